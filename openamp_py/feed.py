"""What happens, as a stream: a bounded queue between who tells and who reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Generic, Self, TypeVar

import trio

T = TypeVar("T")


class Feed(Generic[T]):
    """Values as they come: an async iterator, first of those it began with.

    The base of the streams that are offered. One task may iterate. A reader that lags far behind
    loses the oldest values.

    Attributes:
        missed: values that were lost because the reader was too slow.
    """

    def __init__(self, begin: Iterable[T], limit: int) -> None:
        """Keeps up to `limit` values, beside those it begins with."""
        self.missed = 0
        self._queue = deque(begin)
        self._limit = limit + len(self._queue)
        self._news = trio.lowlevel.ParkingLot()
        self._ended = False
        self._error: Exception | None = None

    def add(self, value: T) -> None:
        """For who tells: something has happened."""
        if self._ended:
            return
        if len(self._queue) >= self._limit:
            self._queue.popleft()
            self.missed += 1
        self._queue.append(value)
        self._news.unpark_all()

    def end(self, error: Exception | None = None) -> None:
        """For who tells: nothing will happen any more; reading ends, or raises the error."""
        if not self._ended:
            self._ended, self._error = True, error
            self._news.unpark_all()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        await trio.lowlevel.checkpoint()
        while not self._queue:
            if self._ended:
                raise self._error or StopAsyncIteration
            await self._news.park()
        return self._queue.popleft()
