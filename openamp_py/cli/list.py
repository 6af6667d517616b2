"""``openamp list``: the remote processors of this machine, with their channels and nodes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict

from openamp_py.cli.common import DONE, Subparsers, one_line
from openamp_py.constants import ADDRESS_ANY
from openamp_py.linux.access import MachineAccess
from openamp_py.linux.tree import (
    PROCESSORS,
    EndpointNode,
    LinuxChannel,
    LinuxProcessor,
    LinuxTree,
    read_tree,
)


def add_parser(commands: Subparsers, common: argparse.ArgumentParser) -> None:
    """Declares ``openamp list``."""
    parser = commands.add_parser(
        "list",
        parents=[common],
        help="list this machine's remote processors, channels and endpoints",
        description="Lists what Linux's remoteproc and rpmsg have on this machine: processors "
        "with state and firmware, channels, and the nodes in /dev. Cores that are emulated or run "
        "as processes are not among them: see `openamp cores`.",
    )
    parser.add_argument("--json", action="store_true", help="a JSON object instead of lines")
    add_root_option(parser)
    parser.set_defaults(run=_run)


def add_root_option(parser: argparse.ArgumentParser) -> None:
    """Declares --root."""
    parser.add_argument(
        "--root", metavar="DIR", default="/", help="where the machine's /sys, /dev and /proc are"
    )


def _run(options: argparse.Namespace) -> int:
    tree = read_tree(MachineAccess(options.root))
    if options.json:
        print(json.dumps(asdict(tree)))
        return DONE
    for line in _lines(tree):
        print(one_line(line))
    return DONE


def _lines(tree: LinuxTree) -> Iterator[str]:
    if not tree.processors:
        yield (
            f"no remote processors: {PROCESSORS} has none (`openamp doctor` tells why; "
            "`openamp cores` lists those that need no hardware)"
        )
    for processor in tree.processors:
        yield _describe(processor)
        yield from _belongings(tree, processor.kernel_name)
    strays = list(_belongings(tree, None))
    if strays:
        yield "of no processor here:"
        yield from strays
    for problem in tree.problems:
        yield f"not read: {problem}"


def _describe(processor: LinuxProcessor) -> str:
    said = [
        processor.state or "state unknown",
        f"firmware {processor.firmware or 'unknown'}",
        *(
            f"{word} {value}"
            for word, value in (("recovery", processor.recovery), ("coredump", processor.coredump))
            if value is not None
        ),
    ]
    return f"{processor.name or '?'} ({processor.kernel_name}): {', '.join(said)}"


def _belongings(tree: LinuxTree, processor: str | None) -> Iterator[str]:
    for channel in tree.channels:
        if channel.processor == processor:
            driver = "no driver" if channel.driver is None else f"driver {channel.driver}"
            yield f"  channel {channel.name or '?'}, {_addresses(channel)}, {driver}"
    for control in tree.controls:
        if control.processor == processor:
            yield f"  control {control.node}"
    for endpoint in tree.endpoints:
        if endpoint.processor == processor:
            yield f"  endpoint {endpoint.node}: {endpoint.name or '?'}, {_addresses(endpoint)}"
    for tty in tree.ttys:
        if tty.processor == processor:
            yield f"  terminal {tty.node}"
    for dump in tree.dumps:
        if dump.processor == processor is not None:
            yield f"  coredump {dump.data}"


def _addresses(of: LinuxChannel | EndpointNode) -> str:
    return f"{_address(of.source)} to {_address(of.destination)}"


def _address(address: int | None) -> str:
    if address is None:
        return "?"
    return "any" if address == ADDRESS_ANY else str(address)
