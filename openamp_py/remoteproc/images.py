"""Images in any format: a registry of loaders, and tables for images that carry none.

The format is recognised by its content; a raw binary has none and is asked for by name.
Intel HEX and Motorola S-record are read with bincopy's record functions (the extra ``hex``):
its `BinFile` takes overlapping records for granted in some orders, and its time grows with the
square of the segments.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

from openamp_py.errors import ImageError, ResourceTableError
from openamp_py.remoteproc.elf import MAX_PROGRAM_HEADERS, Firmware, Segment, decode_elf_untrusted
from openamp_py.remoteproc.resource_table import (
    TABLE_LIMIT,
    ResourceTable,
    decode_table_untrusted,
    encode_table,
)

HEAD_SIZE: Final = 16
"""Most bytes of an image's beginning that a loader sees to recognise it."""

MAX_SEGMENTS: Final = MAX_PROGRAM_HEADERS
"""Our limit for every format; a HEX file of a linker has fewer than ten."""

_ALL: Final = 7  # read, write, execute: these formats do not say
_READ_WRITE: Final = 6
_ADDRESS_SPACE: Final = 1 << 64
_RECORD_SPACE: Final = 1 << 32


@dataclass(frozen=True, slots=True)
class Loader:
    """How images of one format are recognised and decoded.

    Attributes:
        name: by which it is asked for.
        recognises: whether an image that begins so (at most `HEAD_SIZE` bytes) is of its format.
        decode: makes firmware of a whole image from anywhere, or raises FirmwareError; also
            given the address that the caller says its first byte has, if any.
    """

    name: str
    recognises: Callable[[bytes], bool]
    decode: Callable[[bytes, int | None], Firmware]


_loaders: dict[str, Loader] = {}


def register_loader(loader: Loader) -> None:
    """Add a format; it is asked before those that were added earlier.

    Raises:
        ValueError: there is one of that name.
    """
    if loader.name in _loaders:
        raise ValueError(f"there is a loader named {loader.name!r}: {_names()}")
    _loaders[loader.name] = loader


def loader_names() -> tuple[str, ...]:
    """Return the names by which a format can be asked for."""
    return tuple(_loaders)


def decode_image_untrusted(
    data: bytes | memoryview,
    *,
    loader: str | None = None,
    address: int | None = None,
    entry: int | None = None,
    table_da: int | None = None,
) -> Firmware:
    """Decode an image of any registered format from anywhere.

    Args:
        loader: name of the format; None recognises it.
        address: device address of a raw binary's first byte.
        entry: device address at which the core starts, instead of what the image says.
        table_da: device address at which the image has a resource table, for formats that
            cannot say. For a table that is not in the image see `with_table`.

    Raises:
        ImageError: no format recognises it, or it is not a sound image of its format.
        ResourceTableError: its table is malformed, or not where it was said to be.
        ValueError: there is no such format.
    """
    data = bytes(data)
    for name, value in (("address", address), ("entry", entry)):
        if value is not None and not 0 <= value < _ADDRESS_SPACE:
            raise ValueError(f"{name} {value:#x} is not a device address of at most 64 bits")
    chosen = _recognise(data) if loader is None else _loaders.get(loader)
    if chosen is None:
        raise ValueError(f"no loader is named {loader!r}: {_names()}")
    firmware = chosen.decode(data, address)
    if entry is not None:
        firmware = replace(firmware, entry=entry)
    return firmware if table_da is None else _with_loaded_table(firmware, table_da)


