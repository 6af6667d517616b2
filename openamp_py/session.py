"""A remote and the RPMsg bus to it, in one `async with`: what most host programs want."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from openamp_py.echo import serve_echo
from openamp_py.errors import OpenAMPError, PeerGoneError, StateError
from openamp_py.platforms import (
    LoopbackPlatform,
    NativePlatform,
    ProcessPlatform,
    ShmAddress,
    ShmLink,
)
from openamp_py.platforms.demo import python_firmware
from openamp_py.platforms.native import shipped_echo
from openamp_py.remoteproc import (
    Platform,
    ProcessorState,
    RemoteProcessor,
    open_processor,
    open_resources,
)
from openamp_py.remoteproc.processor import Image
from openamp_py.rpmsg import Bus, BusOptions, Endpoint, open_bus
from openamp_py.rpmsg.bus import DEFAULT_OPTIONS
from openamp_py.rpmsg.wire import SHUTDOWN_REQUEST
from openamp_py.virtio import Role

CORES = ("native", "loopback", "process")
"""Names of the cores that a session can boot; anything else is a link's URL."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """How a remote went down."""

    graceful: bool
    """It acknowledged SHUTDOWN_MSG or withdrew its service, and left by itself."""
    reason: str | None = None
    """Why not gracefully."""

    def __str__(self) -> str:
        return "graceful" if self.graceful else "hard"


@dataclass(frozen=True, slots=True)
class Session:
    """A remote and the bus to it. Made by `open_session`, which ends it.

    Args:
        bus: the RPMsg bus, this side being the host.
        processor: the remote, where it was booted here; None for a peer that ran already.
        image: what was booted.
    """

    bus: Bus
    processor: RemoteProcessor | None
    image: Image | None = None

    async def shutdown(self, endpoint: Endpoint, *, grace: float) -> Shutdown:
        """Asks the remote to leave, waits for it, and shuts the processor down.

        Sends SHUTDOWN_MSG and discards what is still to be received, until the remote has
        acknowledged or withdrawn its service, and its core has ended. A remote that does not
        manage that within `grace` seconds, or dies on the way, is shut down hard; so is one
        that cannot be asked, because `endpoint` is closed or another task receives on it.

        Raises:
            ValueError: `grace` is not a time.

        Cancellation: the processor is shut down hard.
        """
        if not 0 <= grace < float("inf"):
            raise ValueError(f"a grace of {grace} s; zero or more seconds are possible")
        asked = endpoint.is_bound
        reason: str | None = None
        try:
            with trio.move_on_after(grace) as scope:
                reason = await self._ask_to_leave(endpoint)
            if scope.cancelled_caught:
                reason = f"the remote did not leave within {grace} s"
                if not (asked or endpoint.is_bound):
                    reason = f"no service was bound within {grace} s, so nobody could be asked"
        finally:
            if self.processor is not None:
                with trio.CancelScope(shield=True):
                    await self.processor.shutdown()
        return Shutdown(reason is None, reason)

    async def restart(self, image: Image | None = None) -> None:
        """Boots the remote anew, and the bus goes on over its new device: see `Bus.restart`.

        For a remote that crashed, left or was shut down; one that still runs is stopped hard.
        Endpoints that were opened with `rebind` live on.

        Args:
            image: firmware to boot; by default what was booted before.

        Raises:
            StateError: the peer was not booted here.
            FirmwareError: the image cannot be used, or its table describes no RPMsg device.
            PlatformError: the core cannot be started.
            trio.BrokenResourceError: the remote was gone before the bus was up.

        Cancellation: the remote may run or not; it can be restarted again.
        """
        processor = self.processor
        if processor is None:
            raise StateError("the peer was not booted here, so it cannot be restarted")
        if processor.state is not ProcessorState.OFFLINE:
            await processor.shutdown()
        if image is None:
            assert self.image is not None, "it was booted here"
            image = self.image
        await processor.boot(image)
        await self.bus.restart(processor.rpmsg_device())

    async def _ask_to_leave(self, endpoint: Endpoint) -> str | None:
        """Returns why it was not graceful, or None."""
        try:
            acknowledged = await _wait_acknowledgement(endpoint)
            if self.processor is not None:
                await self.processor.wait_exit()
        except (OpenAMPError, trio.ClosedResourceError) as error:
            return str(error)
        except trio.BusyResourceError as error:
            return f"the remote could not be asked: {error}"
        return None if acknowledged else "the remote left without acknowledging"


async def _wait_acknowledgement(endpoint: Endpoint) -> bool:
    """Asks, and waits for an answer or the end of the service.

    Returns:
        Whether it answered, or withdrew the service, which is all that OpenAMP's programs do.

    Raises:
        OpenAMPError: the core died, its platform failed, or it broke a ring instead.
    """
    acknowledged = False
    try:
        if not endpoint.is_withdrawn:
            await endpoint.send(SHUTDOWN_REQUEST)
        async for message in endpoint:
            acknowledged = acknowledged or message.payload == SHUTDOWN_REQUEST
        return True
    except trio.BrokenResourceError as error:
        cause = error.__cause__
        if isinstance(cause, OpenAMPError) and not isinstance(cause, PeerGoneError):
            raise cause from None
        return acknowledged or endpoint.is_withdrawn


@asynccontextmanager
async def open_session(
    core: str | Platform = "native",
    image: Image | None = None,
    *,
    options: BusOptions = DEFAULT_OPTIONS,
) -> AsyncIterator[Session]:
    """Boots a remote and opens the bus to it, for an `async with` block; ends both after it.

    Args:
        core: "native", "process" or "loopback" (the last two play the echo service in
            Python), a platform, or the URL of a peer that runs already
            (``shm:PATH?doorbell=unix:PATH[&listen=1]``).
        image: firmware to boot; by default what the core ships: the echo service.
        options: how the bus works the link.

    Raises:
        ValueError: the core's name, or the URL.
        FirmwareError: the image cannot be used, or its table describes no RPMsg device.
        StateError: the image has no resource table.
        PlatformError: the core cannot be started, or the link cannot be made.
        trio.BrokenResourceError: the remote was gone before the bus was up.
    """
    if isinstance(core, str) and core not in CORES:
        with contextlib.closing(ShmLink(_parse_address(core, image))) as link:
            async with (
                open_resources(link, Role.DRIVER) as resources,
                open_bus(resources.rpmsg_device(), options) as bus,
            ):
                yield Session(bus, None)
        return
    async with open_processor(
        _create_platform(core) if isinstance(core, str) else core
    ) as processor:
        if image is None:
            native = isinstance(processor.platform, NativePlatform)
            image = shipped_echo() if native else python_firmware()
        await processor.boot(image)
        async with open_bus(processor.rpmsg_device(), options) as bus:
            yield Session(bus, processor, image)


def check_core(core: str, image: Image | None) -> None:
    """Whether `open_session` knows what these mean; nothing is opened.

    Raises:
        ValueError: the core's name or URL, or firmware for a peer that runs already.
    """
    if core not in CORES:
        _parse_address(core, image)


def _parse_address(core: str, image: Image | None) -> ShmAddress:
    if ":" not in core:
        raise ValueError(f"unknown core {core!r}; there are {', '.join(CORES)}, and shm: URLs")
    if image is not None:
        raise ValueError(f"core {core} runs already: it takes no firmware")
    return ShmAddress.parse(core)


def _create_platform(core: str) -> Platform:
    if core == "native":
        return NativePlatform()
    return ProcessPlatform() if core == "process" else LoopbackPlatform(serve_echo)
