"""How fast a core's life goes: boots, crashes, suspensions, handovers, loading.

Each step is measured with the calls that a program would use, from the call to the first echo
where messages go on after it. The program is warm: the first time of each step is not counted.

Cores run where the scheduler puts them, as a program's do.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import statistics
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from openamp_py.bench import patience, resident
from openamp_py.constants import DA_ANY, ECHO_CHANNEL, NOTIFY_ID_ANY, RPMSG_F_NS, VIRTIO_ID_RPMSG
from openamp_py.errors import PeerError
from openamp_py.platforms.child import SignalledCore
from openamp_py.platforms.native import RAM_DA, NativePlatform, shipped_echo
from openamp_py.remoteproc import Platform, open_processor
from openamp_py.remoteproc.crash import NO_POLICY, CoredumpMode, CrashPolicy
from openamp_py.remoteproc.elf import decode_elf_untrusted
from openamp_py.remoteproc.resource_table import (
    Carveout,
    Entry,
    Trace,
    Vdev,
    Vendor,
    Vring,
    decode_table_untrusted,
    encode_table,
    place_entries,
)
from openamp_py.rpmsg import Endpoint
from openamp_py.session import Session, open_session

LIFECYCLE: Final = "lifecycle"
"""The case's name."""

LIFECYCLE_CORES: Final = ("native", "process")
"""Cores that the case has: those that can die without this program."""

CYCLES: Final = 1000
"""Boots, and as many crashes, between two looks at what this program has."""

IMAGE_SIZE: Final = 64 << 20
"""Bytes of the image that is loaded."""

TABLE_ENTRIES: Final = 500
"""Entries of the table that is decoded."""

_MOST_TO_FIRST_MESSAGE = 50.0  # ms, on the native core
_MOST_GROWTH = 2.0  # MiB: an arena of the allocator, now and then, is no leak
_LEAST_OF_MEMCPY = 0.5
_MOST_OF_TABLE = 5.0  # ms

# The echo firmware's command to crash (csrc/firmware/echo_protocol.h).
_CRASH = struct.pack("<I", 0xEF56A501)

_PING = b"ping"

# A step or cycle that takes longer (seconds) is taken to hang.
_SLOWEST = 2.0

# What a cycle allocates once is there before this program is looked at: a part of the cycles
# goes first.
_WARM_UP = 0.1


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured of one step.

    Args:
        core: the kind of core; "-" where none takes part.
        step: its name.
        unit: of the values.
        values: one for each repeat.
        limit: what is asked for: at most that, or at least.
        of_rate: more is better.
        around: before and after, where the value is how much was added in between.
    """

    core: str
    step: str
    unit: str
    values: tuple[float, ...]
    limit: float | None = None
    of_rate: bool = False
    around: tuple[float, float] | None = None

    @property
    def median(self) -> float:
        """The value that counts."""
        return statistics.median(self.values)

    @property
    def target(self) -> str:
        """What is asked for; empty for nothing."""
        return "" if self.limit is None else f"{'>=' if self.of_rate else '<='} {self.limit:g}"

    @property
    def met(self) -> bool | None:
        """Whether it is so; None where nothing is asked for."""
        if self.limit is None:
            return None
        return self.median >= self.limit if self.of_rate else self.median <= self.limit


@dataclass(frozen=True, slots=True)
class _Run:
    """What the steps of one core share."""

    core: str
    repeat: int
    cycles: int
    image_size: int
    directory: Path

    def times(self, step: str, seconds: Iterable[float], limit: float | None = None) -> Figure:
        """A figure in milliseconds."""
        return Figure(self.core, step, "ms", tuple(1e3 * each for each in seconds), limit)

    def speed(self, core: str, step: str, seconds: Iterable[float]) -> Figure:
        """A figure of the image's size in a time."""
        size = self.image_size / 2**20
        return Figure(core, step, "MiB/s", tuple(size / each for each in seconds))

    @property
    def most_to_first_message(self) -> float | None:
        """Another interpreter takes far longer to start than that: native alone has a target."""
        return _MOST_TO_FIRST_MESSAGE if self.core == "native" else None


