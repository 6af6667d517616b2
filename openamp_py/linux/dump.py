"""Coredumps as the kernel's remoteproc makes them, read back into values.

Reference: System V ABI, chapters 4 and 5; Linux, ``remoteproc_coredump.c``.
"""

from __future__ import annotations

import struct
from typing import Final

from openamp_py.errors import PlatformError
from openamp_py.remoteproc.coredump import MAX_SEGMENTS, Coredump, DumpSegment

_IDENT: Final = 16  # EI_NIDENT
_MAGIC: Final = b"\x7fELF"
_LITTLE_ENDIAN: Final = 1  # ELFDATA2LSB
_ET_CORE: Final = 4
_PT_LOAD: Final = 1

# e_type u16, e_machine u16, e_version u32, e_entry, e_phoff, e_shoff, e_flags u32, e_ehsize u16,
# e_phentsize u16, e_phnum u16
_HEADERS: Final = {1: struct.Struct("<HHIIIIIHHH"), 2: struct.Struct("<HHIQQQIHHH")}

# p_type u32, p_offset, p_vaddr, p_paddr, p_filesz; in class 64 with p_flags u32 behind the type
_PROGRAMS: Final = {1: struct.Struct("<IIIII"), 2: struct.Struct("<I4xQQQQ")}


def decode_dump_untrusted(data: bytes) -> Coredump:
    """Read a coredump that the kernel made; segments of no size are left out.

    Raises:
        PlatformError: it is not one, or cut off.
    """
    if len(data) < _IDENT or not data.startswith(_MAGIC):
        raise PlatformError(f"the kernel's coredump of {len(data)} bytes is not an ELF file")
    kind, order = data[4], data[5]
    if kind not in _HEADERS or order != _LITTLE_ENDIAN:
        raise PlatformError(f"the kernel's coredump is of ELF class {kind}, byte order {order}")
    header, program = _HEADERS[kind], _PROGRAMS[kind]
    if len(data) < _IDENT + header.size:
        raise PlatformError(f"the kernel's coredump of {len(data)} bytes is cut off")
    fields = header.unpack_from(data, _IDENT)
    type_, machine, _, entry, offset, _, _, _, size, count = fields
    if type_ != _ET_CORE or (count and size < program.size) or count > MAX_SEGMENTS:
        raise PlatformError(
            f"the kernel's coredump has type {type_} and {count} program headers of {size} bytes"
        )
    if offset + count * size > len(data):
        raise PlatformError(
            f"the kernel's coredump of {len(data)} bytes is cut off: its {count} program headers "
            f"end at {offset + count * size}"
        )
    segments = []
    for number in range(count):
        found = program.unpack_from(data, offset + number * size)
        segment_type, start, _, da, length = found
        if segment_type != _PT_LOAD or not length:
            continue
        if start + length > len(data):
            raise PlatformError(
                f"the kernel's coredump of {len(data)} bytes is cut off: segment {number} ends "
                f"at {start + length}"
            )
        segments.append(DumpSegment(da, memoryview(data)[start : start + length]))
    return Coredump(machine=machine, elf_class=32 * kind, entry=entry, segments=tuple(segments))
