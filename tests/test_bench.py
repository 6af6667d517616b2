"""The benchmark measures something everywhere; how fast is not for tests to say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, cast

import pytest
import trio

from openamp_py import Bus, CoreCrashedError, Endpoint, Message, PeerError, WhenFull, bench
from openamp_py.bench import (
    CASES,
    SIZES,
    Memory,
    PythonContender,
    Row,
    choose_cases,
    judge,
    open_c,
    open_hogs,
    open_python,
    run_bench,
    sink_many,
    sink_single,
)
from openamp_py.platforms.native import NativeCore
from openamp_py.platforms.process import ProcessCore
from openamp_py.virtio.message_ring import BATCH

SHORT = 0.002
MEASURED = [name for name in CASES if name != "soak"]


def _open(contender: str, core: str) -> AbstractAsyncContextManager[Any]:
    return open_python(core) if contender == "python" else open_c(core)


# Normal


@pytest.mark.parametrize("case", MEASURED)
async def test_every_case_between_processes(case: str) -> None:
    steps = []
    allowed = os.sched_getaffinity(0)
    rows = await run_bench(
        cases=[case],
        endpoints=[1, 3],
        seconds=0.02,
        repeat=1,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert [(row.core, row.case, row.size, row.endpoints) for row in rows] == [
        ("process", case, size, endpoints) for size in SIZES for endpoints in (1, 3)
    ]
    for row in rows:
        assert len(row.python) == len(row.event) == len(row.polling) == 1
        assert all(0 < rate < 1e9 for rate in (*row.python, *row.event, *row.polling))
    assert steps == [(done, 12) for done in range(1, 13)]
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.parametrize("core", ["native", "loopback"])
async def test_the_cases_of_other_cores(core: str) -> None:
    rows = await run_bench(cores=[core], sizes=[16], endpoints=[1, 3], seconds=SHORT, repeat=2)
    assert [(row.case, row.endpoints) for row in rows] == [
        (case, endpoints) for _, case in choose_cases([core], None) for endpoints in (1, 3)
    ]
    for row in rows:
        assert len(row.python) == len(row.event) == 2
        assert row.polling == ()
        assert judge(row, rows).met is None, "only process has targets"


@pytest.mark.parametrize("case", ["ping", "flood-single"])
async def test_more_endpoints_than_buffers(case: str) -> None:
    async with open_python("loopback") as python:
        assert await python.measure(CASES[case], 8, 1024, SHORT) > 0


async def test_a_soak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_SOAK_PART", 1000)
    steps = []
    (row,) = await run_bench(
        cases=["soak"], messages=2500, progress=lambda done, total: steps.append((done, total))
    )
    assert (row.size, row.endpoints, row.messages) == (16, 8, 2500)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert row.rate > 0
    assert row.memory is not None
    assert all(1 << 20 < size < 1 << 30 for size in (*row.memory.host, *row.memory.remote))


async def test_one_cpu_is_enough() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        rows = await run_bench(
            cores=["native"], cases=["ping"], sizes=[8], endpoints=[1], seconds=SHORT, repeat=1
        )
    finally:
        os.sched_setaffinity(0, allowed)
    assert len(rows) == 1


def test_hogs_work_on_every_cpu_and_are_gone_afterwards() -> None:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    with pytest.raises(KeyError), open_hogs(cpus) as pids:
        assert len(pids) == 2
        assert {cpu for pid in pids for cpu in os.sched_getaffinity(pid)} == set(cpus)
        raise KeyError
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_hog_ends_with_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", bench._HOG, "1"], timeout=30)
    assert done.returncode == 0


# Verdicts


def _row(
    case: str = "ping",
    python: float = 1.0,
    *,
    size: int = 16,
    endpoints: int = 1,
    core: str = "process",
    event: float = 1.0,
    polling: float = 1.0,
) -> Row:
    b = (polling,) if core == "process" else ()
    return Row(core, case, size, endpoints, (python,), (event,), b)


def test_ratios_are_of_medians() -> None:
    row = Row("process", "ping", 16, 1, (4.0, 2.0, 90.0), (80.0, 1.0, 0.4))
    assert judge(row, [row]).ratio == 0.25


@pytest.mark.parametrize(
    ("row", "base", "ratio", "target", "met"),
    [
        (_row("ping", 100.0, event=12.0), "(a)", 0.12, "<= 0.12", True),
        (_row("ping", 100.0, event=13.0), "(a)", 0.13, "<= 0.12", False),
        (_row("ping-sleep", 10.0, event=16.0), "(a)", 1.6, "<= 1.6", True),
        (_row("ping-hogs", 5e3, event=5e3), "(a)", 1.0, ">= 5,000/s", True),
        (_row("ping-hogs", 4e3, event=2e3, size=496), "(a)", 0.5, ">= 5,000/s", False),
        (_row("flood", 1e6, polling=4e6), "(b)", 0.25, ">= 1,000,000/s", True),
        (_row("flood", 1.1e6, polling=1e7), "(b)", 0.11, ">= 2,000,000/s", False),
        (_row("flood-single", 4e5, polling=1e6), "(b)", 0.4, ">= 400,000/s", True),
        (_row("echo", 2e5, polling=1e6), "(b)", 0.2, ">= 250,000/s", False),
        (_row("echo", 2e5, polling=1e6, size=100), "(b)", 0.2, "", None),
        (_row("echo", 2e5, event=1e6, core="native"), "(a)", 0.2, "", None),
        (_row("ping", 5.0, event=1.0, core="native"), "(a)", 0.2, "", None),
    ],
)
def test_a_row_beside_c(row: Row, base: str, ratio: float, target: str, met: bool | None) -> None:
    verdict = judge(row, [row])
    assert (verdict.base, verdict.target, verdict.met) == (base, target, met)
    assert verdict.ratio == pytest.approx(ratio)


def test_a_row_beside_another_one() -> None:
    rows = [
        _row(python=100.0),
        _row(python=90.0, endpoints=32),
        _row(python=95.0, endpoints=1024),
        _row(python=70.0, size=496),
        _row(python=69.0, size=496, endpoints=32),
        _row(python=69.0, size=256),
        _row("echo", 69.0, size=496),
        _row("echo", 100.0),
        _row("echo", 1.0, core="native"),
    ]
    verdicts = [judge(row, rows) for row in rows]
    assert [(v.base, v.target, v.met) for v in verdicts[1:7]] == [
        ("1 ep", "<= 1.1", False),
        ("1 ep", "<= 1.1", True),
        ("16 B", ">= 0.7", True),
        ("1 ep", "<= 1.1", True),
        ("16 B", "", None),
        ("16 B", ">= 0.7", False),
    ]


def test_memory_that_grows() -> None:
    for growth, met in ((1 << 20, True), ((1 << 20) + 1, False)):
        memory = Memory(host=(50 << 20, 40 << 20), remote=(1 << 20, (1 << 20) + growth))
        row = Row("process", "soak", 16, 8, (1.0,), messages=1, memory=memory)
        assert judge(row, [row]).met is met


# Refusals


@pytest.mark.parametrize("case", ["ping", "flood"])
@pytest.mark.parametrize("size", [7, 497])
@pytest.mark.parametrize("contender", ["python", "c"])
async def test_sizes_that_are_not_possible(contender: str, size: int, case: str) -> None:
    async with _open(contender, "loopback") as opened:
        with pytest.raises(ValueError, match=f"messages of {size} bytes; 8 to 496 are possible"):
            await opened.measure(CASES[case], size, 1, SHORT)


async def test_a_case_that_the_core_does_not_have() -> None:
    with pytest.raises(ValueError, match="native has no case flood; there are ping, ping-sleep, e"):
        await run_bench(cores=["native"], cases=["flood"])


def test_a_soak_has_to_be_asked_for() -> None:
    assert ("process", "soak") not in choose_cases(["process"], None)
    assert choose_cases(["process"], ["soak"]) == [("process", "soak")]


# The other side's end


@pytest.mark.parametrize(
    ("contender", "name", "case"),
    [
        ("python", "process", "ping"),
        ("python", "process", "flood"),
        ("python", "native", "echo"),
        ("c", "process", "flood"),
        ("c", "native", "ping"),
        ("c", "native", "echo"),
    ],
)
async def test_a_core_that_is_killed(contender: str, name: str, case: str) -> None:
    with pytest.raises((CoreCrashedError, trio.BrokenResourceError)) as caught:
        async with _open(contender, name) as opened:
            await opened.measure(CASES[case], 16, 2, SHORT)
            assert isinstance(opened.core, NativeCore | ProcessCore)
            assert opened.core.pid is not None
            os.kill(opened.core.pid, signal.SIGKILL)
            await opened.measure(CASES[case], 16, 2, 60)
    error = caught.value if contender == "c" else caught.value.__cause__
    assert isinstance(error, CoreCrashedError)
    assert error.signal == signal.SIGKILL


class _Endpoint:
    """An endpoint whose peer answers with these payloads, the last one again and again."""

    def __init__(self, replies: Sequence[bytes]) -> None:
        self._replies = [*replies]

    async def send(self, payload: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def receive(self) -> Message:
        await trio.lowlevel.checkpoint()
        if not self._replies:
            await trio.sleep_forever()
        return Message(
            self._replies.pop(0) if len(self._replies) > 1 else self._replies[0], source=0
        )


def _contender(*replies: bytes) -> PythonContender:
    class _Bus:
        payload_limit = 496

        @asynccontextmanager
        async def open_endpoint(self, *, destination: int) -> AsyncIterator[_Endpoint]:
            yield _Endpoint(replies)

    return PythonContender(cast(Bus, _Bus()), 1024, None)


@pytest.mark.parametrize("case", ["ping", "flood-single"])
async def test_a_remote_that_stops_answering(autojump_clock: Any, case: str) -> None:
    with pytest.raises(PeerError, match=r"does not answer: gave up after 10\.5 s"):
        await _contender().measure(CASES[case], 16, 1, 0.5)


@pytest.mark.parametrize("case", ["ping", "echo"])
async def test_a_reply_that_is_not_the_message(case: str) -> None:
    with pytest.raises(PeerError, match="message 0 came back changed or out of order: 15 bytes"):
        await _contender(bytes(15)).measure(CASES[case], 16, 1, SHORT)


@pytest.mark.parametrize(
    ("counts", "what"),
    [
        ((99, 0), "100 sent, 99 counted, 0 of those"),
        ((101, 0), "100 sent, 101 counted, 0 of those"),
        ((100, 2), "100 sent, 100 counted, 2 of those"),
        (None, "a count of 3 bytes came back, for 16"),
    ],
)
async def test_counts_that_are_not_right(counts: tuple[int, int] | None, what: str) -> None:
    answer = bench._COUNTS.pack(*counts) if counts else b"abc"
    with pytest.raises(PeerError, match=what):
        await _contender(b"ready", answer).soak(16, 1, 100)


@pytest.mark.parametrize("case", ["flood", "flood-single"])
async def test_a_remote_that_loses_messages(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    serve_floods = bench._serve_floods

    class _LossyBus:
        def __init__(self, bus: Bus) -> None:
            self._bus = bus

        def open_endpoint(self, *, address: int) -> AbstractAsyncContextManager[Endpoint]:
            return self._bus.open_endpoint(
                address=address, queue_limit=1, when_full=WhenFull.DROP_OLDEST
            )

    async def lossy(bus: Bus, control: Endpoint) -> None:
        await serve_floods(cast(Bus, _LossyBus(bus)), control)

    monkeypatch.setattr(bench, "_serve_floods", lossy)
    async with open_python("loopback") as opened:
        with pytest.raises(PeerError, match="messages were lost or came out of order"):
            await opened.measure(CASES[case], 16, 1, SHORT)


class _Stream:
    """An endpoint that received messages before."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def receive(self) -> Message:
        await trio.lowlevel.checkpoint()
        return self.messages.pop(0)

    async def receive_many(self) -> list[Message]:
        await trio.lowlevel.checkpoint()
        taken, self.messages = self.messages[:100], self.messages[100:]
        return taken


