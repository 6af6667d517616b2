"""The doctor finds what is wrong with a machine, says what to do, and finds nothing else."""

from __future__ import annotations

import gzip
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from openamp_py import ADDRESS_ANY
from openamp_py.linux.access import MachineAccess
from openamp_py.linux.doctor import Check, Level, examine, read_options, udev_rules
from openamp_py.linux.fake import FakeProcessor, FakeTree, open_fake_tree
from openamp_py.linux.fake_bus import FakeRemote

ALL = "REMOTEPROC=y RPMSG_VIRTIO=m RPMSG_CHAR=m RPMSG_CTRL=m RPMSG_TTY=m ALLOW_DEV_COREDUMP=y"


def config(options: str = ALL) -> str:
    lines = [f"CONFIG_{option}\n" for option in options.split()]
    return "# a kernel\n" + "".join(lines) + "# CONFIG_DEBUG_FS is not set\n"


@pytest.fixture
async def tree() -> AsyncIterator[FakeTree]:
    async with open_fake_tree() as tree:
        tree.put("/boot/config-6.1.0-fake", config())
        yield tree


@pytest.fixture
async def m4(tree: FakeTree) -> FakeProcessor:
    m4 = tree.add_processor("m4")
    await tree.write(f"{m4.path}/state", b"start")
    await wait_all_tasks_blocked()
    return m4


def wrong(tree: FakeTree, level: Level = Level.WRONG) -> list[tuple[str, str, str | None]]:
    return [(each.subject, each.text, each.cure) for each in examine(tree) if each.level is level]


def check(tree: FakeTree, subject: str) -> Check:
    (found,) = (each for each in examine(tree) if each.subject == subject)
    return found


# Nothing to do


async def test_a_machine_on_which_all_is_well(tree: FakeTree, m4: FakeProcessor) -> None:
    assert wrong(tree) == wrong(tree, Level.NOTE) == []
    assert [(each.subject, each.text) for each in examine(tree)] == [
        ("kernel", "6.1.0-fake"),
        ("CONFIG_REMOTEPROC", "processors: in the kernel"),
        ("CONFIG_RPMSG_VIRTIO", "channels: in the kernel"),
        ("CONFIG_RPMSG_CHAR", "nodes of endpoints: in the kernel"),
        ("CONFIG_RPMSG_CTRL", "control nodes: in the kernel"),
        ("CONFIG_RPMSG_TTY", "terminals: in the kernel"),
        ("CONFIG_ALLOW_DEV_COREDUMP", "coredumps: in the kernel"),
        ("CONFIG_DEBUG_FS", "traces: in the kernel"),
        ("m4 (remoteproc0)", "running"),
        ("m4 (remoteproc0)", "firmware /lib/firmware/fake.elf"),
        ("nodes", "/dev/rpmsg_ctrl0, /dev/rpmsg0"),
    ]


def test_a_machine_without_any_of_it(tmp_path: Path) -> None:
    found = {each.subject: each for each in examine(MachineAccess(tmp_path))}
    assert "options are unknown" in found["kernel"].text
    assert found["CONFIG_REMOTEPROC"].level is Level.NOTE
    assert found["processors"].level is Level.WRONG
    assert found["nodes"].level is Level.NOTE
    assert "CONFIG_RPMSG_CTRL" not in found  # of a kernel that may be an old one


def test_this_machine() -> None:
    assert examine()[0].text.startswith(os.uname().release)


# The kernel