async def run_lifecycle(
    *,
    cores: Iterable[str] = LIFECYCLE_CORES,
    repeat: int = 5,
    cycles: int = CYCLES,
    image_size: int = IMAGE_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Figure]:
    """Measures every step of each core; loading and decoding go with the native one.

    Args:
        cores: of `LIFECYCLE_CORES`.
        repeat: how often each step is measured.
        cycles: how many boots, and how many crashes, must leave this program as it was.
        image_size: bytes of the image that is loaded: whole pages.
        progress: called after each step with the number done and that of all.

    Raises:
        ValueError: a core that does not have the case.
        OpenAMPError: a core could not be started, or did not come back, or did not echo.
        trio.BrokenResourceError: the same.
        OSError: the temporary directory cannot be written.
    """
    plan = [(core, step) for core in cores for step in _list_steps(core)]
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="openamp-bench-") as directory:
        for done, (core, step) in enumerate(plan, start=1):
            with patience(_SLOWEST * (repeat + cycles)):
                figures += await step(_Run(core, repeat, cycles, image_size, Path(directory)))
            progress(done, len(plan))
    return figures


_Step = Callable[[_Run], Awaitable[Sequence[Figure]]]


def _list_steps(core: str) -> Sequence[_Step]:
    if core not in LIFECYCLE_CORES:
        raise ValueError(
            f"core {core} has no case {LIFECYCLE}; the cores with it are "
            f"{', '.join(LIFECYCLE_CORES)}"
        )
    common = (_measure_sessions, _measure_boots, _measure_recoveries, _measure_suspensions)
    if core != "native":
        return common
    return (
        *common,
        _measure_handovers,
        _cycle_boots,
        _cycle_crashes,
        _measure_loading,
        _measure_decoding,
    )


# Sessions with an echo


@asynccontextmanager
async def open_echo(
    core: str | Platform, *, policy: CrashPolicy = NO_POLICY, attach: bool = False
) -> AsyncIterator[tuple[Session, Endpoint]]:
    """A session and an endpoint that has had its first echo, for an `async with` block."""
    async with (
        open_session(core, policy=policy, attach=attach) as session,
        session.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
    ):
        await echo(endpoint)
        yield session, endpoint


async def echo(endpoint: Endpoint, payload: bytes = _PING) -> None:
    """Has a message echoed, as soon as there is a service to do so.

    Raises:
        PeerError: something else came back.
    """
    await endpoint.wait_bound()
    await endpoint.send(payload)
    _check_echo((await endpoint.receive()).payload, payload)


def _check_echo(received: bytes, payload: bytes) -> None:
    if received != payload:
        raise PeerError(
            f"{received[:8]!r} of {len(received)} bytes came back for {payload[:8]!r} of "
            f"{len(payload)}"
        )


async def _crash(session: Session, endpoint: Endpoint) -> None:
    """Lets the core die, and returns when the endpoint has heard of it."""
    assert session.processor is not None, "it was booted here"
    core = session.processor.core
    if isinstance(session.processor.platform, NativePlatform):
        await endpoint.send(_CRASH)
    else:
        assert isinstance(core, SignalledCore) and core.pid is not None, "it was started"
        os.kill(core.pid, signal.SIGKILL)
    with contextlib.suppress(trio.BrokenResourceError):
        payload = (await endpoint.receive()).payload
        raise PeerError(f"the core answered the order to crash with {len(payload)} bytes")


async def _recover(session: Session, endpoint: Endpoint) -> float:
    """Seconds from the crash to the next echo."""
    begin = time.perf_counter()
    await _crash(session, endpoint)
    await session.wait_up()
    await echo(endpoint)
    return time.perf_counter() - begin


# The steps


async def _measure_sessions(run: _Run) -> Sequence[Figure]:
    seconds = []
    for _ in range(run.repeat + 1):
        begin = time.perf_counter()
        async with open_echo(run.core):
            seconds.append(time.perf_counter() - begin)
    return [run.times("session", seconds[1:], run.most_to_first_message)]


