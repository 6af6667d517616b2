"""The last words of a native core, and what they say about how it ended."""

from __future__ import annotations

import signal
import struct
from typing import Final

from openamp_py.errors import (
    CoreCrashedError,
    CoreDiedError,
    CoreResetError,
    CrashKind,
    PlatformError,
)
from openamp_py.platforms.child import killed
from openamp_py.remoteproc.coredump import REGISTER_SETS

# The report of csrc/native_core.c: kind, signal, code, machine, fault address, registers, text
_REPORT = struct.Struct("=IIiIQ272s96s")
_REGISTER = struct.Struct("=Q")
REPORT_SIZE: Final = _REPORT.size
"""Bytes of a report; there is at most one for each boot."""

_FAULT, _SETUP, _RESET, _HALT = 1, 2, 3, 4
_HALT_CODE_MASK: Final = 0xFF  # of a halt code, what an exit status holds

_SI_KERNEL: Final = 0x80  # a fault for which the machine gives no address
_MEMORY_SIGNALS: Final = (signal.SIGSEGV, signal.SIGBUS)


def judge(returncode: int | None, report: bytes) -> None:
    """Turns the end of a core into nothing, where it was orderly, or into an error.

    The firmware shares the process with whatever wrote the report, so it is taken as a hint
    about the cause and not for whether there was one, where the exit status tells that.

    Args:
        returncode: of the process; None where it is not our child, and the report is all there is.
        report: `REPORT_SIZE` bytes; zeroes where the core wrote none.

    Raises:
        CoreCrashedError: by a fault or a signal.
        CoreResetError: it asked for a reset.
        CoreDiedError: it halted with a code that is not 0.
        PlatformError: it never ran.
    """
    kind, number, code, machine, address, registers, text = _REPORT.unpack(report)
    if returncode is None:
        if kind not in (_FAULT, _SETUP, _RESET, _HALT):
            raise CoreCrashedError("the core was killed or ended without a word")
        returncode = {_FAULT: -number, _HALT: code & _HALT_CODE_MASK}.get(kind, 0)
        crashed = kind == _FAULT
    else:
        crashed = returncode < 0
    if crashed:
        error = killed("the core", returncode)
        if kind == _FAULT:
            raise _fault(error, code, address, _registers(machine, registers))
        raise error
    if kind == _SETUP:
        why = text.partition(b"\0")[0].decode(errors="backslashreplace")
        raise PlatformError(f"the core could not be set up: {why}")
    if kind == _RESET:
        raise CoreResetError("the core asked for a reset", exit_code=returncode)
    if returncode:
        detail = f" (it halted with code {code})" if kind == _HALT else ""
        raise CoreDiedError(
            f"the core ended with exit code {returncode}{detail}", exit_code=returncode
        )


def _fault(
    death: CoreCrashedError, code: int, address: int, registers: dict[str, int]
) -> CoreCrashedError:
    """What a signal and the report of it come to."""
    at: int | None = None
    kind = CrashKind.FATAL_ERROR
    pc = next((registers[name] for name in ("rip", "pc") if name in registers), None)
    where = "pc unknown" if pc is None else f"pc {pc:#x}"
    if code <= 0:  # sent by a process, not by the kernel
        message = f"{death}: interrupted at {where}"
    elif code == _SI_KERNEL:
        message = f"{death} ({where})"
    elif death.signal is signal.SIGSYS:
        message = f"{death} system call {address} is not allowed to firmware ({where})"
    else:
        at = address
        message = f"{death} at address {address:#x} ({where})"
        if death.signal in _MEMORY_SIGNALS:
            kind = CrashKind.MMU_FAULT
    return CoreCrashedError(
        message,
        exit_code=death.exit_code,
        signal=death.signal,
        address=at,
        pc=pc,
        kind=kind,
        registers=registers,
    )


def _registers(machine: int, data: bytes) -> dict[str, int]:
    """The registers by name; none for a machine that no native core is."""
    known = REGISTER_SETS.get((machine, 64))
    if known is None:
        return {}
    values = [value for (value,) in _REGISTER.iter_unpack(data)]
    return dict(zip(known.names, values, strict=False))  # the rest is zeroes
