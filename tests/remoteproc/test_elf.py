"""ELF images: golden images with the kernel's verdict, every limit, every refusal."""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py.constants import VIRTIO_ID_RPMSG
from openamp_py.errors import FirmwareError, ImageError, ResourceTableError
from openamp_py.remoteproc.elf import Firmware, Segment, decode_elf_untrusted, machine_name
from openamp_py.remoteproc.resource_table import (
    ResourceTable,
    Trace,
    Vdev,
    Vendor,
    Vring,
    decode_table_untrusted,
    encode_table,
)

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "linux"

VRINGS = (Vring(0xFFFF_FFFF, 16, 8, 0), Vring(0xFFFF_FFFF, 16, 8, 1))
TABLE = ResourceTable((Vdev(VIRTIO_ID_RPMSG, 0, 1, vrings=VRINGS), Trace(0x1400, 64, "trace0")))
TABLE_BYTES = encode_table(TABLE)
CODE = bytes(range(1, 65))

ET_REL, ET_EXEC, ET_DYN, ET_CORE = 1, 2, 3, 4
PT_NULL, PT_LOAD = 0, 1
SHT_NULL, SHT_PROGBITS, SHT_STRTAB, SHT_NOBITS = 0, 1, 3, 8

deterministic = settings(derandomize=True, deadline=None, max_examples=400)


# A small ELF builder. Headers are dictionaries of every field, so that a test can say what
# it makes wrong by name; the layouts are written down here a second time on purpose.

EHDR = [
    "e_type",
    "e_machine",
    "e_version",
    "e_entry",
    "e_phoff",
    "e_shoff",
    "e_flags",
    "e_ehsize",
    "e_phentsize",
    "e_phnum",
    "e_shentsize",
    "e_shnum",
    "e_shstrndx",
]
SHDR = [
    "sh_name",
    "sh_type",
    "sh_flags",
    "sh_addr",
    "sh_offset",
    "sh_size",
    "sh_link",
    "sh_info",
    "sh_addralign",
    "sh_entsize",
]
PHDR = {
    32: ["p_type", "p_offset", "p_vaddr", "p_paddr", "p_filesz", "p_memsz", "p_flags", "p_align"],
    64: ["p_type", "p_flags", "p_offset", "p_vaddr", "p_paddr", "p_filesz", "p_memsz", "p_align"],
}
EHDR_STRUCT = {32: struct.Struct("<HHIIIIIHHHHHH"), 64: struct.Struct("<HHIQQQIHHHHHH")}
SHDR_STRUCT = {32: struct.Struct("<10I"), 64: struct.Struct("<IIQQQQIIQQ")}
PHDR_STRUCT = {32: struct.Struct("<8I"), 64: struct.Struct("<IIQQQQQQ")}


@dataclass
class Load:
    """One PT_LOAD; ``fields`` overrides what the builder would write."""

    da: int
    data: bytes
    fields: dict[str, int]


@dataclass
class Section:
    """One section whose bytes are those at an offset into a PT_LOAD, or its own."""

    name: str
    load: int | None
    data: bytes
    fields: dict[str, int]


def load(da: int, data: bytes, **fields: int) -> Load:
    return Load(da, data, fields)


def section(name: str, at: int | None, data: bytes = b"", /, **fields: int) -> Section:
    return Section(name, at, data, fields)


