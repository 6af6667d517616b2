"""What the build attributes of an ARM image say of the processor that it is built for.

Reference: Addenda to, and errata in, the ABI for the Arm architecture, section 3 (Build
Attributes).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

ARM_ATTRIBUTES: Final = 0x7000_0003
"""Type of the section that holds them (SHT_ARM_ATTRIBUTES)."""

_FORMAT: Final = b"A"
_VENDOR: Final = b"aeabi\0"
_TAG_FILE: Final = 1
_SIZE: Final = 4  # of a length, u32
_HEADER: Final = 1 + _SIZE  # of the attributes of a file: tag, length

_TAG_CPU_ARCH: Final = 6
_TAG_CPU_ARCH_PROFILE: Final = 7
_TAG_COMPATIBILITY: Final = 32  # a number and a string
_TEXT_TAGS: Final = (4, 5)  # below 32; above, odd ones are

_ARCHITECTURES: Final[Mapping[int, str]] = {
    1: "v4",
    2: "v4T",
    3: "v5T",
    4: "v5TE",
    5: "v5TEJ",
    6: "v6",
    7: "v6KZ",
    8: "v6T2",
    9: "v6K",
    10: "v7",
    11: "v6-M",
    12: "v6S-M",
    13: "v7E-M",
    14: "v8-A",
    15: "v8-R",
    16: "v8-M.base",
    17: "v8-M.main",
    18: "v8.1-A",
    19: "v8.2-A",
    20: "v8.3-A",
    21: "v8.1-M.main",
    22: "v9-A",
}
_V7: Final = 10
_PROFILES: Final = {ord("A"): "-A", ord("R"): "-R", ord("M"): "-M"}


def decode_architecture_untrusted(section: bytes) -> str | None:
    """Read the processor architecture out of build attributes from anywhere.

    Returns:
        As in "v7-M", or None where they are malformed or do not say.
    """
    if not section.startswith(_FORMAT):
        return None
    at = len(_FORMAT)
    while (length := _length(section, at)) >= _SIZE:
        body = section[at + _SIZE : at + length]
        if body.startswith(_VENDOR):
            return _decode_file(body[len(_VENDOR) :])
        at += length
    return None


def _length(data: bytes, at: int) -> int:
    """Of what begins there; 0 beyond the end."""
    return int.from_bytes(data[at : at + _SIZE], "little")


def _decode_file(body: bytes) -> str | None:
    """The attributes of the whole file come first."""
    if body[:1] != bytes([_TAG_FILE]):
        return None
    length = _length(body, 1)
    values = dict(_attributes(body[_HEADER:length]))
    architecture = values.get(_TAG_CPU_ARCH, 0)
    name = _ARCHITECTURES.get(architecture)
    if name is None or architecture != _V7:
        return name
    return name + _PROFILES.get(values.get(_TAG_CPU_ARCH_PROFILE, 0), "")


def _attributes(data: bytes) -> Iterator[tuple[int, int]]:
    """Tags and values of those with numbers, up to the end or to the first that is cut off."""
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        text = tag in _TEXT_TAGS if tag < _TAG_COMPATIBILITY else tag % 2 == 1
        if not text:
            value, at = _number(data, at)
            yield tag, value
        if text or tag == _TAG_COMPATIBILITY:
            end = data.find(b"\0", at)
            at = end + 1 if end >= 0 else len(data)


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A ULEB128 number, and where it ends; what a cut off one has is its value."""
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        if shift < 64:  # more is no tag and no value that is looked at
            value |= (byte & 0x7F) << shift
            shift += 7
        if byte < 0x80:
            break
    return value, at
