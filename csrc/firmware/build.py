# SPDX-License-Identifier: BSD-3-Clause
"""Builds the firmware beside this file, and the programs that run it natively.

``python3 csrc/firmware/build.py OUTPUT_DIR [TARGET...]`` writes ``APPLICATION-TARGET.elf`` for each
target (``native`` by default), with ``echo`` as the application. For ``native``, the machine's own,
it also writes ``native-core``, ``native-keeper`` and ``tether`` (csrc/native_core.c and so on,
ordinary programs).

The compiler is ``$CC``, else ``cc``, for ``native``, where a cross compiler for a supported machine
works too; for the other targets it is Debian's cross gcc, or with ``--zig`` the one in PyPI's
package ``ziglang``. The same sources and the same compiler make the same file, byte for byte,
wherever they lie: the files that are shipped are built again and compared by the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

FIRMWARE_DIR = Path(__file__).resolve().parent

_PROGRAMS = {
    "native-core": "native_core.c",
    "native-keeper": "native_keeper.c",
    "tether": "tether.c",
}

_WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Wshadow")

# PIE: the core itself is loaded high up, which leaves the low 4 GiB to the firmware's windows.
_CORE_FLAGS = ("-std=c11", "-O2", *_WARNINGS, "-fPIE", "-pie")

_FIRMWARE_FLAGS = (
    "-std=c11",
    *_WARNINGS,
    "-ffreestanding",
    "-nostdlib",
    "-static",
    "-fno-pie",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-unwind-tables",
    "-g",  # for a debugger that reads a coredump; none of it is loaded
    f"-ffile-prefix-map={FIRMWARE_DIR}=csrc/firmware",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,-z,max-page-size=16",  # no gaps in the file, 64 KiB each with lld: nobody maps it
    "-Wl,-e,firmware_entry",  # zig does not heed the linker script's ENTRY
)

# Instructions and helper calls that native firmware has no use for, by the first part of the
# compiler's target triplet.
_NATIVE_FLAGS = {
    "x86_64": ("-fcf-protection=none",),
    "aarch64": ("-mno-outline-atomics", "-mbranch-protection=none"),
}

# For the files that are shipped. The command line is no part of them; all of the debug information
# is, lines and variables, packed to half its size.
_GCC_FLAGS = ("-gno-record-gcc-switches", "-gz=zlib")

# zig traps undefined behaviour by default, with a handler that is not there.
_ZIG_FLAGS = ("-fno-sanitize=all",)

WINDOW_SIZE = 16 << 20
"""Bytes of RAM that firmware takes, from the start of the board's window."""


class Target(NamedTuple):
    """What firmware is built for."""

    port: str
    ram_start: int
    flags: tuple[str, ...] = ("-Os",)
    gcc: str = ""
    """Debian's compiler; the machine's own if empty."""
    package: str = ""
    """The Debian package that has it."""
    gcc_flags: tuple[str, ...] = ()
    zig_flags: tuple[str, ...] = ()


def _cortex_m(
    cpu: str,
    ram_start: int,
    *,
    doorbell: int,
    interrupt: int,
    console: int,
    gcc_less: str = "",
    zig_less: str = "",
) -> Target:
    """A board of Arm's; without those of its instructions that would have to be switched on."""
    return Target(
        port="port_cortexm.c",
        ram_start=ram_start,
        flags=(
            "-Os",
            f"-DDOORBELL_UART={doorbell:#x}u",
            f"-DDOORBELL_IRQ={interrupt}",
            f"-DCONSOLE_UART={console:#x}u",
        ),
        gcc="arm-none-eabi-gcc",
        package="gcc-arm-none-eabi",
        gcc_flags=(f"-mcpu={cpu}{gcc_less}", "-mthumb", "-mfloat-abi=soft"),
        zig_flags=(
            "-target",
            "thumb-freestanding-eabi",
            f"-mcpu={cpu.replace('-', '_')}{zig_less}",
        ),
    )


def _riscv(bits: int, abi: str) -> Target:
    return Target(
        port="port_riscv.c",
        ram_start=0x8000_0000,
        flags=("-Os", "-mcmodel=medany"),
        gcc="riscv64-unknown-elf-gcc",
        package="gcc-riscv64-unknown-elf",
        gcc_flags=(f"-march=rv{bits}imac_zicsr", f"-mabi={abi}", "-msmall-data-limit=0"),
        zig_flags=("-target", f"riscv{bits}-freestanding", f"-mcpu=generic_rv{bits}+m+a+c"),
    )


TARGETS: Mapping[str, Target] = {
    "native": Target(port="port_native.c", ram_start=0x2000_0000, flags=("-O2",)),
    # mps2-an385, mps2-an386 and mps2-an511.
    "cortex-m3": _cortex_m(
        "cortex-m3", 0x2100_0000, doorbell=0x4000_5000, interrupt=2, console=0x4000_4000
    ),
    "mps2-an500": _cortex_m(
        "cortex-m7", 0x6000_0000, doorbell=0x4000_5000, interrupt=2, console=0x4000_4000
    ),
    # Also mps2-an521. These and the next ones start in secure state: the UARTs' secure aliases.
    "mps2-an505": _cortex_m(
        "cortex-m33", 0x8000_0000, doorbell=0x5020_1000, interrupt=34, console=0x5020_0000
    ),
    "mps3-an524": _cortex_m(
        "cortex-m33", 0x6000_0000, doorbell=0x5130_4000, interrupt=34, console=0x5130_3000
    ),
    "mps3-an547": _cortex_m(
        "cortex-m55",
        0x6000_0000,
        doorbell=0x5930_4000,
        interrupt=35,
        console=0x5930_3000,
        gcc_less="+nomve+nofp",
        zig_less="-mve-mve_fp",
    ),
    "rv32": _riscv(32, "ilp32"),
    "rv64": _riscv(64, "lp64"),
}
"""By name, as it stands in the names of files."""

