"""The ways to send: by other addresses, at once, in batches, and built in the shared buffer."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from links import NAME, make_table, settle

from openamp_py import ADDRESS_ANY, Bus, Drops, Endpoint, PeerGoneError, WhenFull


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


async def _fill(endpoint: Endpoint) -> int:
    """Sends until no buffer is free. Returns how many messages went."""
    count = 0
    while True:
        try:
            endpoint.send_nowait(b"fill")
        except trio.WouldBlock:
            return count
        count += 1
        await settle()


async def _receive(endpoint: Endpoint, count: int) -> list[bytes]:
    with trio.fail_after(10):
        return [(await endpoint.receive()).payload for _ in range(count)]


async def _circulates(pair: Any, num: int) -> None:
    """All buffers of both directions can be had: none is lost."""
    for sender, receiver in ((pair.host, pair.remote), (pair.remote, pair.host)):
        async with (
            sender.open_endpoint(destination=900) as one,
            receiver.open_endpoint(address=900) as other,
        ):
            await settle()
            for _ in range(3):
                for number in range(num):
                    one.send_nowait(bytes((number,)))
                with pytest.raises(trio.WouldBlock):
                    one.send_nowait(b"one too many")
                assert await _receive(other, num) == [bytes((number,)) for number in range(num)]


# Normal


async def test_send_from_names_another_source_and_the_answer_goes_there(open_pair: Any) -> None:
    async with (
        open_pair() as pair,
        _bound(pair) as (host, remote),
        pair.host.open_endpoint(address=77) as other,
    ):
        await host.send_from(b"question", 77, remote.address)
        message = await remote.receive()
        assert message == (b"question", 77)
        await remote.send_to(b"answer", message.source)
        assert await other.receive() == (b"answer", remote.address)
        host.send_from_nowait(b"again", 4711, remote.address)
        assert await remote.receive() == (b"again", 4711)
        assert host.statistics.sent == 2
        assert host.statistics.sent_bytes == 13
        assert host.statistics.queued == 0


async def test_nowait_forms_send_what_they_are_told(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        async with pair.remote.open_endpoint(address=5) as other:
            host.send_nowait(bytearray(b"a"))
            host.send_to_nowait(memoryview(b"bc"), 5)
            assert host.send_many_nowait([b"d", bytearray(b"e"), memoryview(b"f")]) == 3
            assert await other.receive() == (b"bc", host.address)
        assert await _receive(remote, 4) == [b"a", b"d", b"e", b"f"]
        assert (host.statistics.sent, host.statistics.sent_bytes) == (5, 6)


async def test_send_many_keeps_the_order_and_each_length(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        payloads = [bytes(number for _ in range(number)) for number in range(100)]
        payloads += [b"", b"z" * host.payload_limit, b""]
        for one, other in ((host, remote), (remote, host)):
            await one.send_many(payloads)
            assert await _receive(other, len(payloads)) == payloads


async def test_send_many_kicks_once_for_all_that_fit(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        await settle()
        before = pair.host.statistics
        await host.send_many([b"x"] * 200)
        after = pair.host.statistics
        assert after.kicks_sent - before.kicks_sent <= 1
        assert after.sent - before.sent == 200
        assert len(await _receive(remote, 200)) == 200


async def test_a_huge_list_goes_on_as_buffers_come_back(open_pair: Any) -> None:
    payloads = [number.to_bytes(3, "little") for number in range(70_000)]
    async with open_pair() as pair, _bound(pair) as (host, remote), trio.open_nursery() as nursery:
        nursery.start_soon(host.send_many, payloads)
        received: list[bytes] = []
        with trio.fail_after(20):
            while len(received) < len(payloads):
                received += [message.payload for message in await remote.receive_many()]
        assert received == payloads
        assert host.statistics.sent == 70_000
        assert host.statistics.sent_bytes == 210_000
        assert remote.statistics.received == 70_000


async def test_an_empty_list_sends_nothing(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        await host.send_many([])
        assert host.send_many_nowait([]) == 0
        await settle()
        assert host.statistics.sent == remote.statistics.received == 0


async def test_a_message_is_built_in_its_buffer(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        for one, other, bus in ((host, remote, pair.host), (remote, host, pair.remote)):
            async with one.reserve(5) as reservation:
                assert reservation.length == 5
                assert bus.statistics.reserved == 1
                reservation.view[:5] = b"built"
            assert bus.statistics.reserved == 0
            assert await other.receive() == (b"built", one.address)
            with one.reserve_nowait() as reservation:
                assert reservation.length == reservation.view.nbytes == one.payload_limit
                reservation.view[:] = b"m" * one.payload_limit
            assert (await other.receive()).payload == b"m" * one.payload_limit
            assert one.statistics.sent == 2
            assert one.statistics.sent_bytes == 5 + one.payload_limit


@pytest.mark.parametrize("begin", [None, 0, 2, 496])
@pytest.mark.parametrize("end", [0, 4, 496])
async def test_the_length_can_be_set_later(open_pair: Any, begin: int | None, end: int) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        async with host.reserve(begin) as reservation:
            reservation.view[:end] = b"q" * end
            reservation.length = end
        assert (await remote.receive()).payload == b"q" * end
        assert host.statistics.sent_bytes == end


async def test_reservations_are_sent_in_the_order_they_end(open_pair: Any) -> None:
    async with open_pair(make_table(4)) as pair, _bound(pair) as (host, remote):
        with host.reserve_nowait(5) as outer:
            with host.reserve_nowait(5) as inner:
                outer.view[:5], inner.view[:5] = b"outer", b"inner"
            await host.send(b"between")
        assert await _receive(remote, 3) == [b"inner", b"between", b"outer"]
        await _circulates(pair, 4)


async def test_calls_that_need_not_wait_let_other_tasks_run(open_pair: Any) -> None:
    """Each way of sending gives others a turn every 0.1 ms or so."""
    options = {"queue_limit": 1, "when_full": WhenFull.DROP_NEWEST}
    async with open_pair() as pair, _bound(pair, **options) as (host, _remote):
        turns = 0

        async def beside() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        async def build() -> None:
            async with host.reserve() as reservation:
                reservation.discard()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(beside)
            calls: list[Callable[[], Awaitable[None]]] = [
                build,
                lambda: host.send_from(b"x", 5, 4711),
                lambda: host.send_to(b"x", 4711),
                lambda: host.send(b"x"),
                lambda: host.send_many([b"x", b"y"]),
            ]
            for send in calls:
                before = turns
                begin = trio.current_time()
                while trio.current_time() - begin < 0.01:
                    await send()
                    pair.remote.drain()
                assert turns - before > 3
            nursery.cancel_scope.cancel()


# Limits


async def test_nothing_goes_when_one_payload_of_many_is_too_long(open_pair: Any) -> None:
    async with open_pair() as pair, _bound(pair) as (host, remote):
        payloads = [b"x", b"y" * (host.payload_limit + 1)]
        with pytest.raises(ValueError, match="payload of 497 bytes; the limit is 496 bytes"):
            await host.send_many(payloads)
        with pytest.raises(ValueError, match="payload of 497 bytes"):
            host.send_many_nowait(payloads)
        for call in (host.send_nowait, lambda p: host.send_to_nowait(p, remote.address)):
            with pytest.raises(ValueError, match="payload of 497 bytes"):
                call(payloads[1])
        with pytest.raises(ValueError, match="payload of 497 bytes"):
            await host.send_from(payloads[1], 5, remote.address)
        await settle()
        assert host.statistics.sent == remote.statistics.received == 0


@pytest.mark.parametrize("length", [-1, 497, 1 << 40])
async def test_a_reservation_of_an_impossible_length(open_pair: Any, length: int) -> None:
    async with open_pair(make_table(2)) as pair, _bound(pair) as (host, _remote):
        with pytest.raises(ValueError, match="the limit is 496 bytes"):
            async with host.reserve(length):
                raise AssertionError("not reached")
        with pytest.raises(ValueError, match="the limit is 496 bytes"), host.reserve_nowait(length):
            raise AssertionError("not reached")
        async with host.reserve(8) as reservation:
            with pytest.raises(ValueError, match=f"a message of {length} bytes"):
                reservation.length = length
            assert reservation.length == 8
            reservation.discard()
        assert host.statistics.sent == 0
        await _circulates(pair, 2)


async def test_many_nowait_says_how_many_went(open_pair: Any) -> None:
    async with open_pair(make_table(4)) as pair, _bound(pair) as (host, remote):
        payloads = [bytes((number,)) for number in range(6)]
        assert host.send_many_nowait(payloads) == 4
        assert (host.statistics.sent, host.statistics.sent_bytes) == (4, 4)
        with pytest.raises(trio.WouldBlock, match="no buffer"):
            host.send_many_nowait(payloads[4:])
        assert await _receive(remote, 4) == payloads[:4]
        await settle()
        assert host.send_many_nowait(payloads[4:]) == 2
        assert await _receive(remote, 2) == payloads[4:]


async def test_nobody_overtakes_those_who_wait_for_a_buffer(open_pair: Any) -> None:
    async with open_pair(make_table(2)) as pair, _bound(pair, queue_limit=1) as (host, remote):
        filled = await _fill(host)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.send_many, [b"1", b"2", b"3"])
            await settle()
            nursery.start_soon(host.send, b"4")
            await settle()

            async def build() -> None:
                async with host.reserve(1) as reservation:
                    reservation.view[:1] = b"5"

            nursery.start_soon(build)
            await settle()
            received: list[bytes] = []
            while len(received) < filled + 5:
                received += await _receive(remote, 1)
                # Whoever does not wait finds others waiting, also where a buffer is free.
                if len(received) < filled + 3:
                    with pytest.raises(trio.WouldBlock):
                        host.send_nowait(b"pushy")
                    with pytest.raises(trio.WouldBlock):
                        host.send_many_nowait([b"pushy"])
                    with pytest.raises(trio.WouldBlock), host.reserve_nowait(5):
                        raise AssertionError("not reached")
        assert received[filled:] == [b"1", b"2", b"3", b"4", b"5"]
        # The batch, one send and one reservation had to wait.
        assert host.statistics.buffer_waits == 3


# Refusals


@pytest.mark.parametrize("address", [-1, ADDRESS_ANY, 1 << 32])
async def test_addresses_that_cannot_be(open_pair: Any, address: int) -> None:
    async with open_pair() as pair, pair.host.open_endpoint() as endpoint:
        before = pair.host.statistics.sent
        for source, destination in ((address, 5), (5, address)):
            with pytest.raises(ValueError, match="is not possible"):
                await endpoint.send_from(b"", source, destination)
            with pytest.raises(ValueError, match="is not possible"):
                endpoint.send_from_nowait(b"", source, destination)
        with pytest.raises(ValueError, match="is not possible"):
            endpoint.send_to_nowait(b"", address)
        assert pair.host.statistics.sent == before


async def test_before_there_is_a_peer_nowait_would_block_and_others_wait(open_pair: Any) -> None:
    async with open_pair() as pair, pair.host.open_endpoint(NAME) as host:
        with pytest.raises(trio.WouldBlock, match="no peer"):
            host.send_many_nowait([b"x"])
        with pytest.raises(trio.WouldBlock, match="no peer"), host.reserve_nowait():
            raise AssertionError("not reached")

        async def build() -> None:
            async with host.reserve(5) as reservation:
                reservation.view[:5] = b"built"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.send_many, [b"a", b"b"])
            nursery.start_soon(build)
            await settle()
            async with pair.remote.open_endpoint(NAME) as remote:
                assert sorted(await _receive(remote, 3)) == [b"a", b"b", b"built"]


# A reservation that is not sent


async def test_a_discarded_reservation_is_not_sent(open_pair: Any) -> None:
    async with open_pair(make_table(2)) as pair, _bound(pair) as (host, remote):
        for _ in range(9):
            async with host.reserve() as reservation:
                reservation.discard()
                reservation.discard()
                with pytest.raises(ValueError, match="released"):
                    reservation.view[0] = 1
            with remote.reserve_nowait() as reservation:
                reservation.discard()
        assert (host.statistics.sent, remote.statistics.sent) == (0, 0)
        await _circulates(pair, 2)


async def test_an_exception_in_the_block_gives_the_buffer_back(open_pair: Any) -> None:
    async with open_pair(make_table(2)) as pair, _bound(pair) as (host, remote):
        for endpoint in (host, remote):
            for _ in range(5):
                with pytest.raises(KeyError, match="mine"):
                    async with endpoint.reserve(3):
                        raise KeyError("mine")
                with pytest.raises(KeyError, match="mine"), endpoint.reserve_nowait(3):
                    raise KeyError("mine")
                with trio.CancelScope() as scope:
                    async with endpoint.reserve(3):
                        scope.cancel()
                        await trio.sleep_forever()
            assert endpoint.statistics.sent == 0
        await _circulates(pair, 2)


async def test_a_discarded_reservation_goes_to_who_waits(open_pair: Any) -> None:
    async with (
        open_pair(make_table(1)) as pair,
        _bound(pair) as (host, remote),
        trio.open_nursery() as nursery,
    ):
        with host.reserve_nowait(1) as reservation:
            nursery.start_soon(host.send, b"waited")
            await settle()
            reservation.discard()
            assert await _receive(remote, 1) == [b"waited"]


async def test_a_view_that_is_still_looked_at_loses_no_buffer(open_pair: Any) -> None:
    """As numpy.frombuffer or struct.iter_unpack do."""
    async with open_pair(make_table(2)) as pair, _bound(pair) as (host, remote):
        for _ in range(4):
            async with host.reserve(8) as reservation:
                numbers = struct.iter_unpack("<I", reservation.view[:8])
                whole = struct.iter_unpack("<I", reservation.view)
                reservation.view[:8] = b"abcdefgh"
            assert pair.host.statistics.reserved == 0
            assert await _receive(remote, 1) == [b"abcdefgh"]
            del numbers, whole
        await _circulates(pair, 2)


# Cancelling


@pytest.mark.parametrize("side", ["host", "remote"])
async def test_a_cancelled_wait_sent_nothing_and_loses_no_buffer(open_pair: Any, side: str) -> None:
    """Acceptance scenario 13 (OA#361)."""
    async with open_pair(make_table(2)) as pair:
        async with _bound(pair, queue_limit=1) as (host, remote):
            sender, receiver = (host, remote) if side == "host" else (remote, host)
            filled = await _fill(sender)

            async def build() -> None:
                async with sender.reserve():
                    raise AssertionError("not reached")

            calls: list[Any] = [
                lambda: sender.send(b"no"),
                lambda: sender.send_to(b"no", receiver.address),
                lambda: sender.send_from(b"no", 5, receiver.address),
                lambda: sender.send_many([b"no", b"no"]),
                build,
            ]
            for call in calls:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(call)
                    await settle()
                    nursery.cancel_scope.cancel()
            # Cancelled before they begin: also where there is a buffer.
            assert await _receive(receiver, filled) == [b"fill"] * filled
            await settle()
            for call in calls:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await call()
                assert scope.cancelled_caught
            await settle()
            assert sender.statistics.sent == receiver.statistics.received == filled
        await _circulates(pair, 2)


async def test_a_cancelled_batch_tells_how_many_went(open_pair: Any) -> None:
    async with open_pair(make_table(4)) as pair, _bound(pair, queue_limit=2) as (host, remote):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.send_many, [bytes((number,)) for number in range(100)])
            await settle()
            assert await _receive(remote, 3) == [b"\0", b"\1", b"\2"]
            await settle()
            nursery.cancel_scope.cancel()
        await settle()
        sent = host.statistics.sent
        assert 3 < sent < 100
        assert await _receive(remote, sent - 3) == [bytes((n,)) for n in range(3, sent)]
        await host.send(b"next")
        assert await _receive(remote, 1) == [b"next"]


