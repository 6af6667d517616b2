"""Emulated cores in trouble: firmware and QEMUs that do their worst, hosts that give up."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import qemu_images as images
import trio
from qemu_images import boards, needs

from openamp_py import (
    ECHO_CHANNEL,
    CoreCrashedError,
    CoreDiedError,
    CoreResetError,
    CrashKind,
    CrashLoopError,
    CrashPolicy,
    ImageError,
    PlatformError,
    ProcessorState,
    QemuPlatform,
    RemoteProcessor,
    ResourceTable,
    StateError,
    VirtqueueError,
    firmware,
    open_bus,
    open_processor,
    open_session,
)
from openamp_py.platforms.boards import BOARDS
from openamp_py.remoteproc.elf import Firmware
from openamp_py.remoteproc.images import with_table
from openamp_py.remoteproc.resource_table import Vdev, Vring

M3 = "mps2-an385"
CRASH, HANG, RESET = (bytes((number, 0xA5, 0x56, 0xEF)) for number in range(1, 4))

ECHO_M3 = firmware.path("echo-cortex-m3.elf")

needs_arm = needs(M3)
needs_gdb = pytest.mark.skipif(
    shutil.which("gdb-multiarch") is None,
    reason="needs gdb-multiarch (Debian package gdb-multiarch)",
)

TABLE_DA, RINGS_DA = 0x2101_0000, 0x2101_1000


def _with_rings(image: Firmware, *notify_ids: int) -> Firmware:
    """The image with a table: one RPMsg device, whose rings are behind the code."""
    first, second = notify_ids or (1, 2)
    vrings = (Vring(RINGS_DA, 0x1000, 16, first), Vring(RINGS_DA + 0x2000, 0x1000, 16, second))
    return with_table(image, ResourceTable((Vdev(7, 0, 1, vrings=vrings),)), TABLE_DA)


async def _crash_of(processor: RemoteProcessor) -> CoreDiedError:
    """How a core ended that did not end well."""
    with trio.fail_after(5), pytest.raises(CoreDiedError) as caught:
        await processor.wait_exit()
    return caught.value


async def _until(true: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while not true():
            await trio.sleep(0.001)


# Kicks by interrupt


@pytest.mark.parametrize(
    ("board", "line"),
    [
        pytest.param(board, line, marks=needs(board))
        for board, line in (
            *((M3, 20), ("mps2-an500", 31), ("mps2-an511", 40), ("mps2-an505", 40)),
            *(("mps3-an547", 100), ("virt-rv32", 40), ("virt-rv64", 40)),
        )
    ],
)
async def test_each_kick_is_an_interrupt(board: str, line: int) -> None:
    image, count = images.mailbox(BOARDS[board], line)
    async with open_processor(QemuPlatform(board, kick_interrupt=line)) as processor:
        await processor.boot(image)
        counted = processor.map(da=count, size=4)
        assert processor.core is not None
        # A kick before the core listens is kept for it.
        for number in range(1, 6):
            processor.core.kick(0)
            await _until(lambda wanted=number: counted[0] == wanted)  # type: ignore[misc]


@needs_arm
async def test_a_host_that_floods_with_interrupts_is_not_blocked() -> None:
    image, count = images.mailbox(BOARDS[M3], 20)
    async with open_processor(QemuPlatform(M3, kick_interrupt=20)) as processor:
        await processor.boot(image)
        assert processor.core is not None
        await processor.suspend()
        for _ in range(20_000):
            processor.core.kick(0)
        await processor.resume()
        before = processor.map(da=count, size=4).tobytes()
        processor.core.kick(0)
        await _until(lambda: processor.map(da=count, size=4).tobytes() != before)
        assert processor.state is ProcessorState.RUNNING


@pytest.mark.parametrize(
    ("board", "line", "highest"),
    [
        pytest.param(M3, 32, 31, marks=needs(M3)),
        pytest.param("virt-rv32", 1023, 95, marks=needs("virt-rv32")),
    ],
)
async def test_an_interrupt_that_the_board_has_not_is_refused(
    board: str, line: int, highest: int
) -> None:
    image, _ = images.mailbox(BOARDS[board], 20 if board == M3 else 40)
    async with open_processor(QemuPlatform(board, kick_interrupt=line)) as processor:
        with pytest.raises(
            PlatformError, match=f"{board} has interrupts 0 to {highest}; {line} was asked for"
        ):
            await processor.boot(image)


# Firmware that ends itself


@pytest.mark.parametrize("board", boards("virt-rv32", "virt-rv64"))
@pytest.mark.parametrize(("word", "code"), [(0x5555, 0), (0x7_3333, 7), (0xFF_3333, 255)])
async def test_riscv_firmware_switches_itself_off(board: str, word: int, code: int) -> None:
    image = images.riscv(images.riscv_end(word), BOARDS[board].elf_class)
    async with open_processor(QemuPlatform(board)) as processor:
        await processor.boot(image)
        if code == 0:
            with trio.fail_after(5):
                await processor.wait_exit()
            assert processor.state is ProcessorState.STOPPED
        else:
            assert (await _crash_of(processor)).exit_code == code


@pytest.mark.parametrize("board", boards("virt-arm", "virt-aarch64"))
async def test_arm_firmware_switches_itself_off_or_resets(board: str) -> None:
    for call in (images.PSCI_OFF, images.PSCI_RESET):
        async with open_processor(QemuPlatform(board)) as processor:
            await processor.boot(images.psci(BOARDS[board], call))
            if call == images.PSCI_OFF:
                with trio.fail_after(5):
                    await processor.wait_exit()
            else:
                assert isinstance(await _crash_of(processor), CoreResetError)


@pytest.mark.parametrize("board", boards(M3, "virt-rv32"))
async def test_firmware_that_resets_at_once_is_given_up(board: str) -> None:
    image = images.cortex_m(images.RESET) if board == M3 else images.riscv(images.riscv_end(0x7777))
    policy = CrashPolicy(recovery=True, limit=4)
    async with open_processor(QemuPlatform(board, spare=True), policy=policy) as processor:
        await processor.boot(image)
        await _until(lambda: isinstance(processor.failure, CrashLoopError))
        assert processor.crashes == 4 and processor.state is ProcessorState.CRASHED


@needs_arm
async def test_each_halt_byte_is_its_exit_code() -> None:
    for code in range(16):
        async with open_processor(QemuPlatform(M3)) as processor:
            await processor.boot(images.cortex_m(images.send_once(images.DOORBELL, 0xF0 + code)))
            if code == 0:
                with trio.fail_after(5):
                    await processor.wait_exit()
            else:
                assert (await _crash_of(processor)).exit_code == code


@needs_arm
async def test_a_byte_is_no_order_to_switch_off_where_it_is_a_notify_id() -> None:
    image = images.cortex_m(images.send_for_ever(images.DOORBELL, 0xF3))
    async with open_processor(QemuPlatform(M3)) as processor:
        await processor.boot(_with_rings(image, 0xF2, 0xF3))
        await trio.sleep(0.2)
        assert processor.state is ProcessorState.RUNNING


@needs_arm
async def test_the_watchdog_of_the_board_is_heard() -> None:
    # CMSDK watchdog: LOAD = 200; CTRL = interrupt, then reset
    code = images.load(0, 0x4000_8000) + images.thumb("c821 0160 0321 8160") + images.HANG
    async with open_processor(QemuPlatform(M3)) as processor:
        await processor.boot(images.cortex_m(code))
        error = await _crash_of(processor)
        assert isinstance(error, CoreCrashedError) and error.kind is CrashKind.WATCHDOG
        assert "the core's watchdog has expired" in str(error)


@needs_arm
async def test_an_image_without_a_vector_table_is_told_so() -> None:
    image = images.cortex_m(images.UNDEFINED)
    (segment,) = image.segments
    data = bytes(64) + bytes(segment.data[64:])
    image = replace(image, segments=(replace(segment, data=data),))
    async with open_processor(QemuPlatform(M3)) as processor:
        await processor.boot(image)
        error = await _crash_of(processor)
        assert "; no vector table was found in the image" in str(error)


@needs_arm
@pytest.mark.parametrize("stack", [0, 0xDEAD_BEEF])
async def test_a_fault_without_a_stack_is_a_lock_up(stack: int) -> None:
    image = images.cortex_m(images.UNDEFINED, stack=stack, vectors={3: 0xF000_0001})
    async with open_processor(QemuPlatform(M3)) as processor:
        await processor.boot(image)
        error = await _crash_of(processor)
        assert "the core locked up: Lockup: can't escalate" in str(error)
        assert isinstance(error, CoreCrashedError) and error.registers


@needs_arm
@pytest.mark.parametrize(
    "garbage",
    [b"\0" * 64, b"\xff" * 64, bytes(range(64))],
    ids=["zeros", "ones", "numbers"],
)
async def test_garbage_for_a_vector_table_ends_in_bounds(garbage: bytes) -> None:
    image = images.cortex_m(images.HANG)
    data = bytes(image.segments[0].data)
    image = replace(image, segments=(images.segment(0x2100_0000, garbage + data[64:]),))
    async with open_processor(QemuPlatform(M3)) as processor:
        try:
            await processor.boot(image)
        except PlatformError:  # QEMU may have given it up by then
            return
        with trio.move_on_after(0.2):
            await _crash_of(processor)
        processor.report_crash(CrashKind.WATCHDOG, "silent")
        assert isinstance(await _crash_of(processor), CoreCrashedError)


# Floods


@pytest.mark.parametrize("board", boards(M3, "virt-rv32", "virt-rv64"))
async def test_a_doorbell_that_floods_leaves_the_host_at_work(board: str) -> None:
    image = (
        images.cortex_m(images.send_for_ever(images.DOORBELL, 1))
        if board == M3
        else images.riscv(images.RISCV_FLOOD, BOARDS[board].elf_class)
    )
    async with open_processor(QemuPlatform(board)) as processor:
        await processor.boot(image)
        with trio.fail_after(5):
            for _ in range(3):
                await trio.sleep(0.02)
                await processor.suspend()
                await processor.resume()
            assert processor.report_crash(CrashKind.WATCHDOG, "babbles")
        assert "babbles (it was at pc" in str(await _crash_of(processor))


@needs_arm
async def test_a_doorbell_that_floods_beside_rings() -> None:
    image = _with_rings(images.cortex_m(images.send_for_ever(images.DOORBELL, 1)))
    async with open_processor(QemuPlatform(M3)) as processor:
        await processor.boot(image)
        async with (
            open_bus(processor.rpmsg_device()) as bus,
            bus.open_endpoint(destination=1024) as endpoint,
        ):
            sent = 0
            with trio.move_on_after(0.2) as scope:
                while True:
                    await endpoint.send(b"nobody takes this")
                    sent += 1
            assert scope.cancelled_caught and sent == 16
            with trio.fail_after(5):
                await processor.stop()


@needs_arm
async def test_a_console_that_floods_is_kept_in_bounds() -> None:
    image = images.cortex_m(images.send_for_ever(images.CONSOLE, ord("A")))
    async with open_processor(QemuPlatform(M3)) as processor:
        await processor.boot(image)
        await _until(lambda: len(processor.platform.console) == 1 << 16)
        await trio.sleep(0.05)
        assert processor.platform.console == "A" * (1 << 16)
        with trio.fail_after(5):
            await processor.stop()


@needs_arm
async def test_firmware_that_overwrites_everything_breaks_the_rings_and_no_more() -> None:
    base = BOARDS[M3].window.da
    start, end = base + 0x9000, base + BOARDS[M3].window.size
    image = _with_rings(images.cortex_m(images.fill_when_told(start, end, 0xA5A5_A5A5)))
    async with open_processor(QemuPlatform(M3)) as processor:
        await processor.boot(image)
        async with (
            open_bus(processor.rpmsg_device()) as bus,
            bus.open_endpoint(destination=1024) as endpoint,
        ):
            await endpoint.send(b"before")
            processor.map(da=start, size=4)[:] = b"\1\0\0\0"
            await _until(lambda: processor.map(da=end - 4, size=4) == b"\xa5" * 4)
            processor.get_notification()
            with trio.fail_after(5), pytest.raises(trio.BrokenResourceError) as caught:
                await endpoint.receive()
            assert isinstance(caught.value.__cause__, VirtqueueError)


# Images


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (images.riscv(images.RISCV_FLOOD), "RISC-V"),
        (Firmware(), "entry point 0x0 lies in none"),
        (replace(images.cortex_m(images.HANG), entry=0x5000_0001), "0x50000001 lies in none"),
        (images.cortex_m(images.HANG, base=0x4000_0000), "0x40000000"),
        (images.cortex_m(images.HANG, base=0x21FF_FF00), "0x21ffff00"),
    ],
    ids=["machine", "empty", "entry", "segment", "over-the-end"],
)
async def test_an_image_that_does_not_fit_is_refused_before_anything_starts(
    image: Firmware, said: str
) -> None:
    async with open_processor(QemuPlatform(M3)) as processor:
        with pytest.raises(ImageError, match=said):
            await processor.boot(image)
        assert processor.core is None


# RAM that is not shared


@pytest.mark.parametrize(
    ("board", "da"),
    [
        pytest.param(board, da, marks=needs(board))
        for board, da in (
            *(("mps2-an505", 0x1000_0000), ("mps2-an505", 0x2000_0000), (M3, 0x2000_0000)),
            *(("mps3-an524", 0x3000_0000), ("mps3-an547", 0x1000_0000)),
        )
    ],
)
async def test_a_dump_has_what_private_ram_holds(board: str, da: int) -> None:
    """What TrustZone shows at two addresses is in no address space but the core's own."""
    base = BOARDS[board].window.da
    # str r1, [r0]
    code = images.load(0, da + 4) + images.load(1, 0x2143_6587) + images.thumb("0160 fee7")
    image = images.add(images.cortex_m(code, base=base), images.segment(da, b"LOADED: IT IS"))
    async with open_processor(QemuPlatform(board)) as processor:
        await processor.boot(image)
        held = processor.map(da=da, size=13)
        await trio.sleep(0.1)
        assert processor.report_crash(CrashKind.WATCHDOG, "enough")
        await _crash_of(processor)
        assert held.tobytes() == b"LOAD\x87\x65\x43\x21IT IS"


