"""A remote that outlives its hosts: resets, new hosts, several devices, and the link's end."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from openamp_py import (
    Bus,
    CoreDiedError,
    Endpoint,
    PeerGoneError,
    PlatformError,
    ResourceTable,
    ResourceTableError,
    Role,
    VirtqueueError,
    open_bus,
    open_resources,
)
from openamp_py.background import open_background
from openamp_py.constants import RPMSG_F_NS
from openamp_py.remote import BusApplication, serve_remote
from openamp_py.remoteproc.resource_table import Vdev, Vring, place_entries

CreateEnds = Callable[[ResourceTable], tuple[Any, Any]]

NAME = "test-service"
ECHO_AT = 5


def _vdev(number: int, id_: int = 7) -> Vdev:
    start = 0x1000 + 0x4000 * number
    vrings = tuple(Vring(start + 0x2000 * i, 0x1000, 4, 2 * number + i) for i in range(2))
    return Vdev(id_, 0, RPMSG_F_NS, vrings=vrings)


TWO = place_entries([_vdev(0), _vdev(1)])


async def _echo(bus: Bus) -> None:
    async with bus.open_endpoint(NAME, address=ECHO_AT, rebind=True) as endpoint:
        async for message in endpoint:
            if message.payload == b"leave":
                return
            if message.payload == b"crash":
                raise ZeroDivisionError
            await endpoint.send_to(message.payload, message.source)


@asynccontextmanager
async def _hosted(host_end: Any, index: int = 0) -> AsyncIterator[Endpoint]:
    """One host's life: its endpoint to the echo service."""
    async with (
        open_resources(host_end, Role.DRIVER) as resources,
        open_bus(resources.devices[index]) as bus,
        bus.open_endpoint(NAME) as endpoint,
    ):
        await endpoint.wait_bound()
        yield endpoint


async def _answers(endpoint: Endpoint) -> None:
    for number in range(10):
        await endpoint.send(bytes((number,)))
        assert (await endpoint.receive()).payload == bytes((number,))


@asynccontextmanager
async def _served(
    remote_end: Any, application: BusApplication = _echo
) -> AsyncIterator[trio.Event]:
    """The remote runs during the block; the event says that it returned."""
    returned = trio.Event()
    with trio.fail_after(30):
        async with open_background() as nursery:

            async def serve() -> None:
                await serve_remote(remote_end, application)
                returned.set()

            nursery.start_soon(serve)
            yield returned


async def test_a_hundred_hosts_one_after_the_other(create_ends: CreateEnds) -> None:
    host_end, remote_end = create_ends(TWO)
    async with _served(remote_end) as returned:
        for _ in range(100):
            async with _hosted(host_end) as endpoint:
                await _answers(endpoint)
        await trio.testing.wait_all_tasks_blocked()
        gc.collect()
        assert sum(isinstance(each, Bus) for each in gc.get_objects()) <= 2, "former ones are gone"
        assert not returned.is_set()


async def test_each_device_has_lives_of_its_own(create_ends: CreateEnds) -> None:
    host_end, remote_end = create_ends(TWO)
    async with _served(remote_end):
        async with (
            open_resources(host_end, Role.DRIVER) as resources,
            open_bus(resources.devices[0]) as bus,
            bus.open_endpoint(NAME) as steady,
        ):
            await steady.wait_bound()
            other = resources.devices[1]
            async with open_bus(other) as second, second.open_endpoint(NAME) as endpoint:
                await endpoint.wait_bound()
                await _answers(endpoint)
            await _answers(steady)
        for index in (1, 0, 1):
            async with _hosted(host_end, index) as endpoint:
                await _answers(endpoint)


async def test_an_application_that_looks_at_nothing_is_ended_too(create_ends: CreateEnds) -> None:
    host_end, remote_end = create_ends(TWO)
    lives = []

    async def application(bus: Bus) -> None:
        lives.append("begun")
        try:
            async with bus.open_endpoint(NAME), trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
        finally:
            lives.append("ended")

    async with _served(remote_end, application):
        for _ in range(3):
            async with _hosted(host_end):
                assert lives.count("begun") == lives.count("ended") + 1
            await trio.testing.wait_all_tasks_blocked()
    assert lives == ["begun", "ended"] * 3


async def test_tasks_of_an_application_that_all_break_are_one_reset(
    create_ends: CreateEnds,
) -> None:
    host_end, remote_end = create_ends(TWO)

    async def application(bus: Bus) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_echo, bus)
            nursery.start_soon(bus.wait_service, "never")

    async with _served(remote_end, application):
        for _ in range(3):
            async with _hosted(host_end) as endpoint:
                await _answers(endpoint)


async def test_one_that_returns_is_done(create_ends: CreateEnds) -> None:
    host_end, remote_end = create_ends(TWO)
    async with _served(remote_end) as returned:
        for index in (0, 1):
            assert not returned.is_set()
            async with _hosted(host_end, index) as endpoint:
                await endpoint.send(b"leave")
                with pytest.raises(trio.EndOfChannel):
                    await endpoint.receive()
        await returned.wait()


