"""The fake machine does what Linux 6.1 does: states, errno by errno, nodes, numbers."""

from __future__ import annotations

import errno
import os
import select
import struct
import termios
import tty
from collections.abc import AsyncIterator, Callable
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from openamp_py import ADDRESS_ANY, ECHO_CHANNEL
from openamp_py.linux.access import (
    CREATE_DEVICE,
    CREATE_ENDPOINT,
    DESTROY_ENDPOINT,
    RELEASE_DEVICE,
    Node,
)
from openamp_py.linux.fake import FakeProcessor, FakeTree, open_fake_tree
from openamp_py.linux.fake_bus import MAX_QUEUED, FakeRemote
from openamp_py.linux.tree import LinuxTree, read_tree
from openamp_py.rpmsg.wire import decode_announcement_untrusted


@pytest.fixture
async def tree() -> AsyncIterator[FakeTree]:
    async with open_fake_tree() as tree:
        yield tree


async def silent(remote: FakeRemote) -> None:
    """A remote that announces raw endpoints and takes no message."""
    remote.announce("rpmsg-raw", 1024)


async def start(tree: FakeTree, processor: FakeProcessor) -> FakeRemote:
    """Starts it, and lets it announce its channels."""
    await tree.write(f"{processor.path}/state", b"start")
    await wait_all_tasks_blocked()
    assert processor.remote is not None
    return processor.remote


def info(name: str, source: int = ADDRESS_ANY, destination: int = 1024) -> bytes:
    return struct.pack("=32sII", name.encode(), source, destination)


def create(tree: FakeTree, *arguments: Any, control: str = "/dev/rpmsg_ctrl0") -> None:
    node = tree.open_node(control)
    try:
        assert len(node.ioctl(CREATE_ENDPOINT, info(*arguments))) == 40
    finally:
        node.close()


@contextmanager
def refused(code: int) -> Any:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == code, caught.value


async def read(node: Node, size: int = 512) -> bytes:
    await trio.lowlevel.wait_readable(node.fileno())
    return node.read(size)


def events(node: Node) -> int:
    poll = select.poll()
    poll.register(node.fileno(), select.POLLIN | select.POLLOUT)
    found = poll.poll(0)
    return found[0][1] if found else 0


def addresses(tree: LinuxTree) -> list[tuple[str | None, int | None, int | None]]:
    return [(each.name, each.source, each.destination) for each in tree.channels]


# The life of a processor


