"""The virtio devices that a resource table in shared memory describes, for either side."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from openamp_py.background import open_background
from openamp_py.constants import VIRTIO_ID_RPMSG
from openamp_py.errors import OpenAMPError, PeerGoneError, ResourceTableError, StateError
from openamp_py.memory import Arena, MemoryMap
from openamp_py.remoteproc import resource_table as rt
from openamp_py.remoteproc.platform import Link, run_link
from openamp_py.virtio import Role, SharedU8, SharedU32, VirtioDevice, Vring
from openamp_py.virtio.device import BufferMemory
from openamp_py.vring import VringLayout

_logger = logging.getLogger(__name__)

# Not every driver kicks once it is up, so its status is looked at again this often (seconds).
_STATUS_RECHECK = 0.02


class Buffers:
    """Memory for one device's buffers: a fixed area, or a part of what is free.

    Args:
        memory: where.
        area: device address and size, where the layout or a carveout fixes them.
        arena: what is free, otherwise.
    """

    def __init__(
        self, name: str, memory: MemoryMap, area: tuple[int, int] | None, arena: Arena
    ) -> None:
        self._name = name
        self._memory = memory
        self._area = area
        self._arena = arena

    def __call__(self, size: int) -> tuple[int, memoryview]:
        """Physical address and bytes of `size` bytes; a later call may get the same ones."""
        if self._area is None:
            da = self._arena.allocate(size, 4096)
            if da is None:
                raise ResourceTableError(
                    f"{self._name}: no room for {size} bytes of buffers in {self._memory}"
                )
            self._area = (da, size)
        da, room = self._area
        view = self._memory.find_da(da, size)
        if size > room or view is None:
            raise ResourceTableError(
                f"{self._name}: {size} bytes of buffers are needed, "
                f"their memory at {da:#x} has {room}"
            )
        return self._memory.pa_of(da), view


class Resources:
    """What one side has of a link: the table, and a virtio device for each of its vdev entries.

    Made by `open_resources` or by a RemoteProcessor, which also close it.

    Attributes:
        table: the table as it was when it was read last: where a device is made, or its driver
            has come up.
        devices: in the order of the table.
        failure: what ended the link; None while it is up.

    Args:
        adopt: a driver takes over what another one has up, instead of resetting it.
    """

    def __init__(
        self,
        link: Link,
        role: Role,
        *,
        adopt: bool = False,
        carveouts: dict[str, tuple[int, int]] | None = None,
        arena: Arena | None = None,
    ) -> None:
        """
        Raises:
            ResourceTableError: the table in memory is malformed.
        """
        self._link = link
        self._role = role
        self._adopt = adopt
        self.failure: OpenAMPError | None = None
        memory = link.memory
        if link.table_da is None:
            raise ResourceTableError(f"{link.name}: there is no resource table")
        view = table_view(memory, link.table_da)
        # Copied once: what is checked is what is used, whatever the peer writes meanwhile.
        self.table = rt.decode_table_untrusted(bytes(view))
        areas = carveouts
        if areas is None:
            areas = {c.name: (c.da, c.length) for c in self.table.carveouts}
        if arena is None:
            arena = _arena_of(self.table, memory, link.table_da)
        self.devices: tuple[VirtioDevice, ...] = ()
        try:
            for index, vdev in enumerate(self.table.vdevs):
                area = areas.get(f"vdev{index}buffer", link.buffer_area if index == 0 else None)
                buffers = Buffers(f"vdev{index}", memory, area, arena)
                self.devices += (self._create_device(view, index, vdev, buffers),)
        except BaseException:
            self.close()
            raise

    def _create_device(
        self, view: memoryview, index: int, vdev: rt.Vdev, buffers: BufferMemory
    ) -> VirtioDevice:
        link = self._link
        config = view[vdev.offset + vdev.config_offset :][: len(vdev.config)]
        accepted = vdev.offset + rt.VDEV_DRIVER_FEATURES_OFFSET
        return VirtioDevice(
            role=self._role,
            device_id=vdev.id,
            index=index,
            offered=vdev.device_features,
            status=SharedU8(view, vdev.offset + rt.VDEV_STATUS_OFFSET),
            accepted=SharedU32(view, accepted),
            vrings=_vrings_of(vdev),
            notify_id=vdev.notify_id,
            config=config,
            memory=link.memory,
            kick=link.kick,
            buffers=buffers,
            handshake=link.handshake,
            find_vrings=partial(self._find_vrings, index) if self._role is Role.DEVICE else None,
            adopt=self._adopt,
        )

    @property
    def kinds(self) -> tuple[int, ...]:
        """The virtio ids of the devices."""
        return tuple(device.device_id for device in self.devices)

    def drop_driver(self, cause: OpenAMPError) -> bool:
        """Device: the driver broke a ring. Returns whether another one may come: not here."""
        return False

    def rpmsg_device(self) -> VirtioDevice:
        """The first RPMsg device.

        Raises:
            ResourceTableError: the table describes none.
        """
        for device in self.devices:
            if device.device_id == VIRTIO_ID_RPMSG:
                return device
        raise ResourceTableError(
            f"the resource table has {len(self.devices)} vdev entries, "
            f"none with id {VIRTIO_ID_RPMSG} (RPMsg)"
        )

    async def wait_driver(self, index: int) -> VirtioDevice:
        """Device: waits until the driver of a device is up, and grants a reset it asks for.

        Returns:
            The device as the table now describes it: see `renew`.

        Raises:
            ValueError: this side is the driver, or there is no such device.
            StateError: a bus works the device.
            ResourceTableError: the table is malformed by now, or describes another device.
            OpenAMPError: what ended the link.
        """
        device = self._device_of(index)
        if device.on_notify is not None:
            raise StateError(f"{device.name}: a bus works the device, or another task waits for it")
        lot = trio.lowlevel.ParkingLot()

        def wake(_: object = None) -> None:
            lot.unpark_all()

        await trio.lowlevel.checkpoint()
        device.on_notify = device.on_failure = wake
        try:
            while device.failure is None and not device.poll_driver():
                with trio.move_on_after(_STATUS_RECHECK):
                    await lot.park()
        finally:
            device.on_notify = device.on_failure = None
        if device.failure is not None:
            raise device.failure.with_traceback(None)
        return self.renew(index)

    def renew(self, index: int) -> VirtioDevice:
        """Device: makes a device anew from the table as it stands in memory, for another life.

        A Linux host writes the places of the vrings only when its driver comes up, and may choose
        others the next time. The old device is closed.

        Raises:
            ValueError: this side is the driver, or there is no such device.
            StateError: a bus works the device.
            ResourceTableError: the table is malformed by now, or describes another device.
        """
        old = self._device_of(index)
        if old.on_notify is not None:
            raise StateError(f"{old.name}: a bus works the device, or a task waits for its driver")
        view, table = self._read_again()
        device = self._create_device(view, index, table.vdevs[index], old.buffers)
        self.table = table
        self.devices = (*self.devices[:index], device, *self.devices[index + 1 :])
        device.succeed(old)
        old.close()
        if self.failure is not None:
            device.fail(self.failure)
        return device

    def _find_vrings(self, index: int) -> list[Vring]:
        """Device: where the vrings are now. A host may have been reset since the device was made.

        Raises:
            ResourceTableError: the table is malformed by now, or describes another device.
        """
        _, self.table = self._read_again()
        return _vrings_of(self.table.vdevs[index])

    def _read_again(self) -> tuple[memoryview, rt.ResourceTable]:
        """The table as it stands in memory, which still describes the same devices."""
        link = self._link
        assert link.table_da is not None, "decoded before"
        view = table_view(link.memory, link.table_da)
        table = rt.decode_table_untrusted(bytes(view))
        before, now = (
            [(v.offset, v.id, len(v.vrings)) for v in t.vdevs] for t in (self.table, table)
        )
        if before != now:
            raise ResourceTableError(
                f"{link.name}: the table's vdev entries are at other places or of other kinds than "
                f"before: (offset, id, vrings) were {before}, are {now}"
            )
        return view, table

    def _device_of(self, index: int, role: Role = Role.DEVICE) -> VirtioDevice:
        if self._role is not role:
            raise ValueError(f"{self._link.name}: only the {role.value} role does this")
        if not 0 <= index < len(self.devices):
            raise ValueError(f"{self._link.name}: no device {index}; there are {len(self.devices)}")
        return self.devices[index]

    def create(self, index: int) -> VirtioDevice:
        """Driver: makes a device anew, in place of one that was removed.

        Raises:
            ValueError: this side is not the driver, or there is no such device.
            StateError: the device was not removed.
        """
        old = self._device_of(index, Role.DRIVER)
        if not old.closed:
            raise StateError(f"{old.name} is there already; remove it first")
        assert self._link.table_da is not None, "decoded before"
        view = table_view(self._link.memory, self._link.table_da)
        device = self._create_device(view, index, self.table.vdevs[index], old.buffers)
        self.devices = (*self.devices[:index], device, *self.devices[index + 1 :])
        if self.failure is not None:
            device.fail(self.failure)
        return device

    def remove(self, device: VirtioDevice) -> None:
        """Driver: resets a device and lets go of it; its users are told. Idempotent.

        Raises:
            ValueError: this side is not the driver, or it is not one of these devices.
        """
        if device not in self.devices:
            raise ValueError(f"{self._link.name}: {device.name} is not one of its devices")
        self._device_of(device.index, Role.DRIVER)
        device.fail(PeerGoneError(f"{device.name} was removed"))
        device.end()
        device.close()

    def detach(self) -> int:
        """Driver: leaves every device up, for another host to take over. See `VirtioDevice.detach`.

        Returns:
            Messages taken from the devices that no application has received yet.
        """
        return sum(device.detach() for device in self.devices)

    def notified(self) -> None:
        """The doorbell rang: every device looks at its rings, since a kick is only a hint."""
        for device in self.devices:
            device.notified()

    def fail(self, cause: OpenAMPError) -> None:
        """The other side is gone: the users of every device are told."""
        self.failure = self.failure or cause
        for device in self.devices:
            device.fail(cause)

    def close(self) -> None:
        """Lets go of the shared memory. Idempotent."""
        for device in self.devices:
            device.close()


def _vrings_of(vdev: rt.Vdev) -> list[Vring]:
    return [
        Vring(vring.da, VringLayout(vring.num, vring.align), vring.notify_id)
        for vring in vdev.vrings
    ]


def table_view(memory: MemoryMap, da: int) -> memoryview:
    """The memory in which a table at `da` lies, up to the end of its region or the limit.

    Raises:
        ResourceTableError: the address is in no region.
    """
    for region in memory.regions:
        offset = da - region.da
        if 0 <= offset < region.size:
            return region.view[offset : offset + rt.TABLE_LIMIT]
    raise ResourceTableError(f"resource table at {da:#x} lies outside the memory: {memory}")


def _arena_of(table: rt.ResourceTable, memory: MemoryMap, table_da: int) -> Arena:
    """What of the memory is taken on a link that was not loaded by us."""
    arena = Arena(memory)
    arena.reserve(table_da, table.end)
    for carveout in table.carveouts:
        arena.reserve(carveout.da, carveout.length)
    for vdev in table.vdevs:
        for vring in vdev.vrings:
            arena.reserve(vring.da, VringLayout(vring.num, vring.align).size)
    return arena


@asynccontextmanager
async def open_resources(
    link: Link, role: Role = Role.DEVICE, *, adopt: bool = False
) -> AsyncIterator[Resources]:
    """Joins the devices that the table on a link describes, for an `async with` block.

    This is resource_init and, at the end of the block, resource_deinit. The remote side uses it
    with the device role; a host that boots nothing (the peer runs already) with the driver role.

    Args:
        link: this side's end.
        role: of this side.
        adopt: a driver takes over what another one has up, instead of resetting it.

    Raises:
        PeerGoneError: the other side is not there.
        PlatformError: the link cannot be made.
        ResourceTableError: the table is malformed.
    """
    async with open_background() as nursery:
        joined: list[Resources] = []
        ended: list[OpenAMPError] = []

        def notified() -> None:
            for resources in joined:
                resources.notified()

        await nursery.start(_listen, link, notified, joined, ended)
        resources = Resources(link, role, adopt=adopt)
        joined.append(resources)
        for cause in ended:
            resources.fail(cause)
        try:
            yield resources
        finally:
            joined.clear()
            resources.close()


async def _listen(
    link: Link,
    notified: Callable[[], None],
    joined: list[Resources],
    ended: list[OpenAMPError],
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """That the other side is gone becomes a matter of the devices, not of the block."""
    cause = await run_link(link, notified, task_status)
    _logger.info("%s", cause)
    ended.append(cause)
    for resources in joined:
        resources.fail(cause)
