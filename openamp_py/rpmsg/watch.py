"""The other side's announcements as a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from openamp_py.feed import Feed
from openamp_py.rpmsg.wire import Announcement

EVENT_LIMIT: Final = 1024
"""Announcements a watch keeps for a reader that is slow, beside those it began with."""


class ServiceWatch(Feed[Announcement]):
    """The other side's announcements as they come: an async iterator of `Announcement`.

    Made by `Bus.open_watch`, which ends it. First those in force when it was opened, then each
    that comes. One task may iterate. A reader that lags far behind loses the oldest; `missed`
    counts them, and `Bus.channels` says what is in force.

    Iterating raises, once all was seen:
        trio.BrokenResourceError: the other side is gone.
        trio.ClosedResourceError: the bus or the watch was closed.
    """

    def __init__(self, begin: Sequence[Announcement]) -> None:
        super().__init__(begin, EVENT_LIMIT)
