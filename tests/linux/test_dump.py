"""Coredumps of the kernel, read back; also those that are none."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openamp_py import Coredump, DumpSegment, PlatformError, encode_coredump
from openamp_py.linux.dump import decode_dump_untrusted

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "linux"


def encoded(elf_class: int = 32) -> bytes:
    segments = (DumpSegment(0x1000, b"first"), DumpSegment(0x2000_0000, b"second" * 100))
    return b"".join(encode_coredump(Coredump(40, elf_class, 0x1001, segments)))


@pytest.mark.parametrize("elf_class", [32, 64])
def test_what_the_kernel_writes_is_read_back(elf_class: int) -> None:
    dump = decode_dump_untrusted(encoded(elf_class))
    assert (dump.machine, dump.elf_class, dump.entry) == (40, elf_class, 0x1001)
    assert [(each.da, bytes(each.data)) for each in dump.segments] == [
        (0x1000, b"first"),
        (0x2000_0000, b"second" * 100),
    ]
    assert b"".join(encode_coredump(dump)) == encoded(elf_class)


def test_a_dump_without_segments() -> None:
    nothing = b"".join(encode_coredump(Coredump(40, 32, 0)))
    assert decode_dump_untrusted(nothing).segments == ()


def with_bytes(at: int, value: bytes) -> bytes:
    data = bytearray(encoded())
    data[at : at + len(value)] = value
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "0 bytes is not an ELF"),
        (b"\x7fELF\1", "5 bytes is not an ELF"),
        (encoded()[:30], "cut off"),
        (encoded()[:60], "program headers end at"),
        (encoded()[:-1], "segment 1 ends at"),
        (with_bytes(4, b"\3"), "class 3"),
        (with_bytes(5, b"\2"), "byte order 2"),
        (with_bytes(16, b"\2"), "type 2"),
        (with_bytes(42, b"\1\0"), "headers of 1 bytes"),
        (with_bytes(44, b"\xff\xff"), "65535 program headers"),
    ],
)
def test_what_is_no_dump_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(PlatformError, match=text):
        decode_dump_untrusted(data)


@given(st.binary(max_size=200), st.integers(0, 120))
def test_any_bytes_give_a_dump_or_the_error(noise: bytes, at: int) -> None:
    for data in (noise, with_bytes(at, noise)):
        try:
            dump = decode_dump_untrusted(data)
        except PlatformError:
            continue
        assert sum(each.size for each in dump.segments) <= len(data) * max(1, len(dump.segments))


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden set is not here")
@pytest.mark.parametrize("release", ["6.1.192", "7.3.4"])
def test_real_dumps(release: str) -> None:
    data = gzip.decompress((GOLDEN / f"core-{release}.elf.gz").read_bytes())
    dump = decode_dump_untrusted(data)
    assert dump.segments
    assert b"".join(encode_coredump(dump)) == data
