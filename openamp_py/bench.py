"""How fast messages go: endpoints in Python beside the same loops written in C.

The yardstick is a C program over the same ring code (csrc/yardstick.c):

    (a)   event-driven: each side sleeps on the link's doorbell, the very stream socket that
          Python endpoints sleep on
    (b)   polling: neither side sleeps

Both send one message with each call, as OpenAMP's C interface has it, and take what is there.

Every case boots a core for each contender and brings its rings up with the same code. Messages
are numbered, and what arrives is checked, on both sides.

    core      the other side of Python             the other side of C
    process   a process of its own, in Python      a process of its own, in C
    native    the shipped firmware                 the shipped firmware, which sleeps: (a) alone
    loopback  a task of this thread, in Python     the same thread, no doorbell: in the place of (a)

Host and core are pinned to a CPU each where there are two: left to itself, the scheduler
puts them together or apart from one run to the next, which changes a round trip fivefold.

As a program (``python -m openamp_py.bench URL SERVICE``) this plays the other side on a link:
in C with the service "event" or "polling", in Python with a time to poll in seconds.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import trio

from openamp_py.background import open_background
from openamp_py.choosing import CORES
from openamp_py.constants import ECHO_CHANNEL, FIRST_DYNAMIC_ADDRESS
from openamp_py.errors import PeerError, PeerGoneError
from openamp_py.platforms import (
    LoopbackPlatform,
    NativePlatform,
    ProcessPlatform,
    ShmAddress,
    ShmLink,
)
from openamp_py.platforms.demo import python_firmware
from openamp_py.platforms.native import NativeCore, shipped_echo
from openamp_py.platforms.process import URL, ProcessCore, module_command
from openamp_py.remoteproc import (
    Link,
    Platform,
    RemoteProcessor,
    open_processor,
    open_resources,
)
from openamp_py.remoteproc.sources import Image
from openamp_py.rpmsg import Bus, BusOptions, Endpoint, open_bus
from openamp_py.rpmsg.polling import DEFAULT_POLLING
from openamp_py.rpmsg.rings import open_rings
from openamp_py.session import open_session
from openamp_py.virtio.message_ring import BATCH
from openamp_py.virtio.yardstick import NUMBER_SIZE, Yardstick

SIZES: Final = (16, 496)
"""Bytes of payload by default."""

_ENDPOINTS = (1, 32, 1024)


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of traffic, and what is expected of it between 16-byte messages on `process`."""

    loop: str
    """ "ping": one message out at a time. "echo": as many as there are buffers, each returns.
    "flood": one way. "soak": one way, a given number."""
    cores: tuple[str, ...] = ("process",)
    batch: int = 1
    """Messages sent with one call."""
    polling: bool = True
    """Whether Python may poll."""
    hogs: bool = False
    """Whether two processes keep both CPUs busy meanwhile."""
    endpoints: tuple[int, ...] = (1,)
    """How many on each side by default."""
    sizes: tuple[int, ...] = SIZES
    least: float = 0.0
    """Messages or round trips per second at least..."""
    least_of_polling: float = 0.0
    """...and at least so much of (b)'s."""
    most_of_event: float | None = None
    """At most so much of (a)'s time."""


CASES: Final = {
    "ping": Case("ping", CORES, endpoints=_ENDPOINTS, most_of_event=0.12),
    "ping-sleep": Case("ping", ("process", "native"), polling=False, most_of_event=1.6),
    "ping-hogs": Case("ping", hogs=True, least=5_000),
    "flood": Case("flood", batch=BATCH, least=1_000_000, least_of_polling=0.2),
    "flood-single": Case("flood", endpoints=_ENDPOINTS, least=400_000),
    "echo": Case("echo", CORES, least=250_000),
    "soak": Case("soak", endpoints=(8,), sizes=(16,)),
}

