"""The pytest plugin: boots a core for a test, and says what it saw when the test fails.

Installed with openamp_py, and so loaded by every pytest of that environment (`-p no:openamp` leaves
it out). `openamp_py.pytest_watch` does the work once a test uses a core.

    openamp_session    a `Session`: the core is booted, and the bus to it is open
    openamp_bus        its bus
    openamp_processor  its processor
    openamp_open       opens sessions: for a test that boots several times, or differently
    openamp_core       the core's name; what makes a test run once for each core
    openamp_firmware   what is booted; to be overridden by who builds it in a fixture
    openamp_platform   makes the platform of a name; to be overridden for a board of one's own

A test that uses one of the first four is `async` and run by pytest-trio.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import math
import os
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from openamp_py.pytest_watch import Plan, Watch, find_obstacle
from openamp_py.remoteproc import Platform, RemoteProcessor
from openamp_py.remoteproc.sources import Image
from openamp_py.rpmsg import Bus
from openamp_py.session import Session

DEFAULT_CORES = ("auto",)
DEFAULT_TIMEOUT = 30.0
"""Seconds that a test on a core has, its boot included, where nobody says how many."""

MARKER = "openamp"
KEYWORDS = ("cores", "firmware", "options", "policy", "timeout", "leaks")

_ASYNC = ("openamp_session", "openamp_bus", "openamp_processor", "openamp_open")

OpenSession = Callable[..., AbstractAsyncContextManager[Session]]
"""What `openamp_open` is: takes the keywords of `open_session`, to replace the test's own."""

CreatePlatform = Callable[[str], str | Platform]
"""What `openamp_platform` is."""

_watch_key = pytest.StashKey[Watch]()
_raised_key = pytest.StashKey[bool]()


# What can be chosen


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, and what of them a configuration file can say."""
    group = parser.getgroup("openamp", "firmware on remote cores (openamp_py)")
    group.addoption(
        "--openamp-core",
        action="append",
        metavar="NAME",
        help="run tests on this core, whatever openamp_cores says; of tests that are marked with "
        "cores of their own, only on this one; can be given several times",
    )
    group.addoption(
        "--openamp-firmware",
        action="append",
        metavar="[CORE=]IMAGE",
        help="firmware to boot (for one core), whatever openamp_firmware says",
    )
    group.addoption(
        "--openamp-require",
        action="store_true",
        default=None,
        help="a core that this machine cannot run fails its tests; by default they are skipped",
    )
    group.addoption(
        "--openamp-leaks",
        action="store_true",
        default=None,
        help="fail each test that leaves a descriptor, a mapping or a process behind",
    )
    parser.addini("openamp_cores", "cores to run tests on (default: auto, by the firmware)", "args")
    parser.addini("openamp_firmware", "[CORE=]IMAGE: firmware to boot (for one core)", "linelist")
    parser.addini("openamp_require", "as --openamp-require", "bool", default=False)
    parser.addini("openamp_leaks", "as --openamp-leaks", "bool", default=False)
    parser.addini(
        "openamp_timeout",
        "seconds that a test on a core has, its boot included; inf for no end "
        f"(default: {DEFAULT_TIMEOUT:g})",
        default=str(DEFAULT_TIMEOUT),
    )
    parser.addini(
        "openamp_dumps",
        "where the coredumps of tests that fail go (default: beside pytest's tmp_path)",
        default="",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declares the marker; looks for leaks where that is asked for."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}({', '.join(f'{name}=...' for name in KEYWORDS)}): what a test on a core boots, "
        "and how long it may take; of several, the nearest that says it",
    )
    if _flag(config, "openamp_leaks"):
        config.pluginmanager.register(LeakCheck(), "openamp-leaks")


def _flag(config: pytest.Config, name: str) -> bool:
    given = config.getoption(name)
    return bool(config.getini(name) if given is None else given)


def _marked(node: pytest.Item | pytest.Function) -> dict[str, Any]:
    """What the markers say, the nearest first.

    Raises:
        ValueError: something that a marker cannot say.
    """
    said: dict[str, Any] = {}
    for marker in node.iter_markers(MARKER):
        wrong = [*map(repr, marker.args), *(name for name in marker.kwargs if name not in KEYWORDS)]
        if wrong:
            raise ValueError(
                f"the marker {MARKER} does not take {', '.join(wrong)}; "
                f"it takes {', '.join(f'{name}=' for name in KEYWORDS)}"
            )
        said = {**marker.kwargs, **said}
    return said


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each core."""
    if "openamp_core" not in metafunc.fixturenames:
        return
    definition = metafunc.definition
    if any(
        "openamp_core" in str(marker.args[:1]) for marker in definition.iter_markers("parametrize")
    ):
        return
    try:
        own = _marked(definition).get("cores")
    except ValueError as error:
        raise pytest.Collector.CollectError(f"{definition.nodeid}: {error}") from None
    chosen = metafunc.config.getoption("openamp_core")
    cores = _configured_cores(metafunc.config) if own is None else _as_names(own)
    marks: tuple[pytest.MarkDecorator, ...] = ()
    if own is not None and chosen is not None:
        wanted = [core for core in cores if any(_is_meant(core, name) for name in chosen)]
        if not wanted:
            why = f"only for {', '.join(cores)}, not for --openamp-core {', '.join(chosen)}"
            marks = (pytest.mark.skip(reason=why),)
        cores = wanted or cores
    parameters = [pytest.param(core, id=core, marks=marks) for core in dict.fromkeys(cores)]
    metafunc.parametrize("openamp_core", parameters, indirect=True)


