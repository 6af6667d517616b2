"""How fast each kind of core comes up and talks: native, another process, emulated boards.

What QEMU itself takes is measured in the same run: a QEMU with nothing but the board, from its
spawn to the first word that a program of three instructions writes into the shared RAM.

Cores run where the scheduler puts them, as a program's do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import struct
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import trio

from openamp_py import firmware as shipped
from openamp_py.background import plain_errors
from openamp_py.bench import CASES, PythonContender, patience
from openamp_py.bench_lifecycle import Figure, echo, open_echo
from openamp_py.choosing import CORES, QEMU, check_name
from openamp_py.constants import EM_ARM, EM_RISCV
from openamp_py.errors import PlatformError
from openamp_py.memory import SharedMemory
from openamp_py.platforms.boards import BOARDS, Board, boot_options, find_board
from openamp_py.platforms.child import create_memory, spawn
from openamp_py.platforms.machine import find_program
from openamp_py.platforms.qemu import QemuPlatform
from openamp_py.remoteproc import Firmware
from openamp_py.remoteproc.elf import Segment
from openamp_py.rpmsg import Endpoint

CORES_CASE: Final = "cores"
"""The case's name."""

SIZE: Final = 100
"""Bytes of payload."""

TOGETHER: Final = 4
"""Emulated cores at once."""

_BOARDS: Final = ("mps2-an385", "virt-rv32", "virt-rv64")

_MOST_OF_NATIVE = 3.0  # times native's start, beside QEMU's own
_MOST_PRE_LAUNCHED = 10.0  # ms
_MOST_IDLE = 1.0  # percent of a CPU

# A step that takes longer (seconds) for each of its repeats is taken to hang.
_SLOWEST = 5.0

# Until a QEMU that was launched for the next start has nothing more to do, and until a core that
# has echoed is idle (seconds): not a part of any figure.
_SETTLE = 0.3

# How often to look whether the first word is there (seconds): little beside what is measured.
_LOOK_EVERY = 0.0001

_WARM_UP = 32  # round trips


@dataclass(frozen=True, slots=True)
class _Run:
    """What the steps of one core share."""

    core: str
    repeat: int
    seconds: float

    def figure(
        self, step: str, unit: str, values: Iterable[float], limit: float | None = None
    ) -> Figure:
        return Figure(self.core, step, unit, tuple(values), limit)

    @property
    def board(self) -> Board:
        return find_board(self.core.removeprefix(f"{QEMU}:"))


def default_cores() -> tuple[str, ...]:
    """Native, process, and the boards of each instruction set whose QEMU is installed."""
    boards = [name for name in _BOARDS if shutil.which(BOARDS[name].program)]
    return ("native", "process", *(f"{QEMU}:{name}" for name in boards))


async def run_cores(
    *,
    cores: Iterable[str] | None = None,
    repeat: int = 5,
    seconds: float = 0.3,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Figure]:
    """Measures every step of each core.

    Args:
        cores: their names; by default `default_cores`. How fast QEMU comes up is judged by native:
            only where that is among them.
        repeat: how often each step is measured.
        seconds: time for each measurement of messages; an idle core is watched three times that.
        progress: called after each step with the number done and that of all.

    Raises:
        ValueError: no such core, or one that leaves a choice.
        OpenAMPError: a core could not be started, or did not echo.
        trio.BrokenResourceError: the same.
    """
    plan = [(core, step) for core in (cores or default_cores()) for step in _list_steps(core)]
    figures: list[Figure] = []
    for done, (core, step) in enumerate(plan, start=1):
        with patience((_SLOWEST + 4 * seconds) * (repeat + 1)):
            figures += await step(_Run(core, repeat, seconds))
        progress(done, len(plan))
    return judge_starts(figures)


def judge_starts(figures: Sequence[Figure]) -> list[Figure]:
    """The figures, with a limit for the first message of each emulated core.

    It is what QEMU takes itself and three times what the native core takes in all.
    """
    medians = {(figure.core, figure.step): figure.median for figure in figures}
    native = medians.get(("native", "first-message"))

    def judge(figure: Figure) -> Figure:
        own = medians.get((figure.core, "qemu-start"))
        if figure.step != "first-message" or native is None or own is None:
            return figure
        return replace(figure, limit=round(_MOST_OF_NATIVE * native + own, 1))

    return [judge(figure) for figure in figures]


_Step = Callable[[_Run], Awaitable[Sequence[Figure]]]


