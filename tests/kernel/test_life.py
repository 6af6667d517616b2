"""The life of a remote processor whose host is the kernel, through its sysfs."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import pytest
import trio
from elftools.elf.elffile import ELFFile

from openamp_py import Coredump, encode_coredump
from openamp_py.remoteproc.coredump import DumpSegment
from openamp_py.remoteproc.resource_table import decode_table_untrusted
from tests.kernel.build import Kernel
from tests.kernel.conftest import Boot
from tests.kernel.core import DEVICE_ID, Op, RemoteCore, open_core
from tests.kernel.guest import on_host_python, open_guest
from tests.kernel.images import CODE, CODE_DA, TABLE_DA, TRACE_DA, make_image, make_table
from tests.kernel.scripts import (
    RPROC,
    START,
    STOP,
    wait_for,
    wait_gone,
    wait_state,
)
from tests.kernel.test_rpmsg import RAW, serve_echo

pytestmark = pytest.mark.linux_kernel

ECHO = """
import os

node = os.open("/dev/rpmsg0", os.O_RDWR)
os.write(node, b"are you there?")
print(os.read(node, 512).decode())
"""
CRASHED, RUNNING = 3, 2
"""What STOP says the state was."""


def orders(core: RemoteCore) -> list[tuple[int, int]]:
    """What the driver ordered, and with what argument."""
    return [(command.op, command.arg) for command in core.commands]


async def test_starts_are_counted(boot: Boot) -> None:
    async with boot(make_image()) as (guest, core):
        calls = ["start", "start", "stop", "stop", "stop", "detach", "nonsense", "start"]
        script = "".join(
            f"echo {call} >{RPROC}/state 2>&1; echo {call} $? $(cat {RPROC}/state)\n"
            for call in calls
        )
        lines = [line for line in (await guest.run(script)).splitlines() if "sh:" not in line]
        assert lines == [
            "start 0 running",
            "start 0 running",
            "stop 0 running",
            "stop 0 offline",
            "stop 1 offline",
            "detach 1 offline",
            "nonsense 1 offline",
            "start 0 running",
        ]
        assert orders(core) == [(Op.HELLO, 0), (Op.START, 0), (Op.STOP, RUNNING), (Op.START, 0)]


async def test_a_start_that_the_core_refuses_is_the_kernels_error(boot: Boot) -> None:
    async with boot(make_image()) as (guest, core):
        core.answers[Op.START] = errno.EIO
        status, output = await guest.run_any(START)
        assert status and "Input/output error" in output
        assert await guest.run(f"cat {RPROC}/state") == "offline\n"
        del core.answers[Op.START]
        await guest.run(START)


async def test_the_core_sees_its_image_table_and_boot_address(boot: Boot) -> None:
    """Where the vrings are, the host says only when its driver comes up."""
    image = make_image()
    async with boot(image) as (guest, core):
        await guest.run(START)
        start = core.commands[-1]
        assert (start.a, start.c) == (CODE_DA, len(make_table()))
        assert bytes(core.tcm[: len(CODE)]) == CODE
        before = decode_table_untrusted(core.tables[0]).vdevs[0]
        after = decode_table_untrusted(bytes(core.tcm[TABLE_DA - CODE_DA :][:4096])).vdevs[0]
        assert [vring.da for vring in before.vrings] == [0xFFFF_FFFF] * 2
        assert [vring.notify_id for vring in before.vrings] == [0, 1]
        assert all(vring.da % 4096 == 0 for vring in after.vrings)


async def test_the_trace_is_a_file(boot: Boot) -> None:
    async with boot(make_image()) as (guest, core):
        await guest.run(START)
        text = b"the core has started\n\0not this"
        core.tcm[TRACE_DA - CODE_DA :][: len(text)] = text
        debug = "/sys/kernel/debug/remoteproc/remoteproc0"
        assert await guest.run(f"cat {debug}/trace0") == "the core has started\n"


async def test_a_crash_is_recovered_from_and_its_channels_return(boot: Boot) -> None:
    async with boot(make_image(), serve_echo(RAW)) as (guest, core):
        await guest.run(START + wait_for("/dev/rpmsg0"))
        assert await guest.python(ECHO) == "are you there?\n"
        core.crash(2)
        await guest.wait_log("crash detected in program-core0: type fatal error")
        await guest.wait_log("is now up", count=2)
        await guest.run(wait_state("running") + wait_for("/dev/rpmsg0"))
        assert await guest.python(ECHO) == "are you there?\n"
        await guest.run(STOP)
        assert orders(core) == [
            (Op.HELLO, 0),
            (Op.START, 0),
            (Op.STOP, CRASHED),
            (Op.START, 0),
            (Op.STOP, RUNNING),
        ]
        assert core.tables[0] == core.tables[1]


async def test_without_recovery_a_core_stays_crashed_until_it_is_asked_for(boot: Boot) -> None:
    async with boot(make_image()) as (guest, core):
        await guest.run(f"echo disabled >{RPROC}/recovery\n" + START)
        core.crash(1)
        await guest.wait_log("type watchdog")
        await guest.run(wait_state("crashed"))
        assert orders(core)[-1] == (Op.START, 0)
        await guest.run(f"echo recover >{RPROC}/recovery\n" + wait_state("running"))
        assert orders(core)[-2:] == [(Op.STOP, CRASHED), (Op.START, 0)]


def segments(dump: bytes) -> list[tuple[dict[str, int], bytes]]:
    """The program headers of a coredump and what they are of."""
    file = ELFFile(io.BytesIO(dump))
    return [(dict(segment.header), segment.data()) for segment in file.iter_segments()]


@pytest.mark.parametrize("mode", ["enabled", "inline"])
async def test_the_kernels_coredump_is_ours(boot: Boot, mode: str) -> None:
    """Ours is made of what the core's memory was when it was stopped."""
    async with boot(make_image(), serve_echo(RAW), module="tcm_kb=64") as (guest, core):
        await guest.run(f"echo {mode} >{RPROC}/coredump\n" + START + wait_for("/dev/rpmsg0"))
        core.tcm[0x8000:0x9000] = b"core" * 1024
        core.crash(0)
        dump = "/sys/class/devcoredump/devcd1"
        await guest.run(f"{wait_for(dump)} cat {dump}/data >/work/dump; echo 0 >{dump}/data")
        await guest.run(wait_state("running"))
        theirs = (guest.directory / "dump").read_bytes()
        memory = DumpSegment(CODE_DA, core.memories[0])
        ours = b"".join(encode_coredump(Coredump(0, 32, CODE_DA, (memory,))))
        assert segments(ours) == segments(theirs)
        assert ours == theirs


