"""A remote processor: configured, loaded, started, suspended, recovered, detached, shut down."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from weakref import WeakSet

import trio

from openamp_py.background import open_background
from openamp_py.constants import NOTIFY_ID_ANY
from openamp_py.errors import (
    CoreCrashedError,
    CrashKind,
    OpenAMPError,
    PeerGoneError,
    PlatformError,
    StateError,
)
from openamp_py.memory import MemoryMap, Region
from openamp_py.remoteproc.aftermath import Aftermath
from openamp_py.remoteproc.coredump import Coredump
from openamp_py.remoteproc.crash import NO_POLICY, CrashPolicy
from openamp_py.remoteproc.dumping import make_dump
from openamp_py.remoteproc.elf import Firmware
from openamp_py.remoteproc.images import decode_image_untrusted, with_table
from openamp_py.remoteproc.life import Life
from openamp_py.remoteproc.lifecycle import Call, Happening, ProcessorState, next_state
from openamp_py.remoteproc.plan import LoadPlan, plan_load
from openamp_py.remoteproc.platform import Core, Platform, run_link
from openamp_py.remoteproc.resource_table import VENDOR_TYPES, ResourceTable, Vendor
from openamp_py.remoteproc.resources import Resources
from openamp_py.remoteproc.sources import Image, read_image
from openamp_py.remoteproc.states import StateWatch
from openamp_py.remoteproc.subdevices import Subdevice, Subdevices
from openamp_py.virtio import Role, VirtioDevice

_logger = logging.getLogger(__name__)

_INTERRUPT_GRACE = 1.0
"""Seconds that a core which is reported as crashed has to say where it was."""

_CLOSE_GRACE = 1.0
"""Seconds that undoing has where nothing else may wait for it."""

_UP = (ProcessorState.RUNNING, ProcessorState.SUSPENDED, ProcessorState.ATTACHED)

_EMPTY = (ProcessorState.OFFLINE, ProcessorState.CONFIGURED, ProcessorState.DETACHED)

VendorHandler = Callable[[Vendor], None]
"""What is done about a vendor's entry; raises ResourceTableError to refuse the image."""


