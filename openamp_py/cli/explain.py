"""``openamp explain``: the tables of the documentation, printed from the code."""

from __future__ import annotations

import argparse
import json

from openamp_py import porting
from openamp_py.cli.common import DONE, Subparsers
from openamp_py.remoteproc.lifecycle import TRANSITIONS, format_table

_ROWS = {"openamp": porting.OPENAMP, "linux": porting.LINUX}


def add_parser(commands: Subparsers, common: argparse.ArgumentParser) -> None:
    """Declares ``openamp explain``."""
    parser = commands.add_parser(
        "explain",
        parents=[common],
        help="print the life cycle's table, or what OpenAMP's and Linux's calls are here",
        description="Prints a table: the states of a remote processor and what leads from one to "
        "the next; or, for each call of OpenAMP's or Linux's remoteproc, what it is here.",
    )
    parser.add_argument("what", choices=("states", *_ROWS))
    parser.add_argument("--json", action="store_true", help="one JSON array instead of text")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.what == "states":
        rows: list[dict[str, str]] = [
            {"state": state.value, "call": trigger.value, "after": after.value}
            for (state, trigger), after in TRANSITIONS.items()
        ]
        text = format_table()
    else:
        rows = [row._asdict() for row in _ROWS[options.what]]
        text = porting.format_rows(_ROWS[options.what])
    print(json.dumps(rows, indent=2) if options.json else text)
    return DONE
