"""Hosts that leave a device running, and hosts that take it over: no message lost, none twice."""

from __future__ import annotations

import logging
import random
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from openamp_py import (
    Bus,
    BusOptions,
    Channel,
    Endpoint,
    Link,
    PeerGoneError,
    Resources,
    Role,
    StateError,
    VirtioDevice,
    VirtqueueError,
    open_bus,
    open_resources,
)
from openamp_py.background import open_background
from openamp_py.constants import RPMSG_F_NS, VIRTIO_RING_F_EVENT_IDX
from openamp_py.errors import DetachedError
from openamp_py.remoteproc.resource_table import ResourceTable, Vdev, Vring
from openamp_py.rpmsg.handover import (
    NOTHING,
    decode_handover_untrusted,
    encode_handover,
)
from openamp_py.rpmsg.options import DEFAULT_OPTIONS

NAME = "test-service"
NUM = 8
EVENT_IDX = pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])


class World:
    """A remote that goes on, and memory that one host after the other works."""

    def __init__(self, ends: tuple[Link, Link]) -> None:
        self.host_side, self.remote_side = ends
        self.memory = self.host_side.memory.regions[0].view
        self.note = encode_handover(NOTHING)
        self.remote: Bus
        self.stack: AsyncExitStack

    @asynccontextmanager
    async def host(
        self, options: BusOptions = DEFAULT_OPTIONS, *, adopt: bool = True
    ) -> AsyncIterator[tuple[Bus, Resources]]:
        handover = decode_handover_untrusted(self.note)
        async with (
            open_resources(self.host_side, Role.DRIVER, adopt=adopt) as resources,
            open_bus(resources.rpmsg_device(), options, handover) as bus,
        ):
            yield bus, resources

    async def open_remote(self, name: str, **options: Any) -> Endpoint:
        """An endpoint of the remote that stays open."""
        endpoint = await self.stack.enter_async_context(self.remote.open_endpoint(name, **options))
        self.stack.callback(endpoint.close)
        return endpoint

    def leave(self, bus: Bus, resources: Resources) -> int:
        unread = resources.detach()
        self.note = encode_handover(bus.handover)
        return unread


OpenWorld = Callable[..., AbstractAsyncContextManager[World]]


@pytest.fixture
def open_world(create_ends: Callable[[ResourceTable], tuple[Link, Link]]) -> OpenWorld:
    """Opens a remote, whose bus comes up with the first host."""

    @asynccontextmanager
    async def open_(
        features: int = RPMSG_F_NS, num: int = NUM, options: BusOptions = DEFAULT_OPTIONS
    ) -> AsyncIterator[World]:
        vrings = (Vring(0x4000, 0x1000, num, 1), Vring(0x8000, 0x1000, num, 2))
        world = World(create_ends(ResourceTable((Vdev(7, 0, features, vrings=vrings),))))
        with trio.fail_after(30):
            async with (
                open_resources(world.remote_side) as resources,
                open_background() as nursery,
                AsyncExitStack() as world.stack,
            ):

                async def remote(*, task_status: trio.TaskStatus[None]) -> None:
                    task_status.started()
                    async with open_bus(resources.rpmsg_device(), options) as world.remote:
                        await trio.sleep_forever()

                await nursery.start(remote)
                yield world

    return open_


async def _settle() -> None:
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked()


def _features(event_idx: bool) -> int:
    return RPMSG_F_NS | (VIRTIO_RING_F_EVENT_IDX if event_idx else 0)


# Taking over


