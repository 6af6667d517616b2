"""Where an image and what its table asks for go, and what does not fit."""

from __future__ import annotations

import logging
import mmap
from dataclasses import replace
from itertools import pairwise

import pytest

from openamp_py import Firmware, ImageError, ResourceTableError
from openamp_py.constants import DA_ANY, NOTIFY_ID_ANY
from openamp_py.memory import MemoryMap, Region
from openamp_py.remoteproc.elf import Segment
from openamp_py.remoteproc.plan import plan_load
from openamp_py.remoteproc.resource_table import (
    Carveout,
    DevMem,
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
    assert [vdev.notify_id, *(v.notify_id for v in vdev.vrings)] == [1, 0, 2]


def test_vrings_keep_ids_that_a_vdev_has_too(memory: MemoryMap) -> None:
    """The usual table: id 0 for the vdev, 0 and 1 for its vrings."""
    pairs = [tuple(replace(ANY_VRING, notify_id=first + i) for i in (0, 1)) for first in (0, 2)]
    table = _load(memory, *(Vdev(7, number, 1, vrings=pairs[number]) for number in (0, 1)))
    assert [v.notify_id for vdev in table.vdevs for v in vdev.vrings] == [0, 1, 2, 3]
    assert [vdev.notify_id for vdev in table.vdevs] == [4, 5]


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


def test_a_fixed_vring_lies_in_the_carveout_of_its_name(memory: MemoryMap) -> None:
    carveout = Carveout(RAM_DA + 0x8000, DA_ANY, 0x4000, 0, "vdev0vring1")
    fixed = Vring(RAM_DA + 0x9000, 4096, 16, 5)
    table = _load(memory, carveout, Vdev(7, 0, 1, vrings=(ANY_VRING, fixed)))
    assert table.vdevs[0].vrings[1] == fixed


@pytest.mark.parametrize("first", [DA_ANY, RAM_DA + 0x8000])
@pytest.mark.parametrize("second", [DA_ANY, RAM_DA + 0x9000])
def test_carveouts_of_one_name_are_one_memory(memory: MemoryMap, first: int, second: int) -> None:
    large = Carveout(first, DA_ANY, 0x4000, 0, "pool")
    small = Carveout(second, DA_ANY, 0x1000, 0, "pool")
    if (first, second) == (DA_ANY, RAM_DA + 0x9000):
        large, small = replace(large, length=0x1000), replace(small, length=0x4000)
    plan = plan_load(_firmware(large, small), memory)
    plan.write(memory)
    view = memory.find_da(TABLE_DA, 0x1000)
    assert view is not None
    one, two = decode_table_untrusted(view).carveouts
    da, size = plan.carveouts["pool"]
    assert size == 0x4000
    for carveout in (one, two):
        assert da <= carveout.da and carveout.da + carveout.length <= da + size
        assert carveout.pa == carveout.da
    if first == second == DA_ANY:
        assert one.da == two.da


def test_carveouts_without_a_name_share_nothing(memory: MemoryMap) -> None:
    one, two = _load(memory, *[Carveout(DA_ANY, DA_ANY, 0x1000, 0, "")] * 2).carveouts
    assert abs(one.da - two.da) >= 0x1000


POOL_DA = 0x8000_0000


@pytest.fixture
def two_regions(memory: MemoryMap) -> MemoryMap:
    """RAM, and a region whose name a test's table has, at another physical address."""
    view = memoryview(bytearray(b"\xee" * 0x4000))
    return MemoryMap([*memory.regions, Region("pool", POOL_DA, 0x4000_0000, view)])


@pytest.mark.parametrize(("da", "placed"), [(DA_ANY, POOL_DA), (POOL_DA + 0x1000,) * 2])
def test_a_carveout_named_after_a_region_lies_in_it(
    two_regions: MemoryMap, da: int, placed: int
) -> None:
    (carveout,) = _load(two_regions, Carveout(da, DA_ANY, 0x3000, 0, "pool")).carveouts
    assert (carveout.da, carveout.pa) == (placed, placed - POOL_DA + 0x4000_0000)


def test_vrings_and_buffers_lie_in_the_regions_of_their_names(memory: MemoryMap) -> None:
    names = ("vdev0buffer", "vdev0vring1")
    pools = [
        Region(name, da, da, memoryview(bytearray(0x2000)))
        for name, da in zip(names, (0x1000, 0x8000), strict=True)
    ]
    regions = MemoryMap([*pools, *memory.regions])
    plan = plan_load(_firmware(VDEV, Carveout(DA_ANY, DA_ANY, 0x1000, 0, "other")), regions)
    assert plan.carveouts["vdev0buffer"] == (0x1000, 0x2000)
    assert plan.carveouts["other"][0] >= RAM_DA, "what has a name is not given to others"
    plan.write(regions)
    view = regions.find_da(TABLE_DA, 0x1000)
    assert view is not None
    one, two = decode_table_untrusted(view).vdevs[0].vrings
    assert one.da >= RAM_DA and two.da == 0x8000


def test_nothing_is_placed_on_a_trace(memory: MemoryMap) -> None:
    trace = Trace(RAM_DA + 0x3000, 0x400, "trace0")
    (carveout,) = _load(memory, trace, Carveout(DA_ANY, DA_ANY, 0x4000, 0, "c")).carveouts
    assert carveout.da >= RAM_DA + 0x3400


def test_notify_ids_are_unique_over_all_vdevs(memory: MemoryMap) -> None:
    claimed = replace(VDEV, notify_id=4)
    table = _load(memory, VDEV, claimed, replace(VDEV, notify_id=4))
    ids = [i for vdev in table.vdevs for i in (vdev.notify_id, *(v.notify_id for v in vdev.vrings))]
    assert len(set(ids)) == 9
    assert table.vdevs[1].notify_id == 4
    rings = sorted(vring.da for vdev in table.vdevs for vring in vdev.vrings)
    assert all(above - below >= 0x1086 for below, above in pairwise(rings))


HIGH = 1 << 32


def two_halves(high: Region) -> MemoryMap:
    return MemoryMap(
        [Region("ram", RAM_DA, RAM_DA, memoryview(bytearray(0x4000))), high],
    )


def test_what_a_table_must_name_lies_below_4_gib() -> None:
    """Also where the first memory with room reaches beyond."""
    low = Region("low", HIGH - 0x3000, 0, memoryview(bytearray(0x8000)))
    high = Region("high", HIGH + 0x1_0000, 0x8000, memoryview(bytearray(0x8000)))
    ram = two_halves(low).regions[0]
    memory = MemoryMap([high, low, ram])
    any_of = Carveout(DA_ANY, DA_ANY, 0x2000, 0, "any")
    table = _load(memory, any_of, replace(any_of, name="other"))
    assert [carveout.da for carveout in table.carveouts] == [HIGH - 0x3000, RAM_DA + 0x2000]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Carveout(DA_ANY, DA_ANY, 0x4000, 0, "c"), "no room for 0x4000 bytes.*below 0x100000000"),
        (Carveout(DA_ANY, DA_ANY, 0x10, 0, "high"), "0x10 bytes at 0x100000000 end beyond"),
        (VDEV, "vdev0vring1.* at 0x100000000 end beyond"),
    ],
)
def test_refuses_what_a_table_cannot_name(entry: Entry, message: str) -> None:
    name = "vdev0vring1" if isinstance(entry, Vdev) else "high"
    high = Region(name, HIGH, 0, memoryview(bytearray(0x8000)))
    with pytest.raises(ResourceTableError, match=message):
        plan_load(_firmware(entry), two_halves(high))


