"""Small images for emulated cores, assembled by hand: what firmware in trouble does."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import pytest

from openamp_py.platforms.boards import BOARDS, Board
from openamp_py.remoteproc.elf import Firmware, Segment

ARM, AARCH64, RISCV = 40, 183, 243


def needs(board: str) -> pytest.MarkDecorator:
    """A mark: skip where the board's QEMU is not installed."""
    found = BOARDS[board]
    return pytest.mark.skipif(
        shutil.which(found.program) is None,
        reason=f"needs {found.program} (Debian package {found.package})",
    )


def boards(*names: str) -> list[object]:
    """Parameters of a test: boards, each skipped where its QEMU is not installed."""
    return [pytest.param(name, marks=needs(name)) for name in names]


def segment(da: int, data: bytes) -> Segment:
    """Bytes at a device address."""
    return Segment(da, data, len(data), flags=7)


def add(image: Firmware, *more: Segment) -> Firmware:
    """The image with further segments."""
    segments = sorted((*image.segments, *more), key=lambda segment: segment.da)
    return replace(image, segments=tuple(segments))


def thumb(text: str) -> bytes:
    """Thumb code: halfwords as they are in memory, with spaces between."""
    return bytes.fromhex(text)


def load(register: int, value: int) -> bytes:
    """movw and movt: a number into a register, in 8 bytes of Thumb code."""
    code = b""
    for opcode, half in ((0xF240, value & 0xFFFF), (0xF2C0, value >> 16)):
        first = opcode | (half >> 11 & 1) << 10 | half >> 12
        second = (half >> 8 & 7) << 12 | register << 8 | half & 0xFF
        code += struct.pack("<HH", first, second)
    return code


VECTORS_SIZE = 0x240  # sixteen exceptions and 128 interrupts
CODE = VECTORS_SIZE + 4
"""Where the code of `cortex_m` begins, behind the image's start."""


