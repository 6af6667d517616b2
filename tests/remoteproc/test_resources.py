"""The devices of a table in shared memory: waiting for drivers, renewing, detaching."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from openamp_py import (
    Link,
    PeerGoneError,
    PlatformError,
    Resources,
    ResourceTable,
    ResourceTableError,
    Role,
    StateError,
    open_bus,
    open_resources,
)
from openamp_py.constants import DA_ANY, RPMSG_F_NS
from openamp_py.remoteproc.resource_table import VDEV_STATUS_OFFSET, Vdev, Vring, place_entries

CreateEnds = Callable[[ResourceTable], tuple[Any, Any]]

NEEDS_RESET = 0x40


def _vdev(number: int, *, da: int | None = None) -> Vdev:
    start = 0x1000 + 0x4000 * number
    places = (start, start + 0x2000) if da is None else (da, da)
    vrings = tuple(Vring(at, 0x1000, 4, 2 * number + i) for i, at in enumerate(places))
    return Vdev(7, 0, RPMSG_F_NS, vrings=vrings)


TWO = place_entries([_vdev(0), _vdev(1)])


async def test_the_driver_that_comes_up_ends_the_wait(create_ends: CreateEnds) -> None:
    host_end, remote_end = create_ends(TWO)
    async with (
        open_resources(remote_end) as remote,
        open_resources(host_end, Role.DRIVER) as host,
        trio.open_nursery() as nursery,
    ):
        old = remote.devices
        found = []

        async def wait() -> None:
            found.append(await remote.wait_driver(1))

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(StateError, match="another task waits"):
            await remote.wait_driver(1)
        async with open_bus(host.devices[1]):
            with trio.fail_after(5):
                while not found:
                    await trio.testing.wait_all_tasks_blocked()
            assert found[0].status == 0xF and old[1].status == 0, "the old one is closed"
        assert found == [remote.devices[1]] and remote.devices[1] is not old[1]
        assert remote.devices[0] is old[0]


async def test_vrings_are_where_the_table_says_when_the_driver_is_up(
    create_ends: CreateEnds,
) -> None:
    """Linux places them after the start."""
    table = place_entries([_vdev(0, da=DA_ANY)])
    host_end, remote_end = create_ends(table)
    memory = host_end.memory.regions[0].view
    at = table.vdevs[0].offset + 28
    async with open_resources(remote_end) as remote:
        for start in (0x1000, 0x8000):
            assert remote.devices[0].vrings[0].da == (DA_ANY if start == 0x1000 else 0x1000)
            for number in range(2):
                struct.pack_into("<I", memory, at + 20 * number, start + 0x2000 * number)
            async with open_resources(host_end, Role.DRIVER) as host:
                with trio.fail_after(5):
                    async with trio.open_nursery() as nursery:

                        async def serve() -> None:
                            device = await remote.wait_driver(0)
                            async with open_bus(device) as bus, bus.open_endpoint("echo") as own:
                                message = await own.receive()
                                await own.send(message.payload)

                        nursery.start_soon(serve)
                        async with (
                            open_bus(host.devices[0]) as bus,
                            bus.open_endpoint("echo") as endpoint,
                        ):
                            await endpoint.send(b"x")
                            assert (await endpoint.receive()).payload == b"x"
            assert remote.table.vdevs[0].vrings[1].da == start + 0x2000


async def test_a_host_that_begins_anew_before_there_is_a_bus(create_ends: CreateEnds) -> None:
    """Its vrings may be elsewhere, and the remote has seen the first ones."""
    table = place_entries([_vdev(0, da=DA_ANY)])
    host_end, remote_end = create_ends(table)
    memory = host_end.memory.regions[0].view
    at = table.vdevs[0].offset + 28

    def place(start: int) -> None:
        for number in range(2):
            struct.pack_into("<I", memory, at + 20 * number, start + 0x2000 * number)

    place(0x1000)
    with trio.fail_after(5):
        async with open_resources(remote_end) as remote:
            async with (
                open_resources(host_end, Role.DRIVER) as host,
                open_bus(host.devices[0]),
            ):
                device = await remote.wait_driver(0)
            place(0x8000)
            async with (
                open_resources(host_end, Role.DRIVER) as host,
                open_bus(host.devices[0]) as host_bus,
                open_bus(device) as bus,
                host_bus.open_endpoint("echo") as endpoint,
                bus.open_endpoint("echo") as own,
            ):
                assert [vring.da for vring in device.vrings] == [0x8000, 0xA000]
                assert remote.table.vdevs[0].vrings[1].da == 0xA000
                await endpoint.wait_bound()
                await endpoint.send(b"x")
                assert (await own.receive()).payload == b"x"


async def test_a_table_that_became_another_opens_no_bus(create_ends: CreateEnds) -> None:
    host_end, remote_end = create_ends(TWO)
    async with (
        open_resources(remote_end) as remote,
        open_resources(host_end, Role.DRIVER) as host,
        open_bus(host.devices[0]),
    ):
        device = await remote.wait_driver(0)
        remote_end.memory.regions[0].view[TWO.vdevs[0].offset + 4] = 8  # its id
        with pytest.raises(ResourceTableError, match="other places or of other kinds"):
            async with open_bus(device):
                pass


async def test_a_reset_that_is_asked_for_is_granted(create_ends: CreateEnds) -> None:
    host_end, remote_end = create_ends(TWO)
    status = host_end.memory.regions[0].view[TWO.vdevs[0].offset + VDEV_STATUS_OFFSET :]
    async with open_resources(remote_end) as remote, trio.open_nursery() as nursery:
        status[0] = 4 | NEEDS_RESET
        nursery.start_soon(remote.wait_driver, 0)
        with trio.fail_after(5):
            while status[0]:
                await trio.testing.wait_all_tasks_blocked()
        status[0] = 4  # without a kick


async def test_what_was_seen_of_the_driver_outlives_the_device(create_ends: CreateEnds) -> None:
    host_end, remote_end = create_ends(TWO)
    async with (
        open_resources(remote_end) as remote,
        open_resources(host_end, Role.DRIVER) as host,
        open_bus(host.devices[0]),
    ):
        device = await remote.wait_driver(0)
        assert device.poll_driver() and device.is_fresh
        device = await remote.wait_driver(0)
        assert device.poll_driver() and not device.is_fresh


@pytest.mark.parametrize("early", [False, True])
async def test_the_end_of_the_link_ends_the_wait(create_ends: CreateEnds, early: bool) -> None:
    _, remote_end = create_ends(TWO)
    async with open_resources(remote_end) as remote:
        if early:
            remote_end.finish(PlatformError("broke"))
            await trio.testing.wait_all_tasks_blocked()
            await _fails(remote)
            assert remote.renew(0).failure is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_fails, remote)
            if not early:
                await trio.testing.wait_all_tasks_blocked()
                remote_end.finish(PlatformError("broke"))


async def _fails(remote: Resources) -> None:
    with pytest.raises(PlatformError, match="broke"):
        await remote.wait_driver(0)


async def test_a_hundred_lives_leave_nothing_behind(create_ends: CreateEnds) -> None:
    _, remote_end = create_ends(TWO)
    async with open_resources(remote_end) as remote:
        for _ in range(100):
            remote.renew(0)
        assert len(remote.devices) == 2


# Refusals


async def test_the_driver_neither_waits_nor_renews(create_ends: CreateEnds) -> None:
    host_end, _ = create_ends(TWO)
    async with open_resources(host_end, Role.DRIVER) as host:
        with pytest.raises(ValueError, match="only the device role"):
            host.renew(0)
        with pytest.raises(ValueError, match="only the device role"):
            await host.wait_driver(0)


async def test_a_device_that_is_not_there(create_ends: CreateEnds) -> None:
    _, remote_end = create_ends(TWO)
    async with open_resources(remote_end) as remote:
        for index in (-1, 2):
            with pytest.raises(ValueError, match=f"no device {index}; there are 2"):
                remote.renew(index)


async def test_a_device_that_a_bus_works_is_not_renewed(create_ends: CreateEnds) -> None:
    host_end, remote_end = create_ends(TWO)
    async with (
        open_resources(remote_end) as remote,
        open_resources(host_end, Role.DRIVER) as host,
        open_bus(host.devices[0]),
        open_bus(remote.devices[0]),
    ):
        with pytest.raises(StateError, match="vdev0: a bus works the device"):
            remote.renew(0)
        with pytest.raises(StateError, match="vdev0: a bus works the device"):
            await remote.wait_driver(0)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 2, "version 2"),
        (4, 1, "other places or of other kinds"),
        (TWO.vdevs[0].offset + 4, 8, "other places or of other kinds"),
        (TWO.vdevs[0].offset + 28 + 8, 3, "num 3"),
    ],
)
async def test_a_table_that_became_another_is_refused(
    create_ends: CreateEnds, at: int, value: int, message: str
) -> None:
    _, remote_end = create_ends(TWO)
    async with open_resources(remote_end) as remote:
        before = remote.devices, remote.table
        struct.pack_into("<I", remote_end.memory.regions[0].view, at, value)
        with pytest.raises(ResourceTableError, match=message):
            remote.renew(0)
        assert (remote.devices, remote.table) == before


# Taking over


async def test_what_is_not_up_is_begun_and_what_is_up_is_taken_over(
    create_ends: CreateEnds,
) -> None:
    host_end, _ = create_ends(TWO)
    async with open_resources(host_end, Role.DRIVER) as host, open_bus(host.devices[0]):
        assert host.detach() == 0
    async with (
        open_resources(host_end, Role.DRIVER, adopt=True) as host,
        open_bus(host.devices[0]),
        open_bus(host.devices[1]),
    ):
        assert [device.is_adopted for device in host.devices] == [True, False]


async def test_each_device_is_left(create_ends: CreateEnds) -> None:
    host_end: Link
    host_end, _ = create_ends(TWO)
    async with (
        open_resources(host_end, Role.DRIVER) as host,
        open_bus(host.devices[0]) as one,
        open_bus(host.devices[1]) as two,
    ):
        host.detach()
        assert one.failure is not None and two.failure is not None
        assert not isinstance(one.failure, PeerGoneError)
        statuses = [device.status for device in host.devices]
    assert statuses == [0xF, 0xF]
