"""When it pays to poll: the decision as a value, and buses that poll beside other tasks."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import openamp_py
from openamp_py import ECHO_CHANNEL, BusOptions
from openamp_py.rpmsg.polling import DEFAULT_POLLING, Polling

NAME = "test-service"


def _waits(polling: Polling, count: int, *, hit: bool) -> list[int]:
    """Numbers of the waits that were polled."""
    polled = []
    for number in range(count):
        if polling.wants():
            polled.append(number)
            polling.learn(hit)
    return polled


# The decision


def test_every_wait_is_polled_as_long_as_it_pays() -> None:
    polling = Polling(1e-4)
    assert _waits(polling, 50, hit=True) == list(range(50))
    assert (polling.tried, polling.hits) == (50, 50)


def test_what_is_in_vain_is_tried_less_and_less() -> None:
    polling = Polling(1e-4)
    # Between two tries 1, 3, 7, ... waits are not polled.
    assert _waits(polling, 100, hit=False) == [0, 2, 6, 14, 30, 62]
    assert (polling.tried, polling.hits) == (6, 0)


def test_skipping_has_a_bound() -> None:
    polling = Polling(1e-4)
    polled = _waits(polling, 20_000, hit=False)
    gaps = [after - before for before, after in itertools.pairwise(polled)]
    assert gaps[:10] == [2**n for n in range(1, 11)]
    assert set(gaps[10:]) == {1024}


def test_one_hit_forgets_all_failures() -> None:
    polling = Polling(1e-4)
    _waits(polling, 5000, hit=False)
    while not polling.wants():
        pass
    polling.learn(True)
    assert _waits(polling, 10, hit=True) == list(range(10))
    assert _waits(polling, 8, hit=False) == [0, 2, 6]


def test_zero_never_polls() -> None:
    polling = Polling(0)
    assert _waits(polling, 3000, hit=True) == []
    assert polling.tried == 0


@pytest.mark.parametrize("cpus, seconds", [(1, 0.0), (2, DEFAULT_POLLING), (64, DEFAULT_POLLING)])
def test_by_default_it_depends_on_the_cpus(
    monkeypatch: pytest.MonkeyPatch, cpus: int, seconds: float
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    assert Polling().seconds == Polling(None).seconds == seconds
    assert Polling(0.5).seconds == 0.5


@pytest.mark.parametrize("seconds", [-1e-9, 1.001, float("inf"), float("nan")])
def test_times_that_cannot_be(seconds: float) -> None:
    with pytest.raises(ValueError, match="0 to 1 second are possible"):
        Polling(seconds)
    with pytest.raises(ValueError, match="0 to 1 second are possible"):
        BusOptions(polling=seconds)


@settings(derandomize=True, deadline=None, database=None)
@given(outcomes=st.lists(st.booleans(), max_size=200))
def test_the_same_history_gives_the_same_decisions(outcomes: list[bool]) -> None:
    one, other = Polling(1e-4), Polling(0.5)
    skipped = 0
    for hit in outcomes:
        decision = one.wants()
        assert decision == other.wants(), "how long it polls has no part in it"
        if decision:
            skipped = 0
            one.learn(hit)
            other.learn(hit)
        else:
            skipped += 1
        assert skipped <= 1023
        assert one.hits <= one.tried <= len(outcomes)
    assert (one.tried, one.hits) == (other.tried, other.hits)


# Buses


async def _echo(endpoint: openamp_py.Endpoint, count: int) -> None:
    with trio.fail_after(20):
        for number in range(count):
            payload = number.to_bytes(4, "little")
            await endpoint.send(payload)
            assert (await endpoint.receive()).payload == payload


async def test_a_peer_in_another_process_is_found_by_polling() -> None:
    options = BusOptions(polling=0.05)
    async with (
        openamp_py.open_session("process", options=options) as session,
        session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.wait_bound()
        await _echo(endpoint, 100)
        statistics = session.bus.statistics
        # 50 ms are more than an answer takes, also on a busy computer.
        assert 0 < statistics.poll_hits <= statistics.polls
        assert statistics.received >= 100


async def test_without_polling_all_works_the_same_and_nothing_is_polled() -> None:
    options = BusOptions(polling=0)
    async with (
        openamp_py.open_session("process", options=options) as session,
        session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.wait_bound()
        await _echo(endpoint, 100)
        statistics = session.bus.statistics
        assert (statistics.polls, statistics.poll_hits) == (0, 0)
        assert statistics.kicks_received > 0


async def test_a_peer_in_the_same_thread_is_hardly_ever_polled_for(open_pair: Any) -> None:
    """It cannot come while this thread polls; both sides soon learn that."""
    async with (
        open_pair(options=BusOptions(polling=1e-4)) as pair,
        pair.remote.open_endpoint(NAME) as remote,
        pair.host.open_endpoint(NAME) as host,
    ):

        async def answer() -> None:
            async for message in remote:
                await remote.send(message.payload)

        await host.wait_bound()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            await _echo(host, 500)
            nursery.cancel_scope.cancel()
        for bus in (pair.host, pair.remote):
            assert bus.statistics.poll_hits == 0
            assert 1 <= bus.statistics.polls <= 12


async def test_two_who_wait_on_one_bus_do_not_poll_in_turns(open_pair: Any) -> None:
    """One poll in vain is enough until trio has run the other tasks."""
    async with (
        open_pair(options=BusOptions(polling=1e-3)) as pair,
        pair.host.open_endpoint(address=5) as one,
        pair.host.open_endpoint(address=6) as other,
        trio.open_nursery() as nursery,
    ):
        before = pair.host.statistics.polls
        nursery.start_soon(one.receive)
        nursery.start_soon(other.receive)
        await trio.testing.wait_all_tasks_blocked()
        assert pair.host.statistics.polls - before == 1
        nursery.cancel_scope.cancel()


async def test_other_tasks_run_beside_one_that_polls() -> None:
    """An answer that is always polled for does not keep others from running."""
    options = BusOptions(polling=0.02)
    turns = 0

    async def beside() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with (
        openamp_py.open_session("process", options=options) as session,
        session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.wait_bound()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beside)
            await _echo(endpoint, 2000)
            # At least one turn for each 0.2 ms of messages; 2000 of them take 6 ms or more.
            assert turns >= 10
            nursery.cancel_scope.cancel()


async def test_who_polls_finds_a_free_buffer_too() -> None:
    """Sending waits for buffers by polling as well."""
    options = BusOptions(polling=0.05)
    async with (
        openamp_py.open_session("process", options=options) as session,
        session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.wait_bound()
        answers = 0

        async def receive() -> None:
            nonlocal answers
            while answers < 2000:
                answers += len(await endpoint.receive_many())

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await endpoint.send_many([b"x" * 32] * 2000)
        assert answers == 2000
        assert session.bus.drops == openamp_py.Drops()
