"""What a driver that is gone has lent to its device, decoded so that another one can go on.

Three kinds of drivers leave three kinds of rings. Ours says in each sending descriptor whether it
is out (`Virtqueue.leave`). OpenAMP and Linux do not, nor does one of ours that was killed, so that
what is out is taken to be what was made available and not used since, which is right where the
device returns in order. All keep the receiving buffers lent, but for those that ours marks while
their messages are kept, and place the sending ones right behind them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from openamp_py.errors import VirtqueueError
from openamp_py.vring import VringLayout

LEFT_OUT: Final = 0xFFFE
LEFT_FREE: Final = 0xFFFF
"""What `Virtqueue.leave` writes into `next` (virtqueue.h); also LEFT_FREE of a kept buffer."""

# addr u64, len u32, flags u16, next u16 (virtio 1.2, 2.7.5)
_DESCRIPTOR = struct.Struct("<QIHH")
_WRITE = 2

_HEADER = 16
_MAX_SIZE = _HEADER + 0xFFFF


@dataclass(frozen=True, slots=True)
class RingCopy:
    """A vring at one moment, read once; any bytes."""

    name: str
    available: int
    """The driver's index."""
    used: int
    """The device's index, from before the rest was read."""
    heads: tuple[int, ...]
    """The slots of the available ring."""
    descriptors: tuple[tuple[int, int, int, int], ...]
    """addr, len, flags, next of each."""


@dataclass(frozen=True, slots=True)
class Lent:
    """What the device has, and where the buffers of all descriptors lie."""

    available: int
    """The index up to which it was lent."""
    heads: tuple[int, ...]
    """Descriptors that are out, or came back without being looked at."""
    pa: int
    """Physical address of the first buffer."""
    size: int
    """Bytes of each."""
    offsets: tuple[int, ...]
    """Where the buffer of each descriptor lies, from `pa` on."""


def copy_ring(
    name: str, layout: VringLayout, available: int, used: int, descriptors: bytes, ring: bytes
) -> RingCopy:
    """Takes the descriptors and the available ring apart; the indexes were loaded before."""
    return RingCopy(
        name,
        available,
        used,
        struct.unpack_from(f"<{layout.num}H", ring, 4),
        tuple(_DESCRIPTOR.iter_unpack(descriptors)),
    )


def find_receiving_untrusted(ring: RingCopy) -> Lent:
    """What a driver lent to be written: all descriptors but the marked ones, each a whole buffer.

    Raises:
        VirtqueueError: the descriptors are not such, or contradict each other.
    """
    num = len(ring.descriptors)
    pa = min(address for address, *_ in ring.descriptors)
    size = ring.descriptors[0][1]
    if not _HEADER < size <= _MAX_SIZE:
        raise _refuse(
            ring,
            f"its first buffer has {size} bytes; {_HEADER + 1} to {_MAX_SIZE} are possible",
        )
    for head, (_, length, flags, _) in enumerate(ring.descriptors):
        if flags != _WRITE or length != size:
            raise _refuse(
                ring,
                f"descriptor {head} has flags {flags:#x} and {length} bytes, "
                f"not {_WRITE:#x} and {size} as one that is lent to receive",
            )
    places = _find_places(ring, range(num), pa, size)
    heads = tuple(h for h, (*_, mark) in enumerate(ring.descriptors) if mark != LEFT_FREE)
    return Lent(ring.available, heads, pa, size, _offsets(places, num, size))


def find_sending_untrusted(ring: RingCopy, pa: int, size: int) -> Lent:
    """What a driver lent to be read.

    Args:
        pa: where the buffers begin.
        size: bytes of each.

    Raises:
        VirtqueueError: indexes or descriptors contradict that, or each other.
    """
    num = len(ring.descriptors)
    for head, (address, length, *_) in enumerate(ring.descriptors):
        if length > size or (length and _place_of(ring, address, pa, size) is None):
            raise _refuse(
                ring,
                f"descriptor {head} was last used for {length} bytes at {address:#x}, which are "
                f"in none of {num} buffers of {size} bytes from {pa:#x} on: is "
                "BusOptions.send_buffer_size the same as before?",
            )
    marks = [mark for *_, mark in ring.descriptors]
    if all(mark in (LEFT_OUT, LEFT_FREE) for mark in marks):
        heads = [head for head, mark in enumerate(marks) if mark == LEFT_OUT]
    else:
        count = (ring.available - ring.used) & 0xFFFF
        if count > num:
            raise _refuse(
                ring,
                f"{count} of its entries are out (available index {ring.available}, used index "
                f"{ring.used}); at most {num} are possible",
            )
        heads = [ring.heads[(ring.used + i) % num] for i in range(count)]
    for head in heads:
        if head >= num:
            raise _refuse(ring, f"descriptor {head} is out; there are {num}")
        _, length, flags, _ = ring.descriptors[head]
        if flags or not _HEADER <= length <= size:
            raise _refuse(
                ring,
                f"descriptor {head}, which is out, has flags {flags:#x} and {length} bytes; 0 and "
                f"{_HEADER} to {size} bytes are possible",
            )
    places = _find_places(ring, heads, pa, size)
    return Lent(ring.available, tuple(heads), pa, size, _offsets(places, num, size))


def _find_places(ring: RingCopy, heads: Sequence[int], pa: int, size: int) -> dict[int, int]:
    """Which of the buffers that lie side by side each of these descriptors has."""
    places: dict[int, int] = {}
    taken: set[int] = set()
    for head in heads:
        address = ring.descriptors[head][0]
        place = _place_of(ring, address, pa, size)
        if place is None:
            raise _refuse(
                ring,
                f"descriptor {head} points at {address:#x}, which is none of "
                f"{len(ring.descriptors)} buffers of {size} bytes from {pa:#x} on",
            )
        if head in places or place in taken:
            raise _refuse(ring, f"descriptor {head}, or its buffer at {address:#x}, is out twice")
        places[head] = place
        taken.add(place)
    return places


def _place_of(ring: RingCopy, address: int, pa: int, size: int) -> int | None:
    """Which of the buffers begins there, or None."""
    place, rest = divmod(address - pa, size)
    return place if not rest and 0 <= place < len(ring.descriptors) else None


def _offsets(places: dict[int, int], num: int, size: int) -> tuple[int, ...]:
    """Descriptors that are free get the buffers that are."""
    taken = set(places.values())
    free = iter([place for place in range(num) if place not in taken])
    return tuple(size * (places[head] if head in places else next(free)) for head in range(num))


def _refuse(ring: RingCopy, why: str) -> VirtqueueError:
    return VirtqueueError(f"{ring.name} cannot be taken over: {why}")
