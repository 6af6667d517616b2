"""Where an image and what its table asks for go, and what does not fit."""

from __future__ import annotations

import mmap
from dataclasses import replace

import pytest

from openamp_py import Firmware, ImageError, ResourceTableError
from openamp_py.constants import DA_ANY, NOTIFY_ID_ANY
from openamp_py.memory import MemoryMap, Region
from openamp_py.remoteproc.elf import Segment
from openamp_py.remoteproc.plan import plan_load
from openamp_py.remoteproc.resource_table import (
    Carveout,
    Entry,
    ResourceTable,
    Trace,
    Unknown,
    Vdev,
    Vring,
    decode_table_untrusted,
    encode_table,
    place_entries,
)

RAM_DA, RAM_SIZE = 0x1000_0000, 0x10_0000
TABLE_DA = RAM_DA + 0x1000
ANY_VRING = Vring(DA_ANY, 4096, 16, NOTIFY_ID_ANY)
VDEV = Vdev(7, NOTIFY_ID_ANY, 1, vrings=(ANY_VRING, ANY_VRING))


@pytest.fixture
def memory() -> MemoryMap:
    view = memoryview(mmap.mmap(-1, RAM_SIZE))
    view[:] = b"\xee" * RAM_SIZE
    return MemoryMap([Region("ram", RAM_DA, RAM_DA, view)])


def _firmware(*entries: Entry, segments: tuple[Segment, ...] = ()) -> Firmware:
    table = place_entries(entries)
    data = encode_table(table)
    return Firmware(
        segments=(Segment(TABLE_DA, data, len(data), 6), *segments),
        table=table,
        table_da=TABLE_DA,
    )


def _load(memory: MemoryMap, *entries: Entry) -> ResourceTable:
    """Loads a table and reads back what the host made of it."""
    plan_load(_firmware(*entries), memory).write(memory)
    view = memory.find_da(TABLE_DA, 0x1000)
    assert view is not None
    return decode_table_untrusted(view)


def test_segments_are_written_and_the_rest_of_them_zeroed(memory: MemoryMap) -> None:
    plan_load(Firmware(segments=(Segment(RAM_DA + 8, b"code", 16, 5),)), memory).write(memory)
    assert bytes(memory.regions[0].view[:32]) == b"\xee" * 8 + b"code" + bytes(12) + b"\xee" * 8


def test_any_vrings_get_memory_of_their_own_and_ids(memory: MemoryMap) -> None:
    (vdev,) = _load(memory, replace(VDEV, driver_features=7, status=7)).vdevs
    one, two = vdev.vrings
    assert one.da % 4096 == two.da % 4096 == 0
    assert two.da >= one.da + 4096 + 6 + 8 * 16
    assert memory.find_da(two.da, 4096) is not None
    assert {vdev.notify_id, one.notify_id, two.notify_id} == {0, 1, 2}
    assert (vdev.driver_features, vdev.status) == (0, 0)


def test_fixed_vrings_stay_and_nothing_is_put_on_them(memory: MemoryMap) -> None:
    fixed = Vring(RAM_DA + 0x2000, 4096, 16, 5)
    carveout = Carveout(DA_ANY, DA_ANY, 0x1000, 0, "any")
    table = _load(memory, carveout, Vdev(7, 9, 1, vrings=(fixed, ANY_VRING)))
    (vdev,) = table.vdevs
    assert vdev.vrings[0] == fixed
    assert vdev.notify_id == 9 and vdev.vrings[1].notify_id == 0
    taken = [(TABLE_DA, 0x1000), (fixed.da, 0x2000)]
    for da, size in ((table.carveouts[0].da, 0x1000), (vdev.vrings[1].da, 0x2000)):
        assert all(da + size <= start or da >= start + length for start, length in taken)
        taken.append((da, size))


