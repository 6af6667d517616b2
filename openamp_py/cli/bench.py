"""``openamp bench``: how fast messages go, beside the same loops written in C."""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from openamp_py.bench import CASES, SIZES, SOAK_MESSAGES, Row, Verdict, judge, run_bench
from openamp_py.bench_cores import CORES_CASE, SIZE, TOGETHER, default_cores, run_cores
from openamp_py.bench_lifecycle import (
    CYCLES,
    IMAGE_SIZE,
    LIFECYCLE,
    LIFECYCLE_CORES,
    TABLE_ENTRIES,
    Figure,
    run_lifecycle,
)
from openamp_py.choosing import CORES, check_name
from openamp_py.cli.common import (
    DONE,
    Progress,
    Subparsers,
    plain_errors,
    positive_int,
    seconds,
    usage_errors,
)

_LEGEND = """\
Medians of {repeat}; messages per second, or round trips where messages return. {cpus}
(a): the same loop in C on both sides, which sleep on the link's doorbell, a stream socket, as
Python does{loopback}. (b): the same, but neither side sleeps. Both send one message with each call.
Ratio: of time for a ping and for several endpoints (ep), otherwise of rate.
ping: one message out at a time (-sleep: without polling; -hogs: with a busy process on each CPU);
flood: one way, {batch} with each call; flood-single: one way, one with each call; echo: as many
out as there are buffers, and each returns. Several endpoints have their turns one after another."""

_LIFECYCLE_LEGEND = """\
Medians of {repeat} in a warm program; boots and crashes: {cycles:,} in a row, and what this
program has more of after them. Up to the first echo: session (from its opening), boot (in a
session), recovery (from the order to crash; process: from SIGKILL; -dump: the core's memory is
copied before and written after, -inline: written before), resume (of a message that waited),
attach. Load: {size} MiB into memory that was written before, as was memcpy's; -path: from a file
in the page cache. Table: {entries} entries decoded."""

