"""The bus to a core that this host boots or attaches to, through all the core's lives."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from openamp_py.errors import PeerGoneError, PlatformError
from openamp_py.linux.bus import open_linux_bus
from openamp_py.linux.platform import LinuxPlatform
from openamp_py.remoteproc import RemoteProcessor, Subdevice
from openamp_py.rpmsg import Bus, BusOptions, Handover, decode_handover_untrusted, open_bus
from openamp_py.rpmsg.handover import NOTHING
from openamp_py.rpmsg.options import DEFAULT_OPTIONS
from openamp_py.virtio import VirtioDevice

_RECHECK = 0.1
"""Seconds between looks at the rings of a core whose kicks may be missing."""


class _BusSubdevice(Subdevice):
    """Lets a bus go on with each start of its processor, before that counts as running."""

    def __init__(self, bus: Bus, processor: RemoteProcessor, index: int | None) -> None:
        self._bus = bus
        self._processor = processor
        self._index = index

    async def start(self) -> None:
        """The core is up again."""
        try:
            await self._bus.restart(
                _find_device(self._processor, self._index),
                _find_handover(self._processor, self._index),
            )
        except trio.BrokenResourceError as error:
            raise error.__cause__ or PeerGoneError(str(error)) from None
        except trio.ClosedResourceError:
            pass  # nobody wants it any more


@asynccontextmanager
async def open_host_bus(
    processor: RemoteProcessor,
    options: BusOptions = DEFAULT_OPTIONS,
    *,
    index: int | None = None,
) -> AsyncIterator[Bus]:
    """A bus over an RPMsg device of a core that is up, for an `async with` block.

    With each new start of the core (a recovery, a boot, an attach) the bus goes on over the new
    device, before the processor counts as running: endpoints that were opened with `rebind` live
    on. `open_bus` alone ends with its device.

    Of a processor that this machine's kernel boots (`LinuxPlatform`) the bus is the kernel's, and
    has neither options nor an index: see `LinuxBus`.

    Args:
        processor: whose.
        options: how the bus works the link; a core that is out of order gets the quirks it needs.
        index: of the device in the table; by default the first RPMsg device. That one also goes
            on with what a host before told of it (see `Session.detach`).

    Raises:
        StateError: the core does not run, or has no table.
        ResourceTableError: its table describes no RPMsg device.
        ValueError: its table has no entry of that index.
        PlatformError: what a host before told of it cannot be used.
        trio.BrokenResourceError: the core was gone before the bus was up.
    """
    if isinstance(processor.platform, LinuxPlatform):
        async with open_linux_bus(processor) as linux_bus:
            yield linux_bus
        return
    device = _find_device(processor, index)
    if processor.core is not None and processor.core.is_out_of_order:
        options = replace(options, always_kick=True, recheck=options.recheck or _RECHECK)
    async with open_bus(device, options, _find_handover(processor, index)) as bus:
        subdevice = _BusSubdevice(bus, processor, index)
        processor.add_subdevice(subdevice)
        try:
            yield bus
        finally:
            processor.remove_subdevice(subdevice)


def _find_device(processor: RemoteProcessor, index: int | None) -> VirtioDevice:
    first = processor.rpmsg_device()
    if index is None:
        return first
    if not 0 <= index < len(processor.devices):
        raise ValueError(f"no virtio device {index}: the table has {len(processor.devices)}")
    return processor.devices[index]


def _find_handover(processor: RemoteProcessor, index: int | None) -> Handover:
    """What the host before knew of the other side; one that says nothing knew nothing."""
    if index is not None or processor.core is None:
        return NOTHING
    try:
        return decode_handover_untrusted(processor.core.note)
    except ValueError as error:
        raise PlatformError(f"what the host before left cannot be used: {error}") from None
