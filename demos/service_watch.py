"""Watches a remote's services come and go, through a crash and a restart of the remote.

python demos/service_watch.py
"""

from __future__ import annotations

import trio

import openamp_py
from openamp_py import Announcement, Link, LoopbackPlatform


async def remote(link: Link) -> None:
    """Offers a thermometer; crashes when it is asked to."""
    async with (
        openamp_py.open_resources(link) as resources,
        openamp_py.open_bus(resources.rpmsg_device()) as bus,
    ):
        async with bus.open_endpoint("warm-up"):
            pass
        async with bus.open_endpoint("thermometer") as endpoint:
            async for question in endpoint:
                if question.payload == b"crash":
                    raise RuntimeError("as told")
                await endpoint.send_to(b"21 C", question.source)


def show(event: Announcement) -> None:
    """Prints one announcement."""
    what = "withdrawn" if event.destroy else "announced"
    print(f"{what}: {event.channel.name} at {event.channel.address}")


async def main() -> None:
    """One endpoint that outlives its peer."""
    async with openamp_py.open_session(LoopbackPlatform(remote)) as session:
        bus = session.bus
        async with bus.open_endpoint("thermometer", rebind=True) as endpoint:
            async with bus.open_watch() as watch:
                async for event in watch:
                    show(event)
                    if event.channel.name == "thermometer":
                        break
            await endpoint.send(b"how warm is it?")
            print("answer:", (await endpoint.receive()).payload.decode())
            await endpoint.send(b"crash")
            try:
                await endpoint.receive()
            except trio.BrokenResourceError as error:
                print("broken:", error.__cause__)
            await session.restart()
            await endpoint.wait_bound()
            await endpoint.send(b"how warm is it now?")
            print("answer:", (await endpoint.receive()).payload.decode())
            print("generation:", bus.generation)


trio.run(main)