def build(
    loads: list[Load] | None = None,
    sections: list[Section] | None = None,
    *,
    bits: int = 32,
    ident: bytes = b"",
    names_end: bytes = b"\0",
    names: dict[str, int] | None = None,
    **ehdr: int,
) -> bytes:
    """Build an image: header, program headers, contents, section headers."""
    if loads is None:
        loads = [load(0x1000, CODE, p_flags=5), load(0x2000, TABLE_BYTES, p_flags=6)]
    if sections is None:
        sections = [section(".text", 0), section(".resource_table", 1)]
    offset = 16 + EHDR_STRUCT[bits].size + PHDR_STRUCT[bits].size * len(loads)
    phoff, contents, starts, phdrs = 16 + EHDR_STRUCT[bits].size, b"", [], b""
    for each in loads:
        starts.append(offset + len(contents))
        fields = {
            "p_type": PT_LOAD,
            "p_offset": starts[-1],
            "p_vaddr": each.da,
            "p_paddr": each.da,
            "p_filesz": len(each.data),
            "p_memsz": len(each.data),
            "p_flags": 7,
            "p_align": 4,
        } | each.fields
        phdrs += PHDR_STRUCT[bits].pack(*(fields[name] for name in PHDR[bits]))
        contents += each.data
    shdrs, strings = SHDR_STRUCT[bits].pack(*[0] * 10), b"\0"
    for one in [*sections, section(".shstrtab", None)]:
        data = one.data if one.load is None else loads[one.load].data
        at = offset + len(contents) if one.load is None else starts[one.load]
        fields = {
            "sh_name": len(strings),
            "sh_type": SHT_PROGBITS,
            "sh_addr": 0 if one.load is None else loads[one.load].da,
            "sh_offset": at,
            "sh_size": len(data),
        } | one.fields
        strings += one.name.encode() + b"\0"
        if one.name == ".shstrtab":
            data = strings[:-1] + names_end
            fields |= {"sh_type": SHT_STRTAB, "sh_size": len(data)} | (names or {})
        if one.load is None:
            contents += data
        shdrs += SHDR_STRUCT[bits].pack(*(fields.get(name, 0) for name in SHDR))
    header = {
        "e_type": ET_EXEC,
        "e_machine": 40 if bits == 32 else 183,
        "e_version": 1,
        "e_entry": 0x1000,
        "e_phoff": phoff,
        "e_shoff": offset + len(contents),
        "e_flags": 0,
        "e_ehsize": 16 + EHDR_STRUCT[bits].size,
        "e_phentsize": PHDR_STRUCT[bits].size,
        "e_phnum": len(loads),
        "e_shentsize": SHDR_STRUCT[bits].size,
        "e_shnum": len(sections) + 2,
        "e_shstrndx": len(sections) + 1,
    } | ehdr
    start = ident or b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9)
    packed = EHDR_STRUCT[bits].pack(*(header[name] for name in EHDR))
    return start + packed + phdrs + contents + shdrs


# Normal


@pytest.mark.parametrize("bits", [32, 64])
def test_an_image_becomes_segments_an_entry_and_a_table(bits: int) -> None:
    firmware = decode_elf_untrusted(build(bits=bits))
    assert firmware == Firmware(
        elf_class=bits,
        machine=40 if bits == 32 else 183,
        machine_name="ARM" if bits == 32 else "AArch64",
        entry=0x1000,
        segments=(
            Segment(0x1000, CODE, len(CODE), 5),
            Segment(0x2000, TABLE_BYTES, len(TABLE_BYTES), 6),
        ),
        table=TABLE,
        table_da=0x2000,
    )
    assert firmware.table is not None
    assert [entry.offset for entry in firmware.table.entries] == [24, 92]


@pytest.mark.parametrize("bits", [32, 64])
def test_the_builder_makes_what_pyelftools_reads(bits: int) -> None:
    file = ELFFile(io.BytesIO(build(bits=bits)))
    assert [s.name for s in file.iter_sections()] == ["", ".text", ".resource_table", ".shstrtab"]
    table = file.get_section_by_name(".resource_table")
    assert table is not None and table.data() == TABLE_BYTES
    assert [s["p_paddr"] for s in file.iter_segments()] == [0x1000, 0x2000]


def test_a_program_of_this_machine_decodes_as_pyelftools_reads_it() -> None:
    image = Path(sys.executable).resolve().read_bytes()
    file = ELFFile(io.BytesIO(image))
    firmware = decode_elf_untrusted(image)
    assert firmware.elf_class == file.elfclass
    assert firmware.entry == file["e_entry"]
    assert firmware.table is None
    assert [(s.da, s.data, s.memory_size, s.flags) for s in firmware.segments] == [
        (s["p_paddr"], s.data(), s["p_memsz"], s["p_flags"]) for s in file.iter_segments("PT_LOAD")
    ]


def test_memory_larger_than_the_file_is_a_number_only() -> None:
    image = build([load(0x1000, CODE, p_memsz=0xF000_0000)], [])
    (segment,) = decode_elf_untrusted(image).segments
    assert (segment.file_size, segment.memory_size) == (64, 0xF000_0000)
    assert segment.data == CODE