_MOST_OF_ONE_ENDPOINT = 1.1
_LEAST_OF_SMALL = 0.7
_SMALL, _LARGE = SIZES
_MOST_GROWTH = 1 << 20
"""Targets that all cases share: time per message with many endpoints; rate with large messages;
bytes that a process grows by in a soak."""

SOAK_MESSAGES: Final = 10_000_000
_SOAK_PART = 100_000
_SLOWEST_SOAK = 10_000  # messages per second; below, it is taken to hang

# Before the first measurement of its kind, a part of its time is spent unmeasured.
_WARM_UP = 0.1

# A remote that takes so much longer (seconds) than it should is taken to hang.
_SILENT = 10.0

# The shipped firmware listens at the first dynamic address; an echo in C does at any.
_ADDRESS = FIRST_DYNAMIC_ADDRESS
_CONTROL = _SINK_IN_C = _ADDRESS + 1
_SINKS = 0x1_0000  # and as many addresses as there are endpoints

# Python's numbers begin anew after so many, so that its messages can be made beforehand. A prime,
# so that with any number of endpoints each of them sees all numbers in turn; and more than ever
# wait for one endpoint.
_CYCLE = 1021
_NUMBER = struct.Struct("<Q")
assert _NUMBER.size == NUMBER_SIZE

# Ends a flood.
_END = b"\xff" * NUMBER_SIZE

# To the control endpoint: messages in a batch, endpoints, bytes of payload, u32 each. It comes
# back when the sinks listen, and after the flood:
_REQUEST = struct.Struct("<III")
# messages that came, how many looks at them found another one than the next, u64 each.
_COUNTS = struct.Struct("<QQ")