async def test_one_that_closes_its_bus_goes_on_until_it_returns(create_ends: CreateEnds) -> None:
    host_end, remote_end = create_ends(place_entries([_vdev(0)]))
    ended = trio.Event()

    async def application(bus: Bus) -> None:
        async with bus.open_endpoint(NAME):
            await bus.aclose()
            await trio.testing.wait_all_tasks_blocked()
            ended.set()

    async with _served(remote_end, application) as returned, _hosted(host_end):
        await ended.wait()
        await returned.wait()


@pytest.mark.parametrize("running", [False, True])
async def test_it_returns_when_the_other_side_left(create_ends: CreateEnds, running: bool) -> None:
    host_end, remote_end = create_ends(TWO)
    async with _served(remote_end) as returned:
        if running:
            async with _hosted(host_end):
                remote_end.finish()
                await returned.wait()
        else:
            await trio.testing.wait_all_tasks_blocked()
            remote_end.finish(PeerGoneError("the host was killed"))
            await returned.wait()


# Failures


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("kind", [PlatformError, CoreDiedError])
async def test_a_link_that_fails_is_that_error(
    create_ends: CreateEnds, running: bool, kind: type[Exception]
) -> None:
    host_end, remote_end = create_ends(TWO)
    error = kind("broke")
    with pytest.raises(kind, match="broke"):
        async with _served(remote_end):
            if running:
                async with _hosted(host_end):
                    remote_end.finish(error)
                    await trio.sleep_forever()
            remote_end.finish(error)
            await trio.sleep_forever()


async def test_what_an_application_raises_comes_out(create_ends: CreateEnds) -> None:
    host_end, remote_end = create_ends(TWO)
    with pytest.raises(ZeroDivisionError):
        async with _served(remote_end), _hosted(host_end) as endpoint:
            await endpoint.send(b"crash")
            await trio.sleep_forever()


async def test_a_channel_that_was_withdrawn_is_the_applications_matter(
    create_ends: CreateEnds,
) -> None:
    host_end, remote_end = create_ends(TWO)

    async def application(bus: Bus) -> None:
        async with bus.open_endpoint(NAME) as endpoint:
            await endpoint.wait_bound()
            while True:
                await endpoint.send(b"x")

    with pytest.raises(trio.BrokenResourceError, match="withdrew the channel"):
        async with (
            _served(remote_end, application),
            open_resources(host_end, Role.DRIVER) as resources,
            open_bus(resources.devices[0]) as bus,
        ):
            async with bus.open_endpoint(NAME) as endpoint:
                await endpoint.receive()
            await trio.sleep_forever()


async def test_a_host_that_breaks_a_ring(create_ends: CreateEnds) -> None:
    host_end, remote_end = create_ends(TWO)
    with pytest.raises(trio.BrokenResourceError) as caught:
        async with _served(remote_end), _hosted(host_end):
            view = remote_end.memory.regions[0].view
            view[0x3000 + 64 + 2 : 0x3000 + 64 + 4] = b"\xff\x7f"
            host_end.kick(0)
            await trio.sleep_forever()
    assert isinstance(caught.value.__cause__, VirtqueueError)


async def test_a_host_that_begins_anew_unseen_is_a_reset(create_ends: CreateEnds) -> None:
    """It was reset and came up again while the remote did not look."""
    host_end, remote_end = create_ends(place_entries([_vdev(0)]))
    async with (
        open_resources(remote_end) as remote,
        open_resources(host_end, Role.DRIVER) as host,
        open_bus(host.devices[0]) as host_bus,
        open_bus(remote.devices[0]) as bus,
        bus.open_endpoint(NAME) as endpoint,
        host_bus.open_endpoint(NAME) as peer,
    ):
        await endpoint.wait_bound()
        await peer.wait_bound()
        await _exchange(peer, endpoint)
        view = remote_end.memory.regions[0].view
        view[0x1000 : 0x1000 + 0x1800] = bytes(0x1800)
        view[0x3000 : 0x3000 + 0x1800] = bytes(0x1800)
        with pytest.raises(trio.BrokenResourceError, match="reset the device, and began anew"):
            while True:
                await endpoint.receive()
        assert isinstance(bus.failure, PeerGoneError)
        assert isinstance(bus.failure.__cause__, VirtqueueError)


async def _exchange(one: Endpoint, other: Endpoint) -> None:
    for _ in range(6):
        for sender, receiver in ((one, other), (other, one)):
            await sender.send(b"x")
            await receiver.receive()


async def test_a_table_without_an_rpmsg_device(create_ends: CreateEnds) -> None:
    _, remote_end = create_ends(place_entries([_vdev(0, id_=3)]))
    with pytest.raises(ResourceTableError, match="1 vdev entries, none with id 7"):
        await serve_remote(remote_end, _echo)


async def test_cancelled_it_ends(create_ends: CreateEnds) -> None:
    host_end, remote_end = create_ends(TWO)
    async with open_background() as nursery:
        nursery.start_soon(serve_remote, remote_end, _echo)
        async with _hosted(host_end) as endpoint:
            await _answers(endpoint)
            nursery.cancel_scope.cancel()
