"""One QEMU process: how it is started, what goes to and fro, and how it is ended."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Final

import trio

from openamp_py import firmware as shipped
from openamp_py.constants import EM_RISCV
from openamp_py.errors import PlatformError
from openamp_py.memory import SharedMemory
from openamp_py.platforms.boards import Board
from openamp_py.platforms.child import spawn
from openamp_py.platforms.doorbell import Doorbell, create_pair
from openamp_py.platforms.qmp import Qmp

MIN_VERSION: Final = (7, 0)
"""The oldest QEMU that is used; older ones were not tried."""

_PIECE: Final = 4096

_QUIET = ("-display", "none", "-nodefaults", "-no-user-config", "-monitor", "none")
_SANDBOX = (
    "-sandbox",
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
)


def find_program(board: Board) -> str:
    """Where a board's QEMU is installed.

    Raises:
        PlatformError: it is not.
    """
    found = shutil.which(board.program)
    if found is None:
        raise PlatformError(
            f"{board.name} ({board.cpu}) needs {board.program}, which is not installed: "
            f"apt install {board.package}"
        )
    return found


class Tail:
    """The end of a text that may be endless."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()

    def add(self, data: bytes) -> None:
        """More of it."""
        self._data += data
        del self._data[: max(0, len(self._data) - self._limit)]

    @property
    def text(self) -> str:
        """The last of it; what is no UTF-8 is shown as an escape sequence."""
        return self._data.decode(errors="backslashreplace")


class Machine:
    """A QEMU that was started and executes nothing yet.

    Made by a QemuPlatform; worked, and closed, by one core.

    Args:
        board: which board it is.
        ram: all of the RAM that is shared.
        private: what is loaded into RAM that is not: a device address and the bytes.
        arguments: further options.
        listener: where QEMU is to wait for a debugger.
        wants_interrupts: whether `raise_interrupt` is to work.

    Raises:
        PlatformError: it cannot be started.
    """

    def __init__(
        self,
        board: Board,
        ram: SharedMemory,
        private: Sequence[tuple[int, memoryview]],
        arguments: Sequence[str],
        *,
        listener: socket.socket | None = None,
        wants_interrupts: bool = False,
    ) -> None:
        self.board = board
        self.wants_reset = False
        self._stack = ExitStack()
        self._inherited: list[int] = [ram.fd]
        try:
            with ExitStack() as theirs:
                command = [
                    *(str(shipped.path("tether")), str(os.getpid()), find_program(board), "-S"),
                    *(*_QUIET, *_SANDBOX, *board.options, *arguments),
                    *("-machine", f"{board.machine},memory-backend=ram"),
                    *("-object", _backend(ram)),
                ]
                doorbell = self._connect(theirs, "doorbell", command)
                console = self._connect(theirs, "console", command)
                for number in range(max(board.doorbell, board.console or 0) + 1):
                    names = {board.doorbell: "doorbell", board.console: "console"}
                    name = names.get(number)
                    command += ["-serial", "null" if name is None else f"chardev:{name}"]
                qmp = self._connect(theirs, "qmp", command)
                command += ["-mon", "chardev=qmp,mode=control"]
                self._qtest: socket.socket | None = None
                if wants_interrupts:
                    self._qtest = self._connect(theirs, "qtest", command)
                    self._qtest.setblocking(False)
                    command += ["-object", "qtest,id=qtest0,chardev=qtest,log=/dev/null"]
                if listener is not None:
                    self._inherited.append(listener.fileno())
                    command += _chardev("gdb", f"{listener.fileno()},server=on,wait=off,nodelay=on")
                    command += ["-gdb", "chardev:gdb"]
                for da, data in private:
                    command += self._load(theirs, da, data)
                # Through this one what private RAM holds comes back.
                self.scratch = self._create_file(self._stack) if private else None
                words, their_words = os.pipe()
                theirs.callback(os.close, their_words)
                self._stack.callback(os.close, words)
                os.set_blocking(words, False)
                self.process = spawn(command, self._inherited, stderr=their_words)
        except OSError as error:
            self._stack.close()
            raise PlatformError(f"{board.program} cannot be started: {error.strerror}") from error
        except BaseException:
            self._stack.close()
            raise
        self._stack.callback(self._kill)
        self._words = words
        self._console = console
        self.doorbell = Doorbell(doorbell)
        self.qmp = Qmp(qmp)

    def _connect(self, theirs: ExitStack, name: str, command: list[str]) -> socket.socket:
        """A socket whose other end is QEMU's character device of that name."""
        ours, other = create_pair()
        theirs.callback(other.close)
        self._stack.callback(ours.close)
        self._inherited.append(other.fileno())
        command += _chardev(name, str(other.fileno()))
        return ours

    def _load(self, theirs: ExitStack, da: int, data: memoryview) -> list[str]:
        """Options that load bytes at a device address at each reset."""
        fd = self._create_file(theirs)
        while data:
            data = data[os.write(fd, data) :]
        return ["-device", f"loader,file=/proc/self/fd/{fd},addr={da:#x},force-raw=on"]

    def _create_file(self, stack: ExitStack) -> int:
        """A file without a name that QEMU can open."""
        fd = os.memfd_create("openamp-private")
        stack.callback(os.close, fd)
        self._inherited.append(fd)
        return fd

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    async def listen(self, console: Tail, words: Tail) -> None:
        """Takes what the console and QEMU itself say, as long as they are there."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_drain, self._console.fileno(), console)
            nursery.start_soon(_drain, self._words, words)
            if self._qtest is not None:
                nursery.start_soon(_drain, self._qtest.fileno(), Tail(0))

    def read_rest(self, words: Tail) -> None:
        """Takes what QEMU has said before it ended."""
        try:
            while data := os.read(self._words, _PIECE):
                words.add(data)
        except BlockingIOError:
            pass

    def raise_interrupt(self, line: int) -> None:
        """Pulses an input of the board's interrupt controller. Never blocks."""
        assert self._qtest is not None, "made with it"
        # A PLIC takes a fallen line back; a NVIC pends again for one that stays raised.
        levels = (0, 1) if self.board.elf_machine == EM_RISCV else (1, 0)
        path = self.board.interrupts
        lines = (f"set_irq_in {path} unnamed-gpio-in {line} {level}\n" for level in levels)
        with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            self._qtest.send("".join(lines).encode())

    def close(self) -> None:
        """Ends the process and takes all that was its own away. Idempotent."""
        self._stack.close()

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait()


def _backend(ram: SharedMemory) -> str:
    path = f"/proc/self/fd/{ram.fd}"
    return f"memory-backend-file,id=ram,size={ram.size},mem-path={path},share=on"


def _chardev(name: str, where: str) -> list[str]:
    return ["-chardev", f"socket,id={name},fd={where}"]


async def _drain(fd: int, tail: Tail) -> None:
    while True:
        await trio.lowlevel.wait_readable(fd)
        try:
            data = os.read(fd, _PIECE)
        except BlockingIOError:
            continue
        except OSError:
            return
        if not data:
            return
        tail.add(data)
