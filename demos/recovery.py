"""A core that crashes, hangs and resets itself, and is back each time; what it left is kept.

python demos/recovery.py
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import trio

import openamp_py
from openamp_py import CoredumpMode, CrashPolicy, Endpoint, Session

# What the echo firmware does when it is told to: see csrc/firmware/echo_protocol.h.
CRASH = 0xEF56A501
HANG = 0xEF56A502
RESET = 0xEF56A503


async def survive(session: Session, endpoint: Endpoint, order: int) -> None:
    """Lets the core fail, waits until it is back, and talks to it through the same endpoint."""
    await endpoint.send(order.to_bytes(4, "little"))
    try:
        await endpoint.receive()
    except trio.BrokenResourceError as error:
        print("broken:", str(error.__cause__).partition(" (")[0])
    await session.wait_up()
    await endpoint.wait_bound()
    await endpoint.send(b"are you back?")
    print("echo:", (await endpoint.receive()).payload.decode())


async def main() -> None:
    """One endpoint, three failures."""
    with tempfile.TemporaryDirectory() as directory:
        policy = CrashPolicy(
            recovery=True, coredump=CoredumpMode.ENABLED, coredump_to=directory, limit=5
        )
        async with (
            openamp_py.open_session("native", policy=policy) as session,
            session.bus.open_endpoint(openamp_py.ECHO_CHANNEL, rebind=True) as endpoint,
            session.open_heartbeat(silence=1.0),
        ):
            for order in (CRASH, HANG, RESET):
                await survive(session, endpoint, order)
            processor = session.processor
            assert processor is not None
            await processor.wait_settled()
            print("crashes:", processor.crashes)
            print("shutdown:", await session.shutdown(endpoint, grace=1.0))
        # Each opens in gdb, beside the firmware.
        print("left behind:", *sorted(path.name for path in Path(directory).iterdir()))


logging.disable(logging.WARNING)  # each crash is logged, too
trio.run(main)
