"""The other side's announcements as a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, Self

import trio

from openamp_py.rpmsg.wire import Announcement

EVENT_LIMIT: Final = 1024
"""Announcements a watch keeps for a reader that is slow, beside those it began with."""


class ServiceWatch:
    """The other side's announcements as they come: an async iterator of `Announcement`.

    Made by `Bus.open_watch`, which ends it. First those in force when it was opened, then each
    that comes. One task may iterate. A reader that lags far behind loses the oldest; `missed`
    counts them, and `Bus.channels` says what is in force.

    Iterating raises, once all was seen:
        trio.BrokenResourceError: the other side is gone.
        trio.ClosedResourceError: the bus or the watch was closed.

    Attributes:
        missed: announcements that were lost because the reader was too slow.
    """

    def __init__(self, begin: Sequence[Announcement]) -> None:
        self.missed = 0
        self._limit = EVENT_LIMIT + len(begin)
        self._queue = deque(begin)
        self._news = trio.lowlevel.ParkingLot()
        self._error: Exception | None = None

    def add(self, announcement: Announcement) -> None:
        """For the bus: an announcement came."""
        if self._error is not None:
            return
        if len(self._queue) >= self._limit:
            self._queue.popleft()
            self.missed += 1
        self._queue.append(announcement)
        self._news.unpark_all()

    def end(self, error: Exception) -> None:
        """For the bus: none will come any more."""
        if self._error is None:
            self._error = error
            self._news.unpark_all()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Announcement:
        await trio.lowlevel.checkpoint()
        while not self._queue:
            if self._error is not None:
                raise self._error
            await self._news.park()
        return self._queue.popleft()
