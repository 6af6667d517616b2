"""RPMsg with the kernel's own bus as our host."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import pytest
import trio

from openamp_py import Bus
from openamp_py.echo import SAMPLE_CHANNEL
from tests.kernel.conftest import Boot
from tests.kernel.core import Op
from tests.kernel.images import make_image
from tests.kernel.scripts import CHANNELS, START, STOP, wait_for, wait_gone

pytestmark = pytest.mark.linux_kernel

RAW = "rpmsg-raw"
"""A channel that the kernel opens a node for, /dev/rpmsg0, as soon as it is announced."""


def serve_echo(name: str) -> Callable[[Bus], Awaitable[None]]:
    """Announces a service that returns what comes."""

    async def application(bus: Bus) -> None:
        async with bus.open_endpoint(name) as endpoint:
            async for message in endpoint:
                await endpoint.send_to(message.payload, message.source)

    return application


@pytest.mark.parametrize("attempt", range(20))
async def test_the_kernels_sample_client_gets_a_thousand_answers(boot: Boot, attempt: int) -> None:
    async with boot(make_image(), serve_echo(SAMPLE_CHANNEL)) as (guest, core):
        await guest.run("insmod /rpmsg_client_sample.ko count=1000\n" + START)
        await guest.wait_log("goodbye!")
        await guest.run(STOP)
        assert b"incoming msg 1000 " in guest.log
        assert [command.op for command in core.commands] == [Op.HELLO, Op.START, Op.STOP]
        assert not core.complaints


ECHO_TWENTY_THOUSAND = """
import os, random, select

COUNT, SIZE, AHEAD = 20_000, 496, 64
node = os.open("/dev/rpmsg0", os.O_RDWR | os.O_NONBLOCK)
ready = select.poll()
ready.register(node, select.POLLIN)
words = random.Random(6).randbytes(SIZE + COUNT)
sent = received = bad = 0
while received < COUNT:
    while sent < COUNT and sent - received < AHEAD:
        try:
            os.write(node, words[sent : sent + SIZE])
        except BlockingIOError:
            break
        sent += 1
    assert ready.poll(5000), f"nothing came: {sent} sent, {received} received"
    while received < sent:
        try:
            message = os.read(node, 512)
        except BlockingIOError:
            break
        bad += message != words[received : received + SIZE]
        received += 1
print(received, bad)
"""


async def test_twenty_thousand_whole_messages_through_a_node(boot: Boot) -> None:
    async with boot(make_image(), serve_echo(RAW)) as (guest, _):
        await guest.run(START + wait_for("/dev/rpmsg0"))
        assert await guest.python(ECHO_TWENTY_THOUSAND, limit=60) == "20000 0\n"


ECHO_ALL_LENGTHS = """
import errno, os

node = os.open("/dev/rpmsg0", os.O_RDWR)
bad = 0
for length in range(497):
    message = bytes([length & 0xFF]) * length
    os.write(node, message)
    bad += os.read(node, 512) != message
print(bad)
try:
    os.write(node, bytes(497))
except OSError as error:
    print(errno.errorcode[error.errno])
"""


async def test_messages_of_all_lengths_through_a_node(boot: Boot) -> None:
    async with boot(make_image(), serve_echo(RAW)) as (guest, _):
        await guest.run(START + wait_for("/dev/rpmsg0"))
        assert await guest.python(ECHO_ALL_LENGTHS) == "0\nEMSGSIZE\n"


CREATE_AND_RELEASE = """
import fcntl, struct

CREATE, RELEASE = 0x4028B503, 0x4028B504
channel = struct.pack("<32sII", b"rpmsg-raw", 3000, 0xFFFFFFFF)
with open("/dev/rpmsg_ctrl0", "rb") as control:
    fcntl.ioctl(control, CREATE, channel)
    fcntl.ioctl(control, RELEASE, channel)
"""


async def test_services_are_announced_and_withdrawn_on_both_sides(boot: Boot) -> None:
    """Ours show in the kernel's sysfs; the kernel announces what has an address of its own."""
    heard = []
    withdraw = trio.Event()

    async def application(bus: Bus) -> None:
        async with bus.open_watch() as watch:
            async with bus.open_endpoint("of-the-core", address=77):
                await withdraw.wait()
            async for announcement in watch:
                heard.append(announcement)

    ours = f"{CHANNELS}/virtio1.of-the-core.-1.77"
    async with boot(make_image(), application) as (guest, _):
        await guest.run(START + wait_for(ours))
        withdraw.set()
        await guest.run(wait_gone(ours))
        await guest.python(CREATE_AND_RELEASE)
        await guest.run(STOP)
    assert [(a.channel.name, a.channel.address, a.destroy) for a in heard] == [
        (RAW, 3000, False),
        (RAW, 3000, True),
    ]


async def test_a_tty_of_the_kernel_is_a_channel(boot: Boot) -> None:
    """Its line discipline is off here: it would change what passes."""
    async with boot(make_image(), serve_echo("rpmsg-tty")) as (guest, _):
        tty = "/dev/ttyRPMSG0"
        lines = "".join(f"line {number}\n" for number in range(100))
        (guest.directory / "lines").write_text(lines)
        await guest.run(START + wait_for(tty))
        # Held open: a tty that nobody has open forgets.
        await guest.run(
            f"exec 3<>{tty}; stty raw -echo <&3; cat <&3 >/tmp/back & cat /work/lines >&3\n"
        )
        size = len(lines)
        back = await guest.run(
            f"until [ $(wc -c </tmp/back) -ge {size} ]; do sleep 0.01; done; cat /tmp/back\n"
        )
        assert back == lines


async def test_a_core_that_does_not_read_stops_the_node_not_the_kernel(boot: Boot) -> None:
    """Two rings of 256: what is sent without waiting fits or is refused."""

    async def application(bus: Bus) -> None:
        async with bus.open_endpoint(RAW):
            await trio.sleep(math.inf)

    fill = """
import os

node = os.open("/dev/rpmsg0", os.O_RDWR | os.O_NONBLOCK)
try:
    for sent in range(10_000):
        os.write(node, b"x")
except BlockingIOError:
    print(sent)
"""
    async with boot(make_image(), application) as (guest, _):
        await guest.run(START + wait_for("/dev/rpmsg0"))
        sent = int(await guest.python(fill))
        assert 256 <= sent < 10_000
        await guest.run(STOP)
