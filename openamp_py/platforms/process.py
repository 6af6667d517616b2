"""A remote in a process of its own: a Python program on the other end of shared memory."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from openamp_py.errors import CoreDiedError
from openamp_py.memory import MemoryMap
from openamp_py.platforms import demo
from openamp_py.platforms.child import SignalledCore, create_memory, killed, run_child, spawn
from openamp_py.platforms.doorbell import Doorbell, create_pair
from openamp_py.platforms.shm import KICK
from openamp_py.remoteproc.elf import Firmware
from openamp_py.remoteproc.platform import Platform
from openamp_py.virtio import Handshake

URL = "{url}"
"""Stands in a command for the link's URL."""

_RUN_MODULE = (
    "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def module_command(module: str, *arguments: str) -> tuple[str, ...]:
    """The command that runs a module of this very package, whatever directory we are in."""
    home = str(Path(__file__).resolve().parents[2])
    return (sys.executable, "-c", _RUN_MODULE, home, module, *arguments)


ECHO_COMMAND = module_command("openamp_py", "serve", "echo", "--core", URL)
"""The echo remote as a process."""


class ProcessPlatform(Platform):
    """Memory and processes for remotes that open a `shm:` URL.

    Memory and doorbell are inherited descriptors, so there is no file and no path.

    Args:
        command: the program to run; an argument "{url}" is replaced by the link's URL.
        memory_size: bytes of shared memory; larger buffers than usual need more.

    Raises:
        ValueError: the memory is too small.
    """

    name = "process"

    def __init__(
        self, command: Sequence[str] = ECHO_COMMAND, *, memory_size: int = demo.MEMORY_SIZE
    ) -> None:
        self.buffer_area = demo.buffer_area(memory_size)
        self._command = tuple(command)
        self._shared = create_memory("openamp-process", memory_size)
        self.memory = MemoryMap([self._shared.region("shm", 0)])

    def check(self, firmware: Firmware) -> None:
        """Raises ImageError for an image with machine code."""
        demo.check_python(self.name, firmware)

    def create_core(self, firmware: Firmware) -> ProcessCore:
        """A process that will join the loaded table's devices."""
        return ProcessCore(self.memory, self._shared.fd, self._command, self.buffer_area)

    def close(self) -> None:
        """Gives the memory back. Idempotent."""
        self._shared.close()


class ProcessCore(SignalledCore):
    """One run of the program, seen from the host.

    A program that looks at its doorbell sees the host's death as its end; one that does not
    outlives a host that was killed. Suspended, interrupted and stopped is all that it started,
    unless it left the program's process group.
    """

    name = "process core"
    table_da: int | None = demo.TABLE_DA
    handshake = Handshake.OPENAMP

    def __init__(
        self,
        memory: MemoryMap,
        fd: int,
        command: Sequence[str],
        buffer_area: tuple[int, int] | None,
    ) -> None:
        self.memory = memory
        self.buffer_area = buffer_area
        self._fd = fd
        self._command = command

    def _signal(self, number: signal.Signals) -> None:
        if self.pid is None or not self._alive:
            raise ProcessLookupError
        if os.getpgid(self.pid) != self.pid:  # it left its group
            os.kill(self.pid, number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    async def run(
        self,
        notified: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Starts the program and listens to it until it ends. See `Link.run`."""
        with contextlib.ExitStack() as stack:
            ours, theirs = create_pair()
            stack.callback(theirs.close)
            self.doorbell = Doorbell(ours, constant=KICK)
            stack.callback(self.doorbell.close)
            url = f"shm:fd:{self._fd}?doorbell=fd:{theirs.fileno()}"
            process = spawn(
                [url if argument == URL else argument for argument in self._command],
                pass_fds=(self._fd, theirs.fileno()),
            )
            theirs.close()
            self.pid = process.pid
            self._alive = True
            stack.callback(setattr, self, "_alive", False)
            await run_child(process, self.doorbell, notified, task_status)
        if process.returncode < 0:
            raise killed("the core's process", process.returncode)
        if process.returncode:
            raise CoreDiedError(
                f"the core's process ended with exit code {process.returncode}",
                exit_code=process.returncode,
            )
