"""Buses and endpoints of both roles on one link, and what a hostile remote can do to a host."""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, NamedTuple

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from links import NAME, make_table

import openamp_py
from openamp_py import (
    ADDRESS_ANY,
    Bus,
    BusOptions,
    Endpoint,
    Link,
    PeerGoneError,
    PlatformError,
    Role,
    VirtqueueError,
)
from openamp_py.constants import NAME_SERVICE_ADDRESS, RPMSG_F_NS, VIRTIO_RING_F_EVENT_IDX
from openamp_py.platforms.demo import TABLE, python_firmware
from openamp_py.rpmsg.name_service import ChannelRegistry
from openamp_py.rpmsg.wire import Announcement, Channel, encode_announcement
from openamp_py.virtio import Message, MessageRing


async def _settle() -> None:
    """Lets both sides handle what is under way."""
    await trio.testing.wait_all_tasks_blocked()


@asynccontextmanager
async def _bound(pair: Any, **options: Any) -> AsyncIterator[tuple[Endpoint, Endpoint]]:
    """An endpoint on each side, bound to each other."""
    async with (
        pair.remote.open_endpoint(NAME, **options) as remote,
        pair.host.open_endpoint(NAME, **options) as host,
    ):
        await host.wait_bound()
        await remote.wait_bound()
        yield host, remote


# Normal


async def test_messages_go_both_ways_whole_and_in_order(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        payloads = [b"", b"x", bytes(range(256)), b"y" * host.payload_limit]
        for one, other in ((host, remote), (remote, host)):
            for payload in payloads:
                await one.send(payload)
            for payload in payloads:
                message = await other.receive()
                assert message == (payload, one.address)


async def test_the_roles_are_the_devices(open_pair: Any) -> None:
    async with open_pair() as pair:
        assert (pair.host.role, pair.remote.role) == (Role.DRIVER, Role.DEVICE)
        assert pair.host_device.features == RPMSG_F_NS
        assert pair.host_device.status == 0xF


async def test_event_idx_is_used_when_the_remote_offers_it(open_pair: Any) -> None:
    table = make_table(num=4, features=RPMSG_F_NS | VIRTIO_RING_F_EVENT_IDX)
    async with open_pair(table) as pair, _bound(pair) as (host, remote):
        assert pair.remote_device.features == RPMSG_F_NS | VIRTIO_RING_F_EVENT_IDX
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_echo, remote)
            for number in range(300):
                payload = number.to_bytes(4, "little")
                await host.send(payload)
                assert (await host.receive()).payload == payload
            nursery.cancel_scope.cancel()


async def _echo(endpoint: Endpoint) -> None:
    async for message in endpoint:
        await endpoint.send_to(message.payload, message.source)


async def test_the_host_acknowledges_and_only_then_the_remote_is_bound(open_pair: Any) -> None:
    async with open_pair() as pair, pair.remote.open_endpoint(NAME) as remote:
        await _settle()
        assert pair.host.channels == (Channel(NAME, remote.address),)
        assert not remote.is_bound
        async with pair.host.open_endpoint(NAME) as host:
            assert host.destination == remote.address
            await remote.wait_bound()
            assert remote.destination == host.address


async def test_the_host_acknowledges_a_service_that_comes_later(open_pair: Any) -> None:
    async with open_pair() as pair, pair.host.open_endpoint(NAME) as host:
        await _settle()
        assert not host.is_bound
        async with pair.remote.open_endpoint(NAME) as remote:
            await host.wait_bound()
            await remote.wait_bound()


async def test_what_came_before_the_bus_was_up_is_not_lost() -> None:
    """The host is done with its announcement before the remote opens its bus."""
    host_is_done = trio.Event()
    bound: list[int | None] = []

    async def application(link: Link) -> None:
        async with openamp_py.open_resources(link) as resources:
            await host_is_done.wait()
            await _settle()
            async with (
                openamp_py.open_bus(resources.rpmsg_device()) as bus,
                bus.open_endpoint(NAME, announce=False) as endpoint,
            ):
                await endpoint.wait_bound()
                bound.append(endpoint.destination)

    with trio.fail_after(10):
        async with openamp_py.open_processor(openamp_py.LoopbackPlatform(application)) as processor:
            await processor.boot(python_firmware())
            async with (
                openamp_py.open_bus(processor.rpmsg_device()) as bus,
                bus.open_endpoint(NAME) as endpoint,
            ):
                host_is_done.set()
                await processor.wait_exit()
                assert bound == [endpoint.address]


async def test_a_peer_that_never_acknowledges_is_bound_by_its_first_message(open_pair: Any) -> None:
    async with (
        open_pair() as pair,
        pair.remote.open_endpoint(NAME) as remote,
        pair.host.open_endpoint(NAME, announce=False) as host,
    ):
        await host.wait_bound()
        await _settle()
        assert not remote.is_bound
        await host.send(b"hello")
        await remote.wait_bound()
        assert remote.destination == host.address
        assert await remote.receive() == (b"hello", host.address)


