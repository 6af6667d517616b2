"""A guest: a User-Mode Linux that boots in a fraction of a second and runs scripts for a test."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import trio

from openamp_py.background import open_background
from tests.kernel.build import Kernel

BOOT_LIMIT = 20.0
SCRIPT_LIMIT = 20.0
"""Seconds until a guest that says nothing has failed the test."""

_MARK = re.compile(rb"@@(\d+) (\d+)@@")
_PANIC = b"Kernel panic"
_TAIL = 3000


class GuestError(Exception):
    """The guest, or a script in it, failed. The message ends with what it said."""


class Guest:
    """A running guest. Made by `open_guest`, which also ends it. One script at a time.

    Attributes:
        directory: what is /work in the guest.
        log: what the kernel wrote until now.
    """

    def __init__(self, directory: Path, process: trio.Process) -> None:
        self.directory = directory
        self.process = process
        self.log = b""
        self._number = 0
        self._changed = trio.Event()
        self._ended = False

    async def read(self) -> None:
        """Takes what the guest writes, until it ends."""
        assert self.process.stdout is not None, "a pipe"
        async for data in self.process.stdout:
            self.log += data
            self._wake()
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def wait_mark(self, number: int, limit: float, silence: float = math.inf) -> int:
        """Waits until script `number` has ended (0: until the guest is up). Returns its status.

        Args:
            silence: how long the kernel may say nothing meanwhile.

        Raises:
            GuestError: the guest panicked or ended before, or it took too long.
        """
        end = trio.current_time() + limit
        with trio.CancelScope() as scope:
            while True:
                scope.deadline = min(end, trio.current_time() + silence)
                for mark in _MARK.finditer(self.log):
                    if int(mark[1]) == number:
                        return int(mark[2])
                if _PANIC in self.log or self._ended:
                    with trio.move_on_after(0.2):  # what else it says
                        while not self._ended:
                            await self._changed.wait()
                    raise GuestError(f"the guest ended in script {number}: {self.tail()}")
                await self._changed.wait()
        raise GuestError(f"script {number} did not end in time: {self.tail()}")

    async def wait_log(self, text: str, *, count: int = 1, limit: float = SCRIPT_LIMIT) -> None:
        """Waits until the kernel has said something, so many times."""
        with trio.move_on_after(limit):
            while self.log.count(text.encode()) < count:
                if self._ended:
                    raise GuestError(f"the guest ended without {text!r}: {self.tail()}")
                await self._changed.wait()
            return
        raise GuestError(f"no {text!r} within {limit} s: {self.tail()}")

    def tail(self) -> str:
        """The end of what the kernel wrote."""
        return self.log[-_TAIL:].decode(errors="replace")

    async def run(
        self, script: str, *, limit: float = SCRIPT_LIMIT, silence: float = math.inf
    ) -> str:
        """Runs a shell script in the guest, and returns what it wrote.

        Raises:
            GuestError: it failed, or took too long, or the guest ended.
        """
        status, output = await self.run_any(script, limit=limit, silence=silence)
        if status:
            raise GuestError(f"{script!r} gave {status}: {output}\n{self.tail()}")
        return output

    async def run_any(
        self, script: str, *, limit: float = SCRIPT_LIMIT, silence: float = math.inf
    ) -> tuple[int, str]:
        """Runs a shell script that may fail. Returns its status and what it wrote.

        Raises:
            GuestError: it took too long, or the guest ended.
        """
        assert self.process.stdin is not None, "a pipe"
        self._number += 1
        number = self._number
        (self.directory / f"{number}.sh").write_text(script)
        try:
            await self.process.stdin.send_all(b"%d\n" % number)
        except trio.BrokenResourceError:
            raise GuestError(f"the guest ended before script {number}: {self.tail()}") from None
        status = await self.wait_mark(number, limit, silence)
        return status, (self.directory / f"{number}.out").read_text(errors="replace")

    async def python(
        self, source: str, *, limit: float = SCRIPT_LIMIT, silence: float = math.inf
    ) -> str:
        """Runs a program on this very Python, with its packages, and returns what it wrote.

        Raises:
            GuestError: it failed, or took too long, or the guest ended.
        """
        program = self.directory / f"{self._number + 1}.py"
        program.write_text(source)
        return await self.run(on_host_python(str(program)), limit=limit, silence=silence)


def on_host_python(arguments: str) -> str:
    """The command that runs the host's Python, this very one, in the guest."""
    return f"chroot /host {sys.executable} {arguments}"


@contextlib.asynccontextmanager
async def open_guest(
    kernel: Kernel,
    directory: Path,
    devices: Iterable[tuple[Path, int]] = (),
    arguments: Iterable[str] = (),
    memory: str = "64M",
) -> AsyncIterator[Guest]:
    """Boots a guest, for an `async with` block; at its end the guest is killed.

    Args:
        directory: what is /work in the guest, and where it looks for firmware.
        devices: sockets of vhost-user devices that somebody listens on, and their virtio ids.
        arguments: more for the kernel's command line.

    Raises:
        GuestError: it does not come up.
    """
    command = [
        # With random addresses the guest's memory would begin anywhere in its first gigabyte.
        *("setarch", "--addr-no-randomize"),
        *(str(kernel.linux), f"mem={memory}", f"initrd={kernel.initrd}"),
        *("con=null", "con0=fd:0,fd:1", f"uml_dir={directory}/", f"OPENAMP_WORK={directory}"),
        *(f"virtio_uml.device={path}:{number}" for path, number in devices),
        *arguments,
    ]
    process = await trio.lowlevel.open_process(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        cwd=directory,
    )
    try:
        guest = Guest(directory, process)
        async with open_background() as nursery:
            nursery.start_soon(guest.read)
            await guest.wait_mark(0, BOOT_LIMIT)
            yield guest
    finally:
        # The kernel is a group of processes, of which some trace others.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with trio.CancelScope(shield=True):
            await process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None, "a pipe"
            await trio.aclose_forcefully(pipe)
