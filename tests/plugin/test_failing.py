"""What the report of a test that fails shows, and that nothing hides the failure itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from elftools.elf.elffile import ELFFile

RunTests = Callable[..., pytest.RunResult]

HEAD = re.compile(r"_{3,} (\S+) _{3,}|-{3,} (openamp .*?) -{3,}|={3,} (.*?) ={3,}")


def _sections(result: pytest.RunResult) -> dict[str, dict[str, str]]:
    """Of each test that failed the sections of its report, the traceback under ""."""
    found: dict[str, dict[str, str]] = {}
    test = title = ""
    for line in result.outlines:
        match = HEAD.fullmatch(line)
        if match is None:
            if test:
                found[test][title] = found[test].get(title, "") + f"{line}\n"
        elif match[2]:
            title = match[2].partition(": ")[2]
        else:
            test, title = match[1] or "", ""
            if test:
                found[test] = {}
    return found


FAILING = """
CRASH, HANG = b"\\x01\\xa5\\x56\\xef", b"\\x02\\xa5\\x56\\xef"  # echo_protocol.h

async def test_wrong(endpoint):
    await endpoint.send(b"hello, core")
    message = await endpoint.receive()
    assert message.payload == b"hello, host"

async def test_crash(endpoint):
    await endpoint.send(CRASH)
    await endpoint.receive()

@pytest.mark.openamp(timeout=0.5)
async def test_hang(endpoint):
    await endpoint.send(HANG)
    await endpoint.receive()

@pytest.mark.openamp(timeout=0.5)
async def test_tasks(openamp_bus):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(openamp_bus.wait_failure)
        await openamp_bus.wait_service("nobody")

@pytest.fixture
async def nobody(openamp_bus):
    await openamp_bus.wait_service("nobody")

@pytest.mark.openamp(timeout=0.5)
async def test_fixture_waits(nobody):
    pass

@pytest.fixture
async def broken(endpoint):
    raise LookupError("the fixture is broken")

async def test_fixture_fails(broken):
    pass

async def test_own_session(openamp_open):
    async with openamp_open() as session, openamp_open() as other:
        await session.bus.wait_service(ECHO_CHANNEL)
        await other.bus.wait_service(ECHO_CHANNEL)
        raise LookupError("in the test")

@pytest.mark.openamp(timeout=0.5)
async def test_passes_and_ends_late(openamp_session):
    async with openamp_session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
        with trio.CancelScope(shield=True):
            await trio.sleep(0.7)

async def test_passes(endpoint):
    await endpoint.send(CRASH)
    with pytest.raises(trio.BrokenResourceError):
        await endpoint.receive()

@pytest.mark.xfail
async def test_expected(endpoint):
    pytest.xfail("as said")

async def test_skipped(endpoint):
    pytest.skip("as said")
"""


def test_reports_of_failures(run_tests: RunTests, pytester: pytest.Pytester) -> None:
    ini = "openamp_dumps = dumps\nopenamp_cores = native\nopenamp_leaks = true"
    result = run_tests(FAILING, "--junitxml=report.xml", ini=ini, own=True)
    result.assert_outcomes(failed=8, passed=1, skipped=1, xfailed=1)
    found = _sections(result)

    wrong = found["test_wrong[native]"]
    assert '>       assert message.payload == b"hello, host"' in wrong[""]
    assert [*wrong] == ["", "what happened", "last messages", "trace trace0", "bus"]
    assert wrong["what happened"].startswith("cause: AssertionError: assert b'hello, core' ==")
    assert "core: native core, running, up after 0." in wrong["what happened"]
    assert "announces 'rpmsg-openamp-demo-channel' at 0x400" in wrong["last messages"]
    assert "6c 6c 6f 2c 20 63 6f 72 65                 hello, core" in wrong["last messages"]
    assert "bound to 0x400 by name service" in wrong["trace trace0"]
    assert "0x400 -> 0x400 rpmsg-openamp-demo-channel" in wrong["bus"]

    crash = found["test_crash[native]"]
    assert (
        "trio.BrokenResourceError" in crash[""] and ">       await endpoint.receive()" in crash[""]
    )
    assert crash[""].startswith("openamp_py.errors.CoreCrashedError: the core died of SIGSEGV")
    assert "site-packages" not in crash[""] and "endpoint.py" not in crash[""]
    assert crash["what happened"].startswith("cause: CoreCrashedError: the core died of SIGSEGV")
    assert "core: native core, crashed" in crash["what happened"]
    assert "01 a5 56 ef" in crash["last messages"].partition("\nsent: ")[2]
    assert "crash on request" in crash["trace trace0"]
    (command,) = re.findall("^to open it: (.*)", crash["what happened"], re.MULTILINE)
    dump = pytester.path / "dumps" / "test_crash-native.core"
    assert re.fullmatch(rf"gdb \S+/echo-native.elf {dump}", command)
    with dump.open("rb") as file:
        assert ELFFile(file)["e_type"] == "ET_CORE"

    hang = found["test_hang[native]"]
    assert ">       await endpoint.receive()" in hang[""]
    assert "no end within 0.5 s (openamp_timeout): test_firmware.py:" in hang[""]
    assert "wait_task_rescheduled" not in hang[""]
    assert "seen: the core runs" in hang["what happened"]

    tasks = found["test_tasks[native]"]
    assert 'await openamp_bus.wait_service("nobody")' in tasks["what happened"].splitlines()[0]

    waits = found["test_fixture_waits[native]"]
    assert re.fullmatch(
        r"no end within 0.5 s \(openamp_timeout\): test_firmware.py:\d+: "
        r'await openamp_bus.wait_service\("nobody"\)\n',
        waits[""],
    )
    assert "DRIVER_OK" not in waits["what happened"]
    assert "announced: 'rpmsg-openamp-demo-channel'" in waits["what happened"]

    fails = found["test_fixture_fails[native]"]
    assert "LookupError: the fixture is broken" in fails[""]
    assert "core: native core, running" in fails["what happened"]

    own = found["test_own_session[native]"]
    assert "LookupError: in the test" in own[""]
    assert "openamp native, session 2: bus" in result.stdout.str()
    assert len(own) == 5

    assert sorted(path.name for path in (pytester.path / "dumps").iterdir()) == [
        "test_crash-native.core",
        "test_fixture_fails-native.core",
        "test_fixture_waits-native.core",
        "test_hang-native.core",
        "test_own_session-native.2.core",
        "test_own_session-native.core",
        "test_passes_and_ends_late-native.core",
        "test_tasks-native.core",
        "test_wrong-native.core",
    ]
    report = ElementTree.parse(pytester.path / "report.xml")
    properties = [
        (case.get("name"), each.get("value"))
        for case in report.iter("testcase")
        for each in case.iter("property")
    ]
    assert ("test_crash[native]", str(dump)) in properties
    assert "test_passes[native]" not in dict(properties)


EXPECTED = """
CRASH = b"\\x01\\xa5\\x56\\xef"  # echo_protocol.h

