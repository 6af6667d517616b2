"""Our programs in the guest, through the kernel, to our device: our code on both its sides."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from openamp_py import Bus
from openamp_py.constants import ECHO_CHANNEL
from openamp_py.rpmsg.wire import is_shutdown
from tests.kernel.conftest import Boot
from tests.kernel.guest import on_host_python
from tests.kernel.images import make_image
from tests.kernel.scripts import CHANNELS, START, STOP, wait_for

pytestmark = pytest.mark.linux_kernel

DEMO = Path(__file__).resolve().parents[2] / "demos" / "ping.py"
CORE = "program-core0"


async def echo_until_shutdown(bus: Bus) -> None:
    """What the shipped echo firmware does."""
    async with bus.open_endpoint(ECHO_CHANNEL) as endpoint:
        async for message in endpoint:
            await endpoint.send_to(message.payload, message.source)
            if is_shutdown(message.payload):
                return


async def test_list_shows_the_processor_and_what_comes_with_its_channels(boot: Boot) -> None:
    command = on_host_python("-m openamp_py list --json")
    async with boot(make_image(), echo_until_shutdown) as (guest, _):
        before = json.loads(await guest.run(command))
        channel = f"{CHANNELS}/virtio1.{ECHO_CHANNEL}.-1.1024"
        await guest.run(START + wait_for(channel))
        running = json.loads(await guest.run(command))
        await guest.run(STOP)
        after = json.loads(await guest.run(command))
    assert [listed["processors"][0]["state"] for listed in (before, running, after)] == [
        *("offline", "running", "offline")
    ]
    assert running["processors"][0]["name"] == CORE
    assert ECHO_CHANNEL in [channel["name"] for channel in running["channels"]]
    assert running["controls"][0]["node"] == "/dev/rpmsg_ctrl0"
    assert not before["channels"] and not after["channels"]


async def test_doctor_finds_nothing_wrong(boot: Boot) -> None:
    async with boot(make_image()) as (guest, _):
        status, output = await guest.run_any(on_host_python("-m openamp_py doctor"))
    assert (status, "to do" in output) == (0, False), output
    assert f"{CORE} (remoteproc0): offline" in output


async def test_a_demo_does_the_same_on_every_kind_of_core(boot: Boot) -> None:
    """The program is unchanged; only the name of the core differs."""
    cores = ["native"]
    if shutil.which("qemu-system-arm"):
        cores.append("qemu:mps2-an385")
    elsewhere = {
        subprocess.run([sys.executable, DEMO, core], capture_output=True, check=True).stdout
        for core in cores
    }
    async with boot(make_image(), echo_until_shutdown) as (guest, _):
        inside = await guest.run(on_host_python(f"{DEMO} linux:{CORE}"))
        assert await guest.run("cat /sys/class/remoteproc/remoteproc0/state") == "offline\n"
    assert elsewhere == {inside.encode()}
