"""``openamp bench``: how fast messages go round, beside the same loops written in C."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence

import trio

from openamp_py.bench import CASES, SIZES, Row, run_bench
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
ping: one message out at a time; flood: as many as there are buffers. Medians of {repeat}.
Python/C: how many times longer Python takes. The C loops use the same rings and doorbell, with
one call for each message sent and one for each batch received, as Python does. On process the
echo service beside C is in C too. On loopback the C loop plays both ends in one thread without
a doorbell, where Python has two trio tasks. Host and core have a CPU each if there are two."""


def add_parser(commands: Subparsers, common: argparse.ArgumentParser) -> None:
    """Declares ``openamp bench``."""
    parser = commands.add_parser(
        "bench",
        parents=[common],
        help="measure how fast messages go round, beside C",
        description="Exchanges messages with an echo service and checks what comes back, with "
        "Python endpoints and with the same loop written in C, in turns. An option that selects "
        "can be given more than once; without it, all are measured.",
    )
    parser.add_argument("--core", action="append", choices=CORES, help="kind of core")
    parser.add_argument("--case", action="append", choices=CASES, help="kind of traffic")
    parser.add_argument(
        "--size",
        action="append",
        type=positive_int,
        help=f"bytes of payload (default: {' and '.join(map(str, SIZES))})",
    )
    parser.add_argument(
        "--seconds", type=seconds, default=0.3, help="time for each measurement (default: 0.3)"
    )
    parser.add_argument(
        "--repeat", type=positive_int, default=3, help="measurements of each (default: 3)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    cores, sizes, cases = options.core or CORES, options.size or SIZES, options.case or CASES
    progress = Progress("bench", 2 * options.repeat * len(cores) * len(sizes) * len(cases))
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        progress.show(done)

    async def measure() -> list[Row]:
        return await run_bench(
            cores=cores,
            sizes=sizes,
            cases=cases,
            seconds=options.seconds,
            repeat=options.repeat,
            progress=count,
        )

    try:
        with usage_errors(), plain_errors():
            rows = trio.run(measure)
    finally:
        progress.clear()
    if options.json:
        print(json.dumps(_to_dict(options, rows)))
    else:
        _print_table(rows)
        print(_LEGEND.format(repeat=options.repeat))
    return DONE


_COLUMNS = "{:<9} {:>5}  {:<6} {:>10} {:>11}   {:>10} {:>11}  {:>8}"
_TITLES = ("core", "bytes", "case", "Python us", "per s", "C us", "per s", "Python/C")


def _print_table(rows: Sequence[Row]) -> None:
    print(_COLUMNS.format(*_TITLES))
    for row in rows:
        figures = []
        for rates in (row.python, row.c):
            rate = statistics.median(rates)
            figures += [f"{1e6 / rate:.2f}", f"{rate:,.0f}"]
        print(_COLUMNS.format(row.core, row.size, row.case, *figures, f"{row.ratio:.2f}"))


def _to_dict(options: argparse.Namespace, rows: Sequence[Row]) -> dict[str, object]:
    return {
        "seconds": options.seconds,
        "repeat": options.repeat,
        "rows": [
            {
                "core": row.core,
                "size": row.size,
                "case": row.case,
                "python": _figures(row.python),
                "c": _figures(row.c),
                "ratio": round(row.ratio, 3),
            }
            for row in rows
        ],
    }


_SUMMARIES: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "median": statistics.median,
    "max": max,
}


def _figures(rates: Sequence[float]) -> dict[str, dict[str, float]]:
    """Round trips per second, and the microseconds of each."""
    times = [1e6 / rate for rate in rates]
    return {
        unit: {name: round(summary(values), 3) for name, summary in _SUMMARIES.items()}
        for unit, values in (("per_second", rates), ("us", times))
    }