@EVENT_IDX
async def test_a_service_goes_on_over_several_hosts(open_world: OpenWorld, event_idx: bool) -> None:
    async with open_world(_features(event_idx)) as world:
        async with world.host() as (bus, resources):
            assert not resources.devices[0].is_adopted, "nobody had it up"
            await _settle()
            remote = await world.open_remote(NAME)
            async with bus.open_endpoint(NAME) as host:
                await _exchange(host, remote, b"first")
                address = host.address
                assert world.leave(bus, resources) == 0
        for number in range(5):
            async with world.host() as (bus, resources):
                assert resources.devices[0].is_adopted
                assert bus.channels == (Channel(NAME, remote.address),)
                async with bus.open_endpoint(NAME) as host:
                    assert host.address == address and host.destination == remote.address
                    for _ in range(3 * NUM):
                        await _exchange(host, remote, bytes((number,)))
                    assert world.leave(bus, resources) == 0
        assert world.remote.channels == (Channel(NAME, address),), "told once, never withdrawn"
        assert world.remote.failure is None
        assert world.remote.drops.unknown_destination == 0


async def _exchange(host: Endpoint, remote: Endpoint, payload: bytes) -> None:
    for one, other in ((host, remote), (remote, host)):
        await one.wait_bound()
        await one.send(payload)
        assert await other.receive() == (payload, one.address)


@EVENT_IDX
@pytest.mark.parametrize("seed", range(12))
async def test_nothing_is_lost_or_seen_twice(
    open_world: OpenWorld, seed: int, event_idx: bool
) -> None:
    """Hosts leave at any moment, with unread messages in both rings, until indexes have wrapped."""
    rng = random.Random(seed)
    num = rng.choice([1, 2, 4, 8])
    sent, received = {"host": 0, "remote": 0}, {"host": 0, "remote": 0}

    def send(who: str, endpoint: Endpoint) -> None:
        for _ in range(rng.randrange(2 * num + 1)):
            try:
                endpoint.send_nowait(struct.pack("<I", sent[who]) * rng.randrange(1, 9))
            except trio.WouldBlock:
                return
            sent[who] += 1

    def receive(who: str, endpoint: Endpoint) -> None:
        for _ in range(rng.randrange(2 * num + 1)):
            try:
                message = endpoint.receive_nowait()
            except trio.WouldBlock:
                return
            assert message.payload[:4] == struct.pack("<I", received[who])
            received[who] += 1

    async with open_world(_features(event_idx), num) as world:
        async with world.host() as (bus, resources):
            await _settle()
            in_place = rng.random() < 0.5
            remote = await world.open_remote(NAME, queue_limit=2, in_place=in_place)
            async with bus.open_endpoint(NAME) as host:
                await host.wait_bound()
                await remote.wait_bound()
                world.leave(bus, resources)
        for _ in range(30):
            async with world.host() as (bus, resources):
                in_place = rng.random() < 0.5
                async with bus.open_endpoint(NAME, queue_limit=2, in_place=in_place) as host:
                    for _ in range(rng.randrange(9)):
                        act, who, endpoint = rng.choice(
                            [
                                (send, "host", host),
                                (send, "remote", remote),
                                (receive, "remote", host),
                                (receive, "host", remote),
                            ]
                        )
                        act(who, endpoint)
                        if rng.random() < 0.3:
                            await trio.testing.wait_all_tasks_blocked()
                    unread = world.leave(bus, resources)
                    for _ in range(unread):
                        message = host.receive_nowait()
                        assert message.payload[:4] == struct.pack("<I", received["remote"])
                        received["remote"] += 1
                    with pytest.raises(trio.BrokenResourceError, match="detached"):
                        host.receive_nowait()
            if rng.random() < 0.5:
                send("remote", remote)  # while nobody is there
                receive("host", remote)
        async with world.host() as (bus, _), bus.open_endpoint(NAME) as host:
            for _ in range(20):
                receive("remote", host)
                receive("host", remote)
                await _settle()
            while received["remote"] < sent["remote"] or received["host"] < sent["host"]:
                receive("remote", host)
                receive("host", remote)
            assert received == {"host": sent["host"], "remote": sent["remote"]}
            assert min(sent.values()) > 5
            await _exchange(host, remote, b"all is well")
        assert world.remote.drops.unknown_destination == 0


