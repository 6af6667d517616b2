"""What is done about a crash, and when it was one too many: values."""

from __future__ import annotations

import enum
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from openamp_py.remoteproc.coredump import Coredump


class CoredumpMode(enum.Enum):
    """When the memory of a crashed core is saved (Linux's modes, under its words)."""

    DISABLED = "disabled"
    """Never."""
    ENABLED = "enabled"
    """It is copied before the recovery, and written after it: the core is soon back."""
    INLINE = "inline"
    """It is written before the recovery, straight from the core's memory: nothing is copied."""


CoredumpSink: TypeAlias = str | os.PathLike[str] | Callable[[Coredump], Awaitable[None]]
"""Where a coredump goes: a directory (each dump is one more file there), a file (each replaces the
one before), or an async function of the `Coredump`. A path that ends with "/" is a directory, and
is made if need be."""


@dataclass(frozen=True, slots=True)
class CrashPolicy:
    """What a RemoteProcessor does when its core crashes.

    Args:
        recovery: load and start the same image again. Without it, `RemoteProcessor.recover`
            does so by hand.
        coredump: whether and when the core's memory is saved.
        coredump_to: where to; must be given unless that is never. In a directory each crash has
            a file of its own: NAME-N.core for the N-th of this processor, or the next free name
            like it.
        limit: this many crashes within the window are a loop: the last is not recovered from.
        window: seconds.

    Raises:
        ValueError: a number is out of its range, or there is a mode without a place.
        TypeError: the mode is none.
    """

    recovery: bool = False
    coredump: CoredumpMode = CoredumpMode.DISABLED
    coredump_to: CoredumpSink | None = None
    limit: int = 5
    window: float = 60.0

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"a limit of {self.limit} crashes; at least 1 is needed")
        if not 0 < self.window < float("inf"):
            raise ValueError(f"a window of {self.window} s; more than 0 seconds are needed")
        if not isinstance(self.coredump, CoredumpMode):
            raise TypeError(f"coredump is {self.coredump!r}; a CoredumpMode is wanted")
        if self.coredump is not CoredumpMode.DISABLED and self.coredump_to is None:
            raise ValueError(f"coredump mode {self.coredump.value} needs a place: coredump_to")


NO_POLICY: Final = CrashPolicy()
"""Nothing is dumped, and nothing is started again by itself."""