async def test_a_waiter_that_is_cancelled_when_called_passes_its_turn_on(open_pair: Any) -> None:
    async with (
        open_pair(make_table(1)) as pair,
        _bound(pair) as (host, remote),
        trio.open_nursery() as nursery,
    ):
        scope = trio.CancelScope()

        async def first() -> None:
            with scope:
                await host.send(b"first")

        with host.reserve_nowait(1) as reservation:
            nursery.start_soon(first)
            await settle()
            nursery.start_soon(host.send, b"second")
            await settle()
            reservation.discard()  # calls the first one,
            scope.cancel()  # who does not come
        received = await _receive(remote, 1)
        if received == [b"first"]:
            received = await _receive(remote, 1)
        assert received == [b"second"]


# Closing


async def _senders(sender: Endpoint, nursery: trio.Nursery, expected: type[Exception]) -> list[Any]:
    """Starts one waiting call of each kind. Returns the causes of the errors they end with."""
    causes: list[Any] = []

    async def build() -> None:
        async with sender.reserve():
            raise AssertionError("not reached")

    async def fails(call: Any) -> None:
        with pytest.raises(expected) as caught:
            await call()
        causes.append(caught.value.__cause__)

    for call in (
        lambda: sender.send(b"x"),
        lambda: sender.send_to(b"x", 5),
        lambda: sender.send_from(b"x", 5, 5),
        lambda: sender.send_many([b"x"]),
        build,
    ):
        nursery.start_soon(fails, call)
    await settle()
    return causes


