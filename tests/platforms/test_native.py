"""The native core: real machine code that crashes, hangs, resets and is the wrong kind."""

from __future__ import annotations

import os
import platform
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from openamp_py import (
    ECHO_CHANNEL,
    CoreCrashedError,
    CoreDiedError,
    CoreResetError,
    Firmware,
    ImageError,
    NativePlatform,
    PlatformError,
    ProcessorState,
    StateError,
    open_processor,
    open_session,
)
from openamp_py.platforms.native import RAM_DA, RAM_SIZE, NativeCore, shipped_echo
from openamp_py.remoteproc import Segment

# csrc/firmware/echo_protocol.h
CRASH, HANG, RESET = (struct.pack("<I", 0xEF56A500 + n) for n in (1, 2, 3))
CRASH_ADDRESS = 0xDEAD_0000
LIMIT = 30.0


async def _send_and_break(order: bytes) -> BaseException | None:
    """Sends an order to the echo firmware, waits for the link to break, and returns why."""
    with trio.fail_after(LIMIT):
        async with (
            open_session("native") as session,
            session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
        ):
            await endpoint.send(order)
            with pytest.raises(trio.BrokenResourceError) as caught:
                await endpoint.receive()
            assert session.processor is not None
            assert session.processor.state is ProcessorState.CRASHED
            assert session.processor.failure is caught.value.__cause__
            return caught.value.__cause__


async def test_a_crash_is_an_error_with_signal_and_address() -> None:
    error = await _send_and_break(CRASH)
    assert isinstance(error, CoreCrashedError)
    assert (error.signal, error.address) == (signal.SIGSEGV, CRASH_ADDRESS)
    assert error.pc is not None and RAM_DA <= error.pc < RAM_DA + (1 << 16)
    assert "died of SIGSEGV at address 0xdead0000" in str(error)


async def test_a_crash_tells_the_registers() -> None:
    error = await _send_and_break(CRASH)
    assert isinstance(error, CoreCrashedError)
    pc, stack, argument = {
        "x86_64": ("rip", "rsp", "rdi"),
        "aarch64": ("pc", "sp", "x0"),
    }[platform.machine()]
    assert error.registers[pc] == error.pc
    assert error.registers[argument] == CRASH_ADDRESS
    assert RAM_DA <= error.registers[stack] < RAM_DA + RAM_SIZE, "the stack is in the dump too"


async def test_a_hung_core_that_is_interrupted_tells_where_it_hangs() -> None:
    with trio.fail_after(LIMIT):
        async with (
            open_session("native") as session,
            session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
        ):
            processor = session.processor
            assert processor is not None and isinstance(processor.core, NativeCore)
            assert processor.core.pid is not None
            await endpoint.send(HANG)
            before = _cpu_ticks(str(processor.core.pid))
            while _cpu_ticks(str(processor.core.pid)) < before + 3:  # so it spins
                await trio.lowlevel.checkpoint()
            os.kill(processor.core.pid, signal.SIGABRT)
            with pytest.raises(trio.BrokenResourceError) as caught:
                await endpoint.receive()
    error = caught.value.__cause__
    assert isinstance(error, CoreCrashedError)
    assert error.pc is not None and RAM_DA <= error.pc < RAM_DA + (1 << 16)
    assert str(error) == f"the core died of SIGABRT: interrupted at pc {error.pc:#x}"
    assert (error.signal, error.address) == (signal.SIGABRT, None)


async def test_a_reset_is_an_error_of_its_own() -> None:
    assert isinstance(await _send_and_break(RESET), CoreResetError)


async def test_a_hung_core_can_be_shut_down() -> None:
    with trio.fail_after(LIMIT):
        async with (
            open_session("native") as session,
            session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
        ):
            await endpoint.send(HANG)
            await endpoint.send(b"anybody?")
            with trio.move_on_after(0.05) as scope:
                await endpoint.receive()
            assert scope.cancelled_caught
            shutdown = await session.shutdown(endpoint, grace=0.05)
            assert not shutdown.graceful


async def test_nothing_runs_while_nobody_talks() -> None:
    async with (
        open_session("native") as session,
        session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.wait_bound()
        (task,) = Path("/proc/self/task").glob(f"{os.getpid()}/children")
        (child,) = task.read_text().split()
        before = _cpu_ticks(child)
        with trio.move_on_after(0.3):
            await endpoint.receive()
        assert _cpu_ticks(child) <= before + 1, "a core that spins would use 30"


def _cpu_ticks(pid: str) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])  # utime, stime


