"""Following a trace buffer of a processor: starts, stops, crashes, and tables that lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from openamp_py import (
    CoreCrashedError,
    Link,
    LoopbackPlatform,
    ResourceTable,
    ResourceTableError,
    StateError,
    encode_table,
    open_processor,
    open_trace,
    read_trace,
)
from openamp_py.platforms import demo
from openamp_py.platforms.demo import python_firmware
from openamp_py.remoteproc import RemoteProcessor
from openamp_py.remoteproc.platform import Core
from openamp_py.remoteproc.resource_table import Trace
from openamp_py.remoteproc.subdevices import Subdevice

TRACE = Trace(da=0xF000, length=0x100, name="log")
IMAGE = python_firmware(ResourceTable((*demo.TABLE.entries, TRACE)))


class Application:
    """Writes what the test says into its trace buffer, until the test ends it."""

    def __init__(self) -> None:
        self._text = b""
        self._write: Callable[[bytes], None] | None = None
        self.crash = trio.Event()

    async def __call__(self, link: Link) -> None:
        view = link.memory.find_da(TRACE.da, TRACE.length)
        assert view is not None
        view[:] = bytes(TRACE.length)
        self._text, self._view, self.crash = b"", view, trio.Event()
        self.write("up\n")
        await self.crash.wait()
        raise ValueError("told to")

    def write(self, text: str) -> None:
        self._text += text.encode()
        self._view[: len(self._text)] = self._text


class Goodbye(Subdevice):
    """Something that the core still talks with while it is being stopped."""

    def __init__(self, application: Application) -> None:
        self._application = application

    async def stop(self, *, crashed: bool) -> None:
        await trio.lowlevel.checkpoint()
        self._application.write("goodbye\n")


async def test_the_last_words_of_a_core_that_is_stopped_are_read() -> None:
    application = Application()
    async with open_processor(LoopbackPlatform(application)) as processor:
        processor.add_subdevice(Goodbye(application))
        await processor.boot(IMAGE)
        async with open_trace(processor) as follower:
            assert await anext(follower) == "up\n"
            assert read_trace(processor, "log") == "up\n"
            await processor.stop()
            assert follower.read_nowait() == "goodbye\n"
            assert follower.read_nowait() == ""
            await processor.shutdown()
            await processor.boot(IMAGE)
            application.write("again\n")
            assert follower.read_nowait() == "up\nagain\n"
            assert follower.gaps == 0


async def test_the_last_words_of_a_core_that_crashes_are_read() -> None:
    application = Application()
    async with open_processor(LoopbackPlatform(application)) as processor:
        await processor.boot(IMAGE)
        async with open_trace(processor) as follower:
            application.write("alas\n")
            application.crash.set()
            with pytest.raises(CoreCrashedError):
                await processor.wait_exit()
            await processor.wait_settled()
            assert follower.read_nowait() == "up\nalas\n"


async def test_following_ends_with_the_processor() -> None:
    application = Application()
    texts = []
    async with (
        trio.open_nursery() as nursery,
        open_processor(LoopbackPlatform(application)) as processor,
    ):
        await processor.boot(IMAGE)
        started = trio.Event()

        async def follow() -> None:
            async with open_trace(processor) as follower:
                started.set()
                texts.extend([text async for text in follower])

        nursery.start_soon(follow)
        await started.wait()
        application.write("late\n")
    assert "".join(texts) == "up\nlate\n"


# Refusals


async def test_what_cannot_be_read_is_said() -> None:
    async with open_processor(LoopbackPlatform(Application())) as processor:
        with pytest.raises(StateError, match="there is no trace: the processor is offline"):
            read_trace(processor)
        await processor.boot(IMAGE)
        with pytest.raises(KeyError, match="no trace buffer 'other'; there are: log"):
            async with open_trace(processor, "other"):
                pass


class _Left(LoopbackPlatform):
    """A core that runs already, with a table that names memory which is not there."""

    async def attach_core(self) -> Core:
        table = ResourceTable((*demo.TABLE.entries, Trace(da=0x7000_0000, length=16, name="far")))
        image = python_firmware(table)
        assert image.table is not None
        data = encode_table(image.table)
        self.memory.regions[0].view[: len(data)] = data
        return self.create_core(image)


async def test_a_buffer_outside_the_memory_is_the_tables_fault() -> None:
    async with open_processor(_Left(Application())) as processor:
        await processor.attach()
        for read in (_read, _follow):
            with pytest.raises(ResourceTableError, match="trace buffer 'far': 16 bytes at da"):
                await read(processor)


async def _read(processor: RemoteProcessor) -> None:
    read_trace(processor)


async def _follow(processor: RemoteProcessor) -> None:
    async with open_trace(processor):
        pass