def _configured_cores(config: pytest.Config) -> Sequence[str]:
    chosen: Sequence[str] | None = config.getoption("openamp_core")
    if chosen is None:
        configured: Sequence[str] = config.getini("openamp_cores")
        return configured or DEFAULT_CORES
    return chosen


def _as_names(cores: str | Sequence[str]) -> Sequence[str]:
    return (cores,) if isinstance(cores, str) else cores


def _is_meant(core: str, name: str) -> bool:
    """Whether a name means a core: its own, or that of its kind ("qemu": all "qemu:BOARD")."""
    return core == name or core.startswith(f"{name}:")


def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Async tests on a core are run by trio, also without its own marker or mode."""
    if _has_trio(config):
        for item in items:
            names = getattr(item, "fixturenames", ())
            if any(name in names for name in _ASYNC) and item.get_closest_marker("trio") is None:
                item.add_marker(pytest.mark.trio)


def _has_trio(config: pytest.Config) -> bool:
    return any(config.pluginmanager.hasplugin(name) for name in ("trio", "pytest_trio.plugin"))


# Fixtures


@pytest.fixture
def openamp_core(request: pytest.FixtureRequest) -> str:
    """The name of the core that this test is for: a test that asks for it runs once for each.

    Skips the test, or fails it where cores are required, if this machine cannot run that core.
    """
    core = str(getattr(request, "param", None) or _configured_cores(request.config)[0])
    _check_possible(request, core, None)
    return core


@pytest.fixture
def openamp_firmware(request: pytest.FixtureRequest, openamp_core: str) -> Image | None:
    """What is booted: what the marker says, the command line, or the ini file.

    None is the echo firmware that comes with openamp_py. Relative paths begin at the rootdir, on
    the command line at the current directory. To be overridden by who builds firmware in a fixture.
    """
    config = request.config
    marked = _marked(request.node).get("firmware")
    sources: list[tuple[Path, Mapping[str, Any]]] = [
        (config.rootpath, marked if isinstance(marked, Mapping) else {"": marked}),
        (config.invocation_params.dir, _parse_images(config.getoption("openamp_firmware") or ())),
        (config.rootpath, _parse_images(config.getini("openamp_firmware"))),
    ]
    for base, images in sources:
        for name in (openamp_core, openamp_core.partition(":")[0], ""):
            image = images.get(name)
            if image is not None:
                is_path = isinstance(image, (str, os.PathLike))
                return base / image if is_path else image  # type: ignore[no-any-return]
    return None


def _parse_images(lines: Sequence[str]) -> dict[str, str]:
    """Images by core, of "CORE=IMAGE"; by "" of "IMAGE", a path that may have a "=" in it."""
    images = {}
    for line in lines:
        core, found, image = line.partition("=")
        if not found or os.sep in core:
            core, image = "", line
        images[core.strip()] = image.strip()
    return images


@pytest.fixture
def openamp_platform() -> CreatePlatform:
    """Makes of a core's name what `open_session` boots: a platform, or the name as it is.

    To be overridden for a board of one's own: `openamp_cores` may name it then.
    """
    return str


@pytest.fixture
def _openamp_plan(
    request: pytest.FixtureRequest,
    openamp_core: str,
    openamp_firmware: Image | None,
    openamp_platform: CreatePlatform,
    tmp_path_factory: pytest.TempPathFactory,
) -> Watch:
    """All that is known before trio runs, and refused where it cannot be."""
    node, config = request.node, request.config
    if not _has_trio(config):
        pytest.fail(
            "a test on a core is run by pytest-trio, which is not installed: "
            "pip install 'openamp_py[pytest]'",
            pytrace=False,
        )
    if hasattr(node.obj, "hypothesis"):
        pytest.fail(
            "Hypothesis calls a test many times, and its fixtures boot once: open a session in "
            "the test, with openamp_core",
            pytrace=False,
        )
    if not inspect.iscoroutinefunction(node.obj):
        pytest.fail(f"a test on a core is async: write async def {node.name}", pytrace=False)
    _check_possible(request, openamp_core, openamp_firmware)
    marked = _marked(node)
    given = marked.get("timeout", config.getini("openamp_timeout"))
    try:
        timeout = float(given)
    except (TypeError, ValueError):
        timeout = math.nan
    if not timeout > 0:
        pytest.fail(
            f"openamp_timeout is {given!r}; more than 0 seconds are possible, or inf", pytrace=False
        )
    dumps = config.getini("openamp_dumps")

    def find_dumps() -> Path:
        return config.rootpath / dumps if dumps else tmp_path_factory.getbasetemp() / "openamp"

    watch = Watch(
        Plan(
            test=node.name,
            root=config.rootpath,
            core=openamp_core,
            platform=openamp_platform,
            image=openamp_firmware,
            options=marked.get("options"),
            policy=marked.get("policy"),
            timeout=timeout,
            full_trace=config.getoption("fulltrace"),
            find_dumps=find_dumps,
        )
    )
    node.stash[_watch_key] = watch
    return watch


@pytest.fixture
async def _openamp_watch(_openamp_plan: Watch) -> AsyncIterator[Watch]:
    """Ends the test when its time is up."""
    async with _openamp_plan.open():
        yield _openamp_plan


@pytest.fixture
async def openamp_open(_openamp_watch: Watch) -> OpenSession:
    """Opens a session on the test's core, for an `async with` block: as often as the test likes.

    Takes the keywords of `open_session` (image, options, policy), to replace the test's own.
    """
    return _openamp_watch.open_session


@pytest.fixture
async def openamp_session(_openamp_watch: Watch) -> AsyncIterator[Session]:
    """A core that is booted, and the bus to it; ended after the test."""
    async with _openamp_watch.boot() as session:
        yield session


@pytest.fixture
async def openamp_bus(openamp_session: Session) -> Bus:
    """The bus of `openamp_session`."""
    return openamp_session.bus


@pytest.fixture
async def openamp_processor(openamp_session: Session) -> RemoteProcessor:
    """The processor of `openamp_session`."""
    processor = openamp_session.processor
    if processor is None:
        pytest.fail("this core was not booted here, so there is no processor", pytrace=False)
    return processor


def _check_possible(request: pytest.FixtureRequest, core: str, image: Image | None) -> None:
    """Skips or fails a test whose core this machine cannot run."""
    obstacle = find_obstacle(core, image)
    if obstacle is None:
        return
    if _flag(request.config, "openamp_require"):
        pytest.fail(f"required (openamp_require), but {obstacle}", pytrace=False)
    pytest.skip(obstacle)


# What a failure shows


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Lets the watch call the test, before pytest-trio takes it."""
    watch = item.stash.get(_watch_key, None)
    if watch is None or not isinstance(item, pytest.Function):
        return (yield)
    test = item.obj
    item.obj = watch.wrap(test)
    try:
        return (yield)
    except BaseExceptionGroup as group:
        # pytest-trio runs a test in a nursery, whose group pytest cannot show as it shows others.
        if len(group.exceptions) > 1 or group.exceptions[0] is not watch.error:
            raise
    finally:
        item.obj = test
    assert watch.error is not None, "it is in the group"
    raise watch.error


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds what the watch saw to the report of a failure."""
    report = yield
    if call.excinfo is not None:
        item.stash[_raised_key] = True
    watch = item.stash.get(_watch_key, None)
    if watch is not None and report.failed and call.when == "call":
        report.sections += watch.report.sections
        item.user_properties += watch.report.properties
    return report


# Leaks


class LeakCheck:
    """Fails each test that leaves something behind of what cores are made of.

    Looked at is all that this process has of such kinds, whoever made it. A test that raised
    something is left alone: its traceback keeps what it had. ``@pytest.mark.openamp(leaks=False)``
    excepts a test.
    """

    @pytest.fixture(autouse=True)
    def openamp_leaks(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Fails the test that leaves a descriptor, a mapping or a child process behind."""
        before = _descriptors(), _mappings(), _children()
        yield
        if request.node.stash.get(_raised_key, False) or not _marked(request.node).get(
            "leaks", True
        ):
            return
        request.node.funcargs.clear()  # the values of fixtures that have ended
        for generation in range(3):  # what only a cycle keeps is no leak; collecting all is slow
            if not _leaks(before):
                return
            gc.collect(generation)
        leaks = _leaks(before)
        if leaks:
            pytest.fail(f"the test left behind: {'; '.join(leaks)}", pytrace=False)


def _leaks(before: tuple[set[str], int, set[str]]) -> list[str]:
    """What is there now that was not there before."""
    descriptors, mappings, children = before
    leaks = [f"descriptor {each}" for each in sorted(_descriptors() - descriptors)]
    if (more := _mappings() - mappings) > 0:
        leaks.append(f"mappings of shared memory: {more}")
    return leaks + [f"child process {each}" for each in sorted(_children() - children)]


def _descriptors() -> set[str]:
    """What this process has open that a platform may have opened."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the listing's own descriptor
        if target.startswith(("/memfd:openamp", "socket:", "pipe:", "anon_inode:[pidfd]")):
            found.add(f"{name} -> {target}")
    return found


def _mappings() -> int:
    """How many mappings of shared memory there are."""
    return Path("/proc/self/maps").read_text().count("/memfd:openamp")


def _children() -> set[str]:
    """The child processes, as "PID (name)"."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            for pid in (task / "children").read_text().split():
                name = "?"
                with contextlib.suppress(OSError):  # it has just been reaped
                    name = Path(f"/proc/{pid}/comm").read_text().strip()
                found.add(f"{pid} ({name})")
    return found