# A loop looks at the clock after so many messages.
_CLOCK_EVERY = 64


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of resident memory of both processes, before and after a soak."""

    host: tuple[int, int]
    remote: tuple[int, int]

    @property
    def growth(self) -> int:
        """Of the one that grew more."""
        return max(after - before for before, after in (self.host, self.remote))


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured for one core, case, size and number of endpoints.

    Messages per second (where they return: round trips), one for each repeat; none for a
    contender that the core or the case does not have.
    """

    core: str
    case: str
    size: int
    endpoints: int
    python: tuple[float, ...]
    event: tuple[float, ...] = ()
    polling: tuple[float, ...] = ()
    messages: int = 0
    """In a soak: how many went, of which none was lost or out of order."""
    memory: Memory | None = None

    @property
    def rate(self) -> float:
        """Python's median."""
        return statistics.median(self.python)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a row amounts to.

    Args:
        ratio: Python's time per message in comparison; its rate where that is `of_rate`.
        base: what it is compared with; empty for nothing.
        of_rate: more is better.
        target: what is asked for; empty for nothing.
        met: whether it is so.
    """

    ratio: float | None = None
    base: str = ""
    of_rate: bool = False
    target: str = ""
    met: bool | None = None


def judge(row: Row, rows: Iterable[Row]) -> Verdict:
    """Compares a row with what its target names: (a), (b), or another one of the same run."""
    case = CASES[row.case]
    has_targets = row.core == "process"
    if row.memory is not None:
        return Verdict(target="flat memory", met=row.memory.growth <= _MOST_GROWTH)
    others = {
        (other.size, other.endpoints): other
        for other in rows
        if (other.core, other.case) == (row.core, row.case)
    }
    one, small = others.get((row.size, 1)), others.get((_SMALL, row.endpoints))
    if one is not None and one is not row:
        ratio = one.rate / row.rate
        return _judge_time(ratio, "1 ep", _MOST_OF_ONE_ENDPOINT if has_targets else None)
    if small is not None and small is not row and not case.hogs:
        ratio = row.rate / small.rate
        base = f"{_SMALL} B"
        if not has_targets or row.size != _LARGE:
            return Verdict(ratio, base, of_rate=True)
        return Verdict(ratio, base, True, f">= {_LEAST_OF_SMALL:g}", ratio >= _LEAST_OF_SMALL)
    has_targets = has_targets and row.endpoints == 1 and (case.hogs or row.size == _SMALL)
    if case.loop == "ping":
        ratio = statistics.median(row.event) / row.rate
        if not case.least:
            return _judge_time(ratio, "(a)", case.most_of_event if has_targets else None)
        verdict = Verdict(ratio, "(a)")
    else:
        base, rates = ("(b)", row.polling) if row.polling else ("(a)", row.event)
        verdict = Verdict(row.rate / statistics.median(rates), base, of_rate=True)
    if not has_targets:
        return verdict
    least = case.least
    if case.least_of_polling:
        least = max(least, case.least_of_polling * statistics.median(row.polling))
    return Verdict(
        verdict.ratio, verdict.base, verdict.of_rate, f">= {least:,.0f}/s", row.rate >= least
    )


def _judge_time(ratio: float, base: str, most: float | None) -> Verdict:
    if most is None:
        return Verdict(ratio, base)
    return Verdict(ratio, base, target=f"<= {most:g}", met=ratio <= most)


class Contender(Protocol):
    """One side of the comparison, with a core that runs."""

    core: Link | None

    async def measure(self, case: Case, size: int, endpoints: int, seconds: float) -> float:
        """Messages per second. Sends for `seconds`, then waits for what is still out.

        Raises:
            ValueError: messages of this size do not go over the link.
            PeerError: a message came back changed, or not at all.
            CoreDiedError: the core died.
            trio.BrokenResourceError: the same.
        """
        ...


class PythonContender:
    """Endpoints of a bus, used as a program would use them.

    Args:
        bus: the host's.
        destination: the echo service's address.
        core: what the other side runs on.
    """

    def __init__(self, bus: Bus, destination: int, core: Link | None) -> None:
        self.core = core
        self._bus = bus
        self._destination = destination

    async def measure(self, case: Case, size: int, endpoints: int, seconds: float) -> float:
        """See `Contender.measure`."""
        with patience(seconds):
            if case.loop == "flood":
                return await self._flood(case.batch, size, endpoints, seconds, math.inf)
            payloads = self._payloads(size)
            async with _open_endpoints(
                self._bus, endpoints, destination=self._destination
            ) as opened:
                loop = _ping if case.loop == "ping" else _echo
                return await loop(opened, payloads, seconds)

    async def soak(self, size: int, endpoints: int, messages: int) -> float:
        """Sends so many messages one by one, and checks that all arrive. See `measure`."""
        with patience(messages / _SLOWEST_SOAK):
            return await self._flood(1, size, endpoints, math.inf, messages)

    def _payloads(self, size: int) -> Sequence[bytes]:
        limit = self._bus.payload_limit
        if not NUMBER_SIZE <= size <= limit:
            raise ValueError(f"messages of {size} bytes; {NUMBER_SIZE} to {limit} are possible")
        return _create_payloads(size)

    async def _flood(
        self, batch: int, size: int, endpoints: int, seconds: float, messages: float
    ) -> float:
        """Sends until the time is up or so many have gone, and has the other side count them."""
        payloads = self._payloads(size)
        bus = self._bus
        async with (
            bus.open_endpoint(destination=_CONTROL) as control,
            _open_endpoints(bus, endpoints, destination=_SINKS, step=1) as opened,
        ):
            request = _REQUEST.pack(batch, endpoints, size)
            await control.send(request)
            await control.receive()
            begin = time.perf_counter()
            send = _send_single if batch == 1 else _send_many
            sent = await send(opened, payloads, seconds, messages)
            await opened[sent // batch % endpoints].send(_END)
            counts = (await control.receive()).payload
            taken = time.perf_counter() - begin
        _check_counts(sent, counts)
        return sent / taken


class CContender:
    """A yardstick on the host's end of the link."""

    def __init__(self, yardstick: Yardstick, processor: RemoteProcessor) -> None:
        self.core: Link | None = processor.core
        self._yardstick = yardstick
        self._processor = processor

    async def measure(self, case: Case, size: int, endpoints: int, seconds: float) -> float:
        """See `Contender.measure`. No other task runs meanwhile."""
        await trio.lowlevel.checkpoint()
        try:
            if case.loop == "flood":
                return self._yardstick.flood(
                    size=size,
                    batch=1,
                    seconds=seconds,
                    source=_ADDRESS,
                    sources=endpoints,
                    destination=_SINK_IN_C,
                )
            return self._yardstick.measure(
                size=size,
                in_flight=1 if case.loop == "ping" else None,
                seconds=seconds,
                source=_ADDRESS,
                sources=endpoints,
                destination=_ADDRESS,
            )
        except PeerGoneError:
            # The processor knows better what became of its core, as soon as it looks.
            with trio.move_on_after(_SILENT):
                await self._processor.wait_exit()
            raise


