"""Where everything of an image goes, decided before any of it is written."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from openamp_py.constants import DA_ANY, NOTIFY_ID_ANY
from openamp_py.errors import ImageError, ResourceTableError
from openamp_py.memory import Arena, MemoryMap
from openamp_py.remoteproc import resource_table as rt
from openamp_py.remoteproc.elf import Firmware
from openamp_py.vring import VringLayout

CARVEOUT_ALIGN = 4096
"""Carveouts whose place the host chooses begin on a page, as Linux places them."""

_U32 = struct.Struct("<I")


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

    def write(self, memory: MemoryMap) -> None:
        """Puts the image into memory: segments, zeroes behind them, the host's decisions."""
        for segment in self.firmware.segments:
            target = memory.find_da(segment.da, segment.memory_size)
            assert target is not None, "plan_load found it"
            target[: segment.file_size] = segment.data
            target[segment.file_size :] = bytes(segment.memory_size - segment.file_size)
        for da, data in self.patches:
            target = memory.find_da(da, len(data))
            assert target is not None, "the table lies in a segment"
            target[:] = data


def plan_load(firmware: Firmware, memory: MemoryMap) -> LoadPlan:
    """Decides where an image and what its table asks for go in a processor's memory.

    Raises:
        ImageError: a segment lies outside the memory.
        ResourceTableError: the table asks for what the memory cannot give.
    """
    _check_table(firmware)
    arena = Arena(memory)
    for number, segment in enumerate(firmware.segments):
        if memory.find_da(segment.da, segment.memory_size) is None:
            raise ImageError(
                f"segment {number}: {segment.memory_size:#x} bytes at {segment.da:#x} lie outside "
                f"the core's memory: {memory}"
            )
        arena.reserve(segment.da, segment.memory_size)
    planner = _Planner(firmware, memory, arena)
    patches = tuple(planner.patches())
    return LoadPlan(firmware, patches, planner.carveouts, arena)


def _check_table(firmware: Firmware) -> None:
    if firmware.table is None:
        return
    if firmware.table.length > rt.TABLE_LIMIT:
        raise ResourceTableError(
            f"the resource table has {firmware.table.length:#x} bytes; "
            f"at most {rt.TABLE_LIMIT:#x} are possible"
        )
    if (firmware.table_da or 0) % _U32.size:
        raise ResourceTableError(
            f"the resource table lies at {firmware.table_da:#x}, which is not a multiple of "
            f"{_U32.size}; both sides write words of it in place"
        )


class _Planner:
    """One pass over one table; a value that lives as long as `plan_load`."""

    def __init__(self, firmware: Firmware, memory: MemoryMap, arena: Arena) -> None:
        self._table = firmware.table or rt.ResourceTable()
        self._table_da = firmware.table_da or 0
        self._memory = memory
        self._arena = arena
        self.carveouts: dict[str, tuple[int, int]] = {}
        self._claimed_ids = {
            notify_id
            for vdev in self._table.vdevs
            for notify_id in (vdev.notify_id, *(vring.notify_id for vring in vdev.vrings))
        }
        self._given_ids: set[int] = set()
        self._next_id = 0

    def patches(self) -> Iterator[tuple[int, bytes]]:
        """Everything the host writes into the table; fixed places are taken first."""
        self._reserve_fixed()
        for carveout in self._table.carveouts:
            yield from self._place_carveout(carveout)
        for trace in self._table.traces:
            if trace.da != DA_ANY:
                self._check_in_memory(f"trace {trace.name!r}", trace.da, trace.length)
        for index, vdev in enumerate(self._table.vdevs):
            yield from self._place_vdev(index, vdev)

    def _reserve_fixed(self) -> None:
        for carveout in self._table.carveouts:
            if carveout.da != DA_ANY:
                what = f"carveout {carveout.name!r}"
                self._check_in_memory(what, carveout.da, carveout.length)
                self._arena.reserve(carveout.da, carveout.length)
        for index, vdev in enumerate(self._table.vdevs):
            for number, vring in enumerate(vdev.vrings):
                if vring.da == DA_ANY:
                    continue
                what = f"vdev {index} vring {number}"
                size = VringLayout(vring.num, vring.align).size
                self._check_in_memory(what, vring.da, size)
                self._arena.reserve(vring.da, size)

    def _place_carveout(self, carveout: rt.Carveout) -> Iterator[tuple[int, bytes]]:
        da = carveout.da
        if da == DA_ANY:
            da = self._allocate(f"carveout {carveout.name!r}", carveout.length, CARVEOUT_ALIGN)
            yield self._patch(carveout.offset + rt.MEMORY_DA_OFFSET, da)
        if carveout.length:
            yield self._patch(carveout.offset + rt.MEMORY_PA_OFFSET, self._memory.pa_of(da))
        self.carveouts.setdefault(carveout.name, (da, carveout.length))

    def _place_vdev(self, index: int, vdev: rt.Vdev) -> Iterator[tuple[int, bytes]]:
        yield self._patch(vdev.offset + rt.VDEV_DRIVER_FEATURES_OFFSET, 0)
        yield self._table_da + vdev.offset + rt.VDEV_STATUS_OFFSET, b"\0"
        yield self._patch(vdev.offset + rt.VDEV_NOTIFY_ID_OFFSET, self._give_id(vdev.notify_id))
        for number, vring in enumerate(vdev.vrings):
            offset = vdev.offset + rt.VDEV_VRINGS_OFFSET + number * rt.VRING_SIZE
            if vring.da == DA_ANY:
                da = self._place_vring(f"vdev{index}vring{number}", vring)
                yield self._patch(offset + rt.VRING_DA_OFFSET, da)
            notify_id = self._give_id(vring.notify_id)
            yield self._patch(offset + rt.VRING_NOTIFY_ID_OFFSET, notify_id)

    def _place_vring(self, name: str, vring: rt.Vring) -> int:
        """In the carveout of that name, as Linux does, or else in free memory."""
        size = VringLayout(vring.num, vring.align).size
        if name not in self.carveouts:
            return self._allocate(name, size, max(vring.align, CARVEOUT_ALIGN))
        da, room = self.carveouts[name]
        if size > room or da % vring.align:
            raise ResourceTableError(
                f"carveout {name!r} has {room:#x} bytes at {da:#x}; the vring of {vring.num} "
                f"entries needs {size:#x}, aligned to {vring.align:#x}"
            )
        return da

    def _allocate(self, what: str, size: int, align: int) -> int:
        da = self._arena.allocate(size, align)
        if da is None:
            raise ResourceTableError(
                f"{what}: no room for {size:#x} bytes aligned to {align:#x} "
                f"in the core's memory: {self._memory}"
            )
        return da

    def _check_in_memory(self, what: str, da: int, size: int) -> None:
        if self._memory.find_da(da, size) is None:
            raise ResourceTableError(
                f"{what}: {size:#x} bytes at {da:#x} lie outside the core's memory: {self._memory}"
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
