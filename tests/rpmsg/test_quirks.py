"""Peers that kick too rarely, too often or too early, or do not say truly whether they want it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from links import NAME, make_table, open_linked, settle

from openamp_py import (
    BusOptions,
    Channel,
    Drops,
    Link,
    LoopbackPlatform,
    VirtioDevice,
    open_bus,
    open_processor,
    open_resources,
)
from openamp_py.constants import RPMSG_F_NS, VIRTIO_RING_F_EVENT_IDX
from openamp_py.platforms.demo import python_firmware

RECHECK = 0.25


class _Kicks:
    """Counts what a device's other side is sent, and loses it where that is wanted."""

    def __init__(self, device: VirtioDevice) -> None:
        self.sent = 0
        self.lost = False
        self._pass_on: Callable[[int], None] = device._kick
        device._kick = self._kick

    def _kick(self, notify_id: int) -> None:
        self.sent += 1
        if not self.lost:
            self._pass_on(notify_id)


class _Deaf:
    """Keeps a bus in this thread from being helped: it hears of nothing but kicks and rechecks.

    Both buses are users of one trio, which wakes for either; a real peer wakes nobody.
    """

    def __init__(self, bus: Any) -> None:
        self._bus = bus

    def __enter__(self) -> None:
        self._bus.after_sleep = lambda: None
        self._bus.before_sleep = self._sleeps

    def __exit__(self, *_: object) -> None:
        del self._bus.after_sleep, self._bus.before_sleep

    def _sleeps(self, _: float) -> None:
        self._bus._looked = False


# Always kicking


async def test_every_message_and_every_returned_buffer_is_kicked_for(open_pair: Any) -> None:
    options = BusOptions(always_kick=True)
    async with (
        open_pair(options=options) as pair,
        open_linked(pair) as (host, remote),
    ):
        kicks = _Kicks(pair.host_device)

        async def expect(count: int) -> None:
            assert kicks.sent == count
            kicks.sent = 0
            await settle()
            await remote.receive_many()
            await settle()
            kicks.sent = 0

        await host.send(b"x")
        await expect(1)
        host.send_nowait(b"x")
        await expect(1)
        await host.send_to(b"x", 6)
        await expect(1)
        host.send_from_nowait(b"x", 9, 6)
        await expect(1)
        for _ in range(7):
            await host.send(b"x")
        await expect(7)
        await host.send_many([b"x"] * 50)
        await expect(1)
        async with host.reserve(1):
            pass
        await expect(1)
        with host.reserve_nowait(1) as reservation:
            reservation.discard()
        assert kicks.sent == 0
        await remote.send(b"x")
        await settle()
        assert kicks.sent == 1, "one buffer went back"
        assert (await host.receive()).payload == b"x"


async def test_kicks_that_nobody_wanted_count_as_sent(open_pair: Any) -> None:
    async with (
        open_pair(options=BusOptions(always_kick=True)) as pair,
        open_linked(pair) as (host, _),
    ):
        kicks = _Kicks(pair.host_device)
        before = pair.host.statistics
        pair.remote._receiving.queue.notify_off()
        for _ in range(20):
            host.send_nowait(b"x")
        after = pair.host.statistics
        assert after.kicks_sent - before.kicks_sent == kicks.sent == 20
        assert after.kicks_suppressed == before.kicks_suppressed


async def test_held_buffers_are_kicked_for_when_they_go_back(open_pair: Any) -> None:
    async with (
        open_pair(options=BusOptions(always_kick=True)) as pair,
        open_linked(pair, in_place=True) as (host, remote),
    ):
        await remote.send(b"x")
        held = await host.hold()
        await settle()
        kicks = _Kicks(pair.host_device)
        held.release()
        assert kicks.sent == 1


@pytest.mark.parametrize("event_idx", [False, True])
async def test_without_it_the_peers_wish_counts(open_pair: Any, event_idx: bool) -> None:
    features = RPMSG_F_NS | (VIRTIO_RING_F_EVENT_IDX if event_idx else 0)
    async with (
        open_pair(make_table(features=features)) as pair,
        open_linked(pair) as (host, remote),
    ):
        kicks = _Kicks(pair.host_device)
        for _ in range(50):
            host.send_nowait(b"x")
        # It asked once, and has not looked since.
        assert kicks.sent <= 1 + (not event_idx) * 49
        await settle()
        assert len(await remote.receive_many()) == 50


