"""Cores that are suspended, resumed and interrupted, on every platform that runs them."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from openamp_py import (
    ECHO_CHANNEL,
    Core,
    CoreCrashedError,
    Endpoint,
    Link,
    LoopbackPlatform,
    NativePlatform,
    PeerGoneError,
    Platform,
    PlatformError,
    ProcessPlatform,
    Session,
    decode_elf_untrusted,
    open_processor,
    open_session,
    serve_echo,
)
from openamp_py.platforms import child
from openamp_py.platforms.demo import python_firmware
from openamp_py.platforms.native import RAM_DA, RAM_SIZE, shipped_echo
from openamp_py.platforms.process import ProcessCore

HANG = struct.pack("<I", 0xEF56A502)  # csrc/firmware/echo_protocol.h
LIMIT = 30.0


@asynccontextmanager
async def _echo(core: str) -> AsyncIterator[tuple[Session, Endpoint, Core]]:
    with trio.fail_after(LIMIT):
        async with open_session(core) as session, session.bus.open_endpoint(ECHO_CHANNEL) as ept:
            await ept.wait_bound()
            assert session.processor is not None
            opened = session.processor.core
            assert isinstance(opened, Core)
            yield session, ept, opened


def _unstarted(kind: str) -> tuple[Platform, Core]:
    if kind == "native":
        native = NativePlatform()
        return native, native.create_core(decode_elf_untrusted(shipped_echo().read_bytes()))
    platform = ProcessPlatform() if kind == "process" else LoopbackPlatform(serve_echo)
    return platform, platform.create_core(python_firmware())


def _states(pid: int) -> set[str]:
    return {
        stat.read_text().rpartition(")")[2].split()[0]
        for stat in Path(f"/proc/{pid}/task").glob("*/stat")
    }


def _cpu_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])  # utime


def _has_socket(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):  # closed while we looked
        return any(
            os.readlink(entry).startswith("socket:") for entry in Path(f"/proc/{pid}/fd").iterdir()
        )
    return True


async def test_what_is_sent_to_a_suspended_core_waits(core: str) -> None:
    async with _echo(core) as (_, endpoint, opened):
        for number in range(3):
            await opened.suspend()
            await endpoint.send(bytes([number, 1]))
            await endpoint.send(bytes([number, 2]))
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.WouldBlock):
                endpoint.receive_nowait()
            await opened.resume()
            assert (await endpoint.receive()).payload == bytes([number, 1])
            assert (await endpoint.receive()).payload == bytes([number, 2])


async def test_a_suspended_core_is_suspended_already(core: str) -> None:
    async with _echo(core) as (_, endpoint, opened):
        await opened.suspend()
        await opened.suspend()
        await opened.resume()
        await opened.resume()
        await endpoint.send(b"awake")
        assert (await endpoint.receive()).payload == b"awake"


@pytest.mark.parametrize("kind", ["native", "process"])
async def test_no_thread_of_a_suspended_process_executes(kind: str) -> None:
    async with _echo(kind) as (_, _, opened):
        assert isinstance(opened, child.SignalledCore) and opened.pid is not None
        await opened.suspend()
        assert _states(opened.pid) == {"T"}
        await opened.resume()
        assert _states(opened.pid) != {"T"}


async def test_what_a_program_started_is_suspended_with_it() -> None:
    script = "import os, time; os.write(2, b'%d\\n' % os.fork()); time.sleep(1000)"
    with trio.fail_after(LIMIT):
        async with open_processor(ProcessPlatform((sys.executable, "-c", script))) as processor:
            await processor.boot(python_firmware())
            core = processor.core
            assert isinstance(core, ProcessCore) and core.pid is not None
            started = await _child_of(core.pid)
            await core.suspend()
            while not child.is_stopped(started):
                await trio.lowlevel.checkpoint()
            await core.resume()
            assert not child.is_stopped(started)


async def _child_of(pid: int) -> int:
    while True:
        await trio.lowlevel.checkpoint()
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if found:
            return int(found[0])


async def test_a_loopback_application_hears_of_several_kicks_once() -> None:
    heard = 0

    async def application(link: Link) -> None:
        def notified() -> None:
            nonlocal heard
            heard += 1
            link.kick(0)

        await link.run(notified)

    told = 0

    def told_() -> None:
        nonlocal told
        told += 1

    platform = LoopbackPlatform(application)
    core = platform.create_core(python_firmware())
    async with trio.open_nursery() as nursery:
        await nursery.start(core.run, told_)
        await core.suspend()
        for _ in range(3):
            core.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        assert (heard, told) == (0, 0)
        await core.resume()
        await trio.testing.wait_all_tasks_blocked()
        assert (heard, told) == (1, 1)
        nursery.cancel_scope.cancel()
    platform.close()


# Refusals


@pytest.mark.parametrize("call", ["suspend", "resume"])
async def test_a_core_that_was_never_started_refuses(core: str, call: str) -> None:
    platform, unstarted = _unstarted(core)
    with pytest.raises(PlatformError, match=r"cannot be (suspended|resumed): it"):
        await getattr(unstarted, call)()
    unstarted.interrupt()
    platform.close()


@pytest.mark.parametrize("call", ["suspend", "resume"])
async def test_a_core_that_has_ended_refuses(core: str, call: str) -> None:
    async with _echo(core) as (session, _, opened):
        assert session.processor is not None
        await session.processor.shutdown()
        with pytest.raises(PlatformError, match=r"cannot be (suspended|resumed): it"):
            await getattr(opened, call)()
        opened.interrupt()


@pytest.mark.parametrize("kind", ["native", "process"])
async def test_a_core_that_dies_while_it_is_being_suspended(kind: str) -> None:
    async with _echo(kind) as (_, _, opened):
        assert isinstance(opened, child.SignalledCore) and opened.pid is not None
        os.kill(opened.pid, signal.SIGKILL)
        with pytest.raises(PlatformError, match="cannot be suspended: it has ended"):
            while True:
                await opened.suspend()


@pytest.mark.parametrize("kind", ["native", "process"])
async def test_a_cancelled_suspend_lets_the_core_go_on(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _echo(kind) as (_, endpoint, opened):
        with monkeypatch.context() as patched, trio.CancelScope() as scope:

            def never(pid: int) -> bool:
                scope.cancel()
                return False

            patched.setattr(child, "is_stopped", never)
            await opened.suspend()
        assert scope.cancelled_caught
        await endpoint.send(b"awake")
        assert (await endpoint.receive()).payload == b"awake"


# How suspended cores end


@pytest.mark.parametrize("kind", ["native", "process"])
async def test_a_suspended_core_can_be_killed(kind: str) -> None:
    async with _echo(kind) as (_, endpoint, opened):
        await opened.suspend()
        assert isinstance(opened, child.SignalledCore) and opened.pid is not None
        os.kill(opened.pid, signal.SIGKILL)
        with pytest.raises(trio.BrokenResourceError, match="died of SIGKILL"):
            await endpoint.receive()


async def test_a_suspended_core_can_be_shut_down(core: str) -> None:
    async with _echo(core) as (session, endpoint, opened):
        await opened.suspend()
        assert session.processor is not None
        await session.processor.shutdown()
        with pytest.raises((trio.BrokenResourceError, trio.EndOfChannel)):
            await endpoint.receive()


async def test_a_suspended_program_without_a_doorbell_is_not_blamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = 0
    enough = trio.Event()
    is_stopped = child.is_stopped

    def counted(pid: int) -> bool:
        nonlocal looks
        looks += 1
        if looks == 6:
            enough.set()
        return is_stopped(pid)

    # The doorbell is held by what the program started, which is then killed.
    script = "import os, time; os.fork() and os.closerange(3, 100); time.sleep(1000)"
    with trio.fail_after(LIMIT):
        async with open_processor(ProcessPlatform((sys.executable, "-c", script))) as processor:
            await processor.boot(python_firmware())
            assert isinstance(processor.core, ProcessCore) and processor.core.pid is not None
            core = processor.core
            holder = await _child_of(processor.core.pid)
            while _has_socket(processor.core.pid):
                await trio.lowlevel.checkpoint()
            await core.suspend()
            monkeypatch.setattr(child, "_EXIT_GRACE", 0.001)
            monkeypatch.setattr(child, "is_stopped", counted)
            os.kill(holder, signal.SIGKILL)
            await enough.wait()
            assert processor.failure is None
            await core.resume()
            await processor.wait_exit()
            assert isinstance(processor.failure, PeerGoneError)
            assert "closed its doorbell" in str(processor.failure)


# Interrupting


@pytest.mark.parametrize("suspended", [False, True])
async def test_a_hung_native_core_says_where_it_is(suspended: bool) -> None:
    async with _echo("native") as (_, endpoint, opened):
        await endpoint.send(HANG)
        assert isinstance(opened, child.SignalledCore) and opened.pid is not None
        before = _cpu_ticks(opened.pid)
        while _cpu_ticks(opened.pid) < before + 2:  # it slept until it heard the order
            await trio.lowlevel.checkpoint()
        if suspended:
            await opened.suspend()
        opened.interrupt()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await endpoint.receive()
        error = caught.value.__cause__
        assert isinstance(error, CoreCrashedError)
        assert error.signal is signal.SIGABRT
        assert error.pc is not None and RAM_DA <= error.pc < RAM_DA + RAM_SIZE


@pytest.mark.parametrize("suspended", [False, True])
async def test_an_interrupted_process_is_a_crash(suspended: bool) -> None:
    async with _echo("process") as (_, endpoint, opened):
        if suspended:
            await opened.suspend()
        opened.interrupt()
        with pytest.raises(trio.BrokenResourceError, match="died of SIGABRT"):
            await endpoint.receive()


async def test_a_loopback_application_cannot_be_interrupted() -> None:
    async with _echo("loopback") as (_, endpoint, opened):
        opened.interrupt()
        await endpoint.send(b"still here")
        assert (await endpoint.receive()).payload == b"still here"