@pytest.mark.parametrize(
    ("options", "files", "level", "text", "cure"),
    [
        ("RPMSG_TTY=y", {}, Level.FINE, "in the kernel", None),
        ("", {"builtin": "kernel/rpmsg-tty.ko\n"}, Level.FINE, "in the kernel", None),
        ("RPMSG_TTY=m", {"dep": "a/rpmsg_tty.ko.xz: b\n"}, Level.NOTE, "loaded", "modprobe rpmsg_"),
        ("RPMSG_TTY=m", {"dep": "a/xrpmsg_tty.ko: b\n"}, Level.NOTE, "installed", "install the"),
        ("", {}, Level.NOTE, "not in this kernel", "build the kernel with CONFIG_RPMSG_TTY"),
    ],
)
async def test_a_part_of_the_kernel(
    options: str, files: dict[str, str], level: Level, text: str, cure: str | None
) -> None:
    async with open_fake_tree(modules=("virtio_rpmsg_bus", "rpmsg_ctrl", "rpmsg_char")) as tree:
        tree.put("/boot/config-6.1.0-fake", config(options))
        for name, content in files.items():
            tree.put(f"/lib/modules/6.1.0-fake/modules.{name}", content)
        found = check(tree, "CONFIG_RPMSG_TTY")
        assert found.level is level and found.text.endswith(text)
        assert cure is None if found.cure is None else found.cure.startswith(cure or "?")


async def test_what_is_needed_and_missing_is_to_be_done() -> None:
    async with open_fake_tree(modules=()) as tree:
        tree.put("/boot/config-6.1.0-fake", config())
        tree.put("/lib/modules/6.1.0-fake/modules.dep", "kernel/rpmsg_ctrl.ko:\n")
        tree.add_processor("m4")
        assert [(subject, cure) for subject, _, cure in wrong(tree)] == [
            ("CONFIG_RPMSG_VIRTIO", "install the modules of this very kernel"),
            ("CONFIG_RPMSG_CHAR", "install the modules of this very kernel"),
            ("CONFIG_RPMSG_CTRL", "modprobe rpmsg_ctrl"),
        ]


@pytest.mark.parametrize(
    ("release", "options"),
    [("5.10.1", set()), ("5.16.0", {"TTY"}), ("5.18", {"TTY", "CTRL"}), ("x", set())],
)
async def test_older_kernels_are_not_asked_for_what_they_cannot_have(
    release: str, options: set[str]
) -> None:
    async with open_fake_tree(release=release, modules=()) as tree:
        tree.put(f"/boot/config-{release}", config(""))
        asked = {each.subject for each in examine(tree)}
        assert {each for each in ("TTY", "CTRL") if f"CONFIG_RPMSG_{each}" in asked} == options


def test_the_kernels_own_words_come_first(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "boot").mkdir()
    packed = tmp_path / "proc/config.gz"
    (tmp_path / "boot/config-1").write_text('CONFIG_A=m\nCONFIG_B="text"\nCONFIG_=y\n')
    access = MachineAccess(tmp_path)
    packed.write_bytes(gzip.compress(b"CONFIG_A=y\n"))
    assert read_options(access, "1") == {"A": "y"}
    for broken in (b"", b"no gzip", gzip.compress(b"CONFIG_A=y\n")[:5]):
        packed.write_bytes(broken)
        assert (read_options(access, "1") or {}).get("A") != "y"
    packed.write_bytes(b"no gzip")
    assert read_options(access, "1") == {"A": "m", "B": '"text"'}
    assert read_options(access, "2") is None
    packed.write_bytes(gzip.compress(b"CONFIG_A=y\n" + b"#\n" * (4 << 20) + b"CONFIG_B=y\n"))
    assert read_options(access, "1") == {"A": "y"}  # more than 4 MiB are not unpacked


# Processors


async def test_a_kernel_that_does_not_say_its_version(tree: FakeTree, m4: FakeProcessor) -> None:
    tree.hide("/proc/sys/kernel/osrelease")
    tree.remove("/lib/firmware/fake.elf")
    said = [f"{each.text} {each.cure}" for each in examine(tree)]
    assert not [text for text in said if "None/" in text or "/None" in text or "-None" in text]
    assert "no version in /proc/sys/kernel/osrelease" in said[0]


async def test_no_processor(tree: FakeTree) -> None:
    ((subject, text, cure),) = wrong(tree)
    assert (subject, text) == ("processors", "none in /sys/class/remoteproc")
    assert cure is not None and "dmesg" in cure


async def test_a_crashed_processor(tree: FakeTree, m4: FakeProcessor) -> None:
    await tree.write(f"{m4.path}/recovery", b"disabled")
    m4.crash()
    assert wrong(tree) == [
        ("m4 (remoteproc0)", "crashed; recovery is disabled", f"echo recover > {m4.path}/recovery")
    ]