@needs_arm
async def test_what_private_ram_holds_after_a_halt_and_after_a_death() -> None:
    da = 0x2000_0000
    write = images.load(0, da) + images.load(1, 0x2143_6587) + images.thumb("0160")
    for ending in ("halt", "kill"):
        end = images.send_once(images.DOORBELL, 0xF3) if ending == "halt" else images.HANG
        image = images.add(images.cortex_m(write + end), images.segment(da, b"LOADED"))
        async with open_processor(QemuPlatform(M3)) as processor:
            await processor.boot(image)
            if ending == "kill":
                os.kill(_pid(processor), signal.SIGKILL)
            await _crash_of(processor)
            expected = b"\x87\x65\x43\x21ED" if ending == "halt" else b"\xff" * 6
            assert processor.map(da=da, size=6) == expected


def _pid(processor: RemoteProcessor) -> int:
    pid = getattr(processor.core, "pid", None)
    assert isinstance(pid, int)
    return pid


# Each board with its echo


ECHOES = {
    M3: "cortex-m3",
    "mps2-an500": "mps2-an500",
    "mps2-an505": "mps2-an505",
    "mps2-an521": "mps2-an505",
    "mps3-an524": "mps3-an524",
    "mps3-an547": "mps3-an547",
    "virt-rv32": "rv32",
    "virt-rv64": "rv64",
}


