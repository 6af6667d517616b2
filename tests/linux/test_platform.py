"""Processors of the kernel: found by name, booted, joined, stopped, recovered, and set back."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from openamp_py import (
    AccessDeniedError,
    CoreCrashedError,
    CoredumpMode,
    CrashPolicy,
    DumpSegment,
    ImageError,
    PlatformError,
    ProcessorState,
    StateError,
    encode_coredump,
    open_processor,
    open_trace,
    read_trace,
    shipped_echo,
)
from openamp_py.choosing import check_name, create_platform, is_core, shipped_image
from openamp_py.linux.fake import FakeProcessor, FakeTree, open_fake_tree
from openamp_py.linux.platform import AS_SET, LinuxPlatform
from openamp_py.linux.tree import FIRMWARE_PATH, read_tree
from openamp_py.remoteproc.coredump import Coredump
from openamp_py.remoteproc.images import with_table
from openamp_py.remoteproc.resource_table import ResourceTable

QUICK = 0.02


@pytest.fixture
async def tree() -> AsyncIterator[FakeTree]:
    async with open_fake_tree() as tree:
        yield tree


@pytest.fixture
def m4(tree: FakeTree) -> FakeProcessor:
    tree.add_processor("dsp")
    return tree.add_processor("m4")


def platform_of(tree: FakeTree, name: str = "m4", **options: object) -> LinuxPlatform:
    return LinuxPlatform(name, access=tree, look=QUICK, **options)  # type: ignore[arg-type]


def word(tree: FakeTree, m4: FakeProcessor, file: str) -> str:
    return tree.read(f"{m4.path}/{file}").decode().strip()


async def test_a_processor_is_found_by_its_name_whatever_its_number(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    platform = platform_of(tree)
    assert platform.find().kernel_name == "remoteproc1"
    assert platform.state() == "offline"
    m4.renumber()
    assert platform.find().kernel_name == "remoteproc2"


async def test_boot_and_shutdown_start_and_stop_the_core(tree: FakeTree, m4: FakeProcessor) -> None:
    async with open_processor(platform_of(tree)) as processor:
        await processor.boot(AS_SET)
        assert (processor.state, m4.state) == (ProcessorState.RUNNING, "running")
        await processor.shutdown()
        assert (processor.state, m4.state) == (ProcessorState.OFFLINE, "offline")
        await processor.boot()
        assert m4.state == "running"
    assert m4.state == "offline"


async def test_an_image_is_put_where_the_kernel_looks_and_all_is_set_back(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    directory = Path(tree.root) / "lib/firmware"
    before = sorted(directory.iterdir())
    platform = platform_of(tree, directory=directory, recovery=False)
    async with open_processor(platform) as processor:
        await processor.boot(shipped_echo())
        assert m4.remote is not None
        assert m4.remote.image == shipped_echo().read_bytes()
        assert word(tree, m4, "firmware").startswith("openamp_py-")
        assert word(tree, m4, "recovery") == "disabled"
    assert word(tree, m4, "firmware") == "fake.elf"
    assert word(tree, m4, "recovery") == "enabled"
    assert sorted(directory.iterdir()) == before


async def test_an_image_is_put_into_the_machine_that_the_processor_is_of(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    """A fake's firmware has nothing to seek in /lib/firmware of the machine that plays it."""
    image = shipped_echo().read_bytes()
    async with open_processor(platform_of(tree)) as processor:
        await processor.boot(image)
        assert m4.remote is not None
        assert m4.remote.image == image
        assert (tree.root / "lib/firmware" / m4.remote.firmware).read_bytes() == image
    assert sorted(os.listdir(tree.root / "lib/firmware")) == ["fake.elf"]


async def test_firmware_that_the_kernel_has_is_named(tree: FakeTree, m4: FakeProcessor) -> None:
    tree.put("/lib/firmware/other.elf", b"\x7fELF other")
    platform = platform_of(tree, firmware="other.elf", restore=False)
    async with open_processor(platform) as processor:
        await processor.boot(AS_SET)
        assert m4.remote is not None
        assert m4.remote.image == b"\x7fELF other"
    assert word(tree, m4, "firmware") == "other.elf"


