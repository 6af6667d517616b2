"""Lint: one broken image for each kind of fault, and nothing to say about a sound one."""

from __future__ import annotations

import base64
import gzip
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py.constants import DA_ANY, NOTIFY_ID_ANY
from openamp_py.errors import FirmwareError
from openamp_py.firmware import path
from openamp_py.remoteproc.elf import decode_elf_untrusted
from openamp_py.remoteproc.images import decode_image_untrusted
from openamp_py.remoteproc.lint import (
    MAX_FINDINGS,
    RULES,
    Severity,
    lint_firmware,
)
from openamp_py.remoteproc.resource_table import (
    Carveout,
    DevMem,
    Entry,
    Trace,
    Unknown,
    Vdev,
    Vendor,
    Vring,
    encode_table,
)

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "linux"
SHIPPED = path("echo-native.elf").read_bytes()

# A 32-bit image by hand: code, then a segment with the table, then zeros behind it.
CODE_DA, DATA_DA, DATA_SIZE = 0x1000_0000, 0x1001_0000, 0x8000
PHOFF, PHSIZE, TABLE_AT, SHSIZE = 52, 32, 52 + 2 * 32 + 16, 40
NAMES = b"\0.resource_table\0.shstrtab\0"
RAM = [(CODE_DA, 0x10_0000)]

ANY_VRING = Vring(DA_ANY, 4096, 16, NOTIFY_ID_ANY)
VDEV = Vdev(7, NOTIFY_ID_ANY, 1, vrings=(ANY_VRING, ANY_VRING))
FREE_DA = 0x1004_0000
"""Memory of the core that no segment has."""


def image(*entries: Entry, table: bytes | None = None) -> bytes:
    """A sound image with this table."""
    words = encode_table(entries or (VDEV,)) if table is None else table
    names_at = TABLE_AT + len(words)
    shoff = names_at + len(NAMES)
    header = b"\x7fELF\1\1\1" + bytes(9)
    header += struct.pack("<HHIIIIIHHHHHH", 2, 40, 1, CODE_DA, PHOFF, shoff, 0, 52, 32, 2, 40, 3, 2)
    phdrs = struct.pack("<8I", 1, TABLE_AT - 16, CODE_DA, CODE_DA, 16, 16, 5, 4)
    size = len(words)
    phdrs += struct.pack("<8I", 1, TABLE_AT, DATA_DA, DATA_DA, size, max(DATA_SIZE, size), 6, 4)
    shdrs = bytes(SHSIZE)
    shdrs += struct.pack("<10I", 1, 1, 3, DATA_DA, TABLE_AT, size, 0, 0, 4, 0)
    shdrs += struct.pack("<10I", 17, 3, 0, 0, names_at, len(NAMES), 0, 0, 1, 0)
    return header + phdrs + bytes(16) + words + NAMES + shdrs


def patched(raw: bytes, *changes: tuple[int, int], layout: str = "<I") -> bytes:
    changed = bytearray(raw)
    for at, value in changes:
        struct.pack_into(layout, changed, at, value)
    return bytes(changed)


def header(at: int, value: int, layout: str = "<H") -> bytes:
    return patched(image(), (at, value), layout=layout)


def phdr(number: int, field: int, value: int) -> bytes:
    return patched(image(), (PHOFF + PHSIZE * number + 4 * field, value))


def shdr(number: int, field: int, value: int) -> bytes:
    raw = image()
    return patched(raw, (len(raw) - SHSIZE * (3 - number) + 4 * field, value))


def table(
    *changes: tuple[int, int], entries: tuple[Entry, ...] = (VDEV,), layout: str = "<I"
) -> bytes:
    return patched(
        image(*entries), *((TABLE_AT + at, value) for at, value in changes), layout=layout
    )


def vdev(*vrings: Vring, **fields: Any) -> bytes:
    return image(Vdev(**({"id": 7, "notify_id": 9, "device_features": 1} | fields), vrings=vrings))


def memory(da: int, length: int, name: str) -> Carveout:
    return Carveout(da, DA_ANY, length, 0, name)


BUFFERS = 2 * 16 * 512
TWO_SECTIONS = patched(image(), (len(image()) - SHSIZE, 1))
ANY_PAIR = (ANY_VRING, ANY_VRING)
TRACE = Trace(DATA_DA + 0x1000, 64, "trace0")

