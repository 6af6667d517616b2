"""``openamp trace`` and ``openamp explain``, as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from openamp_py import NativePlatform, open_session
from openamp_py.cli import main
from openamp_py.cli.common import printable
from openamp_py.platforms.native import shipped_echo
from openamp_py.porting import LINUX
from openamp_py.remoteproc.lifecycle import format_table

LIMIT = 60.0
TRACE = (sys.executable, "-m", "openamp_py", "trace")
BOOTED = "booted: echo on rpmsg-openamp-demo-channel\n"


def test_a_trace_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--wait", "0.2"]) == 0
    assert capsys.readouterr().out == BOOTED
    assert main(["trace", "--wait", "0.2", "--json", str(shipped_echo())]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": BOOTED}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--name", "nothing"], 2, "no trace buffer 'nothing'; there are: trace0"),
        (["--core", "loopback"], 2, "no trace buffer: the firmware's resource table has none"),
        (["--attach", "/nowhere/core"], 1, "/nowhere/core"),
        (["--attach", "/nowhere/core", "fw.elf"], 2, "takes no firmware"),
        (["missing.elf"], 1, "missing.elf"),
    ],
)
def test_what_cannot_be_traced(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_core_cannot_steer_the_terminal() -> None:
    assert printable("plain\ttext\n") == "plain\ttext\n"
    assert printable("\x1b[2J\r\x9b") == "\\x1b[2J\\x0d\\x9b"


def test_following_ends_with_ctrl_c() -> None:
    with subprocess.Popen([*TRACE, "-f"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == BOOTED
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(LIMIT) == 0


async def test_a_core_that_was_left_running_is_traced_and_runs_on(tmp_path: Path) -> None:
    path = tmp_path / "core"
    async with (
        open_session(NativePlatform(rendezvous=path)) as session,
        session.bus.open_endpoint("rpmsg-openamp-demo-channel") as endpoint,
    ):
        await endpoint.wait_bound()
        await session.detach()
        for _ in range(2):
            done = await trio.run_process(
                [*TRACE, "--attach", str(path), "--wait", "0.2"], capture_stdout=True
            )
            lines = done.stdout.decode().splitlines()
            assert lines[0] == BOOTED.rstrip() and lines[-1].startswith("bound to 0x400")
        await session.attach()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_core_that_is_traced_survives_the_end_of_the_tracer(
    tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "core"
    async with open_session(NativePlatform(rendezvous=path)) as session:
        await session.detach()
        with subprocess.Popen(
            [*TRACE, "-f", "--attach", str(path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == BOOTED
            os.kill(process.pid, number)
            assert process.wait(LIMIT) == 0
        await session.attach()


def test_the_end_of_a_core_that_is_followed_is_an_error(tmp_path: Path) -> None:
    """The last line is there, and how it ended is said."""
    with subprocess.Popen(
        [*TRACE, "-f"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == BOOTED
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGSEGV)
        assert process.wait(LIMIT) == 1
        assert "the core died of SIGSEGV" in process.stderr.read()


def test_tables_are_printed_from_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "states"]) == 0
    assert capsys.readouterr().out == format_table() + "\n"
    assert main(["explain", "states", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"state": "ready", "call": "start", "after": "running"} in rows
    assert main(["explain", "linux"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(LINUX)
    assert main(["explain", "openamp", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["c"] == "remoteproc_init"
