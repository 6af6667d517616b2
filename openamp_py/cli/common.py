"""What the subcommands share: exit codes, usage errors, options and progress."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import trio

from openamp_py.choosing import AUTO, CORES, LINUX, QEMU
from openamp_py.errors import OpenAMPError, PeerError
from openamp_py.platforms.qemu import QemuPlatform
from openamp_py.remoteproc import CoredumpMode, CrashPolicy, Platform
from openamp_py.remoteproc.crash import NO_POLICY
from openamp_py.remoteproc.sources import Image, read_image

DONE, FAILED, USAGE = 0, 1, 2
"""Exit codes: done; the peer, the firmware or the platform failed; used wrongly."""

Subparsers = Any
"""What argparse's add_subparsers returns; its class has no public name."""


class UsageError(Exception):
    """The command was used wrongly."""


class Command(Protocol):
    """A module that is a subcommand."""

    def add_parser(self, commands: Subparsers, common: argparse.ArgumentParser) -> None:
        """Declares its options, and as `run` what carries it out and returns the exit code."""
        ...


@contextmanager
def plain_errors() -> Iterator[None]:
    """Lets the cause of a broken channel out instead of trio's own class."""
    try:
        yield
    except trio.BrokenResourceError as error:
        raise error.__cause__ or PeerError(str(error)) from None


@contextmanager
def usage_errors() -> Iterator[None]:
    """Takes a bad value for a mistake of whoever typed it; bad firmware is not one."""
    try:
        yield
    except OpenAMPError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def add_core_options(parser: argparse.ArgumentParser, *, urls: str = "") -> None:
    """Declares what is booted: FIRMWARE, --core, --gdb and --coredump.

    Args:
        urls: what else --core may be.
    """
    parser.add_argument(
        "firmware", nargs="?", type=Path, help="ELF to boot; default: the shipped echo firmware"
    )
    parser.add_argument(
        "--core",
        default=AUTO,
        help=f"{', '.join((AUTO, *CORES, QEMU))}, {QEMU}:BOARD (see `openamp cores`), "
        f"{LINUX}:NAME for a processor of this machine's kernel (see `openamp list`){urls} "
        f"(default: {AUTO}, by the ELF)",
    )
    parser.add_argument(
        "--gdb",
        metavar="PORT|unix:PATH",
        help="let an emulated core wait for a debugger there; without a time limit then",
    )
    parser.add_argument(
        "--coredump", metavar="DIR", type=Path, help="save the core's memory there if it crashes"
    )


def crash_policy(options: argparse.Namespace) -> CrashPolicy:
    """What --coredump asks for."""
    if options.coredump is None:
        return NO_POLICY
    return CrashPolicy(coredump=CoredumpMode.INLINE, coredump_to=f"{options.coredump}/")


def say_debugger(platform: Platform, image: Image) -> None:
    """Says on stderr how a debugger gets at the core, where that waits for one."""
    where = platform.debugger if isinstance(platform, QemuPlatform) else None
    if where is None:
        return
    file = image if isinstance(image, str | Path) else "FIRMWARE"
    command = shlex.join(["gdb-multiarch", str(file), "-ex", f"target remote {where}"])
    print(f"the core waits for a debugger: {command}", file=sys.stderr, flush=True)


class Progress:
    """A line on a terminal that says how far long work is; nothing anywhere else."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._shown = -1
        self._on = sys.stderr.isatty()

    def show(self, done: int) -> None:
        """Updates the line when another percent is done."""
        percent = 100 * done // self._total if self._total else 100
        if self._on and percent != self._shown:
            self._shown = percent
            print(f"\r{self._what}: {percent:3d} %", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Takes the line away."""
        if self._on and self._shown >= 0:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = -1


def printable(text: str) -> str:
    """Text from a core for a terminal: what could steer that is shown as an escape sequence."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else f"\\x{ord(each):02x}" for each in text
    )


def one_line(text: str) -> str:
    """As printable, of what must not look like more than a line."""
    return printable(text).replace("\n", "\\x0a")


def read_firmware(path: Path) -> bytes:
    """The bytes of a firmware image: a file, or the name of one in the search path.

    Raises:
        ImageError: it is too large, or has no end.
        OSError: it cannot be read.
    """
    data = trio.run(read_image, path)
    assert isinstance(data, bytes), "a path is not decoded"
    return data


def positive_int(text: str) -> int:
    """An argparse type: a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def seconds(text: str) -> float:
    """An argparse type: a time of zero or more seconds."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a time of zero or more seconds")
    return value


def address(text: str) -> int:
    """An argparse type: an address, decimal or with 0x in front."""
    value = int(text, 0)
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text} is not an address of at most 64 bits")
    return value
