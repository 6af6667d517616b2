"""What the pytest plugin does once a test uses a core: boots it, watches, and says what it saw."""

from __future__ import annotations

import functools
import linecache
import os
import re
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final

import pytest
import trio

from openamp_py.background import open_background
from openamp_py.choosing import AUTO, QEMU, choose_core, shipped_image
from openamp_py.cli.common import printable
from openamp_py.errors import OpenAMPError, PlatformError
from openamp_py.platforms.boards import BOARDS
from openamp_py.platforms.machine import find_program
from openamp_py.platforms.native import native_machine
from openamp_py.remoteproc import (
    Firmware,
    Platform,
    RemoteProcessor,
    decode_image_untrusted,
    read_trace,
)
from openamp_py.remoteproc.crash import NO_POLICY, CrashPolicy
from openamp_py.remoteproc.dumping import save_dump
from openamp_py.remoteproc.sources import Image
from openamp_py.rpmsg import BusOptions
from openamp_py.rpmsg.options import DEFAULT_OPTIONS
from openamp_py.session import Session, open_session

_DUMP_GRACE: Final = 10.0
"""Seconds that the coredump has when a test has failed."""

_MAX_TEXT: Final = 8192
"""Characters of a trace or a console that a report shows: the last ones."""

_MAX_PLACES: Final = 8
"""Tasks of a test whose places are told when its time is up."""

_PACKAGE: Final = Path(__file__).parent

_MAX_NAME: Final = 100
"""Characters of a test's name in that of its coredump."""

_NO_FAILURE = (
    *(pytest.skip.Exception, pytest.xfail.Exception, pytest.exit.Exception),
    KeyboardInterrupt,
)

Section = tuple[str, str]
"""A section of a report: its title and its text."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a test boots, and how long it may take: known before it runs."""

    test: str
    root: Path
    core: str
    platform: Callable[[str], str | Platform]
    image: Image | None
    options: BusOptions | None
    policy: CrashPolicy | None
    timeout: float
    full_trace: bool
    find_dumps: Callable[[], Path]


@dataclass(slots=True)
class Report:
    """What a failure shows: sections of its report, and properties for the JUnit file."""

    sections: list[Section] = field(default_factory=list)
    properties: list[tuple[str, object]] = field(default_factory=list)


@dataclass(slots=True)
class _Boot:
    """A session, and what was booted in it."""

    session: Session
    image: Image | None
    began: float
    up: float


