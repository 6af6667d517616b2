"""Every step of a core's life is measured; how fast it is, is not for tests to say."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from openamp_py import (
    CoreCrashedError,
    Message,
    NativePlatform,
    PeerError,
    bench_lifecycle,
    decode_elf_untrusted,
    open_processor,
)
from openamp_py.bench_lifecycle import (
    LIFECYCLE_CORES,
    Figure,
    create_image,
    create_table,
    run_lifecycle,
)
from openamp_py.remoteproc.resource_table import decode_table_untrusted

IMAGE_SIZE = 1 << 20


# Normal


async def test_every_step_of_every_core(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "openamp_py")  # a record that is kept keeps the core's memory
    steps = []
    figures = await run_lifecycle(
        repeat=1,
        cycles=2,
        image_size=IMAGE_SIZE,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert {figure.core for figure in figures} == {*LIFECYCLE_CORES, "-"}
    assert len({(figure.core, figure.step) for figure in figures}) == len(figures)
    total = len(steps)
    assert steps == [(done, total) for done in range(1, total + 1)]
    for figure in figures:
        if figure.around is None:
            assert all(value > 0 for value in figure.values)
            assert len(figure.values) == 1
        else:
            before, after = figure.around
            assert figure.values == (after - before,)
    grown = {figure.step: figure for figure in figures if figure.around is not None}
    for cycle, children in (("boots", 0), ("crashes", 1)):
        assert grown[f"{cycle}-descriptors"].met is grown[f"{cycle}-children"].met is True
        around = grown[f"{cycle}-children"].around
        assert around is not None
        assert around[0] - children == len(_children())


def _children() -> list[str]:
    return [
        child
        for task in Path("/proc/self/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


async def test_the_image_fills_the_core_s_memory() -> None:
    image = create_image(IMAGE_SIZE)
    (segment,) = decode_elf_untrusted(image).segments
    assert segment.memory_size == segment.file_size == IMAGE_SIZE
    platform = NativePlatform(ram_size=IMAGE_SIZE)
    async with open_processor(platform) as processor:
        await processor.configure()
        await processor.load(image)
        assert platform.memory.regions[0].view == segment.data


def test_the_table_has_what_tables_have() -> None:
    table = decode_table_untrusted(create_table(500))
    assert len(table.entries) == 500
    kinds = (table.carveouts, table.traces, table.vdevs, table.vendors)
    assert [len(kind) for kind in kinds] == [125] * 4


async def test_what_is_left_behind_is_seen() -> None:
    memory_kept: list[bytes] = []

    with contextlib.ExitStack() as stack:

        async def leak() -> None:
            await trio.lowlevel.checkpoint()
            memory_kept.append(os.urandom(16 << 20))
            stack.enter_context(socket.socket())
            child = subprocess.Popen(["sleep", "1000"])
            stack.callback(child.wait)
            stack.callback(child.kill)

        run = bench_lifecycle._Run("native", 1, 3, IMAGE_SIZE, Path())
        rate, memory, descriptors, children = await bench_lifecycle._cycle(run, "leaks", leak)
    assert (rate.step, rate.unit, rate.met) == ("leaks", "/s", None)
    assert memory.median == pytest.approx(3 * 16, abs=16)  # the rest of the program has its own
    assert (descriptors.values, children.values) == ((3,), (3,))
    assert memory.met is descriptors.met is children.met is False


# Verdicts


@pytest.mark.parametrize(
    ("values", "limit", "of_rate", "target", "met"),
    [
        ((60.0, 50.0, 10.0), 50.0, False, "<= 50", True),
        ((60.0, 50.1, 10.0), 50.0, False, "<= 50", False),
        ((0.4, 0.5, 0.6), 0.5, True, ">= 0.5", True),
        ((0.4, 0.49, 0.6), 0.5, True, ">= 0.5", False),
        ((0.0,), 0.0, False, "<= 0", True),
        ((1.0,), None, False, "", None),
    ],
)
def test_a_median_beside_its_target(
    values: tuple[float, ...], limit: float | None, of_rate: bool, target: str, met: bool | None
) -> None:
    figure = Figure("native", "boot", "ms", values, limit, of_rate)
    assert (figure.target, figure.met) == (target, met)


# Refusals


async def test_a_core_without_the_case() -> None:
    with pytest.raises(ValueError, match=r"core loopback has no case lifecycle; .* process"):
        await run_lifecycle(cores=["native", "loopback"])


# The other side's end


def _answering(payload: bytes) -> Any:
    class _Endpoint:
        async def wait_bound(self) -> None:
            await trio.lowlevel.checkpoint()

        async def send(self, payload: bytes) -> None:
            await trio.lowlevel.checkpoint()

        async def receive(self) -> Message:
            await trio.lowlevel.checkpoint()
            return Message(payload, 0)

    return _Endpoint()


async def test_an_echo_that_is_not_the_message() -> None:
    with pytest.raises(PeerError, match=r"b'pang' of 4 bytes came back for b'ping' of 4"):
        await bench_lifecycle.echo(_answering(b"pang"))


async def test_a_core_that_does_not_crash() -> None:
    async with bench_lifecycle.open_echo("native") as (session, _):
        with pytest.raises(PeerError, match="answered the order to crash with 4 bytes"):
            await bench_lifecycle._crash(session, _answering(b"what"))


@pytest.mark.parametrize("core", LIFECYCLE_CORES)
async def test_a_core_that_is_not_recovered(core: str) -> None:
    with pytest.raises(CoreCrashedError):
        async with bench_lifecycle.open_echo(core) as (session, endpoint):
            await bench_lifecycle._recover(session, endpoint)


async def test_a_core_that_hangs(autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(run: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(bench_lifecycle, "_list_steps", lambda core: [hang])
    with pytest.raises(PeerError, match=r"does not answer: gave up after 26\.0 s"):
        await run_lifecycle(cores=["native"], repeat=3, cycles=5)