PARENT = """
import os, signal, struct, sys, trio, openamp_py

async def main():
    async with openamp_py.open_session("native") as session:
        async with session.bus.open_endpoint(openamp_py.ECHO_CHANNEL) as endpoint:
            await endpoint.wait_bound()
            if sys.argv[1] == "hang":
                await endpoint.send(struct.pack("<I", 0xEF56A502))
                await trio.sleep(0.05)
            with open(f"/proc/self/task/{os.getpid()}/children") as children:
                print(children.read(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

trio.run(main)
"""


@pytest.mark.parametrize("how", ["idle", "hang"])
def test_killing_the_parent_leaves_no_core_behind(how: str) -> None:
    parent = subprocess.run(
        [sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE, timeout=LIMIT, check=False
    )
    assert parent.returncode == -signal.SIGKILL
    (pid,) = parent.stdout.split()
    deadline = time.monotonic() + LIMIT
    while _is_running(int(pid)):
        assert time.monotonic() < deadline, "the core outlived its parent"


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# Images that are not for it


async def test_refuses_what_it_cannot_run_and_stays_as_it_was(tmp_path: Path) -> None:
    image = shipped_echo().read_bytes()
    wrong_machine = bytearray(image)
    wrong_machine[18:20] = struct.pack("<H", 243)
    wrong_entry = bytearray(image)
    wrong_entry[24:32] = struct.pack("<Q", 0x1000)
    cases: list[tuple[bytes, str]] = [
        (b"", "ELF"),
        (b"#!/bin/sh\n" * 10, "ELF"),
        (image[:-1000], "truncated|beyond the file"),
        (image[:100], "beyond|truncated"),
        (bytes(wrong_machine), "the image is for RISC-V"),
        (bytes(wrong_entry), "entry point 0x1000 lies outside"),
    ]
    async with open_processor(NativePlatform()) as processor:
        await processor.configure()
        for data, message in cases:
            with pytest.raises(ImageError, match=message):
                await processor.load(data)
            assert processor.state is ProcessorState.CONFIGURED
        await processor.load(image)
        await processor.start()
        assert processor.state is ProcessorState.RUNNING
        assert processor.table is not None
        assert [c.name for c in processor.table.carveouts] == ["vdev0buffer"]


async def test_firmware_outside_its_ram_is_refused() -> None:
    async with open_processor(NativePlatform(ram_da=0x3000_0000)) as processor:
        with pytest.raises(ImageError, match="outside"):
            await processor.boot(shipped_echo())
        assert processor.state is ProcessorState.OFFLINE


def _machine() -> int:
    return {"x86_64": 62, "aarch64": 183}[platform.machine()]


async def test_firmware_without_a_table_boots_and_says_why_there_is_no_rpmsg() -> None:
    code = {62: b"\xeb\xfe", 183: bytes.fromhex("00000014")}[_machine()]  # jump to itself
    segment = Segment(RAM_DA, code, len(code), 5)
    firmware = Firmware(64, _machine(), "this machine", RAM_DA, (segment,))
    async with open_processor(NativePlatform()) as processor:
        await processor.boot(firmware)
        assert processor.state is ProcessorState.RUNNING
        with pytest.raises(StateError, match=r"no resource table \(section .resource_table\)"):
            processor.rpmsg_device()


async def test_code_that_is_no_code_is_a_crash() -> None:
    code = {62: b"\x0f\x0b", 183: bytes(4)}[_machine()]  # undefined instructions
    firmware = Firmware(
        64, _machine(), "this machine", RAM_DA, (Segment(RAM_DA, code, len(code), 5),)
    )
    with trio.fail_after(LIMIT):
        async with open_processor(NativePlatform()) as processor:
            await processor.boot(firmware)
            with pytest.raises(CoreCrashedError, match="SIGILL at address 0x20000000"):
                await processor.wait_exit()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the machine code is x86-64's")
async def test_firmware_that_asks_the_operating_system_for_something_is_stopped() -> None:
    code = bytes.fromhex("b839000000 0f05 ebfe")  # fork()
    firmware = Firmware(64, 62, "x86-64", RAM_DA, (Segment(RAM_DA, code, len(code), 5),))
    with trio.fail_after(LIMIT):
        async with open_processor(NativePlatform()) as processor:
            await processor.boot(firmware)
            with pytest.raises(CoreDiedError, match="SIGSYS system call 57 is not allowed"):
                await processor.wait_exit()


async def test_a_missing_core_program_is_a_platform_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Path:
        return Path("/nonexistent") / name

    monkeypatch.setattr("openamp_py.platforms.native.shipped.path", missing)
    async with open_processor(NativePlatform()) as processor:
        await processor.configure()
        await processor.load(Path(__file__).parents[2] / "openamp_py/firmware/echo-native.elf")
        with pytest.raises(PlatformError, match="cannot run /nonexistent/native-core"):
            await processor.start()
        assert processor.state is ProcessorState.READY
