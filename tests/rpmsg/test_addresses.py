"""Addresses: lowest first, none twice, none that cannot be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py.constants import ADDRESS_ANY
from openamp_py.rpmsg.addresses import AddressSpace


def test_hands_out_from_1024_upwards_and_the_lowest_returned_first() -> None:
    space = AddressSpace()
    assert [space.take() for _ in range(4)] == [1024, 1025, 1026, 1027]
    space.give_back(1026)
    space.give_back(1024)
    assert [space.take() for _ in range(3)] == [1024, 1026, 1028]


def test_explicit_addresses_are_skipped_when_handing_out() -> None:
    space = AddressSpace()
    assert space.take(1024) == 1024
    assert space.take(1026) == 1026
    assert [space.take() for _ in range(2)] == [1025, 1027]


def test_an_address_taken_and_returned_again_and_again_is_remembered_once() -> None:
    space = AddressSpace()
    space.give_back(space.take())
    for _ in range(1000):
        space.give_back(space.take(1024))
    assert space._returned == [1024]
    assert [space.take() for _ in range(2)] == [1024, 1025]


@pytest.mark.parametrize("address", [0, 1, 52, 1023, 0xFFFF_FFFE])
def test_the_whole_32_bit_space_can_be_asked_for(address: int) -> None:
    assert AddressSpace().take(address) == address


def test_more_than_128_endpoints_get_addresses_of_their_own() -> None:
    space = AddressSpace()
    assert len({space.take() for _ in range(2000)}) == 2000


def test_refuses_an_address_in_use() -> None:
    space = AddressSpace()
    space.take(100)
    with pytest.raises(ValueError, match="0x64 is in use"):
        space.take(100)


@pytest.mark.parametrize("address", [53, -1, 1 << 32])
def test_refuses_addresses_nobody_can_have(address: int) -> None:
    with pytest.raises(ValueError, match="not possible"):
        AddressSpace().take(address)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(1020, 1040)), max_size=60), st.data())
def test_never_the_same_address_twice(wishes: list[int | None], data: st.DataObject) -> None:
    space = AddressSpace()
    used: set[int] = set()
    for wish in wishes:
        if wish in used:
            continue
        address = space.take(ADDRESS_ANY if wish is None else wish)
        assert address not in used
        used.add(address)
        if data.draw(st.booleans(), label="give one back"):
            gone = data.draw(st.sampled_from(sorted(used)))
            space.give_back(gone)
            used.remove(gone)
