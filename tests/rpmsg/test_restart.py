"""A bus that goes on over a new device after its peer died or was given up."""

from __future__ import annotations

import gc
import logging
import os
import signal
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing
from links import NAME, make_table, settle

from openamp_py import (
    ECHO_CHANNEL,
    Bus,
    BusOptions,
    Channel,
    CoreCrashedError,
    Drops,
    Endpoint,
    FirmwareError,
    HeldMessage,
    Link,
    LoopbackPlatform,
    PeerGoneError,
    RemoteProcessor,
    Reservation,
    StateError,
    VirtioDevice,
    open_bus,
    open_processor,
    open_resources,
    open_session,
)
from openamp_py.constants import RPMSG_F_NS
from openamp_py.platforms.demo import python_firmware
from openamp_py.remoteproc.resource_table import ResourceTable, Vdev
from openamp_py.rpmsg.options import DEFAULT_OPTIONS
from openamp_py.session import Session


class _Crash(Exception):
    """What the remote application dies of."""


class _Remote:
    """A remote that can be crashed and booted again, and the host's bus to it."""

    def __init__(self, num: int, options: BusOptions, features: int = RPMSG_F_NS) -> None:
        self.firmware = python_firmware(make_table(num, features))
        self._options = options
        self._send, self._receive = trio.open_memory_channel[tuple[Bus, trio.Event]](100)
        self.bus: Bus
        self.processor: RemoteProcessor
        self.host: Bus

    async def application(self, link: Link) -> None:
        dies = trio.Event()
        async with (
            open_resources(link) as resources,
            open_bus(resources.rpmsg_device(), self._options) as bus,
        ):
            self._send.send_nowait((bus, dies))
            await dies.wait()
            raise _Crash

    async def meet(self) -> None:
        """Waits until the remote's present bus is up."""
        self.bus, self._dies = await self._receive.receive()

    async def crash(self) -> None:
        self._dies.set()
        with pytest.raises(CoreCrashedError):
            await self.processor.wait_exit()

    async def reboot(self) -> VirtioDevice:
        """A new device; the old one has failed."""
        await self.processor.shutdown()
        await self.processor.boot(self.firmware)
        return self.processor.rpmsg_device()

    async def restart(self) -> None:
        """The whole of it: afterwards both buses are up."""
        await self.host.restart(await self.reboot())
        await self.meet()


@asynccontextmanager
async def _remote(
    num: int = 256, options: BusOptions = DEFAULT_OPTIONS, features: int = RPMSG_F_NS
) -> AsyncIterator[_Remote]:
    remote = _Remote(num, options, features)
    async with open_processor(LoopbackPlatform(remote.application)) as processor:
        remote.processor = processor
        await processor.boot(remote.firmware)
        async with open_bus(processor.rpmsg_device(), options) as remote.host:
            await remote.meet()
            yield remote


async def _fill(endpoint: Endpoint) -> int:
    count = 0
    while True:
        try:
            endpoint.send_nowait(b"fill")
        except trio.WouldBlock:
            return count
        count += 1
        await settle()


async def _circulates(remote: _Remote, num: int) -> None:
    """All buffers of both directions can be had: none is lost."""
    await settle()
    for one, other in ((remote.host, remote.bus), (remote.bus, remote.host)):
        async with (
            one.open_endpoint(destination=900) as sender,
            other.open_endpoint(address=900) as receiver,
        ):
            await settle()
            for _ in range(3):
                for number in range(num):
                    sender.send_nowait(bytes((number,)))
                with pytest.raises(trio.WouldBlock):
                    sender.send_nowait(b"one too many")
                for number in range(num):
                    assert (await receiver.receive()).payload == bytes((number,))
                await settle()


# Going on


async def test_an_endpoint_that_rebinds_lives_on_generation_by_generation() -> None:
    async with _remote(4) as remote, remote.host.open_endpoint(NAME, rebind=True) as host:
        for generation in range(5):
            assert remote.host.generation == remote.host.statistics.generation == generation
            assert remote.host.failure is None
            assert not host.is_bound
            assert not remote.host.channels
            async with remote.bus.open_endpoint(NAME, address=2000 + generation) as peer:
                with trio.fail_after(5):
                    await host.wait_bound()
                    await peer.wait_bound()
                    assert host.destination == 2000 + generation
                    assert peer.destination == host.address
                    for one, other in ((host, peer), (peer, host)):
                        for number in range(20):
                            await one.send(bytes((generation, number)))
                            assert (await other.receive()).payload == bytes((generation, number))
            await _circulates(remote, 4)
            await remote.restart()
        assert host.statistics.sent == host.statistics.received == 100


