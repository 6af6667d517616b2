"""Registers and faults: what QEMU printed, every kind of fault, and text from anywhere."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest
import register_dumps
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py.errors import CrashKind
from openamp_py.platforms.registers import Fault, Read, find_fault, parse_registers
from openamp_py.remoteproc.coredump import REGISTER_SETS

ARM, AARCH64, RISCV, X86_64 = 40, 183, 243, 62
FAULT_STATUS = 0xE000_ED28

deterministic = settings(derandomize=True, deadline=None, max_examples=300)


def memory(parts: Mapping[int, bytes]) -> Read:
    def read(da: int, size: int) -> bytes | None:
        for start, data in parts.items():
            if start <= da and da + size <= start + len(data):
                return data[da - start :][:size]
        return None

    return read


def frame(*words: int) -> bytes:
    """r0, r1, r2, r3, r12, lr, pc, xpsr"""
    return struct.pack("<8I", *words)


LOAD = (0xDEAD_0000, 0x11, 0x22, 0x33, 0xCC, 0x2100_00F1, 0x2100_00CC, 0x4100_0000)
"""The frame of the load in `register_dumps.CORTEX_M3`."""


def status(cfsr: int, hfsr: int = 0, mmfar: int = 0, bfar: int = 0) -> bytes:
    return struct.pack("<5I", cfsr, hfsr, 0, mmfar, bfar)


def cortex_m(
    exception: int, cfsr: int = 0, hfsr: int = 0, mmfar: int = 0xA0, bfar: int = 0xB0
) -> Fault | None:
    """A fault with a frame on the main stack."""
    registers = {"xpsr": 0x100_0000 | exception, "lr": 0xFFFF_FFF9, "sp": 0x2000, "r4": 4, "r0": 9}
    parts = {0x2000: frame(*LOAD), FAULT_STATUS: status(cfsr, hfsr, mmfar, bfar)}
    return find_fault(ARM, registers, memory(parts))


# What QEMU printed


@pytest.mark.parametrize(
    ("machine", "text", "some", "count"),
    [
        (ARM, register_dumps.CORTEX_M3, {"r4": 0x44, "sp": 0x2100_FFD0, "xpsr": 0x4100_0005}, 17),
        (ARM, register_dumps.CORTEX_M3_LOCK_UP, {"pc": 0x2100_0082, "lr": 0xFFFF_FFF9}, 17),
        (ARM, register_dumps.CORTEX_M4, {"lr": 0xFFFF_FFE9, "r12": 0xCC}, 17),
        (ARM, register_dumps.ARM, {"pc": 0x4020_0010, "cpsr": 0x1D3, "sp": 0x4030_0000}, 17),
        (AARCH64, register_dumps.AARCH64, {"x1": 0x4030_0000, "pc": 0x4020_0014, "x30": 0}, 34),
        (RISCV, register_dumps.RV32, {"a5": 0xDEAD_0000, "mcause": 5, "mtval": 0xDEAD_0000}, 42),
        (RISCV, register_dumps.RV64, {"mepc": 0x8000_0034, "fp": 0, "t1": 0x7777}, 42),
    ],
)
def test_registers_have_the_names_that_gdb_gives_them(
    machine: int, text: str, some: dict[str, int], count: int
) -> None:
    found = parse_registers(machine, text)
    assert some.items() <= found.items()
    assert len(found) == count
    assert parse_registers(machine, text.replace("\n", "\r\n")) == found


@pytest.mark.parametrize(
    ("machine", "elf_class", "text"),
    [
        (ARM, 32, register_dumps.ARM),
        (ARM, 32, register_dumps.CORTEX_M3),
        (AARCH64, 64, register_dumps.AARCH64),
        (RISCV, 32, register_dumps.RV32),
        (RISCV, 64, register_dumps.RV64),
    ],
)
def test_all_that_a_core_file_has_a_place_for_is_found(
    machine: int, elf_class: int, text: str
) -> None:
    known = REGISTER_SETS[machine, elf_class]
    found = known.own_names(parse_registers(machine, text))
    assert set(known.names) - found.keys() <= {"orig_r0"}


def test_a_fault_of_a_cortex_m_is_told_with_the_registers_it_pushed() -> None:
    registers = parse_registers(ARM, register_dumps.CORTEX_M3)
    parts = {registers["sp"]: frame(*LOAD), FAULT_STATUS: status(0x8200, bfar=0xDEAD_0000)}
    fault = find_fault(ARM, registers, memory(parts))
    assert fault is not None
    assert fault.what == "bus fault, precise, at address 0xdead0000"
    assert (fault.kind, fault.address, fault.pc) == (CrashKind.MMU_FAULT, 0xDEAD_0000, 0x2100_00CC)
    pushed = {"r0": 0xDEAD_0000, "r1": 0x11, "r2": 0x22, "r3": 0x33, "r12": 0xCC}
    kept = {"r4": 0x44, "r5": 0x55, "sp": 0x2100_FFF0, "lr": 0x2100_00F1, "pc": 0x2100_00CC}
    why = {"xpsr": 0x4100_0000, "cfsr": 0x8200, "bfar": 0xDEAD_0000, "hfsr": 0, "mmfar": 0}
    assert {**pushed, **kept, **why}.items() <= fault.registers.items()


def test_a_frame_with_floating_point_is_larger() -> None:
    registers = parse_registers(ARM, register_dumps.CORTEX_M4)
    words = (0, 0x11, 0x22, 0x33, 0xCC, 0x2100_00FB, 0x2100_00CA, 0x4100_0000)
    parts = {registers["sp"]: frame(*words), FAULT_STATUS: status(1 << 16, 1 << 30)}
    fault = find_fault(ARM, registers, memory(parts))
    assert fault is not None
    assert fault.what == "usage fault, undefined instruction"
    assert fault.kind is CrashKind.FATAL_ERROR
    assert fault.registers["sp"] == 0x2100_FFF0


def test_a_fault_on_the_process_stack_is_found_by_r0_and_was_aligned() -> None:
    registers = parse_registers(ARM, register_dumps.CORTEX_M33)
    words = (0xDEAD_0000, 0x11, 0x22, 0x33, 0xCC, 0x8000_0105, 0x8000_00CC, 0x4100_0200)
    parts = {0x8000_EFD0: frame(*words), registers["sp"]: frame(*LOAD)}
    fault = find_fault(ARM, registers, memory(parts))
    assert fault is not None
    assert fault.pc == 0x8000_00CC
    assert fault.registers["sp"] == 0x8000_EFD0 + 32 + 4
    newer = {**registers, "psp": 0x8000_EFD0, "r0": 1}
    assert find_fault(ARM, newer, memory(parts)) == Fault(
        fault.what, fault.kind, fault.address, fault.pc, {**fault.registers, "psp": 0x8000_EFD0}
    )


def test_of_a_locked_up_core_the_first_fault_is_told() -> None:
    registers = parse_registers(ARM, register_dumps.CORTEX_M3_LOCK_UP)
    fault = find_fault(ARM, registers, memory({registers["sp"]: frame(*LOAD)}))
    assert fault is not None, "its process has ended: no word of system registers"
    assert (fault.what, fault.pc) == ("hard fault", 0x2100_00CC)


def test_a_handler_that_has_called_another_function_is_seen_through() -> None:
    """As in push {r4, lr}; bl ..."""
    saved = struct.pack("<II", 0x44, 0xFFFF_FFF9)
    registers = {"xpsr": 0x100_0003, "lr": 0x2100_0089, "sp": 0x2000, "r4": 0x77}
    fault = find_fault(ARM, registers, memory({0x2000: saved + frame(*LOAD)}))
    assert fault is not None
    assert (fault.pc, fault.registers["sp"]) == (0x2100_00CC, 0x2008 + 32)


@pytest.mark.parametrize(
    ("cause", "value", "what", "address"),
    [
        (0, 0x8000_0001, "instruction address misaligned, at address 0x80000001", 0x8000_0001),
        (1, 0xDEAD_0000, "instruction access fault, at address 0xdead0000", 0xDEAD_0000),
        (2, 0xFFFF_FFFF, "illegal instruction 0xffffffff", None),
        (2, 0x9002, "illegal instruction 0x9002", None),
        (2, 0, "illegal instruction", None),
        (3, 0x8000_0000, "breakpoint", None),
        (5, 0xDEAD_0000, "load access fault, at address 0xdead0000", 0xDEAD_0000),
        (7, 0, "store access fault, at address 0x0", 0),
        (15, 8, "store page fault, at address 0x8", 8),
    ],
)
def test_faults_of_risc_v(cause: int, value: int, what: str, address: int | None) -> None:
    registers = {"mcause": cause, "mtval": value, "mepc": 0x8000_0034, "pc": 1, "a0": 2}
    fault = find_fault(RISCV, registers, memory({}))
    kind = CrashKind.FATAL_ERROR if address is None else CrashKind.MMU_FAULT
    expected = {**registers, "pc": 0x8000_0034}
    assert fault == Fault(what, kind, address, 0x8000_0034, expected)


def test_the_faults_that_qemu_printed_of_risc_v() -> None:
    for text, what in (
        (register_dumps.RV32, "load access fault, at address 0xdead0000"),
        (register_dumps.RV64, "illegal instruction 0xffffffff"),
    ):
        fault = find_fault(RISCV, parse_registers(RISCV, text), memory({}))
        assert fault is not None
        assert fault.what == what


@pytest.mark.parametrize(
    ("mode", "what"), [(0x17, "data or prefetch abort"), (0x1B, "undefined instruction")]
)
def test_faults_of_a_cortex_a_are_told_by_its_mode(mode: int, what: str) -> None:
    fault = find_fault(ARM, {"cpsr": 0x6000_01C0 | mode, "pc": 4}, memory({}))
    assert fault is not None
    assert (fault.what, fault.pc, fault.registers["pc"]) == (what, None, 4)


# Every cause of a Cortex-M

CAUSES = [
    (4, 1 << 0, "memory fault, instruction fetch, at address 0x210000cc", 0x2100_00CC),
    (4, 1 << 1, "memory fault, data access", None),
    (4, 1 << 1 | 1 << 7, "memory fault, data access, at address 0xa0", 0xA0),
    (4, 1 << 3, "memory fault, leaving an exception", None),
    (4, 1 << 4, "memory fault, entering an exception", None),
    (4, 1 << 5, "memory fault, saving floating point", None),
    (5, 1 << 8, "bus fault, instruction fetch, at address 0x210000cc", 0x2100_00CC),
    (5, 1 << 9 | 1 << 15, "bus fault, precise, at address 0xb0", 0xB0),
    (5, 1 << 10, "bus fault, imprecise", None),
    (5, 1 << 11, "bus fault, leaving an exception", None),
    (5, 1 << 12, "bus fault, entering an exception", None),
    (5, 1 << 13, "bus fault, saving floating point", None),
    (6, 1 << 16, "usage fault, undefined instruction", None),
    (6, 1 << 17, "usage fault, not in Thumb state", None),
    (6, 1 << 18, "usage fault, impossible return from an exception", None),
    (6, 1 << 19, "usage fault, no coprocessor", None),
    (6, 1 << 20, "usage fault, stack overflow", None),
    (6, 1 << 24, "usage fault, unaligned access", None),
    (6, 1 << 25, "usage fault, division by zero", None),
]


@pytest.mark.parametrize(("exception", "cfsr", "what", "address"), CAUSES)
def test_causes_are_told_by_their_own_exception_or_a_hard_fault(
    exception: int, cfsr: int, what: str, address: int | None
) -> None:
    kind = CrashKind.FATAL_ERROR if exception == 6 else CrashKind.MMU_FAULT
    for number in (exception, 3):
        fault = cortex_m(number, cfsr, 1 << 30)
        assert fault is not None
        assert (fault.what, fault.address, fault.kind) == (what, address, kind)
    other = cortex_m(9 - exception if exception != 6 else 4, cfsr)
    assert other is not None
    assert what not in other.what, "it was left by an earlier fault"


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (2, "non-maskable interrupt"),
        (3, "hard fault"),
        (4, "memory fault"),
        (5, "bus fault"),
        (6, "usage fault"),
        (7, "secure fault"),
    ],
)
def test_an_exception_without_a_cause_has_its_name(number: int, what: str) -> None:
    fault = cortex_m(number)
    assert fault is not None
    assert (fault.what, fault.pc) == (what, 0x2100_00CC)


def test_a_fault_at_the_vector_table() -> None:
    fault = cortex_m(3, hfsr=1 << 1)
    assert fault is not None
    assert fault.what == "hard fault, reading the vector table"


# What is no fault


@pytest.mark.parametrize("number", [0, 1, 11, 12, 14, 15, 16, 50, 511])
def test_a_cortex_m_elsewhere_has_no_fault(number: int) -> None:
    assert cortex_m(number, 0x8200) is None


@pytest.mark.parametrize(
    "registers",
    [
        {},
        {"mcause": 0, "mepc": 0, "mtval": 0, "mstatus": 0},
        {"mcause": 0x8000_000B, "mepc": 0x8000_0000},
        {"mcause": 1 << 63 | 11, "mepc": 0x8000_0000},
        {"mcause": 11, "mepc": 0x8000_0000},
        {"mcause": 5, "mepc": 0x8000_0000, "mstatus": 8},
        {"mcause": 10, "mepc": 0x8000_0000},
    ],
)
def test_a_risc_v_elsewhere_has_no_fault(registers: dict[str, int]) -> None:
    assert find_fault(RISCV, registers, memory({})) is None


def test_other_machines_and_modes_have_no_fault() -> None:
    assert find_fault(ARM, {"cpsr": 0x1D3}, memory({})) is None
    assert find_fault(ARM, {}, memory({})) is None
    assert find_fault(AARCH64, {"pc": 1, "cpsr": 0x17}, memory({})) is None
    assert find_fault(X86_64, {"xpsr": 3}, memory({})) is None
    assert parse_registers(X86_64, register_dumps.CORTEX_M3) == {}


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {0x2000: frame(*LOAD)[:-1]},
        {0x2000: frame(*LOAD[:-1], 0x10_0000)},
        {0x2000: frame(*LOAD[:-1], 0x0100_0003)},
    ],
    ids=["no memory", "cut off", "reserved bits", "from a handler"],
)
def test_a_frame_that_cannot_be_one_is_not_used(parts: dict[int, bytes]) -> None:
    registers = {"xpsr": 3, "lr": 0xFFFF_FFF9, "sp": 0x2000, "pc": 0x2100_0000}
    fault = find_fault(ARM, registers, memory(parts))
    assert fault == Fault("hard fault", CrashKind.FATAL_ERROR, None, None, registers)


def test_a_stack_is_searched_so_far_and_no_further() -> None:
    registers = {"xpsr": 3, "lr": 0, "sp": 0x2000}
    back = struct.pack("<I", 0xFFFF_FFF9) + frame(*LOAD)
    for words, pc in ((63, 0x2100_00CC), (64, None)):
        fault = find_fault(ARM, registers, memory({0x2000: bytes(4 * words) + back}))
        assert fault is not None
        assert fault.pc == pc


# Text and values from anywhere


def test_what_is_cut_off_or_not_a_number_is_left_out() -> None:
    assert parse_registers(ARM, "R00=0000000 R01=zzzzzzzz R02=00000002 R99=00000000") == {"r2": 2}
    assert parse_registers(ARM, "R00=00000001\nR00=00000002") == {"r0": 1}
    assert parse_registers(RISCV, " mepc 8000000\n xyz 00000000 a0 00000005") == {"a0": 5}
    assert parse_registers(ARM, "R00=" + "0" * 17) == {}


@deterministic
@given(
    st.sampled_from([ARM, AARCH64, RISCV, X86_64]),
    st.text("RXPSC0123456789abcdef=/ \nme\u0660\ud800", max_size=200),
)
def test_any_text_gives_registers(machine: int, text: str) -> None:
    for value in parse_registers(machine, text).values():
        assert 0 <= value < 1 << 64


@deterministic
@given(
    st.sampled_from([ARM, AARCH64, RISCV]),
    st.dictionaries(
        st.sampled_from(
            ["xpsr", "cpsr", "lr", "sp", "r0", "psp", "mcause", "mepc", "mtval", "mstatus"]
        ),
        st.integers(0, (1 << 64) - 1) | st.integers(0xFFFF_FF80, 0xFFFF_FFFF) | st.integers(0, 16),
    ),
    st.binary(max_size=64),
    st.booleans(),
)
def test_any_registers_and_memory_give_a_fault_or_none(
    machine: int, registers: dict[str, int], data: bytes, long: bool
) -> None:
    fault = find_fault(
        machine,
        registers,
        lambda _, size: (data * size)[: size + long] if data else None,
    )
    if fault is not None:
        assert fault.what
        assert fault.registers.keys() >= registers.keys()
