"""A remote and the RPMsg bus to it, in one `async with`: what most host programs want."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import trio

from openamp_py.choosing import AUTO, check_name, choose, is_core, shipped_image
from openamp_py.constants import ECHO_CHANNEL
from openamp_py.errors import OpenAMPError, PeerGoneError, StateError
from openamp_py.host import open_host_bus
from openamp_py.platforms import ShmAddress, ShmLink
from openamp_py.remoteproc import (
    Platform,
    ProcessorState,
    RemoteProcessor,
    open_processor,
    open_resources,
)
from openamp_py.remoteproc.crash import NO_POLICY, CrashPolicy
from openamp_py.remoteproc.sources import Image
from openamp_py.rpmsg import (
    Bus,
    BusOptions,
    Endpoint,
    encode_handover,
    open_bus,
)
from openamp_py.rpmsg.options import DEFAULT_OPTIONS
from openamp_py.rpmsg.wire import SHUTDOWN_REQUEST
from openamp_py.silence import describe_silence
from openamp_py.virtio import Role
from openamp_py.watchdog import Watchdog, open_heartbeat


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
        bus: the RPMsg bus, in the role that the session was opened with.
        processor: the remote, where it was booted or attached here; None for a peer that runs by
            itself.
    """

    bus: Bus
    processor: RemoteProcessor | None

    async def shutdown(self, endpoint: Endpoint, *, grace: float) -> Shutdown:
        """Asks the remote to leave, waits for it, and shuts the processor down.

        Sends SHUTDOWN_MSG and discards what is still to be received, until the remote has
        acknowledged or withdrawn its service, and its core has ended. A remote that does not
        manage that within `grace` seconds, or dies on the way, is shut down hard; so is one
        that cannot be asked, because `endpoint` is closed or another task receives on it.

        Args:
            endpoint: bound to a service of the remote.
            grace: seconds; ``math.inf`` for a core that a debugger may hold.

        Raises:
            ValueError: `grace` is not a time.

        Cancellation: the processor is shut down hard.
        """
        if not 0 <= grace <= math.inf:  # NaN is none
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
                    await self.processor.shutdown(force=True)
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
            PeerGoneError: the remote was gone before the bus was up.

        Cancellation: the remote does not run; it can be restarted again.
        """
        processor = self._own_processor("restarted")
        if processor.state is not ProcessorState.OFFLINE:
            await processor.shutdown(force=True)
        await processor.boot(image)

    async def wait_up(self) -> None:
        """Waits until the remote executes and the bus works: also through a recovery.

        Raises:
            OpenAMPError: why it is not coming back.
            StateError: the peer was not booted here.
        """
        await self._own_processor("waited for").wait_up()

    async def detach(self) -> int:
        """Lets go of the remote and leaves it running: the next one opens a session to attach.

        The bus is broken then. Messages that wait in the rings are the next host's.

        Returns:
            How many messages were taken from the rings and not received: they can be, here.

        Raises:
            PlatformError: the core cannot be left running; nothing has changed.
            StateError: the peer was not booted here, or does not run.
        """
        processor = self._own_processor("left")
        return await processor.detach(encode_handover(self.bus.handover))

    async def attach(self) -> None:
        """Takes the remote over again that `detach` left, and the bus goes on.

        Raises:
            PlatformError: it is not there any more, or another host has it.
            StateError: it was not left here.
        """
        await self._own_processor("attached").attach()

    async def describe_silence(self) -> str:
        """What can be seen of a remote that does not announce or answer: see `describe_silence`."""
        return await describe_silence(self.bus, self.processor)

    def open_heartbeat(
        self, service: str = ECHO_CHANNEL, *, silence: float, beat: bytes = b"beat"
    ) -> AbstractAsyncContextManager[Watchdog]:
        """Reports the remote as crashed when a service does not answer: see `open_heartbeat`."""
        processor = self._own_processor("watched")
        return open_heartbeat(processor, self.bus, service, silence, beat=beat)

    def _own_processor(self, what: str) -> RemoteProcessor:
        if self.processor is None:
            raise StateError(f"the peer was not booted here, so it cannot be {what}")
        return self.processor

    async def _ask_to_leave(self, endpoint: Endpoint) -> str | None:
        """Returns why it was not graceful, or None."""
        try:
            core = None if self.processor is None else self.processor.core
            tells_exit = core is None or core.tells_exit
            acknowledged = await _wait_acknowledgement(endpoint, or_end=tells_exit)
            if self.processor is not None and tells_exit:
                await self.processor.wait_exit()
        except (OpenAMPError, trio.ClosedResourceError) as error:
            return str(error)
        except trio.BusyResourceError as error:
            return f"the remote could not be asked: {error}"
        return None if acknowledged else "the remote left without acknowledging"


async def _wait_acknowledgement(endpoint: Endpoint, *, or_end: bool) -> bool:
    """Asks, and waits for an answer or the end of the service.

    Args:
        endpoint: bound to a service of the remote.
        or_end: wait for that end after an answer, too; a core whose end nobody sees may never
            come to it.

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
            if acknowledged and not or_end:
                break
        return True
    except trio.BrokenResourceError as error:
        cause = error.__cause__
        if isinstance(cause, OpenAMPError) and not isinstance(cause, PeerGoneError):
            raise cause from None
        return acknowledged or endpoint.is_withdrawn