class RemoteProcessor:
    """The life of one remote core, from the host's side.

    Made by `open_processor`, which shuts it down. One call at a time: a second one while the
    first is under way is refused. A call that fails, or is cancelled, leaves the state as it was
    unless it says otherwise; `lifecycle.TRANSITIONS` says which calls are allowed when.

    Attributes:
        platform: what kind of core this is.
        name: what it is called, in a registry and in file names.
        role: this side's end of the core's virtio devices.
        policy: what happens when the core crashes; may be replaced at any time.
        state: where it stands.
        failure: why the core ended by itself, or could not be recovered; None after a new start.
        core: the link to the core of the latest start; None before the first.
        entered: how many states it has entered.
        boots: how often a core has come up.
        crashes: how often one has crashed.
        power_count: how many users have booted it and not shut it down yet.
        ignored: vendor entries of the loaded image that nobody handled.
        last_coredump: the file that the policy wrote last.
    """

    def __init__(
        self,
        platform: Platform,
        nursery: trio.Nursery,
        *,
        name: str | None = None,
        firmware: Image | None = None,
        policy: CrashPolicy = NO_POLICY,
        role: Role = Role.DRIVER,
    ) -> None:
        self.platform = platform
        self.name = platform.name if name is None else name
        self.role = role
        self.policy = policy
        self.state = ProcessorState.OFFLINE
        self.failure: OpenAMPError | None = None
        self.core: Core | None = None
        self.entered = self.boots = self.crashes = self.power_count = 0
        self.ignored: tuple[Vendor, ...] = ()
        self.last_coredump: Path | None = None
        self._image = firmware
        self._nursery = nursery
        self._booting = trio.Lock()
        self._added: tuple[Region, ...] = ()
        self._to_dump: list[tuple[int, int]] = []
        self._vendors: dict[int, VendorHandler] = {}
        self._subdevices: list[Subdevice] = []
        self._given_table: tuple[ResourceTable, int] | None = None
        self._plan: LoadPlan | None = None
        self._resources: Resources | None = None
        self._life: Life | None = None
        self._latest: Life | None = None
        self._aftermath = Aftermath(self, nursery)
        self._watches: WeakSet[StateWatch] = WeakSet()
        self._changed = trio.lowlevel.ParkingLot()
        self._prepared = self._closed = False
        self._busy: Call | None = None
        self._calling = trio.CancelScope()

    # What there is

    @property
    def firmware(self) -> Firmware | None:
        """The loaded image."""
        return self._plan.firmware if self._plan else None

    @property
    def table(self) -> ResourceTable | None:
        """The running core's resource table with what the host decided, if it has one."""
        return self._resources.table if self._resources else None

    @property
    def devices(self) -> tuple[VirtioDevice, ...]:
        """The running core's virtio devices, one for each vdev entry of its table."""
        return self._resources.devices if self._resources else ()

    @property
    def memory(self) -> MemoryMap:
        """The core's memory that the host can reach: the platform's, and what was added."""
        memory = self.platform.memory
        return MemoryMap([*memory.regions, *self._added]) if self._added else memory

    @property
    def is_up(self) -> bool:
        """Whether there is a core that executes, or is suspended; not one that is reported."""
        return self.state in _UP and (self._life is None or self._life.report is None)

    @property
    def closed(self) -> bool:
        """Whether the processor's block has ended."""
        return self._closed

    @property
    def recovering(self) -> bool:
        """Whether the core has crashed, and is about to be started again by itself."""
        return self._latest is not None and self._latest.is_recovering

    def rpmsg_device(self) -> VirtioDevice:
        """The running core's first RPMsg device.

        Raises:
            StateError: the core does not run, or its firmware has no resource table.
            ResourceTableError: its table describes none.
        """
        if self._resources is not None:
            return self._resources.rpmsg_device()
        why = f"it is {self.state.value}"
        if self.firmware is not None and self.firmware.table is None:
            why = "its firmware has no resource table (section .resource_table)"
        raise StateError(f"this processor has no RPMsg device: {why}")

    def states(self) -> StateWatch:
        """The states from now on, as an async iterator: ``async for state in p.states()``."""
        watch = StateWatch(self.state)
        if self._closed:
            watch.end()
        self._watches.add(watch)
        return watch

    async def wait_state(self, *states: ProcessorState) -> ProcessorState:
        """Waits until the processor is in one of some states, and returns in which.

        A state that passes by at once may be missed: `states` shows each.

        Raises:
            StateError: the processor's block has ended.
        """
        await trio.lowlevel.checkpoint()
        while self.state not in states:
            if self.state is ProcessorState.OFFLINE:  # the last one; until then it is on its way
                self._check_open("wait")
            await self._changed.park()
        return self.state

    async def wait_up(self) -> None:
        """Waits until the core executes: while it is booted, and where it crashed, recovered.

        Raises:
            OpenAMPError: why it is not coming back: `failure`.
            StateError: it is off and nobody boots it, or the processor's block has ended.
        """
        await trio.lowlevel.checkpoint()
        while not self.is_up:
            self._check_open("wait")
            coming = self.state in _UP or self._busy is not None or self._booting.locked()
            if not coming and not self.recovering:
                if self.failure is not None:
                    raise self.failure.with_traceback(None)
                raise StateError(
                    f"there is no core to wait for: it is {self.state.value}, and nobody boots it"
                )
            await self._changed.park()

    async def wait_idle(self) -> None:
        """Waits until no call is under way."""
        while self._busy is not None:
            await self._changed.park()

    async def wait_change(self) -> None:
        """Waits until the state has changed, a call has ended, or a recovery was given up."""
        await self._changed.park()

    async def wait_exit(self) -> None:
        """Waits until the core has ended: by itself, or by `stop` or `shutdown`.

        Raises:
            CoreDiedError: it crashed, or asked for a reset.
            PlatformError: its platform failed.
            StateError: it was never started.
        """
        life = self._latest
        if life is None:
            raise StateError(f"the core was never started: the processor is {self.state.value}")
        await life.ended.wait()
        if life.failure is not None and not isinstance(life.failure, PeerGoneError):
            raise life.failure.with_traceback(None)

    async def wait_settled(self) -> None:
        """Waits until what follows when a core has ended by itself, or was reported, is done.

        Its subdevices are stopped, the coredump is written, and where the policy says so the core
        is started again. Returns at once where nothing of this is to be waited for.
        """
        await trio.lowlevel.checkpoint()
        if self._life is not None and self._life.report is not None:
            await self._life.ended.wait()
        while self._aftermath.settling:  # a recovered core's dump may be on its way still
            await next(iter(self._aftermath.settling)).settled.wait()

    # What belongs to it

    def add_memory(self, region: Region) -> None:
        """Adds memory of the core that the platform does not know of.

        Raises:
            ValueError: it overlaps a region that is there.
            StateError: an image is loaded already, or the core runs.
        """
        self._check_idle("add memory")
        MemoryMap([*self.memory.regions, region])
        self._added = (*self._added, region)

    def map(self, *, da: int | None = None, pa: int | None = None, size: int) -> memoryview:
        """The core's memory at an address, to read and write.

        Args:
            da: device address; or
            pa: physical address.

        Raises:
            ValueError: not exactly one address, or those bytes are not in one region.
        """
        if (da is None) == (pa is None):
            raise ValueError("one address is needed: da or pa")
        if size < 0:
            raise ValueError(f"a piece of memory of {size} bytes; 0 or more are possible")
        found = self._translate(da, size) if da is not None else None
        if pa is not None:
            found = self.memory.find_pa(pa, size)
        if found is None:
            kind, at = ("da", da) if da is not None else ("pa", pa)
            raise ValueError(f"{size} bytes at {kind} {at:#x} are not in memory: {self.memory}")
        return found

    def add_subdevice(self, subdevice: Subdevice) -> None:
        """Lets something be started after the core and stopped before it.

        Where the core runs already, this begins with the stop.
        """
        self._subdevices.append(subdevice)
        if self._life is not None and self._life.is_up:
            self._life.subdevices.join()

    def remove_subdevice(self, subdevice: Subdevice) -> None:
        """Takes it out again; it is not stopped.

        Raises:
            ValueError: it was not added.
        """
        if subdevice not in self._subdevices:
            raise ValueError(f"subdevice {subdevice!r} was not added to {self.name}")
        self._subdevices.remove(subdevice)

    def register_vendor(self, type_: int, handler: VendorHandler) -> None:
        """Says who handles vendor entries of a type in the tables that are loaded from now on.

        Args:
            type_: 128 to 512.
            handler: a function of the entry, whose `data` are its bytes; what it returns is
                ignored. Raises ResourceTableError to refuse the image.

        Raises:
            ValueError: it is no vendor's type.
        """
        if type_ not in VENDOR_TYPES:
            limits = f"{VENDOR_TYPES.start} to {VENDOR_TYPES.stop - 1}"
            raise ValueError(f"entry type {type_} is no vendor's: those are {limits}")
        self._vendors[type_] = handler

    def set_table(self, table: ResourceTable, da: int) -> None:
        """Gives each image that is loaded from now on a resource table, in place of its own.

        Args:
            table: what it is to have.
            da: where that is to lie in the core's memory.

        Raises:
            StateError: an image is loaded already, or the core runs.
        """
        self._check_idle("set the resource table")
        self._given_table = (table, da)

    def set_firmware(self, image: Image) -> None:
        """Says what `boot` loads.

        Raises:
            StateError: the core is not off.
        """
        if self.state is not ProcessorState.OFFLINE:
            raise StateError(
                f"cannot change the firmware of a processor that is {self.state.value}"
            )
        self._image = image

    def create_virtio(self, index: int) -> VirtioDevice:
        """A new virtio device for a vdev entry of the running core's table.

        Every entry has one from the start. A device is driven once in its life: this is for one
        that was removed, or that is to be driven anew while the core runs.

        Raises:
            StateError: the core does not run, or has no table.
            ValueError: there is no such entry.
        """
        return self._running_resources().create(index)

    def remove_virtio(self, device: VirtioDevice) -> None:
        """Takes a device away: its users are told, and the core sees the driver leave.

        Raises:
            StateError: the core does not run, or has no table.
            ValueError: it is not one of this core's.
        """
        self._running_resources().remove(device)

    def get_notification(self, notify_id: int = NOTIFY_ID_ANY) -> None:
        """Lets the devices look at their rings, as when the doorbell rings.

        For doorbells that the platform does not hear itself. The id is a hint: all are looked at.
        """
        self._hear()

    # Its life

    async def configure(self) -> None:
        """Prepares the platform, so that an image can be loaded.

        Raises:
            PlatformError: it could not be prepared.
        """
        with self._call(Call.CONFIGURE) as after:
            await self._prepare()
            self._enter(after)

    async def load(
        self,
        image: Image,
        *,
        loader: str | None = None,
        address: int | None = None,
        entry: int | None = None,
        table_da: int | None = None,
    ) -> None:
        """Loads firmware; nothing is written unless all of it is valid and fits.

        Args:
            image: bytes, a path, a name to be looked up, a file, or a stream.
            loader: name of the format, where the image does not tell it itself ("raw").
            address: where a raw image goes.
            entry: where it starts, instead of what the image says.
            table_da: where it has a resource table, for images that cannot say.

        Raises:
            ImageError: not an image, or not for this core, or outside its memory.
            ResourceTableError: its table is malformed or asks for the impossible.
            OSError: the file cannot be read.
            StateError: not now.

        Cancellation: what was loaded before may be gone: then the processor is configured.
        """
        with self._call(Call.LOAD) as after:
            data = await read_image(image)
            if isinstance(data, Firmware):
                firmware = data
            else:
                firmware = self.platform.decode(data) or decode_image_untrusted(
                    data, loader=loader, address=address, entry=entry, table_da=table_da
                )
            if self._given_table is not None:
                firmware = with_table(firmware, *self._given_table)
            self.platform.check(firmware)
            plan = plan_load(firmware, self.memory, translate=self._translate)
            ignored = tuple(self._unhandled(firmware.table)) if firmware.table else ()
            try:
                await self.platform.load(plan, self._translate)
            except BaseException:
                self._plan = None
                self._enter(ProcessorState.CONFIGURED)
                raise
            self._plan, self.ignored = plan, ignored
            self._enter(after)

    async def start(self) -> None:
        """Lets the core run, and makes its virtio devices.

        Raises:
            PlatformError: the core did not start.
            StateError: not now.
        """
        with self._call(Call.START) as after:
            life = await self._create()
            self._aftermath.forget()
            self.power_count = 1
            self._come_up(life, after)

    async def boot(self, image: Image | None = None) -> None:
        """Configures, loads and starts; or where the core is up already, counts one more user.

        Each call that succeeds is to be followed by one of `shutdown`, in the end. If a step
        fails, the processor is shut down again.

        A call that is under way, and a recovery, are waited for.

        Args:
            image: what to load; by default the processor's firmware.

        Raises:
            StateError: it is up with another image, or there is none; and what the steps raise.
            CoreDiedError: it has crashed, and is not recovered.
        """
        try:
            async with self._booting:
                await self._boot(image)
        finally:
            self.changed()

    async def suspend(self) -> None:
        """Pauses the core; messages to it wait.

        `Endpoint.send` returns once they are in the ring, unless that is full. An endpoint that is
        not bound yet is bound only after `resume`, so its `send` waits for that.

        Raises:
            PlatformError: this core cannot be suspended.
            StateError: not now.
        """
        with self._call(Call.SUSPEND) as after:
            life = self._living()
            try:
                await life.ask(life.core.suspend)
            except BaseException:
                if self._life is life:
                    await self._briefly(life.core.resume, "resume")
                raise
            self._check_alive(life)
            self._enter(after)

    async def resume(self) -> None:
        """Lets a suspended core go on.

        Raises:
            PlatformError: it did not.
            StateError: not now.
        """
        with self._call(Call.RESUME) as after:
            life = self._living()
            await life.ask(life.core.resume)
            self._check_alive(life)
            self._enter(ProcessorState.ATTACHED if life.attached else after)

    async def attach(self, *, table_da: int | None = None) -> None:
        """Takes over a core that runs already, and its devices as they stand.

        Args:
            table_da: where its resource table is in its memory; by default the platform says it.

        Raises:
            PlatformError: there is none, or this platform cannot.
            ResourceTableError: its table is malformed.
            StateError: not now, or this side is the device.
        """
        self._check_driver("attach")
        with self._call(Call.ATTACH) as after:
            await self._prepare()
            try:
                core = await self.platform.attach_core()
                life = await self._begin(core, table_da, attached=True)
            except BaseException:
                await self._briefly(self._unprepare, "unprepare")
                raise
            self._aftermath.forget()
            self.power_count = 1
            self._come_up(life, after)

    async def detach(self, note: bytes = b"") -> int:
        """Lets go of the core and leaves it running, for `attach`, here or in another program.

        Args:
            note: what the next host is to know: see `Core.note`.

        Returns:
            How many messages were taken from the rings and not received: they can be, here.

        Raises:
            PlatformError: the core cannot be left running; nothing has changed.
            StateError: not now, or this side is the device.
        """
        self._check_driver("detach")
        with self._call(Call.DETACH) as after:
            life = self._living()
            await life.ask(partial(life.core.detach, note))
            self._check_alive(life)
            unread = self._resources.detach() if self._resources else 0
            await self._end_life()
            self._close_resources()
            self._plan = None
            self.power_count = 0
            self._enter(after)
        return unread

    async def stop(self) -> None:
        """Stops the core hard, whoever has booted it. Its memory stays for inspection.

        A recovery is given up, and a coredump that is being written has a short time to be.
        Subdevices are stopped first.

        Cancellation: the core executes no more all the same.
        """
        await self._end_latest()
        with self._call(Call.STOP) as after:
            await self._end_life()
            self.power_count = 0
            self._enter(after)

    async def shutdown(self, *, force: bool = False) -> None:
        """Stops the core hard if it runs, and releases what it had.

        Where others have booted it too, one user less is counted and that is all. Otherwise as
        for `stop`. A core that was detached runs on.

        Args:
            force: for all users at once.

        Raises:
            PlatformError: the platform could not undo its preparation: the processor is stopped,
                and can be shut down again.

        Cancellation: the core executes no more all the same.
        """
        if self.power_count > 1 and not force:
            self._check_open("shutdown")
            self.power_count -= 1
            await trio.lowlevel.checkpoint()
            return
        await self._end_latest()
        with self._call(Call.SHUTDOWN) as after:
            await self._end_life()
            self._close_resources()
            self._plan = None
            self.power_count = 0
            if self.state is not ProcessorState.OFFLINE:
                self._enter(ProcessorState.STOPPED)
            await self._unprepare()
            self._enter(after)

    # When it goes wrong

    def report_crash(self, kind: CrashKind, reason: str) -> bool:
        """Says that the core has crashed: found out by a watchdog, say.

        Its users are told at once; then it is ended, and all goes as for any crash.

        Returns:
            Whether that is news. It is not where the core does not run, or crashed already.
        """
        life = self._life
        if life is None or not life.is_up or life.is_leaving or life.report is not None:
            return False
        life.report = CoreCrashedError(f"{life.core.name}: {reason}", kind=kind)
        if self._resources:
            self._resources.fail(life.report)
        self._nursery.start_soon(self._put_down, life)
        return True

    async def recover(self) -> None:
        """Starts a crashed core again, with the image as it was loaded.

        What is done about the crash already is waited for; where that starts it, this is all.

        Raises:
            PlatformError: it did not start; it is still crashed.
            StateError: not now, or the core was attached, and nothing is there to start again.
        """
        was_recovering = self.recovering
        await self.wait_settled()
        if was_recovering and self.is_up:
            return
        await self.start_again()
        self._aftermath.forget()

    async def coredump(self) -> Coredump:
        """What is to be kept of the core: a value, of memory that is still shared.

        Contains the loaded segments, what the table has in memory, what `add_to_coredump` named
        and what the platform adds; of an attached core all its memory. `encode_coredump` makes
        a file of it.

        Raises:
            StateError: nothing is loaded, and no core runs.
        """
        if self._plan is None and self.state in _EMPTY:
            raise StateError(f"there is nothing to dump: the processor is {self.state.value}")
        taken = await self.platform.take_coredump(self.failure)
        if taken is not None:
            return taken
        return await make_dump(
            self.platform,
            self._translate,
            self.core,
            self._plan,
            self.table,
            self._to_dump,
            self.failure,
        )

    def add_to_coredump(self, da: int, size: int) -> None:
        """Lets coredumps contain further memory of the core.

        Raises:
            ValueError: those bytes are not in one region.
        """
        self.map(da=da, size=size)
        self._to_dump.append((da, size))

    # What follows is for open_processor, and for the calls above.

    def panic(self) -> None:
        """Tells the platform that the program is about to end by an error."""
        try:
            self.platform.panic()
        except Exception as error:  # it must not hide the other
            _logger.error("%s: panic: %s", self.name, repr(error))

    async def close(self) -> None:
        """Ends it for good, whatever is under way."""
        self._closed = True
        self._calling.cancel()
        await self.wait_idle()  # it is cancelled, and undoes what it did
        await self._end_latest()
        await self._aftermath.end()
        if self._life is not None:
            self._life.core.part()
        await self._end_life()
        self._close_resources()
        self._plan = None
        self.power_count = 0
        if self._prepared:
            await self._briefly(self.platform.unprepare, "unprepare")
        self._enter(ProcessorState.OFFLINE)
        for watch in self._watches:
            watch.end()

    @contextmanager
    def _call(self, call: Call) -> Iterator[ProcessorState]:
        """Guards one call: refuses it in the wrong state; gives the state it leads to."""
        self._check_open(call.value)
        if self._busy is not None:
            raise StateError(f"cannot {call.value} while {self._busy.value} is under way")
        after = next_state(self.state, call)
        self._busy = call
        try:
            with trio.CancelScope() as self._calling:
                yield after
            if self._calling.cancelled_caught:
                raise StateError(f"the processor's block ended while {call.value} was under way")
        finally:
            self._busy = None
            self.changed()

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise StateError(f"cannot {what}: the processor's block has ended")

    def _check_driver(self, what: str) -> None:
        if self.role is not Role.DRIVER:
            raise StateError(
                f"cannot {what}: the core is the driver of its devices, and only those that are "
                "driven from here can be handed on"
            )

    def _check_idle(self, what: str) -> None:
        if self.state not in (ProcessorState.OFFLINE, ProcessorState.CONFIGURED):
            raise StateError(
                f"cannot {what} of a processor that is {self.state.value}; "
                "it must be offline or configured"
            )

    def _enter(self, state: ProcessorState) -> None:
        if state is not self.state:
            _logger.info("%s: %s", self.name, state.value)
            self.state = state
            self.entered += 1
            for watch in self._watches:
                watch.add(state)
        self.changed()

    def changed(self) -> None:
        """Wakes those who wait for a change."""
        self._changed.unpark_all()

    def _translate(self, da: int, size: int) -> memoryview | None:
        found = self.platform.translate(da, size)
        if found is None:
            return MemoryMap(self._added).find_da(da, size)
        if found.nbytes != size:
            raise PlatformError(
                f"platform {self.platform.name} has {found.nbytes} bytes at {da:#x} where it was "
                f"asked for {size}"
            )
        return found

    def _unhandled(self, table: ResourceTable) -> Iterator[Vendor]:
        for entry in table.vendors:
            handler = self._vendors.get(entry.type)
            if handler is not None:
                handler(entry)
            elif not self.platform.handle_vendor(entry):
                _logger.warning("%s: a vendor's entry of type %d is ignored", self.name, entry.type)
                yield entry

    async def _boot(self, image: Image | None) -> None:
        await trio.lowlevel.checkpoint()
        while self._busy is not None or self.recovering:
            await self.wait_change()
        self._check_open("boot")
        if self.power_count:
            if image is not None and image != self._image:
                raise StateError(f"the processor is {self.state.value} with another image")
            self._check_coming_back()
            self.power_count += 1
            return
        chosen = self._image if image is None else image
        if chosen is None:
            raise StateError("there is nothing to boot: no firmware was named")
        await self.configure()
        try:
            await self.load(chosen)
            await self.start()
            again = isinstance(chosen, (str, os.PathLike, bytes, Firmware))
            self._image = chosen if again else self.firmware  # a stream is used up
        except BaseException:
            if not self._closed:
                await self._briefly(self.shutdown, "shutdown after a boot that failed")
            raise

    async def _prepare(self) -> None:
        if self._prepared:
            return
        self.platform.heed(self.policy)
        try:
            await self.platform.prepare()
        except BaseException:
            await self._briefly(self.platform.unprepare, "unprepare")
            raise
        self._prepared = True

    async def _unprepare(self) -> None:
        if self._prepared:
            with trio.move_on_after(_CLOSE_GRACE, shield=True) as scope:
                await self.platform.unprepare()
            if scope.cancelled_caught:
                raise PlatformError(
                    f"platform {self.platform.name} did not undo its preparation within "
                    f"{_CLOSE_GRACE} s"
                )
            self._prepared = False

    async def _briefly(self, undo: Callable[[], Awaitable[None]], what: str) -> None:
        """Undoes something after an error, which must not be hidden by another."""
        try:
            with trio.move_on_after(_CLOSE_GRACE, shield=True):
                await undo()
        except Exception as error:
            _logger.error("%s: %s: %s", self.platform.name, what, repr(error))

    async def _create(self) -> Life:
        """Starts a core with what is loaded."""
        plan = self._plan
        assert plan is not None, "loaded"
        firmware = replace(plan.firmware, entry=self.platform.boot_address(plan.firmware))
        core = self.platform.create_core(firmware)
        return await self._begin(core, self.platform.find_table(firmware), attached=False)

    async def _begin(self, core: Core, table_da: int | None, *, attached: bool) -> Life:
        """Brings a core up, with its devices and subdevices; or leaves nothing of it."""
        before, self.failure = self.failure, None
        self.core = core
        life = Life(core, Subdevices(self._subdevices), attached=attached)
        try:
            await life.subdevices.prepare()
            self._open_resources(core, table_da, adopt=attached)
            await self._nursery.start(self._live, life)
            life.scope.shield = True  # whoever ends it sees to its subdevices first
            await life.ask(life.subdevices.start)
        except BaseException:
            await self._end_life(life)
            self._close_resources()
            self.failure = before
            raise
        self._latest = life
        return life

    def _open_resources(self, core: Core, table_da: int | None, *, adopt: bool) -> None:
        if table_da is not None or not adopt:
            core.table_da = table_da
        if core.table_da is None:
            return
        if self._added:
            core.memory = MemoryMap([*core.memory.regions, *self._added])
        plan = self._plan
        self._resources = Resources(
            core,
            self.role,
            carveouts=plan.carveouts if plan else None,
            arena=plan.arena if plan else None,
            adopt=adopt,
        )

    def _come_up(self, life: Life, state: ProcessorState) -> None:
        """The core is up; it may have ended already."""
        life.is_up = True
        life.subdevices.join()
        self.boots += 1
        self._enter(state)
        if life.happening is not None:
            self._happened(life)

    def _hear(self) -> None:
        if self._resources:
            self._resources.notified()

    async def _live(self, life: Life, *, task_status: trio.TaskStatus[None]) -> None:
        """One life of the core, from boot to its end."""
        cause: OpenAMPError = PeerGoneError(f"{life.core.name} was stopped")
        self._life = life
        try:
            with life.scope:
                cause = await run_link(life.core, self._hear, task_status)
            if life.report is not None:
                cause = _complete(life.report, cause)
            elif life.scope.cancelled_caught:
                return
            if not life.is_leaving:
                self.failure = life.failure = cause
                left = isinstance(cause, PeerGoneError)
                life.happening = Happening.EXIT if left else Happening.CRASH
        finally:
            self._life = None
            _logger.info("%s", cause)
            try:
                if self._resources:
                    self._resources.fail(cause)
            finally:
                life.end()
                if life.is_up and life.happening is not None:
                    self._happened(life)

    def _happened(self, life: Life) -> None:
        """The core has ended by itself: sees to what is to be done."""
        assert life.happening is not None
        self.crashes += life.happening is Happening.CRASH
        self._aftermath.begin(life)
        self._enter(next_state(self.state, life.happening))

    async def start_again(self) -> None:
        """Loads the image anew and starts the core. For the aftermath of a crash."""
        with self._call(Call.RECOVER) as after:
            if self._plan is None:
                raise StateError("the core was attached: there is no image here to start again")
            self._close_resources()
            await self.platform.load(self._plan, self._translate)
            life = await self._create()
            self._come_up(life, after)

    async def _put_down(self, life: Life) -> None:
        """Ends a core that was reported as crashed, with its last words if it has any."""
        try:
            life.core.interrupt()
        except Exception as error:
            _logger.error("%s cannot be interrupted: %s", life.core.name, repr(error))
        try:
            with trio.move_on_after(_INTERRUPT_GRACE):
                await life.ended.wait()
        finally:  # who ends the processor waits for this
            life.scope.cancel()

    async def _end_latest(self) -> None:
        """Lets what follows a crash end without a new start, before the memory changes."""
        while (life := self._latest) is not None:
            if life.is_put_down:
                await life.ended.wait()
            if life not in self._aftermath.settling:
                break
            await self._aftermath.end([life])

    async def _end_life(self, life: Life | None = None) -> None:
        """Ends the core and its subdevices. Takes no longer than those have."""
        life = life or self._life or self._latest
        if life is not None:
            life.is_leaving = True  # before anything is awaited: from now on it does not crash
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
            if life is not None:
                await life.subdevices.stop(crashed=False)
                if self._life is life:
                    life.scope.cancel()
                    await life.ended.wait()
                await life.subdevices.end(crashed=False)

    def _living(self) -> Life:
        life = self._life
        if life is None:  # it ends at this moment
            raise StateError("the core has just ended")
        if life.is_put_down:
            raise StateError(f"the core is being ended: {life.report}")
        return life

    def _check_coming_back(self) -> None:
        if self.state is ProcessorState.STOPPED:
            raise StateError(
                "the core has ended by itself; users that have not shut it down yet: "
                f"{self.power_count}"
            )
        by_hand = self._busy is Call.RECOVER
        if self.state is ProcessorState.CRASHED and not self.recovering and not by_hand:
            assert self.failure is not None, "a crash has a cause"
            raise self.failure.with_traceback(None)

    def _check_alive(self, life: Life) -> None:
        if self._life is not life:
            raise PlatformError(f"the core ended meanwhile: {self.failure}") from self.failure

    def _running_resources(self) -> Resources:
        if self._resources is None or self._life is None:
            raise StateError(f"there are no virtio devices: the processor is {self.state.value}")
        return self._resources

    def _close_resources(self) -> None:
        if self._resources is not None:
            self._resources.close()
            self._resources = None


