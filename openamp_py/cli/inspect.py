"""``openamp inspect``: what is in a firmware image."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from openamp_py.cli.common import DONE, Subparsers, address, read_firmware
from openamp_py.constants import DA_ANY, NOTIFY_ID_ANY
from openamp_py.remoteproc import Firmware
from openamp_py.remoteproc.images import decode_image_untrusted, loader_names
from openamp_py.remoteproc.resource_table import DevMem, Unknown, entry_type, type_name


def add_parser(commands: Subparsers, common: argparse.ArgumentParser) -> None:
    """Declares ``openamp inspect``."""
    parser = commands.add_parser(
        "inspect",
        parents=[common],
        help="show what is in a firmware image",
        description="Shows class, machine, entry point, segments and resource table of an image.",
    )
    parser.add_argument("firmware", type=Path, help="ELF, Intel HEX, S-record or raw file")
    parser.add_argument(
        "--loader", choices=loader_names(), help="its format (default: by its content)"
    )
    parser.add_argument("--address", type=address, help="device address of a raw file's first byte")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    firmware = decode_image_untrusted(
        read_firmware(options.firmware), loader=options.loader, address=options.address
    )
    if options.json:
        print(json.dumps({"firmware": str(options.firmware), **firmware.to_dict()}, indent=2))
    else:
        _print_text(options.firmware, firmware)
    return DONE


def _print_text(path: Path, firmware: Firmware) -> None:
    kind = f"ELF{firmware.elf_class} {firmware.machine_name}" if firmware.elf_class else "no ELF"
    print(f"{path}: {kind}, entry {firmware.entry:#x}")
    for number, segment in enumerate(firmware.segments):
        print(
            f"segment {number}: da {segment.da:#x}, {segment.file_size:#x} bytes in the file, "
            f"{segment.memory_size:#x} in memory"
        )
    if firmware.table is None:
        print("no resource table: this firmware has no RPMsg")
        return
    print(f"resource table at {firmware.table_da:#x}, {len(firmware.table.entries)} entries:")
    entries: Any = firmware.table.to_dict()["entries"]
    for number, (entry, fields) in enumerate(zip(firmware.table.entries, entries, strict=True)):
        del fields["kind"], fields["type"]
        vrings = fields.pop("vrings", ())
        skipped = _SKIPPED.get(type(entry), "")
        print(f"  {number}: {type_name(entry_type(entry))}{skipped}: {_fields(fields)}")
        for index, vring in enumerate(vrings):
            print(f"       vring {index}: {_fields(vring)}")


_SKIPPED = {Unknown: " (not known: skipped)", DevMem: " (not mapped)"}
_ANY = {"da": DA_ANY, "pa": DA_ANY, "notify_id": NOTIFY_ID_ANY}
_IN_HEX = ("da", "pa", "length", "align", "flags", "offset", "device_features", "driver_features")


def _fields(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_value(name, value)}" for name, value in fields.items())


def _value(name: str, value: object) -> str:
    if name in _ANY and value == _ANY[name]:
        return "any"
    return hex(value) if name in _IN_HEX and isinstance(value, int) else repr(value)
