"""``openamp doctor``: what keeps this machine's remote processors from being used."""

from __future__ import annotations

import argparse
import json

from openamp_py.cli.common import DONE, FAILED, Subparsers, one_line, usage_errors
from openamp_py.cli.list import add_root_option
from openamp_py.linux.access import MachineAccess
from openamp_py.linux.doctor import DEFAULT_GROUP, Check, Level, examine, udev_rules


def add_parser(commands: Subparsers, common: argparse.ArgumentParser) -> None:
    """Declares ``openamp doctor``."""
    parser = commands.add_parser(
        "doctor",
        parents=[common],
        help="check this machine's kernel, modules, nodes and permissions, and say what to do",
        description="Looks at what Linux's remoteproc and rpmsg need on this machine, without "
        "changing anything, and prints what to do. The exit code is 1 if there is something.",
    )
    parser.add_argument("--json", action="store_true", help="a JSON list instead of lines")
    parser.add_argument(
        "--udev",
        metavar="GROUP",
        nargs="?",
        const=DEFAULT_GROUP,
        help="print rules for udev that give the nodes and processors to a group "
        f"(default: {DEFAULT_GROUP}), and check nothing",
    )
    add_root_option(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.udev is not None:
        with usage_errors():
            print(udev_rules(options.udev), end="")
        return DONE
    checks = examine(MachineAccess(options.root))
    if options.json:
        print(json.dumps([_as_json(check) for check in checks]))
    else:
        for check in checks:
            print(one_line(f"{check.level.value:5}  {check.subject}: {check.text}"))
            if check.cure is not None:
                print(one_line(f"{'':5}  -> {check.cure}"))
    return FAILED if any(check.level is Level.WRONG for check in checks) else DONE


def _as_json(check: Check) -> dict[str, str | None]:
    return {
        "level": check.level.value,
        "subject": check.subject,
        "text": check.text,
        "cure": check.cure,
    }