# Python's loops. With several endpoints, each has its turn: what is sent to the first, the second,
# and so on is received there in this order.


async def _ping(endpoints: Sequence[Endpoint], payloads: Sequence[bytes], seconds: float) -> float:
    turns = zip(itertools.cycle(endpoints), itertools.cycle(payloads[:_CYCLE]), strict=True)
    begin = time.perf_counter()
    for number, (endpoint, payload) in enumerate(turns):
        await endpoint.send(payload)
        received = (await endpoint.receive()).payload
        if received != payload:
            raise _changed(number, payload, received)
        if number % _CLOCK_EVERY == 0 and (taken := time.perf_counter() - begin) >= seconds:
            return (number + 1) / taken
    raise AssertionError("there is always a next payload")


async def _echo(endpoints: Sequence[Endpoint], payloads: Sequence[bytes], seconds: float) -> float:
    sent = received = 0
    expected = itertools.cycle(payloads[:_CYCLE])
    turns = itertools.cycle(endpoints)

    async def send() -> None:
        nonlocal sent
        messages = zip(itertools.cycle(endpoints), itertools.cycle(payloads[:_CYCLE]), strict=True)
        with contextlib.suppress(trio.BrokenResourceError):  # the receiver hears of it too
            for endpoint, payload in messages:
                await endpoint.send(payload)
                sent += 1

    async def receive(count: int) -> None:
        nonlocal received
        for endpoint, payload in itertools.islice(zip(turns, expected, strict=True), count):
            message = await endpoint.receive()
            if message.payload != payload:
                raise _changed(received, payload, message.payload)
            received += 1

    taken = 0.0
    async with open_background() as nursery:
        nursery.start_soon(send)
        begin = time.perf_counter()
        while taken < seconds or not received:
            await receive(_CLOCK_EVERY)
            taken = time.perf_counter() - begin
        rate = received / taken
    await receive(sent - received)
    return rate


async def _send_single(
    endpoints: Sequence[Endpoint], payloads: Sequence[bytes], seconds: float, messages: float
) -> int:
    turns = zip(itertools.cycle(endpoints), itertools.cycle(payloads[:_CYCLE]), strict=True)
    deadline = time.perf_counter() + seconds
    for sent, (endpoint, payload) in enumerate(turns, start=1):
        await endpoint.send(payload)
        if sent >= messages or (sent % _CLOCK_EVERY == 0 and time.perf_counter() >= deadline):
            return sent
    raise AssertionError("there is always a next payload")


async def _send_many(
    endpoints: Sequence[Endpoint], payloads: Sequence[bytes], seconds: float, messages: float
) -> int:
    deadline = time.perf_counter() + seconds
    for turn, endpoint in enumerate(itertools.cycle(endpoints)):
        first = turn * BATCH % _CYCLE
        await endpoint.send_many(payloads[first : first + BATCH])
        sent = (turn + 1) * BATCH
        if sent >= messages or time.perf_counter() >= deadline:
            return sent
    raise AssertionError("there is always a next payload")