_COMMON = ("name_service.c", "vring.c", "trace.c", "freestanding.c", "table.S")

APPLICATIONS: Mapping[str, tuple[str, ...]] = {
    "echo": ("echo.c", "rpmsg_device.c", *_COMMON),
    "echo-driver": ("echo.c", "rpmsg_driver.c", *_COMMON),
}
"""The sources of each application, without the port's."""


class BuildError(Exception):
    """A compiler is missing, failed, or compiles for a machine that has no native core."""


def _run(command: Sequence[str], *, package: str = "") -> str:
    try:
        # There, so that debug information names the sources by their places in csrc only.
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=FIRMWARE_DIR)
    except OSError as error:
        cure = f"; install the Debian package {package}" if package else ""
        raise BuildError(
            f"cannot run the C compiler {command[0]!r}: {error.strerror}{cure}"
        ) from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{shlex.join(command)}\n{error.stderr}") from error
    sys.stderr.write(done.stderr)
    return done.stdout


def _native_compiler() -> tuple[list[str], tuple[str, ...]]:
    """The command, and the flags that firmware for its machine needs."""
    cc = shlex.split(os.environ.get("CC") or "cc")
    machine = _run([*cc, "-dumpmachine"]).strip()
    flags = _NATIVE_FLAGS.get(machine.partition("-")[0])
    if flags is None:
        known = ", ".join(_NATIVE_FLAGS)
        raise BuildError(f"the C compiler is for {machine}; there is a native core for {known}")
    return cc, flags


@contextlib.contextmanager
def _replacing(output: Path, mode: int) -> Iterator[Path]:
    """A new path, put in the place of the file in one step: a core that runs is not disturbed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=output.parent) as scratch:
        made = Path(scratch).resolve() / output.name
        yield made
        made.chmod(mode)
        made.replace(output)


def _linker_script(target: Target) -> str:
    """The script of all targets, told where the window is. (zig knows no --defsym.)"""
    return (
        f"port_ram_start = {target.ram_start:#x};\n"
        f"port_ram_end = {target.ram_start + WINDOW_SIZE:#x};\n"
        + (FIRMWARE_DIR / "firmware.ld").read_text()
    )


def build_programs(output_dir: Path) -> None:
    """Compiles the programs that run native firmware and hold emulated cores.

    Raises:
        BuildError: with the compiler's own messages.
    """
    cc, _ = _native_compiler()
    for name, source in _PROGRAMS.items():
        with _replacing(output_dir / name, 0o755) as made:
            _run([*cc, *_CORE_FLAGS, str(FIRMWARE_DIR.parent / source), "-o", str(made)])


def compile_firmware(
    output: Path,
    target: str,
    sources: Sequence[str],
    flags: Sequence[str] = (),
    *,
    zig: bool = False,
) -> None:
    """Compiles sources and the port of a target into an image.

    Args:
        sources: of the application; relative ones lie in this directory.
        flags: further arguments of the compiler.
        zig: take ``python -m ziglang cc`` instead of Debian's cross compiler.

    Raises:
        BuildError: the compiler is missing, or has messages of its own.
        KeyError: no such target.
    """
    chosen = TARGETS[target]
    if target == "native":
        compiler, machine_flags = _native_compiler()
    elif zig:
        compiler = [sys.executable, "-m", "ziglang", "cc"]
        machine_flags = (*_ZIG_FLAGS, *chosen.zig_flags)
    else:
        compiler, machine_flags = [chosen.gcc], (*_GCC_FLAGS, *chosen.gcc_flags)
    with _replacing(output, 0o644) as made:
        script = made.with_suffix(".ld")
        script.write_text(_linker_script(chosen))
        _run(
            [
                *compiler,
                *_FIRMWARE_FLAGS,
                *chosen.flags,
                *machine_flags,
                *flags,
                "-T",
                str(script),
                chosen.port,
                *sources,
                "-o",
                str(made),
            ],
            package=chosen.package,
        )


def build_firmware(
    output_dir: Path,
    target: str,
    application: str = "echo",
    *,
    zig: bool = False,
    switches: Mapping[str, object] | None = None,
) -> Path:
    """Compiles one application for one target into a directory, which is created if need be.

    Args:
        zig: take ``python -m ziglang cc`` instead of Debian's cross compiler.
        switches: macros, as ``variant.h`` has them.

    Returns:
        The path of the image.

    Raises:
        BuildError: the compiler is missing, or has messages of its own.
        KeyError: no such target or application.
    """
    output = output_dir / f"{application}-{target}.elf"
    flags = [f"-D{name}={value}" for name, value in (switches or {}).items()]
    compile_firmware(output, target, APPLICATIONS[application], flags, zig=zig)
    return output


def main() -> int:
    parser = argparse.ArgumentParser(prog="build.py", description="Builds firmware.")
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; by default native"
    )
    parser.add_argument("--application", default="echo", choices=APPLICATIONS)
    parser.add_argument("--zig", action="store_true", help="compile with PyPI's ziglang")
    chosen = parser.parse_args()
    for target in chosen.targets:
        if target not in TARGETS:
            parser.error(f"no target {target!r}; there are {', '.join(TARGETS)}")
    try:
        for target in chosen.targets or ["native"]:
            if target == "native":
                build_programs(chosen.output_dir)
            build_firmware(chosen.output_dir, target, chosen.application, zig=chosen.zig)
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
