"""Hostile firmware: every field of the shipped image made wrong, and what loading then touches.

The only outcomes are success and the documented errors, and nothing outside the core's two
regions is ever written; nothing at all where loading was refused.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py.errors import FirmwareError
from openamp_py.firmware import path
from openamp_py.memory import MemoryMap, Region
from openamp_py.platforms.native import RAM_DA
from openamp_py.remoteproc.elf import decode_elf_untrusted
from openamp_py.remoteproc.images import decode_image_untrusted
from openamp_py.remoteproc.lint import Severity, lint_firmware
from openamp_py.remoteproc.plan import plan_load

IMAGE = path("echo-native.elf").read_bytes()
WORDS = struct.Struct("<HHIQQQIHHHHHH").unpack_from(IMAGE, 16)
PHOFF, SHOFF, PHNUM, SHNUM = WORDS[4], WORDS[5], WORDS[9], WORDS[11]


def _table_at() -> tuple[int, int]:
    firmware = decode_elf_untrusted(IMAGE)
    assert firmware.table is not None
    return IMAGE.index(firmware.table.raw), firmware.table.length


TABLE_AT, TABLE_SIZE = _table_at()

# (offset in the file, bytes) of every field of a 64-bit ELF's headers and of the table
EHDR = [(4, 1), (5, 1), (6, 1)]
EHDR += [(16, 2), (18, 2), (20, 4), (24, 8), (32, 8), (40, 8), (48, 4)]
EHDR += [(at, 2) for at in range(52, 64, 2)]
PHDR = [(0, 4), (4, 4), *((at, 8) for at in range(8, 56, 8))]
SHDR = [(0, 4), (4, 4), (8, 8), (16, 8), (24, 8), (32, 8), (40, 4), (44, 4), (48, 8), (56, 8)]
FIELDS = [
    *EHDR,
    *((PHOFF + 56 * n + at, size) for n in range(PHNUM) for at, size in PHDR),
    *((SHOFF + 64 * n + at, size) for n in range(SHNUM) for at, size in SHDR),
]
TABLE_FIELDS = [
    *((TABLE_AT + at, 4) for at in range(0, TABLE_SIZE, 4)),
    *((TABLE_AT + at, 1) for at in range(TABLE_SIZE)),
]

# Two regions, each between guards; the first is where the image is linked.
GUARD, FIRST, SECOND = 0x1000, 0xF_0000, 0x1000
SECOND_DA = 0x8000_0000
BLANK = b"\xee" * (GUARD + FIRST + GUARD + SECOND + GUARD)

SIZES = (0, 1, 2, 3, 4, 7, 16, 17, 0x38, 0x40, 0xC8, 0xFF, 0xFFF, 0x1000, 0x3000, 0xFFFF, 0x10000)
PLACES = (RAM_DA, RAM_DA + FIRST - 1, SECOND_DA, SECOND_DA + SECOND - 4, SECOND_DA + SECOND)
LIMITS = (0x7FFF_FFFF, 0xFFFF_F000, 0xFFFF_FFFF, 1 << 32, 1 << 63, (1 << 64) - 1)
interesting = st.sampled_from([*SIZES, *PLACES, *LIMITS]) | st.integers(0, (1 << 64) - 1)

quick = settings(derandomize=True, deadline=None, max_examples=600)


class Board:
    """The memory of a core, with guards around its regions."""

    def __init__(self) -> None:
        self._memory = bytearray(BLANK)
        view = memoryview(self._memory)
        second = GUARD + FIRST + GUARD
        self.map = MemoryMap(
            [
                Region("ram", RAM_DA, RAM_DA, view[GUARD : GUARD + FIRST]),
                Region("tcm", SECOND_DA, 0x100, view[second : second + SECOND]),
            ]
        )

    def is_blank(self) -> bool:
        return self._memory == BLANK

    def guards_are_blank(self) -> bool:
        second = GUARD + FIRST
        guards = (0, second, second + GUARD + SECOND)
        return all(self._memory[at : at + GUARD] == BLANK[:GUARD] for at in guards)


def loads_or_refuses(image: bytes) -> bool:
    """Decode, plan and write; returns whether it was taken."""
    board = Board()
    try:
        firmware = decode_image_untrusted(image)
        plan = plan_load(firmware, board.map)
    except FirmwareError as error:
        str(error).encode()
        assert board.is_blank()
        return False
    assert board.is_blank(), "a plan writes nothing"
    plan.write(board.map)
    assert board.guards_are_blank()
    return True


def lints(image: bytes) -> None:
    """Findings and no exception; what decoding refuses is among the errors."""
    findings = lint_firmware(image, ram=[(RAM_DA, FIRST), (SECOND_DA, SECOND)])
    json.dumps([finding.to_dict() for finding in findings]).encode()
    try:
        decode_image_untrusted(image)
    except FirmwareError:
        assert any(finding.severity is Severity.ERROR for finding in findings)
        assert all(finding.code != "refused" for finding in findings), "a fault without a name"


def mutated(changes: list[tuple[tuple[int, int], int]]) -> bytes:
    image = bytearray(IMAGE)
    for (at, size), value in changes:
        image[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return bytes(image)


def changes_of(fields: list[tuple[int, int]]) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.tuples(st.sampled_from(fields), interesting), min_size=1, max_size=3)


def test_the_shipped_image_loads_between_the_guards() -> None:
    assert loads_or_refuses(IMAGE)


def test_a_board_notices_a_write_beyond_its_regions() -> None:
    board = Board()
    board._memory[GUARD - 1] = 0
    assert not board.guards_are_blank() and not board.is_blank()


def test_every_field_at_every_limit() -> None:
    """One wrong field at a time, with the values at which sums wrap and sizes end."""
    taken = 0
    for field in FIELDS:
        for value in (0, 1, 0xFFFF, 0xFFFF_FFFF, (1 << 64) - 1):
            taken += loads_or_refuses(mutated([(field, value)]))
    assert 0 < taken < 5 * len(FIELDS)


@quick
@given(changes_of(FIELDS))
def test_wrong_headers(changes: list[tuple[tuple[int, int], int]]) -> None:
    image = mutated(changes)
    loads_or_refuses(image)
    lints(image)


@quick
@given(changes_of(TABLE_FIELDS))
def test_wrong_tables(changes: list[tuple[tuple[int, int], int]]) -> None:
    image = mutated(changes)
    loads_or_refuses(image)
    lints(image)


@quick
@given(changes_of(FIELDS + TABLE_FIELDS), st.integers(0, len(IMAGE)))
def test_cut_images(changes: list[tuple[tuple[int, int], int]], end: int) -> None:
    image = mutated(changes)[:end]
    loads_or_refuses(image)
    lints(image)


@quick
@given(
    st.binary(max_size=400), st.sampled_from([b"", b"\x7fELF\2\1\1", b"\x7fELF\1\1\1", b":", b"S1"])
)
def test_any_bytes(image: bytes, head: bytes) -> None:
    loads_or_refuses(head + image)
    lints(head + image)
