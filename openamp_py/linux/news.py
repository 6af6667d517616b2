"""When to look at sysfs again: uevents of the kernel, or the time."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from openamp_py.linux.access import Access

_NETLINK_KOBJECT_UEVENT: Final = 15
_FROM_KERNEL: Final = 1
"""The kernel's own group; udev repeats the events in another one."""

_EVENT_SIZE: Final = 1 << 14
_WORDS: Final = (b"rpmsg", b"virtio", b"remoteproc")


class News:
    """Wakes who waits for something to come or go in sysfs. Made by `open_news`.

    Attributes:
        tells: whether the kernel tells; else only looking does.
    """

    def __init__(self, events: socket.socket | None) -> None:
        self._events = events
        self.tells = events is not None

    async def wait(self, longest: float) -> None:
        """Waits for an event that may concern rpmsg, but not longer than some seconds."""
        if self._events is None:
            await trio.sleep(longest)
            return
        with trio.move_on_after(longest):
            while True:
                await trio.lowlevel.wait_readable(self._events)
                if self._take(self._events):
                    return

    @staticmethod
    def _take(events: socket.socket) -> bool:
        """Takes all events that are there. Returns whether one concerns us."""
        concerns = False
        while True:
            try:
                event = events.recv(_EVENT_SIZE)
            except BlockingIOError:
                return concerns
            except OSError:  # ENOBUFS: some were lost, which may have been ours
                return True
            concerns = concerns or any(word in event for word in _WORDS)


@asynccontextmanager
async def open_news(access: Access) -> AsyncIterator[News]:
    """What tells of changes in a machine's sysfs, for an `async with` block.

    Uevents where it is the machine that this runs on, and it lets us hear them.
    """
    with contextlib.ExitStack() as stack:
        events = None
        with contextlib.suppress(OSError, AttributeError):
            here, there = os.stat("/sys/class"), access.stat("/sys/class")
            if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
                kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
                made = stack.enter_context(
                    socket.socket(socket.AF_NETLINK, kind, _NETLINK_KOBJECT_UEVENT)
                )
                made.bind((0, _FROM_KERNEL))
                events = made
        await trio.lowlevel.checkpoint()
        yield News(events)
