"""Reading and following the trace buffers of a core."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Self

import trio

from openamp_py.errors import PlatformError, ResourceTableError, StateError
from openamp_py.remoteproc.processor import RemoteProcessor
from openamp_py.remoteproc.subdevices import Subdevice
from openamp_py.remoteproc.trace import TraceReader, decode_trace_untrusted

TRACE_INTERVAL: Final = 0.1
"""Seconds between two looks at a buffer: nobody rings when there is something new in it."""

_LIVES: Final = 16
"""Ends of lives whose last text waits for a reader that is slow."""


def read_trace(processor: RemoteProcessor, name: str | None = None) -> str:
    """All the text in a trace buffer.

    Args:
        processor: whose.
        name: of the buffer; by default the first.

    Raises:
        StateError: the processor has no table in memory now.
        ResourceTableError: the buffer lies outside the core's memory.
        KeyError: no buffer of that name; says which there are.
    """
    return decode_trace_untrusted(bytes(_find(processor, name)))


class TraceFollower(Subdevice):
    """New text of a trace buffer as it comes: an async iterator of `str`.

    Made by `open_trace`. Begins with what is in the buffer; goes on through crashes and restarts
    of the core, and has its last words. Waits while the core is off, and ends with the
    processor's block. One task may iterate.
    """

    def __init__(self, processor: RemoteProcessor, name: str | None, interval: float) -> None:
        self._processor = processor
        self._name = name
        self._interval = interval
        self._reader = TraceReader()
        self._last_words: deque[str] = deque(maxlen=_LIVES)
        self._lost = 0
        self._buffer: memoryview | bytes | None = None  # of a core that was stopped, to the next

    @property
    def gaps(self) -> int:
        """How often text may be missing, because the core wrote faster than it was read."""
        return self._reader.gaps + self._lost

    async def prepare(self) -> None:
        """A new life of the core begins."""
        self._buffer = None
        self._reader.restart()

    async def stop(self, *, crashed: bool) -> None:
        """It will be over soon. The memory may be no longer the platform's when it is."""
        with contextlib.suppress(
            KeyError, PlatformError, StateError
        ):  # another image may have no such buffer
            self._buffer = _find(self._processor, self._name)

    async def unprepare(self) -> None:
        """It is over: what the buffer has is taken before anybody loads it anew."""
        if self._buffer is not None:
            self._lost += len(self._last_words) == _LIVES
            self._last_words.append(self._reader.poll(bytes(self._buffer), final=True))

    def read_nowait(self) -> str:
        """All the text that is new at this moment; may be empty."""
        last_words = "".join(self._last_words)
        self._last_words.clear()
        return last_words + self._look()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        await trio.lowlevel.checkpoint()
        while True:
            text = self._last_words.popleft() if self._last_words else self._look()
            if text:
                return text
            if self._processor.closed:
                raise StopAsyncIteration
            with trio.move_on_after(self._interval):
                await self._processor.wait_change()

    def _look(self) -> str:
        if not self._processor.is_up:
            return ""
        buffer = self._buffer
        if buffer is None:
            try:
                buffer = _find(self._processor, self._name)
            except KeyError:  # another image may have no such buffer
                return ""
        return self._reader.poll(bytes(buffer))


@asynccontextmanager
async def open_trace(
    processor: RemoteProcessor, name: str | None = None, *, interval: float = TRACE_INTERVAL
) -> AsyncIterator[TraceFollower]:
    """Follows a trace buffer, for an `async with` block: ``async for text in follower``.

    Args:
        processor: whose.
        name: of the buffer; by default the first.
        interval: seconds between two looks at it.

    Raises:
        StateError: the processor has no table in memory now.
        ResourceTableError: the buffer lies outside the core's memory.
        KeyError: no buffer of that name; says which there are.
    """
    _find(processor, name)
    follower = TraceFollower(processor, name, interval)
    processor.add_subdevice(follower)
    try:
        yield follower
    finally:
        processor.remove_subdevice(follower)


def _find(processor: RemoteProcessor, name: str | None) -> memoryview | bytes:
    own = processor.platform.read_trace(name)
    if own is not None:
        return own
    table = processor.table
    if table is None:
        raise StateError(f"there is no trace: the processor is {processor.state.value}")
    for trace in table.traces:
        if name in (None, trace.name):
            try:
                return processor.map(da=trace.da, size=trace.length)
            except ValueError as error:
                raise ResourceTableError(f"trace buffer {trace.name!r}: {error}") from None
    if not table.traces:
        raise KeyError("no trace buffer: the firmware's resource table has none")
    names = ", ".join(trace.name for trace in table.traces)
    raise KeyError(f"no trace buffer {name!r}; there are: {names}")