def _flood(batch: int, endpoints: int, count: int) -> tuple[list[_Stream], Sequence[bytes]]:
    """What `count` messages are at the receivers, and the payloads they have in turn."""
    payloads = bench._create_payloads(16)
    streams = [_Stream() for _ in range(endpoints)]
    for number in range(count):
        payload = payloads[number % bench._CYCLE]
        streams[number // batch % endpoints].messages.append(Message(payload, 0))
    streams[count // batch % endpoints].messages.append(Message(bench._END, 0))
    return streams, payloads


COUNT = 40 * BATCH
"""More than a cycle."""


@pytest.mark.parametrize("endpoints", [1, 3])
@pytest.mark.parametrize(("sink", "batch"), [(sink_single, 1), (sink_many, BATCH)])
async def test_a_sink_counts(sink: Any, batch: int, endpoints: int) -> None:
    assert await sink(*_flood(batch, endpoints, COUNT)) == (COUNT, 0)
    assert await sink(*_flood(batch, endpoints, 0)) == (0, 0)


@pytest.mark.parametrize(("sink", "batch"), [(sink_single, 1), (sink_many, BATCH)])
async def test_a_sink_misses_what_was_lost(sink: Any, batch: int) -> None:
    streams, payloads = _flood(batch, 1, COUNT)
    del streams[0].messages[70]
    received, wrong = await sink(streams, payloads)
    assert received == COUNT - 1
    assert wrong > 0


@pytest.mark.parametrize("endpoints", [1, 3])
@pytest.mark.parametrize(("sink", "batch"), [(sink_single, 1), (sink_many, BATCH)])
async def test_a_sink_sees_another_order(sink: Any, batch: int, endpoints: int) -> None:
    streams, payloads = _flood(batch, endpoints, COUNT)
    messages = streams[-1].messages
    messages[99], messages[100] = messages[100], messages[99]
    assert await sink(streams, payloads) == (COUNT, 2)