BROKEN: dict[str, tuple[bytes, str]] = {
    "no image": (b"hello", "image-format"),
    "empty": (b"", "image-format"),
    "cut hex": (b":04000000010203", "image-format"),
    "a few bytes of ELF": (SHIPPED[:8], "image-format"),
    "class": (header(4, 3, "<B"), "elf-class"),
    "big endian": (header(5, 2, "<B"), "elf-big-endian"),
    "header cut": (image()[:40], "truncated"),
    "e_ehsize": (header(40, 64), "elf-header"),
    "e_phentsize": (header(42, 56), "elf-header no-segments table-not-loaded"),
    "e_shentsize": (header(46, 64), "elf-header section-names"),
    "relocatable": (header(16, 1), "elf-type"),
    "e_phnum 0": (header(44, 0), "no-segments table-not-loaded"),
    "e_phnum": (header(44, 2000), "too-many-segments truncated"),
    "e_phoff": (header(28, 0xFFFF_0000, "<I"), "truncated no-segments table-not-loaded"),
    "filesz": (phdr(0, 5, 8), "filesz-over-memsz"),
    "segment beyond the file": (phdr(0, 1, 0xFFFF_0000), "truncated"),
    "segment wraps": (phdr(1, 5, 0xFFFF_0000), "segment-wraps"),
    "segments overlap": (phdr(0, 5, 0x2_0000), "segments-overlap"),
    "entry": (header(24, DATA_DA, "<I"), "entry-not-executable"),
    "no code": (phdr(0, 6, 4), "entry-not-executable"),
    "p_vaddr": (phdr(0, 2, 0x2000_0000), "paddr-vaddr"),
    "no sections": (header(32, 0, "<I"), "no-table"),
    "sections without names": (header(50, 0), "no-table"),
    "no table's section": (patched(image(), (image().index(NAMES) + 1, 0x6261)), "no-table"),
    "e_shnum 0": (header(48, 0), "section-names"),
    "e_shstrndx": (header(50, 3), "section-names"),
    "sh_name": (shdr(1, 0, 0x1000), "section-names no-table"),
    "two tables": (shdr(2, 0, 1), "two-tables"),
    "nobits": (shdr(1, 1, 8), "table-nobits"),
    "section beyond the file": (
        shdr(1, 4, 0xFFFF_0000),
        "truncated table-not-loaded table-truncated no-vdev",
    ),
    "not at its address": (shdr(1, 3, 0x2000), "table-not-loaded"),
    "table at an odd address": (
        patched(
            phdr(1, 2, DATA_DA + 2),
            (PHOFF + PHSIZE + 12, DATA_DA + 2),
            (len(image()) - 2 * SHSIZE + 12, DATA_DA + 2),
        ),
        "table-misaligned",
    ),
    "read-only": (phdr(1, 6, 4), "table-read-only"),
    "table of 80 KiB": (image(VDEV, Unknown(9, bytes(0x1_4000))), "table-too-large unknown-entry"),
    "table of 8 bytes": (image(table=bytes(8)), "table-truncated no-vdev"),
    "offsets beyond": (table((4, 100)), "table-truncated no-vdev"),
    "version": (table((0, 2)), "table-version"),
    "table reserved": (table((12, 1)), "table-reserved"),
    "num": (table((4, 1 << 30)), "too-many-entries no-vdev"),
    "offset in the header": (table((16, 16)), "entry-offset no-vdev"),
    "offset beyond": (table((16, 0xFFFF_FFF0)), "entry-offset no-vdev"),
    "trace unaligned": (
        image(
            table=struct.pack("<6I", 1, 2, 0, 0, 76, 26)
            + b".."
            + encode_table([TRACE])[20:]
            + b".."
            + encode_table([VDEV])[20:]
        ),
        "entry-unaligned",
    ),
    "vdev unaligned": (
        image(table=struct.pack("<5I", 1, 1, 0, 0, 22) + b".." + encode_table([VDEV])[20:]),
        "vdev-unaligned",
    ),
    "carveout cut": (
        image(table=encode_table([VDEV, memory(DA_ANY, 9, "c")])[:-4]),
        "entry-truncated",
    ),
    "devmem cut": (
        image(table=encode_table([VDEV, DevMem(0, 0, 9, 0, "d")])[:-4]),
        "entry-truncated",
    ),
    "trace cut": (image(table=encode_table([VDEV, TRACE])[:-4]), "entry-truncated"),
    "vdev cut": (image(table=encode_table([VDEV])[:40]), "entry-truncated no-vdev"),
    "vring cut": (image(table=encode_table([VDEV])[:-4]), "entry-truncated"),
    "config beyond": (table((20 + 20, 0xFFFF_FF00)), "entry-truncated"),
    "entries overlap": (
        table((20, 24 + 8), entries=(VDEV, TRACE)),
        "entries-overlap unknown-entry",
    ),
    "carveout reserved": (
        table((24 + 20, 1), entries=(memory(DA_ANY, 9, "c"), VDEV)),
        "entry-reserved",
    ),
    "trace reserved": (table((24 + 12, 1), entries=(TRACE, VDEV)), "entry-reserved"),
    "vdev reserved": (table((20 + 26, 1), layout="<H"), "entry-reserved"),
    "unknown": (image(VDEV, Unknown(9, b"")), "unknown-entry"),
    "rproc_mem": (image(VDEV, Unknown(4, bytes(16))), "historical-entry"),
    "fw_chksum": (image(VDEV, Unknown(5, bytes(80))), "historical-entry"),
    "vendor": (image(VDEV, Vendor.of(128, b"data")), "vendor-entry"),
    "vendor without a length": (image(VDEV, Vendor(128, b"data")), "vendor-entry vendor-no-length"),
    "devmem": (image(VDEV, DevMem(0, 0, 9, 0, "d")), "devmem"),
    "carveout's name": (image(VDEV, memory(DA_ANY, 9, "c" * 32)), "name-not-terminated"),
    "trace's name": (image(VDEV, replace(TRACE, name="c" * 32)), "name-not-terminated"),
    "carveouts of one name": (image(VDEV, *[memory(DA_ANY, 9, "c")] * 3), "name-duplicate"),
    "traces of one name": (image(VDEV, TRACE, TRACE), "name-duplicate"),
    "empty carveout": (image(VDEV, memory(DA_ANY, 0, "c")), "carveout-empty"),
    "carveouts overlap": (
        image(VDEV, memory(FREE_DA, 0x1000, "a"), memory(FREE_DA + 0x800, 0x1000, "b")),
        "carveouts-overlap",
    ),
    "carveout cuts a segment": (image(VDEV, memory(DATA_DA, 0x1000, "a")), "carveout-cuts-segment"),
    "vring in the table": (vdev(ANY_VRING, Vring(DATA_DA, 4096, 16, 2)), "memory-overlaps-image"),
    "buffers in the code": (
        image(VDEV, memory(CODE_DA, BUFFERS, "vdev0buffer")),
        "memory-overlaps-image",
    ),
    "trace any": (image(VDEV, replace(TRACE, da=DA_ANY)), "trace-any"),
    "trace empty": (image(VDEV, replace(TRACE, length=0)), "trace-empty"),
    "trace outside": (image(VDEV, replace(TRACE, da=FREE_DA)), "trace-outside"),
    "no vdev": (image(TRACE), "no-vdev"),
    "0 vrings": (vdev(), "rpmsg-vrings"),
    "1 vring": (vdev(ANY_VRING), "rpmsg-vrings"),
    "3 vrings": (vdev(*ANY_PAIR, ANY_VRING), "rpmsg-vrings"),
    "3 vrings of another device": (vdev(*ANY_PAIR, ANY_VRING, id=3), "vdev-vrings"),
    "no name service": (vdev(*ANY_PAIR, device_features=0), "no-name-service"),
    "event idx": (vdev(*ANY_PAIR, device_features=1 | 1 << 29), "event-idx"),
    "status": (vdev(*ANY_PAIR, status=4), "status-preset"),
    "accepted": (vdev(*ANY_PAIR, driver_features=1), "status-preset"),
    "notify ids": (
        vdev(replace(ANY_VRING, notify_id=1), replace(ANY_VRING, notify_id=1)),
        "notify-id-duplicate",
    ),
    "notify ids of two devices": (image(*[replace(VDEV, notify_id=5)] * 3), "notify-id-duplicate"),
    "a ring where another is placed": (
        image(
            memory(FREE_DA, 0x2000, "vdev0vring1"),
            replace(VDEV, vrings=(replace(ANY_VRING, da=FREE_DA), ANY_VRING)),
        ),
        "rings-overlap",
    ),
    "carveouts that do not share": (
        image(VDEV, memory(FREE_DA, 0x10, "pool"), memory(FREE_DA, 0x20, "pool")),
        "carveout-shared name-duplicate",
    ),
    "num 0": (vdev(ANY_VRING, replace(ANY_VRING, num=0)), "vring-num"),
    "num 17": (vdev(ANY_VRING, replace(ANY_VRING, num=17)), "vring-num"),
    "num 65536": (vdev(ANY_VRING, replace(ANY_VRING, num=65536)), "vring-num"),
    "align 0": (vdev(ANY_VRING, replace(ANY_VRING, align=0)), "vring-align"),
    "align 12": (vdev(ANY_VRING, replace(ANY_VRING, align=12)), "vring-align"),
    "align 2": (vdev(ANY_VRING, replace(ANY_VRING, align=2)), "vring-align"),
    "vring misaligned": (vdev(ANY_VRING, Vring(FREE_DA + 0x800, 4096, 16, 1)), "vring-misaligned"),
    "descriptors misaligned": (vdev(ANY_VRING, Vring(FREE_DA + 4, 4, 16, 1)), "vring-misaligned"),
    "vring at 0": (vdev(ANY_VRING, Vring(0, 4096, 16, 1)), "vring-zero"),
    "vring's carveout small": (
        image(VDEV, memory(DA_ANY, 0x1000, "vdev0vring1")),
        "vring-carveout",
    ),
    "vring's fixed carveout small": (
        image(VDEV, memory(FREE_DA, 0x1000, "vdev0vring1")),
        "vring-carveout",
    ),
    "vring's carveout elsewhere": (
        image(
            memory(FREE_DA, 0x2000, "vdev0vring1"),
            replace(VDEV, vrings=(ANY_VRING, Vring(FREE_DA + 0x4000, 4096, 16, 1))),
        ),
        "vring-carveout",
    ),
    "vring fixed, its carveout anywhere": (
        image(
            memory(DA_ANY, 0x2000, "vdev0vring1"),
            replace(VDEV, vrings=(ANY_VRING, Vring(FREE_DA, 4096, 16, 1))),
        ),
        "vring-carveout",
    ),
    "vrings overlap": (
        vdev(Vring(FREE_DA, 4096, 16, 1), Vring(FREE_DA + 0x1000, 4096, 16, 2)),
        "rings-overlap",
    ),
    "a vring in the buffers": (
        image(
            memory(FREE_DA, BUFFERS, "vdev0buffer"),
            replace(VDEV, vrings=(ANY_VRING, Vring(FREE_DA + 0x1000, 4096, 16, 1))),
        ),
        "rings-overlap",
    ),
    "buffers": (image(VDEV, memory(DA_ANY, BUFFERS - 1, "vdev0buffer")), "buffers-do-not-fit"),
    "fixed buffers": (
        image(VDEV, memory(FREE_DA, BUFFERS - 1, "vdev0buffer")),
        "buffers-do-not-fit",
    ),
}

