"""What QEMU prints of a core's registers, and what they say about a fault."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """What a core faulted of.

    Attributes:
        what: in words.
        address: the address that faulted, where it is known.
        registers: at the fault.
        pc: the instruction that faulted.
    """

    what: str
    address: int | None
    registers: Mapping[str, int]
    pc: int


def parse_registers(elf_machine: int, text: str) -> dict[str, int]:
    """Registers by gdb's names."""
    found = re.findall(r"(\w+)=([0-9a-f]+)", text)
    return {"pc" if name == "R15" else name.lower(): int(value, 16) for name, value in found}


def find_fault(
    elf_machine: int,
    elf_class: int,
    registers: Mapping[str, int],
    read: Callable[[int, int], bytes | None],
) -> Fault | None:
    """The fault whose handler a core is in, or None."""
    return None