async def test_start_and_stop_are_counted(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4")
    state = f"{m4.path}/state"
    seen = [m4.state]
    for command in (b"start", b"start\n", b"stop", b"stop\n"):
        await tree.write(state, command)
        seen.append(tree.read(state).decode())
    assert seen == ["offline", "running\n", "running\n", "running\n", "offline\n"]
    with refused(errno.EINVAL):
        await tree.write(state, b"stop")


async def test_a_start_makes_channels_and_nodes_and_a_stop_ends_them(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4")
    await start(tree, m4)
    seen = read_tree(tree)
    assert addresses(seen) == [
        (ECHO_CHANNEL, ADDRESS_ANY, 1024),
        ("rpmsg-raw", 1024, 1025),
        ("rpmsg_ctrl", 0, 0),
        ("rpmsg_ns", 53, 53),
    ]
    assert seen.nodes == ("/dev/rpmsg0", "/dev/rpmsg_ctrl0")
    assert {each.processor for each in seen.channels} == {"remoteproc0"}
    await tree.write(f"{m4.path}/state", b"stop")
    gone = read_tree(tree)
    assert (gone.channels, gone.controls, gone.endpoints, gone.nodes) == ((), (), (), ())
    assert seen.problems == gone.problems == ()


async def test_attach_detach_and_stop(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4", attached=True)
    state = f"{m4.path}/state"
    with refused(errno.EINVAL):
        await tree.write(state, b"detach")
    await tree.write(state, b"start")
    assert m4.state == "attached"
    assert tree.read(f"{m4.path}/firmware") == b"unknown\n"
    await tree.write(state, b"detach")
    assert m4.state == "detached" and m4.remote is None
    await tree.write(state, b"start")
    await tree.write(state, b"stop")
    assert m4.state == "offline"


async def test_a_start_comes_back_when_the_core_runs(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4")
    slow = trio.Event()
    m4.hooks["start"] = slow.wait
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tree.write, f"{m4.path}/state", b"start")
        await wait_all_tasks_blocked()
        assert m4.state == "offline"
        slow.set()
    assert m4.state == "running"


async def test_a_cancelled_writer_waits_for_the_kernel(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4")
    slow = trio.Event()
    m4.hooks["start"] = slow.wait
    seen = []
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def start_it() -> None:
                try:
                    await tree.write(f"{m4.path}/state", b"start")
                finally:
                    seen.append(m4.state)

            nursery.start_soon(start_it)
            await wait_all_tasks_blocked()
            scope.cancel()
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
            slow.set()
    assert seen == ["running"]


async def test_firmware_is_searched_where_the_kernel_searches(tree: FakeTree) -> None:
    images = []

    async def service(remote: FakeRemote) -> None:
        images.append((remote.firmware, remote.image))

    m4 = tree.add_processor("m4", service=service)
    tree.put("/lib/firmware/a.elf", b"\x7fELF last")
    tree.put("/lib/firmware/updates/a.elf", b"\x7fELF updates")
    for place in ("", "/data/fw\n"):
        tree.put("/sys/module/firmware_class/parameters/path", place)
        tree.put("/data/fw/a.elf", b"\x7fELF first")
        await tree.write(f"{m4.path}/firmware", b"a.elf\n")
        await tree.write(f"{m4.path}/state", b"start")
        await wait_all_tasks_blocked()
        await tree.write(f"{m4.path}/state", b"stop")
    assert images == [("a.elf", b"\x7fELF updates"), ("a.elf", b"\x7fELF first")]


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("state", b"", errno.EINVAL),
        ("state", b" start", errno.EINVAL),
        ("state", b"start\n\n", errno.EINVAL),
        ("firmware", b"", errno.EINVAL),
        ("firmware", b"\n", errno.EINVAL),
        ("recovery", b"off", errno.EINVAL),
        ("recovery", b"\xff", errno.EINVAL),
        ("coredump", b"default", errno.EINVAL),
        ("name", b"m5", errno.EACCES),
        ("nothing", b"", errno.ENOENT),
    ],
)
async def test_words_that_no_file_takes(tree: FakeTree, name: str, text: bytes, code: int) -> None:
    m4 = tree.add_processor("m4")
    with refused(code):
        await tree.write(f"{m4.path}/{name}", text)
    assert m4.state == "offline"


async def test_what_a_start_can_fail_with(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4")
    state, firmware = f"{m4.path}/state", f"{m4.path}/firmware"
    await tree.write(firmware, b"none.elf")
    with refused(errno.ENOENT):
        await tree.write(state, b"start")
    tree.put("/lib/firmware/none.elf", b"no ELF")
    with refused(errno.EINVAL):
        await tree.write(state, b"start")

    async def broken() -> None:
        raise OSError(errno.EIO, "broken")

    m4.hooks["start"] = broken
    with refused(errno.EIO):
        await tree.write(state, b"start")
    del m4.hooks["start"]
    await tree.write(firmware, b"fake.elf")
    await tree.write(state, b"start")
    with refused(errno.EBUSY):
        await tree.write(firmware, b"other.elf")
    m4.hooks["stop"] = broken
    with refused(errno.EIO):
        await tree.write(state, b"stop")
    del m4.hooks["stop"]
    await tree.write(state, b"stop")
    assert m4.state == "offline"


# Crashes


async def test_a_crash_is_recovered(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4")
    await start(tree, m4)
    before = m4.remote
    m4.crash()
    m4.crash()
    assert tree.read(f"{m4.path}/state") == b"crashed\n"
    await wait_all_tasks_blocked()
    assert m4.state == "running" and m4.remote is not before
    assert len(read_tree(tree).channels) == 4


async def test_a_crash_without_recovery_waits_for_a_word(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4")
    await tree.write(f"{m4.path}/recovery", b"disabled")
    for word in (b"recover", b"enabled"):
        await tree.write(f"{m4.path}/state", b"start")
        await tree.write("/sys/kernel/debug/remoteproc/remoteproc0/crash", b"2\n")
        await wait_all_tasks_blocked()
        assert m4.state == "crashed"
        with refused(errno.EBUSY):
            await tree.write(f"{m4.path}/coredump", b"enabled")
        await tree.write(f"{m4.path}/state", b"start")
        assert m4.state == "crashed"
        await tree.write(f"{m4.path}/recovery", word)
        assert m4.state == "running"
        await tree.write(f"{m4.path}/state", b"stop")
        await tree.write(f"{m4.path}/state", b"stop")
    assert tree.read(f"{m4.path}/recovery") == b"enabled\n"


async def test_what_has_crashed_does_nothing_any_more(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4")
    await tree.write(f"{m4.path}/recovery", b"disabled")
    await start(tree, m4)
    node = tree.open_node("/dev/rpmsg0")
    m4.crash()
    node.write(b"x")
    await wait_all_tasks_blocked()
    assert (m4.state, events(node)) == ("crashed", 0)
    node.close()


async def test_a_recovery_that_fails_leaves_it_offline_and_counted(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4")
    await tree.write(f"{m4.path}/state", b"start")
    tree.hide("/lib/firmware/*")
    m4.crash()
    await wait_all_tasks_blocked()
    assert m4.state == "offline"
    tree.restore("/lib/firmware/*")
    await tree.write(f"{m4.path}/state", b"start")  # 0, and nothing happens: as Linux
    assert m4.state == "offline"


async def test_a_dump_stands_until_it_is_dismissed(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4")
    m4.dump = b"\x7fELF" + bytes(10_000)
    await tree.write(f"{m4.path}/coredump", b"enabled")
    await tree.write(f"{m4.path}/state", b"start")
    for _ in range(2):
        m4.crash()
        await wait_all_tasks_blocked()
    (dump,) = read_tree(tree).dumps
    assert dump.processor == "remoteproc0"
    assert tree.read(dump.data, 1 << 20) == m4.dump
    assert tree.read(dump.data, 2, offset=1) == b"EL"
    await tree.write(dump.data, b"1")
    assert read_tree(tree).dumps == ()


@pytest.mark.parametrize("how", ["read", "dismissed"])
async def test_an_inline_dump_holds_the_recovery(tree: FakeTree, how: str) -> None:
    m4 = tree.add_processor("m4")
    await tree.write(f"{m4.path}/coredump", b"inline")
    await tree.write(f"{m4.path}/state", b"start")
    m4.crash()
    await wait_all_tasks_blocked()
    (dump,) = read_tree(tree).dumps
    tree.read(dump.data, 4)
    await wait_all_tasks_blocked()
    assert m4.state == "offline"
    if how == "read":
        tree.read(dump.data)
    else:
        await tree.write(dump.data, b"1")
    await wait_all_tasks_blocked()
    assert m4.state == "running"


async def test_an_inline_dump_that_nobody_reads(
    tree: FakeTree, autojump_clock: trio.testing.MockClock
) -> None:
    m4 = tree.add_processor("m4")
    await tree.write(f"{m4.path}/coredump", b"inline")
    await tree.write(f"{m4.path}/state", b"start")
    m4.crash()
    await trio.sleep(299)
    assert m4.state == "offline"
    await trio.sleep(2)
    assert m4.state == "running"


# Endpoints


async def test_messages_are_whole_and_come_back(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4")
    await start(tree, m4)
    create(tree, "mine")
    node = tree.open_node("/dev/rpmsg1")
    with refused(errno.EAGAIN):
        node.read(512)
    for payload in (b"abc", b"", b"x" * 496):
        assert node.write(payload) == len(payload)
    assert [await read(node) for _ in range(3)] == [b"abc", b"", b"x" * 496]
    node.write(b"cut short")
    assert await read(node, 3) == b"cut"
    with refused(errno.EAGAIN):
        node.read(512)
    with refused(errno.EMSGSIZE):
        node.write(bytes(497))
    node.close()
    node.close()


async def test_an_endpoint_is_known_by_what_it_was_made_with(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4")
    await start(tree, m4)
    create(tree, "one")
    create(tree, "two", 77, ADDRESS_ANY)
    raw, one, two = read_tree(tree).endpoints
    assert (raw.name, raw.source, raw.destination, raw.control) == ("rpmsg-raw", 1024, 1025, None)
    assert (one.name, one.source, one.destination) == ("one", ADDRESS_ANY, 1024)
    assert (two.name, two.source, two.destination) == ("two", 77, ADDRESS_ANY)
    assert one.control == two.control == "rpmsg_ctrl0"
    assert {each.bus for each in (raw, one, two)} == {"virtio0"}
    node = tree.open_node(two.node)
    with refused(errno.EINVAL):
        node.write(b"to nobody")
    node.close()


async def test_an_endpoint_lives_while_its_node_is_open(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4", service=silent)
    remote = await start(tree, m4)
    create(tree, "mine", 77)
    remote.send(b"early", 77, source=1)
    node = tree.open_node("/dev/rpmsg1")
    with refused(errno.EBUSY):
        tree.open_node("/dev/rpmsg1")
    create(tree, "same", 77)
    with refused(errno.EINVAL):
        tree.open_node("/dev/rpmsg2")
    remote.send(b"heard", 77, source=1)
    assert await read(node) == b"heard"
    node.close()
    remote.send(b"late", 77, source=1)
    assert remote.dropped == 2
    node = tree.open_node("/dev/rpmsg2")
    node.close()
    create(tree, "another")
    assert len(read_tree(tree).endpoints) == 4


async def test_a_raw_channel_hears_before_it_is_opened(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4", service=silent)
    remote = await start(tree, m4)
    for _ in range(MAX_QUEUED + 1):
        remote.send(b"early", 1024, source=1)
    assert remote.dropped == 1
    node = tree.open_node("/dev/rpmsg0")
    for _ in range(MAX_QUEUED):
        assert node.read(512) == b"early"
    assert events(node) == 0
    with refused(errno.EINVAL):
        node.ioctl(DESTROY_ENDPOINT)
    remote.send(b"unread", 1024, source=1)
    node.close()
    node = tree.open_node("/dev/rpmsg0")
    assert events(node) == 0
    with refused(errno.EAGAIN):
        node.read(512)
    node.close()


@pytest.mark.parametrize("full", [errno.EAGAIN, errno.ENOMEM])
async def test_a_remote_that_takes_nothing(tree: FakeTree, full: int) -> None:
    m4 = tree.add_processor("m4", service=silent, buffers=4, full=full)
    remote = await start(tree, m4)
    node = tree.open_node("/dev/rpmsg0")
    for _ in range(4):
        node.write(b"x")
    with refused(full):
        node.write(b"x")
    assert events(node) == 0  # never writable
    assert (await remote.receive()).payload == b"x"
    node.write(b"x")
    node.close()


@pytest.mark.parametrize("how", ["stop", "crash", "destroy"])
async def test_who_waits_at_an_endpoint_is_woken_when_it_goes(tree: FakeTree, how: str) -> None:
    m4 = tree.add_processor("m4")
    await start(tree, m4)
    create(tree, "mine", 77)
    node = tree.open_node("/dev/rpmsg1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.lowlevel.wait_readable, node.fileno())
        await wait_all_tasks_blocked()
        if how == "stop":
            await tree.write(f"{m4.path}/state", b"stop")
        elif how == "crash":
            m4.crash()
        else:
            node.ioctl(DESTROY_ENDPOINT)
    for act in (lambda: node.read(1), lambda: node.write(b"x")):
        with refused(errno.EPIPE):
            act()
    node.close()
    with refused(errno.EBADF):
        node.read(1)


async def test_last_words_are_lost(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4")
    await start(tree, m4)
    node = tree.open_node("/dev/rpmsg0")
    node.write(b"last")
    await wait_all_tasks_blocked()
    assert events(node) == select.POLLIN
    await tree.write(f"{m4.path}/state", b"stop")
    with refused(errno.EPIPE):
        node.read(512)
    node.close()


async def test_numbers_are_free_when_the_last_file_is_closed(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4")
    await start(tree, m4)
    control, node = tree.open_node("/dev/rpmsg_ctrl0"), tree.open_node("/dev/rpmsg0")
    m4.crash()
    await wait_all_tasks_blocked()
    assert read_tree(tree).nodes == ("/dev/rpmsg1", "/dev/rpmsg_ctrl1")
    with refused(errno.ENODEV):
        control.ioctl(CREATE_ENDPOINT, info("mine"))
    control.close()
    node.close()
    m4.crash()
    await wait_all_tasks_blocked()
    assert read_tree(tree).nodes == ("/dev/rpmsg0", "/dev/rpmsg_ctrl0")


@pytest.mark.parametrize(
    ("request_", "argument", "code"),
    [
        (CREATE_ENDPOINT, b"short", errno.EFAULT),
        (CREATE_ENDPOINT, 0, errno.EFAULT),
        (0xB5FF, info("x"), errno.EINVAL),
        (CREATE_DEVICE, info("rpmsg_ctrl", 0, 0), errno.ENXIO),
        (RELEASE_DEVICE, info("x"), errno.EINVAL),
    ],
)
async def test_what_a_control_node_refuses(
    tree: FakeTree, request_: int, argument: bytes | int, code: int
) -> None:
    m4 = tree.add_processor("m4")
    await start(tree, m4)
    node = tree.open_node("/dev/rpmsg_ctrl0")
    with refused(code):
        node.ioctl(request_, argument)
    for act in (lambda: node.read(1), lambda: node.write(b"x")):
        with refused(errno.EINVAL):
            act()
    node.close()
    with refused(errno.EBADF):
        node.ioctl(CREATE_ENDPOINT, info("x"))


async def test_a_channel_of_our_own_is_announced(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4", service=silent)
    remote = await start(tree, m4)
    control = tree.open_node("/dev/rpmsg_ctrl0")
    for request in (CREATE_DEVICE, RELEASE_DEVICE):
        control.ioctl(request, info("rpmsg-raw", 99, 1025))
        message = await remote.receive()
        announcement = decode_announcement_untrusted(message.payload)
        assert announcement is not None and message.destination == 53
        assert announcement.channel.address == 99
        assert announcement.destroy == (request == RELEASE_DEVICE)
    control.close()


async def test_announcements_come_and_go(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4", service=silent)
    remote = await start(tree, m4)
    for _ in range(2):
        remote.announce("a/b", 5)
    assert ("a/b", ADDRESS_ANY, 5) in addresses(read_tree(tree))
    assert "virtio0.a!b.-1.5" in tree.names("/sys/bus/rpmsg/devices")
    for _ in range(2):
        remote.withdraw("a/b", 5)
    assert len(read_tree(tree).channels) == 3
    remote.withdraw("rpmsg-raw", 1024)
    remote.announce("rpmsg-raw", 6)
    assert ("rpmsg-raw", 1024, 6) in addresses(read_tree(tree))
    with pytest.raises(ValueError):
        remote.announce("x" * 32, 5)
    with pytest.raises(ValueError):
        remote.send(bytes(497), 1024, source=5)
    m4.remove()
    remote.announce("late", 6)
    remote.trace("late")
    late = read_tree(tree)
    assert (late.processors, late.channels, late.nodes) == ((), (), ())
    assert tree.names("/sys/kernel/debug/remoteproc") == []


async def test_a_terminal(tree: FakeTree) -> None:
    async def service(remote: FakeRemote) -> None:
        remote.announce("rpmsg-tty", 1024)
        remote.send(b"before anyone listens", 1024, source=1024)
        async for message in remote:
            remote.send(message.payload.upper(), message.source, source=1024)

    m4 = tree.add_processor("m4", service=service)
    await start(tree, m4)
    (entry,) = read_tree(tree).ttys
    assert (entry.node, entry.processor, entry.bus) == ("/dev/ttyRPMSG0", "remoteproc0", "virtio0")
    node = tree.open_node(entry.node)
    assert termios.tcgetattr(node.fileno())[3] & termios.ECHO
    tty.setraw(node.fileno())
    assert node.write(b"hello") == 5
    assert await read(node) == b"HELLO"
    await tree.write(f"{m4.path}/state", b"stop")
    await trio.lowlevel.wait_readable(node.fileno())
    assert node.read(1) == b""
    with refused(errno.EIO):
        node.write(b"x")
    node.close()


# What can be missing


@pytest.mark.parametrize(
    ("modules", "nodes", "channels"),
    [
        ((), (), 0),
        (("virtio_rpmsg_bus",), (), 4),
        (("virtio_rpmsg_bus", "rpmsg_ctrl"), ("/dev/rpmsg_ctrl0",), 4),
        (("virtio_rpmsg_bus", "rpmsg_char"), ("/dev/rpmsg0",), 4),
    ],
)
async def test_missing_modules(
    modules: tuple[str, ...], nodes: tuple[str, ...], channels: int
) -> None:
    async with open_fake_tree(modules=modules) as tree:
        m4 = tree.add_processor("m4")
        await start(tree, m4)
        await wait_all_tasks_blocked()
        seen = read_tree(tree)
        assert (seen.nodes, len(seen.channels)) == (nodes, channels)
        if "rpmsg_ctrl" in modules:
            node = tree.open_node("/dev/rpmsg_ctrl0")
            with refused(errno.EINVAL):
                node.ioctl(CREATE_ENDPOINT, info("x"))
            node.close()


async def test_a_node_that_never_appears(tree: FakeTree) -> None:
    tree.hide("/dev/rpmsg*")
    m4 = tree.add_processor("m4")
    await tree.write(f"{m4.path}/state", b"start")
    seen = read_tree(tree)
    assert seen.nodes == () and len(seen.controls) == 1
    with refused(errno.ENOENT):
        tree.open_node("/dev/rpmsg_ctrl0")
    assert not tree.allowed("/dev/rpmsg_ctrl0", os.F_OK)
    tree.restore("/dev/rpmsg*")
    tree.open_node("/dev/rpmsg_ctrl0").close()


async def test_missing_permissions(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4")
    await tree.write(f"{m4.path}/state", b"start")
    tree.deny("/dev/rpmsg_ctrl0")
    tree.deny("/sys/class/remoteproc/*/state", os.W_OK)
    with refused(errno.EACCES):
        tree.open_node("/dev/rpmsg_ctrl0")
    with refused(errno.EACCES):
        await tree.write(f"{m4.path}/state", b"stop")
    with refused(errno.EACCES):  # by its real path, too
        await tree.write(f"{tree.resolve(m4.path)}/state", b"stop")
    assert tree.read(f"{m4.path}/state") == b"running\n"
    assert tree.allowed(f"{m4.path}/state", os.R_OK)
    assert not tree.allowed(f"{m4.path}/state", os.W_OK)
    assert tree.stat("/dev/rpmsg_ctrl0").st_uid == os.getuid()


async def test_a_plain_file_is_no_node(tree: FakeTree) -> None:
    with refused(errno.ENXIO):
        tree.open_node("/proc/sys/kernel/osrelease")


# Removal


async def test_a_reload_renumbers(tree: FakeTree) -> None:
    old = tree.add_processor("m4")
    await tree.write(f"{old.path}/state", b"start")
    node = tree.open_node("/dev/rpmsg_ctrl0")
    new = old.renumber()
    (processor,) = read_tree(tree).processors
    assert (processor.kernel_name, processor.name, processor.state) == (
        "remoteproc1",
        "m4",
        "offline",
    )
    with refused(errno.ENOENT):
        await tree.write(f"{old.path}/state", b"stop")
    old.crash()
    await tree.write(f"{new.path}/state", b"start")
    assert read_tree(tree).controls[0].node == "/dev/rpmsg_ctrl1"
    node.close()


@pytest.mark.parametrize("hook", ["start", "stop", "recover"])
async def test_a_processor_that_leaves_in_the_middle(tree: FakeTree, hook: str) -> None:
    m4 = tree.add_processor("m4")
    state = f"{m4.path}/state"

    async def leave() -> None:
        m4.remove()

    if hook != "start":
        await tree.write(state, b"start")
    m4.hooks[hook] = leave
    if hook == "recover":
        m4.crash()
        await wait_all_tasks_blocked()
    else:
        with refused(errno.ENODEV):
            await tree.write(state, hook.encode())
    assert read_tree(tree).processors == ()
    assert not (tree.root / "sys/devices/platform/fake.m4/remoteproc/remoteproc0").exists()


async def test_writers_that_wait_while_a_processor_leaves(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4")
    slow = trio.Event()
    m4.hooks["start"] = slow.wait
    seen = []

    async def write(name: str, text: bytes) -> None:
        with pytest.raises(OSError) as caught:
            await tree.write(f"{m4.path}/{name}", text)
        seen.append(caught.value.errno)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, "state", b"start")
        await wait_all_tasks_blocked()
        nursery.start_soon(write, "state", b"stop")
        nursery.start_soon(write, "firmware", b"a.elf")
        await wait_all_tasks_blocked()
        m4.remove()
        slow.set()
    assert seen == [errno.ENODEV] * 3


@pytest.mark.parametrize("steps", range(5))
async def test_a_processor_leaves_at_any_step_of_a_write(tree: FakeTree, steps: int) -> None:
    m4 = tree.add_processor("m4")

    async def write() -> None:
        with suppress(OSError):
            await tree.write(f"{m4.path}/recovery", b"disabled")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        m4.remove()
    assert not (tree.root / "sys/devices/platform/fake.m4/remoteproc/remoteproc0").exists()


async def test_what_waits_when_all_is_closed() -> None:
    seen: list[int | None] = []

    async def try_to_start(tree: FakeTree, path: str) -> None:
        try:
            await tree.write(path, b"start")
        except OSError as error:
            seen.append(error.errno)

    async with trio.open_nursery() as nursery, open_fake_tree() as tree:
        one, two = tree.add_processor("one"), tree.add_processor("two")
        await tree.write(f"{one.path}/state", b"start")
        await wait_all_tasks_blocked()
        node = tree.open_node("/dev/rpmsg0")
        two.hooks["start"] = trio.sleep_forever
        nursery.start_soon(try_to_start, tree, f"{two.path}/state")
        nursery.start_soon(trio.lowlevel.wait_readable, node.fileno())
        await wait_all_tasks_blocked()
    assert seen == [errno.ENODEV]
    node.close()
    assert not tree.root.exists()


async def test_the_fault_of_a_service_comes_out() -> None:
    async def service(remote: FakeRemote) -> None:
        raise KeyError(remote.firmware)

    with pytest.raises(KeyError, match=r"fake\.elf"):
        async with open_fake_tree() as tree:
            m4 = tree.add_processor("m4", service=service)
            await tree.write(f"{m4.path}/state", b"start")
            await trio.sleep_forever()


async def test_crashes_of_the_remotes_own(tree: FakeTree) -> None:
    lives: list[Callable[[], None]] = []

    async def service(remote: FakeRemote) -> None:
        lives.append(remote.crash)
        if len(lives) == 1:
            remote.trace("dying\n")
            remote.crash()

    m4 = tree.add_processor("m4", service=service)
    await start(tree, m4)
    assert (len(lives), m4.state) == (2, "running")
    trace = read_tree(tree).processors[0].traces
    assert trace == ("/sys/kernel/debug/remoteproc/remoteproc0/trace0",)
    assert tree.read(trace[0]) == b""
