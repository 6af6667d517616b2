"""``openamp lint``: what is wrong with a firmware image, why it matters, and the cure."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from openamp_py.cli.common import DONE, FAILED, Subparsers, address, read_firmware
from openamp_py.remoteproc.lint import Finding, Severity, lint_firmware


def add_parser(commands: Subparsers, common: argparse.ArgumentParser) -> None:
    """Declares ``openamp lint``."""
    parser = commands.add_parser(
        "lint",
        parents=[common],
        help="find what is wrong with a firmware image",
        description="Finds every fault of an image and its resource table, with reason and cure. "
        "Exit code 1 when there is an error.",
    )
    parser.add_argument("firmware", type=Path, help="ELF file; of others only the format is seen")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--strict", action="store_true", help="a warning counts as an error")
    parser.add_argument(
        "--ram",
        type=_memory,
        action="append",
        metavar="DA:SIZE",
        help="memory that the core has; may be given more than once",
    )
    parser.set_defaults(run=_run)


def _memory(text: str) -> tuple[int, int]:
    da, _, size = text.partition(":")
    try:
        return address(da), address(size)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is not DA:SIZE, such as 0x20000000:0x10000"
        ) from None


def _run(options: argparse.Namespace) -> int:
    findings = lint_firmware(read_firmware(options.firmware), ram=options.ram)
    counts = Counter(finding.severity for finding in findings)
    if options.json:
        result = {
            "firmware": str(options.firmware),
            **{f"{severity.value}s": counts[severity] for severity in Severity},
            "findings": [finding.to_dict() for finding in findings],
        }
        print(json.dumps(result, indent=2))
    else:
        _print_text(options.firmware, findings, counts)
    failed = counts[Severity.ERROR] or (options.strict and counts[Severity.WARNING])
    return FAILED if failed else DONE


def _print_text(path: Path, findings: tuple[Finding, ...], counts: Counter[Severity]) -> None:
    for finding in findings:
        print(f"{finding.severity.value}: {finding.where}: {finding.what} [{finding.code}]")
        print(f"  why:  {finding.why}")
        print(f"  cure: {finding.cure}")
        print()
    total = ", ".join(
        f"{counts[severity]} {severity.value}{'s' * (counts[severity] != 1)}"
        for severity in Severity
        if counts[severity]
    )
    print(f"{path}: {total or 'clean'}")
