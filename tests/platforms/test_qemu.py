"""Emulated cores: QEMU as it is, and QEMUs that do not behave."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from openamp_py import (
    ECHO_CHANNEL,
    CoreCrashedError,
    CoreDiedError,
    CoreResetError,
    CrashKind,
    Endpoint,
    PlatformError,
    ProcessorState,
    QemuPlatform,
    Session,
    firmware,
    open_processor,
    open_session,
)
from openamp_py.platforms.boards import BOARDS, Board
from openamp_py.platforms.machine import Tail
from openamp_py.platforms.qemu import QemuCore
from openamp_py.remoteproc.elf import Firmware, Segment

MakeFake = Callable[[str], Board]

M3 = BOARDS["mps2-an385"]
ECHO_M3 = firmware.path("echo-cortex-m3.elf")

CRASH, HANG, RESET = (struct.pack("<I", 0xEF56A501 + number) for number in range(3))


@asynccontextmanager
async def _open(
    platform: QemuPlatform, image: Path = ECHO_M3
) -> AsyncIterator[tuple[Session, Endpoint]]:
    async with (
        open_session(platform, image) as session,
        session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.wait_bound()
        yield session, endpoint


def _pid(session: Session) -> int:
    assert session.processor is not None
    core = session.processor.core
    assert isinstance(core, QemuCore) and core.pid is not None
    return core.pid


async def _end(endpoint: Endpoint, order: bytes | None = None) -> BaseException:
    """Why the endpoint broke, after an order perhaps."""
    with pytest.raises(trio.BrokenResourceError) as caught:
        if order is not None:
            await endpoint.send(order)
        while True:
            await endpoint.receive()
    assert caught.value.__cause__ is not None
    return caught.value.__cause__


# QEMUs that do not behave

FAKE = """#!{python}
import json, os, re, socket, sys, time

def connect(name):
    fd = int(re.search(name + ",fd=([0-9]+)", " ".join(sys.argv))[1])
    return socket.socket(fileno=fd)

def say(message):
    qmp.sendall(json.dumps(message).encode() + b"\\n")

def greet(major=7):
    say({{"QMP": {{"version": {{"qemu": {{"major": major, "minor": 2, "micro": 0}}}}}}}})

def obey(until=None):
    for line in qmp.makefile():
        command = json.loads(line)
        if command["execute"] == until:
            return command["id"]
        say({{"id": command["id"], "return": {{}}}})

