"""What is counted, when, and how a dump shows it; and that counts of both sides agree."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from links import NAME, make_table, open_linked, settle

from openamp_py import (
    ADDRESS_ANY,
    BusOptions,
    BusStatistics,
    Drops,
    Endpoint,
    HeldMessage,
    PeerGoneError,
    WhenFull,
)
from openamp_py.constants import NAME_SERVICE_ADDRESS
from openamp_py.rpmsg.wire import Announcement, Channel, encode_announcement

# How often there were kicks and polls is the scheduler's business.
_BESIDE = {"kicks_sent", "kicks_suppressed", "kicks_received", "polls", "poll_hits"}


def _changes(before: BusStatistics, after: BusStatistics) -> dict[str, Any]:
    """What moved, and by how much."""
    old, new = dataclasses.asdict(before), dataclasses.asdict(after)
    old |= old.pop("drops")
    new |= new.pop("drops")
    return {key: new[key] - old[key] for key in new if new[key] != old[key] and key not in _BESIDE}


# Counters


async def test_a_new_bus_has_counted_nothing(open_pair: Any) -> None:
    async with open_pair() as pair:
        for bus in (pair.host, pair.remote):
            counted = dataclasses.asdict(bus.statistics)
            assert counted.pop("drops") == dataclasses.asdict(Drops())
            del counted["kicks_received"]
            assert set(counted.values()) == {0}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("to_host", [False, True])
async def test_a_message_moves_just_its_counters(
    open_pair: Any, to_host: bool, in_place: bool
) -> None:
    async with open_pair() as pair, open_linked(pair, in_place=in_place) as ends:
        sender, receiver = ends[::-1] if to_host else ends
        one, other = (pair.remote, pair.host) if to_host else (pair.host, pair.remote)
        before, before_other = one.statistics, other.statistics
        await sender.send(b"abc")
        await settle()
        assert _changes(before, one.statistics) == {"sent": 1, "sent_bytes": 3}
        held = {"held": 1} if in_place else {}
        assert _changes(before_other, other.statistics) == {
            "received": 1,
            "received_bytes": 3,
            **held,
        }
        counted = receiver.statistics
        assert (counted.received, counted.received_bytes) == (1, 3)
        assert (counted.queued, counted.held) == (1, int(in_place))
        await receiver.receive()
        assert _changes(before_other, other.statistics) == {"received": 1, "received_bytes": 3}
        assert (receiver.statistics.queued, receiver.statistics.received) == (0, 1)
        assert (sender.statistics.sent, sender.statistics.sent_bytes) == (1, 3)
        assert sender.statistics.received == receiver.statistics.sent == 0


async def test_every_message_of_a_batch_counts(open_pair: Any) -> None:
    async with open_pair() as pair, open_linked(pair) as (host, remote):
        await host.send_many([b"abc"] * 5)
        await settle()
        counted = remote.statistics
        assert (counted.received, counted.received_bytes, counted.queued) == (5, 15, 5)
        assert (host.statistics.sent, host.statistics.sent_bytes) == (5, 15)


async def test_the_name_service_counts_on_the_bus_only(open_pair: Any) -> None:
    async with open_pair() as pair:
        before, before_other = pair.host.statistics, pair.remote.statistics
        async with pair.remote.open_endpoint(NAME) as endpoint:
            await settle()
            assert endpoint.statistics.sent == endpoint.statistics.sent_bytes == 0
        await settle()
        assert _changes(before, pair.host.statistics) == {"received": 2, "received_bytes": 80}
        assert _changes(before_other, pair.remote.statistics) == {"sent": 2, "sent_bytes": 80}


@pytest.mark.parametrize(
    "what, payload, destination",
    [
        ("unknown_destination", b"x", 4711),
        ("bad_announcement", b"", NAME_SERVICE_ADDRESS),
        ("bad_announcement", bytes(40), NAME_SERVICE_ADDRESS),
        (
            "bad_announcement",
            encode_announcement(Announcement(Channel("unknown", 9), destroy=True)),
            NAME_SERVICE_ADDRESS,
        ),
    ],
)
async def test_drops_by_their_reason(
    open_pair: Any, what: str, payload: bytes, destination: int
) -> None:
    async with open_pair() as pair, open_linked(pair) as (host, _remote):
        for number in range(1, 4):
            await host.send_to(payload, destination)
            await settle()
            assert pair.remote.drops == Drops(**{what: number})
        assert pair.remote.statistics.received == 3
        assert pair.host.drops == Drops()


@pytest.mark.parametrize("what", ["bad_length", "bad_source"])
async def test_headers_that_cannot_be(open_pair: Any, what: str) -> None:
    """Acceptance scenario 7 (OA#696): a length beyond the buffer."""
    async with open_pair() as pair, open_linked(pair) as (host, remote):
        with host.reserve_nowait(4) as reservation:
            reservation.view[:4] = b"abcd"
            memory = pair.host_device.memory.regions[0].view
            at = bytes(memory).index(b"abcd") - 16
        before = pair.remote.statistics
        if what == "bad_length":
            struct.pack_into("<H", memory, at + 12, 497)
        else:
            struct.pack_into("<I", memory, at, ADDRESS_ANY)
        await settle()
        assert pair.remote.drops == Drops(**{what: 1})
        assert _changes(before, pair.remote.statistics).get(what) == 1
        assert remote.statistics.received == 0
        await host.send(b"good")
        assert (await remote.receive()).payload == b"good"


async def test_who_waits_for_a_buffer_is_counted_once(open_pair: Any) -> None:
    async with open_pair(make_table(2)) as pair, open_linked(pair, queue_limit=1) as (host, remote):
        with pytest.raises(trio.WouldBlock):
            while True:
                host.send_nowait(b"x")
                await settle()
        assert pair.host.statistics.buffer_waits == host.statistics.buffer_waits == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.send, b"y")
            await settle()
            nursery.start_soon(host.send_many, [b"z"] * 9)
            await settle()
            assert pair.host.statistics.buffer_waits == host.statistics.buffer_waits == 2
            for _ in range(3 + 10):
                await remote.receive()
        assert pair.host.statistics.buffer_waits == host.statistics.buffer_waits == 2


