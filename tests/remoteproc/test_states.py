"""The states of a processor as a stream, and its memory calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio
import trio.testing

from openamp_py import (
    Link,
    LoopbackPlatform,
    NativePlatform,
    PeerGoneError,
    ProcessorState,
    RemoteProcessor,
    ResourceTable,
    StateError,
    open_bus,
    open_processor,
)
from openamp_py.constants import NOTIFY_ID_ANY
from openamp_py.memory import MemoryMap, Region
from openamp_py.platforms import demo
from openamp_py.platforms.demo import python_firmware
from openamp_py.platforms.native import shipped_echo
from openamp_py.remote import serve_remote
from openamp_py.remoteproc.lifecycle import Happening
from openamp_py.remoteproc.resource_table import Unknown
from openamp_py.remoteproc.states import STATE_LIMIT, StateWatch
from openamp_py.rpmsg import Bus

Do = Callable[[RemoteProcessor, Happening], Awaitable[None]]
OpenFake = Callable[..., AbstractAsyncContextManager[tuple[RemoteProcessor, Any]]]

S = ProcessorState


async def test_a_slow_reader_loses_the_oldest() -> None:
    watch = StateWatch(S.OFFLINE)
    for _ in range(STATE_LIMIT + 1):
        watch.add(S.RUNNING)
    assert watch.missed == 1
    watch.end()
    assert [state async for state in watch] == [S.RUNNING] * (STATE_LIMIT + 1)


async def test_a_reader_that_is_cancelled_loses_nothing() -> None:
    watch = StateWatch(S.OFFLINE)
    assert await anext(watch) is S.OFFLINE
    with trio.move_on_after(0) as scope:
        await anext(watch)
    assert scope.cancelled_caught
    watch.add(S.CONFIGURED)
    assert await anext(watch) is S.CONFIGURED


async def test_a_stream_of_a_block_that_has_ended(open_fake: OpenFake) -> None:
    async with open_fake(S.RUNNING) as (processor, _):
        pass
    assert [state async for state in processor.states()] == [S.OFFLINE]
    assert await processor.wait_state(S.OFFLINE) is S.OFFLINE
    for wait in (processor.wait_up, lambda: processor.wait_state(S.RUNNING)):
        with pytest.raises(StateError, match="block has ended"):
            await wait()


async def test_waiters_are_told_that_the_block_ends(open_fake: OpenFake) -> None:
    async def wait(what: Callable[[], Any]) -> None:
        with pytest.raises(StateError, match="block has ended"):
            await what()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery, open_fake(S.STOPPED) as (processor, _):
            nursery.start_soon(wait, lambda: processor.wait_state(S.CRASHED))
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(StateError, match="block has ended"):
            await processor.wait_up()


async def test_waiting_for_a_core_that_nobody_boots_ends(open_fake: OpenFake, do_step: Do) -> None:
    with trio.fail_after(5):
        async with open_fake(S.STOPPED) as (processor, platform):
            with pytest.raises(StateError, match="it is stopped, and nobody boots it"):
                await processor.wait_up()
        async with open_fake(S.RUNNING) as (processor, platform), trio.open_nursery() as nursery:
            await do_step(processor, Happening.EXIT)
            with pytest.raises(PeerGoneError, match="the other side left"):
                await processor.wait_up()
            await processor.shutdown()
            platform.script.hangs["run"] = trio.Event()
            nursery.start_soon(processor.boot, python_firmware())
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(processor.wait_up)
            await trio.testing.wait_all_tasks_blocked()
            platform.script.hangs["run"].set()


async def test_firmware_from_a_stream_is_booted_again() -> None:
    async def stream() -> AsyncIterator[bytes]:
        yield shipped_echo().read_bytes()

    async with open_processor(NativePlatform()) as processor:
        await processor.boot(stream())
        await processor.shutdown()
        await processor.boot()
        assert processor.firmware is not None and processor.firmware.entry


async def test_a_table_that_was_given_stays(open_fake: OpenFake) -> None:
    other = ResourceTable((*demo.TABLE.entries, Unknown(9, b"more")))
    async with open_fake() as (processor, _):
        processor.set_table(other, 0x2000)
        for _ in range(2):
            await processor.boot(python_firmware())
            assert processor.table is not None and len(processor.table.entries) == 2
            await processor.shutdown()


async def test_memory_that_the_platform_does_not_know_of(open_fake: OpenFake) -> None:
    extra = Region("extra", 0x10_0000, 0x90_0000, memoryview(bytearray(0x1000)))
    async with open_fake() as (processor, _):
        processor.add_memory(extra)
        with pytest.raises(ValueError, match="overlaps"):
            processor.add_memory(extra)
        processor.map(da=0x10_0004, size=2)[:] = b"hi"
        assert bytes(processor.map(pa=0x90_0004, size=2)) == b"hi"
        assert processor.memory.find_name("extra") is extra
        assert processor.memory.find_view(extra.view[4:6]) == (extra, 4)
        for where in ({"da": 0x10_0FFF}, {"pa": 0x90_0FFF}):
            with pytest.raises(ValueError, match="are not in memory"):
                processor.map(**where, size=2)
        for where in ({}, {"da": 0, "pa": 0}):
            with pytest.raises(ValueError, match="one address is needed"):
                processor.map(**where, size=2)
        processor.add_to_coredump(0x10_0004, 2)
        await processor.boot(python_firmware())
        with pytest.raises(StateError, match="cannot add memory of a processor that is running"):
            processor.add_memory(extra)
        with pytest.raises(StateError, match="cannot set the resource table"):
            processor.set_table(demo.TABLE, 0)
        dump = await processor.coredump()
        assert [bytes(s.data) for s in dump.segments if s.da == 0x10_0004] == [b"hi"]


async def test_a_device_that_is_removed_and_made_anew() -> None:
    """The application sees the reset, and serves the next driver."""
    lives: list[int] = []

    async def serve(bus: Bus) -> None:
        lives.append(len(lives))
        async with bus.open_endpoint("echo", rebind=True) as endpoint:
            async for message in endpoint:
                await endpoint.send_to(message.payload, message.source)

    async def application(link: Link) -> None:
        await serve_remote(link, serve)

    with trio.fail_after(10):
        async with open_processor(LoopbackPlatform(application)) as processor:
            with pytest.raises(StateError, match="no virtio devices: the processor is offline"):
                processor.create_virtio(0)
            await processor.boot(python_firmware())
            for number in range(3):
                device = processor.devices[0]
                async with open_bus(device) as bus, bus.open_endpoint("echo") as endpoint:
                    await endpoint.wait_bound()
                    await endpoint.send(b"hello")
                    assert (await endpoint.receive()).payload == b"hello"
                    processor.get_notification()
                    processor.get_notification(NOTIFY_ID_ANY - 1)
                    with pytest.raises(StateError, match="remove it first"):
                        processor.create_virtio(0)
                    processor.remove_virtio(device)
                    with pytest.raises(trio.BrokenResourceError) as caught:
                        await endpoint.receive()
                    assert isinstance(caught.value.__cause__, PeerGoneError)
                assert processor.create_virtio(0) is processor.devices[0] is not device
                with pytest.raises(ValueError, match="not one of its devices"):
                    processor.remove_virtio(device)
                with pytest.raises(ValueError, match="no device 1"):
                    processor.create_virtio(1)
                assert len(lives) == number + 1


def test_maps_with_nothing_in_them() -> None:
    empty = MemoryMap([])
    assert empty.find_name("x") is None and empty.find_view(memoryview(b"x")) is None
