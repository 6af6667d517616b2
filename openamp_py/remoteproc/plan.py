"""Where everything of an image goes, decided before any of it is written."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

from openamp_py.constants import DA_ANY, NOTIFY_ID_ANY
from openamp_py.errors import ImageError, ResourceTableError
from openamp_py.memory import Arena, MemoryMap, Region
from openamp_py.remoteproc import resource_table as rt
from openamp_py.remoteproc.elf import Firmware
from openamp_py.vring import VringLayout

_logger = logging.getLogger(__name__)

CARVEOUT_ALIGN = 4096
"""Carveouts whose place the host chooses begin on a page, as Linux places them."""

CHUNK_SIZE: Final = 1 << 20
"""Most bytes of a piece of `LoadPlan.chunks`: well below a millisecond of copying."""

Translate: TypeAlias = Callable[[int, int], "memoryview | None"]
"""The memory at a device address of a given size; None where the core has none there."""

_U32 = struct.Struct("<I")
_U32_SPACE: Final = 1 << 32
_ZEROS = memoryview(bytes(CHUNK_SIZE))


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What loading an image comes to.

    Args:
        firmware: the image.
        patches: (device address, bytes) that the host writes into the loaded table.
        carveouts: device address and size of each carveout, by name.
        arena: what of the memory is taken.
    """

    firmware: Firmware
    patches: tuple[tuple[int, bytes], ...]
    carveouts: dict[str, tuple[int, int]]
    arena: Arena

    def chunks(self) -> Iterator[tuple[int, memoryview | bytes]]:
        """All that is written, in pieces of at most `CHUNK_SIZE`, as (device address, bytes).

        Segments come by address, each with the zeros behind it; the host's decisions come last,
        for they lie in a segment.
        """
        for segment in self.firmware.segments:
            data = memoryview(segment.data)
            for start in range(0, len(data), CHUNK_SIZE):
                yield segment.da + start, data[start : start + CHUNK_SIZE]
            for start in range(segment.file_size, segment.memory_size, CHUNK_SIZE):
                yield segment.da + start, _ZEROS[: segment.memory_size - start]
        yield from self.patches

    def write(self, memory: MemoryMap, *, translate: Translate | None = None) -> None:
        """Puts all of it into memory at once; with the `translate` of `plan_load`."""
        translate = translate or memory.find_da
        for da, data in self.chunks():
            target = translate(da, len(data))
            assert target is not None, "plan_load found the segment it lies in"
            target[:] = data


def plan_load(
    firmware: Firmware, memory: MemoryMap, *, translate: Translate | None = None
) -> LoadPlan:
    """Decides where an image and what its table asks for go in a processor's memory.

    What the table leaves to the host is placed in the regions of the memory; a carveout, vring
    or vdev's buffers that has a region's name lies in that region.

    Args:
        translate: how a device address is found, where the platform knows more than the regions.

    Raises:
        ImageError: a segment lies outside the memory.
        ResourceTableError: the table asks for what the memory cannot give.
    """
    translate = translate or memory.find_da
    arena = Arena(memory)
    for number, segment in enumerate(firmware.segments):
        if translate(segment.da, segment.memory_size) is None:
            raise ImageError(
                f"segment {number}: {segment.memory_size:#x} bytes at {segment.da:#x} lie outside "
                f"the core's memory: {memory}"
            )
        arena.reserve(segment.da, segment.memory_size)
    _check_table(firmware)
    planner = _Planner(firmware, memory, arena, translate)
    patches = tuple(planner.patches())
    return LoadPlan(firmware, patches, planner.carveouts, arena)


def _check_table(firmware: Firmware) -> None:
    table, da = firmware.table, firmware.table_da
    if table is None:
        return
    if da is None:
        raise ResourceTableError("the resource table has no device address; give table_da")
    if table.length > rt.TABLE_LIMIT:
        raise ResourceTableError(
            f"the resource table has {table.length:#x} bytes; "
            f"at most {rt.TABLE_LIMIT:#x} are possible"
        )
    if da % _U32.size:
        raise ResourceTableError(
            f"the resource table lies at {da:#x}, which is not a multiple of "
            f"{_U32.size}; both sides write words of it in place"
        )
    if not any(
        segment.da <= da and da + table.length <= segment.da + segment.memory_size
        for segment in firmware.segments
    ):
        raise ResourceTableError(
            f"the resource table's {table.length:#x} bytes at {da:#x} are not in a segment, "
            "so the remote would not see it; see with_table"
        )


