"""The boards of QEMU that can share their RAM with a host: values, and which one an image fits.

Reference: QEMU, ``hw/arm/mps2.c``, ``hw/arm/mps2-tz.c``, ``hw/arm/virt.c``, ``hw/riscv/virt.c``.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

from openamp_py.constants import EM_AARCH64, EM_ARM, EM_RISCV
from openamp_py.errors import ImageError
from openamp_py.remoteproc.elf import Firmware, Segment, machine_name
from openamp_py.vring import VringLayout

_logger = logging.getLogger(__name__)

_MiB: Final = 1 << 20
_THUMB: Final = 1  # in an address to jump to: 16-bit instructions, all that a Cortex-M has

# The beginning of a vector table: stack pointer, entry.
_WORD: Final = struct.Struct("<I")
_MAX_WORD: Final = 0xFFFF_FFFF
_VECTORS: Final = struct.Struct("<II")
_TABLE_ALIGN: Final = 128  # VTOR's


class Window(NamedTuple):
    """A stretch of a board's memory, as its core addresses it."""

    name: str
    da: int
    size: int

    def holds(self, da: int, size: int) -> bool:
        """Whether all of these bytes lie in it."""
        return self.da <= da and da + size <= self.da + self.size

    def __str__(self) -> str:
        return f"{self.name} {self.da:#x}..{self.da + self.size:#x}"


@dataclass(frozen=True, slots=True)
class Board:
    """A board that QEMU emulates, with RAM that host and core share.

    Attributes:
        name: what it is called here.
        cpu: its processor, for people.
        machine: QEMU's name of it.
        program: QEMU's program for it.
        package: Debian's package with that program.
        elf_machine: e_machine of its firmware.
        elf_class: 32 or 64.
        ram: all of the RAM that is shared: what a memory backend must have.
        window: what of it firmware may use; QEMU writes a device tree into the rest.
        private: RAM that cannot be shared; segments there are loaded by QEMU.
        options: further options of QEMU.
        doorbell: which of its serial ports is the doorbell.
        console: which one is the console, or None where the doorbell is the only one.
        interrupts: QOM path of what has the inputs of its interrupt controller.
        halt_bytes: firmware cannot switch it off, and says so on the doorbell instead.
        architectures: which of `Firmware.arm_architecture` it runs; empty where that is no matter.
        vectors: options of QEMU that tell the core where its vector table is, with {table} and
            {entry} in them; empty where the core has none, and begins at the entry.
    """

    name: str
    cpu: str
    machine: str
    program: str
    package: str
    elf_machine: int
    elf_class: int
    ram: Window
    window: Window
    private: tuple[Window, ...]
    options: tuple[str, ...]
    doorbell: int
    console: int | None
    interrupts: str
    halt_bytes: bool
    architectures: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()


_V7M: Final = ("v6-M", "v6S-M", "v7-M")
_V7EM: Final = (*_V7M, "v7E-M")
_V8M: Final = (*_V7M, "v8-M.base", "v8-M.main")
_V81M: Final = (*_V7EM, "v8-M.base", "v8-M.main", "v8.1-M.main")
_A: Final = ("v4", "v4T", "v5T", "v5TE", "v5TEJ", "v6", "v6KZ", "v6T2", "v6K", "v7", "v7-A")

_VTOR: Final = ("-global", "armv7m.init-nsvtor={table:#x}")


def _secure_vtor(register: int) -> tuple[str, ...]:
    """How a core with TrustZone gets its table: these boards set the property for it themselves.

    The register INITSVTOR0 of the system controller is what hardware has for it. It is written
    when the machine is reset; setting the entry after that resets the core once more.
    """
    return (
        *("-device", f"loader,addr={register:#x},data={{table:#x}},data-len=4"),
        *("-device", "loader,addr={entry:#x},cpu-num=0"),
    )


