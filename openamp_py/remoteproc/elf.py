"""Firmware images: an ELF file, decoded into what is loaded, and where, and its table.

Every field is checked against the file before anything is read through it. Layouts and
names come from pyelftools: its structures only, for its file object also follows what no
firmware needs (and takes 20 ms to import where these take 8).

Reference: System V ABI, chapters 4 and 5; Linux, ``remoteproc_elf_loader.c``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Final, NamedTuple

from elftools.construct import Struct
from elftools.construct.lib.container import Container
from elftools.elf.enums import ENUM_E_MACHINE
from elftools.elf.structs import ELFStructs

from openamp_py.constants import EM_AARCH64, EM_ARM, EM_RISCV, EM_X86_64
from openamp_py.errors import ImageError, ResourceTableError
from openamp_py.remoteproc.attributes import ARM_ATTRIBUTES, decode_architecture_untrusted
from openamp_py.remoteproc.resource_table import ResourceTable, decode_table_untrusted

TABLE_SECTION: Final = ".resource_table"
"""Name of the section in which a firmware carries its resource table."""

MAX_PROGRAM_HEADERS: Final = 1024
"""Our limit; real firmware has fewer than ten."""

_EXTENDED_NUMBERING: Final = 0xFF00  # SHN_LORESERVE: from here on e_shnum is 0

_MAX_ATTRIBUTES: Final = 4096
"""Our limit, of the bytes of build attributes that are looked at; real ones have fewer than 100."""

_TABLE_NAME: Final = TABLE_SECTION.encode() + b"\0"
_MAGIC: Final = b"\x7fELF"
_IDENT_SIZE: Final = 16  # EI_NIDENT
_EI_CLASS: Final = 4
_EI_DATA: Final = 5
_LITTLE_ENDIAN: Final = 1  # ELFDATA2LSB
_CLASSES: Final = {1: 32, 2: 64}  # ELFCLASS32, ELFCLASS64

_MACHINE_NAMES: Final = {
    EM_ARM: "ARM",
    EM_X86_64: "x86-64",
    EM_AARCH64: "AArch64",
    EM_RISCV: "RISC-V",
}

# A position-independent image is taken as it is, at the addresses it was linked for: Linux
# loads both alike, and some linkers call every firmware "dynamic".
_LOADABLE_TYPES: Final = ("ET_EXEC", "ET_DYN")
_OTHER_TYPES: Final = {
    "ET_NONE": "no type",
    "ET_REL": "a relocatable object, not linked yet",
    "ET_CORE": "a core dump",
}


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes to load at a device address, and zeros after them.

    Attributes:
        da: where it goes (p_paddr, as in Linux and OpenAMP).
        data: the bytes from the file; may be empty.
        memory_size: bytes in memory, ``len(data)`` or more; the rest is zero.
        flags: 4 read, 2 write, 1 execute.
    """

    da: int
    data: memoryview | bytes = field(repr=False)
    memory_size: int
    flags: int

    @property
    def file_size(self) -> int:
        """Bytes from the file."""
        return len(self.data)

    def to_dict(self) -> dict[str, object]:
        """Return all but the data as plain JSON."""
        return {
            "da": self.da,
            "file_size": self.file_size,
            "memory_size": self.memory_size,
            "flags": self.flags,
        }


@dataclass(frozen=True, slots=True)
class Firmware:
    """What a core is started with.

    Built by hand for a remote in Python: it has no ELF, so all it may need is a table, which
    `with_table` puts where the remote finds it: ``with_table(Firmware(), rpmsg_table(), 0)``.

    Attributes:
        elf_class: 32 or 64; 0 without an ELF.
        machine: e_machine of the ELF; 0 without one.
        machine_name: that number as a name.
        entry: device address at which the core starts.
        segments: by device address, not overlapping.
        table: the resource table, if the firmware has one.
        table_da: device address at which the table is loaded.
        arm_architecture: what an ARM image is built for, as in "v7-M"; None where it does not say.
    """

    elf_class: int = 0
    machine: int = 0
    machine_name: str = ""
    entry: int = 0
    segments: tuple[Segment, ...] = ()
    table: ResourceTable | None = None
    table_da: int | None = None
    arm_architecture: str | None = None

    def to_dict(self) -> dict[str, object]:
        """Return all but the segments' data as plain JSON."""
        return {
            "elf_class": self.elf_class,
            "machine": self.machine,
            "machine_name": self.machine_name,
            "entry": self.entry,
            "segments": [segment.to_dict() for segment in self.segments],
            "table": None if self.table is None else self.table.to_dict(),
            "table_da": self.table_da,
            "arm_architecture": self.arm_architecture,
        }