_CORES_LEGEND = """\
Medians of {repeat} in a warm program; {size} bytes of payload. first-message: from the opening of a
session, whose core's process does not run yet, to the first echo; at most 3 times native's and
qemu-start, which is a QEMU with nothing but the board, from its spawn to the first word that its
core writes. pre-launched: a boot in a session, to the first echo. flood: as many out as there are
buffers, and each returns. idle: CPU time of QEMU, and of this program. {together}-: so many cores
at once, until all have echoed, and all they echo."""

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
        type=_core,
        help=f"kind of core: {', '.join(CORES)}, or for the case {CORES_CASE} also qemu:BOARD "
        "(default: process, the only one with targets)",
    )
    parser.add_argument(
        "--case",
        action="append",
        choices=(*CASES, LIFECYCLE, CORES_CASE),
        help="kind of traffic; or lifecycle: boots, crashes and the like, on "
        f"{' and '.join(LIFECYCLE_CORES)} by default; or cores: all kinds of core side by side, "
        f"{' and '.join(default_cores())} by default "
        "(default: all that the core has, but neither soak, lifecycle nor cores)",
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
    parser.add_argument(
        "--cycles",
        type=positive_int,
        default=CYCLES,
        help=f"boots, and crashes, in a row of lifecycle (default: {CYCLES})",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.set_defaults(run=_run)


def _core(text: str) -> str:
    """An argparse type: the name of a core."""
    try:
        check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _list_endpoints() -> str:
    return (
        "; ".join(
            f"{name}: {', '.join(map(str, case.endpoints))}"
            for name, case in CASES.items()
            if case.endpoints != (1,)
        )
        + "; others: 1"
    )


@dataclass(frozen=True, slots=True)
class _Results:
    """What was measured, by the kinds of case."""

    rows: Sequence[Row] = ()
    lifecycle: Sequence[Figure] = ()
    cores: Sequence[Figure] = ()


def _run(options: argparse.Namespace) -> int:
    progress = Progress("bench", 100)
    try:
        progress.show(0)
        with usage_errors(), plain_errors():
            results = trio.run(_measure, options, progress)
    finally:
        progress.clear()
    cpus = len(os.sched_getaffinity(0))
    if options.json:
        print(json.dumps(_to_dict(options, cpus, results)))
        return DONE
    parts = []
    if results.lifecycle:
        legend = _LIFECYCLE_LEGEND.format(
            repeat=options.repeat,
            cycles=options.cycles,
            size=IMAGE_SIZE >> 20,
            entries=TABLE_ENTRIES,
        )
        parts.append(partial(_print_figures, results.lifecycle, legend))
    if results.cores:
        legend = _CORES_LEGEND.format(repeat=options.repeat, size=SIZE, together=TOGETHER)
        parts.append(partial(_print_figures, results.cores, legend))
    if results.rows:
        parts.append(partial(_print_rows, options, cpus, results.rows))
    for number, show in enumerate(parts):
        if number:
            print()
        show()
    return DONE


async def _measure(options: argparse.Namespace, progress: Progress) -> _Results:
    def show(done: int, total: int) -> None:
        progress.show(100 * done // total)

    asked = options.case or ()
    cases = [case for case in asked if case not in (LIFECYCLE, CORES_CASE)]
    rows: Sequence[Row] = ()
    lifecycle: Sequence[Figure] = ()
    cores: Sequence[Figure] = ()
    if LIFECYCLE in asked:
        lifecycle = await run_lifecycle(
            cores=options.core or LIFECYCLE_CORES,
            repeat=options.repeat,
            cycles=options.cycles,
            progress=show,
        )
    if CORES_CASE in asked:
        cores = await run_cores(
            cores=options.core, repeat=options.repeat, seconds=options.seconds, progress=show
        )
    if cases or not asked:
        rows = await run_bench(
            cores=options.core or ("process",),
            cases=cases or None,
            sizes=options.size,
            endpoints=options.endpoints,
            seconds=options.seconds,
            repeat=options.repeat,
            messages=options.messages,
            progress=show,
        )
    return _Results(rows, lifecycle, cores)


def _print_rows(options: argparse.Namespace, cpus: int, rows: Sequence[Row]) -> None:
    _print_table(rows)
    _print_legend(options, cpus, rows)


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


_VERDICTS = {True: "met", False: "missed", None: ""}


def _describe(verdict: Verdict) -> tuple[str, str, str]:
    ratio = "-" if verdict.ratio is None else f"{verdict.ratio:.2f} {verdict.base}"
    return ratio, verdict.target, _VERDICTS[verdict.met]


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


_FIGURE_COLUMNS = "{:<{width}} {:<19} {:>10} {:<6}  {:<32} {:<8} {}"
_FIGURE_TITLES = ("core", "step", "median", "", "from least to most", "target", "")
_CORE_WIDTH = 8  # at least


def _print_figures(figures: Sequence[Figure], legend: str) -> None:
    width = max(_CORE_WIDTH, *(len(figure.core) for figure in figures))
    print(_FIGURE_COLUMNS.format(*_FIGURE_TITLES, width=width).rstrip())
    for figure in figures:
        print(
            _FIGURE_COLUMNS.format(
                figure.core,
                figure.step,
                _number(figure.median),
                figure.unit,
                _describe_spread(figure),
                figure.target,
                _VERDICTS[figure.met],
                width=width,
            ).rstrip()
        )
    print(legend)


def _describe_spread(figure: Figure) -> str:
    if figure.around is not None:
        before, after = figure.around
        return f"{_number(before)} before, {_number(after)} after"
    if len(figure.values) == 1:
        return ""
    return f"{_number(min(figure.values))} to {_number(max(figure.values))}"


def _number(value: float) -> str:
    return f"{value:,d}" if isinstance(value, int) else f"{value:,.{0 if value >= 1000 else 2}f}"


def _to_dict(options: argparse.Namespace, cpus: int, results: _Results) -> dict[str, object]:
    result: dict[str, object] = {
        "seconds": options.seconds,
        "repeat": options.repeat,
        "cpus": cpus,
        "rows": [_row_to_dict(row, judge(row, results.rows)) for row in results.rows],
    }
    if results.lifecycle:
        result["cycles"] = options.cycles
        result["lifecycle"] = [_figure_to_dict(figure) for figure in results.lifecycle]
    if results.cores:
        result["cores"] = [_figure_to_dict(figure) for figure in results.cores]
    return result


def _figure_to_dict(figure: Figure) -> dict[str, object]:
    result: dict[str, object] = {
        "core": figure.core,
        "step": figure.step,
        "unit": figure.unit,
        **_summarize(figure.values),
        "target": figure.target or None,
        "met": figure.met,
    }
    if figure.around is not None:
        result["before"], result["after"] = (round(each, 3) for each in figure.around)
    return result


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
    return {unit: _summarize(values) for unit, values in (("per_second", rates), ("us", times))}


def _summarize(values: Sequence[float]) -> dict[str, float]:
    return {name: round(summary(values), 3) for name, summary in _SUMMARIES.items()}
