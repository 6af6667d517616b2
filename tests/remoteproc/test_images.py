"""Images of every format, the registry of loaders, and tables for images without one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py.errors import FirmwareError, ImageError, ResourceTableError
from openamp_py.firmware import path
from openamp_py.memory import MemoryMap, Region
from openamp_py.remoteproc import images
from openamp_py.remoteproc.elf import Firmware, Segment, decode_elf_untrusted
from openamp_py.remoteproc.images import (
    Loader,
    decode_image_untrusted,
    loader_names,
    register_loader,
    with_table,
)
from openamp_py.remoteproc.plan import plan_load
from openamp_py.remoteproc.resource_table import (
    ResourceTable,
    Unknown,
    encode_table,
    rpmsg_table,
)

bincopy: Any = importlib.import_module("bincopy")  # it has no types

CODE = bytes(range(200))
DA, DATA_DA, ENTRY = 0x2000_0000, 0x2010_0000, 0x2000_0010
TABLE = rpmsg_table(num=16)
TABLE_BYTES = encode_table(TABLE)

deterministic = settings(derandomize=True, deadline=None, max_examples=300)


def _file() -> Any:
    file = bincopy.BinFile()
    file.add_binary(CODE, address=DA)
    file.add_binary(b"data", address=DATA_DA)
    file.execution_start_address = ENTRY
    return file


HEX: str = _file().as_ihex()
SREC: str = _file().as_srec()


def _lines(*records: tuple[int, int, bytes]) -> bytes:
    """Intel HEX of (type, address, data)."""
    lines = [bincopy.pack_ihex(type_, at, len(data), data) for type_, at, data in records]
    return "\n".join([*lines, ":00000001FF"]).encode()


# Normal


@pytest.mark.parametrize("image", [HEX, SREC, HEX.replace("\n", "\r\n"), "\n" + HEX.lower() + "\n"])
def test_hex_files_become_segments_and_an_entry(image: str) -> None:
    loader = "ihex" if image[:1] == "\n" else None
    firmware = decode_image_untrusted(image.encode(), loader=loader)
    assert firmware == Firmware(
        entry=ENTRY,
        segments=(Segment(DA, CODE, 200, 7), Segment(DATA_DA, b"data", 4, 7)),
    )
    assert (firmware.elf_class, firmware.machine, firmware.machine_name) == (0, 0, "")


def test_records_in_any_order_are_joined() -> None:
    image = _lines((0, 8, b"5678"), (0, 0, b"0123"), (0, 4, b"...."), (0, 0x20, b"x"))
    firmware = decode_image_untrusted(image)
    assert [(s.da, bytes(s.data)) for s in firmware.segments] == [(0, b"0123....5678"), (32, b"x")]
    assert firmware.entry == 0, "where no record says, it is the lowest address"


def test_segmented_addresses_of_intel_hex() -> None:
    image = _lines((2, 0, b"\x12\x34"), (0, 8, b"x"), (3, 0, b"\x10\x00\x00\x20"))
    firmware = decode_image_untrusted(image)
    assert (firmware.segments[0].da, firmware.entry) == (0x12348, 0x10020)


@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_a_raw_binary_goes_where_it_is_told(kind: type[bytes]) -> None:
    firmware = decode_image_untrusted(kind(CODE), loader="raw", address=DA)
    assert firmware == Firmware(entry=DA, segments=(Segment(DA, CODE, 200, 7),))
    assert decode_image_untrusted(CODE, loader="raw", address=DA, entry=4).entry == 4


def test_an_elf_file_is_recognised() -> None:
    image = path("echo-native.elf").read_bytes()
    assert decode_image_untrusted(image) == decode_elf_untrusted(image)
    assert decode_image_untrusted(image, entry=0x1234).entry == 0x1234


def test_a_table_that_lies_in_an_image_without_sections() -> None:
    image = CODE + TABLE_BYTES + bytes(100)
    firmware = decode_image_untrusted(image, loader="raw", address=DA, table_da=DA + 200)
    assert firmware.table == TABLE and firmware.table_da == DA + 200
    assert firmware.table is not None and firmware.table.length == len(TABLE_BYTES)


@pytest.fixture
def no_new_loaders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(images, "_loaders", dict(images._loaders))
    yield


@pytest.mark.usefixtures("no_new_loaders")
def test_a_format_can_be_added() -> None:
    made = Firmware(entry=5)
    register_loader(Loader("mine", lambda head: head[:2] == b"S1", lambda data, address: made))
    assert loader_names()[-1] == "mine"
    assert decode_image_untrusted(b"S1...") is made, "a later one is asked first"
    assert decode_image_untrusted(b"", loader="mine") is made
    with pytest.raises(ValueError, match="there is a loader named 'mine'"):
        register_loader(Loader("mine", lambda head: True, lambda data, address: made))


# Tables added


def _memory(firmware: Firmware) -> bytes:
    """What loading it leaves at DA."""
    view = memoryview(bytearray(b"\xee" * 0x1000))
    regions = MemoryMap([Region("ram", DA, DA, view)])
    plan = plan_load(replace(firmware, table=None, table_da=None), regions)
    plan.write(regions)
    return bytes(view)


@pytest.mark.parametrize("at", [0, 100, 200 - 88, 180, 512, 1024 - 88])
def test_a_table_over_a_segment_cuts_it(at: int) -> None:
    plain = Firmware(entry=DA, segments=(Segment(DA, CODE, 1024, 5),))
    firmware = with_table(plain, TABLE, DA + at)
    expected = bytearray(_memory(plain))
    expected[at : at + len(TABLE_BYTES)] = TABLE_BYTES
    assert _memory(firmware) == bytes(expected)
    assert firmware.table == TABLE and firmware.table_da == DA + at and firmware.entry == DA
    assert all(segment.memory_size and segment.flags == 5 for segment in firmware.segments)


def test_a_table_beside_the_segments() -> None:
    plain = decode_image_untrusted(HEX.encode())
    firmware = with_table(plain, TABLE, DA + 0x1000)
    first, table, last = firmware.segments
    assert (first, last) == plain.segments
    assert table == Segment(DA + 0x1000, TABLE_BYTES, len(TABLE_BYTES), 6)
    assert plan_load(with_table(Firmware(), TABLE, 0), _ram()).patches


def _ram() -> MemoryMap:
    return MemoryMap([Region("ram", 0, 0, memoryview(bytearray(0x10000)))])


def test_a_table_that_a_segment_holds_in_part_is_refused() -> None:
    plain = Firmware(segments=(Segment(DA, CODE, 200, 5),))
    for da in (DA - 4, DA + 200 - 84):
        with pytest.raises(ResourceTableError, match=r"only partly in the segment of 0xc8 bytes"):
            with_table(plain, TABLE, da)
    with pytest.raises(ResourceTableError, match=r"a table of 0x1\w+ bytes; the limit is 0x10000"):
        with_table(plain, ResourceTable((Unknown(9, bytes(0x10000)),)), 0)
    for da in (-4, 1 << 64):
        with pytest.raises(ValueError, match="is not a device address of at most 64 bits"):
            with_table(plain, TABLE, da)


# Refusals

REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"known image \(raw, srec, ihex, elf\): 0 bytes, beginning with nothing"),
    "unknown": (
        CODE,
        r"200 bytes, beginning with 00 01 02 03; for a raw binary name the loader",
    ),
    "hex cut": (HEX[:-12].encode(), r"there is no end-of-file record; the file is truncated"),
    "srec cut": ("\n".join(SREC.splitlines()[:-1]).encode(), r"no S7, S8 or S9 record"),
    "checksum": (b":0400000001020304F3\n", r"line 1: expected crc"),
    "srec checksum": (SREC[:-3].encode() + b"00\n", r"line \d+: expected crc"),
    "not hexadecimal": (b":04000000zz020304F3\n", r"line 1: "),
    "not ASCII": (b":\xff\xfe", r"line 1: 'ascii' codec"),
    "no number of bytes": (b":", r"line 1: record ':' too short"),
    "srec type": (b"S4" + b"030000FC", r"line 1: "),
    "type 6": (_lines((6, 0, b"")), r"line 1: a record of type 6 with 0 bytes, and .* 0 to 5"),
    "base of 3 bytes": (_lines((4, 0, b"abc")), r"line 1: a record of type 4 with 3 bytes, not 2"),
    "base of 0 bytes": (_lines((2, 0, b"")), r"line 1: a record of type 2 with 0 bytes, not 2"),
    "long end": (_lines((1, 0, b"x")), r"line 1: a record of type 1 with 1 bytes, not 0"),
    "start": (_lines((5, 0, b"xy")), r"line 1: a record of type 5 with 2 bytes, not 4"),
    "behind the end": (_lines() + b"\n" + _lines(), r"line 2: a record behind"),
    "no data": (_lines(), r"Intel HEX: no data records"),
    "overlap": (_lines((0, 0, b"abcd"), (0, 3, b"x")), r"1 bytes at 0x3 overlap those below"),
    "twice": (_lines((0, 0, b"abcd"), (0, 0, b"abcd")), r"4 bytes at 0x0 overlap"),
    "overlap where bincopy takes it": (
        _lines((0, 8, b"above"), (0, 0, b"1234"), (0, 4, b"567890")),
        r"5 bytes at 0x8 overlap those below, which end at 0xa",
    ),
    "beyond 32 bits": (
        _lines((4, 0, b"\xff\xff"), (0, 0xFFFE, b"abc")),
        r"3 bytes at 0xfffffffe end beyond 0x100000000",
    ),
    "segments": (
        _lines(*[(0, 2 * number, b"x") for number in range(1025)]),
        r"more than 1024 separate segments",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_images(name: str) -> None:
    image, message = REFUSED[name]
    with pytest.raises(ImageError, match=message):
        decode_image_untrusted(image)


def test_most_segments() -> None:
    image = _lines(*[(0, 2 * number, b"x") for number in range(1024)])
    assert len(decode_image_untrusted(image).segments) == 1024


def test_a_raw_binary_without_a_place_names_the_cure() -> None:
    with pytest.raises(ImageError, match="does not say where it goes; give its address"):
        decode_image_untrusted(CODE, loader="raw")
    with pytest.raises(ImageError, match="0 bytes"):
        decode_image_untrusted(b"", loader="raw", address=0)
    with pytest.raises(ImageError, match="end beyond the address space"):
        decode_image_untrusted(CODE, loader="raw", address=2**64 - 199)


def test_only_a_raw_binary_takes_an_address() -> None:
    for image in (HEX.encode(), SREC.encode(), path("echo-native.elf").read_bytes()):
        with pytest.raises(ImageError, match=r"address 0x0 given, but .* says itself"):
            decode_image_untrusted(image, address=0)


def test_wrong_arguments_are_the_callers() -> None:
    wrong: list[dict[str, Any]] = [
        {"loader": "uf2"},
        {"loader": "raw", "address": -1},
        {"entry": 1 << 64},
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"no loader is named 'uf2'|not a device address") as e:
            decode_image_untrusted(HEX.encode(), **arguments)
        assert not isinstance(e.value, FirmwareError)


@pytest.mark.parametrize("da", [0, DA - 1, DA + 400])
def test_a_table_where_nothing_is_loaded_is_refused(da: int) -> None:
    with pytest.raises(ResourceTableError, match=f"no bytes of the image are loaded at {da:#x}"):
        decode_image_untrusted(bytes(400), loader="raw", address=DA, table_da=da)


def test_without_bincopy_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bincopy", None)
    with pytest.raises(ImageError, match=r"pip install 'openamp_py\[hex\]'"):
        decode_image_untrusted(HEX.encode())


# Hostile input


def decodes_or_refuses(image: bytes, loader: str | None = None) -> None:
    try:
        firmware = decode_image_untrusted(image, loader=loader)
    except FirmwareError as exc:
        str(exc).encode()
        return
    assert 0 < len(firmware.segments) <= 1024
    end = 0
    for segment in firmware.segments:
        assert end <= segment.da
        end = segment.da + segment.memory_size


@deterministic
@given(st.sampled_from(loader_names()), st.binary(max_size=100))
def test_any_bytes_decode_or_are_refused(loader: str, image: bytes) -> None:
    decodes_or_refuses(image, loader)


records = st.tuples(st.integers(0, 7), st.integers(0, 0xFFFF), st.binary(max_size=6))


@deterministic
@given(st.lists(records, max_size=8))
def test_any_records_decode_or_are_refused(lines: list[tuple[int, int, bytes]]) -> None:
    decodes_or_refuses(_lines(*lines))


@deterministic
@given(
    st.sampled_from([HEX, SREC]),
    st.lists(st.tuples(st.integers(0, 2000), st.sampled_from(b"\0\n 019AFSs:\xff")), max_size=4),
)
def test_damaged_files_decode_or_are_refused(text: str, damage: list[tuple[int, int]]) -> None:
    image = bytearray(text.encode())
    for position, value in damage:
        image[position % len(image)] = value
    decodes_or_refuses(bytes(image))
