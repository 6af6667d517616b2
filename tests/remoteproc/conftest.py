"""A platform whose core does what the test says, and a processor on it in any state."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio

from openamp_py import (
    Core,
    CoreCrashedError,
    CrashPolicy,
    Firmware,
    ImageError,
    Platform,
    ProcessorState,
    RemoteProcessor,
    encode_table,
    open_processor,
)
from openamp_py.memory import MemoryMap, SharedMemory
from openamp_py.platforms import demo
from openamp_py.platforms.demo import python_firmware
from openamp_py.remoteproc.coredump import DumpSegment
from openamp_py.remoteproc.crash import NO_POLICY
from openamp_py.remoteproc.lifecycle import Call, Happening, next_state
from openamp_py.remoteproc.resource_table import Vendor


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
        await self.script.wait("attach_core")
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


async def do(processor: RemoteProcessor, step: Call | Happening) -> None:
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
async def _open_fake(
    state: ProcessorState = ProcessorState.OFFLINE, *, policy: CrashPolicy = NO_POLICY
) -> AsyncIterator[tuple[RemoteProcessor, FakePlatform]]:
    platform = FakePlatform()
    async with open_processor(platform, policy=policy) as processor:
        for call in PATHS[state]:
            await do(processor, call)
        assert processor.state is state
        yield processor, platform
    assert platform.closed


OpenFake = Callable[..., AbstractAsyncContextManager[tuple[RemoteProcessor, FakePlatform]]]


@pytest.fixture
def open_fake() -> OpenFake:
    """Opens a processor on a FakePlatform, brought to a state."""
    return _open_fake


@pytest.fixture
def fake_platform() -> type[FakePlatform]:
    """The platform itself, for tests that open it in their own way."""
    return FakePlatform


@pytest.fixture
def do_step() -> Callable[[RemoteProcessor, Call | Happening], Awaitable[None]]:
    """Does a call, or lets the core end by itself."""
    return do
