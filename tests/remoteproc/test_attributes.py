"""Build attributes of ARM images: compilers' own, every architecture, bytes from anywhere."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py.remoteproc.attributes import decode_architecture_untrusted

ARCHITECTURE, PROFILE = 6, 7

# Of arm-none-eabi-gcc 12.2
COMPILED = {
    "v7-M": (
        "412c000000616561626900012200000005372d4d00060a074d09021204140115011703180119011a011e062201"
    ),
    "v8-M.main": (
        "4133000000616561626900012900000005382d4d2e4d41494e000611074d09031204140115011703"
        "180119011a011e0622012e01"
    ),
    "v7-A": (
        "4134000000616561626900012a00000005372d4100060a0741080109021204140115011703180119"
        "011a011e0622012a012c024403"
    ),
}


def attributes(content: bytes, *, vendor: bytes = b"aeabi\0", tag: int = 1) -> bytes:
    """A section with the attributes of a file."""
    inner = bytes([tag]) + struct.pack("<I", 5 + len(content)) + content
    return struct.pack("<I", 4 + len(vendor) + len(inner)) + vendor + inner


def section(*parts: bytes) -> bytes:
    return b"A" + b"".join(parts)


@pytest.mark.parametrize("name", COMPILED)
def test_what_a_compiler_writes(name: str) -> None:
    assert decode_architecture_untrusted(bytes.fromhex(COMPILED[name])) == name


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ([ARCHITECTURE, 2], "v4T"),
        ([ARCHITECTURE, 10], "v7"),
        ([ARCHITECTURE, 10, PROFILE, ord("R")], "v7-R"),
        ([PROFILE, ord("M"), ARCHITECTURE, 10], "v7-M"),
        ([ARCHITECTURE, 13, PROFILE, ord("M")], "v7E-M"),
        ([ARCHITECTURE, 21], "v8.1-M.main"),
        ([ARCHITECTURE, 10, ARCHITECTURE, 11], "v6-M"),
        ([ARCHITECTURE, 0x8A, 0x00], "v7"),
        ([], None),
        ([PROFILE, ord("M")], None),
        ([ARCHITECTURE, 99], None),
        ([ARCHITECTURE], None),
    ],
)
def test_architectures(content: list[int], name: str | None) -> None:
    assert decode_architecture_untrusted(section(attributes(bytes(content)))) == name


@pytest.mark.parametrize("text", [b"\x04\x01", b"\x05\x01", b"\x43\x01", b"\x20\x01"])
def test_attributes_with_text_are_stepped_over(text: bytes) -> None:
    """Taken for numbers, these would say v4T."""
    content = b"\x06\x0b" + text + b"\x06\x02\0"
    assert decode_architecture_untrusted(section(attributes(content))) == "v6-M"
    assert decode_architecture_untrusted(section(attributes(text + b"CORTEX"))) is None


def test_attributes_of_other_vendors_are_stepped_over() -> None:
    other = attributes(b"\x06\x0b", vendor=b"gnu\0")
    assert decode_architecture_untrusted(section(other)) is None
    assert decode_architecture_untrusted(section(other, attributes(b"\x06\x02"))) == "v4T"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"A",
        b"B" + attributes(b"\x06\x0b"),
        b"A\0\0\0\0aeabi\0",
        b"A\x03\0\0\0",
        section(attributes(b"\x06\x0b", tag=2)),
        b"A\x0a\0\0\0aeabi\0",
        b"A\xff\xff\xff\xffaeabi",
    ],
)
def test_what_is_malformed_says_nothing(data: bytes) -> None:
    assert decode_architecture_untrusted(data) is None


@settings(derandomize=True, deadline=None, max_examples=400)
@given(st.binary(max_size=64), st.booleans())
def test_any_bytes_give_an_architecture_or_none(data: bytes, framed: bool) -> None:
    found = decode_architecture_untrusted(section(attributes(data)) if framed else data)
    assert found is None or found.startswith("v")