async def test_what_is_announced_again_is_seen_by_the_new_peer() -> None:
    async with (
        _remote() as remote,
        remote.host.open_endpoint("one", rebind=True) as one,
        remote.host.open_endpoint("two"),
        remote.host.open_endpoint("three", rebind=True, announce=False),
        remote.host.open_endpoint(address=7, rebind=True),
        remote.host.open_endpoint("four", address=8, rebind=True),
    ):
        await remote.restart()
        await settle()
        assert remote.bus.channels == (Channel("one", one.address), Channel("four", 8))
        one.close()
        async with remote.host.open_endpoint("five"):
            await settle()
            assert remote.bus.channels[-1].name == "five"


async def test_one_that_was_told_anew_withdraws_at_its_end() -> None:
    async with _remote() as remote:
        async with remote.host.open_endpoint(NAME, rebind=True):
            await remote.restart()
            await settle()
            assert len(remote.bus.channels) == 1
        await settle()
        assert not remote.bus.channels
        assert remote.bus.drops == Drops()


async def test_more_announcements_than_buffers() -> None:
    async with _remote(2) as remote, trio.open_nursery() as nursery:

        async def hold_open(number: int) -> None:
            async with remote.host.open_endpoint(f"service {number}", rebind=True):
                await trio.sleep_forever()

        for number in range(9):
            nursery.start_soon(hold_open, number)
        await settle()
        await remote.restart()
        for _ in range(9):
            await settle()
        assert len(remote.bus.channels) == 9
        nursery.cancel_scope.cancel()


