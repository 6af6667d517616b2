"""SHUTDOWN_MSG: a remote that leaves when asked, and one that does not answer.

python demos/graceful_shutdown.py
"""

from __future__ import annotations

import struct

import trio

import openamp_py

HANG = struct.pack("<I", 0xEF56A502)  # the shipped firmware stops listening


async def shut_down(*, hung: bool) -> None:
    """Boots the shipped firmware and asks it to leave."""
    async with (
        openamp_py.open_session("native") as session,
        session.bus.open_endpoint(openamp_py.ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.wait_bound()
        if hung:
            await endpoint.send(HANG)
        shutdown = await session.shutdown(endpoint, grace=0.3)
        assert session.processor is not None
        why = f" ({shutdown.reason})" if shutdown.reason else ""
        print(f"{shutdown}{why}; the processor is {session.processor.state.value}")


async def main() -> None:
    """Once as it should be, once with a remote that hangs."""
    await shut_down(hung=False)
    await shut_down(hung=True)


trio.run(main)
