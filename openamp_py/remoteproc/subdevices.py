"""What lives and dies with a core: prepared and started in order, stopped in reverse."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Sequence
from typing import Final

import trio

_logger = logging.getLogger(__name__)

STOP_GRACE: Final = 5.0
"""Seconds that each has to stop, and to unprepare."""


class Subdevice:
    """Something that works together with a core, and only while that runs.

    A base class: each step may be left as it is. They are registered with
    `RemoteProcessor.add_subdevice`.
    """

    async def prepare(self) -> None:
        """Before the core starts. What it raises ends the start."""

    async def start(self) -> None:
        """The core runs. What it raises ends the start, and the core."""

    async def stop(self, *, crashed: bool) -> None:
        """Before the core is stopped; or after it has ended or crashed, and answers no more.

        It has `STOP_GRACE` seconds. What it raises is logged, and the rest is stopped all the same.
        """

    async def unprepare(self) -> None:
        """The core is stopped. Time and errors as for `stop`."""


class Subdevices:
    """The subdevices of one life of a core, and how far they have come.

    Args:
        subdevices: the processor's own list: what leaves it meanwhile is left alone, and what
            comes is taken in by `join`.
    """

    def __init__(self, subdevices: Sequence[Subdevice]) -> None:
        self._all = subdevices
        self._prepared: list[Subdevice] = []
        self._started: list[Subdevice] = []

    async def prepare(self) -> None:
        """Prepares each in order. `end` undoes what was done, also after an error."""
        for subdevice in tuple(self._all):
            if subdevice in self._all:  # it may have left meanwhile
                await subdevice.prepare()
                self._prepared.append(subdevice)

    async def start(self) -> None:
        """Starts each in order. `end` undoes what was done, also after an error."""
        for subdevice in tuple(self._prepared):
            if subdevice in self._all:
                await subdevice.start()
                self._started.append(subdevice)

    def join(self) -> None:
        """The core runs: those that came since it was prepared are as if they had been started."""
        for subdevice in self._all:
            if subdevice not in self._prepared:
                self._prepared.append(subdevice)
                self._started.append(subdevice)

    async def stop(self, *, crashed: bool) -> None:
        """Stops what was started, in reverse."""
        while self._started:
            subdevice = self._started.pop()
            if subdevice in self._all:
                await _undo(f"stopping {subdevice!r}", subdevice.stop(crashed=crashed))

    async def end(self, *, crashed: bool) -> None:
        """Stops and unprepares what is left, in reverse."""
        await self.stop(crashed=crashed)
        while self._prepared:
            subdevice = self._prepared.pop()
            if subdevice in self._all:
                await _undo(f"unpreparing {subdevice!r}", subdevice.unprepare())


async def _undo(what: str, step: Awaitable[None]) -> None:
    """Takes a step that must be taken; one that fails or hangs does not keep the rest."""
    with trio.move_on_after(STOP_GRACE, shield=True) as scope:
        try:
            await step
        except Exception as error:
            _logger.exception("%s: %r", what, error)
    if scope.cancelled_caught:
        _logger.error("%s took longer than %s s: it was left", what, STOP_GRACE)
