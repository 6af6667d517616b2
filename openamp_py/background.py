"""A nursery for tasks that serve an `async with` block and end with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_background() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks are cancelled when the block ends.

    What the block raises comes out as it is and not in an exception group, so that callers can
    catch it by its class.
    """
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # A cancellation from outside is still under way whatever we raise here.
        _, rest = group.split(trio.Cancelled)
        if rest is None or len(rest.exceptions) > 1:
            raise
        error = rest.exceptions[0]
        context = error.__context__
        try:
            raise error
        finally:
            error.__context__ = context
            del error, context, rest