async def test_a_core_that_ran_before_is_joined_and_left_running(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    await tree.write(f"{m4.path}/state", b"start")
    async with open_processor(platform_of(tree)) as processor:
        await processor.boot(AS_SET)
        assert processor.state is ProcessorState.RUNNING
    assert m4.state == "running"
    async with open_processor(platform_of(tree)) as processor:
        await processor.boot(AS_SET)
        await processor.shutdown()
        assert m4.state == "offline"


async def test_a_core_of_the_boot_loader_is_attached_to_detached_and_attached_to_again(
    tree: FakeTree,
) -> None:
    early = tree.add_processor("early", attached=True)
    async with open_processor(platform_of(tree, "early")) as processor:
        await processor.attach()
        assert (processor.state, early.state) == (ProcessorState.ATTACHED, "attached")
        await processor.detach()
        assert (processor.state, early.state) == (ProcessorState.DETACHED, "detached")
        await processor.attach()
        assert early.state == "attached"
        await processor.stop()
        assert early.state == "offline"


async def test_a_crash_is_seen_and_the_kernel_recovers_by_hand_or_by_policy(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    async with open_processor(platform_of(tree, recovery=False)) as processor:
        await processor.boot(AS_SET)
        m4.crash()
        await processor.wait_state(ProcessorState.CRASHED)
        assert isinstance(processor.failure, CoreCrashedError)
        assert m4.state == "crashed"
        await processor.recover()
        assert (processor.state, m4.state) == (ProcessorState.RUNNING, "running")
        processor.policy = CrashPolicy(recovery=True)
        m4.crash()
        await processor.wait_state(ProcessorState.CRASHED)
        await processor.wait_up()
        assert m4.state == "running"
        assert processor.crashes == 2
    assert m4.state == "offline"


async def test_a_core_that_crashed_and_was_given_up_is_off_in_the_end(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    """The kernel has it running again by then."""
    recovered = trio.Event()

    async def recover() -> None:
        await trio.sleep(5 * QUICK)
        recovered.set()

    m4.hooks["recover"] = recover
    async with open_processor(platform_of(tree)) as processor:
        await processor.boot(AS_SET)
        m4.crash()
        await processor.wait_state(ProcessorState.CRASHED)
        await recovered.wait()
        while m4.state != "running":
            await trio.sleep(QUICK)
    assert m4.state == "offline"


async def test_a_core_that_the_kernel_recovers_at_the_end_is_off_in_the_end(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    """Meanwhile its file says offline, which is not the last word."""
    begun, go_on = trio.Event(), trio.Event()

    async def recover() -> None:
        begun.set()
        await go_on.wait()

    m4.hooks["recover"] = recover
    async with (
        trio.open_nursery() as nursery,
        open_processor(platform_of(tree, recovery=False)) as processor,
    ):
        await processor.boot(AS_SET)
        m4.crash()
        await processor.wait_state(ProcessorState.CRASHED)
        nursery.start_soon(tree.write, f"{m4.path}/recovery", b"recover")
        await begun.wait()
        assert m4.state == "offline"

        async def end_it() -> None:
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()

        nursery.start_soon(end_it)
    assert m4.state == "offline"


async def test_somebody_else_stops_the_core(tree: FakeTree, m4: FakeProcessor) -> None:
    async with open_processor(platform_of(tree)) as processor:
        await processor.boot(AS_SET)
        await tree.write(f"{m4.path}/state", b"stop")
        await processor.wait_exit()
        assert processor.state is ProcessorState.STOPPED
        assert "somebody else" in str(processor.failure)


async def test_a_core_that_others_have_started_too_is_stopped_all_the_same(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    async with open_processor(platform_of(tree)) as processor:
        await processor.boot(AS_SET)
        await tree.write(f"{m4.path}/state", b"start")
        await processor.shutdown()
        assert m4.state == "offline"


@pytest.mark.parametrize("mode", [CoredumpMode.ENABLED, CoredumpMode.INLINE])
@pytest.mark.parametrize("by_kernel", [True, False])
async def test_the_kernels_coredump_is_taken_as_the_policy_says(
    tree: FakeTree, m4: FakeProcessor, tmp_path: Path, mode: CoredumpMode, by_kernel: bool
) -> None:
    kept = Coredump(40, 32, 0x1000_0000, (DumpSegment(0x1000_0000, b"memory" * 100),))
    m4.dump = b"".join(encode_coredump(kept))
    policy = CrashPolicy(recovery=True, coredump=mode, coredump_to=tmp_path)
    platform = platform_of(tree, recovery=by_kernel)
    async with open_processor(platform, policy=policy, name="m4") as processor:
        await processor.boot(AS_SET)
        assert word(tree, m4, "coredump") == mode.value
        m4.crash()
        await processor.wait_state(ProcessorState.CRASHED)
        await processor.wait_up()
        await processor.wait_settled()
        assert processor.last_coredump is not None
        assert processor.last_coredump.read_bytes() == m4.dump
        assert platform.waiting_dump() is None
    assert word(tree, m4, "coredump") == "disabled"


async def test_a_coredump_that_waits_is_fetched_into_a_file(
    tree: FakeTree, m4: FakeProcessor, tmp_path: Path
) -> None:
    platform = platform_of(tree)
    with pytest.raises(PlatformError, match="disabled"):
        await platform.fetch_coredump(tmp_path / "core")
    await platform.tell("coredump", "enabled")
    await platform.tell("state", "start")
    m4.crash()
    while m4.state != "running":
        await trio.sleep(QUICK)
    assert await platform.fetch_coredump(tmp_path / "core") == len(m4.dump)
    assert (tmp_path / "core").read_bytes() == m4.dump
    with pytest.raises(PlatformError, match="no coredump"):
        await platform.fetch_coredump(tmp_path / "core")


async def test_an_older_coredump_is_in_the_way(tree: FakeTree, m4: FakeProcessor) -> None:
    platform = platform_of(tree)
    await platform.tell("coredump", "enabled")
    await platform.tell("state", "start")
    m4.crash()
    while m4.state != "running":
        await trio.sleep(QUICK)
    async with open_processor(platform) as processor:
        await processor.boot(AS_SET)
        m4.crash()
        await processor.wait_state(ProcessorState.CRASHED)
        with pytest.raises(PlatformError, match=r"devcd0.* in the way"):
            await processor.coredump()


async def test_the_trace_is_read_and_followed(tree: FakeTree, m4: FakeProcessor) -> None:
    async with open_processor(platform_of(tree)) as processor:
        await processor.boot(AS_SET)
        await trio.testing.wait_all_tasks_blocked()
        assert read_trace(processor) == "booted: echo of fake.elf\n"
        async with open_trace(processor, interval=QUICK) as follower:
            assert await anext(follower) == "booted: echo of fake.elf\n"
            assert m4.remote is not None
            m4.remote.trace("more\n")
            assert await anext(follower) == "more\n"
        with pytest.raises(KeyError, match="trace0"):
            read_trace(processor, "trace7")


# Limits and refusals


async def test_an_unknown_name_says_which_there_are(tree: FakeTree, m4: FakeProcessor) -> None:
    with pytest.raises(PlatformError, match="there are: dsp, m4"):
        platform_of(tree, "m7").find()
    async with open_fake_tree() as empty:
        with pytest.raises(PlatformError, match=r"there is none .*openamp doctor"):
            platform_of(empty).find()


async def test_two_of_one_name_are_told_apart_by_the_kernels_names(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    tree.add_processor("m4")
    with pytest.raises(PlatformError, match="remoteproc1, remoteproc2"):
        platform_of(tree).find()
    assert platform_of(tree, "remoteproc2").find().kernel_name == "remoteproc2"


async def test_a_core_that_runs_is_replaced_only_where_that_was_said(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    await tree.write(f"{m4.path}/state", b"start")
    directory = Path(tree.root) / "lib/firmware"
    async with open_processor(platform_of(tree, directory=directory)) as processor:
        with pytest.raises(PlatformError, match=r"replace=1"):
            await processor.boot(shipped_echo())
    assert m4.state == "running"
    platform = platform_of(tree, directory=directory, replace=True)
    async with open_processor(platform) as processor:
        await processor.boot(shipped_echo())
        assert m4.remote is not None
        assert m4.remote.image == shipped_echo().read_bytes()
    assert m4.state == "offline"


async def test_what_linux_cannot_do_is_the_documented_error(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    async with open_processor(platform_of(tree)) as processor:
        await processor.boot(AS_SET)
        with pytest.raises(PlatformError, match="suspended"):
            await processor.suspend()
        with pytest.raises(ValueError, match="not in memory"):
            processor.map(da=0, size=4)
        with pytest.raises(StateError, match="no RPMsg device"):
            processor.rpmsg_device()
        await processor.shutdown()
        with pytest.raises(PlatformError, match="cannot be attached to: it is offline"):
            await processor.attach()


async def test_only_files_are_loaded(tree: FakeTree, m4: FakeProcessor) -> None:
    platform = platform_of(tree)
    with pytest.raises(ImageError):
        platform.decode(b"no image")
    with pytest.raises(ImageError, match="whole files"):
        platform.check(with_table(AS_SET, ResourceTable(), 0))


FAULTS = [
    ("state", "start", errno.ENOENT, ImageError, "finds no firmware"),
    ("state", "start", errno.EINVAL, ImageError, "dmesg"),
    ("state", "start", errno.ENOMEM, PlatformError, "carveout"),
    ("state", "start", errno.ENODEV, PlatformError, "driver"),
    ("state", "start", errno.ETIMEDOUT, PlatformError, "in time"),
    ("state", "start", errno.EIO, PlatformError, "Input/output error"),
    ("state", "stop", errno.EINVAL, StateError, "neither running"),
    ("state", "detach", errno.EINVAL, PlatformError, "only a core that is attached"),
    ("firmware", "x", errno.EBUSY, StateError, "offline"),
    ("firmware", "", errno.EINVAL, PlatformError, "empty"),
    ("recovery", "x", errno.EINVAL, PlatformError, "recovery mode"),
    ("coredump", "x", errno.EINVAL, PlatformError, "coredump mode"),
    ("coredump", "inline", errno.EBUSY, StateError, "crashed"),
    ("state", "start", errno.EACCES, AccessDeniedError, "run as root"),
    ("firmware", "x", errno.EPERM, PermissionError, "run as root"),
    ("recovery", "x", errno.EROFS, AccessDeniedError, "cannot be written"),
]


@pytest.mark.parametrize(("file", "said", "code", "kind", "text"), FAULTS)
async def test_each_errno_of_a_file_is_a_typed_error(
    tree: FakeTree,
    m4: FakeProcessor,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    said: str,
    code: int,
    kind: type[Exception],
    text: str,
) -> None:
    async def refuse(path: str, data: bytes) -> None:
        raise OSError(code, "refused", path)

    monkeypatch.setattr(tree, "write", refuse)
    with pytest.raises(kind, match=text) as caught:
        await platform_of(tree).tell(file, said)
    assert isinstance(caught.value, PlatformError | StateError | ImageError)
    assert f"remoteproc1/{file}" in str(caught.value)
    assert errno.errorcode[code] in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


async def test_a_start_that_the_driver_refuses_leaves_the_processor_off(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    async def refuse() -> None:
        raise OSError(errno.ETIMEDOUT, "no answer")

    m4.hooks["start"] = refuse
    async with open_processor(platform_of(tree)) as processor:
        with pytest.raises(PlatformError, match="did not come up in time"):
            await processor.boot(AS_SET)
        assert processor.state is ProcessorState.OFFLINE
        del m4.hooks["start"]
        await processor.boot(AS_SET)
        assert m4.state == "running"


async def test_missing_firmware_names_the_file(tree: FakeTree, m4: FakeProcessor) -> None:
    async with open_processor(platform_of(tree, firmware="gone.elf")) as processor:
        with pytest.raises(ImageError, match="finds no firmware"):
            await processor.boot(AS_SET)


async def test_a_recovery_that_fails_is_an_error(tree: FakeTree, m4: FakeProcessor) -> None:
    async def refuse() -> None:
        raise OSError(errno.EIO, "dead")

    m4.hooks["recover"] = refuse
    async with open_processor(platform_of(tree, recovery=False)) as processor:
        await processor.boot(AS_SET)
        m4.crash()
        await processor.wait_state(ProcessorState.CRASHED)
        with pytest.raises(PlatformError):
            await processor.recover()
        assert processor.state is ProcessorState.CRASHED


async def test_the_driver_goes_while_the_core_runs(tree: FakeTree, m4: FakeProcessor) -> None:
    async with open_processor(platform_of(tree)) as processor:
        await processor.boot(AS_SET)
        m4.remove()
        with pytest.raises(PlatformError, match="is gone"):
            await processor.wait_exit()


async def test_a_processor_that_was_renumbered_is_found_again(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    async with open_processor(platform_of(tree)) as processor:
        await processor.boot(AS_SET)
        again = m4.renumber()
        with pytest.raises(PlatformError, match="is gone"):
            await processor.wait_exit()
        await processor.shutdown()
        await processor.boot(AS_SET)
        assert again.state == "running"


# Names


def test_the_url_says_it_all() -> None:
    assert is_core("linux:m4")
    check_name("linux:m4?firmware=a.elf&replace=1&restore=0")
    platform = create_platform("linux:m4")
    assert (platform.name, shipped_image(platform)) == ("linux:m4", AS_SET)
    assert isinstance(platform, LinuxPlatform)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("linux:", "which processor"),
        ("linux:m4?firmware=", "firmware is empty"),
        ("linux:m4?replace=2", "0 and 1"),
        ("linux:m4?what=1", "unknown what"),
    ],
)
def test_a_url_that_is_none(url: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_name(url)


def test_no_debugger_waits_for_a_board() -> None:
    with pytest.raises(ValueError, match="debugger"):
        check_name("linux:m4", gdb="tcp::1234")


async def test_where_the_kernels_directory_cannot_be_written_it_looks_in_ours(
    tree: FakeTree, m4: FakeProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openamp_py.linux.platform.DEFAULT_DIRECTORY", "/proc/no/such/place")
    monkeypatch.setattr("openamp_py.linux.platform.tempfile.gettempdir", lambda: str(tmp_path))
    told: list[tuple[str, bytes]] = []
    write = tree.write

    async def record(path: str, data: bytes) -> None:
        told.append((path, data))
        if path == FIRMWARE_PATH:
            tree.put(path, data)
        elif data == b"start":
            m4.hooks.clear()
            raise OSError(errno.ENOENT, "the fake has no such directory")
        else:
            await write(path, data)

    monkeypatch.setattr(tree, "write", record)
    async with open_processor(platform_of(tree)) as processor:
        with pytest.raises(ImageError, match="finds no firmware"):
            await processor.boot(shipped_echo())
    ours = [data for path, data in told if path == FIRMWARE_PATH]
    assert ours[0].startswith(str(tmp_path).encode())
    assert ours[1] == b"\0"  # as it was
    assert not list(tmp_path.rglob("*.elf"))


@pytest.mark.parametrize("trap", ["link", "file", "open to all"])
async def test_a_directory_for_firmware_that_others_could_change_is_not_used(
    tree: FakeTree, m4: FakeProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    monkeypatch.setattr("openamp_py.linux.platform.DEFAULT_DIRECTORY", "/proc/no/such/place")
    monkeypatch.setattr("openamp_py.linux.platform.tempfile.gettempdir", lambda: str(tmp_path))
    victim = tmp_path / "victim"
    victim.mkdir()
    place = tmp_path / f"openamp_py-firmware-{os.getuid()}"
    if trap == "link":
        place.symlink_to(victim)
    elif trap == "file":
        place.touch()
    else:
        place.mkdir()
        place.chmod(0o777)
    async with open_processor(platform_of(tree)) as processor:
        with pytest.raises(AccessDeniedError, match="/proc/no/such/place"):
            await processor.boot(shipped_echo())
    assert not list(tmp_path.rglob("*.elf"))


async def test_a_coredump_that_is_too_large_is_not_cut_and_dismissed(
    tree: FakeTree, m4: FakeProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openamp_py.linux.platform._DUMP_LIMIT", 16)
    await tree.write(f"{m4.path}/coredump", b"enabled")
    await tree.write(f"{m4.path}/state", b"start")
    m4.crash()
    with trio.fail_after(5):
        while m4.state != "running":
            await trio.lowlevel.checkpoint()
    with pytest.raises(PlatformError, match="more than 16 bytes"):
        await platform_of(tree).fetch_coredump(tmp_path / "dump")
    assert not (tmp_path / "dump").exists()
    assert read_tree(tree).dumps


async def test_a_boot_that_is_cancelled_does_not_stop_somebody_elses_core(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    await tree.write(f"{m4.path}/state", b"start")
    async with open_processor(platform_of(tree)) as processor:
        with trio.CancelScope() as scope:
            scope.cancel()
            await processor.boot(AS_SET)
    assert m4.state == "running"


async def test_an_attach_that_is_cancelled_leaves_the_core_running(tree: FakeTree) -> None:
    early = tree.add_processor("early", attached=True)
    async with open_processor(platform_of(tree, "early")) as processor:
        with trio.CancelScope() as scope:

            async def cancel() -> None:
                scope.cancel()

            early.hooks["attach"] = cancel
            await processor.attach()
        assert early.state in ("attached", "detached")
