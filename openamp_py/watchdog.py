"""Watchdogs: a core that answers no more is reported as crashed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from openamp_py.background import open_background
from openamp_py.errors import CrashKind
from openamp_py.remoteproc import ProcessorState, RemoteProcessor
from openamp_py.rpmsg import Bus, Endpoint

_EXECUTES = (ProcessorState.RUNNING, ProcessorState.ATTACHED)


class Watchdog:
    """Reports its processor as crashed when it was not fed for too long. See `open_watchdog`.

    Attributes:
        processor: whom it watches.
        silence: seconds without a sign of life that are too long.
    """

    def __init__(self, processor: RemoteProcessor, silence: float) -> None:
        if not 0 < silence < float("inf"):
            raise ValueError(f"a silence of {silence} s; more than 0 seconds are needed")
        self.processor = processor
        self.silence = silence
        self._fed = trio.current_time()

    def feed(self) -> None:
        """The core has given a sign of life."""
        self._fed = trio.current_time()

    async def run(self) -> None:
        """Watches until it is cancelled. A core that does not execute need not be fed.

        Raises:
            StateError: the processor's block has ended.
        """
        processor = self.processor
        while True:
            if processor.state not in _EXECUTES:
                await processor.wait_state(*_EXECUTES)
                self.feed()
            entered = processor.entered
            with trio.move_on_at(self._fed + self.silence):
                while processor.entered == entered:
                    await processor.wait_change()
            if processor.entered != entered:
                self.feed()
            elif trio.current_time() >= self._fed + self.silence:
                processor.report_crash(CrashKind.WATCHDOG, f"no sign of life for {self.silence} s")
                self.feed()  # it is ending, which takes a while


@asynccontextmanager
async def open_watchdog(processor: RemoteProcessor, silence: float) -> AsyncIterator[Watchdog]:
    """A watchdog for an `async with` block; the program feeds it with what it hears of the core.

    It goes on after a recovery, and rests while the core is suspended.

    Args:
        processor: whom to report.
        silence: seconds without `Watchdog.feed` that are too long.

    Raises:
        ValueError: `silence` is not a time.
    """
    watchdog = Watchdog(processor, silence)
    async with open_background() as nursery:
        nursery.start_soon(watchdog.run)
        yield watchdog


@asynccontextmanager
async def open_heartbeat(
    processor: RemoteProcessor, bus: Bus, service: str, silence: float, *, beat: bytes = b"beat"
) -> AsyncIterator[Watchdog]:
    """A watchdog that asks: it sends a message to a service, again and again, and wants answers.

    The service must answer whoever asks, as the echo service does; that it is not announced in
    time counts as silence too. Ends when the bus is closed.

    Args:
        processor: whom to report.
        bus: where the service is.
        service: its name.
        silence: seconds without an answer, or an announcement, that are too long.
        beat: what to send: each quarter of that time.

    Raises:
        ValueError: `silence` is not a time, or the beat is too long for the bus.
        trio.BrokenResourceError: the other side is gone.
    """
    watchdog = Watchdog(processor, silence)
    if len(beat) > bus.payload_limit:
        raise ValueError(f"a beat of {len(beat)} bytes; {bus.payload_limit} are possible")
    async with bus.open_endpoint(rebind=True) as endpoint, open_background() as nursery:
        nursery.start_soon(_watch, watchdog, bus, endpoint, service, beat)
        yield watchdog


async def _watch(
    watchdog: Watchdog, bus: Bus, endpoint: Endpoint, service: str, beat: bytes
) -> None:
    """A watchdog as long as there is a bus to ask on."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watchdog.run)
        await _beat(watchdog, bus, endpoint, service, beat)
        nursery.cancel_scope.cancel()


async def _beat(
    watchdog: Watchdog, bus: Bus, endpoint: Endpoint, service: str, beat: bytes
) -> None:
    while True:
        try:
            channel = await bus.wait_service(service)
            await endpoint.send_to(beat, channel.address)
            with trio.move_on_after(watchdog.silence / 4):
                while True:
                    await endpoint.receive()
                    watchdog.feed()
        except trio.BrokenResourceError:
            generation = bus.generation
            while bus.failure is not None and bus.generation == generation:
                await watchdog.processor.wait_change()
        except trio.ClosedResourceError:
            return