async def _measure_boots(run: _Run) -> Sequence[Figure]:
    seconds = []
    async with open_echo(run.core) as (session, endpoint):
        assert session.processor is not None, "it was booted here"
        for _ in range(run.repeat + 1):
            await session.processor.shutdown()
            begin = time.perf_counter()
            await session.processor.boot()
            await echo(endpoint)
            seconds.append(time.perf_counter() - begin)
    return [run.times("boot", seconds[1:], run.most_to_first_message)]


async def _measure_recoveries(run: _Run) -> Sequence[Figure]:
    figures = []
    for step, mode in (
        ("recovery", CoredumpMode.DISABLED),
        ("recovery-dump", CoredumpMode.ENABLED),
        ("recovery-inline", CoredumpMode.INLINE),
    ):
        where = None if mode is CoredumpMode.DISABLED else run.directory / "core"
        policy = CrashPolicy(recovery=True, coredump=mode, coredump_to=where)
        seconds = []
        for _ in range(run.repeat + 1):
            # A session for each: at its end, a dump that is still to be written is waited for.
            async with open_echo(run.core, policy=policy) as (session, endpoint):
                seconds.append(await _recover(session, endpoint))
        limit = run.most_to_first_message if mode is CoredumpMode.DISABLED else None
        figures.append(run.times(step, seconds[1:], limit))
    return figures


async def _measure_suspensions(run: _Run) -> Sequence[Figure]:
    suspended, resumed = [], []
    async with open_echo(run.core) as (session, endpoint):
        assert session.processor is not None, "it was booted here"
        for _ in range(run.repeat + 1):
            begin = time.perf_counter()
            await session.processor.suspend()
            suspended.append(time.perf_counter() - begin)
            await endpoint.send(_PING)
            begin = time.perf_counter()
            await session.processor.resume()
            _check_echo((await endpoint.receive()).payload, _PING)
            resumed.append(time.perf_counter() - begin)
    return [run.times("suspend", suspended[1:]), run.times("resume", resumed[1:])]


async def _measure_handovers(run: _Run) -> Sequence[Figure]:
    path = run.directory / "rendezvous"
    detached, attached = [], []
    async with open_echo(NativePlatform(rendezvous=path)) as (session, _):
        await session.detach()
    for left in range(run.repeat, -1, -1):
        begin = time.perf_counter()
        async with open_echo(NativePlatform(rendezvous=path), attach=True) as (session, _):
            attached.append(time.perf_counter() - begin)
            if left:  # the end of the last session is the core's
                begin = time.perf_counter()
                await session.detach()
                detached.append(time.perf_counter() - begin)
    return [run.times("detach", detached), run.times("attach", attached[1:])]


async def _cycle_boots(run: _Run) -> Sequence[Figure]:
    async def boot() -> None:
        async with open_echo(run.core) as (session, endpoint):
            shutdown = await session.shutdown(endpoint, grace=_SLOWEST)
        if not shutdown.graceful:
            raise PeerError(f"the core did not leave when it was asked to: {shutdown.reason}")

    return await _cycle(run, "boots", boot)


async def _cycle_crashes(run: _Run) -> Sequence[Figure]:
    # The times of crashes are kept for the window.
    policy = CrashPolicy(recovery=True, limit=1 << 30, window=1.0)
    async with open_echo(run.core, policy=policy) as (session, endpoint):

        async def crash() -> None:
            await _recover(session, endpoint)

        return await _cycle(run, "crashes", crash)


async def _cycle(run: _Run, name: str, once: Callable[[], Awaitable[None]]) -> Sequence[Figure]:
    """Does the same again and again: how fast, and what this program has more of afterwards."""
    for _ in range(max(1, int(run.cycles * _WARM_UP))):
        await once()
    before = _look()
    begin = time.perf_counter()
    for _ in range(run.cycles):
        await once()
    seconds = time.perf_counter() - begin
    after = _look()
    limits = (("memory", "MiB", _MOST_GROWTH), ("descriptors", "", 0.0), ("children", "", 0.0))
    return [
        Figure(run.core, name, "/s", (run.cycles / seconds,)),
        *(
            Figure(run.core, f"{name}-{what}", unit, (new - old,), limit, around=(old, new))
            for (what, unit, limit), old, new in zip(limits, before, after, strict=True)
        ),
    ]


