"""What a platform is to the layers above: memory, a doorbell, and cores that come and go."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from openamp_py.errors import OpenAMPError, PeerGoneError, PlatformError, as_ours
from openamp_py.memory import MemoryMap
from openamp_py.remoteproc.coredump import Coredump, DumpSegment
from openamp_py.remoteproc.crash import CrashPolicy
from openamp_py.remoteproc.elf import Firmware
from openamp_py.remoteproc.plan import LoadPlan, Translate
from openamp_py.remoteproc.resource_table import Vendor
from openamp_py.virtio import Handshake


class Link(Protocol):
    """One side's way to the other, for one life of the link: shared memory and a doorbell."""

    name: str
    """For messages: "native core", "shm link"."""
    memory: MemoryMap
    table_da: int | None
    """Where the resource table lies, where there is one."""
    buffer_area: tuple[int, int] | None
    """Device address and size of the buffers of device 0, where the layout fixes them."""
    handshake: Handshake
    """How a driver on this link walks the status word."""

    def kick(self, notify_id: int) -> None:
        """Wakes the other side. Never blocks, never fails: a peer that is gone shows in `run`."""
        ...

    async def run(
        self,
        notified: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Connects (or starts the core), reports ready, and calls `notified` for each wake-up.

        What the other side put into memory before it left is notified before this ends.
        Returns when the other side ended in order. Cancelling it ends the other side hard where
        it is ours.

        Raises:
            PeerGoneError: the other side left without a word.
            CoreDiedError: the core ended when it should not have.
            PlatformError: it never began.
        """
        ...


class Core(abc.ABC):
    """A core of a platform for one life: the link to it, and what else can be asked of it.

    Made by a Platform, worked by a RemoteProcessor. Beside what a `Link` is, a core may be able
    to pause and to be left running; those calls refuse unless a platform does them. A subclass
    supplies `name`, `memory`, `kick` and `run`; the rest has a default or is set at the start.

    Attributes:
        name: for messages: "native core".
        memory: what the host can reach of it: the platform's.
        table_da: where the resource table lies. Set by the processor when it starts a core; by
            the platform, to an address or None, for one that is to be attached to.
        buffer_area: as the platform's.
        handshake: how the driver of its devices walks the status word.
        machine: its e_machine in an ELF, for the coredump; 0 where it runs no machine code.
        elf_class: 32 or 64, for the same.
        note: what the host that detached from it left for the next one.
        is_out_of_order: what it writes may be seen in another order than it wrote it, so that
            each side may miss that the other is about to sleep: a bus kicks always then, and looks
            at its rings now and then without a kick.
        tells_exit: whether `run` ends when the firmware has ended by itself.
    """

    name: str
    memory: MemoryMap
    table_da: int | None = None
    buffer_area: tuple[int, int] | None = None
    handshake: Handshake = Handshake.FULL
    machine: int = 0
    elf_class: int = 32
    note: bytes = b""
    is_out_of_order: bool = False
    tells_exit: bool = True

    @abc.abstractmethod
    def kick(self, notify_id: int) -> None:
        """See `Link.kick`."""

    @abc.abstractmethod
    async def run(
        self,
        notified: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Boots the core, or takes over one that runs, and listens to its end. See `Link.run`."""

    async def suspend(self) -> None:
        """Lets the core execute nothing until `resume`; what is sent to it waits.

        Raises:
            PlatformError: it cannot be suspended.
        """
        raise PlatformError(f"the {self.name} cannot be suspended")

    async def resume(self) -> None:
        """Lets a suspended core go on.

        Raises:
            PlatformError: it cannot.
        """
        raise PlatformError(f"the {self.name} cannot be resumed")

    def interrupt(self) -> None:
        """Makes a core that answers no more end and say where it was, where that is possible.

        `run` then raises its last words. Where it is not possible nothing happens, and the core is
        ended by cancelling `run`.
        """

    async def describe(self) -> str:
        """What the core does at this moment, for messages: "sleeps", "is at pc 0x21000124".

        Empty where nobody can tell. It need not be quick: whoever asks sets a limit.
        """
        await trio.lowlevel.checkpoint()
        return ""

    def part(self) -> None:
        """The processor's block ends: from now on the end of `run` may leave the core running.

        For a core that ran before there was this processor. Others end with it.
        """

    async def detach(self, note: bytes) -> None:
        """From now on the end of `run` leaves the core running, for another host to take over.

        Args:
            note: what that host is to know.

        Raises:
            PlatformError: it cannot be left running; nothing has changed.
        """
        raise PlatformError(f"the {self.name} cannot be left running")


class Platform(abc.ABC):
    """A kind of core, and the memory of one such core. Owned by its RemoteProcessor.

    A subclass supplies `name`, `memory` (made of `Region`, in its constructor) and `create_core`;
    each other operation does what most platforms want, and may be replaced. One that raises, or is
    cancelled, leaves the processor where the next call works.

    Attributes:
        name: for messages, and for the processor where it has no other.
        memory: what of the core's memory the host can reach.
        buffer_area: device address and size of the buffers of device 0, where the layout fixes
            them.
    """

    name: str
    memory: MemoryMap
    buffer_area: tuple[int, int] | None = None

    @property
    def console(self) -> str:
        """The end of what the core of the latest start wrote to its console, if it has one."""
        return ""

    def check(self, firmware: Firmware) -> None:
        """Raises ImageError when this core cannot run the image."""

    def heed(self, policy: CrashPolicy) -> None:
        """What the processor will do about a crash; said before each `prepare`."""

    async def prepare(self) -> None:
        """Before an image is loaded or a core is attached: clocks, power, memory."""

    async def unprepare(self) -> None:
        """After a shutdown, the opposite of `prepare`. Also where `prepare` was cancelled."""

    def decode(self, data: bytes) -> Firmware | None:
        """An image of a form that only this platform knows; None leaves it to the loaders.

        Raises:
            ImageError: it is of that form, and cannot be used.
        """
        return None

    async def load(self, plan: LoadPlan, translate: Translate) -> None:
        """Puts an image where the core finds it: piece by piece, so that other tasks run.

        Args:
            plan: what goes where.
            translate: the memory at a device address.
        """
        for da, data in plan.chunks():
            target = translate(da, len(data))
            if target is None:
                raise PlatformError(
                    f"platform {self.name}: the memory at {da:#x} has gone since it was asked for"
                )
            target[:] = data
            await trio.lowlevel.checkpoint()

    def find_table(self, firmware: Firmware) -> int | None:
        """Device address at which the loaded image has its table; None where it has none."""
        return firmware.table_da

    def boot_address(self, firmware: Firmware) -> int:
        """Device address at which the core is to start."""
        return firmware.entry

    def handle_vendor(self, entry: Vendor) -> bool:
        """A vendor's entry in the resource table. Returns whether it means something here.

        Raises:
            ResourceTableError: it asks for what this platform cannot give; the load fails.
        """
        return False

    def translate(self, da: int, size: int) -> memoryview | None:
        """The memory at a device address, or None: for cores that see theirs elsewhere."""
        return self.memory.find_da(da, size)

    @abc.abstractmethod
    def create_core(self, firmware: Firmware) -> Core:
        """A core that is about to run the loaded image; its `run` boots it. One for each start."""

    async def attach_core(self) -> Core:
        """A core that runs already; its `run` takes it over. Its memory is known from then on.

        Raises:
            PlatformError: there is none, or this platform cannot.
        """
        raise PlatformError(f"platform {self.name} cannot attach to a core that runs already")

    async def dump_segments(self) -> Sequence[DumpSegment]:
        """What a coredump is to contain beside the core's memory: registers of peripherals, say."""
        return ()

    async def take_coredump(self, failure: OpenAMPError | None) -> Coredump | None:
        """The coredump of a platform that makes it itself; None: it is made of the memory.

        Args:
            failure: why the core ended.

        Raises:
            PlatformError: it made none.
        """
        return None

    def read_trace(self, name: str | None) -> bytes | None:
        """What is in a trace buffer that the platform has; None: it is in the core's memory.

        Args:
            name: of the buffer; None for the first.

        Raises:
            KeyError: no buffer of that name; says which there are.
            PlatformError: it cannot be read.
        """
        return None

    def panic(self) -> None:
        """The host program is about to end by an error: leave the core as safe as can be.

        Neither waits nor raises.
        """

    def close(self) -> None:
        """Gives the memory back. Idempotent."""


async def run_link(
    link: Link, notified: Callable[[], None], task_status: trio.TaskStatus[None]
) -> OpenAMPError:
    """Runs a link to its end and returns why it ended.

    An error from before it was up is raised instead: whoever opens the link has to know.
    """
    up = False

    class Status:
        def started(self, value: None = None) -> None:
            nonlocal up
            up = True
            task_status.started()

    try:
        await link.run(notified, task_status=Status())
    except Exception as problem:
        error = as_ours(problem, f"{link.name} failed")
        if not up:
            raise error from error.__cause__
        return error
    if not up:
        raise PlatformError(f"{link.name} ended before it was up")
    return PeerGoneError(f"{link.name}: the other side left")
