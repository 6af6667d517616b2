"""How fast messages go round: endpoints in Python beside the same loops written in C.

Both sides of the comparison boot the same kind of core and bring its rings up with the same
code. Then a loop exchanges numbered messages with an echo service and checks each that
comes back: once with the endpoints of a `Bus`, once in C over the bare rings.

    core      echo service beside Python            echo service beside C
    loopback  a task of this thread, in Python      the same thread, in C, no doorbell
    process   a process of its own, in Python       a process of its own, in C
    native    the shipped firmware                  the shipped firmware

Host and core are pinned to a CPU each where there are two: left to itself, the scheduler
puts them together or apart from one run to the next, which changes a round trip fivefold.

As a program (``python -m openamp_py.bench URL``) this plays the echo service in C on a link.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from openamp_py.background import open_background
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
from openamp_py.remoteproc.processor import Image
from openamp_py.rpmsg import Endpoint
from openamp_py.rpmsg.bus import open_rings
from openamp_py.session import CORES, open_session
from openamp_py.virtio.yardstick import NUMBER_SIZE, Yardstick

CASES: Final = ("ping", "flood")
"""One message out at a time, or as many as there are buffers."""
SIZES: Final = (16, 496)

# Before the first measurement of its kind, a part of its time is spent unmeasured.
_WARM_UP = 0.1

# A remote that takes so much longer (seconds) than it should is taken to hang.
_SILENT = 10.0

# The shipped firmware listens at the first dynamic address; an echo in C does at any.
_ADDRESS = FIRST_DYNAMIC_ADDRESS

_NUMBER = struct.Struct("<Q")
assert _NUMBER.size == NUMBER_SIZE


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured for one core, size and case: round trips per second, one per repeat."""

    core: str
    size: int
    case: str
    python: tuple[float, ...]
    c: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times slower Python is, by the medians."""
        return statistics.median(self.c) / statistics.median(self.python)


class Contender(Protocol):
    """One side of the comparison, with a core that runs."""

    core: Link | None

    async def measure(self, case: str, size: int, seconds: float) -> float:
        """Round trips per second. Sends for `seconds`, then waits for what is still out.

        Raises:
            ValueError: messages of this size do not go over the link.
            PeerError: a message came back changed, or not at all.
            CoreDiedError: the core died.
            trio.BrokenResourceError: the same.
        """
        ...


class PythonContender:
    """Endpoints of a bus, used as a program would use them."""

    def __init__(self, endpoint: Endpoint, core: Link | None) -> None:
        self.core = core
        self._endpoint = endpoint

    async def measure(self, case: str, size: int, seconds: float) -> float:
        """See `Contender.measure`."""
        limit = self._endpoint.payload_limit
        if not NUMBER_SIZE <= size <= limit:
            raise ValueError(f"messages of {size} bytes; {NUMBER_SIZE} to {limit} are possible")
        loop = self._ping if case == "ping" else self._flood
        with _patience(seconds):
            return await loop(size, seconds)

    async def _ping(self, size: int, seconds: float) -> float:
        endpoint = self._endpoint
        taken = 0.0
        begin = time.perf_counter()
        for number, payload in enumerate(_payloads(size)):
            await endpoint.send(payload)
            _check(number, payload, (await endpoint.receive()).payload)
            taken = time.perf_counter() - begin
            if taken >= seconds:
                return (number + 1) / taken
        raise AssertionError("there is always a next payload")

    async def _flood(self, size: int, seconds: float) -> float:
        endpoint = self._endpoint
        sent = received = 0
        taken = 0.0
        expected = _payloads(size)

        async def send() -> None:
            nonlocal sent
            with contextlib.suppress(trio.BrokenResourceError):  # the receiver hears of it too
                for payload in _payloads(size):
                    await endpoint.send(payload)
                    sent += 1

        async def receive() -> None:
            nonlocal received
            _check(received, next(expected), (await endpoint.receive()).payload)
            received += 1

        async with open_background() as nursery:
            nursery.start_soon(send)
            begin = time.perf_counter()
            while taken < seconds:
                await receive()
                taken = time.perf_counter() - begin
        rate = received / taken
        while received < sent:
            await receive()
        return rate


class CContender:
    """A yardstick on the host's end of the link."""

    def __init__(self, yardstick: Yardstick, processor: RemoteProcessor) -> None:
        self.core = processor.core
        self._yardstick = yardstick
        self._processor = processor

    async def measure(self, case: str, size: int, seconds: float) -> float:
        """See `Contender.measure`. No other task runs meanwhile."""
        await trio.lowlevel.checkpoint()
        try:
            return self._yardstick.measure(
                size=size,
                in_flight=1 if case == "ping" else None,
                seconds=seconds,
                source=_ADDRESS,
                destination=_ADDRESS,
            )
        except PeerGoneError:
            # The processor knows better what became of its core, as soon as it looks.
            with trio.move_on_after(_SILENT):
                await self._processor.wait_exit()
            raise


