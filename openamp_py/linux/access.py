"""How this package touches the machine: the real one with ``os``, a fake one plays the kernel.

Paths are those of the machine, ``/sys/class/remoteproc``, wherever its root directory lies. Every
method raises ``OSError`` with the kernel's errno, and nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import os
from functools import partial
from pathlib import PurePosixPath
from typing import Final, Protocol

import trio

ATTRIBUTE_SIZE: Final = 4096
"""Bytes of a sysfs attribute: one page, which Linux never exceeds."""

CREATE_ENDPOINT: Final = 0x4028_B501
"""RPMSG_CREATE_EPT_IOCTL on a control node; takes struct rpmsg_endpoint_info."""

DESTROY_ENDPOINT: Final = 0xB502
"""RPMSG_DESTROY_EPT_IOCTL on an endpoint's node."""

CREATE_DEVICE: Final = 0x4028_B503
"""RPMSG_CREATE_DEV_IOCTL on a control node (5.18 and newer); takes the same structure."""

RELEASE_DEVICE: Final = 0x4028_B504
"""RPMSG_RELEASE_DEV_IOCTL on a control node; takes the same structure."""


class Node(Protocol):
    """A device node that is open for reading and writing and never blocks."""

    def fileno(self) -> int:
        """What ``trio.lowlevel.wait_readable`` waits for; nothing else is done with it.

        A ttyRPMSG is a tty here, too, so that ``termios`` takes it.
        """
        ...

    def read(self, size: int) -> bytes:
        """One message, cut to `size`; b"" is an empty message, not an end.

        On a tty: what is there; b"" is the end of it.
        """
        ...

    def write(self, data: bytes) -> int:
        """Sends one message, and returns its length; on a tty it may be less."""
        ...

    def ioctl(self, request: int, argument: bytes | int = 0) -> bytes:
        """Controls the node; the structure as the kernel left it, empty for a number."""
        ...

    def close(self) -> None:
        """Closes the node; again: nothing happens."""
        ...


class Access(Protocol):
    """A machine's files and nodes."""

    def local(self, path: str) -> str:
        """Where this program has that file of the machine, to be written without it."""
        ...

    def names(self, directory: str) -> list[str]:
        """The names in a directory, in no order."""
        ...

    def read(self, path: str, size: int = ATTRIBUTE_SIZE, offset: int = 0) -> bytes:
        """What a file has from `offset`; less than `size` is its end."""
        ...

    def resolve(self, path: str) -> str:
        """The path without symbolic links, as the machine sees it."""
        ...

    def allowed(self, path: str, mode: int) -> bool:
        """Whether a file is there and this user may do that with it (``os.R_OK``...)."""
        ...

    def stat(self, path: str) -> os.stat_result:
        """Whose file it is, and of what kind; follows symbolic links."""
        ...

    async def write(self, path: str, data: bytes) -> None:
        """Writes a file at once; ``start`` comes back when the core runs, or with its errno.

        Cancellation: before the write only. What the kernel has begun, it ends.
        """
        ...

    def open_node(self, path: str) -> Node:
        """Opens a device node."""
        ...


class MachineNode:
    """A node of the machine that this runs on. Whoever opened it closes it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def read(self, size: int) -> bytes:
        return os.read(self._fd, size)

    def write(self, data: bytes) -> int:
        return os.write(self._fd, data)

    def ioctl(self, request: int, argument: bytes | int = 0) -> bytes:
        result = fcntl.ioctl(self._fd, request, argument)
        return result if isinstance(result, bytes) else b""

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd != -1:
            os.close(fd)


class MachineAccess:
    """The machine that this runs on, or one whose root directory is mounted here.

    Args:
        root: where its /sys, /dev and /proc are.
    """

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self._root = os.path.realpath(root)

    def local(self, path: str) -> str:
        if "\0" in path:  # some are made of names that a firmware chose
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return os.path.join(self._root, path.lstrip("/"))

    def names(self, directory: str) -> list[str]:
        return os.listdir(self.local(directory))

    def read(self, path: str, size: int = ATTRIBUTE_SIZE, offset: int = 0) -> bytes:
        # A FIFO or a tty in the place of a file must not hold us.
        fd = os.open(self.local(path), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            found = b""
            while len(found) < size:
                part = os.pread(fd, size - len(found), offset + len(found))
                if not part:
                    break
                found += part
            return found
        finally:
            os.close(fd)

    def resolve(self, path: str) -> str:
        real = PurePosixPath(os.path.realpath(self.local(path), strict=True))
        if not real.is_relative_to(self._root):
            return str(real)  # an absolute link of another root: nothing below it is known here
        return str(PurePosixPath("/") / real.relative_to(self._root))

    def allowed(self, path: str, mode: int) -> bool:
        return "\0" not in path and os.access(self.local(path), mode)

    def stat(self, path: str) -> os.stat_result:
        return os.stat(self.local(path))

    async def write(self, path: str, data: bytes) -> None:
        await trio.to_thread.run_sync(partial(self._write, self.local(path), data))

    @staticmethod
    def _write(path: str, data: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, data)  # one call: the kernel takes each as a command of its own
        finally:
            os.close(fd)

    def open_node(self, path: str) -> Node:
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return MachineNode(os.open(self.local(path), flags))
