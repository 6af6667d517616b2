"""What tells that sysfs has changed: the kernel's events, or the time."""

from __future__ import annotations

import errno
import socket

import pytest
import trio
import trio.testing

from openamp_py.linux.access import MachineAccess
from openamp_py.linux.fake import open_fake_tree
from openamp_py.linux.news import News, open_news


async def test_a_fake_machine_is_looked_at_by_time(autojump_clock: trio.abc.Clock) -> None:
    async with open_fake_tree() as tree, open_news(tree) as news:
        assert not news.tells
        began = trio.current_time()
        await news.wait(3.0)
        assert trio.current_time() == began + 3.0


async def test_this_machine_is_heard_where_it_lets_us() -> None:
    async with open_news(MachineAccess()) as news:
        with trio.move_on_after(0.01) as scope:
            await news.wait(0.001)
        assert not scope.cancelled_caught


async def test_only_events_that_concern_us_wake() -> None:
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    with ours, kernel:
        news = News(ours)
        woken = trio.Event()

        async def wait() -> None:
            await news.wait(60)
            woken.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            kernel.send(b"add@/devices/usb1\0SUBSYSTEM=usb")
            await trio.testing.wait_all_tasks_blocked()
            assert not woken.is_set()
            kernel.send(b"add@/devices/x/virtio0/virtio0.rpmsg-raw.-1.1024\0")
            await woken.wait()


class _Overflown(socket.socket):
    def recv(self, size: int, flags: int = 0) -> bytes:
        raise OSError(errno.ENOBUFS, "lost")


def test_lost_events_count_as_one_that_concerns_us() -> None:
    with _Overflown(socket.AF_UNIX, socket.SOCK_DGRAM) as overflown:
        assert News._take(overflown)


def test_no_events_concern_nobody() -> None:
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    with ours, kernel:
        assert not News._take(ours)
        with pytest.raises(BlockingIOError):
            ours.recv(1)
