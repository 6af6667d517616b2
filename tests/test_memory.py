"""Regions and address translation, giving memory away, and shared mappings."""

from __future__ import annotations

import os
import random

import pytest

from openamp_py.memory import Arena, MemoryMap, Region, SharedMemory


def region(name: str, da: int, size: int, pa: int | None = None) -> Region:
    return Region(name, da, da if pa is None else pa, memoryview(bytearray(size)))


# Regions.


def test_addresses_are_found_in_their_region() -> None:
    low, high = region("low", 0x1000, 16, pa=0x9000), region("high", 0x2000, 16, pa=0x8000)
    memory = MemoryMap([high, low])
    high.view[4:6] = b"ab"
    view = memory.find_da(0x2004, 2)
    assert view is not None and bytes(view) == b"ab"
    view[:] = b"cd"
    assert bytes(high.view[4:6]) == b"cd", "a view, not a copy"
    assert memory.pa_of(0x1000) == 0x9000 and memory.pa_of(0x200F) == 0x800F
    view = memory.find_pa(0x8004, 2)
    assert view is not None and bytes(view) == b"cd"


@pytest.mark.parametrize(
    ("address", "size"), [(0xFFF, 1), (0x1000, 17), (0x100F, 2), (0x1011, 0), (0x1010, 1), (-1, 1)]
)
def test_addresses_outside(address: int, size: int) -> None:
    memory = MemoryMap([region("one", 0x1000, 16), region("two", 0x1020, 16)])
    assert memory.find_da(address, size) is None
    assert memory.find_pa(address, size) is None


def test_a_range_does_not_span_regions() -> None:
    memory = MemoryMap([region("one", 0, 16), region("two", 16, 16)])
    assert memory.find_da(8, 16) is None
    assert memory.find_da(16, 16) is not None


def test_a_device_address_in_no_region() -> None:
    memory = MemoryMap([region("ram", 0x1000, 16)])
    with pytest.raises(ValueError, match=r"0x1010 is in no region: ram 0x1000\.\.0x1010"):
        memory.pa_of(0x1010)
    with pytest.raises(ValueError, match="no region: none"):
        MemoryMap([]).pa_of(0)


def test_overlapping_regions() -> None:
    with pytest.raises(ValueError, match="'b' at 0x100f overlaps region 'a', which ends at 0x1010"):
        MemoryMap([region("b", 0x100F, 1), region("a", 0x1000, 16)])


# Giving parts away.


def test_the_lowest_free_range() -> None:
    arena = Arena(MemoryMap([region("one", 0x1000, 0x100), region("two", 0x8000, 0x1000)]))
    arena.reserve(0x1010, 0x10)
    assert arena.allocate(0x10, 16) == 0x1000
    assert arena.allocate(0x10, 16) == 0x1020
    assert arena.allocate(0x200, 0x100) == 0x8000
    assert arena.allocate(0xD0, 1) == 0x1030
    assert arena.allocate(1, 1) == 0x8200
    assert arena.allocate(0x1000, 1) is None


def test_alignment_skips_what_is_free_but_crooked() -> None:
    arena = Arena(MemoryMap([region("one", 0x1004, 0x100)]))
    assert arena.allocate(4, 16) == 0x1010
    assert arena.allocate(4, 4) == 0x1004


def test_reserved_ranges_may_overlap() -> None:
    arena = Arena(MemoryMap([region("one", 0, 0x100)]))
    arena.reserve(0x00, 0x80)
    arena.reserve(0x10, 0x10)
    assert arena.allocate(0x10, 1) == 0x80


def test_nothing_is_taken_for_nothing() -> None:
    arena = Arena(MemoryMap([region("one", 0, 0x10)]))
    arena.reserve(4, 0)
    assert arena.allocate(0x10, 1) == 0


def test_allocations_never_overlap() -> None:
    rng = random.Random(0)
    memory = MemoryMap([region("one", 0, 0x400), region("two", 0x1000, 0x800)])
    arena = Arena(memory)
    taken: list[tuple[int, int]] = []
    for _ in range(2000):
        size, align = rng.randint(1, 20), 1 << rng.randint(0, 6)
        da = arena.allocate(size, align)
        if da is not None:
            assert da % align == 0 and memory.find_da(da, size) is not None
            assert all(da + size <= a or b + a <= da for a, b in taken)
            taken.append((da, size))


# Shared mappings.


def test_two_mappings_of_one_memory() -> None:
    one = SharedMemory.create("openamp-test", 8192)
    two = SharedMemory(os.dup(one.fd))
    assert two.size == 8192
    view = one.region("a", 0x100).view
    other = two.region("b", 0x200)
    assert (other.name, other.da, other.pa, other.size) == ("b", 0x200, 0x200, 8192)
    view[100:105] = b"hello"
    assert bytes(other.view[100:105]) == b"hello" and not any(other.view[105:])
    one.close()
    two.close()


def test_closing_pulls_no_memory_from_under_a_view() -> None:
    shared = SharedMemory.create("openamp-test", 4096)
    view = shared.region("a", 0).view
    shared.close()
    shared.close()
    view[:4] = b"mine"
    assert bytes(view[:4]) == b"mine"
    with pytest.raises(OSError):
        os.fstat(shared.fd)


@pytest.mark.parametrize("size", [0, -1])
def test_memory_of_no_size(size: int) -> None:
    with pytest.raises(ValueError, match=f"shared memory of {size} bytes"):
        SharedMemory.create("openamp-test", size)


def test_a_size_beyond_the_file_closes_the_descriptor() -> None:
    fd = os.memfd_create("openamp-test")
    os.ftruncate(fd, 4096)
    with pytest.raises(ValueError):
        SharedMemory(fd, 8192)
    with pytest.raises(OSError):
        os.fstat(fd)