async def expect_crash(open_session):
    with pytest.raises(trio.BrokenResourceError):
        async with open_session() as session:
            await session.bus.wait_service(ECHO_CHANNEL)
            async with session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
                await endpoint.wait_bound()
                await endpoint.send(CRASH)
                await endpoint.receive()

async def test_next_session(openamp_open):
    await expect_crash(openamp_open)
    async with openamp_open() as session:
        await session.bus.wait_service(ECHO_CHANNEL)
        raise LookupError("in the second session")

async def test_no_session(openamp_open):
    await expect_crash(openamp_open)
    raise LookupError("after it")

async def test_same_error(openamp_open):
    try:
        async with openamp_open() as session:
            raise LookupError("in the session")
    except LookupError as error:
        raise ValueError("another class") from error

async def test_said_by_pytest(openamp_open):
    async with openamp_open() as session:
        pytest.fail("as said")

@pytest.mark.openamp(timeout=0.5)
async def test_no_end(openamp_open):
    await expect_crash(openamp_open)
    async with openamp_open() as session:
        await trio.sleep_forever()
"""


def test_an_error_that_the_test_expects_is_not_the_failure(run_tests: RunTests) -> None:
    result = run_tests(EXPECTED, ini="openamp_cores = native", own=True)
    result.assert_outcomes(failed=5)
    found = {name.partition("[")[0]: each for name, each in _sections(result).items()}
    happened = found["test_next_session"]["what happened"]
    assert happened.startswith("cause: LookupError: in the second session\ncore: native core, run")
    assert [*found["test_no_session"]] == [""]
    happened = found["test_same_error"]["what happened"]
    assert happened.startswith("cause: LookupError: in the session\ncore: native core, running")
    assert found["test_said_by_pytest"]["what happened"].startswith("cause: Failed: as said\n")
    assert found["test_no_end"]["what happened"].startswith("cause: TimeoutError: no end within")


def test_who_presses_ctrl_c_waits_for_no_coredump(
    run_tests: RunTests, pytester: pytest.Pytester
) -> None:
    result = run_tests(
        """
async def test_interrupted(openamp_session):
    raise KeyboardInterrupt
""",
        ini="openamp_dumps = dumps",
        own=True,
    )
    assert result.ret is pytest.ExitCode.INTERRUPTED
    assert not (pytester.path / "dumps").exists()


def test_a_core_that_is_gone_before_the_bus_is_up(run_tests: RunTests) -> None:
    result = run_tests(
        r"""
import contextlib, openamp_py.pytest_watch

async def test_it(openamp_bus):
    pass

@pytest.fixture(autouse=True)
def gone(monkeypatch):
    @contextlib.asynccontextmanager
    async def open_session(*_, **__):
        raise trio.BrokenResourceError from openamp_py.PeerGoneError("it left\x1b[31m at once")
        yield
    monkeypatch.setattr(openamp_py.pytest_watch, "open_session", open_session)
