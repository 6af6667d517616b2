"""The ways to receive: in batches, by a handler, and in the shared buffer."""

from __future__ import annotations

import contextlib
import math
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from links import NAME, make_table, settle

from openamp_py import (
    Bus,
    Drops,
    Endpoint,
    HeldMessage,
    Link,
    LoopbackPlatform,
    Message,
    PeerGoneError,
    Role,
    StateError,
    VirtioDevice,
    WhenFull,
    open_bus,
    open_processor,
    open_resources,
)
from openamp_py.constants import RPMSG_F_NS
from openamp_py.platforms.demo import python_firmware


@asynccontextmanager
async def _bound(pair: Any, **options: Any) -> AsyncIterator[tuple[Endpoint, Endpoint]]:
    """An endpoint on each side, bound to each other."""
    async with (
        pair.remote.open_endpoint(NAME, **options) as remote,
        pair.host.open_endpoint(NAME, **options) as host,
    ):
        await host.wait_bound()
        await remote.wait_bound()
        await settle()  # the buffers of the announcements are back
        yield host, remote


async def _numbers(sender: Endpoint, count: int) -> None:
    for number in range(count):
        await sender.send(bytes((number,)))
    await settle()


def _first(messages: list[Message]) -> list[int]:
    return [message.payload[0] for message in messages]


async def _circulates(sender: Endpoint, receiver: Endpoint, num: int) -> None:
    """All buffers of one direction can be had: none is lost."""
    await settle()
    for _ in range(2):
        for number in range(num):
            sender.send_nowait(bytes((number,)))
        with pytest.raises(trio.WouldBlock):
            sender.send_nowait(b"one too many")
        await settle()
        for number in range(num):
            assert receiver.receive_nowait().payload == bytes((number,))
        await settle()


# Batches


@pytest.mark.parametrize("in_place", [False, True])
async def test_receive_many_returns_what_is_there_in_order(open_pair: Any, in_place: bool) -> None:
    async with open_pair() as pair, _bound(pair, in_place=in_place) as (host, remote):
        await _numbers(host, 10)
        assert _first(await remote.receive_many(3)) == [0, 1, 2]
        assert remote.statistics.queued == 7
        assert _first(await remote.receive_many(1)) == [3]
        assert _first(await remote.receive_many(6)) == [4, 5, 6, 7, 8, 9]
        await _numbers(host, 5)
        assert _first(await remote.receive_many(100)) == [0, 1, 2, 3, 4]
        await _numbers(host, 5)
        messages = await remote.receive_many()
        assert messages == [Message(bytes((n,)), host.address) for n in range(5)]
        assert remote.statistics.queued == remote.statistics.held == 0


async def test_receive_many_waits_for_the_first(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        batches: list[list[Message]] = []

        async def receive() -> None:
            batches.append(await remote.receive_many(5))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await settle()
            assert batches == []
            for call in (remote.receive_many, remote.receive):
                with pytest.raises(trio.BusyResourceError), trio.fail_after(5):
                    await call()
            host.send_many_nowait([b"a", b"b"])
        assert [m.payload for m in batches[0]] == [b"a", b"b"]


async def test_receive_many_of_one_that_holds_back_lets_the_peer_go_on(open_pair: Any) -> None:
    async with open_pair(make_table(2)) as pair, _bound(pair, queue_limit=1) as (host, remote):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.send_many, [bytes((n,)) for n in range(50)])
            received: list[int] = []
            with trio.fail_after(10):
                while len(received) < 50:
                    received += _first(await remote.receive_many(2))
        assert received == list(range(50))
        assert remote.statistics.held == 0
        await _circulates(host, remote, 2)


@pytest.mark.parametrize("limit", [0, -1])
async def test_limits_that_cannot_be(open_pair: Any, limit: int) -> None:
    async with open_pair() as pair, _bound(pair) as (_host, remote):
        with pytest.raises(ValueError, match=f"limit of {limit} messages"):
            await remote.receive_many(limit)
        with pytest.raises(ValueError, match=f"concurrency of {limit}"):
            await remote.serve(_ignore, concurrency=limit)


async def _ignore(message: Message) -> None:
    pass