@pytest.mark.parametrize("board", boards(*ECHOES))
async def test_crash_hang_and_reset_on_each_board(board: str) -> None:
    image = firmware.path(f"echo-{ECHOES[board]}.elf")
    for order in (CRASH, HANG, RESET):
        async with (
            open_session(QemuPlatform(board), image) as session,
            session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
        ):
            assert session.processor is not None
            with trio.fail_after(10):
                await endpoint.send(order)
                if order == HANG:
                    await trio.sleep(0.05)
                    assert session.processor.report_crash(CrashKind.WATCHDOG, "silent")
                error = await _crash_of(session.processor)
            if order == RESET:
                assert isinstance(error, CoreResetError)
            else:
                assert isinstance(error, CoreCrashedError) and error.pc is not None
                assert error.address == (0xDEAD_0000 if order == CRASH else None)


# Suspended


@needs_arm
async def test_the_end_of_a_core_that_is_suspended() -> None:
    for ending in ("report", "kill", "stop", "shutdown", "stopped process"):
        async with open_processor(QemuPlatform(M3)) as processor:
            await processor.boot(ECHO_M3)
            await processor.suspend()
            with pytest.raises(StateError):
                await processor.suspend()
            if ending == "stopped process":
                os.kill(_pid(processor), signal.SIGSTOP)
            if ending in ("report", "stopped process"):
                assert processor.report_crash(CrashKind.WATCHDOG, "silent")
                assert "it was at pc 0x21" in str(await _crash_of(processor))
            elif ending == "kill":
                os.kill(_pid(processor), signal.SIGKILL)
                assert "SIGKILL" in str(await _crash_of(processor))
            else:
                with trio.fail_after(2):
                    await (processor.stop if ending == "stop" else processor.shutdown)()


