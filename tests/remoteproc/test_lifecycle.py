"""The state table: every pair of state and call."""

from __future__ import annotations

import itertools

import pytest

from openamp_py import StateError
from openamp_py.remoteproc.lifecycle import (
    Call,
    Happening,
    ProcessorState,
    Trigger,
    format_table,
    next_state,
)

# Written down a second time: what OpenAMP's C answers (openamp-c.md section 10), and Linux.
EXPECTED = """
            configure   load   start    suspend    resume   recover  attach    detach    stop     shutdown  exits    crashes
offline     configured  -      -        -          -        -        attached  -         offline  offline   -        -
configured  -           ready  -        -          -        -        -         -         stopped  offline   -        -
ready       -           ready  running  -          -        -        -         -         stopped  offline   -        -
running     -           -      -        suspended  -        -        -         detached  stopped  offline   stopped  crashed
suspended   -           -      -        -          running  -        -         -         stopped  offline   stopped  crashed
crashed     -           -      -        -          -        running  -         -         stopped  offline   -        -
stopped     -           -      -        -          -        -        -         -         stopped  offline   -        -
attached    -           -      -        suspended  -        -        -         detached  stopped  offline   stopped  crashed
detached    -           -      -        -          -        -        attached  -         -        offline   -        -
"""  # noqa: E501


def _expected() -> dict[tuple[str, str], str]:
    header, *rows = (line.split() for line in EXPECTED.strip().splitlines())
    return {
        (state, call): after
        for state, *cells in rows
        for call, after in zip(header, cells, strict=True)
    }


@pytest.mark.parametrize(
    ("state", "call"), list(itertools.product(ProcessorState, [*Call, *Happening]))
)
def test_every_state_and_call(state: ProcessorState, call: Trigger) -> None:
    expected = _expected()[state.value, call.value]
    if expected == "-":
        with pytest.raises(StateError, match=f"cannot {call.value} .* {state.value}; it must be"):
            next_state(state, call)
    else:
        assert next_state(state, call).value == expected


def test_the_printed_table_is_the_one_in_the_code() -> None:
    printed = [line.split() for line in format_table().splitlines()]
    assert printed == [line.split() for line in EXPECTED.strip().splitlines()]