def test_an_id_that_is_named_twice_is_renumbered(memory: MemoryMap) -> None:
    vring = replace(ANY_VRING, notify_id=0)
    (vdev,) = _load(memory, Vdev(7, 0, 1, vrings=(vring, vring))).vdevs
    assert [vdev.notify_id, *(v.notify_id for v in vdev.vrings)] == [0, 1, 2]


def test_carveouts_get_addresses_and_names_are_found(memory: MemoryMap) -> None:
    fixed = Carveout(RAM_DA + 0x8000, DA_ANY, 0x1000, 0, "fixed")
    plan = plan_load(_firmware(Carveout(DA_ANY, DA_ANY, 0x4000, 0, "pool"), fixed), memory)
    plan.write(memory)
    assert plan.carveouts["fixed"] == (RAM_DA + 0x8000, 0x1000)
    da, size = plan.carveouts["pool"]
    assert size == 0x4000 and da % 4096 == 0
    view = memory.find_da(TABLE_DA, 0x1000)
    assert view is not None
    pool, fixed_after = decode_table_untrusted(view).carveouts
    assert (pool.da, pool.pa, fixed_after.pa) == (da, da, RAM_DA + 0x8000)


def test_a_carveout_named_after_a_vring_holds_it(memory: MemoryMap) -> None:
    carveout = Carveout(RAM_DA + 0x8000, DA_ANY, 0x2000, 0, "vdev0vring1")
    table = _load(memory, carveout, VDEV)
    assert table.vdevs[0].vrings[1].da == RAM_DA + 0x8000


def test_firmware_without_a_table_is_legal(memory: MemoryMap) -> None:
    plan = plan_load(Firmware(segments=(Segment(RAM_DA, b"x", 1, 5),)), memory)
    assert plan.patches == ()


def test_an_unknown_entry_is_skipped(memory: MemoryMap) -> None:
    assert len(_load(memory, Unknown(9, b"????"), VDEV).vdevs) == 1


@pytest.mark.parametrize("da", [0, RAM_DA - 1, RAM_DA + RAM_SIZE - 3])
def test_refuses_a_segment_outside_memory(memory: MemoryMap, da: int) -> None:
    with pytest.raises(ImageError, match=rf"segment 0: 0x4 bytes at {da:#x} lie outside .*ram"):
        plan_load(Firmware(segments=(Segment(da, b"code", 4, 5),)), memory)


BAD_TABLES: dict[str, tuple[tuple[Entry, ...], str]] = {
    "carveout outside": (
        (Carveout(0x500, DA_ANY, 16, 0, "c"),),
        "carveout 'c': 0x10 bytes at 0x500 lie outside",
    ),
    "carveout too large": (
        (Carveout(DA_ANY, DA_ANY, RAM_SIZE, 0, "c"),),
        "carveout 'c': no room for 0x100000 bytes",
    ),
    "trace outside": ((Trace(0x500, 16, "t"),), "trace 't': 0x10 bytes at 0x500 lie outside"),
    "vring outside": (
        (Vdev(7, 0, 1, vrings=(ANY_VRING, Vring(0x4000, 4096, 16, 1))),),
        "vdev 0 vring 1: .* lie outside",
    ),
    "vring's carveout too small": (
        (Carveout(DA_ANY, DA_ANY, 0x1000, 0, "vdev0vring0"), VDEV),
        "carveout 'vdev0vring0' has 0x1000 bytes .* needs 0x1086",
    ),
    "no room for a vring": (
        (Vdev(7, 0, 1, vrings=(Vring(DA_ANY, 4096, 32768, 1),) * 2),),
        "vdev0vring1: no room for",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_refuses_what_the_memory_cannot_give_and_writes_nothing(
    memory: MemoryMap, name: str
) -> None:
    entries, message = BAD_TABLES[name]
    with pytest.raises(ResourceTableError, match=message):
        plan_load(_firmware(*entries), memory)
    assert bytes(memory.regions[0].view) == b"\xee" * RAM_SIZE
