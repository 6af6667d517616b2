"""Crashes at every moment of a processor's life, and what follows them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from openamp_py import (
    CoreCrashedError,
    CrashKind,
    CrashLoopError,
    PlatformError,
    ProcessorState,
    RemoteProcessor,
    StateError,
)
from openamp_py.platforms.demo import python_firmware
from openamp_py.remoteproc.coredump import Coredump
from openamp_py.remoteproc.crash import CoredumpMode, CrashPolicy
from openamp_py.remoteproc.lifecycle import Call, Happening
from openamp_py.remoteproc.subdevices import Subdevice

OpenFake = Callable[..., AbstractAsyncContextManager[tuple[RemoteProcessor, Any]]]
Do = Callable[[RemoteProcessor, Call | Happening], Awaitable[None]]

CRASH = Happening.CRASH
RUNNING, CRASHED = ProcessorState.RUNNING, ProcessorState.CRASHED
RECOVERS = CrashPolicy(recovery=True, limit=3, window=60.0)
ENDS: dict[str, Callable[[RemoteProcessor], Awaitable[object]]] = {
    "stop": lambda p: p.stop(),
    "shutdown": lambda p: p.shutdown(),
}
MODES = (CoredumpMode.ENABLED, CoredumpMode.INLINE)


def _crash(platform: Any) -> None:
    """The core dies now."""
    platform.end_error = CoreCrashedError("the core died of SIGSEGV")
    platform.end.set()


async def _sink_hangs(dump: Coredump) -> None:
    await trio.sleep_forever()


class _Follower(Subdevice):
    """A subdevice that tells what it saw, and can do something in a step."""

    def __init__(self, **steps: Callable[[], Awaitable[object]]) -> None:
        self.seen: list[str] = []
        self._steps = steps

    async def _step(self, name: str) -> None:
        self.seen.append(name)
        if name in self._steps:
            await self._steps[name]()

    async def prepare(self) -> None:
        await self._step("prepare")

    async def start(self) -> None:
        await self._step("start")

    async def stop(self, *, crashed: bool) -> None:
        await self._step("crashed" if crashed else "stop")

    async def unprepare(self) -> None:
        await self._step("unprepare")


async def test_each_crash_counts_once_until_it_is_a_loop(open_fake: OpenFake, do_step: Do) -> None:
    with trio.fail_after(5):
        async with open_fake(RUNNING, policy=RECOVERS) as (processor, _):
            for number in (1, 2):
                await do_step(processor, CRASH)
                await processor.wait_up()
                assert (processor.crashes, processor.boots) == (number, number + 1)
            await do_step(processor, CRASH)
            with pytest.raises(CrashLoopError, match="in a loop: 3 within") as caught:
                await processor.wait_up()
            assert isinstance(caught.value.__cause__, CoreCrashedError)
            await processor.recover()
            assert processor.state is RUNNING and processor.failure is None
            await do_step(processor, CRASH)  # by hand it begins anew
            await processor.wait_up()


async def test_crashes_outside_the_window_are_no_loop(
    open_fake: OpenFake, do_step: Do, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_fake(RUNNING, policy=RECOVERS) as (processor, _):
        for _ in range(10):
            await do_step(processor, CRASH)
            await processor.wait_up()
            await trio.sleep(31)


async def test_a_core_that_crashes_as_soon_as_it_is_recovered(
    open_fake: OpenFake, do_step: Do
) -> None:
    """It dies while its subdevices are started, and in the moment after."""
    with trio.fail_after(5):
        async with open_fake(RUNNING, policy=RECOVERS) as (processor, platform):
            deaths = iter([True])

            async def die() -> None:
                if next(deaths, False):
                    _crash(platform)
                else:
                    platform.end_error = None

            processor.add_subdevice(_Follower(start=die))
            await do_step(processor, CRASH)
            while processor.crashes < 2:
                await processor.wait_change()
            await processor.wait_up()
            assert processor.state is RUNNING and processor.boots == 3


async def test_a_subdevice_that_waits_for_a_dead_core_does_not_hang_the_recovery(
    open_fake: OpenFake, do_step: Do
) -> None:
    with trio.fail_after(5):
        async with open_fake(RUNNING, policy=RECOVERS) as (processor, platform):

            async def wait() -> None:
                _crash(platform)
                await trio.sleep_forever()

            processor.add_subdevice(_Follower(start=wait))
            await do_step(processor, CRASH)
            with pytest.raises(CrashLoopError, match="SIGSEGV"):
                await processor.wait_up()


@pytest.mark.parametrize("kind", [PlatformError, OSError])
async def test_a_start_that_fails_in_recovery_counts_as_a_crash(
    open_fake: OpenFake, do_step: Do, kind: type[Exception]
) -> None:
    with trio.fail_after(5):
        async with open_fake(RUNNING, policy=RECOVERS) as (processor, platform):
            platform.script.errors["create_core"] = kind("no power")
            await do_step(processor, CRASH)
            with pytest.raises(CrashLoopError, match="no power"):
                await processor.wait_up()
            assert processor.state is CRASHED
            with pytest.raises(kind):
                await processor.recover()
            with pytest.raises(CrashLoopError):
                await processor.wait_up()
            platform.script.errors.clear()
            await processor.recover()
            assert processor.state is RUNNING


@pytest.mark.parametrize("step", ["prepare", "start"])
async def test_a_recovery_by_hand_that_fails_keeps_the_cause(
    open_fake: OpenFake, do_step: Do, step: str
) -> None:
    with trio.fail_after(5):
        async with open_fake(RUNNING) as (processor, _):
            await do_step(processor, CRASH)

            async def fail() -> None:
                raise PlatformError("not today")

            follower = _Follower(**{step: fail})
            processor.add_subdevice(follower)
            with pytest.raises(PlatformError, match="not today"):
                await processor.recover()
            assert processor.state is CRASHED
            with pytest.raises(CoreCrashedError, match="SIGSEGV"):
                await processor.wait_up()
            processor.remove_subdevice(follower)
            await processor.recover()


@pytest.mark.parametrize("call", ["suspend", "resume", "detach"])
async def test_a_crash_ends_a_call_that_hangs(open_fake: OpenFake, call: str) -> None:
    with trio.fail_after(5):
        state = ProcessorState.SUSPENDED if call == "resume" else RUNNING
        async with open_fake(state, policy=RECOVERS) as (processor, platform):
            platform.script.hangs[call] = trio.Event()
            async with trio.open_nursery() as nursery:

                async def ask() -> None:
                    with pytest.raises(PlatformError, match=r"ended meanwhile.*SIGSEGV"):
                        await getattr(processor, call)()

                nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                _crash(platform)
            platform.end_error = None
            await processor.wait_up()
            assert processor.state is RUNNING and processor.crashes == 1


async def test_a_recovery_waits_for_a_call_that_is_under_way(open_fake: OpenFake) -> None:
    """It is refused no more than it is counted as one crash after the other."""
    with trio.fail_after(5):
        async with open_fake(RUNNING, policy=RECOVERS) as (processor, platform):

            async def slow() -> None:
                with trio.CancelScope(shield=True):
                    await hold.wait()

            hold = trio.Event()
            platform.script.wait = lambda operation: slow()
            async with trio.open_nursery() as nursery:

                async def ask() -> None:
                    with pytest.raises(PlatformError):
                        await processor.suspend()

                nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                _crash(platform)
                await trio.testing.wait_all_tasks_blocked()
                assert processor.state is CRASHED and processor.recovering
                platform.end_error = None
                hold.set()
            await processor.wait_up()
            assert processor.crashes == 1


async def test_a_core_that_dies_while_it_is_said_to_be_suspended(open_fake: OpenFake) -> None:
    with trio.fail_after(5):
        async with open_fake(RUNNING) as (processor, platform):
            core: Any = processor.core

            async def lie() -> None:
                _crash(platform)
                with contextlib.suppress(CoreCrashedError), trio.CancelScope(shield=True):
                    await processor.wait_exit()

            core.suspend = lie
            with pytest.raises(PlatformError, match="ended meanwhile"):
                await processor.suspend()
            assert processor.state is CRASHED


@pytest.mark.parametrize("end", ENDS)
async def test_ending_during_a_recovery_gives_it_up(
    open_fake: OpenFake, do_step: Do, end: str
) -> None:
    with trio.fail_after(5):
        async with open_fake(RUNNING, policy=RECOVERS) as (processor, platform):
            platform.script.hangs["run"] = trio.Event()
            await do_step(processor, CRASH)
            await trio.testing.wait_all_tasks_blocked()
            assert processor.recovering
            await ENDS[end](processor)
            assert not processor.recovering and processor.devices == ()
            platform.script.hangs.clear()
            await processor.shutdown()
            await processor.boot(python_firmware())


async def test_the_block_ends_during_a_recovery(open_fake: OpenFake, do_step: Do) -> None:
    with trio.fail_after(5):
        async with open_fake(RUNNING, policy=RECOVERS) as (processor, platform):
            platform.script.hangs["run"] = trio.Event()
            await do_step(processor, CRASH)
            await trio.testing.wait_all_tasks_blocked()
        assert processor.state is ProcessorState.OFFLINE and not processor.recovering


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recovery", [False, True])
@pytest.mark.parametrize("end", [*ENDS, "close"])
async def test_ending_while_a_sink_hangs(
    open_fake: OpenFake,
    do_step: Do,
    autojump_clock: trio.testing.MockClock,
    mode: CoredumpMode,
    recovery: bool,
    end: str,
) -> None:
    """A dump gets ten seconds, and then the core's memory is needed."""
    policy = CrashPolicy(recovery=recovery, coredump=mode, coredump_to=_sink_hangs)
    with trio.fail_after(30):
        async with open_fake(RUNNING, policy=policy) as (processor, _):
            await do_step(processor, CRASH)
            await trio.testing.wait_all_tasks_blocked()
            if end != "close":
                await ENDS[end](processor)
                await processor.shutdown()
                await processor.boot(python_firmware())
                assert processor.state is RUNNING