async def test_without_the_name_service_feature_nobody_announces(open_pair: Any) -> None:
    async with (
        open_pair(make_table(features=0)) as pair,
        pair.remote.open_endpoint(NAME, address=7) as remote,
        pair.host.open_endpoint(NAME, destination=7) as host,
    ):
        await host.send(b"static")
        assert await remote.receive() == (b"static", host.address)
        assert pair.host.channels == pair.remote.channels == ()
        assert pair.host.drops == pair.remote.drops == openamp_py.Drops()


async def test_wait_service_sees_early_and_late_announcements(open_pair: Any) -> None:
    async with open_pair() as pair, trio.open_nursery() as nursery:
        found: list[Channel] = []

        async def watch() -> None:
            found.append(await pair.host.wait_service(NAME))

        nursery.start_soon(watch)
        await _settle()
        async with pair.remote.open_endpoint(NAME) as remote:
            channel = await pair.host.wait_service(NAME)
            await _settle()
            assert found == [channel] == [Channel(NAME, remote.address)]


async def test_several_endpoints_of_one_name_find_a_peer_each(open_pair: Any) -> None:
    async with (
        open_pair() as pair,
        pair.remote.open_endpoint(NAME) as r1,
        pair.remote.open_endpoint(NAME) as r2,
        pair.host.open_endpoint(NAME) as h1,
        pair.host.open_endpoint(NAME) as h2,
    ):
        await h1.wait_bound()
        await h2.wait_bound()
        assert {h1.destination, h2.destination} == {r1.address, r2.address}


async def test_the_second_of_a_name_gets_the_peer_when_the_first_closes(open_pair: Any) -> None:
    async with (
        open_pair() as pair,
        pair.remote.open_endpoint(NAME) as remote,
        pair.host.open_endpoint(NAME) as first,
        pair.host.open_endpoint(NAME) as second,
    ):
        await _settle()
        assert (first.destination, second.destination) == (remote.address, None)
        await first.aclose()
        assert second.destination == remote.address


async def test_a_withdrawn_channel_ends_after_what_was_sent_and_can_come_back(
    open_pair: Any,
) -> None:
    async with open_pair() as pair, pair.host.open_endpoint(NAME) as host:
        async with pair.remote.open_endpoint(NAME) as remote:
            await remote.wait_bound()
            await remote.send(b"last words")
        await _settle()
        assert (await host.receive()).payload == b"last words"
        with pytest.raises(trio.EndOfChannel):
            await host.receive()
        assert [message async for message in host] == []
        with pytest.raises(trio.BrokenResourceError, match="withdrew"):
            await host.send(b"too late")
        with pytest.raises(trio.BrokenResourceError, match="withdrew"):
            host.send_nowait(b"too late")
        async with pair.remote.open_endpoint(NAME) as again:
            await host.wait_bound()
            await again.wait_bound()
            await host.send(b"hello again")
            assert (await again.receive()).payload == b"hello again"


async def test_send_before_bound_waits_and_send_nowait_would_block(open_pair: Any) -> None:
    async with open_pair() as pair, pair.host.open_endpoint(NAME) as host:
        with pytest.raises(trio.WouldBlock, match="no peer"):
            host.send_nowait(b"x")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.send, b"patience")
            await _settle()
            async with pair.remote.open_endpoint(NAME) as remote:
                assert (await remote.receive()).payload == b"patience"