OUTSIDE: dict[str, bytes] = {
    "segment": patched(phdr(0, 3, 0x4000_0000), (PHOFF + 8, 0x4000_0000), (24, 0x4000_0000)),
    "carveout": image(VDEV, memory(0x4000_0000, 9, "c")),
    "trace": image(VDEV, memory(0x1000_8000, 64, "c"), replace(TRACE, da=0x1000_8000)),
    "vring": vdev(ANY_VRING, Vring(0x4000_0000, 4096, 16, 1)),
}


def codes(raw: bytes, **ram: list[tuple[int, int]]) -> list[str]:
    return [finding.code for finding in lint_firmware(raw, **ram)]


# Normal


@pytest.mark.parametrize(
    "sound",
    [
        SHIPPED,
        image(),
        image(VDEV, VDEV, TRACE, memory(DA_ANY, 0x1000, "heap")),
        image(VDEV, memory(DA_ANY, BUFFERS, "vdev0buffer"), memory(FREE_DA, 0x2000, "vdev0vring0")),
        image(VDEV, memory(CODE_DA, 0x10_0000, "all"), memory(FREE_DA, 0x1000, "inner")),
        vdev(Vring(FREE_DA, 4096, 16, 1), Vring(DATA_DA + 0x2000, 4096, 16, 2)),
        vdev(*ANY_PAIR, id=3, device_features=0),
    ],
)
def test_a_sound_image_is_clean(sound: bytes) -> None:
    assert codes(sound) == []