@needs_arm
async def test_a_stopped_qemu_can_be_given_up_at_each_call() -> None:
    async with open_processor(QemuPlatform(M3)) as processor:
        await processor.boot(ECHO_M3)
        os.kill(_pid(processor), signal.SIGSTOP)
        with trio.move_on_after(0.05) as scope:
            await processor.suspend()
        assert scope.cancelled_caught
        os.kill(_pid(processor), signal.SIGCONT)
        await processor.suspend()
        os.kill(_pid(processor), signal.SIGSTOP)
        with trio.move_on_after(0.05) as scope:
            await processor.resume()
        assert scope.cancelled_caught and processor.is_up
        with trio.fail_after(2):
            await processor.stop()


@needs_arm
async def test_a_core_cannot_be_detached() -> None:
    async with open_processor(QemuPlatform(M3)) as processor:
        await processor.boot(ECHO_M3)
        with pytest.raises(PlatformError, match="mps2-an385 core cannot be left running"):
            await processor.detach()
        assert processor.state is ProcessorState.RUNNING


# A debugger


@needs_arm
@needs_gdb
@pytest.mark.parametrize("kind", ["port", "path"])
async def test_a_debugger_at_the_first_instruction(tmp_path: Path, kind: str) -> None:
    where = f"unix:{tmp_path / 'gdb'}" if kind == "path" else str(_free_port())
    target = str(tmp_path / "gdb") if kind == "path" else f"localhost:{where}"
    async with open_processor(QemuPlatform(M3, gdb=where)) as processor:
        for _ in range(2):  # the second debugger finds the second core
            await processor.boot(ECHO_M3)
            commands = (
                *(f"target remote {target}", "info registers pc", "break firmware_main"),
                *("continue", "info registers pc", "backtrace", "detach"),
            )
            with trio.fail_after(20):
                done = await trio.run_process(
                    [
                        *("gdb-multiarch", "-nx", "-batch"),
                        *(word for command in commands for word in ("-ex", command)),
                        str(ECHO_M3),
                    ],
                    capture_stdout=True,
                    capture_stderr=True,
                )
            assert b"firmware_entry ()" in done.stdout
            assert b"Breakpoint 1, " in done.stdout and b"firmware_main" in done.stdout
            await processor.shutdown()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@needs_arm
