"""Watching services come and go, and endpoints that follow a service to where it goes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from links import NAME, make_table, settle

from openamp_py import (
    ADDRESS_ANY,
    Announcement,
    Bus,
    Channel,
    Endpoint,
    PeerGoneError,
    ServiceWatch,
)
from openamp_py.constants import NAME_SERVICE_ADDRESS
from openamp_py.rpmsg.watch import EVENT_LIMIT
from openamp_py.rpmsg.wire import encode_announcement


async def _seen(watch: ServiceWatch) -> list[Announcement]:
    """All that a watch has by now."""
    seen = []
    await settle()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                async for announcement in watch:
                    seen.append(announcement)

            nursery.start_soon(read)
            await settle()
            scope.cancel()
    return seen


@asynccontextmanager
async def _announcing(bus: Bus) -> AsyncIterator[Callable[..., Awaitable[None]]]:
    """Sends any announcement from a bus, also one that no endpoint makes."""
    async with bus.open_endpoint(destination=NAME_SERVICE_ADDRESS) as endpoint:

        async def announce(name: str, address: int, destroy: bool = False) -> None:
            await endpoint.send(encode_announcement(Announcement(Channel(name, address), destroy)))

        yield announce


def _came(name: str, address: int) -> Announcement:
    return Announcement(Channel(name, address))


def _went(name: str, address: int) -> Announcement:
    return Announcement(Channel(name, address), destroy=True)


# Watching


@pytest.mark.parametrize("host_watches", [True, False])
async def test_announcements_come_in_their_order(open_pair: Any, host_watches: bool) -> None:
    async with open_pair() as pair:
        watching, other = (pair.host, pair.remote) if host_watches else (pair.remote, pair.host)
        async with watching.open_watch() as watch:
            async with other.open_endpoint("one") as one:
                async with other.open_endpoint("two") as two:
                    pass
                async with other.open_endpoint("two", address=7):
                    assert await _seen(watch) == [
                        _came("one", one.address),
                        _came("two", two.address),
                        _went("two", two.address),
                        _came("two", 7),
                    ]
            assert await _seen(watch) == [_went("two", 7), _went("one", one.address)]
            assert await _seen(watch) == []
            assert watch.missed == 0


async def test_a_late_listener_is_told_what_is_in_force(open_pair: Any) -> None:
    """Acceptance scenario 4 (OA#376): the late one, for watch, `wait_service` and endpoint."""
    async with open_pair() as pair, pair.remote.open_endpoint("stays", address=2000):
        async with pair.remote.open_endpoint("goes"):
            pass
        async with pair.remote.open_endpoint("also stays", address=1500):
            await settle()
            async with pair.host.open_watch() as watch:
                expected = [_came("stays", 2000), _came("also stays", 1500)]
                assert await _seen(watch) == expected
                # And from then on what comes.
                async with pair.remote.open_endpoint("new", address=5):
                    assert await _seen(watch) == [_came("new", 5)]
            assert await pair.host.wait_service("stays") == Channel("stays", 2000)
            async with pair.host.open_endpoint("also stays") as endpoint:
                assert endpoint.destination == 1500


async def test_an_early_listener_hears_it_when_it_comes(open_pair: Any) -> None:
    """Acceptance scenario 4 (NX#17783): the early one, for watch, `wait_service` and endpoint."""
    async with (
        open_pair() as pair,
        pair.host.open_watch() as watch,
        pair.host.open_endpoint(NAME) as endpoint,
        trio.open_nursery() as nursery,
    ):
        heard: list[object] = []

        async def wait_service() -> None:
            heard.append(await pair.host.wait_service(NAME))

        async def wait_bound() -> None:
            await endpoint.wait_bound()
            heard.append("bound")

        async def see() -> None:
            async for announcement in watch:
                heard.append(announcement)
                return

        for task in (wait_service, wait_bound, see):
            nursery.start_soon(task)
        await settle()
        assert heard == []
        async with pair.remote.open_endpoint(NAME, address=9):
            await settle()
            assert len(heard) == 3
            for each in (Channel(NAME, 9), "bound", _came(NAME, 9)):
                assert each in heard


async def test_every_watch_sees_everything(open_pair: Any) -> None:
    async with open_pair() as pair, pair.host.open_watch() as one:
        async with pair.remote.open_endpoint("a", address=5), pair.host.open_watch() as other:
            await settle()
            async with pair.remote.open_endpoint("b", address=6):
                pass
            everything = [_came("a", 5), _came("b", 6), _went("b", 6)]
            assert await _seen(one) == everything
            async with pair.host.open_watch() as third:
                assert await _seen(third) == [_came("a", 5)]
            assert await _seen(other) == everything
        # The one that is closed hears nothing more, and the rest go on.
        assert await _seen(one) == [_went("a", 5)]


async def test_several_channels_of_one_name(open_pair: Any) -> None:
    async with (
        open_pair() as pair,
        pair.host.open_watch() as watch,
        _announcing(pair.remote) as announce,
    ):
        for address in (5, 6, 7):
            await announce(NAME, address)
        assert await _seen(watch) == [_came(NAME, address) for address in (5, 6, 7)]
        await announce(NAME, 6, destroy=True)
        assert await _seen(watch) == [_went(NAME, 6)]
        assert pair.host.channels == (Channel(NAME, 5), Channel(NAME, 7))
        assert await pair.host.wait_service(NAME) == Channel(NAME, 5)


async def test_what_is_refused_is_not_seen(open_pair: Any) -> None:
    async with (
        open_pair() as pair,
        pair.host.open_watch() as watch,
        _announcing(pair.remote) as announce,
        pair.remote.open_endpoint(destination=NAME_SERVICE_ADDRESS) as raw,
    ):
        await announce("unknown", 5, destroy=True)
        await announce("any", ADDRESS_ANY)
        await announce("name service", NAME_SERVICE_ADDRESS)
        await raw.send(b"")
        await raw.send(bytes(40))
        await raw.send(encode_announcement(_came("x", 5)) + b"x")
        assert await _seen(watch) == []
        assert pair.host.channels == ()
        assert pair.host.drops.bad_announcement == 6
        await announce("good", 5)
        assert await _seen(watch) == [_came("good", 5)]


async def test_a_watch_is_bounded_and_says_what_it_missed(open_pair: Any) -> None:
    async with (
        open_pair() as pair,
        _announcing(pair.remote) as announce,
    ):
        await announce("before", 5)
        await settle()
        async with pair.host.open_watch() as watch:
            rounds = EVENT_LIMIT // 2 + 10
            for _ in range(rounds):
                await announce(NAME, 6)
                await announce(NAME, 6, destroy=True)
                await pair.remote.rest()
            await settle()
            seen = await _seen(watch)
            # One more than the limit, because it began with one.
            assert watch.missed == 20
            assert len(seen) == EVENT_LIMIT + 1
            assert seen[-2:] == [_came(NAME, 6), _went(NAME, 6)]
            # Having caught up it misses nothing more.
            await announce(NAME, 6)
            assert await _seen(watch) == [_came(NAME, 6)]
            assert watch.missed == 20


async def test_a_cancelled_reader_loses_nothing(open_pair: Any) -> None:
    async with open_pair() as pair, pair.host.open_watch() as watch:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch.__anext__)
                await settle()
                async with _announcing(pair.remote) as announce:
                    await announce("a", 5)
                    scope.cancel()
        seen = await _seen(watch)
        assert seen in ([], [_came("a", 5)])
        with trio.CancelScope() as scope:
            scope.cancel()
            await watch.__anext__()
        assert scope.cancelled_caught
        async with _announcing(pair.remote) as announce:
            await announce("b", 6)
            await settle()
            with trio.CancelScope() as scope:
                scope.cancel()
                await watch.__anext__()
            assert scope.cancelled_caught
            assert await _seen(watch) == [_came("b", 6)]


