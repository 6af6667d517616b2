"""The tree of a machine: read from files as the kernel lays them out, however they come and go."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py import ADDRESS_ANY
from openamp_py.linux.access import MachineAccess
from openamp_py.linux.tree import (
    ControlNode,
    EndpointNode,
    LinuxChannel,
    LinuxProcessor,
    TreeReader,
    WaitingDump,
    read_tree,
)

RPROC = "sys/devices/platform/soc/5c.m4/remoteproc/remoteproc0"
BUS = f"{RPROC}/rproc-virtio.0.auto/virtio3"


class Root:
    """A directory with files as sysfs has them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, directory: str, **files: str | bytes) -> None:
        place = self.path / directory
        place.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (place / name).write_bytes(text if isinstance(text, bytes) else f"{text}\n".encode())

    def link(self, link: str, target: str) -> None:
        place = self.path / link
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(self.path / target, place.parent))

    def channel(self, directory: str, link: str, **files: str | bytes) -> None:
        self.put(directory, **files)
        self.link(f"{link}/{directory.rpartition('/')[2]}", directory)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """One processor with a channel, a control node, an endpoint, a terminal and a dump."""
    root = Root(tmp_path)
    bus, nodes = "sys/bus/rpmsg/devices", "sys/class/rpmsg"
    root.put(
        RPROC, name="m4", state="running", firmware="a.elf", recovery="enabled", dev="240:0",
        coredump="inline",
    )  # fmt: skip
    root.link("sys/class/remoteproc/remoteproc0", RPROC)
    addresses = {"src": "0x400", "dst": "0x35"}
    root.channel(
        f"{BUS}/virtio3.rpmsg-raw.-1.53", bus, name="rpmsg-raw", announce="false", **addresses
    )
    root.put("sys/bus/rpmsg/drivers/rpmsg_chrdev")
    root.link(f"{BUS}/virtio3.rpmsg-raw.-1.53/driver", "sys/bus/rpmsg/drivers/rpmsg_chrdev")
    control = f"{BUS}/virtio3.rpmsg_ctrl.0.0"
    root.channel(control, bus, name="rpmsg_ctrl", src="0x0", dst="0x0", announce="true")
    root.channel(f"{control}/rpmsg/rpmsg_ctrl10", nodes, dev="241:7")
    root.channel(
        f"{control}/rpmsg/rpmsg_ctrl10/rpmsg2", nodes, name="mine", src="-1", dst="1024", dev="bad"
    )
    root.channel(f"{BUS}/virtio3.rpmsg-tty.-1.9/tty/ttyRPMSG4", "sys/class/tty", dev="242:4")
    root.put("sys/devices/virtual/devcoredump/devcd3", data=b"\x7fELF")
    root.link("sys/devices/virtual/devcoredump/devcd3/failing_device", RPROC)
    root.link("sys/class/devcoredump/devcd3", "sys/devices/virtual/devcoredump/devcd3")
    root.put("sys/kernel/debug/remoteproc/remoteproc0", trace0="", trace10="", trace2="", crash="")
    root.put("sys/module/firmware_class/parameters", path="")
    root.put("proc/sys/kernel", osrelease="6.1.0")
    root.put("dev", rpmsg2=b"", rpmsg_ctrl10=b"", ttyRPMSG4=b"", ttyS0=b"", rpmsg=b"")
    return root


# What is there


def test_a_machine(root: Root) -> None:
    tree = read_tree(MachineAccess(root.path))
    debug = "/sys/kernel/debug/remoteproc/remoteproc0"
    assert tree.processors == (
        LinuxProcessor(
            kernel_name="remoteproc0",
            path=f"/{RPROC}",
            name="m4",
            state="running",
            firmware="a.elf",
            recovery="enabled",
            coredump="inline",
            node="/dev/remoteproc0",
            traces=(f"{debug}/trace0", f"{debug}/trace2", f"{debug}/trace10"),
        ),
    )
    raw, control = tree.channels
    assert raw == LinuxChannel(
        kernel_name="virtio3.rpmsg-raw.-1.53",
        path=f"/{BUS}/virtio3.rpmsg-raw.-1.53",
        bus="virtio3",
        processor="remoteproc0",
        name="rpmsg-raw",
        source=1024,
        destination=53,
        announce=False,
        driver="rpmsg_chrdev",
    )
    assert (control.name, control.announce, control.driver) == ("rpmsg_ctrl", True, None)
    path = f"/{BUS}/virtio3.rpmsg_ctrl.0.0/rpmsg/rpmsg_ctrl10"
    whose = {
        "bus": "virtio3",
        "channel": "virtio3.rpmsg_ctrl.0.0",
        "processor": "remoteproc0",
    }
    assert tree.controls == (
        ControlNode("rpmsg_ctrl10", path, "/dev/rpmsg_ctrl10", device=(241, 7), **whose),
    )
    assert tree.endpoints == (
        EndpointNode(
            "rpmsg2",
            f"{path}/rpmsg2",
            "/dev/rpmsg2",
            control="rpmsg_ctrl10",
            name="mine",
            source=ADDRESS_ANY,
            destination=1024,
            device=None,
            **whose,
        ),
    )
    (tty,) = tree.ttys
    assert (tty.node, tty.processor, tty.bus) == ("/dev/ttyRPMSG4", "remoteproc0", "virtio3")
    assert tty.channel == "virtio3.rpmsg-tty.-1.9"
    dump = "/sys/devices/virtual/devcoredump/devcd3/data"
    assert tree.dumps == (WaitingDump("devcd3", dump, "remoteproc0"),)
    assert (tree.release, tree.firmware_path, tree.problems) == ("6.1.0", "", ())
    assert tree.nodes == ("/dev/rpmsg2", "/dev/rpmsg_ctrl10", "/dev/ttyRPMSG4")