class _Load(NamedTuple):
    """A PT_LOAD program header whose bytes lie in the file."""

    number: int
    offset: int
    vaddr: int
    paddr: int
    file_size: int
    memory_size: int
    flags: int

    @property
    def end(self) -> int:
        return self.offset + self.file_size

    @property
    def where(self) -> str:
        return f"program header {self.number}"


class _Section(NamedTuple):
    """The header of the table's section, whose bytes lie in the file."""

    number: int
    addr: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size

    @property
    def where(self) -> str:
        return f"section {self.number} ({TABLE_SECTION})"


def machine_name(machine: int) -> str:
    """Name an e_machine: ours, else that of pyelftools, else the number in hex."""
    ours = _MACHINE_NAMES.get(machine)
    return ours if ours is not None else _elftools_machine_names().get(machine, f"{machine:#x}")


@cache
def _elftools_machine_names() -> dict[int, str]:
    return {
        number: name.removeprefix("EM_")
        for name, number in ENUM_E_MACHINE.items()
        if isinstance(number, int)  # its "_default_" is none
    }


def decode_elf_untrusted(image: bytes | memoryview) -> Firmware:
    """Decode an ELF image from anywhere.

    The segments of the result are views of the image; bytes are not copied.

    Raises:
        ImageError: it is no ELF, truncated, inconsistent, or nothing that can be loaded.
        ResourceTableError: its table is malformed, or is not loaded where it says.
    """
    image = bytes(image)
    structs = _structs(_decode_class(image))
    header = _decode_header(image, structs)
    loads = _decode_loads(image, structs, header)
    view = memoryview(image)
    table, table_da = None, None
    section = _find_table(image, structs, header)
    if section is not None:
        table = decode_table_untrusted(view[section.offset : section.end])
        table_da = _table_da(section, loads)
    machine = header["e_machine"]  # a name where pyelftools knows it
    machine = ENUM_E_MACHINE.get(machine, machine)
    return Firmware(
        elf_class=structs.elfclass,
        machine=machine,
        machine_name=machine_name(machine),
        entry=header["e_entry"],
        segments=tuple(
            Segment(load.paddr, view[load.offset : load.end], load.memory_size, load.flags)
            for load in loads
        ),
        table=table,
        table_da=table_da,
        arm_architecture=_find_architecture(image, structs, header) if machine == EM_ARM else None,
    )


@cache
def _structs(elf_class: int) -> ELFStructs:
    structs = ELFStructs(little_endian=True, elfclass=elf_class)
    structs.create_basic_structs()
    structs.create_advanced_structs()
    return structs


def _decode_class(image: bytes) -> int:
    if len(image) < _IDENT_SIZE:
        raise ImageError(f"not an ELF file: {len(image)} bytes; its first field has {_IDENT_SIZE}")
    if not image.startswith(_MAGIC):
        raise ImageError(f"not an ELF file: it begins with {image[:4].hex(' ')}, not 7f 45 4c 46")
    elf_class = _CLASSES.get(image[_EI_CLASS])
    if elf_class is None:
        raise ImageError(f"ELF header: class {image[_EI_CLASS]}, expected 1 (32 bit) or 2 (64 bit)")
    if image[_EI_DATA] != _LITTLE_ENDIAN:
        raise ImageError(
            f"ELF header: data encoding {image[_EI_DATA]}, expected 1; "
            "only little-endian cores are supported"
        )
    return elf_class