async def test_a_debugger_that_never_comes_can_be_given_up() -> None:
    platform = QemuPlatform(M3, gdb="0")
    with trio.fail_after(10):
        with trio.move_on_after(0.3) as scope:
            async with (
                open_session(platform, ECHO_M3) as session,
                session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
            ):
                await endpoint.wait_bound()
        assert scope.cancelled_caught


@needs_arm
async def test_a_place_for_a_debugger_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken, socket.socket(socket.AF_UNIX) as also:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        also.bind(str(tmp_path / "gdb"))
        places = {str(taken.getsockname()[1]): "choose", f"unix:{tmp_path / 'gdb'}": "remove"}
        for where, cure in places.items():
            async with open_processor(QemuPlatform(M3, gdb=where)) as processor:
                with pytest.raises(PlatformError, match=f"Address already in use; {cure}"):
                    await processor.boot(ECHO_M3)
        assert (tmp_path / "gdb").exists()


# A spare


@needs_arm
async def test_a_spare_that_cannot_be_used_is_replaced() -> None:
    async with open_processor(QemuPlatform(M3, spare=True)) as processor:
        await processor.boot(ECHO_M3)
        # It was killed meanwhile.
        await _until(lambda: len(_children()) == 2)
        spare = _children() - {_pid(processor)}
        dead = spare.pop()
        os.kill(dead, signal.SIGKILL)
        os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)  # it takes a moment to die
        await processor.shutdown()
        await processor.boot(ECHO_M3)
        # It was stopped: it is used.
        await _until(lambda: len(_children()) == 2)
        spare = _children() - {_pid(processor)}
        os.kill(next(iter(spare)), signal.SIGSTOP)
        await processor.shutdown()
        with trio.fail_after(5):
            await processor.boot(ECHO_M3)
        assert spare == {_pid(processor)}
        # The image is another: the table lies elsewhere.
        await processor.shutdown()
        image = images.cortex_m(images.send_once(images.DOORBELL, 0xF5), base=0x2180_0000)
        await processor.boot(image)
        assert (await _crash_of(processor)).exit_code == 5
        # What is loaded through QEMU is in no spare, and so none is kept.
        await processor.shutdown()
        held = images.add(images.cortex_m(images.HANG), images.segment(0x2000_0000, b"held"))
        await processor.boot(held)
        await processor.shutdown()
        await processor.boot(held)
        await trio.sleep(0.1)
        assert _children() == {_pid(processor)}


