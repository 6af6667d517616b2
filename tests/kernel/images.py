"""Firmware for the remote processor of the guest."""

from __future__ import annotations

import struct

from openamp_py import encode_table
from openamp_py.constants import DA_ANY, RPMSG_F_NS, VIRTIO_ID_RPMSG
from openamp_py.remoteproc.resource_table import (
    Entry,
    Trace,
    Vdev,
    Vring,
    place_entries,
)

CODE_DA = 0x1000_0000
TABLE_DA = 0x1000_1000
TRACE_DA = 0x1000_2000
TRACE_SIZE = 0x400
"""Where things are in the core's memory, which the driver puts at CODE_DA."""

CODE = bytes(range(256)) * 4

_CODE_AT = 52 + 2 * 32  # the ELF header, two program headers
TABLE_AT = _CODE_AT + len(CODE)
"""Where the table is in the file."""


def rpmsg_vdev(num: int = 256) -> Vdev:
    """The RPMsg device, whose vrings the host places."""
    vring = Vring(da=DA_ANY, align=0x1000, num=num, notify_id=DA_ANY)
    return Vdev(VIRTIO_ID_RPMSG, DA_ANY, RPMSG_F_NS, vrings=(vring, vring))


def make_table(*entries: Entry, num: int = 256) -> bytes:
    """A resource table, by default with a trace buffer and an RPMsg device."""
    entries = entries or (Trace(TRACE_DA, TRACE_SIZE, "trace0"), rpmsg_vdev(num))
    return encode_table(place_entries(entries))


def make_image(table: bytes | None = None) -> bytes:
    """A 32-bit ELF: some bytes of code, and a resource table."""
    table = make_table() if table is None else table
    names = b"\0.resource_table\0.shstrtab\0"
    names_at = TABLE_AT + len(table)
    # e_ident, then type (EXEC), machine (ARM), version, entry, phoff, shoff, flags, ehsize,
    # phentsize, phnum, shentsize, shnum, shstrndx
    head = b"\x7fELF\1\1\1" + bytes(9)
    counts = (52, 32, 2, 40, 3, 2)
    head += struct.pack("<HHIIIIIHHHHHH", 2, 40, 1, CODE_DA, 52, names_at + len(names), 0, *counts)
    # type (LOAD), offset, vaddr, paddr, filesz, memsz, flags, align
    head += struct.pack("<8I", 1, _CODE_AT, CODE_DA, CODE_DA, len(CODE), 0x1000, 5, 4)
    head += struct.pack("<8I", 1, TABLE_AT, TABLE_DA, TABLE_DA, len(table), len(table), 6, 4)
    # name, type, flags, addr, offset, size, link, info, addralign, entsize
    sections = bytes(40)
    sections += struct.pack("<10I", 1, 1, 3, TABLE_DA, TABLE_AT, len(table), 0, 0, 4, 0)
    sections += struct.pack("<10I", 17, 3, 0, 0, names_at, len(names), 0, 0, 1, 0)
    return head + CODE + table + names + sections
