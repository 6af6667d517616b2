"""The state of a crashed core as an ELF core file, as Linux's remoteproc writes it, with notes.

Without a reason and registers the file is byte for byte what Linux writes. The notes tell a
debugger the rest: ``gdb FIRMWARE CORE`` shows where the core was, and why. They are

    CORE       NT_PRSTATUS  the registers, for the machines of `REGISTER_SETS`
    CORE       NT_SIGINFO   the signal and the address that faulted: gdb's $_siginfo
    openamp_py NOTE_REASON  text, a "name: value" a line: reason, kind, time, and registers that
                            NT_PRSTATUS has no place for

Reference: System V ABI, chapters 4 and 5; Linux, ``remoteproc_coredump.c``, ``elfcore.h``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from openamp_py.constants import EM_AARCH64, EM_ARM, EM_RISCV, EM_X86_64
from openamp_py.errors import CrashKind
from openamp_py.remoteproc.elf import Segment

NOTE_OWNER: Final = "openamp_py"
"""Owner of the note with the reason."""

NOTE_REASON: Final = 0x4F41_4D50
"""Type of the note with the reason: "OAMP", for tools that name small numbers by the kernel's."""

PIECE_SIZE: Final = 1 << 20
"""At most so many bytes of memory are handed out at once."""

MAX_SEGMENTS: Final = 0xFFFE - 1
"""A program header count of 0xFFFF means something else (PN_XNUM), and one is for the notes."""

_MAX_MACHINE: Final = 0xFFFF
_UNREADABLE: Final = 0xFF  # what Linux writes for memory that it cannot reach

_MAGIC: Final = b"\x7fELF"
_LITTLE_ENDIAN: Final = 1  # ELFDATA2LSB
_VERSION: Final = 1  # EV_CURRENT
_ET_CORE: Final = 4
_PT_LOAD: Final = 1
_PT_NOTE: Final = 4
_READ_WRITE_EXECUTE: Final = 7

_NT_PRSTATUS: Final = 1
_NT_SIGINFO: Final = 0x53494749  # "SIGI"
_KERNEL_OWNER: Final = "CORE"
_NOTE_ALIGN: Final = 4
_THREAD: Final = 1  # gdb takes a thread of number 0 for none
_KERNEL_FOUND_IT: Final = 1  # si_code: above 0 is not "sent by a process"


@dataclass(frozen=True, slots=True)
class DumpSegment:
    """Memory that goes into a coredump.

    Attributes:
        da: device address of its first byte.
        data: the bytes; of memory that is shared, or a copy of it.
        unreadable: bytes behind them that could not be reached; they read as 0xFF.
    """

    da: int
    data: memoryview | bytes = field(repr=False)
    unreadable: int = 0

    @property
    def size(self) -> int:
        """Bytes of memory that it covers."""
        return memoryview(self.data).nbytes + self.unreadable


@dataclass(frozen=True, slots=True)
class RegisterSet:
    """How a machine's registers lie in NT_PRSTATUS (pr_reg of elf_prstatus).

    Attributes:
        names: gdb's, in the order of the structure.
        word: bytes of each.
        offset: of the first one.
        size: bytes of the structure.
        aliases: other names of some, and those of theirs that are in `names`.
    """

    names: tuple[str, ...]
    word: int
    offset: int
    size: int
    aliases: Mapping[str, str] = field(default_factory=dict)

    def own_names(self, registers: Mapping[str, int]) -> dict[str, int]:
        """The same registers, by the names that are in `names` where they have such."""
        return {self.aliases.get(name, name): value for name, value in registers.items()}


