"""Endpoints that are read slowly or not at all: what they lose, and what they cost the others."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from links import NAME, make_table, settle

from openamp_py import (
    BusOptions,
    Drops,
    Endpoint,
    Link,
    LoopbackPlatform,
    WhenFull,
    open_bus,
    open_processor,
    open_resources,
)
from openamp_py.platforms.demo import python_firmware

DROPPING = (WhenFull.DROP_OLDEST, WhenFull.DROP_NEWEST)


@asynccontextmanager
async def _one_way(
    pair: Any, to_host: bool = False, address: int = 5, **options: Any
) -> AsyncIterator[tuple[Endpoint, Endpoint]]:
    """A sender, and the receiver at an agreed address that is opened with `options`."""
    one, other = (pair.remote, pair.host) if to_host else (pair.host, pair.remote)
    async with (
        other.open_endpoint(address=address, **options) as receiver,
        one.open_endpoint(destination=address) as sender,
    ):
        yield sender, receiver


async def _flood(sender: Endpoint, begin: int = 0) -> int:
    """Sends numbers until no buffer is free, also after a while. Returns the next number."""
    number = begin
    while True:
        try:
            sender.send_nowait(number.to_bytes(2, "little"))
        except trio.WouldBlock:
            return number
        number += 1
        await settle()


def _number(payload: bytes) -> int:
    return int.from_bytes(payload, "little")


async def _numbers(receiver: Endpoint) -> list[int]:
    """All that can be received at once."""
    found = []
    while True:
        await settle()
        try:
            found.append(_number(receiver.receive_nowait().payload))
        except trio.WouldBlock:
            return found


async def _circulates(sender: Endpoint, receiver: Endpoint, num: int) -> None:
    """All buffers of one direction can be had: none is lost."""
    await settle()
    for _ in range(3):
        for number in range(num):
            sender.send_nowait(bytes((number,)))
        with pytest.raises(trio.WouldBlock):
            sender.send_nowait(b"one too many")
        for number in range(num):
            assert (await receiver.receive()).payload == bytes((number,))
        await settle()


# Holding back


@pytest.mark.parametrize("to_host", [False, True])
@pytest.mark.parametrize("limit", [1, 3, 100])
async def test_held_back_are_the_limit_and_the_buffers(
    open_pair: Any, to_host: bool, limit: int
) -> None:
    async with (
        open_pair(make_table(8)) as pair,
        _one_way(pair, to_host, queue_limit=limit) as (sender, receiver),
    ):
        bus = pair.host if to_host else pair.remote
        count = await _flood(sender)
        assert count == limit + 8
        statistics = receiver.statistics
        assert (statistics.queued, statistics.held) == (limit + 8, 8)
        assert bus.statistics.held == 8
        assert await _numbers(receiver) == list(range(count))
        assert (receiver.statistics.dropped, bus.drops) == (0, Drops())
        assert bus.statistics.held == receiver.statistics.held == 0
        await _circulates(sender, receiver, 8)


async def test_a_burst_is_copied_up_to_one_batch_beyond_the_limit(open_pair: Any) -> None:
    async with open_pair() as pair, _one_way(pair, queue_limit=2) as (sender, receiver):
        sent = 0
        with pytest.raises(trio.WouldBlock):
            while True:
                numbers = range(sent, sent + 256)
                sent += sender.send_many_nowait([n.to_bytes(2, "little") for n in numbers])
                await settle()
        statistics = receiver.statistics
        assert statistics.held == 256
        assert 2 <= statistics.queued - statistics.held <= 2 + 64
        assert statistics.queued == sent
        assert await _numbers(receiver) == list(range(sent))


async def test_a_slow_reader_loses_nothing(open_pair: Any, autojump_clock: Any) -> None:
    """It takes one message in nearly each time of patience, and that is enough."""
    options = BusOptions(patience=1.0)
    async with (
        open_pair(make_table(2), options=options) as pair,
        _one_way(pair, queue_limit=1) as (sender, receiver),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(sender.send_many, [bytes((number,)) for number in range(40)])
        for number in range(40):
            await trio.sleep(0.9)
            assert (await receiver.receive()).payload == bytes((number,))
        assert (receiver.statistics.dropped, pair.remote.drops) == (0, Drops())


async def test_two_slow_readers_lose_nothing(open_pair: Any, autojump_clock: Any) -> None:
    async with (
        open_pair(make_table(2)) as pair,
        _one_way(pair, queue_limit=1) as (sender, receiver),
        _one_way(pair, address=6, queue_limit=1, in_place=True) as (other_sender, other),
        trio.open_nursery() as nursery,
    ):
        payloads = [bytes((number,)) for number in range(20)]
        nursery.start_soon(sender.send_many, payloads)
        nursery.start_soon(other_sender.send_many, payloads)

        async def read(endpoint: Endpoint) -> None:
            received = []
            for _ in payloads:
                await trio.sleep(0.6)
                received.append((await endpoint.receive()).payload)
            assert received == payloads

        nursery.start_soon(read, receiver)
        nursery.start_soon(read, other)
    assert pair.remote.drops == Drops()


# Dropping


@pytest.mark.parametrize("to_host, batch", [(False, True), (True, False)])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("when_full", DROPPING)
async def test_what_is_dropped_is_counted_and_never_holds_the_peer_back(
    open_pair: Any, when_full: WhenFull, batch: bool, in_place: bool, to_host: bool
) -> None:
    options: dict[str, Any] = {"queue_limit": 3, "when_full": when_full, "in_place": in_place}
    async with (
        open_pair(make_table(8)) as pair,
        _one_way(pair, to_host, **options) as (sender, receiver),
    ):
        bus = pair.host if to_host else pair.remote
        payloads = [bytes((number,)) for number in range(24)]
        if batch:
            for begin in range(0, 24, 4):
                assert sender.send_many_nowait(payloads[begin : begin + 4]) == 4
                await settle()
        else:
            for payload in payloads:
                sender.send_nowait(payload)
                await settle()
        statistics = receiver.statistics
        assert (statistics.received, statistics.queued, statistics.dropped) == (24, 3, 21)
        assert statistics.held == bus.statistics.held == (3 if in_place else 0)
        assert bus.drops == Drops(full=21)
        kept = [0, 1, 2] if when_full is WhenFull.DROP_NEWEST else [21, 22, 23]
        assert await _numbers(receiver) == kept
        # Once there is room, what comes is kept again.
        sender.send_nowait(b"\x63")
        assert await _numbers(receiver) == [0x63]
        assert bus.drops == Drops(full=21)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("when_full", DROPPING)
async def test_one_that_drops_loses_no_buffer(
    open_pair: Any, when_full: WhenFull, in_place: bool
) -> None:
    options: dict[str, Any] = {"queue_limit": 1, "when_full": when_full, "in_place": in_place}
    async with open_pair(make_table(4)) as pair:
        async with _one_way(pair, **options) as (sender, receiver):
            for number in range(50):
                sender.send_nowait(bytes((number,)))
                await settle()
            assert receiver.statistics.queued == 1
        async with _one_way(pair) as (sender, receiver):
            await _circulates(sender, receiver, 4)
        assert pair.remote.statistics.held == 0


async def test_no_reader_is_no_reason_to_drop_at_the_limit_itself(open_pair: Any) -> None:
    for when_full in DROPPING:
        async with (
            open_pair(make_table(8)) as pair,
            _one_way(pair, queue_limit=5, when_full=when_full) as (sender, receiver),
        ):
            for number in range(5):
                sender.send_nowait(bytes((number,)))
                await settle()
            assert receiver.statistics.dropped == 0
            assert await _numbers(receiver) == [0, 1, 2, 3, 4]


# Not read


@pytest.mark.parametrize("to_host", [False, True])
@pytest.mark.parametrize("patience", [0.0, 0.5, 60.0])
async def test_after_the_patience_others_and_the_name_service_go_on(
    open_pair: Any, autojump_clock: Any, patience: float, to_host: bool
) -> None:
    async with (
        open_pair(make_table(4), options=BusOptions(patience=patience)) as pair,
        _one_way(pair, to_host, queue_limit=3) as (sender, unread),
        _one_way(pair, to_host, address=6) as (other_sender, other),
    ):
        bus, sending = (pair.host, pair.remote) if to_host else (pair.remote, pair.host)
        begin = trio.current_time()
        for number in range(7):  # three copied, four held: that is all buffers
            sender.send_nowait(bytes((number,)))
            await settle()
        assert unread.statistics.held == (4 if patience else 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other_sender.send, b"other")
            async with sending.open_endpoint(NAME) as service:
                # The bus under test has heard of it: the name service works.
                channel = await bus.wait_service(NAME)
                assert channel.address == service.address
                assert (await other.receive()).payload == b"other"
        assert trio.current_time() - begin == pytest.approx(patience)
        statistics = unread.statistics
        assert (statistics.queued, statistics.held, statistics.dropped) == (3, 0, 4)
        assert bus.drops == Drops(unread=4)
        assert bus.statistics.held == 0
        assert await _numbers(unread) == [0, 1, 2]


async def test_one_that_is_still_not_read_loses_what_comes(
    open_pair: Any, autojump_clock: Any
) -> None:
    async with (
        open_pair(make_table(2)) as pair,
        _one_way(pair, queue_limit=1) as (sender, unread),
    ):
        await _flood(sender)
        await trio.sleep(2)
        for number in range(20):  # nothing of this is waited for
            sender.send_nowait(bytes((100 + number,)))
            await settle()
        assert unread.statistics.dropped == pair.remote.drops.unread == 2 + 20
        assert (unread.statistics.queued, unread.statistics.held) == (1, 0)
        assert pair.remote.drops.full == 0


@pytest.mark.parametrize("in_place", [False, True])
async def test_once_it_is_read_it_holds_back_again(
    open_pair: Any, autojump_clock: Any, in_place: bool
) -> None:
    async with (
        open_pair(make_table(4)) as pair,
        _one_way(pair, queue_limit=2, in_place=in_place) as (sender, receiver),
    ):
        copied = 0 if in_place else 2
        for turn in range(3):
            assert await _flood(sender) == copied + 4
            await trio.sleep(2.5)
            assert pair.remote.drops == Drops(unread=4 * (turn + 1))
            assert await _numbers(receiver) == list(range(copied))
            # Whoever looks, reads: also where nothing was there.
            with trio.move_on_after(0.01):
                await receiver.receive()
            assert await _flood(sender) == copied + 4
            assert await _numbers(receiver) == list(range(copied + 4))
        assert receiver.statistics.dropped == 12
        await _circulates(sender, receiver, 4)


@pytest.mark.parametrize("how", ["receive", "receive_many", "receive_nowait", "hold"])
async def test_any_way_to_read_makes_it_hold_back_again(
    open_pair: Any, autojump_clock: Any, how: str
) -> None:
    async with (
        open_pair(make_table(4)) as pair,
        _one_way(pair, queue_limit=4, in_place=how == "hold") as (sender, receiver),
    ):
        await _flood(sender)
        await trio.sleep(2.5)
        dropped = pair.remote.drops.unread
        assert dropped == 4
        if how == "receive_nowait":
            receiver.receive_nowait()
        else:
            with trio.move_on_after(0.01):  # nothing is left to hold
                await getattr(receiver, how)()
        with pytest.raises(trio.WouldBlock):
            for _ in range(20):
                sender.send_nowait(b"again")
                await settle()
        assert pair.remote.drops == Drops(unread=dropped)


@pytest.mark.parametrize("num, reserved", [(4, 1), (8, 4)])
async def test_patience_does_not_need_the_last_buffer(
    open_pair: Any, autojump_clock: Any, num: int, reserved: int
) -> None:
    """The peer builds messages in some buffers, or has lent fewer than there are entries."""
    async with (
        open_pair(make_table(num), options=BusOptions(patience=0.5)) as pair,
        _one_way(pair, queue_limit=1) as (sender, unread),
        contextlib.AsyncExitStack() as stack,
    ):
        building = [await stack.enter_async_context(sender.reserve(0)) for _ in range(reserved)]
        await _flood(sender)
        assert unread.statistics.held == num - reserved
        with trio.fail_after(0.6):
            async with pair.host.open_endpoint(NAME):
                assert pair.remote.drops == Drops(unread=num - reserved)
        for each in building:
            each.discard()


async def test_a_waiting_sender_of_an_unread_endpoint_goes_on_too(
    open_pair: Any, autojump_clock: Any
) -> None:
    async with (
        open_pair(make_table(2), options=BusOptions(patience=0.5)) as pair,
        _one_way(pair, queue_limit=1, in_place=True) as (sender, unread),
    ):
        await _flood(sender)
        with trio.fail_after(0.6):
            await sender.send(b"goes on")
        await settle()
        assert unread.statistics.dropped == 3
        assert unread.statistics.queued == pair.remote.statistics.held == 0


async def test_two_unread_in_place_endpoints_do_not_starve_the_link(
    open_pair: Any, autojump_clock: Any
) -> None:
    async with (
        open_pair(make_table(2), options=BusOptions(patience=0.5)) as pair,
        _one_way(pair, address=5, in_place=True) as (sender, one),
        _one_way(pair, address=6, in_place=True) as (_, other),
        _one_way(pair, address=7) as (_, third),
    ):
        await sender.send_to(b"1", 5)
        await sender.send_to(b"1", 6)
        await settle()
        with trio.fail_after(1):
            await sender.send_to(b"1", 7)
            await third.receive()
        assert one.statistics.dropped + other.statistics.dropped == pair.remote.drops.unread >= 1


@pytest.mark.parametrize("in_place", [False, True])
async def test_only_those_that_are_not_read_lose(
    open_pair: Any, autojump_clock: Any, in_place: bool
) -> None:
    async with (
        open_pair(make_table(4)) as pair,
        _one_way(pair, queue_limit=1, in_place=in_place) as (sender, unread),
        _one_way(pair, address=6, queue_limit=1, in_place=in_place) as (other_sender, read),
    ):
        copied = 0 if in_place else 1
        for _ in range(copied + 2):
            for each in (sender, other_sender):
                each.send_nowait(b"x")
                await settle()
        assert (unread.statistics.held, read.statistics.held) == (2, 2)
        await trio.sleep(0.5)
        await read.receive()
        other_sender.send_nowait(b"y")  # all buffers are out again
        await settle()
        await trio.sleep(0.75)
        assert unread.statistics.dropped == 2
        assert read.statistics.dropped == 0
        assert read.statistics.queued == copied + 2


async def test_one_that_is_read_in_time_is_not_given_up(
    open_pair: Any, autojump_clock: Any
) -> None:
    async with (
        open_pair(make_table(2)) as pair,
        _one_way(pair, queue_limit=1) as (sender, receiver),
    ):
        await _flood(sender)
        await trio.sleep(0.99)
        assert await _numbers(receiver) == [0, 1, 2]
        await trio.sleep(10)
        assert pair.remote.drops == Drops()


async def test_below_half_of_the_buffers_nobody_is_given_up(
    open_pair: Any, autojump_clock: Any
) -> None:
    async with (
        open_pair(make_table(8)) as pair,
        _one_way(pair, queue_limit=1, in_place=True) as (sender, receiver),
    ):
        for number in range(3):
            sender.send_nowait(bytes((number,)))
            await settle()
        await trio.sleep(100)
        assert await _numbers(receiver) == [0, 1, 2]
        assert pair.remote.drops == Drops()


async def test_endless_patience(open_pair: Any, autojump_clock: Any) -> None:
    async with (
        open_pair(make_table(2), options=BusOptions(patience=math.inf)) as pair,
        _one_way(pair, queue_limit=1) as (sender, receiver),
        _one_way(pair, address=6) as (other_sender, other),
    ):
        count = await _flood(sender)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other_sender.send, b"other")
            await trio.sleep(1e7)
            assert other.statistics.received == 0
            assert pair.remote.drops == Drops()
            assert await _numbers(receiver) == list(range(count))
            assert (await other.receive()).payload == b"other"


async def test_messages_in_hand_are_nobodys_to_drop(open_pair: Any, autojump_clock: Any) -> None:
    async with (
        open_pair(make_table(4)) as pair,
        _one_way(pair, in_place=True) as (sender, receiver),
    ):
        await _flood(sender)
        held = [receiver.hold_nowait() for _ in range(4)]
        await trio.sleep(10)
        assert [each.view[0] for each in held] == [0, 1, 2, 3]
        assert pair.remote.drops == Drops()
        held.pop().release()
        await settle()
        assert await _flood(sender, 4) == 5
        await trio.sleep(10)  # the last buffer is kept by a queued message: that one goes
        assert pair.remote.drops == Drops(unread=1)
        assert [each.view[0] for each in held] == [0, 1, 2]
        for each in held:
            each.release()
        with trio.move_on_after(0.01):
            await receiver.receive()
        await _circulates(sender, receiver, 4)


async def test_closing_it_is_in_time(open_pair: Any, autojump_clock: Any) -> None:
    async with open_pair(make_table(2)) as pair:
        async with _one_way(pair, queue_limit=1) as (sender, receiver):
            await _flood(sender)
            await trio.sleep(0.5)
            receiver.close()
            await trio.sleep(2)
            assert pair.remote.drops == Drops()
        async with _one_way(pair) as (sender, receiver):
            await _circulates(sender, receiver, 2)


async def test_the_patience_begins_anew_after_a_restart(autojump_clock: Any) -> None:
    async def talk(link: Link) -> None:
        async with (
            open_resources(link) as resources,
            open_bus(resources.rpmsg_device()) as bus,
            bus.open_endpoint(destination=5) as endpoint,
        ):
            await endpoint.send_many([b"x"] * 50)

    async with open_processor(LoopbackPlatform(talk)) as processor:
        await processor.boot(python_firmware(make_table(2)))
        async with (
            open_bus(processor.rpmsg_device()) as bus,
            bus.open_endpoint(address=5, queue_limit=1, rebind=True) as endpoint,
        ):
            await trio.sleep(0.9)
            assert (bus.drops.unread, endpoint.statistics.held) == (0, 2)
            await processor.shutdown()
            await processor.boot(python_firmware(make_table(2)))
            await bus.restart(processor.rpmsg_device())
            await trio.sleep(0.5)
            assert bus.drops.unread == 0
            await trio.sleep(2)
            assert bus.drops.unread > 0


async def test_it_is_told_once_who_is_not_read(
    open_pair: Any, autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "openamp_py.rpmsg.bus"):
        async with (
            open_pair(make_table(2)) as pair,
            _one_way(pair, queue_limit=1) as (sender, _unread),
        ):
            await _flood(sender)
            await trio.sleep(1.5)
            for _ in range(10):
                sender.send_nowait(b"x")
                await trio.sleep(1.5)
    about, count = (record.getMessage() for record in caplog.records)
    assert about == "<Endpoint  0x5 -> 0x400> keeps the link's buffers and is not read"
    assert count == "vdev0: dropped 2 messages: unread"


@pytest.mark.parametrize("patience", [-1e-9, -math.inf, math.nan])
def test_a_patience_that_cannot_be(patience: float) -> None:
    with pytest.raises(ValueError, match="0 s or more are possible"):
        BusOptions(patience=patience)