async def test_indexes_that_wrapped(open_world: OpenWorld) -> None:
    async with open_world(num=2) as world:
        async with world.host() as (bus, resources):
            await _settle()
            remote = await world.open_remote(NAME)
            async with bus.open_endpoint(NAME) as host:
                await host.wait_bound()
                await remote.wait_bound()
                for number in range(0x10000 // 64 + 2):
                    payloads = [struct.pack("<I", number)] * 64
                    async with trio.open_nursery() as nursery:
                        for one in (host, remote):
                            nursery.start_soon(one.send_many, payloads)
                        for other in (host, remote):
                            for _ in range(64):
                                assert (await other.receive()).payload == payloads[0]
                await remote.send(b"unread")
                world.leave(bus, resources)
        assert resources is not None
        async with world.host() as (bus, resources), bus.open_endpoint(NAME) as host:
            assert resources.devices[0].is_adopted
            assert (await host.receive()).payload == b"unread"
            await _exchange(host, remote, b"x")


async def test_a_bus_goes_on_over_a_device_that_it_left(open_world: OpenWorld) -> None:
    async with open_world() as world, AsyncExitStack() as stack:
        bus, resources = await stack.enter_async_context(world.host())
        await _settle()
        remote = await world.open_remote(NAME)
        host = await stack.enter_async_context(bus.open_endpoint(NAME, rebind=True))
        await _exchange(host, remote, b"before")
        await _settle()
        await remote.send(b"unread")
        assert world.leave(bus, resources) == 0
        async with open_resources(world.host_side, Role.DRIVER, adopt=True) as again:
            await bus.restart(again.rpmsg_device(), decode_handover_untrusted(world.note))
            assert host.is_bound
            assert (await host.receive()).payload == b"unread"
            await _exchange(host, remote, b"after")
            assert world.remote.channels == (Channel(NAME, host.address),)
            await host.aclose()
            await _settle()
            assert not world.remote.channels, "who was told is told of the end"
            await bus.aclose()


async def test_what_comes_for_an_endpoint_that_is_not_open_yet_waits_for_it(
    open_world: OpenWorld,
) -> None:
    async with open_world(num=4) as world:
        async with world.host() as (bus, resources):
            await _settle()
            remote = await world.open_remote(NAME)
            async with bus.open_endpoint(NAME) as host, bus.open_endpoint(address=7) as bare:
                await _exchange(host, remote, b"x")
                await remote.send_to(b"bound", bare.address)
                assert (await bare.receive()).payload == b"bound"
                world.leave(bus, resources)
        async with world.host() as (bus, resources):
            for number in range(4):
                await remote.send_to(bytes((number,)), 7)
                await remote.send(bytes((number,)))
                await _settle()
            async with bus.open_endpoint(address=7) as bare, bus.open_endpoint(NAME) as host:
                assert bare.statistics.received == host.statistics.received == 4
                for endpoint in (bare, host):
                    assert [m.payload[0] for m in await endpoint.receive_many()] == [0, 1, 2, 3]
                assert bus.drops.unknown_destination == 0
                await bare.send(b"to the one that wrote to it")
                assert (await remote.receive()).source == 7


async def test_a_stand_in_that_holds_the_peer_back_is_followed_by_one_that_lets_it_go(
    open_world: OpenWorld,
) -> None:
    async with open_world(num=4) as world:
        async with world.host() as (bus, resources):
            await _settle()
            remote = await world.open_remote(NAME)
            async with bus.open_endpoint(NAME) as host:
                await _exchange(host, remote, b"x")
                world.leave(bus, resources)
        async with world.host() as (bus, resources):
            sent = 0
            with pytest.raises(trio.WouldBlock):
                while True:
                    remote.send_nowait(struct.pack("<I", sent))
                    sent += 1
                    await _settle()
            assert bus.statistics.held == 4
            async with bus.open_endpoint(NAME, queue_limit=1000) as host:
                for number in range(sent):
                    assert (await host.receive()).payload == struct.pack("<I", number)
                assert bus.statistics.held == 0
                await _exchange(host, remote, b"x")


async def test_a_buffer_that_the_remote_holds_is_not_written_by_the_next_host(
    open_world: OpenWorld,
) -> None:
    async with open_world(num=4) as world:
        async with world.host() as (bus, resources):
            await _settle()
            holding = await world.open_remote("holding", in_place=True)
            remote = await world.open_remote(NAME)
            async with bus.open_endpoint("holding") as first, bus.open_endpoint(NAME) as host:
                await first.wait_bound()
                await first.send(b"held")
                held = await holding.hold()
                for _ in range(9):  # until the ring does not name the held one any more
                    await _exchange(host, remote, b"x")
                world.leave(bus, resources)
        async with world.host() as (bus, _), bus.open_endpoint(NAME) as host:
            for _ in range(3):
                host.send_nowait(b"y")
            with pytest.raises(trio.WouldBlock):
                host.send_nowait(b"y")
            assert bytes(held.view) == b"held"
            held.release()
            assert len([await remote.receive() for _ in range(3)]) == 3
            await _exchange(host, remote, b"x")


async def test_without_a_handover_the_rings_go_on_and_names_do_not(open_world: OpenWorld) -> None:
    async with open_world() as world:
        async with world.host() as (bus, resources):
            await _settle()
            remote = await world.open_remote(NAME)
            async with bus.open_endpoint(NAME) as host:
                await _exchange(host, remote, b"x")
                await _settle()
                await remote.send(b"for nobody")
                world.leave(bus, resources)
        world.note = b""
        async with world.host() as (bus, resources):
            assert not bus.channels
            assert bus.drops.unknown_destination == 1
            address = host.address
            async with bus.open_endpoint(address=address, destination=remote.address) as host:
                await _exchange(host, remote, b"x")


# Leaving


async def test_everyone_who_waits_wakes_and_is_told_why(
    open_world: OpenWorld, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_world(num=1) as world, world.host() as (bus, resources):
        await _settle()
        remote = await world.open_remote(NAME, queue_limit=1)
        async with (
            bus.open_endpoint(NAME) as host,
            bus.open_endpoint(in_place=True) as held,
            trio.open_nursery() as nursery,
        ):
            await host.wait_bound()
            causes = []

            async def fails(call: Any, *arguments: Any) -> None:
                with pytest.raises(trio.BrokenResourceError, match="detached") as caught:
                    while True:
                        await call(*arguments)
                causes.append(caught.value.__cause__)

            nursery.start_soon(fails, host.send, b"x")
            nursery.start_soon(fails, host.receive)
            nursery.start_soon(fails, held.hold)
            nursery.start_soon(fails, bus.wait_service, "never")
            await _settle()
            with caplog.at_level(logging.INFO, "openamp_py.rpmsg.bus"):
                assert resources.detach() == 0
            assert resources.detach() == 0, "again does nothing"
            assert bus.failure is not None and bus.failure is await bus.wait_failure()
        assert len(causes) == 4
        assert all(isinstance(cause, DetachedError) for cause in causes)
        assert isinstance(causes[0], StateError) and not isinstance(causes[0], PeerGoneError)
        assert "0 messages were taken" in caplog.text
        assert resources.devices[0].status == 0xF
        assert remote.statistics.received
        with pytest.raises(trio.BrokenResourceError, match="detached"):
            async with open_bus(resources.rpmsg_device()):
                raise AssertionError("not reached")
    assert world.remote.failure is None


async def test_buffers_in_hand_go_back_and_what_was_taken_can_be_received(
    open_world: OpenWorld,
) -> None:
    async with open_world(num=4) as world:
        async with world.host() as (bus, resources):
            await _settle()
            remote = await world.open_remote(NAME)
            async with bus.open_endpoint(NAME, in_place=True) as host:
                await host.wait_bound()
                await remote.wait_bound()
                for number in range(4):
                    await remote.send(bytes((number,)))
                await _settle()
                held = await host.hold()
                with (
                    pytest.raises(trio.BrokenResourceError, match="detached"),
                    host.reserve_nowait() as reservation,
                ):
                    reservation.view[:1] = b"x"
                    assert world.leave(bus, resources) == 3
                with pytest.raises(trio.BrokenResourceError, match="detached"):
                    held.release()
                assert [host.receive_nowait().payload[0] for _ in range(3)] == [1, 2, 3]
                with pytest.raises(trio.BrokenResourceError):
                    host.receive_nowait()
        async with world.host() as (bus, resources), bus.open_endpoint(NAME) as host:
            for number in range(20):
                await _exchange(host, remote, bytes((number,)))


async def test_a_bus_that_is_closed_resets_the_device_it_took_over(open_world: OpenWorld) -> None:
    async with open_world() as world:
        async with world.host() as (bus, resources):
            await _settle()
            world.leave(bus, resources)
        async with world.host() as (bus, resources):
            assert resources.devices[0].is_adopted
        await _settle()
        assert "the driver reset the device" in str(world.remote.failure)


async def test_a_device_that_failed_cannot_be_left(open_world: OpenWorld) -> None:
    async with open_world() as world, world.host() as (bus, resources):
        resources.fail(PeerGoneError("gone"))
        assert resources.detach() == 0
        assert isinstance(bus.failure, PeerGoneError)


async def test_the_remote_cannot_detach(open_world: OpenWorld) -> None:
    async with open_world() as world, world.host(), open_resources(world.remote_side) as resources:
        with pytest.raises(ValueError, match="only the driver"):
            resources.detach()


# Refusals and hostile input


@pytest.mark.parametrize("seed", range(40))
async def test_whatever_lies_in_the_rings_is_taken_over_or_refused(
    open_world: OpenWorld, seed: int
) -> None:
    rng = random.Random(seed)
    async with open_world(num=4) as world:
        async with world.host() as (bus, resources):
            await _settle()
            remote = await world.open_remote(NAME)
            async with bus.open_endpoint(NAME) as host:
                await host.wait_bound()
                await remote.wait_bound()
                for _ in range(rng.randrange(4)):
                    await remote.send(b"unread")
                    await host.send(b"unread")
                world.leave(bus, resources)
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice([0x4000, 0x4000 + 64, 0x5000, 0x8000, 0x8000 + 64, 0x9000])
            at += rng.randrange(64)
            world.memory[at] = rng.choice([0, 1, 2, 0x7F, 0xFF, rng.randrange(256)])
        try:
            async with world.host() as (bus, _), bus.open_endpoint(NAME) as host:
                await _settle()
                host.send_nowait(b"x")
                while True:
                    host.receive_nowait()
        except (VirtqueueError, trio.BrokenResourceError, trio.WouldBlock) as error:
            assert str(error) or isinstance(error, trio.WouldBlock)
        assert isinstance(resources.devices[0], VirtioDevice)


async def test_a_refusal_changes_nothing(open_world: OpenWorld) -> None:
    async with open_world(num=4) as world:
        async with world.host() as (bus, resources):
            await _settle()
            remote = await world.open_remote(NAME)
            async with bus.open_endpoint(NAME) as host:
                await _exchange(host, remote, b"x")
                world.leave(bus, resources)
        right = bytes(world.memory[0x4008:0x400C])
        world.memory[0x4008:0x400C] = bytes(4)
        with pytest.raises(VirtqueueError, match="vdev0 vring 0 cannot be taken over: its first"):
            async with world.host():
                raise AssertionError("not reached")
        assert resources.table.vdevs[0].offset + 24 and world.remote.failure is None
        world.memory[0x4008:0x400C] = right
        async with world.host() as (bus, _), bus.open_endpoint(NAME) as host:
            await _exchange(host, remote, b"x")


async def test_buffers_of_another_size_are_named(open_world: OpenWorld) -> None:
    async with open_world(num=4) as world:
        async with world.host() as (bus, resources):
            await _settle()
            await world.open_remote(NAME, in_place=True)
            async with bus.open_endpoint(NAME) as host:
                await host.wait_bound()
                await host.send(b"held")
                world.leave(bus, resources)
        with pytest.raises(VirtqueueError, match=r"send_buffer_size"):
            async with world.host(BusOptions(send_buffer_size=256)):
                raise AssertionError("not reached")
