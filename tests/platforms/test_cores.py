"""One body for every core: this process, a process of its own, machine code on the native core."""

from __future__ import annotations

import os
import signal
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from openamp_py import (
    ECHO_CHANNEL,
    CoreCrashedError,
    Endpoint,
    Link,
    LoopbackPlatform,
    PeerGoneError,
    PlatformError,
    ProcessorState,
    ProcessPlatform,
    Session,
    open_processor,
    open_session,
)
from openamp_py.platforms.demo import python_firmware
from openamp_py.platforms.process import ProcessCore
from openamp_py.rpmsg.wire import SHUTDOWN_REQUEST

LIMIT = 30.0
"""Seconds after which a test has hung; nothing is measured by it."""


@asynccontextmanager
async def _echo(core: str) -> AsyncIterator[tuple[Session, Endpoint]]:
    with trio.fail_after(LIMIT):
        async with open_session(core) as session, session.bus.open_endpoint(ECHO_CHANNEL) as ept:
            await ept.wait_bound()
            yield session, ept


async def test_echoes_every_size_whole(core: str) -> None:
    async with _echo(core) as (_, endpoint):
        assert endpoint.payload_limit == 496
        for size in (0, 1, 2, 3, 15, 16, 17, 255, 256, 495, 496):
            payload = bytes((size + i) & 0xFF for i in range(size))
            await endpoint.send(payload)
            assert await endpoint.receive() == (payload, endpoint.destination)


async def test_refuses_a_payload_over_the_limit_and_goes_on(core: str) -> None:
    async with _echo(core) as (_, endpoint):
        with pytest.raises(ValueError, match="payload of 497 bytes; the limit is 496 bytes"):
            await endpoint.send(bytes(497))
        await endpoint.send(b"fine")
        assert (await endpoint.receive()).payload == b"fine"


async def test_a_flood_comes_back_complete_and_in_order(core: str) -> None:
    total = 5000
    async with _echo(core) as (session, endpoint), trio.open_nursery() as nursery:

        async def flood() -> None:
            for number in range(total):
                await endpoint.send(struct.pack("<I", number) * 5)

        nursery.start_soon(flood)
        for number in range(total):
            assert (await endpoint.receive()).payload == struct.pack("<I", number) * 5
        assert session.bus.drops.unknown_destination == 0


async def test_several_endpoints_share_the_remote(core: str) -> None:
    async with (
        _echo(core) as (session, first),
        session.bus.open_endpoint(destination=first.destination or 0) as second,
    ):
        await first.send(b"first")
        await second.send(b"second")
        assert (await first.receive()).payload == b"first"
        assert (await second.receive()).payload == b"second"


async def test_the_service_is_seen_and_named(core: str) -> None:
    async with _echo(core) as (session, endpoint):
        channel = await session.bus.wait_service(ECHO_CHANNEL)
        assert session.bus.channels == (channel,)
        assert channel.address == endpoint.destination == 1024


async def test_shuts_down_gracefully(core: str) -> None:
    async with _echo(core) as (session, endpoint):
        await endpoint.send(b"unread")
        shutdown = await session.shutdown(endpoint, grace=10)
        assert shutdown.graceful and shutdown.reason is None
        assert session.processor is not None
        assert session.processor.state is ProcessorState.OFFLINE
        with pytest.raises((trio.BrokenResourceError, trio.EndOfChannel)):
            while True:
                await endpoint.receive()


async def test_the_acknowledgement_comes_before_the_withdrawal(core: str) -> None:
    async with _echo(core) as (session, endpoint):
        await endpoint.send(SHUTDOWN_REQUEST)
        assert (await endpoint.receive()).payload == SHUTDOWN_REQUEST
        with pytest.raises(trio.EndOfChannel):
            await endpoint.receive()
        assert session.processor is not None
        await session.processor.wait_exit()
        assert session.processor.state is ProcessorState.STOPPED
        assert isinstance(session.processor.failure, PeerGoneError)


async def test_a_hard_shutdown_breaks_the_endpoint(core: str) -> None:
    async with _echo(core) as (session, endpoint):
        assert session.processor is not None
        await session.processor.shutdown()
        # A Python application that is cancelled still withdraws its service; others cannot.
        with pytest.raises((trio.BrokenResourceError, trio.EndOfChannel)):
            await endpoint.receive()
        with pytest.raises(trio.BrokenResourceError):
            await endpoint.send(b"x")


async def test_boots_again_and_again(core: str) -> None:
    for _ in range(3):
        async with _echo(core) as (session, endpoint):
            await endpoint.send(b"hello")
            assert (await endpoint.receive()).payload == b"hello"
            await session.shutdown(endpoint, grace=10)


@pytest.mark.parametrize("killed_core", ["native", "process"])
async def test_a_killed_core_wakes_who_waits_with_how_it_died(killed_core: str) -> None:
    async with _echo(killed_core) as (session, endpoint), trio.open_nursery() as nursery:

        async def receive() -> None:
            with pytest.raises(trio.BrokenResourceError, match="died of SIGKILL") as caught:
                await endpoint.receive()
            assert isinstance(caught.value.__cause__, CoreCrashedError)
            assert caught.value.__cause__.signal is signal.SIGKILL

        nursery.start_soon(receive)
        children = _children()
        assert len(children) == 1
        os.kill(children[0], signal.SIGKILL)
        del session


