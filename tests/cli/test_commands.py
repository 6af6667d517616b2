"""The command line as a user runs it: output, JSON, exit codes, one line for an error."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from front_end import open_guest

from openamp_py import ECHO_CHANNEL
from openamp_py.cli import main
from openamp_py.platforms.native import shipped_echo
from openamp_py.rpmsg.wire import SHUTDOWN_REQUEST

LIMIT = 60.0
OPENAMP = (sys.executable, "-m", "openamp_py")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*OPENAMP, *arguments], capture_output=True, text=True, timeout=LIMIT, check=False
    )


def test_ping_looks_like_ping(core: str) -> None:
    done = _run("ping", "--core", core, "-c", "3")
    assert (done.returncode, done.stderr) == (0, "")
    head, *replies, rule, counts, times, end = done.stdout.splitlines()
    assert head == f"PING rpmsg-openamp-demo-channel (0x400) on {core}: 56(72) bytes of data."
    assert [line.split(" time=")[0] for line in replies] == [
        f"72 bytes from 0x400: seq={number}" for number in range(3)
    ]
    assert rule == "--- rpmsg-openamp-demo-channel ping statistics ---"
    assert counts == "3 sent, 3 received, 0 lost, 0 corrupt"
    assert times.startswith("rtt min/p50/p99/max = ")
    assert end.endswith("shutdown graceful")


def test_ping_json_is_one_object(core: str) -> None:
    done = _run("ping", "--core", core, "--count", "200", "--size", "480", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert {k: result[k] for k in ("core", "channel", "firmware", "size")} == {
        "core": core,
        "channel": "rpmsg-openamp-demo-channel",
        "firmware": None,
        "size": 480,
    }
    counts = [result[k] for k in ("sent", "received", "lost", "corrupt", "shutdown", "error")]
    assert counts == [200, 200, 0, 0, "graceful", None]
    times = result["rtt_us"]
    assert 0 < times["min"] <= times["p50"] <= times["p99"] <= times["max"]
    assert result["boot_ms"] > 0


def test_ping_dumps_rings_and_endpoints() -> None:
    text = _run("ping", "--core", "loopback", "--dump").stdout
    assert "bus on vdev0 (driver)" in text and "vdev0 vring 1, role driver, num 256" in text
    assert "rpmsg-openamp-demo-channel, hold back: sent 6, " in text
    dump = json.loads(_run("ping", "--core", "loopback", "--dump", "--json").stdout)["dump"]
    assert [ring["name"] for ring in dump["rings"]] == ["vdev0 vring 1", "vdev0 vring 0"]
    assert dump["endpoints"][0]["statistics"]["sent"] == 6


def test_ping_boots_the_firmware_it_is_given() -> None:
    done = _run("ping", str(shipped_echo()), "--count", "1", "--json")
    assert json.loads(done.stdout)["firmware"] == str(shipped_echo())
    assert done.returncode == 0


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("killed_core", ["native", "process"])
def test_ping_says_at_once_how_its_remote_died(killed_core: str) -> None:
    command = [*OPENAMP, "ping", "--core", killed_core, "--count", "100000000", "-q"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as ping:
        assert ping.stdout is not None
        assert ping.stdout.readline().startswith("PING")
        (child,) = _children(ping.pid)
        os.kill(child, signal.SIGKILL)
        killed = time.monotonic()
        out, err = ping.communicate(timeout=LIMIT)
        taken = time.monotonic() - killed
    assert ping.returncode == 1
    assert len(err.splitlines()) == 1
    assert err.startswith("openamp ping: the core") and "died of SIGKILL" in err
    assert "shutdown hard (the core" in out
    assert taken < LIMIT / 2, "it did not hang; how fast it is, is for the benchmark"


def test_ping_says_what_it_saw_of_a_remote_that_answers_no_more() -> None:
    limits = ("--wait", "0.1", "--grace", "0.1")
    command = [*OPENAMP, "ping", "--core", "native", "-c", "100000000", "-q", *limits]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as ping:
        assert ping.stdout is not None
        assert ping.stdout.readline().startswith("PING")
        (child,) = _children(ping.pid)
        os.kill(child, signal.SIGSTOP)
        _, err = ping.communicate(timeout=LIMIT)
    assert ping.returncode == 1
    assert "no reply to 3 messages in a row within 0.1 s each; the core runs" in err
    assert "kicks from it: " in err and "announced: 'rpmsg-openamp-demo-channel'" in err


def test_the_json_of_a_ping_that_failed_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ping", "--channel", "nobody", "--timeout", "0.1", "--json"]) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["error"] in captured.err
    assert (result["sent"], result["shutdown"], result["rtt_us"]) == (0, "hard", None)


def test_ping_interrupted_sums_up_and_shuts_down() -> None:
    command = [*OPENAMP, "ping", "--count", "100000000"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as ping:
        assert ping.stdout is not None
        for _ in range(10):
            ping.stdout.readline()
        ping.send_signal(signal.SIGINT)
        out, err = ping.communicate(timeout=LIMIT)
    assert "shutdown graceful" in out.splitlines()[-1]
    assert err == ""


def test_a_message_in_flight_at_the_interrupt_is_not_lost() -> None:
    command = [*OPENAMP, "ping", "--count", "100000000", "-q"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as ping:
        assert ping.stdout is not None
        ping.stdout.readline()
        ping.send_signal(signal.SIGINT)
        out, _ = ping.communicate(timeout=LIMIT)
    assert ping.returncode == 0
    assert " 0 lost" in out


def test_a_remote_that_does_not_leave_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ping", "-q", "--grace", "0"]) == 1
    captured = capsys.readouterr()
    assert "shutdown hard" in captured.out
    assert "the shutdown was hard: the remote did not leave within 0.0 s" in captured.err


def test_the_process_core_works_in_a_source_tree(tmp_path: Path) -> None:
    (tmp_path / "openamp_py").mkdir()
    (tmp_path / "openamp_py" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    command = [str(Path(sys.executable).parent / "openamp"), "ping", "-q", "--core", "process"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_closed_standard_output_is_no_traceback() -> None:
    command = f"{' '.join(OPENAMP)} ping >&-"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--core", "nonsense"], "unknown core 'nonsense'"),
        (["--core", "shm:/a"], "doorbell"),
        (["--size", "481"], "--size 481 is too large; the limit on this link is 480"),
        (["--size", "-1"], "--size -1"),
        (["--channel", "x" * 40], "channel name"),
        (["--channel", ""], "channel name"),
    ],
)
def test_ping_used_wrongly(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["ping", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["fly"], ["ping", "--count", "0"], ["ping", "--x"]])
def test_options_that_are_none(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_a_service_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ping", "--channel", "nobody", "--timeout", "0.2"]) == 1
    assert "no service 'nobody' on native within 0.2 s" in capsys.readouterr().err


def test_a_peer_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = f"shm:{tmp_path}/m?doorbell=unix:{tmp_path}/b"
    assert main(["ping", "--core", url, "--timeout", "0.1"]) == 1
    assert "is the peer running" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "ELF"), (b"\x7fELF\x02\x01\x01" + bytes(57), "")],
)
@pytest.mark.parametrize("command", ["ping", "inspect"])
def test_firmware_that_is_none(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: str,
    content: bytes | None,
    message: str,
) -> None:
    path = tmp_path / "firmware.elf"
    if content is not None:
        path.write_bytes(content)
    assert main([command, str(path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"openamp {command}: ") and message in err
    assert len(err.splitlines()) == 1


def test_verbose_adds_the_traceback() -> None:
    done = _run("inspect", "-v", "/nonexistent")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("openamp inspect: ")


def test_inspect_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(shipped_echo())]) == 0
    out = capsys.readouterr().out
    for text in (
        "ELF64",
        "segment 0: da 0x20000000",
        "carveout: offset 0x1c, da any, pa any, length 0x40000, flags 0x0, name 'vdev0buffer'",
        "name 'trace0'",
        "id 7, notify_id any, device_features 0x1",
        "vring 1: da any, align 0x1000, num 256, notify_id any",
    ):
        assert text in out


def test_inspect_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(shipped_echo()), "--json"]) == 0
    document: Any = json.loads(capsys.readouterr().out)
    carveout, trace, vdev = document["table"]["entries"]
    assert (carveout["kind"], trace["kind"], vdev["kind"]) == ("carveout", "trace", "vdev")
    assert vdev["id"] == 7 and len(vdev["vrings"]) == 2


def test_serve_echo_plays_the_remote_for_ping(tmp_path: Path) -> None:
    url = f"shm:{tmp_path}/memory?doorbell=unix:{tmp_path}/bell"
    with subprocess.Popen([*OPENAMP, "serve", "echo", "--core", f"{url}&listen=1"]) as server:
        done = _run("ping", "--core", url, "--count", "50", "-q")
        assert (done.returncode, done.stderr) == (0, "")
        assert "50 received, 0 lost" in done.stdout
        assert server.wait(LIMIT) == 0


def test_serve_echo_plays_the_device_of_a_guest(tmp_path: Path) -> None:
    async def be_a_guest(ends: bool) -> None:
        with trio.fail_after(LIMIT):
            async with (
                open_guest(tmp_path / "s") as bus,
                bus.open_endpoint(ECHO_CHANNEL, announce=False) as endpoint,
            ):
                for payload in (b"one", SHUTDOWN_REQUEST if ends else b"two"):
                    await endpoint.send(payload)
                    assert (await endpoint.receive()).payload == payload

    url = f"vhost-user:{tmp_path / 's'}"
    with subprocess.Popen([*OPENAMP, "serve", "echo", "--core", url]) as server:
        try:
            for ends in (False, False, True):
                assert server.poll() is None
                trio.run(be_a_guest, ends)
                _wait_unmapped(server.pid, "openamp-guest")
            assert server.wait(LIMIT) == 0
        finally:
            server.kill()
    assert not (tmp_path / "s").exists()


def _wait_unmapped(pid: int, name: str) -> None:
    """Waits until a process has let go of memory of this name, or is gone."""
    until = time.monotonic() + LIMIT / 6
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        while name in Path(f"/proc/{pid}/maps").read_text():
            assert time.monotonic() < until, f"{name} is still mapped"
            time.sleep(0.01)


def test_serve_used_wrongly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "echo", "--core", "vhost-user:/a?b=1"]) == 2
    assert "unknown option 'b'" in capsys.readouterr().err
    assert main(["serve", "echo", "--core", "native"]) == 2
    assert "is not a link" in capsys.readouterr().err


def test_output_to_a_closed_pipe_is_no_traceback() -> None:
    command = f"{' '.join(OPENAMP)} ping --count 20000 | head -1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.stdout.startswith("PING") and "Traceback" not in done.stderr