qmp = connect("qmp")
{behaviour}
"""


@pytest.fixture
def make_fake(tmp_path: Path) -> MakeFake:
    """Makes a board whose QEMU is a program of ours."""

    def make(behaviour: str) -> Board:
        program = tmp_path / "fake-qemu"
        program.write_text(FAKE.format(python=sys.executable, behaviour=behaviour))
        program.chmod(0o755)
        return replace(M3, program=str(program))

    return make


MISBEHAVIOUR = {
    "sys.exit('bad option')": "ended with exit code 1 at its start: bad option",
    "os.abort()": "died of signal 6 at its start",
    "qmp.close(); time.sleep(60)": "QEMU ended, or sent no QMP greeting",
    "qmp.sendall(b'hello\\n'); time.sleep(60)": "QEMU ended, or sent no QMP greeting",
    "greet(6); obey()": "is version 6.2.0; 7.0 or newer is needed",
    "greet(); sys.exit(3)": "ended with exit code 3 at its start",
    "greet(); n = obey('cont'); say({'id': n, 'error': {'desc': 'no'}}); obey()": (
        "QEMU refused cont: no"
    ),
}


@pytest.mark.parametrize("behaviour", MISBEHAVIOUR)
async def test_a_qemu_that_does_not_start_says_why(make_fake: MakeFake, behaviour: str) -> None:
    board = make_fake(behaviour)
    async with open_processor(QemuPlatform(board)) as processor:
        with pytest.raises(PlatformError) as caught:
            await processor.boot(ECHO_M3)
        assert MISBEHAVIOUR[behaviour] in str(caught.value)


async def test_a_qemu_that_hangs_at_its_start_can_be_given_up(make_fake: MakeFake) -> None:
    async with open_processor(QemuPlatform(make_fake("time.sleep(60)"))) as processor:
        with trio.move_on_after(0.2) as scope:
            await processor.boot(ECHO_M3)
        assert scope.cancelled_caught


async def test_a_qemu_that_is_missing_is_named_with_its_package() -> None:
    board = replace(M3, program="qemu-system-none")
    async with open_processor(QemuPlatform(board)) as processor:
        with pytest.raises(PlatformError) as caught:
            await processor.boot(ECHO_M3)
    assert str(caught.value) == (
        "mps2-an385 (Cortex-M3) needs qemu-system-none, which is not installed: "
        "apt install qemu-system-arm"
    )


async def test_a_tether_that_cannot_run_its_program_says_so(tmp_path: Path) -> None:
    program = tmp_path / "no-qemu"
    program.write_text("#!/nonexistent\n")
    program.chmod(0o755)
    board = replace(M3, program=str(program))
    async with open_processor(QemuPlatform(board)) as processor:
        with pytest.raises(PlatformError, match=r"tether: cannot run \S*no-qemu: No such file"):
            await processor.boot(ECHO_M3)


STEPS = ["qmp_capabilities", "set-action", "cont"]


@pytest.mark.parametrize("step", STEPS)
async def test_a_qemu_that_hangs_at_a_step_of_its_start_can_be_given_up(
    make_fake: MakeFake, step: str
) -> None:
    board = make_fake(f"greet(); obey({step!r}); time.sleep(60)")
    async with open_processor(QemuPlatform(board)) as processor:
        with trio.move_on_after(0.3) as scope:
            await processor.boot(ECHO_M3)
        assert scope.cancelled_caught and processor.state is ProcessorState.OFFLINE


@pytest.mark.parametrize("step", ["stop", "human-monitor-command", "memsave"])
async def test_a_qemu_that_hangs_while_its_core_is_examined_is_killed(
    make_fake: MakeFake, step: str
) -> None:
    image = _image(STORE_42, base=0x2100_0000)
    image = replace(image, segments=(_segment(0x1000, b"private"), *image.segments))
    board = make_fake(f"greet(); obey({step!r}); time.sleep(60)")
    async with open_processor(QemuPlatform(board)) as processor:
        await processor.boot(image)
        assert processor.report_crash(CrashKind.WATCHDOG, "silent")
        with trio.fail_after(2), pytest.raises(CoreCrashedError, match="silent"):
            await processor.wait_exit()
        assert processor.map(da=0x1000, size=7) == b"\xff" * 7


EVENTS = {
    "'SHUTDOWN', data={'reason': 'guest-panic'}": "the core ended with exit code 9",
    "'SHUTDOWN', data={'reason': 'guest-shutdown'}": "the core ended with exit code 9",
    "'SHUTDOWN', data={'reason': 'guest-reset'}": "the core asked for a reset",
    "'SHUTDOWN', data={'reason': 'unheard-of'}": r"the core ended \(unheard-of\)",
    "'WATCHDOG', data=None": "the core's watchdog has expired",
    "'GUEST_PANICKED', data={}": "the core panicked",
}


@pytest.mark.parametrize("event", EVENTS)
async def test_what_qemu_tells_of_the_end(make_fake: MakeFake, event: str) -> None:
    board = make_fake(
        f"greet(); n = obey('cont'); say({{'id': n, 'return': {{}}}})\n"
        f"say(dict(event={event})); obey('quit'); sys.exit(9)"
    )
    async with open_processor(QemuPlatform(board)) as processor:
        await processor.boot(ECHO_M3)
        with trio.fail_after(2), pytest.raises(CoreDiedError, match=EVENTS[event]):
            await processor.wait_exit()


async def test_a_qemu_that_hangs_when_it_is_to_end_is_killed(make_fake: MakeFake) -> None:
    board = make_fake(
        "greet(); n = obey('cont'); say({'id': n, 'return': {}})\n"
        "say(dict(event='SHUTDOWN', data={'reason': 'guest-shutdown'})); obey('quit')\n"
        "time.sleep(60)"
    )
    async with open_processor(QemuPlatform(board)) as processor:
        await processor.boot(ECHO_M3)
        with trio.fail_after(2), pytest.raises(CoreCrashedError, match="does not answer, and is"):
            await processor.wait_exit()


async def test_a_qemu_that_aborts_is_not_taken_for_a_core_that_locked_up(
    make_fake: MakeFake,
) -> None:
    board = make_fake(
        "greet(); n = obey('cont'); say({'id': n, 'return': {}})\n"
        "os.write(2, b'gpio.c: Assertion failed\\n'); os.abort()"
    )
    async with open_processor(QemuPlatform(board)) as processor:
        await processor.boot(ECHO_M3)
        with pytest.raises(CoreCrashedError) as caught:
            await processor.wait_exit()
    assert str(caught.value) == "the core's QEMU died of SIGABRT: gpio.c: Assertion failed"


async def test_a_qemu_that_floods_its_sockets_does_not_stop_the_host(make_fake: MakeFake) -> None:
    board = make_fake(
        "greet(); n = obey('cont'); say({'id': n, 'return': {}})\n"
        "while True:\n"
        "    os.write(2, b'w' * 4096); qmp.sendall(b'{\"event\": \"X\"}\\n' * 99)"
    )
    async with open_processor(QemuPlatform(board)) as processor:
        await processor.boot(ECHO_M3)
        with trio.fail_after(2):
            for _ in range(20):
                await trio.sleep(0.005)
            await processor.stop()


async def test_a_qemu_that_stops_answering_is_killed(make_fake: MakeFake) -> None:
    board = make_fake("greet(); obey('stop'); time.sleep(60)")
    async with open_processor(QemuPlatform(board)) as processor:
        await processor.boot(ECHO_M3)
        assert processor.report_crash(CrashKind.WATCHDOG, "silent")
        with pytest.raises(CoreCrashedError, match="silent"):
            await processor.wait_exit()


async def test_a_suspend_that_is_given_up_lets_the_core_go_on(
    make_fake: MakeFake, tmp_path: Path
) -> None:
    board = make_fake(
        f"greet(); obey('stop'); obey('cont'); open({str(tmp_path / 'went-on')!r}, 'w'); obey()"
    )
    async with open_processor(QemuPlatform(board)) as processor:
        await processor.boot(ECHO_M3)
        with trio.move_on_after(0.05):
            await processor.suspend()
        while not (tmp_path / "went-on").exists():
            await trio.lowlevel.checkpoint()
        await processor.stop()


def test_the_tail_of_an_endless_text() -> None:
    tail = Tail(4)
    tail.add(b"abc")
    tail.add(b"def\xff")
    assert tail.text == "def\\xff"
    nothing = Tail(0)
    nothing.add(b"abc")
    assert nothing.text == ""


@pytest.mark.parametrize("line", [-1, 1024])
def test_an_interrupt_that_no_board_has_is_refused(line: int) -> None:
    with pytest.raises(ValueError, match=f"interrupt {line}; 0 to 1023 are possible"):
        QemuPlatform(M3, kick_interrupt=line)


# QEMU as it is


needs_arm = pytest.mark.skipif(
    not any(Path(p, "qemu-system-arm").exists() for p in os.get_exec_path()),
    reason="needs qemu-system-arm (Debian package qemu-system-arm)",
)


@needs_arm
async def test_suspended_it_answers_nothing_and_then_all() -> None:
    async with _open(QemuPlatform(M3)) as (session, endpoint):
        assert session.processor is not None
        await session.processor.suspend()
        await endpoint.send(b"waits")
        with trio.move_on_after(0.1) as scope:
            await endpoint.receive()
        assert scope.cancelled_caught
        await session.processor.resume()
        assert (await endpoint.receive()).payload == b"waits"


@needs_arm
async def test_a_reset_is_a_reset_and_a_crash_a_crash() -> None:
    async with _open(QemuPlatform(M3)) as (_, endpoint):
        assert isinstance(await _end(endpoint, RESET), CoreResetError)
    async with _open(QemuPlatform(M3)) as (session, endpoint):
        error = await _end(endpoint, CRASH)
        assert isinstance(error, CoreCrashedError)
        assert error.address == 0xDEAD0000 and error.pc is not None
        assert error.registers["pc"] == error.pc
        assert session.processor is not None
        assert "crash on request" in session.processor.platform.console


@needs_arm
async def test_a_core_that_hangs_says_where_when_it_is_reported() -> None:
    async with _open(QemuPlatform(M3)) as (session, endpoint):
        assert session.processor is not None
        await endpoint.send(HANG)
        while "hang on request" not in session.processor.platform.console:
            await trio.lowlevel.checkpoint()
        assert session.processor.report_crash(CrashKind.WATCHDOG, "silent")
        with pytest.raises(CoreCrashedError, match=r"silent \(it was at pc 0x21000[0-9a-f]{3}\)"):
            await session.processor.wait_exit()


@needs_arm
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
async def test_a_qemu_that_is_killed_is_a_crash(number: signal.Signals) -> None:
    async with _open(QemuPlatform(M3)) as (session, endpoint):
        assert session.processor is not None and session.processor.core is not None
        os.kill(_pid(session), number)
        error = await _end(endpoint)
        assert isinstance(error, CoreCrashedError)
        expected = "told to end by a signal" if number is signal.SIGTERM else number.name
        assert expected in str(error)


@needs_arm
async def test_a_qemu_that_was_stopped_says_where_when_it_is_reported() -> None:
    async with _open(QemuPlatform(M3)) as (session, endpoint):
        assert session.processor is not None and session.processor.core is not None
        os.kill(_pid(session), signal.SIGSTOP)
        await endpoint.send(b"nobody hears this")
        assert session.processor.report_crash(CrashKind.WATCHDOG, "silent")
        with pytest.raises(CoreCrashedError, match="it was at pc"):
            await session.processor.wait_exit()


@needs_arm
async def test_a_full_doorbell_never_blocks_the_host() -> None:
    async with _open(QemuPlatform(M3)) as (session, endpoint):
        assert session.processor is not None and session.processor.core is not None
        await session.processor.suspend()
        for _ in range(200_000):
            session.processor.core.kick(1)
        await session.processor.resume()
        await endpoint.send(b"still there")
        assert (await endpoint.receive()).payload == b"still there"


HOST = """
import sys, trio
from openamp_py import QemuPlatform, open_session