async def test_recovering_by_hand_waits_for_the_dump(open_fake: OpenFake, do_step: Do) -> None:
    """The dump is of the crash, not of the new start's memory."""
    done = trio.Event()
    written: list[bytes] = []

    async def sink(dump: Coredump) -> None:
        await done.wait()
        written.append(bytes(dump.segments[0].data))

    policy = CrashPolicy(coredump=CoredumpMode.ENABLED, coredump_to=sink)
    with trio.fail_after(5):
        async with open_fake(RUNNING, policy=policy) as (processor, platform):
            platform.memory.regions[0].view[8] = 99  # the table's reserved word
            await do_step(processor, CRASH)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(processor.recover)
                await trio.testing.wait_all_tasks_blocked()
                assert processor.state is CRASHED
                done.set()
            assert processor.state is RUNNING
            assert written[0][8] == 99 and platform.memory.regions[0].view[8] == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [OSError, ValueError, PlatformError])
async def test_a_sink_that_raises_does_not_keep_the_core_down(
    open_fake: OpenFake,
    do_step: Do,
    caplog: pytest.LogCaptureFixture,
    mode: CoredumpMode,
    kind: type[Exception],
) -> None:
    async def sink(dump: Coredump) -> None:
        raise kind("full")

    policy = CrashPolicy(recovery=True, coredump=mode, coredump_to=sink)
    with trio.fail_after(5):
        async with open_fake(RUNNING, policy=policy) as (processor, _):
            await do_step(processor, CRASH)
            await processor.wait_settled()
            await processor.wait_up()
            assert "the coredump is not written" in caplog.text
            caplog.clear()  # its traceback has the core in it