class Watch:
    """Watches one test: how long it takes, and what its cores did when it fails.

    Made by the plugin for each test that boots a core; one run long.

    Attributes:
        error: what the test itself has raised, or why its time was up before it began.
        report: what its failure shows of the cores.
    """

    def __init__(self, plan: Plan) -> None:
        self.error: BaseException | None = None
        self.report = Report()
        self._plan = plan
        self._boots: list[_Boot] = []
        self._time_is_up = ""
        self._reached = self._told = self._expired = False
        self._ended_with: BaseException | None = None
        self._test: trio.CancelScope | None = None
        self._began = 0.0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Counts the time from now on, for an `async with` block around fixtures and test.

        Raises:
            pytest.fail.Exception: it was up before the test began.
        """
        self._began = trio.current_time()
        with trio.CancelScope() as scope:
            async with open_background() as nursery:
                nursery.start_soon(self._expire, scope)
                yield
        if scope.cancelled_caught:
            self.error = pytest.fail.Exception(self._time_is_up, pytrace=False)
            raise self.error from None

    async def _expire(self, scope: trio.CancelScope) -> None:
        """Looks before it ends anything: what waits for what is gone afterwards."""
        await trio.sleep_until(self._began + self._plan.timeout)
        self._expired = True
        where = "; ".join(_find_places(self._plan.root)) or "nowhere in the tests"
        self._time_is_up = f"no end within {self._plan.timeout:g} s (openamp_timeout): {where}"
        await self.examine(TimeoutError(self._time_is_up))
        if self._test is not None:
            self._test.cancel()
        elif self.error is None:  # otherwise the test has told already
            scope.cancel()

    @asynccontextmanager
    async def open_session(self, **changes: Any) -> AsyncIterator[Session]:
        """A session on the test's core, for an `async with` block.

        Args:
            changes: of what `open_session` takes, other than the test's own.
        """
        plan = self._plan
        arguments: dict[str, Any] = {
            "image": plan.image,
            "options": plan.options or DEFAULT_OPTIONS,
            "policy": plan.policy or NO_POLICY,
        } | changes
        began = trio.current_time()
        async with open_session(plan.platform(plan.core), **arguments) as session:
            boot = _Boot(session, arguments["image"], began, trio.current_time())
            self._boots.append(boot)
            try:
                yield session
            except BaseException as error:
                await self._examine_ending(error)
                raise
            finally:
                self._boots.remove(boot)

    @asynccontextmanager
    async def boot(self) -> AsyncIterator[Session]:
        """The session of the fixture, which the test itself does not open."""
        async with AsyncExitStack() as stack:
            try:
                session = await stack.enter_async_context(self.open_session())
            except (OpenAMPError, OSError, ValueError, trio.BrokenResourceError) as error:
                problem = _in_a_line(_find_cause(error) or error)
                why = f"core {self._plan.core} was not booted: {problem}"
                self.error = pytest.fail.Exception(why, pytrace=False)
                raise self.error from None
            yield session
            if not self._reached:  # another fixture has failed: the test itself would have told
                await self.examine(None)

    def wrap(self, test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        """The test, watched."""

        @functools.wraps(test)
        async def watched(*args: object, **kwargs: object) -> None:
            __tracebackhide__ = True
            await self._run(functools.partial(test, *args, **kwargs))

        return watched

    async def _run(self, test: Callable[[], Awaitable[None]]) -> None:
        __tracebackhide__ = True
        error: BaseException | None = None
        self._reached = True
        with trio.CancelScope() as self._test:
            try:
                await test()
            except BaseException as raised:
                if not (self._expired and _is_cancelled(raised)):
                    self.error = raised
                    await self.examine(raised)
                    if isinstance(raised, trio.BrokenResourceError) and not self._plan.full_trace:
                        _shorten(raised, self._plan.root)
                    raise
                error = raised
            finally:
                self._test = None
        if self._expired:
            self.error = TimeoutError(self._time_is_up)
            trace = None if error is None else _cut(error.__traceback__, self._plan.root)
            raise self.error.with_traceback(trace)

    async def examine(self, error: BaseException | None) -> None:
        """Says what the test's cores did, for a test that has failed; once."""
        if self._told or isinstance(error, _NO_FAILURE):
            return
        self._told = True
        if not self._is_seen(error):
            self.report = await self._look(error)

    async def _examine_ending(self, error: BaseException) -> None:
        """Looks at a session that ends with an error while there is something to see.

        Whether the test expects it is not known yet: if it fails of another, that is told instead.
        """
        if self._told or self._is_seen(error) or isinstance(error, _NO_FAILURE):
            return
        if not _is_cancelled(error):
            self._ended_with = error
            report = await self._look(error)
            if not self._told:  # its time was up meanwhile
                self.report = report

    def _is_seen(self, error: BaseException | None) -> bool:
        """Whether it comes from the error of a session that was looked at when it ended."""
        return any(each is self._ended_with for each in _list_causes(error))

    async def _look(self, error: BaseException | None) -> Report:
        """Takes down all that can be seen now; nothing that goes wrong here hides the failure."""
        report = Report()
        with trio.CancelScope(shield=True):
            for number, boot in enumerate(self._boots, 1):
                head = f"openamp {self._plan.core}"
                if len(self._boots) > 1:
                    head += f", session {number}"
                try:
                    await self._describe(report, head, boot, error)
                except Exception as problem:
                    report.sections.append((head, f"this cannot be told: {problem!r}"))
        return report

    async def _describe(
        self, report: Report, head: str, boot: _Boot, error: BaseException | None
    ) -> None:
        """Adds what is known of one session, the most important first."""
        bus, processor = boot.session.bus, boot.session.processor
        happened = [_guarded(lambda: "\n".join(_tell_state(boot, error)))]
        try:
            happened.append(f"seen: {printable(await boot.session.describe_silence())}")
        except Exception as problem:
            happened.append(f"seen: this cannot be told: {problem!r}")
        if processor is not None:
            happened += await self._dump(report, boot, processor)
        sections = [
            ("what happened", "\n".join(happened)),
            ("last messages", _guarded(lambda: str(bus.recent()))),
        ]
        if processor is not None:
            sections += [(name, _tail(text)) for name, text in _read_texts(processor)]
        sections.append(("bus", _guarded(lambda: str(bus.dump()))))
        report.sections += [(f"{head}: {title}", text) for title, text in sections]

    async def _dump(self, report: Report, boot: _Boot, processor: RemoteProcessor) -> list[str]:
        """Writes the coredump; says where it is, and how to open it."""
        name = re.sub(r"[^\w.]+", "-", self._plan.test)[:_MAX_NAME].strip("-")
        try:
            with trio.fail_after(_DUMP_GRACE):
                dump = await processor.coredump()
                path = await save_dump(dump, f"{self._plan.find_dumps()}{os.sep}", f"{name}.core")
        except trio.TooSlowError:
            return [f"coredump: there is none within {_DUMP_GRACE:g} s"]
        except Exception as problem:
            return [f"coredump: there is none: {problem!r}"]
        report.properties.append(("openamp_coredump", str(path)))
        lines = [f"coredump: {path}"]
        if dump.machine:
            debugger = "gdb" if dump.machine == native_machine() else "gdb-multiarch"
            image = _find_image(processor, boot.image)
            files = ["-c", str(path)] if image is None else [str(image), str(path)]
            lines.append(f"to open it: {shlex.join([debugger, *files])}")
        if processor.last_coredump is not None:
            lines.append(f"coredump of the crash, by the policy: {processor.last_coredump}")
        return lines


