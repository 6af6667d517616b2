"""The remote core of module/program_rproc.c: a program behind a vhost-user device of id 63."""

from __future__ import annotations

import contextlib
import enum
import errno
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple

import trio

from openamp_py import BusApplication, serve_remote
from openamp_py.background import open_background
from openamp_py.constants import VIRTIO_F_VERSION_1
from openamp_py.errors import ResourceTableError
from openamp_py.memory import MemoryMap, Region
from openamp_py.platforms.vhost_user import Guests, VhostUserAddress, VhostUserLink
from openamp_py.virtio import Handshake, VirtioDevice, Virtqueue

DEVICE_ID = 63
TABLE_SIZE = 4096
"""In attach mode: what the end of the core's memory has for the resource table."""

EVENTS, COMMANDS = 0, 1
"""Queues of the device."""

# u32 op, u32 arg, u64 reserved
_EVENT = struct.Struct("<IIQ")
# u32 op, u32 arg, u64 a, u64 b, u64 c
_COMMAND = struct.Struct("<IIQQQ")
_STATUS = struct.Struct("<I")

_NOTIFY, _CRASH = 1, 2


class Op(enum.IntEnum):
    """What the driver orders."""

    HELLO = 1
    START = 2
    STOP = 3
    KICK = 4
    ATTACH = 5
    DETACH = 6


class Command(NamedTuple):
    """One order of the driver."""

    op: int
    arg: int
    a: int
    b: int
    c: int