ATTACHED = make_table()


async def test_a_core_that_runs_already_is_attached_to_and_left(boot: Boot) -> None:
    image = make_image()
    async with boot(image, serve_echo(RAW), attach_table=ATTACHED, module="attach=1") as (
        guest,
        core,
    ):
        table = core.tcm[-4096:][: len(ATTACHED)]
        state = f"cat {RPROC}/state\n"
        assert await guest.run(state) == "detached\n"
        for _ in range(2):
            await guest.run(START + wait_for("/dev/rpmsg0"))
            assert await guest.run(state) == "attached\n"
            assert bytes(table) != ATTACHED
            assert await guest.python(ECHO) == "are you there?\n"
            await guest.run(f"echo detach >{RPROC}/state\n" + wait_gone("/dev/rpmsg0"))
            assert await guest.run(state) == "detached\n"
            assert bytes(table) == ATTACHED
        await guest.run(START + STOP)
        assert await guest.run(state) == "offline\n"
        assert [op for op, _ in orders(core)] == [
            *(Op.HELLO, Op.ATTACH, Op.DETACH, Op.ATTACH, Op.DETACH, Op.ATTACH, Op.STOP)
        ]


async def test_the_driver_comes_back_in_order(boot: Boot) -> None:
    """Unbinding the virtio device and binding it is a whole new handshake."""
    async with boot(make_image(), serve_echo(RAW)) as (guest, core):
        driver = "/sys/bus/platform/drivers/virtio-uml"
        for _ in range(3):
            await guest.run(
                "cd /sys/class/remoteproc/*; echo start >state\n" + wait_for("/dev/rpmsg0")
            )
            assert await guest.python(ECHO) == "are you there?\n"
            await guest.run(f"cd {driver}; echo virtio-uml.0 >unbind")
            assert not core.running
            await guest.run(f"cd {driver}; echo virtio-uml.0 >bind")
        assert [op for op, _ in orders(core)] == [Op.HELLO, Op.START, Op.STOP] * 3 + [Op.HELLO]


WAIT_FOR_THE_END = """
import errno, os, select

node = os.open("/dev/rpmsg0", os.O_RDWR | os.O_NONBLOCK)
print("open", flush=True)
ready = select.poll()
ready.register(node, select.POLLIN)
_, events = ready.poll(10_000)[0]
print("error" if events & select.POLLERR else events)
for call in (lambda: os.read(node, 512), lambda: os.write(node, b"x")):
    try:
        call()
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


async def test_a_core_that_dies_ends_its_nodes_and_not_the_kernel(
    kernel: Kernel, place: Path
) -> None:
    (place / "core.elf").write_bytes(make_image())
    path = place / "core.sock"
    async with trio.open_nursery() as nursery:
        ready = trio.Event()
        dying = trio.CancelScope()

        async def live() -> None:
            with dying:
                async with open_core(path, serve_echo(RAW)):
                    ready.set()
                    await trio.sleep_forever()

        nursery.start_soon(live)
        await ready.wait()
        async with open_guest(kernel, place, [(path, DEVICE_ID)]) as guest:
            await guest.run("insmod /program_rproc.ko\n" + START + wait_for("/dev/rpmsg0"))
            (place / "wait.py").write_text(WAIT_FOR_THE_END)
            await guest.run(
                f"{on_host_python(f'{place}/wait.py')} >/work/waited 2>&1 &\n"
                "until grep -q open /work/waited; do sleep 0.01; done"
            )
            dying.cancel()
            await guest.run(wait_gone("/sys/class/remoteproc/remoteproc0") + "wait")
            waited = await guest.run(
                "until grep -q E /work/waited; do sleep 0.01; done; sleep 0.1; cat /work/waited"
            )
            assert waited.split() == ["open", "error", "EPIPE", "EPIPE"]