async def test_bytearray_and_memoryview_are_payloads_too(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        await host.send(bytearray(b"ab"))
        await host.send(memoryview(b"cd"))
        assert [(await remote.receive()).payload for _ in range(2)] == [b"ab", b"cd"]


# Limits


@pytest.mark.parametrize("to_remote, to_host", [(64, 4096), (1024, 17), (65551, 512)])
async def test_buffer_sizes_differ_per_direction(
    open_pair: Any, to_remote: int, to_host: int
) -> None:
    async with (
        open_pair(make_table(num=2), to_remote=to_remote, to_host=to_host) as pair,
        pair.remote.open_endpoint(address=5, destination=6) as remote,
        pair.host.open_endpoint(address=6, destination=5) as host,
    ):
        assert (host.payload_limit, remote.payload_limit) == (to_remote - 16, to_host - 16)
        for one, other in ((host, remote), (remote, host)):
            await one.send(b"z" * one.payload_limit)
            assert (await other.receive()).payload == b"z" * one.payload_limit
            with pytest.raises(ValueError, match=f"the limit is {one.payload_limit} bytes"):
                await one.send(b"z" * (one.payload_limit + 1))


async def test_a_full_ring_holds_senders_back_and_loses_nothing(open_pair: Any) -> None:
    async with open_pair(make_table(num=4)) as pair, _bound(pair, queue_limit=2) as (host, remote):
        sent = 0
        with pytest.raises(trio.WouldBlock, match="no buffer"):
            for sent in range(100):
                host.send_nowait(sent.to_bytes(4, "little"))
                await _settle()
        # Two wait in the queue, four are held in their buffers.
        assert sent == 6
        async with trio.open_nursery() as nursery:
            for number in range(sent, sent + 5):
                nursery.start_soon(host.send, number.to_bytes(4, "little"))
                await _settle()
            numbers = [
                int.from_bytes((await remote.receive()).payload, "little") for _ in range(sent + 5)
            ]
        assert numbers == list(range(sent + 5))


async def test_both_sides_full_and_both_replying_do_not_deadlock(open_pair: Any) -> None:
    """open-amp#320, with two buffers each way."""
    async with open_pair(make_table(num=2)) as pair, _bound(pair, queue_limit=1) as (host, remote):
        handled = {host: 0, remote: 0}
        for endpoint in (host, remote):
            with pytest.raises(trio.WouldBlock):
                while True:
                    endpoint.send_nowait(b"fill")
                    await _settle()

        async def handle(endpoint: Endpoint, nursery: trio.Nursery) -> None:
            async for message in endpoint:
                await endpoint.send(message.payload)
                handled[endpoint] += 1
                if min(handled.values()) >= 100:
                    nursery.cancel_scope.cancel()

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for endpoint in (host, remote):
                    nursery.start_soon(handle, endpoint, nursery)


async def test_an_endpoint_that_is_not_read_keeps_its_messages_until_it_is(open_pair: Any) -> None:
    async with (
        open_pair() as pair,
        _bound(pair, queue_limit=8) as (host, remote),
        pair.remote.open_endpoint("other") as other,
        pair.host.open_endpoint("other") as host_other,
    ):
        await other.wait_bound()
        for number in range(100):
            await host.send(bytes((number,)))
        await host_other.send(b"not behind them")
        assert (await other.receive()).payload == b"not behind them"
        numbers = [(await remote.receive()).payload[0] for _ in range(100)]
        assert numbers == list(range(100))


async def test_closing_an_unread_endpoint_gives_its_buffers_back(
    open_pair: Any, autojump_clock: Any
) -> None:
    async with open_pair(make_table(num=4)) as pair:
        async with _bound(pair, queue_limit=1) as (host, _remote):
            for _ in range(5):
                host.send_nowait(b"unread")
                await _settle()
        async with _bound(pair) as (host, remote):
            for _ in range(8):
                await host.send(b"again")
                await remote.receive()


# Refusals


@pytest.mark.parametrize("name", ["", "n" * 32, "a\0b"])
async def test_open_endpoint_refuses_bad_names(open_pair: Any, name: str) -> None:
    async with open_pair() as pair:
        with pytest.raises(ValueError, match="channel name"):
            async with pair.host.open_endpoint(name):
                pass


async def test_open_endpoint_refuses_an_address_in_use(open_pair: Any) -> None:
    async with open_pair() as pair, pair.host.open_endpoint(address=99):
        with pytest.raises(ValueError, match="in use"):
            async with pair.host.open_endpoint(address=99):
                pass


async def test_open_endpoint_refuses_a_queue_without_room(open_pair: Any) -> None:
    async with open_pair() as pair:
        with pytest.raises(ValueError, match="queue_limit is 0"):
            async with pair.host.open_endpoint(queue_limit=0):
                pass


async def test_what_is_no_bytes_is_a_type_error(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, _):
        with pytest.raises(TypeError):
            await host.send("text")  # type: ignore[arg-type]


async def test_two_tasks_cannot_receive_on_one_endpoint(open_pair: Any) -> None:
    async with (
        open_pair() as pair,
        pair.host.open_endpoint(NAME) as host,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(host.receive)
        await _settle()
        with pytest.raises(trio.BusyResourceError):
            await host.receive()
        nursery.cancel_scope.cancel()


# Closing and cancellation


async def test_closed_endpoints_say_so_and_close_again(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, _remote):
        await host.aclose()
        await host.aclose()
        host.close()
        for call in (host.receive, host.wait_bound):
            with pytest.raises(trio.ClosedResourceError):
                await call()
        with pytest.raises(trio.ClosedResourceError):
            await host.send(b"x")
        with pytest.raises(trio.ClosedResourceError):
            host.receive_nowait()


async def test_an_endpoint_can_be_closed_while_a_task_receives(open_pair: Any) -> None:
    async with open_pair() as pair, pair.host.open_endpoint(NAME) as host:

        async def receive() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await host.receive()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await _settle()
            host.close()


async def test_two_who_close_an_endpoint_both_wait_for_the_withdrawal(open_pair: Any) -> None:
    async with (
        open_pair(make_table(num=4)) as pair,
        _bound(pair) as (host, remote),
        pair.remote.open_endpoint(address=77, queue_limit=1) as unread,
    ):
        with pytest.raises(trio.WouldBlock):
            while True:
                host.send_to_nowait(b"fill", unread.address)
                await _settle()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.aclose)
            nursery.start_soon(host.aclose)
            await _settle()
            assert len(nursery.child_tasks) == 2
            await unread.receive()
        await _settle()
        assert remote.is_withdrawn


async def test_an_endpoint_can_be_closed_by_its_own_receiver(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        await host.send(b"close yourself")
        await remote.receive()
        await remote.aclose()
        with pytest.raises(trio.EndOfChannel):
            await host.receive()


async def test_a_cancelled_receive_loses_no_message(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        received: list[bytes] = []
        for number in range(20):
            async with trio.open_nursery() as nursery:

                async def receive() -> None:
                    received.append((await remote.receive()).payload)

                nursery.start_soon(receive)
                await _settle()
                host.send_nowait(bytes((number,)))
                # Some are cancelled before the message wakes them, some after.
                for _ in range(number % 5):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        while len(received) < 20:
            received.append((await remote.receive()).payload)
        assert received == [bytes((number,)) for number in range(20)]
        with pytest.raises(trio.WouldBlock):
            remote.receive_nowait()


async def test_a_cancelled_send_sends_nothing_and_passes_its_turn_on(open_pair: Any) -> None:
    async with open_pair(make_table(num=1)) as pair, _bound(pair, queue_limit=1) as (host, remote):
        for payload in (b"1", b"2"):
            await host.send(payload)
            await _settle()
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(host.send, b"3")
                await _settle()
                scope.cancel()
                await host.send(b"never")
            assert scope.cancelled_caught
            received = [(await remote.receive()).payload for _ in range(3)]
        assert received == [b"1", b"2", b"3"]
        with pytest.raises(trio.WouldBlock):
            remote.receive_nowait()


async def test_the_end_of_the_remote_wakes_everyone_with_the_cause(open_pair: Any) -> None:
    async with open_pair(make_table(num=1)) as pair, _bound(pair, queue_limit=1) as (host, _remote):
        for _ in range(2):
            await host.send(b"fill")
            await _settle()
        errors: list[BaseException | None] = []

        async def fails(call: Any, *args: Any) -> None:
            with pytest.raises(trio.BrokenResourceError) as caught:
                await call(*args)
            errors.append(caught.value.__cause__)

        cause = PeerGoneError("the remote is gone")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, host.receive)
            nursery.start_soon(fails, host.send, b"x")
            nursery.start_soon(fails, host.send, b"y")
            nursery.start_soon(fails, pair.host.wait_service, "never")
            await _settle()
            pair.host_device.fail(cause)
        assert errors == [cause] * 4
        with pytest.raises(trio.BrokenResourceError):
            async with pair.host.open_endpoint("late"):
                pass


async def test_what_was_sent_before_the_end_is_still_received(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        for number in range(100):
            remote.send_nowait(bytes((number,)))
        pair.host_device.fail(PeerGoneError("gone"))
        assert [(await host.receive()).payload[0] for _ in range(100)] == list(range(100))
        with pytest.raises(trio.BrokenResourceError):
            await host.receive()


async def test_what_was_sent_before_a_fault_is_still_received(open_pair: Any) -> None:
    """An impossible chain in the same batch."""
    async with open_pair(make_table(num=8)) as pair, _bound(pair) as (host, remote):
        await _settle()
        for number in range(3):
            pair.remote._sending.send(remote.address, host.address, bytes((number,)))
        vring = pair.host_device.vrings[0]
        used = vring.da + vring.layout.used_offset
        memory = pair.host_device.memory.regions[0].view
        (index,) = struct.unpack_from("<H", memory, used + 2)
        struct.pack_into("<I", memory, used + 4 + 8 * (index % 8), 999)
        struct.pack_into("<H", memory, used + 2, index + 1)
        assert [(await host.receive()).payload[0] for _ in range(3)] == [0, 1, 2]
        with pytest.raises(trio.BrokenResourceError, match="999") as caught:
            await host.receive()
        assert isinstance(caught.value.__cause__, VirtqueueError)


@contextmanager
def _cannot_kick(device: openamp_py.VirtioDevice) -> Iterator[None]:
    def kick(_: int) -> None:
        raise OSError(errno.ENOBUFS, "no buffer space available")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_kick", kick)
        yield


async def test_a_failing_kick_for_returned_buffers_ends_the_link_after_what_came(
    open_pair: Any,
) -> None:
    async with open_pair(make_table(num=8)) as pair, _bound(pair) as (host, remote):
        await _settle()
        received: list[bytes] = []

        async def receive() -> None:
            with pytest.raises(trio.BrokenResourceError, match="cannot kick") as caught:
                while True:
                    received.append((await host.receive()).payload)
            assert isinstance(caught.value.__cause__, PlatformError)

        with trio.fail_after(5), _cannot_kick(pair.host_device):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await _settle()
                pair.remote._sending.want_buffer()
                # Without a kick, so that it is found when trio wakes.
                pair.remote._sending.send(remote.address, host.address, b"came")
        assert received == [b"came"]
        assert host.statistics.received == 1


async def test_a_failing_kick_for_a_message_ends_the_link(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, _remote):
        await _settle()
        with _cannot_kick(pair.host_device):
            await host.send(b"went")
        with pytest.raises(trio.BrokenResourceError, match="cannot kick") as caught:
            await host.send(b"did not")
        assert isinstance(caught.value.__cause__, PlatformError)
        assert isinstance(pair.host.failure, PlatformError)


async def test_a_bus_closes_also_where_kicks_fail(open_pair: Any) -> None:
    async with open_pair() as pair:
        with _cannot_kick(pair.host_device):
            await pair.host.aclose()
        assert pair.host_device.status == 0


async def _sleep(_: Link) -> None:
    await trio.sleep_forever()


async def _opened_within(passes: int, opening: AbstractAsyncContextManager[object]) -> bool:
    """Cancels an opening after so many passes of the scheduler. Returns whether it was done."""
    done = False

    async def open_and_stay() -> None:
        nonlocal done
        async with opening:
            done = True
            await trio.sleep_forever()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_and_stay)
            for _ in range(passes):
                await trio.lowlevel.cancel_shielded_checkpoint()
            nursery.cancel_scope.cancel()
    return done


async def test_a_host_whose_opening_is_cancelled_at_any_pass_leaves_the_device_down() -> None:
    for passes in itertools.count():
        async with openamp_py.open_processor(openamp_py.LoopbackPlatform(_sleep)) as processor:
            await processor.boot(python_firmware())
            device = processor.rpmsg_device()
            done = await _opened_within(passes, openamp_py.open_bus(device))
            assert (device.status, device.on_notify, device.on_failure) == (0, None, None)
            device.notified()
        if done:
            break
    assert passes > 1


async def test_a_remote_whose_opening_is_cancelled_at_any_pass_lets_go_of_the_device() -> None:
    links: list[Link] = []

    async def application(link: Link) -> None:
        links.append(link)
        await trio.sleep_forever()

    async with openamp_py.open_processor(openamp_py.LoopbackPlatform(application)) as processor:
        await processor.boot(python_firmware())
        await _settle()
        async with (
            openamp_py.open_bus(processor.rpmsg_device()),
            openamp_py.open_resources(links[0]) as resources,
        ):
            device = resources.rpmsg_device()
            for passes in itertools.count():
                done = await _opened_within(passes, openamp_py.open_bus(device))
                assert (device.on_notify, device.on_failure) == (None, None)
                device.notified()
                if done:
                    break
            assert passes > 1


async def test_a_session_whose_opening_is_cancelled_at_any_pass_leaves_nothing_behind() -> None:
    for passes in itertools.count():
        if await _opened_within(passes, openamp_py.open_session("loopback")):
            break
    assert passes > 5


async def test_what_was_sent_before_a_reset_is_still_received(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        for number in range(200):
            host.send_nowait(bytes((number,)))
        pair.host_device.end()
        await _settle()
        assert [(await remote.receive()).payload[0] for _ in range(200)] == list(range(200))


async def test_a_device_is_driven_once(open_pair: Any) -> None:
    async with open_pair() as pair:
        with pytest.raises(openamp_py.StateError, match="driven before"):
            async with openamp_py.open_bus(pair.host_device):
                pass


async def test_a_driver_that_comes_up_and_leaves_at_once_is_noticed() -> None:
    async def application(link: Link) -> None:
        async with openamp_py.open_resources(link) as resources:
            device = resources.rpmsg_device()
            device.on_notify = None
            while not device.poll_driver():
                await trio.lowlevel.checkpoint()
            device.fail(PeerGoneError("gone"))
            with pytest.raises(trio.BrokenResourceError):
                async with openamp_py.open_bus(device) as bus, bus.open_endpoint("x"):
                    pass

    with trio.fail_after(10):
        async with openamp_py.open_processor(openamp_py.LoopbackPlatform(application)) as processor:
            await processor.boot(python_firmware())
            async with openamp_py.open_bus(processor.rpmsg_device()):
                await processor.wait_exit()


async def test_a_withdrawal_follows_also_an_announcement_that_was_cancelled() -> None:
    """All buffers are out; the answer to a CREATE goes out, then the announcement is cancelled."""
    async with _raw_remote() as (bus, remote, _), bus.open_endpoint(destination=5) as other:
        with pytest.raises(trio.WouldBlock):
            while True:
                other.send_nowait(b"fill")
        async with trio.open_nursery() as nursery:

            async def announce() -> None:
                async with bus.open_endpoint("echo"):
                    await trio.sleep_forever()

            nursery.start_soon(announce)
            await _settle()
            announcement = encode_announcement(Announcement(Channel("echo", 9)))
            remote.send(9, NAME_SERVICE_ADDRESS, announcement)
            await _settle()
            held = [head for _, _, head, _ in remote.hold()]
            remote.release(held[:1])
            await _settle()
            nursery.cancel_scope.cancel()
            remote.release(held[1:])
        names = []
        for _ in range(10):
            names += [m for m in remote.received() if m[1] == NAME_SERVICE_ADDRESS]
            remote._kick(1)
            await _settle()
        flags = [m[3][36] for m in names]
        assert flags == [0, 1], "who was told of it is told of its end"


async def test_a_reset_by_the_host_is_seen_by_the_remote(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(trio.BrokenResourceError, match="reset the device"):
                    await remote.receive()

            nursery.start_soon(receive)
            await _settle()
            pair.host_device.end()
        assert isinstance(pair.remote.failure, PeerGoneError)
        del host


async def test_closing_an_endpoint_wakes_who_sends_on_it(open_pair: Any) -> None:
    async with open_pair(make_table(num=1)) as pair, _bound(pair, queue_limit=1) as (host, _remote):
        for _ in range(2):
            await host.send(b"fill")
            await _settle()

        async def send() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await host.send(b"stuck")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await _settle()
            host.close()


async def test_a_second_receiver_is_refused_also_while_the_first_is_being_woken(
    open_pair: Any,
) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        received: list[bytes] = []

        async def receive() -> None:
            received.append((await host.receive()).payload)

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await _settle()
                host.deliver([Message(b"first", remote.address)], len(b"first"))
                assert host.receive_nowait().payload == b"first"
                with pytest.raises(trio.BusyResourceError):
                    await host.receive()
                await remote.send(b"second")
        assert received == [b"second"]


async def test_a_send_that_waits_for_a_peer_ends_when_the_channel_is_withdrawn() -> None:
    """CREATE and DESTROY in one batch: the peer was there and is gone."""
    async with _raw_remote() as (bus, remote, _), bus.open_endpoint("echo") as endpoint:

        async def send() -> None:
            with pytest.raises(trio.BrokenResourceError, match="withdrew") as caught:
                await endpoint.send(b"x")
            assert isinstance(caught.value.__cause__, PeerGoneError)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await _settle()
            for destroy in (False, True):
                announcement = Announcement(Channel("echo", 9), destroy)
                remote.send(9, NAME_SERVICE_ADDRESS, encode_announcement(announcement))
            await _settle()


@pytest.mark.parametrize("destination", [-1, ADDRESS_ANY, 1 << 32])
async def test_destinations_that_cannot_be(open_pair: Any, destination: int) -> None:
    async with open_pair() as pair, pair.host.open_endpoint() as endpoint:
        with pytest.raises(ValueError, match=r"destination .* is not possible"):
            await endpoint.send_to(b"", destination)


async def test_the_counts_can_be_read_when_all_is_over(open_pair: Any) -> None:
    async with open_pair() as pair:
        pass
    assert pair.host.drops == openamp_py.Drops()


async def test_a_buffer_that_is_too_small_is_the_peers_fault(open_pair: Any) -> None:
    """The host lends 64 bytes where the remote was told of 512."""
    send, receive = trio.open_memory_channel[BaseException | None](1)

    async def application(link: Link) -> None:
        async with (
            openamp_py.open_resources(link) as resources,
            openamp_py.open_bus(resources.rpmsg_device()) as bus,
            bus.open_endpoint(destination=5) as endpoint,
        ):
            await endpoint.send(bytes(48))
            with pytest.raises(trio.BrokenResourceError) as caught:
                await endpoint.send(bytes(49))
            await send.send(caught.value.__cause__)

    async with openamp_py.open_processor(openamp_py.LoopbackPlatform(application)) as processor:
        await processor.boot(python_firmware())
        device = processor.rpmsg_device()
        async with openamp_py.open_bus(device, BusOptions(receive_buffer_size=64)):
            error = await receive.receive()
    assert isinstance(error, openamp_py.PeerError)
    assert "too small for 49 bytes" in str(error)


async def test_what_a_device_accepted_cannot_be_taken_back(open_pair: Any) -> None:
    async with open_pair() as pair:
        features = pair.host_device.features
        memory = pair.host_device.memory.find_da(36, 4)
        assert memory is not None
        memory[:] = bytes(4)
        assert pair.host_device.features == pair.remote_device.features == features


# A hostile remote


class Received(NamedTuple):
    """One message that the host sent."""

    source: int
    destination: int
    head: int
    payload: bytes


class _RawRemote:
    """The device's end of the rings, to send any bytes."""

    def __init__(self, sending: MessageRing, receiving: MessageRing, kick: Any) -> None:
        self._sending = sending
        self._receiving = receiving
        self._kick = kick

    def send(self, source: int, destination: int, payload: bytes) -> None:
        while self._sending.send(source, destination, payload) < 0:
            raise AssertionError("the host's buffers are all out")
        self._kick(0)

    def received(self) -> list[Received]:
        return self._receive(give_back=True)

    def hold(self) -> list[Received]:
        return self._receive(give_back=False)

    def _receive(self, *, give_back: bool) -> list[Received]:
        arrivals, _, _ = self._receiving.receive(give_back=give_back)
        return [
            Received(message.source, arrival.destination, arrival.head, message.payload)
            for arrival in arrivals
            for message in arrival.messages
        ]

    def release(self, heads: list[int]) -> None:
        self._receiving.release(heads)
        self._kick(1)


@asynccontextmanager
async def _raw_remote() -> AsyncIterator[tuple[Bus, _RawRemote, openamp_py.VirtioDevice]]:
    """A host's bus whose remote is this test."""
    send, receive = trio.open_memory_channel[_RawRemote](1)

    async def application(link: Link) -> None:
        async with openamp_py.open_resources(link) as resources:
            device = resources.rpmsg_device()
            while not device.poll_driver():
                await trio.lowlevel.checkpoint()
            to_host, to_remote = device.open_queue(0), device.open_queue(1)
            sending = MessageRing(to_host, sender=True, buffer_size=512)
            receiving = MessageRing(to_remote, sender=False, buffer_size=512)
            try:
                await send.send(_RawRemote(sending, receiving, device.kick))
                await trio.sleep_forever()
            finally:
                sending.close()
                receiving.close()

    async with openamp_py.open_processor(openamp_py.LoopbackPlatform(application)) as processor:
        await processor.boot(python_firmware(TABLE))
        device = processor.rpmsg_device()
        async with openamp_py.open_bus(device) as bus:
            yield bus, await receive.receive(), device


async def _announce(
    remote: _RawRemote, address: int, *, destroy: bool = False, name: str = "echo"
) -> None:
    announcement = Announcement(Channel(name, address), destroy)
    remote.send(address, NAME_SERVICE_ADDRESS, encode_announcement(announcement))
    await _settle()


async def test_messages_for_nobody_are_counted_and_their_buffers_returned() -> None:
    async with _raw_remote() as (bus, remote, _):
        for _ in range(600):
            remote.send(1, 4711, b"lost?")
            await _settle()
        assert bus.drops.unknown_destination == 600


async def test_malformed_announcements_are_counted() -> None:
    """Acceptance scenario 7 (OA#349): names that are none, and messages of a wrong length."""
    good = encode_announcement(Announcement(Channel("ok", 1024)))
    async with _raw_remote() as (bus, remote, _):
        for payload in (b"", good[:10], good + b"x", b"\0" * 40, good[:32] + b"\xff" * 8):
            remote.send(1024, NAME_SERVICE_ADDRESS, payload)
            await _settle()
        assert bus.drops.bad_announcement == 5
        remote.send(1024, NAME_SERVICE_ADDRESS, good)
        await _settle()
        assert bus.channels == (Channel("ok", 1024),)


async def test_a_flood_of_announcements_ends_at_the_limit() -> None:
    async with _raw_remote() as (bus, remote, _), bus.open_endpoint("echo") as endpoint:
        for number in range(1500):
            name = f"flood-{number}"
            announcement = encode_announcement(Announcement(Channel(name, 2000 + number)))
            remote.send(1, NAME_SERVICE_ADDRESS, announcement)
            await _settle()
        assert len(bus.channels) == 1024
        assert bus.drops.bad_announcement == 1500 - 1024
        remote.send(9, endpoint.address, b"still here")
        assert (await endpoint.receive()).payload == b"still here"


async def test_what_is_announced_again_binds_no_second_endpoint() -> None:
    async with _raw_remote() as (bus, remote, _), bus.open_endpoint("echo") as one:
        await _announce(remote, 2000)
        async with bus.open_endpoint("echo") as other:
            await _announce(remote, 3000)
            assert (one.destination, other.destination) == (2000, 3000)
            await _announce(remote, 2000, destroy=True)
            await _announce(remote, 3000)
            assert (one.destination, other.destination) == (None, 3000)


async def test_an_announcement_over_the_limit_binds_nobody() -> None:
    async with _raw_remote() as (bus, remote, _), bus.open_endpoint("echo") as endpoint:
        bus._name_service._registry = ChannelRegistry(limit=1)
        await _announce(remote, 2000, name="first")
        await _announce(remote, 3000)
        assert not endpoint.is_bound
        assert (bus.drops.bad_announcement, len(bus.channels)) == (1, 1)


async def test_only_who_was_announced_or_is_bound_can_be_withdrawn() -> None:
    async with (
        _raw_remote() as (bus, remote, _),
        bus.open_endpoint("echo", announce=False) as endpoint,
    ):
        remote.send(9, endpoint.address, b"never announced")
        assert (await endpoint.receive()).source == 9
        await _announce(remote, 10, destroy=True)
        assert (endpoint.destination, bus.drops.bad_announcement) == (9, 1)
        await _announce(remote, 9, destroy=True)
        assert (endpoint.is_withdrawn, bus.drops.bad_announcement) == (True, 1)


async def test_the_acknowledgement_is_an_announcement_of_the_host() -> None:
    async with _raw_remote() as (bus, remote, _), bus.open_endpoint("echo") as endpoint:
        remote.received()
        remote.send(9, NAME_SERVICE_ADDRESS, encode_announcement(Announcement(Channel("echo", 9))))
        await _settle()
        expected = encode_announcement(Announcement(Channel("echo", endpoint.address)))
        assert [(m[0], m[1], m[3]) for m in remote.received()] == [
            (endpoint.address, NAME_SERVICE_ADDRESS, expected)
        ]


async def test_a_remote_that_repeats_itself_and_takes_nothing_costs_one_answer() -> None:
    async with _raw_remote() as (bus, remote, _), bus.open_endpoint("echo") as endpoint:
        announcement = encode_announcement(Announcement(Channel("echo", 9)))
        async with bus.open_endpoint(destination=5) as other:
            with pytest.raises(trio.WouldBlock):
                while True:
                    other.send_nowait(b"fill")
            for _ in range(500):
                remote.send(9, NAME_SERVICE_ADDRESS, announcement)
                await _settle()
        answers = []
        for _ in range(10):
            answers += [m for m in remote.received() if m[1] == NAME_SERVICE_ADDRESS]
            remote._kick(1)
            await _settle()
        assert [m[0] for m in answers] == [endpoint.address] * 2, "its announcement and one answer"


async def test_a_closed_endpoint_is_not_announced_any_more() -> None:
    async with _raw_remote() as (bus, remote, _), bus.open_endpoint(destination=5) as other:
        async with bus.open_endpoint("echo"):
            with pytest.raises(trio.WouldBlock):
                while True:
                    other.send_nowait(b"fill")
            announcement = encode_announcement(Announcement(Channel("echo", 9)))
            remote.send(9, NAME_SERVICE_ADDRESS, announcement)
            await _settle()
            bus._endpoints[1025].close()
        names = []
        for _ in range(10):
            names += [m for m in remote.received() if m[1] == NAME_SERVICE_ADDRESS]
            remote._kick(1)
            await _settle()
        assert len(names) == 1, "only the announcement from before"


async def test_acknowledgements_wait_for_buffers_and_are_not_lost() -> None:
    """The remote announces while it holds every buffer of the host."""
    async with (
        _raw_remote() as (bus, remote, _),
        bus.open_endpoint("echo") as endpoint,
        bus.open_endpoint(destination=5) as other,
    ):
        for _ in range(255):
            other.send_nowait(b"fill")
        with pytest.raises(trio.WouldBlock):
            other.send_nowait(b"one too many")
        remote.send(9, NAME_SERVICE_ADDRESS, encode_announcement(Announcement(Channel("echo", 9))))
        await _settle()
        assert endpoint.destination == 9
        messages = []
        while batch := remote.received():
            messages += batch
            remote._kick(1)
            await _settle()
        assert messages[-1][0] == endpoint.address and messages[-1][1] == NAME_SERVICE_ADDRESS


async def test_an_impossible_index_breaks_the_bus_with_the_reason() -> None:
    """Acceptance scenario 7 (OA#696): the used index jumps."""
    async with _raw_remote() as (bus, _remote, device), bus.open_endpoint("echo") as endpoint:
        used_index = 0x6000 + 2
        memory = device.memory.find_da(used_index, 2)
        assert memory is not None
        memory[:] = struct.pack("<H", 300)
        with pytest.raises(trio.BrokenResourceError, match="jumped by 300 entries") as caught:
            await endpoint.receive()
        assert isinstance(caught.value.__cause__, VirtqueueError)


async def test_a_device_whose_ring_broke_is_reset_all_the_same() -> None:
    """The remote must hear of it: its own end is well."""
    async with _raw_remote() as (bus, _remote, device), bus.open_endpoint("echo") as endpoint:
        memory = device.memory.find_da(0x6000 + 2, 2)
        assert memory is not None
        memory[:] = struct.pack("<H", 300)
        with pytest.raises(trio.BrokenResourceError, match="jumped by 300 entries"):
            await endpoint.receive()
        assert device.status == 0xF
        await bus.aclose()
        assert device.status == 0


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    messages=st.lists(
        st.tuples(
            st.sampled_from([0, 9, 53, 1024, ADDRESS_ANY]),
            st.sampled_from([0, 53, 1024, 1025, ADDRESS_ANY]),
            st.one_of(st.binary(max_size=60), st.binary(min_size=40, max_size=40)),
        ),
        max_size=40,
    )
)
def test_any_messages_are_delivered_or_counted(messages: list[tuple[int, int, bytes]]) -> None:
    async def main() -> None:
        async with _raw_remote() as (bus, remote, _), bus.open_endpoint("echo") as endpoint:
            for message in messages:
                remote.send(*message)
                await _settle()
            from_nobody = sum(s == ADDRESS_ANY for s, _, _ in messages)
            messages_from_somebody = [m for m in messages if m[0] != ADDRESS_ANY]
            delivered = 0
            while True:
                try:
                    received = endpoint.receive_nowait()
                except (trio.WouldBlock, trio.EndOfChannel):
                    break
                assert tuple(received) in [(p, s) for s, d, p in messages if d == endpoint.address]
                delivered += 1
            destinations = [d for _, d, _ in messages_from_somebody]
            assert delivered == destinations.count(endpoint.address)
            to_names = destinations.count(NAME_SERVICE_ADDRESS)
            assert bus.drops.unknown_destination == len(destinations) - delivered - to_names
            assert bus.drops.bad_source == from_nobody
            assert bus.failure is None

    trio.run(main)
