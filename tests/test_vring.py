"""Where the parts of a vring lie, and the shapes that are refused."""

from __future__ import annotations

import pytest

from openamp_py.vring import MAX_NUM, VringLayout, VringPlaces


@pytest.mark.parametrize(
    ("num", "align", "available", "used", "size"),
    [
        (256, 4096, 0x1000, 0x2000, 0x2806),
        (16, 4096, 0x100, 0x1000, 0x1086),
        (64, 64, 0x400, 0x4C0, 0x6C6),
        (1, 4, 16, 24, 38),
        (MAX_NUM, 4096, 0x80000, 0x91000, 0xD1006),
    ],
)
def test_offsets(num: int, align: int, available: int, used: int, size: int) -> None:
    """The first three as OpenAMP C, and QEMU, place them."""
    layout = VringLayout(num, align)
    assert (layout.available_offset, layout.used_offset, layout.size) == (available, used, size)


def test_the_parts_of_one_at_an_address() -> None:
    layout = VringLayout(16, 4096)
    assert layout.places(0x8000) == VringPlaces(0x8000, 0x8100, 0x9000)
    assert (layout.available_size, layout.used_size) == (2 * 19, 2 * 3 + 8 * 16)


@pytest.mark.parametrize("align", [2**n for n in range(2, 17)])
def test_the_rings_do_not_overlap_and_the_used_ring_is_aligned(align: int) -> None:
    for num in (2**n for n in range(16)):
        layout = VringLayout(num, align)
        assert layout.used_offset % align == 0
        assert layout.available_offset + 6 + 2 * num <= layout.used_offset
        assert layout.size == layout.used_offset + 6 + 8 * num


@pytest.mark.parametrize("num", [-1, 0, 3, 255, 32767, 65536])
def test_number_of_entries(num: int) -> None:
    with pytest.raises(ValueError, match=f"vring of {num} entries; it must be a power of two"):
        VringLayout(num, 4096)


@pytest.mark.parametrize("align", [-4, 0, 1, 2, 3, 12, 4095])
def test_alignment(align: int) -> None:
    with pytest.raises(ValueError, match=f"alignment {align}; it must be a power of two"):
        VringLayout(16, align)
