"""Services that come and go, as the host sees them; one is bound by name.

python demos/name_service.py
"""

from __future__ import annotations

import trio

import openamp_py
from openamp_py import Link, LoopbackPlatform


async def remote(link: Link) -> None:
    """Announces a clock, answers one question, withdraws it, and announces a lamp."""
    async with (
        openamp_py.open_resources(link) as resources,
        openamp_py.open_bus(resources.rpmsg_device()) as bus,
    ):
        async with bus.open_endpoint("clock") as clock:
            question = await clock.receive()
            await clock.send_to(b"noon", question.source)
        async with bus.open_endpoint("lamp", address=7):
            await trio.sleep_forever()


async def main() -> None:
    """Waits for each service by its name."""
    async with openamp_py.open_session(LoopbackPlatform(remote)) as session:
        bus = session.bus
        print("announced:", await bus.wait_service("clock"))
        async with bus.open_endpoint("clock") as clock:
            await clock.send(b"what time is it?")
            print("answer:", (await clock.receive()).payload.decode())
            async for _ in clock:
                pass
            print("withdrawn: clock")
        print("announced:", await bus.wait_service("lamp"))
        print("now there:", ", ".join(channel.name for channel in bus.channels))


trio.run(main)