async def main():
    async with open_session(QemuPlatform("mps2-an385", spare=True), sys.argv[1]) as session:
        print(session.processor.core.pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@needs_arm
def test_no_qemu_outlives_a_host_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOST, str(ECHO_M3)], stdout=subprocess.PIPE, text=True
    ) as host:
        try:
            assert host.stdout is not None
            pid = int(host.stdout.readline())
            while len(children := set(_children_of(host.pid))) < 2:  # the spare, too
                time.sleep(0.001)
            assert pid in children and len(children) == 2
        finally:
            host.kill()
    while any(_is_running(child) for child in children):
        time.sleep(0.001)


def _children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


@needs_arm
async def test_a_spare_starts_what_was_loaded_last() -> None:
    platform = QemuPlatform(M3, spare=True)
    async with _open(platform) as (session, _):
        assert session.processor is not None
        for _ in range(5):
            spare: set[int] = set()
            while not spare:
                await trio.sleep(0.001)
                spare = {*_children_of(os.getpid())} - {_pid(session)}
            await session.restart()
            assert spare == {_pid(session)}
            async with session.bus.open_endpoint(ECHO_CHANNEL) as again:
                await again.send(b"again")
                assert (await again.receive()).payload == b"again"


# Vector table, then: r0 = our word's place, count down from there; see each test.
def _image(code: bytes, *, base: int, stack: int = 0x2100_8000) -> Firmware:
    """A Cortex-M image: a vector table whose faults go to an endless loop, and code."""
    entry = base + 64 + 4
    vectors = struct.pack("<II14I", stack, entry | 1, *[(base + 64) | 1] * 14)
    loop = b"\xfe\xe7\x00\xbf"  # b . ; nop
    data = vectors + loop + code
    return Firmware(machine=40, elf_class=32, entry=entry | 1, segments=(_segment(base, data),))


