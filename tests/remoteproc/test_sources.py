"""Where an image comes from: every kind of place, and what is wrong with some."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from openamp_py import ImageError
from openamp_py.remoteproc import sources
from openamp_py.remoteproc.sources import SEARCH_VARIABLE, find_firmware, read_image

DATA = bytes(range(256)) * 8192  # two megabytes: more than one piece


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.elf"
    path.write_bytes(DATA)
    return path


async def _pieces(*pieces: Any) -> AsyncGenerator[Any, None]:
    for piece in pieces:
        await trio.lowlevel.checkpoint()
        yield piece


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, io.BytesIO, _pieces])
async def test_what_is_in_memory(kind: Any) -> None:
    assert await read_image(kind(DATA)) == DATA


async def test_a_file(file: Path) -> None:
    assert await read_image(file) == DATA
    assert await read_image(str(file)) == DATA
    with file.open("rb") as opened:
        assert await read_image(opened) == DATA
    async with await trio.open_file(file, "rb") as opened_async:
        assert await read_image(opened_async) == DATA


async def test_a_stream() -> None:
    one, other = trio.testing.memory_stream_one_way_pair()
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            async with one:
                await one.send_all(DATA)

        nursery.start_soon(send)
        assert await read_image(cast(AsyncIterator[bytes], other)) == DATA


async def test_a_buffer_that_its_giver_uses_again() -> None:
    async def give() -> AsyncIterator[bytearray]:
        buffer = bytearray(4)
        for number in range(4):
            buffer[:] = bytes([number]) * 4
            yield buffer

    assert await read_image(give()) == bytes(n for n in range(4) for _ in range(4))  # type: ignore[arg-type]


async def test_a_pipe_that_waits_for_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with trio.move_on_after(0.02) as scope:
        await read_image(path)
    assert scope.cancelled_caught
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                async with trio.lowlevel.FdStream(os.open(path, os.O_RDWR | os.O_NONBLOCK)) as pipe:
                    await pipe.send_all(DATA)

            async def read() -> None:
                assert await read_image(path) == DATA

            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(write)


async def test_a_read_that_blocks_can_be_cancelled_and_blocks_nobody() -> None:
    ours, theirs = os.pipe()
    try:
        with open(ours, "rb", buffering=0, closefd=False) as file, trio.fail_after(5):
            with trio.move_on_after(0.02) as scope:
                await read_image(file)
            assert scope.cancelled_caught
            os.write(theirs, b"for the thread that was left")
    finally:
        os.close(theirs)
        os.close(ours)


def test_names_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    later = tmp_path / "later"
    later.mkdir()
    (later / "some.elf").write_bytes(b"later")
    (later / "other.elf").write_bytes(b"other")
    monkeypatch.chdir("/")
    monkeypatch.setenv(SEARCH_VARIABLE, f"/does-not-exist:{tmp_path}::{later}")
    assert find_firmware("some.elf") == file
    assert find_firmware("other.elf") == later / "other.elf"
    assert find_firmware("later/other.elf") == later / "other.elf"
    with pytest.raises(FileNotFoundError) as caught:
        find_firmware("nowhere.elf")
    with pytest.raises(FileNotFoundError, match="No such file or directory: '/nowhere'"):
        find_firmware("/nowhere")
    assert str(caught.value) == (
        "firmware 'nowhere.elf' is neither a file here nor in /does-not-exist, "
        f"{tmp_path}, {later}, /lib/firmware (OPENAMP_FIRMWARE_PATH names further directories)"
    )
    monkeypatch.chdir(later)
    assert find_firmware("some.elf").read_bytes() == b"later", "what is here comes first"


@pytest.mark.parametrize("text", ["", "text"])
async def test_a_file_in_text_mode(tmp_path: Path, text: str) -> None:
    path = tmp_path / "text"
    path.write_text(text)
    with path.open() as opened, pytest.raises(TypeError, match="open it in binary mode"):
        await read_image(opened)  # type: ignore[arg-type]


async def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        await read_image(tmp_path)


@pytest.mark.parametrize("wrong", [None, 7, object(), ["a"]])
async def test_what_is_no_image(wrong: Any) -> None:
    with pytest.raises(TypeError, match="an image is a path, bytes, a file or a stream"):
        await read_image(wrong)


@pytest.mark.parametrize("wrong", ["text", 5, None])
async def test_a_stream_of_something_else(wrong: Any) -> None:
    async with aclosing(_pieces(b"x", wrong)) as stream:
        with pytest.raises(TypeError, match="not bytes"):
            await read_image(stream)


async def test_too_large(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr(sources, "IMAGE_LIMIT", len(DATA) - 1)
    for source in (file, io.BytesIO(DATA)):
        with pytest.raises(ImageError, match="the limit is"):
            await read_image(source)
    async with aclosing(_pieces(DATA)) as stream:
        with pytest.raises(ImageError, match="the limit is"):
            await read_image(stream)


@pytest.mark.skipif(sys.platform != "linux", reason="a device without an end")
async def test_a_device_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "IMAGE_LIMIT", 4 << 20)
    with pytest.raises(ImageError, match="the limit is"):
        await read_image("/dev/zero")