@pytest.mark.parametrize("how", ["endpoint", "bus", "failure"])
async def test_every_waiting_sender_ends_with_its_endpoint_or_bus(open_pair: Any, how: str) -> None:
    cause = PeerGoneError("the remote is gone")
    expected = trio.BrokenResourceError if how == "failure" else trio.ClosedResourceError
    async with open_pair(make_table(1)) as pair, _bound(pair, queue_limit=1) as (host, _remote):
        await _fill(host)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                causes = await _senders(host, nursery, expected)
                if how == "endpoint":
                    host.close()
                elif how == "bus":
                    await pair.host.aclose()
                else:
                    pair.host_device.fail(cause)
        assert causes == [cause if how == "failure" else None] * 5
        for nowait in (
            lambda: host.send_nowait(b""),
            lambda: host.send_to_nowait(b"", 5),
            lambda: host.send_from_nowait(b"", 5, 5),
            lambda: host.send_many_nowait([b""]),
        ):
            with pytest.raises(expected):
                nowait()
        with pytest.raises(expected), host.reserve_nowait():
            raise AssertionError("not reached")


_ENDS = [(side, how) for side in ("host", "remote") for how in ("endpoint", "bus", "failure")]


@pytest.mark.parametrize("side, how", [*_ENDS, ("remote", "reset")])
async def test_a_reservation_whose_endpoint_or_link_ends_is_not_sent(
    open_pair: Any, side: str, how: str
) -> None:
    async with open_pair(make_table(2)) as pair, _bound(pair) as (host, remote):
        sender, bus = (host, pair.host) if side == "host" else (remote, pair.remote)
        device = pair.host_device if side == "host" else pair.remote_device
        expected: type[Exception] = trio.ClosedResourceError
        if how in ("failure", "reset"):
            expected = trio.BrokenResourceError
        before = bus.statistics.sent
        with pytest.raises(expected):
            async with sender.reserve(1) as reservation:
                reservation.view[:1] = b"x"
                if how == "endpoint":
                    sender.close()
                elif how == "bus":
                    await bus.aclose()
                elif how == "failure":
                    device.fail(PeerGoneError("gone"))
                else:
                    pair.host_device.end()
                    await settle()
        assert bus.statistics.sent == before
        assert bus.statistics.reserved == 0
        assert sender.statistics.sent == 0
        reservation.discard()