async def test_reserved_and_held_go_up_and_down(open_pair: Any) -> None:
    async with open_pair() as pair, open_linked(pair, in_place=True) as (host, remote):
        bus = pair.host
        assert bus.statistics.reserved == 0
        with host.reserve_nowait() as one, host.reserve_nowait():
            assert bus.statistics.reserved == 2
            one.discard()
            assert bus.statistics.reserved == 1
        assert bus.statistics.reserved == 0
        assert bus.statistics.sent == host.statistics.sent == 1
        await settle()
        held = remote.hold_nowait()
        assert (pair.remote.statistics.held, remote.statistics.held) == (1, 0)
        held.release()
        assert pair.remote.statistics.held == 0


async def test_kicks_add_up(open_pair: Any) -> None:
    async with open_pair() as pair, open_linked(pair) as (host, remote):
        kicks = 0
        before = pair.host.statistics
        pass_on = pair.host_device._kick

        def kick(notify_id: int) -> None:
            nonlocal kicks
            kicks += 1
            pass_on(notify_id)

        pair.host_device._kick = kick
        for number in range(30):
            await host.send(b"x")
            if number % 3 == 0:
                await settle()
                await remote.receive_many()
        await settle()
        after = pair.host.statistics
        assert after.kicks_sent - before.kicks_sent == kicks > 0
        assert after.kicks_suppressed - before.kicks_suppressed == 30 - kicks


async def test_nothing_is_held_by_one_that_was_closed_on_a_broken_link(open_pair: Any) -> None:
    async with open_pair(make_table(4)) as pair, open_linked(pair, queue_limit=1) as (host, remote):
        for _ in range(4):
            remote.send_nowait(b"x")
            await settle()
        assert pair.host.statistics.held == host.statistics.held == 3
        pair.host_device.fail(PeerGoneError("gone"))
        host.close()
        assert pair.host.statistics.held == 0


async def test_what_was_counted_outlives_the_bus(open_pair: Any) -> None:
    async with open_pair() as pair, open_linked(pair) as (host, remote):
        await host.send(b"abc")
        await remote.receive()
        await host.send_to(b"", 9)
        await settle()
        before = pair.host.statistics, pair.remote.statistics
        of_endpoints = host.statistics, remote.statistics
    assert _changes(before[0], pair.host.statistics) == {}
    assert _changes(before[1], pair.remote.statistics) == {}
    assert (host.statistics, remote.statistics) == of_endpoints


# Dumps


def _strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