async def run_bench(
    *,
    cores: Iterable[str] = CORES,
    sizes: Iterable[int] = SIZES,
    cases: Iterable[str] = CASES,
    seconds: float = 0.3,
    repeat: int = 3,
    progress: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Measures every core, size and case, in Python and in C.

    The two take turns, and take turns at being first, so that what drifts meets both.

    Args:
        cores: of `CORES`.
        sizes: bytes of payload.
        cases: of `CASES`.
        seconds: how long each measurement sends.
        repeat: how often each is measured.
        progress: called after each measurement; there are two for each repeat of each row.

    Raises:
        ValueError: a size that is not possible.
        OpenAMPError: a core could not be started, or died, or did not echo.
        trio.BrokenResourceError: the same.
    """
    rows = []
    with _pinned_host() as cpu:
        for core in cores:
            async with open_python(core) as python, open_c(core) as c:
                _pin(python.core, cpu)
                _pin(c.core, cpu)
                for size, case in itertools.product(sizes, cases):
                    rates: dict[Contender, list[float]] = {python: [], c: []}
                    for contender in rates:
                        await contender.measure(case, size, seconds * _WARM_UP)
                    for turn in range(repeat):
                        for contender in (python, c) if turn % 2 == 0 else (c, python):
                            rates[contender].append(await contender.measure(case, size, seconds))
                            progress()
                    rows.append(Row(core, size, case, tuple(rates[python]), tuple(rates[c])))
    return rows


@contextmanager
def _pinned_host() -> Iterator[int]:
    """Keeps this thread on one CPU for a `with` block; gives one for cores, another if there is."""
    before = os.sched_getaffinity(0)
    host, *others = sorted(before)
    os.sched_setaffinity(0, {host})
    try:
        yield others[0] if others else host
    finally:
        os.sched_setaffinity(0, before)


def _pin(core: Link | None, cpu: int) -> None:
    """Keeps a core that is a process on one CPU."""
    if isinstance(core, NativeCore | ProcessCore) and core.pid is not None:
        with contextlib.suppress(ProcessLookupError):  # it ended: whoever talks to it will hear
            os.sched_setaffinity(core.pid, {cpu})


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Ends a block that takes longer than `seconds` and some grace with a PeerError."""
    limit = seconds + _SILENT
    try:
        with trio.fail_after(limit):
            yield
    except trio.TooSlowError:
        raise PeerError(f"the other side does not answer: gave up after {limit} s") from None


def _payloads(size: int) -> Iterator[bytes]:
    fill = bytes(size - NUMBER_SIZE)
    return (_NUMBER.pack(number) + fill for number in itertools.count())


def _check(number: int, sent: bytes, received: bytes) -> None:
    if received != sent:
        raise PeerError(
            f"message {number} came back changed or out of order: {len(received)} bytes that "
            f"begin with {received[:NUMBER_SIZE].hex()}, for {len(sent)}"
        )


@asynccontextmanager
async def open_python(core: str) -> AsyncIterator[PythonContender]:
    """Boots a core and its echo service for an `async with` block. Raises what `measure` does."""
    async with open_session(core) as session, session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
        assert session.processor is not None, "it was booted here"
        with _patience(0):
            await endpoint.wait_bound()
        yield PythonContender(endpoint, session.processor.core)


@asynccontextmanager
async def open_c(core: str) -> AsyncIterator[CContender]:
    """Boots a core and an echo service to compare with, for an `async with` block.

    Raises what `measure` does.
    """
    ready, remote = trio.open_memory_channel[Yardstick](1)

    async def application(link: Link) -> None:
        async with open_resources(link) as resources, open_rings(resources.rpmsg_device()) as rings:
            await ready.send(Yardstick(*rings))
            await trio.sleep_forever()

    platform: Platform
    image: Image = python_firmware()
    if core == "loopback":
        platform = LoopbackPlatform(application)
    elif core == "process":
        platform = ProcessPlatform(module_command("openamp_py.bench", URL))
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
                yardstick = Yardstick(*rings, doorbell=link.doorbell.fileno())
            else:
                yardstick = Yardstick(*rings, peer=await remote.receive())
            yield CContender(yardstick, processor)


async def serve_echo(address: ShmAddress) -> None:
    """Plays the echo service, in C and without a name, until the host is gone.

    Raises:
        PlatformError: the link cannot be made.
        PeerError: the host broke the protocol.
        trio.BrokenResourceError: the host left before it brought the device up.
    """
    with contextlib.closing(ShmLink(address)) as link:
        async with open_resources(link) as resources, open_rings(resources.rpmsg_device()) as rings:
            assert link.doorbell is not None, "the link is up"
            Yardstick(*rings, doorbell=link.doorbell.fileno()).echo()


if __name__ == "__main__":
    trio.run(serve_echo, ShmAddress.parse(sys.argv[1]))
