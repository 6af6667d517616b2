"""The last messages of a link, read out of its rings after the fact.

The rings and the buffers still hold them: nothing is recorded while the link runs, and it makes no
difference whether the other side lives. Any bytes give a result.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from openamp_py.constants import NAME_SERVICE_ADDRESS
from openamp_py.rpmsg.wire import TO_DEVICE, TO_DRIVER, decode_announcement_untrusted
from openamp_py.virtio import Role, VirtioDevice
from openamp_py.virtio.message_ring import HEADER_SIZE
from openamp_py.vring import VringLayout

RECENT_MESSAGES: Final = 16
"""Messages of each direction that are looked for."""

RECENT_BYTES: Final = 64
"""Bytes of each payload that are kept."""

_U16 = struct.Struct("<H")
_DESCRIPTOR = struct.Struct("<QIHH")  # addr u64, len u32, flags, next u16 (virtio 1.2, 2.7.5)
_INDIRECT = 4  # of its flags: what lies there is a table of descriptors (virtio 1.2, 2.7.5.3)
_USED = struct.Struct("<II")  # id, len (virtio 1.2, 2.7.8)
_HEADER = struct.Struct("<IIIHH")  # src, dst, reserved u32; len, flags u16
_RING = 4  # flags and idx come before the entries of either ring

_LINE = 16

FindMemory = Callable[[int, int], memoryview | None]
FindHeads = Callable[[bytes, VringLayout], Iterable[int]]


class RecentMessage(NamedTuple):
    """A message as it lies in its buffer."""

    source: int
    destination: int
    length: int
    """Bytes of payload, as its header says."""
    payload: bytes
    """What of it is there, and was asked for."""

    def __str__(self) -> str:
        head = f"{self.source:#x} -> {self.destination:#x}, {self.length} bytes"
        if self.destination == NAME_SERVICE_ADDRESS:
            announcement = decode_announcement_untrusted(self.payload)
            if announcement is not None:
                verb = "withdraws" if announcement.destroy else "announces"
                channel = announcement.channel
                return f"{head}: {verb} {channel.name!r} at {channel.address:#x}"
        if not self.payload:
            return head
        lines = [
            f"    {part.hex(' '):{3 * _LINE - 1}}  {_text(part)}"
            for part in (self.payload[at : at + _LINE] for at in range(0, len(self.payload), _LINE))
        ]
        if len(self.payload) < self.length:
            lines.append(f"    ... {self.length - len(self.payload)} bytes more")
        return "\n".join([f"{head}:", *lines])


@dataclass(frozen=True, slots=True)
class RecentMessages:
    """The last messages of both directions, each the oldest first: ``str()`` gives text.

    How the messages of one direction lie between those of the other is in no ring.
    """

    received: tuple[RecentMessage, ...]
    """What the other side wrote."""
    sent: tuple[RecentMessage, ...]
    """What this side wrote."""

    def __str__(self) -> str:
        lines = []
        for what, messages in (("received", self.received), ("sent", self.sent)):
            held = "what the buffers still hold, the latest last" if messages else "nothing"
            lines.append(f"{what}: {held}")
            lines += [f"  {message}" for message in messages]
        return "\n".join(lines)


def recent_messages(
    device: VirtioDevice, *, count: int = RECENT_MESSAGES, size: int = RECENT_BYTES
) -> RecentMessages:
    """The last messages in the rings of an RPMsg device, as far as their buffers still hold them.

    Each buffer holds the last message that was in it: where one buffer is used again and again, as
    a host does with one message at a time, that one is all there is. Just after the 65,536th
    message, when a ring's index begins anew, there may be fewer. A payload that spans several
    descriptors is shown as far as the first one goes.

    Args:
        device: in either role; its other side may be dead. One whose rings lie in no memory
            has no messages.
        count: most messages of each direction.
        size: most bytes of each payload.

    Raises:
        ValueError: a number below zero.
    """
    if count < 0 or size < 0:
        raise ValueError(f"{count} messages of {size} bytes; neither can be negative")
    to_driver, to_device = (
        _read(device, index, heads, count, size)
        for index, heads in ((TO_DRIVER, _used_heads), (TO_DEVICE, _available_heads))
    )
    if device.role is Role.DRIVER:
        return RecentMessages(to_driver, to_device)
    return RecentMessages(to_device, to_driver)


def _read(
    device: VirtioDevice, index: int, heads: FindHeads, count: int, size: int
) -> tuple[RecentMessage, ...]:
    """One direction's, from a copy of its ring."""
    if index >= len(device.vrings):
        return ()
    layout = device.vrings[index].layout
    copy = _copy_ring(device, index)
    if copy is None:
        return ()
    find = device.memory.find_pa
    return decode_recent_untrusted(copy, heads(copy, layout), find, count, size)