def _cortex_m(
    machine: str,
    cpu: str,
    ram: Window,
    window: Window,
    private: tuple[Window, ...],
    architectures: tuple[str, ...],
    vectors: tuple[str, ...] = _VTOR,
    interrupts: str = "/machine/armv7m",
) -> Board:
    return Board(
        name=machine,
        cpu=cpu,
        machine=machine,
        program="qemu-system-arm",
        package="qemu-system-arm",
        elf_machine=EM_ARM,
        elf_class=32,
        ram=ram,
        window=window,
        private=private,
        options=(),
        doorbell=1,
        console=0,
        interrupts=interrupts,
        halt_bytes=True,
        architectures=architectures,
        vectors=vectors,
    )


_SSE_NVIC: Final = "/machine/iotkit/cluster0/armv7m0"
_PSRAM_21: Final = Window("PSRAM", 0x2100_0000, 16 * _MiB)
_PSRAM_60: Final = Window("PSRAM", 0x6000_0000, 16 * _MiB)
_PSRAM_80: Final = Window("PSRAM", 0x8000_0000, 16 * _MiB)
_DDR: Final = Window("DDR", 0x6000_0000, 2048 * _MiB)
# Both halves of the first 512 MiB: what TrustZone calls non-secure, and secure. More would let an
# image fill the memory of the host.
_DDR_WINDOW: Final = Window("DDR", 0x6000_0000, 512 * _MiB)

# Without the mirrors of some: an image that lay in both would overwrite itself.
_AN385: Final = (
    Window("SSRAM1", 0, 4 * _MiB),
    Window("block RAM", 0x0100_0000, 0x4000),
    Window("SSRAM23", 0x2000_0000, 4 * _MiB),
)
_AN511: Final = (
    Window("block RAM", 0, 0x4_0000),
    Window("SSRAM1", 0x0040_0000, 8 * _MiB),
    Window("SRAM", 0x2000_0000, 0x2_0000),
    Window("SSRAM23", 0x2040_0000, 4 * _MiB),
)
_AN500: Final = (Window("SSRAM1", 0, 4 * _MiB), Window("SSRAM23", 0x2000_0000, 4 * _MiB))


def _secure_alias(*windows: Window) -> tuple[Window, ...]:
    """The same RAM at its two addresses: secure software uses the one with bit 28."""
    aliases = (Window(f"{w.name} (secure)", w.da | 1 << 28, w.size) for w in windows)
    return (*windows, *aliases)


_AN505: Final = _secure_alias(
    Window("SSRAM1", 0, 4 * _MiB),
    Window("SRAM", 0x2000_0000, 0x8000),
    Window("SSRAM23", 0x2800_0000, 4 * _MiB),
)
_AN521: Final = _secure_alias(
    Window("SSRAM1", 0, 4 * _MiB),
    Window("SRAM", 0x2000_0000, 0x2_0000),
    Window("SSRAM23", 0x2800_0000, 4 * _MiB),
)
_AN524: Final = _secure_alias(
    Window("BRAM", 0, 0x8_0000),
    Window("SRAM", 0x2000_0000, 0x2_0000),
    Window("QSPI (ROM)", 0x2800_0000, 8 * _MiB),
)
_AN547: Final = _secure_alias(
    Window("ITCM", 0, 0x8_0000),
    Window("SRAM", 0x0100_0000, 2 * _MiB),
    Window("DTCM", 0x2000_0000, 0x8_0000),
    Window("SRAM2", 0x2100_0000, 4 * _MiB),
    Window("QSPI (ROM)", 0x2800_0000, 8 * _MiB),
)
_SYSCTL_INITSVTOR0: Final = 0x5002_1110
_SSE300_INITSVTOR0: Final = 0x5802_1110


def _virt(
    name: str,
    cpu: str,
    program: str,
    package: str,
    elf_machine: int,
    elf_class: int,
    ram: Window,
    window: Window,
    options: tuple[str, ...],
    interrupts: str,
    architectures: tuple[str, ...] = (),
) -> Board:
    return Board(
        name=name,
        cpu=cpu,
        machine="virt",
        program=program,
        package=package,
        elf_machine=elf_machine,
        elf_class=elf_class,
        ram=ram,
        window=window,
        private=(),
        options=options,
        doorbell=0,
        console=None,
        interrupts=interrupts,
        halt_bytes=False,
        architectures=architectures,
    )


