"""Nurseries whose errors come out as they are, and tasks that serve an `async with` block."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raises what a nursery in the block raises as it is, where it is one error and no group."""
    try:
        yield
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


@asynccontextmanager
async def open_background() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks are cancelled when the block ends.

    What the block raises comes out as it is and not in an exception group, so that callers can
    catch it by its class.
    """
    with plain_errors():
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()