def test_a_physical_address_that_the_table_cannot_name_stays_as_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory = MemoryMap([Region("ram", RAM_DA, HIGH, memoryview(bytearray(0x4000)))])
    with caplog.at_level(logging.WARNING):
        (carveout,) = _load(memory, Carveout(DA_ANY, DA_ANY, 0x1000, 0, "c")).carveouts
    assert (carveout.da, carveout.pa) == (RAM_DA, DA_ANY)
    assert "carveout 'c': 0x100000000 is no u32" in caplog.text


def test_devmem_is_reported_and_nothing_is_mapped(
    memory: MemoryMap, caplog: pytest.LogCaptureFixture
) -> None:
    firmware = _firmware(DevMem(0x4000_0000, 0x4000_0000, 0x1000, 0, "uart"))
    with caplog.at_level(logging.WARNING, logger="openamp_py"):
        assert plan_load(firmware, memory).patches == ()
    assert "devmem 'uart' (0x1000 bytes at 0x40000000)" in caplog.text


def test_pieces_are_small_in_order_and_all_of_it(memory: MemoryMap) -> None:
    ram = memoryview(mmap.mmap(-1, 5 << 20))
    ram[:] = b"\xee" * len(ram)
    large = MemoryMap([Region("ram", RAM_DA, RAM_DA, ram)])
    code = Segment(RAM_DA + 0x10_0000, b"c" * 0x18_0000, 0x2C_0001, 5)
    plan = plan_load(_firmware(VDEV, segments=(code,)), large)
    pieces = list(plan.chunks())
    assert all(0 < len(data) <= 1 << 20 for _, data in pieces)
    assert pieces[-len(plan.patches) :] == list(plan.patches) != []
    for da, data in pieces:
        target = large.find_da(da, len(data))
        assert target is not None
        target[:] = data
    piecewise = bytes(ram)
    ram[:] = b"\xee" * len(ram)
    plan.write(large)
    assert bytes(ram) == piecewise
    assert piecewise[0x10_0000:] == (
        b"c" * 0x18_0000 + bytes(0x14_0001) + b"\xee" * (len(ram) - 0x10_0000 - 0x2C_0001)
    )