class _Planner:
    """One pass over one table; a value that lives as long as `plan_load`."""

    def __init__(
        self, firmware: Firmware, memory: MemoryMap, arena: Arena, translate: Translate
    ) -> None:
        self._table = firmware.table or rt.ResourceTable()
        self._table_da = firmware.table_da or 0
        self._memory = memory
        self._regions = {region.name: region for region in memory.regions}
        self._arena = arena
        self._translate = translate
        self.carveouts: dict[str, tuple[int, int]] = {}
        self._written: list[tuple[int, int, str]] = []
        self._ring_ids = {vring.notify_id for vdev in self._table.vdevs for vring in vdev.vrings}
        self._claimed_ids = self._ring_ids | {vdev.notify_id for vdev in self._table.vdevs}
        self._given_ids: set[int] = set()
        self._next_id = 0

    def patches(self) -> Iterator[tuple[int, bytes]]:
        """Everything the host writes into the table; fixed places are taken first."""
        for devmem in self._table.devmems:
            _logger.warning(
                "devmem %r (%#x bytes at %#x) is left to the core: no IOMMU is programmed for it",
                devmem.name,
                devmem.length,
                devmem.da,
            )
        self._reserve_fixed()
        for carveout in self._table.carveouts:
            yield from self._place_carveout(carveout)
        for index, vdev in enumerate(self._table.vdevs):
            yield from self._place_vdev(index, vdev)
        self._check_overlap()

    def _reserve_fixed(self) -> None:
        for carveout in self._table.carveouts:
            if carveout.da != DA_ANY:
                self._share(carveout, carveout.da)
        for carveout in self._table.carveouts:
            region = self._regions.get(carveout.name)
            if carveout.da == DA_ANY and region and carveout.name not in self.carveouts:
                self._share(carveout, region.da)
        for trace in self._table.traces:
            if trace.da != DA_ANY:
                self._check_in_memory(f"trace {trace.name!r}", trace.da, trace.length)
                self._arena.reserve(trace.da, trace.length)
        for index, vdev in enumerate(self._table.vdevs):
            names = [f"vdev{index}vring{number}" for number in range(len(vdev.vrings))]
            for name in (*names, f"vdev{index}buffer"):
                region = self._regions.get(name)
                if region is not None and name not in self.carveouts:
                    self._take(name, region.da, region.size)
            for number, vring in enumerate(vdev.vrings):
                if vring.da != DA_ANY:
                    size = VringLayout(vring.num, vring.align).size
                    self._check_in_memory(f"vdev {index} vring {number}", vring.da, size)
                    self._arena.reserve(vring.da, size)

    def _check_overlap(self) -> None:
        """Rings, buffers and the table are written by both sides all the time."""
        if self._table.entries:
            self._written.append((self._table_da, self._table.length, "the resource table"))
        for index in range(len(self._table.vdevs)):
            name = f"vdev{index}buffer"
            if name in self.carveouts:
                self._written.append((*self.carveouts[name], f"carveout {name!r}"))
        for (da, size, below), (above_da, _, above) in pairwise(sorted(self._written)):
            if da + size > above_da:
                raise ResourceTableError(
                    f"{below}: {size:#x} bytes at {da:#x} overlap {above} at {above_da:#x}"
                )

    def _share(self, carveout: rt.Carveout, da: int) -> None:
        """Takes what a carveout names, or finds that it fits into what its name stands for."""
        what, size = f"carveout {carveout.name!r}", carveout.length
        _check_encodable(what, da, size)
        region = self._regions.get(carveout.name)
        if region is not None:
            _check_inside(what, da, size, f"region {region.name!r}", (region.da, region.size))
        if carveout.name and carveout.name in self.carveouts:
            _check_inside(what, da, size, "the first of that name", self.carveouts[carveout.name])
            return
        self._check_in_memory(what, da, size)
        self._take(carveout.name, da, size)

    def _take(self, name: str, da: int, size: int) -> None:
        self._arena.reserve(da, size)
        self.carveouts[name] = (da, size)

    def _place_carveout(self, carveout: rt.Carveout) -> Iterator[tuple[int, bytes]]:
        da = carveout.da
        if da == DA_ANY:
            da = self._place_any_carveout(carveout)
            yield self._patch(carveout.offset + rt.MEMORY_DA_OFFSET, da)
        region = self._region_of(da)
        if carveout.length and region is not None:
            pa = region.pa + da - region.da
            if pa >= _U32_SPACE:
                _logger.warning(
                    "carveout %r: %#x is no u32: the table's pa stays", carveout.name, pa
                )
            else:
                yield self._patch(carveout.offset + rt.MEMORY_PA_OFFSET, pa)

    def _place_any_carveout(self, carveout: rt.Carveout) -> int:
        if carveout.name and carveout.name in self.carveouts:
            da = self.carveouts[carveout.name][0]
            self._share(carveout, da)
            return da
        da = self._allocate(f"carveout {carveout.name!r}", carveout.length, CARVEOUT_ALIGN)
        self.carveouts[carveout.name] = (da, carveout.length)
        return da

    def _region_of(self, da: int) -> Region | None:
        return next((r for r in self._memory.regions if 0 <= da - r.da < r.size), None)

    def _place_vdev(self, index: int, vdev: rt.Vdev) -> Iterator[tuple[int, bytes]]:
        yield self._patch(vdev.offset + rt.VDEV_DRIVER_FEATURES_OFFSET, 0)
        yield self._table_da + vdev.offset + rt.VDEV_STATUS_OFFSET, b"\0"
        # Much firmware has 0 for the vdev and for its first vring, where Linux knows only vrings'
        # ids, and has the latter built in.
        asked = NOTIFY_ID_ANY if vdev.notify_id in self._ring_ids else vdev.notify_id
        yield self._patch(vdev.offset + rt.VDEV_NOTIFY_ID_OFFSET, self._give_id(asked))
        for number, vring in enumerate(vdev.vrings):
            offset = vdev.offset + rt.VDEV_VRINGS_OFFSET + number * rt.VRING_SIZE
            da = self._place_vring(f"vdev{index}vring{number}", vring)
            size = VringLayout(vring.num, vring.align).size
            self._written.append((da, size, f"vdev {index} vring {number}"))
            if vring.da == DA_ANY:
                yield self._patch(offset + rt.VRING_DA_OFFSET, da)
            notify_id = self._give_id(vring.notify_id)
            yield self._patch(offset + rt.VRING_NOTIFY_ID_OFFSET, notify_id)

    def _place_vring(self, name: str, vring: rt.Vring) -> int:
        """In the carveout or region of that name, as Linux does, or else in free memory."""
        size = VringLayout(vring.num, vring.align).size
        if name not in self.carveouts:
            if vring.da != DA_ANY:
                return vring.da
            return self._allocate(name, size, max(vring.align, CARVEOUT_ALIGN))
        place, room = self.carveouts[name]
        da = place if vring.da == DA_ANY else vring.da
        _check_encodable(name, da, size)
        if da < place or da + size > place + room or da % vring.align:
            raise ResourceTableError(
                f"carveout {name!r} has {room:#x} bytes at {place:#x}; the vring of {vring.num} "
                f"entries needs {size:#x}, aligned to {vring.align:#x}, at "
                f"{'any address' if vring.da == DA_ANY else hex(da)}"
            )
        return da

    def _allocate(self, what: str, size: int, align: int) -> int:
        da = self._arena.allocate(size, align, below=_U32_SPACE)
        if da is None:
            raise ResourceTableError(
                f"{what}: no room for {size:#x} bytes aligned to {align:#x}, below "
                f"{_U32_SPACE:#x}, in the core's memory: {self._memory}"
            )
        return da

    def _check_in_memory(self, what: str, da: int, size: int) -> None:
        if self._translate(da, size) is None:
            hint = f"; an address that the host is to choose is {DA_ANY:#x}" if da == 0 else ""
            raise ResourceTableError(
                f"{what}: {size:#x} bytes at {da:#x} lie outside the core's memory: "
                f"{self._memory}{hint}"
            )

    def _give_id(self, asked: int) -> int:
        """The id asked for; or a free one, where that is left to us or is taken.

        Published firmware does name one id twice, and expects the host to sort it out.
        """
        notify_id = asked
        if asked == NOTIFY_ID_ANY or asked in self._given_ids:
            while self._next_id in self._given_ids or self._next_id in self._claimed_ids:
                self._next_id += 1
            notify_id = self._next_id
        self._given_ids.add(notify_id)
        return notify_id

    def _patch(self, offset: int, value: int) -> tuple[int, bytes]:
        return self._table_da + offset, _U32.pack(value)


def _check_encodable(what: str, da: int, size: int) -> None:
    """A region may lie where a table's addresses do not reach."""
    if da + size > _U32_SPACE:
        raise ResourceTableError(
            f"{what}: {size:#x} bytes at {da:#x} end beyond {_U32_SPACE:#x}; addresses in a "
            "resource table have 32 bits"
        )


def _check_inside(what: str, da: int, size: int, whose: str, room: tuple[int, int]) -> None:
    room_da, room_size = room
    if da < room_da or da + size > room_da + room_size:
        raise ResourceTableError(
            f"{what}: {size:#x} bytes at {da:#x} do not fit {whose}, which has "
            f"{room_size:#x} bytes at {room_da:#x}"
        )
