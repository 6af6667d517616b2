"""An endpoint whose queue the kernel has: a node /dev/rpmsgN, behind the calls of `Endpoint`."""

from __future__ import annotations

import contextlib
import errno
import random
import select
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from openamp_py.constants import ADDRESS_ANY
from openamp_py.errors import OpenAMPError, PeerGoneError, PlatformError
from openamp_py.linux.access import DESTROY_ENDPOINT, Node
from openamp_py.linux.faults import node_fault
from openamp_py.rpmsg.addresses import check_destination
from openamp_py.rpmsg.endpoint import Endpoint, Payload, WhenFull
from openamp_py.rpmsg.in_place import HeldMessage, Reservation
from openamp_py.rpmsg.statistics import EndpointReport, EndpointStatistics
from openamp_py.rpmsg.wire import Channel
from openamp_py.virtio import Message

if TYPE_CHECKING:
    from openamp_py.linux.bus import LinuxBus

_READ_SIZE: Final = 1 << 16
"""A read that is shorter than the message loses the rest of it; no bus has longer ones."""

_KEPT: Final = 4096
"""Messages that are taken out of a node that is about to go; there are rarely any."""

_FULL: Final = (errno.EAGAIN, errno.ENOMEM)
"""No buffer is free; older kernels say it the second way."""

_GONE: Final = (errno.EPIPE, errno.ENODEV, errno.ENXIO, errno.ENETRESET, errno.EIO)

_FIRST_PAUSE: Final = 0.0002
_LONGEST_PAUSE: Final = 0.01
"""Seconds until a send that found no buffer tries again: kernels before 7 never say when."""


class OpenNode:
    """A node that is open for an endpoint, and how it is to be closed.

    Args:
        node: open; closed with this.
        path: ``/dev/rpmsg0``.
        address: local address, where it is known.
        made: it was made for this endpoint, and goes with it.
        keeps_boundaries: one read is one message: not on a tty.
    """

    def __init__(
        self, node: Node, path: str, address: int, *, made: bool, keeps_boundaries: bool = True
    ) -> None:
        self.node = node
        self.path = path
        self.address = address
        self.keeps_boundaries = keeps_boundaries
        self._made = made
        self._closed = False

    def close(self) -> None:
        """Gives the node back, and wakes who waits for it. Idempotent.

        An endpoint that went with its bus is not destroyed: to do that twice is a panic of the
        kernel (seen on 6.1), which does not look. A dead one shows by its poll events.
        """
        if self._closed:
            return
        self._closed = True
        trio.lowlevel.notify_closing(self.node.fileno())
        if self._made and self._is_alive():
            with contextlib.suppress(OSError):  # it went with its bus
                self.node.ioctl(DESTROY_ENDPOINT)
        self.node.close()

    def _is_alive(self) -> bool:
        poll = select.poll()
        poll.register(self.node.fileno(), 0)  # errors and the end are always told
        return not poll.poll(0)


