"""Sessions whose core crashes, hangs and resets: the same endpoints work afterwards."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from openamp_py import (
    ECHO_CHANNEL,
    CoreCrashedError,
    CoreResetError,
    CrashKind,
    CrashLoopError,
    Endpoint,
    Link,
    LoopbackPlatform,
    NativePlatform,
    Platform,
    ProcessorState,
    ProcessPlatform,
    RemoteProcessor,
    Session,
    open_bus,
    open_processor,
    open_resources,
    open_session,
)
from openamp_py.echo import serve_echo
from openamp_py.platforms.child import SignalledCore
from openamp_py.platforms.demo import python_firmware
from openamp_py.platforms.native import shipped_echo
from openamp_py.remoteproc.crash import CrashPolicy
from openamp_py.remoteproc.resource_table import ResourceTable, Vdev, Vring
from openamp_py.virtio import VirtioDevice

CRASH, RESET = (struct.pack("<I", 0xEF56A500 + n) for n in (1, 3))  # csrc/firmware/echo_protocol.h
LIMIT = 30.0
RECOVERS = CrashPolicy(recovery=True, limit=10_000)


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def _answers(endpoint: Endpoint, count: int = 3) -> None:
    await endpoint.wait_bound()
    for number in range(count):
        await endpoint.send(b"%d" % number)
        assert (await endpoint.receive()).payload == b"%d" % number


def _processor(session: Session) -> RemoteProcessor:
    assert session.processor is not None
    return session.processor


async def _end(processor: RemoteProcessor) -> None:
    """The core dies: by a signal where it is a process, or else it is reported."""
    core = processor.core
    if isinstance(core, SignalledCore):
        assert core.pid is not None
        os.kill(core.pid, signal.SIGSEGV)
    else:
        assert processor.report_crash(CrashKind.FATAL_ERROR, "by the test")
        assert processor._life is not None
        processor._life.scope.cancel()  # not after the grace that an interrupt has


async def test_every_waiter_is_told_and_goes_on(core: str) -> None:
    with trio.fail_after(LIMIT):
        async with (
            open_session(core, policy=RECOVERS) as session,
            session.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
            session.bus.open_endpoint("nobody", rebind=True) as unbound,
        ):
            processor = _processor(session)
            await _answers(endpoint)
            told: list[str] = []

            async def wait(name: str, what: Callable[[], Awaitable[object]]) -> None:
                try:
                    await what()
                except trio.BrokenResourceError as error:
                    assert isinstance(error.__cause__, CoreCrashedError)
                    told.append(name)
                except CoreCrashedError:
                    told.append(name)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait, "receive", endpoint.receive)
                nursery.start_soon(wait, "bound", unbound.wait_bound)
                nursery.start_soon(wait, "exit", processor.wait_exit)
                await trio.testing.wait_all_tasks_blocked(0.01)
                await _end(processor)
                await processor.wait_state(ProcessorState.CRASHED)
                with trio.move_on_after(1):
                    await processor.wait_up()
                await session.wait_up()
                await trio.testing.wait_all_tasks_blocked(0.01)
                nursery.cancel_scope.cancel()
            assert {"receive", "exit"} <= set(told)
            await _answers(endpoint)


@pytest.mark.parametrize(("order", "kind"), [(CRASH, CoreCrashedError), (RESET, CoreResetError)])
async def test_a_native_core_comes_back(order: bytes, kind: type[Exception]) -> None:
    with trio.fail_after(LIMIT):
        async with (
            open_session("native", policy=RECOVERS) as session,
            session.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
        ):
            states = _processor(session).states()
            for _ in range(3):
                await endpoint.wait_bound()
                await endpoint.send(order)
                with pytest.raises(trio.BrokenResourceError) as caught:
                    await endpoint.receive()
                assert isinstance(caught.value.__cause__, kind)
                await _processor(session).wait_state(ProcessorState.RUNNING)
                await _processor(session).wait_settled()
                await session.wait_up()
                await _answers(endpoint)
            await _processor(session).shutdown()
        seen = [state.value async for state in states]
        assert seen == ["running", *["crashed", "running"] * 3, "stopped", "offline"]


async def test_a_native_core_that_crashes_again_and_again_is_given_up() -> None:
    with trio.fail_after(LIMIT):
        async with (
            open_session("native", policy=CrashPolicy(recovery=True, limit=3)) as session,
            session.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
        ):
            processor = _processor(session)
            for _ in range(3):
                await endpoint.wait_bound()
                await endpoint.send(CRASH)
                with pytest.raises(trio.BrokenResourceError):
                    await endpoint.receive()
                await processor.wait_settled()
            with pytest.raises(CrashLoopError, match="in a loop: 3 within"):
                await session.wait_up()
            await processor.recover()
            await _answers(endpoint)


async def test_a_restart_after_a_crash(core: str) -> None:
    with trio.fail_after(LIMIT):
        async with (
            open_session(core) as session,
            session.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
        ):
            processor = _processor(session)
            await _answers(endpoint)
            await processor.boot()
            await _end(processor)
            with pytest.raises(trio.BrokenResourceError):
                await endpoint.receive()
            with pytest.raises(CoreCrashedError):
                await processor.wait_exit()
            await session.restart()
            assert processor.power_count == 1
            await _answers(endpoint)
            shut = await session.shutdown(endpoint, grace=5)
            assert shut.graceful and processor.state is ProcessorState.OFFLINE


async def test_the_others_lose_nothing_when_one_crashes_in_a_loop() -> None:
    with trio.fail_after(LIMIT):
        async with (
            open_session("native", policy=RECOVERS) as native,
            open_session("process") as process,
            open_session("loopback") as loopback,
            native.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as victim,
            process.bus.open_endpoint(ECHO_CHANNEL) as one,
            loopback.bus.open_endpoint(ECHO_CHANNEL) as two,
            trio.open_nursery() as nursery,
        ):
            counts = [0, 0]

            async def talk(index: int, endpoint: Endpoint) -> None:
                while True:
                    await _answers(endpoint, 1)
                    counts[index] += 1

            nursery.start_soon(talk, 0, one)
            nursery.start_soon(talk, 1, two)
            processor = _processor(native)
            for number in range(1, 11):
                await _answers(victim, 1)
                before = list(counts)
                await victim.send(CRASH)
                with pytest.raises(trio.BrokenResourceError):
                    await victim.receive()
                await processor.wait_settled()
                await native.wait_up()
                assert processor.crashes == number
                while any(now == then for now, then in zip(counts, before, strict=True)):
                    await trio.lowlevel.checkpoint()
            assert _processor(process).crashes == _processor(loopback).crashes == 0
            nursery.cancel_scope.cancel()


def _two_buses() -> ResourceTable:
    """Two RPMsg devices of eight buffers in each direction."""
    return ResourceTable(
        tuple(
            Vdev(
                7,
                0,
                1,
                vrings=tuple(
                    Vring(0x1000 + 0x4000 * n + 0x2000 * m, 0x1000, 8, 2 * n + m) for m in range(2)
                ),
            )
            for n in range(2)
        )
    )


async def _serve_two(link: Link) -> None:
    async def serve(device: VirtioDevice, index: int) -> None:
        async with open_bus(device) as bus, bus.open_endpoint(f"echo-{index}") as endpoint:
            async for message in endpoint:
                await endpoint.send_to(b"%d:" % index + message.payload, message.source)

    async with open_resources(link) as resources, trio.open_nursery() as nursery:
        for index, device in enumerate(resources.devices):
            nursery.start_soon(serve, device, index)


async def test_one_table_with_two_buses() -> None:
    with trio.fail_after(LIMIT):
        async with open_processor(LoopbackPlatform(_serve_two)) as processor:
            for _ in range(2):
                await processor.boot(python_firmware(_two_buses()))
                one, two = processor.devices
                async with (
                    open_bus(one) as bus_0,
                    open_bus(two) as bus_1,
                    bus_0.open_endpoint("echo-0") as first,
                    bus_1.open_endpoint("echo-1") as second,
                ):
                    for index, endpoint in enumerate((first, second)):
                        await endpoint.wait_bound()
                        for number in range(20):
                            await endpoint.send(b"%d" % number)
                            answer = (await endpoint.receive()).payload
                            assert answer == b"%d:%d" % (index, number)
                await processor.shutdown()


async def _boot_ping_shutdown(core: str, cycles: int) -> None:
    platforms: dict[str, Callable[[], Platform]] = {
        "native": NativePlatform,
        "process": ProcessPlatform,
        "loopback": lambda: LoopbackPlatform(serve_echo),
    }
    image = shipped_echo() if core == "native" else python_firmware()
    async with open_processor(platforms[core]()) as processor:
        flat: set[int] = set()
        for number in range(cycles):
            await processor.boot(image)
            async with (
                open_bus(processor.rpmsg_device()) as bus,
                bus.open_endpoint(ECHO_CHANNEL) as endpoint,
            ):
                await _answers(endpoint, 1)
            await processor.shutdown()
            if number >= 2:
                flat.add(_open_descriptors())
        assert len(flat) == 1, f"descriptors: {flat}"
        assert Path("/proc/thread-self/children").read_text() == ""


async def _crash_recover(cycles: int) -> None:
    async with (
        open_session("native", policy=CrashPolicy(recovery=True, limit=cycles + 1)) as session,
        session.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
    ):
        processor = _processor(session)
        flat: set[int] = set()
        for number in range(1, cycles + 1):
            await _answers(endpoint, 1)
            await endpoint.send(CRASH)
            with pytest.raises(trio.BrokenResourceError):
                await endpoint.receive()
            await processor.wait_settled()
            await session.wait_up()
            assert (processor.crashes, processor.boots) == (number, number + 1)
            if number >= 3:
                flat.add(_open_descriptors())
        assert len(flat) == 1, f"descriptors: {flat}"
        await _answers(endpoint)


@pytest.mark.parametrize("name", ["native", "loopback"])
async def test_a_hundred_boots(name: str) -> None:
    with trio.fail_after(60):
        await _boot_ping_shutdown(name, 100)


async def test_a_hundred_crashes() -> None:
    with trio.fail_after(60):
        await _crash_recover(100)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["native", "loopback"])
async def test_a_thousand_boots(name: str) -> None:
    with trio.fail_after(300):
        await _boot_ping_shutdown(name, 1000)


@pytest.mark.soak
async def test_a_thousand_crashes() -> None:
    with trio.fail_after(300):
        await _crash_recover(1000)
