"""The registers of a core that QEMU shows, and what they tell of a fault.

Reference: Armv7-M Architecture Reference Manual, B1.5 (exceptions) and B3.2 (fault status);
RISC-V Privileged Architecture, 3.1 (machine-level CSRs).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from openamp_py.constants import EM_AARCH64, EM_ARM, EM_RISCV
from openamp_py.errors import CrashKind

Read: TypeAlias = Callable[[int, int], bytes | None]
"""Memory as the core sees it, by address and size; None where it cannot be read."""

# "R00=2100ffd0 R01=...", "XPSR=41000003 -Z-- T handler"; "PC=... X00=...", "PSTATE=600003c5"
_ARM_REGISTER: Final = re.compile(r"\b(R\d\d|X?PSR|X\d\d|PC|SP|PSTATE)=([0-9a-fA-F]{8,16})\b")
_ARM_NAMES: Final = {
    **{f"R{number:02}": f"r{number}" for number in range(13)},
    **{f"X{number:02}": f"x{number}" for number in range(31)},
    **{"R13": "sp", "R14": "lr", "R15": "pc", "PSR": "cpsr", "XPSR": "xpsr"},
    **{"PC": "pc", "SP": "sp", "PSTATE": "cpsr"},
}
# " pc       8000000c", " x8/s0    00000000"
_RISCV_REGISTER: Final = re.compile(r"\b([a-z]\w*)(?:/(\w+))? +([0-9a-fA-F]{8,16})\b")
_RISCV_NAMES: Final = (
    *("pc", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "fp", "s1"),
    *(f"a{number}" for number in range(8)),
    *(f"s{number}" for number in range(2, 12)),
    *("t3", "t4", "t5", "t6"),
    *("mhartid", "mstatus", "mip", "mie", "mtvec", "mepc", "mcause", "mtval", "mscratch", "satp"),
)


@dataclass(frozen=True, slots=True)
class Fault:
    """What a core's registers tell of a fault.

    Attributes:
        what: in words, as in "bus fault, precise, at address 0xdead0000".
        kind: whether it touched memory that it may not, or anything else.
        address: that of the memory, where it is known.
        pc: the instruction that faulted, where it is known.
        registers: at the fault; those of its handler where the core did not keep them. Registers
            that say why are among them.
    """

    what: str
    kind: CrashKind
    address: int | None
    pc: int | None
    registers: dict[str, int]


def parse_registers(elf_machine: int, text: str) -> dict[str, int]:
    """Read the registers that QEMU prints: on its monitor, or when it gives up on a locked-up core.

    Returns:
        By gdb's names; what the text does not have, or has in another form, is left out. Of a
        register that is printed twice the first counts.
    """
    found: dict[str, int] = {}
    if elf_machine in (EM_ARM, EM_AARCH64):
        for match in _ARM_REGISTER.finditer(text):
            name = _ARM_NAMES.get(match[1])
            if name is not None:
                found.setdefault(name, int(match[2], 16))
    elif elf_machine == EM_RISCV:
        for match in _RISCV_REGISTER.finditer(text):
            name = match[2] or match[1]
            name = "fp" if name == "s0" else name
            if name in _RISCV_NAMES:
                found.setdefault(name, int(match[3], 16))
    return found


def find_fault(elf_machine: int, registers: Mapping[str, int], read: Read) -> Fault | None:
    """Tell whether a core is in the handler of a fault, and of which.

    A Cortex-M pushes its registers when it takes an exception: those are found through the link
    register, or where a handler saved it, and come in place of the handler's own. A fault on the
    process stack is found by r0, where handlers by convention hold the frame: QEMU does not show
    that stack pointer before version 8.

    Args:
        registers: as of `parse_registers`.
        read: the core's own view of memory, its system registers included.

    Returns:
        None where it is in none.
    """
    if elf_machine == EM_RISCV:
        return _riscv_fault(registers)
    if elf_machine == EM_ARM:
        return _cortex_m_fault(registers, read) if "xpsr" in registers else _arm_fault(registers)
    return None


_EXCEPTION_MASK: Final = 0x1FF  # IPSR
_EXCEPTIONS: Final = {
    2: "non-maskable interrupt",
    3: "hard fault",
    4: "memory fault",
    5: "bus fault",
    6: "usage fault",
    7: "secure fault",
}
_HARD_FAULT: Final = 3

# SCB: CFSR u32, HFSR u32, DFSR u32, MMFAR u32, BFAR u32
_FAULT_STATUS: Final = struct.Struct("<IIIII")
_FAULT_STATUS_DA: Final = 0xE000_ED28

# By bit of CFSR: exception it belongs to, what it means. Bits 0..7 are those of the MPU (MMFSR),
# 8..15 of the bus (BFSR), 16..31 of use (UFSR).
_CAUSES: Final = {
    0: (4, "memory fault, instruction fetch"),
    1: (4, "memory fault, data access"),
    3: (4, "memory fault, leaving an exception"),
    4: (4, "memory fault, entering an exception"),
    5: (4, "memory fault, saving floating point"),
    8: (5, "bus fault, instruction fetch"),
    9: (5, "bus fault, precise"),
    10: (5, "bus fault, imprecise"),
    11: (5, "bus fault, leaving an exception"),
    12: (5, "bus fault, entering an exception"),
    13: (5, "bus fault, saving floating point"),
    16: (6, "usage fault, undefined instruction"),
    17: (6, "usage fault, not in Thumb state"),
    18: (6, "usage fault, impossible return from an exception"),
    19: (6, "usage fault, no coprocessor"),
    20: (6, "usage fault, stack overflow"),
    24: (6, "usage fault, unaligned access"),
    25: (6, "usage fault, division by zero"),
}
_MMFAR_VALID: Final = 1 << 7
_BFAR_VALID: Final = 1 << 15
_VECTOR_READ: Final = 1 << 1  # of HFSR
_FETCHES: Final = (0, 8)

# What a Cortex-M pushes: r0, r1, r2, r3, r12, lr, pc, xpsr; and with floating point s0..s15,
# fpscr and a word more. One more word below the old stack pointer makes it a multiple of 8.
_FRAME: Final = struct.Struct("<8I")
_FRAME_NAMES: Final = ("r0", "r1", "r2", "r3", "r12", "lr", "pc", "xpsr")
_FLOAT_SIZE: Final = 18 * 4
_ALIGNED: Final = 1 << 9  # of the xpsr pushed
_RESERVED: Final = 0xF << 20  # of it: always 0

# EXC_RETURN, what a handler has in lr: 0xFFFFFF80 and these bits.
_RETURN_FIRST: Final = 0xFFFF_FF80
_RETURN_RESERVED: Final = 1 << 1
_RETURN_PROCESS_STACK: Final = 1 << 2
_RETURN_THREAD: Final = 1 << 3
_RETURN_NO_FLOAT: Final = 1 << 4

_SEARCHED: Final = 64  # words of stack: more than a handler written in C saves


def _cortex_m_fault(registers: Mapping[str, int], read: Read) -> Fault | None:
    number = registers["xpsr"] & _EXCEPTION_MASK
    name = _EXCEPTIONS.get(number)
    if name is None:
        return None
    before = _find_frame(registers, read)
    pc = None if before is None else before["pc"]
    found = {**registers, **(before or {})}
    status = _read(read, _FAULT_STATUS_DA, _FAULT_STATUS.size)
    if status is None:
        return Fault(name, CrashKind.FATAL_ERROR, None, pc, found)
    cfsr, hfsr, _, mmfar, bfar = _FAULT_STATUS.unpack(status)
    found |= {"cfsr": cfsr, "hfsr": hfsr, "mmfar": mmfar, "bfar": bfar}
    if number == _HARD_FAULT and hfsr & _VECTOR_READ:
        return Fault(f"{name}, reading the vector table", CrashKind.FATAL_ERROR, None, pc, found)
    for bit, (exception, cause) in _CAUSES.items():
        if cfsr & 1 << bit and number in (exception, _HARD_FAULT):
            address = pc if bit in _FETCHES else None
            if exception == 4 and cfsr & _MMFAR_VALID:
                address = mmfar
            elif exception == 5 and cfsr & _BFAR_VALID:
                address = bfar
            kind = CrashKind.FATAL_ERROR if exception == 6 else CrashKind.MMU_FAULT
            return Fault(_at(cause, address), kind, address, pc, found)
    return Fault(name, CrashKind.FATAL_ERROR, None, pc, found)


def _find_frame(registers: Mapping[str, int], read: Read) -> dict[str, int] | None:
    """The registers at the fault, of those that the core pushed."""
    stack = registers.get("sp", 0)
    if _is_return(registers.get("lr", 0)):
        return _frame_of(registers["lr"], stack, registers, read)
    for at in range(stack, stack + 4 * _SEARCHED, 4):
        word = _read(read, at, 4)
        if word is None:
            break
        value = int.from_bytes(word, "little")
        if _is_return(value):
            frame = _frame_of(value, at + 4, registers, read)
            if frame is not None:
                return frame
    return None


def _is_return(value: int) -> bool:
    return value >= _RETURN_FIRST and not value & _RETURN_RESERVED


def _frame_of(
    value: int, main: int, registers: Mapping[str, int], read: Read
) -> dict[str, int] | None:
    """The frame that a return by this value would take, where there is one."""
    stacks = [main]
    if value & _RETURN_PROCESS_STACK:
        stacks = [registers[name] for name in ("psp", "r0") if name in registers]
    for stack in stacks:
        data = None if stack % 4 else _read(read, stack, _FRAME.size)
        if data is None:
            continue
        frame = dict(zip(_FRAME_NAMES, _FRAME.unpack(data), strict=True))
        in_thread = not frame["xpsr"] & _EXCEPTION_MASK
        if frame["xpsr"] & _RESERVED or in_thread != bool(value & _RETURN_THREAD):
            continue
        size = _FRAME.size + (0 if value & _RETURN_NO_FLOAT else _FLOAT_SIZE)
        frame["sp"] = stack + size + (4 if frame["xpsr"] & _ALIGNED else 0)
        return frame
    return None


def _read(read: Read, da: int, size: int) -> bytes | None:
    """All of the bytes, or None."""
    data = read(da, size)
    return data if data is not None and len(data) == size else None


_MODE_MASK: Final = 0x1F
_MODES: Final = {
    0x17: ("data or prefetch abort", CrashKind.MMU_FAULT),
    0x1B: ("undefined instruction", CrashKind.FATAL_ERROR),
}


def _arm_fault(registers: Mapping[str, int]) -> Fault | None:
    """The mode tells; how far its lr is behind the instruction depends on more than is shown."""
    mode = _MODES.get(registers.get("cpsr", 0) & _MODE_MASK)
    if mode is None:
        return None
    what, kind = mode
    return Fault(what, kind, None, None, dict(registers))


_MIE: Final = 1 << 3  # of mstatus
_ILLEGAL_INSTRUCTION: Final = 2
_TRAPS: Final = {
    0: "instruction address misaligned",
    1: "instruction access fault",
    _ILLEGAL_INSTRUCTION: "illegal instruction",
    3: "breakpoint",
    4: "load address misaligned",
    5: "load access fault",
    6: "store address misaligned",
    7: "store access fault",
    12: "instruction page fault",
    13: "load page fault",
    15: "store page fault",
}
"""By mcause; calls of the environment (8 to 11) are no faults."""
_NO_ADDRESS: Final = (_ILLEGAL_INSTRUCTION, 3)


def _riscv_fault(registers: Mapping[str, int]) -> Fault | None:
    cause = registers.get("mcause", 0)
    pc = registers.get("mepc", 0)
    # Interrupts have the highest bit set, and so are in no table. All zero: it never trapped.
    what = _TRAPS.get(cause)
    if what is None or registers.get("mstatus", 0) & _MIE or not (cause or pc):
        return None
    value = registers.get("mtval", 0)
    found = {**registers, "pc": pc}
    if cause == _ILLEGAL_INSTRUCTION:
        digits = 4 if value & 3 != 3 else 8  # compressed ones have two bytes
        what = f"{what} {value:#0{digits + 2}x}" if value else what
    if cause in _NO_ADDRESS:
        return Fault(what, CrashKind.FATAL_ERROR, None, pc, found)
    return Fault(_at(what, value), CrashKind.MMU_FAULT, value, pc, found)


def _at(what: str, address: int | None) -> str:
    return what if address is None else f"{what}, at address {address:#x}"
