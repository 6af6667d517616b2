"""The states of a processor as a stream."""

from __future__ import annotations

from typing import Final

from openamp_py.feed import Feed
from openamp_py.remoteproc.lifecycle import ProcessorState

STATE_LIMIT: Final = 256
"""States that a watch keeps for a reader that is slow."""


class StateWatch(Feed[ProcessorState]):
    """The states of a processor as they come: an async iterator of `ProcessorState`.

    Made by `RemoteProcessor.states`. Begins with the state at that time, and ends when the
    processor's block does. One task may iterate. A reader that lags far behind loses the oldest;
    `missed` counts them.
    """

    def __init__(self, state: ProcessorState) -> None:
        super().__init__([state], STATE_LIMIT)