def test_segments_come_by_address_and_empty_ones_not_at_all() -> None:
    loads = [
        load(0x3000, b"c"),
        load(0x1000, b"a"),
        load(0x9000, b"", p_memsz=0),
        load(0x5000, b"x", p_type=PT_NULL),
        load(0x2000, b"", p_memsz=0x1000, p_offset=0xFFFF_FFFF),
    ]
    segments = decode_elf_untrusted(build(loads, [])).segments
    assert [(s.da, bytes(s.data), s.memory_size) for s in segments] == [
        (0x1000, b"a", 1),
        (0x2000, b"", 0x1000),
        (0x3000, b"c", 1),
    ]


def test_device_addresses_are_physical_and_the_table_goes_with_its_segment() -> None:
    loads = [
        load(0, CODE, p_vaddr=0x8000_1000, p_paddr=0x1000),
        load(0, CODE[:8] + TABLE_BYTES, p_vaddr=0x8000_2000, p_paddr=0x2000),
    ]
    image = build(loads, [])
    at = image.index(TABLE_BYTES)
    table = section(
        ".resource_table", 1, sh_addr=0x8000_2008, sh_offset=at, sh_size=len(TABLE_BYTES)
    )
    # one more section header does not move the contents before it
    firmware = decode_elf_untrusted(build(loads, [table]))
    assert [s.da for s in firmware.segments] == [0x1000, 0x2000]
    assert firmware.table == TABLE
    assert firmware.table_da == 0x2008


def test_a_table_whose_address_is_given_as_a_physical_one() -> None:
    loads = [load(0x2000, TABLE_BYTES, p_vaddr=0x8000_2000)]
    assert decode_elf_untrusted(build(loads, [section(".resource_table", 0)])).table_da == 0x2000


def test_of_overlays_at_one_address_the_one_with_the_bytes_has_the_table() -> None:
    loads = [
        load(0x2000, bytes(len(TABLE_BYTES)), p_paddr=0x8000),
        load(0x2000, TABLE_BYTES, p_paddr=0x9000),
    ]
    assert decode_elf_untrusted(build(loads, [section(".resource_table", 1)])).table_da == 0x9000


def test_a_firmware_without_a_table_is_legal() -> None:
    for image in (
        build(sections=[section(".text", 0)]),
        build(e_shoff=0, e_shnum=0, e_shstrndx=0, e_shentsize=0),  # all sections stripped
        build(e_shstrndx=0),  # sections without names
        build(sections=[section(".resource_table", 1, sh_type=SHT_NULL)]),
        build(sections=[section(".resource_table2", 1), section("x.resource_tabl", 1)]),
    ):
        firmware = decode_elf_untrusted(image)
        assert (firmware.table, firmware.table_da) == (None, None)


def test_names_may_share_their_tails() -> None:
    image = build(sections=[section(".rel.resource_table", 1, sh_name=5)])
    assert decode_elf_untrusted(image).table == TABLE


def test_segments_do_not_copy_the_image() -> None:
    image = build()
    segment = decode_elf_untrusted(image).segments[0]
    assert isinstance(segment.data, memoryview)
    assert segment.data.obj is image


def test_an_image_in_memory_that_changes_is_read_once() -> None:
    memory = bytearray(build())
    firmware = decode_elf_untrusted(memoryview(memory))
    memory[:] = bytes(len(memory))
    assert firmware == decode_elf_untrusted(build())


ATTRIBUTES = bytes.fromhex("4113000000 616561626900 0109000000 060a074d")


def test_an_arm_image_says_what_it_is_built_for() -> None:
    sections = [section(".ARM.attributes", None, ATTRIBUTES, sh_type=0x7000_0003)]
    assert decode_elf_untrusted(build(sections=sections)).arm_architecture == "v7-M"
    assert decode_elf_untrusted(build()).arm_architecture is None
    assert decode_elf_untrusted(build(sections=sections, e_machine=243)).arm_architecture is None
    assert decode_elf_untrusted(build(sections=sections, e_shoff=0)).arm_architecture is None


