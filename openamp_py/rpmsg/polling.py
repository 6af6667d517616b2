"""When it pays to look at a ring for a moment instead of going to sleep."""

from __future__ import annotations

import os
from typing import Final

DEFAULT_POLLING: Final = 100e-6
"""Seconds: more than a wake-up takes, so that two sides that both sleep find each other."""

# A wait that was polled in vain lets 1, 3, 7, ... waits sleep at once, up to so many: a peer that
# is always slower costs next to nothing, one that becomes fast is noticed within a tenth of a
# second.
_MOST_SKIPPED = 1023


class Polling:
    """Decides for each wait whether to poll, by how it went before.

    One for each bus; a value that knows neither time nor rings.

    Args:
        seconds: how long to look each time; 0 for never; None for the default, which is never
            where this process has only one CPU.

    Attributes:
        tried: waits that were polled.
        hits: those that thereby needed no sleep.
    """

    def __init__(self, seconds: float | None = None) -> None:
        if seconds is None:
            seconds = DEFAULT_POLLING if len(os.sched_getaffinity(0)) > 1 else 0.0
        if not 0 <= seconds <= 1:
            raise ValueError(f"polling for {seconds} s; 0 to 1 second are possible")
        self.seconds = seconds
        self.tried = 0
        self.hits = 0
        self._skip = 0
        self._left = 0

    def wants(self) -> bool:
        """Whether to poll in the wait that begins now."""
        if self._left:
            self._left -= 1
            return False
        return self.seconds > 0

    def learn(self, hit: bool) -> None:
        """Says how it went: whether something came in time."""
        self.tried += 1
        if hit:
            self.hits += 1
            self._skip = 0
        else:
            self._skip = self._left = min(2 * self._skip + 1, _MOST_SKIPPED)
