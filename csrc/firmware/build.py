# SPDX-License-Identifier: BSD-3-Clause
"""Builds the native core, its keeper, a tether and its echo firmware with the machine's C compiler.

``python3 csrc/firmware/build.py OUTPUT_DIR`` writes ``native-core``, ``native-keeper`` and
``tether`` (csrc/native_core.c and so on, ordinary programs) and ``echo-native.elf`` (the
sources beside this file, freestanding). The compiler is ``$CC``, else ``cc``; a cross compiler for
a supported machine works too.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FIRMWARE_DIR = Path(__file__).resolve().parent
CORE_SOURCE = FIRMWARE_DIR.parent / "native_core.c"
KEEPER_SOURCE = FIRMWARE_DIR.parent / "native_keeper.c"
TETHER_SOURCE = FIRMWARE_DIR.parent / "tether.c"

CORE_NAME = "native-core"
KEEPER_NAME = "native-keeper"
TETHER_NAME = "tether"
FIRMWARE_NAME = "echo-native.elf"

_PROGRAMS = {CORE_NAME: CORE_SOURCE, KEEPER_NAME: KEEPER_SOURCE, TETHER_NAME: TETHER_SOURCE}

_WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Wshadow")

# PIE: the core itself is loaded high up, which leaves the low 4 GiB to the firmware's windows.
_CORE_FLAGS = ("-std=c11", "-O2", *_WARNINGS, "-fPIE", "-pie")

_FIRMWARE_SOURCES = (
    "port_native.c",
    "echo.c",
    "rpmsg_device.c",
    "trace.c",
    "freestanding.c",
    "table.S",
)
_FIRMWARE_FLAGS = (
    "-std=c11",
    "-O2",
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
    "-Wl,-z,max-page-size=4096",  # aarch64 would pad the file to 64 KiB
)

# Instructions and helper calls that firmware has no use for, by the first part of the compiler's
# target triplet.
_MACHINE_FLAGS = {
    "x86_64": ("-fcf-protection=none",),
    "aarch64": ("-mno-outline-atomics", "-mbranch-protection=none"),
}


class BuildError(Exception):
    """The C compiler is missing, failed, or compiles for a machine that has no native core."""


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"cannot run the C compiler {command[0]!r}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{shlex.join(command)}\n{error.stderr}") from error
    sys.stderr.write(done.stderr)
    return done.stdout


def build(output_dir: Path, compiler: Sequence[str] | None = None) -> tuple[Path, Path]:
    """Compile all programs into a directory, which is created if need be.

    Existing files are replaced in one step, so that a core that runs from there is not disturbed.

    Args:
        compiler: the command and its first arguments; by default from ``$CC``.

    Returns:
        The paths of the core and of the firmware.

    Raises:
        BuildError: with the compiler's own messages.
    """
    cc = list(compiler) if compiler is not None else shlex.split(os.environ.get("CC") or "cc")
    target = _run([*cc, "-dumpmachine"]).strip()
    machine_flags = _MACHINE_FLAGS.get(target.partition("-")[0])
    if machine_flags is None:
        known = ", ".join(_MACHINE_FLAGS)
        raise BuildError(f"the C compiler is for {target}; there is a native core for {known}")

    output_dir.mkdir(parents=True, exist_ok=True)
    firmware = output_dir / FIRMWARE_NAME
    with tempfile.TemporaryDirectory(prefix=".build-", dir=output_dir) as scratch_name:
        scratch = Path(scratch_name)
        new_firmware = scratch / FIRMWARE_NAME
        for name, source in _PROGRAMS.items():
            _run([*cc, *_CORE_FLAGS, str(source), "-o", str(scratch / name)])
        _run(
            [
                *cc,
                *_FIRMWARE_FLAGS,
                *machine_flags,
                "-T",
                str(FIRMWARE_DIR / "native.ld"),
                *(str(FIRMWARE_DIR / name) for name in _FIRMWARE_SOURCES),
                "-o",
                str(new_firmware),
            ]
        )
        new_firmware.chmod(0o644)
        for name in _PROGRAMS:
            (scratch / name).chmod(0o755)
            (scratch / name).replace(output_dir / name)
        new_firmware.replace(firmware)
    return output_dir / CORE_NAME, firmware


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: build.py OUTPUT_DIR", file=sys.stderr)
        return 2
    try:
        build(Path(sys.argv[1]))
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
