"""The vhost-user protocol as values: what a front end asks, decoded; what it is told, encoded.

The front end is the guest's side (QEMU, User-Mode Linux); its device is elsewhere, here. Every
message is a header and a payload on a Unix stream socket, with descriptors beside it.

Reference: QEMU's docs/interop/vhost-user.
"""

from __future__ import annotations

import enum
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from openamp_py.errors import VhostUserError
from openamp_py.vring import MAX_NUM, VringPlaces

QUEUES: Final = 2
"""Vrings of an RPMsg device."""

MAX_REGIONS: Final = 8
"""Regions of one memory table, and so descriptors of one message (VHOST_MEMORY_BASELINE)."""

PROTOCOL_FEATURES: Final = 1 << 30
"""Virtio feature bit that is vhost-user's own: there are protocol features."""

REPLY_ACK: Final = 1 << 3
BACKEND_REQ: Final = 1 << 5
CONFIG: Final = 1 << 9
RESET: Final = 1 << 13
INBAND: Final = 1 << 14
"""Protocol features. INBAND: kicks and calls are messages, not descriptors."""

VERSION: Final = 1
REPLY: Final = 4
NEED_REPLY: Final = 8
"""Flags of a header; the version is the two lowest bits."""


class Request(enum.IntEnum):
    """What a front end asks."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    RESET_DEVICE = 34
    VRING_KICK = 35


NEEDED: Final = {
    Request.SET_BACKEND_REQ_FD: BACKEND_REQ,
    Request.GET_CONFIG: CONFIG,
    Request.SET_CONFIG: CONFIG,
    Request.RESET_DEVICE: RESET,
    Request.VRING_KICK: INBAND,
}
"""Requests that may come only where a protocol feature was accepted."""

BEFORE_OWNER: Final = frozenset(
    {
        Request.GET_FEATURES,
        Request.SET_OWNER,
        Request.GET_PROTOCOL_FEATURES,
        Request.SET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.SET_BACKEND_REQ_FD,
    }
)
"""Requests that may come before SET_OWNER; QEMU sends all of these so early."""

# request u32, flags u32, size u32
_HEADER = struct.Struct("<III")
HEADER_SIZE: Final = _HEADER.size

_U64 = struct.Struct("<Q")
# index u32, value u32
_STATE = struct.Struct("<II")
# index u32, flags u32, descriptors u64, used u64, available u64, log u64
_ADDRESS = struct.Struct("<IIQQQQ")
# count u32, padding u32
_TABLE = struct.Struct("<II")
# guest address u64, size u64, user address u64, offset in the file u64
_REGION = struct.Struct("<QQQQ")

# Offset, size and flags (u32 each) and up to 256 bytes (VHOST_USER_MAX_CONFIG_SIZE) of a device's
# configuration; the table of memory may be as large as that.
MAX_PAYLOAD: Final = 12 + 256

# Of SET_VRING_KICK, _CALL and _ERR: the index, and the bit that says that no descriptor comes.
_INDEX_MASK = 0xFF
_NO_DESCRIPTOR = 0x100

_ADDRESS_LIMIT = 1 << 64

_VRING_CALL = 4
"""A request to the front end: the in-band form of a call."""


class Header(NamedTuple):
    """What every message begins with."""

    request: Request
    flags: int
    size: int

    @property
    def wants_reply(self) -> bool:
        """Whether an acknowledgement is asked for."""
        return bool(self.flags & NEED_REPLY)


class RingValue(NamedTuple):
    """A number for one vring."""

    vring: int
    value: int


class RingDescriptor(NamedTuple):
    """For one vring, whether a descriptor comes along."""

    vring: int
    has_descriptor: bool


class RingAddress(NamedTuple):
    """Where the parts of one vring are, as addresses of the front end."""

    vring: int
    places: VringPlaces


@dataclass(frozen=True, slots=True)
class MemoryPlace:
    """One region of the guest's memory, and where in its file it is."""

    guest_pa: int
    """What descriptors in a ring hold."""
    size: int
    user_va: int
    """The front end's own address of it: what ring addresses are."""
    offset: int
    """In the file."""

    def __str__(self) -> str:
        return f"{self.size:#x} bytes at {self.guest_pa:#x}"


def decode_header_untrusted(data: bytes) -> Header:
    """Decodes the first bytes of a message, exactly `HEADER_SIZE`.

    Raises:
        VhostUserError: it is not a request of this protocol, or not one that is known here.
    """
    number, flags, size = _HEADER.unpack(data)
    try:
        request = Request(number)
    except ValueError:
        raise VhostUserError(
            f"request {number} with {size} bytes is none that is offered here"
        ) from None
    if flags & ~NEED_REPLY != VERSION:
        raise VhostUserError(
            f"{request.name}: the header's flags are {flags:#x}; {VERSION:#x}, "
            f"or {VERSION | NEED_REPLY:#x}, are possible"
        )
    if size > MAX_PAYLOAD:
        raise VhostUserError(
            f"{request.name}: a payload of {size} bytes; {MAX_PAYLOAD} are possible"
        )
    return Header(request, flags, size)


def decode_nothing_untrusted(request: Request, payload: bytes) -> None:
    """Checks that a payload is empty."""
    _check_size(request, payload, 0)


def decode_features_untrusted(request: Request, payload: bytes, offered: int) -> int:
    """Decodes a set of features, of which all must have been offered."""
    (features,) = _unpack(request, payload, _U64)
    if features & ~offered:
        raise VhostUserError(
            f"{request.name}: {features:#x}, of which {features & ~offered:#x} were not offered"
        )
    return int(features)


