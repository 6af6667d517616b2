"""What a platform is to the layers above: memory, a doorbell, and cores that come and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from openamp_py.errors import OpenAMPError, PeerGoneError, PlatformError
from openamp_py.memory import MemoryMap
from openamp_py.remoteproc.elf import Firmware
from openamp_py.virtio import Handshake


class Link(Protocol):
    """One side's way to the other, for one life of the link: shared memory and a doorbell."""

    name: str
    """For messages: "native core", "shm link"."""
    memory: MemoryMap
    table_da: int
    """Where the resource table lies."""
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


class Platform(Protocol):
    """A kind of core, and the memory of one such core. Owned by its RemoteProcessor."""

    name: str
    memory: MemoryMap
    buffer_area: tuple[int, int] | None

    def check(self, firmware: Firmware) -> None:
        """Raises ImageError when this core cannot run the image."""
        ...

    def create_core(self, firmware: Firmware) -> Link:
        """A core that is about to run the loaded image; its `run` boots it. One for each start."""
        ...

    def close(self) -> None:
        """Gives the memory back. Idempotent."""
        ...


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
        error = problem
        if not isinstance(error, OpenAMPError):
            error = PlatformError(f"{link.name} failed: {problem!r}")
            error.__cause__ = problem
        if not up:
            raise error from error.__cause__
        return error
    return PeerGoneError(f"{link.name}: the other side left")