def with_table(firmware: Firmware, table: ResourceTable, da: int) -> Firmware:
    """Give firmware a resource table that is loaded at `da`: over a segment, or beside them.

    This is what OpenAMP's remoteproc_set_rsc_table is for on a host: an image without a table,
    or with another one.

    Raises:
        ResourceTableError: a segment would hold only a part of it, or it is too long.
        ValueError: the table cannot be encoded, or `da` is no address.
    """
    if not 0 <= da < _ADDRESS_SPACE:
        raise ValueError(f"da {da:#x} is not a device address of at most 64 bits")
    data = encode_table(table)
    if len(data) > TABLE_LIMIT:
        raise ResourceTableError(f"a table of {len(data):#x} bytes; the limit is {TABLE_LIMIT:#x}")
    placed = Segment(da, data, len(data), _READ_WRITE)
    segments = [placed]
    for segment in firmware.segments:
        if not _overlap(segment, placed):
            segments.append(segment)
        elif segment.da <= da and da + len(data) <= segment.da + segment.memory_size:
            segments[0] = replace(placed, flags=segment.flags)
            segments.append(_cut(segment, 0, da - segment.da))
            segments.append(_cut(segment, da - segment.da + len(data), segment.memory_size))
        else:
            raise ResourceTableError(
                f"the table's {len(data):#x} bytes at {da:#x} are only partly in the segment of "
                f"{segment.memory_size:#x} bytes at {segment.da:#x}"
            )
    return replace(
        firmware,
        segments=tuple(sorted((s for s in segments if s.memory_size), key=lambda s: s.da)),
        table=decode_table_untrusted(data),
        table_da=da,
    )


def _recognise(data: bytes) -> Loader:
    head = data[:HEAD_SIZE]
    for loader in reversed(_loaders.values()):
        if loader.recognises(head):
            return loader
    raise ImageError(
        f"neither an ELF file nor another known image ({_names()}): {len(data)} bytes, beginning "
        f"with {head[:4].hex(' ') or 'nothing'}; for a raw binary "
        "name the loader, raw, and give its address"
    )


def _names() -> str:
    return ", ".join(_loaders)


def _overlap(one: Segment, other: Segment) -> bool:
    return one.da < other.da + other.memory_size and other.da < one.da + one.memory_size


def _cut(segment: Segment, start: int, end: int) -> Segment:
    """The part of a segment between two of its offsets; bytes are not copied."""
    data = memoryview(segment.data)[start:end]
    return Segment(segment.da + start, data, end - start, segment.flags)


def _with_loaded_table(firmware: Firmware, da: int) -> Firmware:
    for segment in firmware.segments:
        into = da - segment.da
        if 0 <= into < segment.file_size:
            found = memoryview(segment.data)[into : into + TABLE_LIMIT]
            end = decode_table_untrusted(found).end
            return replace(firmware, table=decode_table_untrusted(found[:end]), table_da=da)
    raise ResourceTableError(f"no bytes of the image are loaded at {da:#x}, given as table_da")


def _decode_elf(data: bytes, address: int | None) -> Firmware:
    _refuse_address("an ELF file", address)
    return decode_elf_untrusted(data)


# Raw binaries


def _decode_raw(data: bytes, address: int | None) -> Firmware:
    if address is None:
        raise ImageError("a raw binary does not say where it goes; give its address")
    if not data:
        raise ImageError("a raw binary of 0 bytes: nothing to load")
    if address + len(data) > _ADDRESS_SPACE:
        raise ImageError(f"{len(data):#x} bytes at {address:#x} end beyond the address space")
    segment = Segment(address, data, len(data), _ALL)
    return Firmware(entry=address, segments=(segment,))


# Intel HEX and Motorola S-record: lines of hexadecimal digits, one record each

_IHEX_SIZES: Final = {1: 0, 2: 2, 3: 4, 4: 2, 5: 4}  # of what is no data (type 0)

_SREC_DATA: Final = "123"
_SREC_START: Final = "789"


@dataclass(slots=True)
class _Parts:
    """What the records of one file come to, in their order."""

    data: list[tuple[int, bytes]] = field(default_factory=list)
    entry: int | None = None
    ended: bool = False