def _children() -> set[int]:
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}


# Giving up at any moment


class CancelLater(trio.abc.Instrument):
    """Cancels a scope after so many steps of any task."""

    def __init__(self, scope: trio.CancelScope, steps: int) -> None:
        self._scope = scope
        self._steps = steps

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._steps -= 1
        if self._steps == 0:
            self._scope.cancel()


async def _give_up_after(steps: int, *, spare: bool) -> bool:
    """Goes through a core's life, and gives up after so many steps. Returns whether it did."""
    async with open_processor(QemuPlatform(M3, spare=spare)) as processor:
        with trio.CancelScope() as scope:
            instrument = CancelLater(scope, steps)
            trio.lowlevel.add_instrument(instrument)
            try:
                await processor.boot(ECHO_M3)
                await processor.suspend()
                await processor.resume()
                await processor.stop()
            finally:
                trio.lowlevel.remove_instrument(instrument)
        with trio.fail_after(5):
            await processor.shutdown(force=True)
        assert processor.state is ProcessorState.OFFLINE
    assert not _children()
    return scope.cancelled_caught


@needs_arm
async def test_giving_up_at_any_moment_leaves_nothing() -> None:
    steps = 1
    while await _give_up_after(steps, spare=steps % 2 == 0):
        steps += 7
    assert steps > 30


@needs_arm
@pytest.mark.soak
@pytest.mark.parametrize("spare", [False, True])
async def test_giving_up_at_every_moment_leaves_nothing(spare: bool) -> None:
    steps = 1
    while await _give_up_after(steps, spare=spare):
        steps += 1
    print(f"{steps} steps")


# Many