async def test_a_waiting_send_ends_when_its_channel_is_withdrawn(open_pair: Any) -> None:
    """It waits for a buffer, and is not sent to where nobody is any more."""
    async with open_pair(make_table(2)) as pair, pair.host.open_endpoint(NAME) as host:
        errors: list[BaseException] = []

        async def send() -> None:
            with pytest.raises(trio.BrokenResourceError, match="withdrew") as caught:
                await host.send(b"precious")
            errors.append(caught.value)

        async with (
            trio.open_nursery() as nursery,
            pair.remote.open_endpoint(NAME, queue_limit=1),
        ):
            await host.wait_bound()
            await settle()
            await _fill(host)
            nursery.start_soon(send)
            await settle()
            assert errors == []
        assert isinstance(errors[0].__cause__, PeerGoneError)
        await settle()
        assert pair.remote.drops == Drops()


async def test_a_reservation_for_a_channel_that_was_withdrawn_meanwhile(open_pair: Any) -> None:
    async with open_pair(make_table(2)) as pair, pair.host.open_endpoint(NAME) as host:
        async with pair.remote.open_endpoint(NAME) as remote:
            await host.wait_bound()
            with pytest.raises(trio.BrokenResourceError, match="withdrew"):
                async with host.reserve(3):
                    await remote.aclose()
                    await settle()
                    assert host.is_withdrawn
        await settle()
        await _circulates(pair, 2)


