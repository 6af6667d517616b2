"""RPMsg messages in one direction through a virtqueue, over the C fast path."""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from openamp_py.virtio._ring import ffi, lib
from openamp_py.virtio.shared import Pinned
from openamp_py.virtio.takeover import Lent
from openamp_py.virtio.virtqueue import Role, Virtqueue

HEADER_SIZE: Final[int] = lib.MESSAGE_HEADER
"""Bytes before the payload in each buffer."""

SOURCE_SIZE: Final[int] = lib.MESSAGE_SOURCE
"""Bytes after each received payload in C's data: its source."""

MAX_BUFFER_SIZE: Final = HEADER_SIZE + 0xFFFF
"""The header's length field is a u16, so a larger buffer is never filled."""

NO_BUFFER: Final[int] = lib.VQ_EMPTY
SMALL_BUFFER: Final[int] = lib.VQ_SMALL
"""Results of sending: no buffer is free; the one the other side lent is too small."""

RETURNED: Final[int] = lib.MESSAGE_RETURNED
KEPT: Final[int] = lib.MESSAGE_KEPT
IN_PLACE: Final[int] = lib.MESSAGE_IN_PLACE
"""What became of a received message's buffer: it went back; it is kept, the payload having been
copied; it is kept, and the payload is only there."""

BATCH: Final = 64
"""Most messages taken in one call: enough to make the call itself cheap, few enough that the
other tasks get their turn (a call takes some 10 us when full)."""

# struct message_record of message_ring.h: dst u32; length, kept u16; src, offset, head u32
_RECORD = struct.Struct("<IHHIII")
_unpack_first = struct.Struct("<IHHI").unpack_from
_NULL = ffi.NULL

_ALIKE: Final[int] = lib.MESSAGE_ALIKE
_EVEN: Final[int] = lib.MESSAGE_EVEN
_ALIKE_OR_EVEN = _ALIKE | _EVEN
_WORDS = 5  # u32 in a record, of which the first is the destination
_COUNT = 0xFFFF
_GIVE_BACK: Final[int] = lib.MESSAGE_GIVE_BACK
_STAY_QUIET: Final[int] = lib.MESSAGE_STAY_QUIET
_QUIET = _GIVE_BACK | _STAY_QUIET

_receive = lib.poll_receive

BROKEN: Final[int] = lib.VQ_BROKEN
POLLED: Final[int] = lib.POLL_TRIED
POLL_HIT: Final[int] = lib.POLL_HIT
"""Bits of what `MessageRing.take` returns first: it spun; and something came meanwhile."""
KICK: Final[int] = lib.MESSAGE_KICK
"""The same: the other side wants a kick for returned buffers."""
MORE: Final[int] = lib.MESSAGE_MORE
"""The same: there is more, also where the other side has kicked."""
MIXED: Final = -1
SEVERAL: Final = -2
"""Instead of a destination: what came is a list of Arrival; or messages of the same length, for
`MessageRing.destinations`."""


class Message(NamedTuple):
    """What came for an endpoint."""

    payload: bytes
    source: int
    """The sender's address."""


_make_message = functools.partial(tuple.__new__, Message)


class Arrival(NamedTuple):
    """Messages for one destination that came together."""

    destination: int
    messages: list[Message]
    """One where its buffer is kept; with an empty payload where that is in place."""
    length: int
    """Bytes of payload of each."""
    kept: int
    """RETURNED, KEPT or IN_PLACE."""
    head: int
    """The kept buffer."""


_make_arrival = functools.partial(tuple.__new__, Arrival)

_NO_MESSAGES: list[Message] = []
_NO_ARRIVALS: list[Arrival] = []


class Transmit(Protocol):
    """See `MessageRing.transmit`."""

    def __call__(self, source: int, destination: int, payload: bytes, length: int, /) -> int: ...


def transmit_closed(_source: int, _destination: int, _payload: bytes, _length: int) -> int:
    """What `MessageRing.transmit` is once the ring is closed."""
    return BROKEN


@functools.lru_cache(maxsize=256)
def _layout(length: int) -> struct.Struct:
    """A payload of this length and its source, as message_ring_receive lays them out."""
    return struct.Struct(f"<{length}sI")


