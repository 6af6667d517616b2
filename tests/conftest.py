"""Fixtures for all tests: two buses on one link; the cores to test on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import NamedTuple

import pytest
import trio

from openamp_py import (
    Bus,
    BusOptions,
    Handshake,
    Link,
    LoopbackPlatform,
    ResourceTable,
    VirtioDevice,
    encode_table,
    open_bus,
    open_processor,
    open_resources,
)
from openamp_py.memory import MemoryMap, SharedMemory
from openamp_py.platforms import demo
from openamp_py.platforms.demo import TABLE, python_firmware
from openamp_py.rpmsg.options import DEFAULT_OPTIONS


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """The command line sets one, which is not to last."""
    yield
    logging.getLogger("openamp_py").setLevel(logging.NOTSET)


class Pair(NamedTuple):
    """Both ends of one link."""

    host: Bus
    remote: Bus
    host_device: VirtioDevice
    remote_device: VirtioDevice


OpenPair = Callable[..., AbstractAsyncContextManager[Pair]]


@pytest.fixture
def open_pair() -> OpenPair:
    """Opens a host bus and a remote bus on one link in this process."""

    @asynccontextmanager
    async def open_(
        table: ResourceTable = TABLE,
        *,
        to_remote: int = 512,
        to_host: int = 512,
        options: BusOptions = DEFAULT_OPTIONS,
    ) -> AsyncIterator[Pair]:
        send, receive = trio.open_memory_channel[tuple[Bus, VirtioDevice]](1)

        async def application(link: Link) -> None:
            async with (
                open_resources(link) as resources,
                open_bus(
                    resources.rpmsg_device(),
                    replace(options, send_buffer_size=to_host, receive_buffer_size=to_remote),
                ) as bus,
            ):
                await send.send((bus, resources.rpmsg_device()))
                await trio.sleep_forever()

        async with open_processor(LoopbackPlatform(application)) as processor:
            await processor.boot(python_firmware(table))
            device = processor.rpmsg_device()
            own = replace(options, send_buffer_size=to_remote, receive_buffer_size=to_host)
            async with open_bus(device, own) as bus:
                remote, remote_device = await receive.receive()
                yield Pair(bus, remote, device, remote_device)

    return open_


class LinkEnd:
    """One end of a link in this process: whoever runs it hears of the other's kicks.

    Either end may be run again and again, so that programs on it come and go. It ends when `end`
    is set, with that error or in order.
    """

    table_da: int | None = demo.TABLE_DA
    handshake = Handshake.FULL

    def __init__(self, name: str, memory: MemoryMap) -> None:
        self.name = name
        self.memory = memory
        self.buffer_area: tuple[int, int] | None = demo.buffer_area()
        self.other: LinkEnd
        self.rung = trio.Event()
        self.end: Exception | None = None
        self.ended = False

    def kick(self, notify_id: int) -> None:
        self.other.rung.set()

    def finish(self, error: Exception | None = None) -> None:
        """The other side is gone."""
        self.end, self.ended = error, True
        self.rung.set()

    async def run(
        self,
        notified: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        task_status.started()
        while not self.ended:
            await self.rung.wait()
            self.rung = trio.Event()
            notified()
        if self.end is not None:
            raise self.end


CreateEnds = Callable[[ResourceTable], tuple[LinkEnd, LinkEnd]]


@pytest.fixture
def create_ends() -> Iterator[CreateEnds]:
    """Makes both ends of a link, the host's first, over memory with a table in it."""
    with contextlib.ExitStack() as stack:

        def create(table: ResourceTable) -> tuple[LinkEnd, LinkEnd]:
            shared = SharedMemory.create("openamp-test", demo.MEMORY_SIZE)
            stack.callback(shared.close)
            region = shared.region("shm", 0)
            data = encode_table(table)
            region.view[: len(data)] = data
            memory = MemoryMap([region])
            host, remote = LinkEnd("host end", memory), LinkEnd("remote end", memory)
            host.other, remote.other = remote, host
            return host, remote

        yield create


@pytest.fixture
def core(openamp_core: str) -> str:
    """Every core of `openamp_cores` in pyproject.toml, or those of the command line."""
    return openamp_core
