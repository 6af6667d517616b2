"""What a test boots: cores, firmware and options, by marker, command line and ini file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from openamp_py import shipped_echo

RunTests = Callable[..., pytest.RunResult]

ECHO = """
async def test_echo(endpoint):
    await endpoint.send(b"hello")
    assert (await endpoint.receive()).payload == b"hello"
"""

NAMES = """
def test_core(openamp_core):
    assert openamp_core
"""


def _passed(result: pytest.RunResult) -> list[str]:
    return [line.partition("::")[2].split()[0] for line in result.outlines if " PASSED" in line]


def test_a_test_runs_once_for_each_core_of_the_ini_file(run_tests: RunTests) -> None:
    result = run_tests(ECHO, "-v", ini="openamp_cores = loopback process native")
    result.assert_outcomes(passed=3)
    assert _passed(result) == [f"test_echo[{name}]" for name in ("loopback", "process", "native")]


def test_without_a_word_it_is_the_core_of_the_firmware(run_tests: RunTests) -> None:
    result = run_tests(
        """
async def test_it(endpoint, openamp_processor, openamp_session, openamp_bus):
    assert openamp_processor is openamp_session.processor
    assert openamp_bus is openamp_session.bus
    assert openamp_processor.platform.name == "native"
""",
        "-v",
    )
    assert _passed(result) == ["test_it[auto]"]


def test_the_command_line_wins_over_the_ini_file(run_tests: RunTests) -> None:
    result = run_tests(
        NAMES,
        *("-v", "--openamp-core", "loopback", "--openamp-core", "process"),
        ini="openamp_cores = native",
    )
    assert _passed(result) == ["test_core[loopback]", "test_core[process]"]


MARKED = """
pytestmark = pytest.mark.openamp(cores=["native", "loopback"], timeout=7)

def test_module(openamp_core): pass

@pytest.mark.openamp(cores="process")
class TestClass:
    def test_class(self, openamp_core): pass

    @pytest.mark.openamp(cores=["loopback"])
    def test_method(self, openamp_core): pass

@pytest.mark.parametrize("openamp_core", ["native"], indirect=True)
def test_parametrized(openamp_core): pass
"""


def test_the_nearest_marker_that_says_it_wins(run_tests: RunTests) -> None:
    result = run_tests(MARKED, "-v", ini="openamp_cores = process")
    assert _passed(result) == [
        "test_module[native]",
        "test_module[loopback]",
        "TestClass::test_class[process]",
        "TestClass::test_method[loopback]",
        "test_parametrized[native]",
    ]


def test_of_marked_cores_the_command_line_takes_some(run_tests: RunTests) -> None:
    result = run_tests(MARKED, "-v", "-rs", "--openamp-core", "loopback")
    assert _passed(result)[:2] == ["test_module[loopback]", "TestClass::test_method[loopback]"]
    result.stdout.fnmatch_lines(["*only for process, not for --openamp-core loopback*"])


def test_a_kind_of_core_means_all_its_boards(run_tests: RunTests) -> None:
    result = run_tests(
        """
@pytest.mark.openamp(cores=["qemu:mps2-an385", "native", "qemuish:x"])
def test_core(request):
    assert request.node

@pytest.mark.openamp(cores=["qemu:mps2-an385", "native", "qemuish:x"])
@pytest.mark.usefixtures("openamp_core")
def test_it(): pass
""",
        *("--collect-only", "-q", "--openamp-core", "qemu"),
    )
    assert [line for line in result.outlines if "test_it" in line] == [
        "test_firmware.py::test_it[qemu:mps2-an385]"
    ]


def test_a_marker_that_says_something_else_is_refused(run_tests: RunTests) -> None:
    result = run_tests(
        """
@pytest.mark.openamp("native", core="x")
def test_core(openamp_core): pass
"""
    )
    result.stdout.fnmatch_lines(
        ["*test_core: the marker openamp does not take 'native', core; it takes cores=, *"]
    )
    result.assert_outcomes(errors=1)


def test_a_core_that_there_is_not(run_tests: RunTests) -> None:
    result = run_tests(ECHO, "--openamp-core", "natve")
    result.stdout.fnmatch_lines(["core natve was not booted: ValueError: unknown core 'natve'*"])


IMAGES = """
import pathlib

ROOT = pathlib.Path(__file__).parent

def test_ini(openamp_firmware):
    print("ini", openamp_firmware)

@pytest.mark.openamp(firmware="marked.elf")
def test_marked(openamp_firmware):
    assert openamp_firmware == ROOT / "marked.elf"

@pytest.mark.openamp(firmware={"native": "/n.elf", "qemu": "q.elf"})
def test_mapping(openamp_core, openamp_firmware):
    if openamp_core == "native":
        assert openamp_firmware == pathlib.Path("/n.elf")
    else:
        print("else", openamp_firmware)

@pytest.mark.openamp(firmware=b"data")
def test_data(openamp_firmware):
    assert openamp_firmware == b"data"
