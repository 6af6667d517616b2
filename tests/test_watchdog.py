"""Watchdogs: a core that is silent is reported, and one that is not is left alone."""

from __future__ import annotations

import struct

import pytest
import trio
import trio.testing

from openamp_py import (
    ECHO_CHANNEL,
    CoreCrashedError,
    CrashKind,
    Link,
    LoopbackPlatform,
    ProcessorState,
    open_bus,
    open_processor,
    open_resources,
    open_session,
)
from openamp_py.echo import serve_echo
from openamp_py.platforms.demo import python_firmware
from openamp_py.remoteproc.crash import CrashPolicy
from openamp_py.remoteproc.subdevices import Subdevice
from openamp_py.watchdog import open_watchdog

HANG = struct.pack("<I", 0xEF56A502)  # csrc/firmware/echo_protocol.h
RECOVERS = CrashPolicy(recovery=True)


async def _mute(link: Link) -> None:
    """An application that announces nothing."""
    async with open_resources(link) as resources, open_bus(resources.rpmsg_device()):
        await trio.sleep_forever()


async def _late(link: Link) -> None:
    """The echo service, which takes its time."""
    async with (
        open_resources(link) as resources,
        open_bus(resources.rpmsg_device()) as bus,
        bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        async for message in endpoint:
            await trio.sleep(2)
            await endpoint.send_to(message.payload, message.source)


async def test_a_core_that_is_fed_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    async with open_processor(LoopbackPlatform(serve_echo)) as processor:
        await processor.boot(python_firmware())
        async with open_watchdog(processor, 1.0) as watchdog:
            for _ in range(20):
                await trio.sleep(0.9)
                watchdog.feed()
            assert processor.crashes == 0


async def test_silence_is_a_crash_again_and_again(autojump_clock: trio.testing.MockClock) -> None:
    with trio.fail_after(100):
        async with (
            open_processor(LoopbackPlatform(serve_echo), policy=RECOVERS) as processor,
            open_watchdog(processor, 1.0),
        ):
            await trio.sleep(10)  # it is off: nobody need feed
            assert processor.crashes == 0
            await processor.boot(python_firmware())
            begun = trio.current_time()
            for number in (1, 2, 3):
                with pytest.raises(CoreCrashedError, match=r"no sign of life for 1\.0 s") as caught:
                    await processor.wait_exit()
                assert caught.value.kind is CrashKind.WATCHDOG
                await processor.wait_up()
                assert processor.crashes == number
            took = trio.current_time() - begun
        assert took == pytest.approx(6), "1 s, and 1 s to be ended"


async def test_a_core_that_is_suspended_may_be_silent(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_processor(LoopbackPlatform(serve_echo)) as processor:
        await processor.boot(python_firmware())
        async with open_watchdog(processor, 1.0):
            await trio.sleep(0.9)
            await processor.suspend()
            await trio.sleep(100)
            await processor.resume()
            await trio.sleep(0.9)
            assert processor.crashes == 0
            await processor.wait_state(ProcessorState.CRASHED)


async def test_it_does_not_spin_while_a_core_is_ended(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The clock jumps only when all tasks wait: one that spins would stop it for ever."""

    class Slow(Subdevice):
        async def stop(self, *, crashed: bool) -> None:
            await trio.sleep(4)

    with trio.fail_after(100):
        async with open_processor(LoopbackPlatform(serve_echo)) as processor:
            processor.add_subdevice(Slow())
            await processor.boot(python_firmware())
            async with open_watchdog(processor, 1.0):
                await processor.stop()
                assert processor.state is ProcessorState.STOPPED


@pytest.mark.parametrize("silence", [0, -1, float("inf"), float("nan")])
async def test_a_silence_that_is_no_time(silence: float) -> None:
    async with open_session("loopback") as session:
        with pytest.raises(ValueError, match="more than 0 seconds"):
            async with session.open_heartbeat(silence=silence):
                pass
        with pytest.raises(ValueError, match="a beat of 497 bytes; 496 are possible"):
            async with session.open_heartbeat(silence=1, beat=bytes(497)):
                pass


async def test_a_heartbeat_that_is_answered(autojump_clock: trio.testing.MockClock) -> None:
    async with open_session("loopback") as session, session.open_heartbeat(silence=1.0):
        await trio.sleep(60)
        assert session.processor is not None and session.processor.crashes == 0


async def test_a_service_that_never_comes(autojump_clock: trio.testing.MockClock) -> None:
    with trio.fail_after(100):
        async with (
            open_session(LoopbackPlatform(_mute), python_firmware()) as session,
            session.open_heartbeat(silence=3.0),
        ):
            assert session.processor is not None
            with pytest.raises(CoreCrashedError, match="no sign of life"):
                await session.processor.wait_exit()


@pytest.mark.parametrize(("silence", "crashes"), [(3.0, 0), (1.0, 1)])
async def test_answers_that_come_late(
    autojump_clock: trio.testing.MockClock, silence: float, crashes: int
) -> None:
    """Each takes two seconds; that there are more beats than answers is no harm."""
    async with (
        open_session(LoopbackPlatform(_late), python_firmware()) as session,
        session.open_heartbeat(silence=silence),
    ):
        await trio.sleep(60)
        assert session.processor is not None and session.processor.crashes == crashes


async def test_a_bus_that_is_closed_is_no_crash(autojump_clock: trio.testing.MockClock) -> None:
    async with open_session("loopback") as session, session.open_heartbeat(silence=1.0):
        await session.bus.aclose()
        await trio.sleep(60)
        assert session.processor is not None and session.processor.crashes == 0


async def test_a_hung_core_is_found_and_answers_again() -> None:
    with trio.fail_after(30):
        async with (
            open_session("native", policy=RECOVERS) as session,
            session.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
            session.open_heartbeat(silence=0.3),
        ):
            await endpoint.send(HANG)
            with pytest.raises(trio.BrokenResourceError) as caught:
                await endpoint.receive()
            cause = caught.value.__cause__
            assert isinstance(cause, CoreCrashedError) and cause.kind is CrashKind.WATCHDOG
            assert session.processor is not None
            await session.processor.wait_settled()
            await session.wait_up()
            await endpoint.wait_bound()
            for _ in range(4):
                await endpoint.send(b"again")
                assert (await endpoint.receive()).payload == b"again"
                await trio.sleep(0.2)
            assert session.processor.crashes == 1
