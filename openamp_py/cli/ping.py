"""``openamp ping``: boot a remote, exchange checked messages with it, shut it down."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import signal
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import trio

from openamp_py.background import open_background
from openamp_py.choosing import choose, is_core
from openamp_py.cli.common import (
    DONE,
    FAILED,
    Progress,
    Subparsers,
    UsageError,
    add_core_options,
    crash_policy,
    plain_errors,
    positive_int,
    printable,
    say_debugger,
    seconds,
    usage_errors,
)
from openamp_py.constants import ECHO_CHANNEL
from openamp_py.errors import CrashKind, OpenAMPError, PeerError
from openamp_py.remoteproc import Platform
from openamp_py.remoteproc.sources import Image
from openamp_py.rpmsg import BusDump, Endpoint, Message
from openamp_py.rpmsg.wire import check_name
from openamp_py.session import Session, Shutdown, check_core, open_session

_LIMITS = {"timeout": 10.0, "wait": 1.0, "grace": 2.0}
"""Seconds by default. There is no limit where a debugger may hold the core."""

# Payload of the echo demo: number u64, size u64, then `size` bytes of the pattern.
_PREFIX = struct.Struct("<QQ")
_PATTERN = b"\xa5"

_SILENT_LIMIT = 3
"""Pings without a reply, one after the other, that are taken for a hang."""


def add_parser(commands: Subparsers, common: argparse.ArgumentParser) -> None:
    """Declares ``openamp ping``."""
    parser = commands.add_parser(
        "ping",
        parents=[common],
        help="boot a remote, exchange messages with it, shut it down",
        description="Boots a remote, waits for its echo service, sends it messages one at a time, "
        "checks what comes back, and shuts the remote down gracefully.",
    )
    add_core_options(
        parser, urls=", or shm:PATH?doorbell=unix:PATH[&listen=1] for a peer that runs already"
    )
    parser.add_argument("--channel", default=ECHO_CHANNEL, help="service to talk to")
    parser.add_argument("-c", "--count", type=positive_int, default=5, help="messages (default: 5)")
    parser.add_argument(
        "--size", type=int, default=56, help="bytes of data behind 16 of header (default: 56)"
    )
    parser.add_argument(
        "--interval", type=seconds, default=0.0, help="seconds between messages (default: 0)"
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        help="seconds to wait for the peer and its service (default: 10; any time with --gdb)",
    )
    parser.add_argument(
        "--wait",
        type=seconds,
        help="seconds to wait for a reply (default: 1; any time with --gdb)",
    )
    parser.add_argument(
        "--grace",
        type=seconds,
        help="seconds the remote has to leave (default: 2; any time with --gdb)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="only the summary")
    parser.add_argument(
        "--dump", action="store_true", help="show rings, endpoints and counters afterwards"
    )
    parser.add_argument(
        "--console", action="store_true", help="show what the core wrote to its console"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.set_defaults(run=_run)


class RoundTrips:
    """Round-trip times, kept to three digits so that any number of them takes little memory."""

    def __init__(self) -> None:
        self._counts: Counter[float] = Counter()
        self._min = math.inf
        self._max = 0.0

    def add(self, microseconds: float) -> None:
        """Counts one."""
        self._min = min(self._min, microseconds)
        self._max = max(self._max, microseconds)
        self._counts[float(f"{microseconds:.3g}")] += 1

    def summary(self) -> dict[str, float] | None:
        """min, p50, p99 and max in microseconds; None without any."""
        total = self._counts.total()
        if not total:
            return None
        ordered = sorted(self._counts.items())
        passed = list(itertools.accumulate(count for _, count in ordered))

        def quantile(q: float) -> float:
            rank = math.ceil(q * total)
            value = next(v for (v, _), n in zip(ordered, passed, strict=True) if n >= rank)
            return min(value, round(self._max, 1))

        return {
            "min": round(self._min, 1),
            "p50": quantile(0.5),
            "p99": quantile(0.99),
            "max": round(self._max, 1),
        }


_NOT_UP = Shutdown(graceful=False, reason="it never came up")


@dataclass(slots=True)
class _Result:
    """What has happened so far."""

    core: str
    sent: int = 0
    received: int = 0
    corrupt: int = 0
    boot_ms: float | None = None
    times: RoundTrips = field(default_factory=RoundTrips)
    shutdown: Shutdown = _NOT_UP
    dump: BusDump | None = None
    coredump: Path | None = None
    console: str = ""

    @property
    def lost(self) -> int:
        return self.sent - self.received


def _run(options: argparse.Namespace) -> int:
    if options.size < 0:
        raise UsageError(f"--size {options.size}; it cannot be negative")
    with usage_errors():
        check_core(options.core, options.firmware, gdb=options.gdb)
        check_name(options.channel)
    set_limits(options)
    result = _Result(options.core)
    error: OpenAMPError | OSError | None = None
    try:
        with plain_errors():
            trio.run(_ping, options, result)
    except (OpenAMPError, OSError) as problem:
        error = problem
    if options.json:
        print(json.dumps(_to_dict(options, result, error)))
    else:
        if result.boot_ms is not None:
            _print_summary(options, result)
        if result.coredump is not None:
            print(f"coredump: {result.coredump}")
        if options.console:
            print(f"--- console ---\n{printable(result.console) or '(empty)'}")
    if error is not None:
        raise error
    return FAILED if result.lost or result.corrupt else DONE


def set_limits(options: argparse.Namespace) -> None:
    """Fills in the time limits that were not given."""
    for name, limit in _LIMITS.items():
        if getattr(options, name) is None:
            setattr(options, name, limit if options.gdb is None else math.inf)


async def _ping(options: argparse.Namespace, result: _Result) -> None:
    progress = Progress("ping", options.count)
    started = time.perf_counter()
    try:
        with trio.CancelScope() as waiting:
            waiting.deadline = trio.current_time() + options.timeout
            core, image = await _choose(options, result)
            async with (
                open_session(core, image, policy=crash_policy(options)) as session,
                _open_aftermath(options, session, result),
                session.bus.open_endpoint(options.channel) as endpoint,
            ):
                _check_size(options, endpoint)
                if session.processor is not None and image is not None:
                    say_debugger(session.processor.platform, options.firmware or image)
                with trio.CancelScope(deadline=waiting.deadline) as announcing:
                    waiting.deadline = math.inf
                    await endpoint.wait_bound()
                if announcing.cancelled_caught:
                    seen = await session.describe_silence()
                    raise PeerError(f"{_nobody(options, result)}; {seen}")
                result.boot_ms = (time.perf_counter() - started) * 1e3
                try:
                    await _ping_until_interrupted(options, session, endpoint, result, progress)
                finally:
                    if options.dump:
                        result.dump = session.bus.dump()
        if waiting.cancelled_caught:
            raise PeerError(
                f"{_nobody(options, result)}; is the peer running, and does it announce this name?"
            )
    finally:
        progress.clear()


async def _choose(
    options: argparse.Namespace, result: _Result
) -> tuple[str | Platform, Image | None]:
    """The core, and what it is to run; a peer that runs already has no image."""
    if not is_core(options.core):
        return options.core, None
    with usage_errors():
        result.core, platform, image = await choose(options.core, options.firmware, gdb=options.gdb)
    return platform, image


def _nobody(options: argparse.Namespace, result: _Result) -> str:
    return f"no service {options.channel!r} on {result.core} within {options.timeout:g} s"


@asynccontextmanager
async def _open_aftermath(
    options: argparse.Namespace, session: Session, result: _Result
) -> AsyncIterator[None]:
    """Has a core that crashed, or does not answer, dumped before the session ends."""
    processor = session.processor
    try:
        yield
    except (OpenAMPError, trio.BrokenResourceError) as error:
        if processor is not None and options.coredump is not None:
            processor.report_crash(CrashKind.WATCHDOG, str(error))  # no news where it crashed
            with trio.CancelScope(shield=True):
                await processor.wait_settled()
            result.coredump = processor.last_coredump
        raise
    finally:
        if processor is not None:
            result.console = processor.platform.console


def _check_size(options: argparse.Namespace, endpoint: Endpoint) -> None:
    limit = endpoint.payload_limit - _PREFIX.size
    if options.size > limit:
        raise UsageError(f"--size {options.size} is too large; the limit on this link is {limit}")


async def _ping_until_interrupted(
    options: argparse.Namespace,
    session: Session,
    endpoint: Endpoint,
    result: _Result,
    progress: Progress,
) -> None:
    """Pings, and shuts down gracefully also after Ctrl-C; a second one makes it hard."""
    with trio.open_signal_receiver(signal.SIGINT) as signals:
        _print_start(options, endpoint, result)
        async with open_background() as nursery:
            pinging, leaving = trio.CancelScope(), trio.CancelScope()

            async def interrupt() -> None:
                for scope in (pinging, leaving):
                    await anext(signals)
                    scope.cancel()

            nursery.start_soon(interrupt)
            try:
                with pinging:
                    await _exchange(options, session, endpoint, result, progress)
            except (trio.BrokenResourceError, PeerError) as error:
                result.shutdown = Shutdown(False, str(error.__cause__ or error))
                raise
            result.shutdown = Shutdown(False, "it was interrupted")
            with leaving:
                result.shutdown = await session.shutdown(endpoint, grace=options.grace)
    if not result.shutdown.graceful:
        raise PeerError(f"the shutdown was hard: {result.shutdown.reason}")


async def _exchange(
    options: argparse.Namespace,
    session: Session,
    endpoint: Endpoint,
    result: _Result,
    progress: Progress,
) -> None:
    """Sends `count` messages, one in flight, and checks each reply."""
    data = _PATTERN * options.size
    silent = 0
    for number in range(options.count):
        payload = _PREFIX.pack(number, options.size) + data
        begin = time.perf_counter()
        await endpoint.send(payload)
        result.sent += 1
        try:
            reply = await _reply(endpoint, number, options.wait)
        except trio.Cancelled:
            result.sent -= 1  # interrupted: neither answered nor lost
            raise
        if reply is None:
            silent += 1
            if silent == _SILENT_LIMIT:
                raise PeerError(
                    f"no reply to {silent} messages in a row within {options.wait} s each; "
                    f"{await session.describe_silence()}"
                )
            continue
        silent = 0
        taken = (time.perf_counter() - begin) * 1e6
        result.received += 1
        result.times.add(taken)
        good = reply.payload == payload
        result.corrupt += not good
        if not (options.quiet or options.json):
            remark = "" if good else "  CORRUPT"
            print(
                f"{len(reply.payload)} bytes from {reply.source:#x}: seq={number} "
                f"time={taken:.0f} us{remark}"
            )
        else:
            progress.show(number + 1)
        if options.interval and number + 1 < options.count:
            await trio.sleep(options.interval)


async def _reply(endpoint: Endpoint, number: int, wait: float) -> Message | None:
    """The reply to message `number`, or None; late ones to earlier messages are passed over."""
    with trio.move_on_after(wait):
        async for message in endpoint:
            if len(message.payload) < _PREFIX.size:
                return message
            if _PREFIX.unpack_from(message.payload)[0] >= number:
                return message
        raise PeerError("the remote withdrew its service")
    return None


def _print_start(options: argparse.Namespace, endpoint: Endpoint, result: _Result) -> None:
    if not options.json:
        print(
            f"PING {options.channel} ({endpoint.destination:#x}) on {result.core}: "
            f"{options.size}({options.size + _PREFIX.size}) bytes of data.",
            flush=True,
        )


def _print_summary(options: argparse.Namespace, result: _Result) -> None:
    print(f"--- {options.channel} ping statistics ---")
    print(
        f"{result.sent} sent, {result.received} received, {result.lost} lost, "
        f"{result.corrupt} corrupt"
    )
    times = result.times.summary()
    if times:
        print("rtt min/p50/p99/max = {min:g}/{p50:g}/{p99:g}/{max:g} us".format(**times))
    why = f" ({result.shutdown.reason})" if result.shutdown.reason else ""
    print(f"boot {result.boot_ms:.1f} ms, shutdown {result.shutdown}{why}")
    if result.dump is not None:
        print(result.dump)


def _to_dict(
    options: argparse.Namespace, result: _Result, error: Exception | None
) -> dict[str, object]:
    return {
        "core": result.core,
        "firmware": str(options.firmware) if options.firmware else None,
        "channel": options.channel,
        "size": options.size,
        "sent": result.sent,
        "received": result.received,
        "lost": result.lost,
        "corrupt": result.corrupt,
        "rtt_us": result.times.summary(),
        "boot_ms": None if result.boot_ms is None else round(result.boot_ms, 3),
        "shutdown": str(result.shutdown),
        "shutdown_reason": result.shutdown.reason,
        "error": None if error is None else str(error),
        "console": result.console,
        "coredump": None if result.coredump is None else str(result.coredump),
    } | ({"dump": asdict(result.dump)} if result.dump else {})