async def sink_single(endpoints: Sequence[Endpoint], payloads: Sequence[bytes]) -> tuple[int, int]:
    """Receives a flood message by message.

    Returns:
        How many messages came, and how many were not the one that was to come next.
    """
    received = wrong = 0
    for endpoint, payload in zip(
        itertools.cycle(endpoints), itertools.cycle(payloads[:_CYCLE]), strict=True
    ):
        message = await endpoint.receive()
        if message.payload != payload:
            if message.payload == _END:
                break
            wrong += 1
        received += 1
    return received, wrong


async def sink_many(endpoints: Sequence[Endpoint], payloads: Sequence[bytes]) -> tuple[int, int]:
    """Receives a flood in as many messages at once as there are.

    Returns:
        How many messages came, and how many of the first and last of each batch were not the one
        that was to come next.
    """
    received = [0] * len(endpoints)
    wrong = 0
    last = -1

    def expected(index: int, position: int) -> bytes:
        batch, rest = divmod(position, BATCH)
        return payloads[((batch * len(endpoints) + index) * BATCH + rest) % _CYCLE]

    for turn in itertools.count(1):
        for index, endpoint in enumerate(endpoints):
            count = received[index]
            while count < turn * BATCH:
                if index == last:
                    return sum(received), wrong
                messages = await endpoint.receive_many()
                if messages[-1].payload == _END:
                    messages.pop()
                    last = index  # what was sent before may wait at the others still
                if messages:
                    wrong += messages[0].payload != expected(index, count)
                    count += len(messages)
                    wrong += messages[-1].payload != expected(index, count - 1)
                    received[index] = count
    raise AssertionError("there is always a next turn")


@functools.lru_cache(maxsize=4)
def _create_payloads(size: int) -> Sequence[bytes]:
    """A cycle of numbered messages, and after it the first ones again: a batch from anywhere."""
    fill = bytes(size - NUMBER_SIZE)
    return [_NUMBER.pack(number % _CYCLE) + fill for number in range(_CYCLE + BATCH)]


def _changed(number: int, sent: bytes, received: bytes) -> PeerError:
    return PeerError(
        f"message {number} came back changed or out of order: {len(received)} bytes that "
        f"begin with {received[:NUMBER_SIZE].hex()}, for {len(sent)}"
    )


def _check_counts(sent: int, counts: bytes) -> None:
    if len(counts) != _COUNTS.size:
        raise PeerError(f"a count of {len(counts)} bytes came back, for {_COUNTS.size}")
    received, wrong = _COUNTS.unpack(counts)
    if (received, wrong) != (sent, 0):
        raise PeerError(
            f"messages were lost or came out of order: {sent} sent, {received} counted, "
            f"{wrong} of those looked at were not the next one"
        )


