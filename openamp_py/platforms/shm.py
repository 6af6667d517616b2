"""The link of OpenAMP's Linux demo platform: a shared-memory file and a Unix stream socket.

To the byte what the C programs speak (machine "generic" of the OpenAMP library), as
either end of the socket and in either role. Nothing is booted: the peer is a program
that runs already.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl

import trio

from openamp_py.errors import PeerGoneError, PlatformError
from openamp_py.memory import MemoryMap, SharedMemory
from openamp_py.platforms import demo
from openamp_py.platforms.doorbell import Doorbell, DoorbellLink
from openamp_py.platforms.unix_sockets import accept, connect, open_listener
from openamp_py.remoteproc.resource_table import encode_table
from openamp_py.virtio import Handshake

KICK: Final = 1
"""The byte of every kick; the demo platform sends no ids."""


@dataclass(frozen=True, slots=True)
class ShmAddress:
    """Where a link's shared memory and doorbell are: paths, or inherited descriptors.

    Written ``shm:MEMORY?doorbell=DOORBELL[&listen=1]``, where MEMORY is a path or ``fd:N``
    and DOORBELL is ``unix:PATH`` or ``fd:N``.

    Args:
        memory: the shared-memory file.
        doorbell: the socket.
        listen: create the socket and the table, and wait for the peer to connect.
    """

    memory: str | int
    doorbell: str | int
    listen: bool = False

    @classmethod
    def parse(cls, url: str) -> ShmAddress:
        """Reads a URL.

        Raises:
            ValueError: it is not one of this form; says what it lacks.
        """
        form = "shm:PATH?doorbell=unix:PATH[&listen=1]"
        scheme, _, rest = url.partition(":")
        memory, _, query = rest.partition("?")
        try:
            options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
        except ValueError:
            raise ValueError(f"{url!r}: the part after '?' is not key=value; want {form}") from None
        doorbell = options.pop("doorbell", "")
        listen = options.pop("listen", "0")
        if scheme != "shm" or not memory:
            raise ValueError(f"{url!r} is not a link; want {form}")
        if options:
            raise ValueError(f"{url!r}: unknown option {next(iter(options))!r}; want {form}")
        if listen not in ("0", "1"):
            raise ValueError(f"{url!r}: listen={listen}; 0 or 1 are possible")
        kind, _, where = doorbell.partition(":")
        if not where or kind not in ("unix", "fd"):
            raise ValueError(f"{url!r}: doorbell {doorbell!r}; want unix:PATH or fd:N")
        address = cls(
            memory=_descriptor(url, memory[3:]) if memory.startswith("fd:") else memory,
            doorbell=_descriptor(url, where) if kind == "fd" else where,
            listen=listen == "1",
        )
        if address.listen and not isinstance(address.doorbell, str):
            raise ValueError(f"{url!r}: an inherited doorbell cannot listen")
        return address


def _descriptor(url: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{url!r}: {text!r} is not the number of a descriptor")
    return int(text)


class ShmLink(DoorbellLink):
    """One end of such a link. Closed by whoever made it, after the devices on it.

    It runs once: when the other side has left it is to be closed, and a new one made.

    Args:
        address: where it is. Descriptors named in it are owned by the link that runs.
    """

    name = "shm link"
    table_da: int | None = demo.TABLE_DA
    buffer_area: tuple[int, int] | None = None  # until the memory is mapped
    handshake = Handshake.OPENAMP
    memory: MemoryMap

    def __init__(self, address: ShmAddress) -> None:
        self._address = address
        self._stack = contextlib.ExitStack()

    async def run(
        self,
        notified: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listens or connects, and then hears kicks until the peer closes. See `Link.run`.

        Raises:
            PlatformError: the file or the socket cannot be used.
            PeerGoneError: the peer left; on this link nobody says goodbye otherwise.
        """
        address = self._address
        if address.listen:
            sock = await self._accept(str(address.doorbell))
        elif isinstance(address.doorbell, int):
            sock = _adopt(address.doorbell)
        else:
            sock = await connect(address.doorbell, "doorbell")
        self.doorbell = Doorbell(sock, constant=KICK)
        with contextlib.closing(self.doorbell):
            if not address.listen:
                # The peer writes its table before it listens, so from here on it is there.
                self._map(os.O_RDWR)
            task_status.started()
            await self.doorbell.run(notified)
        raise PeerGoneError(f"{self.name}: the other side closed its end of the doorbell")

    def close(self) -> None:
        """Lets go of the memory. Idempotent."""
        self._stack.close()

    def _map(self, flags: int) -> None:
        where = self._address.memory
        try:
            fd = where if isinstance(where, int) else os.open(where, flags | os.O_CLOEXEC, 0o600)
            try:
                if flags & os.O_CREAT:
                    _claim(fd)
                    os.ftruncate(fd, demo.MEMORY_SIZE)
                size = os.fstat(fd).st_size
                try:
                    self.buffer_area = demo.buffer_area(size)
                except ValueError as error:
                    raise PlatformError(f"{where}: {error}") from None
            except BaseException:
                os.close(fd)
                raise
            shared = SharedMemory(fd, size)
        except OSError as error:
            raise PlatformError(f"shared memory {where}: {error.strerror or error}") from error
        self._stack.callback(shared.close)
        if flags & os.O_CREAT:
            # By hand, since the mapping may outlive us and would keep the claim.
            self._stack.callback(_lock, fd, fcntl.F_UNLCK)
        self.memory = MemoryMap([shared.region("shm", 0)])

    async def _accept(self, path: str) -> socket.socket:
        """Lays the table, makes the socket, waits for one peer, and hears no other."""
        self._map(os.O_RDWR | os.O_CREAT)
        table = encode_table(demo.TABLE)
        target = self.memory.find_da(demo.TABLE_DA, len(table))
        assert target is not None, "the layout has room for its table"
        target[:] = table
        with open_listener(path, "doorbell") as listener:
            return await accept(listener)


# struct flock of fcntl(2): type and whence short, start and length off_t, pid
_FLOCK = struct.Struct("@hhqqi")


def _lock(fd: int, kind: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 1, 0))


def _claim(fd: int) -> None:
    """Makes sure that no other listener works in this memory.

    Raises:
        PlatformError: another one does.
    """
    try:
        _lock(fd, fcntl.F_WRLCK)
    except BlockingIOError:
        raise PlatformError(
            "another program listens on this shared memory; choose another file, or end it"
        ) from None


def _adopt(descriptor: int) -> socket.socket:
    try:
        return socket.socket(fileno=descriptor)
    except OSError as error:
        raise PlatformError(f"doorbell fd:{descriptor}: {error.strerror or error}") from error