async def test_the_buffer_of_a_closed_endpoints_reservation_is_free_again(open_pair: Any) -> None:
    async with open_pair(make_table(2)) as pair:
        async with _bound(pair) as (host, _remote):
            with pytest.raises(trio.ClosedResourceError):
                async with host.reserve():
                    host.close()
        # It did not withdraw its service; its remote is closed as well.
        await _circulates(pair, 2)


async def test_who_is_told_first_of_the_end_sees_its_own_error(open_pair: Any) -> None:
    """An exception of the block is not replaced by what the link has to say."""
    async with open_pair() as pair, _bound(pair) as (host, _remote):
        with pytest.raises(KeyError, match="mine"):
            async with host.reserve():
                pair.host_device.fail(PeerGoneError("gone"))
                raise KeyError("mine")
        assert pair.host.statistics.reserved == 0


# Any sequence


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 9)),
        st.tuples(st.just("many"), st.integers(0, 9)),
        st.tuples(st.just("reserve"), st.integers(0, 9)),
        st.tuples(st.just("discard"), st.integers(0, 9)),
        st.tuples(st.just("open"), st.integers(0, 9)),
        st.tuples(st.just("end"), st.integers(0, 9)),
        st.tuples(st.just("receive"), st.integers(0, 9)),
    ),
    max_size=40,
)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it has no state
)
@given(steps=_STEPS, from_host=st.booleans())
def test_any_sequence_of_sending_keeps_the_counts(
    open_pair: Any, steps: list[tuple[str, int]], from_host: bool
) -> None:
    """What went is received in its order; every buffer circulates in the end."""

    async def main() -> None:
        async with open_pair(make_table(4)) as pair:
            async with _bound(pair) as ends:
                sender, receiver = ends if from_host else ends[::-1]
                bus: Bus = pair.host if from_host else pair.remote
                expected: list[bytes] = []
                received: list[bytes] = []
                opened: list[Any] = []
                for number, (step, size) in enumerate(steps):
                    payload = bytes((number,)) * size
                    try:
                        if step == "send":
                            sender.send_nowait(payload)
                            expected.append(payload)
                        elif step == "many":
                            went = sender.send_many_nowait([payload] * size)
                            expected += [payload] * went
                        elif step in ("reserve", "discard"):
                            with sender.reserve_nowait() as reservation:
                                reservation.view[:size] = payload
                                reservation.length = size
                                if step == "discard":
                                    reservation.discard()
                            if step == "reserve":
                                expected.append(payload)
                        elif step == "open":
                            context = sender.reserve_nowait(size)
                            context.__enter__().view[:size] = payload
                            opened.append((context, payload))
                        elif step == "end" and opened:
                            context, payload = opened.pop(size % len(opened))
                            context.__exit__(None, None, None)
                            expected.append(payload)
                        elif step == "receive":
                            received.append(receiver.receive_nowait().payload)
                    except trio.WouldBlock:
                        pass
                    await settle()
                    assert bus.statistics.reserved == len(opened)
                for context, payload in opened:
                    context.__exit__(None, None, None)
                    expected.append(payload)
                await settle()
                assert sender.statistics.sent == len(expected)
                assert sender.statistics.sent_bytes == sum(map(len, expected))
                assert receiver.statistics.received == len(expected)
                assert receiver.statistics.queued == len(expected) - len(received)
                received += await _receive(receiver, len(expected) - len(received))
                assert received == expected
            await _circulates(pair, 4)

    trio.run(main)
