"""Core files: the kernel's to the byte, what pyelftools, readelf and gdb see in ours, limits."""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import signal
import struct
import subprocess
from pathlib import Path

import pytest
import trio
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection
from elftools.elf.segments import NoteSegment
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py import ECHO_CHANNEL, CoreCrashedError, open_session
from openamp_py import firmware as shipped
from openamp_py.errors import CrashKind
from openamp_py.memory import MemoryMap, Region
from openamp_py.platforms.native import NativeCore, shipped_echo
from openamp_py.remoteproc.coredump import (
    MAX_SEGMENTS,
    NOTE_OWNER,
    NOTE_REASON,
    PIECE_SIZE,
    REGISTER_SETS,
    Coredump,
    DumpSegment,
    coredump_size,
    dump_segments,
    encode_coredump,
)
from openamp_py.remoteproc.elf import Segment, decode_elf_untrusted

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "linux"
LIMIT = 30.0

# csrc/firmware/echo_protocol.h
CRASH, HANG = (struct.pack("<I", 0xEF56A500 + n) for n in (1, 2))

X86_64, AARCH64, ARM, RISCV, OTHER = 62, 183, 40, 243, 50


def encoded(dump: Coredump) -> bytes:
    data = b"".join(encode_coredump(dump))
    assert len(data) == coredump_size(dump)
    return data


# What the kernel writes


@pytest.mark.parametrize("release", ["6.1.192", "7.3.4"])
def test_a_dump_without_notes_is_the_kernels_to_the_byte(release: str) -> None:
    path = GOLDEN / f"core-{release}.elf.gz"
    if not path.exists():
        pytest.skip(f"the golden data is not here: {path}")
    golden = gzip.decompress(path.read_bytes())
    dump = Coredump(0, 32, 0x1000_0000, (DumpSegment(0x1000_0000, golden[0x54:]),))
    assert encoded(dump) == golden


# What others read in it

REGISTERS = {
    machine: {name: 0x1000 + number for number, name in enumerate(known.names)}
    for (machine, _), known in REGISTER_SETS.items()
}


def crash(machine: int = X86_64, elf_class: int = 64) -> Coredump:
    return Coredump(
        machine,
        elf_class,
        0x2000_0000,
        (DumpSegment(0x2000_0000, b"code"), DumpSegment(0x2000_1000, b"da", unreadable=3)),
        reason="the core fell over",
        kind=CrashKind.MMU_FAULT,
        signal=11,
        fault_address=0xDEAD_0000,
        registers=REGISTERS.get(machine, {"r0": 1, "pc": 0x2000_0002}),
        time=0.0,
    )