class _CoreLink:
    """The remote's end of one life of the core, from START or ATTACH to its end."""

    name = "program core"
    buffer_area: tuple[int, int] | None = None
    handshake = Handshake.FULL

    def __init__(self, core: RemoteCore, memory: MemoryMap, table_da: int) -> None:
        self.memory = memory
        self.table_da: int | None = table_da
        self._core = core
        self.ended = trio.Event()
        self.notified: Callable[[], None] = _nothing

    def kick(self, notify_id: int) -> None:
        self._core.raise_event(_NOTIFY, notify_id)

    async def run(
        self,
        notified: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        self.notified = notified
        task_status.started()
        await self.ended.wait()


def _nothing() -> None:
    """What a kick does before there is anybody to hear it."""


class RemoteCore:
    """What the driver takes for its core. Made by `open_core`, which also ends it.

    Attributes:
        commands: what the driver ordered, but for kicks.
        tables: the resource table as it was at each START and ATTACH.
        memories: the core's own memory as it was at each STOP.
        complaints: what our remote said of tables that it cannot work with.
        answers: the errno to answer an order with, where it is not 0.

    Args:
        application: what runs on the core, for each life of the driver of its RPMsg device. None:
            the core does what it is told, and runs nothing.
        attach_table: what the core that is to be attached to has as its table.
    """

    def __init__(self, application: BusApplication | None, attach_table: bytes) -> None:
        self.commands: list[Command] = []
        self.tables: list[bytes] = []
        self.memories: list[bytes] = []
        self.complaints: list[str] = []
        self.answers: dict[Op, int] = {}
        self.memory = MemoryMap([])
        self.running = False
        self._application = application
        self._attach_table = attach_table
        self._link: _CoreLink | None = None
        self._life: trio.CancelScope | None = None
        self._life_ended = trio.Event()
        self._pending: dict[tuple[int, int], None] = {}  # in order, each once
        self._work = trio.Event()
        self._device: VirtioDevice | None = None
        self._queues: list[Virtqueue] = []

    @property
    def tcm(self) -> memoryview:
        """The core's own memory."""
        region = self.memory.find_name("tcm")
        assert region is not None, "the driver said hello"
        return region.view

    def crash(self, kind: int) -> None:
        """The core is gone, and says so."""
        self._end_life()
        self.raise_event(_CRASH, kind)

    def raise_event(self, op: int, arg: int) -> None:
        """Tells the driver something, as soon as it has room for it."""
        self._pending[op, arg] = None
        self._flush()

    def _flush(self) -> None:
        """Gives the driver what it has room for."""
        while self._pending and self._queues:
            queue = self._queues[EVENTS]
            chain = queue.get_available()
            if chain is None:
                break
            op, arg = next(iter(self._pending))
            del self._pending[op, arg]
            chain.spans[0].view[: _EVENT.size] = _EVENT.pack(op, arg, 0)
            self._give_back(EVENTS, chain.head, _EVENT.size)

    def _give_back(self, index: int, head: int, length: int) -> None:
        assert self._device is not None, "it has the queues"
        queue = self._queues[index]
        queue.put_used(head, length)
        if queue.publish():
            self._device.kick(index)

    async def serve(self, guests: Guests) -> None:
        """Serves one driver after the other."""
        while True:
            device = await guests.wait_driver(0)
            self._pending.clear()
            with contextlib.ExitStack() as stack:
                self._device = device
                device.on_notify = device.on_failure = self._wake
                stack.callback(self._leave)
                for index in (EVENTS, COMMANDS):
                    queue = stack.enter_context(contextlib.closing(device.open_queue(index)))
                    queue.attach()
                    self._queues.append(queue)
                async with open_background() as nursery:
                    while device.failure is None:
                        self._work = trio.Event()
                        self._flush()
                        if not await self._obey(nursery):
                            await self._work.wait()

    def _wake(self, _: object = None) -> None:
        self._work.set()

    def _leave(self) -> None:
        self.running = False
        self._queues.clear()
        self._device = None

    async def _obey(self, nursery: trio.Nursery) -> bool:
        """Carries out one order. Returns whether there was any."""
        chain = self._queues[COMMANDS].get_available()
        if chain is None:
            return False
        out, answer = chain.spans
        command = Command(*_COMMAND.unpack(out.view))
        if command.op == Op.KICK:
            # First the answer: the driver then knows that a new kick is needed.
            status = 0
        else:
            self.commands.append(command)
            status = await self._carry_out(command, nursery)
        answer.view[:] = _STATUS.pack(status)
        self._give_back(COMMANDS, chain.head, _STATUS.size)
        if command.op == Op.KICK and self._link is not None:
            self._link.notified()
        return True

    async def _carry_out(self, command: Command, nursery: trio.Nursery) -> int:
        with contextlib.suppress(ValueError):
            if status := self.answers.get(Op(command.op), 0):
                return status
        match command.op:
            case Op.HELLO:
                self._meet(command)
            case Op.START | Op.ATTACH:
                if self.running:
                    return errno.EBUSY
                table = self.memory.find_pa(command.b, command.c)
                self.tables.append(b"" if table is None else bytes(table))
                self.running = True
                if self._application is not None and table is not None:
                    link = _CoreLink(self, self.memory, command.b)
                    await nursery.start(self._live, link, self._application)
            case Op.STOP | Op.DETACH:
                self._end_life()
                if self._life is not None:
                    await self._life_ended.wait()
                if command.op == Op.STOP:
                    self.memories.append(bytes(self.tcm))
                self.running = False
            case _:
                return errno.EINVAL
        return 0

    def _meet(self, hello: Command) -> None:
        assert self._device is not None, "it brought the order"
        ram = self._device.memory
        tcm = ram.find_pa(hello.a, hello.b)
        assert tcm is not None, "it is in the guest's memory"
        self.memory = MemoryMap([Region("tcm", hello.c, hello.a, tcm), *ram.regions])
        if hello.arg:
            tcm[-TABLE_SIZE:] = self._attach_table.ljust(TABLE_SIZE, b"\0")

    async def _live(
        self,
        link: _CoreLink,
        application: BusApplication,
        *,
        task_status: trio.TaskStatus[None],
    ) -> None:
        self._link, self._life_ended = link, trio.Event()
        with trio.CancelScope() as self._life:
            task_status.started()
            try:
                await serve_remote(link, application)
            except ResourceTableError as error:
                self.complaints.append(str(error))
        self._link = self._life = None
        self._life_ended.set()

    def _end_life(self) -> None:
        if self._link is not None:
            self._link.ended.set()
        if self._life is not None:
            self._life.cancel()


@contextlib.asynccontextmanager
async def open_core(
    path: Path, application: BusApplication | None = None, *, attach_table: bytes = b""
) -> AsyncIterator[RemoteCore]:
    """A core that listens at `path`, for an `async with` block. See `RemoteCore`."""
    core = RemoteCore(application, attach_table)
    link = VhostUserLink(VhostUserAddress(str(path)), features=VIRTIO_F_VERSION_1)
    async with link.open_devices() as guests, open_background() as nursery:
        nursery.start_soon(core.serve, guests)
        yield core
