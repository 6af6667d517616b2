"""Coredumps that are taken, copied and saved: what is in them, and what may go wrong."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from openamp_py import (
    CoreCrashedError,
    Firmware,
    Link,
    LoopbackPlatform,
    open_processor,
)
from openamp_py.memory import Region
from openamp_py.platforms.demo import python_firmware
from openamp_py.remoteproc import Segment
from openamp_py.remoteproc.coredump import (
    PIECE_SIZE,
    Coredump,
    DumpSegment,
    coredump_size,
    encode_coredump,
)
from openamp_py.remoteproc.crash import CoredumpMode, CrashPolicy
from openamp_py.remoteproc.dumping import copy_dump, save_dump

DUMP = Coredump(0, 32, 0, (DumpSegment(0, b"memory"),))
FILE = b"".join(encode_coredump(DUMP))


async def _crash(link: Link) -> None:
    raise ValueError("the application's")


# Taking and copying


async def test_memory_that_was_added_is_dumped_as_the_rest_is() -> None:
    added = bytearray(b"..loaded")
    data = b"loaded"
    plain = python_firmware()
    image = Firmware(
        segments=(*plain.segments, Segment(0x9000_0002, data, len(data), 6)),
        table=plain.table,
        table_da=plain.table_da,
    )
    async with open_processor(LoopbackPlatform(_crash)) as processor:
        processor.add_memory(Region("added", 0x9000_0000, 0x9000_0000, memoryview(added)))
        await processor.boot(image)
        with pytest.raises(CoreCrashedError):
            await processor.wait_exit()
        processor.add_to_coredump(0x9000_0000, 2)
        dump = await processor.coredump()
        found = {part.da: (bytes(part.data), part.unreadable) for part in dump.segments}
        assert found[0x9000_0002] == (b"loaded", 0)
        assert found[0x9000_0000] == (b"..", 0)


@pytest.mark.parametrize("size", [0, 1, PIECE_SIZE, PIECE_SIZE + 4])
async def test_a_copy_is_the_same_and_stays_so(size: int) -> None:
    memory = bytearray(b"x" * size)
    view = memoryview(memory)
    if size % 4 == 0 and size:
        view = view.cast("I")
    dump = Coredump(0, 32, 0, (DumpSegment(0, view, unreadable=1), DumpSegment(8, b"bytes")))
    copy = await copy_dump(dump)
    memory[:] = b"y" * size
    assert coredump_size(copy) == coredump_size(dump)
    assert bytes(copy.segments[0].data) == b"x" * size
    assert (copy.segments[0].unreadable, bytes(copy.segments[1].data)) == (1, b"bytes")


# Saving


async def test_a_dump_goes_into_a_directory_or_a_file_or_a_function(tmp_path: Path) -> None:
    given: list[Coredump] = []

    async def take(dump: Coredump) -> None:
        given.append(dump)

    for name in ("core-1.core", "core-1.2.core", "core-1.3.core"):
        assert await save_dump(DUMP, str(tmp_path), "core-1.core") == tmp_path / name
    for _ in range(2):
        assert await save_dump(DUMP, tmp_path / "mine", "core-1.core") == tmp_path / "mine"
    assert await save_dump(DUMP, take, "core-1.core") is None
    assert given == [DUMP]
    assert sorted(os.listdir(tmp_path)) == [
        "core-1.2.core",
        "core-1.3.core",
        "core-1.core",
        "mine",
    ]
    made = await save_dump(DUMP, f"{tmp_path}/deep/dumps/", "core-1.core")
    assert made == tmp_path / "deep" / "dumps" / "core-1.core"
    for name in ("core-1.core", "core-1.2.core", "mine", "deep/dumps/core-1.core"):
        assert (tmp_path / name).read_bytes() == FILE
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600, "memory may hold secrets"


async def test_nothing_is_written_through_a_link_that_somebody_laid(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in (".a.core.part", "a.core"):
        (tmp_path / name).symlink_to(precious)
    assert await save_dump(DUMP, tmp_path, "a.core") == tmp_path / "a.2.core"
    await save_dump(DUMP, tmp_path / "a.core", "")
    assert precious.read_text() == "mine"
    assert not (tmp_path / "a.core").is_symlink()


async def test_two_dumps_of_one_name_do_not_mix(tmp_path: Path) -> None:
    other = Coredump(0, 32, 0, (DumpSegment(0, b"z" * (3 * PIECE_SIZE)),))
    async with trio.open_nursery() as nursery:
        for dump in (DUMP, other) * 4:
            nursery.start_soon(save_dump, dump, tmp_path / "a.core", "")
    (name,) = os.listdir(tmp_path)
    assert (tmp_path / name).read_bytes() in (FILE, b"".join(encode_coredump(other)))


# Refusals


async def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="not a regular file"):
        await save_dump(DUMP, pipe, "")
    assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


async def test_a_directory_that_vanished_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await save_dump(DUMP, tmp_path / "gone" / "core", "")


async def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    large = Coredump(0, 32, 0, (DumpSegment(0, bytes(4 * PIECE_SIZE)),))
    before = tmp_path / "core"
    before.write_text("the one before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PIECE_SIZE, hard))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            await save_dump(large, before, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert os.listdir(tmp_path) == ["core"] and before.read_text() == "the one before"


class _Vast(LoopbackPlatform):
    """A platform whose dump no core file of its class can hold."""

    async def dump_segments(self) -> Sequence[DumpSegment]:
        return [DumpSegment(1 << 33, b"far away")]


async def test_a_dump_that_does_not_fit_is_not_written_and_breaks_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = CrashPolicy(coredump=CoredumpMode.INLINE, coredump_to=tmp_path)
    async with open_processor(_Vast(_crash), policy=policy) as processor:
        await processor.boot(python_firmware())
        with pytest.raises(CoreCrashedError):
            await processor.wait_exit()
        await processor.wait_settled()
        assert processor.last_coredump is None
    assert "the coredump is not written" in caplog.text and "0x200000000" in caplog.text
    caplog.clear()  # the records hold the error, and that holds the memory
    assert os.listdir(tmp_path) == []


# Cancellation


async def test_a_cancelled_save_leaves_nothing(tmp_path: Path) -> None:
    large = Coredump(0, 32, 0, (DumpSegment(0, bytes(4 * PIECE_SIZE)),))
    with trio.CancelScope() as scope:
        scope.cancel()
        await save_dump(large, tmp_path, "core")
    assert scope.cancelled_caught and os.listdir(tmp_path) == []