def test_a_machine_without_any_of_it(tmp_path: Path) -> None:
    assert not any(asdict(read_tree(MachineAccess(tmp_path))).values())


def test_this_machine() -> None:
    assert read_tree().release == os.uname().release


def test_entries_are_in_the_order_of_their_numbers(root: Root) -> None:
    for number in (10, 2):
        root.put(f"sys/devices/x/remoteproc/remoteproc{number}", name="m")
        root.link(
            f"sys/class/remoteproc/remoteproc{number}",
            f"sys/devices/x/remoteproc/remoteproc{number}",
        )
    found = TreeReader(MachineAccess(root.path)).processors()
    assert [each.kernel_name for each in found] == ["remoteproc0", "remoteproc2", "remoteproc10"]


def test_an_older_kernel_has_fewer_files(root: Root) -> None:
    for name in ("coredump", "recovery", "dev"):
        (root.path / RPROC / name).unlink()
    shutil.rmtree(root.path / "sys/kernel")
    tree = read_tree(MachineAccess(root.path))
    (processor,) = tree.processors
    assert (processor.coredump, processor.recovery, processor.node) == (None, None, None)
    assert (processor.traces, tree.problems) == ((), ())


def test_a_bus_of_no_processor(root: Root) -> None:
    path = "sys/devices/platform/virtio-uml.0/virtio0/virtio0.x.-1.1"
    root.channel(path, "sys/bus/rpmsg/devices", name="x", src="0xffffffff", dst="0x1")
    found = read_tree(MachineAccess(root.path)).channels[0]
    assert (found.bus, found.processor, found.source) == ("virtio0", None, ADDRESS_ANY)


def test_a_device_whose_name_looks_like_a_channel(root: Root) -> None:
    path = "sys/devices/soc/soc.bus/virtio0/virtio0.soc.bus.-1.1/rpmsg/rpmsg9"
    root.channel(path, "sys/class/rpmsg", name="x", src="1", dst="2")
    found = read_tree(MachineAccess(root.path)).endpoints[-1]
    assert (found.bus, found.channel) == ("virtio0", "virtio0.soc.bus.-1.1")


def test_a_dump_of_another_device(root: Root) -> None:
    link = root.path / "sys/devices/virtual/devcoredump/devcd3/failing_device"
    link.unlink()
    assert read_tree(MachineAccess(root.path)).dumps[0].processor is None
    root.put("sys/devices/gpu")
    link.symlink_to(root.path / "sys/devices/gpu")
    assert read_tree(MachineAccess(root.path)).dumps[0].processor is None


# What has no sense, cannot be read, or goes


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0xffffffff", ADDRESS_ANY),
        ("-1", ADDRESS_ANY),
        ("4294967295", ADDRESS_ANY),
        ("-2147483648", 1 << 31),
        ("0x0", 0),
    ],
)
def test_addresses(root: Root, text: str, address: int) -> None:
    root.put(f"{BUS}/virtio3.rpmsg-raw.-1.53", src=text)
    tree = read_tree(MachineAccess(root.path))
    assert (tree.channels[0].source, tree.problems) == (address, ())


@pytest.mark.parametrize(
    "text", ["", "x", "1 2", "0x", "0x1ffffffff", "4294967296", "-2147483649", "٣", "1_0", " 1"]
)
def test_what_is_no_address(root: Root, text: str) -> None:
    root.put(f"{BUS}/virtio3.rpmsg-raw.-1.53", src=text)
    tree = read_tree(MachineAccess(root.path))
    assert tree.channels[0].source is None
    (problem,) = tree.problems
    assert str(problem).endswith("is not an address") and "/src: " in str(problem)