def _decode_header(image: bytes, structs: ELFStructs) -> Container:
    size = structs.Elf_Ehdr.sizeof()
    _check_in_file(image, 0, size, "ELF header")
    header = _parse(structs.Elf_Ehdr, image, 0)
    if header["e_ehsize"] != size:
        raise ImageError(f"ELF header: e_ehsize {header['e_ehsize']}, expected {size}")
    type_ = header["e_type"]
    if type_ not in _LOADABLE_TYPES:
        raise ImageError(
            f"ELF header: e_type {type_} ({_OTHER_TYPES.get(type_, 'not a known one')}); "
            f"firmware is {' or '.join(_LOADABLE_TYPES)}"
        )
    return header


def _decode_loads(image: bytes, structs: ELFStructs, header: Container) -> list[_Load]:
    """Decode and check the program headers of all that goes into memory, by address."""
    count = header["e_phnum"]
    if count > MAX_PROGRAM_HEADERS:
        raise ImageError(f"ELF header: {count} program headers, limit {MAX_PROGRAM_HEADERS}")
    offsets = _header_offsets(image, structs.Elf_Phdr, header, "ph", "program headers")
    phdrs = [_parse(structs.Elf_Phdr, image, at) for at in offsets]
    limit = 1 << structs.elfclass
    loads = [
        _decode_load(image, number, phdr, limit)
        for number, phdr in enumerate(phdrs)
        if phdr["p_type"] == "PT_LOAD"
    ]
    loads = sorted((load for load in loads if load.memory_size), key=lambda load: load.paddr)
    if not loads:
        raise ImageError(f"none of the {count} program headers is a PT_LOAD: nothing to load")
    for below, above in pairwise(loads):
        if below.paddr + below.memory_size > above.paddr:
            raise ImageError(
                f"{below.where}: {below.memory_size:#x} bytes at {below.paddr:#x} overlap "
                f"{above.where} at {above.paddr:#x}"
            )
    return loads


def _decode_load(image: bytes, number: int, phdr: Container, limit: int) -> _Load:
    load = _Load(
        number,
        phdr["p_offset"],
        phdr["p_vaddr"],
        phdr["p_paddr"],
        phdr["p_filesz"],
        phdr["p_memsz"],
        phdr["p_flags"],
    )
    if load.file_size > load.memory_size:
        raise ImageError(
            f"{load.where}: file size {load.file_size:#x} is larger than memory size "
            f"{load.memory_size:#x}"
        )
    if load.file_size:  # where there are no bytes, linkers write any offset
        _check_in_file(image, load.offset, load.file_size, load.where)
    if load.paddr + load.memory_size > limit:
        raise ImageError(
            f"{load.where}: {load.memory_size:#x} bytes at {load.paddr:#x} end beyond the "
            f"address space ({limit:#x} bytes)"
        )
    return load


def _find_table(image: bytes, structs: ELFStructs, header: Container) -> _Section | None:
    """Find the one section that holds the table, and check that it lies in the file."""
    if not header["e_shoff"]:
        return None  # how an ELF says that it has no sections
    if not header["e_shnum"]:
        raise ImageError(
            f"ELF header: e_shnum 0 with section headers at {header['e_shoff']:#x}: extended "
            f"numbering ({_EXTENDED_NUMBERING} sections or more) is not supported"
        )
    offsets = _header_offsets(image, structs.Elf_Shdr, header, "sh", "section headers")
    if not header["e_shstrndx"]:
        return None  # sections, but without names
    names = _section_names(image, structs, header["e_shstrndx"], offsets)
    found: _Section | None = None
    for number, at in enumerate(offsets):
        shdr = _parse(structs.Elf_Shdr, image, at)
        if shdr["sh_type"] == "SHT_NULL":
            continue
        if shdr["sh_name"] >= len(names):
            raise ImageError(
                f"section {number}: its name at {shdr['sh_name']:#x} is beyond the section names "
                f"({len(names):#x} bytes)"
            )
        if not names.startswith(_TABLE_NAME, shdr["sh_name"]):
            continue
        if found is not None:
            raise ResourceTableError(
                f"sections {found.number} and {number} are both named {TABLE_SECTION}"
            )
        found = _decode_table_section(image, number, shdr)
    return found