""",
        own=True,
    )
    result.stdout.fnmatch_lines(
        [r"core auto was not booted: PeerGoneError: it left\x1b[[]31m at once"]
    )


def test_a_coredump_that_does_not_come_hides_nothing(run_tests: RunTests) -> None:
    result = run_tests(
        """
import openamp_py.pytest_watch

async def test_wrong(openamp_processor, monkeypatch):
    async def coredump():
        await trio.sleep_forever()
    monkeypatch.setattr(openamp_processor, "coredump", coredump)
    monkeypatch.setattr(openamp_py.pytest_watch, "_DUMP_GRACE", 0.05)
    raise LookupError("the failure")
""",
        own=True,
    )
    (found,) = _sections(result).values()
    assert "cause: LookupError: the failure" in found["what happened"]
    assert "coredump: there is none within 0.05 s" in found["what happened"]
    assert "endpoints: 0" in found["bus"]


@pytest.mark.parametrize("board", ["mps2-an385", "virt-rv32"])
def test_an_emulated_core_that_crashes(run_tests: RunTests, board: str) -> None:
    result = run_tests(FAILING, "-k", "crash", "--openamp-core", f"qemu:{board}", own=True)
    if result.parseoutcomes().get("skipped"):
        pytest.skip("QEMU is not installed")
    (found,) = _sections(result).values()
    assert "cause: CoreCrashedError: the core faulted" in found["what happened"]
    assert "to open it: gdb-multiarch " in found["what happened"]
    assert "01 a5 56 ef" in found["last messages"]


def test_by_default_dumps_lie_beside_tmp_path(run_tests: RunTests) -> None:
    result = run_tests(
        """
async def test_wrong(endpoint, tmp_path):
    print("base:", tmp_path.parent)
    assert not endpoint
""",
        own=True,
    )
    (base,) = re.findall("^base: (.*)", result.stdout.str(), re.MULTILINE)
    assert (Path(base) / "openamp" / "test_wrong-auto.core").is_file()


def test_what_cannot_be_told_hides_nothing(run_tests: RunTests) -> None:
    result = run_tests(
        """
import trio
from openamp_py import LoopbackPlatform, Session, serve_echo

class Board(LoopbackPlatform):
    @property
    def console(self):
        raise OSError("no console")

@pytest.fixture
def openamp_platform(monkeypatch):
    return lambda name: Board(serve_echo)

async def test_wrong(openamp_session, openamp_bus, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("bus")
    monkeypatch.setattr(type(openamp_bus), "dump", fail)
    monkeypatch.setattr(type(openamp_bus), "recent", fail)
    raise LookupError("the failure")
""",
        ini="openamp_dumps = /proc/none",
        own=True,
    )
    result.assert_outcomes(failed=1)
    (found,) = _sections(result).values()
    assert "LookupError: the failure" in found[""]
    assert "coredump: there is none: " in found["what happened"]
    told = "this cannot be told: ZeroDivisionError('bus')\n"
    assert found["last messages"] == told and found["bus"].startswith(told)
    assert found["console"] == "this cannot be told: OSError('no console')\n"


def test_what_a_terminal_obeys_is_shown_as_text(run_tests: RunTests) -> None:
    result = run_tests(
        r"""
from openamp_py import LoopbackPlatform, serve_echo

class Board(LoopbackPlatform):
    console = "begin \x1b[31m\x07 " + "x" * 10_000 + " end"

@pytest.fixture
def openamp_platform():
    return lambda name: Board(serve_echo)

async def test_wrong(openamp_session):
    assert not openamp_session
""",
        own=True,
    )
    (found,) = _sections(result).values()
    assert found["console"].startswith("...xx") and found["console"].endswith("x end\n")
    assert len(found["console"]) < 9000


def test_leaks_fail_the_test_that_left_them(run_tests: RunTests) -> None:
    result = run_tests(
        """
import os, socket, subprocess
kept = []

def test_socket():
    kept.extend(socket.socketpair())

def test_child():
    kept.append(subprocess.Popen(["sleep", "30"]))

@pytest.mark.openamp(leaks=False)
def test_excepted():
    kept.extend(socket.socketpair())

async def test_clean(endpoint):
    await endpoint.send(b"hello")

def test_failing():
    kept.extend(socket.socketpair())
    assert not kept

def test_end():
    for each in kept:
        each.terminate() if hasattr(each, "terminate") else each.close()
        hasattr(each, "wait") and each.wait()
""",
        "--openamp-leaks",
        own=True,
    )
    result.assert_outcomes(passed=5, failed=1, errors=2)
    result.stdout.fnmatch_lines(
        [
            "the test left behind: descriptor * -> socket:*; descriptor * -> socket:*",
            "the test left behind: child process * (sleep)",
        ]
    )
    assert "excepted" not in result.stdout.str()


def test_without_the_option_leaks_are_nobodys_business(run_tests: RunTests) -> None:
    result = run_tests("import socket\nkept = socket.socketpair()\ndef test_it(): kept", own=True)
    result.assert_outcomes(passed=1)