class LinuxEndpoint(Endpoint):
    """An endpoint of this machine's kernel. Made by `LinuxBus.open_endpoint`, which closes it.

    The kernel queues what comes, without a limit; `when_full` has no effect. It is announced by
    nobody: the remote learns its address by the first message. The kernel tells no source of a
    message, so `Message.source` is the peer's address. Messages cannot be built or held in their
    buffers, and none can be sent in another address's name: those calls raise PlatformError.

    It has nothing in common with the endpoints of a `Bus` but what a program sees.
    """

    def __init__(
        self,
        bus: LinuxBus,
        name: str | None,
        address: int,
        *,
        destination: int,
        when_full: WhenFull,
        rebind: bool,
    ) -> None:
        self.name = name
        self.address = address
        self.when_full = when_full
        self._owner = bus
        self._fixed = destination
        self._peer_address = destination
        self._again = rebind
        self._open: OpenNode | None = None
        self._kept: deque[Message] = deque()
        self._news = trio.lowlevel.ParkingLot()
        self._full = trio.StrictFIFOLock()
        self._is_receiving = False
        self._waiting: trio.CancelScope | None = None
        self._is_withdrawn = self._is_closed = False
        self._cause: OpenAMPError | None = None
        self._counts = dict.fromkeys(
            ("sent", "sent_bytes", "received", "received_bytes", "buffer_waits"), 0
        )

    @property
    def destination(self) -> int | None:
        """The peer's address, or None while not bound."""
        return self._peer_address if self.is_bound else None

    @property
    def is_bound(self) -> bool:
        """Whether there is a node that leads to a peer."""
        return self._open is not None and not self._is_withdrawn and self._has_peer

    @property
    def is_withdrawn(self) -> bool:
        """Whether the peer withdrew the channel and none has taken its place."""
        return self._is_withdrawn

    @property
    def payload_limit(self) -> int:
        """Most bytes that one message sent from here can carry."""
        return self._owner.payload_limit

    @property
    def statistics(self) -> EndpointStatistics:
        """What it counted so far; what waits in the kernel is not known."""
        return EndpointStatistics(**self._counts, queued=len(self._kept), held=0, dropped=0)

    @property
    def node(self) -> str | None:
        """``/dev/rpmsg0``, while there is one."""
        return None if self._open is None else self._open.path

    def __repr__(self) -> str:
        peer = f"{self._peer_address:#x}" if self.is_bound else "not bound"
        return f"<LinuxEndpoint {self.name or ''} {self.node or 'no node'} -> {peer}>"

    async def wait_bound(self) -> None:
        """Waits until there is a node that leads to the peer; see `Endpoint.wait_bound`."""
        await trio.lowlevel.checkpoint()
        while not self.is_bound:
            if self._is_closed or self._cause is not None or not self._again:
                self.check_usable()
            await self._park()

    # Sending.

    async def send(self, payload: Payload) -> None:
        """Sends one message to the peer; see `Endpoint.send`."""
        data = self._checked(payload)
        await trio.lowlevel.checkpoint()
        while True:
            await self._wait_for_peer()
            if not self._full.locked() and self._write(data):
                return
            self._counts["buffer_waits"] += 1
            async with self._full:
                if await self._write_patiently(data):
                    return

    async def send_to(self, payload: Payload, destination: int) -> None:
        """Sends to the peer's address, or, from an endpoint without a name or a peer, to any.

        Raises what `send` does, and:
            PlatformError: the kernel fixed the destination when the endpoint was made.
        """
        check_destination(destination)
        self._checked(payload)
        if self._open is None and self.name is None:
            self.check_usable()
            await self._owner.bind_bare(self, destination)
        if destination != self._peer_address:
            self._refuse_destination(destination)
        await self.send(payload)

    async def send_from(self, payload: Payload, source: int, destination: int) -> None:
        """Refused: the kernel writes the source."""
        await trio.lowlevel.checkpoint()
        self._refuse("send in another address's name")

    async def send_many(self, payloads: Sequence[Payload]) -> None:
        """Sends messages to the peer in their order; see `Endpoint.send_many`."""
        for data in [self._checked(payload) for payload in payloads]:
            await self.send(data)

    def send_nowait(self, payload: Payload) -> None:
        """Sends one message to the peer now, or raises; see `Endpoint.send_nowait`."""
        data = self._checked(payload)
        self._check_peer()
        if self._full.locked() or not self._write(data):
            raise trio.WouldBlock(f"{self!r}: no buffer is free")

    def send_to_nowait(self, payload: Payload, destination: int) -> None:
        """As `send_nowait`, to the peer's address only."""
        self._checked(payload)
        self._check_peer()
        if check_destination(destination) != self._peer_address:
            self._refuse_destination(destination)
        self.send_nowait(payload)

    def send_from_nowait(self, payload: Payload, source: int, destination: int) -> None:
        """Refused: the kernel writes the source."""
        self._refuse("send in another address's name")

    def send_many_nowait(self, payloads: Sequence[Payload]) -> int:
        """Sends as many as there are buffers for; see `Endpoint.send_many_nowait`."""
        parts = [self._checked(payload) for payload in payloads]
        self._check_peer()
        for count, data in enumerate(parts):
            if self._full.locked() or not self._write(data):
                if not count:
                    raise trio.WouldBlock(f"{self!r}: no buffer is free")
                return count
        return len(parts)

    @asynccontextmanager
    async def reserve(self, length: int | None = None) -> AsyncIterator[Reservation]:
        """Refused: the kernel has the buffers."""
        await trio.lowlevel.checkpoint()
        self._refuse("build a message in its buffer")
        yield

    @contextmanager
    def reserve_nowait(self, length: int | None = None) -> Iterator[Reservation]:
        """Refused: the kernel has the buffers."""
        self._refuse("build a message in its buffer")
        yield

    # Receiving.

    async def receive(self) -> Message:
        """The next message; see `Endpoint.receive`.

        What waited in the kernel when the core went is lost: the kernel gives it to nobody.
        """
        await trio.lowlevel.checkpoint()
        with self._reading():
            while (message := self._next_message()) is None:
                await self._wait_readable()
            return message

    async def receive_many(self, limit: int | None = None) -> list[Message]:
        """The messages that are there; see `Endpoint.receive_many`."""
        if limit is not None and limit < 1:
            raise ValueError(f"a limit of {limit} messages; at least 1 is needed")
        messages = [await self.receive()]
        with contextlib.suppress(
            trio.EndOfChannel, trio.BrokenResourceError, trio.ClosedResourceError
        ):  # the next call says so
            while len(messages) < min(limit or _KEPT, _KEPT):
                message = self._next_message()
                if message is None:
                    break
                messages.append(message)
        return messages

    def receive_nowait(self) -> Message:
        """The next message if it is there; otherwise raises trio.WouldBlock, or as `receive`."""
        with self._reading():
            message = self._next_message()
        if message is None:
            raise trio.WouldBlock
        return message

    async def hold(self) -> HeldMessage:
        """Refused: the kernel has the buffers."""
        await trio.lowlevel.checkpoint()
        self._refuse("hold a message in its buffer")

    def hold_nowait(self) -> HeldMessage:
        """Refused: the kernel has the buffers."""
        self._refuse("hold a message in its buffer")

    # Closing.

    async def aclose(self) -> None:
        """Closes it; the kernel's endpoint goes with it. Idempotent."""
        self.close()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def close(self) -> None:
        """Closes it at once. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._owner.forget(self)
            self._drop_node()
            self.wake()

    # What follows is for the bus.

    @property
    def is_closed(self) -> bool:
        """Whether it was closed here."""
        return self._is_closed

    @property
    def fixed_destination(self) -> int:
        """The peer's address that was given; ADDRESS_ANY: the name service says it."""
        return self._fixed

    @property
    def rebinds(self) -> bool:
        """Whether it goes on with the next bus."""
        return self._again

    @property
    def failure(self) -> OpenAMPError | None:
        """Why it ended."""
        return self._cause

    @property
    def waits_for_service(self) -> bool:
        """Whether it is to be bound when its service is announced."""
        return (
            self.name is not None
            and self._fixed == ADDRESS_ANY
            and not self.is_bound
            and not self._is_closed
            and self._cause is None
        )

    def bound_to(self, channel: Channel) -> bool:
        """Whether it was bound to this service."""
        return self.is_bound and self.name == channel.name and self._has(channel.address)

    def _has(self, address: int) -> bool:
        return self._fixed == ADDRESS_ANY and self._peer_address == address

    def attach_node(self, opened: OpenNode, destination: int) -> None:
        """It has a node from now on."""
        self._keep_rest()
        self._drop_node()
        self._open = opened
        self.address = opened.address
        self._peer_address = destination
        self._is_withdrawn = False
        self.wake()

    def withdraw(self) -> None:
        """The peer withdrew the channel; what it sent before can be received."""
        self._is_withdrawn = True
        if self._again:
            self._keep_rest()
            self._drop_node()
            self._is_withdrawn = False
        self.wake()

    def lose(self, cause: OpenAMPError) -> None:
        """The bus is gone, and the node with it."""
        self._keep_rest()
        self._drop_node()
        if not self._again:
            self._cause = self._cause or cause
        self.wake()

    def go_on(self) -> None:
        """The bus goes on: what came before belongs to the past."""
        self._kept.clear()
        self._is_withdrawn = False
        self.wake()

    def fail(self, cause: OpenAMPError) -> None:
        """It cannot be bound, and never will."""
        self._cause = cause
        self.wake()

    def wake(self) -> None:
        """Whoever waits looks again."""
        self._news.unpark_all()
        if self._waiting is not None:
            self._waiting.cancel()

    def check_usable(self) -> None:
        """Raises when the endpoint is closed or its bus failed."""
        if self._is_closed:
            raise trio.ClosedResourceError(f"{self!r} was closed")
        cause = self._cause or self._owner.failure
        if cause is not None:
            raise trio.BrokenResourceError(f"{self!r}: {cause}") from cause
        if not self._owner.usable:
            raise trio.ClosedResourceError("the bus was closed")

    def report(self) -> EndpointReport:
        """It, for a dump of the bus."""
        return EndpointReport(
            self.name, self.address, self.destination, self.when_full.value, self.statistics
        )

    # Inside.

    @property
    def _has_peer(self) -> bool:
        return self._peer_address != ADDRESS_ANY

    def _checked(self, payload: Payload) -> bytes:
        data = payload if type(payload) is bytes else memoryview(payload).tobytes()
        limit = self.payload_limit
        if len(data) > limit:
            raise ValueError(f"payload of {len(data)} bytes; the limit is {limit} bytes")
        if not data and self._open is not None and not self._open.keeps_boundaries:
            raise ValueError(f"{self!r}: a tty carries no empty messages")
        return data

    async def _wait_for_peer(self) -> None:
        while not self.is_bound and not self._is_withdrawn:
            self.check_usable()
            await self._park()
        self._check_peer()

    def _check_peer(self) -> None:
        self.check_usable()
        if self._is_withdrawn:
            why = "the other side withdrew the channel"
            raise trio.BrokenResourceError(f"{self!r}: {why}") from PeerGoneError(why)
        if not self.is_bound:
            raise trio.WouldBlock(f"{self!r}: no peer yet")

    def _write(self, data: bytes) -> bool:
        """Returns whether it went; not where no buffer is free."""
        opened = self._open
        assert opened is not None, "bound"
        try:
            written = opened.node.write(data)
        except OSError as error:
            if error.errno in _FULL:
                return False
            if error.errno == errno.EMSGSIZE:
                raise ValueError(
                    f"payload of {len(data)} bytes; {opened.path} does not take so many"
                ) from error
            self._gone(error)
            self.check_usable()
            if self._is_withdrawn:
                self._check_peer()
            return False
        if written < len(data) and not opened.keeps_boundaries:
            self._owner.count_short(len(data) - written)
        self._counts["sent"] += 1
        self._counts["sent_bytes"] += written
        return True

    async def _write_patiently(self, data: bytes) -> bool:
        """Tries until it went; returns False where the peer is another one meanwhile."""
        pause = _FIRST_PAUSE
        opened = self._open
        while opened is not None and opened is self._open and not self._is_withdrawn:
            if self._write(data):
                return True
            # Linux 7 says when there is room. Older ones never do, so that is not waited for long.
            length = pause * random.uniform(0.5, 1.0)
            began = trio.current_time()
            with trio.move_on_after(length), contextlib.suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_writable(opened.node.fileno())
            if trio.current_time() - began < length / 2:  # it says so, and may be wrong
                await trio.sleep(_FIRST_PAUSE)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return False

    def _next_message(self) -> Message | None:
        """The next message, or None where one is to be waited for; or raises why none will come."""
        if self._is_closed:
            self.check_usable()
        if self._kept:
            return self._kept.popleft()
        message = self._read()
        if message is not None:
            return message
        if self._is_withdrawn:
            raise trio.EndOfChannel(f"{self!r}: the other side withdrew the channel")
        if not (self._again and self._cause is None and self._owner.failure is not None):
            self.check_usable()
        else:
            raise trio.BrokenResourceError(f"{self!r}: {self._owner.failure}") from (
                self._owner.failure
            )
        return None

    def _read(self) -> Message | None:
        opened = self._open
        if opened is None:
            return None
        try:
            payload = opened.node.read(_READ_SIZE)
        except BlockingIOError:
            return None
        except OSError as error:
            self._gone(error)
            return None
        if not payload and not opened.keeps_boundaries:
            return None
        self._counts["received"] += 1
        self._counts["received_bytes"] += len(payload)
        return Message(payload, self._peer_address)

    def _gone(self, error: OSError) -> None:
        """The node does not work any more: says the bus, or was it only this endpoint?"""
        opened = self._open
        if opened is None:
            return
        self._drop_node()
        if error.errno not in _GONE:
            self._cause = node_fault(opened.path, "it failed", error)
        self._owner.look()
        if self._owner.failure is None and self._cause is None and not self._is_withdrawn:
            gone = PeerGoneError(f"{opened.path}: the endpoint was destroyed")
            gone.__cause__ = error
            self._owner.doubt(self, gone)
        self.wake()

    async def _wait_readable(self) -> None:
        opened = self._open
        if opened is None:
            await self._park()
            return
        try:
            with trio.CancelScope() as self._waiting, contextlib.suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(opened.node.fileno())
        finally:
            self._waiting = None

    async def _park(self) -> None:
        self._owner.hurry()
        await self._news.park()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        if self._is_receiving:
            raise trio.BusyResourceError(f"{self!r}: another task receives here")
        self._is_receiving = True
        try:
            yield
        finally:
            self._is_receiving = False

    def _keep_rest(self) -> None:
        """Takes what the node still has, before that goes."""
        while self._open is not None and len(self._kept) < _KEPT:
            try:
                payload = self._open.node.read(_READ_SIZE)
            except OSError:
                return
            if not payload and not self._open.keeps_boundaries:
                return
            self._kept.append(Message(payload, self._peer_address))
            self._counts["received"] += 1
            self._counts["received_bytes"] += len(payload)

    def _drop_node(self) -> None:
        opened, self._open = self._open, None
        if self._fixed == ADDRESS_ANY and not self._is_withdrawn:
            self._peer_address = ADDRESS_ANY
        if opened is not None:
            opened.close()

    def _refuse(self, what: str) -> NoReturn:
        raise PlatformError(f"{self!r}: a program cannot {what} through Linux's rpmsg nodes")

    def _refuse_destination(self, destination: int) -> NoReturn:
        raise PlatformError(
            f"{self!r}: Linux fixes the destination of an endpoint when it makes it; open one "
            f"with destination={destination:#x}"
        )