def _look() -> tuple[float, int, int]:
    """Resident memory of this process in MiB, its open descriptors, and its child processes."""
    gc.collect()  # what only a cycle keeps is no leak
    children = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            children += len((task / "children").read_text().split())
    return resident(os.getpid()) / 2**20, len(os.listdir("/proc/self/fd")), children


# Loading and decoding

# ELF64 header: identification, type, machine, version, entry, phoff, shoff, flags, ehsize,
# phentsize, phnum, shentsize, shnum, shstrndx
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
# ELF64 program header: type, flags, offset, vaddr, paddr, filesz, memsz, align
_PHDR = struct.Struct("<IIQQQQQQ")
_ET_EXEC, _PT_LOAD, _ALL = 2, 1, 7
_PAGE = 4096


def create_image(size: int) -> bytes:
    """An ELF file for the native core with one segment of `size` bytes, on a page of the file."""
    machine = decode_elf_untrusted(shipped_echo().read_bytes()).machine
    header = _EHDR.pack(
        b"\x7fELF\x02\x01\x01",
        _ET_EXEC,
        machine,
        1,
        RAM_DA,
        _EHDR.size,
        0,
        0,
        _EHDR.size,
        _PHDR.size,
        1,
        0,
        0,
        0,
    )
    header += _PHDR.pack(_PT_LOAD, _ALL, _PAGE, RAM_DA, RAM_DA, size, size, _PAGE)
    # Not zeros, which would all be read from the same page.
    return b"".join((header.ljust(_PAGE, b"\0"), b"\xa5" * size))


async def _measure_loading(run: _Run) -> Sequence[Figure]:
    """Beside memcpy of the segment into the same memory, all of which was written before."""
    image = create_image(run.image_size)
    path = run.directory / "image.elf"
    path.write_bytes(image)
    copied, loaded, read = [], [], []
    platform = NativePlatform(ram_size=run.image_size)
    async with open_processor(platform) as processor:
        ram = platform.memory.regions[0].view
        segment = memoryview(image)[_PAGE:]
        await processor.configure()
        await processor.load(image)
        for _ in range(run.repeat):
            begin = time.perf_counter()
            ram[:] = segment
            copied.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            await processor.load(image)
            loaded.append(time.perf_counter() - begin)
        # Apart, because a load also gives the memory of the image before it back.
        for _ in range(run.repeat + 1):
            begin = time.perf_counter()
            await processor.load(path)
            read.append(time.perf_counter() - begin)
    path.unlink()
    ratios = tuple(memcpy / load for memcpy, load in zip(copied, loaded, strict=True))
    return [
        run.speed("-", "memcpy", copied),
        run.speed(run.core, "load", loaded),
        Figure(run.core, "load-ratio", "memcpy", ratios, _LEAST_OF_MEMCPY, of_rate=True),
        run.speed(run.core, "load-path", read[1:]),
    ]


def create_table(entries: int) -> bytes:
    """A resource table with so many entries, of several kinds in turn."""
    vring = Vring(da=DA_ANY, align=_PAGE, num=256, notify_id=NOTIFY_ID_ANY)
    kinds: Sequence[Entry] = (
        Carveout(da=DA_ANY, pa=DA_ANY, length=_PAGE, flags=0, name="carveout"),
        Trace(da=RAM_DA, length=_PAGE, name="trace"),
        Vdev(VIRTIO_ID_RPMSG, NOTIFY_ID_ANY, RPMSG_F_NS, vrings=(vring, vring)),
        Vendor.of(128, b"vendor's"),
    )
    return encode_table(place_entries([kinds[i % len(kinds)] for i in range(entries)]))


async def _measure_decoding(run: _Run) -> Sequence[Figure]:
    data = create_table(TABLE_ENTRIES)
    seconds = []
    for _ in range(run.repeat + 1):
        begin = time.perf_counter()
        decode_table_untrusted(data)
        seconds.append(time.perf_counter() - begin)
        await trio.lowlevel.checkpoint()
    milliseconds = tuple(1e3 * each for each in seconds[1:])
    return [Figure("-", "table", "ms", milliseconds, _MOST_OF_TABLE)]