def _list_steps(core: str) -> Sequence[_Step]:
    check_name(core)
    if core in CORES:
        return (_measure_start, _measure_messages)
    if not core.startswith(f"{QEMU}:"):
        raise ValueError(f"core {core} is measured by its name: one of `openamp cores`")
    return (
        *(_measure_emulated_start, _measure_messages),
        *(_measure_spare, _measure_idle, _measure_together),
    )


# The steps


async def _measure_start(run: _Run) -> Sequence[Figure]:
    """From the opening of a session, whose process does not run yet, to its first echo."""
    taken = [await _start_core(run.core) for _ in range(run.repeat + 1)]
    return [run.figure("first-message", "ms", taken[1:])]


async def _measure_emulated_start(run: _Run) -> Sequence[Figure]:
    """The same, and QEMU alone in turns: what else the machine does slows both down."""
    own, taken = [], []
    for _ in range(run.repeat + 1):
        own.append(await _start_qemu(run.board))
        taken.append(await _start_core(run.core))
    return [
        run.figure("qemu-start", "ms", own[1:]),
        run.figure("first-message", "ms", taken[1:]),
    ]


async def _start_core(core: str) -> float:
    """Milliseconds to the first echo."""
    begin = time.perf_counter()
    async with open_echo(core):
        return 1e3 * (time.perf_counter() - begin)


async def _measure_messages(run: _Run) -> Sequence[Figure]:
    middle, late, rates = [], [], []
    async with open_echo(run.core) as (session, endpoint):
        await _round_trips(endpoint, 0.0)
        contender = PythonContender(session.bus, _address(endpoint), None)
        for _ in range(run.repeat):
            times = await _round_trips(endpoint, run.seconds)
            middle.append(statistics.median(times))
            late.append(percentile(times, 0.99))
            rates.append(await contender.measure(CASES["echo"], SIZE, 1, run.seconds))
    return [
        run.figure("round-trip", "us", middle),
        run.figure("round-trip-p99", "us", late),
        run.figure("flood", "/s", rates),
    ]


def _address(endpoint: Endpoint) -> int:
    assert endpoint.destination is not None, "bound"
    return endpoint.destination


async def _round_trips(endpoint: Endpoint, seconds: float) -> list[float]:
    """Microseconds of each, with one message out at a time; some at least."""
    payload = bytes(SIZE)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _WARM_UP or time.perf_counter() < end:
        begin = time.perf_counter()
        await echo(endpoint, payload)
        times.append(1e6 * (time.perf_counter() - begin))
    return times


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of all are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def _measure_spare(run: _Run) -> Sequence[Figure]:
    """A boot in a session, for which a QEMU was launched beforehand."""
    taken = []
    async with open_echo(QemuPlatform(run.board, spare=True)) as (session, endpoint):
        assert session.processor is not None, "it was booted here"
        for _ in range(run.repeat + 1):
            await trio.sleep(_SETTLE)
            await session.processor.shutdown()
            begin = time.perf_counter()
            await session.processor.boot()
            await echo(endpoint, b"again")
            taken.append(1e3 * (time.perf_counter() - begin))
    return [run.figure("pre-launched", "ms", taken[1:], _MOST_PRE_LAUNCHED)]


async def _measure_idle(run: _Run) -> Sequence[Figure]:
    """CPU time of QEMU, and of this program, while nobody says anything."""
    core, host = [], []
    watched = 3 * run.seconds
    async with open_echo(run.core) as (session, _):
        assert session.processor is not None, "it was booted here"
        pid = getattr(session.processor.core, "pid", None)
        assert isinstance(pid, int), "it was started"
        await trio.sleep(_SETTLE)
        for _ in range(run.repeat):
            begin, before, own = time.perf_counter(), cpu_seconds(pid), time.process_time()
            await trio.sleep(watched)
            taken = time.perf_counter() - begin
            host.append(100 * (time.process_time() - own) / taken)
            core.append(100 * (cpu_seconds(pid) - before) / taken)
    return [
        run.figure("idle-core", "%", core, _MOST_IDLE),
        run.figure("idle-host", "%", host, _MOST_IDLE),
    ]


def cpu_seconds(pid: int) -> float:
    """CPU time that the threads of a process have used, to the nanosecond.

    Threads that have ended are not in it: an emulator that is up keeps its own.
    """
    total = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            total += int(thread.read_text().split()[0])
    return total * 1e-9


