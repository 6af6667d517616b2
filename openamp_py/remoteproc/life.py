"""One life of a core, as its processor sees it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from openamp_py.errors import CoreCrashedError, OpenAMPError, PlatformError
from openamp_py.remoteproc.lifecycle import Happening
from openamp_py.remoteproc.platform import Core
from openamp_py.remoteproc.subdevices import Subdevices


class Life:
    """One run of a core: how to end it, how it ended, and what lived with it.

    Made by a RemoteProcessor for each start.

    Attributes:
        core: what runs.
        subdevices: what lives with it.
        attached: it was taken over, and not booted here.
        scope: its task; cancelled to end it.
        ended: it is over.
        is_up: it began, and the processor has entered the state that says so.
        is_leaving: it is being ended by a call.
        is_recovering: it has crashed, and a new start is about to come.
        report: as which crash it was reported.
        happening: what it did by itself; None as long as it runs, or where it was ended.
        failure: why it did that.
        recovery: cancelled to give up the new start.
        aftermath: cancelled to give up all that follows its end.
        settled: all that is done.
    """

    def __init__(self, core: Core, subdevices: Subdevices, *, attached: bool) -> None:
        self.core = core
        self.subdevices = subdevices
        self.attached = attached
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.is_up = False
        self.is_leaving = False
        self.is_recovering = False
        self.report: CoreCrashedError | None = None
        self.failure: OpenAMPError | None = None
        self.happening: Happening | None = None
        self.recovery = trio.CancelScope()
        self.aftermath = trio.CancelScope()
        self.settled = trio.Event()
        self._asking: trio.CancelScope | None = None

    @property
    def is_put_down(self) -> bool:
        """It was reported as crashed, and is about to end for that."""
        return self.report is not None and not self.is_leaving and not self.ended.is_set()

    async def ask(self, request: Callable[[], Awaitable[None]]) -> None:
        """Asks something of the core, or of what needs it; not for longer than it lives.

        Raises:
            PlatformError: it ended meanwhile.
        """
        with trio.CancelScope() as self._asking:
            if self.ended.is_set():
                self._asking.cancel()
            await request()
        if self._asking.cancelled_caught:
            raise PlatformError(f"the core ended meanwhile: {self.failure}") from self.failure

    def end(self) -> None:
        """It is over: whoever still asks something of it is told."""
        self.ended.set()
        if self._asking is not None:
            self._asking.cancel()