@asynccontextmanager
async def _open_endpoints(
    bus: Bus, count: int, *, destination: int, step: int = 0
) -> AsyncIterator[Sequence[Endpoint]]:
    """Endpoints without a name, for an `async with` block.

    Args:
        destination: of the first.
        step: from the destination of one to that of the next.
    """
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(bus.open_endpoint(destination=destination + i * step))
            for i in range(count)
        ]


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Ends a block that takes longer than `seconds` and some grace with a PeerError."""
    limit = seconds + _SILENT
    try:
        with trio.fail_after(limit):
            yield
    except trio.TooSlowError:
        raise PeerError(f"the other side does not answer: gave up after {limit} s") from None


# The benchmark as a whole.


def choose_cases(cores: Iterable[str], names: Iterable[str] | None) -> list[tuple[str, str]]:
    """The cases to measure with each core: those named, or all that it has but a soak.

    Raises:
        ValueError: a core does not have a case that was named.
    """
    chosen = []
    for core in cores:
        possible = [name for name, case in CASES.items() if core in case.cores]
        if not possible:
            raise ValueError(f"core {core} has none of the cases {', '.join(CASES)}")
        for name in possible if names is None else names:
            if name not in possible:
                raise ValueError(f"core {core} has no case {name}; there are {', '.join(possible)}")
            if names is not None or CASES[name].loop != "soak":
                chosen.append((core, name))
    return chosen


async def run_bench(
    *,
    cores: Iterable[str] = ("process",),
    cases: Iterable[str] | None = None,
    sizes: Sequence[int] | None = None,
    endpoints: Sequence[int] | None = None,
    seconds: float = 0.3,
    repeat: int = 5,
    messages: int = SOAK_MESSAGES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Measures every core, case, size and number of endpoints, in Python and in C.

    All measurements of a case take turns, and take turns at being first, so that what drifts
    meets all that are compared.

    Args:
        cores: of `CORES`.
        cases: of `CASES`; by default all that the core has, but for a soak.
        sizes: bytes of payload; by default the case's.
        endpoints: how many on each side; by default the case's.
        seconds: how long each measurement sends.
        repeat: how often each is measured; a soak is once.
        messages: how many a soak sends.
        progress: called after each measurement with the number done and that of all.

    Raises:
        ValueError: a size or a case that is not possible.
        OpenAMPError: a core could not be started, or died, or did not echo, or lost something.
        trio.BrokenResourceError: the same.
    """
    plan = []
    total = 0
    for core, name in choose_cases(cores, cases):
        case = CASES[name]
        shapes = [*itertools.product(sizes or case.sizes, endpoints or case.endpoints)]
        plan.append((core, name, shapes))
        if case.loop == "soak":
            total += len(shapes) * len(_split(messages))
        else:
            total += len(shapes) * repeat * len(_list_contenders(core))
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    rows: list[Row] = []
    for core, name, shapes in plan:
        if CASES[name].loop == "soak":
            rows += await _soak(core, name, shapes, messages, count)
        else:
            rows += await _measure(core, name, shapes, seconds, repeat, count)
    return rows


def _list_contenders(core: str) -> tuple[str, ...]:
    """By the name of their figures in a row."""
    return ("python", "event", "polling") if core == "process" else ("python", "event")


async def _measure(
    core: str,
    name: str,
    shapes: Sequence[tuple[int, int]],
    seconds: float,
    repeat: int,
    count: Callable[[], None],
) -> list[Row]:
    case = CASES[name]
    names = _list_contenders(core)
    rates: dict[tuple[int, int], dict[str, list[float]]] = {
        shape: {each: [] for each in names} for shape in shapes
    }
    async with AsyncExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for each in names:
            if each == "python":
                opening: contextlib.AbstractAsyncContextManager[Contender] = open_python(
                    core, polling=case.polling
                )
            else:
                opening = open_c(core, polling=each == "polling")
            contenders[each] = await stack.enter_async_context(opening)
        cpus = stack.enter_context(_pinned(contender.core for contender in contenders.values()))
        if case.hogs:
            stack.enter_context(open_hogs(cpus))
        for shape, contender in itertools.product(shapes, contenders.values()):
            await contender.measure(case, *shape, seconds * _WARM_UP)
        for turn in range(repeat):
            first = turn % len(names)
            for shape, each in itertools.product(shapes, names[first:] + names[:first]):
                rate = await contenders[each].measure(case, *shape, seconds)
                rates[shape][each].append(rate)
                count()
    return [
        Row(
            core,
            name,
            *shape,
            python=tuple(found["python"]),
            event=tuple(found["event"]),
            polling=tuple(found.get("polling", ())),
        )
        for shape, found in rates.items()
    ]


