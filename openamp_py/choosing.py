"""Which core runs what: names of cores, the platform that a name or an image means.

auto              by the image: this machine's own instruction set is native, others are
                  emulated; without an image, native
native            firmware for this machine
process, loopback a remote written in Python
qemu              an emulated board, by the image
qemu:BOARD        this board
linux:NAME        a processor that this machine's kernel boots: see `LinuxPlatform.parse`
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import trio

from openamp_py import firmware as shipped
from openamp_py.echo import serve_echo
from openamp_py.errors import ImageError, PlatformError
from openamp_py.linux.platform import AS_SET, SCHEME, LinuxPlatform
from openamp_py.platforms import LoopbackPlatform, NativePlatform, ProcessPlatform, demo
from openamp_py.platforms.boards import BOARDS, UNUSABLE, Board, choose_board, find_board
from openamp_py.platforms.demo import python_firmware
from openamp_py.platforms.machine import MIN_VERSION
from openamp_py.platforms.native import RAM_DA, RAM_SIZE, is_native, native_machine, shipped_echo
from openamp_py.platforms.qemu import QemuPlatform
from openamp_py.remoteproc import Firmware, Platform, decode_image_untrusted
from openamp_py.remoteproc.elf import machine_name
from openamp_py.remoteproc.sources import Image, read_image

AUTO: Final = "auto"
"""The core that fits the image."""

QEMU: Final = "qemu"
"""An emulated board that fits the image; with ":BOARD" behind it, this one."""

LINUX: Final = SCHEME
"""With ":NAME" behind it, a processor that this machine's kernel boots."""

CORES: Final = ("native", "loopback", "process")
"""Names of the cores that need no emulator."""

_VERSION_LIMIT: Final = 5.0  # seconds in which a program says its version


class Choice(NamedTuple):
    """What was chosen: owned by whoever asked, who closes the platform."""

    name: str
    """Of the core, without any choice left: "native", "qemu:mps2-an385"."""
    platform: Platform
    image: Image
    """What it is to run; decoded, where it was looked at to choose."""


def is_core(name: str) -> bool:
    """Whether a name can only mean a core to boot, and not the URL of a peer."""
    return ":" not in name or name.startswith((f"{QEMU}:", f"{LINUX}:"))


def is_linux(name: str) -> bool:
    """Whether a name means a processor that this machine's kernel boots."""
    return name.startswith(f"{LINUX}:")


def check_name(name: str, *, gdb: str | None = None) -> None:
    """Whether a core of this name can be had; nothing is made.

    Raises:
        ValueError: there is none, or a debugger cannot wait for it.
    """
    if name.startswith(f"{QEMU}:"):
        find_board(name.removeprefix(f"{QEMU}:"))
    elif is_linux(name):
        LinuxPlatform.parse(name).close()
    elif name not in (AUTO, QEMU, *CORES):
        raise ValueError(
            f"unknown core {name!r}; there are {', '.join((AUTO, *CORES, QEMU))}, "
            f"{QEMU}:BOARD (`openamp cores` lists the boards), {LINUX}:NAME (`openamp list` shows "
            "this machine's processors), and shm: URLs"
        )
    if gdb is not None and (name in CORES or is_linux(name)):
        raise ValueError(f"core {name} takes no debugger: only emulated cores (qemu:BOARD) do")


async def choose(name: str, image: Image | None = None, *, gdb: str | None = None) -> Choice:
    """The platform that a core's name and an image mean, and what it is to run.

    The image is read at most once: a pipe or a stream will do.

    Args:
        name: of the core; see the table of this module.
        image: firmware; by default the echo firmware that comes with the package.
        gdb: where a debugger is waited for, for emulated cores: see `QemuPlatform`.

    Raises:
        ValueError: no such core, or a debugger cannot wait for it.
        ImageError: the image fits no core, or does not say which it is for.
        PlatformError: there is no memory, or no image for this board.
        OSError: the file cannot be read.
    """
    check_name(name, gdb=gdb)
    if name in (AUTO, QEMU) and image is not None:
        data = await read_image(image)
        image = data if isinstance(data, Firmware) else decode_image_untrusted(data)
        name = choose_core(image, emulated=name == QEMU)
        check_name(name, gdb=gdb)
    else:
        await trio.lowlevel.checkpoint()
    if name == QEMU:
        raise ValueError(
            "which board? Name it (qemu:BOARD; `openamp cores` lists them), or give firmware to "
            "choose it by"
        )
    if name == AUTO:
        name = "native"
        check_name(name, gdb=gdb)
    platform = create_platform(name, gdb=gdb)
    try:
        return Choice(name, platform, shipped_image(platform) if image is None else image)
    except BaseException:
        platform.close()
        raise


def choose_core(firmware: Firmware, *, emulated: bool = False) -> str:
    """The name of the core that runs firmware of this machine and these addresses.

    Args:
        firmware: what is to run.
        emulated: an emulated board is wanted, also for this machine's own instruction set.

    Raises:
        ImageError: there is none, or the image has no machine.
    """
    if not firmware.machine:
        raise ImageError(
            "the image does not say which machine it is for (only ELF files do): name the core "
            "(core=, on the command line --core): native, qemu:BOARD, or process or loopback for "
            "a remote written in Python"
        )
    if not emulated and is_native(firmware):
        return "native"
    return f"{QEMU}:{choose_board(firmware).name}"


