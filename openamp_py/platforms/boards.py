"""The boards of QEMU that can share their RAM with a host: values, and which one an image fits.

Reference: QEMU, ``hw/arm/mps2.c``, ``hw/arm/mps2-tz.c``, ``hw/arm/virt.c``, ``hw/riscv/virt.c``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

from openamp_py.errors import ImageError
from openamp_py.remoteproc.elf import Firmware, machine_name

ARM: Final = 40
AARCH64: Final = 183
RISCV: Final = 243
"""ELF machine numbers of the boards."""

_MiB: Final = 1 << 20


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
        interrupts: QOM path of its interrupt controller.
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
    interrupts: str = "/machine/armv7m/nvic",
) -> Board:
    return Board(
        name=machine,
        cpu=cpu,
        machine=machine,
        program="qemu-system-arm",
        package="qemu-system-arm",
        elf_machine=ARM,
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


_SSE_NVIC: Final = "/machine/iotkit/cluster0/armv7m0/nvic"
_PSRAM_21: Final = Window("PSRAM", 0x2100_0000, 16 * _MiB)
_PSRAM_60: Final = Window("PSRAM", 0x6000_0000, 16 * _MiB)
_PSRAM_80: Final = Window("PSRAM", 0x8000_0000, 16 * _MiB)
_DDR: Final = Window("DDR", 0x6000_0000, 2048 * _MiB)
# Both halves of the first 512 MiB: what TrustZone calls non-secure, and secure. More would let an
# image fill the memory of the host.
_DDR_WINDOW: Final = Window("DDR", 0x6000_0000, 512 * _MiB)

_AN385: Final = (
    Window("SSRAM1", 0, 8 * _MiB),
    Window("block RAM", 0x0100_0000, 0x1_0000),
    Window("SSRAM23", 0x2000_0000, 8 * _MiB),
)
_AN511: Final = (
    Window("block RAM", 0, 0x4_0000),
    Window("SSRAM1", 0x0040_0000, 8 * _MiB),
    Window("SRAM", 0x2000_0000, 0x2_0000),
    Window("SSRAM23", 0x2040_0000, 4 * _MiB),
)
_AN500: Final = (Window("SSRAM1", 0, 8 * _MiB), Window("SSRAM23", 0x2000_0000, 8 * _MiB))


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
)
_AN547: Final = _secure_alias(
    Window("ITCM", 0, 0x8_0000),
    Window("SRAM", 0x0100_0000, 2 * _MiB),
    Window("DTCM", 0x2000_0000, 0x8_0000),
    Window("SRAM2", 0x2100_0000, 4 * _MiB),
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
# 16 MiB (QEMU 7.0 to 7.2) or 2 MiB (since 8.0): never into the lower half of 32 MiB.
_RISCV_RAM: Final = Window("RAM", 0x8000_0000, 32 * _MiB)
_RISCV_WINDOW: Final = Window("RAM", 0x8000_0000, 16 * _MiB)
# Arm: it goes to the first MiB.
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
        *("virt-rv32", "RV32", "qemu-system-riscv32", "qemu-system-misc", RISCV, 32),
        *(_RISCV_RAM, _RISCV_WINDOW, ("-bios", "none"), _PLIC),
    ),
    _virt(
        *("virt-rv64", "RV64", "qemu-system-riscv64", "qemu-system-misc", RISCV, 64),
        *(_RISCV_RAM, _RISCV_WINDOW, ("-bios", "none"), _PLIC),
    ),
    _virt(
        *("virt-arm", "Cortex-A15", "qemu-system-arm", "qemu-system-arm", ARM, 32),
        *(_ARM_RAM, _ARM_WINDOW, ("-cpu", "cortex-a15"), _GIC, _A),
    ),
    _virt(
        *("virt-aarch64", "Cortex-A53", "qemu-system-aarch64", "qemu-system-arm", AARCH64, 64),
        *(_ARM_RAM, _ARM_WINDOW, ("-cpu", "cortex-a53"), _GIC),
    ),
)

BOARDS: Final[Mapping[str, Board]] = MappingProxyType({board.name: board for board in _TABLE})
"""By name; of those that fit an image the first is chosen."""


def find_board(name: str) -> Board:
    """The board of that name.

    Raises:
        ValueError: there is none, or QEMU gives no way to share its RAM.
    """
    board = BOARDS.get(name)
    if board is None:
        raise ValueError(f"no board is named {name!r}; there are {', '.join(BOARDS)}")
    return board


def choose_board(firmware: Firmware) -> Board:
    """The first board that the image fits: by machine, architecture and addresses.

    Raises:
        ImageError: none.
    """
    for board in BOARDS.values():
        try:
            check_image(board, firmware)
        except ImageError:
            continue
        return board
    raise ImageError("no board fits")


def check_image(board: Board, firmware: Firmware) -> None:
    """Raises ImageError unless the board can run the image and the host can reach its rings."""
    if (firmware.machine, firmware.elf_class) != (board.elf_machine, board.elf_class):
        raise ImageError(
            f"the image is for {firmware.machine_name or 'no machine'} "
            f"({firmware.elf_class} bit); {board.name} runs "
            f"{machine_name(board.elf_machine)} ({board.elf_class} bit)"
        )
    for segment in firmware.segments:
        if not any(
            w.holds(segment.da, segment.memory_size) for w in (board.window, *board.private)
        ):
            raise ImageError(f"segment at {segment.da:#x} lies outside")


def boot_options(board: Board, firmware: Firmware) -> tuple[str, ...]:
    """Options of QEMU with which the core finds its entry."""
    if board.vectors:
        table = find_vectors(firmware)
        if table is not None:
            entry = firmware.entry | 1
            return tuple(option.format(table=table, entry=entry) for option in board.vectors)
        return ("-device", f"loader,addr={firmware.entry | 1:#x},cpu-num=0")
    if board.elf_machine == RISCV and firmware.entry == board.ram.da:
        return ()
    return ("-device", f"loader,addr={firmware.entry:#x},cpu-num=0")


def find_vectors(firmware: Firmware) -> int | None:
    """Device address of the vector table of a Cortex-M image, or None."""
    for segment in firmware.segments:
        first = -segment.da % 128
        for offset in range(first, segment.file_size - 7, 128):
            entry = int.from_bytes(segment.data[offset + 4 : offset + 8], "little")
            if entry == firmware.entry | 1:
                return segment.da + offset
    return None
