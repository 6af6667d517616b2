"""The Linux kernel's own RPMsg bus on a core, with our bus as its device.

virtio.c, virtio_ring.c, rpmsg_core.c, rpmsg_ns.c, virtio_rpmsg_bus.c and the kernel's sample client
are compiled as they lie in the distribution's source, into firmware for the native core and for
boards of QEMU: RPMsg code that was not written for this project. tests/second/linux has what they
need of a kernel, and an echo service.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from typing import Any, Final

import pytest
import trio

from openamp_py import SHUTDOWN_MSG, Endpoint, Session, read_trace
from openamp_py.rpmsg.statistics import Drops

pytestmark = pytest.mark.kernel_source

# orders.h
CHANNEL: Final = "linux-echo"
ADDRESS: Final = 30
FLOOD: Final = 0xEF56A510
FILL: Final = 0xEF56A511
LIMIT: Final = 0xEF56A512

SAMPLE: Final = "rpmsg-client-sample"
HELLO: Final = b"hello world!"
SAMPLES: Final = 100
"""What rpmsg_client_sample.c sends, and how often."""

PAYLOAD_LIMIT: Final = 496
"""virtio_rpmsg_bus.c has buffers of 512 bytes."""
BUFFERS: Final = 256
FROM_HOST: Final = 0
TO_HOST: Final = 1
"""Which vring is which for a driver."""

SHUTDOWN: Final = SHUTDOWN_MSG.to_bytes(4, "little")
ENOMEM: Final = -12
EMSGSIZE: Final = -90

MESSAGES: Final = 1000
FLOODED: Final = 5000


def _payload(number: int) -> bytes:
    """Different for each number, and of every length that there is."""
    length = number * 37 % (PAYLOAD_LIMIT + 1)
    return bytes((number + i) & 0xFF for i in range(length))


async def _exchange(session: Session, endpoint: Endpoint, count: int) -> None:
    """All of `count` messages come back, whole and in order."""
    before = session.bus.statistics
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            for number in range(count):
                await endpoint.send(_payload(number))

        nursery.start_soon(send)
        for number in range(count):
            message = await endpoint.receive()
            assert (message.payload, message.source) == (_payload(number), endpoint.destination)
    after = session.bus.statistics
    assert after.sent - before.sent == after.received - before.received == count
    assert after.drops == Drops()


async def _order(endpoint: Endpoint, *words: int) -> None:
    await endpoint.send(struct.pack("<3I", *words, *[0] * (3 - len(words))))


async def _answer(endpoint: Endpoint) -> tuple[int, ...]:
    return struct.unpack("<I3i", (await endpoint.receive()).payload)


async def _leave(session: Session, endpoint: Endpoint) -> list[str]:
    """The core leaves in order, with nothing left behind. Returns the lines of its trace."""
    processor = session.processor
    assert processor is not None
    await endpoint.send(SHUTDOWN)
    assert (await endpoint.receive()).payload == SHUTDOWN
    await processor.wait_exit()
    lines = read_trace(processor).splitlines()
    assert lines[-2:] == ["bytes of the heap in use: 0", "shutdown"]
    assert not [line for line in lines if line.startswith(("BUG", "WARNING"))]
    return lines


def _wait_all_available(session: Session, index: int) -> None:
    """Until the core has put all buffers of a vring there for us. We take none meanwhile."""
    processor = session.processor
    assert processor is not None
    vring = processor.rpmsg_device().vrings[index]
    ring = processor.map(da=vring.da, size=vring.layout.size)
    deadline = time.monotonic() + 10

    def count(offset: int) -> int:
        return int.from_bytes(ring[offset + 2 : offset + 4], "little")

    while count(vring.layout.available_offset) - count(vring.layout.used_offset) & 0xFFFF < BUFFERS:
        assert time.monotonic() < deadline


async def test_messages_come_back(open_linux: Any) -> None:
    async with open_linux() as session, session.bus.open_endpoint(CHANNEL) as endpoint:
        await endpoint.wait_bound()
        assert endpoint.destination == ADDRESS
        await _exchange(session, endpoint, MESSAGES)
        await _leave(session, endpoint)


async def test_a_restart(open_linux: Any) -> None:
    async with open_linux() as session, session.bus.open_endpoint(CHANNEL, rebind=True) as endpoint:
        await endpoint.wait_bound()
        await session.restart()
        await endpoint.wait_bound()
        await _exchange(session, endpoint, MESSAGES)
        assert (await session.shutdown(endpoint, grace=10)).graceful


async def test_names_both_ways(open_linux: Any) -> None:
    async with open_linux() as session, session.bus.open_watch() as watch:
        assert (await session.bus.wait_service(CHANNEL)).address == ADDRESS
        async with session.bus.open_endpoint(CHANNEL) as endpoint:
            async with session.bus.open_endpoint("nobody's") as unwanted:
                await _exchange(session, endpoint, 1)
            await _exchange(session, endpoint, 1)
            trace = await _leave(session, endpoint)
        events = [await anext(watch) for _ in range(2)]
    assert [(e.channel.name, e.channel.address, e.destroy) for e in events] == [
        (CHANNEL, ADDRESS, False),
        (CHANNEL, ADDRESS, True),
    ]
    assert trace == [
        "virtio0: rpmsg host is online",
        f"virtio0.{CHANNEL}.{ADDRESS}.-1: opened at {ADDRESS:#x}",
        f"virtio0: creating channel {CHANNEL} addr {endpoint.address:#x}",
        f"virtio0.{CHANNEL}.-1.{endpoint.address}: opened at 0x400",
        f"virtio0: creating channel nobody's addr {unwanted.address:#x}",
        f"virtio0: destroying channel nobody's addr {unwanted.address:#x}",
        f"virtio0.{CHANNEL}.{ADDRESS}.-1: closed",
        f"virtio0.{CHANNEL}.-1.{endpoint.address}: closed",
        "bytes of the heap in use: 0",
        "shutdown",
    ]


async def test_the_kernels_own_client(open_linux: Any) -> None:
    """It begins when its name is announced, and ends by itself after so many answers."""
    async with open_linux() as session, session.bus.open_endpoint(CHANNEL) as endpoint:
        async with session.bus.open_endpoint(SAMPLE) as sample:
            for number in range(SAMPLES):
                message = await sample.receive()
                assert message.payload == HELLO
                await sample.send_to(b"answer %d" % number, message.source)
            await endpoint.wait_bound()
            await _exchange(session, endpoint, 1)
            with pytest.raises(trio.WouldBlock):
                sample.receive_nowait()
        trace = await _leave(session, endpoint)
    client = [line.partition(": ")[2] for line in trace if f".{SAMPLE}." in line]
    assert client[-3:] == [
        f"incoming msg {SAMPLES} (src: {sample.address:#x})",
        "goodbye!",
        "rpmsg sample client driver is removed",
    ]


async def test_the_core_waits_for_room(open_linux: Any) -> None:
    async with open_linux() as session, session.bus.open_endpoint(CHANNEL) as endpoint:
        await endpoint.wait_bound()
        await _order(endpoint, FLOOD, FLOODED, 100)
        _wait_all_available(session, TO_HOST)
        for number in range(FLOODED):
            payload = (await endpoint.receive()).payload
            assert (len(payload), int.from_bytes(payload[:4], "little")) == (100, number)
        *answer, sleeps = await _answer(endpoint)
        assert answer == [FLOOD, FLOODED, 0]
        assert sleeps > 0
        assert session.bus.drops == Drops()
        await _leave(session, endpoint)


async def test_the_core_finds_no_room(open_linux: Any) -> None:
    async with open_linux() as session, session.bus.open_endpoint(CHANNEL) as endpoint:
        await endpoint.wait_bound()
        await _order(endpoint, FILL, FLOODED, 100)
        _wait_all_available(session, TO_HOST)
        for _ in range(BUFFERS):
            assert len((await endpoint.receive()).payload) == 100
        assert await _answer(endpoint) == (FILL, BUFFERS, ENOMEM, 0)
        await _leave(session, endpoint)


async def test_the_host_finds_no_room(open_linux: Any) -> None:
    async with open_linux() as session, session.bus.open_endpoint(CHANNEL) as endpoint:
        await endpoint.wait_bound()
        await _exchange(session, endpoint, 1)
        _wait_all_available(session, FROM_HOST)
        await session.processor.suspend()
        with pytest.raises(trio.WouldBlock):
            for sent in range(BUFFERS + 1):
                endpoint.send_nowait(_payload(sent))
        assert sent == BUFFERS
        await session.processor.resume()
        for number in range(BUFFERS):
            assert (await endpoint.receive()).payload == _payload(number)
        await _leave(session, endpoint)


async def test_lengths(open_linux: Any) -> None:
    async with open_linux() as session, session.bus.open_endpoint(CHANNEL) as endpoint:
        await endpoint.wait_bound()
        await _order(endpoint, LIMIT)
        assert await _answer(endpoint) == (LIMIT, endpoint.payload_limit, 0, 0)
        assert endpoint.payload_limit == PAYLOAD_LIMIT
        for length in (0, 1, PAYLOAD_LIMIT):
            await endpoint.send(bytes(length))
            assert (await endpoint.receive()).payload == bytes(length)
        await _order(endpoint, FLOOD, 1, PAYLOAD_LIMIT + 1)
        assert await _answer(endpoint) == (FLOOD, 0, EMSGSIZE, 0)
        await _leave(session, endpoint)


@pytest.mark.parametrize(
    "switches",
    [
        {"VRING_NUM": 2, "VRING_ALIGN": 16},
        {"VRING_NUM": 64, "VRING_ALIGN": 4},
        {"VRING_NUM": 512},
        {"TABLE_FEATURES": 1 << 29 | 1},
        {"TABLE_FEATURES": 1 << 29 | 1 << 28 | 1, "VRING_NUM": 16},
    ],
    ids=str,
)
async def test_rings_and_features(open_linux: Any, switches: Mapping[str, int]) -> None:
    async with open_linux(switches) as session, session.bus.open_endpoint(CHANNEL) as endpoint:
        await endpoint.wait_bound()
        device = session.processor.rpmsg_device()
        assert device.features == switches.get("TABLE_FEATURES", 1)
        assert [v.layout.num for v in device.vrings] == [switches.get("VRING_NUM", BUFFERS)] * 2
        await _exchange(session, endpoint, MESSAGES)
        await _leave(session, endpoint)


async def test_without_name_service(open_linux: Any) -> None:
    async with (
        open_linux({"TABLE_FEATURES": 0}) as session,
        session.bus.open_endpoint(address=40, destination=ADDRESS) as endpoint,
    ):
        await _exchange(session, endpoint, MESSAGES)
        await _leave(session, endpoint)


async def test_what_the_kernel_refuses(open_linux: Any) -> None:
    async with open_linux() as session, session.bus.open_endpoint(CHANNEL) as endpoint:
        await endpoint.wait_bound()
        await endpoint.send_to(b"who is there?", 999)
        await endpoint.send_to(b"short", 53)
        await endpoint.announce()
        await _exchange(session, endpoint, MESSAGES)
        trace = await _leave(session, endpoint)
    assert "virtio0: msg received with no recipient" in trace
    assert "virtio0: malformed ns msg (5)" in trace
    assert f"virtio0: channel {CHANNEL}:ffffffff:{endpoint.address:x} already exist" in trace


async def test_a_pool_that_is_too_small(open_linux: Any) -> None:
    """The kernel's driver gives up, and the firmware with it."""
    with pytest.raises(trio.BrokenResourceError, match=r"driver never came up: .*exit code 3"):
        async with open_linux({"RPMSG_TO_HOST_SIZE": 128}):
            pass