def create_platform(name: str, *, gdb: str | None = None) -> Platform:
    """The platform that a core's name means; a name that leaves no choice.

    Raises:
        ValueError: there is none of that name, or `gdb` is no place for a debugger.
        PlatformError: there is no memory, or this machine cannot run it.
    """
    match name:
        case "native":
            return NativePlatform()
        case "process":
            return ProcessPlatform()
        case "loopback":
            return LoopbackPlatform(serve_echo)
    if is_linux(name):
        return LinuxPlatform.parse(name)
    board = find_board(name.removeprefix(f"{QEMU}:"))
    return QemuPlatform(board, gdb=gdb)


def shipped_image(platform: Platform) -> Image:
    """What a platform runs where nothing else is asked for: the echo service.

    A processor of this machine's kernel runs the firmware that is set for it.

    Raises:
        PlatformError: there is none for this board.
    """
    if isinstance(platform, NativePlatform):
        return shipped_echo()
    if isinstance(platform, QemuPlatform):
        return shipped_firmware(platform.board)
    if isinstance(platform, LinuxPlatform):
        return AS_SET
    return python_firmware()


def shipped_firmware(board: Board) -> Path:
    """The echo firmware for a board that comes with the package.

    Raises:
        PlatformError: there is none, or it was not installed.
    """
    name = shipped.ECHO.get(board.name)
    if name is None:
        raise PlatformError(f"no echo firmware is shipped for {board.name}: name your own")
    return shipped.path(name)


# What is installed


async def find_version(program: str) -> tuple[int, ...] | None:
    """The version of an installed QEMU; None where it does not say one, or is not there."""
    path = shutil.which(program)
    if path is None:
        return None
    text = b""
    with trio.move_on_after(_VERSION_LIMIT), contextlib.suppress(OSError):
        done = await trio.run_process(
            [path, "--version"], capture_stdout=True, stderr=subprocess.DEVNULL, check=False
        )
        text = done.stdout
    found = re.match(rb"QEMU emulator version (\d+)\.(\d+)(?:\.(\d+))?", text)
    return None if found is None else tuple(int(part) for part in found.groups() if part)


@dataclass(frozen=True, slots=True)
class CoreDescription:
    """A core as `openamp cores` lists it.

    Args:
        name: by which it is asked for.
        cpu: for people.
        ram: device address and bytes of the memory that both sides share.
        program: what it needs; None for nothing.
        package: Debian's, that has the program.
        version: of the program, where it says one.
        installed: whether all that it needs is there.
        usable: not a board that can never be used.
        remark: why it cannot be used; "" where it can.
        firmware: the file name of the echo firmware that comes with the package; None for a
            remote written in Python, or where there is none.
    """

    name: str
    cpu: str
    ram: tuple[int, int] | None
    program: str | None = None
    package: str | None = None
    version: str | None = None
    installed: bool = True
    usable: bool = True
    remark: str = ""
    firmware: str | None = None


async def list_cores(*, unusable: bool = False) -> list[CoreDescription]:
    """All cores that there are, and what is installed for each.

    Args:
        unusable: also boards that QEMU has and that cannot be used, with the reason.
    """
    programs = {board.program for board in BOARDS.values()}
    versions: dict[str, tuple[int, ...] | None] = {}

    async def ask(program: str) -> None:
        versions[program] = await find_version(program)

    async with trio.open_nursery() as nursery:
        for program in programs:
            nursery.start_soon(ask, program)
    found = [*_list_own()]
    found += [_describe(board, versions[board.program]) for board in BOARDS.values()]
    if unusable:
        found += [
            CoreDescription(f"{QEMU}:{name}", "", None, installed=False, usable=False, remark=why)
            for name, why in UNUSABLE.items()
        ]
    return found


def _list_own() -> list[CoreDescription]:
    machine = native_machine()
    python = (demo.TABLE_DA, demo.MEMORY_SIZE)
    return [
        CoreDescription(
            "native",
            machine_name(machine) if machine else "this machine's",
            (RAM_DA, RAM_SIZE),
            installed=machine is not None,
            remark="" if machine else "this machine's instruction set is not supported",
            firmware=shipped_echo().name,
        ),
        CoreDescription("process", "Python", python),
        CoreDescription("loopback", "Python", python),
    ]


def _describe(board: Board, version: tuple[int, ...] | None) -> CoreDescription:
    installed = shutil.which(board.program) is not None
    old = version is not None and version < MIN_VERSION
    remark = ""
    if not installed:
        remark = f"apt install {board.package}"
    elif old:
        remark = f"too old: QEMU {'.'.join(map(str, MIN_VERSION))} is needed"
    return CoreDescription(
        name=f"{QEMU}:{board.name}",
        cpu=board.cpu,
        ram=(board.window.da, board.window.size),
        program=board.program,
        package=board.package,
        version=None if version is None else ".".join(map(str, version)),
        installed=installed and not old,
        remark=remark,
        firmware=shipped.ECHO.get(board.name),
    )
