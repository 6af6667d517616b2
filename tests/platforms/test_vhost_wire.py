"""The vhost-user protocol as values: recorded bytes, limits, and any bytes at all."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py.errors import VhostUserError
from openamp_py.platforms import vhost_wire as wire
from openamp_py.platforms.vhost_wire import MemoryPlace, Request
from openamp_py.vring import MAX_NUM, VringPlaces

HOSTILE = settings(derandomize=True, deadline=None, max_examples=300, database=None)

# Recorded from User-Mode Linux 6.1.192 (golden/linux/vhost-user-uml-6.1.192.jsonl).
_TABLE = bytes.fromhex(
    "01000000000000000080e51f0000000000f0b503000000000080e51f000000000080e51f00000000"
) + bytes(32)
_ADDRESS = bytes.fromhex(
    "000000000000000000800a200000000000a00a200000000000900a2000000000ffffffffffffffff"
)


def test_what_user_mode_linux_says_of_its_memory() -> None:
    """One region, and a slot that it does not count."""
    place = MemoryPlace(0x1FE5_8000, 0x3B5_F000, 0x1FE5_8000, 0x1FE5_8000)
    assert wire.decode_memory_untrusted(_TABLE) == (place,)


def test_what_user_mode_linux_says_of_a_vring() -> None:
    places = VringPlaces(0x200A_8000, 0x200A_9000, 0x200A_A000)
    assert wire.decode_address_untrusted(_ADDRESS) == (0, places)


def test_headers() -> None:
    for request in Request:
        header = wire.decode_header_untrusted(struct.pack("<III", request, 1, 8))
        assert (header.request, header.size, header.wants_reply) == (request, 8, False)
    assert wire.decode_header_untrusted(struct.pack("<III", 3, 9, 0)).wants_reply


def test_answers() -> None:
    assert wire.encode_reply(Request.GET_FEATURES, wire.encode_u64(0x1_4000_0001)) == bytes.fromhex(
        "0100000005000000080000000100004001000000"
    )
    reply = wire.encode_reply(Request.GET_VRING_BASE, wire.encode_value(wire.RingValue(1, 4)))
    assert reply == bytes.fromhex("0b00000005000000080000000100000004000000")
    assert wire.encode_call(0) == bytes.fromhex("0400000001000000080000000000000000000000")


# Limits


def test_the_largest_payload_and_one_more() -> None:
    data = struct.pack("<III", Request.GET_CONFIG, 1, wire.MAX_PAYLOAD)
    assert wire.decode_header_untrusted(data).size == wire.MAX_PAYLOAD
    data = struct.pack("<III", Request.GET_CONFIG, 1, wire.MAX_PAYLOAD + 1)
    with pytest.raises(VhostUserError, match="a payload of 269 bytes; 268 are possible"):
        wire.decode_header_untrusted(data)


@pytest.mark.parametrize("num", [2**n for n in range(16)])
def test_numbers_of_entries(num: int) -> None:
    assert wire.decode_num_untrusted(struct.pack("<II", 1, num)) == (1, num)


@pytest.mark.parametrize("num", [0, 3, MAX_NUM - 1, MAX_NUM + 1, 2 * MAX_NUM, 0xFFFF_FFFF])
def test_impossible_numbers_of_entries(num: int) -> None:
    with pytest.raises(VhostUserError, match="SET_VRING_NUM"):
        wire.decode_num_untrusted(struct.pack("<II", 1, num))


@pytest.mark.parametrize("word", [0, 1, 0x100, 0x101])
def test_descriptors_of_a_vring(word: int) -> None:
    payload = struct.pack("<Q", word)
    decoded = wire.decode_descriptor_untrusted(Request.SET_VRING_CALL, payload)
    assert decoded == (word & 1, word < 0x100)


def _region(*values: int) -> bytes:
    return struct.pack("<IIQQQQ", 1, 0, *values)


@pytest.mark.parametrize(
    "values",
    [
        (0, 1, 0, 0),
        ((1 << 64) - 3, 2, 0, 0),
        (0, 2, (1 << 64) - 2, 0),
        (0, 2, 0, (1 << 64) - 2),
    ],
)
def test_regions_up_to_the_last_address(values: tuple[int, ...]) -> None:
    assert wire.decode_memory_untrusted(_region(*values)) == (MemoryPlace(*values),)


@pytest.mark.parametrize(
    "values",
    [
        (0, 0, 0, 0),
        ((1 << 64) - 2, 2, 0, 0),
        ((1 << 64) - 1, 2, 0, 0),
        (0, 2, (1 << 64) - 1, 0),
        (0, 2, 0, (1 << 64) - 1),
    ],
)
def test_regions_beyond_it(values: tuple[int, ...]) -> None:
    with pytest.raises(VhostUserError, match="empty, or beyond 64 bits"):
        wire.decode_memory_untrusted(_region(*values))


def test_regions_side_by_side() -> None:
    regions = [(4096 * n, 4096, 4096 * (9 - n), 0) for n in range(wire.MAX_REGIONS)]
    data = struct.pack("<II", len(regions), 0)
    data += b"".join(struct.pack("<QQQQ", *each) for each in regions)
    assert len(wire.decode_memory_untrusted(data)) == wire.MAX_REGIONS


@pytest.mark.parametrize(("part", "odd"), [(0, 8), (1, 2), (2, 1)])
def test_parts_of_a_vring_that_are_not_aligned(part: int, odd: int) -> None:
    addresses = [0, 0, 0]  # descriptors, used, available
    addresses[part] = odd
    with pytest.raises(VhostUserError, match=f"at {odd:#x}; a multiple of {2 * odd}"):
        wire.decode_address_untrusted(struct.pack("<IIQQQQ", 0, 0, *addresses, 0))


# Hostile input


@given(st.binary(min_size=wire.HEADER_SIZE, max_size=wire.HEADER_SIZE))
@HOSTILE
def test_any_header(data: bytes) -> None:
    try:
        header = wire.decode_header_untrusted(data)
    except VhostUserError:
        return
    assert header.size <= wire.MAX_PAYLOAD


_DECODERS: list[Callable[[bytes], object]] = [
    wire.decode_memory_untrusted,
    wire.decode_address_untrusted,
    wire.decode_num_untrusted,
    wire.decode_enable_untrusted,
    lambda data: wire.decode_nothing_untrusted(Request.SET_OWNER, data),
    lambda data: wire.decode_features_untrusted(Request.SET_FEATURES, data, 0x1_4000_0001),
    lambda data: wire.decode_value_untrusted(Request.SET_VRING_BASE, data, 0xFFFF),
    lambda data: wire.decode_descriptor_untrusted(Request.SET_VRING_KICK, data),
]


@pytest.mark.parametrize("decode", _DECODERS)
@given(data=st.one_of(st.binary(max_size=80), st.binary(min_size=8, max_size=8)))
@HOSTILE
def test_any_payload(decode: Callable[[bytes], object], data: bytes) -> None:
    """It is a value, or the documented error."""
    try:
        decode(data)
    except VhostUserError as error:
        assert str(error)


@given(
    st.lists(
        st.tuples(*[st.one_of(st.integers(0, 3), st.integers(0, (1 << 64) - 1))] * 4), max_size=9
    ),
    st.integers(0, 9),
)
@HOSTILE
def test_any_table(regions: list[tuple[int, ...]], count: int) -> None:
    data = struct.pack("<II", count, 0)
    data += b"".join(struct.pack("<QQQQ", *each) for each in regions)
    try:
        places = wire.decode_memory_untrusted(data)
    except VhostUserError:
        return
    assert 1 <= len(places) == count <= wire.MAX_REGIONS
    for one in places:
        for other in places:
            if one is not other:
                assert one.guest_pa + one.size <= other.guest_pa or (
                    other.guest_pa + other.size <= one.guest_pa
                )
