"""As many messages as go: batches one way to a process of its own, counted at the other end.

python demos/flood.py [MESSAGES]         (this program starts itself for the remote's side)
"""

from __future__ import annotations

import contextlib
import sys
import time

import trio

import openamp_py
from openamp_py import ProcessPlatform, ShmAddress, ShmLink

SERVICE = "count"
BATCH = 64
END = b"how many?"


async def remote(url: str) -> None:
    """Counts what comes, and says how many when asked."""
    async with contextlib.AsyncExitStack() as stack:
        link = stack.enter_context(contextlib.closing(ShmLink(ShmAddress.parse(url))))
        resources = await stack.enter_async_context(openamp_py.open_resources(link))
        bus = await stack.enter_async_context(openamp_py.open_bus(resources.rpmsg_device()))
        endpoint = await stack.enter_async_context(bus.open_endpoint(SERVICE))
        count = 0
        while True:
            messages = await endpoint.receive_many()
            count += len(messages)
            if messages[-1].payload == END:
                await endpoint.send(str(count - 1).encode())
                return


async def host(total: int) -> None:
    """Sends, and says how fast it went."""
    command = (sys.executable, __file__, "{url}")
    async with (
        openamp_py.open_session(ProcessPlatform(command)) as session,
        session.bus.open_endpoint(SERVICE) as endpoint,
    ):
        await endpoint.wait_bound()
        begin = time.perf_counter()
        for first in range(0, total, BATCH):
            numbers = range(first, min(first + BATCH, total))
            await endpoint.send_many([number.to_bytes(16, "little") for number in numbers])
        await endpoint.send(END)
        answer = await endpoint.receive()
        seconds = time.perf_counter() - begin
        print(f"{total} sent, {answer.payload.decode()} counted")
        print(f"{total / seconds:,.0f} messages/s", file=sys.stderr)


if len(sys.argv) > 1 and sys.argv[1].startswith("shm:"):
    trio.run(remote, sys.argv[1])
else:
    trio.run(host, int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
