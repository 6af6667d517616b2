"""The virtio devices that a resource table in shared memory describes, for either side."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from openamp_py.background import open_background
from openamp_py.constants import VIRTIO_ID_RPMSG
from openamp_py.errors import OpenAMPError, ResourceTableError
from openamp_py.memory import Arena, MemoryMap
from openamp_py.remoteproc import resource_table as rt
from openamp_py.remoteproc.platform import Link, run_link
from openamp_py.virtio import Role, SharedU8, SharedU32, VirtioDevice, Vring
from openamp_py.vring import VringLayout

_logger = logging.getLogger(__name__)


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
        table: the table as it was when the devices were made.
        devices: in the order of the table.
    """

    def __init__(
        self,
        link: Link,
        role: Role,
        *,
        carveouts: dict[str, tuple[int, int]] | None = None,
        arena: Arena | None = None,
    ) -> None:
        """
        Raises:
            ResourceTableError: the table in memory is malformed.
        """
        self._link = link
        self._role = role
        memory = link.memory
        if link.table_da is None:
            raise ResourceTableError(f"{link.name}: there is no resource table")
        view = table_view(memory, link.table_da)
        # Copied once: what is checked is what is used, whatever the peer writes meanwhile.
        self.table = rt.decode_table_untrusted(bytes(view))
        areas = carveouts or {c.name: (c.da, c.length) for c in self.table.carveouts}
        if arena is None:
            arena = _arena_of(self.table, memory, link.table_da)
        self._stack = contextlib.ExitStack()
        self.devices: tuple[VirtioDevice, ...] = ()
        try:
            for index, vdev in enumerate(self.table.vdevs):
                area = areas.get(f"vdev{index}buffer", link.buffer_area if index == 0 else None)
                buffers = Buffers(f"vdev{index}", memory, area, arena)
                self.devices += (self._create_device(view, index, vdev, buffers),)
        except BaseException:
            self._stack.close()
            raise

    def _create_device(
        self, view: memoryview, index: int, vdev: rt.Vdev, buffers: Buffers
    ) -> VirtioDevice:
        link = self._link
        config = view[vdev.offset + vdev.config_offset :][: len(vdev.config)]
        accepted = vdev.offset + rt.VDEV_DRIVER_FEATURES_OFFSET
        device = VirtioDevice(
            role=self._role,
            device_id=vdev.id,
            index=index,
            offered=vdev.device_features,
            status=SharedU8(view, vdev.offset + rt.VDEV_STATUS_OFFSET),
            accepted=SharedU32(view, accepted),
            vrings=[
                Vring(vring.da, VringLayout(vring.num, vring.align), vring.notify_id)
                for vring in vdev.vrings
            ],
            notify_id=vdev.notify_id,
            config=config,
            memory=link.memory,
            kick=link.kick,
            buffers=buffers,
            handshake=link.handshake,
        )
        self._stack.callback(device.close)
        return device

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

    def notified(self) -> None:
        """The doorbell rang: every device looks at its rings, since a kick is only a hint."""
        for device in self.devices:
            device.notified()

    def fail(self, cause: OpenAMPError) -> None:
        """The other side is gone: the users of every device are told."""
        for device in self.devices:
            device.fail(cause)

    def close(self) -> None:
        """Lets go of the shared memory. Idempotent."""
        self._stack.close()


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
    arena.reserve(table_da, table.length)
    for carveout in table.carveouts:
        arena.reserve(carveout.da, carveout.length)
    for vdev in table.vdevs:
        for vring in vdev.vrings:
            arena.reserve(vring.da, VringLayout(vring.num, vring.align).size)
    return arena


@asynccontextmanager
async def open_resources(link: Link, role: Role = Role.DEVICE) -> AsyncIterator[Resources]:
    """Joins the devices that the table on a link describes, for an `async with` block.

    This is resource_init and, at the end of the block, resource_deinit. The remote side uses it
    with the device role; a host that boots nothing (the peer runs already) with the driver role.

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
        resources = Resources(link, role)
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
