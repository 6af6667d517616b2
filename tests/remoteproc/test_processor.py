"""A remote processor with a core that does what the test says."""

from __future__ import annotations

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
    Firmware,
    ImageError,
    PeerGoneError,
    PlatformError,
    ProcessorState,
    RemoteProcessor,
    ResourceTable,
    ResourceTableError,
    StateError,
    open_bus,
    open_processor,
)
from openamp_py.platforms import demo
from openamp_py.platforms.demo import python_firmware
from openamp_py.remoteproc.elf import Segment
from openamp_py.remoteproc.lifecycle import TRANSITIONS, Call, Happening
from openamp_py.remoteproc.resource_table import Carveout, Unknown, Vdev, Vring

OpenFake = Callable[..., AbstractAsyncContextManager[tuple[RemoteProcessor, Any]]]
Fake = Callable[[], Any]
Do = Callable[[RemoteProcessor, Call | Happening], Awaitable[None]]


@pytest.mark.parametrize(
    ("state", "call"), list(itertools.product(ProcessorState, [*Call, *Happening]))
)
async def test_every_state_and_call(
    open_fake: OpenFake, do_step: Do, state: ProcessorState, call: Call | Happening
) -> None:
    async with open_fake(state) as (processor, _):
        if (state, call) in TRANSITIONS:
            await do_step(processor, call)
            assert processor.state is TRANSITIONS[state, call]
        elif isinstance(call, Call):
            before = (processor.firmware, processor.devices)
            with pytest.raises(StateError):
                await do_step(processor, call)
            assert processor.state is state
            assert (processor.firmware, processor.devices) == before


async def test_boot_is_the_first_three_calls(open_fake: OpenFake) -> None:
    async with open_fake() as (processor, _):
        await processor.boot(python_firmware())
        assert processor.state is ProcessorState.RUNNING
        assert processor.table == demo.TABLE
        assert [d.device_id for d in processor.devices] == [7]


async def test_it_can_be_booted_again_after_a_shutdown(open_fake: OpenFake) -> None:
    async with open_fake(ProcessorState.RUNNING) as (processor, _):
        first = processor.rpmsg_device()
        await processor.shutdown()
        assert processor.devices == () and processor.firmware is None
        await processor.boot(python_firmware())
        assert processor.rpmsg_device() is not first


async def test_an_image_can_be_loaded_from_a_path_or_bytes(
    open_fake: OpenFake, tmp_path: Path
) -> None:
    async with open_fake(ProcessorState.CONFIGURED) as (processor, _):
        for image in (b"not an ELF", tmp_path / "missing", str(tmp_path / "missing")):
            with pytest.raises((ImageError, FileNotFoundError)):
                await processor.load(image)
            assert processor.state is ProcessorState.CONFIGURED


async def test_a_bad_image_leaves_the_loaded_one_in_place(open_fake: OpenFake) -> None:
    async with open_fake(ProcessorState.READY) as (processor, platform):
        loaded = processor.firmware
        before = bytes(platform.memory.regions[0].view)
        outside = Firmware(segments=(Segment(0, b"x", 1, 5), Segment(1 << 30, b"x", 1, 5)))
        for bad in (b"\x7fELF", Firmware(machine=40), outside):
            with pytest.raises(ImageError):
                await processor.load(bad)
            assert processor.state is ProcessorState.READY
            assert processor.firmware is loaded
        assert bytes(platform.memory.regions[0].view) == before


async def test_a_core_that_does_not_start_leaves_it_ready(open_fake: OpenFake) -> None:
    async with open_fake(ProcessorState.READY) as (processor, platform):
        platform.script.errors["run"] = PlatformError("no power")
        with pytest.raises(PlatformError, match="no power"):
            await processor.start()
        assert processor.state is ProcessorState.READY and processor.devices == ()
        platform.script.errors.clear()
        await processor.start()
        assert len(processor.devices) == 1


async def test_a_boot_that_fails_ends_offline(open_fake: OpenFake) -> None:
    async with open_fake() as (processor, platform):
        platform.script.errors["run"] = PlatformError("no power")
        with pytest.raises(PlatformError):
            await processor.boot(python_firmware())
        assert processor.state is ProcessorState.OFFLINE


async def test_a_core_that_ends_in_order_stops_and_breaks_its_devices(open_fake: OpenFake) -> None:
    async with open_fake(ProcessorState.RUNNING) as (processor, platform):
        device = processor.rpmsg_device()
        assert platform.end is not None
        platform.end.set()
        await processor.wait_exit()
        assert processor.state is ProcessorState.STOPPED
        assert isinstance(processor.failure, PeerGoneError)
        assert device.failure is processor.failure


