"""What is known of a remote that announces nothing, or answers no more: for an error message."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import trio

from openamp_py.constants import RPMSG_F_NS
from openamp_py.errors import PlatformError, ResourceTableError, StateError
from openamp_py.remoteproc import ProcessorState, RemoteProcessor, read_trace
from openamp_py.rpmsg import Bus, BusDump
from openamp_py.virtio import Role
from openamp_py.virtio.device import DRIVER_OK

_LOOK: Final = 0.5
"""Seconds that a core has to say where it is: one that hangs may not."""

_LINE: Final = 160
"""Characters of a line of its own that are shown."""

_NAMES: Final = 8
"""Services that are named."""


async def describe_silence(bus: Bus, processor: RemoteProcessor | None = None) -> str:
    """Says in one line what can be seen of a remote: its core, the rings, its last words.

    For the error that follows when a service was not announced in time: whether the core runs and
    where it is, whether it has touched the rings, what it announced instead, and the last line of
    its trace buffer and of its console. What the remote wrote is quoted and bounded.

    Args:
        bus: the bus to it.
        processor: its processor, where it was booted here.
    """
    parts: list[str] = []
    if processor is not None:
        parts.append(await _describe_core(processor))
    parts += _describe_link(bus)
    if processor is not None:
        parts += _last_words(processor)
    return "; ".join(parts)


async def _describe_core(processor: RemoteProcessor) -> str:
    if processor.state in (ProcessorState.RUNNING, ProcessorState.ATTACHED):
        doing = ""
        if processor.core is not None:
            with trio.move_on_after(_LOOK) as scope:
                doing = await processor.core.describe()
            if scope.cancelled_caught:
                doing = f"does not say within {_LOOK} s what it does"
        return f"the core runs and {doing}" if doing else "the core runs"
    if processor.failure is not None:
        return f"the core is {processor.state.value}: {processor.failure}"
    return f"the core is {processor.state.value}"


def _describe_link(bus: Bus) -> Iterator[str]:
    dump = bus.dump()
    if dump.failure is not None:
        yield f"the link has failed: {dump.failure}"
        return
    if dump.rings and not dump.status & DRIVER_OK:
        yield (
            f"DRIVER_OK is gone from the status word ({dump.status:#x}): the firmware has "
            "overwritten it"
        )
    if dump.rings:  # the kernel has those of a processor that it boots
        yield f"kicks from it: {dump.statistics.kicks_received}"
        yield from _describe_rings(dump)
    if dump.channels:
        names = ", ".join(repr(channel.name) for channel in dump.channels[:_NAMES])
        more = "" if len(dump.channels) <= _NAMES else f" and {len(dump.channels) - _NAMES} more"
        yield f"announced: {names}{more}"
    elif not dump.features & RPMSG_F_NS:
        yield (
            "its resource table has no name service (feature bit 0), so it announces nothing: "
            "open the endpoint with a destination"
        )
    refused = dump.statistics.drops.bad_announcement
    if refused:
        yield f"announcements of it that were refused: {refused}"


def _describe_rings(dump: BusDump) -> Iterator[str]:
    """What the other side has done to the rings.

    A core that has not read the DRIVER_OK has touched neither of them.
    """
    sending, receiving = dump.rings
    if dump.role == Role.DRIVER.value and not (sending.used_index or receiving.used_index):
        yield (
            f"it has touched no ring (of {receiving.num} and {sending.num} buffers): it has not "
            f"seen DRIVER_OK (status word {dump.status:#x}), or waits for something else"
        )
        return
    yield f"messages from it: {dump.statistics.received}"
    if dump.role == Role.DRIVER.value:
        unread = (sending.available_index - sending.used_index) & 0xFFFF
        yield f"not read by it: {unread} of {dump.statistics.sent}"


def _last_words(processor: RemoteProcessor) -> Iterator[str]:
    with contextlib.suppress(
        KeyError, PlatformError, ResourceTableError, StateError
    ):  # it has none
        yield _quote("last line of its trace", read_trace(processor))
    if processor.platform.console:
        yield _quote("of its console", processor.platform.console)


def _quote(what: str, text: str) -> str:
    lines = text.split("\n")
    last = next((line for line in reversed(lines) if line.strip()), None)
    return f"{what}: nothing" if last is None else f"{what}: {last.strip()[-_LINE:]!r}"
