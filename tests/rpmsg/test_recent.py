"""The last messages of a link, out of rings that work, of a dead core, and of any bytes."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from openamp_py import (
    ECHO_CHANNEL,
    BusOptions,
    CoreCrashedError,
    MemoryMap,
    RecentMessage,
    Region,
    open_session,
    recent_messages,
)
from openamp_py.rpmsg.recent import decode_recent_untrusted
from openamp_py.vring import VringLayout

CRASH = struct.pack("<I", 0xEF56A501)  # csrc/firmware/echo_protocol.h
LIMIT = 30.0
NUM = 4
POOL = 0x1000
HEADER = struct.Struct("<IIIHH")


def _memory(*messages: bytes, size: int = 0x1000) -> MemoryMap:
    """Buffers of 64 bytes from POOL on, with these at their beginnings."""
    data = bytearray(size)
    for number, message in enumerate(messages):
        data[64 * number : 64 * number + len(message)] = message
    return MemoryMap([Region("pool", POOL, POOL, memoryview(data))])


def _message(payload: bytes, source: int = 1024, destination: int = 1025) -> bytes:
    return HEADER.pack(source, destination, 0, len(payload), 0) + payload


def _table(*descriptors: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<QIHH", pa, length, 0, 0) for pa, length in descriptors)


async def test_both_directions_of_a_link(core: str) -> None:
    with trio.fail_after(LIMIT):
        async with open_session(core) as session, session.bus.open_endpoint(ECHO_CHANNEL) as ept:
            await ept.wait_bound()
            for number in range(3):
                await ept.send(b"number %d" % number)
                await ept.receive()
            recent = session.bus.recent()
            assert recent.received[1:] == tuple(
                RecentMessage(1024, ept.address, 8, b"number %d" % number) for number in range(3)
            )
            assert "announces 'rpmsg-openamp-demo-channel' at 0x400" in str(recent.received[0])
            assert recent.sent[-1] == (ept.address, 1024, 8, b"number 2")
            assert "6e 75 6d 62 65 72 20 32" in str(recent) and "  number 2\n" in str(recent)


async def test_the_device_has_the_same_the_other_way_round(open_pair: Any) -> None:
    with trio.fail_after(LIMIT):
        async with (
            open_pair() as pair,
            pair.remote.open_endpoint("echo") as remote,
            pair.host.open_endpoint("echo") as host,
        ):
            await host.wait_bound()
            await host.send(b"from the host")
            await remote.receive()
            here, there = pair.host.recent(), pair.remote.recent()
            assert here.sent[-1].payload == b"from the host"
            assert there.received == here.sent
            assert there.sent == here.received != ()


async def test_a_dead_core_has_its_last_messages_too() -> None:
    with trio.fail_after(LIMIT):
        async with open_session() as session, session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
            await endpoint.send(CRASH)
            with pytest.raises(trio.BrokenResourceError):
                await endpoint.receive()
            assert isinstance(session.bus.failure, CoreCrashedError)
            assert session.bus.recent().sent[-1].payload == CRASH


async def test_count_and_size_are_limits() -> None:
    with trio.fail_after(LIMIT):
        async with (
            open_session("loopback", options=BusOptions(polling=0)) as session,
            session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
        ):
            for number in range(20):
                await endpoint.send(bytes([number]) * 100)
                await endpoint.receive()
            processor = session.processor
            assert processor is not None
            device = processor.rpmsg_device()
            latest = recent_messages(device, count=2, size=3).received
            assert [message.payload for message in latest] == [b"\x12" * 3, b"\x13" * 3]
            assert [message.length for message in latest] == [100, 100]
            assert "97 bytes more" in str(latest[0])
            nothing = recent_messages(device, count=0)
            assert nothing.received == nothing.sent == ()
            assert str(nothing) == "received: nothing\nsent: nothing"
            with pytest.raises(ValueError, match="-1 messages of 64 bytes"):
                recent_messages(device, count=-1)


def test_a_buffer_that_was_used_again_is_shown_once() -> None:
    ring = _table((POOL, 64), (POOL + 64, 64))
    memory = _memory(_message(b"again"), _message(b"older"))
    found = decode_recent_untrusted(ring, [0, 0, 1, 0], memory.find_pa, 16, 64)
    assert [message.payload for message in found] == [b"older", b"again"]


@pytest.mark.parametrize(
    ("descriptor", "head"),
    [
        ((POOL, 64), 1),
        ((POOL, 64), 0xFFFF_FFFF),
        ((POOL, 15), 0),
        ((POOL - 1, 64), 0),
        ((POOL + 0x1000 - 16, 17), 0),
        (((1 << 64) - 8, 64), 0),
    ],
    ids=["no descriptor", "u32", "small", "before", "over the end", "wraps"],
)
def test_what_is_no_message_is_left_out(descriptor: tuple[int, int], head: int) -> None:
    ring = _table(descriptor)
    memory = _memory(_message(b"hello"))
    assert decode_recent_untrusted(ring, [head], memory.find_pa, 16, 64) == ()


@pytest.mark.parametrize(
    ("table", "size", "found"),
    [((POOL, 64), 16, [b"hello"]), ((POOL, 64), 15, []), ((POOL - 1, 64), 16, [])],
    ids=["its buffer", "too small a table", "nowhere"],
)
def test_a_table_of_descriptors_is_no_message(
    table: tuple[int, int], size: int, found: list[bytes]
) -> None:
    memory = _memory(_message(b"hello"), _table(table))
    for address, seen in ((POOL + 64, found), (POOL - 64, [])):
        ring = struct.pack("<QIHH", address, size, 4, 0)
        messages = decode_recent_untrusted(ring, [0], memory.find_pa, 16, 64)
        assert [message.payload for message in messages] == seen


def test_a_length_that_is_a_lie_shows_what_is_there() -> None:
    memory = _memory(HEADER.pack(1, 2, 3, 0xFFFF, 4) + b"there")
    ring = _table((POOL, 16 + 5))
    (found,) = decode_recent_untrusted(ring, [0], memory.find_pa, 16, 64)
    assert found == (1, 2, 0xFFFF, b"there")


def test_what_a_terminal_obeys_is_not_shown() -> None:
    text = str(RecentMessage(1, 2, 6, b"\x1b[31m\x9b"))
    assert text.isascii() and "\x1b" not in text


@given(st.binary(max_size=VringLayout(NUM, 4).size * 2), st.lists(st.integers(0, 1 << 32)))
def test_any_bytes_give_a_result(ring: bytes, heads: list[int]) -> None:
    found = decode_recent_untrusted(ring, heads, _memory(ring).find_pa, 16, 64)
    assert len(found) <= min(16, len(heads))
    assert all(len(message.payload) <= 64 for message in found)
    assert all(str(message) for message in found)


@given(st.data())
async def test_any_rings_give_a_result(data: st.DataObject) -> None:
    """What a device has: the copied indexes and heads are any, too."""
    async with open_session("loopback") as session:
        processor = session.processor
        assert processor is not None
        device = processor.rpmsg_device()
        layout = VringLayout(NUM, 4)
        vrings = [replace(vring, layout=layout) for vring in device.vrings]
        device.vrings = tuple(vrings)
        for vring in vrings:
            view = device.memory.find_da(vring.da, layout.size)
            assert view is not None
            view[:] = data.draw(st.binary(min_size=layout.size, max_size=layout.size))
        found = recent_messages(device)
        assert len(found.received) <= NUM and len(found.sent) <= NUM
        assert str(found)