def test_the_shipped_firmware_is_clean_in_its_memory() -> None:
    assert codes(SHIPPED, ram=[(0x2000_0000, 16 << 20)]) == []


@pytest.mark.parametrize("name", BROKEN)
def test_one_fault_is_one_finding(name: str) -> None:
    raw, expected = BROKEN[name]
    assert sorted(codes(raw)) == sorted(expected.split())


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_lies_outside_the_memory_of_the_core(name: str) -> None:
    assert codes(OUTSIDE[name]) == []
    assert codes(OUTSIDE[name], ram=RAM) == (["outside-ram"] if name != "trace" else [])
    assert codes(OUTSIDE[name], ram=[]).count("outside-ram") >= 2


def test_every_rule_has_a_broken_image() -> None:
    seen = {code for _, expected in BROKEN.values() for code in expected.split()}
    assert set(RULES) - seen == {"outside-ram", "refused", "more-findings"}


def test_all_faults_are_found_at_once_and_the_worst_come_first() -> None:
    raw = image(
        Vdev(7, 5, 1 << 29, status=4, vrings=(Vring(0x10, 3, 5, 5), Vring(DA_ANY, 4, 0, 5))),
        replace(TRACE, da=DA_ANY, length=0),
        Unknown(9, b""),
    )
    findings = lint_firmware(patched(raw, (TABLE_AT, 7)))
    order = [finding.severity for finding in findings]
    assert order == sorted(order, key=list(Severity).index)
    assert {finding.code for finding in findings} == {
        "table-version", "vring-align", "vring-num", "event-idx", "status-preset",
        "notify-id-duplicate", "trace-any", "trace-empty", "no-name-service", "unknown-entry",
    }  # fmt: skip


