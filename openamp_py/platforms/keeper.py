"""Native cores that outlive their host: the keeper is their parent, and hands them on.

The protocol is described in ``csrc/native_keeper.c``. The keeper never looks into what one host
leaves for the next: a description of the core, and a note.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import signal
import socket
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import trio

from openamp_py import firmware as shipped
from openamp_py.errors import CoreDiedError, PlatformError
from openamp_py.memory import MemoryMap
from openamp_py.platforms.child import SignalledCore, create_memory, is_stopped, spawn
from openamp_py.platforms.doorbell import Doorbell, create_pair
from openamp_py.platforms.report import REPORT_SIZE, judge

NOTE_LIMIT: Final = 32 * 1024
"""Bytes that a host can leave for the next one."""

# Each message's header: version, kind, number
_HEADER = struct.Struct("=HHI")
_VERSION = 1
_HELLO, _BUSY, _FAILED, _LEFT, _ENDED = range(1, 6)
_TAKE, _LEAVE = 1, 2

# What a hello carries: memory, doorbell, report, the core's pidfd, the keeper's pidfd
_HANDED = 5

# A keeper answers at once. One that does not within so many seconds is stopped, or none of ours.
_ANSWER_TIME = 5.0

# A keeper whose core was killed ends; after so many seconds (a stopped one) it is killed too.
_END_GRACE = 1.0


class Description(NamedTuple):
    """What a host has to know of a core that it did not boot."""

    machine: int
    elf_class: int
    ram_da: int
    ram_size: int
    entry: int
    table_da: int | None


# A description: machine, elf_class, ram_da, ram_size, entry, table_da (all ones: none)
_DESCRIPTION = struct.Struct("=IIQQQQ")
_NO_TABLE = (1 << 64) - 1
_MESSAGE_LIMIT = _HEADER.size + _DESCRIPTION.size + NOTE_LIMIT


def encode_description(description: Description) -> bytes:
    """The bytes that a host leaves before its note."""
    table_da = _NO_TABLE if description.table_da is None else description.table_da
    return _DESCRIPTION.pack(*description[:5], table_da)


def decode_description_untrusted(data: bytes) -> tuple[Description, bytes]:
    """What a host left: the description, and its note.

    Raises:
        ValueError: it cannot be one; says why.
    """
    if len(data) < _DESCRIPTION.size:
        raise ValueError(f"a description of {len(data)} bytes; it has {_DESCRIPTION.size}")
    machine, elf_class, ram_da, ram_size, entry, table_da = _DESCRIPTION.unpack_from(data)
    if elf_class not in (32, 64):
        raise ValueError(f"a core of ELF class {elf_class}; there are 32 and 64")
    if not ram_size or ram_da + ram_size > 1 << 64:
        raise ValueError(f"RAM of {ram_size:#x} bytes at {ram_da:#x}")
    if table_da != _NO_TABLE and not 0 <= table_da - ram_da < ram_size:
        raise ValueError(f"a table at {table_da:#x}; RAM is {ram_size:#x} bytes at {ram_da:#x}")
    table = None if table_da == _NO_TABLE else table_da
    return (
        Description(machine, elf_class, ram_da, ram_size, entry, table),
        data[_DESCRIPTION.size :],
    )


@dataclass(eq=False)
class Connection:
    """A connection to a keeper, and what it handed over. Owned by a KeptCore, which closes it."""

    control: socket.socket
    memory: int
    doorbell: socket.socket
    report: int
    core: int
    keeper: int
    ended: bool
    left: bytes

    def close(self) -> None:
        """Closes everything, the connection last: the next host finds the doorbell unheard."""
        self.doorbell.close()
        for descriptor in (self.memory, self.report, self.core, self.keeper):
            os.close(descriptor)
        self.control.close()


async def start_keeper(path: str, memory: int, entry: int, window: str) -> Connection:
    """Starts a keeper, and it the core; the core ends with this process until it is left.

    Args:
        path: of the socket on which the keeper will listen.
        memory: descriptor of the RAM.
        entry: where the core begins.
        window: where the RAM is, for native-core.

    Raises:
        PlatformError: something runs there already, or cannot be started.
    """
    control = _spawn_keeper(path, memory, entry, window)
    try:
        # Shielded: who is cancelled gets a core all the same, and can see to its end.
        with trio.CancelScope(shield=True):
            connection = await _receive_hello(control, path)
    except BaseException:
        control.close()  # the keeper ends, and frees the path
        raise
    return connection


def _spawn_keeper(path: str, memory: int, entry: int, window: str) -> socket.socket:
    programs = shipped.path("native-keeper"), shipped.path("native-core")
    with contextlib.ExitStack() as failing, contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(path))
        failing.callback(_unlink, path)
        try:
            control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise PlatformError(f"the core's keeper: {error.strerror}") from error
        failing.enter_context(control)
        stack.enter_context(theirs)
        control.setblocking(False)
        doorbells = create_pair()
        for doorbell in doorbells:
            stack.enter_context(doorbell)
        # Memory of just its size: still there after any death, and never more than that.
        report = create_memory("openamp-report", REPORT_SIZE)
        stack.callback(report.close)
        descriptors = [
            listener.fileno(),
            theirs.fileno(),
            doorbells[0].fileno(),
            memory,
            doorbells[1].fileno(),
            report.fd,
        ]
        process = spawn(
            [
                programs[0],
                os.path.abspath(path),
                *map(str, descriptors),
                programs[1],
                hex(entry),
                window,
            ],
            pass_fds=descriptors,
        )
        process.wait()  # it ends as soon as it has forked the keeper
        failing.pop_all()  # the path is the keeper's now
        return control


async def connect_keeper(path: str) -> tuple[Connection, Description, bytes]:
    """Asks a keeper for its core. Until the core is taken, to close the connection changes nothing.

    Returns:
        The connection, and the description and the note that the last host left.

    Raises:
        PlatformError: there is none, or it has another host, or it is none of ours.
    """
    with contextlib.ExitStack() as failing:
        try:
            control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            failing.enter_context(control)
            control.setblocking(False)
            control.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            raise PlatformError(f"no core was left running at {path}") from None
        except BlockingIOError:
            raise PlatformError(f"the keeper at {path} does not accept connections") from None
        except OSError as error:
            raise PlatformError(f"core at {path}: {error.strerror or error}") from error
        # struct ucred: pid, uid, gid
        credentials = control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        owner = struct.unpack("=iII", credentials)[1]
        if owner != os.geteuid():
            raise PlatformError(
                f"the core at {path} belongs to user {owner}; this is user {os.geteuid()}"
            )
        connection = await _receive_hello(control, path)
        failing.pop_all()
        failing.callback(connection.close)
        try:
            description, note = decode_description_untrusted(connection.left)
            size = os.fstat(connection.memory).st_size
            if size != description.ram_size:
                raise ValueError(f"RAM of {description.ram_size:#x} bytes in memory of {size:#x}")
        except ValueError as error:
            raise _not_ours(path, str(error)) from None
        failing.pop_all()
        return connection, description, note


def _not_ours(path: str, why: str) -> PlatformError:
    return PlatformError(f"what listens at {path} is no keeper of ours: {why}")


async def _receive_hello(control: socket.socket, path: str) -> Connection:
    """The keeper's first message, checked.

    Raises:
        PlatformError: it has none for us; `control` is still open.
    """
    room = socket.CMSG_LEN(_HANDED * 4)
    with trio.move_on_after(_ANSWER_TIME) as waiting:
        await trio.lowlevel.wait_readable(control)
    if waiting.cancelled_caught:
        raise PlatformError(f"the keeper at {path} does not answer within {_ANSWER_TIME} s")
    try:
        data, ancillary, flags, _ = control.recvmsg(_MESSAGE_LIMIT, room, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise PlatformError(f"core at {path}: {error.strerror or error}") from error
    with contextlib.ExitStack() as failing:
        descriptors: list[int] = []
        for level, kind, rights in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors += struct.unpack(
                    f"={len(rights) // 4}i", rights[: len(rights) // 4 * 4]
                )
        for descriptor in descriptors:
            failing.callback(os.close, descriptor)
        if not data:
            raise PlatformError(f"the keeper at {path} ended, or does not serve this user")
        version, kind, number = _HEADER.unpack_from(data.ljust(_HEADER.size, b"\0"))
        if version != _VERSION or flags & socket.MSG_TRUNC:
            raise _not_ours(path, f"a message of {len(data)} bytes and version {version}")
        body = data[_HEADER.size :]
        if kind == _BUSY:
            raise PlatformError(f"the core at {path} has another host; that one must detach first")
        if kind == _FAILED:
            what = body[:500].decode(errors="backslashreplace")
            why = os.strerror(number) if number in errno.errorcode else f"error {number}"
            raise PlatformError(f"the core's keeper: {what}: {why}")
        if flags & socket.MSG_CTRUNC and len(descriptors) < _HANDED:
            raise PlatformError(f"core at {path}: there are no descriptors left to take it over")
        if kind != _HELLO or flags & socket.MSG_CTRUNC or len(descriptors) != _HANDED:
            raise _not_ours(path, f"message {kind} with {len(descriptors)} descriptors")
        memory, doorbell, report, core, keeper = descriptors
        try:
            _check_handed(memory, doorbell, report, (core, keeper))
        except (OSError, ValueError) as error:
            raise _not_ours(path, str(error)) from None
        failing.pop_all()
        bell = socket.socket(fileno=doorbell)
        return Connection(control, memory, bell, report, core, keeper, bool(number), body)


def _check_handed(memory: int, doorbell: int, report: int, pidfds: Sequence[int]) -> None:
    """
    Raises:
        OSError: a descriptor is not of its kind.
        ValueError: likewise.
    """
    for name, descriptor in (("memory", memory), ("report", report)):
        # Else whoever has it could take the memory from under our mapping.
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError(f"its {name} can be cut")
    if os.fstat(report).st_size != REPORT_SIZE:
        raise ValueError(f"its report is not of {REPORT_SIZE} bytes")
    if not stat.S_ISSOCK(os.fstat(doorbell).st_mode):
        raise ValueError("its doorbell is no socket")
    bell = socket.socket(fileno=doorbell)
    try:
        if (bell.family, bell.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise ValueError("its doorbell is no Unix stream socket")
        bell.getpeername()  # one without another end would fail with each kick
    finally:
        bell.detach()
    for pidfd in pidfds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, 0)


def _listen(path: str) -> socket.socket:
    """A socket that listens at `path`, for this user only.

    Raises:
        PlatformError: it cannot, or another program does.
    """
    with contextlib.ExitStack() as failing:
        try:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            failing.enter_context(listener)
            with _claim(path):
                _clear(path)
                os.fchmod(listener.fileno(), 0o600)  # so that bind makes the file like this
                listener.bind(path)
                failing.callback(_unlink, path)
                listener.listen(4)
        except OSError as error:
            raise PlatformError(f"rendezvous {path}: {error.strerror or error}") from error
        failing.pop_all()
        return listener


def _claim(path: str) -> socket.socket:
    """What only one program has at a time, so that none takes another's new socket for stale."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        # A name without a file goes with its owner, however that ends.
        claim.bind(b"\0openamp_py " + hashlib.sha256(os.fsencode(os.path.realpath(path))).digest())
    except OSError as error:
        claim.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise PlatformError(
            f"rendezvous {path}: another program starts a core there at this moment"
        ) from None
    return claim


