"""OpenAMP's echo test from the host: payloads of every size, each checked.

python demos/ping.py [CORE]          native (default), loopback, process, or shm:URL
"""

from __future__ import annotations

import struct
import sys

import trio

import openamp_py


async def main(core: str) -> None:
    """Sends 480 payloads of growing size and counts what comes back changed."""
    errors = 0
    async with (
        openamp_py.open_session(core) as session,
        session.bus.open_endpoint(openamp_py.ECHO_CHANNEL) as endpoint,
    ):
        sizes = range(1, endpoint.payload_limit - 15)
        for number, size in enumerate(sizes):
            payload = struct.pack("<QQ", number, size) + b"\xa5" * size
            await endpoint.send(payload)
            errors += (await endpoint.receive()).payload != payload
        print(f"{len(sizes)} payloads, {errors} errors")
        print("shutdown:", await session.shutdown(endpoint, grace=2.0))


trio.run(main, sys.argv[1] if len(sys.argv) > 1 else "native")