def test_a_finding_says_where_what_why_and_the_cure() -> None:
    (finding,) = lint_firmware(BROKEN["num 17"][0])
    plain = json.loads(json.dumps(finding.to_dict()))
    assert plain.pop("why") and plain.pop("cure")
    assert plain == {
        "code": "vring-num",
        "severity": "error",
        "where": "table entry 0 (vdev) at 0x14, vring 1",
        "what": "num 17 is no power of two up to 32768",
    }


def test_a_format_without_a_table() -> None:
    assert codes(b":0100000078" + b"87\n:00000001FF\n") == ["no-table"]


# Against decoding, and against Linux


@pytest.mark.parametrize("name", BROKEN)
def test_errors_are_what_decoding_refuses_and_what_cannot_be_placed(name: str) -> None:
    raw, expected = BROKEN[name]
    errors = {code for code in expected.split() if RULES[code].severity is Severity.ERROR}
    placing = {
        "buffers-do-not-fit", "memory-overlaps-image", "rings-overlap", "table-misaligned",
        "table-too-large", "vring-carveout", "carveout-shared",
    }  # fmt: skip
    try:
        decode_image_untrusted(raw)
    except FirmwareError:
        assert errors - placing
    else:
        assert not errors - placing


@pytest.mark.parametrize(
    ("vdev_id", "ids", "name"),
    [(0, (0, 1), "STM32Cube and Zephyr"), (0, (1, 2), "OpenAMP's demos"), (1, (0, 1), "others")],
)
def test_the_ids_of_usual_tables_are_clean(vdev_id: int, ids: tuple[int, int], name: str) -> None:
    vrings = (replace(ANY_VRING, notify_id=number) for number in ids)
    assert codes(vdev(*vrings, notify_id=vdev_id)) == [], name


def test_a_vring_lies_in_the_first_carveout_of_its_name() -> None:
    """As `plan_load` places it; the others of that name only have to lie in that one."""
    at = DATA_DA + 0x4000
    entries = [memory(at, length, "vdev0vring0") for length in (0x4000, 0x100)]
    assert codes(image(VDEV, *entries)) == ["name-duplicate"]
    assert "vring-carveout" in codes(image(VDEV, *reversed(entries)))