@pytest.mark.parametrize(
    "fields", [{"sh_offset": 0xFFFF_FFFF}, {"sh_size": 0xFFFF_FFFF}, {"sh_size": 0}]
)
def test_attributes_that_lie_anywhere_are_no_reason_to_refuse(fields: dict[str, int]) -> None:
    one = section(".ARM.attributes", None, ATTRIBUTES, sh_type=0x7000_0003, **fields)
    found = decode_elf_untrusted(build(sections=[one])).arm_architecture
    assert found in (None, "v7-M")


def test_a_firmware_of_a_remote_in_python_is_built_by_hand() -> None:
    firmware = Firmware(table=TABLE, table_da=0)
    assert (firmware.elf_class, firmware.machine, firmware.segments) == (0, 0, ())


def test_plain_form_is_json() -> None:
    plain = decode_elf_untrusted(build()).to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["segments"] == [
        {"da": 0x1000, "file_size": 64, "memory_size": 64, "flags": 5},
        {
            "da": 0x2000,
            "file_size": len(TABLE_BYTES),
            "memory_size": len(TABLE_BYTES),
            "flags": 6,
        },
    ]
    assert plain["table"] == decode_table_untrusted(TABLE_BYTES).to_dict()
    assert {k: v for k, v in plain.items() if k not in ("segments", "table")} == {
        "elf_class": 32,
        "machine": 40,
        "machine_name": "ARM",
        "entry": 0x1000,
        "table_da": 0x2000,
        "arm_architecture": None,
    }
    assert Firmware().to_dict()["table"] is None


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (40, "ARM"),
        (243, "RISC-V"),
        (62, "x86-64"),
        (183, "AArch64"),
        (94, "XTENSA"),
        (0, "NONE"),
        (0xFEED, "0xfeed"),
    ],
)
def test_machines_have_names(machine: int, name: str) -> None:
    assert machine_name(machine) == name
    firmware = decode_elf_untrusted(build(e_machine=machine))
    assert (firmware.machine, firmware.machine_name) == (machine, name)


# The verdicts of Linux 6.1, 6.12 and 7.3 on 35 images, and where ours differ

LINUX_REFUSES_WE_DECODE = {
    "bad-segment-da": "where memory is, is the platform's business, not decoding",
    "table-not-in-memory": "where memory is, is the platform's business, not decoding",
    "no-table": "a firmware without a table is legal: it runs, only without RPMsg",
    "devmem-entry": "Linux refuses it for want of an IOMMU; whoever maps it decides",
}
LINUX_BOOTS_WE_REFUSE = {
    "bad-vring-num0": "boots without its virtio device in Linux; an error here says why",
    "bad-vring-align0": "boots without its virtio device in Linux; an error here says why",
    "vring-num17": "Linux's slot arithmetic breaks on what is not a power of two",
    "vrings0": "boots, and panics Linux at stop",
    "vrings1": "boots, and panics Linux at stop",
}


def golden_images() -> dict[str, tuple[bytes, bool]]:
    path = GOLDEN / "firmware.jsonl"
    if not path.exists():
        pytest.skip(f"the golden data is not here: {path}")
    images = {}
    for line in path.read_text().splitlines():
        entry: dict[str, Any] = json.loads(line)
        image = gzip.decompress(base64.b64decode(entry["elf_gzip_base64"]))
        images[entry["name"]] = (image, entry["start"] == "ok")
    return images


def test_verdicts_agree_with_the_kernel_but_for_documented_differences() -> None:
    images = golden_images()
    assert len(images) == 35
    assert (LINUX_BOOTS_WE_REFUSE.keys() | LINUX_REFUSES_WE_DECODE.keys()) <= images.keys()
    for name, (image, linux_boots) in images.items():
        expected = (linux_boots or name in LINUX_REFUSES_WE_DECODE) and (
            name not in LINUX_BOOTS_WE_REFUSE
        )
        try:
            decode_elf_untrusted(image)
        except FirmwareError as exc:
            assert not expected, f"{name}: {exc}"
        else:
            assert expected, f"{name}: decoded"


