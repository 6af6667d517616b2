"""The guest itself: that it boots, and that one that fails says so and leaves nothing behind."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import trio

from openamp_py.constants import RPMSG_F_NS, VIRTIO_ID_RPMSG
from openamp_py.remoteproc.resource_table import Vdev
from tests.kernel import build as building
from tests.kernel.build import Kernel, Unavailable
from tests.kernel.conftest import Boot
from tests.kernel.guest import GuestError, open_guest
from tests.kernel.images import make_image, make_table
from tests.kernel.scripts import START, STOP

pytestmark = pytest.mark.linux_kernel


def processes_of(place: Path) -> list[str]:
    """What still runs of a guest."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ends as we look
            if f"OPENAMP_WORK={place}" in (process / "cmdline").read_text():
                found.append(process.name)
    return found


async def test_scripts_run_and_say_what_came_of_them(kernel: Kernel, place: Path) -> None:
    async with open_guest(kernel, place) as guest:
        assert (await guest.run("uname -s; uname -r")).startswith("Linux\n6.")
        assert await guest.run_any("echo no; exit 3") == (3, "no\n")
        with pytest.raises(GuestError, match="gave 3: no"):
            await guest.run("echo no; exit 3")


async def test_the_hosts_python_runs_in_the_guest(kernel: Kernel, place: Path) -> None:
    async with open_guest(kernel, place) as guest:
        program = "import os, sys; print(os.uname().version, sys.version)"
        version, _, python = (await guest.python(program)).partition(" 3.")
        assert python and await guest.run("uname -v") == version + "\n"


async def test_a_guest_that_hangs_is_killed_with_all_that_belongs_to_it(
    kernel: Kernel, place: Path
) -> None:
    with pytest.raises(GuestError, match="script 1 did not end in time"):
        async with open_guest(kernel, place) as guest:
            assert processes_of(place)
            await guest.run("while :; do :; done", limit=0.1)
    while processes_of(place):  # they are killed, and die in their own time
        await trio.lowlevel.checkpoint()


async def test_a_guest_that_has_ended_runs_nothing(kernel: Kernel, place: Path) -> None:
    async with open_guest(kernel, place) as guest:
        with pytest.raises(GuestError, match="the guest ended in script 1"):
            await guest.run("poweroff -f; sleep 10")
        await guest.process.wait()
        with pytest.raises(GuestError, match="the guest ended before script 2"):
            await guest.run("true")


async def test_a_guest_that_panics_says_why(boot: Boot) -> None:
    """On a table that we refuse: the kernel stops vrings that are not there."""
    table = make_table(Vdev(VIRTIO_ID_RPMSG, 0, RPMSG_F_NS))
    with pytest.raises(GuestError, match="Kernel panic"):
        async with boot(make_image(table)) as (guest, _):
            await guest.run(START + STOP)


def test_what_the_build_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAMP_LINUX_SOURCE", "/nowhere/linux.tar.xz")
    with pytest.raises(Unavailable, match=r"no /nowhere/linux\.tar\.xz .*linux-source-6\.1"):
        building.build()
    monkeypatch.setenv("OPENAMP_LINUX_SOURCE", __file__)
    monkeypatch.setattr(building, "TOOLS", {"no-such-tool": "its-package"})
    with pytest.raises(Unavailable, match="packages its-package"):
        building.build()