async def test_a_crash_while_the_dump_of_another_is_written(
    open_fake: OpenFake, do_step: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a file of its own, whatever the order in which they are done."""
    names: list[str] = []

    async def save(dump: Coredump, where: object, name: str) -> None:
        names.append(name)
        await trio.testing.wait_all_tasks_blocked()

    monkeypatch.setattr("openamp_py.remoteproc.aftermath.save_dump", save)
    policy = CrashPolicy(recovery=True, coredump=CoredumpMode.ENABLED, coredump_to=tmp_path)
    with trio.fail_after(5):
        async with open_fake(RUNNING, policy=policy) as (processor, platform):
            deaths = iter([True])

            async def die() -> None:
                if next(deaths, False):
                    _crash(platform)
                else:
                    platform.end_error = None

            processor.add_subdevice(_Follower(start=die))
            await do_step(processor, CRASH)
            while processor.crashes < 2:
                await processor.wait_change()
            await processor.wait_up()
            await processor.wait_settled()
        assert sorted(names) == ["fake-1.core", "fake-2.core"]


async def test_what_settles_after_a_recovery_is_waited_for(
    open_fake: OpenFake, do_step: Do
) -> None:
    saved = []

    async def save(dump: Coredump) -> None:
        await trio.testing.wait_all_tasks_blocked()
        saved.append(dump)

    policy = CrashPolicy(recovery=True, coredump=CoredumpMode.ENABLED, coredump_to=save)
    with trio.fail_after(5):
        async with open_fake(RUNNING, policy=policy) as (processor, _):
            await do_step(processor, CRASH)
            await processor.wait_up()
            assert not saved, "the core is back before"
            await processor.wait_settled()
            assert len(saved) == 1


async def test_two_dumps_to_one_file_at_once(
    open_fake: OpenFake, do_step: Do, tmp_path: Path
) -> None:
    path = tmp_path / "the.core"
    policy = CrashPolicy(recovery=True, coredump=CoredumpMode.ENABLED, coredump_to=path)
    with trio.fail_after(5):
        async with open_fake(RUNNING, policy=policy) as (processor, _):
            for _ in range(4):
                await do_step(processor, CRASH)
                await processor.wait_up()
        assert [p.name for p in tmp_path.iterdir()] == ["the.core"]
        assert path.read_bytes().startswith(b"\x7fELF")


async def test_a_crash_is_reported_once(
    open_fake: OpenFake, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_fake(RUNNING, policy=RECOVERS) as (processor, _):
        news = [processor.report_crash(CrashKind.WATCHDOG, f"silence {n}") for n in range(3)]
        assert news == [True, False, False]
        assert processor.state is RUNNING and not processor.is_up
        await processor.wait_up()
        assert (processor.boots, processor.crashes) == (2, 1)


async def test_the_report_is_what_ended_the_core(
    open_fake: OpenFake, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_fake(RUNNING) as (processor, _):
        assert processor.report_crash(CrashKind.WATCHDOG, "silence 0")
        with pytest.raises(CoreCrashedError, match="silence 0") as caught:
            await processor.wait_exit()
        assert caught.value.kind is CrashKind.WATCHDOG
        with pytest.raises(CoreCrashedError, match="silence 0"):
            await processor.wait_up()


async def test_recovery_by_hand_right_after_a_report(
    open_fake: OpenFake, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_fake(RUNNING) as (processor, _):
        assert processor.report_crash(CrashKind.WATCHDOG, "silence")
        await processor.recover()
        assert (processor.state, processor.boots, processor.crashes) == (RUNNING, 2, 1)


async def test_a_report_and_a_real_crash_are_one(open_fake: OpenFake) -> None:
    with trio.fail_after(5):
        async with open_fake(RUNNING, policy=RECOVERS) as (processor, platform):
            processor.report_crash(CrashKind.MMU_FAULT, "the IOMMU says so")
            _crash(platform)
            with pytest.raises(CoreCrashedError, match="IOMMU"):
                await processor.wait_exit()
            platform.end_error = None
            await processor.wait_up()
            assert processor.crashes == 1


@pytest.mark.parametrize("end", [*ENDS, "close"])
async def test_ending_while_a_reported_core_is_put_down(open_fake: OpenFake, end: str) -> None:
    with trio.fail_after(5):
        async with open_fake(RUNNING, policy=RECOVERS) as (processor, _):
            assert processor.report_crash(CrashKind.WATCHDOG, "silence")
            if end != "close":
                await ENDS[end](processor)
                assert not processor.is_up and not processor.recovering


async def test_a_crash_while_it_is_stopped_is_the_stop(open_fake: OpenFake) -> None:
    with trio.fail_after(5):
        async with open_fake(RUNNING, policy=RECOVERS) as (processor, platform):

            async def die() -> None:
                _crash(platform)
                await trio.testing.wait_all_tasks_blocked()

            follower = _Follower(stop=die)
            processor.add_subdevice(follower)
            await processor.stop()
            assert processor.state is ProcessorState.STOPPED
            assert follower.seen == ["stop", "unprepare"] and processor.crashes == 0


async def test_cancelling_from_outside_stops_subdevices_before_the_core(
    open_fake: OpenFake,
) -> None:
    with trio.fail_after(5), trio.CancelScope() as scope:
        async with open_fake(RUNNING) as (processor, _):

            async def look() -> None:
                alive.append(processor.core is not None and processor.is_up)
                assert processor._latest is not None
                alive.append(not processor._latest.ended.is_set())

            alive: list[bool] = []
            follower = _Follower(stop=look)
            processor.add_subdevice(follower)
            scope.cancel()
            await trio.sleep_forever()
    assert follower.seen == ["stop", "unprepare"]
    assert alive == [True, True]


async def test_a_dump_that_is_under_way_is_finished_when_the_block_is_cancelled(
    open_fake: OpenFake, do_step: Do
) -> None:
    written: list[Coredump] = []

    async def sink(dump: Coredump) -> None:
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.lowlevel.checkpoint()
        written.append(dump)

    policy = CrashPolicy(coredump=CoredumpMode.INLINE, coredump_to=sink)
    with trio.fail_after(5), trio.CancelScope() as scope:
        async with open_fake(RUNNING, policy=policy) as (processor, _):
            await do_step(processor, CRASH)
            await trio.sleep_forever()
    assert scope.cancelled_caught and len(written) == 1


async def test_states_of_a_crash_and_its_recovery(open_fake: OpenFake, do_step: Do) -> None:
    with trio.fail_after(5):
        async with open_fake(RUNNING, policy=RECOVERS) as (processor, _):
            watches = [processor.states(), processor.states()]
            await do_step(processor, CRASH)
            await processor.wait_up()
            await processor.shutdown()
        for watch in watches:
            assert [state.value async for state in watch] == [
                "running",
                "crashed",
                "running",
                "stopped",
                "offline",
            ]


async def test_nothing_is_dumped_of_a_processor_that_is_off(open_fake: OpenFake) -> None:
    async with open_fake(RUNNING) as (processor, _):
        await processor.coredump()
        await processor.shutdown()
        with pytest.raises(StateError, match="nothing to dump: the processor is offline"):
            await processor.coredump()


async def test_a_hundred_crashes(open_fake: OpenFake, do_step: Do) -> None:
    policy = CrashPolicy(recovery=True, limit=1000)
    with trio.fail_after(20):
        async with open_fake(RUNNING, policy=policy) as (processor, _):
            for number in itertools.count(1):
                await do_step(processor, CRASH)
                await processor.wait_up()
                assert processor.boots == number + 1
                if number == 100:
                    break
            assert not processor._aftermath.settling


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"limit": 0}, ValueError, "a limit of 0 crashes; at least 1"),
        ({"window": 0.0}, ValueError, "a window of 0.0 s"),
        ({"window": float("inf")}, ValueError, "a window of inf s"),
        ({"coredump": CoredumpMode.INLINE}, ValueError, "mode inline needs a place: coredump_to"),
        ({"coredump": "enabled", "coredump_to": "."}, TypeError, "a CoredumpMode is wanted"),
    ],
)
def test_policies_that_cannot_be(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CrashPolicy(**fields)
