"""Our Linux platform on the real kernel: the same programs as on every other core.

The program runs in the guest, on the host's Python; the remote is a program of this test.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import openamp_py
from openamp_py import ECHO_CHANNEL, Bus
from openamp_py.rpmsg.wire import is_shutdown
from tests.kernel.conftest import Boot
from tests.kernel.core import RemoteCore
from tests.kernel.guest import Guest
from tests.kernel.images import CODE, CODE_DA, TRACE_DA, make_image, make_table

pytestmark = pytest.mark.linux_kernel

NAME = "program-core0"
ROOT = Path(openamp_py.__file__).parents[1]
RPROC = "/sys/class/remoteproc/remoteproc0"

BEGIN = f"""
import logging
import trio
import openamp_py
from openamp_py import *
from openamp_py.linux.platform import AS_SET

logging.disable(logging.WARNING)
CORE = "linux:{NAME}?firmware=core.elf"
RPROC = "{RPROC}"

def crash():
    with open("/sys/kernel/debug/remoteproc/remoteproc0/crash", "w") as file:
        file.write("2")

def state():
    with open(RPROC + "/state") as file:
        return file.read().strip()

async def limited():
    with trio.fail_after(15):
        await main()
"""
END = "\ntrio.run(limited)\n"


async def leaving_echo(bus: Bus) -> None:
    """As the shipped firmware: returns all, and leaves when it is asked to."""
    async with bus.open_endpoint(ECHO_CHANNEL, address=1024) as endpoint:
        async for message in endpoint:
            await endpoint.send_to(message.payload, message.source)
            if is_shutdown(message.payload):
                return


async def run(guest: Guest, program: str) -> list[str]:
    return (await guest.python(BEGIN + program + END)).splitlines()


def stopped(guest: Guest, core: RemoteCore) -> bool:
    return b"stopped remote processor" in guest.log and not core.complaints


async def test_the_demo_and_the_command_run_by_their_url(boot: Boot) -> None:
    async with boot(make_image(), leaving_echo) as (guest, core):
        shell = f"chroot /host {sys.executable}"
        core_url = f"linux:{NAME}?firmware=core.elf"
        said = await guest.run(f"{shell} {ROOT}/demos/ping.py '{core_url}'")
        assert said.splitlines() == ["480 payloads, 0 errors", "shutdown: graceful"]
        said = await guest.run(f"{shell} -m openamp_py ping --core '{core_url}' --count 20 -q")
        assert "20 sent, 20 received" in said, said
        assert stopped(guest, core)


async def test_a_crash_is_recovered_from_and_endpoints_go_on(boot: Boot) -> None:
    program = """
async def main():
    async with (
        open_session(CORE, policy=CrashPolicy(recovery=True)) as session,
        session.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
    ):
        for attempt in range(4):
            await endpoint.send(b"there?")
            await endpoint.receive()
            crash()
            try:
                await endpoint.receive()
            except trio.BrokenResourceError as error:
                assert isinstance(error.__cause__, OpenAMPError), error
            await session.wait_up()
            await endpoint.wait_bound()
        await endpoint.send(b"back")
        print((await endpoint.receive()).payload, session.bus.generation, session.processor.crashes)
        print(hex(endpoint.address))  # it was made once
    print(state())
"""
    async with boot(make_image(), leaving_echo) as (guest, _core):
        assert await run(guest, program) == ["b'back' 4 4", "0x800", "offline"]


@pytest.mark.parametrize("recovery", ["None", "False"])
@pytest.mark.parametrize("mode", ["ENABLED", "INLINE"])
async def test_the_coredump_is_the_kernels(boot: Boot, mode: str, recovery: str) -> None:
    program = f"""
async def main():
    policy = CrashPolicy(recovery=True, coredump=CoredumpMode.{mode}, coredump_to=WHERE)
    platform = LinuxPlatform("{NAME}", firmware="core.elf", recovery={recovery})
    async with open_session(platform, policy=policy) as session:
        crash()
        await session.processor.wait_state(ProcessorState.CRASHED)
        await session.wait_up()
        await session.processor.wait_settled()
        print(session.processor.last_coredump)
    with open(RPROC + "/coredump") as file:
        print(file.read().strip())
"""
    async with boot(make_image(), leaving_echo) as (guest, _core):
        where = guest.directory / "dumped.core"
        said = await run(guest, program.replace("WHERE", repr(str(where))))
        assert said == [str(where), "disabled"]
        assert CODE in where.read_bytes()


async def test_the_trace_is_read(boot: Boot) -> None:
    program = """
async def main():
    async with open_session(CORE) as session:
        print(repr(read_trace(session.processor)))
"""
    async with boot(make_image(), leaving_echo) as (guest, core):
        await run(guest, program)
        core.tcm[TRACE_DA - CODE_DA :][:6] = b"words\0"
        assert (await run(guest, program))[0].startswith("'")


async def test_a_core_of_a_boot_loader_is_attached_to_and_left(boot: Boot) -> None:
    program = f"""
async def main():
    async with open_processor(LinuxPlatform("{NAME}")) as processor:
        await processor.attach()
        print(state())
        async with open_host_bus(processor) as bus, bus.open_endpoint(ECHO_CHANNEL) as endpoint:
            await endpoint.send(b"x")
            print((await endpoint.receive()).payload)
        await processor.detach()
        print(state())
        await processor.attach()
        print(state())
    print(state())
"""
    async with boot(make_image(), leaving_echo, attach_table=make_table(), module="attach=1") as (
        guest,
        _core,
    ):
        assert await run(guest, program) == ["attached", "b'x'", "detached", "attached", "attached"]


async def test_errors_of_the_kernel(boot: Boot) -> None:
    program = f"""
async def attempt(**options):
    try:
        async with open_processor(LinuxPlatform("{NAME}", **options)) as processor:
            await processor.boot(AS_SET)
            print("up")
    except OpenAMPError as error:
        print(type(error).__name__, error.__cause__.errno)

async def main():
    await attempt(firmware="missing.elf")
    await attempt(firmware="broken.elf")
    await attempt(firmware="core.elf")
"""
    async with boot(make_image(), leaving_echo) as (guest, _core):
        (guest.directory / "broken.elf").write_bytes(make_image()[:100])
        assert await run(guest, program) == ["ImageError 2", "ImageError 22", "up"]