@asynccontextmanager
async def open_session(
    core: str | Platform = AUTO,
    image: Image | None = None,
    *,
    options: BusOptions = DEFAULT_OPTIONS,
    policy: CrashPolicy = NO_POLICY,
    attach: bool = False,
    role: Role = Role.DRIVER,
) -> AsyncIterator[Session]:
    """Boots a remote and opens the bus to it, for an `async with` block; ends both after it.

    With a policy that recovers a crashed core, the bus goes on over the new one before the
    processor counts as running again; `Session.wait_up` waits for it.

    Args:
        core: "auto" chooses by the image: "native" for this machine's own instruction set and
            where there is no image, otherwise an emulated board. "native", "process" or
            "loopback" (the last two play the echo service in Python), "qemu" (a board by the
            image), "qemu:BOARD", "linux:NAME" (a processor that this machine's kernel boots: see
            `LinuxPlatform`), a platform, or the URL of a peer that runs already
            (``shm:PATH?doorbell=unix:PATH[&listen=1]``).
        image: firmware to boot; by default what the core ships: the echo service; for a processor
            of the kernel what is set for it, or runs already. One that is
            looked at to choose the core is read once: a restart boots it as it was.
        options: how the bus works the link.
        policy: what happens when the core crashes.
        attach: take over a core that was left running (see `Session.detach`), instead of
            booting one; its devices, their messages and its services are as they were.
        role: this side's end of the virtio device. The device, for firmware or a peer that is the
            driver: the bus is there once that has come up.

    Raises:
        ValueError: the core's name, or the URL; or the device's role without an image.
        FirmwareError: the image cannot be used, no core runs it, or its table describes no RPMsg
            device.
        StateError: the image has no resource table.
        PlatformError: what the core needs is not installed, it cannot be started, or the link
            cannot be made.
        trio.BrokenResourceError: the remote was gone before the bus was up.
    """
    if isinstance(core, str) and not is_core(core):
        with contextlib.closing(ShmLink(_parse_address(core, image))) as link:
            async with (
                open_resources(link, role) as resources,
                open_bus(resources.rpmsg_device(), options) as bus,
            ):
                yield Session(bus, None)
        return
    if role is Role.DEVICE and image is None and not attach:
        raise ValueError("the echo service that a core ships is a device: name a driver's image")
    platform, chosen = core, image
    if isinstance(platform, str):
        _, platform, chosen = await choose(platform, image)
    async with open_processor(platform, policy=policy, role=role) as processor:
        if attach:
            if image is not None:
                raise ValueError("a core that runs already takes no firmware")
            await processor.attach()
        else:
            await processor.boot(shipped_image(platform) if chosen is None else chosen)
        async with open_host_bus(processor, options) as bus:
            yield Session(bus, processor)


def check_core(core: str, image: Image | None, *, gdb: str | None = None) -> None:
    """Whether `open_session` knows what these mean; nothing is opened.

    Raises:
        ValueError: the core's name or URL, firmware for a peer that runs already, or a debugger
            for a core that takes none.
    """
    if is_core(core):
        check_name(core, gdb=gdb)
    else:
        _parse_address(core, image)
        if gdb is not None:
            raise ValueError(f"core {core} takes no debugger: only emulated cores (qemu:BOARD) do")


def _parse_address(core: str, image: Image | None) -> ShmAddress:
    if image is not None:
        raise ValueError(f"core {core} runs already: it takes no firmware")
    return ShmAddress.parse(core)
