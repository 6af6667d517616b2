"""``openamp cores``: the cores and boards that there are, and what is installed for them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial

import trio

from openamp_py.choosing import CoreDescription, list_cores
from openamp_py.cli.common import DONE, Subparsers

_TITLES = ("core", "CPU", "shared RAM", "needs", "installed", "echo firmware")


def add_parser(commands: Subparsers, common: argparse.ArgumentParser) -> None:
    """Declares ``openamp cores``."""
    parser = commands.add_parser(
        "cores",
        parents=[common],
        help="list the cores and boards, what each needs, and whether it is installed",
        description="Lists what --core can be, where its shared RAM lies, the program that it "
        "needs, and the echo firmware that is booted where none is given.",
    )
    parser.add_argument(
        "--all", action="store_true", help="also boards that cannot be used, with the reason"
    )
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    cores = trio.run(partial(list_cores, unusable=options.all))
    if options.json:
        print(json.dumps([asdict(core) for core in cores]))
        return DONE
    rows = [_TITLES, *(_describe(core) for core in cores if core.usable)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    for core in cores:
        if not core.usable:
            print(f"{core.name}: {core.remark}")
    return DONE


def _describe(core: CoreDescription) -> tuple[str, ...]:
    ram = "" if core.ram is None else f"{core.ram[0]:#x}, {_size(core.ram[1])}"
    installed = core.remark or core.version or "yes"
    return (core.name, core.cpu, ram, core.program or "-", installed, core.firmware or "-")


def _size(size: int) -> str:
    unit, name = (1 << 20, "MiB") if size >= 1 << 20 else (1 << 10, "KiB")
    return f"{size / unit:g} {name}"
