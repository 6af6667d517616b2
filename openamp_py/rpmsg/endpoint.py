"""An RPMsg endpoint: a local address with a receive queue, and usually one peer."""

from __future__ import annotations

import contextlib
import enum
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Final, Self

import trio
from trio.lowlevel import checkpoint_if_cancelled

from openamp_py.background import plain_errors
from openamp_py.constants import ADDRESS_ANY, NAME_SERVICE_ADDRESS
from openamp_py.errors import OpenAMPError, PeerGoneError, StateError
from openamp_py.rpmsg.addresses import check_destination
from openamp_py.rpmsg.batch import Batch
from openamp_py.rpmsg.handover import HandedEndpoint
from openamp_py.rpmsg.in_place import HeldMessage, Reservation
from openamp_py.rpmsg.statistics import EndpointReport, EndpointStatistics
from openamp_py.rpmsg.wire import Announcement, Channel, encode_announcement
from openamp_py.virtio import Message
from openamp_py.virtio.message_ring import IN_PLACE, Arrival

if TYPE_CHECKING:
    from openamp_py.rpmsg.bus import Bus

Payload = bytes | bytearray | memoryview
"""What can be sent; anything but bytes is copied once more."""

Handler = Callable[[Message], Awaitable[None]]
"""What `Endpoint.serve` calls for each message."""

_ONLY_BYTES: Final = frozenset((bytes,))

CLOSE_GRACE = 1.0
"""Seconds that `aclose` waits for a buffer to send the withdrawal in, when all are out."""

DEFAULT_QUEUE_LIMIT = 256
"""Messages an endpoint keeps before `WhenFull` decides."""


class WhenFull(enum.Enum):
    """What becomes of messages for an endpoint that has as many as it may keep."""

    HOLD_BACK = "hold back"
    """They stay in their shared buffers, so that the peer runs out of them and has to wait. Nothing
    is lost as long as the endpoint is read. One that is not read for `BusOptions.patience` while
    half of the link's buffers are kept loses those it keeps (counted), so that the name service
    and other endpoints go on; once it is read again it holds back again."""
    DROP_OLDEST = "drop oldest"
    """The one that waits longest makes room; counted."""
    DROP_NEWEST = "drop newest"
    """They are lost; counted."""


@dataclass(frozen=True, slots=True)
class _Occupied:
    """A queued message that is only in its shared buffer."""

    head: int
    length: int
    source: int


