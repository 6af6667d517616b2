"""A remote processor with a core that does what the test says."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from openamp_py import (
    Core,
    CoreCrashedError,
    Firmware,
    ImageError,
    PeerGoneError,
    Platform,
    PlatformError,
    ProcessorState,
    RemoteProcessor,
    ResourceTable,
    ResourceTableError,
    StateError,
    encode_table,
    open_bus,
    open_processor,
)
from openamp_py.memory import MemoryMap, SharedMemory
from openamp_py.platforms import demo
from openamp_py.platforms.demo import python_firmware
from openamp_py.remoteproc.coredump import DumpSegment
from openamp_py.remoteproc.elf import Segment
from openamp_py.remoteproc.lifecycle import TRANSITIONS, Call, Happening, next_state
from openamp_py.remoteproc.resource_table import Carveout, Unknown, Vdev, Vendor, Vring


class Script:
    """What the platform's operations do: raise, or wait until they are cancelled or let go on."""

    def __init__(self) -> None:
        self.errors: dict[str, Exception] = {}
        self.hangs: dict[str, trio.Event] = {}
        self.done: list[str] = []

    def do(self, operation: str) -> None:
        if operation in self.errors:
            raise self.errors[operation]
        self.done.append(operation)

    async def wait(self, operation: str) -> None:
        if operation in self.hangs:
            await self.hangs[operation].wait()
        self.do(operation)


class FakePlatform(Platform):
    """A platform whose core runs until the test ends it."""

    name = "fake"
    buffer_area = demo.buffer_area()

    def __init__(self) -> None:
        self._shared = SharedMemory.create("openamp-fake", demo.MEMORY_SIZE)
        self.memory = MemoryMap([self._shared.region("shm", 0)])
        self.script = Script()
        self.kicks: list[int] = []
        self.end: trio.Event | None = None
        self.end_error: Exception | None = None
        self.closed = False
        self.panicked = False

    def check(self, firmware: Firmware) -> None:
        if firmware.machine:
            raise ImageError("the fake runs nothing")
        self.script.do("check")

    async def prepare(self) -> None:
        await self.script.wait("prepare")

    async def unprepare(self) -> None:
        await self.script.wait("unprepare")

    def find_table(self, firmware: Firmware) -> int | None:
        self.script.do("find_table")
        return super().find_table(firmware)

    def boot_address(self, firmware: Firmware) -> int:
        self.script.do("boot_address")
        return super().boot_address(firmware)

    def handle_vendor(self, entry: Vendor) -> bool:
        self.script.do("handle_vendor")
        return entry.type == 200

    def create_core(self, firmware: Firmware) -> Core:
        self.script.do("create_core")
        return FakeCore(self)

    async def attach_core(self) -> Core:
        self.script.do("attach_core")
        core = FakeCore(self)
        core.note = b"from the host before"
        table = encode_table(demo.TABLE)
        self.memory.regions[0].view[: len(table)] = table
        return core

    async def dump_segments(self) -> Sequence[DumpSegment]:
        await self.script.wait("dump_segments")
        return [DumpSegment(0xF000_0000, b"registers")]

    def panic(self) -> None:
        self.panicked = True

    def close(self) -> None:
        self.closed = True
        self._shared.close()


