"""What is done after a core has ended by itself: a dump, and a new start."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio

from openamp_py.errors import CrashLoopError, as_ours
from openamp_py.remoteproc.coredump import Coredump
from openamp_py.remoteproc.crash import CoredumpMode, CoredumpSink
from openamp_py.remoteproc.dumping import copy_dump, save_dump
from openamp_py.remoteproc.life import Life
from openamp_py.remoteproc.lifecycle import Happening

if TYPE_CHECKING:
    from openamp_py.remoteproc.processor import RemoteProcessor

_logger = logging.getLogger(__name__)

_DUMP_GRACE = 10.0
"""Seconds that a coredump has to be written when the processor is stopped, or its block ends."""


class Aftermath:
    """Sees to the ends of a processor's lives, as the processor's policy says.

    Made by a RemoteProcessor, which also ends it.

    Attributes:
        settling: the lives that ended, and are not done with.
    """

    def __init__(self, processor: RemoteProcessor, nursery: trio.Nursery) -> None:
        self.settling: set[Life] = set()
        self._processor = processor
        self._nursery = nursery
        self._crash_times: deque[float] = deque()

    def begin(self, life: Life) -> None:
        """A life has ended by itself."""
        if life.happening is Happening.CRASH:
            life.is_recovering = self._processor.policy.recovery and not life.attached
        self.settling.add(life)
        self._nursery.start_soon(self._settle, life)

    def forget(self) -> None:
        """Somebody starts the core by hand: its crashes are counted anew."""
        self._crash_times.clear()

    async def end(self, lives: Sequence[Life] | None = None) -> None:
        """Gives recoveries up; a coredump has a short time to be written.

        Args:
            lives: which have ended; by default all.
        """
        lives = [*self.settling] if lives is None else lives
        for life in lives:
            life.recovery.cancel()
        with trio.move_on_after(_DUMP_GRACE):
            for life in lives:
                await life.settled.wait()
        for life in lives:
            life.aftermath.cancel()
        for life in lives:
            await life.settled.wait()

    async def _settle(self, life: Life) -> None:
        """All that is to be done after a life; it ends before the processor's block does."""
        crashed = life.happening is Happening.CRASH
        try:
            with trio.CancelScope(shield=True):
                await life.subdevices.end(crashed=crashed)
                if crashed:
                    with life.aftermath:
                        await self._after_crash(life)
        finally:
            self._end_recovering(life)
            self.settling.discard(life)
            life.settled.set()

    def _end_recovering(self, life: Life) -> None:
        life.is_recovering = False
        self._processor.changed()

    async def _after_crash(self, life: Life) -> None:
        """Dumps and recovers."""
        policy = self._processor.policy
        name = f"{self._processor.name}-{self._processor.crashes}.core"
        inline = policy.coredump is CoredumpMode.INLINE
        dump = None
        if policy.coredump is not CoredumpMode.DISABLED:
            dump = await self._take_dump(copy=not inline and life.is_recovering)
            if inline:
                await self._save(dump, policy.coredump_to, name)
        if life.is_recovering:
            with life.recovery:
                await self._recover()
            self._end_recovering(life)
        if not inline:
            await self._save(dump, policy.coredump_to, name)

    async def _take_dump(self, *, copy: bool) -> Coredump | None:
        try:
            dump = await self._processor.coredump()
            return await copy_dump(dump) if copy else dump
        except Exception as error:
            name = self._processor.name
            _logger.error("%s: there is no coredump: %s", name, repr(error))
            return None

    async def _save(self, dump: Coredump | None, where: CoredumpSink | None, name: str) -> None:
        if dump is None or where is None:
            return
        try:
            self._processor.last_coredump = await save_dump(dump, where, name)
        except Exception as error:  # a program is not to end because its crash was not saved
            name = self._processor.name
            _logger.exception("%s: the coredump is not written: %r", name, error)

    async def _recover(self) -> None:
        """Starts the core again, unless it has crashed too often."""
        await trio.lowlevel.checkpoint()
        processor = self._processor
        limit, window = processor.policy.limit, processor.policy.window
        times = self._crash_times
        while True:
            crash = processor.failure
            times.append(trio.current_time())
            while times[0] <= times[-1] - window:
                times.popleft()
            if len(times) >= limit:
                processor.failure = CrashLoopError(
                    f"{processor.name} crashes in a loop: {len(times)} within {window} s, "
                    f"which is the limit; it is not started again; the last crash: {crash}"
                )
                processor.failure.__cause__ = crash
                _logger.error("%s", str(processor.failure))
                return
            _logger.warning("%s crashed, and is started again: %s", processor.name, str(crash))
            await processor.wait_idle()
            try:
                await processor.start_again()
                return
            except Exception as error:  # a start that fails is one more crash
                if processor.closed:
                    return
                processor.failure = as_ours(error, "the core did not start")
