"""``openamp list`` and ``openamp doctor``, on this machine and on fake ones."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from trio.testing import wait_all_tasks_blocked

from openamp_py.cli import main
from openamp_py.linux.fake import FakeTree, fake_echo, open_fake_tree
from openamp_py.linux.fake_bus import FakeRemote


async def service(remote: FakeRemote) -> None:
    remote.announce("steer\x1b[2J\n", 99)
    remote.announce("rpmsg-tty", 98)
    await fake_echo(remote)


@pytest.fixture
async def tree() -> AsyncIterator[FakeTree]:
    async with open_fake_tree() as tree:
        m4 = tree.add_processor("m4", service=service)
        tree.add_processor("dsp", attached=True)
        await tree.write(f"{m4.path}/coredump", b"enabled")
        await tree.write(f"{m4.path}/state", b"start")
        m4.crash()
        await wait_all_tasks_blocked()
        yield tree


async def test_the_list(tree: FakeTree, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--root", str(tree.root)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "m4 (remoteproc0): running, firmware fake.elf, recovery enabled, coredump enabled",
        "  channel rpmsg-openamp-demo-channel, any to 1024, no driver",
        "  channel rpmsg-raw, 1025 to 1025, driver rpmsg_chrdev",
        "  channel rpmsg-tty, 1024 to 98, driver rpmsg_tty",
        "  channel rpmsg_ctrl, 0 to 0, driver rpmsg_ctrl",
        "  channel rpmsg_ns, 53 to 53, no driver",
        "  channel steer\\x1b[2J\\x0a, any to 99, no driver",
        "  control /dev/rpmsg_ctrl0",
        "  endpoint /dev/rpmsg0: rpmsg-raw, 1025 to 1025",
        "  terminal /dev/ttyRPMSG0",
        "  coredump /sys/devices/virtual/devcoredump/devcd0/data",
        "dsp (remoteproc1): detached, firmware fake.elf, recovery enabled, coredump disabled",
    ]


async def test_the_list_as_json(tree: FakeTree, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--root", str(tree.root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["state"] for each in found["processors"]] == ["running", "detached"]
    assert found["controls"][0]["processor"] == "remoteproc0"
    assert found["problems"] == []


def test_a_machine_without_processors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        "no remote processors: /sys/class/remoteproc has none (`openamp doctor` tells why; "
        "`openamp cores` lists those that need no hardware)\n"
    )
    assert main(["list", "--root", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["processors"] == []


def test_what_belongs_to_nobody_and_what_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    channel = tmp_path / "sys/bus/rpmsg/devices/virtio0.x.-1.1"
    (channel / "name").mkdir(parents=True)
    (tmp_path / "sys/class/remoteproc/remoteproc0").mkdir(parents=True)
    assert main(["list", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "? (remoteproc0): state unknown, firmware unknown",
        "of no processor here:",
        "  channel ?, ? to ?, no driver",
        "not read: /sys/bus/rpmsg/devices/virtio0.x.-1.1/name: EISDIR, Is a directory",
    ]


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert capsys.readouterr().out
    assert main(["doctor"]) in (0, 1)
    assert "CONFIG_REMOTEPROC" in capsys.readouterr().out


# The doctor


async def test_the_doctor(tree: FakeTree, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(tree.root)]
    assert main(["doctor", *root]) == 0
    assert "ok     m4 (remoteproc0): running\n" in capsys.readouterr().out
    (tree.root / "dev/rpmsg0").unlink()
    assert main(["doctor", *root]) == 1
    lines = capsys.readouterr().out.splitlines()
    where = lines.index("to do  /dev/rpmsg0: sysfs has it, /dev does not")
    assert lines[where + 1].startswith("       -> mount devtmpfs")
    assert main(["doctor", *root, "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)
    (found,) = (each for each in checks if each["level"] == "to do")
    assert found["subject"] == "/dev/rpmsg0" and found["cure"]


def test_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--udev"]) == 0
    assert 'GROUP="openamp"' in capsys.readouterr().out
    assert main(["doctor", "--udev", "radio"]) == 0
    assert 'GROUP="radio"' in capsys.readouterr().out
    assert main(["doctor", "--udev", "a b"]) == 2
    assert capsys.readouterr().err == "openamp doctor: 'a b' is no name of a group\n"