async def _measure_together(run: _Run) -> Sequence[Figure]:
    """Several at once: until all have echoed, and what they echo together."""
    taken, rates = [], []
    for _ in range(run.repeat):
        together = _Together(time.perf_counter())
        with plain_errors():
            async with trio.open_nursery() as nursery:
                for _ in range(TOGETHER):
                    nursery.start_soon(_be_one_of_several, run, together)
        taken.append(1e3 * (together.all_up - together.begin))
        rates.append(together.rate)
    return [
        run.figure(f"{TOGETHER}-first-message", "ms", taken),
        run.figure(f"{TOGETHER}-flood", "/s", rates),
    ]


@dataclass(slots=True)
class _Together:
    """What cores that run at the same time have done."""

    begin: float
    up: int = 0
    all_up: float = 0.0
    rate: float = 0.0
    go: trio.Event = field(default_factory=trio.Event)


async def _be_one_of_several(run: _Run, together: _Together) -> None:
    async with open_echo(run.core) as (session, endpoint):
        together.up += 1
        if together.up == TOGETHER:
            together.all_up = time.perf_counter()
            together.go.set()
        await together.go.wait()
        contender = PythonContender(session.bus, _address(endpoint), None)
        together.rate += await contender.measure(CASES["echo"], SIZE, 1, run.seconds)


# QEMU itself

# Where the first word goes, behind the entry: that may be an instruction's literal pool.
_WORD = 16
_CODE = 0x40  # behind a vector table of two entries
# Each writes what is not 0 at `_WORD` behind its first byte, and stays there.
_THUMB = struct.pack("<3H", 0x4678, 0x60C0, 0xE7FE)  # mov r0, pc; str r0, [r0, #12]; b .
_ARM_A = struct.pack("<2I", 0xE58FF008, 0xEAFFFFFE)  # str pc, [pc, #8]; b .
_AARCH64 = struct.pack("<3I", 0x10000000, 0xB9001000, 0x14000000)  # adr x0, .; str w0, [x0, #16]
_RISCV = struct.pack("<3I", 0x00000297, 0x0052A823, 0x0000006F)  # auipc t0, 0; sw t0, 16(t0); j .


def create_first_word(board: Board) -> tuple[Firmware, int]:
    """A program for a board that writes a word and no more, and where it writes it."""
    da = board.window.da
    code = _RISCV if board.elf_machine == EM_RISCV else _AARCH64
    if board.elf_machine == EM_ARM:
        code = _THUMB if board.vectors else _ARM_A
    entry = da + _CODE if board.vectors else da
    table = struct.pack("<2I", da + 0x1000, entry | 1).ljust(_CODE, b"\0") if board.vectors else b""
    data = (table + code).ljust(entry - da + _WORD + 4, b"\0")
    segment = Segment(da, data, len(data), 7)
    return Firmware(board.elf_class, board.elf_machine, "", entry, (segment,)), entry + _WORD


async def _start_qemu(board: Board) -> float:
    """Milliseconds from QEMU's spawn until its core has written a word."""
    firmware, word = create_first_word(board)
    with contextlib.closing(create_memory("openamp-bench-ram", board.ram.size)) as ram:
        view = ram.region("ram", board.ram.da).view
        (segment,) = firmware.segments
        view[segment.da - board.ram.da :][: segment.file_size] = segment.data
        begin = time.perf_counter()
        with _spawned(board, ram, boot_options(board, firmware)) as process:
            at = word - board.ram.da
            while not any(view[at : at + 4]):
                if process.poll() is not None:
                    raise PlatformError(f"{board.program} ended with {process.returncode}")
                await trio.sleep(_LOOK_EVERY)
            return 1e3 * (time.perf_counter() - begin)


@contextlib.contextmanager
def _spawned(
    board: Board, ram: SharedMemory, options: Sequence[str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU with nothing but the board, for a `with` block."""
    backend = f"memory-backend-file,id=ram,size={ram.size},mem-path=/proc/self/fd/{ram.fd},share=on"
    command = [
        # One whose bench was killed would keep a CPU busy for good.
        *(str(shipped.path("tether")), str(os.getpid()), find_program(board)),
        *("-display", "none", "-nodefaults", "-no-user-config"),
        *("-monitor", "none", "-machine", f"{board.machine},memory-backend=ram"),
        *("-object", backend, *board.options, *options),
    ]
    process = spawn(command, [ram.fd], stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
