"""The state table: every pair of state and call."""

from __future__ import annotations

import itertools

import pytest

from openamp_py import StateError
from openamp_py.remoteproc.lifecycle import Call, ProcessorState, next_state

# Written down a second time, from openamp-c.md section 10: rows are states, columns calls.
EXPECTED = """
            configure   load   start    stop     shutdown
offline     configured  -      -        offline  offline
configured  -           ready  -        stopped  offline
ready       -           ready  running  stopped  offline
running     -           -      -        stopped  offline
stopped     -           -      -        stopped  offline
"""


def _expected() -> dict[tuple[str, str], str]:
    header, *rows = (line.split() for line in EXPECTED.strip().splitlines())
    return {
        (state, call): after
        for state, *cells in rows
        for call, after in zip(header, cells, strict=True)
    }


@pytest.mark.parametrize(("state", "call"), list(itertools.product(ProcessorState, Call)))
def test_every_state_and_call(state: ProcessorState, call: Call) -> None:
    expected = _expected()[state.value, call.value]
    if expected == "-":
        with pytest.raises(StateError, match=f"cannot {call.value} .* {state.value}; it must be"):
            next_state(state, call)
    else:
        assert next_state(state, call).value == expected
