"""``openamp bench``: how fast messages go, beside the same loops written in C."""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Sequence

import trio

from openamp_py.bench import CASES, SIZES, SOAK_MESSAGES, Row, Verdict, judge, run_bench
from openamp_py.cli.common import (
    DONE,
    Progress,
    Subparsers,
    plain_errors,
    positive_int,
    seconds,
    usage_errors,
)
from openamp_py.session import CORES

_LEGEND = """\
Medians of {repeat}; messages per second, or round trips where messages return. {cpus}
(a): the same loop in C on both sides, which sleep on the link's doorbell, a stream socket, as
Python does{loopback}. (b): the same, but neither side sleeps. Both send one message with each call.
Ratio: of time for a ping and for several endpoints (ep), otherwise of rate.
ping: one message out at a time (-sleep: without polling; -hogs: with a busy process on each CPU);
flood: one way, {batch} with each call; flood-single: one way, one with each call; echo: as many
out as there are buffers, and each returns. Several endpoints have their turns one after another."""

_LOOPBACK = " (on loopback: in one thread, without a doorbell)"
_CPUS = (
    "Both sides share the only CPU\nthat there is, so polling is in vain.",
    "Host and core have a CPU each.",
)


def add_parser(commands: Subparsers, common: argparse.ArgumentParser) -> None:
    """Declares ``openamp bench``."""
    parser = commands.add_parser(
        "bench",
        parents=[common],
        help="measure how fast messages go, beside C",
        description="Exchanges messages between two processes, and checks them, with Python "
        "endpoints and with the same loops written in C, in turns. An option that selects can be "
        "given more than once.",
    )
    parser.add_argument(
        "--core",
        action="append",
        choices=CORES,
        help="kind of core (default: process, the only one with targets)",
    )
    parser.add_argument(
        "--case",
        action="append",
        choices=CASES,
        help="kind of traffic (default: all that the core has, but not soak)",
    )
    parser.add_argument(
        "--size",
        action="append",
        type=positive_int,
        help=f"bytes of payload (default: {' and '.join(map(str, SIZES))})",
    )
    parser.add_argument(
        "--endpoints",
        action="append",
        type=positive_int,
        help=f"endpoints on each side (default: {_list_endpoints()})",
    )
    parser.add_argument(
        "--seconds", type=seconds, default=0.3, help="time for each measurement (default: 0.3)"
    )
    parser.add_argument(
        "--repeat", type=positive_int, default=5, help="measurements of each (default: 5)"
    )
    parser.add_argument(
        "--messages",
        type=positive_int,
        default=SOAK_MESSAGES,
        help=f"length of a soak (default: {SOAK_MESSAGES})",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.set_defaults(run=_run)


def _list_endpoints() -> str:
    return (
        "; ".join(
            f"{name}: {', '.join(map(str, case.endpoints))}"
            for name, case in CASES.items()
            if case.endpoints != (1,)
        )
        + "; others: 1"
    )


def _run(options: argparse.Namespace) -> int:
    progress = Progress("bench", 100)

    async def measure() -> list[Row]:
        return await run_bench(
            cores=options.core or ("process",),
            cases=options.case,
            sizes=options.size,
            endpoints=options.endpoints,
            seconds=options.seconds,
            repeat=options.repeat,
            messages=options.messages,
            progress=lambda done, total: progress.show(100 * done // total),
        )

    try:
        progress.show(0)
        with usage_errors(), plain_errors():
            rows = trio.run(measure)
    finally:
        progress.clear()
    cpus = len(os.sched_getaffinity(0))
    if options.json:
        print(json.dumps(_to_dict(options, cpus, rows)))
    else:
        _print_table(rows)
        _print_legend(options, cpus, rows)
    return DONE


_COLUMNS = "{:<8} {:<12} {:>5} {:>4} {:>9} {:>11} {:>11} {:>11}  {:>12} {:>14} {}"
_TITLES = (
    *("core", "case", "bytes", "ep", "Python us", "per s", "(a) per s", "(b) per s"),
    *("ratio", "target", ""),
)


def _print_table(rows: Sequence[Row]) -> None:
    print(_COLUMNS.format(*_TITLES).rstrip())
    for row in rows:
        verdict = judge(row, rows)
        figures = [f"{1e6 / row.rate:.2f}", f"{row.rate:,.0f}"]
        for rates in (row.event, row.polling):
            figures.append(f"{statistics.median(rates):,.0f}" if rates else "-")
        print(
            _COLUMNS.format(
                row.core, row.case, row.size, row.endpoints, *figures, *_describe(verdict)
            ).rstrip()
        )


def _describe(verdict: Verdict) -> tuple[str, str, str]:
    ratio = "-" if verdict.ratio is None else f"{verdict.ratio:.2f} {verdict.base}"
    if verdict.met is None:
        return ratio, "", ""
    return ratio, verdict.target, "met" if verdict.met else "missed"


def _print_legend(options: argparse.Namespace, cpus: int, rows: Sequence[Row]) -> None:
    for row in rows:
        if row.memory is not None:
            host, core = (
                f"{before / 2**20:.2f} MiB before and {after / 2**20:.2f} after"
                for before, after in (row.memory.host, row.memory.remote)
            )
            print(f"{row.messages:,} messages, none lost or out of order; host {host}, core {core}")
    if any(row.memory is None for row in rows):
        loopback = any(row.core == "loopback" for row in rows)
        print(
            _LEGEND.format(
                repeat=options.repeat,
                cpus=_CPUS[cpus > 1],
                loopback=_LOOPBACK if loopback else "",
                batch=CASES["flood"].batch,
            )
        )


def _to_dict(options: argparse.Namespace, cpus: int, rows: Sequence[Row]) -> dict[str, object]:
    return {
        "seconds": options.seconds,
        "repeat": options.repeat,
        "cpus": cpus,
        "rows": [_row_to_dict(row, judge(row, rows)) for row in rows],
    }


def _row_to_dict(row: Row, verdict: Verdict) -> dict[str, object]:
    result: dict[str, object] = {
        "core": row.core,
        "case": row.case,
        "size": row.size,
        "endpoints": row.endpoints,
        "python": _figures(row.python),
        "event": _figures(row.event),
        "polling": _figures(row.polling),
        "ratio": None if verdict.ratio is None else round(verdict.ratio, 3),
        "ratio_of": verdict.base or None,
        "ratio_is": "rate" if verdict.of_rate else "time",
        "target": verdict.target or None,
        "met": verdict.met,
    }
    if row.memory is not None:
        result["soak"] = {
            "messages": row.messages,
            "lost": 0,
            "out_of_order": 0,
            "host_bytes": row.memory.host,
            "core_bytes": row.memory.remote,
        }
    return result


_SUMMARIES: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "median": statistics.median,
    "max": max,
}


def _figures(rates: Sequence[float]) -> dict[str, dict[str, float]] | None:
    """Messages per second, and the microseconds of each; None where nothing was measured."""
    if not rates:
        return None
    times = [1e6 / rate for rate in rates]
    return {
        unit: {name: round(summary(values), 3) for name, summary in _SUMMARIES.items()}
        for unit, values in (("per_second", rates), ("us", times))
    }