async def test_firmware_that_is_nowhere(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4", firmware="a.elf")
    tree.put("/sys/module/firmware_class/parameters/path", "/data/\n")
    ((_, text, cure),) = wrong(tree)
    assert text == (
        "firmware a.elf is in none of /data, /lib/firmware/updates/6.1.0-fake, "
        "/lib/firmware/updates, /lib/firmware/6.1.0-fake, /lib/firmware"
    )
    assert cure == f"copy it there, or name another: echo NAME > {m4.path}/firmware"
    tree.put("/data/a.elf.xz", b"")
    assert wrong(tree) == []


async def test_a_running_processor_needs_its_firmware_only_later(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    tree.hide("/lib/firmware/*")
    assert wrong(tree) == []
    ((_, text, _cure),) = wrong(tree, Level.NOTE)
    assert text.startswith("firmware fake.elf is in none of ")


async def test_two_of_one_name(tree: FakeTree, m4: FakeProcessor) -> None:
    tree.add_processor("m4")
    notes = [text for _, text, _ in wrong(tree, Level.NOTE)]
    assert len(notes) == 2 and notes[0].endswith("use remoteproc0")


async def test_a_dump_that_waits(tree: FakeTree, m4: FakeProcessor) -> None:
    await tree.write(f"{m4.path}/coredump", b"enabled")
    m4.crash()
    await wait_all_tasks_blocked()
    ((subject, _, cure),) = wrong(tree, Level.NOTE)
    data = "/sys/devices/virtual/devcoredump/devcd0/data"
    assert (subject, cure) == ("remoteproc0", f"cp {data} FILE; echo 1 > {data}")


async def test_no_trace(tree: FakeTree, m4: FakeProcessor) -> None:
    tree.deny("/sys/kernel/debug/*")
    ((subject, text, _cure),) = wrong(tree, Level.NOTE)
    assert subject == "m4 (remoteproc0)" and "root's alone" in text


# Channels and nodes


async def test_a_processor_without_a_bus() -> None:
    async with open_fake_tree(modules=()) as tree:
        m4 = tree.add_processor("m4")
        await tree.write(f"{m4.path}/state", b"start")
        notes = {text for _, text, _ in wrong(tree, Level.NOTE)}
        assert "it runs, and has no rpmsg bus" in notes


async def test_no_control_node() -> None:
    async with open_fake_tree(modules=("virtio_rpmsg_bus", "rpmsg_char")) as tree:
        m4 = tree.add_processor("m4")
        await tree.write(f"{m4.path}/state", b"start")
        cure = "modprobe -a rpmsg_ctrl rpmsg_char"
        assert wrong(tree) == [("m4 (remoteproc0)", "it has no control node", cure)]


async def test_channels_that_no_driver_takes() -> None:
    async def service(remote: FakeRemote) -> None:
        for name in ("rpmsg-raw", "rpmsg-tty", "rpmsg-tty-channel", "other"):
            remote.announce(name, 1024)

    async with open_fake_tree(modules=("virtio_rpmsg_bus", "rpmsg_ctrl")) as tree:
        m4 = tree.add_processor("m4", service=service)
        await tree.write(f"{m4.path}/state", b"start")
        await wait_all_tasks_blocked()
        assert [(subject, cure) for subject, _, cure in wrong(tree)] == [
            ("virtio0.rpmsg-raw.-1.1024", "modprobe rpmsg_char"),
            ("virtio0.rpmsg-tty.-1.1024", "modprobe rpmsg_tty"),
        ]
        old = check(tree, "virtio0.rpmsg-tty-channel.-1.1024")
        assert (old.level, old.cure) == (Level.NOTE, "call the firmware's service rpmsg-tty")


async def test_nodes_that_are_not_there(tree: FakeTree, m4: FakeProcessor) -> None:
    tree.hide("/dev/rpmsg_ctrl*")
    ((subject, text, cure),) = wrong(tree)
    assert (subject, text) == ("/dev/rpmsg_ctrl0", "sysfs has it, /dev does not")
    assert cure is not None and "container" in cure


async def test_missing_permissions(tree: FakeTree, m4: FakeProcessor) -> None:
    tree.deny("/dev/rpmsg0", os.W_OK)
    tree.deny("/sys/class/remoteproc/*/state", os.W_OK)
    tree.deny("/sys/class/remoteproc/*/firmware")
    (path, text, cure), (node, _, again), (unread, reason, _) = [
        each for each in wrong(tree) if "firmware" not in each[0] or each[1].startswith("EACCES")
    ]
    assert path == f"{m4.path}/state"
    mode = os.stat(tree.root / path[1:])
    assert f", user {mode.st_uid}, group {mode.st_gid})" in text
    assert node == "/dev/rpmsg0"
    assert cure == again == "give it to a group: openamp doctor --udev"
    assert (unread.rpartition("/")[2], reason) == ("firmware", "EACCES, Permission denied")


async def test_a_driver_that_lets_nobody_write(tree: FakeTree, m4: FakeProcessor) -> None:
    tree.deny("/sys/class/remoteproc/*/state", os.W_OK)
    os.chmod(tree.root / m4.path[1:] / "state", 0o444)
    assert wrong(tree) == []
    text = f"its driver lets nobody write {m4.path}/state"
    assert wrong(tree, Level.NOTE) == [("m4 (remoteproc0)", text, None)]


# The rules


def test_the_rules_are_complete() -> None:
    rules = udev_rules("radio")
    lines = [line for line in rules.splitlines() if not line.startswith("#")]
    assert len(lines) == 5 and all("radio" in line for line in lines)
    for name in ("rpmsg_ctrl", "rpmsg[", "ttyRPMSG", "remoteproc[", "devcoredump"):
        assert name in rules


def test_the_command_of_a_rule_works(tmp_path: Path) -> None:
    line = next(line for line in udev_rules("root").splitlines() if "coredump &&" in line
                or "firmware" in line)  # fmt: skip
    command = line.partition("/bin/sh -c '")[2].removesuffix("'\"")
    for name in ("state", "firmware", "recovery"):  # and no coredump: an older kernel
        (tmp_path / name).touch(0o644)
    filled = command.replace("%S", str(tmp_path)).replace("%p", "")
    subprocess.run(["/bin/sh", "-c", filled], check=False, stderr=subprocess.DEVNULL)
    assert {os.stat(each).st_mode & 0o777 for each in tmp_path.iterdir()} == {0o664}


@pytest.mark.parametrize("group", ["", "a b", "a'", "-x", "x" * 33, "a\n", "$(x)"])
def test_what_is_no_group(group: str) -> None:
    with pytest.raises(ValueError, match="is no name of a group"):
        udev_rules(group)


# Hostile files


@settings(derandomize=True, deadline=None, max_examples=50, database=None)
@given(st.lists(st.binary(max_size=60), min_size=6, max_size=6))
def test_any_bytes_are_examined(
    tmp_path_factory: pytest.TempPathFactory, texts: list[bytes]
) -> None:
    root = tmp_path_factory.mktemp("root")
    places = (
        "proc/sys/kernel/osrelease",
        "proc/config.gz",
        "sys/module/firmware_class/parameters/path",
        "sys/class/remoteproc/remoteproc0/name",
        "sys/class/remoteproc/remoteproc0/firmware",
        "sys/class/remoteproc/remoteproc0/state",
    )
    for place, text in zip(places, texts, strict=True):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(text)
    assert any(each.subject.endswith("(remoteproc0)") for each in examine(MachineAccess(root)))


def test_an_address_that_is_none_is_told(tmp_path: Path) -> None:
    place = tmp_path / "sys/bus/rpmsg/devices/virtio0.x.-1.1"
    place.mkdir(parents=True)
    (place / "src").write_text(f"{ADDRESS_ANY + 1}\n")
    found = [each for each in examine(MachineAccess(tmp_path)) if each.subject.endswith("/src")]
    assert [(each.level, each.cure) for each in found] == [(Level.WRONG, None)]
