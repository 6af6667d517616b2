"""The virtio-rpmsg device of a guest, over vhost-user: a real Linux kernel as host.

The guest is a User-Mode Linux (``virtio_uml.device=PATH:7``) or a QEMU from version 11 on
(``vhost-user-test-device`` with ``virtio-id=7``). Nothing is booted here: the guest connects.

Linux (seen with 6.1 and 6.12) works the RPMsg bus in the interrupts of such devices, where it must
not wait and may: a guest can panic as a service is announced. The driver of a remote processor in
between, as in tests/kernel, calls it where it may.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl

import trio

from openamp_py.background import open_background
from openamp_py.constants import (
    RPMSG_F_NS,
    VIRTIO_F_VERSION_1,
    VIRTIO_ID_RPMSG,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
)
from openamp_py.errors import (
    OpenAMPError,
    PeerGoneError,
    VhostUserError,
    as_ours,
)
from openamp_py.memory import MemoryMap
from openamp_py.platforms import vhost_wire as wire
from openamp_py.platforms.unix_sockets import accept, connect, open_listener
from openamp_py.platforms.vhost_descriptors import Descriptors, Kick
from openamp_py.platforms.vhost_session import FrontEnd, Offer
from openamp_py.virtio import VirtioDevice

_logger = logging.getLogger(__name__)

FEATURES: Final = (
    RPMSG_F_NS | VIRTIO_F_VERSION_1 | VIRTIO_RING_F_EVENT_IDX | VIRTIO_RING_F_INDIRECT_DESC
)
"""Virtio features that are offered. Packed rings never are."""

PROTOCOL: Final = wire.REPLY_ACK | wire.BACKEND_REQ | wire.CONFIG | wire.RESET
"""Protocol features that are offered: User-Mode Linux does not work without BACKEND_REQ."""

_SCHEME = "vhost-user:"
_SOCKET = "vhost-user socket"


@dataclass(frozen=True, slots=True)
class VhostUserAddress:
    """Where a front end is met.

    Written ``vhost-user:PATH[?connect=1][&inband=1][&sealed=1]``.

    Args:
        path: of the Unix socket.
        connect: connect to a front end that listens, instead of listening for front ends.
        inband: offer kicks and calls as messages. By default they are descriptors, which cost
            the guest less.
        sealed: refuse guest memory whose file can be cut off, which would kill this program.
            QEMU's memory-backend-memfd is sealed; User-Mode Linux has nothing that is.
    """

    path: str
    connect: bool = False
    inband: bool = False
    sealed: bool = False

    @staticmethod
    def matches(url: str) -> bool:
        """Whether a URL can only be one of this kind."""
        return url.startswith(_SCHEME)

    @classmethod
    def parse(cls, url: str) -> VhostUserAddress:
        """Reads a URL.

        Raises:
            ValueError: it is not one of this form; says what it lacks.
        """
        form = f"{_SCHEME}PATH[?connect=1][&inband=1][&sealed=1]"
        path, _, query = url.removeprefix(_SCHEME).partition("?")
        if not cls.matches(url) or not path:
            raise ValueError(f"{url!r} is not a link to a guest; want {form}")
        try:
            options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
        except ValueError:
            raise ValueError(f"{url!r}: the part after '?' is not key=value; want {form}") from None
        choices = {}
        for name in ("connect", "inband", "sealed"):
            value = options.pop(name, "0")
            if value not in ("0", "1"):
                raise ValueError(f"{url!r}: {name}={value}; 0 or 1 are possible")
            choices[name] = value == "1"
        if options:
            raise ValueError(f"{url!r}: unknown option {next(iter(options))!r}; want {form}")
        return cls(path, **choices)


class VhostUserLink:
    """A device for one guest after the other. Runs in `open_devices`, which also ends it.

    Who breaks the protocol, or a ring, loses its connection, and the next front end is served;
    the log says why. Memory that its owner cuts off later kills this program by SIGBUS, where it
    could not be sealed (see `VhostUserAddress`), and an eventfd for calls that its owner fills, and
    makes blocking just as it is written, stops it: whoever may connect is trusted so far, and no
    further. The socket's directory says who may.

    Args:
        address: where front ends are met.
        features: virtio features to offer.
        protocol: vhost-user protocol features to offer.
        device_id: what kind of virtio device it is. One that is not RPMsg, and has two vrings too,
            is for programs that work the devices of `open_devices` themselves.
    """

    def __init__(
        self,
        address: VhostUserAddress,
        *,
        features: int = FEATURES,
        protocol: int = PROTOCOL,
        device_id: int = VIRTIO_ID_RPMSG,
    ) -> None:
        self.address = address
        self.name = f"{_SCHEME}{address.path}"
        if address.inband:
            protocol |= wire.INBAND
        self._offer = Offer(features, protocol, address.sealed, device_id)

    @asynccontextmanager
    async def open_devices(self) -> AsyncIterator[Guests]:
        """Meets front ends during an `async with` block.

        Raises:
            PlatformError: the socket cannot be used.
        """
        async with open_background() as nursery:
            guests = Guests(self._offer, self.name)
            await nursery.start(self._run, guests)
            try:
                yield guests
            finally:
                guests.close()

    async def _run(self, guests: Guests, *, task_status: trio.TaskStatus[None]) -> None:
        path = self.address.path
        if self.address.connect:
            with await connect(path, _SOCKET) as sock:
                task_status.started()
                guests.fail(await guests.serve(sock))
            return
        with open_listener(path, _SOCKET) as listener:
            task_status.started()
            while True:
                try:
                    sock = await accept(listener)
                except OSError as error:
                    guests.fail(as_ours(error, f"{_SOCKET} {path}"))
                    return
                with sock:
                    await guests.serve(sock)


class Guests:
    """The drivers that come and go over a link. Made by `VhostUserLink.open_devices`.

    Attributes:
        kinds: the virtio id of the one device that there is.
        failure: what ended the link; None while it is up.
        dropped: why the latest front end that was dropped was; None where all left by themselves.
    """

    def __init__(self, offer: Offer, name: str) -> None:
        self.kinds = (offer.device_id,)
        self._offer = offer
        self._name = name
        self._front_end: FrontEnd | None = None
        self._connection = trio.CancelScope()
        self._given: VirtioDevice | None = None
        self._last: VirtioDevice | None = None
        self._news = trio.lowlevel.ParkingLot()
        self._broken: OpenAMPError | None = None
        self.failure: OpenAMPError | None = None
        self.dropped: OpenAMPError | None = None

    async def wait_driver(self, index: int) -> VirtioDevice:
        """Waits for the next life of a driver. What worked the one before is closed by now.

        Raises:
            OpenAMPError: what ended the link.
        """
        await trio.lowlevel.checkpoint()
        if self._last is not None:
            # What refers to itself is not collected while nothing happens here, and would keep
            # the memory of a guest that is gone.
            self._last.memory = MemoryMap(())
            self._last = None
        while True:
            if self.failure is not None:
                raise self.failure.with_traceback(None)
            life = None if self._front_end is None else self._front_end.life
            if life is not None and life is not self._given:
                self._given = self._last = life
                return life
            life = None
            await self._news.park()

    def drop_driver(self, cause: OpenAMPError) -> bool:
        """The driver broke a ring: its connection is closed. Returns whether another may come."""
        # Whoever worked the device may have taken long to end: meanwhile its guest may have left,
        # and the connection may be another one's.
        if self._given is not None:
            self._drop(cause)
        return True

    async def serve(self, sock: socket.socket) -> OpenAMPError:
        """Serves one front end as long as it is connected. Returns why it is not any more."""
        sock.setblocking(False)
        self._broken = None
        self._connection = trio.CancelScope()
        cause: OpenAMPError = PeerGoneError(f"{self._name}: this side ended the connection")
        try:
            with self._connection:
                cause = await self._serve(sock)
            if self._broken is not None:
                cause = self._broken
        finally:
            self._leave(cause)
        if not isinstance(cause, PeerGoneError):
            self.dropped = cause
        _logger.log(
            logging.INFO if isinstance(cause, PeerGoneError) else logging.WARNING, "%s", cause
        )
        return cause

    async def _serve(self, sock: socket.socket) -> OpenAMPError:
        try:
            async with open_background() as nursery:
                front_end = FrontEnd(
                    self._offer, lambda kick: nursery.start_soon(self._listen, kick), self._wake
                )
                self._front_end = front_end
                while (message := await _receive(sock)) is not None:
                    header, payload, descriptors = message
                    with contextlib.closing(descriptors):
                        try:
                            reply = front_end.handle_untrusted(header, payload, descriptors)
                        except VhostUserError:
                            if header.wants_reply and front_end.acknowledges:
                                _refuse(sock, header.request)
                            raise
                    if reply is not None:
                        await _send(sock, reply)
        except VhostUserError as error:
            return self._refusal(error)
        except OSError as error:
            return PeerGoneError(f"{self._name}: the connection broke: {error.strerror}")
        return PeerGoneError(f"{self._name}: the front end closed its connection")

    async def _listen(self, kick: Kick) -> None:
        """Hears the kicks of one descriptor until it is closed."""
        with contextlib.suppress(trio.ClosedResourceError):
            while True:
                await kick.wait()
                try:
                    if self._front_end is not None:
                        self._front_end.look()
                except VhostUserError as error:
                    self._drop(error)

    def _drop(self, cause: OpenAMPError) -> None:
        """Closes the present connection."""
        self._broken = self._refusal(cause)
        self._connection.cancel()

    def _refusal(self, error: OpenAMPError) -> OpenAMPError:
        # As text: whoever keeps this must not keep the guest's memory, which a traceback does.
        return VhostUserError(f"{self._name}: the front end was dropped: {error}")

    def _wake(self) -> None:
        self._news.unpark_all()

    def _leave(self, cause: OpenAMPError) -> None:
        front_end, self._front_end = self._front_end, None
        self._given = None
        if front_end is not None:
            front_end.close(cause)

    def fail(self, cause: OpenAMPError) -> None:
        """The link is over."""
        self.failure = self.failure or cause
        self._news.unpark_all()

    def close(self) -> None:
        """Ends the connection, if there is one. Idempotent."""
        self._connection.cancel()


async def _receive(sock: socket.socket) -> tuple[wire.Header, bytes, Descriptors] | None:
    """One message; None where the front end has closed the connection.

    Raises:
        VhostUserError: it cannot be the beginning of a message, or breaks off.
        OSError: the connection broke.
    """
    descriptors = Descriptors()
    try:
        # Never more than one message at once: the descriptors of the next one would be taken for
        # its own.
        data = await _receive_exactly(sock, wire.HEADER_SIZE, descriptors)
        if data == b"":
            return None
        header = wire.decode_header_untrusted(data)
        payload = b""
        if header.size:
            payload = await _receive_exactly(sock, header.size, descriptors)
            if not payload:
                raise VhostUserError(f"{header.request.name}: the connection ends in the message")
    except BaseException:
        descriptors.close()
        raise
    return header, payload, descriptors


async def _receive_exactly(sock: socket.socket, size: int, descriptors: Descriptors) -> bytes:
    """So many bytes, or none at all where the connection ends before the first one."""
    data = b""
    room = socket.CMSG_SPACE(4 * wire.MAX_REGIONS)
    while len(data) < size:
        await trio.lowlevel.wait_readable(sock)
        try:
            part, ancillary, flags, _ = sock.recvmsg(
                size - len(data), room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            continue
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = content[: len(content) // 4 * 4]
                descriptors.add(memoryview(whole).cast("i").tolist())
        if flags & socket.MSG_CTRUNC or len(descriptors) > wire.MAX_REGIONS:
            raise VhostUserError(
                f"more descriptors came with one message than the {wire.MAX_REGIONS} that are "
                "possible, or than this process may have"
            )
        if not part:
            if data:
                raise VhostUserError(f"the connection ends after {len(data)} of {size} bytes")
            return data
        data += part
    return data


async def _send(sock: socket.socket, data: bytes) -> None:
    while data:
        try:
            data = data[sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)


def _refuse(sock: socket.socket, request: wire.Request) -> None:
    """Tells a front end that a request failed, if it listens."""
    with contextlib.suppress(OSError):
        reply = wire.encode_reply(request, wire.encode_u64(1))
        sock.send(reply, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