@pytest.mark.parametrize(
    ("first", "second", "is_good"),
    [
        ((FREE_DA, 0x20), (FREE_DA + 0x10, 0x10), True),
        ((FREE_DA, 0x20), (FREE_DA + 0x20, 0x10), False),
        ((FREE_DA, 0x20), (DA_ANY, 0x20), True),
        ((FREE_DA, 0x20), (DA_ANY, 0x30), False),
        ((DA_ANY, 0x20), (FREE_DA, 0x30), True),
        ((DA_ANY, 0x20), (FREE_DA, 0x10), False),
        ((DA_ANY, 0x20), (DA_ANY, 0x10), True),
        ((DA_ANY, 0x20), (DA_ANY, 0x30), False),
    ],
)
def test_carveouts_of_one_name_lie_in_one(
    first: tuple[int, int], second: tuple[int, int], is_good: bool
) -> None:
    raw = image(memory(*first, "pool"), memory(*second, "pool"), VDEV)
    assert ("carveout-shared" not in codes(raw)) is is_good


def test_golden_images() -> None:
    """What Linux refuses has an error here, but for what depends on its memory or its IOMMU."""
    lines = GOLDEN / "firmware.jsonl"
    if not lines.exists():
        pytest.skip(f"the golden data is not here: {lines}")
    memory_or_iommu = {"bad-segment-da", "table-not-in-memory", "devmem-entry", "no-table"}
    stricter = {"vring-num17", "vrings0", "vrings1", "bad-vring-num0", "bad-vring-align0"}
    for line in lines.read_text().splitlines():
        golden = json.loads(line)
        raw = gzip.decompress(base64.b64decode(golden["elf_gzip_base64"]))
        failed = any(finding.severity is Severity.ERROR for finding in lint_firmware(raw))
        name = golden["name"]
        refused = golden["start"] != "ok" and name not in memory_or_iommu
        assert failed == (refused or name in stricter), name
        if name in ("good", "good-num256", "machine-riscv"):
            assert not any(f.severity is Severity.WARNING for f in lint_firmware(raw)), name
    assert "outside-ram" in codes(golden_image("bad-segment-da"), ram=[(0x1000_0000, 0x10000)])
    assert "outside-ram" in codes(golden_image("table-not-in-memory"), ram=[(0x1000_0000, 0x10000)])


def golden_image(name: str) -> bytes:
    for line in (GOLDEN / "firmware.jsonl").read_text().splitlines():
        golden = json.loads(line)
        if golden["name"] == name:
            return gzip.decompress(base64.b64decode(golden["elf_gzip_base64"]))
    raise AssertionError(name)


# Hostile input


def test_no_more_is_read_of_a_long_table_than_a_host_reads() -> None:
    """Which bounds what 1024 vdevs of 255 vrings cost."""
    long = (Unknown(9, bytes(0x1_4000)), Vdev(9, 9, 0, vrings=(ANY_VRING,) * 3))
    assert codes(image(VDEV, *long)) == ["table-too-large", "entry-offset", "unknown-entry"]


def test_the_number_of_findings_is_bounded() -> None:
    raw = image(VDEV, *[Unknown(9, b"")] * 1000)
    found = codes(raw)
    assert len(found) == MAX_FINDINGS + 1
    assert found[-1] == "more-findings"


def test_a_refused_image_has_an_error_however_much_else_is_wrong() -> None:
    raw = image(*[Unknown(9, b"")] * 1000, Trace(0, 0, "t"))
    at = raw.index(b"t".ljust(32, b"\0")) - 4
    raw = patched(raw, (at, 1))
    with pytest.raises(FirmwareError):
        decode_elf_untrusted(raw)
    assert codes(raw)[0] == "refused"


deterministic = settings(derandomize=True, deadline=None, max_examples=300)


@deterministic
@given(
    st.sampled_from([image(), image(VDEV, TRACE, memory(DA_ANY, 9, "c"), Vendor(128, b""))]),
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=6),
    st.integers(0, 600),
)
def test_any_damage_gives_findings(raw: bytes, damage: list[tuple[int, int]], end: int) -> None:
    changed = bytearray(raw)
    for at, value in damage:
        changed[at % len(changed)] = value
    for shape in (bytes(changed), bytes(changed[:end])):
        findings = lint_firmware(shape, ram=RAM)
        json.dumps([finding.to_dict() for finding in findings]).encode()
        assert refusal(shape) <= any(f.severity is Severity.ERROR for f in findings)


def refusal(raw: bytes) -> bool:
    try:
        decode_image_untrusted(raw)
    except FirmwareError:
        return True
    return False


@deterministic
@given(st.binary(max_size=300))
def test_any_bytes_are_a_table(words: bytes) -> None:
    lint_firmware(image(table=words), ram=[])
