"""The last words of a native core, and what they say about how it ended."""

from __future__ import annotations

import signal
import struct
from typing import Final

from openamp_py.errors import CoreCrashedError, CoreDiedError, CoreResetError, PlatformError
from openamp_py.platforms.child import killed

# The report of csrc/native_core.c: kind, signal, code, pad, fault address, pc, sp, text
_REPORT = struct.Struct("=IIiIQQQ96s")
REPORT_SIZE: Final = _REPORT.size
"""Bytes of a report; there is at most one for each boot."""

_FAULT, _SETUP, _RESET, _HALT = 1, 2, 3, 4


def judge(returncode: int, report: bytes) -> None:
    """Turns the end of the process into nothing, where it was orderly, or into an error.

    The firmware shares the process with whatever wrote the report, so it is taken as a hint
    about the cause and not for whether there was one.
    """
    kind, _number, code, _pad, address, pc, _sp, text = _REPORT.unpack(report)
    if returncode < 0:
        error = killed("the core", returncode)
        if kind == _FAULT:
            refused = error.signal is signal.SIGSYS
            detail = (
                f"system call {address} is not allowed to firmware"
                if refused
                else f"at address {address:#x}"
            )
            raise CoreCrashedError(
                f"{error} {detail} (pc {pc:#x})",
                exit_code=returncode,
                signal=error.signal,
                address=None if refused else address,
                pc=pc,
            )
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
