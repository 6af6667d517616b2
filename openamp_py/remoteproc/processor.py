"""A remote processor: configured, loaded, started, stopped and shut down by the host."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from openamp_py.background import open_background
from openamp_py.errors import OpenAMPError, PeerGoneError, StateError
from openamp_py.remoteproc.elf import Firmware, decode_elf_untrusted
from openamp_py.remoteproc.lifecycle import Call, ProcessorState, next_state
from openamp_py.remoteproc.plan import LoadPlan, plan_load
from openamp_py.remoteproc.platform import Link, Platform, run_link
from openamp_py.remoteproc.resource_table import ResourceTable
from openamp_py.remoteproc.resources import Resources
from openamp_py.virtio import Role, VirtioDevice

_logger = logging.getLogger(__name__)

Image = bytes | str | os.PathLike[str] | Firmware
"""What can be loaded: an ELF file's bytes, a path to one, or firmware that is decoded already."""


class _Life:
    """One run of a core: how to end it, and that it has ended."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()


class RemoteProcessor:
    """The life of one remote core, from the host's side.

    Made by `open_processor`, which shuts it down. One call at a time: a second one while
    the first is under way is refused. A call that fails leaves the state as it was.

    Attributes:
        platform: what kind of core this is.
        state: where it stands; see `lifecycle.TRANSITIONS`.
        failure: why the core ended by itself, once it has; None after a new start.
        core: the link to the core of the latest start; None before the first.
    """

    def __init__(self, platform: Platform, nursery: trio.Nursery) -> None:
        self.platform = platform
        self.state = ProcessorState.OFFLINE
        self.failure: OpenAMPError | None = None
        self.core: Link | None = None
        self._nursery = nursery
        self._plan: LoadPlan | None = None
        self._resources: Resources | None = None
        self._life: _Life | None = None
        self._ended: trio.Event | None = None
        self._busy: Call | None = None
        self._closed = False

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

    async def configure(self) -> None:
        """Makes the processor ready to be loaded."""
        with self._call(Call.CONFIGURE):
            await trio.lowlevel.checkpoint()

    async def load(self, image: Image) -> None:
        """Loads firmware; nothing is written unless all of it is valid and fits.

        Raises:
            ImageError: not an image, or not for this core, or outside its memory.
            ResourceTableError: its table is malformed or asks for the impossible.
            OSError: the file cannot be read.
            StateError: not now.
        """
        with self._call(Call.LOAD):
            if isinstance(image, Firmware):
                await trio.lowlevel.checkpoint()
                firmware = image
            else:
                data = image
                if not isinstance(data, bytes):
                    data = await trio.Path(Path(data)).read_bytes()
                else:
                    await trio.lowlevel.checkpoint()
                firmware = decode_elf_untrusted(data)
            self.platform.check(firmware)
            plan = plan_load(firmware, self.platform.memory)
            plan.write(self.platform.memory)
            self._plan = plan

    async def start(self) -> None:
        """Lets the core run, and makes its virtio devices.

        Raises:
            PlatformError: the core did not start.
            StateError: not now.
        """
        with self._call(Call.START):
            assert self._plan is not None, "READY means loaded"
            core = self.core = self.platform.create_core(self._plan.firmware)
            self.failure = None
            if self._plan.firmware.table is not None:
                self._resources = Resources(
                    core, Role.DRIVER, carveouts=self._plan.carveouts, arena=self._plan.arena
                )
            life = _Life()
            try:
                await self._nursery.start(self._live, core, life)
            except BaseException:
                self._close_resources()
                raise
            self._ended = life.ended
        if life.ended.is_set():
            self.state = ProcessorState.STOPPED

    async def boot(self, image: Image) -> None:
        """Configures, loads and starts. If one of them fails, the processor is shut down again."""
        await self.configure()
        try:
            await self.load(image)
            await self.start()
        except BaseException:
            if not self._closed:
                with trio.CancelScope(shield=True):
                    await self.shutdown()
            raise

    async def stop(self) -> None:
        """Stops the core hard. Its memory stays for inspection.

        Cancellation: the core is stopped all the same.
        """
        with self._call(Call.STOP):
            await self._end_life()

    async def shutdown(self) -> None:
        """Stops the core hard if it runs, and releases what it had.

        Cancellation: the core is stopped all the same.
        """
        with self._call(Call.SHUTDOWN):
            await self._end_life()
            self._close_resources()
            self._plan = None

    async def wait_exit(self) -> None:
        """Waits until the core has ended: by itself, or by `stop` or `shutdown`.

        Raises:
            CoreDiedError: it crashed, or asked for a reset.
            PlatformError: its platform failed.
            StateError: it was never started.
        """
        if self._ended is None:
            raise StateError(f"the core was never started: the processor is {self.state.value}")
        await self._ended.wait()
        if self.failure is not None and not isinstance(self.failure, PeerGoneError):
            raise self.failure.with_traceback(None)

    async def _live(self, core: Link, life: _Life, *, task_status: trio.TaskStatus[None]) -> None:
        """One life of the core, from boot to its end."""
        resources = self._resources
        cause: OpenAMPError = PeerGoneError(f"{core.name} was stopped")
        self._life = life
        try:
            with life.scope:
                notified = resources.notified if resources else _nobody
                cause = await run_link(core, notified, task_status)
            if not life.scope.cancelled_caught:
                self.failure = cause
                self.state = ProcessorState.STOPPED
            elif self._busy is Call.START:
                raise StateError("the processor's block ended while start was under way")
        finally:
            self._life = None
            _logger.info("%s", cause)
            try:
                if resources:
                    resources.fail(cause)
            finally:
                life.ended.set()

    async def _end_life(self) -> None:
        life = self._life
        if life is None:
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            life.scope.cancel()
            with trio.CancelScope(shield=True):
                await life.ended.wait()

    def _close_resources(self) -> None:
        if self._resources is not None:
            self._resources.close()
            self._resources = None

    async def close(self) -> None:
        """Ends it for good, whatever is under way: for `open_processor`."""
        self._closed = True
        await self._end_life()
        self._close_resources()
        self._plan = None
        self.state = ProcessorState.OFFLINE

    @contextmanager
    def _call(self, call: Call) -> Iterator[None]:
        """Guards one call: refuses it in the wrong state, moves the state when it succeeds."""
        if self._closed:
            raise StateError(f"cannot {call.value}: the processor's block has ended")
        if self._busy is not None:
            raise StateError(f"cannot {call.value} while {self._busy.value} is under way")
        after = next_state(self.state, call)
        self._busy = call
        try:
            yield
        finally:
            self._busy = None
        self.state = after


def _nobody() -> None:
    """Notifications of a core without devices."""


@asynccontextmanager
async def open_processor(platform: Platform) -> AsyncIterator[RemoteProcessor]:
    """A remote processor for an `async with` block; shut down, and its platform closed, at its end.

    Args:
        platform: the kind of core; owned by the processor from here on.
    """
    try:
        async with open_background() as nursery:
            processor = RemoteProcessor(platform, nursery)
            try:
                yield processor
            finally:
                with trio.CancelScope(shield=True):
                    await processor.close()
    finally:
        platform.close()
