"""The states of a remote processor and the calls that lead from one to the next, as a table."""

from __future__ import annotations

import enum
from typing import Final

from openamp_py.errors import StateError


class ProcessorState(enum.Enum):
    """Where a remote processor stands (OpenAMP's remoteproc design document)."""

    OFFLINE = "offline"
    """Powered off, its resources released."""
    CONFIGURED = "configured"
    """Ready to be loaded."""
    READY = "ready"
    """An image is loaded."""
    RUNNING = "running"
    """The core executes."""
    STOPPED = "stopped"
    """The core executes no more; its resources are still there."""


class Call(enum.Enum):
    """What can be asked of a remote processor."""

    CONFIGURE = "configure"
    LOAD = "load"
    START = "start"
    STOP = "stop"
    SHUTDOWN = "shutdown"


_S = ProcessorState

TRANSITIONS: Final[dict[tuple[ProcessorState, Call], ProcessorState]] = {
    (_S.OFFLINE, Call.CONFIGURE): _S.CONFIGURED,
    (_S.OFFLINE, Call.STOP): _S.OFFLINE,
    (_S.OFFLINE, Call.SHUTDOWN): _S.OFFLINE,
    (_S.CONFIGURED, Call.LOAD): _S.READY,
    (_S.CONFIGURED, Call.STOP): _S.STOPPED,
    (_S.CONFIGURED, Call.SHUTDOWN): _S.OFFLINE,
    (_S.READY, Call.LOAD): _S.READY,
    (_S.READY, Call.START): _S.RUNNING,
    (_S.READY, Call.STOP): _S.STOPPED,
    (_S.READY, Call.SHUTDOWN): _S.OFFLINE,
    (_S.RUNNING, Call.STOP): _S.STOPPED,
    (_S.RUNNING, Call.SHUTDOWN): _S.OFFLINE,
    (_S.STOPPED, Call.STOP): _S.STOPPED,
    (_S.STOPPED, Call.SHUTDOWN): _S.OFFLINE,
}
"""The state after each allowed call; a pair that is absent is refused.

The same answers as the OpenAMP C library gives. A running core that ends by itself, well or
badly, goes to STOPPED without a call.
"""


def next_state(state: ProcessorState, call: Call) -> ProcessorState:
    """The state that a call leads to.

    Raises:
        StateError: the call is not allowed in this state; says in which ones it is.
    """
    after = TRANSITIONS.get((state, call))
    if after is None:
        allowed = [s.value for s in ProcessorState if (s, call) in TRANSITIONS]
        raise StateError(
            f"cannot {call.value} a processor that is {state.value}; "
            f"it must be {' or '.join(allowed)}"
        )
    return after