class Endpoint:
    """A local address on a bus, with a receive queue.

    Made by `Bus.open_endpoint`, which closes it. Bound to a peer's address when the name
    service says so, or by the first message that comes; until then `send` waits.

    One task may receive at a time; any number may send. Calls that need not wait let other tasks
    run every 0.2 ms or so instead of each time.

    Attributes:
        name: the service's name, or None for an endpoint that is only an address.
        address: its local address.
        when_full: what becomes of messages beyond its limit.
    """

    def __init__(
        self,
        bus: Bus,
        name: str | None,
        address: int,
        *,
        destination: int = ADDRESS_ANY,
        announces: bool = False,
        queue_limit: int = DEFAULT_QUEUE_LIMIT,
        when_full: WhenFull = WhenFull.HOLD_BACK,
        in_place: bool = False,
        rebind: bool = False,
    ) -> None:
        self.name = name
        self.address = address
        self.when_full = when_full
        self._bus = bus
        self._sender = bus.sender
        self._given_destination = destination
        self._destination = destination
        self._wants_announcing = announces
        self._queue_limit = self._bound = queue_limit
        self._in_place = in_place
        self._rebind = rebind
        self._queue: deque[Message | _Occupied] = deque()
        self._held: deque[int] = deque()  # buffers of copied messages, which hold the peer back
        self._holds_back = False
        self._unread = False
        self._careful = in_place  # taking a message is more than taking it out of the queue
        self._receiving = False
        self._sleeper: trio.lowlevel.Task | None = None
        self._binding = trio.lowlevel.ParkingLot()
        self._announces = False
        self._told = False
        self._withdrawing: trio.Event | None = None
        self._withdrawn = False
        self._closed = False
        self._over = False  # closed, or lost at a restart
        self._failure: OpenAMPError | None = None
        self._taken = 0
        self._sent = self._sent_bytes = self._received = self._received_bytes = 0
        self._waits = self._dropped = 0

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

    @property
    def statistics(self) -> EndpointStatistics:
        """What it counted so far."""
        occupied = sum(isinstance(each, _Occupied) for each in self._queue) if self._in_place else 0
        return EndpointStatistics(
            sent=self._sent,
            sent_bytes=self._sent_bytes,
            received=self._received,
            received_bytes=self._received_bytes,
            buffer_waits=self._waits,
            queued=len(self._queue),
            held=len(self._held) + occupied,
            dropped=self._dropped,
        )

    def __repr__(self) -> str:
        peer = f"{self._destination:#x}" if self.is_bound else "not bound"
        return f"<Endpoint {self.name or ''} {self.address:#x} -> {peer}>"

    async def wait_bound(self) -> None:
        """Waits until the peer's address is known: it announced itself, or wrote first.

        An endpoint that was opened with `rebind` also waits for the bus to go on after a failure.

        Raises:
            trio.ClosedResourceError: the endpoint was closed here.
            trio.BrokenResourceError: the other side is gone.
        """
        await trio.lowlevel.checkpoint()
        while not self.is_bound or (self._rebind and self._bus.failure is not None):
            if self._closed or not self._rebind:
                self.check_usable()
            await self._binding.park()
        self.check_usable()

    # Sending.

    async def send(self, payload: Payload) -> None:
        """Sends one message to the peer; waits until bound, and for a free buffer.

        Raises:
            ValueError: more than `payload_limit` bytes; nothing was sent.
            trio.ClosedResourceError: the endpoint was closed here.
            trio.BrokenResourceError: the other side is gone, or withdrew the channel.

        Cancellation: nothing was sent.
        """
        bus = self._bus
        if perf_counter() >= bus.slice_end:
            await bus.rest()
        else:
            await checkpoint_if_cancelled()
        if self._transmit(payload, self._destination):
            return
        data = self._check_payload(payload)
        while not await self._send(data, self.address, await self._wait_peer(), to_peer=True):
            pass

    async def send_to(self, payload: Payload, destination: int) -> None:
        """Sends one message to any address on the other side, as `send` does."""
        bus = self._bus
        if perf_counter() >= bus.slice_end:
            await bus.rest()
        else:
            await checkpoint_if_cancelled()
        if self._transmit(payload, destination):
            return
        data = self._check_payload(payload)
        await self._send(data, self.address, check_destination(destination))

    async def send_from(self, payload: Payload, source: int, destination: int) -> None:
        """Sends one message in the name of another local address, as `send` does.

        An answer goes to whoever has that address here; nobody has to.
        """
        data = self._check_payload(payload)
        await self._bus.pause()
        await self._send(data, check_destination(source), check_destination(destination))

    async def send_many(self, payloads: Sequence[Payload]) -> None:
        """Sends messages to the peer in their order, with one kick for as many as there is room.

        Raises what `send` does; for one payload that is too long nothing is sent.

        Cancellation: some may have been sent: `statistics.sent` tells how many.
        """
        sender = self._sender
        batch = Batch(self._check_payloads(payloads))
        await self._bus.pause()
        while not batch.is_done:
            destination = await self._wait_peer()
            if not sender.send_batch(self.address, destination, batch, self._count_sent):
                self._waits += 1
                await sender.wait_for_buffers(
                    self,
                    partial(
                        sender.send_batch,
                        self.address,
                        destination,
                        batch,
                        self._count_sent,
                        has_turn=True,
                    ),
                    peer=destination,
                )

    def send_nowait(self, payload: Payload) -> None:
        """Sends one message to the peer now, or raises.

        Raises:
            trio.WouldBlock: not bound yet, no buffer is free, or others wait for one.
            Otherwise as `send`.
        """
        data = self._check_payload(payload)
        self._send_now(data, self.address, self._peer_nowait())

    def send_to_nowait(self, payload: Payload, destination: int) -> None:
        """Sends one message to any address on the other side now, or raises as `send_nowait`."""
        data = self._check_payload(payload)
        self._send_now(data, self.address, check_destination(destination))

    def send_from_nowait(self, payload: Payload, source: int, destination: int) -> None:
        """Sends one message in another address's name now, or raises as `send_nowait`."""
        data = self._check_payload(payload)
        self._send_now(data, check_destination(source), check_destination(destination))

    def send_many_nowait(self, payloads: Sequence[Payload]) -> int:
        """Sends messages to the peer as far as there are buffers now.

        Returns:
            How many went, from the first on.

        Raises:
            trio.WouldBlock: none of them could go. Otherwise as `send`.
        """
        parts = self._check_payloads(payloads)
        destination = self._peer_nowait()
        before = self._sent
        batch = Batch(parts)
        self._sender.send_batch(self.address, destination, batch, self._count_sent)
        sent = self._sent - before
        if parts and not sent:
            raise trio.WouldBlock(f"{self!r}: no buffer is free")
        return sent

    @asynccontextmanager
    async def reserve(self, length: int | None = None) -> AsyncIterator[Reservation]:
        """A message to the peer that is built in its shared buffer, for an `async with` block.

        Waits as `send` does. Sent at the end of the block; given back unsent where the block
        raises or calls `discard`.

        Args:
            length: bytes of payload; can be set later, and is by default all that fits.

        Raises: what `send` does, at either end of the block.
        """
        self._check_length(length)
        await self._bus.pause()
        found: list[Reservation] = []

        def attempt(*, has_turn: bool = True) -> bool:
            reservation = self._sender.reserve(self.address, length, has_turn=has_turn)
            if reservation is not None:
                found.append(reservation)
            return reservation is not None

        while not found:
            peer = await self._wait_peer()
            if not attempt(has_turn=False):
                self._waits += 1
                await self._sender.wait_for_buffers(self, attempt, peer=peer)
        (reservation,) = found
        with contextlib.closing(reservation):
            yield reservation
            if not reservation.is_discarded:
                # It may have gone during the block, and another come.
                self._commit(reservation, await self._wait_peer())

    @contextmanager
    def reserve_nowait(self, length: int | None = None) -> Iterator[Reservation]:
        """As `reserve`, for a `with` block; raises what `send_nowait` does."""
        self._check_length(length)
        self._peer_nowait()
        reservation = self._sender.reserve(self.address, length)
        if reservation is None:
            raise trio.WouldBlock(f"{self!r}: no buffer is free")
        with contextlib.closing(reservation):
            yield reservation
            if not reservation.is_discarded:
                self._commit(reservation, self._peer())

    # Receiving.

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
        bus = self._bus
        if perf_counter() >= bus.slice_end:
            await bus.rest()
        else:
            await checkpoint_if_cancelled()
        if self._receiving:
            raise self._busy()
        if not self._queue and not (bus.drain(bus.poll_now) and self._queue):
            await self._wait_message()
        if self._careful:
            return self._take()
        return self._queue.popleft()  # type: ignore[return-value]  # only careful ones have others

    async def receive_many(self, limit: int | None = None) -> list[Message]:
        """The messages that are there, in order; waits until there is one.

        Args:
            limit: most messages to return; by default all.

        Raises and is cancelled as `receive`.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"a limit of {limit} messages; at least 1 is needed")
        bus = self._bus
        if perf_counter() >= bus.slice_end:
            await bus.rest()
        else:
            await checkpoint_if_cancelled()
        if self._receiving:
            raise self._busy()
        queue = self._queue
        if not queue and not (bus.drain(bus.poll_now) and queue):
            await self._wait_message()
        if self._careful or (limit is not None and limit < len(queue)):
            count = len(queue) if limit is None else min(limit, len(queue))
            return [self._take() for _ in range(count)]
        messages = list(queue)
        queue.clear()
        self._taken += len(messages)
        return messages  # type: ignore[return-value]  # only careful endpoints have others

    def receive_nowait(self) -> Message:
        """The next message if it is there; otherwise raises trio.WouldBlock, or as `receive`."""
        self._is_read()
        if not self._has_message():
            raise trio.WouldBlock
        return self._take()

    async def hold(self) -> HeldMessage:
        """The next message, in its shared buffer until it is released; waits for one.

        Only for an endpoint that was opened with `in_place`. The peer lacks the buffer meanwhile.

        Raises:
            StateError: the endpoint was not opened with `in_place`. Otherwise as `receive`.
        """
        if not self._in_place:
            raise StateError(f"{self!r}: open it with in_place=True to hold messages")
        bus = self._bus
        await bus.pause()
        if self._receiving:
            raise self._busy()
        if not self._queue and not (bus.drain(bus.poll_now) and self._queue):
            await self._wait_message()
        return self._hold()

    def hold_nowait(self) -> HeldMessage:
        """As `hold`, or raises trio.WouldBlock."""
        if not self._in_place:
            raise StateError(f"{self!r}: open it with in_place=True to hold messages")
        self._is_read()
        if not self._has_message():
            raise trio.WouldBlock
        return self._hold()

    async def serve(self, handler: Handler, *, concurrency: int = 1) -> None:
        """Calls `handler` for each message until the channel ends.

        Returns when the peer withdrew the channel, or the endpoint was closed here, also by a
        handler, and all handlers have returned.

        Args:
            handler: an async function of one `Message`. It answers with `send_to`, to the
                message's source; what it returns is ignored, and what it raises ends this call.
            concurrency: handlers that may run at once. With 1 the messages are handled in
                their order; with more they are begun in it.

        Raises:
            trio.BrokenResourceError: the other side is gone.
            trio.BusyResourceError: another task receives here already.
        """
        if concurrency < 1:
            raise ValueError(f"a concurrency of {concurrency}; at least 1 is needed")
        if concurrency == 1:
            while (message := await self._next()) is not None:
                await handler(message)
            return
        room = trio.Semaphore(concurrency)

        async def run(message: Message) -> None:
            try:
                await handler(message)
            finally:
                room.release()

        try:
            with plain_errors():
                async with trio.open_nursery() as nursery:
                    await room.acquire()
                    while (message := await self._next()) is not None:
                        nursery.start_soon(run, message)
                        await room.acquire()
        except BaseExceptionGroup as group:
            # Handlers that send hear of the other side's end too: that is one error.
            if group.split(trio.BrokenResourceError)[1] is None:
                self.check_usable()
            raise

    async def _next(self) -> Message | None:
        """The next message, or None when the channel has ended or was closed here."""
        try:
            return await self.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            return None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    # Closing.

    async def aclose(self) -> None:
        """Withdraws the announcement and closes. Idempotent.

        Cancellation: closes all the same; when no buffer is free for the withdrawal it
        waits at most a second for one, shielded.
        """
        try:
            if self._withdrawing is not None:
                await self._withdrawing.wait()
            elif self._told and not self._over and self._bus.failure is None:
                self._withdrawing = trio.Event()
                self._told = self._announces = False
                with (
                    trio.move_on_after(CLOSE_GRACE, shield=True),
                    contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError),
                ):
                    withdrawal = self.announcement(destroy=True)
                    await self._send(withdrawal, self.address, NAME_SERVICE_ADDRESS, counts=False)
        finally:
            self.close()
            if self._withdrawing is not None:
                self._withdrawing.set()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def close(self) -> None:
        """Closes at once, without a word to the peer. Idempotent."""
        if not self._closed:
            self._closed = self._over = True
            self._announces = False
            heads = self._clear()
            self._bus.forget(self, heads)
            self.wake()

    # What follows is for the bus.

    async def announce(self) -> None:
        """Tells the peer of this endpoint."""
        self._check_length(len(self.announcement()))
        # From before it goes out: a service that is announced to us meanwhile gets its answer.
        self._announces = True
        await checkpoint_if_cancelled()
        await self._send(self.announcement(), self.address, NAME_SERVICE_ADDRESS, counts=False)
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

    @property
    def taken(self) -> int:
        """Messages taken out of its queue; counted only where it matters."""
        return self._taken

    @property
    def in_place(self) -> bool:
        """Whether its messages stay in their shared buffers."""
        return self._in_place

    @property
    def occupies(self) -> bool:
        """Whether queued messages keep shared buffers."""
        return bool(self._held) or (self._in_place and bool(self._queue))

    def check_usable(self) -> None:
        """Raises when the endpoint is closed or its bus failed."""
        if self._closed:
            raise trio.ClosedResourceError(f"{self!r} was closed")
        if self._failure is not None:
            what = f"{self!r} (opened without rebind, it ended with its device)"
            raise self._bus.broken(what, self._failure)
        if self._bus.failure is not None:
            raise self._bus.broken(repr(self))

    def bind(self, destination: int) -> None:
        """The peer is at `destination` from now on."""
        if self._failure is None:
            self._destination = destination
            self._withdrawn = False
            self._binding.unpark_all()

    def unbind(self) -> None:
        """The peer withdrew the channel."""
        if self._given_destination == ADDRESS_ANY:
            self._destination = ADDRESS_ANY
            self._withdrawn = not self._rebind
            self._sender.call(self)
            self.wake()

    def deliver(self, messages: Sequence[Message | _Occupied], length: int) -> None:
        """Messages of `length` bytes each came; what cannot be kept is dropped and counted."""
        if self._destination == ADDRESS_ANY:
            self.bind(messages[0].source)
        count = len(messages)
        self._received += count
        self._received_bytes += count * length
        queue = self._queue
        queue.extend(messages)
        if len(queue) >= self._bound:
            self._limit()
        if self._sleeper is not None:
            trio.lowlevel.reschedule(self._sleeper)
            self._sleeper = None

    def deliver_one(self, message: Message, length: int) -> None:
        """As `deliver` of one message: the way of most that come when many endpoints are busy."""
        if self._destination == ADDRESS_ANY:
            self.bind(message.source)
        self._received += 1
        self._received_bytes += length
        self._queue.append(message)
        if len(self._queue) >= self._bound:
            self._limit()
        if self._sleeper is not None:
            trio.lowlevel.reschedule(self._sleeper)
            self._sleeper = None

    def deliver_kept(self, arrival: Arrival) -> None:
        """A message came whose buffer is kept."""
        message = arrival.messages[0]
        if arrival.kept == IN_PLACE:
            self.deliver([_Occupied(arrival.head, arrival.length, message.source)], arrival.length)
        else:
            self._held.append(arrival.head)
            self.deliver([message], arrival.length)

    def give_up_held(self) -> None:
        """It was not read for too long: what it holds is dropped."""
        self._unread = True
        if self._in_place:
            # Each message that it keeps costs a buffer, so it keeps none until it is read.
            self._bound = 0
            self._drop(len(self._queue), newest=True)
        else:
            for _ in range(len(self._held)):
                self._queue.pop()
            self._dropped += len(self._held)
            self._bus.count_drops(unread=len(self._held))
            self._bus.kept.release([*self._held])
            self._held.clear()
        self._stop_holding_back()
        self._careful = True  # so that being read is noticed

    def lose(self, failure: OpenAMPError) -> None:
        """The bus goes on without this endpoint."""
        self._failure = failure
        self._over = True
        # What was copied can still be received.
        copied = [each for each in self._queue if not isinstance(each, _Occupied)]
        self._bus.count_drops(stale=len(self._queue) - len(copied))
        self._clear()
        self._queue.extend(copied)

    def revive(self) -> bool:
        """The bus goes on over a new device. Returns whether this endpoint asked to go on too."""
        if not self._rebind:
            return False
        self._bus.count_drops(stale=len(self._queue))
        self._clear()
        self._destination = self._given_destination
        self._told = self._announces = self._withdrawn = self._unread = False
        self._bound = self._queue_limit
        return True

    def vacate(self) -> list[int]:
        """Its messages leave their shared buffers, to wait as copies. Returns the buffers."""
        heads = [*self._held]
        self._held.clear()
        for place, each in enumerate(self._queue):
            if isinstance(each, _Occupied):
                payload = self._bus.kept.copy(each.head, each.length)
                self._queue[place] = Message(payload, each.source)
                heads.append(each.head)
        return heads

    def handed(self) -> HandedEndpoint:
        """What the next host has to know of it."""
        return HandedEndpoint(self.name, self.address, self.destination, self._told)

    def take_over(self, handed: HandedEndpoint) -> None:
        """The peer knows it from the host before."""
        if self._given_destination == ADDRESS_ANY and handed.destination is not None:
            self._destination = handed.destination
        self._told = handed.announced

    def inherit(self, stand_in: Endpoint) -> None:
        """Goes on for one that stood in for it at its address."""
        if self._given_destination == ADDRESS_ANY:
            self._destination = stand_in._destination
        self._told = self._announces = stand_in._told and self._wants_announcing
        self._received = stand_in._received
        self._received_bytes = stand_in._received_bytes
        self._dropped = stand_in._dropped
        self._withdrawn = stand_in._withdrawn and not self._rebind
        self._queue, stand_in._queue = stand_in._queue, self._queue
        self._held, stand_in._held = stand_in._held, self._held
        self._holds_back = stand_in._holds_back
        self._careful = self._in_place or self._holds_back
        if len(self._queue) >= self._bound:
            self._limit()

    @property
    def is_told(self) -> bool:
        """Whether the peer knows of it."""
        return self._told

    def announces_again(self) -> bool:
        """Whether the peer is to be told of this endpoint, on a new device."""
        self._announces = self._wants_announcing
        return self._announces

    @property
    def wants_announcing(self) -> bool:
        """Whether it is to be announced when there is a peer."""
        return self._wants_announcing

    def report(self) -> EndpointReport:
        """What a dump shows of it."""
        return EndpointReport(
            self.name, self.address, self.destination, self.when_full.value, self.statistics
        )

    def wake(self) -> None:
        """Something is over: whoever waits has to look."""
        if self._sleeper is not None:
            trio.lowlevel.reschedule(self._sleeper)
            self._sleeper = None
        self._binding.unpark_all()

    # Inside.

    async def _wait_message(self) -> None:
        """Until there is something to receive; only for the one task that receives."""
        self._receiving = True
        self._is_read()
        generation = self._bus.generation
        try:
            if self._has_message():
                return
            while True:
                await self._sleep()
                if self._queue or self._has_message():
                    return
                self._bus.check_generation(generation)
        finally:
            self._receiving = False

    def _busy(self) -> trio.BusyResourceError:
        return trio.BusyResourceError(f"{self!r}: another task receives here already")

    async def _sleep(self) -> None:
        def abort(_: object) -> trio.lowlevel.Abort:
            self._sleeper = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._sleeper = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)
        self._bus.begin_slice()

    def _has_message(self) -> bool:
        """Looks into the ring too. Raises when none can come any more."""
        if self._closed:
            raise trio.ClosedResourceError(f"{self!r} was closed")
        if not self._queue and self._bus.failure is None and self._failure is None:
            self._bus.drain()
        if self._queue:
            return True
        if self._withdrawn:
            raise trio.EndOfChannel(f"{self!r}: the other side withdrew the channel")
        self.check_usable()
        return False

    def _take(self) -> Message:
        message = self._queue.popleft()
        if not self._careful:
            return message  # type: ignore[return-value]  # only careful endpoints have others
        self._taken += 1
        self._is_read()
        if isinstance(message, _Occupied):
            with self._bus.kept.open_held(message.head, message.length, message.source) as held:
                return Message(bytes(held.view), message.source)
        self._made_room()
        return message

    def _hold(self) -> HeldMessage:
        message = self._queue.popleft()
        self._taken += 1
        self._is_read()
        if isinstance(message, _Occupied):
            return self._bus.kept.open_held(message.head, message.length, message.source)
        # It came in several pieces, of which no one view can be made, so it is a copy.
        self._made_room()
        return HeldMessage(memoryview(message.payload), message.source, None)

    def _is_read(self) -> None:
        if self._unread:
            self._unread = False
            self._bound = self._queue_limit
            self._careful = self._in_place

    def _made_room(self) -> None:
        # Each message taken lets the peer send one, or two handlers that reply could both wait.
        if self._held:
            self._bus.kept.release([self._held.popleft()])
        if self._holds_back and not self._held and len(self._queue) <= self._queue_limit // 2:
            self._stop_holding_back()

    def _limit(self) -> None:
        """Does what is to be done when there are as many messages as there may be."""
        excess = len(self._queue) - self._bound
        if self.when_full is not WhenFull.HOLD_BACK:
            self._drop(excess, newest=self.when_full is WhenFull.DROP_NEWEST)
        elif self._unread:
            self._drop(excess, newest=True)
        elif not self._holds_back:
            self._holds_back = self._careful = True
            self._bus.kept.choose(self)

    @property
    def holds_back(self) -> bool:
        """Whether further messages have to stay in their buffers."""
        return self._holds_back

    def _stop_holding_back(self) -> None:
        if self._holds_back:
            self._holds_back = False
            self._careful = self._in_place
            self._bus.kept.choose(self)

    def _drop(self, count: int, *, newest: bool) -> None:
        if count <= 0:
            return
        take = self._queue.pop if newest else self._queue.popleft
        dropped = [take() for _ in range(count)]
        self._dropped += count
        self._bus.count_drops(**{"unread" if self._unread else "full": count})
        heads = [each.head for each in dropped if isinstance(each, _Occupied)]
        copied = min(count - len(heads), len(self._held))
        self._bus.kept.release(heads + [self._held.pop() for _ in range(copied)])

    def _clear(self) -> list[int]:
        """Empties the queue. Returns the buffers that its messages occupied."""
        heads = [*self._held]
        heads += [each.head for each in self._queue if isinstance(each, _Occupied)]
        self._queue.clear()
        self._held.clear()
        self._holds_back = False
        self._careful = self._in_place
        return heads

    def _check_payload(self, payload: Payload) -> bytes:
        data = payload if type(payload) is bytes else memoryview(payload).tobytes()
        self._check_length(len(data))
        return data

    def _check_payloads(self, payloads: Sequence[Payload]) -> list[bytes]:
        parts = [*payloads]
        if set(map(type, parts)) <= _ONLY_BYTES:
            self._check_length(max(map(len, parts), default=0))
            return parts  # type: ignore[return-value]  # they are all bytes
        return [self._check_payload(payload) for payload in payloads]

    def _check_length(self, length: int | None) -> None:
        if length is not None and not 0 <= length <= self._bus.payload_limit:
            raise ValueError(
                f"payload of {length} bytes; the limit is {self._bus.payload_limit} bytes"
            )

    async def _wait_peer(self) -> int:
        """As `wait_bound`, but a withdrawn channel is not waited for."""
        generation = self._bus.generation
        while not self.is_bound and not self._withdrawn:
            self.check_usable()
            self._bus.check_generation(generation)
            await self._binding.park()
        return self._peer()

    def _peer(self) -> int:
        self.check_usable()
        if not self.is_bound:
            why = "the other side withdrew the channel"
            raise trio.BrokenResourceError(f"{self!r}: {why}") from PeerGoneError(why)
        return self._destination

    def _peer_nowait(self) -> int:
        self.check_usable()
        if not self.is_bound and not self._withdrawn:
            raise trio.WouldBlock(f"{self!r}: no peer yet")
        return self._peer()

    def _send_now(self, data: bytes, source: int, destination: int) -> None:
        self.check_usable()
        if not self._sender.send_nowait(source, destination, data):
            raise trio.WouldBlock(f"{self!r}: no buffer is free")
        self._count_sent(1, len(data))

    def _transmit(self, payload: Payload, destination: int) -> bool:
        """Sends the way of nearly every message. Returns whether it went; if not, `_send` sorts
        out why."""
        sender = self._sender
        if type(payload) is not bytes or self._over or sender.blocked:
            return False
        if not 0 <= destination < ADDRESS_ANY:
            return False
        length = len(payload)
        result = sender.transmit(self.address, destination, payload, length)
        if result < 0:
            return False
        if result:
            sender.kick()
        self._sent += 1
        self._sent_bytes += length
        return True

    async def _send(
        self,
        data: bytes,
        source: int,
        destination: int,
        *,
        to_peer: bool = False,
        counts: bool = True,
    ) -> bool:
        """Returns whether it went: not where it is for the peer, and that went or changed."""
        self.check_usable()
        sender = self._sender
        if not sender.send_nowait(source, destination, data):
            self._waits += 1
            went = await sender.wait_for_buffers(
                self,
                lambda: sender.send_nowait(source, destination, data, has_turn=True),
                peer=destination if to_peer else None,
            )
            if not went:
                return False
        if counts:
            self._count_sent(1, len(data))
        return True

    def _count_sent(self, count: int, length: int) -> None:
        self._sent += count
        self._sent_bytes += length

    def _commit(self, reservation: Reservation, destination: int) -> None:
        reservation.commit(destination)
        self._count_sent(1, reservation.length)
