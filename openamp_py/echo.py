"""The echo service as a remote application: what OpenAMP's echo demos and the firmware do."""

from __future__ import annotations

from typing import Final

import trio

from openamp_py.constants import ECHO_CHANNEL
from openamp_py.errors import PeerGoneError
from openamp_py.remoteproc import Link, open_resources
from openamp_py.rpmsg import Bus, open_bus
from openamp_py.rpmsg.wire import is_shutdown

SAMPLE_CHANNEL: Final = "rpmsg-client-sample"
"""Channel of the "hello world!" demos of OpenAMP and Linux."""

# OpenAMP's sample client waits for its service to withdraw after this last message.
_FAREWELL: Final = {SAMPLE_CHANNEL: b"goodbye!"}


async def serve_echo(link: Link, channel: str = ECHO_CHANNEL) -> None:
    """Plays a remote that returns every message to its sender.

    Ends when the host asks for it with SHUTDOWN_MSG (which is returned too: that is the
    acknowledgement), withdraws its endpoint, or is gone.

    Args:
        link: this remote's end of the link.
        channel: name to announce the service by.

    Raises:
        ResourceTableError: the table on the link has no RPMsg device, or is malformed.
        PlatformError: the link cannot be made.
        PeerGoneError: the host left before the link was up.
        trio.BrokenResourceError: the host broke a ring (the cause says how).
    """
    async with open_resources(link) as resources:
        device = resources.rpmsg_device()
        try:
            async with open_bus(device) as bus:
                await echo(bus, channel)
        except trio.BrokenResourceError as error:
            if not isinstance(error.__cause__, PeerGoneError):
                raise


async def echo(bus: Bus, channel: str = ECHO_CHANNEL, *, rebind: bool = False) -> None:
    """Returns every message to its sender, until the host asks for the end or withdraws.

    Args:
        bus: of one life of the driver, as `serve_remote` gives it.
        channel: name to announce the service by.
        rebind: go on when the host withdraws its endpoint.

    Raises:
        trio.BrokenResourceError: the other side is gone.
    """
    farewell = _FAREWELL.get(channel)
    async with bus.open_endpoint(channel, rebind=rebind) as endpoint:
        async for message in endpoint:
            await endpoint.send_to(message.payload, message.source)
            if is_shutdown(message.payload) or message.payload == farewell:
                return