def _segment(da: int, data: bytes) -> Segment:
    return Segment(da, data, len(data), flags=7)


# movw r0, #0x1000; movt r0, #0x2100; movs r1, #42; str r1, [r0]; wfi; b (to the wfi)
STORE_42 = bytes.fromhex("41f20000 c2f20010 2a21 0160 30bf fde7".replace(" ", ""))


@needs_arm
async def test_code_outside_of_the_shared_ram_is_loaded_through_qemu() -> None:
    platform = QemuPlatform(M3)
    async with open_processor(platform) as processor:
        await processor.boot(_image(STORE_42, base=0))
        word = processor.map(da=0x2100_1000, size=4)
        while bytes(word) != b"\x2a\0\0\0":
            await trio.lowlevel.checkpoint()
        assert processor.report_crash(CrashKind.WATCHDOG, "enough")
        with pytest.raises(CoreCrashedError):
            await processor.wait_exit()
        dump = await processor.coredump()
        assert bytes(dump.segments[0].data) == _image(STORE_42, base=0).segments[0].data


@needs_arm
async def test_a_lock_up_is_a_crash_with_registers() -> None:
    async with open_processor(QemuPlatform(M3)) as processor:
        image = _image(b"\x00\xde\x00\xde", base=0x2100_0000)  # udf
        data = bytearray(image.segments[0].data)
        data[12:16] = struct.pack("<I", 0xF000_0001)  # HardFault: nothing is there
        image = replace(image, segments=(_segment(0x2100_0000, bytes(data)),))
        await processor.boot(image)
        with pytest.raises(CoreCrashedError, match="the core locked up") as caught:
            await processor.wait_exit()
        assert "sp" in caught.value.registers


@needs_arm
@pytest.mark.parametrize("code", [0, 3])
async def test_a_halt_byte_is_the_exit_code(code: int) -> None:
    # UART1 at 0x40005000: CTRL = TX enable, DATA = 0xF0 + code; b .
    store = bytes.fromhex("45f20000c4f200000121 8160".replace(" ", ""))
    send = struct.pack("<H", 0x2100 | (0xF0 + code)) + bytes.fromhex("0160fee7")
    async with open_processor(QemuPlatform(M3)) as processor:
        await processor.boot(_image(store + send, base=0x2100_0000))
        if code == 0:
            await processor.wait_exit()
        else:
            with pytest.raises(CoreDiedError, match="exit code 3") as caught:
                await processor.wait_exit()
            assert caught.value.exit_code == 3