def _complete(report: CoreCrashedError, words: OpenAMPError) -> CoreCrashedError:
    """A crash that was reported, with what the core said when it was ended."""
    if isinstance(words, CoreCrashedError):
        report.registers, report.pc = words.registers, words.pc
        report.signal, report.exit_code = words.signal, words.exit_code
        report.address, report.fault = words.address, words.fault
        if report.pc is not None:
            fault = f", after a fault: {report.fault}" if report.fault else ""
            report.args = (f"{report.args[0]} (it was at pc {report.pc:#x}{fault})",)
    return report


@asynccontextmanager
async def open_processor(
    platform: Platform,
    *,
    name: str | None = None,
    firmware: Image | None = None,
    policy: CrashPolicy = NO_POLICY,
    role: Role = Role.DRIVER,
) -> AsyncIterator[RemoteProcessor]:
    """A remote processor for an `async with` block; shut down, and its platform closed, at its end.

    Args:
        platform: the kind of core; owned by the processor from here on.
        name: what to call it; by default as its platform.
        firmware: what `boot` loads when it is not told.
        policy: what happens when the core crashes.
        role: this side's end of the core's virtio devices; the device, for firmware that is the
            driver. The life of the core is this side's in either role, but for `attach` and
            `detach`, which only a driver can.
    """
    try:
        async with open_background() as nursery:
            processor = RemoteProcessor(
                platform, nursery, name=name, firmware=firmware, policy=policy, role=role
            )
            try:
                yield processor
            except Exception:
                processor.panic()
                raise
            finally:
                with trio.CancelScope(shield=True):
                    await processor.close()
    finally:
        platform.close()
