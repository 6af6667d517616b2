"""What a bring-up engineer should know of an image: every fault at once, with its cure.

Decoding stops at the first thing it refuses; this walks on over whatever is there, with
readings of its own, and only looks at what lies in the file. What decoding refuses is always
among the errors.
"""

from __future__ import annotations

import enum
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

from openamp_py.constants import (
    DA_ANY,
    NAME_SIZE,
    NOTIFY_ID_ANY,
    RPMSG_F_NS,
    VIRTIO_ID_RPMSG,
    VIRTIO_RING_F_EVENT_IDX,
)
from openamp_py.errors import FirmwareError
from openamp_py.remoteproc import resource_table as rt
from openamp_py.remoteproc.elf import MAX_PROGRAM_HEADERS, TABLE_SECTION
from openamp_py.remoteproc.images import decode_image_untrusted
from openamp_py.vring import MAX_NUM, MIN_ALIGN, VringLayout

BUFFER_SIZE: Final = 512
"""Bytes of an RPMsg buffer in Linux, and in OpenAMP and here unless changed."""

MAX_FINDINGS: Final = 500
"""Our limit: nobody reads more, and it bounds what a hostile image costs."""


class Severity(enum.StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """It does not load here, or cannot work."""
    WARNING = "warning"
    """It loads here, and is likely to fail: on another host, or later."""
    NOTE = "note"
    """It is unusual, and may be meant so."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of an image.

    Attributes:
        code: a short name of the kind of fault that stays the same.
        severity: how bad it is.
        where: header, section, entry or vring.
        what: what is wrong, with the numbers.
        why: why it matters.
        cure: what to do about it.
    """

    code: str
    severity: Severity
    where: str
    what: str
    why: str
    cure: str

    def to_dict(self) -> dict[str, str]:
        """Return it as plain JSON."""
        return {
            "code": self.code,
            "severity": self.severity.value,
            "where": self.where,
            "what": self.what,
            "why": self.why,
            "cure": self.cure,
        }


class _Rule(NamedTuple):
    severity: Severity
    why: str
    cure: str


_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE

_NOT_READ = "Nothing is loaded: no host goes on after this."
_LINK_ANEW = "Build or copy the file anew."
_TABLE_REFUSED = "Hosts refuse the whole table, so nothing is loaded."
_IN_PLACE = "Both sides write words of it in place; many cores fault on an unaligned word."
_COMPARE = "Compare the offsets and sizes with struct resource_table in the firmware's source."

RULES: Final[dict[str, _Rule]] = {
    # The file
    "image-format": _Rule(_E, _NOT_READ, "Give an ELF file for the core, or a sound HEX file."),
    "elf-class": _Rule(_E, _NOT_READ, "Build a 32-bit or a 64-bit ELF file."),
    "elf-big-endian": _Rule(
        _E,
        "Rings and messages are little endian; Linux refuses an ELF of another order than its own.",
        "Build for the core's little-endian mode.",
    ),
    "elf-header": _Rule(
        _E, "The headers would be read at wrong places.", "Link it with a sound tool chain."
    ),
    "elf-type": _Rule(
        _E, "It was never linked for the core's memory.", "Link it to an executable (ET_EXEC)."
    ),
    "truncated": _Rule(_E, "Bytes that would be loaded are not in the file.", _LINK_ANEW),
    "no-segments": _Rule(
        _E, "There is nothing to load.", "Link with a PT_LOAD program header for each memory."
    ),
    "too-many-segments": _Rule(
        _E, "It is beyond any real firmware.", "Merge sections into fewer PT_LOAD segments."
    ),
    "filesz-over-memsz": _Rule(
        _E,
        "The file would be written beyond the memory that the segment claims.",
        "Mend the linker script: a segment's memory holds its file content.",
    ),
    "segment-wraps": _Rule(_E, "No core has memory there.", "Mend the linker script's addresses."),
    "segments-overlap": _Rule(
        _E,
        "Which of the two is in memory afterwards depends on the loader.",
        "Give each segment its own range in the linker script.",
    ),
    "entry-not-executable": _Rule(
        _W,
        "The core would start where no code was loaded.",
        "Set ENTRY in the linker script, and the segment's flags to executable.",
    ),
    "paddr-vaddr": _Rule(
        _N,
        "Hosts load at p_paddr; p_vaddr is the core's own view.",
        "Nothing, if the core copies or maps it there itself; else drop AT() from the script.",
    ),
    "section-names": _Rule(
        _E, "The resource table is found by its section's name.", "Do not strip section headers."
    ),
    "outside-ram": _Rule(
        _E,
        "Hosts refuse what lies outside the core's memory.",
        "Link for the memory that the host gives the core, or give the core that memory.",
    ),
    # Where the table lies
    "no-table": _Rule(
        _N,
        "There will be no RPMsg and no trace. Linux's generic loader refuses such firmware.",
        f"Put the table into a section named {TABLE_SECTION}; KEEP it in the linker script.",
    ),
    "two-tables": _Rule(
        _E, "Which one a host takes is chance.", f"Keep one section named {TABLE_SECTION}."
    ),
    "table-nobits": _Rule(
        _E, "The file has no bytes of it.", "Initialise the table; do not put it into .bss."
    ),
    "table-not-loaded": _Rule(
        _E,
        "The remote would wait for ever for addresses and a status that it does not see.",
        "Place the section in a PT_LOAD segment, with its file content.",
    ),
    "table-misaligned": _Rule(_E, _IN_PLACE, "Align the section to at least 4 bytes."),
    "table-read-only": _Rule(
        _W,
        "The host writes addresses, notify ids and status back; in flash or protected memory "
        "that is lost.",
        "Make the table's section writable, in RAM; drop const.",
    ),
    "table-too-large": _Rule(
        _E, "In memory a table has no length, so a host reads no more.", "Shorten the table."
    ),
    # The table's header
    "table-truncated": _Rule(_E, _TABLE_REFUSED, _COMPARE),
    "table-version": _Rule(_E, _TABLE_REFUSED, "Set the version to 1."),
    "table-reserved": _Rule(_E, _TABLE_REFUSED, "Set both reserved words to 0."),
    "too-many-entries": _Rule(_E, _TABLE_REFUSED, "Set num to the number of entries."),
    "entry-offset": _Rule(_E, _TABLE_REFUSED, _COMPARE),
    "entry-unaligned": _Rule(_W, _IN_PLACE, "Begin each entry at a multiple of 4."),
    "vdev-unaligned": _Rule(_E, _IN_PLACE, "Begin each entry at a multiple of 4."),
    "entry-truncated": _Rule(_E, _TABLE_REFUSED, _COMPARE),
    "entries-overlap": _Rule(
        _E, "What a host writes into one changes the other.", "Mend the offset array."
    ),
    "entry-reserved": _Rule(_E, _TABLE_REFUSED, "Set the reserved field to 0."),
    # Entries of any kind
    "unknown-entry": _Rule(
        _N, "Every host skips it.", "Check the type word, or the offset that led to it."
    ),
    "historical-entry": _Rule(
        _N, "OpenAMP removed it in 2018 and Linux never had it: hosts skip it.", "Drop the entry."
    ),
    "vendor-entry": _Rule(
        _N,
        "Only a platform with a handler for this type acts on it; others skip it.",
        "Nothing, on that platform.",
    ),
    "vendor-no-length": _Rule(
        _N,
        "OpenAMP's vendor entries begin with the length of their data; Linux does not mind.",
        "Write the length behind the type, if an OpenAMP host is to read it.",
    ),
    "devmem": _Rule(
        _W,
        "It is not mapped here, nor by OpenAMP; Linux without an IOMMU refuses the whole firmware.",
        "Drop the entry unless the core is behind an IOMMU.",
    ),
    "name-not-terminated": _Rule(
        _W,
        "Hosts that take it for a C string read on into the next entry.",
        f"Use at most {NAME_SIZE - 1} bytes and a NUL.",
    ),
    "name-duplicate": _Rule(
        _W,
        "A trace is looked up by its name. Carveouts of one name are one memory here; Linux "
        "refuses the second one.",
        "Give each entry a name of its own.",
    ),
    # Memory
    "carveout-empty": _Rule(_W, "It gives the remote no memory.", "Set its length."),
    "carveout-shared": _Rule(
        _E,
        "Carveouts of one name are one memory: that of the first with a fixed address, or else of "
        "the first.",
        "Let that one hold the others, or give each a name of its own.",
    ),
    "carveouts-overlap": _Rule(
        _W, "Two users of one memory, unless one is meant to hold the other.", "Move one of them."
    ),
    "carveout-cuts-segment": _Rule(
        _W,
        "Linux loads a segment only into memory that holds all of it.",
        "Let the carveout hold the whole segment, or none of it.",
    ),
    "memory-overlaps-image": _Rule(
        _E,
        "The host zeroes and fills it while the core runs, over what was loaded there.",
        "Keep rings and buffers out of initialised sections.",
    ),
    "trace-any": _Rule(
        _W,
        "Nobody chooses an address for a trace: there will be none.",
        "Write the buffer's address into the entry.",
    ),
    "trace-empty": _Rule(_W, "There is nothing to read.", "Set its length."),
    "trace-outside": _Rule(
        _N,
        "Nothing in the image reserves this memory: hosts other than this one may put rings there.",
        "Put the buffer into .bss, or into a carveout with a fixed address.",
    ),
    # Virtio devices
    "no-vdev": _Rule(_N, "There will be no RPMsg.", "Add a vdev entry with id 7 and two vrings."),
    "rpmsg-vrings": _Rule(
        _E,
        "RPMsg has one vring for each direction. With 0 or 1, Linux boots and panics at stop; "
        "with 3 it refuses the image.",
        "Set num_of_vrings to 2, and describe both.",
    ),
    "vdev-vrings": _Rule(
        _W, "Linux refuses a vdev with more than two vrings.", "Use two, or hosts other than Linux."
    ),
    "no-name-service": _Rule(
        _N,
        "Nobody announces channels: both sides must know the addresses.",
        "Offer feature bit 0 (VIRTIO_RPMSG_F_NS).",
    ),
    "event-idx": _Rule(
        _W,
        "An OpenAMP host accepts EVENT_IDX but works with flags: kicks are lost.",
        "Do not offer feature bit 29.",
    ),
    "status-preset": _Rule(
        _W,
        "Status and accepted features are the driver's: a remote that looks early believes it is "
        "up.",
        "Set both to 0 in the image.",
    ),
    "notify-id-duplicate": _Rule(
        _W,
        "Hosts give a new id to one of them; firmware that has the ids built in hears the wrong "
        "vring.",
        "Number them differently, or leave them to the host (0xffffffff) and read the table.",
    ),
    "vring-num": _Rule(
        _E,
        "Indexes run modulo num. Linux takes 17, and breaks; with 0 it boots without the device.",
        f"Use a power of two from 1 to {MAX_NUM}.",
    ),
    "vring-align": _Rule(
        _E,
        "The used ring is aligned to it. With 0, Linux boots without the device.",
        f"Use a power of two of at least {MIN_ALIGN}; 4096 is usual.",
    ),
    "vring-misaligned": _Rule(
        _E,
        "Both sides would find the used ring at different places.",
        "Move the vring to a multiple of its align, and of 16.",
    ),
    "vring-zero": _Rule(
        _W,
        "Address 0 is an address like any other here and in Linux; some old firmware means ANY.",
        "Write 0xffffffff for an address that the host is to choose.",
    ),
    "vring-carveout": _Rule(
        _E, "The vring is placed in the carveout of its name.", "Enlarge or move the carveout."
    ),
    "rings-overlap": _Rule(
        _E, "Each of them is overwritten by the other's user.", "Move one of them."
    ),
    "buffers-do-not-fit": _Rule(
        _E,
        f"Each vring entry has a buffer of {BUFFER_SIZE} bytes: the host cannot start the device.",
        "Enlarge the carveout, or use smaller vrings.",
    ),
    # The rest
    "refused": _Rule(_E, "It does not load here.", "See the message."),
    "more-findings": _Rule(_N, "They are not shown.", "Mend those above, and look again."),
}
"""Severity, reason and cure of every code; a finding adds where and what."""

_IDENT_SIZE: Final = 16
_CLASSES: Final = {1: 32, 2: 64}
_EHDR: Final = {32: struct.Struct("<HHIIIIIHHHHHH"), 64: struct.Struct("<HHIQQQIHHHHHH")}
_PHDR: Final = {32: struct.Struct("<8I"), 64: struct.Struct("<IIQQQQQQ")}
_SHDR: Final = {32: struct.Struct("<10I"), 64: struct.Struct("<IIQQQQIIQQ")}
_PT_LOAD, _SHT_NULL, _SHT_NOBITS = 1, 0, 8
_TYPES: Final = {0: "no type", 1: "a relocatable object", 4: "a core dump"}
_LOADABLE: Final = (2, 3)  # ET_EXEC, ET_DYN
_WRITE, _EXECUTE = 2, 1

_TABLE_HEADER: Final = struct.Struct("<4I")
_MEMORY_SIZE, _TRACE_SIZE, _VDEV_SIZE = 56, 48, rt.VDEV_VRINGS_OFFSET
_HISTORICAL: Final = (4, 5)

# Memory of one kind that is compared with all of another; real firmware has about ten.
_MOST_COMPARED: Final = 256


class _TooManyError(Exception):
    """There are `MAX_FINDINGS`."""


class _Range(NamedTuple):
    """Memory with a fixed place."""

    da: int
    size: int
    what: str

    @property
    def end(self) -> int:
        return self.da + self.size

    def holds(self, other: _Range) -> bool:
        return self.da <= other.da and other.end <= self.end

    def meets(self, other: _Range) -> bool:
        return self.da < other.end and other.da < self.end

    def __str__(self) -> str:
        return f"{self.size:#x} bytes at {self.da:#x}"


class _Load(NamedTuple):
    """A PT_LOAD, as far as it is in the file."""

    number: int
    offset: int
    vaddr: int
    da: int
    file_size: int
    memory_size: int
    flags: int

    @property
    def memory(self) -> _Range:
        return _Range(self.da, self.memory_size, f"program header {self.number}")

    @property
    def content(self) -> _Range:
        return _Range(self.da, self.file_size, f"the content of program header {self.number}")


@dataclass(slots=True)
class _Report:
    """Findings in the order in which they were made."""

    findings: list[Finding] = field(default_factory=list)

    def __call__(self, code: str, where: str, what: str) -> None:
        rule = RULES[code]
        if len(self.findings) == MAX_FINDINGS:
            raise _TooManyError
        self.findings.append(Finding(code, rule.severity, where, what, rule.why, rule.cure))


def lint_firmware(
    data: bytes | memoryview, *, ram: Iterable[tuple[int, int]] | None = None
) -> tuple[Finding, ...]:
    """Find every fault of an image from anywhere; the worst first, else in the order of the file.

    Args:
        data: the bytes of an ELF file (a path is read by the caller); of another format only what
            its loader says.
        ram: device address and size of each memory that the core has, if that is known.

    Raises:
        ImageError: the format needs a package that is not installed.
        TypeError: it is no bytes.
    """
    if isinstance(data, str):
        raise TypeError(f"an image's bytes are wanted, not a path: {data!r}")
    data = bytes(data)
    report = _Report()
    try:
        decode_image_untrusted(data)
        refused = None
    except FirmwareError as error:
        if isinstance(error.__cause__, ImportError):  # that is not the image's fault
            raise
        refused = str(error)
    try:
        if data.startswith(b"\x7fELF") and len(data) >= _IDENT_SIZE:
            _lint_elf(data, report, None if ram is None else list(ram))
        elif refused is not None:
            report("image-format", "file", refused)
        else:
            report("no-table", "file", "this format carries no resource table")
    except _TooManyError:
        rule = RULES["more-findings"]
        report.findings.append(
            Finding("more-findings", rule.severity, "file", f"over {MAX_FINDINGS}", *rule[1:])
        )
    if refused is not None and not any(f.severity is _E for f in report.findings):
        rule = RULES["refused"]
        report.findings.append(Finding("refused", rule.severity, "file", refused, *rule[1:]))
    order = list(Severity)
    return tuple(sorted(report.findings, key=lambda finding: order.index(finding.severity)))


# The ELF file


def _lint_elf(data: bytes, report: _Report, ram: list[tuple[int, int]] | None) -> None:
    bits = _CLASSES.get(data[4])
    if bits is None:
        report("elf-class", "ELF header", f"class {data[4]}, expected 1 (32 bit) or 2 (64 bit)")
        return
    if data[5] != 1:
        report("elf-big-endian", "ELF header", f"data encoding {data[5]}, expected 1")
        return
    if len(data) < _IDENT_SIZE + _EHDR[bits].size:
        report("truncated", "ELF header", f"the file has {len(data)} bytes")
        return
    type_, _, _, entry, phoff, shoff, _, ehsize, phentsize, phnum, shentsize, shnum, shstrndx = (
        _EHDR[bits].unpack_from(data, _IDENT_SIZE)
    )
    expected = _IDENT_SIZE + _EHDR[bits].size
    if ehsize != expected:
        report("elf-header", "ELF header", f"e_ehsize {ehsize}, expected {expected}")
    if type_ not in _LOADABLE:
        named = _TYPES.get(type_, "not a known one")
        report("elf-type", "ELF header", f"e_type {type_} ({named})")
    if phnum > MAX_PROGRAM_HEADERS:
        report("too-many-segments", "ELF header", f"{phnum} headers, limit {MAX_PROGRAM_HEADERS}")
        phnum = MAX_PROGRAM_HEADERS
    phdrs = _headers(data, report, _PHDR[bits], phoff, phnum, phentsize, "program headers")
    loads = list(_loads(data, report, phdrs, bits))
    _lint_memory_of(loads, report, entry, ram)
    table = _find_table(data, report, (shoff, shentsize, shnum, shstrndx), bits, loads)
    if table is not None:
        words, load, into = table
        _Table(words, report, loads, load.da + into if load else None, ram).lint()


def _headers(
    data: bytes,
    report: _Report,
    layout: struct.Struct,
    offset: int,
    count: int,
    entry_size: int,
    what: str,
) -> list[tuple[int, ...]]:
    """All headers of a kind that are in the file."""
    if count and entry_size != layout.size:
        report("elf-header", "ELF header", f"{what} of {entry_size} bytes, expected {layout.size}")
        return []
    if offset + count * layout.size > len(data):
        report(
            "truncated",
            "ELF header",
            f"{count} {what} at {offset:#x} end beyond the file ({len(data):#x} bytes)",
        )
        count = max(0, len(data) - offset) // layout.size
    return [layout.unpack_from(data, offset + i * layout.size) for i in range(count)]


def _loads(
    data: bytes, report: _Report, phdrs: list[tuple[int, ...]], bits: int
) -> Iterator[_Load]:
    for number, phdr in enumerate(phdrs):
        if phdr[0] != _PT_LOAD:
            continue
        if bits == 32:
            _, offset, vaddr, paddr, file_size, memory_size, flags, _ = phdr
        else:
            _, flags, offset, vaddr, paddr, file_size, memory_size, _ = phdr
        where = f"program header {number}"
        if file_size > memory_size:
            report(
                "filesz-over-memsz",
                where,
                f"file size {file_size:#x} is larger than memory size {memory_size:#x}",
            )
        if file_size and offset + file_size > len(data):
            report(
                "truncated",
                where,
                f"{file_size:#x} bytes at {offset:#x} end beyond the file ({len(data):#x} bytes)",
            )
            file_size = max(0, len(data) - offset)
        if paddr + memory_size > 1 << bits:
            report(
                "segment-wraps",
                where,
                f"{memory_size:#x} bytes at {paddr:#x} end beyond the address space",
            )
        if memory_size:
            yield _Load(number, offset, vaddr, paddr, file_size, memory_size, flags)


def _lint_memory_of(
    loads: list[_Load], report: _Report, entry: int, ram: list[tuple[int, int]] | None
) -> None:
    if not loads:
        report("no-segments", "program headers", "none of them is a PT_LOAD with memory")
        return
    for below, above in pairwise(sorted(load.memory for load in loads)):
        if below.end > above.da:
            report("segments-overlap", below.what, f"{below} overlap {above.what} at {above.da:#x}")
    for load in loads:
        if load.vaddr != load.da:
            report(
                "paddr-vaddr",
                f"program header {load.number}",
                f"loaded at p_paddr {load.da:#x}, while p_vaddr is {load.vaddr:#x}",
            )
        _check_ram(report, ram, load.memory)
    code = [load for load in loads if load.flags & _EXECUTE]
    starts = [(start, load.memory_size) for load in code for start in (load.da, load.vaddr)]
    if not any(start <= entry < start + size for start, size in starts):
        report(
            "entry-not-executable", "ELF header", f"entry {entry:#x} is in no executable segment"
        )


def _check_ram(report: _Report, ram: list[tuple[int, int]] | None, memory: _Range) -> None:
    if ram is None or any(_Range(da, size, "").holds(memory) for da, size in ram):
        return
    has = ", ".join(f"{da:#x}..{da + size:#x}" for da, size in ram[:8]) or "none"
    report("outside-ram", memory.what, f"{memory} are not in the core's memory: {has}")


def _find_table(
    data: bytes,
    report: _Report,
    sections: tuple[int, int, int, int],
    bits: int,
    loads: list[_Load],
) -> tuple[bytes, _Load | None, int] | None:
    """The table's bytes, the segment that loads them, and where in it they are."""
    offset, entry_size, count, names_index = sections
    if not offset:
        report("no-table", "ELF header", "there are no section headers")
        return None
    if not count:
        report("section-names", "ELF header", f"e_shnum 0 with section headers at {offset:#x}")
        return None
    shdrs = _headers(data, report, _SHDR[bits], offset, count, entry_size, "section headers")
    if not names_index:
        report("no-table", "ELF header", "the sections have no names")
        return None
    if names_index >= len(shdrs):
        report("section-names", "ELF header", f"e_shstrndx {names_index} of {len(shdrs)} sections")
        return None
    _, type_, _, _, at, size, *_ = shdrs[names_index]
    names = data[at : at + size]
    if type_ == _SHT_NOBITS or len(names) < size or not names.endswith(b"\0"):
        report("section-names", f"section {names_index}", "the section names are not all there")
    found = []
    for number, (name, type_, *_) in enumerate(shdrs):
        if type_ == _SHT_NULL:
            continue
        if name >= len(names):
            report("section-names", f"section {number}", f"its name at {name:#x} is beyond them")
        elif names.startswith(TABLE_SECTION.encode() + b"\0", name):
            found.append(number)
    if not found:
        report("no-table", "section headers", f"no section is named {TABLE_SECTION}")
        return None
    where = f"section {found[0]} ({TABLE_SECTION})"
    if len(found) > 1:
        report("two-tables", where, f"section {found[1]} has the same name")
    _, type_, _, addr, at, size, *_ = shdrs[found[0]]
    if type_ == _SHT_NOBITS:
        report("table-nobits", where, "its type is SHT_NOBITS: no content")
        return None
    if at + size > len(data):
        report("truncated", where, f"{size:#x} bytes at {at:#x} end beyond the file")
    words = data[at : at + min(size, rt.TABLE_LIMIT)]
    if size > rt.TABLE_LIMIT:
        report("table-too-large", where, f"{size:#x} bytes, limit {rt.TABLE_LIMIT:#x}")
    for load in loads:
        into = at - load.offset
        inside = into >= 0 and into + size <= load.file_size
        if inside and addr - into in (load.vaddr, load.da):
            _lint_place(report, where, load, into)
            return words, load, into
    report(
        "table-not-loaded",
        where,
        f"its {size:#x} bytes at address {addr:#x} are the content of no PT_LOAD segment",
    )
    return words, None, 0


def _lint_place(report: _Report, where: str, load: _Load, into: int) -> None:
    if (load.da + into) % 4:
        report("table-misaligned", where, f"it is loaded at {load.da + into:#x}")
    if not load.flags & _WRITE:
        report("table-read-only", where, f"program header {load.number} has flags {load.flags:#x}")


# The table


class _Table:
    """One walk over the words of one table; lives as long as `lint_firmware`."""

    def __init__(
        self,
        words: bytes,
        report: _Report,
        loads: list[_Load],
        da: int | None,
        ram: list[tuple[int, int]] | None,
    ) -> None:
        self._words = words
        self._report = report
        self._loads = loads
        self._ram = ram
        self._carveouts: list[_Range] = []
        self._any_carveouts: dict[str, int] = {}
        self._named: list[tuple[bool, str, _Range]] = []
        self._names: Counter[tuple[int, str]] = Counter()
        self._traces: list[_Range] = []
        self._rings: list[_Range] = []
        self._buffers: list[tuple[str, str, int]] = []
        self._ring_homes: list[tuple[str, str, int, int, int]] = []
        self._vdev_ids: Counter[int] = Counter()
        self._vring_ids: Counter[int] = Counter()
        self._vdevs = 0
        self._place = [] if da is None else [_Range(da, len(words), "the resource table")]

    def lint(self) -> None:
        """Everything, entry by entry, and then how the entries go together."""
        offsets = self._lint_header()
        checks: dict[int, Callable[[int, str], int]] = {
            rt.Carveout.TYPE: self._lint_carveout,
            rt.DevMem.TYPE: self._lint_devmem,
            rt.Trace.TYPE: self._lint_trace,
            rt.Vdev.TYPE: self._lint_vdev,
        }
        spans = []
        for index, offset in enumerate(offsets):
            if not _TABLE_HEADER.size + 4 * len(offsets) <= offset <= len(self._words) - 4:
                self._report(
                    "entry-offset",
                    f"table entry {index}",
                    f"offset {offset:#x} is in the header or beyond the table "
                    f"({len(self._words):#x} bytes)",
                )
                continue
            type_ = self._word(offset)
            where = f"table entry {index} ({rt.type_name(type_)}) at {offset:#x}"
            if offset % 4:
                code = "vdev-unaligned" if type_ == rt.Vdev.TYPE else "entry-unaligned"
                self._report(code, where, f"offset {offset:#x} is not a multiple of 4")
            size = checks.get(type_, self._lint_other)(offset, where)
            spans.append(_Range(offset, size, where))
        for below, above in pairwise(sorted(spans)):
            if below.end > above.da:
                self._report("entries-overlap", below.what, f"it ends inside {above.what}")
        self._lint_together()

    def _lint_header(self) -> tuple[int, ...]:
        where, size = "resource table", len(self._words)
        if size < _TABLE_HEADER.size:
            self._report("table-truncated", where, f"{size} bytes; the header alone has 16")
            return ()
        version, num, *reserved = _TABLE_HEADER.unpack_from(self._words)
        if version != rt.TABLE_VERSION:
            self._report("table-version", where, f"version {version}, expected {rt.TABLE_VERSION}")
        if any(reserved):
            self._report("table-reserved", where, f"{reserved[0]:#x}, {reserved[1]:#x}")
        if num > rt.MAX_ENTRIES:
            self._report("too-many-entries", where, f"{num} entries, limit {rt.MAX_ENTRIES}")
            return ()
        if _TABLE_HEADER.size + 4 * num > size:
            self._report("table-truncated", where, f"{num} offsets do not fit {size:#x} bytes")
            return ()
        offsets: tuple[int, ...] = struct.unpack_from(f"<{num}I", self._words, _TABLE_HEADER.size)
        return offsets

    def _word(self, offset: int) -> int:
        (value,) = struct.unpack_from("<I", self._words, offset)
        return int(value)

    def _fits(self, offset: int, size: int, where: str) -> bool:
        if offset + size <= len(self._words):
            return True
        self._report(
            "entry-truncated",
            where,
            f"its {size:#x} bytes end at {offset + size:#x}, beyond the table "
            f"({len(self._words):#x} bytes)",
        )
        return False

    def _name(self, offset: int, where: str) -> str:
        raw = self._words[offset : offset + NAME_SIZE]
        name = raw.partition(b"\0")[0].decode("utf-8", "backslashreplace")
        if b"\0" not in raw:
            self._report("name-not-terminated", where, f"name {name!r} fills all 32 bytes")
        return name

    def _lint_memory(self, offset: int, where: str) -> tuple[str, int, int] | None:
        if not self._fits(offset, _MEMORY_SIZE, where):
            return None
        _, da, _, length, _, reserved = struct.unpack_from("<6I", self._words, offset)
        if reserved:
            self._report("entry-reserved", where, f"reserved is {reserved:#x}")
        return self._name(offset + 24, where), da, length

    def _lint_carveout(self, offset: int, where: str) -> int:
        found = self._lint_memory(offset, where)
        if found is None:
            return 4
        name, da, length = found
        self._names[rt.Carveout.TYPE, name] += 1
        if self._names[rt.Carveout.TYPE, name] == 2 and name:
            self._report("name-duplicate", where, f"another carveout is named {name!r}")
        if name:
            self._named.append((da == DA_ANY, name, _Range(da, length, where)))
        if not length:
            self._report("carveout-empty", where, f"carveout {name!r} has 0 bytes")
        elif da != DA_ANY:
            memory = _Range(da, length, name)
            self._carveouts.append(memory)
            _check_ram(self._report, self._ram, memory._replace(what=where))
        else:
            self._any_carveouts.setdefault(name, length)
        return _MEMORY_SIZE

    def _lint_devmem(self, offset: int, where: str) -> int:
        found = self._lint_memory(offset, where)
        if found is None:
            return 4
        name, da, length = found
        self._report("devmem", where, f"{name!r}: {length:#x} bytes at {da:#x}")
        return _MEMORY_SIZE

    def _lint_trace(self, offset: int, where: str) -> int:
        if not self._fits(offset, _TRACE_SIZE, where):
            return 4
        _, da, length, reserved = struct.unpack_from("<4I", self._words, offset)
        if reserved:
            self._report("entry-reserved", where, f"reserved is {reserved:#x}")
        name = self._name(offset + 16, where)
        self._names[rt.Trace.TYPE, name] += 1
        if self._names[rt.Trace.TYPE, name] == 2:
            self._report("name-duplicate", where, f"another trace is named {name!r}")
        if da == DA_ANY:
            self._report("trace-any", where, f"trace {name!r} is at any address")
        if not length:
            self._report("trace-empty", where, f"trace {name!r} has 0 bytes")
        if da != DA_ANY and length:
            self._traces.append(_Range(da, length, where))
            _check_ram(self._report, self._ram, self._traces[-1])
        return _TRACE_SIZE

    def _lint_other(self, offset: int, where: str) -> int:
        type_ = self._word(offset)
        if type_ in _HISTORICAL:
            self._report("historical-entry", where, rt.type_name(type_))
        elif type_ in rt.VENDOR_TYPES:
            self._report("vendor-entry", where, f"type {type_}")
            left = len(self._words) - offset - 8
            if left < 0 or self._word(offset + 4) > left:
                self._report("vendor-no-length", where, "its second word is no length")
        else:
            self._report("unknown-entry", where, f"type {type_}")
        return 4

    def _lint_vdev(self, offset: int, where: str) -> int:
        if not self._fits(offset, _VDEV_SIZE, where):
            return 4
        index = self._vdevs
        self._vdevs += 1
        _, id_, notify_id, offered, accepted, config, status, count, reserved = struct.unpack_from(
            "<6I2BH", self._words, offset
        )
        if id_ == VIRTIO_ID_RPMSG and count != rt.RPMSG_VRINGS:
            self._report("rpmsg-vrings", where, f"{count} vrings, expected {rt.RPMSG_VRINGS}")
        elif count > rt.RPMSG_VRINGS:
            self._report("vdev-vrings", where, f"{count} vrings")
        size: int = _VDEV_SIZE + rt.VRING_SIZE * count + config
        if not self._fits(offset, size, where):
            size = _VDEV_SIZE
            count = min(count, (len(self._words) - offset - _VDEV_SIZE) // rt.VRING_SIZE)
        if reserved:
            self._report("entry-reserved", where, f"reserved is {reserved:#x}")
        if accepted or status:
            what = f"accepted features {accepted:#x}, status {status:#x}"
            self._report("status-preset", where, what)
        if id_ == VIRTIO_ID_RPMSG and not offered & RPMSG_F_NS:
            self._report("no-name-service", where, f"features {offered:#x} lack bit 0")
        if offered & VIRTIO_RING_F_EVENT_IDX:
            self._report("event-idx", where, f"features {offered:#x} have bit 29")
        self._lint_notify_id(self._vdev_ids, notify_id, where)
        nums = []
        for number in range(count):
            at = offset + _VDEV_SIZE + rt.VRING_SIZE * number
            nums.append(self._lint_vring(at, f"{where}, vring {number}", index, number))
        if id_ == VIRTIO_ID_RPMSG:
            self._buffers.append((f"vdev{index}buffer", where, sum(nums) * BUFFER_SIZE))
        return size

    def _lint_notify_id(self, ids: Counter[int], notify_id: int, where: str) -> None:
        """A vdev and a vring may share one: hosts give the vrings theirs."""
        ids[notify_id] += 1
        if notify_id != NOTIFY_ID_ANY and ids[notify_id] == 2:
            self._report("notify-id-duplicate", where, f"notify id {notify_id} is taken")

    def _lint_vring(self, at: int, where: str, index: int, number: int) -> int:
        da, align, num, notify_id, _ = struct.unpack_from("<5I", self._words, at)
        num_fits = 1 <= num <= MAX_NUM and not num & (num - 1)
        align_fits = align >= MIN_ALIGN and not align & (align - 1)
        if not num_fits:
            self._report("vring-num", where, f"num {num} is no power of two up to {MAX_NUM}")
        if not align_fits:
            what = f"align {align:#x} is no power of two of at least {MIN_ALIGN}"
            self._report("vring-align", where, what)
        elif da != DA_ANY and da % max(align, rt.DESCRIPTOR_TABLE_ALIGN):
            what = f"da {da:#x} is not a multiple of {max(align, rt.DESCRIPTOR_TABLE_ALIGN):#x}"
            self._report("vring-misaligned", where, what)
        if da == 0:
            self._report("vring-zero", where, "da is 0")
        if num_fits and align_fits:
            size = VringLayout(num, align).size
            if da != DA_ANY:
                self._rings.append(_Range(da, size, where))
                _check_ram(self._report, self._ram, self._rings[-1])
            self._ring_homes.append((f"vdev{index}vring{number}", where, da, size, align))
        self._lint_notify_id(self._vring_ids, notify_id, where)
        return int(num) if num_fits else 0

    def _lint_together(self) -> None:
        """What entries do to each other, and to what is loaded."""
        if not self._vdevs:
            self._report("no-vdev", "resource table", "there is no vdev entry")
        placed = self._lint_homes()
        self._lint_shared()
        fixed = self._first_carveouts()
        for name, where, needed in self._buffers:
            room = fixed[name].size if name in fixed else self._any_carveouts.get(name, needed)
            if room < needed:
                what = f"carveout {name!r} has {room:#x} bytes, {needed:#x} are needed"
                self._report("buffers-do-not-fit", where, what)
        names = {name for name, *_ in self._buffers} | {name for name, *_ in self._ring_homes}
        used = [memory for name, memory in fixed.items() if name in names]
        contents = [load.content for load in self._loads if load.file_size][:_MOST_COMPARED]
        for memory in (*self._rings[:_MOST_COMPARED], *used):
            for other in (*self._place, *contents):
                if memory.meets(other):
                    what = f"{memory} overlap {other.what} at {other.da:#x}"
                    self._report("memory-overlaps-image", memory.what, what)
                    break
        buffers = [memory for name, memory in fixed.items() if name.endswith("buffer")]
        for below, above in pairwise(sorted(self._rings + placed + buffers)):
            if below.end > above.da:
                what = f"{below} overlap {above.what} at {above.da:#x}"
                self._report("rings-overlap", below.what, what)
        self._lint_carveouts(names)
        homes = [*(load.memory for load in self._loads), *self._carveouts]
        for trace in self._traces[:_MOST_COMPARED]:
            if not any(home.holds(trace) for home in homes):
                self._report("trace-outside", trace.what, f"{trace} are in no segment or carveout")

    def _first_carveouts(self) -> dict[str, _Range]:
        """By name: what comes later with a name lies in the first."""
        return {memory.what: memory for memory in reversed(self._carveouts)}

    def _lint_shared(self) -> None:
        first: dict[str, _Range] = {}
        for is_any, name, memory in sorted(self._named, key=lambda each: each[0]):
            home = first.setdefault(name, memory)
            there = memory._replace(da=home.da) if is_any else memory
            if not home.holds(there):
                what = f"{memory.size:#x} bytes; the first named {name!r} has {home}"
                self._report("carveout-shared", memory.what, what)

    def _lint_homes(self) -> list[_Range]:
        """Returns where vrings for any address lie, whose carveouts have a fixed one."""
        placed = []
        fixed = self._first_carveouts()
        for name, where, da, size, align in self._ring_homes:
            home = fixed.get(name)
            room = self._any_carveouts.get(name)
            if home is not None:
                place = home.da if da == DA_ANY else da
                if da == DA_ANY:
                    placed.append(_Range(place, size, where))
                bad = not home.holds(_Range(place, size, "")) or bool(place % align)
            else:
                bad = room is not None and (size > room or da != DA_ANY)
            if bad:
                what = f"it needs {size:#x} bytes aligned to {align:#x}; carveout {name!r} has "
                what += f"{home if home is not None else hex(room or 0)}"
                self._report("vring-carveout", where, what)
        return placed

    def _lint_carveouts(self, names: set[str]) -> None:
        plain = sorted(memory for memory in self._carveouts if memory.what not in names)
        for below, above in pairwise(plain):
            if below.end > above.da and below.what != above.what and not below.holds(above):
                what = f"{below} overlap {above.what!r} at {above.da:#x}"
                self._report("carveouts-overlap", f"carveout {below.what!r}", what)
        for memory in plain[:_MOST_COMPARED]:
            for load in self._loads[:_MOST_COMPARED]:
                if memory.meets(load.memory) and not memory.holds(load.memory):
                    what = f"{memory} hold a part of {load.memory.what}: {load.memory}"
                    self._report("carveout-cuts-segment", f"carveout {memory.what!r}", what)