def test_what_this_user_may_not_read(root: Root) -> None:
    class Denied(MachineAccess):
        def read(self, path: str, size: int = 4096, offset: int = 0) -> bytes:
            if path.endswith("/state"):
                raise OSError(errno.EACCES, "denied")
            return super().read(path, size, offset)

        def names(self, directory: str) -> list[str]:
            if directory in ("/sys/class/rpmsg", "/sys/kernel/debug/remoteproc/remoteproc0"):
                raise OSError(errno.EACCES, "denied")
            return super().names(directory)

    tree = read_tree(Denied(root.path))
    assert (tree.processors[0].state, tree.processors[0].name) == (None, "m4")
    assert tree.processors[0].traces == ()
    assert [str(each) for each in tree.problems] == [
        f"/{RPROC}/state: EACCES, Permission denied",
        "/sys/class/rpmsg: EACCES, Permission denied",
    ]


@pytest.mark.parametrize("name", ["name", "state", "coredump", "dev"])
def test_a_processor_that_leaves_while_it_is_read(root: Root, name: str) -> None:
    class Leaving(MachineAccess):
        def read(self, path: str, size: int = 4096, offset: int = 0) -> bytes:
            if path.endswith(f"/remoteproc0/{name}"):
                shutil.rmtree(root.path / RPROC)
                raise OSError(errno.EIO, "in the middle of its removal")
            return super().read(path, size, offset)

    tree = read_tree(Leaving(root.path))
    assert (tree.processors, tree.channels, tree.controls, tree.problems) == ((), (), (), ())


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENODEV, errno.ENOTDIR])
def test_a_file_that_is_not_there_is_no_problem(root: Root, code: int) -> None:
    class Without(MachineAccess):
        def read(self, path: str, size: int = 4096, offset: int = 0) -> bytes:
            if path.endswith("/coredump"):
                raise OSError(code, "not there")
            return super().read(path, size, offset)

    tree = read_tree(Without(root.path))
    assert (tree.processors[0].coredump, tree.problems) == (None, ())


def test_odd_files_in_the_place_of_attributes(root: Root) -> None:
    place = root.path / RPROC
    for name in ("state", "name", "firmware", "recovery"):
        (place / name).unlink()
    (place / "state").mkdir()
    (place / "name").symlink_to("name")
    os.mkfifo(place / "firmware")
    (place / "recovery").symlink_to("/dev/zero")
    tree = read_tree(MachineAccess(root.path))
    (processor,) = tree.processors
    assert (processor.state, processor.name, processor.firmware) == (None, None, None)
    assert processor.recovery == "\0" * 4096
    assert [each.reason.partition(",")[0] for each in tree.problems] == [
        "ELOOP",
        "EISDIR",
        "ESPIPE",
    ]


def test_links_that_leave_the_root_lead_nowhere(root: Root, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "name").write_text("secret")
    (root.path / "sys/class/remoteproc/remoteproc1").symlink_to(outside)
    (processor,) = read_tree(MachineAccess(root.path)).processors
    assert processor.name == "m4"


def test_channels_without_end(tmp_path: Path) -> None:
    class Many(MachineAccess):
        def names(self, directory: str) -> list[str]:
            if directory == "/sys/bus/rpmsg/devices":
                return [f"virtio0.x.-1.{number}" for number in range(5000)]
            return []

        def resolve(self, path: str) -> str:
            looked_at.append(path)
            raise OSError(errno.ENOENT, "not there")

    looked_at: list[str] = []
    tree = read_tree(Many(tmp_path))
    assert len(looked_at) == 4096
    assert [each.reason for each in tree.problems] == ["5000 entries; only 4096 were read"]


@settings(derandomize=True, deadline=None, max_examples=50, database=None)
@given(st.binary(max_size=100), st.binary(max_size=100), st.binary(min_size=1, max_size=60))
def test_any_bytes_are_a_tree(
    tmp_path_factory: pytest.TempPathFactory, text: bytes, other: bytes, name: bytes
) -> None:
    root = Root(tmp_path_factory.mktemp("root"))
    fields = {"name": text, "src": other, "dst": text, "state": other, "firmware": text}
    kernel_name = os.fsdecode(name.replace(b"\0", b"").replace(b"/", b"!").lstrip(b".")) or "x"
    for link in ("sys/bus/rpmsg/devices", "sys/class/rpmsg"):
        root.channel(f"{BUS}/virtio3.{kernel_name}", link, **fields)
    root.channel(RPROC, "sys/class/remoteproc", dev=text, **fields)
    root.put("proc/sys/kernel", osrelease=text)
    tree = read_tree(MachineAccess(root.path))
    (processor,), (channel,) = tree.processors, tree.channels
    assert processor.state == other.decode("utf-8", "backslashreplace").removesuffix("\n")
    assert channel.kernel_name == f"virtio3.{kernel_name}"
    shutil.rmtree(root.path)