async def _soak(
    core: str,
    name: str,
    shapes: Sequence[tuple[int, int]],
    messages: int,
    count: Callable[[], None],
) -> list[Row]:
    rows = []
    async with open_python(core, polling=CASES[name].polling) as contender:
        with _pinned([contender.core]):
            assert isinstance(contender.core, ProcessCore), "a soak is for two processes"
            pids = os.getpid(), contender.core.pid
            for size, endpoints in shapes:
                parts = _split(messages)
                # What is allocated once is there before memory is looked at.
                await contender.soak(size, endpoints, parts[0])
                before = [resident(pid) for pid in pids]
                seconds = 0.0
                for part in parts:
                    seconds += part / await contender.soak(size, endpoints, part)
                    count()
                host, remote = zip(before, [resident(pid) for pid in pids], strict=True)
                rate = messages / seconds
                memory = Memory(host, remote)
                rows.append(
                    Row(core, name, size, endpoints, (rate,), messages=messages, memory=memory)
                )
    return rows


def _split(messages: int) -> list[int]:
    """A soak's parts: after each, the other side says what it got."""
    whole, rest = divmod(messages, _SOAK_PART)
    return [_SOAK_PART] * whole + [rest] * bool(rest)


def resident(pid: int | None) -> int:
    """Bytes of resident memory of a process.

    Raises:
        PeerGoneError: it has none any more.
    """
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "VmRSS":
                return int(value.split()[0]) * 1024
    raise PeerGoneError(f"process {pid} is gone")


@contextmanager
def _pinned(cores: Iterable[Link | None]) -> Iterator[set[int]]:
    """Keeps this thread on one CPU for a `with` block, and cores on another one if there is.

    What a bus decides by the number of CPUs has to be decided before.

    Returns:
        The CPUs.
    """
    before = os.sched_getaffinity(0)
    host, *others = sorted(before)
    other = others[0] if others else host
    for core in cores:
        if isinstance(core, NativeCore | ProcessCore) and core.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended: whoever talks to it will hear
                os.sched_setaffinity(core.pid, {other})
    os.sched_setaffinity(0, {host})
    try:
        yield {host, other}
    finally:
        os.sched_setaffinity(0, before)


# Ends by itself should this process be killed.
_HOG = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n  for _ in range(100000): pass"


@contextmanager
def open_hogs(cpus: Iterable[int]) -> Iterator[list[int]]:
    """Two processes that compute without end for a `with` block, spread over the CPUs.

    Returns:
        Their process ids.
    """
    with contextlib.ExitStack() as stack:
        pids = []
        for cpu in itertools.islice(itertools.cycle(cpus), 2):
            hog = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _HOG, str(os.getpid())],
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C at the terminal is our business
            )
            stack.callback(hog.wait)
            stack.callback(hog.kill)
            os.sched_setaffinity(hog.pid, {cpu})
            pids.append(hog.pid)
        yield pids


# The other side.


