"""A remote application that outlives its hosts: one bus for each life of each device's driver."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable

import trio

from openamp_py.background import open_background, plain_errors
from openamp_py.constants import VIRTIO_ID_RPMSG
from openamp_py.errors import OpenAMPError, PeerGoneError, ResourceTableError
from openamp_py.platforms import VhostUserLink
from openamp_py.platforms.vhost_user import Guests
from openamp_py.remoteproc import Link, Resources, open_resources
from openamp_py.rpmsg import Bus, BusOptions, open_bus
from openamp_py.rpmsg.options import DEFAULT_OPTIONS

_logger = logging.getLogger(__name__)

BusApplication = Callable[[Bus], Awaitable[None]]
"""What `serve_remote` runs: it gets the bus of one life of the driver."""


async def serve_remote(
    link: Link | VhostUserLink,
    application: BusApplication,
    *,
    options: BusOptions = DEFAULT_OPTIONS,
) -> None:
    """Plays a remote whose host may come and go, over every RPMsg device of the link.

    Each time the driver of a device comes up, `application` runs with a new bus to it. When the
    driver resets the device the application is cancelled, and begins again with the next life. One
    that returns by itself is done, and its device is not served any more: an endpoint that is to
    stay when the host withdraws its own is opened with `rebind`.

    Returns when all are done, or the other side left: a host that resets its driver and comes
    back is served on the same link, a host whose program ends takes a `shm:` link with it. For the
    next program close that link, make a new one, and call this again. A `VhostUserLink` that
    listens serves one guest after the other: also one that broke the protocol, or a ring, only
    loses its connection.

    Args:
        link: this remote's end of the link; one serves one call.
        application: an async function of one `Bus`, run once at a time for each device. What it
            raises ends this call, but for what a reset makes of it.
        options: how the buses work the link.

    Raises:
        ResourceTableError: the table has no RPMsg device, or is malformed.
        PlatformError: the link cannot be made, or failed.
        PeerGoneError: the host left before the link was up.
        VhostUserError: the one front end that we connected to broke the protocol, or a ring.
        trio.BrokenResourceError: the host broke a ring (the cause says how).
    """
    opened = link.open_devices() if isinstance(link, VhostUserLink) else open_resources(link)
    with plain_errors():
        async with opened as drivers, trio.open_nursery() as nursery:
            found = False
            for index, kind in enumerate(drivers.kinds):
                if kind == VIRTIO_ID_RPMSG:
                    found = True
                    nursery.start_soon(_serve_device, drivers, index, application, options)
            if not found:
                raise ResourceTableError(
                    f"the resource table has {len(drivers.kinds)} vdev entries, "
                    f"none with id {VIRTIO_ID_RPMSG} (RPMsg)"
                )
    if drivers.failure is not None and not isinstance(drivers.failure, PeerGoneError):
        raise drivers.failure


async def _serve_device(
    drivers: Resources | Guests, index: int, application: BusApplication, options: BusOptions
) -> None:
    """One life of the driver after the other."""
    while (failure := await _serve_life(drivers, index, application, options)) is not None:
        _logger.info("%s", failure)


async def _serve_life(
    drivers: Resources | Guests, index: int, application: BusApplication, options: BusOptions
) -> OpenAMPError | None:
    """Returns what ended it; None where nothing is to be served any more."""
    try:
        device = await drivers.wait_driver(index)
    except OpenAMPError:
        if drivers.failure is None:
            raise
        return None
    up = False
    try:
        async with open_bus(device, options) as bus:
            up = True
            failure = await _run_life(bus, application)
            if (
                failure is not None
                and failure is not drivers.failure
                and not isinstance(failure, PeerGoneError)
                and not drivers.drop_driver(failure)
            ):
                raise bus.broken("bus")
    except trio.BrokenResourceError:
        if up or device.failure is None:
            raise
        failure = device.failure
    return failure


async def _run_life(bus: Bus, application: BusApplication) -> OpenAMPError | None:
    """Runs the application until it is done or the bus fails. Returns why that failed."""
    async with open_background() as nursery:

        async def watch() -> None:
            with contextlib.suppress(trio.ClosedResourceError):  # by the application
                await bus.wait_failure()
                nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            await application(bus)
        except trio.BrokenResourceError:
            if bus.failure is None:
                raise
        except BaseExceptionGroup as group:
            _, rest = group.split(trio.BrokenResourceError)
            if bus.failure is None:
                raise
            if rest is not None:
                raise rest from None
    return bus.failure