def test_a_platform_translates_what_is_in_no_region(memory: MemoryMap) -> None:
    tcm = memoryview(bytearray(64))

    def translate(da: int, size: int) -> memoryview | None:
        return tcm[da : da + size] if da + size <= len(tcm) else memory.find_da(da, size)

    low = Carveout(0, 0x77, 64, 0, "tcm")
    plan = plan_load(
        _firmware(low, segments=(Segment(8, b"vectors", 8, 5),)), memory, translate=translate
    )
    plan.write(memory, translate=translate)
    assert bytes(tcm[8:16]) == b"vectors\0"
    view = memory.find_da(TABLE_DA, 0x1000)
    assert view is not None
    assert decode_table_untrusted(view).carveouts == (low,), "its pa is not ours to know"


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
    "fixed vring outside its carveout": (
        (
            Carveout(RAM_DA + 0x8000, DA_ANY, 0x1000, 0, "vdev0vring0"),
            Vdev(7, 0, 1, vrings=(Vring(RAM_DA + 0x9000, 4096, 16, 1), ANY_VRING)),
        ),
        "carveout 'vdev0vring0' has 0x1000 bytes at 0x10008000; .* at 0x10009000",
    ),
    "vring's carveout misaligned": (
        (Carveout(RAM_DA + 0x8010, DA_ANY, 0x4000, 0, "vdev0vring0"), VDEV),
        "at 0x10008010; the vring .* aligned to 0x1000, at any address",
    ),
    "one name, the second larger": (
        (Carveout(DA_ANY, DA_ANY, 16, 0, "c"), Carveout(DA_ANY, DA_ANY, 32, 0, "c")),
        "carveout 'c': 0x20 bytes at .* do not fit the first of that name, which has 0x10 bytes",
    ),
    "one name, two places": (
        (Carveout(RAM_DA + 64, DA_ANY, 16, 0, "c"), Carveout(RAM_DA, DA_ANY, 16, 0, "c")),
        "carveout 'c': 0x10 bytes at 0x10000000 do not fit the first of that name",
    ),
    "larger than its region": (
        (Carveout(DA_ANY, DA_ANY, RAM_SIZE + 1, 0, "ram"),),
        "carveout 'ram': 0x100001 bytes .* do not fit region 'ram', which has 0x100000",
    ),
    "outside its region": (
        (Carveout(0x500, DA_ANY, 16, 0, "ram"),),
        "carveout 'ram': 0x10 bytes at 0x500 do not fit region 'ram'",
    ),
    "two vrings in one place": (
        (Vdev(7, 0, 1, vrings=(Vring(RAM_DA + 0x8000, 4096, 16, 1),) * 2),),
        "vdev 0 vring 0: 0x1086 bytes at 0x10008000 overlap vdev 0 vring 1",
    ),
    "a vring in the buffers": (
        (
            Carveout(RAM_DA + 0x8000, DA_ANY, 0x4000, 0, "vdev0buffer"),
            Vdev(7, 0, 1, vrings=(ANY_VRING, Vring(RAM_DA + 0xB000, 4096, 16, 1))),
        ),
        "carveout 'vdev0buffer': 0x4000 bytes at 0x10008000 overlap vdev 0 vring 1",
    ),
    "a vring on the table": (
        (Vdev(7, 0, 1, vrings=(ANY_VRING, Vring(TABLE_DA, 4096, 16, 1))),),
        "the resource table.* overlap|overlap the resource table",
    ),
    "a vring at 0": (
        (Vdev(7, 0, 1, vrings=(ANY_VRING, Vring(0, 4096, 16, 1))),),
        "vdev 0 vring 1: .* at 0x0 lie outside .*that the host is to choose is 0xffffffff",
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


def test_refuses_a_table_that_is_not_loaded(memory: MemoryMap) -> None:
    firmware = _firmware(VDEV)
    for wrong, message in (
        (replace(firmware, table_da=None), "no device address"),
        (replace(firmware, table_da=RAM_DA), "at 0x10000000 are not in a segment"),
        (replace(firmware, table_da=TABLE_DA + 2), "not a multiple of 4"),
    ):
        with pytest.raises(ResourceTableError, match=message):
            plan_load(wrong, memory)
