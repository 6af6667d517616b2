"""Leaves a core running, and takes it over in another process.

python demos/takeover.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

import trio

import openamp_py
from openamp_py import NativePlatform


async def leave(path: str) -> None:
    """Boots a core that can be found at a path, talks to it, and leaves it running."""
    async with (
        openamp_py.open_session(NativePlatform(rendezvous=path)) as session,
        session.bus.open_endpoint(openamp_py.ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.send(b"first host")
        print("echo:", (await endpoint.receive()).payload.decode(), flush=True)
        await session.detach()


async def take_over(path: str) -> None:
    """Goes on where the other process stopped, and shuts the core down."""
    async with (
        openamp_py.open_session(NativePlatform(rendezvous=path), attach=True) as session,
        session.bus.open_endpoint(openamp_py.ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.send(b"second host")
        print("echo:", (await endpoint.receive()).payload.decode())
        print("shutdown:", await session.shutdown(endpoint, grace=1.0))


if len(sys.argv) == 2:
    trio.run(take_over, sys.argv[1])
else:
    with tempfile.TemporaryDirectory() as directory:
        rendezvous = f"{directory}/core"
        trio.run(leave, rendezvous)
        subprocess.run([sys.executable, __file__, rendezvous], check=True)
