"""What a vhost-user front end hands over as descriptors: memory, kicks, calls.

Each is looked at before it is used, for the front end may send anything: reading, writing and
closing never wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import stat
import struct
from collections.abc import Sequence

import trio

from openamp_py.errors import VhostUserError
from openamp_py.memory import MemoryMap, Region
from openamp_py.platforms.vhost_wire import MemoryPlace, Request, check_descriptors

_EVENTFD = "anon_inode:[eventfd]"

# What an eventfd is read and written by, and what User-Mode Linux reads for each call.
_ONE = struct.pack("=Q", 1)


class Descriptors:
    """Descriptors that came with one request: those that nobody took are closed with it."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def __len__(self) -> int:
        return len(self._fds)

    def add(self, fds: Sequence[int]) -> None:
        """More have come."""
        self._fds += fds

    def take(self) -> int:
        """The first one; the caller owns it from now on."""
        return self._fds.pop(0)

    def close(self) -> None:
        """Closes those that are left. Idempotent."""
        while self._fds:
            os.close(self._fds.pop())


class Kick:
    """An eventfd by which the front end kicks a vring.

    Owned by the front end's session, which closes it. Each one is listened to by one task.
    """

    def __init__(self, fd: int, index: int) -> None:
        """Owns `fd` from now on.

        Raises:
            VhostUserError: it is not an eventfd, or one that counts down.
        """
        self._fd = fd
        self._count = bytearray(8)
        try:
            if not _is_eventfd(fd):
                raise VhostUserError(f"the kick descriptor of vring {index} is not an eventfd")
            if _counts_down(fd):
                raise VhostUserError(
                    f"the kick descriptor of vring {index} is an eventfd that is a semaphore; one "
                    "write may keep it readable for ever"
                )
        except BaseException:
            os.close(fd)
            raise

    async def wait(self) -> None:
        """Waits for a kick and takes it.

        Raises:
            trio.ClosedResourceError: it was closed.
        """
        while True:
            if self._fd < 0:
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_readable(self._fd)
            # The front end shares the file's flags, so only the call itself can refuse to wait.
            with contextlib.suppress(BlockingIOError):
                os.preadv(self._fd, [self._count], -1, os.RWF_NOWAIT)
                return

    def close(self) -> None:
        """Closes it; who waits hears of that. Idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            trio.lowlevel.notify_closing(fd)
            os.close(fd)


class Call:
    """An eventfd or a socket by which the driver of a vring is interrupted.

    Owned by the front end's session, which closes it.
    """

    def __init__(self, fd: int, index: int) -> None:
        """Owns `fd` from now on.

        Raises:
            VhostUserError: it is neither.
        """
        self._fd = fd
        self._socket: socket.socket | None = None
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                self._socket = socket.socket(fileno=fd)
            elif _is_eventfd(fd):
                os.set_blocking(fd, False)
            else:
                raise VhostUserError(
                    f"the call descriptor of vring {index} is neither an eventfd nor a socket"
                )
        except OSError as error:
            os.close(fd)
            raise VhostUserError(f"the call descriptor of vring {index}: {error}") from error
        except BaseException:
            os.close(fd)
            raise

    def call(self) -> None:
        """Interrupts the driver. One that has heard nothing for so long that it is full will."""
        with contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.send(_ONE, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            elif not os.get_blocking(self._fd):
                # One that the front end made blocking again is not written: it might be full.
                os.write(self._fd, _ONE)

    def close(self) -> None:
        """Closes it. Idempotent."""
        if self._fd >= 0:
            if self._socket is not None:
                self._socket.close()
            else:
                os.close(self._fd)
            self._fd = -1


class BackChannel:
    """The socket for our own requests to the front end.

    Owned by the front end's session, which closes it.
    """

    def __init__(self, fd: int) -> None:
        """Owns `fd` from now on.

        Raises:
            VhostUserError: it is not a socket.
        """
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                raise VhostUserError("the descriptor of SET_BACKEND_REQ_FD is not a socket")
            self._socket = socket.socket(fileno=fd)
        except OSError as error:
            os.close(fd)
            raise VhostUserError(f"the descriptor of SET_BACKEND_REQ_FD: {error}") from error
        except BaseException:
            os.close(fd)
            raise

    def send(self, message: bytes) -> None:
        """Sends a request, unless so many are unheard that there is no room for one more."""
        with contextlib.suppress(OSError):
            self._socket.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """Closes it. Idempotent."""
        self._socket.close()


def map_memory(
    places: Sequence[MemoryPlace], descriptors: Descriptors, *, sealed: bool
) -> MemoryMap:
    """Maps the guest's memory: device addresses are the front end's own, physical the guest's.

    A file that is cut off later kills whoever touches what is gone, with SIGBUS. So a memfd that
    takes seals is sealed against it first. Other files (User-Mode Linux has one in /dev/shm) take
    none, and their owner has to be trusted not to do it.

    Args:
        sealed: refuse memory that can be cut off.

    Raises:
        VhostUserError: too few or too many files, a region that its file does not have, or a file
            that cannot be mapped or, if that is asked for, sealed.
    """
    check_descriptors(Request.SET_MEM_TABLE, len(descriptors), len(places))
    regions = []
    for number, place in enumerate(places):
        fd = descriptors.take()
        try:
            view = _map(fd, place, sealed=sealed)
        except (OSError, ValueError, OverflowError) as error:
            raise VhostUserError(f"the memory of {place} cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        regions.append(Region(f"guest {number}", place.user_va, place.guest_pa, view))
    return MemoryMap(regions)


def _map(fd: int, place: MemoryPlace, *, sealed: bool) -> memoryview:
    """
    Raises:
        VhostUserError: the file is none that can hold memory, or is too small.
        OSError: it cannot be mapped.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise VhostUserError(f"the memory of {place} is not a file")
    if not _seal(fd) and sealed:
        raise VhostUserError(
            f"the memory of {place} can be cut off under us, and only sealed memory is wanted: "
            "QEMU has that as memory-backend-memfd"
        )
    size = os.fstat(fd).st_size  # which is final now, where there is a seal
    if place.offset + place.size > size:
        raise VhostUserError(
            f"the memory of {place}, at {place.offset:#x} of its file, ends at "
            f"{place.offset + place.size:#x}; the file has {size:#x} bytes"
        )
    # Huge pages are mapped and unmapped as a whole.
    unit = max(mmap.ALLOCATIONGRANULARITY, status.st_blksize)
    start = place.offset // unit * unit
    end = min(-(-(place.offset + place.size) // unit) * unit, size)
    mapped = memoryview(mmap.mmap(fd, end - start, offset=start))
    return mapped[place.offset - start :][: place.size]


def _seal(fd: int) -> bool:
    """Makes sure that a file can never be cut off. Returns whether it is so."""
    with contextlib.suppress(OSError):  # it takes no seals
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False


def _is_eventfd(fd: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == _EVENTFD
    except OSError:  # a file whose path is longer than any name that can be read
        return False


def _counts_down(fd: int) -> bool:
    """Whether reading an eventfd takes one of many, as far as this kernel tells (since 6.5)."""
    with open(f"/proc/self/fdinfo/{fd}") as lines:
        return any(line.split() == ["eventfd-semaphore:", "1"] for line in lines)