class MessageRing:
    """One direction of an RPMsg link: either all sending or all receiving.

    Made and closed by the bus. One task at a time. All methods raise VirtqueueError once
    the other side has written an impossible value into the ring.

    Attributes:
        destinations: of each message that `take` returned last for SEVERAL.
        transmit: what `send` does, for the path of nearly every message: also BROKEN is a
            result, as it is for a closed ring.

    Args:
        queue: started by this object; owned by it from now on.
        sender: whether this end sends.
        buffer_size: bytes of a buffer, header included. The driver lends buffers of this
            size; a device must know it, because it can only send what fits.
        pool: driver only: physical address and memory of ``num * buffer_size`` bytes.
        lent: driver only: goes on where another driver left that had lent this, instead of
            beginning anew.

    Raises:
        VirtqueueError: the device contradicts what was lent.
    """

    def __init__(
        self,
        queue: Virtqueue,
        *,
        sender: bool,
        buffer_size: int,
        pool: tuple[int, memoryview] | None = None,
        lent: Lent | None = None,
    ) -> None:
        num = queue.layout.num
        if not HEADER_SIZE < buffer_size <= MAX_BUFFER_SIZE:
            raise ValueError(
                f"buffers of {buffer_size} bytes; "
                f"{HEADER_SIZE + 1} to {MAX_BUFFER_SIZE} are possible"
            )
        self.queue = queue
        self.buffer_size = buffer_size
        self._pool: Pinned | None = None
        self._spans = ffi.new("struct vq_span[]", num)
        self._places = ffi.new("uint64_t[]", num)
        self.destinations: list[int] = []
        self._ring = self._handle = ffi.new("struct message_ring *")
        ring = self._handle
        ring.queue = queue.handle
        ring.spans = self._spans
        ring.places = self._places
        ring.buffer_size = buffer_size
        ring.sender = sender
        self.transmit: Transmit = functools.partial(lib.message_ring_send, ring)
        if sender:
            self._spares = ffi.new("uint16_t[]", num)
            ring.spares = self._spares
            self._capacity = ffi.new("uint32_t *")
        else:
            self._batch = max(1, min(BATCH, num))
            self._keep = ffi.NULL
            self._scratch = ffi.new("uint8_t[]", buffer_size)
            ring.scratch = self._scratch
            self._records = ffi.new("struct message_record[]", self._batch)
            self._record_bytes = memoryview(ffi.buffer(self._records))
            self._record_words = self._record_bytes.cast("I")
            room = buffer_size - HEADER_SIZE + SOURCE_SIZE
            self._data = ffi.new("uint8_t[]", self._batch * room)
            self._data_buffer = ffi.buffer(self._data)
            self._data_bytes = memoryview(self._data_buffer)
        if queue.role is Role.DRIVER:
            if pool is None or pool[1].nbytes < num * buffer_size:
                raise ValueError(f"{queue.name}: {num * buffer_size} bytes of buffers are needed")
            self._pool = Pinned(pool[1])
            ring.pool_pa, ring.pool = pool[0], self._pool.pointer
            offsets = range(0, num * buffer_size, buffer_size) if lent is None else lent.offsets
            self._offsets = ring.offsets = ffi.new("uint32_t[]", list(offsets))
            if lent is not None:
                queue.resume(lent.available, lent.heads, buffer_size)
            else:
                queue.start()
            if not sender:
                queue.result(lib.message_ring_fill(ring))
        else:
            queue.attach()
        if sender:
            queue.notify_off()

    @property
    def handle(self) -> Any:
        """The C structure, for the other wrappers on this floor."""
        if self._ring is None:
            raise ValueError(f"{self.queue.name} is closed")
        return self._ring

    @property
    def payload_limit(self) -> int:
        """Most bytes of payload in one message."""
        return self.buffer_size - HEADER_SIZE

    @property
    def messages(self) -> int:
        """Messages sent or received so far."""
        return int(self._handle.messages)

    @property
    def payload_bytes(self) -> int:
        """Bytes of their payloads."""
        return int(self._handle.bytes)

    @property
    def bad_length(self) -> int:
        """Messages dropped so far because their header contradicts their buffer."""
        return int(self._handle.bad_length)

    @property
    def bad_source(self) -> int:
        """Messages dropped so far because their source is the address that means "any"."""
        return int(self._handle.bad_source)

    @property
    def kicks(self) -> tuple[int, int]:
        """How often the other side wanted to be told of something, and how often it did not."""
        return int(self._handle.kicks), int(self._handle.unkicked)

    def send(self, source: int, destination: int, payload: bytes) -> int:
        """Sends one message.

        Returns:
            1 sent and the other side wants a kick, 0 sent, NO_BUFFER, or SMALL_BUFFER, also
            where it is longer than `payload_limit`.
        """
        if self._ring is None:
            raise ValueError(f"{self.queue.name} is closed")
        return self.queue.result(self.transmit(source, destination, payload, len(payload)))

    def send_many(
        self, source: int, destination: int, data: bytes, lengths: Any, done: int, offset: int
    ) -> tuple[int, bool]:
        """Sends messages that lie end to end in `data`, as far as there are buffers.

        Args:
            lengths: of each, from `encode_lengths`.
            done: how many of them went before.
            offset: the bytes of those.

        Returns:
            How many went now (or NO_BUFFER or SMALL_BUFFER where none did), and whether the
            other side wants a kick.
        """
        result = self.queue.result(
            lib.message_ring_send_many(
                self._ring,
                source,
                destination,
                ffi.from_buffer(data) + offset,
                lengths + done,
                len(lengths) - done,
            )
        )
        return (result, False) if result < 0 else (result & _COUNT, bool(result & KICK))

    def reserve(self) -> tuple[int, int, int]:
        """Takes a free buffer to build a message in.

        Returns:
            Its head (or NO_BUFFER or SMALL_BUFFER), the physical address of its payload, and how
            many bytes fit.
        """
        head = self.queue.result(lib.message_ring_reserve(self.handle, self._capacity))
        if head < 0:
            return head, 0, 0
        return head, int(self._places[head]), int(self._capacity[0])

    def commit(self, head: int, source: int, destination: int, length: int) -> bool:
        """Sends the message in a reserved buffer. Returns whether the other side wants a kick."""
        result = self.queue.result(
            lib.message_ring_commit(self.handle, head, source, destination, length)
        )
        if result < 0:
            raise ValueError(f"{self.queue.name}: buffer {head} is not reserved for {length} bytes")
        return bool(result)

    def cancel(self, head: int) -> None:
        """Makes a reserved buffer free again, unsent."""
        if lib.message_ring_cancel(self.handle, head) < 0:
            raise ValueError(f"{self.queue.name}: buffer {head} is not reserved")

    def keep(self, destinations: Mapping[int, int]) -> None:
        """Says to which destinations messages keep their buffers from now on: KEPT or IN_PLACE."""
        self._keep = ffi.new("struct message_keep[]", sorted(destinations.items()))
        self.handle.keep = self._keep
        self.handle.keep_count = len(destinations)

    def receive(
        self, *, give_back: bool = True, stay_quiet: bool = False
    ) -> tuple[list[Arrival], bool, bool]:
        """Takes messages that have come, at most 64.

        Args:
            give_back: return their buffers at once, but for those of `keep`; otherwise all
                are KEPT.
            stay_quiet: when nothing is left, leave notifications off if they are.

        Returns:
            The messages in the order they came, whether the other side wants a kick for
            returned buffers, and whether there may be more (then call again: no
            notification will come).
        """
        how = (_GIVE_BACK if give_back else 0) | (_STAY_QUIET if stay_quiet else 0)
        result: int = _receive(self._ring, ffi.NULL, 0, self._records, self._data, self._batch, how)
        if result < 0:
            self.queue.result(result)
        arrivals = self._sort_out(result & _COUNT)
        return arrivals, bool(result & KICK), bool(result & MORE)

    def take(
        self, nanoseconds: int, sending: MessageRing | None
    ) -> tuple[int, int, int, list[Message], list[Arrival]]:
        """As `receive` that stays quiet, for the path of nearly every message.

        Args:
            nanoseconds: where nothing is there, spin so long until something is, or a free
                buffer of `sending`; both rings are left quiet then.

        Returns:
            The bits KICK, MORE, POLLED and POLL_HIT. Then, where none is kept and the length is
            the same for all that came, their destination or SEVERAL, the length of each, and the
            messages; otherwise MIXED, 0, no messages, and what came as arrivals.
        """
        result: int = _receive(
            self._ring,
            _NULL if sending is None else sending.handle,
            nanoseconds,
            self._records,
            self._data,
            self._batch,
            _QUIET,
        )
        count = result & _COUNT
        if count == 0:
            return result, MIXED, 0, _NO_MESSAGES, _NO_ARRIVALS
        if result < 0:
            self.queue.result(result)
        if not result & _ALIKE_OR_EVEN:
            return result, MIXED, 0, _NO_MESSAGES, self._sort_out(count)
        destination, length, _, source = _unpack_first(self._record_bytes)
        if result & _EVEN:
            destination = SEVERAL
            self.destinations = self._record_words[: count * _WORDS : _WORDS].tolist()
        if count == 1:
            messages = [_make_message((self._data_buffer[:length], source))]
        else:
            layout = _layout(length)
            data = self._data_bytes[: count * layout.size]
            messages = [*map(_make_message, layout.iter_unpack(data))]
        return result, destination, length, messages, _NO_ARRIVALS

    def _sort_out(self, count: int) -> list[Arrival]:
        data = self._data_buffer
        records = self._record_bytes[: count * _RECORD.size]
        return [
            _make_arrival(
                (
                    destination,
                    [
                        _make_message(
                            (b"" if kept == IN_PLACE else data[offset : offset + length], source)
                        )
                    ],
                    length,
                    kept,
                    head,
                )
            )
            for destination, length, kept, source, offset, head in _RECORD.iter_unpack(records)
        ]

    def place(self, head: int) -> int:
        """Physical address of the payload in a buffer that is kept in place."""
        return int(self._places[head])

    def release(self, heads: Sequence[int]) -> bool:
        """Gives received buffers back. Returns whether the other side wants a kick.

        Raises:
            ValueError: a head is not held or named twice; nothing was given back.
        """
        if len(set(heads)) < len(heads) or not all(0 <= h < self.queue.layout.num for h in heads):
            raise ValueError(f"{self.queue.name}: of the buffers {list(heads)} one is not held")
        result = self.queue.result(
            lib.message_ring_release(self._ring, ffi.new("uint16_t[]", list(heads)), len(heads))
        )
        if result < 0:
            raise ValueError(f"{self.queue.name}: of the buffers {list(heads)} one is not held")
        return bool(result)

    def leave(self) -> None:
        """Sending driver: notes in shared memory what is out, for the next driver.

        Nothing may be reserved, and nothing be sent after it.
        """
        self.queue.leave()

    def has_buffer(self) -> bool:
        """Whether a buffer is free. A broken ring counts as one: sending will tell."""
        return bool(lib.message_ring_has_buffer(self._ring))

    def want_buffer(self) -> bool:
        """Asks to be notified of a free buffer. Returns whether there is one already."""
        return bool(self.queue.result(lib.message_ring_want_buffer(self._ring)))

    def close(self) -> None:
        """Lets go of the shared memory. Idempotent; what was counted can still be read."""
        self.queue.close()
        self.transmit = transmit_closed
        self._ring = None  # a call after this is a TypeError and touches no memory
        if self._pool is not None:
            self._pool.close()


def encode_lengths(payloads: Sequence[bytes]) -> Any:
    """The lengths of messages as `MessageRing.send_many` wants them."""
    return ffi.from_buffer("uint32_t[]", array("I", map(len, payloads)))


def poll_rings(receiving: MessageRing, sending: MessageRing | None, seconds: float) -> bool:
    """Spins until a message is there, or (unless None) a free buffer of `sending`, or time is up.

    Other threads run meanwhile, but no task of this one. Both rings are left without
    notifications. Returns whether there is something; a broken ring counts.
    """
    other = ffi.NULL if sending is None else sending.handle
    return bool(lib.poll_rings(receiving.handle, other, int(seconds * 1e9)))
