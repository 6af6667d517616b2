"""A service written as a handler: up to four requests at once, each answered when it is done.

python demos/handler_service.py
"""

from __future__ import annotations

import trio

import openamp_py
from openamp_py import Link, LoopbackPlatform, Message


async def remote(link: Link) -> None:
    """Sleeps as long as each request says, and answers it."""
    async with (
        openamp_py.open_resources(link) as resources,
        openamp_py.open_bus(resources.rpmsg_device()) as bus,
        bus.open_endpoint("sleep") as endpoint,
    ):

        async def answer(message: Message) -> None:
            await trio.sleep(int(message.payload) / 1000)
            await endpoint.send_to(message.payload, message.source)

        await endpoint.serve(answer, concurrency=4)


async def main() -> None:
    """Asks for four naps at once; the shortest answers first."""
    async with (
        openamp_py.open_session(LoopbackPlatform(remote)) as session,
        session.bus.open_endpoint("sleep") as endpoint,
    ):
        await endpoint.send_many([b"400", b"300", b"200", b"100"])
        for _ in range(4):
            print((await endpoint.receive()).payload.decode(), "ms")


trio.run(main)
