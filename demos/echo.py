"""A remote written in Python: returns every message until it is told to leave.

python demos/echo.py                 both sides in this process
python demos/echo.py shm:URL         the remote alone, for a host at the other end
"""

from __future__ import annotations

import contextlib
import sys

import trio

import openamp_py
from openamp_py import ECHO_CHANNEL, Link, LoopbackPlatform, ShmAddress, ShmLink


async def remote(link: Link) -> None:
    """The remote application: joins the devices of its table, serves, and leaves them."""
    async with (
        openamp_py.open_resources(link) as resources,
        openamp_py.open_bus(resources.rpmsg_device()) as bus,
        bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        async for message in endpoint:
            await endpoint.send_to(message.payload, message.source)
            if message.payload[:4] == openamp_py.SHUTDOWN_MSG.to_bytes(4, "little"):
                break  # what was returned just now is the acknowledgement


async def host() -> None:
    """A host that boots the remote above as a task of this process."""
    async with (
        openamp_py.open_session(LoopbackPlatform(remote)) as session,
        session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        for text in ("one", "two", "three"):
            await endpoint.send(text.encode())
            print((await endpoint.receive()).payload.decode())
        print("shutdown:", await session.shutdown(endpoint, grace=1.0))


async def serve(url: str) -> None:
    """The remote at one end of a shared-memory link."""
    with contextlib.closing(ShmLink(ShmAddress.parse(url))) as link:
        await remote(link)


if len(sys.argv) > 1:
    trio.run(serve, sys.argv[1])
else:
    trio.run(host)
