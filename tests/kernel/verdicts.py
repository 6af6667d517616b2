"""What the kernel does with firmware images, one after the other, in as few boots as can be."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

from tests.kernel.conftest import Boot
from tests.kernel.guest import GuestError


class Verdict(NamedTuple):
    """What came of starting an image."""

    start: str
    """ok, or the name of the error; "lost" where the kernel falls over it, or over the stop."""
    state: str
    """After the start."""
    devices: int
    """Virtio devices that it brought."""


# Writes a line for each image: its number, then the verdict; then whether the stop came back.
_JUDGE = """
import errno, os

RPROC = "/sys/class/remoteproc/remoteproc0/"

def write(name, text):
    node = os.open(RPROC + name, os.O_WRONLY)
    try:
        os.write(node, text.encode())
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    finally:
        os.close(node)
    return "ok"

def say(line):
    os.write(out, line.encode())
    os.fsync(out)  # past what a panic loses

out = os.open({out!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for number in range({first}, {end}):
    assert write("firmware", f"{{number}}.elf") == "ok"
    before = len(os.listdir("/sys/bus/virtio/devices"))
    start = write("state", "start")
    state = open(RPROC + "state").read().strip()
    devices = len(os.listdir("/sys/bus/virtio/devices")) - before
    say(f"{{number}} {{start}} {{state}} {{devices}}\\n")
    if start == "ok":
        assert write("state", "stop") == "ok"
    say("next\\n")
"""


async def judge(boot: Boot, images: Sequence[bytes]) -> tuple[list[Verdict], int]:
    """The kernel's verdict on each image, and how often it had to be booted.

    Raises:
        GuestError: a guest failed by itself.
    """
    verdicts: list[Verdict] = []
    boots = 0
    suspect = -1
    while len(verdicts) < len(images):
        boots += 1
        first = len(verdicts)
        async with boot(b"", module="tcm_kb=64") as (guest, _):
            for number in range(first, len(images)):
                (guest.directory / f"{number}.elf").write_bytes(images[number])
            judged = guest.directory / "verdicts"
            program = _JUDGE.format(first=first, end=len(images), out=str(judged))
            failure: GuestError | None = None
            try:
                await guest.python(program, limit=120, silence=2)
            except GuestError as error:
                failure = error
            lines = judged.read_text().splitlines() if judged.exists() else []
            with contextlib.suppress(FileNotFoundError):
                judged.unlink()
        for line in lines:
            if line != "next":
                _, start, state, devices = line.split()
                verdicts.append(Verdict(start, state, int(devices)))
        if failure is not None:
            if lines and lines[-1] != "next":
                verdicts.pop()  # it was the stop
            # A guest may also be silent because this machine has other things to do: who does it
            # twice is to blame.
            if suspect == len(verdicts):
                if f"Booting fw image {len(verdicts)}.elf" not in str(failure):
                    raise failure
                verdicts.append(Verdict("lost", "", 0))
            suspect = len(verdicts)
    return verdicts, boots