def _decode_ihex(data: bytes, address: int | None) -> Firmware:
    _refuse_address("Intel HEX", address)
    parts = _Parts()
    base = 0
    for where, (type_, offset, _, content) in _records(data, "unpack_ihex", parts):
        if type_ == 0:
            parts.data.append((base + offset, bytes(content)))
            continue
        size = _IHEX_SIZES.get(type_)
        if size != len(content):
            wrong = f"not {size}" if size is not None else "and Intel HEX has types 0 to 5"
            raise ImageError(
                f"{where}: a record of type {type_} with {len(content)} bytes, {wrong}"
            )
        value = int.from_bytes(content, "big")
        match type_:
            case 1:
                parts.ended = True
            case 2:
                base = value << 4
            case 3:  # CS and IP
                parts.entry = ((value >> 16) << 4) + (value & 0xFFFF)
            case 4:
                base = value << 16
            case 5:
                parts.entry = value
    return _assemble(parts, "Intel HEX", "end-of-file record")


def _decode_srec(data: bytes, address: int | None) -> Firmware:
    _refuse_address("S-record", address)
    parts = _Parts()
    for _, (type_, da, _, content) in _records(data, "unpack_srec", parts):
        if type_ in _SREC_DATA:
            parts.data.append((da, bytes(content)))
        elif type_ in _SREC_START:
            parts.ended = True
            parts.entry = da
    return _assemble(parts, "S-record", "S7, S8 or S9 record")


def _refuse_address(what: str, address: int | None) -> None:
    if address is not None:
        raise ImageError(f"address {address:#x} given, but {what} says itself where it goes")


def _records(data: bytes, unpack: str, parts: _Parts) -> Iterator[tuple[str, Any]]:
    """What bincopy makes of each line, with where it is."""
    try:
        decode = getattr(importlib.import_module("bincopy"), unpack)
    except ImportError as error:
        raise ImageError(
            "Intel HEX and S-record images need bincopy: pip install 'openamp_py[hex]'"
        ) from error
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = decode(line.strip().decode("ascii"))
        except Exception as error:  # its own kind, and whatever a hostile line does to it
            raise ImageError(f"line {number}: {str(error)[:200]}") from error
        if parts.ended:
            raise ImageError(f"line {number}: a record behind the one that ends the file")
        yield f"line {number}", record


def _assemble(parts: _Parts, what: str, end: str) -> Firmware:
    """Join records that touch, and refuse those that overlap."""
    if not parts.ended:
        raise ImageError(f"{what}: there is no {end}; the file is truncated")
    segments: list[tuple[int, bytearray]] = []
    for address, content in sorted(part for part in parts.data if part[1]):
        last_end = segments[-1][0] + len(segments[-1][1]) if segments else -1
        if address < last_end:
            raise ImageError(
                f"{what}: {len(content)} bytes at {address:#x} overlap those below, which end at "
                f"{last_end:#x}"
            )
        if address + len(content) > _RECORD_SPACE:
            raise ImageError(
                f"{what}: {len(content)} bytes at {address:#x} end beyond {_RECORD_SPACE:#x}; its "
                "addresses have 32 bits"
            )
        if address == last_end:
            segments[-1][1].extend(content)
        else:
            segments.append((address, bytearray(content)))
        if len(segments) > MAX_SEGMENTS:
            raise ImageError(f"{what}: more than {MAX_SEGMENTS} separate segments")
    if not segments:
        raise ImageError(f"{what}: no data records: nothing to load")
    return Firmware(
        entry=segments[0][0] if parts.entry is None else parts.entry,
        segments=tuple(Segment(da, bytes(data), len(data), _ALL) for da, data in segments),
    )


def _is_srec(head: bytes) -> bool:
    return len(head) >= 2 and head[:1] == b"S" and head[1:2].isdigit()


def _is_raw(head: bytes) -> bool:
    return False  # any bytes are one


for _loader in (
    Loader("raw", _is_raw, _decode_raw),
    Loader("srec", _is_srec, _decode_srec),
    Loader("ihex", lambda head: head.startswith(b":"), _decode_ihex),
    Loader("elf", lambda head: head.startswith(b"\x7fELF"), _decode_elf),
):
    register_loader(_loader)
