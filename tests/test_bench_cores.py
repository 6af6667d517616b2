"""Every step of the bench of cores runs, and its arithmetic; how fast, is not for tests to say."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
import trio

from openamp_py import PlatformError, bench_cores
from openamp_py.bench_cores import (
    TOGETHER,
    cpu_seconds,
    create_first_word,
    default_cores,
    judge_starts,
    percentile,
    run_cores,
)
from openamp_py.bench_lifecycle import Figure
from openamp_py.platforms.boards import BOARDS, find_board

MESSAGES = ["first-message", "round-trip", "round-trip-p99", "flood"]
EMULATED = [
    "qemu-start",
    *MESSAGES,
    "pre-launched",
    "idle-core",
    "idle-host",
    f"{TOGETHER}-first-message",
    f"{TOGETHER}-flood",
]


def _needs(board: str) -> pytest.MarkDecorator:
    program = BOARDS[board].program
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is missing")


# Normal


@_needs("mps2-an385")
async def test_every_step_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cores, "_SETTLE", 0.01)
    done = []
    figures = await run_cores(
        cores=["native", "loopback", "qemu:mps2-an385"],
        repeat=1,
        seconds=0.01,
        progress=lambda at, total: done.append((at, total)),
    )
    steps = [(figure.core, figure.step) for figure in figures]
    assert steps == [
        *(("native", step) for step in MESSAGES),
        *(("loopback", step) for step in MESSAGES),
        *(("qemu:mps2-an385", step) for step in EMULATED),
    ]
    assert done == [(at, len(done)) for at in range(1, len(done) + 1)]
    assert all(figure.median > 0 for figure in figures if not figure.step.startswith("idle"))
    judged = [figure.step for figure in figures if figure.met is not None]
    assert judged == ["first-message", "pre-launched", "idle-core", "idle-host"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=_needs(name)) for name in BOARDS])
async def test_the_first_word_of_every_board(name: str) -> None:
    with trio.fail_after(30):
        assert await bench_cores._start_qemu(find_board(name)) > 0


def test_by_default_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: program == "qemu-system-riscv64")
    assert default_cores() == ("native", "process", "qemu:virt-rv64")


# Arithmetic


def _figure(core: str, step: str, *values: float) -> Figure:
    return Figure(core, step, "ms", values)


def test_a_start_is_judged_by_native_s_and_qemu_s_own() -> None:
    figures = judge_starts(
        [
            _figure("native", "first-message", 5.0, 6.0, 99.0),
            _figure("qemu:a", "qemu-start", 19.0, 20.0, 21.0),
            _figure("qemu:a", "first-message", 38.0),
            _figure("qemu:a", "round-trip", 1000.0),
            _figure("qemu:b", "qemu-start", 10.0),
            _figure("qemu:b", "first-message", 28.1),
        ]
    )
    assert [(figure.target, figure.met) for figure in figures] == [
        ("", None),
        ("", None),
        ("<= 38", True),
        ("", None),
        ("", None),
        ("<= 28", False),
    ]


@pytest.mark.parametrize("missing", ["native", "qemu-start"])
def test_a_start_is_not_judged_without_both(missing: str) -> None:
    figures = [
        _figure("native", "first-message", 5.0),
        _figure("qemu:a", "qemu-start", 20.0),
        _figure("qemu:a", "first-message", 38.0),
    ]
    rest = [figure for figure in figures if missing not in (figure.core, figure.step)]
    assert judge_starts(rest) == rest


def test_percentiles() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 51, 100, 100]
    assert percentile([7.0], 0.99) == 7


def test_the_cpu_time_of_a_process() -> None:
    before = cpu_seconds(os.getpid())
    assert 0 < before < time.process_time() + 0.01
    end = time.process_time() + 0.02
    while time.process_time() < end:
        pass
    assert cpu_seconds(os.getpid()) - before + 0.001 >= 0.02
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
        assert cpu_seconds(child.pid) == 0


@pytest.mark.parametrize("name", BOARDS)
def test_the_first_word_lies_where_it_is_said_to(name: str) -> None:
    board = find_board(name)
    firmware, word = create_first_word(board)
    (segment,) = firmware.segments
    assert board.window.holds(segment.da, segment.memory_size)
    into = word - segment.da
    assert into + 4 == segment.file_size and not any(segment.data[into:])
    assert segment.da <= firmware.entry < word


# Refusals


@pytest.mark.parametrize("core", ["x", "auto", "qemu", "qemu:x", "shm:/a?doorbell=unix:/b"])
async def test_no_such_core(core: str) -> None:
    with pytest.raises(ValueError, match=r"core|board"):
        await run_cores(cores=["native", core])


@_needs("mps2-an385")
async def test_a_qemu_that_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cores, "boot_options", lambda board, firmware: ("-nonsense",))
    with pytest.raises(PlatformError, match="qemu-system-arm ended with 1"):
        await bench_cores._start_qemu(find_board("mps2-an385"))


# Closing

SPAWNING = """
import contextlib, signal
from openamp_py import bench_cores
from openamp_py.platforms.boards import boot_options, find_board
from openamp_py.platforms.child import create_memory

board = find_board("mps2-an385")
firmware, _ = bench_cores.create_first_word(board)
(segment,) = firmware.segments
with contextlib.closing(create_memory("openamp-test", board.ram.size)) as ram:
    ram.region("ram", 0).view[: segment.file_size] = segment.data
    with bench_cores._spawned(board, ram, boot_options(board, firmware)) as process:
        print(process.pid, flush=True)
        signal.pause()
"""


@_needs("mps2-an385")
def test_a_qemu_ends_with_a_bench_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SPAWNING], stdout=subprocess.PIPE, text=True
    ) as bench:
        assert bench.stdout is not None
        pidfd = os.pidfd_open(int(bench.stdout.readline()))
        bench.kill()
        ended, _, _ = select.select([pidfd], [], [], 10)
        if not ended:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
    assert ended
