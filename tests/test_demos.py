"""The demos as a reader runs them, and the README's example, which is one of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import openamp_py

ROOT = Path(__file__).resolve().parents[1]
DEMOS = ROOT / "demos"
LIMIT = 60.0

GRACEFUL = "shutdown: graceful\n"
OUTPUT = {
    "hello.py": f"b'hello, core' from address 0x400\n{GRACEFUL}",
    "echo.py": f"one\ntwo\nthree\n{GRACEFUL}",
    "ping.py": f"480 payloads, 0 errors\n{GRACEFUL}",
    "name_service.py": (
        "announced: Channel(name='clock', address=1024)\n"
        "answer: noon\n"
        "withdrawn: clock\n"
        "announced: Channel(name='lamp', address=7)\n"
        "now there: lamp\n"
    ),
    "graceful_shutdown.py": (
        "graceful; the processor is offline\n"
        "hard (the remote did not leave within 0.3 s); the processor is offline\n"
    ),
    "matrix_multiply.py": f"200 products, 0 errors\n{GRACEFUL}",
    "zero_copy.py": "1000 bytes in place, inverted\nbuffers held: 1\nbuffers held: 0\n",
    "handler_service.py": "100 ms\n200 ms\n300 ms\n400 ms\n",
    "service_watch.py": (
        "announced: warm-up at 1024\n"
        "withdrawn: warm-up at 1024\n"
        "announced: thermometer at 1024\n"
        "answer: 21 C\n"
        "broken: the core's application raised RuntimeError('as told')\n"
        "answer: 21 C\n"
        "generation: 1\n"
    ),
    "recovery.py": (
        "broken: the core died of SIGSEGV at address 0xdead0000\n"
        "echo: are you back?\n"
        "broken: native core: no sign of life for 1.0 s\n"
        "echo: are you back?\n"
        "broken: the core asked for a reset\n"
        "echo: are you back?\n"
        "crashes: 3\n"
        f"{GRACEFUL}"
        "left behind: native-1.core native-2.core native-3.core\n"
    ),
    "takeover.py": f"echo: first host\necho: second host\n{GRACEFUL}",
    "several_cores.py": (
        "there are: dsp0, dsp1, sensor\n"
        "dsp0: hello, DSP\n"
        "dsp1: hello, other DSP\n"
        "sensor: 21 C\n"
        "afterwards: offline, offline, offline\n"
    ),
    "flood.py": "100000 sent, 100000 counted\n",
}
PYTEST = ("test_firmware.py", "failing_firmware.py")
"""Those that pytest runs."""

SPEED = {"flood.py": r"[\d,]+ messages/s\n"}
"""What a demo says beside its result, where that differs each time."""


def _command(demo: str, *arguments: str) -> list[str]:
    return [sys.executable, str(DEMOS / demo), *arguments]


def _run(demo: str, *arguments: str) -> str:
    done = subprocess.run(
        _command(demo, *arguments), capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0 and re.fullmatch(SPEED.get(demo, ""), done.stderr), done.stderr
    return done.stdout


def test_every_demo_is_run() -> None:
    assert {path.name for path in DEMOS.glob("*.py")} == {*OUTPUT, *PYTEST}


@pytest.mark.parametrize("demo", OUTPUT)
def test_demo(demo: str) -> None:
    assert _run(demo) == OUTPUT[demo]


@pytest.mark.parametrize("demo", [*OUTPUT, *PYTEST])
def test_demos_use_only_what_is_public(demo: str) -> None:
    text = (DEMOS / demo).read_text()
    assert not re.search(r"^\s*(from|import) openamp_py\.", text, re.MULTILINE)
    assert set(re.findall(r"\bopenamp_py\.(\w+)", text)) <= set(openamp_py.__all__)


def _run_pytest(demo: str, core: str, directory: Path) -> str:
    """Runs pytest in this checkout as its README says: demos/pytest.ini keeps our settings away."""
    options = ("-W", "error", "-p", "no:cacheprovider", f"--basetemp={directory}/base")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--openamp-core", core, DEMOS / demo],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert not done.stderr
    return done.stdout


@pytest.mark.openamp(cores=["native", "qemu:mps2-an385"])
def test_the_pytest_demo(openamp_core: str, tmp_path: Path) -> None:
    assert " 7 passed in " in _run_pytest("test_firmware.py", openamp_core, tmp_path)


@pytest.mark.openamp(cores=["native", "qemu:mps2-an385"])
def test_what_the_failing_pytest_demo_shows(openamp_core: str, tmp_path: Path) -> None:
    text = _run_pytest("failing_firmware.py", openamp_core, tmp_path)
    assert " 4 failed in " in text
    for shown in (
        '>       assert message.payload == b"hello, host"',
        "cause: AssertionError: assert b'hello, core' == b'hello, host'",
        "cause: CoreCrashedError: the core ",
        "crash on request",
        "cause: TimeoutError: no end within 1 s (openamp_timeout): failing_firmware.py:",
        "  0x400 -> 0x35, 40 bytes: announces 'rpmsg-openamp-demo-channel' at 0x400",
        f"coredump: {tmp_path}/base/openamp/test_meets_a_crash-",
        "to open it: gdb",
    ):
        assert shown in text
    assert text.count(": what happened -") == text.count(": bus -") == 4


def test_ping_demo_on_every_core(core: str) -> None:
    assert _run("ping.py", core) == OUTPUT["ping.py"]


@pytest.mark.parametrize(
    ("remote", "host", "output"),
    [
        (("echo.py",), ("ping.py",), OUTPUT["ping.py"]),
        (
            ("matrix_multiply.py", "remote"),
            ("matrix_multiply.py", "host"),
            OUTPUT["matrix_multiply.py"],
        ),
    ],
)
def test_demos_talk_over_a_link(
    tmp_path: Path, remote: tuple[str, ...], host: tuple[str, ...], output: str
) -> None:
    url = f"shm:{tmp_path}/memory?doorbell=unix:{tmp_path}/bell"
    with subprocess.Popen(_command(*remote, f"{url}&listen=1")) as process:
        assert _run(*host, url) == output
        assert process.wait(LIMIT) == 0


def test_the_readmes_example_is_the_hello_demo() -> None:
    readme = (ROOT / "README.md").read_text()
    assert f"```python\n{(DEMOS / 'hello.py').read_text()}```" in readme