def _clear(path: str) -> None:
    """Removes a socket on which nobody listens.

    Raises:
        PlatformError: somebody does, or it is no socket.
    """
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise PlatformError(f"rendezvous {path}: it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        # A keeper takes a host that comes and goes for what it is.
        found = probe.connect_ex(path)
    if found == errno.EPROTOTYPE:
        raise PlatformError(f"rendezvous {path}: another program listens there")
    if found not in (errno.ECONNREFUSED, errno.ENOENT):  # a keeper may just have ended
        raise PlatformError(
            f"rendezvous {path}: a core was left running there; attach to it, "
            "or choose another path"
        )
    _unlink(path)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


class KeptCore(SignalledCore):
    """One life of a native core under a keeper, as far as this host is there for it.

    Made by a NativePlatform: to boot a core, or with the connection of one that runs. Ends like a
    NativeCore unless it is left by `detach`: then the end of `run` is only the host's own.

    Attributes:
        entry: device address at which the core began.
    """

    name = "native core"

    def __init__(
        self,
        path: str,
        memory: MemoryMap,
        description: Description,
        ram: int,
        *,
        connection: Connection | None = None,
        note: bytes = b"",
        left: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            path: the keeper's socket.
            memory: the RAM.
            description: of the core.
            ram: descriptor of the RAM, to boot from.
            connection: of a core that runs; owned from now on.
            note: what its last host left.
            left: called when the core was left running, and its memory is no longer ours.
        """
        self.memory = memory
        self.table_da = description.table_da
        self.machine = description.machine
        self.elf_class = description.elf_class
        self.entry = description.entry
        self.note = note
        self._path = path
        self._description = description
        self._ram = ram
        self._connection = connection
        self._on_left = left
        self._owned = connection is None
        self._orders = 0
        self._answered = 0
        self._news = trio.Event()  # an order was answered, or the end

    async def run(
        self,
        notified: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Boots the core, or takes it over, and listens to it until it ends. See `Link.run`.

        A core that ended while it had no host is taken over all the same, for its memory, and
        the error comes at once.
        """
        attached = self._connection is not None
        if self._connection is None:
            ram_da, size = self._description.ram_da, self._description.ram_size
            window = f"{ram_da:#x}:{size:#x}:0"
            self._connection = await start_keeper(self._path, self._ram, self.entry, window)
        connection = self._connection
        self.doorbell = Doorbell(connection.doorbell)
        try:
            with contextlib.suppress(ProcessLookupError):
                self.pid = _pid_of(connection.core)
            self._alive = True
            if attached:
                self._order(_TAKE)
                self._owned = True
            task_status.started()
            if attached:
                notified()  # the last host may have heard kicks that were for us
            status = await self._listen(connection, self.doorbell, notified)
            # What it wrote last may have come without a kick that was heard.
            notified()
            try:
                self._judge(status, os.pread(connection.report, REPORT_SIZE, 0))
            except CoreDiedError as error:
                if connection.ended:
                    error.args = (f"{error}, while it had no host",)
                raise
        finally:
            self._alive = False
            self._news.set()
            self._connection = None
            with contextlib.closing(connection):
                if self._owned:
                    await _end(connection)
            if not self._owned:
                self._on_left()

    async def detach(self, note: bytes) -> None:
        """Leaves the core to its keeper. One that is suspended stays so.

        Raises:
            PlatformError: the core does not run, or the note is too long.

        Cancellation: the core stays ours, or is again.
        """
        if len(note) > NOTE_LIMIT:
            raise PlatformError(
                f"a note of {len(note)} bytes for the next host; the limit is {NOTE_LIMIT}"
            )
        await trio.lowlevel.checkpoint()
        # One order at a time: a keeper that is stopped has always room for the core's return.
        await self._wait_answered()
        self._orders += 1
        self._order(_LEAVE, encode_description(self._description) + note)
        try:
            await self._wait_answered()
        except trio.Cancelled:
            self._order(_TAKE)
            raise
        self._owned = False

    async def _wait_answered(self) -> None:
        while self._alive and self._answered < self._orders:
            await self._news.wait()
        if not self._alive:
            raise self._not_running("left running")

    def close(self) -> bool:
        """Lets go of a core that was handed over and never taken; it stays with its keeper.

        Returns:
            Whether there was one.
        """
        if self._connection is None or self._alive:
            return False
        self._connection.close()
        self._connection = None
        return True

    def _signal(self, number: signal.Signals) -> None:
        if self._connection is None or not self._alive:
            raise ProcessLookupError
        signal.pidfd_send_signal(self._connection.core, number)

    def _stopped(self) -> bool:
        if self._connection is None or not self._alive:
            raise ProcessLookupError
        return is_stopped(_pid_of(self._connection.core))

    def _order(self, kind: int, body: bytes = b"") -> None:
        """Tells the keeper something. One that is gone shows in `run`."""
        assert self._connection is not None, "run has begun"
        with contextlib.suppress(OSError):
            self._connection.control.send(_HEADER.pack(_VERSION, kind, self._orders) + body)

    async def _listen(
        self, connection: Connection, doorbell: Doorbell, notified: Callable[[], None]
    ) -> int | None:
        """Hears the core and its keeper until one of them is gone.

        Returns:
            The core's wait status, or None where the keeper cannot say.
        """
        status: int | None = None

        async def hear(nursery: trio.Nursery) -> None:
            nonlocal status
            status = await self._hear_keeper(connection.control)
            nursery.cancel_scope.cancel()

        async def watch(nursery: trio.Nursery) -> None:
            await trio.lowlevel.wait_readable(connection.core)
            await trio.sleep(_END_GRACE)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(doorbell.run, notified)
            nursery.start_soon(hear, nursery)
            nursery.start_soon(watch, nursery)
        return status

    async def _hear_keeper(self, control: socket.socket) -> int | None:
        while True:
            await trio.lowlevel.wait_readable(control)
            try:
                data = control.recv(_HEADER.size)
            except (BlockingIOError, ConnectionResetError):
                continue  # a reset (it left an order unread) is told once, before what it said
            if len(data) < _HEADER.size:
                return None
            version, kind, number = _HEADER.unpack(data)
            if version != _VERSION:
                return None
            if kind == _ENDED:
                return int(number)
            if kind == _LEFT:
                self._answered = number
                self._news.set()
                self._news = trio.Event()

    def _judge(self, status: int | None, report: bytes) -> None:
        if status is None and not any(report):
            raise CoreDiedError("the core or its keeper was killed; nobody can say how it ended")
        try:
            returncode = None if status is None else os.waitstatus_to_exitcode(status)
        except (ValueError, OverflowError):
            raise _not_ours(self._path, f"wait status {status:#x}") from None
        judge(returncode, report)


async def _end(connection: Connection) -> None:
    """Ends the core, and with it its keeper. Bounded: neither need be what it should."""
    with trio.CancelScope(shield=True):
        _kill(connection.core)
        if not (await _ended(connection.core) and await _ended(connection.keeper)):
            _kill(connection.keeper)
            await _ended(connection.keeper)


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


async def _ended(pidfd: int) -> bool:
    with trio.move_on_after(_END_GRACE):
        await trio.lowlevel.wait_readable(pidfd)
        return True
    return False


def _pid_of(pidfd: int) -> int:
    """The process of a pidfd.

    Raises:
        ProcessLookupError: it was reaped.
    """
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Pid" and int(value) > 0:
            return int(value)
    raise ProcessLookupError
