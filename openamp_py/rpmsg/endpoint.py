"""An RPMsg endpoint: a local address with a receive queue, and usually one peer."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Self

import trio

from openamp_py.constants import ADDRESS_ANY, NAME_SERVICE_ADDRESS
from openamp_py.errors import PeerGoneError
from openamp_py.rpmsg.addresses import check_destination
from openamp_py.rpmsg.wire import Announcement, Channel, encode_announcement

if TYPE_CHECKING:
    from openamp_py.rpmsg.bus import Bus

Payload = bytes | bytearray | memoryview
"""What can be sent; anything but bytes is copied once more."""

CLOSE_GRACE = 1.0
"""Seconds that `aclose` waits for a buffer to send the withdrawal in, when all are out."""


class Message(NamedTuple):
    """What an endpoint received."""

    payload: bytes
    source: int
    """The sender's address."""


class Endpoint:
    """A local address on a bus, with a receive queue.

    Made by `Bus.open_endpoint`, which closes it. Bound to a peer's address when the name
    service says so, or by the first message that comes; until then `send` waits.

    One task may receive at a time; any number may send.

    A message that comes while `queue_limit` messages wait to be received stays in its
    shared buffer, so that the peer runs out of buffers and is held back; nothing is
    dropped.

    Attributes:
        name: the service's name, or None for an endpoint that is only an address.
        address: its local address.
    """

    def __init__(
        self, bus: Bus, name: str | None, address: int, destination: int, queue_limit: int
    ) -> None:
        self.name = name
        self.address = address
        self._bus = bus
        self._fixed = destination != ADDRESS_ANY
        self._destination = destination
        self._queue_limit = queue_limit
        self._queue: deque[Message] = deque()
        self._held: deque[int] = deque()  # buffers of the youngest messages in the queue
        self._receiving = False
        self._sleeper: trio.lowlevel.Task | None = None
        self._binding = trio.lowlevel.ParkingLot()
        self._announces = False
        self._told = False
        self._withdrawn = False
        self._closed = False

    @property
    def destination(self) -> int | None:
        """The peer's address, or None while not bound."""
        return None if self._destination == ADDRESS_ANY else self._destination

    @property
    def is_bound(self) -> bool:
        """Whether the peer's address is known."""
        return self._destination != ADDRESS_ANY

    @property
    def is_withdrawn(self) -> bool:
        """Whether the peer withdrew the channel and none has taken its place."""
        return self._withdrawn

    @property
    def payload_limit(self) -> int:
        """Most bytes that one message sent from here can carry."""
        return self._bus.payload_limit

    def __repr__(self) -> str:
        peer = f"{self._destination:#x}" if self.is_bound else "not bound"
        return f"<Endpoint {self.name or ''} {self.address:#x} -> {peer}>"

    async def wait_bound(self) -> None:
        """Waits until the peer's address is known: it announced itself, or wrote first.

        Raises:
            trio.ClosedResourceError: the endpoint was closed here.
            trio.BrokenResourceError: the other side is gone.
        """
        await trio.lowlevel.checkpoint()
        while not self.is_bound:
            self.check_usable()
            await self._binding.park()
        self.check_usable()

    async def _wait_peer(self) -> int:
        """As `wait_bound`, but a withdrawn channel is not waited for."""
        while not self.is_bound and not self._withdrawn:
            self.check_usable()
            await self._binding.park()
        return self._peer()

    async def send(self, payload: Payload) -> None:
        """Sends one message to the peer; waits until bound, and for a free buffer.

        Raises:
            ValueError: more than `payload_limit` bytes; nothing was sent.
            trio.ClosedResourceError: the endpoint was closed here.
            trio.BrokenResourceError: the other side is gone, or withdrew the channel.

        Cancellation: nothing was sent.
        """
        data = self._check_payload(payload)
        await trio.lowlevel.checkpoint_if_cancelled()
        await self._send(data, await self._wait_peer())

    async def send_to(self, payload: Payload, destination: int) -> None:
        """Sends one message to any address on the other side, as `send` does."""
        data = self._check_payload(payload)
        await trio.lowlevel.checkpoint_if_cancelled()
        await self._send(data, check_destination(destination))

    def send_nowait(self, payload: Payload) -> None:
        """Sends one message to the peer now, or raises.

        Raises:
            trio.WouldBlock: not bound yet, no buffer is free, or others wait for one.
            Otherwise as `send`.
        """
        data = self._check_payload(payload)
        self.check_usable()
        if not self.is_bound and not self._withdrawn:
            raise trio.WouldBlock(f"{self!r}: no peer yet")
        if not self._bus.send_nowait(self.address, self._peer(), data):
            raise trio.WouldBlock(f"{self!r}: no buffer is free")

    async def receive(self) -> Message:
        """The next message; waits for one.

        Raises:
            trio.EndOfChannel: the peer withdrew the channel and all it sent was received. A
                peer that announces the channel again, or writes, binds the endpoint anew.
            trio.BrokenResourceError: the other side is gone and all it sent was received.
            trio.ClosedResourceError: the endpoint was closed here.
            trio.BusyResourceError: another task receives here already.

        Cancellation: no message is lost.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._receiving:
            raise trio.BusyResourceError(f"{self!r}: another task receives here already")
        if self._has_message():
            message = self._take()
            await trio.lowlevel.cancel_shielded_checkpoint()
            return message
        self._receiving = True
        try:
            await self._sleep()
            while not self._has_message():
                await self._sleep()
        finally:
            self._receiving = False
        return self._take()

    def receive_nowait(self) -> Message:
        """The next message if it is there; otherwise raises trio.WouldBlock, or as `receive`."""
        if not self._has_message():
            raise trio.WouldBlock
        return self._take()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    async def aclose(self) -> None:
        """Withdraws the announcement and closes. Idempotent.

        Cancellation: closes all the same; when no buffer is free for the withdrawal it
        waits at most a second for one, shielded.
        """
        try:
            if self._told and not self._closed and self._bus.failure is None:
                self._told = self._announces = False
                with (
                    trio.move_on_after(CLOSE_GRACE, shield=True),
                    contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError),
                ):
                    await self._send(self.announcement(destroy=True), NAME_SERVICE_ADDRESS)
        finally:
            self.close()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def close(self) -> None:
        """Closes at once, without a word to the peer. Idempotent."""
        if not self._closed:
            self._closed = True
            self._announces = False
            self._bus.forget(self, list(self._held))
            self._queue.clear()
            self._held.clear()
            self.wake()

    # What follows is for the bus.

    async def announce(self) -> None:
        """Tells the peer of this endpoint."""
        # From before it goes out: a service that is announced to us meanwhile gets its answer.
        self._announces = True
        await trio.lowlevel.checkpoint_if_cancelled()
        await self._send(self.announcement(), NAME_SERVICE_ADDRESS)
        self._told = True

    def announcement(self, *, destroy: bool = False) -> bytes:
        """The name-service message that tells the peer of this endpoint, or withdraws it."""
        return encode_announcement(Announcement(Channel(self.name or "", self.address), destroy))

    @property
    def announces(self) -> bool:
        """Whether the peer is to be told of this endpoint."""
        return self._announces

    def was_told(self) -> None:
        """The peer was told of this endpoint in an answer, so it is told of its end too."""
        self._told = True

    def check_usable(self) -> None:
        """Raises when the endpoint is closed or its bus failed."""
        if self._closed:
            raise trio.ClosedResourceError(f"{self!r} was closed")
        if self._bus.failure is not None:
            raise self._bus.broken(repr(self))

    @property
    def is_full(self) -> bool:
        """Whether further messages have to stay in their buffers."""
        return len(self._queue) >= self._queue_limit

    def bind(self, destination: int) -> None:
        """The peer is at `destination` from now on."""
        self._destination = destination
        self._withdrawn = False
        self._binding.unpark_all()

    def unbind(self) -> None:
        """The peer withdrew the channel."""
        if not self._fixed:
            self._destination = ADDRESS_ANY
            self._withdrawn = True
            self.wake()

    def deliver(self, payload: bytes, source: int, head: int | None) -> None:
        """A message came; `head` is its buffer if that was not given back yet."""
        if self._destination == ADDRESS_ANY:
            self.bind(source)
        self._queue.append(Message(payload, source))
        if head is not None:
            self._held.append(head)
        self._wake_receiver()

    def wake(self) -> None:
        """Something is over: whoever waits has to look."""
        self._wake_receiver()
        self._binding.unpark_all()

    def _wake_receiver(self) -> None:
        if self._sleeper is not None:
            trio.lowlevel.reschedule(self._sleeper)
            self._sleeper = None

    async def _sleep(self) -> None:
        """Until there may be something to receive; only for the one task that receives."""

        def abort(_: object) -> trio.lowlevel.Abort:
            self._sleeper = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._sleeper = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)

    def _has_message(self) -> bool:
        """Looks into the ring too. Raises when none can come any more."""
        if self._closed:
            raise trio.ClosedResourceError(f"{self!r} was closed")
        if not self._queue and self._bus.failure is None:
            self._bus.drain()
        if self._queue:
            return True
        if self._withdrawn:
            raise trio.EndOfChannel(f"{self!r}: the other side withdrew the channel")
        if self._bus.failure is not None:
            raise self._bus.broken(repr(self))
        return False

    def _take(self) -> Message:
        was_full = self.is_full
        message = self._queue.popleft()
        # Each message taken lets the peer send one, or two handlers that reply could both wait.
        if was_full:
            self._bus.took_message(self, self._held.popleft() if self._held else None)
        return message

    def _check_payload(self, payload: Payload) -> bytes:
        data = payload if type(payload) is bytes else memoryview(payload).tobytes()
        if len(data) > self._bus.payload_limit:
            raise ValueError(
                f"payload of {len(data)} bytes; the limit is {self._bus.payload_limit} bytes"
            )
        return data

    def _peer(self) -> int:
        self.check_usable()
        if not self.is_bound:
            why = "the other side withdrew the channel"
            raise trio.BrokenResourceError(f"{self!r}: {why}") from PeerGoneError(why)
        return self._destination

    async def _send(self, data: bytes, destination: int) -> None:
        self.check_usable()
        if self._bus.send_nowait(self.address, destination, data):
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            await self._bus.send_when_free(self, destination, data)
