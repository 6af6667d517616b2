"""A remote in the same process: a Python application on the other end of shared memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from openamp_py.errors import CoreCrashedError, PlatformError
from openamp_py.memory import MemoryMap
from openamp_py.platforms import demo
from openamp_py.platforms.child import create_memory
from openamp_py.remoteproc.elf import Firmware
from openamp_py.remoteproc.platform import Core, Link, Platform
from openamp_py.virtio import Handshake

Application = Callable[[Link], Awaitable[None]]
"""A remote application: it gets its end of the link and returns when it is done."""


class LoopbackPlatform(Platform):
    """Memory for a remote that is a trio task of this program.

    Args:
        application: what the remote runs; called anew at each start.
        handshake: how the driver walks the status word.
        memory_size: bytes of shared memory; larger buffers than usual need more.

    Raises:
        ValueError: the memory is too small.
    """

    name = "loopback"

    def __init__(
        self,
        application: Application,
        *,
        handshake: Handshake = Handshake.FULL,
        memory_size: int = demo.MEMORY_SIZE,
    ) -> None:
        self.buffer_area = demo.buffer_area(memory_size)
        self._application = application
        self._handshake = handshake
        self._shared = create_memory("openamp-loopback", memory_size)
        self.memory = MemoryMap([self._shared.region("shm", 0)])

    def check(self, firmware: Firmware) -> None:
        """Raises ImageError for an image with machine code."""
        demo.check_python(self.name, firmware)

    def create_core(self, firmware: Firmware) -> LoopbackCore:
        """A remote that will run the application."""
        return LoopbackCore(
            self.memory, firmware, self._application, self._handshake, self.buffer_area
        )

    def close(self) -> None:
        """Gives the memory back. Idempotent."""
        self._shared.close()


class _Bell:
    """A doorbell between two tasks. While it is held back, rings are remembered as one."""

    def __init__(self) -> None:
        self._rung = trio.Event()
        self._free = trio.Event()
        self._free.set()

    def ring(self) -> None:
        self._rung.set()

    def hold(self) -> None:
        if self._free.is_set():
            self._free = trio.Event()

    def release(self) -> None:
        self._free.set()

    async def run(self, notified: Callable[[], None]) -> None:
        while True:
            await self._rung.wait()
            while not self._free.is_set():
                await self._free.wait()
            self._rung = trio.Event()
            notified()


class _RemoteEnd:
    """The application's end of a loopback: a link that is up as long as the core runs."""

    name = "loopback host"
    buffer_area: tuple[int, int] | None = None  # a device brings none
    table_da: int | None = demo.TABLE_DA

    def __init__(self, memory: MemoryMap, handshake: Handshake, own: _Bell, other: _Bell) -> None:
        self.memory = memory
        self.handshake = handshake
        self._own = own
        self._other = other

    def kick(self, notify_id: int) -> None:
        self._other.ring()

    async def run(
        self,
        notified: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        task_status.started()
        await self._own.run(notified)


class LoopbackCore(Core):
    """One run of the application, seen from the host.

    The application is a task of this program, which nothing can pause: while it is suspended it
    neither hears the host nor is heard. Kicks of either side wait, as one, for `resume`; what the
    application does without being kicked it goes on doing, and its end is heard at once. It
    cannot be interrupted.
    """

    name = "loopback core"

    def __init__(
        self,
        memory: MemoryMap,
        firmware: Firmware,
        application: Application,
        handshake: Handshake,
        buffer_area: tuple[int, int] | None,
    ) -> None:
        self.memory = memory
        self.buffer_area = buffer_area
        self.table_da = firmware.table_da or demo.TABLE_DA
        self.handshake = handshake
        self._application = application
        self._host_bell = _Bell()
        self._remote_bell = _Bell()
        self._running = False

    def kick(self, notify_id: int) -> None:
        """Wakes the application's side."""
        self._remote_bell.ring()

    async def suspend(self) -> None:
        """Holds the kicks of both sides back, until `resume`.

        Raises:
            PlatformError: the application does not run.
        """
        await self._check_running("suspended")
        for bell in (self._host_bell, self._remote_bell):
            bell.hold()

    async def resume(self) -> None:
        """Lets the kicks through again, and those that waited.

        Raises:
            PlatformError: the application does not run.
        """
        await self._check_running("resumed")
        for bell in (self._host_bell, self._remote_bell):
            bell.release()

    async def _check_running(self, what: str) -> None:
        await trio.lowlevel.checkpoint()
        if not self._running:
            raise PlatformError(f"the {self.name} cannot be {what}: its application does not run")

    async def run(
        self,
        notified: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Runs the application until it returns. See `Link.run`.

        Raises:
            CoreCrashedError: the application raised an exception, which is the cause.
        """
        remote = _RemoteEnd(self.memory, self.handshake, self._remote_bell, self._host_bell)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._host_bell.run, notified)
            task_status.started()
            crash: CoreCrashedError | None = None
            self._running = True
            try:
                await self._application(remote)
            except Exception as error:
                crash = _crash(error)
            except BaseExceptionGroup as group:
                cancelled, rest = group.split(trio.Cancelled)
                if cancelled is not None:
                    raise cancelled from None
                assert rest is not None, "no group is empty"
                crash = _crash(rest)
            finally:
                self._running = False
            notified()
            nursery.cancel_scope.cancel()
        if crash is not None:
            raise crash


def _crash(error: BaseException) -> CoreCrashedError:
    crash = CoreCrashedError(f"the core's application raised {error!r}")
    crash.__cause__ = error
    return crash
