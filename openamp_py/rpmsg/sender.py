"""The sending ring of a bus: messages that go out, and those who wait for a buffer."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from openamp_py.errors import PeerError, VirtqueueError
from openamp_py.rpmsg.batch import Batch
from openamp_py.rpmsg.in_place import Reservation
from openamp_py.virtio.message_ring import SMALL_BUFFER, Transmit, transmit_closed

if TYPE_CHECKING:
    from openamp_py.rpmsg.bus import Bus
    from openamp_py.rpmsg.endpoint import Endpoint
    from openamp_py.virtio import MessageRing, VirtioDevice


class _Turn:
    """A task that waits for a buffer."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.called = trio.Event()


class Sender:
    """Sends for the endpoints of a bus, in turn where buffers are short.

    Made by the bus, which calls `begin` for each device that it works. Whoever finds no buffer
    waits behind those who wait already. All of it is called in the bus's thread.

    Args:
        bus: whose ring it is.
        always_kick: see `BusOptions.always_kick`.

    Attributes:
        blocked: nothing can be sent at once: others wait for a buffer, or the link failed, which
            the bus says here.
        transmit: `MessageRing.transmit`, for where nothing is `blocked`.
        kick: tells the other side of what was sent, where `transmit` says so.
        turns: those who wait for a buffer, the first of them first.
        waits: how many had to wait so far.
    """

    def __init__(self, bus: Bus, *, always_kick: bool) -> None:
        self.blocked = False
        self.transmit: Transmit = transmit_closed
        self.turns: deque[_Turn] = deque()
        self.waits = 0
        self._bus = bus
        self._always_kick = always_kick
        self._reserved: dict[Reservation, tuple[int, int]] = {}

    def begin(self, device: VirtioDevice, ring: MessageRing, index: int) -> None:
        """Goes on with another device.

        Args:
            index: of the vring, for kicks.
        """
        self._device = device
        self._ring = ring
        self._index = index
        self.transmit = ring.transmit
        self.kick = functools.partial(self._bus.kick, index)
        self.blocked = bool(self.turns) or self._always_kick

    @property
    def reserved(self) -> tuple[int, ...]:
        """The buffers in which messages are being built."""
        return tuple(head for head, _ in self._reserved.values())

    # What follows is for the endpoints.

    def send_nowait(
        self, source: int, destination: int, payload: bytes, *, has_turn: bool = False
    ) -> bool:
        """Sends a message now, unless others wait for a buffer. Returns whether it went."""
        bus = self._bus
        if bus.failure is not None or (self.turns and not has_turn):
            return False
        try:
            result = self._ring.send(source, destination, payload)
        except VirtqueueError as error:
            bus.fail(error)
            raise bus.broken("send") from bus.failure
        if result < 0:
            return self._no_buffer(result, len(payload))
        bus.tell(self._index, wanted=bool(result))
        return True

    def send_batch(
        self,
        source: int,
        destination: int,
        batch: Batch,
        count: Callable[[int, int], None],
        *,
        has_turn: bool = False,
    ) -> bool:
        """Sends what can be sent of a batch now. Returns whether all of it went.

        Args:
            count: called with the number of messages that went, and their bytes.
        """
        bus = self._bus
        while not batch.is_done:
            if bus.failure is not None or (self.turns and not has_turn):
                return False
            try:
                sent, kick = self._ring.send_many(
                    source, destination, batch.data, batch.lengths, batch.done, batch.offset
                )
            except VirtqueueError as error:
                bus.fail(error)
                raise bus.broken("send") from bus.failure
            if sent < 0:
                return self._no_buffer(sent, len(batch.payloads[batch.done]))
            count(sent, batch.went(sent))
            bus.tell(self._index, wanted=kick)
        return True

    def reserve(
        self, source: int, length: int | None, *, has_turn: bool = False
    ) -> Reservation | None:
        """A buffer to build a message in, or None when none is free."""
        bus = self._bus
        if bus.failure is not None or (self.turns and not has_turn):
            return None
        ring = self._ring
        try:
            head, place, capacity = ring.reserve()
        except VirtqueueError as error:
            bus.fail(error)
            raise bus.broken("reserve") from bus.failure
        if head < 0:
            self._no_buffer(head, length or 0)
            return None
        size = capacity if length is None else length
        if size > capacity:
            ring.cancel(head)
            self._no_buffer(SMALL_BUFFER, size)
        view = self._device.memory.find_pa(place, capacity)
        assert view is not None, "translated before"
        reservation = Reservation(view, size, self)
        self._reserved[reservation] = (head, source)
        return reservation

    async def wait_for_buffers(
        self, endpoint: Endpoint, attempt: Callable[[], bool], *, peer: int | None = None
    ) -> bool:
        """Waits for buffers, behind those who wait already, until `attempt` says it is done.

        Args:
            peer: give up as soon as this is not the endpoint's peer any more.

        Returns:
            Whether it is done.

        Cancellation: what `attempt` did is done.
        """
        bus = self._bus
        turns = self.turns
        turn = _Turn(endpoint)
        generation = bus.generation
        turns.append(turn)
        self.blocked = True
        self.waits += 1
        bus.asked = False
        try:
            while True:
                endpoint.check_usable()
                bus.check_generation(generation)
                if peer is not None and endpoint.destination != peer:
                    return False
                if turns[0] is turn and (attempt() or (bus.drain(bus.poll_now) and attempt())):
                    return True
                endpoint.check_usable()
                turn.called = trio.Event()
                await turn.called.wait()
                bus.begin_slice()
        finally:
            turns.remove(turn)
            if turns:
                self.call_next()
            elif bus.usable:
                self.blocked = self._always_kick
                bus.hush()

    def call(self, endpoint: Endpoint) -> None:
        """Something changed for an endpoint: its senders that wait have to look."""
        for turn in self.turns:
            if turn.endpoint is endpoint:
                turn.called.set()

    # What follows is for reservations.

    def commit(self, reservation: Reservation, destination: int) -> None:
        """Sends a reserved buffer."""
        bus = self._bus
        head, source = self._reserved.pop(reservation)
        try:
            kick = self._ring.commit(head, source, destination, reservation.length)
        except VirtqueueError as error:
            bus.fail(error)
            raise bus.broken("send") from bus.failure
        bus.tell(self._index, wanted=kick)

    def cancel(self, reservation: Reservation) -> None:
        """Makes a reserved buffer free again."""
        head, _ = self._reserved.pop(reservation)
        self._ring.cancel(head)
        self.call_next()

    # What follows is for the bus.

    def call_next(self) -> None:
        """Calls the first who waits for a buffer, where there is one."""
        if self.turns and self._bus.usable and self._ring.has_buffer():
            self.turns[0].called.set()

    def call_all(self) -> None:
        """Something is over: all who wait have to look."""
        for turn in self.turns:
            turn.called.set()

    def take_away(self, error: Exception) -> None:
        """The ring is not ours any more; `error` is for whoever has a buffer of it reserved."""
        self.transmit = transmit_closed
        for reservation in self._reserved:
            reservation.take_away(error)
        self._reserved.clear()

    def _no_buffer(self, result: int, length: int) -> bool:
        """Sorts out why a message did not go. Returns False where there is no buffer."""
        if result != SMALL_BUFFER:
            return False
        limit = self._ring.payload_limit
        if length > limit:
            raise ValueError(f"payload of {length} bytes; the limit is {limit} bytes")
        raise trio.BrokenResourceError("send") from PeerError(
            f"{self._device.name}: the driver lent a buffer that is too small for "
            f"{length} bytes of payload; this side was told of "
            f"{self._ring.buffer_size} bytes with header"
        )