async def test_all_works_the_same_with_it(open_pair: Any) -> None:
    async with (
        open_pair(make_table(2), options=BusOptions(always_kick=True)) as pair,
        open_linked(pair, queue_limit=1) as (host, remote),
        trio.open_nursery() as nursery,
    ):
        payloads = [bytes((number,)) for number in range(100)]
        nursery.start_soon(host.send_many, payloads)

        async def one_by_one() -> None:
            for payload in payloads:
                await remote.send(payload)

        nursery.start_soon(one_by_one)
        for payload in payloads:
            assert (await remote.receive()).payload == payload
            assert (await host.receive()).payload == payload
        assert pair.host.drops == pair.remote.drops == Drops()


async def test_a_peer_that_lies_about_its_wish_is_reached(open_pair: Any) -> None:
    """It says that it wants no kicks, and sleeps all the same."""
    for always_kick in (False, True):
        options = BusOptions(always_kick=always_kick)
        async with open_pair(options=options) as pair, open_linked(pair) as (host, remote):
            # What trio does for both buses in one thread, this peer does not get.
            with _Deaf(pair.remote):
                pair.remote._receiving.queue.notify_off()
                await host.send(b"x")
                await settle()
                assert remote.statistics.queued == always_kick


# Lost kicks


@pytest.mark.parametrize("to_host", [False, True])
async def test_a_message_whose_kick_was_lost_is_found(
    open_pair: Any, autojump_clock: Any, to_host: bool
) -> None:
    """Acceptance scenario 6 (linux-xlnx#51): lost."""
    # The first is for comparison: the kick is heard.
    for lost, recheck in ((False, None), (True, None), (True, RECHECK)):
        async with (
            open_pair(options=BusOptions(recheck=recheck)) as pair,
            open_linked(pair) as ends,
        ):
            sender, receiver = ends[::-1] if to_host else ends
            device = pair.remote_device if to_host else pair.host_device
            kicks = _Kicks(device)
            kicks.lost = lost
            bus = pair.host if to_host else pair.remote
            with _Deaf(bus):
                begin = trio.current_time()
                with trio.move_on_after(60):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(receiver.receive)
                        await settle()
                        bus._ask_for_kicks()
                        await sender.send(b"lost?")
                waited = trio.current_time() - begin
            expected = 60 if lost else 0
            assert waited <= RECHECK if recheck else waited == pytest.approx(expected)
            kicks.lost = False


async def test_a_free_buffer_whose_kick_was_lost_is_found(
    open_pair: Any, autojump_clock: Any
) -> None:
    """Acceptance scenario 6 (linux-xlnx#51): the kick for returned buffers is lost."""
    for lost, recheck in ((False, None), (True, None), (True, RECHECK)):
        async with (
            open_pair(make_table(2), options=BusOptions(recheck=recheck, patience=1e9)) as pair,
            open_linked(pair, queue_limit=1) as (host, remote),
        ):
            with pytest.raises(trio.WouldBlock):
                while True:
                    host.send_nowait(b"fill")
                    await settle()
            kicks = _Kicks(pair.remote_device)
            kicks.lost = lost
            with _Deaf(pair.host):
                begin = trio.current_time()
                with trio.move_on_after(60):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(host.send, b"waits")
                        await settle()
                        pair.host._ask_for_kicks()
                        await remote.receive_many()
                waited = trio.current_time() - begin
            expected = 60 if lost else 0
            assert waited <= RECHECK if recheck else waited == pytest.approx(expected)
            kicks.lost = False


async def test_an_announcement_whose_kick_was_lost_is_found(
    open_pair: Any, autojump_clock: Any
) -> None:
    async with open_pair(options=BusOptions(recheck=RECHECK)) as pair:
        kicks = _Kicks(pair.remote_device)
        kicks.lost = True
        with _Deaf(pair.host):
            async with pair.remote.open_endpoint(NAME, address=9):
                with trio.fail_after(RECHECK + 0.01):
                    assert await pair.host.wait_service(NAME) == Channel(NAME, 9)
            kicks.lost = False


