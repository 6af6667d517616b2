"""The states of a processor as a stream."""

from __future__ import annotations

from collections import deque
from typing import Final, Self

import trio

from openamp_py.remoteproc.lifecycle import ProcessorState

STATE_LIMIT: Final = 256
"""States that a watch keeps for a reader that is slow."""


class StateWatch:
    """The states of a processor as they come: an async iterator of `ProcessorState`.

    Made by `RemoteProcessor.states`. Begins with the state at that time, and ends when the
    processor's block does. One task may iterate. A reader that lags far behind loses the oldest.

    Attributes:
        missed: states that were lost because the reader was too slow.
    """

    def __init__(self, state: ProcessorState) -> None:
        self.missed = 0
        self._queue = deque([state])
        self._news = trio.lowlevel.ParkingLot()
        self._ended = False

    def add(self, state: ProcessorState) -> None:
        """For the processor: a new state."""
        if len(self._queue) == STATE_LIMIT:
            self._queue.popleft()
            self.missed += 1
        self._queue.append(state)
        self._news.unpark_all()

    def end(self) -> None:
        """For the processor: there will be no other."""
        self._ended = True
        self._news.unpark_all()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ProcessorState:
        await trio.lowlevel.checkpoint()
        while not self._queue:
            if self._ended:
                raise StopAsyncIteration
            await self._news.park()
        return self._queue.popleft()
