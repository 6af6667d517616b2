"""One script for the kernel's remoteproc and for ours: what each call gives, and the state after.

Where they differ the difference is listed here, with its reason.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from openamp_py import (
    CoreCrashedError,
    Link,
    LoopbackPlatform,
    OpenAMPError,
    ProcessorState,
    RemoteProcessor,
    open_processor,
    serve_echo,
)
from openamp_py.background import open_background
from openamp_py.platforms.demo import python_firmware
from tests.kernel.conftest import Boot
from tests.kernel.core import RemoteCore
from tests.kernel.guest import Guest
from tests.kernel.images import make_image
from tests.kernel.scripts import RPROC, wait_state

pytestmark = pytest.mark.linux_kernel

SCRIPT = (
    *("stop", "start", "start", "stop", "stop", "stop"),  # counted
    *("start", "crash", "recover", "stop"),
    *("start", "crash", "stop", "start", "stop"),
    *("start", "crash", "start", "recover", "stop", "stop"),
    *("recover", "detach"),
)

Transcript = list[str]
"""For each step whether it was taken or refused, and the state after it."""

REASONS = {
    "idempotent": "to stop what does not run is an error in Linux; shutdown here is idempotent",
    "crashed": "Linux counts a start of a crashed core, which does nothing; boot here refuses",
    "counted": "the start that Linux counted wants a stop of its own",
    "recover": "Linux takes the word and does nothing; recover here refuses",
}
DIFFERENCES = {
    0: ("refused offline", "taken offline", "idempotent"),
    5: ("refused offline", "taken offline", "idempotent"),
    17: ("taken crashed", "refused crashed", "crashed"),
    19: ("taken running", "taken offline", "counted"),
    21: ("taken offline", "refused offline", "recover"),
}
"""By the step: what Linux does, what we do, and the reason."""


async def drive_linux(guest: Guest, core: RemoteCore) -> Transcript:
    """Through sysfs; the core crashes by itself."""
    transcript = []
    await guest.run(f"cd {RPROC}; echo disabled >recovery")
    for call in SCRIPT:
        file = "recovery" if call == "recover" else "state"
        do = f"echo {call} >{file} && echo taken || echo refused"
        if call == "crash":
            core.crash(2)
            do = wait_state("crashed") + "echo taken"
        answer = await guest.run(f"cd {RPROC}\n({do}) 2>/tmp/error; cat state")
        transcript.append(" ".join(answer.split()))
    return transcript


class Program:
    """What runs on our core: it echoes, and crashes when the script says so."""

    def __init__(self) -> None:
        self.crash = trio.Event()

    async def run(self, link: Link) -> None:
        """One life of it."""
        self.crash = trio.Event()
        async with open_background() as nursery:
            nursery.start_soon(serve_echo, link)
            await self.crash.wait()
            raise CoreCrashedError("as the script says")


async def drive_ours(processor: RemoteProcessor, program: Program) -> Transcript:
    """The same by the calls that openamp_py.porting names."""
    transcript = []
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "start": processor.boot,
        "stop": processor.shutdown,
        "recover": processor.recover,
        "detach": processor.detach,
    }
    for call in SCRIPT:
        answer = "taken"
        if call == "crash":
            program.crash.set()
            await processor.wait_state(ProcessorState.CRASHED)
        else:
            try:
                await calls[call]()
            except OpenAMPError:
                answer = "refused"
        transcript.append(f"{answer} {processor.state.value}")
    return transcript


async def test_both_tell_the_same_but_for_what_is_listed(boot: Boot) -> None:
    async with boot(make_image()) as (guest, core):
        linux = await drive_linux(guest, core)
    program = Program()
    async with open_processor(LoopbackPlatform(program.run)) as processor:
        processor.set_firmware(python_firmware())
        ours = await drive_ours(processor, program)
    different = {
        number: (theirs, own)
        for number, (theirs, own) in enumerate(zip(linux, ours, strict=True))
        if theirs != own
    }
    assert different == {number: listed[:2] for number, listed in DIFFERENCES.items()}
    assert {listed[2] for listed in DIFFERENCES.values()} == REASONS.keys()
