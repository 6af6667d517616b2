"""Sessions that leave a native core running, and others that take it over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import trio

from openamp_py import (
    ECHO_CHANNEL,
    CoreCrashedError,
    CoredumpMode,
    CrashPolicy,
    DetachedError,
    NativePlatform,
    PlatformError,
    ProcessorState,
    open_processor,
    open_session,
)
from openamp_py.platforms.keeper import KeptCore
from openamp_py.platforms.native import shipped_echo

LIMIT = 60.0

HOST = textwrap.dedent(
    """
    import sys
    import trio
    from openamp_py import ECHO_CHANNEL, NativePlatform, open_session

    async def main(path: str, first: int, end: str) -> None:
        platform = NativePlatform(rendezvous=path)
        async with (
            open_session(platform, attach=first > 0) as session,
            session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
        ):
            for number in range(first, first + 300):
                await endpoint.send(b"%d" % number)
                assert (await endpoint.receive()).payload == b"%d" % number
            print(endpoint.address, flush=True)
            if end == "detach":
                assert await session.detach() == 0
            elif end == "hang":
                await trio.sleep_forever()

    trio.run(main, sys.argv[1], int(sys.argv[2]), sys.argv[3])
    """
)


def _host(path: Path, first: int, end: str) -> subprocess.CompletedProcess[str]:
    """A host in a process of its own; what it printed."""
    return subprocess.run(
        [sys.executable, "-c", HOST, str(path), str(first), end],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def test_a_core_outlives_its_hosts(tmp_path: Path) -> None:
    """Three processes, one after the other; indexes of the rings have wrapped by then."""
    path = tmp_path / "core"
    for first, end in ((0, "detach"), (300, "detach"), (600, "detach"), (900, "stop")):
        done = _host(path, first, end)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "1024\n", "the endpoint has the address that the core knows"
    assert not path.exists()


async def test_what_was_sent_before_is_answered_to_the_next_host(tmp_path: Path) -> None:
    """The core is suspended, so that all of it is still in the rings when the host leaves."""
    path = tmp_path / "core"
    async with (
        open_session(NativePlatform(rendezvous=path)) as session,
        session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.wait_bound()
        processor = session.processor
        assert processor is not None
        await processor.suspend()
        for number in range(100):
            await endpoint.send(b"%d" % number)
        await processor.resume()
        assert processor.state is ProcessorState.RUNNING
        unread = await session.detach()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await endpoint.send(b"too late")
        assert isinstance(caught.value.__cause__, DetachedError)
        before = [(await endpoint.receive()).payload for _ in range(unread)]
    async with (
        open_session(NativePlatform(rendezvous=path), attach=True) as session,
        session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        with trio.fail_after(LIMIT):
            after = [(await endpoint.receive()).payload for _ in range(100 - unread)]
        assert before + after == [b"%d" % number for number in range(100)]


async def test_one_processor_leaves_and_comes_back(tmp_path: Path) -> None:
    platform = NativePlatform(rendezvous=tmp_path / "core")
    async with (
        open_session(platform) as session,
        session.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
    ):
        processor = session.processor
        assert processor is not None
        states: list[ProcessorState] = []
        for number in range(3):
            with trio.fail_after(LIMIT):
                await endpoint.wait_bound()
                await endpoint.send(b"%d" % number)
                assert (await endpoint.receive()).payload == b"%d" % number
                await session.detach()
                states.append(processor.state)
                await session.attach()
                states.append(processor.state)
        assert states == [ProcessorState.DETACHED, ProcessorState.ATTACHED] * 3
        assert (await session.shutdown(endpoint, grace=1.0)).graceful


async def test_a_core_that_cannot_be_left_is_not_touched(core: str) -> None:
    async with (
        open_session(core) as session,
        session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.wait_bound()
        with pytest.raises(PlatformError, match=r"can(not| only) be left running"):
            await session.detach()
        await endpoint.send(b"still here")
        assert (await endpoint.receive()).payload == b"still here"


async def test_nobody_there(tmp_path: Path) -> None:
    path = tmp_path / "core"
    async with open_processor(NativePlatform(rendezvous=path)) as processor:
        with pytest.raises(PlatformError, match=f"no core was left running at {path}"):
            await processor.attach()
        assert processor.state is ProcessorState.OFFLINE
    with pytest.raises(ValueError, match="takes no firmware"):
        async with open_session(NativePlatform(rendezvous=path), b"image", attach=True):
            pass


async def test_a_core_that_crashed_alone_tells_how_and_is_dumped(tmp_path: Path) -> None:
    path = tmp_path / "core"
    async with (
        open_session(NativePlatform(rendezvous=path)) as session,
        session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.wait_bound()
        processor = session.processor
        assert processor is not None and processor.core is not None
        core = processor.core
        await session.detach()
        assert isinstance(core, KeptCore) and core.pid is not None
        os.kill(core.pid, signal.SIGSEGV)
    policy = CrashPolicy(coredump=CoredumpMode.ENABLED, coredump_to=tmp_path)
    async with open_processor(NativePlatform(rendezvous=path), policy=policy) as processor:
        with trio.fail_after(LIMIT):
            await processor.attach()
            await processor.wait_state(ProcessorState.CRASHED)
            await processor.wait_settled()
        assert isinstance(processor.failure, CoreCrashedError)
        assert "SIGSEGV" in str(processor.failure)
        assert processor.last_coredump is not None
        assert b"bound to 0x400 by name service" in processor.last_coredump.read_bytes()


def test_a_host_that_is_killed_takes_its_core_along(tmp_path: Path) -> None:
    path = tmp_path / "core"
    with subprocess.Popen(
        [sys.executable, "-c", HOST, str(path), "0", "hang"], stdout=subprocess.PIPE
    ) as host:
        assert host.stdout is not None and host.stdout.readline()
        os.kill(host.pid, signal.SIGKILL)

    async def wait() -> None:
        while path.exists():
            await trio.sleep(0.01)

    async def main() -> None:
        with trio.fail_after(LIMIT):
            await wait()

    trio.run(main)


async def test_what_the_host_before_left_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "core"
    async with open_processor(NativePlatform(rendezvous=path)) as processor:
        await processor.boot(shipped_echo())
        await processor.detach(b'{"channels": 7}')
    with pytest.raises(PlatformError, match="what the host before left cannot be used"):
        async with open_session(NativePlatform(rendezvous=path), attach=True):
            pass