async def test_a_cancelled_receive_loses_nothing(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair, in_place=True) as (host, remote):
        for call in (remote.receive, remote.receive_many, remote.hold):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                await settle()
                nursery.cancel_scope.cancel()
            await _numbers(host, 3)
            with trio.CancelScope() as scope:
                scope.cancel()
                await call()
            assert scope.cancelled_caught
            assert _first(await remote.receive_many()) == [0, 1, 2]


# Handlers


async def test_serve_handles_one_after_another_in_order(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        handled: list[int] = []
        running = 0

        async def handle(message: Message) -> None:
            nonlocal running
            running += 1
            assert running == 1
            for _ in range(message.payload[0] % 3):
                await trio.lowlevel.checkpoint()
            handled.append(message.payload[0])
            running -= 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(remote.serve, handle)
            await _numbers(host, 20)
            nursery.cancel_scope.cancel()
        assert handled == list(range(20))


async def test_serve_begins_in_order_and_runs_so_many_at_once(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        begun: list[int] = []
        gates = [trio.Event() for _ in range(8)]
        ended: list[int] = []

        async def handle(message: Message) -> None:
            number = message.payload[0]
            begun.append(number)
            await gates[number].wait()
            ended.append(number)

        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                await remote.serve(handle, concurrency=3)

            nursery.start_soon(serve)
            await _numbers(host, 8)
            assert begun == [0, 1, 2]
            gates[1].set()
            await settle()
            assert begun == [0, 1, 2, 3]
            gates[3].set()
            gates[0].set()
            await settle()
            assert begun == [0, 1, 2, 3, 4, 5]
            assert ended[0] == 1 and sorted(ended) == [0, 1, 3]
            for gate in gates:
                gate.set()
            await settle()
            assert begun == list(range(8)) and sorted(ended) == begun
            remote.close()


@pytest.mark.parametrize("concurrency", [2, 5])
async def test_what_a_handler_raises_ends_serve_as_it_is(open_pair: Any, concurrency: int) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        cancelled = 0

        async def handle(message: Message) -> None:
            nonlocal cancelled
            if message.payload == b"\1":
                raise KeyError("mine")
            try:
                await trio.sleep_forever()
            finally:
                cancelled += 1

        await _numbers(host, 2)
        with pytest.raises(KeyError, match="mine"):
            await remote.serve(handle, concurrency=concurrency)
        assert cancelled == 1
        # The endpoint can still be used.
        await host.send(b"next")
        assert (await remote.receive()).payload == b"next"


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("graceful", [True, False])
async def test_an_endpoint_closed_inside_its_own_handler(
    open_pair: Any, concurrency: int, graceful: bool
) -> None:
    """Acceptance scenario 10 (OA#508)."""
    async with open_pair() as pair, _bound(pair) as (host, remote):
        handled: list[int] = []

        async def handle(message: Message) -> None:
            handled.append(message.payload[0])
            if graceful:
                await remote.aclose()
            else:
                remote.close()
            with pytest.raises(trio.ClosedResourceError):
                await remote.send(b"reply")

        await _numbers(host, 3)
        with trio.fail_after(10):
            await remote.serve(handle, concurrency=concurrency)
            await remote.serve(handle, concurrency=concurrency)
        assert handled[0] == 0
        await settle()
        assert host.is_withdrawn == graceful
        async with pair.remote.open_endpoint(NAME, address=remote.address):
            pass


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_withdrawn_channel_ends_serve_when_all_is_handled(
    open_pair: Any, concurrency: int
) -> None:
    async with open_pair() as pair, pair.host.open_endpoint(NAME) as host:
        handled: list[int] = []

        async def handle(message: Message) -> None:
            await trio.lowlevel.checkpoint()
            handled.append(message.payload[0])

        async with pair.remote.open_endpoint(NAME) as remote:
            await remote.wait_bound()
            await _numbers(remote, 7)
        with trio.fail_after(10):
            await host.serve(handle, concurrency=concurrency)
        assert sorted(handled) == list(range(7))


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_serve_ends_with_the_cause_when_the_peer_is_gone(
    open_pair: Any, concurrency: int
) -> None:
    async with open_pair() as pair, _bound(pair) as (host, _remote):
        cause = PeerGoneError("the remote is gone")

        async def serve() -> None:
            with pytest.raises(trio.BrokenResourceError) as caught:
                await host.serve(_ignore, concurrency=concurrency)
            assert caught.value.__cause__ is cause

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            await settle()
            pair.host_device.fail(cause)


async def test_a_second_server_is_refused(open_pair: Any) -> None:
    async with (
        open_pair() as pair,
        _bound(pair) as (_host, remote),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(remote.serve, _ignore)
        await settle()
        for concurrency in (1, 2):
            with pytest.raises(trio.BusyResourceError), trio.fail_after(5):
                await remote.serve(_ignore, concurrency=concurrency)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("call", [Endpoint.receive, Endpoint.receive_many])
async def test_a_second_reader_does_not_take_what_the_first_is_woken_for(
    open_pair: Any, call: Callable[[Endpoint], Awaitable[object]]
) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote), trio.open_nursery() as nursery:
        received: list[Message] = []

        async def receive() -> None:
            received.append(await remote.receive())

        nursery.start_soon(receive)
        await settle()
        host.send_nowait(b"x")
        assert pair.remote.drain()
        pair.remote.slice_end = math.inf  # or the first may be done before
        with pytest.raises(trio.BusyResourceError):
            await call(remote)
        await settle()
        assert received == [(b"x", host.address)]


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_both_sides_full_and_handlers_that_reply(open_pair: Any, concurrency: int) -> None:
    """Acceptance scenario 1 (OA#320): two buffers each way."""
    async with open_pair(make_table(2)) as pair, _bound(pair, queue_limit=1) as (host, remote):
        handled = {host: 0, remote: 0}
        for endpoint in (host, remote):
            with pytest.raises(trio.WouldBlock):
                while True:
                    endpoint.send_nowait(b"fill")
                    await settle()

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:

                async def serve(endpoint: Endpoint) -> None:
                    async def handle(message: Message) -> None:
                        with contextlib.suppress(trio.ClosedResourceError):
                            await endpoint.send(message.payload)
                        handled[endpoint] += 1
                        if min(handled.values()) >= 200:
                            for each in handled:
                                each.close()

                    await endpoint.serve(handle, concurrency=concurrency)

                nursery.start_soon(serve, host)
                nursery.start_soon(serve, remote)
        for bus in (pair.host, pair.remote):
            assert replace(bus.drops, unknown_destination=0) == Drops()  # some came after the end


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_serve_that_is_cancelled_leaves_nothing_behind(
    open_pair: Any, concurrency: int
) -> None:
    """No generator that only the garbage collector ends: warnings are errors."""
    async with open_pair() as pair, _bound(pair) as (host, remote):
        await _numbers(host, 3)

        async def handle(_: Message) -> None:
            await trio.sleep_forever()

        async def serve() -> None:
            await remote.serve(handle, concurrency=concurrency)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            await settle()
            nursery.cancel_scope.cancel()
        assert remote.statistics.queued == 3 - concurrency


async def test_the_end_of_the_peer_is_one_error_also_where_handlers_send(open_pair: Any) -> None:
    cause = PeerGoneError("gone")
    async with open_pair(make_table(2)) as pair, _bound(pair, queue_limit=1) as (host, remote):

        async def handle(_: Message) -> None:
            while True:
                await host.send(b"reply")

        async def serve() -> None:
            with pytest.raises(trio.BrokenResourceError) as caught:
                await host.serve(handle, concurrency=3)
            assert caught.value.__cause__ is cause

        await remote.send_many([b"1", b"2"])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            await settle()
            pair.host_device.fail(cause)


async def test_holding_lets_other_tasks_run(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair, in_place=True) as (host, remote):
        turns = 0

        async def beside() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        for _ in range(200):
            remote.send_nowait(b"x")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beside)
            begin = trio.current_time()
            while trio.current_time() - begin < 0.01:
                (await host.hold()).release()
                remote.send_nowait(b"x")
            assert turns > 3
            nursery.cancel_scope.cancel()


async def test_five_endpoints_both_ways(open_pair: Any) -> None:
    """Acceptance scenario 9 (OA#217, RL#63), the short form; `openamp bench soak` is the long."""
    async with open_pair(make_table(8)) as pair, trio.open_nursery() as nursery:
        done = 0
        payloads = [number.to_bytes(2, "little") for number in range(400)]

        async def use(bus: Bus, address: int) -> None:
            nonlocal done
            async with bus.open_endpoint(
                address=address, destination=address, queue_limit=3
            ) as endpoint:
                await barrier.wait()

                async def send() -> None:
                    for payload in payloads:
                        await endpoint.send(bytes((address,)) + payload)

                async with trio.open_nursery() as inner:
                    inner.start_soon(send)
                    for payload in payloads:
                        expected = bytes((address,)) + payload
                        assert await endpoint.receive() == (expected, address)
                done += 1
                await trio.sleep_forever()

        barrier = trio.Event()
        for address in range(60, 65):
            nursery.start_soon(use, pair.host, address)
            nursery.start_soon(use, pair.remote, address)
        await settle()
        barrier.set()
        with trio.fail_after(20):
            while done < 10:
                await settle()
        nursery.cancel_scope.cancel()
    assert pair.host.drops == pair.remote.drops == Drops()


# In place


async def test_a_held_message_is_a_read_only_view_of_its_buffer(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair, in_place=True) as (host, remote):
        payloads = [b"", b"x", bytes(range(256)), b"y" * host.payload_limit]
        for one, other in ((host, remote), (remote, host)):
            await one.send_many(payloads)
            for payload in payloads:
                with await other.hold() as held:
                    assert bytes(held.view) == payload
                    assert held.view.nbytes == len(payload)
                    assert held.source == one.address
                    assert held.view.readonly
                    assert not held.is_released
                assert held.is_released
                with pytest.raises(ValueError, match="released"):
                    bytes(held.view)


async def test_the_view_shows_shared_memory(open_pair: Any) -> None:
    """What the peer writes later is seen: it is no copy."""
    async with open_pair() as pair, _bound(pair, in_place=True) as (host, remote):
        await host.send(b"before")
        with await remote.hold() as held:
            memory = pair.host_device.memory.regions[0].view
            offset = bytes(memory).index(b"before")
            memory[offset : offset + 6] = b"behind"
            assert bytes(held.view) == b"behind"


async def test_an_in_place_endpoint_can_also_receive(open_pair: Any) -> None:
    async with open_pair(make_table(4)) as pair, _bound(pair, in_place=True) as (host, remote):
        await host.send_many([b"a", b"b", b"c", b"d"])
        assert await remote.receive() == (b"a", host.address)
        with remote.hold_nowait() as held:
            assert bytes(held.view) == b"b"
            assert remote.receive_nowait() == (b"c", host.address)
            assert await remote.receive_many() == [(b"d", host.address)]
        with pytest.raises(trio.WouldBlock):
            remote.hold_nowait()
        assert remote.statistics.queued == remote.statistics.held == 0
        await _circulates(host, remote, 4)


async def test_only_in_place_endpoints_hold(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        await host.send(b"x")
        with pytest.raises(StateError, match="in_place=True"):
            await remote.hold()
        with pytest.raises(StateError, match="in_place=True"):
            remote.hold_nowait()
        assert (await remote.receive()).payload == b"x"


async def test_releasing_twice_is_an_error_but_harmless(open_pair: Any) -> None:
    async with open_pair(make_table(2)) as pair, _bound(pair, in_place=True) as (host, remote):
        for _ in range(5):
            await host.send(b"x")
            held = await remote.hold()
            held.release()
            for _ in range(2):
                with pytest.raises(StateError, match="released before"):
                    held.release()
            with held:
                pass  # what was released in the block, or before, is no error at its end
        await _circulates(host, remote, 2)


@pytest.mark.parametrize("side", ["host", "remote"])
async def test_all_buffers_held_and_released_in_any_order(open_pair: Any, side: str) -> None:
    """Acceptance scenario 5 (OA#162)."""
    chance = random.Random(162)
    async with open_pair(make_table(8)) as pair, _bound(pair, in_place=True) as ends:
        sender, receiver = ends if side == "remote" else ends[::-1]
        bus = pair.remote if side == "remote" else pair.host
        for turn in range(20):
            for number in range(8):
                sender.send_nowait(bytes((turn, number)))
            with pytest.raises(trio.WouldBlock):
                sender.send_nowait(b"one too many")
            await settle()
            assert (receiver.statistics.queued, receiver.statistics.held) == (8, 8)
            held = [receiver.hold_nowait() for _ in range(8)]
            assert (receiver.statistics.queued, receiver.statistics.held) == (0, 0)
            assert bus.statistics.held == 8
            chance.shuffle(held)
            for left, each in zip(range(7, -1, -1), held, strict=True):
                assert each.view[0] == turn
                each.release()
                assert bus.statistics.held == left
            await settle()
        await _circulates(sender, receiver, 8)


async def test_each_release_lets_the_peer_send_one(open_pair: Any) -> None:
    async with open_pair(make_table(4)) as pair, _bound(pair, in_place=True) as (host, remote):
        await _numbers(host, 4)
        held = [remote.hold_nowait() for _ in range(4)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.send_many, [b"w"] * 4)
            for count, each in enumerate(reversed(held), 1):
                await settle()
                each.release()
                await settle()
                assert host.statistics.sent == 4 + count
        assert [m.payload for m in await remote.receive_many()] == [b"w"] * 4


async def test_a_held_message_outlives_its_endpoint(open_pair: Any) -> None:
    async with open_pair(make_table(2)) as pair:
        async with _bound(pair, in_place=True) as (host, remote):
            await host.send_many([b"hold me", b"queued"])
            held = await remote.hold()
            remote.close()
            assert bytes(held.view) == b"hold me"
            assert pair.remote.statistics.held == 1
            held.release()
            assert pair.remote.statistics.held == 0
        async with (
            pair.host.open_endpoint(destination=900) as one,
            pair.remote.open_endpoint(address=900) as other,
        ):
            await _circulates(one, other, 2)


@pytest.mark.parametrize("side", ["host", "remote"])
async def test_a_held_message_ends_with_its_bus(open_pair: Any, side: str) -> None:
    async with open_pair() as pair, _bound(pair, in_place=True) as ends:
        sender, receiver = ends if side == "remote" else ends[::-1]
        bus = pair.remote if side == "remote" else pair.host
        await sender.send_many([b"x", b"y"])
        held = await receiver.hold()
        with await receiver.hold():
            await bus.aclose()
        assert held.is_released
        with pytest.raises(ValueError, match="released"):
            bytes(held.view)
        for _ in range(2):
            with pytest.raises(trio.ClosedResourceError, match="the bus was closed"):
                held.release()
        assert bus.statistics.held == 0
        with pytest.raises(trio.ClosedResourceError):
            receiver.hold_nowait()


async def test_a_held_message_can_be_read_after_a_reset(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair, in_place=True) as (host, remote):
        await host.send_many([b"held", b"queued"])
        held = await remote.hold()
        pair.host_device.end()
        await settle()
        assert bytes(held.view) == b"held"
        assert (await remote.receive()).payload == b"queued"
        with pytest.raises(trio.BrokenResourceError):
            await remote.hold()
        with held:
            pass


async def test_releasing_after_the_peer_is_gone_says_so(open_pair: Any) -> None:
    cause = PeerGoneError("gone")
    async with open_pair() as pair, _bound(pair, in_place=True) as (host, remote):
        await remote.send(b"x")
        held = await host.hold()
        pair.host_device.fail(cause)
        with pytest.raises(trio.BrokenResourceError) as caught:
            held.release()
        assert caught.value.__cause__ is cause
        assert pair.host.statistics.held == 0


async def test_a_view_that_is_still_looked_at(open_pair: Any) -> None:
    """As numpy.frombuffer or struct.iter_unpack do: neither release nor closing fails."""
    async with open_pair(make_table(2)) as pair, _bound(pair, in_place=True) as (host, remote):
        for _ in range(4):
            await host.send(b"abcdefgh")
            held = await remote.hold()
            numbers = struct.iter_unpack("<I", held.view)
            held.release()
            assert pair.remote.statistics.held == 0
            del numbers
            await settle()
        await remote.send(b"abcdefgh")
        held = await host.hold()
        numbers = struct.iter_unpack("<I", held.view)
        await pair.host.aclose()
        assert pair.host_device.status == 0
        del numbers


async def test_waiting_to_hold_ends_with_the_endpoint(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair, in_place=True) as (_host, remote):

        async def hold() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await remote.hold()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold)
            await settle()
            with pytest.raises(trio.BusyResourceError), trio.fail_after(5):
                await remote.hold()
            remote.close()


async def test_a_closed_in_place_endpoint_gives_its_buffers_back(open_pair: Any) -> None:
    async with open_pair(make_table(4)) as pair:
        async with _bound(pair, in_place=True) as (host, remote):
            await _numbers(host, 4)
            assert pair.remote.statistics.held == 4
            remote.close()
            assert pair.remote.statistics.held == 0
        async with _bound(pair) as (host, remote):
            await _circulates(host, remote, 4)


class _Cutter:
    """A driver that sends each message as two descriptors: a header with some payload, the rest."""

    _CUT = 20

    def __init__(self, device: VirtioDevice) -> None:
        assert device.role is Role.DRIVER
        assert device.memory.regions[0].pa == 0
        device.begin(RPMSG_F_NS)
        self._device = device
        self._memory = device.memory.regions[0].view
        self._pa, self._pool = device.buffers(8192)
        from_device, self._vring = device.vrings
        for vring in (from_device, self._vring):
            self._memory[vring.da : vring.da + vring.layout.size] = bytes(vring.layout.size)
        self._free = [*range(0, self._vring.layout.num, 2)]
        self._sent = self._returned = 0
        device.set_driver_ok()

    def send(self, payload: bytes) -> bool:
        """Returns whether there was a buffer for it."""
        num, layout = self._vring.layout.num, self._vring.layout
        available, used = (
            self._vring.da + at for at in (layout.available_offset, layout.used_offset)
        )
        while self._returned != struct.unpack_from("<H", self._memory, used + 2)[0]:
            at = used + 4 + 8 * (self._returned % num)
            self._free.append(struct.unpack_from("<I", self._memory, at)[0])
            self._returned += 1
        if not self._free:
            return False
        head = self._free.pop(0)
        message = struct.pack("<IIIHH", 9, 5, 0, len(payload), 0) + payload
        offset = head * 512
        self._pool[offset : offset + len(message)] = message
        for number, piece in enumerate(
            ((self._pa + offset, self._CUT, 1, head + 1),
             (self._pa + offset + self._CUT, len(message) - self._CUT, 0, 0))
        ):  # fmt: skip
            struct.pack_into("<QIHH", self._memory, self._vring.da + 16 * (head + number), *piece)
        struct.pack_into("<H", self._memory, available + 4 + 2 * (self._sent % num), head)
        self._sent += 1
        struct.pack_into("<H", self._memory, available + 2, self._sent)
        self._device.kick(1)
        return True


@asynccontextmanager
async def _cut(num: int, **options: Any) -> AsyncIterator[tuple[_Cutter, Bus, Endpoint]]:
    """That driver, and the bus and an in-place endpoint of the remote that it sends to."""
    send, receive = trio.open_memory_channel[tuple[Bus, Endpoint]](1)

    async def application(link: Link) -> None:
        async with (
            open_resources(link) as resources,
            open_bus(resources.rpmsg_device()) as bus,
            bus.open_endpoint(address=5, in_place=True, **options) as endpoint,
        ):
            send.send_nowait((bus, endpoint))
            await trio.sleep_forever()

    async with open_processor(LoopbackPlatform(application)) as processor:
        await processor.boot(python_firmware(make_table(num)))
        driver = _Cutter(processor.rpmsg_device())
        yield driver, *await receive.receive()


async def test_a_message_in_several_descriptors_is_held_as_a_copy() -> None:
    """RPMsg allows a driver to cut its messages in two; Linux does not do it."""
    async with _cut(4) as (driver, bus, endpoint):
        for number in range(20):
            assert driver.send(b"cut in two %2d" % number)
            with await endpoint.hold() as message:
                assert message.view.readonly
                assert (bytes(message.view), message.source) == (b"cut in two %2d" % number, 9)
            assert bus.statistics.held == 0
            await settle()


async def _fill_cut(driver: _Cutter) -> int:
    for count in range(100):
        if not driver.send(b"cut in two"):
            return count
        await settle()
    raise AssertionError("there is no bound")


@pytest.mark.parametrize("how", ["receive", "hold", "receive_nowait", "receive_many"])
async def test_copies_of_messages_in_several_descriptors_keep_their_buffers_too(how: str) -> None:
    """So an in-place endpoint that is not read is bounded whatever its peer does."""
    async with _cut(8, queue_limit=2) as (driver, bus, endpoint):
        assert await _fill_cut(driver) == 4
        assert (endpoint.statistics.queued, endpoint.statistics.held) == (4, 4)
        taken = 1
        if how == "hold":
            (await endpoint.hold()).release()
        elif how == "receive_nowait":
            endpoint.receive_nowait()
        elif how == "receive":
            await endpoint.receive()
        else:
            taken = len(await endpoint.receive_many(3))
        assert bus.statistics.held == 4 - taken
        await settle()
        assert await _fill_cut(driver) == taken
        endpoint.close()
        assert bus.statistics.held == 0
        await settle()


@pytest.mark.parametrize("when_full", [WhenFull.DROP_OLDEST, WhenFull.DROP_NEWEST])
async def test_copies_that_are_dropped_give_their_buffers_back(when_full: WhenFull) -> None:
    async with _cut(8, queue_limit=2, when_full=when_full) as (driver, bus, endpoint):
        for _ in range(50):
            assert driver.send(b"cut in two")
            await settle()
        assert (endpoint.statistics.queued, bus.statistics.held) == (2, 2)
        assert bus.drops == Drops(full=48)


async def test_copies_of_one_that_is_not_read_are_given_up(autojump_clock: Any) -> None:
    async with _cut(8, queue_limit=2) as (driver, bus, endpoint):
        assert await _fill_cut(driver) == 4
        await trio.sleep(2.5)
        assert (endpoint.statistics.queued, bus.statistics.held) == (0, 0)
        assert bus.drops == Drops(unread=4)
        for _ in range(20):
            assert driver.send(b"cut in two")
            await settle()
        assert bus.drops == Drops(unread=24)


# Any sequence


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["send", "many", "receive", "receive many", "hold", "release", "settle"]),
        st.integers(0, 5),
    ),
    max_size=50,
)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it has no state
)
@given(steps=_STEPS, in_place=st.booleans(), limit=st.integers(1, 5), to_host=st.booleans())
def test_any_sequence_of_receiving_keeps_the_counts(
    open_pair: Any, steps: list[tuple[str, int]], in_place: bool, limit: int, to_host: bool
) -> None:
    """sent == received + queued, nothing is dropped, and in the end all buffers circulate."""

    async def main() -> None:
        async with open_pair(make_table(4)) as pair:
            bus = pair.host if to_host else pair.remote
            async with _bound(pair, in_place=in_place, queue_limit=limit) as ends:
                receiver, sender = ends if to_host else ends[::-1]
                sent = taken = 0
                held: list[HeldMessage] = []

                def check(payloads: list[bytes]) -> None:
                    nonlocal taken
                    assert payloads == [bytes((taken + n,)) for n in range(len(payloads))]
                    taken += len(payloads)

                for step, number in steps:
                    try:
                        if step == "send":
                            sender.send_nowait(bytes((sent,)))
                            sent += 1
                        elif step == "many":
                            parts = [bytes((sent + n,)) for n in range(number)]
                            sent += sender.send_many_nowait(parts)
                        elif step == "receive":
                            check([receiver.receive_nowait().payload])
                        elif step == "receive many" and receiver.statistics.queued:
                            messages = await receiver.receive_many(number or None)
                            check([message.payload for message in messages])
                        elif step == "hold" and in_place:
                            held.append(receiver.hold_nowait())
                            check([bytes(held[-1].view)])
                        elif step == "release" and held:
                            held.pop(number % len(held)).release()
                        else:
                            await settle()
                    except trio.WouldBlock:
                        pass
                    statistics = receiver.statistics
                    assert statistics.received == taken + statistics.queued
                    assert bus.statistics.held == statistics.held + len(held)
                    if in_place:
                        assert statistics.held == statistics.queued
                for each in held:
                    each.release()
                await settle()
                while taken < sent:
                    check([receiver.receive_nowait().payload])
                    await settle()
                assert sender.statistics.sent == receiver.statistics.received == sent
                assert receiver.statistics.dropped == 0
                assert bus.statistics.held == 0
                await _circulates(sender, receiver, 4)
            assert bus.drops == Drops()

    trio.run(main)
