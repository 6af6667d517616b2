"""Spinning instead of sleeping: what ends it, and how it leaves the rings."""

from __future__ import annotations

import mmap
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from openamp_py.errors import VirtqueueError
from openamp_py.memory import MemoryMap, Region
from openamp_py.virtio import MessageRing, Role, Virtqueue
from openamp_py.virtio.message_ring import KICK, MIXED, POLL_HIT, POLLED, poll_rings
from openamp_py.vring import VringLayout

NUM, BUFFER = 2, 64
LAYOUT = VringLayout(NUM, 64)
POOL_AT = 1 << 12
HALF = 1 << 13

NOTHING = [MIXED, 0, [], []]

SHORT, LONG = 0.002, 60.0
"""Seconds: for what does not come, and for what does (never waited for to its end)."""


@dataclass(frozen=True)
class Ends:
    """Both directions of a link: our end polls, the peer's end is worked by the test."""

    memory: memoryview
    sending: MessageRing
    receiving: MessageRing
    peer_sending: MessageRing
    peer_receiving: MessageRing

    def rings(self) -> tuple[MessageRing, ...]:
        return (self.sending, self.receiving, self.peer_sending, self.peer_receiving)

    def fill(self) -> None:
        while self.sending.send(1, 2, b"") >= 0:
            pass

    def break_ring(self, ring: MessageRing, half: int) -> None:
        """As the other side: publishes an index that cannot be, which the ring then notices."""
        driver = ring.queue.role is Role.DRIVER
        at = half * HALF + (LAYOUT.used_offset if driver else LAYOUT.available_offset)
        struct.pack_into("<H", self.memory, at + 2, 0x7FFF)
        with pytest.raises(VirtqueueError, match="index jumped"):
            while True:
                if ring is self.sending:
                    ring.send(1, 2, b"")
                else:
                    ring.receive()


@pytest.fixture(params=[(r, e) for r in Role for e in (False, True)], ids=str)
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """Our role and the kind of wishes."""
    role, event_idx = request.param
    view = memoryview(mmap.mmap(-1, 2 * HALF))
    memory = MemoryMap([Region("ram", 0, 0, view)])
    made: dict[tuple[Role, bool], MessageRing] = {}
    for half in range(2):  # 0: we send
        start = half * HALF
        for end in Role:
            ring = view[start : start + LAYOUT.size]
            queue = Virtqueue(LAYOUT, ring, memory, end, event_idx=event_idx)
            pool = view[start + POOL_AT : start + POOL_AT + NUM * BUFFER]
            sender = (end is role) == (half == 0)
            made[end, sender] = MessageRing(
                queue,
                sender=sender,
                buffer_size=BUFFER,
                pool=(start + POOL_AT, pool) if end is Role.DRIVER else None,
            )
    peer = Role.DEVICE if role is Role.DRIVER else Role.DRIVER
    ends = Ends(view, made[role, True], made[role, False], made[peer, True], made[peer, False])
    yield ends
    for one in ends.rings():
        one.close()


def poll(ends: Ends, seconds: float, *, sending: bool = False) -> bool:
    """Checks what holds after every poll."""
    found = poll_rings(ends.receiving, ends.sending if sending else None, seconds)
    assert ends.receiving.queue.is_quiet
    return found


# Normal


def test_a_message_that_is_there(ends: Ends) -> None:
    ends.peer_sending.send(1, 2, b"x")
    assert poll(ends, LONG)
    assert poll(ends, LONG), "it only looks"
    [arrival], _, _ = ends.receiving.receive()
    assert arrival.messages == [(b"x", 1)]
    assert not poll(ends, SHORT)


def test_nothing_comes(ends: Ends) -> None:
    begin = time.monotonic()
    assert not poll(ends, SHORT)
    assert time.monotonic() - begin >= SHORT


def test_a_free_buffer_is_something_for_who_waits_for_one(ends: Ends) -> None:
    assert poll(ends, LONG, sending=True)
    ends.fill()
    assert not poll(ends, SHORT, sending=True)
    ends.peer_receiving.receive()
    assert poll(ends, LONG, sending=True)
    assert not poll(ends, SHORT), "not for one who does not"


def test_a_cancelled_buffer_is_a_free_one(ends: Ends) -> None:
    heads = [ends.sending.reserve()[0] for _ in range(NUM)]
    assert not poll(ends, SHORT, sending=True)
    ends.sending.cancel(heads[0])
    assert poll(ends, LONG, sending=True)


def test_a_message_where_no_buffer_is_free(ends: Ends) -> None:
    ends.fill()
    ends.peer_sending.send(1, 2, b"x")
    assert poll(ends, LONG, sending=True)


def test_neither_side_is_kicked_after_it(ends: Ends) -> None:
    ends.fill()
    assert not ends.sending.want_buffer()
    for _ in range(3):
        assert not poll(ends, SHORT, sending=True)
        assert ends.sending.queue.is_quiet
        assert ends.peer_sending.send(1, 2, b"x") == 0
        assert ends.peer_receiving.receive()[1] is False
        assert poll(ends, LONG, sending=True)
        # An ordinary receive that finds the end asks to be kicked again.
        assert len(ends.receiving.receive()[0]) == 1
        assert ends.receiving.receive() == ([], False, False)
        ends.fill()


