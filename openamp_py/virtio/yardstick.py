"""The benchmark's loops in C, over the rings of one link: what Python is measured against."""

from __future__ import annotations

from typing import Any, Final, NoReturn

from openamp_py.errors import PeerError, PeerGoneError
from openamp_py.virtio._ring import ffi, lib
from openamp_py.virtio.message_ring import BATCH, HEADER_SIZE, SOURCE_SIZE, MessageRing

NUMBER_SIZE: Final = 8
"""Bytes of the number that each message begins with."""

_NO_DOORBELL = -1
_NO_SINK: Final[int] = lib.MESSAGE_ANY
_UNLIMITED = 0xFFFF_FFFF

_FAILURES: Final = {
    lib.YARDSTICK_GONE: (PeerGoneError, "the other side closed its end of the doorbell"),
    lib.YARDSTICK_SILENT: (PeerError, "the other side does not answer"),
    lib.YARDSTICK_WRONG: (PeerError, "a message came back changed or out of order"),
    lib.YARDSTICK_LOST: (PeerError, "messages were lost or came out of order"),
    lib.VQ_SMALL: (PeerError, "the other side lent a buffer that is too small"),
}


class Yardstick:
    """One end of a link, worked in C.

    Made over rings that are up, by whoever opened them; has nothing to close. One thread at a
    time. Its calls block: other threads run meanwhile, but no task of this one.

    Args:
        sending: the ring towards the other side.
        receiving: the ring from it.
        doorbell: descriptor of the stream socket that both sides ring.
        peer: instead of a doorbell: the other end, which the same thread works whenever this
            one has to wait.
        polling: looks at the rings instead of sleeping, as long as something comes every now and
            then; the other end has to do the same.
        sink: messages to this address are counted by `echo`, and not returned.
    """

    def __init__(
        self,
        sending: MessageRing,
        receiving: MessageRing,
        *,
        doorbell: int = _NO_DOORBELL,
        peer: Yardstick | None = None,
        polling: bool = False,
        sink: int = _NO_SINK,
    ) -> None:
        self._sending = sending
        self._receiving = receiving
        self._peer = peer
        room = BATCH * (receiving.buffer_size - HEADER_SIZE + SOURCE_SIZE)
        self._records = ffi.new("struct message_record[]", BATCH)
        self._data = ffi.new("uint8_t[]", room)
        self._end = ffi.new("struct yardstick *")
        self._end.records = self._records
        self._end.data = self._data
        self._end.batch = BATCH
        self._end.polling = polling
        self._end.sink = sink
        self._end.doorbell = doorbell
        self._end.peer = ffi.NULL if peer is None else peer._end

    def measure(
        self,
        *,
        size: int,
        in_flight: int | None,
        seconds: float,
        source: int,
        destination: int,
        sources: int = 1,
    ) -> float:
        """Sends numbered messages to an echo service and checks all that comes back.

        Args:
            size: bytes of payload.
            in_flight: messages out at once; None for as many as there are buffers.
            seconds: how long to send; what is out after that is waited for, but not counted.
            source: this end's address.
            destination: the echo service's address.
            sources: so many addresses from `source` on send in turn.

        Returns:
            Round trips per second.

        Raises:
            ValueError: the size is not possible on this link.
            PeerGoneError: the other side closed its end of the doorbell.
            PeerError: a message came back changed or not at all.
        """
        run, _memory = self._create_run(size, 1, seconds, source, sources, destination)
        run.in_flight = _UNLIMITED if in_flight is None else in_flight
        result = lib.yardstick_measure(self._end, run)
        if result < 0:
            self._fail(result, f" ({run.sent} messages sent, {run.received} came back)")
        return float(run.timed) / float(run.taken) * 1e9

    def flood(
        self,
        *,
        size: int,
        batch: int,
        seconds: float,
        source: int,
        destination: int,
        sources: int = 1,
    ) -> float:
        """Sends numbered messages to a sink, which counts them.

        Args:
            size: bytes of payload.
            batch: messages sent with one call.
            seconds: how long to send.
            source: this end's address.
            destination: the sink's address.
            sources: so many addresses from `source` on send a batch in turn.

        Returns:
            Messages per second, until the sink had counted the last.

        Raises what `measure` does; a PeerError where the sink did not get what was sent.
        """
        run, _memory = self._create_run(size, batch, seconds, source, sources, destination)
        result = lib.yardstick_flood(self._end, run)
        if result < 0:
            wrong = run.received == lib.YARDSTICK_END
            counted = "some out of order" if wrong else f"{run.received} counted"
            self._fail(result, f" ({run.sent} messages sent, {counted})")
        return float(run.timed) / float(run.taken) * 1e9

    def _create_run(
        self, size: int, batch: int, seconds: float, source: int, sources: int, destination: int
    ) -> tuple[Any, Any]:
        """A `struct yardstick_run`, and memory that it needs as long as it is used."""
        limit = min(self._sending.payload_limit, self._receiving.payload_limit)
        if not NUMBER_SIZE <= size <= limit:
            raise ValueError(f"messages of {size} bytes; {NUMBER_SIZE} to {limit} are possible")
        payload = ffi.new("uint8_t[]", batch * size)
        lengths = ffi.new("uint32_t[]", [size] * batch)
        run = ffi.new("struct yardstick_run *")
        run.payload = payload
        run.lengths = lengths
        run.length = size
        run.batch = batch
        run.source = source
        run.sources = sources
        run.destination = destination
        run.nanoseconds = int(seconds * 1e9)
        self._use_rings()
        return run, (payload, lengths)

    def echo(self) -> None:
        """Returns every message to its sender until the other side is gone.

        Those for the sink are counted instead, and the end of a flood is answered with the count.

        Raises:
            PeerError: it broke the protocol.
        """
        self._use_rings()
        result = lib.yardstick_echo(self._end)
        if result != lib.YARDSTICK_GONE:
            self._fail(result)

    def _use_rings(self) -> None:
        """Also finds out that they are closed, before C would."""
        self._end.sending = self._sending.handle
        self._end.receiving = self._receiving.handle
        if self._peer is not None:
            self._peer._use_rings()

    def _fail(self, result: int, progress: str = "") -> NoReturn:
        if result in _FAILURES:
            error, what = _FAILURES[result]
            raise error(what + progress)
        ends = (self,) if self._peer is None else (self, self._peer)
        for queue in (ring.queue for end in ends for ring in (end._sending, end._receiving)):
            if queue.handle.fault:
                queue.result(result)
        raise AssertionError(f"a loop in C ended with {result}")