async def test_a_dump_says_what_is_there(open_pair: Any) -> None:
    async with (
        open_pair(make_table(16), to_remote=128, to_host=256) as pair,
        pair.remote.open_endpoint("service", address=2000),
        pair.host.open_endpoint("service", when_full=WhenFull.DROP_OLDEST) as host,
        pair.host.open_endpoint(address=7),
    ):
        await host.wait_bound()
        await host.send(b"abc")
        await settle()
        dump = pair.host.dump()
        assert (dump.role, dump.status, dump.features, dump.failure) == ("driver", 0xF, 1, None)
        assert (dump.payload_limit, dump.receive_payload_limit) == (112, 240)
        assert dump.channels == (Channel("service", 2000),)
        assert dump.statistics == pair.host.statistics
        assert [report.address for report in dump.endpoints] == [1024, 7]
        text = str(dump)
        for part in (
            "bus on vdev0 (driver): status 0xf",
            "failure: none",
            "payload limit: 112 sent, 240 received",
            "endpoints: 2",
            "0x400 -> 0x7d0 service, drop oldest: sent 1, sent_bytes 3",
            "0x7 -> not bound (no name), hold back:",
            "channels announced by the peer: 1",
            "'service' at 0x7d0",
        ):
            assert part in text
        loaded = _strict(dump.to_json())
        assert loaded == json.loads(json.dumps(dataclasses.asdict(dump)))
        assert loaded["endpoints"][0]["statistics"]["sent"] == 1
        assert len(loaded["rings"]) == 2
        assert "device" in str(pair.remote.dump())


@pytest.mark.parametrize("patience, shown", [(math.inf, "inf"), (1.0, 1.0)])
async def test_json_is_json_whatever_the_options(
    open_pair: Any, patience: float, shown: object
) -> None:
    async with open_pair(options=BusOptions(patience=patience, always_kick=True)) as pair:
        loaded = _strict(pair.host.dump().to_json())
        assert loaded["options"]["patience"] == shown
        assert loaded["options"]["always_kick"] is True
        assert loaded["options"]["recheck"] is None


@pytest.mark.parametrize("how", ["failed", "reset", "broken", "closed", "failed and closed"])
async def test_a_dump_of_what_is_over(open_pair: Any, how: str) -> None:
    async with open_pair() as pair, open_linked(pair, in_place=True) as (host, remote):
        await host.send_many([b"x", b"y"])
        await remote.send(b"z")
        held = await host.hold()
        bus = pair.remote if how == "reset" else pair.host
        if how == "reset":
            pair.host_device.end()
        elif how == "broken":
            memory = pair.host_device.memory.find_da(0x6002, 2)
            memory[:] = b"\xff\x7f"
        elif how != "closed":
            pair.host_device.fail(PeerGoneError("lost it \x1b[2J\nendpoints: 99"))
        await settle()
        if how.endswith("closed"):
            await bus.aclose()
        for _ in range(2):
            dump = bus.dump()
            loaded = _strict(dump.to_json())
            assert (loaded["failure"] is None) == (how == "closed")
            assert "status" in str(dump)
            assert loaded["statistics"]["sent"] == bus.statistics.sent
        with held:
            pass
    text = str(pair.host.dump())
    assert "endpoints: 0" in text
    _strict(pair.host.dump().to_json())


@pytest.mark.parametrize(
    "name", ["a\nendpoints: 99\x1b[2J", "\x07\x9b1m", "\u202e gnp", "\\xff'\""]
)
async def test_hostile_names_are_escaped(open_pair: Any, name: str) -> None:
    async with open_pair() as pair, pair.remote.open_endpoint(name):
        await settle()
        dump = pair.host.dump()
        text = str(dump)
        assert dump.channels[0].name == name
        assert len(text.splitlines()) == 1 + 6 + 1 + 1 + 1
        for character in "\x1b\x07\x9b\u202e\r":
            assert character not in text
        assert text.count("endpoints: 99") <= 1
        assert "\nendpoints: 99" not in text
        assert _strict(dump.to_json())["channels"][0]["name"] == name


async def test_names_that_are_no_utf_8(open_pair: Any) -> None:
    async with open_pair() as pair, pair.remote.open_endpoint(destination=53) as raw:
        await raw.send(struct.pack("<32sII", b"\xff\xfe\xed\xa0\x80\x1b", 9, 0))
        await settle()
        (channel,) = pair.host.channels
        assert channel.name == "\\xff\\xfe\\xed\\xa0\\x80\x1b"
        assert "\x1b" not in str(pair.host.dump())
        assert _strict(pair.host.dump().to_json())["channels"][0]["name"] == channel.name


# Any sequence

_ACTIONS = (
    "send", "many", "receive", "receive many", "hold", "release", "reserve", "commit",
    "discard", "reopen", "settle",
)  # fmt: skip

_STEPS = st.lists(st.tuples(st.sampled_from(_ACTIONS), st.integers(0, 5)), max_size=60)