def test_the_good_golden_image_is_what_its_description_says() -> None:
    image, _ = golden_images()["good"]
    firmware = decode_elf_untrusted(image)
    assert (firmware.elf_class, firmware.machine_name) == (32, "ARM")
    assert firmware.entry == 0x1000_0000
    assert [(s.da, s.file_size, s.memory_size, s.flags) for s in firmware.segments] == [
        (0x1000_0000, 0x400, 0x1000, 5),
        (0x1000_1000, 200, 200, 6),
    ]
    assert firmware.table_da == 0x1000_1000
    assert firmware.table is not None
    assert firmware.table.carveouts[0].name == "heap"
    assert firmware.table.traces == (Trace(0x1000_2000, 0x400, "trace0"),)
    assert [vring.num for vring in firmware.table.vdevs[0].vrings] == [16, 16]
    # where the golden README finds vdev status and the second vring's da
    assert firmware.table.vdevs[0].offset + 24 == 0x9C
    assert firmware.table.vdevs[0].offset + 28 + 20 == 0xB4


def test_tables_of_the_golden_images_encode_to_the_byte() -> None:
    same = 0
    for name, (image, _) in golden_images().items():
        try:
            firmware = decode_elf_untrusted(image)
        except FirmwareError:
            continue
        if firmware.table is None:
            continue
        raw = bytes(firmware.segments[-1].data)
        if name == "vendor-entry128":  # 12 bytes follow that its length does not count
            assert firmware.table.vendors == (Vendor(128, bytes(16)),)
        assert encode_table(firmware.table) == raw, name
        same += 1
    assert same >= 10


@pytest.mark.parametrize("name", ["core-6.1.192.elf.gz", "core-7.3.4.elf.gz"])
def test_a_core_dump_is_not_firmware(name: str) -> None:
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f"the golden data is not here: {path}")
    with pytest.raises(ImageError, match=r"e_type ET_CORE \(a core dump\); firmware is ET_EXEC"):
        decode_elf_untrusted(gzip.decompress(path.read_bytes()))


# Limits


@pytest.mark.parametrize("bits", [32, 64])
def test_a_segment_may_end_at_the_end_of_the_address_space(bits: int) -> None:
    da = (1 << bits) - 64
    assert decode_elf_untrusted(build([load(da, CODE)], [], bits=bits)).segments[0].da == da
    with pytest.raises(ImageError, match=r"end beyond the address space"):
        decode_elf_untrusted(build([load(da + 1, CODE)], [], bits=bits))


def test_segments_may_touch() -> None:
    image = build([load(0x1040, CODE), load(0x1000, CODE)], [])
    assert [s.da for s in decode_elf_untrusted(image).segments] == [0x1000, 0x1040]


def test_most_program_headers() -> None:
    loads = [load(0x1000 + i, b"x") for i in range(1024)]
    assert len(decode_elf_untrusted(build(loads, [])).segments) == 1024
    with pytest.raises(ImageError, match=r"1025 program headers, limit 1024"):
        decode_elf_untrusted(build([*loads, load(0, b"x")], []))


def test_most_sections() -> None:
    """65535 section headers, the most that e_shnum can say, and the table is the last."""
    image = build()
    shdrs = image[-4 * SHDR_STRUCT[32].size :]
    one = SHDR_STRUCT[32].size
    null, text, table, strings = (shdrs[i * one : (i + 1) * one] for i in range(4))
    packed = null + strings + text * 65532 + table
    header = bytearray(image[: -len(shdrs)] + packed)
    struct.pack_into("<HH", header, 48, 65535, 1)
    assert decode_elf_untrusted(bytes(header)).table == TABLE


def test_a_file_of_only_what_is_needed() -> None:
    image = build([load(0x1000, CODE)], [], e_shoff=0, e_shnum=0, e_shstrndx=0)
    end = image.index(CODE) + len(CODE)
    assert len(decode_elf_untrusted(image[:end]).segments) == 1
    with pytest.raises(ImageError, match=r"truncated"):
        decode_elf_untrusted(image[: end - 1])


def test_position_independent_images_are_loaded_where_they_were_linked() -> None:
    assert decode_elf_untrusted(build(e_type=ET_DYN)).segments[0].da == 0x1000


# Refusals


def table_section(**fields: int) -> list[Section]:
    return [section(".resource_table", 1, **fields)]