def _copy_ring(device: VirtioDevice, index: int) -> bytes | None:
    """A vring as one piece, wherever its parts are; None where they are in no memory."""
    vring = device.vrings[index]
    layout = vring.layout
    places = vring.places or layout.places(vring.da)
    copy = bytearray(layout.size)
    for offset, da, size in (
        (0, places.descriptors, layout.available_offset),
        (layout.available_offset, places.available, layout.available_size),
        (layout.used_offset, places.used, layout.used_size),
    ):
        part = device.memory.find_da(da, size)
        if part is None:
            return None
        copy[offset : offset + size] = part
    return bytes(copy)


def decode_recent_untrusted(
    ring: bytes, heads: Iterable[int], find: FindMemory, count: int, size: int
) -> tuple[RecentMessage, ...]:
    """The last message of each of some descriptors of a copied ring, the oldest first.

    Where a descriptor comes again, what its buffer held then is overwritten. Left out is also what
    is no message: a descriptor that is none, a buffer that is not in memory, or is too small for a
    header. Of a table of descriptors the first one counts.

    Args:
        ring: a vring's bytes; the descriptors come first.
        heads: which descriptors, the latest first; any numbers.
        find: the memory at a physical address.
        count: most messages.
        size: most bytes of each payload.
    """
    seen: set[int] = set()
    messages: list[RecentMessage] = []
    for head in heads:
        if len(messages) == count:
            break
        if head in seen or (head + 1) * _DESCRIPTOR.size > len(ring):
            continue
        seen.add(head)
        address, length, flags, _ = _DESCRIPTOR.unpack_from(ring, head * _DESCRIPTOR.size)
        if flags & _INDIRECT:
            table = find(address, _DESCRIPTOR.size) if length >= _DESCRIPTOR.size else None
            if table is None:
                continue
            address, length, _, _ = _DESCRIPTOR.unpack(table)
        here = min(length, HEADER_SIZE + size)
        buffer = find(address, here) if length >= HEADER_SIZE else None
        if buffer is None:
            continue
        data = bytes(buffer)
        source, destination, _, payload_length, _ = _HEADER.unpack_from(data)
        payload = data[HEADER_SIZE : HEADER_SIZE + payload_length]
        messages.append(RecentMessage(source, destination, payload_length, payload))
    return tuple(reversed(messages))


def _used_heads(ring: bytes, layout: VringLayout) -> Iterator[int]:
    """What the device gave back, the latest first."""
    start = layout.used_offset
    for slot in _slots(ring, start, layout.num):
        yield _USED.unpack_from(ring, start + _RING + _USED.size * slot)[0]


def _available_heads(ring: bytes, layout: VringLayout) -> Iterator[int]:
    """What the driver lent, the latest first."""
    start = layout.available_offset
    for slot in _slots(ring, start, layout.num):
        yield _U16.unpack_from(ring, start + _RING + _U16.size * slot)[0]


def _slots(ring: bytes, start: int, num: int) -> Iterator[int]:
    """The slots of a ring that were filled, the latest first."""
    (index,) = _U16.unpack_from(ring, start + _U16.size)
    for back in range(1, min(index, num) + 1):
        yield (index - back) % num


def _text(part: bytes) -> str:
    return "".join(chr(each) if 0x20 <= each < 0x7F else "." for each in part)