# The end of a watch


async def _expect_end(
    watch: ServiceWatch, expected: type[Exception], seen: list[Announcement]
) -> BaseException | None:
    """What comes before the end, then the end, again and again. Returns its cause."""
    received: list[Announcement] = []
    for _ in range(2):
        with pytest.raises(expected) as caught:
            async for announcement in watch:
                received.append(announcement)
    assert received == seen
    return caught.value.__cause__


@pytest.mark.parametrize("how", ["watch", "bus", "failure", "reset"])
@pytest.mark.parametrize("waiting", [False, True])
async def test_a_watch_ends_when_all_was_seen(open_pair: Any, how: str, waiting: bool) -> None:
    cause = PeerGoneError("the remote is gone")
    async with open_pair() as pair, pair.remote.open_endpoint(NAME, address=9):
        await settle()
        bus = pair.remote if how == "reset" else pair.host
        if how == "reset":
            async with pair.host.open_endpoint("host's", address=8):
                pass
            await settle()
        expected = trio.ClosedResourceError if how in ("watch", "bus") else trio.BrokenResourceError
        announced = [] if how == "reset" else [_came(NAME, 9)]
        causes: list[BaseException | None] = []

        async def read() -> None:
            causes.append(await _expect_end(watch, expected, announced))

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                async with bus.open_watch() as watch:
                    if waiting:
                        nursery.start_soon(read)
                        await settle()
                        assert causes == []
                    if how == "bus":
                        await bus.aclose()
                    elif how == "failure":
                        pair.host_device.fail(cause)
                    elif how == "reset":
                        pair.host_device.end()
                    if how != "watch":
                        await settle()
                if not waiting:
                    await read()
        (found,) = causes
        if how == "failure":
            assert found is cause
        elif how == "reset":
            assert isinstance(found, PeerGoneError) and "reset the device" in str(found)
        else:
            assert found is None