REFUSED = {
    "empty": (b"", r"not an ELF file: 0 bytes"),
    "not an ELF": (
        b"#!/bin/sh\necho this is no ELF\n",
        r"not an ELF file: it begins with 23 21 2f",
    ),
    "magic": (build(ident=b"XELF\1\1\1" + bytes(9)), r"begins with 58 45 4c 46"),
    "class 0": (build(ident=b"\x7fELF\0\1\1" + bytes(9)), r"class 0, expected 1 .* or 2"),
    "class 3": (build(ident=b"\x7fELF\3\1\1" + bytes(9)), r"class 3, expected 1 .* or 2"),
    "no data encoding": (build(ident=b"\x7fELF\1\0\1" + bytes(9)), r"data encoding 0"),
    "big endian": (build(ident=b"\x7fELF\1\2\1" + bytes(9)), r"data encoding 2.*little-endian"),
    "header cut": (build()[:51], r"ELF header: 0x34 bytes .* file \(0x33 bytes\).*truncated"),
    "64-bit header cut": (build(bits=64)[:63], r"ELF header: 0x40 bytes .* file \(0x3f bytes\)"),
    "e_ehsize": (build(e_ehsize=64), r"e_ehsize 64, expected 52"),
    "e_phentsize": (build(e_phentsize=56), r"e_phentsize 56, expected 32"),
    "e_phentsize 0": (build(e_phentsize=0), r"e_phentsize 0, expected 32"),
    "e_shentsize": (build(e_shentsize=64), r"e_shentsize 64, expected 40"),
    "e_shentsize 0": (build(e_shentsize=0), r"e_shentsize 0, expected 40"),
    "no type": (build(e_type=0), r"e_type ET_NONE"),
    "object file": (build(e_type=ET_REL), r"e_type ET_REL \(a relocatable object"),
    "core dump": (build(e_type=ET_CORE), r"e_type ET_CORE \(a core dump\)"),
    "unknown type": (build(e_type=0x1234), r"e_type 4660 \(not a known one\)"),
    "no program headers": (build([], []), r"none of the 0 program headers is a PT_LOAD"),
    "no PT_LOAD": (build([load(0, b"x", p_type=PT_NULL)], []), r"none of the 1 program headers"),
    "nothing in memory": (build([load(0, b"", p_memsz=0)], []), r"none of the 1 program headers"),
    "e_phoff": (build(e_phoff=0xFFFF_F000), r"2 program headers: 0x40 bytes .* 0xfffff000 end"),
    "e_phoff 64": (build(bits=64, e_phoff=2**64 - 1), r"program headers: .* 0xffffffffffffffff"),
    "e_phnum": (build(e_phnum=1024), r"1024 program headers: 0x8000 bytes .*beyond the file"),
    "e_phnum extended": (build(e_phnum=0xFFFF), r"65535 program headers, limit 1024"),
    "e_shoff": (build(e_shoff=0xFFFF_F000), r"4 section headers: 0xa0 bytes .* 0xfffff000 end"),
    "e_shnum": (build(e_shnum=65535), r"65535 section headers: .* beyond the file"),
    "e_shnum extended": (build(e_shnum=0), r"e_shnum 0 with section headers at 0x.* extended"),
    "last section header cut": (build()[:-1], r"4 section headers: .* beyond the file"),
    "e_shstrndx": (build(e_shstrndx=4), r"e_shstrndx 4, but there are 4 sections"),
    "e_shstrndx extended": (build(e_shstrndx=0xFFFF), r"e_shstrndx 65535, but there are 4"),
    "names beyond": (build(names={"sh_size": 0x10000}), r"section 3 \(the section names\).*beyond"),
    "names at": (
        build(names={"sh_offset": 0xFFFF_FFFF}),
        r"section 3 \(the section names\).*beyond",
    ),
    "names nobits": (build(names={"sh_type": SHT_NOBITS}), r"\(the section names\).*SHT_NOBITS"),
    "names empty": (build(names={"sh_size": 0}), r"\(the section names\).*do not end with a NUL"),
    "names without NUL": (build(names_end=b""), r"\(the section names\).*do not end with a NUL"),
    "sh_name": (
        build(sections=table_section(sh_name=0x4000)),
        r"section 1: its name at 0x4000 is beyond the section names \(0x1b bytes\)",
    ),
    "file size": (
        build([load(0x1000, CODE, p_memsz=63)], []),
        r"program header 0: file size 0x40 is larger than memory size 0x3f",
    ),
    "file size, no memory": (
        build([load(0x1000, CODE, p_memsz=0), load(0x2000, CODE)], []),
        r"program header 0: file size 0x40 is larger than memory size 0x0",
    ),
    "segment beyond the file": (
        build([load(0, CODE), load(0x2000, CODE, p_filesz=0x4000, p_memsz=0x4000)], []),
        r"program header 1: 0x4000 bytes at file offset 0xb4 end beyond the file .*truncated",
    ),
    "segment offset": (
        build([load(0, CODE, p_offset=2**64 - 1)], [], bits=64),
        r"program header 0: 0x40 bytes at file offset 0xffffffffffffffff end beyond",
    ),
    "segment wraps": (
        build([load(0xFFFF_F000, CODE, p_memsz=0x1001)], []),
        r"program header 0: 0x1001 bytes at 0xfffff000 end beyond the address space \(0x100000000",
    ),
    "64-bit segment wraps": (
        build([load(2**64 - 1, CODE)], [], bits=64),
        r"end beyond the address space \(0x10000000000000000",
    ),
    "overlap": (
        build([load(0x103F, CODE), load(0x1000, CODE)], []),
        r"program header 1: 0x40 bytes at 0x1000 overlap program header 0 at 0x103f",
    ),
    "overlap of zero fill": (
        build([load(0x1000, CODE, p_memsz=0x1001), load(0x2000, CODE)], []),
        r"program header 0: 0x1001 bytes at 0x1000 overlap program header 1 at 0x2000",
    ),
}