def decode_value_untrusted(request: Request, payload: bytes, limit: int) -> RingValue:
    """Decodes a number of at most `limit` for one vring."""
    index, value = _unpack(request, payload, _STATE)
    _check_index(request, index)
    if value > limit:
        raise VhostUserError(f"{request.name}: {value} for vring {index}; at most {limit}")
    return RingValue(index, value)


def decode_num_untrusted(payload: bytes) -> RingValue:
    """Decodes the number of entries of one vring."""
    ring = decode_value_untrusted(Request.SET_VRING_NUM, payload, MAX_NUM)
    if not ring.value or ring.value & (ring.value - 1):
        raise VhostUserError(
            f"SET_VRING_NUM: {ring.value} entries for vring {ring.vring}; a power of two up to "
            f"{MAX_NUM} is possible"
        )
    return ring


def decode_descriptor_untrusted(request: Request, payload: bytes) -> RingDescriptor:
    """Decodes which vring a kick, call or error descriptor is for."""
    (word,) = _unpack(request, payload, _U64)
    if word & ~(_INDEX_MASK | _NO_DESCRIPTOR):
        raise VhostUserError(f"{request.name}: {word:#x} has bits that mean nothing")
    _check_index(request, word & _INDEX_MASK)
    return RingDescriptor(word & _INDEX_MASK, not word & _NO_DESCRIPTOR)


def decode_address_untrusted(payload: bytes) -> RingAddress:
    """Decodes where one vring is. Whether that is in memory shows when it is used."""
    request = Request.SET_VRING_ADDR
    index, _flags, descriptors, used, available, _log = _unpack(request, payload, _ADDRESS)
    _check_index(request, index)
    places = VringPlaces(descriptors, available, used)
    for what, address, align in (
        ("descriptors", descriptors, 16),
        ("available ring", available, 2),
        ("used ring", used, 4),
    ):
        if address % align:
            raise VhostUserError(
                f"SET_VRING_ADDR: the {what} of vring {index} at {address:#x}; "
                f"a multiple of {align} is possible"
            )
    return RingAddress(index, places)


def decode_memory_untrusted(payload: bytes) -> tuple[MemoryPlace, ...]:
    """Decodes the table of the guest's memory, whose regions do not overlap.

    What follows the regions is not looked at: User-Mode Linux sends a slot more than it counts.
    """
    request = Request.SET_MEM_TABLE
    if len(payload) < _TABLE.size or (len(payload) - _TABLE.size) % _REGION.size:
        raise VhostUserError(
            f"{request.name}: {len(payload)} bytes; {_TABLE.size}, and {_REGION.size} for each "
            "region, are possible"
        )
    count, _ = _TABLE.unpack_from(payload)
    slots = (len(payload) - _TABLE.size) // _REGION.size
    if not 1 <= count <= min(slots, MAX_REGIONS):
        raise VhostUserError(
            f"{request.name}: {count} regions in {slots} slots; 1 to {MAX_REGIONS} are possible"
        )
    places = tuple(
        MemoryPlace(*_REGION.unpack_from(payload, _TABLE.size + _REGION.size * number))
        for number in range(count)
    )
    for place in places:
        # The end of what a ring may point to has to be an address too: C counts it in 64 bits.
        highest = max(place.guest_pa + 1, place.user_va, place.offset)
        if not place.size or highest + place.size > _ADDRESS_LIMIT:
            raise VhostUserError(
                f"{request.name}: {place}, for the front end at {place.user_va:#x}, at "
                f"{place.offset:#x} of its file: empty, or beyond 64 bits"
            )
    for field in ("guest_pa", "user_va"):
        _check_apart(places, field)
    return places


def decode_enable_untrusted(payload: bytes) -> RingValue:
    """Decodes whether one vring is to be worked: 1 or 0."""
    return decode_value_untrusted(Request.SET_VRING_ENABLE, payload, 1)


def check_descriptors(request: Request, got: int, expected: int) -> None:
    """Whether as many descriptors came with a request as belong to it.

    Raises:
        VhostUserError: more or fewer came.
    """
    if got != expected:
        raise VhostUserError(f"{request.name}: {got} descriptors came with it; {expected} belong")


def encode_reply(request: Request, payload: bytes) -> bytes:
    """The answer to a request."""
    return _HEADER.pack(request, VERSION | REPLY, len(payload)) + payload


def encode_u64(value: int) -> bytes:
    """A payload of one number: features, or 0 for "done"."""
    return _U64.pack(value)


def encode_value(value: RingValue) -> bytes:
    """A payload of a number for one vring."""
    return _STATE.pack(*value)


def encode_call(index: int) -> bytes:
    """The request to the front end that interrupts its driver for a vring."""
    return _HEADER.pack(_VRING_CALL, VERSION, _STATE.size) + _STATE.pack(index, 0)


def _check_apart(places: Sequence[MemoryPlace], field: str) -> None:
    ordered = sorted(places, key=lambda place: int(getattr(place, field)))
    for low, high in itertools.pairwise(ordered):
        start = getattr(high, field)
        if getattr(low, field) + low.size > start:
            raise VhostUserError(
                f"SET_MEM_TABLE: {low} and {high} overlap: the second begins at {field} {start:#x}"
            )


def _check_index(request: Request, index: int) -> None:
    if index >= QUEUES:
        raise VhostUserError(f"{request.name}: vring {index}; there are {QUEUES}")


def _check_size(request: Request, payload: bytes, size: int) -> None:
    if len(payload) != size:
        raise VhostUserError(f"{request.name}: {len(payload)} bytes; {size} belong to it")


def _unpack(request: Request, payload: bytes, form: struct.Struct) -> tuple[int, ...]:
    _check_size(request, payload, form.size)
    return form.unpack(payload)
