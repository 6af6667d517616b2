"""One test body for every core there is: this process, another one, native, and each QEMU board."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import trio

from openamp_py import (
    ECHO_CHANNEL,
    Announcement,
    Bus,
    Channel,
    CoreCrashedError,
    CoreResetError,
    Drops,
    Endpoint,
    ProcessorState,
    RemoteProcessor,
    Session,
)
from openamp_py.choosing import list_cores
from openamp_py.pytest_plugin import OpenSession

QEMU = (
    "qemu:mps2-an385",
    "qemu:mps2-an386",
    "qemu:mps2-an511",
    "qemu:mps2-an500",
    "qemu:mps2-an505",
    "qemu:mps2-an521",
    "qemu:mps3-an524",
    "qemu:mps3-an547",
    "qemu:virt-rv32",
    "qemu:virt-rv64",
)
CORES = ("loopback", "process", "native", *QEMU)
CRASH, RESET = (struct.pack("<I", 0xEF56A500 + n) for n in (1, 3))  # csrc/firmware/echo_protocol.h
MESSAGES = 200

pytestmark = pytest.mark.openamp(cores=CORES)


@pytest.fixture
async def echo(openamp_bus: Bus) -> AsyncIterator[Endpoint]:
    """An endpoint that is bound to the echo service."""
    async with openamp_bus.open_endpoint(ECHO_CHANNEL) as endpoint:
        await endpoint.wait_bound()
        yield endpoint


async def test_every_size_comes_back_whole(echo: Endpoint) -> None:
    for size in (*range(17), 255, 256, 257, echo.payload_limit - 1, echo.payload_limit):
        payload = bytes((size + each) & 0xFF for each in range(size))
        await echo.send(payload)
        assert await echo.receive() == (payload, echo.destination)


async def test_messages_come_back_in_order(echo: Endpoint, openamp_bus: Bus) -> None:
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            for number in range(MESSAGES):
                await echo.send(b"%d" % number)

        for number in range(MESSAGES):
            assert (await echo.receive()).payload == b"%d" % number
    size = sum(len(b"%d" % number) for number in range(MESSAGES))
    own = echo.statistics
    assert (own.sent, own.sent_bytes) == (own.received, own.received_bytes) == (MESSAGES, size)
    counted = openamp_bus.statistics
    # The core announces once; the host when it opens, and again where it is announced to later.
    assert counted.received == MESSAGES + 1
    assert counted.sent - MESSAGES in (1, 2)
    assert counted.drops == Drops()
    assert counted.kicks_sent >= 1 and counted.kicks_received >= 1


async def test_several_endpoints_share_the_service(echo: Endpoint, openamp_bus: Bus) -> None:
    async with openamp_bus.open_endpoint(destination=echo.destination or 0) as other:
        await other.send(b"other")
        await echo.send(b"echo")
        assert (await other.receive()).payload == b"other"
        assert (await echo.receive()).payload == b"echo"


async def test_the_service_is_announced_and_withdrawn(
    openamp_session: Session, openamp_bus: Bus
) -> None:
    async with openamp_bus.open_watch() as watch, openamp_bus.open_endpoint(ECHO_CHANNEL) as ept:
        announcement = Announcement(Channel(ECHO_CHANNEL, 1024))
        assert await anext(watch) == announcement
        await ept.wait_bound()
        assert (await openamp_session.shutdown(ept, grace=10)).graceful
        assert await anext(watch) == replace(announcement, destroy=True)


async def test_it_leaves_when_it_is_asked_to(openamp_session: Session, echo: Endpoint) -> None:
    shutdown = await openamp_session.shutdown(echo, grace=10)
    assert shutdown.graceful and shutdown.reason is None
    assert openamp_session.processor is not None
    assert openamp_session.processor.state is ProcessorState.OFFLINE


async def test_what_waits_for_a_suspended_core_is_answered(
    openamp_processor: RemoteProcessor, echo: Endpoint
) -> None:
    await openamp_processor.suspend()
    await echo.send(b"wait")
    await openamp_processor.resume()
    assert (await echo.receive()).payload == b"wait"


async def test_it_boots_again(openamp_open: OpenSession) -> None:
    for _ in range(2):
        async with (
            openamp_open() as session,
            session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
        ):
            await endpoint.send(b"hello")
            assert (await endpoint.receive()).payload == b"hello"


@pytest.mark.openamp(cores=("native", *QEMU))
@pytest.mark.parametrize(("order", "error"), [(CRASH, CoreCrashedError), (RESET, CoreResetError)])
async def test_an_end_of_its_own_is_a_typed_error(
    openamp_session: Session, echo: Endpoint, order: bytes, error: type[Exception]
) -> None:
    await echo.send(order)
    with pytest.raises(trio.BrokenResourceError) as caught:
        await echo.receive()
    assert type(caught.value.__cause__) is error
    processor = openamp_session.processor
    assert processor is not None and processor.failure is caught.value.__cause__
    if isinstance(processor.failure, CoreCrashedError):
        assert processor.failure.registers and processor.failure.pc is not None
    assert openamp_session.bus.recent().sent[-1].payload == order


async def test_every_board_with_a_firmware_of_ours_is_here() -> None:
    shipped = {core.name for core in await list_cores() if core.firmware}
    assert shipped <= {*CORES}