"""


def test_firmware_by_marker_ini_file_and_core(
    run_tests: RunTests, pytester: pytest.Pytester
) -> None:
    ini = "openamp_cores = native loopback\nopenamp_firmware =\n  native = ini.elf\n  any.elf"
    result = run_tests(IMAGES, "-s", ini=ini)
    result.assert_outcomes(passed=8)
    printed = [line.lstrip("sF.") for line in result.outlines]
    root = pytester.path
    text = "\n".join(printed)
    assert f"ini {root}/ini.elf" in text
    assert f"ini {root}/any.elf" in text
    assert f"else {root}/any.elf" in text


@pytest.mark.parametrize(
    ("given", "image"),
    [("/a=b/c.elf", "/a=b/c.elf"), ("loopback=/a=b/c.elf", "/a=b/c.elf"), ("native=/n.elf", None)],
)
def test_a_path_of_firmware_may_have_what_follows_a_core(
    run_tests: RunTests, given: str, image: str | None
) -> None:
    arguments = ("-s", "-k", "ini", "--openamp-firmware", given)
    result = run_tests(IMAGES, *arguments, ini="openamp_cores = loopback")
    result.stdout.fnmatch_lines([f"*ini {image}"])


def test_firmware_of_the_command_line_begins_at_the_current_directory(
    run_tests: RunTests, pytester: pytest.Pytester
) -> None:
    result = run_tests(
        IMAGES,
        *("-s", "-k", "ini", "--openamp-firmware", "mine.elf"),
        *("--openamp-firmware", "loopback=other.elf", "--rootdir", "/"),
        ini="openamp_cores = native loopback\nopenamp_firmware = ini.elf",
    )
    assert f"ini {pytester.path}/mine.elf" in result.stdout.str()
    assert f"ini {pytester.path}/other.elf" in result.stdout.str()


def test_a_firmware_file_is_booted(run_tests: RunTests, pytester: pytest.Pytester) -> None:
    (pytester.path / "mine.elf").write_bytes(Path(shipped_echo()).read_bytes())
    result = run_tests(ECHO, ini="openamp_firmware = mine.elf\nopenamp_cores = native auto")
    result.assert_outcomes(passed=2)
    result = run_tests(ECHO, "--openamp-firmware", "none.elf")
    result.stdout.fnmatch_lines(["core auto was not booted: *none.elf*"])


def test_options_policy_and_changes_of_a_session(run_tests: RunTests) -> None:
    result = run_tests(
        """
from openamp_py import BusOptions, CrashPolicy

@pytest.mark.openamp(
    cores="loopback", options=BusOptions(send_buffer_size=256), policy=CrashPolicy(limit=9)
)
async def test_marked(openamp_session, openamp_open):
    assert openamp_session.bus.payload_limit == 240
    assert openamp_session.processor.policy.limit == 9
    async with openamp_open(options=BusOptions()) as other:
        assert other.bus.payload_limit == 496
        assert other.processor is not openamp_session.processor
        assert other.processor.policy.limit == 9
"""
    )
    result.assert_outcomes(passed=1)


def test_fixtures_to_be_overridden(run_tests: RunTests) -> None:
    result = run_tests(
        """
from openamp_py import LoopbackPlatform, python_firmware, serve_echo

class Board(LoopbackPlatform):
    name = "my board"

@pytest.fixture
def openamp_platform():
    return lambda name: Board(serve_echo) if name == "mine" else name

@pytest.fixture
def openamp_firmware(openamp_core):
    return python_firmware() if openamp_core == "mine" else None

async def test_it(endpoint, openamp_core, openamp_processor):
    assert (openamp_processor.platform.name == "my board") == (openamp_core == "mine")
""",
        ini="openamp_cores = mine loopback",
    )
    result.assert_outcomes(passed=2)


@pytest.fixture
def no_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which no program is installed."""
    monkeypatch.setenv("PATH", "/nonexistent")


@pytest.mark.usefixtures("no_qemu")
def test_a_core_that_this_machine_cannot_run_skips_with_the_package(run_tests: RunTests) -> None:
    result = run_tests(ECHO, "-rs", "--openamp-core", "qemu:virt-rv32")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*qemu-system-riscv32*apt install qemu-system-misc*"])


@pytest.mark.usefixtures("no_qemu")
@pytest.mark.parametrize("how", ["--openamp-require", "-oopenamp_require=true"])
def test_where_cores_are_required_nothing_is_skipped(run_tests: RunTests, how: str) -> None:
    result = run_tests(ECHO, "--openamp-core", "qemu:virt-rv32", how)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["required (openamp_require), but *qemu-system-riscv32*apt install qemu-system-misc*"]
    )


def test_who_does_not_want_it_leaves_it_out(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
import sys

def test_nothing_is_imported():
    assert "openamp_py" not in sys.modules
"""
    )
    result = pytester.runpytest_subprocess("-p", "no:openamp")
    result.assert_outcomes(passed=1)


def test_without_pytest_trio_it_says_what_to_install(run_tests: RunTests) -> None:
    result = run_tests(
        "async def test_it(openamp_session): pass\ndef test_name(openamp_core): pass",
        *("-p", "no:trio"),
    )
    result.stdout.fnmatch_lines(["*pytest-trio, which is not installed: pip install *pytest*"])
    result.assert_outcomes(passed=1, errors=1)


def test_a_test_that_is_not_async_is_told_so(run_tests: RunTests) -> None:
    result = run_tests("def test_it(openamp_session): pass")
    result.stdout.fnmatch_lines(["a test on a core is async: write async def test_it*"])
    result.assert_outcomes(errors=1)


def test_a_test_that_hypothesis_calls_is_told_so(run_tests: RunTests) -> None:
    result = run_tests(
        """
from hypothesis import given, strategies

@given(strategies.integers())
async def test_it(openamp_session, number): pass
"""
    )
    result.stdout.fnmatch_lines(["Hypothesis calls a test many times, *"])
    result.assert_outcomes(errors=1)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "soon"])
def test_a_timeout_that_is_none_is_refused(run_tests: RunTests, text: str) -> None:
    result = run_tests(ECHO, ini=f"openamp_timeout = {text}\nopenamp_cores = loopback")
    result.stdout.fnmatch_lines([f"openamp_timeout is '{text}'; more than 0 seconds *"])
    result.assert_outcomes(errors=1)


def test_no_timeout_is_one(run_tests: RunTests) -> None:
    result = run_tests(ECHO, ini="openamp_timeout = inf\nopenamp_cores = loopback")
    result.assert_outcomes(passed=1)