def _find_architecture(image: bytes, structs: ELFStructs, header: Container) -> str | None:
    """Look for the build attributes; they only help to choose a core, so nothing is refused."""
    if not header["e_shoff"]:
        return None
    for at in _header_offsets(image, structs.Elf_Shdr, header, "sh", "section headers"):
        shdr = _parse(structs.Elf_Shdr, image, at)
        kind: object = shdr["sh_type"]  # a name where pyelftools knows it without the machine
        if kind == ARM_ATTRIBUTES:
            end = shdr["sh_offset"] + min(shdr["sh_size"], _MAX_ATTRIBUTES)
            return decode_architecture_untrusted(image[shdr["sh_offset"] : end])
    return None


def _decode_table_section(image: bytes, number: int, shdr: Container) -> _Section:
    section = _Section(number, shdr["sh_addr"], shdr["sh_offset"], shdr["sh_size"])
    if shdr["sh_type"] == "SHT_NOBITS":
        raise ResourceTableError(
            f"{section.where}: of type SHT_NOBITS, without content in the file; "
            "the table must be initialised data"
        )
    _check_in_file(image, section.offset, section.size, section.where)
    return section


def _section_names(image: bytes, structs: ELFStructs, number: int, offsets: range) -> bytes:
    """Return the string table with the names of the sections."""
    if number >= len(offsets):
        raise ImageError(f"ELF header: e_shstrndx {number}, but there are {len(offsets)} sections")
    shdr = _parse(structs.Elf_Shdr, image, offsets[number])
    where = f"section {number} (the section names)"
    offset, size = shdr["sh_offset"], shdr["sh_size"]
    if shdr["sh_type"] == "SHT_NOBITS":
        raise ImageError(f"{where}: of type SHT_NOBITS, without content in the file")
    _check_in_file(image, offset, size, where)
    names = image[offset : offset + size]
    if not names.endswith(b"\0"):
        raise ImageError(f"{where}: its {size:#x} bytes do not end with a NUL")
    return names


def _table_da(section: _Section, loads: list[_Load]) -> int:
    """Return the device address at which the section's bytes are loaded.

    The segment is the one that holds both the section's address and its bytes: overlays share
    an address, and a section that was added afterwards has its bytes elsewhere. An image whose
    addresses differ (p_vaddr is the core's own view) is loaded at p_paddr.
    """
    for load in loads:
        into = section.offset - load.offset
        inside = into >= 0 and into + section.size <= load.file_size
        if inside and section.addr - into in (load.vaddr, load.paddr):
            return load.paddr + into
    raise ResourceTableError(
        f"{section.where}: its {section.size:#x} bytes at address {section.addr:#x}, file offset "
        f"{section.offset:#x}, are not in a loaded segment, so the remote would not see the "
        "table; place the section in a PT_LOAD segment"
    )


def _header_offsets(image: bytes, layout: Struct, header: Container, kind: str, what: str) -> range:
    """Check a table of program or section headers; return where in the file each lies."""
    count, offset = header[f"e_{kind}num"], header[f"e_{kind}off"]
    size, entry_size = layout.sizeof(), header[f"e_{kind}entsize"]
    if count and entry_size != size:
        raise ImageError(f"ELF header: e_{kind}entsize {entry_size}, expected {size}")
    _check_in_file(image, offset, count * size, f"{count} {what}")
    return range(offset, offset + count * size, size)


def _parse(layout: Struct, image: bytes, offset: int) -> Container:
    parsed: Container = layout.parse(image[offset : offset + layout.sizeof()])
    return parsed


def _check_in_file(image: bytes, offset: int, size: int, where: str) -> None:
    if offset + size > len(image):
        raise ImageError(
            f"{where}: {size:#x} bytes at file offset {offset:#x} end beyond the file "
            f"({len(image):#x} bytes); the image is truncated"
        )