@needs_arm
async def test_four_cores_at_once() -> None:
    async def work(number: int) -> None:
        async with (
            open_session(QemuPlatform(M3), ECHO_M3) as session,
            session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
        ):
            await barrier(number)
            for count in range(50):
                text = f"core {number}, message {count}".encode()
                await endpoint.send(text)
                assert (await endpoint.receive()).payload == text

    up: set[int] = set()
    all_up = trio.Event()

    async def barrier(number: int) -> None:
        up.add(number)
        if len(up) == 4:
            all_up.set()
        await all_up.wait()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(work, number)


@needs_arm
@pytest.mark.soak
async def test_fifty_crashes_in_a_row_cost_nothing() -> None:
    policy = CrashPolicy(recovery=True, limit=1000)
    figures = []
    async with (
        open_session(QemuPlatform(M3), ECHO_M3, policy=policy) as session,
        session.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
    ):
        processor = session.processor
        assert processor is not None
        for crash in range(50):
            with trio.fail_after(20):
                await endpoint.wait_bound()
                await endpoint.send(CRASH)
                await _until(lambda wanted=crash: processor.crashes > wanted)  # type: ignore[misc]
                await processor.wait_settled()
                await processor.wait_up()
                await session.wait_up()
            if crash in (9, 49):
                status = Path("/proc/self/status").read_text()
                memory = int(status.split("VmRSS:")[1].split()[0])
                figures.append((len(os.listdir("/proc/self/fd")), len(_children()), memory))
    print(f"after 10 and 50 crashes (descriptors, children, KiB): {figures}")
    (fds, children, memory), (fds_then, children_then, memory_then) = figures
    assert (fds, children) == (fds_then, children_then)
    assert memory_then < memory + 8192


# The surroundings

PING = """
import sys, trio
from openamp_py import ECHO_CHANNEL, QemuPlatform, open_session

async def main():
    platform = QemuPlatform("mps2-an385", spare=True)
    async with open_session(platform, sys.argv[1]) as session:
        async with session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
            await endpoint.send(b"unprivileged")
            print((await endpoint.receive()).payload.decode())

trio.run(main)
"""


@needs_arm
@pytest.mark.skipif(os.geteuid() != 0, reason="is for root: others run as themselves anyway")
def test_it_needs_no_privileges() -> None:
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    command += ["--bounding-set=-all", sys.executable, "-B"]
    try:
        subprocess.run([*command, "-c", "import openamp_py"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs setpriv (util-linux), and a Python that everybody may read")
    done = subprocess.run(
        [*command, "-c", PING, str(ECHO_M3)], check=True, capture_output=True, text=True
    )
    assert done.stdout == "unprivileged\n"


@pytest.mark.parametrize("board", boards(M3, "virt-rv32"))
async def test_an_idle_core_uses_no_processor(board: str) -> None:
    image = firmware.path("echo-cortex-m3.elf" if board == M3 else "echo-rv32.elf")
    async with (
        open_session(QemuPlatform(board), image) as session,
        session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.wait_bound()
        assert session.processor is not None
        theirs, ours = _cpu_time(_pid(session.processor)), time.process_time()
        await trio.sleep(1)
        theirs, ours = _cpu_time(_pid(session.processor)) - theirs, time.process_time() - ours
        print(f"{board} idle for 1 s: QEMU {theirs * 1e3:.0f} ms, we {ours * 1e3:.1f} ms")
        assert theirs < 0.5 and ours < 0.5


def _cpu_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@needs_arm
async def test_a_host_without_descriptors_says_so_and_loses_none() -> None:
    async with open_processor(QemuPlatform(M3, kick_interrupt=20, gdb="0")) as processor:
        held = images.add(images.cortex_m(images.HANG), images.segment(0x2000_0000, b"held"))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        fillers: list[int] = []
        refused = 0
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (400, limits[1]))
            with contextlib.suppress(OSError):
                while True:
                    fillers.append(os.open(os.devnull, os.O_RDONLY))
            while processor.state is not ProcessorState.RUNNING:
                try:
                    await processor.boot(held)
                except PlatformError as error:
                    assert "Too many open files" in str(error)
                    refused += 1
                    os.close(fillers.pop())
        finally:
            for filler in fillers:
                os.close(filler)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert refused > 10