# RISC-V: at each reset the device tree (at most 1 MiB) goes below the end of RAM, aligned down to
# 2 MiB, or to 16 MiB in older versions: never into the lower half of 32 MiB.
_RISCV_RAM: Final = Window("RAM", 0x8000_0000, 32 * _MiB)
_RISCV_WINDOW: Final = Window("RAM", 0x8000_0000, 16 * _MiB)
# Arm: it goes into the first MiB.
_ARM_RAM: Final = Window("RAM", 0x4000_0000, 32 * _MiB)
_ARM_WINDOW: Final = Window("RAM", 0x4020_0000, 30 * _MiB)

_PLIC: Final = "/machine/unattached/device[2]"
_GIC: Final = "/machine/unattached/device[1]"

_TABLE: Final = (
    _cortex_m("mps2-an385", "Cortex-M3", _PSRAM_21, _PSRAM_21, _AN385, _V7M),
    _cortex_m("mps2-an386", "Cortex-M4", _PSRAM_21, _PSRAM_21, _AN385, _V7EM),
    _cortex_m("mps2-an511", "Cortex-M3", _PSRAM_21, _PSRAM_21, _AN511, _V7M),
    _cortex_m("mps2-an500", "Cortex-M7", _PSRAM_60, _PSRAM_60, _AN500, _V7EM),
    _cortex_m(
        *("mps2-an521", "Cortex-M33", _PSRAM_80, _PSRAM_80, _AN521, _V8M),
        *(_secure_vtor(_SYSCTL_INITSVTOR0), _SSE_NVIC),
    ),
    _cortex_m(
        *("mps2-an505", "Cortex-M33", _PSRAM_80, _PSRAM_80, _AN505, _V8M),
        *(_secure_vtor(_SYSCTL_INITSVTOR0), _SSE_NVIC),
    ),
    _cortex_m(
        *("mps3-an524", "Cortex-M33", _DDR, _DDR_WINDOW, _AN524, _V8M),
        *(_secure_vtor(_SYSCTL_INITSVTOR0), _SSE_NVIC),
    ),
    _cortex_m(
        *("mps3-an547", "Cortex-M55", _DDR, _DDR_WINDOW, _AN547, _V81M),
        *(_secure_vtor(_SSE300_INITSVTOR0), _SSE_NVIC),
    ),
    _virt(
        *("virt-rv32", "RV32", "qemu-system-riscv32", "qemu-system-misc", EM_RISCV, 32),
        *(_RISCV_RAM, _RISCV_WINDOW, ("-bios", "none"), _PLIC),
    ),
    _virt(
        *("virt-rv64", "RV64", "qemu-system-riscv64", "qemu-system-misc", EM_RISCV, 64),
        *(_RISCV_RAM, _RISCV_WINDOW, ("-bios", "none"), _PLIC),
    ),
    _virt(
        *("virt-arm", "Cortex-A15", "qemu-system-arm", "qemu-system-arm", EM_ARM, 32),
        *(_ARM_RAM, _ARM_WINDOW, ("-cpu", "cortex-a15"), _GIC, _A),
    ),
    _virt(
        *("virt-aarch64", "Cortex-A53", "qemu-system-aarch64", "qemu-system-arm", EM_AARCH64, 64),
        *(_ARM_RAM, _ARM_WINDOW, ("-cpu", "cortex-a53"), _GIC),
    ),
)

BOARDS: Final[Mapping[str, Board]] = MappingProxyType({board.name: board for board in _TABLE})
"""By name; of those that fit an image the first is chosen."""


_OWN_RAM: Final = "QEMU makes its RAM itself, and has no way to share it"
UNUSABLE: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        (
            *("b-l475e-iot01a", "emcraft-sf2", "lm3s6965evb", "lm3s811evb", "microbit"),
            *("musca-a", "musca-b1", "netduino2", "netduinoplus2", "olimex-stm32-h405"),
            *("realview-eb", "realview-eb-mpcore", "realview-pb-a8", "realview-pbx-a9"),
            "stm32vldiscovery",
        ),
        _OWN_RAM,
    ),
    "xlnx-zcu102": "QEMU leaves its Cortex-R5 cores off",
}
"""Boards of QEMU that are asked for and do not work, and why."""


