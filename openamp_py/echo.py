"""The echo service as a remote application: what OpenAMP's echo demos and the firmware do."""

from __future__ import annotations

from typing import Final

import trio

from openamp_py.constants import ECHO_CHANNEL
from openamp_py.errors import PeerGoneError
from openamp_py.platforms.vhost_user import VhostUserLink
from openamp_py.remote import serve_remote
from openamp_py.remoteproc import Link, open_resources
from openamp_py.rpmsg import Bus, Endpoint, open_bus
from openamp_py.rpmsg.wire import is_shutdown

SAMPLE_CHANNEL: Final = "rpmsg-client-sample"
"""Channel of the "hello world!" demos of OpenAMP and Linux."""

# OpenAMP's sample client waits for its service to withdraw after this last message.
_FAREWELL: Final = {SAMPLE_CHANNEL: b"goodbye!"}


async def serve_echo(link: Link | VhostUserLink, channel: str = ECHO_CHANNEL) -> None:
    """Plays a remote that returns every message to its sender.

    Ends when the host asks for it with SHUTDOWN_MSG (which is returned too: that is the
    acknowledgement), withdraws its endpoint, or is gone. Guests that come over a `VhostUserLink`
    may withdraw and go: then it ends when one asks for it.

    Args:
        link: this remote's end of the link.
        channel: name to announce the service by.

    Raises:
        ResourceTableError: the table on the link has no RPMsg device, or is malformed.
        PlatformError: the link cannot be made.
        PeerGoneError: the host left before the link was up.
        VhostUserError: the one front end that we connected to broke the protocol, or a ring.
        trio.BrokenResourceError: the host broke a ring (the cause says how).
    """
    if isinstance(link, VhostUserLink):
        await _serve_guests(link, channel)
        return
    async with open_resources(link) as resources:
        device = resources.rpmsg_device()
        try:
            async with open_bus(device) as bus, bus.open_endpoint(channel) as endpoint:
                await _answer(endpoint, channel)
        except trio.BrokenResourceError as error:
            if not isinstance(error.__cause__, PeerGoneError):
                raise


async def _serve_guests(link: VhostUserLink, channel: str) -> None:
    async def application(bus: Bus) -> None:
        asked = False
        try:
            async with bus.open_endpoint(channel, rebind=True) as endpoint:
                await _answer(endpoint, channel)
                asked = True
        finally:
            # Also where the guest left before the endpoint was closed.
            if asked:
                done.cancel()

    with trio.CancelScope() as done:
        await serve_remote(link, application)


async def _answer(endpoint: Endpoint, channel: str) -> None:
    """Returns messages until the host says goodbye."""
    farewell = _FAREWELL.get(channel)
    async for message in endpoint:
        await endpoint.send_to(message.payload, message.source)
        if is_shutdown(message.payload) or message.payload == farewell:
            return
