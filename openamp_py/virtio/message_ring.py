"""RPMsg messages in one direction through a virtqueue, over the C fast path."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

from openamp_py.virtio._ring import ffi, lib
from openamp_py.virtio.virtqueue import Role, Virtqueue

HEADER_SIZE: Final[int] = lib.MESSAGE_HEADER
"""Bytes before the payload in each buffer."""

MAX_BUFFER_SIZE: Final = HEADER_SIZE + 0xFFFF
"""The header's length field is a u16, so a larger buffer is never filled."""

# struct message_record of message_ring.h: src, dst, offset u32; length, flags, head, pad u16
_RECORD = struct.Struct("<IIIHHHH")

BATCH: Final = 64
"""Most messages taken in one call: enough to make the call itself cheap, few enough that the
other tasks get their turn (a call takes some 10 us when full)."""

Received = tuple[int, int, int, bytes]
"""One received message: source, destination, head (for `release`), payload."""


class MessageRing:
    """One direction of an RPMsg link: either all sending or all receiving.

    Made and closed by the bus. One task at a time. All methods raise VirtqueueError once
    the other side has written an impossible value into the ring.

    Args:
        queue: started by this object; owned by it from now on.
        sender: whether this end sends.
        buffer_size: bytes of a buffer, header included. The driver lends buffers of this
            size; a device must know it, because it can only send what fits.
        pool: driver only: physical address and memory of ``num * buffer_size`` bytes.
    """

    def __init__(
        self,
        queue: Virtqueue,
        *,
        sender: bool,
        buffer_size: int,
        pool: tuple[int, memoryview] | None = None,
    ) -> None:
        num = queue.layout.num
        if not HEADER_SIZE < buffer_size <= MAX_BUFFER_SIZE:
            raise ValueError(
                f"buffers of {buffer_size} bytes; "
                f"{HEADER_SIZE + 1} to {MAX_BUFFER_SIZE} are possible"
            )
        self.queue = queue
        self.buffer_size = buffer_size
        self._pool = None
        self._spans = ffi.new("struct vq_span[]", num)
        self._ring = ffi.new("struct message_ring *")
        self._ring.queue = queue.handle
        self._ring.spans = self._spans
        self._ring.buffer_size = buffer_size
        self._ring.sender = sender
        if queue.role is Role.DRIVER:
            if pool is None or pool[1].nbytes < num * buffer_size:
                raise ValueError(f"{queue.name}: {num * buffer_size} bytes of buffers are needed")
            self._pool = ffi.from_buffer("uint8_t[]", pool[1], True)
            self._ring.pool_pa, self._ring.pool = pool[0], self._pool
            queue.start()
            if not sender:
                queue.result(lib.message_ring_fill(self._ring))
        else:
            queue.attach()
        if sender:
            queue.notify_off()
        self._final_bad_length = 0
        self._batch = max(1, min(BATCH, num))
        if not sender:
            self._records = ffi.new("struct message_record[]", self._batch)
            self._record_bytes = ffi.buffer(self._records)
            self._data = ffi.new("uint8_t[]", self._batch * (buffer_size - HEADER_SIZE))
            self._data_bytes = ffi.buffer(self._data)

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
    def bad_length(self) -> int:
        """Messages dropped so far because their header contradicts their buffer."""
        return self._final_bad_length if self._ring is None else int(self._ring.bad_length)

    def send(self, source: int, destination: int, payload: bytes) -> int:
        """Sends one message of at most `payload_limit` bytes.

        Returns:
            1 sent and the other side wants a kick, 0 sent, -1 no buffer is free,
            -3 the other side lent a buffer that is too small for it.
        """
        return self.queue.result(
            lib.message_ring_send(
                self._ring, source, destination, ffi.from_buffer(payload), len(payload), 0
            )
        )

    def receive(self, give_back: bool = True) -> tuple[list[Received], bool, bool]:
        """Takes messages that have come, at most 64.

        Args:
            give_back: return their buffers at once; otherwise each waits for `release`.

        Returns:
            The messages, whether the other side wants a kick for returned buffers, and
            whether there may be more (then call again: no notification will come).
        """
        result = self.queue.result(
            lib.message_ring_receive(self._ring, self._records, self._data, self._batch, give_back)
        )
        data = self._data_bytes
        records = self._record_bytes[: (result & 0xFFFF) * _RECORD.size]
        return (
            [
                (src, dst, head, data[offset : offset + length])
                for src, dst, offset, length, _flags, head, _pad in _RECORD.iter_unpack(records)
            ],
            bool(result & lib.MESSAGE_KICK),
            bool(result & lib.MESSAGE_MORE),
        )

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

    def want_buffer(self) -> bool:
        """Asks to be notified of a free buffer. Returns whether there is one already."""
        return bool(self.queue.result(lib.message_ring_want_buffer(self._ring)))

    def close(self) -> None:
        """Lets go of the shared memory. Idempotent."""
        self.queue.close()
        self._final_bad_length = self.bad_length
        self._ring = None  # a call after this is a TypeError and touches no memory
        if self._pool is not None:
            ffi.release(self._pool)