_X86_64: Final = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8"),
    *("rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss"),
    *("fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_AARCH64: Final = (*(f"x{number}" for number in range(31)), "sp", "pc", "cpsr")
_ARM: Final = (
    *(f"r{number}" for number in range(13)),
    *("sp", "lr", "pc", "cpsr", "orig_r0"),
)
_RISCV: Final = (
    *("pc", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "fp", "s1"),
    *(f"a{number}" for number in range(8)),
    *(f"s{number}" for number in range(2, 12)),
    *("t3", "t4", "t5", "t6"),
)

REGISTER_SETS: Final[Mapping[tuple[int, int], RegisterSet]] = {
    (EM_X86_64, 64): RegisterSet(_X86_64, 8, 112, 336),
    (EM_AARCH64, 64): RegisterSet(_AARCH64, 8, 112, 392),
    (EM_ARM, 32): RegisterSet(_ARM, 4, 72, 148, {"xpsr": "cpsr"}),  # gdb's word on a Cortex-M
    (EM_RISCV, 32): RegisterSet(_RISCV, 4, 72, 204, {"s0": "fp"}),
    (EM_RISCV, 64): RegisterSet(_RISCV, 8, 112, 376, {"s0": "fp"}),
}
"""By e_machine and ELF class."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """The structures of one ELF class."""

    ident: int  # ELFCLASS32, ELFCLASS64
    limit: int  # of addresses, sizes and offsets
    # e_ident (magic, class, data, version, 9 of padding), e_type, e_machine, e_version, e_entry,
    # e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx
    ehdr: struct.Struct
    # 32: p_type, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_flags, p_align
    # 64: p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
    phdr: struct.Struct
    # si_signo, si_errno, si_code, si_addr at the next multiple of its size
    siginfo: struct.Struct


_LAYOUTS: Final = {
    32: _Layout(
        1,
        1 << 32,
        struct.Struct("<4sBBB9xHHIIIIIHHHHHH"),
        struct.Struct("<8I"),
        struct.Struct("<iiiI112x"),
    ),
    64: _Layout(
        2,
        1 << 64,
        struct.Struct("<4sBBB9xHHIQQQIHHHHHH"),
        struct.Struct("<IIQQQQQQ"),
        struct.Struct("<iii4xQ104x"),
    ),
}


@dataclass(frozen=True, slots=True)
class Coredump:
    """What a core leaves behind.

    Attributes:
        machine: e_machine of its firmware.
        elf_class: 32 or 64.
        entry: device address at which it was started.
        segments: its memory.
        reason: why there is a dump, in words; a line.
        kind: what kind of crash it was.
        signal: number of the signal that ended it, or 0.
        fault_address: the address that faulted, where it is known.
        registers: by gdb's names.
        time: when, in seconds since 1970 (UTC).
    """

    machine: int
    elf_class: int
    entry: int
    segments: tuple[DumpSegment, ...] = ()
    reason: str = ""
    kind: CrashKind | None = None
    signal: int = 0
    fault_address: int | None = None
    registers: Mapping[str, int] = field(default_factory=dict)
    time: float | None = None


def dump_segments(
    segments: Iterable[Segment],
    find: Callable[[int, int], memoryview | None],
    extra: Iterable[tuple[int, int]] = (),
) -> tuple[DumpSegment, ...]:
    """The memory of a loaded image, for its coredump.

    Args:
        segments: of the firmware.
        find: the memory at a device address and of a size, or None where it cannot be reached:
            `MemoryMap.find_da`, or a platform's `translate`.
        extra: device address and size of vrings, carveouts, buffers and the like. One that lies
            in a part that is dumped already adds nothing.

    Returns:
        One for each part that is not empty, in the order given: views of the memory, not copies.
    """
    found: list[DumpSegment] = []
    for segment in segments:
        if segment.memory_size:
            found.append(_dump_segment(segment.da, segment.memory_size, find))
    for da, size in extra:
        covered = any(s.da <= da and da + size <= s.da + s.size for s in found)
        if size and not covered:
            found.append(_dump_segment(da, size, find))
    return tuple(found)


def _dump_segment(da: int, size: int, find: Callable[[int, int], memoryview | None]) -> DumpSegment:
    view = find(da, size)
    return DumpSegment(da, b"", size) if view is None else DumpSegment(da, view)


def coredump_size(dump: Coredump) -> int:
    """Bytes that `encode_coredump` yields in all.

    Raises:
        ValueError: as there.
    """
    return len(_encode_headers(dump)) + sum(segment.size for segment in dump.segments)


def encode_coredump(dump: Coredump) -> Iterator[bytes | memoryview]:
    """The file in pieces: its headers and notes, then the memory, at most `PIECE_SIZE` at a time.

    The memory is not copied: a piece is what the memory holds when the piece is used.

    Raises:
        ValueError: the dump does not fit in an ELF of its class; before the first piece.
    """
    return _pieces(_encode_headers(dump), dump.segments)


def _pieces(headers: bytes, segments: Iterable[DumpSegment]) -> Iterator[bytes | memoryview]:
    yield headers
    filler = b""
    for segment in segments:
        view = memoryview(segment.data).cast("B")
        for start in range(0, len(view), PIECE_SIZE):
            yield view[start : start + PIECE_SIZE]
        for start in range(0, segment.unreadable, PIECE_SIZE):
            filler = filler or bytes([_UNREADABLE]) * PIECE_SIZE
            yield memoryview(filler)[: segment.unreadable - start]


def _encode_headers(dump: Coredump) -> bytes:
    """All that comes before the memory."""
    layout = _LAYOUTS.get(dump.elf_class)
    if layout is None:
        raise ValueError(f"an ELF class of {dump.elf_class}; 32 and 64 are possible")
    if len(dump.segments) > MAX_SEGMENTS:
        raise ValueError(
            f"{len(dump.segments)} segments; an ELF core file holds at most {MAX_SEGMENTS}"
        )
    if not 0 <= dump.machine <= _MAX_MACHINE:
        raise ValueError(f"machine {dump.machine}; an ELF holds at most {_MAX_MACHINE}")
    if not 0 <= dump.entry < layout.limit:
        raise ValueError(f"entry point {dump.entry:#x} is too large for ELF{dump.elf_class}")
    notes = b"".join(_notes(dump, layout))
    count = len(dump.segments) + bool(notes)
    offset = layout.ehdr.size + count * layout.phdr.size
    headers = [
        layout.ehdr.pack(
            _MAGIC,
            layout.ident,
            _LITTLE_ENDIAN,
            _VERSION,
            _ET_CORE,
            dump.machine,
            _VERSION,
            dump.entry,
            layout.ehdr.size,
            0,
            0,
            layout.ehdr.size,
            layout.phdr.size,
            count,
            0,
            0,
            0,
        )
    ]
    if notes:
        headers.append(_program_header(layout, _PT_NOTE, offset, 0, len(notes), 0, _NOTE_ALIGN))
        offset += len(notes)
    for number, segment in enumerate(dump.segments):
        size = segment.size
        if segment.da < 0 or segment.da + size > layout.limit or offset + size > layout.limit:
            raise ValueError(
                f"segment {number}: {size:#x} bytes at {segment.da:#x}, at offset {offset:#x} of "
                f"the file, are too much for ELF{dump.elf_class}: the limit is {layout.limit:#x}"
            )
        headers.append(
            _program_header(layout, _PT_LOAD, offset, segment.da, size, _READ_WRITE_EXECUTE, 0)
        )
        offset += size
    return b"".join(headers) + notes


def _program_header(
    layout: _Layout, type_: int, offset: int, da: int, size: int, flags: int, align: int
) -> bytes:
    if layout is _LAYOUTS[32]:
        return layout.phdr.pack(type_, offset, da, da, size, size, flags, align)
    return layout.phdr.pack(type_, flags, offset, da, da, size, size, align)


def _notes(dump: Coredump, layout: _Layout) -> Iterator[bytes]:
    known = REGISTER_SETS.get((dump.machine, dump.elf_class))
    if known is not None and dump.registers:
        yield _note(_KERNEL_OWNER, _NT_PRSTATUS, _prstatus(dump, known))
    if dump.signal or dump.fault_address is not None:
        address = dump.fault_address
        code = 0 if address is None else _KERNEL_FOUND_IT
        siginfo = layout.siginfo.pack(dump.signal, 0, code, (address or 0) % layout.limit)
        yield _note(_KERNEL_OWNER, _NT_SIGINFO, siginfo)
    lines = []
    if dump.reason:
        lines.append(f"reason: {' '.join(dump.reason.splitlines())}")
    if dump.kind is not None:
        lines.append(f"kind: {dump.kind.value}")
    if dump.time is not None:
        lines.append(f"time: {datetime.fromtimestamp(dump.time, UTC).isoformat()}")
    registers = dump.registers if known is None else known.own_names(dump.registers)
    names = () if known is None else known.names
    lines += [f"{name}: {value:#x}" for name, value in registers.items() if name not in names]
    if lines:
        text = "".join(f"{line}\n" for line in lines)
        yield _note(NOTE_OWNER, NOTE_REASON, text.encode(errors="backslashreplace"))


def _prstatus(dump: Coredump, known: RegisterSet) -> bytes:
    """Of struct elf_prstatus all that a debugger reads of a core without an operating system."""
    status = bytearray(known.size)
    # pr_info (si_signo, si_code, si_errno), pr_cursig
    struct.pack_into("<iiih", status, 0, dump.signal, 0, 0, dump.signal)
    # pr_sigpend and pr_sighold, a word each, stand between pr_cursig and pr_pid
    struct.pack_into("<i", status, 16 + 2 * known.word, _THREAD)
    registers = known.own_names(dump.registers)
    mask = (1 << 8 * known.word) - 1
    for index, name in enumerate(known.names):
        start = known.offset + index * known.word
        value = registers.get(name, 0) & mask
        status[start : start + known.word] = value.to_bytes(known.word, "little")
    return bytes(status)


def _note(owner: str, type_: int, content: bytes) -> bytes:
    name = owner.encode() + b"\0"
    header = struct.pack("<III", len(name), len(content), type_)
    return header + _padded(name) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _NOTE_ALIGN)
