"""Messages built and read in the shared buffers: a frame goes there and back without a copy.

python demos/zero_copy.py
"""

from __future__ import annotations

import trio

import openamp_py
from openamp_py import BusOptions, Link, LoopbackPlatform

FRAME = 1000
LARGE = BusOptions(send_buffer_size=1024, receive_buffer_size=1024)


async def remote(link: Link) -> None:
    """Inverts each frame from one shared buffer into another."""
    async with (
        openamp_py.open_resources(link) as resources,
        openamp_py.open_bus(resources.rpmsg_device(), LARGE) as bus,
        bus.open_endpoint("invert", in_place=True) as endpoint,
    ):
        while True:
            with await endpoint.hold() as frame:
                async with endpoint.reserve(len(frame.view)) as answer:
                    answer.view[:FRAME] = bytes(255 - value for value in frame.view)


async def main() -> None:
    """Sends a frame, and looks at the answer where it lies."""
    platform = LoopbackPlatform(remote, memory_size=1 << 20)
    async with (
        openamp_py.open_session(platform, options=LARGE) as session,
        session.bus.open_endpoint("invert", in_place=True) as endpoint,
    ):
        async with endpoint.reserve() as frame:
            for position in range(FRAME):
                frame.view[position] = position % 256
            frame.length = FRAME
        with await endpoint.hold() as answer:
            good = all(value == 255 - i % 256 for i, value in enumerate(answer.view))
            print(f"{len(answer.view)} bytes in place, {'inverted' if good else 'wrong'}")
            print("buffers held:", session.bus.statistics.held)
        print("buffers held:", session.bus.statistics.held)


trio.run(main)