class FakeCore(Core):
    """One life of it."""

    name = "fake core"
    buffer_area: tuple[int, int] | None = demo.buffer_area()
    table_da: int | None = demo.TABLE_DA

    def __init__(self, platform: FakePlatform) -> None:
        self.memory = platform.memory
        self._platform = platform
        self._script = platform.script

    def kick(self, notify_id: int) -> None:
        self._platform.kicks.append(notify_id)

    async def run(
        self,
        notified: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        await self._script.wait("run")
        end = self._platform.end = trio.Event()
        task_status.started()
        await end.wait()
        if self._platform.end_error is not None:
            raise self._platform.end_error

    def interrupt(self) -> None:
        self._script.do("interrupt")

    async def suspend(self) -> None:
        await self._script.wait("suspend")

    async def resume(self) -> None:
        await self._script.wait("resume")

    async def detach(self, note: bytes) -> None:
        await self._script.wait("detach")


CALLS: dict[Call, Callable[[RemoteProcessor], Awaitable[object]]] = {
    Call.CONFIGURE: lambda p: p.configure(),
    Call.LOAD: lambda p: p.load(python_firmware()),
    Call.START: lambda p: p.start(),
    Call.SUSPEND: lambda p: p.suspend(),
    Call.RESUME: lambda p: p.resume(),
    Call.RECOVER: lambda p: p.recover(),
    Call.ATTACH: lambda p: p.attach(),
    Call.DETACH: lambda p: p.detach(),
    Call.STOP: lambda p: p.stop(),
    Call.SHUTDOWN: lambda p: p.shutdown(),
}

_BOOT = (Call.CONFIGURE, Call.LOAD, Call.START)
PATHS: dict[ProcessorState, tuple[Call | Happening, ...]] = {
    ProcessorState.OFFLINE: (),
    ProcessorState.CONFIGURED: (Call.CONFIGURE,),
    ProcessorState.READY: (Call.CONFIGURE, Call.LOAD),
    ProcessorState.RUNNING: _BOOT,
    ProcessorState.SUSPENDED: (*_BOOT, Call.SUSPEND),
    ProcessorState.CRASHED: (*_BOOT, Happening.CRASH),
    ProcessorState.STOPPED: (*_BOOT, Call.STOP),
    ProcessorState.ATTACHED: (Call.ATTACH,),
    ProcessorState.DETACHED: (Call.ATTACH, Call.DETACH),
}


async def _do(processor: RemoteProcessor, step: Call | Happening) -> None:
    if isinstance(step, Call):
        await CALLS[step](processor)
        return
    platform = processor.platform
    assert isinstance(platform, FakePlatform) and platform.end is not None
    crash = CoreCrashedError("the core died of SIGSEGV")
    platform.end_error = crash if step is Happening.CRASH else None
    platform.end.set()
    await processor.wait_state(next_state(processor.state, step))
    platform.end_error = None


@asynccontextmanager
async def _processor(
    state: ProcessorState = ProcessorState.OFFLINE,
) -> AsyncIterator[tuple[RemoteProcessor, FakePlatform]]:
    platform = FakePlatform()
    async with open_processor(platform) as processor:
        for call in PATHS[state]:
            await _do(processor, call)
        assert processor.state is state
        yield processor, platform
    assert platform.closed


@pytest.mark.parametrize(
    ("state", "call"), list(itertools.product(ProcessorState, [*Call, *Happening]))
)
async def test_every_state_and_call(state: ProcessorState, call: Call | Happening) -> None:
    async with _processor(state) as (processor, _):
        if (state, call) in TRANSITIONS:
            await _do(processor, call)
            assert processor.state is TRANSITIONS[state, call]
        elif isinstance(call, Call):
            before = (processor.firmware, processor.devices)
            with pytest.raises(StateError):
                await _do(processor, call)
            assert processor.state is state
            assert (processor.firmware, processor.devices) == before


async def test_boot_is_the_first_three_calls() -> None:
    async with _processor() as (processor, _):
        await processor.boot(python_firmware())
        assert processor.state is ProcessorState.RUNNING
        assert processor.table == demo.TABLE
        assert [d.device_id for d in processor.devices] == [7]


async def test_it_can_be_booted_again_after_a_shutdown() -> None:
    async with _processor(ProcessorState.RUNNING) as (processor, _):
        first = processor.rpmsg_device()
        await processor.shutdown()
        assert processor.devices == () and processor.firmware is None
        await processor.boot(python_firmware())
        assert processor.rpmsg_device() is not first


async def test_an_image_can_be_loaded_from_a_path_or_bytes(tmp_path: Path) -> None:
    async with _processor(ProcessorState.CONFIGURED) as (processor, _):
        for image in (b"not an ELF", tmp_path / "missing", str(tmp_path / "missing")):
            with pytest.raises((ImageError, FileNotFoundError)):
                await processor.load(image)
            assert processor.state is ProcessorState.CONFIGURED


async def test_a_bad_image_leaves_the_loaded_one_in_place() -> None:
    async with _processor(ProcessorState.READY) as (processor, platform):
        loaded = processor.firmware
        before = bytes(platform.memory.regions[0].view)
        outside = Firmware(segments=(Segment(0, b"x", 1, 5), Segment(1 << 30, b"x", 1, 5)))
        for bad in (b"\x7fELF", Firmware(machine=40), outside):
            with pytest.raises(ImageError):
                await processor.load(bad)
            assert processor.state is ProcessorState.READY
            assert processor.firmware is loaded
        assert bytes(platform.memory.regions[0].view) == before


async def test_a_core_that_does_not_start_leaves_it_ready() -> None:
    async with _processor(ProcessorState.READY) as (processor, platform):
        platform.script.errors["run"] = PlatformError("no power")
        with pytest.raises(PlatformError, match="no power"):
            await processor.start()
        assert processor.state is ProcessorState.READY and processor.devices == ()
        platform.script.errors.clear()
        await processor.start()
        assert len(processor.devices) == 1


async def test_a_boot_that_fails_ends_offline() -> None:
    async with _processor() as (processor, platform):
        platform.script.errors["run"] = PlatformError("no power")
        with pytest.raises(PlatformError):
            await processor.boot(python_firmware())
        assert processor.state is ProcessorState.OFFLINE


async def test_a_core_that_ends_in_order_stops_and_breaks_its_devices() -> None:
    async with _processor(ProcessorState.RUNNING) as (processor, platform):
        device = processor.rpmsg_device()
        assert platform.end is not None
        platform.end.set()
        await processor.wait_exit()
        assert processor.state is ProcessorState.STOPPED
        assert isinstance(processor.failure, PeerGoneError)
        assert device.failure is processor.failure


async def test_a_crash_is_raised_by_wait_exit_and_is_the_cause_of_broken_channels() -> None:
    async with (
        _processor(ProcessorState.RUNNING) as (processor, platform),
        open_bus(processor.rpmsg_device()) as bus,
        bus.open_endpoint(destination=5) as endpoint,
    ):
        platform.end_error = CoreCrashedError("the core died of SIGSEGV")
        assert platform.end is not None
        platform.end.set()
        with pytest.raises(trio.BrokenResourceError, match="SIGSEGV") as caught:
            await endpoint.receive()
        assert caught.value.__cause__ is platform.end_error
        with pytest.raises(CoreCrashedError):
            await processor.wait_exit()
        assert processor.state is ProcessorState.CRASHED


async def test_stop_wakes_those_who_wait() -> None:
    async with (
        _processor(ProcessorState.RUNNING) as (processor, _),
        open_bus(processor.rpmsg_device()) as bus,
        bus.open_endpoint("x") as endpoint,
        trio.open_nursery() as nursery,
    ):

        async def wait() -> None:
            with pytest.raises(trio.BrokenResourceError, match="was stopped"):
                await endpoint.wait_bound()

        nursery.start_soon(wait)
        nursery.start_soon(processor.wait_exit)
        await trio.testing.wait_all_tasks_blocked()
        await processor.stop()


async def test_one_call_at_a_time() -> None:
    async with _processor(ProcessorState.READY) as (processor, platform):
        platform.script.hangs["run"] = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(processor.start)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(StateError, match="cannot shutdown while start is under way"):
                await processor.shutdown()
            platform.script.hangs["run"].set()
        assert processor.state is ProcessorState.RUNNING


async def test_a_start_that_hangs_can_be_cancelled() -> None:
    async with _processor(ProcessorState.READY) as (processor, platform):
        platform.script.hangs["run"] = trio.Event()
        with trio.move_on_after(0.05) as scope:
            await processor.start()
        assert scope.cancelled_caught
        assert processor.state is ProcessorState.READY and processor.devices == ()
        platform.script.hangs["run"].set()
        await processor.start()


async def test_without_a_table_asking_for_rpmsg_says_why() -> None:
    async with _processor() as (processor, _):
        with pytest.raises(StateError, match="it is offline"):
            processor.rpmsg_device()
        await processor.boot(Firmware(segments=(Segment(0, b"x", 1, 5),)))
        assert processor.devices == ()
        with pytest.raises(StateError, match="no resource table"):
            processor.rpmsg_device()


async def test_what_the_block_raises_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with open_processor(FakePlatform()) as processor:
            await processor.boot(python_firmware())
            raise KeyError("mine")


async def test_cancelling_the_block_takes_the_core_down() -> None:
    platform = FakePlatform()
    with trio.move_on_after(0.05) as scope:
        async with open_processor(platform) as processor:
            await processor.boot(python_firmware())
            await trio.sleep_forever()
    assert scope.cancelled_caught and platform.closed
    assert processor.state is ProcessorState.OFFLINE


async def test_waiting_for_the_end_of_a_core_that_never_began_is_refused() -> None:
    async with _processor(ProcessorState.READY) as (processor, _):
        with pytest.raises(StateError, match="never started: the processor is ready"):
            await processor.wait_exit()


async def test_a_platform_that_fails_in_its_own_way_is_a_platform_error() -> None:
    async with _processor(ProcessorState.RUNNING) as (processor, platform):
        device = processor.rpmsg_device()
        platform.end_error = ZeroDivisionError("oops")
        assert platform.end is not None
        platform.end.set()
        with pytest.raises(PlatformError, match="fake core failed: ZeroDivisionError"):
            await processor.wait_exit()
        assert processor.state is ProcessorState.CRASHED
        assert processor.failure is not None
        assert isinstance(processor.failure.__cause__, ZeroDivisionError)
        assert device.failure is processor.failure


async def test_a_processor_is_of_no_use_after_its_block() -> None:
    async with _processor(ProcessorState.RUNNING) as (processor, _):
        pass
    assert processor.state is ProcessorState.OFFLINE
    for call in CALLS:
        with pytest.raises(StateError, match="the processor's block has ended"):
            await _do(processor, call)


async def test_leaving_the_block_during_a_call_does_not_hide_why() -> None:
    platform = FakePlatform()
    platform.script.hangs["run"] = trio.Event()
    async with trio.open_nursery() as nursery:

        async def start(processor: RemoteProcessor) -> None:
            with pytest.raises(StateError, match="ended while start was under way"):
                await processor.start()

        with pytest.raises(KeyError):
            async with open_processor(platform) as processor:
                await processor.configure()
                await processor.load(python_firmware())
                nursery.start_soon(start, processor)
                await trio.testing.wait_all_tasks_blocked()
                raise KeyError("mine")


async def test_what_is_raised_during_a_cancellation_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError), trio.CancelScope() as scope:
        async with open_processor(FakePlatform()) as processor:
            await processor.boot(python_firmware())
            try:
                scope.cancel()
                await trio.sleep_forever()
            finally:
                raise KeyError("mine")


async def test_a_table_that_is_too_long_is_refused_before_anything_is_written() -> None:
    table = ResourceTable((Carveout(0x10000, 0, 0, 0, "c"),) * 1024)
    firmware = python_firmware(ResourceTable((*table.entries[:1023], Unknown(9, bytes(0x4000)))))
    async with _processor(ProcessorState.CONFIGURED) as (processor, _):
        with pytest.raises(ResourceTableError, match="at most 0x10000 are possible"):
            await processor.load(firmware)
        assert processor.state is ProcessorState.CONFIGURED


async def test_config_space_is_where_the_table_says() -> None:
    vrings = (Vring(0x4000, 0x1000, 256, 1), Vring(0x8000, 0x1000, 256, 2))
    table = ResourceTable((Vdev(7, 0, 1, vrings=vrings, config=b"CONFIG!!"),))
    async with _processor() as (processor, _):
        await processor.boot(python_firmware(table))
        assert bytes(processor.devices[0].config) == b"CONFIG!!"