@pytest.mark.parametrize("how", ["closed", "failed"])
async def test_what_is_over_cannot_be_watched(open_pair: Any, how: str) -> None:
    async with open_pair() as pair:
        if how == "closed":
            await pair.host.aclose()
            with pytest.raises(trio.ClosedResourceError):
                async with pair.host.open_watch():
                    raise AssertionError("not reached")
        else:
            cause = PeerGoneError("gone")
            pair.host_device.fail(cause)
            with pytest.raises(trio.BrokenResourceError) as caught:
                async with pair.host.open_watch():
                    raise AssertionError("not reached")
            assert caught.value.__cause__ is cause


async def test_a_link_that_ends_while_the_watch_is_opened(open_pair: Any) -> None:
    async with open_pair() as pair:

        async def watch() -> None:
            with pytest.raises(trio.ClosedResourceError):
                async with pair.host.open_watch() as opened:
                    await opened.__anext__()

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                nursery.start_soon(pair.host.aclose)


# Both sides at once


@pytest.mark.parametrize("polite", [False, True])
async def test_both_sides_announce_at_the_same_time(open_pair: Any, polite: bool) -> None:
    """Acceptance scenario 4 (NX#17783): simultaneous creation."""
    for turn in range(20):
        async with open_pair() as pair, trio.open_nursery() as nursery:
            echoed: list[bytes] = []
            barrier = trio.Event()

            async def one(
                bus: Bus,
                mine: bytes,
                delay: int,
                barrier: trio.Event = barrier,
                echoed: list[bytes] = echoed,
            ) -> None:
                await barrier.wait()
                for _ in range(delay):
                    await trio.lowlevel.checkpoint()
                async with bus.open_endpoint(NAME) as endpoint:
                    if polite:
                        await endpoint.wait_bound()
                    await endpoint.send(mine)
                    echoed.append((await endpoint.receive()).payload)
                    await settle()

            # Who is first differs by a few turns of trio.
            nursery.start_soon(one, pair.host, b"host", turn % 5)
            nursery.start_soon(one, pair.remote, b"remote", turn // 5)
            barrier.set()
            with trio.fail_after(5):
                while len(echoed) < 2:
                    await settle()
            assert sorted(echoed) == [b"host", b"remote"]


async def test_both_announce_many_at_once_and_every_one_finds_its_peer(open_pair: Any) -> None:
    async with open_pair(make_table(4)) as pair, trio.open_nursery() as nursery:
        pairs: list[tuple[str, int, int | None]] = []

        async def one(bus: Bus, name: str) -> None:
            async with bus.open_endpoint(name) as endpoint:
                await endpoint.wait_bound()
                pairs.append((name, endpoint.address, endpoint.destination))
                await trio.sleep_forever()

        names = [f"service {number}" for number in range(30)]
        for name in names:
            nursery.start_soon(one, pair.host, name)
        for name in reversed(names):
            nursery.start_soon(one, pair.remote, name)
        with trio.fail_after(10):
            while len(pairs) < 60:
                await settle()
        for name in names:
            (one_end, other_end) = [each[1:] for each in pairs if each[0] == name]
            assert one_end == other_end[::-1]
        nursery.cancel_scope.cancel()


# Endpoints that follow


@asynccontextmanager
async def _at(bus: Bus, address: int, **options: Any) -> AsyncIterator[Endpoint]:
    async with bus.open_endpoint(NAME, address=address, **options) as endpoint:
        await settle()
        yield endpoint


async def _fill(endpoint: Endpoint) -> int:
    count = 0
    while True:
        try:
            endpoint.send_nowait(b"fill")
        except trio.WouldBlock:
            return count
        count += 1
        await settle()


async def _moves(
    pair: Any, use: Callable[[Endpoint], Awaitable[None]], *, full: bool = False
) -> list[bytes]:
    """The peer goes to another address while `use` waits. Returns what it receives there."""
    received: list[bytes] = []
    with trio.fail_after(5):
        async with (
            pair.host.open_endpoint(NAME, rebind=True) as host,
            trio.open_nursery() as nursery,
        ):
            async with _at(pair.remote, 2000, queue_limit=1):
                await host.wait_bound()
                if full:
                    await _fill(host)
                    nursery.start_soon(use, host)
                    await settle()
            await settle()
            assert (host.is_bound, host.is_withdrawn) == (False, False)
            if not full:
                nursery.start_soon(use, host)
                await settle()
            async with _at(pair.remote, 3000) as moved:
                assert host.destination == 3000
                await moved.send(b"hello again")
                await settle()
                while moved.statistics.queued:
                    received += [message.payload for message in await moved.receive_many()]
                    await settle()
    assert pair.remote.statistics.held == pair.host.statistics.reserved == 0
    return received


async def _use_send(host: Endpoint) -> None:
    await host.send(b"precious")


async def _use_send_many(host: Endpoint) -> None:
    await host.send_many([b"precious", b"goods"])


async def _use_reserve(host: Endpoint) -> None:
    async with host.reserve(8) as reservation:
        reservation.view[:8] = b"precious"


@pytest.mark.parametrize(
    "use, full",
    [
        (_use_send, False),
        (_use_send, True),
        (_use_send_many, False),
        (_use_send_many, True),
        (_use_reserve, False),
        (_use_reserve, True),
    ],
)
async def test_what_waits_to_be_sent_goes_where_the_peer_went(
    open_pair: Any, use: Callable[[Endpoint], Awaitable[None]], full: bool
) -> None:
    async with open_pair(make_table(2)) as pair:
        received = await _moves(pair, use, full=full)
        assert received == ([b"precious", b"goods"] if use is _use_send_many else [b"precious"])
        unknown = pair.remote.drops.unknown_destination
        assert unknown == 0, "nothing was sent to where nobody is any more"


async def test_what_waits_to_receive_goes_on(open_pair: Any) -> None:
    async with open_pair() as pair:
        received: list[bytes] = []

        async def use(host: Endpoint) -> None:
            received.append((await host.receive()).payload)

        assert await _moves(pair, use) == []
        assert received == [b"hello again"]


async def test_iteration_goes_on(open_pair: Any) -> None:
    async with open_pair() as pair, pair.host.open_endpoint(NAME, rebind=True) as host:
        received: list[bytes] = []
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                async for message in host:
                    received.append(message.payload)

            nursery.start_soon(read)
            for address in (2000, 3000, 2000):
                async with _at(pair.remote, address) as remote:
                    await remote.wait_bound()
                    await remote.send(str(address).encode())
                    await settle()
            assert received == [b"2000", b"3000", b"2000"]
            nursery.cancel_scope.cancel()


async def test_wait_bound_waits_for_the_peer_to_be_back(open_pair: Any) -> None:
    async with open_pair() as pair:
        bound: list[int | None] = []

        async def use(host: Endpoint) -> None:
            await host.wait_bound()
            bound.append(host.destination)

        await _moves(pair, use)
        assert bound == [3000]


async def test_nowait_forms_would_block_meanwhile(open_pair: Any) -> None:
    async with open_pair() as pair, pair.host.open_endpoint(NAME, rebind=True) as host:
        async with _at(pair.remote, 2000):
            host.send_nowait(b"x")
        await settle()
        with pytest.raises(trio.WouldBlock, match="no peer"):
            host.send_nowait(b"x")
        with pytest.raises(trio.WouldBlock, match="no peer"):
            host.send_many_nowait([b"x"])
        with pytest.raises(trio.WouldBlock, match="no peer"), host.reserve_nowait():
            raise AssertionError("not reached")
        with pytest.raises(trio.WouldBlock):
            host.receive_nowait()


async def test_a_batch_goes_on_at_the_new_address_with_what_is_left(open_pair: Any) -> None:
    async with (
        open_pair(make_table(2)) as pair,
        pair.host.open_endpoint(NAME, rebind=True) as host,
        trio.open_nursery() as nursery,
    ):
        payloads = [bytes((number,)) for number in range(20)]
        received: list[bytes] = []
        async with _at(pair.remote, 2000, queue_limit=1) as remote:
            nursery.start_soon(host.send_many, payloads)
            while len(received) < 5:
                received += [(await remote.receive()).payload]
            await settle()
            lost = remote.statistics.queued
        await settle()
        assert host.statistics.sent == 5 + lost
        async with _at(pair.remote, 3000) as moved:
            with trio.fail_after(5):
                while len(received) < 20 - lost:
                    received += [(await moved.receive()).payload]
        assert received == payloads[:5] + payloads[5 + lost :]
        assert pair.remote.drops.unknown_destination == 0


async def test_without_rebind_a_withdrawn_channel_ends_what_waits(open_pair: Any) -> None:
    async with (
        open_pair(make_table(2)) as pair,
        pair.host.open_endpoint(NAME) as host,
        trio.open_nursery() as nursery,
    ):
        async with _at(pair.remote, 2000, queue_limit=1):
            await _fill(host)

            async def send(call: Callable[[], Awaitable[None]]) -> None:
                with pytest.raises(trio.BrokenResourceError, match="withdrew") as caught:
                    await call()
                assert isinstance(caught.value.__cause__, PeerGoneError)

            async def receive() -> None:
                with pytest.raises(trio.EndOfChannel):
                    await host.receive()

            nursery.start_soon(send, lambda: host.send(b"x"))
            nursery.start_soon(send, lambda: host.send_many([b"x", b"y"]))
            nursery.start_soon(send, lambda: _use_reserve(host))
            nursery.start_soon(receive)
            await settle()
        with trio.move_on_after(5):
            await settle()
    assert pair.remote.drops.unknown_destination == 0


async def test_a_withdrawal_wakes_who_waits_also_where_no_buffer_comes_back(
    open_pair: Any,
) -> None:
    async with (
        open_pair(make_table(2)) as pair,
        pair.host.open_endpoint(NAME) as host,
        _at(pair.remote, 2000, queue_limit=1),
        _announcing(pair.remote) as announce,
    ):
        await host.wait_bound()
        await settle()
        await _fill(host)
        errors: list[BaseException] = []

        async def send() -> None:
            with pytest.raises(trio.BrokenResourceError, match="withdrew") as caught:
                await host.send(b"x")
            errors.append(caught.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await settle()
            assert errors == []
            await announce(NAME, 2000, destroy=True)
            await settle()
            assert len(errors) == 1
            assert pair.remote.statistics.held == 2, "all buffers are still out"
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("rebind", [True, False])
async def test_the_next_of_its_name_takes_the_place_of_one_that_leaves(
    open_pair: Any, rebind: bool
) -> None:
    """Only where that was asked for: otherwise the channel has ended."""
    async with (
        open_pair() as pair,
        pair.host.open_endpoint(NAME, rebind=rebind) as host,
        _at(pair.remote, 2000),
        _at(pair.remote, 3000),
    ):
        assert host.destination == 2000
        pair.remote._endpoints[2000].close()
        async with _announcing(pair.remote) as announce:
            await announce(NAME, 2000, destroy=True)
            await settle()
        assert host.destination == (3000 if rebind else None)
        assert host.is_withdrawn == (not rebind)


async def test_the_one_that_is_followed_to_hears_of_it(open_pair: Any) -> None:
    """It was announced long before: the host acknowledges once it is its turn."""
    async with (
        open_pair() as pair,
        pair.host.open_endpoint(NAME, rebind=True) as host,
        _at(pair.remote, 2000) as first,
        _at(pair.remote, 3000) as second,
    ):
        assert (first.is_bound, second.is_bound) == (True, False)
        await first.aclose()
        with trio.fail_after(5):
            await second.wait_bound()
        assert second.destination == host.address


async def test_a_fixed_destination_is_not_followed(open_pair: Any) -> None:
    async with (
        open_pair() as pair,
        _at(pair.remote, 2000),
        pair.host.open_endpoint(NAME, destination=2000, rebind=True) as host,
    ):
        await settle()
        async with _announcing(pair.remote) as announce:
            await announce(NAME, 2000, destroy=True)
            await announce(NAME, 3000)
            await settle()
        assert host.destination == 2000


@pytest.mark.parametrize("host_first", [False, True])
async def test_either_role_follows(open_pair: Any, host_first: bool) -> None:
    async with open_pair() as pair:
        one, other = (pair.host, pair.remote) if host_first else (pair.remote, pair.host)
        async with one.open_endpoint(NAME, rebind=True) as endpoint:
            for address in (2000, 3000):
                async with _at(other, address) as peer:
                    if not host_first:
                        # A host's service is announced; the remote binds to it.
                        assert endpoint.destination == address
                    await peer.wait_bound()
                    await endpoint.send(b"x")
                    assert await peer.receive() == (b"x", endpoint.address)
                await settle()
                assert not endpoint.is_bound