def find_board(name: str) -> Board:
    """The board of that name.

    Raises:
        ValueError: there is none; or QEMU has it, but cannot share its RAM.
    """
    board = BOARDS.get(name)
    if board is not None:
        return board
    there_are = f"there are {', '.join(BOARDS)}"
    if name in UNUSABLE:
        raise ValueError(f"board {name!r} cannot be used: {UNUSABLE[name]}; {there_are}")
    raise ValueError(f"no board is named {name!r}; {there_are}")


def choose_board(firmware: Firmware) -> Board:
    """The first board that the image fits: by machine, architecture and addresses.

    Raises:
        ImageError: it fits none; says what keeps it from the one that it fits best.
    """
    boards = [board for board in BOARDS.values() if _core_problem(board, firmware) is None]
    if not firmware.machine or not boards:
        there_are = ", ".join(f"{board.name} ({board.cpu})" for board in BOARDS.values())
        raise ImageError(
            f"no board runs the image, which is for {_target(firmware)}; there are {there_are}"
        )
    for board in boards:
        if _find_problem(board, firmware) is None:
            return board
    best = max(boards, key=lambda board: _fitting(board, firmware))
    others = ", ".join(board.name for board in boards if board is not best)
    raise ImageError(
        f"no board fits the image, for {_target(firmware)}; nearest is {best.name}: "
        f"{_find_problem(best, firmware)}{others and f'; also looked at: {others}'}"
    )


def check_image(board: Board, firmware: Firmware) -> None:
    """Raises ImageError unless the board runs the image and the host reaches what both use."""
    problem = _find_problem(board, firmware)
    if problem is not None:
        raise ImageError(problem)
    for trace in firmware.table.traces if firmware.table else ():
        window = _private_window(board, trace.da, trace.length)
        if window is not None:
            _logger.warning(
                "trace %r (%#x bytes at %#x) lies in %s of %s, which the host does not see: it "
                "stays empty; link it into %s",
                *(trace.name, trace.length, trace.da, window.name, board.name, board.window),
            )


def boot_options(board: Board, firmware: Firmware) -> tuple[str, ...]:
    """Options of QEMU by which the core finds its entry.

    A Cortex-M takes stack pointer and entry out of the image's vector table. Where there is none,
    the core begins at the entry with no stack; the others always begin so.
    """
    entry = firmware.entry
    if not board.vectors:
        # A RISC-V board's ROM jumps there by itself, and has the hart's number and the device
        # tree's address in registers then.
        starts_there = board.elf_machine == EM_RISCV and entry == board.ram.da
        return () if starts_there else _loader(f"addr={entry:#x}")
    vectors = find_vectors(board, firmware)
    if vectors is None:
        return _loader(f"addr={entry | _THUMB:#x}")
    table, entry = vectors
    return tuple(option.format(table=table, entry=entry) for option in board.vectors)


def _loader(what: str) -> tuple[str, str]:
    return ("-device", f"loader,{what},cpu-num=0")


def find_vectors(board: Board, firmware: Firmware) -> tuple[int, int] | None:
    """Device address of the vector table of an image for a Cortex-M, and the entry in it.

    The table is where a stack pointer is followed by the image's entry; or else the lowest segment
    if that begins like one.

    Returns:
        None where there is none.
    """
    second = re.compile(re.escape(_WORD.pack((firmware.entry | _THUMB) & _MAX_WORD)))
    for segment in firmware.segments:
        for found in second.finditer(segment.data):
            at = found.start() - _WORD.size
            if at >= 0 and (segment.da + at) % _TABLE_ALIGN == 0:
                stack, entry = _VECTORS.unpack_from(segment.data, at)
                if _is_stack(board, stack):
                    return segment.da + at, entry
    for lowest in firmware.segments[:1]:
        if lowest.da % _TABLE_ALIGN == 0 and lowest.file_size >= _VECTORS.size:
            stack, entry = _VECTORS.unpack_from(lowest.data)
            if entry & _THUMB and _is_loaded(firmware, entry) and _is_stack(board, stack):
                return lowest.da, entry
    return None


def _is_stack(board: Board, stack: int) -> bool:
    """Stacks grow downwards: the first word is the one below."""
    return stack % 4 == 0 and any(w.holds(stack - 4, 4) for w in (board.window, *board.private))