async def test_a_crash_is_raised_by_wait_exit_and_is_the_cause_of_broken_channels(
    open_fake: OpenFake,
) -> None:
    async with (
        open_fake(ProcessorState.RUNNING) as (processor, platform),
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


async def test_stop_wakes_those_who_wait(open_fake: OpenFake) -> None:
    async with (
        open_fake(ProcessorState.RUNNING) as (processor, _),
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


async def test_one_call_at_a_time(open_fake: OpenFake) -> None:
    async with open_fake(ProcessorState.READY) as (processor, platform):
        platform.script.hangs["run"] = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(processor.start)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(StateError, match="cannot shutdown while start is under way"):
                await processor.shutdown()
            platform.script.hangs["run"].set()
        assert processor.state is ProcessorState.RUNNING


async def test_a_start_that_hangs_can_be_cancelled(open_fake: OpenFake) -> None:
    async with open_fake(ProcessorState.READY) as (processor, platform):
        platform.script.hangs["run"] = trio.Event()
        with trio.move_on_after(0.05) as scope:
            await processor.start()
        assert scope.cancelled_caught
        assert processor.state is ProcessorState.READY and processor.devices == ()
        platform.script.hangs["run"].set()
        await processor.start()


async def test_without_a_table_asking_for_rpmsg_says_why(open_fake: OpenFake) -> None:
    async with open_fake() as (processor, _):
        with pytest.raises(StateError, match="it is offline"):
            processor.rpmsg_device()
        await processor.boot(Firmware(segments=(Segment(0, b"x", 1, 5),)))
        assert processor.devices == ()
        with pytest.raises(StateError, match="no resource table"):
            processor.rpmsg_device()


async def test_what_the_block_raises_comes_out_as_it_is(fake_platform: Fake) -> None:
    with pytest.raises(KeyError):
        async with open_processor(fake_platform()) as processor:
            await processor.boot(python_firmware())
            raise KeyError("mine")


async def test_cancelling_the_block_takes_the_core_down(fake_platform: Fake) -> None:
    platform = fake_platform()
    with trio.move_on_after(0.05) as scope:
        async with open_processor(platform) as processor:
            await processor.boot(python_firmware())
            await trio.sleep_forever()
    assert scope.cancelled_caught and platform.closed
    assert processor.state is ProcessorState.OFFLINE


async def test_waiting_for_the_end_of_a_core_that_never_began_is_refused(
    open_fake: OpenFake,
) -> None:
    async with open_fake(ProcessorState.READY) as (processor, _):
        with pytest.raises(StateError, match="never started: the processor is ready"):
            await processor.wait_exit()


async def test_a_platform_that_fails_in_its_own_way_is_a_platform_error(
    open_fake: OpenFake,
) -> None:
    async with open_fake(ProcessorState.RUNNING) as (processor, platform):
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


async def test_a_processor_is_of_no_use_after_its_block(open_fake: OpenFake, do_step: Do) -> None:
    async with open_fake(ProcessorState.RUNNING) as (processor, _):
        pass
    assert processor.state is ProcessorState.OFFLINE
    for call in Call:
        with pytest.raises(StateError, match="the processor's block has ended"):
            await do_step(processor, call)


async def test_leaving_the_block_during_a_call_does_not_hide_why(fake_platform: Fake) -> None:
    platform = fake_platform()
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


async def test_what_is_raised_during_a_cancellation_comes_out_as_it_is(fake_platform: Fake) -> None:
    with pytest.raises(KeyError), trio.CancelScope() as scope:
        async with open_processor(fake_platform()) as processor:
            await processor.boot(python_firmware())
            try:
                scope.cancel()
                await trio.sleep_forever()
            finally:
                raise KeyError("mine")


async def test_a_table_that_is_too_long_is_refused_before_anything_is_written(
    open_fake: OpenFake,
) -> None:
    table = ResourceTable((Carveout(0x10000, 0, 0, 0, "c"),) * 1024)
    firmware = python_firmware(ResourceTable((*table.entries[:1023], Unknown(9, bytes(0x4000)))))
    async with open_fake(ProcessorState.CONFIGURED) as (processor, _):
        with pytest.raises(ResourceTableError, match="at most 0x10000 are possible"):
            await processor.load(firmware)
        assert processor.state is ProcessorState.CONFIGURED


async def test_config_space_is_where_the_table_says(open_fake: OpenFake) -> None:
    vrings = (Vring(0x4000, 0x1000, 256, 1), Vring(0x8000, 0x1000, 256, 2))
    table = ResourceTable((Vdev(7, 0, 1, vrings=vrings, config=b"CONFIG!!"),))
    async with open_fake() as (processor, _):
        await processor.boot(python_firmware(table))
        assert bytes(processor.devices[0].config) == b"CONFIG!!"
