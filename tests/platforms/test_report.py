"""What a native core's last words and its exit status come to."""

from __future__ import annotations

import signal
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py.errors import (
    CoreCrashedError,
    CoreDiedError,
    CoreResetError,
    CrashKind,
    OpenAMPError,
    PlatformError,
)
from openamp_py.platforms.report import REPORT_SIZE, judge

# csrc/native_core.c
FAULT, SETUP, RESET, HALT = 1, 2, 3, 4
X86_64, AARCH64 = 62, 183
SENT_BY_A_PROCESS = 0  # SI_USER
MAPERR = 1

NO_REPORT = bytes(392)


def report(
    kind: int,
    *,
    number: int = 0,
    code: int = 0,
    machine: int = X86_64,
    address: int = 0,
    text: bytes = b"",
) -> bytes:
    registers = range(0x100, 0x122)
    return struct.pack("=IIiIQ34Q96s", kind, number, code, machine, address, *registers, text)


def fault(number: int, *, code: int = MAPERR, machine: int = X86_64, address: int = 0) -> bytes:
    return report(FAULT, number=number, code=code, machine=machine, address=address)


def verdict(returncode: int | None, words: bytes) -> OpenAMPError:
    with pytest.raises(OpenAMPError) as caught:
        judge(returncode, words)
    return caught.value


def test_the_size_is_that_of_the_c_structure() -> None:
    assert REPORT_SIZE == len(NO_REPORT) == len(report(HALT))


# A child of ours


@pytest.mark.parametrize("words", [NO_REPORT, report(HALT)])
def test_an_orderly_end_is_nothing(words: bytes) -> None:
    judge(0, words)


@pytest.mark.parametrize("known", [True, False], ids=["child", "not our child"])
@pytest.mark.parametrize(
    ("machine", "pc"), [(X86_64, 0x110), (AARCH64, 0x120)], ids=["x86-64", "aarch64"]
)
def test_a_fault_has_its_address_and_registers(known: bool, machine: int, pc: int) -> None:
    words = fault(signal.SIGSEGV, machine=machine, address=0xDEAD_0000)
    error = verdict(-signal.SIGSEGV if known else None, words)
    assert isinstance(error, CoreCrashedError)
    assert str(error) == f"the core died of SIGSEGV at address 0xdead0000 (pc {pc:#x})"
    assert (error.signal, error.address, error.pc) == (signal.SIGSEGV, 0xDEAD_0000, pc)
    assert error.exit_code == -signal.SIGSEGV
    assert error.kind is CrashKind.MMU_FAULT
    names = list(error.registers)
    assert (len(names), names[0]) == ((27, "r15") if machine == X86_64 else (34, "x0"))
    assert error.registers["rip" if machine == X86_64 else "pc"] == pc
    assert error.registers["rsp" if machine == X86_64 else "sp"] == {62: 0x113, 183: 0x11F}[machine]


def test_a_fault_that_is_not_of_memory_is_a_fatal_error() -> None:
    error = verdict(-signal.SIGILL, fault(signal.SIGILL, address=0x2000_0000))
    assert isinstance(error, CoreCrashedError)
    assert (error.kind, error.address) == (CrashKind.FATAL_ERROR, 0x2000_0000)


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGTRAP])
@pytest.mark.parametrize("code", [SENT_BY_A_PROCESS, -6])
def test_a_core_that_was_interrupted_tells_where(number: signal.Signals, code: int) -> None:
    error = verdict(-number, fault(number, code=code))
    assert isinstance(error, CoreCrashedError)
    assert str(error) == f"the core died of {number.name}: interrupted at pc 0x110"
    assert (error.address, error.pc, error.kind) == (None, 0x110, CrashKind.FATAL_ERROR)
    assert error.registers["rip"] == 0x110


def test_a_refused_system_call_has_no_address() -> None:
    error = verdict(-signal.SIGSYS, fault(signal.SIGSYS, address=57))
    assert isinstance(error, CoreCrashedError)
    assert "SIGSYS system call 57 is not allowed to firmware (pc 0x110)" in str(error)
    assert error.address is None


def test_a_fault_of_which_the_machine_tells_no_address_has_none() -> None:
    error = verdict(-signal.SIGSEGV, fault(signal.SIGSEGV, code=0x80))  # SI_KERNEL
    assert isinstance(error, CoreCrashedError)
    assert (str(error), error.address) == ("the core died of SIGSEGV (pc 0x110)", None)


def test_a_kill_has_no_words() -> None:
    error = verdict(-signal.SIGKILL, NO_REPORT)
    assert isinstance(error, CoreCrashedError)
    assert (str(error), error.signal) == ("the core died of SIGKILL", signal.SIGKILL)
    assert (error.registers, error.pc) == ({}, None)


@pytest.mark.parametrize("known", [True, False], ids=["child", "not our child"])
def test_the_other_ends_are_errors_of_their_own(known: bool) -> None:
    error = verdict(3 if known else None, report(HALT, code=3))
    assert type(error) is CoreDiedError and error.exit_code == 3
    assert str(error) == "the core ended with exit code 3 (it halted with code 3)"
    assert type(verdict(124 if known else None, report(RESET))) is CoreResetError
    error = verdict(125 if known else None, report(SETUP, text=b"no window\0junk"))
    assert type(error) is PlatformError
    assert str(error) == "the core could not be set up: no window"


def test_an_exit_code_without_words_is_an_error() -> None:
    error = verdict(7, NO_REPORT)
    assert (type(error), str(error)) == (CoreDiedError, "the core ended with exit code 7")


# A core that is not our child


def test_an_orderly_halt_is_nothing_for_whoever_attached_too() -> None:
    judge(None, report(HALT))


def test_without_a_word_nobody_knows_how_it_ended() -> None:
    error = verdict(None, NO_REPORT)
    assert isinstance(error, CoreCrashedError)
    assert str(error) == "the core was killed or ended without a word"
    assert error.exit_code is None


def test_what_a_halt_code_means_is_decided_by_the_low_byte_as_in_an_exit_status() -> None:
    judge(None, report(HALT, code=0x100))
    error = verdict(None, report(HALT, code=-1))
    assert isinstance(error, CoreDiedError) and error.exit_code == 255


# Hostile words


def test_a_machine_that_no_core_is_has_no_registers() -> None:
    error = verdict(-signal.SIGSEGV, fault(signal.SIGSEGV, machine=40, address=1))
    assert isinstance(error, CoreCrashedError)
    assert (error.registers, error.pc) == ({}, None)
    assert str(error) == "the core died of SIGSEGV at address 0x1 (pc unknown)"


@pytest.mark.parametrize("words", [report(HALT), report(RESET), report(SETUP), report(77)])
def test_words_do_not_explain_a_signal_away(words: bytes) -> None:
    assert isinstance(verdict(-signal.SIGSEGV, words), CoreCrashedError)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(
    st.none() | st.integers(-64, 255),
    st.binary(min_size=392, max_size=392)
    | st.builds(
        report,
        st.integers(0, 5),
        number=st.integers(0, (1 << 32) - 1),
        code=st.integers(-(1 << 31), (1 << 31) - 1),
        machine=st.sampled_from([0, X86_64, AARCH64]),
        address=st.integers(0, (1 << 64) - 1),
        text=st.binary(max_size=96),
    ),
)
def test_any_words_are_an_orderly_end_or_an_error_of_ours(
    returncode: int | None, words: bytes
) -> None:
    try:
        judge(returncode, words)
    except PlatformError as error:
        assert str(error)
    else:
        assert not returncode