class _Run:
    """One sender, one receiver that may be closed and opened anew, and what they must count."""

    def __init__(self, pair: Any, to_host: bool, options: dict[str, Any]) -> None:
        self.bus = pair.host if to_host else pair.remote
        self.options = options
        self.sent = self.taken = self.lost = 0
        self.old_received = self.old_dropped = 0
        self.held: list[HeldMessage] = []
        self.stacks: list[Any] = []

    async def open(self) -> None:
        context = self.bus.open_endpoint(address=6, **self.options)
        self.stacks.append(context)
        self.receiver: Endpoint = await context.__aenter__()

    async def close(self) -> None:
        statistics = self.receiver.statistics
        self.old_received += statistics.received
        self.old_dropped += statistics.dropped
        self.lost += statistics.queued
        await self.stacks.pop().__aexit__(None, None, None)

    def check(self) -> None:
        """received == taken + queued + dropped, and every buffer kept is accounted for."""
        statistics = self.receiver.statistics
        received = self.old_received + statistics.received
        dropped = self.old_dropped + statistics.dropped
        assert received == self.taken + statistics.queued + dropped + self.lost
        assert self.bus.statistics.held == statistics.held + len(self.held)
        assert self.bus.drops.full + self.bus.drops.unread == dropped


@settings(
    derandomize=True,
    deadline=None,
    max_examples=80,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it has no state
)
@given(
    steps=_STEPS,
    to_host=st.booleans(),
    in_place=st.booleans(),
    limit=st.integers(1, 6),
    when_full=st.sampled_from(WhenFull),
)
def test_any_sequence_keeps_the_counts(
    open_pair: Any,
    steps: list[tuple[str, int]],
    to_host: bool,
    in_place: bool,
    limit: int,
    when_full: WhenFull,
) -> None:
    """sent == received == taken + queued + dropped, and in the end all buffers circulate."""
    options = {"in_place": in_place, "queue_limit": limit, "when_full": when_full}

    async def main() -> None:
        async with open_pair(make_table(4)) as pair:
            run = _Run(pair, to_host, options)
            one = pair.remote if to_host else pair.host
            await run.open()
            async with one.open_endpoint(destination=6) as sender:
                reserved: list[Any] = []
                for step, number in steps:
                    try:
                        if step == "send":
                            sender.send_nowait(bytes(number))
                            run.sent += 1
                        elif step == "many":
                            run.sent += sender.send_many_nowait([bytes(number)] * number)
                        elif step == "receive":
                            run.receiver.receive_nowait()
                            run.taken += 1
                        elif step == "receive many" and run.receiver.statistics.queued:
                            run.taken += len(await run.receiver.receive_many(number or None))
                        elif step == "hold" and in_place:
                            run.held.append(run.receiver.hold_nowait())
                            run.taken += 1
                        elif step == "release" and run.held:
                            run.held.pop(number % len(run.held)).release()
                        elif step == "reserve":
                            context = sender.reserve_nowait(number)
                            reserved.append((context, context.__enter__()))
                        elif step == "commit" and reserved:
                            reserved.pop(number % len(reserved))[0].__exit__(None, None, None)
                            run.sent += 1
                        elif step == "discard" and reserved:
                            context, reservation = reserved.pop(number % len(reserved))
                            reservation.discard()
                            context.__exit__(None, None, None)
                        elif step == "reopen":
                            await settle()
                            await run.close()
                            await run.open()
                        else:
                            await settle()
                    except trio.WouldBlock:
                        pass
                    run.check()
                    assert one.statistics.reserved == len(reserved)
                    assert sender.statistics.sent == one.statistics.sent == run.sent
                for context, reservation in reserved:
                    reservation.discard()
                    context.__exit__(None, None, None)
                await settle()
                for each in run.held:
                    each.release()
                run.held.clear()
                run.check()
                await settle()
                while run.receiver.statistics.queued:
                    run.taken += len(await run.receiver.receive_many())
                    await settle()
                run.check()
                dropped = run.old_dropped + run.receiver.statistics.dropped
                assert run.sent == run.taken + dropped + run.lost
                assert run.bus.statistics.received == run.sent
                assert run.bus.statistics.held == 0
                if when_full is WhenFull.HOLD_BACK:
                    assert run.bus.drops == Drops()
                await run.close()
                async with run.bus.open_endpoint(address=6) as other:
                    for _ in range(2):
                        for number in range(4):
                            sender.send_nowait(bytes((number,)))
                        with pytest.raises(trio.WouldBlock):
                            sender.send_nowait(b"one too many")
                        for number in range(4):
                            assert (await other.receive()).payload == bytes((number,))
                        await settle()

    trio.run(main)