@asynccontextmanager
async def open_python(core: str, *, polling: bool = True) -> AsyncIterator[PythonContender]:
    """Boots a core and its services for an `async with` block. Raises what `measure` does.

    Args:
        polling: whether Python polls, on both sides; never on loopback, where there is one thread.
    """
    seconds = DEFAULT_POLLING if polling and core != "loopback" else 0.0
    platform: Platform
    if core == "loopback":
        platform = LoopbackPlatform(functools.partial(serve_python, polling=seconds))
    elif core == "process":
        platform = ProcessPlatform(module_command("openamp_py.bench", URL, str(seconds)))
    else:
        platform = NativePlatform()
    async with (
        open_session(platform, options=BusOptions(polling=seconds)) as session,
        session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        assert session.processor is not None, "it was booted here"
        with patience(0):
            await endpoint.wait_bound()
        assert endpoint.destination is not None, "it is bound"
        yield PythonContender(session.bus, endpoint.destination, session.processor.core)


@asynccontextmanager
async def open_c(core: str, *, polling: bool = False) -> AsyncIterator[CContender]:
    """Boots a core and services to compare with, for an `async with` block.

    Raises what `measure` does.
    """
    ready, remote = trio.open_memory_channel[Yardstick](1)

    async def application(link: Link) -> None:
        async with open_resources(link) as resources, open_rings(resources.rpmsg_device()) as rings:
            await ready.send(Yardstick(*rings, sink=_SINK_IN_C))
            await trio.sleep_forever()

    platform: Platform
    image: Image = python_firmware()
    if core == "loopback":
        platform = LoopbackPlatform(application)
    elif core == "process":
        service = "polling" if polling else "event"
        platform = ProcessPlatform(module_command("openamp_py.bench", URL, service))
    else:
        platform, image = NativePlatform(), shipped_echo()
    async with open_processor(platform) as processor:
        await processor.boot(image)
        device = processor.rpmsg_device()
        async with open_rings(device) as rings:
            device.set_driver_ok()
            link = processor.core
            if isinstance(link, NativeCore | ProcessCore):
                assert link.doorbell is not None, "it was started"
                yardstick = Yardstick(*rings, doorbell=link.doorbell.fileno(), polling=polling)
            else:
                yardstick = Yardstick(*rings, peer=await remote.receive())
            yield CContender(yardstick, processor)


async def serve_python(link: Link, *, polling: float) -> None:
    """Plays echo service and sinks with Python endpoints, until the host is gone.

    Args:
        polling: see `BusOptions`.

    Raises:
        PlatformError: the link cannot be made.
        trio.BrokenResourceError: the host broke a ring (the cause says how).
    """
    async with open_resources(link) as resources:
        try:
            async with (
                open_bus(resources.rpmsg_device(), BusOptions(polling=polling)) as bus,
                bus.open_endpoint(address=_CONTROL) as control,
                open_background() as nursery,
            ):
                nursery.start_soon(_serve_floods, bus, control)
                async with bus.open_endpoint(ECHO_CHANNEL) as endpoint:
                    while True:
                        message = await endpoint.receive()
                        await endpoint.send_to(message.payload, message.source)
        except trio.EndOfChannel:
            return
        except trio.BrokenResourceError as error:
            if not isinstance(error.__cause__, PeerGoneError):
                raise


_Sink = Callable[[Sequence[Endpoint], Sequence[bytes]], Awaitable[tuple[int, int]]]


async def _serve_floods(bus: Bus, control: Endpoint) -> None:
    """Receives one flood after the other, each as the host asks for it."""
    with contextlib.suppress(trio.BrokenResourceError):  # the echo service hears of it too
        async for message in control:
            batch, endpoints, size = _REQUEST.unpack(message.payload)
            sink: _Sink = sink_single if batch == 1 else sink_many
            async with AsyncExitStack() as stack:
                opened = [
                    await stack.enter_async_context(bus.open_endpoint(address=address))
                    for address in range(_SINKS, _SINKS + endpoints)
                ]
                await control.send_to(message.payload, message.source)
                counts = await sink(opened, _create_payloads(size))
            await control.send_to(_COUNTS.pack(*counts), message.source)


async def serve_c(link: ShmLink, *, polling: bool) -> None:
    """Plays echo service and sink in C and without a name, until the host is gone.

    Raises:
        PlatformError: the link cannot be made.
        PeerError: the host broke the protocol.
        trio.BrokenResourceError: the host left before it brought the device up.
    """
    async with open_resources(link) as resources, open_rings(resources.rpmsg_device()) as rings:
        assert link.doorbell is not None, "the link is up"
        doorbell = link.doorbell.fileno()
        Yardstick(*rings, doorbell=doorbell, polling=polling, sink=_SINK_IN_C).echo()


async def _serve(url: str, service: str) -> None:
    """Plays the other side on a link, as this file's first lines say."""
    with contextlib.closing(ShmLink(ShmAddress.parse(url))) as link:
        if service in ("event", "polling"):
            await serve_c(link, polling=service == "polling")
        else:
            await serve_python(link, polling=float(service))


if __name__ == "__main__":
    _url, _service = sys.argv[1:]
    trio.run(_serve, _url, _service)
