"""``openamp cores``, and the other commands with cores that are chosen, emulated and debugged."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from openamp_py import firmware, shipped_echo
from openamp_py.cli import main
from openamp_py.cli.ping import set_limits
from openamp_py.cli.trace import set_wait
from openamp_py.platforms.boards import BOARDS, UNUSABLE

LIMIT = 60.0
OPENAMP = (sys.executable, "-m", "openamp_py")
M3 = "qemu:mps2-an385"

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-system-arm") is None, reason="qemu-system-arm is not installed"
)
needs_gdb = pytest.mark.skipif(
    shutil.which("gdb-multiarch") is None, reason="gdb-multiarch is not installed"
)


# The list


def test_the_table_of_cores(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cores"]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.split("  ")[0] == "core"
    names = [row.split()[0] for row in rows]
    assert names == ["native", "process", "loopback", *(f"qemu:{name}" for name in BOARDS)]
    native, m3 = rows[0], rows[names.index(M3)]
    assert native.split()[-2:] == ["yes", "echo-native.elf"]
    for text in ("Cortex-M3", "0x21000000, 16 MiB", "qemu-system-arm", "echo-cortex-m3.elf"):
        assert text in m3


def test_boards_that_cannot_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cores"]) == 0
    usable = capsys.readouterr().out
    assert main(["cores", "--all"]) == 0
    every = capsys.readouterr().out
    assert every.startswith(usable)
    assert every[len(usable) :].splitlines() == [
        f"qemu:{name}: {why}" for name, why in UNUSABLE.items()
    ]
    assert main(["cores", "--all", "--json"]) == 0
    cores = {core["name"]: core for core in json.loads(capsys.readouterr().out)}
    microbit = cores["qemu:microbit"]
    assert (microbit["usable"], microbit["remark"]) == (False, UNUSABLE["microbit"])
    assert main(["ping", "--core", "qemu:microbit"]) == 2
    assert UNUSABLE["microbit"] in capsys.readouterr().err


def test_cores_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cores", "--json"]) == 0
    cores = {core["name"]: core for core in json.loads(capsys.readouterr().out)}
    assert cores["loopback"]["cpu"] == "Python"
    assert cores[M3]["ram"] == [0x2100_0000, 16 << 20]
    assert cores[M3]["package"] == "qemu-system-arm"


def test_what_to_install(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["cores"]) == 0
    assert "apt install qemu-system-misc" in capsys.readouterr().out
    assert main(["ping", "--core", M3]) == 1
    err = capsys.readouterr().err
    assert err.endswith("apt install qemu-system-arm\n") and err.count("\n") == 1


# Emulated cores


@needs_qemu
@pytest.mark.parametrize("arguments", [[str(firmware.path("echo-cortex-m3.elf"))], ["--core", M3]])
def test_ping_boots_a_board(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ping", *arguments, "--count", "10", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["core"], result["received"], result["shutdown"]) == (M3, 10, "graceful")
    assert "rpmsg-openamp-demo-channel" in result["console"]


@needs_qemu
def test_ping_shows_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ping", "--core", M3, "-q", "--console"]) == 0
    console = capsys.readouterr().out.partition("--- console ---\n")[2]
    assert console.startswith("booted: echo on rpmsg-openamp-demo-channel\n")


@needs_qemu
def test_trace_follows_a_board(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--core", M3]) == 0
    assert capsys.readouterr().out.startswith("booted: echo on ")


@needs_qemu
@needs_gdb
def test_ping_waits_for_a_debugger(tmp_path: Path) -> None:
    command = [*OPENAMP, "ping", "--core", M3, "--gdb", f"unix:{tmp_path}/gdb", "-q"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as ping:
        assert ping.stderr is not None
        said = ping.stderr.readline()
        program, debugger = said.split("gdb-multiarch ")
        assert program == "the core waits for a debugger: "
        assert debugger == (
            f"{firmware.path('echo-cortex-m3.elf')} -ex 'target remote {tmp_path}/gdb'\n"
        )
        gdb = subprocess.run(
            ["bash", "-c", f"gdb-multiarch -batch {debugger.strip()} -ex 'p/x $pc' -ex detach"],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        out, err = ping.communicate(timeout=LIMIT)
    assert "$1 = 0x2100" in gdb.stdout
    assert (ping.returncode, err) == (0, "")
    assert "5 received, 0 lost" in out and "shutdown graceful" in out
    assert not (tmp_path / "gdb").exists()


@pytest.mark.parametrize(("gdb", "limits"), [(None, (10, 3, 2)), ("1", (math.inf, 3, math.inf))])
def test_a_breakpoint_is_no_hang(gdb: str | None, limits: tuple[float, ...]) -> None:
    options = Namespace(timeout=None, wait=3.0, grace=None, gdb=gdb)
    set_limits(options)
    assert (options.timeout, options.wait, options.grace) == limits


@pytest.mark.parametrize(
    ("wait", "gdb", "limit"),
    [(None, None, 0.5), (None, "1", math.inf), (3.0, None, 3.0), (3.0, "1", 3.0)],
)
def test_trace_looks_as_long_as_a_debugger_may_take(
    wait: float | None, gdb: str | None, limit: float
) -> None:
    options = Namespace(wait=wait, gdb=gdb)
    set_wait(options)
    assert options.wait == limit


@needs_qemu
@needs_gdb
def test_trace_waits_for_a_debugger(tmp_path: Path) -> None:
    command = [*OPENAMP, "trace", "--core", M3, "--gdb", f"unix:{tmp_path}/gdb"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as trace:
        assert trace.stderr is not None and trace.stdout is not None
        assert trace.stderr.readline().startswith("the core waits for a debugger: ")
        target = f"target remote {tmp_path}/gdb"
        gdb = ["gdb-multiarch", "-batch", "-ex", target, "-ex", "detach"]
        subprocess.run(gdb, capture_output=True, timeout=LIMIT, check=False)
        assert trace.stdout.readline().startswith("booted: echo on ")
        trace.send_signal(signal.SIGINT)
        _, err = trace.communicate(timeout=LIMIT)
    assert (trace.returncode, err) == (0, "")


@needs_qemu
def test_a_core_that_nobody_debugs_waits_for_ever_unless_there_is_a_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"unix:{tmp_path}/gdb"
    assert main(["ping", "--core", M3, "--gdb", where, "--timeout", "0.2"]) == 1
    debugger, error = capsys.readouterr().err.splitlines()
    assert debugger.startswith("the core waits for a debugger: ")
    assert f"on {M3} within 0.2 s; the core runs and is held" in error
    assert "it has touched no ring" in error


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ping", "--gdb", "1234"], "core native takes no debugger"),
        (["ping", "--core", "process", "--gdb", "1234"], "core process takes no debugger"),
        (["ping", "--core", "shm:/a?doorbell=unix:/b", "--gdb", "1"], "takes no debugger"),
        (["ping", "--core", M3, "--gdb", "nowhere"], "'nowhere'; a port"),
        (["ping", "--core", M3, "--gdb", "65536"], "'65536'; a port"),
        (["ping", "--core", "qemu"], "`openamp cores` lists them"),
        (["ping", "--core", "qemu:x"], "mps2-an385"),
        (["trace", "--gdb", "1234"], "core native takes no debugger"),
        (["trace", "--core", "x"], "unknown core 'x'"),
        (["trace", "--core", "shm:/a?doorbell=unix:/b"], "unknown core 'shm:"),
        (["trace", "--core", "qemu"], "which board?"),
        (["trace", "--attach", "/a", "--gdb", "1"], "--attach takes no gdb"),
    ],
)
def test_used_wrongly(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_an_image_without_a_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fw.hex").write_bytes(b":0400000001020304F2\n:00000001FF\n")
    assert main(["ping", str(tmp_path / "fw.hex")]) == 1
    assert "--core): native, qemu:BOARD, or process or loopback" in capsys.readouterr().err


# Remotes that fail


def test_a_silent_remote_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ping", "--channel", "nobody", "--timeout", "0.2"]) == 1
    err = capsys.readouterr().err
    assert "no service 'nobody' on native within 0.2 s; the core runs" in err
    assert "; announced: 'rpmsg-openamp-demo-channel'; last line of its trace: '" in err
    assert err.count("\n") == 1


def test_a_remote_that_does_not_announce_is_dumped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dumps = tmp_path / "dumps"
    options = ["--channel", "nobody", "--timeout", "0.2", "--coredump", str(dumps)]
    assert main(["ping", str(shipped_echo()), *options, "--json"]) == 1
    (dump,) = dumps.iterdir()
    assert json.loads(capsys.readouterr().out)["coredump"] == str(dump)
    assert dump.read_bytes().startswith(b"\x7fELF")


def test_no_dump_where_all_went_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ping", "-q", "--coredump", str(tmp_path / "dumps")]) == 0
    assert "coredump" not in capsys.readouterr().out
    assert not (tmp_path / "dumps").exists()