def _is_loaded(firmware: Firmware, da: int) -> bool:
    return any(0 <= da - segment.da < segment.memory_size for segment in firmware.segments)


def _fitting(board: Board, firmware: Firmware) -> int:
    """How many of the segments lie in the board's memory."""
    problems = [_segment_problem(board, *numbered) for numbered in enumerate(firmware.segments)]
    return problems.count(None)


def _find_problem(board: Board, firmware: Firmware) -> str | None:
    """Why the board cannot run the image, in words; or None."""
    problems = (
        _core_problem(board, firmware),
        *(_segment_problem(board, *numbered) for numbered in enumerate(firmware.segments)),
        _entry_problem(firmware),
        *_shared_problems(board, firmware),
    )
    return next((problem for problem in problems if problem is not None), None)


def _core_problem(board: Board, firmware: Firmware) -> str | None:
    """An image of a format that names no machine is taken as it is."""
    kind = _kind(board.elf_machine, board.elf_class)
    if firmware.machine and kind != _kind(firmware.machine, firmware.elf_class):
        return f"the image is for {_target(firmware)}; {board.name} ({board.cpu}) runs {kind}"
    architecture = firmware.arm_architecture
    if architecture is None or not board.architectures or architecture in board.architectures:
        return None
    return (
        f"the image is built for {architecture}; {board.name} ({board.cpu}) runs "
        f"{', '.join(board.architectures)}"
    )


def _segment_problem(board: Board, number: int, segment: Segment) -> str | None:
    if any(w.holds(segment.da, segment.memory_size) for w in (board.window, *board.private)):
        return None
    what = f"segment {number}: {segment.memory_size:#x} bytes at {segment.da:#x}"
    has = ", ".join(map(str, (board.window, *board.private)))
    why = "lie outside its memory"
    if board.ram.holds(segment.da, segment.memory_size):
        why = "lie in RAM that is not for firmware (QEMU writes its device tree there)"
    return f"{what} {why}; link the image into {has}"


def _entry_problem(firmware: Firmware) -> str | None:
    if _is_loaded(firmware, firmware.entry):
        return None
    return f"the entry point {firmware.entry:#x} lies in none of the image's segments"


def _shared_problems(board: Board, firmware: Firmware) -> Iterator[str]:
    """What both sides write must lie in RAM that both sides see."""
    for what, da, size in _shared_parts(firmware):
        window = _private_window(board, da, size)
        if window is not None:
            yield (
                f"{what}: {size:#x} bytes at {da:#x} lie in {window.name} of {board.name}, which "
                f"host and core cannot share; link it into {board.window}, with no load address "
                "elsewhere (AT>)"
            )


def _shared_parts(firmware: Firmware) -> Iterator[tuple[str, int, int]]:
    """Names, device addresses and sizes; an address left to the host (DA_ANY) is in no RAM."""
    table = firmware.table
    if table is None:
        return
    if firmware.table_da is not None:
        yield "the resource table", firmware.table_da, table.length
    buffers = {f"vdev{index}buffer" for index in range(len(table.vdevs))}
    rings = {
        f"vdev{index}vring{number}"
        for index, vdev in enumerate(table.vdevs)
        for number in range(len(vdev.vrings))
    }
    for carveout in table.carveouts:
        if carveout.name in buffers | rings:
            yield f"carveout {carveout.name!r}", carveout.da, carveout.length
    for index, vdev in enumerate(table.vdevs):
        for number, vring in enumerate(vdev.vrings):
            size = VringLayout(vring.num, vring.align).size
            yield f"vdev {index} vring {number}", vring.da, size


def _private_window(board: Board, da: int, size: int) -> Window | None:
    """The private RAM in which any of these bytes lie."""
    return next((w for w in board.private if da < w.da + w.size and w.da < da + size), None)


def _target(firmware: Firmware) -> str:
    if not firmware.machine:
        return "no machine that it names"
    kind = _kind(firmware.machine, firmware.elf_class)
    return f"{kind}, {firmware.arm_architecture}" if firmware.arm_architecture else kind


def _kind(machine: int, elf_class: int) -> str:
    return f"{machine_name(machine)} ({elf_class} bit)"