TABLE_REFUSED = {
    "nobits": (table_section(sh_type=SHT_NOBITS), r"section 1 \(.resource_table\).*SHT_NOBITS"),
    "not at its address": (table_section(sh_addr=0x2004), r"at address 0x2004.*PT_LOAD segment"),
    "in no segment": (
        [section(".resource_table", None, TABLE_BYTES, sh_addr=0x2000)],
        r"not in a loaded segment, so the remote would not see.*place the section in a PT_LOAD",
    ),
    "not loaded at all": (
        [section(".resource_table", None, TABLE_BYTES)],
        r"at address 0x0.*not in a loaded segment",
    ),
    "longer than its segment": (
        table_section(sh_size=len(TABLE_BYTES) + 1),
        r"not in a loaded segment",
    ),
    "two": (table_section() * 2, r"sections 1 and 2 are both named .resource_table"),
    "empty": (table_section(sh_size=0), r"resource table: 0 bytes"),
    "cut": (table_section(sh_size=len(TABLE_BYTES) - 1), r"entry 1 \(trace\).*beyond the table"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_images(name: str) -> None:
    image, message = REFUSED[name]
    with pytest.raises(ImageError, match=message):
        decode_elf_untrusted(image)


@pytest.mark.parametrize("name", TABLE_REFUSED)
def test_refused_tables(name: str) -> None:
    sections, message = TABLE_REFUSED[name]
    with pytest.raises(ResourceTableError, match=message):
        decode_elf_untrusted(build(sections=sections))


@pytest.mark.parametrize("field", ["sh_size", "sh_offset"])
def test_a_table_beyond_the_file_is_a_truncated_image(field: str) -> None:
    with pytest.raises(ImageError, match=r"section 1 \(.resource_table\).*image is truncated"):
        decode_elf_untrusted(build(sections=table_section(**{field: 0xFFFF_FFFF})))


def test_a_table_in_the_zero_fill_of_its_segment_is_not_seen() -> None:
    loads = [load(0x1000, CODE, p_memsz=0x2000)]
    sections = [section(".resource_table", None, TABLE_BYTES, sh_addr=0x1800)]
    with pytest.raises(ResourceTableError, match=r"not in a loaded segment"):
        decode_elf_untrusted(build(loads, sections))


def test_a_table_that_begins_before_its_segment_is_not_seen() -> None:
    at = build([load(0x2000, TABLE_BYTES)], []).index(TABLE_BYTES)
    size = len(TABLE_BYTES) - 8
    tail = {"p_vaddr": 0x2008, "p_paddr": 0x2008, "p_offset": at + 8}
    loads = [load(0x2000, TABLE_BYTES, **tail, p_filesz=size, p_memsz=size)]
    sections = [section(".resource_table", 0, sh_offset=at)]
    with pytest.raises(ResourceTableError, match=r"not in a loaded segment"):
        decode_elf_untrusted(build(loads, sections))


def test_a_bad_table_in_a_good_image_is_the_tables_error() -> None:
    bad = TABLE_BYTES[:4] + b"\xff" + TABLE_BYTES[5:]
    with pytest.raises(ResourceTableError, match=r"offsets of 255 entries"):
        decode_elf_untrusted(build([load(0x1000, CODE), load(0x2000, bad)]))


# Hostile input


def decodes_or_refuses(image: bytes) -> None:
    """Decode; what is accepted must keep every promise, what is refused must say why."""
    try:
        firmware = decode_elf_untrusted(image)
    except (ImageError, ResourceTableError) as exc:
        str(exc).encode()
        return
    json.dumps(firmware.to_dict()).encode()
    assert 0 < len(firmware.segments) <= 1024
    end = 0
    for segment in firmware.segments:
        assert end <= segment.da
        assert 0 < segment.memory_size >= segment.file_size <= len(image)
        end = segment.da + segment.memory_size
    assert end <= 1 << firmware.elf_class
    assert (firmware.table is None) == (firmware.table_da is None)
    if firmware.table is not None and firmware.table_da is not None:
        home = [s for s in firmware.segments if 0 <= firmware.table_da - s.da < s.file_size]
        start = firmware.table_da - home[0].da
        loaded = home[0].data[start : start + firmware.table.length]
        assert decode_table_untrusted(bytes(loaded)) == firmware.table


@deterministic
@given(st.binary(max_size=300))
def test_any_bytes_decode_or_are_refused(image: bytes) -> None:
    decodes_or_refuses(image)


@deterministic
@given(st.sampled_from([1, 2]), st.binary(min_size=30, max_size=400))
def test_any_bytes_behind_a_good_start_decode_or_are_refused(class_: int, rest: bytes) -> None:
    decodes_or_refuses(b"\x7fELF" + bytes([class_, 1, 1]) + bytes(9) + rest)


bits = st.sampled_from([32, 64])
wild = st.sampled_from(
    [0, 1, 2, 3, 4, 0x34, 0x40, 0x7F, 0xFF, 0xFFF, 0x1000, 0x2000, 0x7FFF_FFFF, 0xFFFF_FFFF]
) | st.integers(0, 0xFFFF_FFFF)


@settings(derandomize=True, deadline=None, max_examples=1000)
@given(
    bits,
    st.dictionaries(st.sampled_from(EHDR), wild, max_size=2),
    st.dictionaries(st.sampled_from(PHDR[32]), wild, max_size=2),
    st.dictionaries(st.sampled_from(SHDR), wild, max_size=2),
    st.dictionaries(st.sampled_from(SHDR), wild, max_size=1),
)
def test_wrong_fields_decode_or_are_refused(
    bits: int,
    ehdr: dict[str, Any],
    phdr: dict[str, int],
    table: dict[str, int],
    names: dict[str, int],
) -> None:
    half = {name for name, code in zip(EHDR, "HHIIIIIHHHHHH", strict=True) if code == "H"}
    ehdr = {name: value & 0xFFFF if name in half else value for name, value in ehdr.items()}
    loads = [load(0x1000, CODE), Load(0x2000, TABLE_BYTES, phdr)]
    decodes_or_refuses(build(loads, table_section(**table), bits=bits, names=names, **ehdr))


@deterministic
@given(bits, st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8))
def test_damaged_images_decode_or_are_refused(bits: int, damage: list[tuple[int, int]]) -> None:
    image = bytearray(build(bits=bits))
    for position, value in damage:
        image[position % len(image)] = value
    decodes_or_refuses(bytes(image))


@pytest.mark.parametrize("bits", [32, 64])
def test_an_image_cut_anywhere_is_refused(bits: int) -> None:
    image = build(bits=bits)
    for length in range(len(image)):
        with pytest.raises(ImageError):
            decode_elf_untrusted(image[:length])
