"""How fast messages go through the real kernel: ``python -m tests.kernel.measure``.

In one boot of the guest, one after the other: the kernel's own sample client, a program that reads
and writes a node, and a program of ours on ``linux:``; the core that answers them is ours, too.
"""

from __future__ import annotations

import re
import statistics
import tempfile
from pathlib import Path

import trio

from openamp_py import ECHO_CHANNEL, Bus
from openamp_py.echo import SAMPLE_CHANNEL
from tests.kernel.build import build
from tests.kernel.conftest import open_booted
from tests.kernel.images import make_image
from tests.kernel.scripts import START, wait_for

RAW = "rpmsg-raw"
COUNT = 2000

NODE = f"""
import os, time

node = os.open("/dev/rpmsg0", os.O_RDWR)
times = []
for _ in range({COUNT}):
    begin = time.perf_counter()
    os.write(node, bytes(16))
    os.read(node, 512)
    times.append(time.perf_counter() - begin)
print(*times)
"""

ENDPOINT = f"""
import fcntl, os, struct, time
import trio
from openamp_py import ECHO_CHANNEL, open_session
from openamp_py.linux.access import CREATE_ENDPOINT, DESTROY_ENDPOINT

def open_by_hand():
    control = os.open("/dev/rpmsg_ctrl0", os.O_RDWR)
    before = set(os.listdir("/dev"))
    fcntl.ioctl(control, CREATE_ENDPOINT, struct.pack("<32sII", b"by hand", 0xFFFFFFFF, 1024))
    while not (new := set(os.listdir("/dev")) - before):
        pass
    node = os.open("/dev/" + new.pop(), os.O_RDWR)
    fcntl.ioctl(node, DESTROY_ENDPOINT)
    os.close(node)
    os.close(control)

async def main():
    begin = time.perf_counter()
    for _ in range(20):
        open_by_hand()
    by_hand = (time.perf_counter() - begin) / 20
    async with open_session("linux:program-core0") as session:
        begin = time.perf_counter()
        for _ in range(20):
            async with session.bus.open_endpoint("x", destination=1024):
                pass
        opening = (time.perf_counter() - begin) / 20
        async with session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
            await endpoint.wait_bound()
            times = []
            for _ in range({COUNT}):
                begin = time.perf_counter()
                await endpoint.send(bytes(16))
                await endpoint.receive()
                times.append(time.perf_counter() - begin)
            begin = time.process_time()
            with trio.move_on_after(2):
                await endpoint.receive()
            idle = (time.process_time() - begin) / 2
    print(by_hand, opening, idle, *times)

trio.run(main)
"""


async def serve(bus: Bus) -> None:
    """Returns what comes, on three channels."""

    async def echo(name: str) -> None:
        async with bus.open_endpoint(name) as endpoint:
            async for message in endpoint:
                await endpoint.send_to(message.payload, message.source)

    async with trio.open_nursery() as nursery:
        for name in (SAMPLE_CHANNEL, RAW, ECHO_CHANNEL):
            nursery.start_soon(echo, name)


def _sample_times(log: bytes) -> float:
    """Microseconds of a message and its answer, by the kernel's clock."""
    at = {
        int(number): float(seconds)
        for seconds, number in re.findall(rb"\[ *([\d.]+)\][^\n]*incoming msg (\d+) ", log)
    }
    return 1e6 * (at[COUNT] - at[1]) / (COUNT - 1)


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="openamp-") as directory:
        async with open_booted(build(), Path(directory), make_image(), serve) as (guest, _):
            await guest.run(f"insmod /rpmsg_client_sample.ko count={COUNT}\n{START}")
            await guest.wait_log("goodbye!")
            sample = _sample_times(guest.log)
            await guest.run(wait_for("/dev/rpmsg0"))
            node = [float(each) for each in (await guest.python(NODE)).split()]
            words = (await guest.python(ENDPOINT, limit=60)).split()
            by_hand, opening, idle, *times = (float(each) for each in words)
    print(f"the kernel's sample client   {sample:7.0f} us a round trip")
    print(f"read and write of a node     {1e6 * statistics.median(node):7.0f} us")
    print(f"an endpoint over linux:      {1e6 * statistics.median(times):7.0f} us")
    print(f"opening a node by hand       {1e3 * by_hand:7.2f} ms")
    print(f"opening an endpoint          {1e3 * opening:7.2f} ms")
    print(f"an endpoint that waits       {100 * idle:7.2f} % of a CPU")


if __name__ == "__main__":
    trio.run(main)