def cortex_m(
    code: bytes,
    *,
    base: int = 0x2100_0000,
    stack: int | None = None,
    vectors: Mapping[int, int] = MappingProxyType({}),
) -> Firmware:
    """A vector table whose entries are an endless loop, and code.

    Args:
        code: what is executed after the reset.
        base: where the table lies.
        stack: the stack pointer, by default 32 KiB above.
        vectors: what else is in the table, by its number.
    """
    words = [base + VECTORS_SIZE | 1] * (VECTORS_SIZE // 4)
    words[:2] = (base + 0x8000 if stack is None else stack, base + CODE | 1)
    for number, word in vectors.items():
        words[number] = word
    data = struct.pack(f"<{len(words)}I", *words) + thumb("fee7 00bf") + code
    return Firmware(
        machine=ARM,
        machine_name="ARM",
        elf_class=32,
        entry=base + CODE | 1,
        segments=(segment(base, data),),
    )


HANG = thumb("fee7")
UNDEFINED = thumb("00de")
RESET = load(0, 0xE000_ED0C) + load(1, 0x05FA_0004) + thumb("0160 fee7")


def send_for_ever(uart: int, byte: int) -> bytes:
    """Writes a byte to a CMSDK UART whenever there is room."""
    start = load(0, uart) + thumb("1021 0161 0121 8160")  # divider 16, transmitter on
    return start + struct.pack("<H", 0x2100 | byte) + thumb("4268 d207 fcd4 0160 fae7")


def send_once(uart: int, byte: int) -> bytes:
    """Writes a byte to a CMSDK UART, and then hangs."""
    start = load(0, uart) + thumb("0121 8160")
    return start + struct.pack("<H", 0x2100 | byte) + thumb("0160") + HANG


CONSOLE, DOORBELL = 0x4000_4000, 0x4000_5000
"""UARTs of mps2-an385."""


def fill_when_told(start: int, end: int, value: int) -> bytes:
    """Waits until the word at `start` is not zero; then memory is full of another."""
    code = load(0, start) + load(2, end) + load(3, value)
    # ldr r1, [r0]; cmp r1, #0; beq back; str r3, [r0], #4; cmp r0, r2; bne back
    return code + thumb("0168 0029 fcd0 40f8043b 9042 fbd1") + HANG


def mailbox(board: Board, line: int) -> tuple[Firmware, int]:
    """Firmware with a mailbox interrupt, and where it counts how often that came."""
    if board.elf_machine == RISCV:
        assert line == 40, "as the code has it"
        code = bytes.fromhex(MAILBOX_RV32 if board.elf_class == 32 else MAILBOX_RV64)
        return riscv(code, board.elf_class), 0x8000_0000 + len(code) - 4
    base = board.window.da
    count = base + 0x4000
    enable = load(0, 0xE000_E100 + line // 32 * 4) + load(1, 1 << line % 32) + thumb("0160")
    main = enable + thumb("30bf fde7 00bf")  # wfi; back
    # ldr r1, [r0]; adds r1, #1; str r1, [r0]; bx lr
    handler = load(0, count) + thumb("0168 0131 0160 7047")
    at = base + CODE + len(main)
    return cortex_m(main + handler, base=base, vectors={16 + line: at | 1}), count


# mtvec; PLIC: priority 1 for source 40, enabled for context 0, threshold 0; mie.MEIE, mstatus.MIE;
# wfi for ever. The handler: claim, count in the last word, complete.
MAILBOX_RV32 = (
    "970200009382420473905230b702000c9382020a054323a06200b722000c91021303001023a06200"
    "b702200c23a00200856293820280739042307360043073005010f5bfb702200c910203a302009703"
    "00009383a30103ae0300050e23a0c30123a062007300203000000000"
)
MAILBOX_RV64 = (
    "970200009382420473905230b702000c9b82020a054323a06200b722000c91221303001023a06200"
    "b702200c23a0020085629b820280739042307360043073005010f5bfb702200c912203a302009703"
    "00009383a30103ae0300050e23a0c30123a062007300203000000000"
)


def riscv(code: bytes, elf_class: int = 32) -> Firmware:
    """Code at the start of RAM."""
    return Firmware(
        machine=RISCV,
        machine_name="RISC-V",
        elf_class=elf_class,
        entry=0x8000_0000,
        segments=(segment(0x8000_0000, code),),
    )


def riscv_end(word: int) -> bytes:
    """Writes a word to the test device, which switches off or resets."""
    upper, lower = (word + 0x800) >> 12, word & 0xFFF
    code = (0x0010_02B7, upper << 12 | 0x337, lower << 20 | 0x3_0313, 0x0062_A023, 0x0000_006F)
    return struct.pack("<5I", *code)  # lui t0; lui t1; addi t1, t1; sw t1, (t0); j .


# lbu t2, 5(t0); andi t2, t2, 0x20; beqz; sb; j: whenever the UART has room
RISCV_FLOOD = bytes.fromhex("b7020010054383c3520093f30302e38c03fe23806200c5bf")

PSCI_OFF, PSCI_RESET = 0x8400_0008, 0x8400_0009


def psci(board: Board, call: int) -> Firmware:
    """Asks the board's firmware, which is QEMU, to switch off or to reset."""
    low, high = call & 0xFFFF, call >> 16
    if board.elf_machine == AARCH64:  # movz x0; movk x0; hvc; b .
        words = (0xD280_0000 | low << 5, 0xF2A0_0000 | high << 5, 0xD400_0002, 0x1400_0000)
    else:  # movw r0; movt r0; hvc; b .
        words = (
            0xE300_0000 | low >> 12 << 16 | low & 0xFFF,
            0xE340_0000 | high >> 12 << 16 | high & 0xFFF,
            0xE140_0070,
            0xEAFF_FFFE,
        )
    return Firmware(
        machine=board.elf_machine,
        machine_name="ARM" if board.elf_machine == ARM else "AArch64",
        elf_class=board.elf_class,
        entry=board.window.da,
        segments=(segment(board.window.da, struct.pack("<4I", *words)),),
    )