def find_obstacle(core: str, image: Image | None) -> str | None:
    """Why this machine cannot run a core, in one line; None where it can, or its boot will say.

    Args:
        core: its name.
        image: what it is to run, which may decide what core that is.
    """
    try:
        if core in (AUTO, QEMU) and image is not None:
            core = choose_core(_decode(image), emulated=core == QEMU)
    except (OpenAMPError, OSError, ValueError):
        return None
    if core in (AUTO, "native") and native_machine() is None:
        return "the native core does not know this machine's instruction set"
    board = BOARDS.get(core.removeprefix(f"{QEMU}:")) if core.startswith(f"{QEMU}:") else None
    try:
        if board is not None:
            find_program(board)
    except PlatformError as error:
        return str(error)
    return None


def _decode(image: Image) -> Firmware:
    """An image that can be looked at twice.

    Raises:
        ValueError: it is a stream.
    """
    if isinstance(image, Firmware):
        return image
    if isinstance(image, (str, os.PathLike)):
        image = Path(image).read_bytes()
    if not isinstance(image, bytes):
        raise ValueError("a stream can be read once")
    return decode_image_untrusted(image)


def _tell_state(boot: _Boot, error: BaseException | None) -> Iterator[str]:
    bus, processor = boot.session.bus, boot.session.processor
    failure = (processor.failure if processor else None) or bus.failure
    cause = _find_cause(error) or error or failure
    if cause is not None:
        yield f"cause: {_in_a_line(cause)}"
    if failure is not None and failure is not cause:
        yield f"failure of the core: {_in_a_line(failure)}"
    now = trio.current_time()
    times = f"up after {boot.up - boot.began:.3f} s, {now - boot.up:.3f} s ago"
    if processor is None:
        yield f"core: a peer that runs by itself, {times}"
        return
    name = processor.core.name if processor.core else processor.name
    yield (
        f"core: {name}, {processor.state.value}, {times}; "
        f"boots: {processor.boots}, crashes: {processor.crashes}"
    )
    yield f"firmware: {_find_image(processor, boot.image) or 'given as data'}"


def _find_cause(error: BaseException | None) -> BaseException | None:
    """The error of ours that a failure comes from: in a group, or behind trio's own classes."""
    return next((each for each in _list_causes(error) if isinstance(each, OpenAMPError)), None)


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that it comes from, or that are in its group; the nearest first."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        each = waiting.pop(0)
        if each is None or any(each is known for known in seen):
            continue
        yield each
        seen.append(each)
        waiting += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions


def _in_a_line(error: BaseException) -> str:
    lines = printable(str(error)).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _read_texts(processor: RemoteProcessor) -> Iterator[Section]:
    """What the core wrote: its trace buffers, and its console."""
    table = processor.table
    for trace in table.traces if table else ():
        text = _guarded(functools.partial(read_trace, processor, trace.name))
        yield f"trace {printable(trace.name)}", text or "(empty)"
    console = _guarded(lambda: processor.platform.console)
    if console:
        yield "console", console


def _find_image(processor: RemoteProcessor, image: Image | None) -> Path | None:
    """The file that was booted, where it is one."""
    try:
        chosen = shipped_image(processor.platform) if image is None else image
    except PlatformError:
        return None
    return Path(chosen) if isinstance(chosen, (str, os.PathLike)) else None


def _guarded(tell: Callable[[], str]) -> str:
    """A text for a report, or why there is none: it must not hide the failure."""
    try:
        return printable(tell())
    except Exception as problem:
        return f"this cannot be told: {problem!r}"


def _tail(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"...{text[-_MAX_TEXT:]}"


def _is_cancelled(error: BaseException) -> bool:
    """Whether that is a cancellation, and nothing else."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_cancelled, error.exceptions))
    return isinstance(error, trio.Cancelled)


def _find_places(root: Path) -> list[str]:
    """Where in the tests the tasks of this run are; of each the innermost place."""
    places: list[str] = []
    tasks = [trio.lowlevel.current_root_task()]
    while tasks:
        task = tasks.pop()
        if task is None:
            continue
        tasks += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        own = [each for each in task.iter_await_frames() if _is_own(_file(each[0]), root)]
        for frame, number in own[-1:]:
            line = linecache.getline(_file(frame), number).strip()
            places.append(f"{Path(_file(frame)).relative_to(root)}:{number}: {line}")
    return places[:_MAX_PLACES]


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename


def _shorten(error: BaseException, root: Path) -> None:
    """Leaves of the tracebacks of a failed core what lies in the tests."""
    _cut(error.__traceback__, root)
    cause = error.__cause__
    while isinstance(cause, OpenAMPError):
        cause.__traceback__ = None
        cause = cause.__cause__


def _cut(trace: TracebackType | None, root: Path) -> TracebackType | None:
    """A traceback without what lies deeper than the tests."""
    last, each = None, trace
    while each is not None:
        if _is_own(_file(each.tb_frame), root):
            last = each
        each = each.tb_next
    if last is not None:
        last.tb_next = None
    return trace


def _is_own(filename: str, root: Path) -> bool:
    """Whether a file belongs to the tests, and not to a library that lies below them."""
    path = Path(filename)
    return (
        path.is_relative_to(root)
        and not path.is_relative_to(_PACKAGE)
        and "site-packages" not in path.parts
    )
