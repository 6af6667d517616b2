"""Buffer sizes from the smallest to 64 KiB, and payloads of no, of most and of too many bytes."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from links import make_table, settle

from openamp_py import (
    ECHO_CHANNEL,
    Bus,
    BusOptions,
    Endpoint,
    Link,
    LoopbackPlatform,
    ProcessPlatform,
    ResourceTableError,
    open_bus,
    open_processor,
    open_resources,
    open_session,
)
from openamp_py.platforms.demo import BUFFERS_DA, MEMORY_SIZE, python_firmware
from openamp_py.platforms.process import URL

HEADER = 16
SIZES = (64, 512, 4096, 65536)


@asynccontextmanager
async def _pair(to_remote: int, to_host: int, num: int) -> AsyncIterator[tuple[Bus, Bus]]:
    """A host and a remote with memory for just these buffers."""
    send, receive = trio.open_memory_channel[Bus](1)

    async def application(link: Link) -> None:
        options = BusOptions(send_buffer_size=to_host, receive_buffer_size=to_remote)
        async with (
            open_resources(link) as resources,
            open_bus(resources.rpmsg_device(), options) as bus,
        ):
            await send.send(bus)
            await trio.sleep_forever()

    memory_size = max(MEMORY_SIZE, BUFFERS_DA + num * (to_remote + to_host))
    platform = LoopbackPlatform(application, memory_size=memory_size)
    options = BusOptions(send_buffer_size=to_remote, receive_buffer_size=to_host)
    async with open_processor(platform) as processor:
        await processor.boot(python_firmware(make_table(num)))
        async with open_bus(processor.rpmsg_device(), options) as host:
            yield host, await receive.receive()


def _pattern(length: int, seed: int) -> bytes:
    return bytes((seed + n * 7) & 0xFF for n in range(min(length, 251))) * (length // 251 + 1)


async def _exchange(one: Endpoint, other: Endpoint, count: int) -> None:
    """Messages of 0 bytes to the limit, in one direction, more of them than buffers."""
    limit = one.payload_limit
    for number in range(count):
        for length in (0, 1, limit // 2, limit - 1, limit):
            payload = _pattern(length, number)[:length]
            await one.send(payload)
            assert (await other.receive()) == (payload, one.address)


# Both directions


@pytest.mark.parametrize("to_remote, to_host", [*zip(SIZES, reversed(SIZES), strict=True)])
async def test_each_direction_has_its_own_size(to_remote: int, to_host: int) -> None:
    """Acceptance scenario 14 (OA#155, OA#322)."""
    async with (
        _pair(to_remote, to_host, 8) as (host_bus, remote_bus),
        host_bus.open_endpoint(address=5, destination=6) as host,
        remote_bus.open_endpoint(address=6, destination=5) as remote,
    ):
        assert host_bus.payload_limit == remote_bus.receive_payload_limit == to_remote - HEADER
        assert remote_bus.payload_limit == host_bus.receive_payload_limit == to_host - HEADER
        await _exchange(host, remote, 3)
        await _exchange(remote, host, 3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("in_place", [False, True])
async def test_all_buffers_full_of_different_bytes(size: int, in_place: bool) -> None:
    """Neighbours do not touch each other: all are out, and all full, at once."""
    async with (
        _pair(size, 64, 16) as (host_bus, remote_bus),
        host_bus.open_endpoint(destination=6) as host,
        remote_bus.open_endpoint(address=6, in_place=in_place) as remote,
    ):
        limit = host.payload_limit
        payloads = [bytes((number,)) * limit for number in range(16)]
        for _ in range(2):
            assert host.send_many_nowait(payloads) == 16
            await settle()
            assert [(await remote.receive()).payload for _ in range(16)] == payloads
            await settle()


@pytest.mark.parametrize("num", [1, 256])
async def test_the_largest_buffers_with_the_fewest_and_the_most(num: int) -> None:
    async with (
        _pair(65536, 65536, num) as (host_bus, remote_bus),
        host_bus.open_endpoint(address=5, destination=6) as host,
        remote_bus.open_endpoint(address=6, destination=5) as remote,
    ):
        payload = _pattern(host.payload_limit, 3)[: host.payload_limit]
        for one, other in ((host, remote), (remote, host)):
            for _ in range(num):
                one.send_nowait(payload)
            with pytest.raises(trio.WouldBlock):
                one.send_nowait(b"")
            for _ in range(num):
                assert (await other.receive()).payload == payload


async def test_built_in_place_at_every_size() -> None:
    for size in SIZES:
        async with (
            _pair(size, 64, 4) as (host_bus, remote_bus),
            host_bus.open_endpoint(destination=6) as host,
            remote_bus.open_endpoint(address=6, in_place=True) as remote,
        ):
            async with host.reserve() as reservation:
                assert reservation.view.nbytes == size - HEADER
                reservation.view[:] = b"m" * (size - HEADER)
            with await remote.hold() as held:
                assert bytes(held.view) == b"m" * (size - HEADER)


# The limit


def _ways(one: Endpoint, other: Endpoint, payload: bytes) -> list[Callable[[], Awaitable[None]]]:
    """The ways to send that may wait."""
    return [
        lambda: one.send(payload),
        lambda: one.send(bytearray(payload)),
        lambda: one.send_to(payload, other.address),
        lambda: one.send_from(payload, 9, other.address),
        lambda: one.send_many([b"", payload]),
    ]


@pytest.mark.parametrize("size", (*SIZES, 17))
async def test_none_most_and_too_many_bytes(size: int) -> None:
    """Acceptance scenario 8 (OA#355, open-pru#96): 0, limit and limit + 1 bytes, every way."""
    async with (
        _pair(size, size, 4) as (host_bus, remote_bus),
        host_bus.open_endpoint(address=5, destination=6) as host,
        remote_bus.open_endpoint(address=6, destination=5) as remote,
    ):
        limit = size - HEADER
        message = f"payload of {limit + 1} bytes; the limit is {limit} bytes"
        for one, other in ((host, remote), (remote, host)):
            assert one.payload_limit == limit
            sent = 0
            for length in (0, limit):
                payload = b"p" * length
                await one.send(payload)
                await one.send_to(payload, other.address)
                await one.send_many([payload])
                one.send_nowait(payload)
                sent += 4
                received = [(await other.receive()).payload for _ in range(4)]
                assert received == [payload] * 4
                await settle()
                async with one.reserve(length) as reservation:
                    reservation.view[:length] = payload
                sent += 1
                assert (await other.receive()).payload == payload
                await settle()
            too_long = b"p" * (limit + 1)
            for call in _ways(one, other, too_long):
                with pytest.raises(ValueError, match=message):
                    await call()
            with pytest.raises(ValueError, match=message):
                one.send_nowait(too_long)
            with pytest.raises(ValueError, match=message):
                one.send_many_nowait([too_long])
            with pytest.raises(ValueError, match=message):
                async with one.reserve(limit + 1):
                    raise AssertionError("not reached")
            await settle()
            assert one.statistics.sent == other.statistics.received == sent


@pytest.mark.parametrize("size", [17, 55])
async def test_an_announcement_that_does_not_fit_is_refused(size: int) -> None:
    message = f"payload of 40 bytes; the limit is {size - HEADER} bytes"
    async with _pair(size, size, 4) as buses:
        for bus in buses:
            with pytest.raises(ValueError, match=message), trio.fail_after(5):
                async with bus.open_endpoint("service", address=5):
                    raise AssertionError("not reached")
            async with bus.open_endpoint("service", address=5, announce=False):
                await settle()


async def test_the_smallest_buffers_that_an_announcement_fits() -> None:
    async with (
        _pair(56, 56, 4) as (host_bus, remote_bus),
        remote_bus.open_endpoint("service") as remote,
        host_bus.open_endpoint("service") as host,
    ):
        with trio.fail_after(5):
            await host.wait_bound()
            await remote.wait_bound()


@pytest.mark.parametrize("size", [-1, 0, 16, 65552, 1 << 17])
@pytest.mark.parametrize("direction", ["send", "receive"])
def test_sizes_that_cannot_be(direction: str, size: int) -> None:
    what = f"{direction} buffers of {size} bytes; 17 to 65551 are possible"
    with pytest.raises(ValueError, match=what):
        if direction == "send":
            BusOptions(send_buffer_size=size)
        else:
            BusOptions(receive_buffer_size=size)


async def _sleep(_: Link) -> None:
    await trio.sleep_forever()


async def test_memory_without_room_for_the_buffers_is_refused_with_the_numbers() -> None:
    async with open_processor(LoopbackPlatform(_sleep)) as processor:
        await processor.boot(python_firmware(make_table(256)))
        options = BusOptions(send_buffer_size=65536, receive_buffer_size=65536)
        with pytest.raises(ResourceTableError, match=r"33554432 bytes of buffers are needed"):
            async with open_bus(processor.rpmsg_device(), options):
                raise AssertionError("not reached")


# Between processes


# The echo program with buffer sizes of its own.
_ECHO = """
import sys
sys.path.insert(0, sys.argv[1])
import contextlib
import trio
from openamp_py import *
from openamp_py.platforms import ShmAddress, ShmLink
from openamp_py.rpmsg.wire import is_shutdown

async def main():
    to_remote, to_host = int(sys.argv[3]), int(sys.argv[4])
    options = BusOptions(send_buffer_size=to_host, receive_buffer_size=to_remote)
    with contextlib.closing(ShmLink(ShmAddress.parse(sys.argv[2]))) as link:
        async with (
            open_resources(link) as resources,
            open_bus(resources.rpmsg_device(), options) as bus,
            bus.open_endpoint(ECHO_CHANNEL) as endpoint,
        ):
            async for message in endpoint:
                await endpoint.send_to(message.payload[:endpoint.payload_limit], message.source)
                if is_shutdown(message.payload):
                    return

trio.run(main)
"""


@pytest.mark.parametrize("to_remote, to_host", [(64, 65536), (65536, 64), (4096, 256)])
async def test_different_sizes_between_processes(to_remote: int, to_host: int) -> None:
    """Acceptance scenario 14 (OA#155, OA#322) with a real process."""
    home = str(Path(__file__).resolve().parents[2])
    arguments = (sys.executable, "-c", _ECHO, home, URL, str(to_remote), str(to_host))
    memory_size = BUFFERS_DA + 256 * (to_remote + to_host)
    platform = ProcessPlatform(arguments, memory_size=memory_size)
    options = BusOptions(send_buffer_size=to_remote, receive_buffer_size=to_host)
    with trio.fail_after(30):
        async with (
            open_session(platform, options=options) as session,
            session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
        ):
            await endpoint.wait_bound()
            assert endpoint.payload_limit == to_remote - HEADER
            for number in range(20):
                for length in (0, 1, endpoint.payload_limit):
                    payload = _pattern(length, number)[:length]
                    await endpoint.send(payload)
                    assert (await endpoint.receive()).payload == payload[: to_host - HEADER]
            assert (await session.shutdown(endpoint, grace=10)).graceful