def notes_of(data: bytes) -> dict[tuple[str, str | int], bytes]:
    elf = ELFFile(io.BytesIO(data))
    notes: dict[tuple[str, str | int], bytes] = {}
    for segment in elf.iter_segments("PT_NOTE"):
        assert isinstance(segment, NoteSegment)
        for note in segment.iter_notes():
            start = note["n_offset"] + 12 + -(-note["n_namesz"] // 4) * 4
            notes[note["n_name"], note["n_type"]] = data[start : start + note["n_descsz"]]
    return notes


@pytest.mark.parametrize(("machine", "elf_class"), [(X86_64, 64), (AARCH64, 64), (ARM, 32)])
def test_pyelftools_reads_the_segments(machine: int, elf_class: int) -> None:
    elf = ELFFile(io.BytesIO(encoded(crash(machine, elf_class))))
    assert (elf.elfclass, elf.little_endian) == (elf_class, True)
    assert (elf["e_type"], elf["e_entry"], elf["e_shnum"]) == ("ET_CORE", 0x2000_0000, 0)
    loads = list(elf.iter_segments("PT_LOAD"))
    assert [segment.data() for segment in loads] == [b"code", b"da\xff\xff\xff"]
    assert [segment["p_vaddr"] for segment in loads] == [0x2000_0000, 0x2000_1000]
    assert [segment["p_paddr"] for segment in loads] == [0x2000_0000, 0x2000_1000]
    assert [segment["p_memsz"] for segment in loads] == [4, 5]
    assert [segment["p_flags"] for segment in loads] == [7, 7]


@pytest.mark.parametrize(
    ("machine", "elf_class", "size"),
    [(X86_64, 64, 336), (AARCH64, 64, 392), (RISCV, 64, 376), (ARM, 32, 148), (RISCV, 32, 204)],
)
def test_the_registers_lie_where_linux_puts_them(machine: int, elf_class: int, size: int) -> None:
    """elf_prstatus: pr_cursig at 12, pr_pid at 32 (24), pr_reg at 112 (72) with words of 8 (4)."""
    status = notes_of(encoded(crash(machine, elf_class)))["CORE", "NT_PRSTATUS"]
    assert len(status) == size
    assert struct.unpack_from("<iiih", status) == (11, 0, 0, 11)
    pid, start, word = (32, 112, "Q") if elf_class == 64 else (24, 72, "I")
    assert struct.unpack_from("<i", status, pid) == (1,)
    count = len(REGISTERS[machine])
    values = struct.unpack_from(f"<{count}{word}", status, start)
    assert dict(zip(REGISTERS[machine], values, strict=True)) == REGISTERS[machine]
    assert not any(status[start + elf_class // 8 * count :])


def test_registers_with_another_name_have_a_place_too() -> None:
    cortex_m = Coredump(ARM, 32, 0, registers={"xpsr": 0x0100_0003, "cfsr": 0x8200})
    notes = notes_of(encoded(cortex_m))
    assert struct.unpack_from("<I", notes["CORE", "NT_PRSTATUS"], 72 + 4 * 16) == (0x0100_0003,)
    assert notes[NOTE_OWNER, NOTE_REASON] == b"cfsr: 0x8200\n"
    risc_v = Coredump(RISCV, 64, 0, registers={"s0": 8})
    assert struct.unpack_from("<Q", notes_of(encoded(risc_v))["CORE", "NT_PRSTATUS"], 176) == (8,)


@pytest.mark.parametrize(("elf_class", "address"), [(64, ("<Q", 16)), (32, ("<I", 12))])
def test_the_fault_address_lies_where_siginfo_has_it(
    elf_class: int, address: tuple[str, int]
) -> None:
    notes = notes_of(encoded(crash(ARM, elf_class)))
    (siginfo,) = (content for (_, type_), content in notes.items() if "SIGINFO" in str(type_))
    assert len(siginfo) == 128
    assert struct.unpack_from("<iii", siginfo) == (11, 0, 1)
    assert struct.unpack_from(*address[:1], siginfo, address[1]) == (0xDEAD_0000,)


def test_our_note_says_why_and_has_the_registers_that_have_no_place() -> None:
    text = notes_of(encoded(crash(OTHER, 32)))[NOTE_OWNER, NOTE_REASON].decode()
    assert text == (
        "reason: the core fell over\nkind: mmufault\ntime: 1970-01-01T00:00:00+00:00\n"
        "r0: 0x1\npc: 0x20000002\n"
    )
    assert "r15" not in notes_of(encoded(crash()))[NOTE_OWNER, NOTE_REASON].decode()


def test_a_reason_of_several_lines_cannot_pass_for_other_lines() -> None:
    dump = Coredump(X86_64, 64, 0, reason="first\nkind: forged\r\nlast")
    text = notes_of(encoded(dump))[NOTE_OWNER, NOTE_REASON].decode()
    assert text == "reason: first kind: forged last\n"


def test_what_is_not_known_is_not_noted() -> None:
    assert list(notes_of(encoded(Coredump(X86_64, 64, 0, reason="why")))) == [
        (NOTE_OWNER, NOTE_REASON)
    ]
    assert list(notes_of(encoded(Coredump(X86_64, 64, 0, registers={"rip": 1})))) == [
        ("CORE", "NT_PRSTATUS")
    ]
    assert notes_of(encoded(Coredump(X86_64, 64, 0))) == {}


# Memory


def test_memory_is_handed_out_in_pieces_and_not_copied() -> None:
    memory = memoryview(bytearray(2 * PIECE_SIZE + 1))
    dump = Coredump(X86_64, 64, 0, (DumpSegment(0, memory, unreadable=PIECE_SIZE + 2),))
    pieces = encode_coredump(dump)
    headers = next(pieces)
    memory[0] = 1
    rest = list(pieces)
    assert [len(piece) for piece in rest] == [PIECE_SIZE, PIECE_SIZE, 1, PIECE_SIZE, 2]
    assert rest[0][0] == 1, "what the memory holds now"
    assert bytes(rest[4]) == b"\xff\xff"
    assert coredump_size(dump) == len(headers) + sum(len(piece) for piece in rest)


def test_views_of_wider_elements_are_bytes() -> None:
    view = memoryview(bytearray(PIECE_SIZE + 4)).cast("I")
    _, *pieces = encode_coredump(Coredump(X86_64, 64, 0, (DumpSegment(0, view),)))
    assert [len(piece) for piece in pieces] == [PIECE_SIZE, 4]


def test_a_loaded_image_is_dumped_with_its_zeroes_and_what_else_is_asked_for() -> None:
    ram = memoryview(bytearray(range(256)))
    memory = MemoryMap([Region("ram", 0x1000, 0x1000, ram)])
    segments = [
        Segment(0x1000, b"ab", 4, 5),
        Segment(0x1010, b"", 0, 4),
        Segment(0x10F0, b"", 32, 6),
    ]
    extra = [(0x1001, 2), (0x1002, 4), (0x1040, 0), (0x1080, 8), (0x1082, 1), (0x9000, 3)]
    found = dump_segments(segments, memory.find_da, extra)
    assert [(part.da, part.size, part.unreadable) for part in found] == [
        (0x1000, 4, 0),
        (0x10F0, 32, 32),
        (0x1002, 4, 0),
        (0x1080, 8, 0),
        (0x9000, 3, 3),
    ]
    ram[0x80] = 0xAA
    assert bytes(found[3].data[:2]) == b"\xaa\x81"


# Limits and refusals


@pytest.mark.parametrize(
    ("dump", "message"),
    [
        (Coredump(0, 0, 0), "an ELF class of 0; 32 and 64 are possible"),
        (Coredump(0, 32, 1 << 32), "entry point 0x100000000 is too large for ELF32"),
        (Coredump(0, 64, -1), "entry point"),
        (Coredump(1 << 16, 64, 0), "machine 65536"),
        (Coredump(0, 32, 0, (DumpSegment(0xFFFF_FFFF, b"ab"),)), "segment 0: 0x2 bytes at 0xfff"),
        (Coredump(0, 32, 0, (DumpSegment(-1, b"ab"),)), "segment 0: 0x2 bytes at -0x1"),
        (
            Coredump(0, 32, 0, (DumpSegment(0, b"", 1 << 31), DumpSegment(0, b"", 1 << 31))),
            "segment 1: 0x80000000 bytes at 0x0, at offset 0x80000074 of the file, are too much",
        ),
        (
            Coredump(0, 64, 0, (DumpSegment(0, b""),) * (MAX_SEGMENTS + 1)),
            "65534 segments; an ELF core file holds at most 65533",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_piece(dump: Coredump, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        encode_coredump(dump)
    with pytest.raises(ValueError, match=re.escape(message)):
        coredump_size(dump)


def test_the_last_address_of_a_class_is_possible() -> None:
    dump = Coredump(0, 32, 0xFFFF_FFFF, (DumpSegment(0xFFFF_FFFF, b"a"),))
    assert ELFFile(io.BytesIO(encoded(dump))).get_segment(0)["p_vaddr"] == 0xFFFF_FFFF


# What a hostile core may have left


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.sampled_from([(0, 32), (ARM, 32), (ARM, 64), (X86_64, 64), (AARCH64, 64), (RISCV, 32)]),
    st.text(max_size=40),
    st.integers(0, (1 << 64) - 1) | st.none(),
    st.dictionaries(
        st.sampled_from(["rip", "pc", "x0", "r15", "xpsr", "cpsr", "\ud800", ""]),
        st.integers(-(1 << 64), 1 << 64),
    ),
    st.integers(0, 64),
)
def test_any_last_words_make_a_core_file(
    kind: tuple[int, int],
    reason: str,
    address: int | None,
    registers: dict[str, int],
    number: int,
) -> None:
    machine, elf_class = kind
    dump = Coredump(
        machine,
        elf_class,
        0,
        (DumpSegment(0, b"memory"),),
        reason=reason,
        signal=number,
        fault_address=address,
        registers=registers,
    )
    data = encoded(dump)
    assert ELFFile(io.BytesIO(data)).num_segments() in (1, 2)
    assert data.endswith(b"memory")


# The real thing


async def crashed(path: Path, order: bytes = CRASH) -> CoreCrashedError:
    """Lets the shipped firmware crash, or hang and be interrupted, and dumps it to a file."""
    image = decode_elf_untrusted(shipped_echo().read_bytes())
    with trio.fail_after(LIMIT):
        async with (
            open_session("native", image) as session,
            session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
        ):
            processor = session.processor
            assert processor is not None
            await endpoint.send(order)
            if order == HANG:
                assert isinstance(processor.core, NativeCore)
                assert processor.core.pid is not None
                await _wait_spinning(processor.core.pid)
                os.kill(processor.core.pid, signal.SIGABRT)
            with pytest.raises(trio.BrokenResourceError) as caught:
                await endpoint.receive()
            error = caught.value.__cause__
            assert isinstance(error, CoreCrashedError)
            dump = Coredump(
                image.machine,
                image.elf_class,
                image.entry,
                dump_segments(image.segments, processor.platform.translate),
                reason=str(error),
                kind=error.kind,
                signal=error.signal or 0,
                fault_address=error.address,
                registers=error.registers,
            )
            with path.open("wb") as file:
                for piece in encode_coredump(dump):
                    file.write(piece)
            assert path.stat().st_size == coredump_size(dump)
            return error


async def _wait_spinning(pid: int) -> None:
    """A core that has used three ticks of the clock is past its last words, and hangs."""

    def ticks() -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])

    before = ticks()
    while ticks() < before + 3:
        await trio.lowlevel.checkpoint()


def gdb(core: Path, *commands: str) -> str:
    return run_gdb("gdb", shipped_echo(), core, *commands)


def run_gdb(name: str, image: Path, core: Path, *commands: str) -> str:
    """What a debugger prints of a core, which it must read without complaint."""
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} (Debian package {name})")
    arguments = [argument for command in commands for argument in ("-ex", command)]
    done = subprocess.run(
        [program, "-batch", "-nx", str(image), str(core), *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    # In what order a checkout writes its files is chance.
    complaints = done.stderr.replace("warning: Source file is more recent than executable.", "")
    assert complaints.strip() == ""
    return done.stdout


async def test_gdb_shows_where_and_why_a_core_crashed(tmp_path: Path) -> None:
    core = tmp_path / "core"
    error = await crashed(core)
    shown = gdb(
        core,
        "p $_siginfo._sifields._sigfault.si_addr",
        "info registers pc",
        "x/s trace_buffer",
        "p resource_table.vdev.status",
        "bt",
    )
    assert "terminated with signal SIGSEGV" in shown
    assert "$1 = (void *) 0xdead0000" in shown
    assert re.search(rf"^pc +{error.pc:#x} .*<port_crash\+\d+>$", shown, re.MULTILINE)
    assert re.search(r'<trace_buffer>:\s"booted: .*crash on request\\n"', shown)
    assert "$2 = 15" in shown, "driver ready, to the host's last word"
    frames = re.findall(r"^#\d+ .*?(\w+) \(", shown.rpartition("#0 ")[2], re.MULTILINE)
    assert {"crash", "firmware_main", "native_start", "firmware_entry"} <= set(frames)
    assert "Backtrace stopped" not in shown


@pytest.mark.parametrize(
    ("name", "registers", "thumb"),
    [
        ("echo-cortex-m3.elf", ("pc", "lr", "sp", "r4", "xpsr"), 1),
        ("echo-rv32.elf", ("pc", "ra", "sp", "fp", "t6"), 0),
        ("echo-rv64.elf", ("pc", "ra", "sp", "fp", "t6"), 0),
    ],
)
def test_gdb_shows_where_a_core_of_another_machine_was(
    tmp_path: Path, name: str, registers: tuple[str, ...], thumb: int
) -> None:
    firmware = Path(shipped.path(name))
    image = decode_elf_untrusted(firmware.read_bytes())
    with firmware.open("rb") as file:
        symbols = ELFFile(file).get_section_by_name(".symtab")
        assert isinstance(symbols, SymbolTableSection)
        places = {symbol.name: symbol["st_value"] & ~1 for symbol in symbols.iter_symbols()}
    crash_at, main_at = places["port_crash"], places["firmware_main"]
    # At the first instruction of one function, called from the other.
    values = (crash_at, main_at + 8 + thumb, image.segments[0].da + 0x8000, 0x1234, 0x0100_0000)
    dump = Coredump(
        image.machine,
        image.elf_class,
        image.entry,
        tuple(DumpSegment(segment.da, bytes(segment.data)) for segment in image.segments),
        signal=11,
        fault_address=0xDEAD_0000,
        registers=dict(zip(registers, values, strict=True)),
    )
    core = tmp_path / "core"
    core.write_bytes(encoded(dump))
    commands = ("info registers", "bt", "p $_siginfo._sifields._sigfault.si_addr")
    shown = run_gdb("gdb-multiarch", firmware, core, *commands)
    assert "terminated with signal SIGSEGV" in shown
    for register, value in zip(registers, values, strict=True):
        gdbs = "cpsr" if register == "xpsr" else register
        assert re.search(rf"^{gdbs}\s+{value:#x}\s", shown, re.MULTILINE), register
    assert re.search(r"^#0 .*\bport_crash \(", shown, re.MULTILINE)
    assert re.search(r"^#1 .*\bfirmware_main \(", shown, re.MULTILINE)
    assert "$1 = (void *) 0xdead0000" in shown


async def test_gdb_shows_where_a_hung_core_was_interrupted(tmp_path: Path) -> None:
    core = tmp_path / "core"
    error = await crashed(core, HANG)
    assert str(error) == f"the core died of SIGABRT: interrupted at pc {error.pc:#x}"
    assert error.address is None
    shown = gdb(core, "x/s trace_buffer", "bt")
    assert "terminated with signal SIGABRT" in shown
    assert r"hang on request\n" in shown
    assert re.search(r"^#0 +(0x\w+ in )?hang \(\)", shown, re.MULTILINE)


async def test_readelf_and_pyelftools_read_it_without_complaint(tmp_path: Path) -> None:
    core = tmp_path / "core"
    error = await crashed(core)
    notes = notes_of(core.read_bytes())
    assert len(notes) == 3
    assert str(error) in notes[NOTE_OWNER, NOTE_REASON].decode()
    program = shutil.which("readelf")
    if program is None:
        pytest.skip("readelf (Debian package binutils)")
    done = subprocess.run(
        [program, "-hlnW", str(core)], capture_output=True, text=True, timeout=LIMIT, check=True
    )
    assert done.stderr == "" and "arning" not in done.stdout
    assert "CORE (Core file)" in done.stdout
    assert "NT_PRSTATUS" in done.stdout and "NT_SIGINFO" in done.stdout
