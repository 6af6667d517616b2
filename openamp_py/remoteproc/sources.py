"""Where firmware comes from: a name, a file, bytes, or a stream of them."""

from __future__ import annotations

import errno
import inspect
import os
import stat
from collections.abc import AsyncIterable, Awaitable, Callable
from pathlib import Path
from typing import Final, Protocol, TypeAlias, cast, runtime_checkable

import trio

from openamp_py.errors import ImageError
from openamp_py.remoteproc.elf import Firmware

SEARCH_VARIABLE: Final = "OPENAMP_FIRMWARE_PATH"
"""Environment variable: directories in which firmware is looked up by name, ":" between them."""

SEARCH_DEFAULT: Final = ("/lib/firmware",)
"""Where firmware is looked up after those."""

IMAGE_LIMIT: Final = 1 << 30
"""Bytes of the largest image that is read."""

_PIECE = 1 << 20


@runtime_checkable
class BinaryFile(Protocol):
    """A file, or what is like one: also trio's, whose `read` is async."""

    def read(self, size: int, /) -> bytes | Awaitable[bytes]:
        """Up to so many bytes; none at the end."""
        ...


Image: TypeAlias = (
    bytes
    | bytearray
    | memoryview
    | str
    | os.PathLike[str]
    | Firmware
    | BinaryFile
    | AsyncIterable[bytes]
)
"""What can be loaded: bytes, a path, a name to be looked up, an open file (also an async one), a
stream of bytes, or firmware that is decoded already."""


def find_firmware(name: str | os.PathLike[str]) -> Path:
    """The file that a name means: a path to one that exists, or else looked up.

    A name that is no path from here is looked up in the directories of `SEARCH_VARIABLE` and in
    /lib/firmware, in this order.

    Raises:
        FileNotFoundError: there is none; says where it was looked for.
    """
    path = Path(name)
    if path.exists():
        return path
    if path.is_absolute():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    places = [*filter(None, os.environ.get(SEARCH_VARIABLE, "").split(":")), *SEARCH_DEFAULT]
    for place in places:
        found = Path(place) / path
        if found.is_file():
            return found
    raise FileNotFoundError(
        f"firmware {str(name)!r} is neither a file here nor in {', '.join(places)} "
        f"({SEARCH_VARIABLE} names further directories)"
    )


async def read_image(source: Image) -> bytes | Firmware:
    """The bytes of an image, read in pieces without blocking other tasks.

    Raises:
        ImageError: it is larger than `IMAGE_LIMIT`.
        FileNotFoundError: no such file.
        OSError: it cannot be read.
        TypeError: it is nothing that can be read.
    """
    match source:
        case Firmware() | bytes():
            await trio.lowlevel.checkpoint()
            return source
        case bytearray() | memoryview():
            await trio.lowlevel.checkpoint()
            return bytes(source)  # whoever has it could change what was checked
        case BinaryFile():  # trio's are async iterables too, of lines
            return await _read_file(source)
        case str() | os.PathLike():
            path = trio.Path(find_firmware(source))
            status = await path.stat()
            if stat.S_ISFIFO(status.st_mode):
                return await _read_pipe(path)
            if stat.S_ISREG(status.st_mode):
                _check_size(status.st_size)
                return await path.read_bytes()
            async with await path.open("rb") as file:
                return await _read_file(file)
        case AsyncIterable():
            pieces: list[bytes] = []
            size = 0
            async for piece in source:
                if not isinstance(piece, (bytes, bytearray, memoryview)):
                    raise TypeError(f"the stream gives {type(piece).__name__}, not bytes")
                pieces.append(bytes(piece))  # whoever gives it may use it again
                size = _check_size(size + len(piece))
            return b"".join(pieces)
    raise TypeError(f"an image is a path, bytes, a file or a stream, not {type(source).__name__}")


async def _read_file(file: BinaryFile) -> bytes:
    pieces: list[bytes] = []
    size = 0
    is_async = inspect.iscoroutinefunction(file.read)
    while True:
        if is_async:
            read = file.read(_PIECE)
            assert not isinstance(read, bytes), "a coroutine"
            piece = await read
        else:  # it may be a pipe that nobody writes to: a cancelled read is left to itself
            read_now = cast("Callable[[int], bytes]", file.read)
            piece = await trio.to_thread.run_sync(read_now, _PIECE, abandon_on_cancel=True)
        if not isinstance(piece, bytes):
            raise TypeError(f"the file gives {type(piece).__name__}: open it in binary mode")
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
        size = _check_size(size + len(piece))


async def _read_pipe(path: trio.Path) -> bytes:
    pieces: list[bytes] = []
    size = 0
    async with trio.lowlevel.FdStream(os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as pipe:
        await trio.lowlevel.wait_readable(pipe.fileno())  # without a writer it looks ended
        async for piece in pipe:
            pieces.append(bytes(piece))
            size = _check_size(size + len(piece))
    return b"".join(pieces)


def _check_size(size: int) -> int:
    if size > IMAGE_LIMIT:
        raise ImageError(f"the image has {size} bytes or more; the limit is {IMAGE_LIMIT}")
    return size
