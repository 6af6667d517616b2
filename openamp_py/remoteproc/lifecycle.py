"""The states of a remote processor and what leads from one to the next, as a table."""

from __future__ import annotations

import enum
from typing import Final

from openamp_py.errors import StateError


class ProcessorState(enum.Enum):
    """Where a remote processor stands: the states of OpenAMP's design document, and Linux's."""

    OFFLINE = "offline"
    """Powered off, its resources released."""
    CONFIGURED = "configured"
    """Ready to be loaded."""
    READY = "ready"
    """An image is loaded."""
    RUNNING = "running"
    """The core executes what was loaded here."""
    SUSPENDED = "suspended"
    """The core pauses; what is sent to it waits."""
    CRASHED = "crashed"
    """The core ended when it should not have, or was reported as crashed."""
    STOPPED = "stopped"
    """The core executes no more; its resources are still there."""
    ATTACHED = "attached"
    """The core executes what somebody else has started."""
    DETACHED = "detached"
    """The core executes, and this host has let go of it."""


class Call(enum.Enum):
    """What can be asked of a remote processor."""

    CONFIGURE = "configure"
    LOAD = "load"
    START = "start"
    SUSPEND = "suspend"
    RESUME = "resume"
    RECOVER = "recover"
    ATTACH = "attach"
    DETACH = "detach"
    STOP = "stop"
    SHUTDOWN = "shutdown"


class Happening(enum.Enum):
    """What a core does without being asked."""

    EXIT = "exits"
    CRASH = "crashes"


Trigger = Call | Happening

_S = ProcessorState

TRANSITIONS: Final[dict[tuple[ProcessorState, Trigger], ProcessorState]] = {
    (_S.OFFLINE, Call.CONFIGURE): _S.CONFIGURED,
    (_S.OFFLINE, Call.ATTACH): _S.ATTACHED,
    (_S.OFFLINE, Call.STOP): _S.OFFLINE,
    (_S.OFFLINE, Call.SHUTDOWN): _S.OFFLINE,
    (_S.CONFIGURED, Call.LOAD): _S.READY,
    (_S.CONFIGURED, Call.STOP): _S.STOPPED,
    (_S.CONFIGURED, Call.SHUTDOWN): _S.OFFLINE,
    (_S.READY, Call.LOAD): _S.READY,
    (_S.READY, Call.START): _S.RUNNING,
    (_S.READY, Call.STOP): _S.STOPPED,
    (_S.READY, Call.SHUTDOWN): _S.OFFLINE,
    (_S.RUNNING, Call.SUSPEND): _S.SUSPENDED,
    (_S.RUNNING, Call.DETACH): _S.DETACHED,
    (_S.RUNNING, Call.STOP): _S.STOPPED,
    (_S.RUNNING, Call.SHUTDOWN): _S.OFFLINE,
    (_S.RUNNING, Happening.EXIT): _S.STOPPED,
    (_S.RUNNING, Happening.CRASH): _S.CRASHED,
    (_S.SUSPENDED, Call.RESUME): _S.RUNNING,
    (_S.SUSPENDED, Call.STOP): _S.STOPPED,
    (_S.SUSPENDED, Call.SHUTDOWN): _S.OFFLINE,
    (_S.SUSPENDED, Happening.EXIT): _S.STOPPED,
    (_S.SUSPENDED, Happening.CRASH): _S.CRASHED,
    (_S.CRASHED, Call.RECOVER): _S.RUNNING,
    (_S.CRASHED, Call.STOP): _S.STOPPED,
    (_S.CRASHED, Call.SHUTDOWN): _S.OFFLINE,
    (_S.STOPPED, Call.STOP): _S.STOPPED,
    (_S.STOPPED, Call.SHUTDOWN): _S.OFFLINE,
    (_S.ATTACHED, Call.SUSPEND): _S.SUSPENDED,
    (_S.ATTACHED, Call.DETACH): _S.DETACHED,
    (_S.ATTACHED, Call.STOP): _S.STOPPED,
    (_S.ATTACHED, Call.SHUTDOWN): _S.OFFLINE,
    (_S.ATTACHED, Happening.EXIT): _S.STOPPED,
    (_S.ATTACHED, Happening.CRASH): _S.CRASHED,
    (_S.DETACHED, Call.ATTACH): _S.ATTACHED,
    (_S.DETACHED, Call.SHUTDOWN): _S.OFFLINE,
}
"""The state after each call that is allowed; a pair that is absent is refused.

The same answers as the OpenAMP C library gives where it has the state and the call. Suspending,
recovering, attaching and detaching are as Linux does them, but that a core which was booted here
can be detached too, and that RESUME leads back to ATTACHED where the core was attached. To shut a
detached processor down lets go of it: the core runs on.
"""


def next_state(state: ProcessorState, trigger: Trigger) -> ProcessorState:
    """The state that a call, or what the core does, leads to.

    Raises:
        StateError: the call is not allowed in this state; says in which ones it is.
    """
    after = TRANSITIONS.get((state, trigger))
    if after is None:
        allowed = [s.value for s in ProcessorState if (s, trigger) in TRANSITIONS]
        raise StateError(
            f"cannot {trigger.value} a processor that is {state.value}; "
            f"it must be {' or '.join(allowed)}"
        )
    return after


def format_table() -> str:
    """The table as text: a row for each state, a column for each call, "-" where it is refused."""
    header = ["", *(trigger.value for trigger in (*Call, *Happening))]
    rows = [
        [
            state.value,
            *(
                after.value if (after := TRANSITIONS.get((state, trigger))) else "-"
                for trigger in (*Call, *Happening)
            ),
        ]
        for state in ProcessorState
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    )