async def test_a_reset_whose_kick_was_lost_is_found(open_pair: Any, autojump_clock: Any) -> None:
    async with (
        open_pair(options=BusOptions(recheck=RECHECK)) as pair,
        open_linked(pair) as (_, remote),
    ):
        _Kicks(pair.host_device).lost = True
        with _Deaf(pair.remote):
            await pair.host.aclose()
            with (
                trio.fail_after(RECHECK + 0.01),
                pytest.raises(trio.BrokenResourceError, match="reset the device"),
            ):
                await remote.receive()


async def test_rechecking_is_not_done_oftener_than_asked(
    open_pair: Any, autojump_clock: Any
) -> None:
    async with open_pair(options=BusOptions(recheck=RECHECK)) as pair, open_linked(pair):
        looks = 0
        drain = pair.host.drain

        def counted(nanoseconds: int = 0) -> bool:
            nonlocal looks
            looks += 1
            return bool(drain(nanoseconds))

        with _Deaf(pair.host):
            pair.host.drain = counted
            await trio.sleep(100 * RECHECK + 0.01)
            del pair.host.drain
        assert 99 <= looks <= 101


async def test_a_failed_bus_is_rechecked_without_harm(open_pair: Any, autojump_clock: Any) -> None:
    async with (
        open_pair(options=BusOptions(recheck=RECHECK)) as pair,
        open_linked(pair) as (host, _),
    ):
        pair.host_device.end()
        await trio.sleep(3 * RECHECK)
        with pytest.raises(trio.BrokenResourceError):
            await pair.remote.wait_service("x")
        await pair.host.aclose()
        await trio.sleep(3 * RECHECK)
        with pytest.raises(trio.ClosedResourceError):
            await host.receive()


@pytest.mark.parametrize("recheck", [0.0, -1.0, float("inf"), float("nan")])
def test_a_recheck_that_cannot_be(recheck: float) -> None:
    with pytest.raises(ValueError, match="more than 0 s are possible"):
        BusOptions(recheck=recheck)


# Spurious and early kicks


@pytest.mark.parametrize("to_host", [False, True])
async def test_spurious_kicks_do_nothing(open_pair: Any, to_host: bool) -> None:
    """Acceptance scenario 6 (OA#117): spurious."""
    async with open_pair() as pair, open_linked(pair) as (host, remote):
        bus = pair.host if to_host else pair.remote
        device = pair.remote_device if to_host else pair.host_device
        before = bus.statistics
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.receive)
            nursery.start_soon(remote.receive)
            await settle()
            for notify_id in (0, 1, 2, 3, 0xFFFF_FFFF):
                for _ in range(20):
                    device._kick(notify_id)
                    await settle()
            after = bus.statistics
            assert after.kicks_received == before.kicks_received + 100
            assert (after.received, after.drops, bus.failure) == (before.received, Drops(), None)
            await host.send(b"x")
            await remote.send(b"y")


async def test_kicks_before_anything_was_sent() -> None:
    """Acceptance scenario 6 (OA#117): before the buses are there, on either side."""
    began = trio.Event()

    async def application(link: Link) -> None:
        for _ in range(5):
            link.kick(0)
            link.kick(1)
            await trio.lowlevel.checkpoint()
        began.set()
        async with open_resources(link) as resources:
            for _ in range(5):
                resources.rpmsg_device().kick(0)
                await settle()
            async with (
                open_bus(resources.rpmsg_device()) as bus,
                bus.open_endpoint(NAME) as endpoint,
            ):
                async for message in endpoint:
                    await endpoint.send(message.payload)

    async with open_processor(LoopbackPlatform(application)) as processor:
        await processor.boot(python_firmware())
        device = processor.rpmsg_device()
        for _ in range(5):
            device.kick(0)
            device.kick(1)
            await settle()
        await began.wait()
        async with open_bus(device) as bus, bus.open_endpoint(NAME) as endpoint:
            with trio.fail_after(5):
                await endpoint.send(b"x")
                assert (await endpoint.receive()).payload == b"x"
            assert bus.drops == Drops()