async def test_a_remote_killed_while_it_leaves_is_a_hard_shutdown() -> None:
    async with _echo("process") as (session, endpoint):
        os.kill(_children()[0], signal.SIGSTOP)
        async with trio.open_nursery() as nursery:

            async def kill() -> None:
                await trio.testing.wait_all_tasks_blocked()
                os.kill(_children()[0], signal.SIGKILL)

            nursery.start_soon(kill)
            shutdown = await session.shutdown(endpoint, grace=10)
        assert not shutdown.graceful
        assert shutdown.reason is not None and "SIGKILL" in shutdown.reason


async def test_a_remote_that_does_not_answer_is_shut_down_hard_after_its_grace() -> None:
    async with _echo("process") as (session, endpoint):
        os.kill(_children()[0], signal.SIGSTOP)
        shutdown = await session.shutdown(endpoint, grace=0.05)
        assert str(shutdown) == "hard"
        assert shutdown.reason == "the remote did not leave within 0.05 s"
        assert _children() == []


async def test_a_signal_without_a_name_is_named_by_its_number() -> None:
    async with _echo("process") as (_, endpoint):
        os.kill(_children()[0], signal.SIGRTMIN + 5)
        with pytest.raises(trio.BrokenResourceError, match=f"signal {signal.SIGRTMIN + 5}"):
            await endpoint.receive()


async def test_a_service_that_is_gone_already_is_a_graceful_end(core: str) -> None:
    async with _echo(core) as (session, endpoint):
        await endpoint.send(SHUTDOWN_REQUEST)
        async for _ in endpoint:
            pass
        assert (await session.shutdown(endpoint, grace=10)).graceful


async def test_an_endpoint_that_is_closed_cannot_ask(core: str) -> None:
    async with _echo(core) as (session, endpoint):
        await endpoint.aclose()
        shutdown = await session.shutdown(endpoint, grace=10)
        assert not shutdown.graceful and "was closed" in str(shutdown.reason)
        assert session.processor is not None
        assert session.processor.state is ProcessorState.OFFLINE


async def test_a_service_that_never_came_cannot_be_asked(core: str) -> None:
    async with _echo(core) as (session, _), session.bus.open_endpoint("nobody") as endpoint:
        shutdown = await session.shutdown(endpoint, grace=0.05)
        assert shutdown.reason == "no service was bound within 0.05 s, so nobody could be asked"


async def test_a_grace_that_is_none_is_refused(core: str) -> None:
    async with _echo(core) as (session, endpoint):
        with pytest.raises(ValueError, match="a grace of -1"):
            await session.shutdown(endpoint, grace=-1)
        await endpoint.send(b"still up")
        assert (await endpoint.receive()).payload == b"still up"


async def test_an_application_that_fails_is_a_crash_with_its_exception() -> None:
    async def application(link: Link) -> None:
        raise ZeroDivisionError("in the remote")

    async with open_processor(LoopbackPlatform(application)) as processor:
        await processor.boot(python_firmware())
        with pytest.raises(CoreCrashedError, match="ZeroDivisionError") as caught:
            await processor.wait_exit()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


async def test_what_a_program_started_ends_with_it() -> None:
    command = ("sh", "-c", "sleep 1000 & echo $! > /proc/self/fd/2; wait")
    async with open_processor(ProcessPlatform(command)) as processor:
        await processor.boot(python_firmware())
        assert isinstance(processor.core, ProcessCore)
        group = processor.core.pid
        assert group is not None
        await processor.shutdown()
    with pytest.raises(ProcessLookupError):
        while True:
            os.killpg(group, 0)


async def test_a_program_that_closes_its_doorbell_and_goes_on_is_gone() -> None:
    script = "import os, sys, time; os.closerange(3, 100); time.sleep(1000)"
    async with open_processor(ProcessPlatform((sys.executable, "-c", script))) as processor:
        await processor.boot(python_firmware())
        with trio.fail_after(LIMIT):
            await processor.wait_exit()
        assert "closed its doorbell" in str(processor.failure)


async def test_a_program_that_leaves_its_group_ends_with_its_core() -> None:
    script = "import os, time; os.setpgid(0, os.getppid()); time.sleep(1000)"
    async with open_processor(ProcessPlatform((sys.executable, "-c", script))) as processor:
        await processor.boot(python_firmware())
        with trio.fail_after(LIMIT):
            await processor.shutdown()


async def test_a_remote_cannot_take_the_memory_away() -> None:
    script = """
import os
for fd in range(3, 100):
    try:
        os.ftruncate(fd, 0)
    except OSError:
        pass
"""
    async with open_processor(ProcessPlatform((sys.executable, "-c", script))) as processor:
        await processor.boot(python_firmware())
        await processor.wait_exit()
        assert bytes(processor.platform.memory.regions[0].view[:4]) == b"\1\0\0\0"


async def test_a_program_that_is_not_there_is_a_platform_error() -> None:
    async with open_processor(ProcessPlatform(("/nonexistent",))) as processor:
        with pytest.raises(PlatformError, match="cannot run /nonexistent: No such file"):
            await processor.boot(python_firmware())
        assert processor.state is ProcessorState.OFFLINE


def _children() -> list[int]:
    found = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children") as children:
            found += [int(pid) for pid in children.read().split()]
    return found