async def test_an_announcement_that_does_not_fit_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first device has no name service, so that nobody looked at its size."""
    options = BusOptions(send_buffer_size=48)
    async with (
        _remote(4, options, features=0) as remote,
        remote.host.open_endpoint("one", rebind=True),
        remote.host.open_endpoint("two", rebind=True),
    ):
        remote.firmware = python_firmware(make_table(4))
        with trio.fail_after(5), caplog.at_level(logging.WARNING, "openamp_py.rpmsg.bus"):
            await remote.restart()
            await settle()  # never, where it is tried again and again
        assert not remote.host._name_service.replies
        assert [record.getMessage() for record in caplog.records].count(
            "<Endpoint one 0x400 -> not bound> cannot be announced: "
            "payload of 40 bytes; the limit is 32 bytes"
        ) == 1


async def test_a_fixed_peer_is_kept() -> None:
    async with (
        _remote() as remote,
        remote.host.open_endpoint(address=5, destination=6, rebind=True) as host,
    ):
        await remote.restart()
        async with remote.bus.open_endpoint(address=6, destination=5) as peer:
            await host.send(b"x")
            assert await peer.receive() == (b"x", 5)
            await peer.send(b"y")
            assert await host.receive() == (b"y", 6)


async def test_a_service_that_is_up_first_is_bound_at_once() -> None:
    """What came in while the bus went on is not lost."""

    async def application(link: Link) -> None:
        async with (
            open_resources(link) as resources,
            open_bus(resources.rpmsg_device()) as bus,
            bus.open_endpoint(NAME) as endpoint,
        ):
            async for message in endpoint:
                await endpoint.send_to(message.payload, message.source)

    async with open_processor(LoopbackPlatform(application)) as processor:
        await processor.boot(python_firmware())
        async with (
            open_bus(processor.rpmsg_device()) as bus,
            bus.open_endpoint(NAME, rebind=True) as endpoint,
        ):
            for number in range(4):
                await endpoint.send(bytes((number,)))
                assert (await endpoint.receive()).payload == bytes((number,))
                await processor.shutdown()
                await processor.boot(python_firmware())
                await bus.restart(processor.rpmsg_device())


async def test_in_place_endpoints_hold_again() -> None:
    async with (
        _remote(4) as remote,
        remote.host.open_endpoint(address=5, rebind=True, in_place=True) as host,
    ):
        for _ in range(3):
            async with remote.bus.open_endpoint(destination=5) as peer:
                for number in range(12):
                    await peer.send(bytes((number,)))
                    with await host.hold() as held:
                        assert bytes(held.view) == bytes((number,))
            await remote.restart()


@pytest.mark.parametrize("times", [1, 2])
async def test_the_remote_goes_on_too(times: int) -> None:
    """Both buses live on, whoever is first."""
    links: list[Link] = []

    async def application(link: Link) -> None:
        links.append(link)
        await trio.sleep_forever()

    async with open_processor(LoopbackPlatform(application)) as processor:
        await processor.boot(python_firmware())
        await settle()
        async with (
            open_bus(processor.rpmsg_device()) as host_bus,
            host_bus.open_endpoint(NAME, rebind=True) as host,
            open_resources(links[0]) as first,
            open_bus(first.rpmsg_device()) as bus,
            bus.open_endpoint(NAME, rebind=True) as endpoint,
        ):
            await endpoint.wait_bound()
            for _ in range(times):
                await processor.shutdown()
                with pytest.raises(trio.BrokenResourceError):
                    await host.receive()
                await processor.boot(python_firmware())
                await settle()
                async with open_resources(links[-1]) as resources, trio.open_nursery() as nursery:
                    nursery.start_soon(bus.restart, resources.rpmsg_device())
                    await settle()
                    await host_bus.restart(processor.rpmsg_device())
                    with trio.fail_after(5):
                        await endpoint.wait_bound()
                        await host.wait_bound()
                        await endpoint.send(b"x")
                        assert await host.receive() == (b"x", endpoint.address)
                        await host.send(b"y")
                        assert await endpoint.receive() == (b"y", host.address)
            assert bus.generation == host_bus.generation == times


@pytest.mark.parametrize("number", range(4))
async def test_options_hold_over_a_restart(number: int) -> None:
    options = [
        BusOptions(always_kick=True),
        BusOptions(recheck=0.005),
        BusOptions(polling=1e-4),
        BusOptions(send_buffer_size=64, receive_buffer_size=64),
    ][number]
    async with (
        _remote(4, options) as remote,
        remote.host.open_endpoint(NAME, rebind=True) as host,
    ):
        limit = host.payload_limit
        await remote.restart()
        assert host.payload_limit == limit
        before = remote.host.statistics
        async with remote.bus.open_endpoint(NAME) as peer:
            for _ in range(10):
                await host.send(b"x" * limit)
                assert (await peer.receive()).payload == b"x" * limit
        if options.always_kick:
            assert remote.host.dump().options["always_kick"]
        assert remote.host.statistics.sent - before.sent >= 10


# Those that wait


def _waiting_calls(endpoint: Endpoint, in_place: Endpoint, bus: Bus) -> dict[str, Any]:
    async def build() -> None:
        async with endpoint.reserve():
            raise AssertionError("not reached")

    async def watch() -> None:
        async with bus.open_watch() as opened:
            async for _ in opened:
                pass

    return {
        "receive": endpoint.receive,
        "send": lambda: endpoint.send(b"x"),
        "send_to": lambda: endpoint.send_to(b"x", 5),
        "send_from": lambda: endpoint.send_from(b"x", 5, 5),
        "send_many": lambda: endpoint.send_many([b"x", b"y"]),
        "reserve": build,
        "hold": in_place.hold,
        "wait_service": lambda: bus.wait_service("never"),
        "watch": watch,
    }


@pytest.mark.parametrize("rebind", [False, True])
@pytest.mark.parametrize("how", ["crash", "given up"])
async def test_everyone_who_waits_wakes_at_once_with_the_reason(how: str, rebind: bool) -> None:
    """Acceptance scenario 3 (OA#116), first half."""
    async with (
        _remote(1) as remote,
        remote.host.open_endpoint(NAME, rebind=rebind) as host,
        remote.host.open_endpoint(in_place=True, rebind=rebind) as in_place,
        remote.bus.open_endpoint(NAME, queue_limit=1),
    ):
        await host.wait_bound()
        await settle()
        assert await _fill(host) == 2
        errors: dict[str, BaseException] = {}

        async def fails(what: str, call: Callable[[], Awaitable[object]]) -> None:
            try:
                await call()
            except BaseException as error:
                errors[what] = error
                if isinstance(error, trio.Cancelled):
                    raise
            else:
                errors[what] = AssertionError("it returned")

        calls = _waiting_calls(host, in_place, remote.host)
        async with trio.open_nursery() as nursery:
            for what, call in calls.items():
                nursery.start_soon(fails, what, call)
            await settle()
            assert errors == {}
            with trio.fail_after(5):
                if how == "crash":
                    remote.processor.rpmsg_device().fail(CoreCrashedError("_Crash"))
                    await settle()  # before anybody restarts anything
                else:
                    other = _Remote(4, DEFAULT_OPTIONS)
                    async with open_processor(LoopbackPlatform(other.application)) as processor:
                        await processor.boot(other.firmware)
                        await remote.host.restart(processor.rpmsg_device())
                        await settle()
                        assert sorted(errors) == sorted(calls)
                        assert host.is_bound is (not rebind)
            assert sorted(errors) == sorted(calls)
        for what, error in errors.items():
            assert isinstance(error, trio.BrokenResourceError), what
            if how == "crash":
                assert isinstance(error.__cause__, CoreCrashedError)
                assert "_Crash" in str(error.__cause__) and "_Crash" in str(error)
            else:
                assert isinstance(error.__cause__, PeerGoneError)


async def test_a_peer_that_was_given_up_sees_the_reset() -> None:
    async with _remote() as remote, remote.bus.open_endpoint(NAME) as peer:
        other = _Remote(4, DEFAULT_OPTIONS)
        async with open_processor(LoopbackPlatform(other.application)) as processor:
            await processor.boot(other.firmware)
            await remote.host.restart(processor.rpmsg_device())
            with (
                trio.fail_after(5),
                pytest.raises(trio.BrokenResourceError, match="reset the device"),
            ):
                await peer.receive()
            await remote.host.aclose()


async def test_between_the_end_and_the_restart_nothing_can_be_done_and_wait_bound_waits() -> None:
    async with _remote() as remote, remote.host.open_endpoint(NAME, rebind=True) as host:
        async with remote.bus.open_endpoint(NAME):
            await host.wait_bound()
        await settle()
        await remote.crash()
        for call in _waiting_calls(host, host, remote.host).values():
            with pytest.raises((trio.BrokenResourceError, StateError)), trio.fail_after(1):
                await call()
        for nowait in (
            lambda: host.send_nowait(b"x"),
            lambda: host.send_to_nowait(b"x", 5),
            lambda: host.send_many_nowait([b"x"]),
            host.receive_nowait,
        ):
            with pytest.raises(trio.BrokenResourceError):
                nowait()
        with pytest.raises(trio.BrokenResourceError):
            async with remote.host.open_endpoint("new"):
                raise AssertionError("not reached")
        bound: list[bool] = []

        async def wait_bound() -> None:
            await host.wait_bound()
            bound.append(True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_bound)
            await settle()
            await remote.restart()
            await settle()
            assert bound == []
            async with remote.bus.open_endpoint(NAME):
                await settle()
                assert bound == [True]


async def test_a_watch_ends_and_can_be_opened_again() -> None:
    async with _remote() as remote:
        async with remote.bus.open_endpoint("old", address=5), remote.host.open_watch() as watch:
            await remote.restart()
            assert (await watch.__anext__()).channel == Channel("old", 5)
            with pytest.raises(trio.BrokenResourceError) as caught:
                await watch.__anext__()
            assert isinstance(caught.value.__cause__, PeerGoneError)
        async with (
            remote.host.open_watch() as watch,
            remote.bus.open_endpoint("new", address=6),
        ):
            assert (await watch.__anext__()).channel == Channel("new", 6)


# Those that do not go on


async def test_others_stay_broken_and_harm_nobody() -> None:
    async with (
        _remote(4) as remote,
        remote.host.open_endpoint(NAME, address=2000) as lost,
        remote.host.open_endpoint(address=2001, destination=5) as also_lost,
    ):
        await remote.crash()
        await remote.restart()
        # Their addresses are free.
        async with remote.host.open_endpoint(address=2000, destination=5) as heir:
            for endpoint in (lost, also_lost):
                with pytest.raises(trio.BrokenResourceError, match="_Crash") as caught:
                    await endpoint.receive()
                assert isinstance(caught.value.__cause__, CoreCrashedError)
                for call in (
                    lambda endpoint=endpoint: endpoint.send(b"x"),
                    lambda endpoint=endpoint: endpoint.send_to(b"x", 5),
                    lambda endpoint=endpoint: endpoint.send_many([b"x"]),
                    endpoint.wait_bound,
                ):
                    with pytest.raises(trio.BrokenResourceError, match="_Crash"):
                        await call()
                with pytest.raises(trio.BrokenResourceError):
                    endpoint.send_nowait(b"x")
            async with remote.bus.open_endpoint(address=5, destination=2000) as peer:
                await peer.send(b"for the heir")
                await settle()
                lost.close()
                await lost.aclose()
                assert await heir.receive() == (b"for the heir", 5)
                await peer.send(b"again")
                assert (await heir.receive()).payload == b"again"
                with pytest.raises(trio.ClosedResourceError):
                    await lost.receive()
            assert [report.address for report in remote.host.dump().endpoints] == [2000]
        await _circulates(remote, 4)


async def test_copies_of_lost_endpoints_can_still_be_received_and_others_are_stale() -> None:
    async with (
        _remote() as remote,
        remote.host.open_endpoint(address=5) as copied,
        remote.host.open_endpoint(address=6, in_place=True) as in_place,
        remote.host.open_endpoint(address=7, rebind=True) as rebinds,
        remote.host.open_endpoint(address=8, rebind=True, in_place=True) as both,
        remote.bus.open_endpoint(destination=5) as peer,
    ):
        for address in (5, 6, 7, 8):
            for number in range(address):
                await peer.send_to(bytes((number,)), address)
        await settle()
        await remote.restart()
        assert remote.host.drops == Drops(stale=6 + 7 + 8)
        assert [message.payload[0] for message in await copied.receive_many()] == [*range(5)]
        for endpoint in (copied, in_place):
            with pytest.raises(trio.BrokenResourceError):
                endpoint.receive_nowait()
        for endpoint in (rebinds, both):
            with pytest.raises(trio.WouldBlock):
                endpoint.receive_nowait()
        assert remote.host.statistics.held == 0
        for endpoint in (copied, in_place, rebinds, both):
            assert (endpoint.statistics.queued, endpoint.statistics.held) == (0, 0)


async def test_messages_held_back_are_of_the_old_device() -> None:
    async with (
        _remote(4) as remote,
        remote.host.open_endpoint(address=5, queue_limit=2, rebind=True) as rebinds,
        remote.host.open_endpoint(address=6, queue_limit=1) as lost,
    ):
        async with remote.bus.open_endpoint(destination=5) as peer:
            for address in (5, 5, 5, 5, 6, 6, 6):
                peer.send_to_nowait(b"x", address)
                await settle()
            assert remote.host.statistics.held == 4
        await remote.restart()
        assert remote.host.statistics.held == 0
        assert len(await lost.receive_many()) == 3
        async with remote.bus.open_endpoint(destination=5) as peer:
            assert await _fill(peer) == 6
            assert rebinds.statistics.held == 4
            assert len(await rebinds.receive_many()) == 6
        await _circulates(remote, 4)


# What users have in hand


async def test_old_held_messages_and_reservations_are_void() -> None:
    async with (
        _remote(4) as remote,
        remote.host.open_endpoint(address=5, destination=5, rebind=True, in_place=True) as host,
        remote.bus.open_endpoint(address=5, destination=5) as peer,
    ):
        await peer.send_many([b"a", b"b", b"c"])
        held: list[HeldMessage] = [await host.hold(), await host.hold()]
        reservations: list[Reservation] = []
        with pytest.raises(trio.BrokenResourceError) as caught:
            async with host.reserve(4) as reservation:
                reservations.append(reservation)
                with host.reserve_nowait(4) as other:
                    reservations.append(other)
                    await remote.crash()
                    assert bytes(held[0].view) == b"a", "until the restart it can be read"
                    other.discard()
                await remote.restart()
        assert isinstance(caught.value.__cause__, CoreCrashedError)
        statistics = remote.host.statistics
        assert (statistics.held, statistics.reserved) == (0, 0)
        assert remote.host.drops == Drops(stale=1)
        for each in held:
            assert each.is_released
            with pytest.raises(ValueError, match="released"):
                bytes(each.view)
            for _ in range(2):
                with pytest.raises(trio.BrokenResourceError) as caught:
                    each.release()
                assert isinstance(caught.value.__cause__, CoreCrashedError)
            with each:
                pass  # its block would have ended without an error
        for old in reservations:
            with pytest.raises(ValueError, match="released"):
                old.view[0] = 1
            old.discard()
        await _circulates(remote, 4)


async def test_a_reservation_that_outlives_two_devices() -> None:
    async with (
        _remote(2) as remote,
        remote.host.open_endpoint(destination=5, rebind=True) as host,
    ):
        with pytest.raises(trio.BrokenResourceError):
            async with host.reserve(1):
                await remote.restart()
                async with host.reserve(1) as inner:
                    inner.view[:1] = b"i"
                await remote.restart()
        assert host.statistics.sent == 1
        await _circulates(remote, 2)


async def test_notifications_of_the_old_device_do_nothing() -> None:
    async with (
        _remote(4) as remote,
        remote.host.open_endpoint(NAME, rebind=True) as host,
    ):
        old = remote.processor.rpmsg_device()
        await remote.restart()
        async with remote.bus.open_endpoint(NAME):
            await host.wait_bound()
            await settle()
            before = remote.host.statistics
            for _ in range(3):
                old.notified()
                old.fail(PeerGoneError("of old"))
                await settle()
            assert remote.host.statistics == before
            assert remote.host.failure is None
            await host.send(b"x")


# Counting


async def test_counts_go_on_and_count_once() -> None:
    async with (
        _remote() as remote,
        remote.host.open_endpoint(address=5, destination=6, rebind=True) as host,
    ):
        sent = received = waits = 0
        for turn in range(1, 4):
            async with remote.bus.open_endpoint(address=6, destination=5) as peer:
                await host.send_many([b"abc"] * 5)
                await peer.send_many([b"ab"] * 7)
                await peer.send_to(b"nobody", 4711)
                await host.receive_many()
                await settle()
            sent, received = 5 * turn, 8 * turn
            for _ in range(2):  # the second time after the restart
                statistics = remote.host.statistics
                assert (statistics.sent, statistics.sent_bytes) == (sent, 3 * sent)
                assert (statistics.received, statistics.received_bytes) == (
                    received,
                    (14 + 6) * turn,
                )
                assert statistics.buffer_waits == waits
                assert statistics.drops == Drops(unknown_destination=turn)
                assert host.statistics.sent == 5 * turn
                assert host.statistics.received == 7 * turn
                kicks = statistics.kicks_sent + statistics.kicks_suppressed
                assert kicks > 0
                if remote.host.generation < turn:
                    await remote.restart()
                    after = remote.host.statistics
                    assert after.kicks_sent + after.kicks_suppressed >= kicks


async def test_counts_of_a_broken_bus_and_of_failed_attempts() -> None:
    async with _remote() as remote, remote.host.open_endpoint(destination=6) as host:
        await host.send_many([b"x"] * 9)
        for _ in range(3):
            device = await remote.reboot()
            with trio.CancelScope() as scope:
                scope.cancel()
                await remote.host.restart(device)
            assert scope.cancelled_caught
            assert remote.host.statistics.sent == 9
            assert remote.host.generation == 0
        await remote.restart()
        assert remote.host.statistics.sent == 9
        assert remote.host.generation == 1


# Refusals


async def test_restarts_that_are_refused_change_nothing() -> None:
    async with _remote(4) as remote, remote.host.open_endpoint(NAME, rebind=True) as host:
        with pytest.raises(StateError, match="driven before"):
            await remote.host.restart(remote.processor.rpmsg_device())
        async with remote.bus.open_endpoint(NAME) as peer:
            await host.wait_bound()
            await host.send(b"x")
            assert (await peer.receive()).payload == b"x"
        device = await remote.reboot()
        refused: list[str] = []

        async def restart() -> None:
            try:
                await remote.host.restart(device)
            except StateError as error:
                refused.append(str(error))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(restart)
        # Those that came first during the restart, those that came late when it was done.
        assert len(refused) == 2
        for why in refused:
            assert "restarted already" in why or "driven before" in why
        await remote.meet()
        assert remote.host.generation == 1
        await _circulates(remote, 4)
        device = await remote.reboot()
        await remote.host.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await remote.host.restart(device)
        assert not device.is_up and device.status == 0


async def test_a_device_that_is_no_rpmsg_device_leaves_the_bus_broken_and_can_be_followed() -> None:
    async with _remote(4) as remote, remote.host.open_endpoint(NAME, rebind=True) as host:
        good = remote.firmware
        vrings = make_table(4).entries[0]
        assert isinstance(vrings, Vdev)
        remote.firmware = python_firmware(ResourceTable((replace(vrings, id=8),)))
        await remote.processor.shutdown()
        await remote.processor.boot(remote.firmware)
        (device,) = remote.processor.devices
        with pytest.raises(ValueError, match="not 7"):
            await remote.host.restart(device)
        with pytest.raises(trio.BrokenResourceError):
            await host.send(b"x")
        assert remote.host.failure is not None
        remote.firmware = good
        await remote.restart()
        await _circulates(remote, 4)


async def test_a_remote_that_is_gone_before_the_bus_is_up() -> None:
    async with _remote(4) as remote, remote.host.open_endpoint(NAME, rebind=True):
        device = await remote.reboot()
        await remote.processor.shutdown()
        with pytest.raises(trio.BrokenResourceError, match="stopped"):
            await remote.host.restart(device)
        assert remote.host.failure is not None
        await remote.restart()
        await _circulates(remote, 4)


# Closing and cancellation


async def test_a_cancelled_restart_can_be_tried_again_with_the_same_device() -> None:
    async with _remote(4) as remote, remote.host.open_endpoint(NAME, rebind=True) as host:
        device = await remote.reboot()
        with trio.CancelScope() as scope:
            scope.cancel()
            await remote.host.restart(device)
        assert scope.cancelled_caught
        assert remote.host.failure is not None
        with pytest.raises(trio.BrokenResourceError):
            await host.receive()
        await remote.host.restart(device)
        await remote.meet()
        async with remote.bus.open_endpoint(NAME) as peer:
            await host.send(b"x")
            assert (await peer.receive()).payload == b"x"


async def test_closing_an_endpoint_while_the_bus_restarts() -> None:
    async with (
        _remote(1) as remote,
        remote.host.open_endpoint("a", rebind=True),
        remote.host.open_endpoint("b", rebind=True) as closed,
    ):
        device = await remote.reboot()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(remote.host.restart, device)
            await trio.lowlevel.checkpoint()
            closed.close()
        await remote.meet()
        await settle()
        assert [channel.name for channel in remote.bus.channels] == ["a"]


async def test_a_bus_closed_while_it_restarts_leaves_the_new_device_down() -> None:
    async with _remote() as remote:
        device = await remote.reboot()

        async def restart() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await remote.host.restart(device)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(restart)
            await trio.lowlevel.checkpoint()
            await remote.host.aclose()
        assert not device.is_up


async def test_a_hundred_restarts_leak_nothing() -> None:
    """Acceptance scenario 2 (SR#109, SR#56) over one bus."""
    async with _remote(2) as remote, remote.host.open_endpoint(NAME, rebind=True) as host:
        alive: list[weakref.ref[object]] = []
        descriptors = len(os.listdir("/proc/self/fd"))
        for turn in range(100):
            device = remote.processor.rpmsg_device()
            alive += [weakref.ref(device), weakref.ref(remote.bus), weakref.ref(remote.host.kick)]
            alive.append(weakref.ref(remote.host._sending))
            del device
            async with remote.bus.open_endpoint(NAME) as peer:
                await host.send(bytes((turn,)))
                assert (await peer.receive()).payload == bytes((turn,))
            del peer
            await remote.restart()
        assert len(os.listdir("/proc/self/fd")) == descriptors
        gc.collect()
        # Locals of the last turns may live still.
        assert sum(each() is not None for each in alive) <= 4
        assert remote.host.generation == 100
        # Each time it was announced, and answered its peer.
        assert remote.host.statistics.sent == host.statistics.sent + 101 + 100
        await _circulates(remote, 2)


# Sessions


@pytest.mark.parametrize("core", ["native", "process"])
async def test_a_peer_killed_in_mid_message_is_restarted(core: str) -> None:
    """Acceptance scenario 3 (OA#116) on cores that are processes, with a real SIGKILL."""
    with trio.fail_after(60):
        async with (
            open_session(core) as session,
            session.bus.open_endpoint(ECHO_CHANNEL, rebind=True, in_place=True) as endpoint,
        ):
            processor = session.processor
            assert processor is not None
            answers = 0
            for generation in range(3):
                await endpoint.wait_bound()
                await endpoint.send(b"first of %d" % generation)
                assert (await endpoint.receive()).payload == b"first of %d" % generation
                core_link = processor.core
                pid = getattr(core_link, "pid", None)
                assert isinstance(pid, int)
                causes: list[BaseException | None] = []

                async def flood(causes: list[BaseException | None] = causes) -> None:
                    with pytest.raises(trio.BrokenResourceError) as caught:
                        while True:
                            await endpoint.send_many([b"x" * 400] * 100)
                    causes.append(caught.value.__cause__)

                async def read(causes: list[BaseException | None] = causes, pid: int = pid) -> None:
                    count = 0
                    with pytest.raises(trio.BrokenResourceError) as caught:
                        while True:
                            message = await endpoint.receive()
                            assert message.payload == b"x" * 400
                            count += 1
                            if count == 500:
                                os.kill(pid, signal.SIGKILL)
                    causes.append(caught.value.__cause__)

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(flood)
                    nursery.start_soon(read)
                assert len(causes) == 2
                for cause in causes:
                    assert isinstance(cause, CoreCrashedError)
                    assert cause.signal is signal.SIGKILL
                answers = endpoint.statistics.received
                assert session.bus.statistics.held == 0
                await session.restart()
                assert session.bus.generation == generation + 1
            await endpoint.wait_bound()
            await endpoint.send(b"last")
            assert (await endpoint.receive()).payload == b"last"
            assert endpoint.statistics.received == answers + 1


async def test_a_peer_that_crashes_in_mid_message_is_restarted() -> None:
    """Acceptance scenario 3 (OA#116): it holds one message and builds another."""
    async with _remote(2) as remote, remote.host.open_endpoint(NAME, rebind=True) as host:
        for _ in range(3):
            async with remote.bus.open_endpoint(NAME, in_place=True) as peer:
                await peer.wait_bound()
                await settle()
                await host.send_many([b"held", b"queued"])
                with await peer.hold() as held, pytest.raises(trio.ClosedResourceError):
                    async with peer.reserve(4) as reservation:
                        reservation.view[:4] = b"half"
                        assert bytes(held.view) == b"held"
                        await remote.crash()
            with pytest.raises(trio.BrokenResourceError) as caught:
                await host.receive()
            assert isinstance(caught.value.__cause__, CoreCrashedError)
            await remote.restart()
            await _circulates(remote, 2)


async def test_sessions_restart_from_any_state(core: str) -> None:
    with trio.fail_after(30):
        async with (
            open_session(core) as session,
            session.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
        ):
            processor = session.processor
            assert processor is not None
            for number in range(4):
                await endpoint.wait_bound()
                await endpoint.send(bytes((number,)))
                assert (await endpoint.receive()).payload == bytes((number,))
                if number == 1:
                    shutdown = await session.shutdown(endpoint, grace=5)
                    assert shutdown.graceful
                elif number == 2:
                    await processor.stop()
                await session.restart()
            assert session.bus.generation == 4


async def test_a_peer_that_was_not_booted_here_cannot_be_restarted(open_pair: Any) -> None:
    async with open_pair() as pair:
        session = Session(pair.host, None)
        with pytest.raises(StateError, match="was not booted here"):
            await session.restart()
        assert pair.host.failure is None


async def test_an_image_that_is_none_can_be_followed_by_a_good_one() -> None:
    async with (
        open_session("loopback") as session,
        session.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
    ):
        await endpoint.wait_bound()
        with pytest.raises(FirmwareError):
            await session.restart(b"no ELF file")
        with pytest.raises(trio.BrokenResourceError):
            await endpoint.send(b"x")
        await session.restart()
        await endpoint.send(b"x")
        assert (await endpoint.receive()).payload == b"x"
        await session.restart(python_firmware())
        await endpoint.send(b"y")
        assert (await endpoint.receive()).payload == b"y"


async def test_a_restart_of_a_session_that_is_cancelled_can_be_tried_again() -> None:
    async with (
        open_session("loopback") as session,
        session.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
    ):
        for checkpoints in range(12):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.restart)
                for _ in range(checkpoints):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            await session.restart()
            with trio.fail_after(5):
                await endpoint.send(b"x")
                assert (await endpoint.receive()).payload == b"x"