def test_after_an_ordinary_receive_it_is_quiet_too(ends: Ends) -> None:
    """That asked for a kick, which polling takes back."""
    for _ in range(3):
        assert ends.peer_sending.send(1, 2, b"x") == 1
        assert len(ends.receiving.receive()[0]) == 1
        assert not poll(ends, SHORT)
        assert ends.peer_sending.send(1, 2, b"x") == 0
        assert len(ends.receiving.receive()[0]) == 1


def test_who_polled_in_vain_asks_before_it_sleeps(ends: Ends) -> None:
    assert not poll(ends, SHORT)
    assert not ends.receiving.queue.notify_on()
    assert ends.peer_sending.send(1, 2, b"x") == 1


def when_it_spins(ring: MessageRing, thing: threading.Thread) -> None:
    thing.start()
    assert not ring.queue.is_quiet, "so the thread waits for the poll to begin"


def test_another_thread_sends_meanwhile(ends: Ends) -> None:
    def send() -> None:
        while not ends.receiving.queue.is_quiet:
            time.sleep(0)
        ends.peer_sending.send(1, 2, b"from the thread")

    thread = threading.Thread(target=send)
    when_it_spins(ends.receiving, thread)
    try:
        assert poll(ends, LONG)
    finally:
        thread.join()
    assert ends.receiving.receive()[0][0].messages == [(b"from the thread", 1)]


def test_another_thread_returns_a_buffer_meanwhile(ends: Ends) -> None:
    def receive() -> None:
        while not ends.sending.queue.is_quiet:
            time.sleep(0)
        ends.peer_receiving.receive()

    ends.fill()
    assert not ends.sending.want_buffer()
    thread = threading.Thread(target=receive)
    when_it_spins(ends.sending, thread)
    try:
        assert poll(ends, LONG, sending=True)
    finally:
        thread.join()
    assert ends.sending.send(1, 2, b"") >= 0


# Polling and receiving in one call


def test_take_spins_only_where_nothing_is_there(ends: Ends) -> None:
    ends.peer_sending.send(1, 2, b"x")
    bits, *found = ends.receiving.take(int(LONG * 1e9), None)
    assert not bits & (POLLED | POLL_HIT)
    assert found == [2, 1, [(b"x", 1)], []]
    begin = time.monotonic()
    bits, *found = ends.receiving.take(int(SHORT * 1e9), None)
    assert time.monotonic() - begin >= SHORT
    assert (bits & (POLLED | POLL_HIT | KICK), found) == (POLLED, NOTHING)
    bits, *found = ends.receiving.take(0, None)
    assert (bits & (POLLED | POLL_HIT | KICK), found) == (0, NOTHING)


def test_take_does_not_spin_where_a_buffer_is_free(ends: Ends) -> None:
    bits, *found = ends.receiving.take(int(LONG * 1e9), ends.sending)
    assert (bits & (POLLED | POLL_HIT), found) == (0, NOTHING)
    ends.fill()
    bits, *found = ends.receiving.take(int(SHORT * 1e9), ends.sending)
    assert (bits & (POLLED | POLL_HIT), found) == (POLLED, NOTHING)


def test_take_says_that_something_came_while_it_spun(ends: Ends) -> None:
    def send() -> None:
        while not ends.receiving.queue.is_quiet:
            time.sleep(0)
        ends.peer_sending.send(1, 2, b"hit")

    thread = threading.Thread(target=send)
    when_it_spins(ends.receiving, thread)
    try:
        bits, *found = ends.receiving.take(int(LONG * 1e9), None)
    finally:
        thread.join()
    assert bits & POLLED and bits & POLL_HIT
    assert found == [2, 3, [(b"hit", 1)], []]


# Refusals


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan"), 1e300])
def test_times_that_are_not_possible(ends: Ends, seconds: float) -> None:
    with pytest.raises((OverflowError, ValueError)):
        poll_rings(ends.receiving, None, seconds)


# Hostile input


def test_a_broken_ring_is_something(ends: Ends) -> None:
    ends.break_ring(ends.receiving, 1)
    assert poll(ends, LONG)
    with pytest.raises(VirtqueueError, match="index jumped"):
        ends.receiving.receive()


def test_a_broken_sending_ring_is_something(ends: Ends) -> None:
    ends.break_ring(ends.sending, 0)
    assert poll(ends, LONG, sending=True)
    assert not poll(ends, SHORT)


def test_an_index_that_jumps_while_nobody_has_looked(ends: Ends) -> None:
    driver = ends.receiving.queue.role is Role.DRIVER
    at = HALF + (LAYOUT.used_offset if driver else LAYOUT.available_offset)
    struct.pack_into("<H", ends.memory, at + 2, 0x7FFF)
    assert poll(ends, LONG)
    with pytest.raises(VirtqueueError, match="index jumped"):
        ends.receiving.receive()


# Closing


def test_closed_rings_are_not_touched(ends: Ends) -> None:
    ends.sending.close()
    with pytest.raises(ValueError, match="is closed"):
        poll_rings(ends.receiving, ends.sending, LONG)
    ends.receiving.close()
    with pytest.raises(ValueError, match="is closed"):
        poll_rings(ends.receiving, None, LONG)
