"""The benchmark measures something everywhere; how fast is not for tests to say."""

from __future__ import annotations

import os
import signal
from contextlib import AbstractAsyncContextManager
from typing import Any, cast

import pytest
import trio

from openamp_py import CoreCrashedError, Endpoint, Message, PeerError
from openamp_py.bench import (
    CASES,
    SIZES,
    PythonContender,
    Row,
    open_c,
    open_python,
    run_bench,
)
from openamp_py.platforms.native import NativeCore
from openamp_py.platforms.process import ProcessCore

SHORT = 0.002


def _open(contender: str, core: str) -> AbstractAsyncContextManager[Any]:
    return open_python(core) if contender == "python" else open_c(core)


# Normal


async def test_every_size_and_case_of_a_core(core: str) -> None:
    calls = 0

    def progress() -> None:
        nonlocal calls
        calls += 1

    allowed = os.sched_getaffinity(0)
    rows = await run_bench(cores=[core], seconds=SHORT, repeat=2, progress=progress)
    assert {(row.core, row.size, row.case) for row in rows} == {
        (core, size, case) for size in SIZES for case in CASES
    }
    for row in rows:
        assert len(row.python) == len(row.c) == 2
        assert all(0 < rate < 1e9 for rate in (*row.python, *row.c, row.ratio))
    assert calls == 2 * 2 * len(rows)
    assert os.sched_getaffinity(0) == allowed


async def test_one_cpu_is_enough() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        rows = await run_bench(cores=["native"], sizes=[8], seconds=SHORT, repeat=1)
    finally:
        os.sched_setaffinity(0, allowed)
    assert len(rows) == len(CASES)


def test_the_ratio_is_of_the_medians() -> None:
    row = Row("native", 16, "ping", python=(1.0, 2.0, 90.0), c=(80.0, 8.0, 1.0))
    assert row.ratio == 4.0


# Refusals


@pytest.mark.parametrize("size", [7, 497])
@pytest.mark.parametrize("contender", ["python", "c"])
async def test_sizes_that_are_not_possible(contender: str, size: int) -> None:
    async with _open(contender, "loopback") as opened:
        with pytest.raises(ValueError, match=f"messages of {size} bytes; 8 to 496 are possible"):
            await opened.measure("ping", size, SHORT)


# The other side's end


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("contender", ["python", "c"])
@pytest.mark.parametrize("name", ["process", "native"])
async def test_a_core_that_is_killed(name: str, contender: str, case: str) -> None:
    with pytest.raises((CoreCrashedError, trio.BrokenResourceError)) as caught:
        async with _open(contender, name) as opened:
            await opened.measure(case, 16, SHORT)
            assert isinstance(opened.core, NativeCore | ProcessCore)
            assert opened.core.pid is not None
            os.kill(opened.core.pid, signal.SIGKILL)
            await opened.measure(case, 16, 60)
    error = caught.value if contender == "c" else caught.value.__cause__
    assert isinstance(error, CoreCrashedError)
    assert error.signal == signal.SIGKILL


class _Endpoint:
    """An endpoint whose peer returns `reply` to everything, or nothing ever."""

    payload_limit = 496

    def __init__(self, reply: bytes | None) -> None:
        self._reply = reply

    async def send(self, payload: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def receive(self) -> Message:
        if self._reply is None:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        return Message(self._reply or b"", 0)


async def test_a_remote_that_stops_answering(autojump_clock: Any) -> None:
    contender = PythonContender(cast(Endpoint, _Endpoint(None)), None)
    with pytest.raises(PeerError, match=r"does not answer: gave up after 10\.5 s"):
        await contender.measure("ping", 16, 0.5)


@pytest.mark.parametrize("case", CASES)
async def test_a_reply_that_is_not_the_message(case: str) -> None:
    contender = PythonContender(cast(Endpoint, _Endpoint(bytes(15))), None)
    with pytest.raises(PeerError, match="message 0 came back changed or out of order: 15 bytes"):
        await contender.measure(case, 16, SHORT)
