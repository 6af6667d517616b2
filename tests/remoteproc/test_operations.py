"""Each operation of a platform that raises, hangs or lies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from openamp_py import (
    CoreCrashedError,
    Coredump,
    CrashKind,
    CrashLoopError,
    Firmware,
    ImageError,
    OpenAMPError,
    PlatformError,
    ProcessorState,
    RemoteProcessor,
    ResourceTable,
    ResourceTableError,
    StateError,
    open_processor,
)
from openamp_py.platforms import demo
from openamp_py.platforms.demo import python_firmware
from openamp_py.remoteproc.crash import CoredumpMode, CrashPolicy
from openamp_py.remoteproc.elf import Segment
from openamp_py.remoteproc.lifecycle import Happening
from openamp_py.remoteproc.resource_table import Vendor
from openamp_py.remoteproc.subdevices import Subdevice

OpenFake = Callable[..., AbstractAsyncContextManager[tuple[RemoteProcessor, Any]]]
Fake = Callable[[], Any]

S = ProcessorState
VENDOR = python_firmware(ResourceTable((*demo.TABLE.entries, Vendor(200, b"mine"))))

# (operation, state before, what calls it, state after it failed)
ASKED: list[tuple[str, ProcessorState, str, ProcessorState]] = [
    ("prepare", S.OFFLINE, "configure", S.OFFLINE),
    ("prepare", S.OFFLINE, "attach", S.OFFLINE),
    ("check", S.CONFIGURED, "load", S.CONFIGURED),
    ("handle_vendor", S.CONFIGURED, "load", S.CONFIGURED),
    ("check", S.READY, "load", S.READY),
    ("find_table", S.READY, "start", S.READY),
    ("boot_address", S.READY, "start", S.READY),
    ("create_core", S.READY, "start", S.READY),
    ("run", S.READY, "start", S.READY),
    ("create_core", S.CRASHED, "recover", S.CRASHED),
    ("run", S.CRASHED, "recover", S.CRASHED),
    ("suspend", S.RUNNING, "suspend", S.RUNNING),
    ("suspend", S.ATTACHED, "suspend", S.ATTACHED),
    ("resume", S.SUSPENDED, "resume", S.SUSPENDED),
    ("detach", S.RUNNING, "detach", S.RUNNING),
    ("attach_core", S.OFFLINE, "attach", S.OFFLINE),
    ("attach_core", S.DETACHED, "attach", S.DETACHED),
    ("run", S.OFFLINE, "attach", S.OFFLINE),
    ("unprepare", S.RUNNING, "shutdown", S.STOPPED),
    ("unprepare", S.DETACHED, "shutdown", S.STOPPED),
]
HANGS = [
    case
    for case in ASKED
    if case[0] in ("prepare", "run", "suspend", "resume", "detach", "attach_core")
    and case[2] != "shutdown"
]


async def _ask(processor: RemoteProcessor, call: str) -> None:
    await (processor.load(VENDOR) if call == "load" else getattr(processor, call)())


@pytest.mark.parametrize("kind", [PlatformError, OSError, ZeroDivisionError])
@pytest.mark.parametrize(("operation", "state", "call", "after"), ASKED)
async def test_one_that_raises(
    open_fake: OpenFake,
    operation: str,
    state: ProcessorState,
    call: str,
    after: ProcessorState,
    kind: type[Exception],
) -> None:
    with trio.fail_after(5):
        async with open_fake(state) as (processor, platform):
            platform.script.errors[operation] = kind("out of order")
            with pytest.raises((kind, PlatformError), match="out of order"):
                await _ask(processor, call)
            assert processor.state is after
            if after in (S.READY, S.OFFLINE, S.CONFIGURED, S.CRASHED):
                assert processor.devices == () or after is S.CRASHED
            platform.script.errors.clear()
            await _ask(processor, call)


@pytest.mark.parametrize(("operation", "state", "call", "after"), HANGS)
async def test_one_that_hangs_is_cancelled(
    open_fake: OpenFake, operation: str, state: ProcessorState, call: str, after: ProcessorState
) -> None:
    with trio.fail_after(5):
        async with open_fake(state) as (processor, platform):
            platform.script.hangs[operation] = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_ask, processor, call)
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(StateError, match=f"cannot stop while {call} is under way"):
                    await processor.stop()
                nursery.cancel_scope.cancel()
            assert processor.state is after
            platform.script.hangs.clear()
            await _ask(processor, call)


@pytest.mark.parametrize(("operation", "state", "call", "after"), HANGS)
async def test_the_block_ends_while_one_hangs(
    open_fake: OpenFake, operation: str, state: ProcessorState, call: str, after: ProcessorState
) -> None:
    async def ask(processor: RemoteProcessor) -> None:
        with pytest.raises(StateError, match=f"block ended while {call} was under way"):
            await _ask(processor, call)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery, open_fake(state) as (processor, platform):
            platform.script.hangs[operation] = trio.Event()
            nursery.start_soon(ask, processor)
            await trio.testing.wait_all_tasks_blocked()
        assert processor.state is S.OFFLINE


async def test_an_undoing_that_hangs_is_left(
    open_fake: OpenFake, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.fail_after(30):
        async with open_fake(S.RUNNING) as (processor, platform):
            platform.script.hangs["unprepare"] = trio.Event()
            with pytest.raises(PlatformError, match="did not undo its preparation"):
                await processor.shutdown()
            assert processor.state is S.STOPPED
            platform.script.hangs.clear()
            await processor.shutdown()
        assert not processor.is_up


@pytest.mark.parametrize("kind", [PlatformError, OSError])
async def test_an_undoing_that_raises_does_not_hide_why(
    open_fake: OpenFake, kind: type[Exception]
) -> None:
    async with open_fake() as (processor, platform):
        platform.script.errors = {"run": PlatformError("no power"), "unprepare": kind("neither")}
        with pytest.raises(PlatformError, match="no power"):
            await processor.boot(python_firmware())
        platform.script.errors.clear()
        await processor.shutdown()
        await processor.boot(python_firmware())


async def test_an_interrupt_that_raises(
    open_fake: OpenFake, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.fail_after(5):
        async with open_fake(S.RUNNING) as (processor, platform):
            platform.script.errors["interrupt"] = ZeroDivisionError("oops")
            assert processor.report_crash(CrashKind.WATCHDOG, "silence")
            with pytest.raises(CoreCrashedError, match="silence"):
                await processor.wait_exit()
            await processor.recover()


@pytest.mark.parametrize("kind", [PlatformError, OSError, ZeroDivisionError])
async def test_dump_segments_that_raises(open_fake: OpenFake, kind: type[Exception]) -> None:
    async with open_fake(S.RUNNING) as (processor, platform):
        platform.script.errors["dump_segments"] = kind("oops")
        dump = await processor.coredump()
        assert [segment.da for segment in dump.segments][:1] == [0]


async def test_dump_segments_that_hangs_after_a_crash(
    open_fake: OpenFake, autojump_clock: trio.testing.MockClock
) -> None:
    async def sink(dump: object) -> None:
        raise AssertionError("there is none")

    policy = CrashPolicy(recovery=True, coredump=CoredumpMode.ENABLED, coredump_to=sink)
    with trio.fail_after(30):
        async with open_fake(S.RUNNING, policy=policy) as (processor, platform):
            platform.script.hangs["dump_segments"] = trio.Event()
            platform.end.set()
            platform.end_error = CoreCrashedError("died")
            await processor.wait_state(S.CRASHED)
            await processor.shutdown()
            assert processor.state is S.OFFLINE and not processor.recovering


async def test_a_panic_that_raises_hides_nothing(fake_platform: Fake) -> None:
    platform = fake_platform()

    def panic() -> None:
        raise ZeroDivisionError

    platform.panic = panic
    with pytest.raises(KeyError, match="mine"):
        async with open_processor(platform):
            raise KeyError("mine")
    assert platform.closed


class _Runs:
    """What a core's `run` can do wrong."""

    @staticmethod
    async def twice(notified: object, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        task_status.started()

    @staticmethod
    async def never(notified: object, *, task_status: trio.TaskStatus[None]) -> None:
        return

    @staticmethod
    async def at_once(notified: object, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()


def _lie(platform: Any, run: Callable[..., object]) -> None:
    create = type(platform).create_core

    def create_core(firmware: Firmware) -> Any:
        core = create(platform, firmware)
        core.run = run
        return core

    platform.create_core = create_core


async def test_a_run_that_says_twice_that_it_began(open_fake: OpenFake) -> None:
    with trio.fail_after(5):
        async with open_fake(S.READY) as (processor, platform):
            _lie(platform, _Runs.twice)
            await processor.start()
            assert await processor.wait_state(S.CRASHED)
            with pytest.raises(PlatformError, match="called 'started' twice"):
                await processor.wait_exit()
            del platform.create_core
            await processor.recover()


async def test_a_run_that_never_begins(open_fake: OpenFake) -> None:
    with trio.fail_after(5):
        async with open_fake(S.READY) as (processor, platform):
            _lie(platform, _Runs.never)
            with pytest.raises(PlatformError, match="fake core ended before it was up"):
                await processor.start()
            assert processor.state is S.READY and processor.failure is None
            del platform.create_core
            await processor.start()


async def test_a_run_that_ends_at_once(open_fake: OpenFake) -> None:
    with trio.fail_after(5):
        async with open_fake(S.READY) as (processor, platform):
            _lie(platform, _Runs.at_once)
            await processor.start()
            assert await processor.wait_state(S.STOPPED) and processor.power_count == 1
            await processor.wait_exit()


@pytest.mark.parametrize("table_da", [-4, demo.MEMORY_SIZE, 0x1000, demo.MEMORY_SIZE - 8, 1 << 70])
async def test_a_table_that_is_not_there(open_fake: OpenFake, table_da: int) -> None:
    with trio.fail_after(5):
        async with open_fake(S.READY) as (processor, platform):
            platform.find_table = lambda firmware: table_da
            with pytest.raises(ResourceTableError):
                await processor.start()
            assert processor.state is S.READY and processor.devices == ()
            del platform.find_table
            await processor.start()


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
async def test_a_translation_of_the_wrong_size(open_fake: OpenFake, size: int) -> None:
    wrong = memoryview(bytearray(size))
    async with open_fake(S.CONFIGURED) as (processor, platform):
        platform.translate = lambda da, asked: wrong
        with pytest.raises(PlatformError, match=f"has {size} bytes at 0x0 where it was asked for"):
            await processor.load(python_firmware())
        assert processor.state is S.CONFIGURED
        del platform.translate
        await processor.load(python_firmware())


async def test_a_translation_that_changes_its_mind(open_fake: OpenFake) -> None:
    async with open_fake(S.CONFIGURED) as (processor, platform):
        original = platform.translate
        answers = iter(range(3))
        platform.translate = lambda da, size: (
            original(da, size) if next(answers, None) is not None else None
        )
        with pytest.raises(OpenAMPError):
            await processor.load(python_firmware())
        assert processor.state is S.CONFIGURED and processor.firmware is None
        del platform.translate
        await processor.load(python_firmware())


async def test_an_image_that_is_written_in_part_is_not_loaded(open_fake: OpenFake) -> None:
    """Cancelled between two pieces: there is no image to start."""
    big = Firmware(segments=tuple(Segment(0x1000 * n, b"x", 1, 5) for n in range(8)))
    async with open_fake(S.READY) as (processor, _):
        with trio.CancelScope() as scope:
            scope.cancel()
            await processor.load(big)
        assert scope.cancelled_caught
        loaded = processor.firmware is not None
        assert processor.state is (S.READY if loaded else S.CONFIGURED)
        await processor.load(python_firmware())
        await processor.start()


@pytest.mark.parametrize("step", ["prepare", "start"])
async def test_a_subdevice_that_fails_unwinds_the_others(open_fake: OpenFake, step: str) -> None:
    log: list[str] = []

    class Logged(Subdevice):
        def __init__(self, number: int) -> None:
            self._number = number

        async def _do(self, what: str) -> None:
            if (self._number, what) == (2, step) and fails:
                raise PlatformError("out of order")
            log.append(f"{what} {self._number}")

        async def prepare(self) -> None:
            await self._do("prepare")

        async def start(self) -> None:
            await self._do("start")

        async def stop(self, *, crashed: bool) -> None:
            await self._do("stop")

        async def unprepare(self) -> None:
            await self._do("unprepare")

    fails = True
    async with open_fake(S.READY) as (processor, _):
        for number in (1, 2, 3):
            processor.add_subdevice(Logged(number))
        with pytest.raises(PlatformError, match="out of order"):
            await processor.start()
        assert processor.state is S.READY
        undone = {
            "prepare": ["prepare 1", "unprepare 1"],
            "start": [
                *(f"prepare {n}" for n in (1, 2, 3)),
                "start 1",
                "stop 1",
                *(f"unprepare {n}" for n in (3, 2, 1)),
            ],
        }
        assert log == undone[step]
        fails = False
        log.clear()
        await processor.start()
        await processor.stop()
        up = [f"{what} {n}" for what in ("prepare", "start") for n in (1, 2, 3)]
        assert log == [*up, *(f"{w} {n}" for w in ("stop", "unprepare") for n in (3, 2, 1))]


async def test_a_subdevice_that_hangs_or_raises_does_not_keep_the_core(
    open_fake: OpenFake,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Bad(Subdevice):
        async def stop(self, *, crashed: bool) -> None:
            await trio.sleep_forever()

        async def unprepare(self) -> None:
            raise ZeroDivisionError

    async with open_fake(S.RUNNING) as (processor, _):
        processor.add_subdevice(Bad())
        with trio.fail_after(6):
            await processor.stop()
        assert processor.state is S.STOPPED
        assert "took longer than 5.0 s" in caplog.text and "ZeroDivisionError" in caplog.text
        caplog.clear()


async def test_a_subdevice_that_leaves_is_asked_nothing_more(open_fake: OpenFake) -> None:
    seen = []

    class Logged(Subdevice):
        async def stop(self, *, crashed: bool) -> None:
            seen.append("stop")

        async def unprepare(self) -> None:
            seen.append("unprepare")

    async with open_fake(S.RUNNING) as (processor, _):
        subdevice = Logged()
        with pytest.raises(ValueError, match="was not added to fake"):
            processor.remove_subdevice(subdevice)
        processor.add_subdevice(subdevice)
        processor.remove_subdevice(subdevice)
        await processor.stop()
        assert seen == []


async def test_the_power_is_counted(open_fake: OpenFake) -> None:
    image = python_firmware()
    with trio.fail_after(5):
        async with open_fake() as (processor, _):
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(processor.boot, image)
            assert (processor.power_count, processor.boots) == (10, 1)
            with pytest.raises(StateError, match="running with another image"):
                await processor.boot(python_firmware(ResourceTable()))
            async with trio.open_nursery() as nursery:
                for _ in range(9):
                    nursery.start_soon(processor.shutdown)
            assert (processor.power_count, processor.state) == (1, S.RUNNING)
            await processor.shutdown()
            assert (processor.power_count, processor.state) == (0, S.OFFLINE)


async def test_a_boot_during_the_last_shutdown_is_a_new_boot(open_fake: OpenFake) -> None:
    image = python_firmware()
    with trio.fail_after(5):
        async with open_fake() as (processor, _):
            await processor.boot(image)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(processor.shutdown)
                nursery.start_soon(processor.boot, image)
            await processor.wait_state(S.RUNNING, S.OFFLINE)
            async with trio.open_nursery() as nursery:
                hold = trio.Event()

                class Slow(Subdevice):
                    async def stop(self, *, crashed: bool) -> None:
                        await hold.wait()

                if processor.state is S.OFFLINE:
                    await processor.boot(image)
                await processor.boot(image)
                slow = Slow()
                processor.add_subdevice(slow)
                nursery.start_soon(lambda: processor.shutdown(force=True))
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(processor.boot, image)
                await trio.testing.wait_all_tasks_blocked()
                hold.set()
            assert (processor.state, processor.power_count) == (S.RUNNING, 1)


async def test_a_core_that_crashed_is_not_booted_once_more(open_fake: OpenFake) -> None:
    with trio.fail_after(5):
        async with open_fake() as (processor, platform):
            await processor.boot(python_firmware())
            platform.end_error = CoreCrashedError("died")
            platform.end.set()
            await processor.wait_state(S.CRASHED)
            with pytest.raises(CoreCrashedError, match="died"):
                await processor.boot()
            assert processor.power_count == 1


async def test_a_refused_vendor_entry(open_fake: OpenFake) -> None:
    seen: list[Vendor] = []

    def refuse(entry: Vendor) -> None:
        raise ResourceTableError("not this one")

    async with open_fake(S.CONFIGURED) as (processor, _):
        processor.register_vendor(200, seen.append)
        await processor.load(VENDOR)
        assert [entry.data for entry in seen] == [b"mine"] and processor.ignored == ()
        processor.register_vendor(200, refuse)
        with pytest.raises(ResourceTableError, match="not this one"):
            await processor.load(VENDOR)
        assert processor.state is S.READY
        with pytest.raises(ValueError, match="entry type 3 is no vendor's"):
            processor.register_vendor(3, refuse)
        with pytest.raises(ImageError):
            await processor.load(b"\x7fELF")


# What comes between two steps


async def _end_by_leaving(processor: RemoteProcessor) -> None:
    """The end of the block sees to it."""


@pytest.mark.parametrize("end", [RemoteProcessor.stop, RemoteProcessor.shutdown, _end_by_leaving])
async def test_a_crash_that_was_reported_is_one_also_where_the_core_is_ended_at_once(
    open_fake: OpenFake,
    end: Callable[[RemoteProcessor], Awaitable[None]],
    autojump_clock: trio.testing.MockClock,
) -> None:
    reasons = []

    async def keep(dump: Coredump) -> None:
        reasons.append(dump.reason)

    policy = CrashPolicy(recovery=True, coredump=CoredumpMode.ENABLED, coredump_to=keep)
    async with open_fake(S.RUNNING, policy=policy) as (processor, _):
        assert processor.report_crash(CrashKind.WATCHDOG, "silent")
        await end(processor)
    assert processor.crashes == processor.boots == 1 and reasons == ["fake core: silent"]


@pytest.mark.parametrize("call", ["suspend", "detach"])
async def test_a_crash_that_was_reported_refuses_what_needs_the_core(
    open_fake: OpenFake, call: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_fake(S.RUNNING) as (processor, _):
        assert processor.report_crash(CrashKind.WATCHDOG, "silent")
        with pytest.raises(StateError, match="is being ended: fake core: silent"):
            await _ask(processor, call)
        assert await processor.wait_state(S.CRASHED)


async def test_a_core_that_ends_while_it_is_stopped_has_not_crashed(open_fake: OpenFake) -> None:
    with trio.fail_after(5):
        for _ in range(20):  # who comes first in one round of trio is chance
            async with open_fake(S.RUNNING, policy=CrashPolicy(recovery=True)) as fake:
                processor, platform = fake
                platform.end_error = CoreCrashedError("died")
                platform.end.set()
                await processor.stop()
                await processor.wait_settled()
                assert (processor.state, processor.crashes) == (S.STOPPED, 0)
                assert processor.failure is None


async def test_a_boot_after_the_block(fake_platform: Fake) -> None:
    async with open_processor(fake_platform()) as processor:
        await processor.boot(python_firmware())
    with pytest.raises(StateError, match="cannot boot: the processor's block has ended"):
        await processor.boot()
    assert processor.power_count == 0


async def test_who_booted_a_core_that_ended_shuts_it_down(open_fake: OpenFake) -> None:
    with trio.fail_after(5):
        async with open_fake() as (processor, platform):
            for _ in range(2):
                await processor.boot(python_firmware())
            platform.end.set()
            await processor.wait_state(S.STOPPED)
            await processor.shutdown()
            assert (processor.state, processor.power_count) == (S.STOPPED, 1)
            with pytest.raises(StateError, match="not shut it down yet: 1"):
                await processor.boot()
            await processor.shutdown()
            await processor.boot()
            assert (processor.state, processor.power_count) == (S.RUNNING, 1)


async def test_a_recovery_that_is_refused_leaves_the_count_of_crashes(
    open_fake: OpenFake, do_step: Callable[..., Awaitable[None]]
) -> None:
    with trio.fail_after(5):
        async with open_fake(S.RUNNING, policy=CrashPolicy(recovery=True, limit=2)) as (
            processor,
            _,
        ):
            await do_step(processor, Happening.CRASH)
            await processor.wait_up()
            with pytest.raises(StateError, match="cannot recover a processor that is running"):
                await processor.recover()
            await do_step(processor, Happening.CRASH)
            await processor.wait_settled()
            assert isinstance(processor.failure, CrashLoopError)


class _Steps(Subdevice):
    """Notes what is done with it; its `prepare` may wait."""

    def __init__(self, hold: trio.Event | None = None) -> None:
        self.steps: list[str] = []
        self._hold = hold

    async def prepare(self) -> None:
        self.steps.append("prepare")
        if self._hold is not None:
            await self._hold.wait()

    async def start(self) -> None:
        self.steps.append("start")

    async def stop(self, *, crashed: bool) -> None:
        self.steps.append("stop")

    async def unprepare(self) -> None:
        self.steps.append("unprepare")


async def test_subdevices_that_come_and_go_while_the_core_starts(open_fake: OpenFake) -> None:
    with trio.fail_after(5):
        async with open_fake(S.READY) as (processor, _):
            hold = trio.Event()
            waits, goes, comes = _Steps(hold), _Steps(), _Steps()
            processor.add_subdevice(waits)
            processor.add_subdevice(goes)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(processor.start)
                await trio.testing.wait_all_tasks_blocked()
                for subdevice in (goes, waits):
                    processor.remove_subdevice(subdevice)
                processor.add_subdevice(comes)
                hold.set()
            await processor.stop()
            assert goes.steps == []
            assert waits.steps == ["prepare"], "it had begun"
            assert comes.steps == ["stop", "unprepare"]


async def test_a_size_below_zero_is_the_callers_fault(open_fake: OpenFake) -> None:
    async with open_fake(S.RUNNING) as (processor, _):
        for place in ({"da": 0x100}, {"pa": 0x100}):
            with pytest.raises(ValueError, match="-5 bytes"):
                processor.map(**place, size=-5)
        with pytest.raises(ValueError, match="-5 bytes"):
            processor.add_to_coredump(0x100, -5)


async def test_a_dump_before_the_first_start_is_for_the_images_machine(
    open_fake: OpenFake,
) -> None:
    async with open_fake(S.CONFIGURED) as (processor, _):
        await processor.load(replace(python_firmware(), elf_class=64))
        assert (await processor.coredump()).elf_class == 64
