"""Virtqueues: both ends against each other, every limit and fault, a peer that writes anything."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py.errors import VirtqueueError
from openamp_py.memory import MemoryMap, Region, SharedMemory
from openamp_py.virtio import RingParts, Role, Span, Virtqueue
from openamp_py.vring import VringLayout

T = TypeVar("T")

NEXT, WRITE, INDIRECT = 1, 2, 4

GUARD = 4096
GUARD_BYTES = b"\xa5" * GUARD
POOL_PA = 0x8000_0000
POOL_SIZE = 4096

BOTH_WISHES = pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
BOTH_ROLES = pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
HOSTILE = settings(derandomize=True, deadline=None, max_examples=200, database=None)


class Wire:
    """One virtqueue's memory between guards, both ends, and a hand that writes into it.

    Only the pool is memory that descriptors may point into.
    """

    def __init__(self, num: int, *, event_idx: bool, indirect: bool) -> None:
        self.layout = VringLayout(num, 64)
        ring_bytes = -(-self.layout.size // GUARD) * GUARD
        self.shared = SharedMemory.create("openamp-test", 3 * GUARD + ring_bytes + POOL_SIZE)
        self.memory = self.shared.region("all", 0).view
        pool = 2 * GUARD + ring_bytes
        # The ring ends where the guard after it begins, so one byte too many is seen.
        ring = pool - GUARD - self.layout.size // 64 * 64 - 64
        self.ring_at, self.pool_at = ring, pool
        self.ring = self.memory[ring : ring + self.layout.size]
        self.pool = self.memory[pool : pool + POOL_SIZE]
        self.guards = [(0, ring), (ring + self.layout.size, pool), (pool + POOL_SIZE, None)]
        for start, end in self.guards:
            self.memory[start:end] = b"\xa5" * len(self.memory[start:end])
        self.event_idx, self.indirect = event_idx, indirect
        self.queues: list[Virtqueue] = []
        self.driver = self.end(Role.DRIVER)
        self.device = self.end(Role.DEVICE)

    def end(self, role: Role, *, fresh: bool = False) -> Virtqueue:
        """One more end, not started."""
        regions = MemoryMap([Region("pool", POOL_PA, POOL_PA, self.pool)])
        queue = Virtqueue(
            self.layout,
            self.ring,
            regions,
            role,
            event_idx=self.event_idx,
            indirect=self.indirect,
            fresh=fresh,
            name="queue",
        )
        self.queues.append(queue)
        return queue

    def close(self) -> None:
        for start, end in self.guards:
            assert set(self.memory[start:end]) == {0xA5}
        for queue in self.queues:
            queue.close()
        self.shared.close()

    # The other side's hand.

    def descriptor(self, index: int, addr: int, length: int, flags: int, next_: int = 0) -> None:
        struct.pack_into("<QIHH", self.ring, 16 * index, addr, length, flags, next_)

    def u16(self, offset: int) -> int:
        return int(struct.unpack_from("<H", self.ring, offset)[0])

    def set_u16(self, offset: int, value: int) -> None:
        struct.pack_into("<H", self.ring, offset, value & 0xFFFF)

    @property
    def available(self) -> int:
        return self.layout.available_offset

    @property
    def used(self) -> int:
        return self.layout.used_offset

    @property
    def used_event(self) -> int:
        return self.available + 4 + 2 * self.layout.num

    @property
    def avail_event(self) -> int:
        return self.used + 4 + 8 * self.layout.num

    def offer(self, *heads: int) -> None:
        """As a driver: makes these heads available."""
        index = self.u16(self.available + 2)
        for head in heads:
            self.set_u16(self.available + 4 + 2 * (index % self.layout.num), head)
            index += 1
        self.set_u16(self.available + 2, index)

    def use(self, *entries: tuple[int, int]) -> None:
        """As a device: puts these (head, length) into the used ring."""
        index = self.u16(self.used + 2)
        for head, length in entries:
            slot = self.used + 4 + 8 * (index % self.layout.num)
            struct.pack_into("<II", self.ring, slot, head, length)
            index += 1
        self.set_u16(self.used + 2, index)


@contextlib.contextmanager
def wire(
    num: int = 8, *, event_idx: bool = False, indirect: bool = False, start: bool = True
) -> Iterator[Wire]:
    w = Wire(num, event_idx=event_idx, indirect=indirect)
    try:
        if start:
            w.driver.start()
            w.device.start()
        yield w
    finally:
        w.close()


def shape(spans: tuple[Span, ...]) -> list[tuple[int, int, bool]]:
    return [(span.pa, span.view.nbytes, span.writable) for span in spans]


def taken(queue: Virtqueue) -> int:
    """Takes one chain, which must be there."""
    chain = queue.get_available()
    assert chain is not None
    return chain.head


# Both ends.


@BOTH_WISHES
def test_a_chain_there_and_back(event_idx: bool) -> None:
    with wire(event_idx=event_idx) as w:
        head = w.driver.add([(POOL_PA, 10), (POOL_PA + 64, 20)], [(POOL_PA + 128, 30)])
        assert head == 0
        assert w.device.get_available() is None, "not published yet"
        assert w.driver.publish()
        assert w.device.pending
        chain = w.device.get_available()
        assert chain is not None and chain.head == head
        assert shape(chain.spans) == [
            (POOL_PA, 10, False),
            (POOL_PA + 64, 20, False),
            (POOL_PA + 128, 30, True),
        ]
        assert not w.device.pending and w.device.get_available() is None
        chain.spans[2].view[:5] = b"hello"
        w.device.put_used(head, 5)
        assert w.driver.get_used() is None, "not published yet"
        assert w.device.publish()
        assert w.driver.get_used() == (head, 5)
        assert bytes(w.pool[128:133]) == b"hello"
        assert w.driver.get_used() is None


def test_what_the_driver_writes() -> None:
    with wire() as w:
        w.driver.add([(POOL_PA, 10)], [(POOL_PA + 64, 20)])
        w.driver.publish()
        assert struct.unpack_from("<QIHH", w.ring, 0) == (POOL_PA, 10, NEXT, 1)
        assert struct.unpack_from("<QIH", w.ring, 16) == (POOL_PA + 64, 20, WRITE)
        assert [w.u16(w.available + i) for i in (0, 2, 4)] == [0, 1, 0]
        w.device.put_used(taken(w.device), 7)
        w.device.publish()
        assert [w.u16(w.used + i) for i in (0, 2)] == [0, 1]
        assert struct.unpack_from("<II", w.ring, w.used + 4) == (0, 7)


@BOTH_WISHES
@pytest.mark.parametrize("num", [1, 2, 8, 256])
def test_out_of_order_for_longer_than_the_indexes_run(event_idx: bool, num: int) -> None:
    """Batches of random sizes, returned in random order, past index 65535 from just before."""
    rng = random.Random(num)
    with wire(num, event_idx=event_idx, start=False) as w:
        for offset in (w.available + 2, w.used + 2):
            w.set_u16(offset, 0xFFF0)
        w.driver.attach()
        w.device.attach()
        out: dict[int, list[tuple[int, int, bool]]] = {}
        held: list[int] = []
        moved = 0
        while moved < 600:
            for _ in range(rng.randint(0, num)):
                spans = [(POOL_PA + 8 * rng.randint(0, 99), rng.randint(0, 64)) for _ in range(3)]
                count, split = rng.randint(1, min(3, num)), rng.randint(0, 3)
                spans = spans[:count]
                head = w.driver.add(spans[:split], spans[split:])
                if head is None:
                    break
                assert head not in out
                out[head] = [(pa, n, i >= split) for i, (pa, n) in enumerate(spans)]
            w.driver.publish()
            while chain := w.device.get_available():
                assert shape(chain.spans) == out[chain.head]
                held.append(chain.head)
            rng.shuffle(held)
            back = [held.pop() for _ in range(rng.randint(0, len(held)))]
            for head in back:
                w.device.put_used(head, head + 1)
            w.device.publish()
            assert [w.driver.get_used() for _ in back] == [(head, head + 1) for head in back]
            moved += len(back)
            for head in back:
                del out[head]
        assert w.driver.used_index < 0xFFF0, "the indexes wrapped"


def test_all_descriptors_serve_and_come_back() -> None:
    with wire(8) as w:
        for _ in range(3):
            heads = [w.driver.add(writable=[(POOL_PA, 1)] * n) for n in (3, 1, 4)]
            assert None not in heads
            assert w.driver.add([(POOL_PA, 1)]) is None, "no descriptor is left"
            w.driver.publish()
            for _head in heads:
                w.device.put_used(taken(w.device), 0)
            w.device.publish()
            assert [w.driver.get_used() for _ in heads] == [(head, 0) for head in heads]


def test_a_chain_that_needs_more_than_is_free_takes_nothing() -> None:
    with wire(4) as w:
        w.driver.add([(POOL_PA, 1)] * 2)
        before = bytes(w.ring)
        assert w.driver.add([(POOL_PA, 1)] * 3) is None
        assert bytes(w.ring) == before
        assert w.driver.add([(POOL_PA, 1)] * 2) is not None


def test_an_indirect_table() -> None:
    with wire(4, indirect=True) as w:
        table = [(POOL_PA, 16, NEXT, 2), (0, 0, 0, 0), (POOL_PA + 99, 3, WRITE, 0)]
        for i, entry in enumerate(table):
            struct.pack_into("<QIHH", w.pool, 1024 + 16 * i, *entry)
        # The device ignores WRITE on the descriptor that names the table (2.7.5.3.2).
        w.descriptor(1, POOL_PA + 1024, 48, INDIRECT | WRITE)
        w.offer(1)
        chain = w.device.get_available()
        assert chain is not None and chain.head == 1
        assert shape(chain.spans) == [(POOL_PA, 16, False), (POOL_PA + 99, 3, True)]
        w.device.put_used(1, 3)


def test_an_indirect_table_at_the_end_of_a_chain() -> None:
    with wire(4, indirect=True) as w:
        struct.pack_into("<QIHH", w.pool, 1024, POOL_PA + 5, 6, WRITE, 0)
        w.descriptor(0, POOL_PA, 2, NEXT, 3)
        w.descriptor(3, POOL_PA + 1024, 16, INDIRECT)
        w.offer(0)
        chain = w.device.get_available()
        assert chain is not None
        assert shape(chain.spans) == [(POOL_PA, 2, False), (POOL_PA + 5, 6, True)]


def test_a_buffer_may_fill_its_region() -> None:
    with wire() as w:
        w.descriptor(0, POOL_PA, POOL_SIZE, WRITE)
        w.descriptor(1, POOL_PA + POOL_SIZE, 0, 0)
        w.offer(0, 1)
        for length in (POOL_SIZE, 0):
            chain = w.device.get_available()
            assert chain is not None and chain.spans[0].view.nbytes == length


def test_a_span_outlives_its_queue() -> None:
    with wire() as w:
        w.driver.add([(POOL_PA, 4)])
        w.driver.publish()
        w.pool[:4] = b"here"
        chain = w.device.get_available()
        w.device.close()
        assert chain is not None and bytes(chain.spans[0].view) == b"here"


# Attaching.


def test_a_device_takes_anew_what_its_last_life_did_not_put_back() -> None:
    with wire() as w:
        heads = [w.driver.add([(POOL_PA, i)]) for i in range(4)]
        w.driver.publish()
        first, second = taken(w.device), taken(w.device)
        w.device.put_used(second, 0)
        w.device.publish()
        assert (first, second) == tuple(heads[:2])
        again = w.end(Role.DEVICE)
        again.attach()
        # The used index says how many are done, not which: the second comes once more.
        assert [taken(again) for _ in range(3)] == heads[1:]
        assert again.get_available() is None


def test_a_driver_that_attaches_knows_its_chains() -> None:
    with wire() as w:
        w.driver.add([(POOL_PA, 1)], [(POOL_PA, 2)])  # 0 and 1
        w.driver.add([(POOL_PA, 1)] * 3)  # 2, 3, 4
        w.driver.publish()
        w.device.put_used(taken(w.device), 2)
        w.device.publish()
        again = w.end(Role.DRIVER)
        again.attach(seen=0)
        assert again.get_used() == (0, 2)
        assert again.get_used() is None
        # Five are free (0, 1 and 5 to 7), three are still with the device.
        assert again.add([(POOL_PA, 1)] * 6) is None
        assert again.add([(POOL_PA, 1)] * 5) is not None
        again.publish()
        w.device.put_used(taken(w.device), 0)
        w.device.publish()
        assert again.get_used() == (2, 0)


@pytest.mark.parametrize(
    ("used", "available", "fresh", "first"),
    [
        # A driver that filled the used ring before it began: 8 entries, so `used` is 8 ahead.
        (8, 0, False, 0),
        (8, 7, False, 0),
        (8, 8, True, 0),
        (8, 8, False, 8),
        (9, 8, True, 1),
        (9, 9, True, 9),
        (3, 0xFFFF, False, 0xFFFB),
        (48, 47, True, 40),
        # One that did not.
        (0, 0, True, 0),
        (0, 8, True, 0),
        (8, 9, True, 8),
        (8, 16, True, 8),
        (0xFFFF, 3, False, 0xFFFF),
        # Neither: what is impossible is found out by what follows.
        (8, 17, True, 8),
        (9, 0, True, 9),
    ],
)
def test_a_device_begins_where_its_driver_did(
    used: int, available: int, fresh: bool, first: int
) -> None:
    with wire(start=False) as w:
        w.set_u16(w.used + 2, used)
        w.set_u16(w.available + 2, available)
        device = w.end(Role.DEVICE, fresh=fresh)
        device.attach()
        assert device.handle.seen == first
        assert device.handle.next == device.handle.published == used


def test_a_ring_that_was_filled_beforehand_works_as_any() -> None:
    with wire(start=False) as w:
        for slot in range(8):
            w.set_u16(w.used + 4 + 8 * slot, slot)
        w.set_u16(w.used + 2, 8)
        device = w.end(Role.DEVICE, fresh=True)
        device.attach()
        assert device.get_available() is None
        for number in range(20):
            w.descriptor(number % 8, POOL_PA, 4, 0)
            w.set_u16(w.available + 4 + 2 * (number % 8), number % 8)
            w.set_u16(w.available + 2, number + 1)
            assert taken(device) == number % 8
            device.put_used(number % 8, 4)
            device.publish()
            assert w.u16(w.used + 2) == 8 + number + 1
            assert struct.unpack_from("<II", w.ring, w.used + 4 + 8 * (number % 8)) == (
                number % 8,
                4,
            )
        w.set_u16(w.available + 2, 29)
        with pytest.raises(VirtqueueError, match="its index jumped by 9"):
            device.get_available()


@BOTH_WISHES
@BOTH_ROLES
def test_notifications_are_on_after_attaching(role: Role, event_idx: bool) -> None:
    """Also where an earlier life of this side turned them off."""
    with wire(event_idx=event_idx, start=False) as w:
        for index in (w.available + 2, w.used + 2):
            w.set_u16(index, 100)
        w.driver.attach()
        w.device.attach()
        this, other = (w.driver, w.device) if role is Role.DRIVER else (w.device, w.driver)
        this.notify_off()
        again = w.end(role)
        again.attach()
        if role is Role.DRIVER:
            again.add([(POOL_PA, 1)])
            again.publish()
            other.put_used(taken(other), 0)
        else:
            other.add([(POOL_PA, 1)])
        assert other.publish()


@BOTH_ROLES
@pytest.mark.parametrize("seen", [-1, 0x10000])
def test_an_index_to_attach_at_is_a_u16(role: Role, seen: int) -> None:
    with wire() as w, pytest.raises(ValueError, match="0 to 65535"):
        (w.driver if role is Role.DRIVER else w.device).attach(seen)


def test_indexes_that_contradict_each_other() -> None:
    with wire(8, start=False) as w:
        w.set_u16(w.available + 2, 109)
        w.set_u16(w.used + 2, 100)
        with pytest.raises(VirtqueueError, match="jumped by 9 entries, at most 8"):
            w.driver.attach()
        w.device.attach()
        with pytest.raises(VirtqueueError, match="jumped by 9 entries, at most 8"):
            w.device.get_available()


@pytest.mark.parametrize(
    ("heads", "chain", "match"),
    [
        ([8], (0, 0), "descriptor 8 as the head"),
        ([0], (NEXT, 8), "next is 8; its table has 8"),
        ([0], (NEXT, 0), "descriptor 0, which is not its to give"),
        ([0, 0], (0, 0), "descriptor 0, which is not its to give"),
    ],
)
def test_a_driver_attaches_to_nonsense(
    heads: list[int], chain: tuple[int, int], match: str
) -> None:
    with wire(8, start=False) as w:
        w.descriptor(0, POOL_PA, 1, *chain)
        w.offer(*heads)
        with pytest.raises(VirtqueueError, match=match):
            w.driver.attach(seen=0)
        with pytest.raises(VirtqueueError, match=match):
            w.driver.add([(POOL_PA, 1)])


# Notifications.


@BOTH_WISHES
def test_no_kick_while_the_other_side_is_quiet(event_idx: bool) -> None:
    with wire(event_idx=event_idx) as w:
        w.device.notify_off()
        w.driver.notify_off()
        for _ in range(20):
            w.driver.add([(POOL_PA, 1)])
            assert not w.driver.publish()
            w.device.put_used(taken(w.device), 0)
            assert not w.device.publish()
            w.driver.get_used()
        assert not w.device.notify_on() and not w.driver.notify_on()
        w.driver.add([(POOL_PA, 1)])
        assert w.driver.publish()
        w.device.put_used(taken(w.device), 0)
        assert w.device.publish()


@BOTH_WISHES
def test_nothing_published_is_no_kick(event_idx: bool) -> None:
    with wire(event_idx=event_idx) as w:
        assert not w.driver.publish() and not w.device.publish()
        w.driver.add([(POOL_PA, 1)])
        assert w.driver.publish()
        assert not w.driver.publish()


def test_with_an_index_only_the_entry_that_was_wished_for_kicks() -> None:
    with wire(event_idx=True) as w:
        for expected in (True, False, False):
            w.driver.add([(POOL_PA, 1)])
            assert w.driver.publish() is expected
        while w.device.get_available():
            pass
        assert not w.device.notify_on()
        for _ in range(3):
            w.driver.add([(POOL_PA, 1)])
        assert w.driver.publish(), "the first of the three was wished for"


@BOTH_WISHES
@BOTH_ROLES
def test_what_comes_before_the_wish_is_told_by_it(role: Role, event_idx: bool) -> None:
    """The order that loses no wake-up: wish, then look. Either the look or a kick tells."""
    with wire(event_idx=event_idx) as w:
        w.driver.add([(POOL_PA, 1)])
        w.driver.publish()
        if role is Role.DRIVER:
            w.driver.notify_off()
            w.device.put_used(taken(w.device), 0)
            assert not w.device.publish()
            assert w.driver.notify_on() and w.driver.pending
            w.driver.get_used()
            assert not w.driver.notify_on()
            w.driver.add([(POOL_PA, 1)])
            w.driver.publish()
            w.device.put_used(taken(w.device), 0)
            assert w.device.publish()
        else:
            taken(w.device)
            w.device.notify_off()
            w.driver.add([(POOL_PA, 1)])
            assert not w.driver.publish()
            assert w.device.notify_on() and w.device.pending
            taken(w.device)
            assert not w.device.notify_on()
            w.driver.add([(POOL_PA, 1)])
            assert w.driver.publish()


@pytest.mark.parametrize("old", [0, 5, 65533, 65535])
@pytest.mark.parametrize("added", [1, 2, 8])
def test_the_kick_decision_at_every_event_index_near(old: int, added: int) -> None:
    """Reference: virtio 1.2, 2.7.10: kick when the entry at the event index was just published."""
    for delta in range(-4, added + 4):
        with wire(8, event_idx=True, start=False) as w:
            w.set_u16(w.available + 2, old)
            w.set_u16(w.used + 2, old)
            w.driver.attach()
            w.device.attach()
            w.set_u16(w.avail_event, old + delta)
            w.set_u16(w.used_event, old + delta)
            w.set_u16(w.used, 1)  # flags mean nothing with EVENT_IDX
            w.set_u16(w.available, 1)
            for _ in range(added):
                assert w.driver.add([(POOL_PA, 1)]) is not None
            assert w.driver.publish() == (0 <= delta < added)
            for _ in range(added):
                w.device.put_used(taken(w.device), 0)
            assert w.device.publish() == (0 <= delta < added)


@BOTH_WISHES
def test_each_end_writes_its_wish_where_it_belongs(event_idx: bool) -> None:
    with wire(event_idx=event_idx) as w:
        before = bytearray(w.ring)
        w.driver.notify_off()
        w.device.notify_off()
        places = (
            [(w.used_event, 0x8000), (w.avail_event, 0x8000)]
            if event_idx
            else [(w.available, 1), (w.used, 1)]
        )
        for offset, value in places:
            struct.pack_into("<H", before, offset, value)
        assert bytes(w.ring) == bytes(before)
        w.driver.notify_on()
        w.device.notify_on()
        assert all(w.u16(offset) == 0 for offset, _ in places)


# Parts that lie anywhere.


class Scattered:
    """A virtqueue whose three parts are in an order of their own, with guards between them."""

    def __init__(self, num: int, order: Sequence[int], *, event_idx: bool = False) -> None:
        self.layout = layout = VringLayout(num, 4)
        sizes = (layout.available_offset, layout.available_size, layout.used_size)
        self.shared = SharedMemory.create("openamp-test", 4 * (GUARD + (1 << 17)) + POOL_SIZE)
        self.memory = self.shared.region("all", 0).view
        self.pool = self.memory[-POOL_SIZE:]
        self.memory[:-POOL_SIZE] = b"\xa5" * len(self.memory[:-POOL_SIZE])
        views: dict[int, memoryview] = {}
        at = GUARD
        for part in order:
            # What follows begins as close behind as it may; only the descriptors are aligned to 8.
            at = -(-at // 8) * 8 + (0, 2, 4)[part]
            views[part] = self.memory[at : at + sizes[part]]
            at += sizes[part]
        self.parts = RingParts(views[0], views[1], views[2])
        regions = MemoryMap([Region("pool", POOL_PA, POOL_PA, self.pool)])
        self.driver, self.device = (
            Virtqueue(layout, self.parts, regions, role, event_idx=event_idx) for role in Role
        )
        self.driver.start()

    def guards_hold(self) -> bool:
        """Whether nothing but the parts and the pool was written."""
        inside = sum(view.nbytes for view in vars_of(self.parts))
        whole = self.memory.nbytes - POOL_SIZE
        saved = [bytes(view) for view in vars_of(self.parts)]
        for view in vars_of(self.parts):
            view[:] = bytes(view.nbytes)
        untouched = bytes(self.memory[:whole]).count(0xA5)
        for view, content in zip(vars_of(self.parts), saved, strict=True):
            view[:] = content
        return untouched == whole - inside

    def close(self) -> None:
        self.driver.close()
        self.device.close()
        self.shared.close()


def vars_of(parts: RingParts) -> tuple[memoryview, memoryview, memoryview]:
    return parts.descriptors, parts.available, parts.used


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@BOTH_WISHES
def test_parts_in_any_order(order: Sequence[int], event_idx: bool) -> None:
    with contextlib.closing(Scattered(4, order, event_idx=event_idx)) as s:
        s.device.attach()
        for number in range(9):
            head = s.driver.add([(POOL_PA, 3)], [(POOL_PA + 8, 4)])
            assert head is not None
            s.driver.publish()
            s.pool[:3] = bytes((number,)) * 3
            chain = s.device.get_available()
            assert chain is not None and bytes(chain.spans[0].view) == bytes((number,)) * 3
            s.device.put_used(chain.head, number)
            s.device.publish()
            assert s.driver.get_used() == (head, number)
        copy = s.driver.copy()
        assert (copy.available, copy.used) == (9, 9) and len(copy.heads) == 4
        assert s.guards_hold()


@pytest.mark.parametrize("used", [0, 5])
def test_a_transport_can_say_where_a_device_begins(used: int) -> None:
    with contextlib.closing(Scattered(8, (2, 0, 1))) as s:
        heads = [s.driver.add([(POOL_PA + i, 1)]) for i in range(8)]
        s.driver.publish()
        s.parts.used[2] = used
        regions = MemoryMap([Region("pool", POOL_PA, POOL_PA, s.pool)])
        device = Virtqueue(s.layout, s.parts, regions, Role.DEVICE, start=3)
        with contextlib.closing(device):
            device.attach()
            taken = [chain.head for chain in iter(device.get_available, None)]
            assert taken == heads[3:]
            device.put_used(taken[0], 1)
            device.publish()
            assert device.used_index == used + 1


@pytest.mark.parametrize(
    ("part", "match"),
    [
        ("descriptors", "127 bytes for the descriptors, which take 128"),
        ("available", "21 bytes for the entries of the available ring, which take 22"),
        ("used", "69 bytes for the entries of the used ring, which take 70"),
    ],
)
def test_parts_that_are_too_small(part: str, match: str) -> None:
    with contextlib.closing(Scattered(8, (0, 1, 2))) as s:
        short = dataclasses.replace(s.parts, **{part: getattr(s.parts, part)[:-1]})
        with pytest.raises(ValueError, match=match):
            Virtqueue(s.layout, short, MemoryMap(()), Role.DEVICE)


@pytest.mark.parametrize(("part", "odd"), [("descriptors", 4), ("available", 1), ("used", 2)])
def test_parts_that_are_badly_aligned(part: str, odd: int) -> None:
    with contextlib.closing(Scattered(8, (0, 1, 2))) as s:
        view = s.memory[GUARD // 2 + odd : GUARD // 2 + odd + 256]
        shifted = dataclasses.replace(s.parts, **{part: view})
        with pytest.raises(ValueError, match=f"not aligned to {2 * odd} bytes"):
            Virtqueue(s.layout, shifted, MemoryMap(()), Role.DEVICE)


# The caller's mistakes.


def test_only_the_right_end() -> None:
    calls: list[tuple[Role, Callable[[Virtqueue], object]]] = [
        (Role.DRIVER, lambda queue: queue.add([(POOL_PA, 1)])),
        (Role.DRIVER, lambda queue: queue.get_used()),
        (Role.DEVICE, lambda queue: queue.get_available()),
        (Role.DEVICE, lambda queue: queue.put_used(0, 0)),
    ]
    with wire() as w:
        for role, call in calls:
            wrong = w.device if role is Role.DRIVER else w.driver
            with pytest.raises(ValueError, match=f"only the {role.value} end"):
                call(wrong)


@pytest.mark.parametrize(
    "spans", [[], [(POOL_PA, 1)] * 9, [(-1, 1)], [(1 << 64, 1)], [(0, -1)], [(0, 1 << 32)]]
)
def test_impossible_chains(spans: list[tuple[int, int]]) -> None:
    with wire(8) as w:
        before = bytes(w.ring)
        with pytest.raises(ValueError, match="possible"):
            w.driver.add(spans)
        assert not w.driver.publish() and bytes(w.ring) == before
        assert w.driver.add([(POOL_PA, 1)] * 8) is not None, "all are still free"


def test_only_what_was_taken_can_be_put() -> None:
    with wire() as w:
        w.driver.add([(POOL_PA, 1)])
        w.driver.add([(POOL_PA, 1)])
        w.driver.publish()
        head = taken(w.device)
        for wrong in (-1, 1, 7, 8, 65536):
            with pytest.raises(ValueError, match=f"head {wrong} was taken"):
                w.device.put_used(wrong, 0)
        for length in (-1, 1 << 32):
            with pytest.raises(ValueError, match="u32"):
                w.device.put_used(head, length)
        w.device.put_used(head, 0)
        with pytest.raises(ValueError, match="was taken"):
            w.device.put_used(head, 0)
        w.device.publish()
        assert w.driver.get_used() == (head, 0) and w.driver.get_used() is None


def test_memory_that_a_ring_cannot_use() -> None:
    with wire() as w:
        size = w.layout.size
        regions = MemoryMap([])
        with pytest.raises(ValueError, match=f"{size - 1} bytes for a vring of {size}"):
            Virtqueue(w.layout, w.ring[: size - 1], regions, Role.DRIVER)
        with pytest.raises(ValueError, match="not aligned to 64"):
            Virtqueue(w.layout, w.memory[4 : 4 + size], regions, Role.DRIVER)
        small = VringLayout(8, 4)
        with pytest.raises(ValueError, match="not aligned to 8"):
            Virtqueue(small, w.memory[4 : 4 + small.size], regions, Role.DRIVER)


# The other side's mistakes, each by hand.


@pytest.mark.parametrize("jump", [9, 0x8000, 0xFFFF])
def test_fault_index_jump(jump: int) -> None:
    with wire(8) as w:
        w.set_u16(w.available + 2, jump)
        with pytest.raises(VirtqueueError, match=f"jumped by {jump} entries, at most 8 were"):
            w.device.get_available()
    with wire(8) as w:
        w.driver.add([(POOL_PA, 1)])
        w.driver.add([(POOL_PA, 1)])
        w.driver.publish()
        w.set_u16(w.used + 2, jump)
        with pytest.raises(VirtqueueError, match=f"jumped by {jump} entries, at most 2 were"):
            w.driver.get_used()


def test_fault_index_jump_counts_what_the_other_side_can_see() -> None:
    with wire(8) as w:
        w.driver.add([(POOL_PA, 1)])
        w.driver.publish()
        w.driver.add([(POOL_PA, 1)])  # added, but the device cannot know
        w.use((0, 0), (1, 0))
        with pytest.raises(VirtqueueError, match="jumped by 2 entries, at most 1 were"):
            w.driver.get_used()
    with wire(2) as w:
        w.descriptor(0, POOL_PA, 1, 0)
        w.descriptor(1, POOL_PA, 1, 0)
        w.offer(0, 1)
        w.device.put_used(taken(w.device), 0)
        taken(w.device)
        w.offer(0)  # put, but the driver cannot know
        with pytest.raises(VirtqueueError, match="jumped by 1 entries, at most 0 were"):
            w.device.get_available()


def test_fault_index_that_goes_back() -> None:
    with wire(8) as w:
        w.descriptor(0, POOL_PA, 1, 0)
        w.offer(0)
        taken(w.device)
        w.set_u16(w.available + 2, 0)
        with pytest.raises(VirtqueueError, match="jumped by 65535 entries, at most 7 were"):
            w.device.get_available()


@pytest.mark.parametrize("head", [8, 0xFFFF])
def test_fault_head_range(head: int) -> None:
    with wire(8) as w:
        w.offer(head)
        with pytest.raises(VirtqueueError, match=f"descriptor {head} as the head .* are 8"):
            w.device.get_available()


@pytest.mark.parametrize("head", [8, 0x10000, 0xFFFF_FFFF])
def test_fault_head_range_used(head: int) -> None:
    with wire(8) as w:
        w.driver.add([(POOL_PA, 1)])
        w.driver.publish()
        w.use((head, 0))
        with pytest.raises(VirtqueueError, match=f"descriptor {head} as the head .* are 8"):
            w.driver.get_used()


def test_fault_head_state() -> None:
    with wire(8) as w:
        w.descriptor(3, POOL_PA, 1, 0)
        w.offer(3, 3)
        assert taken(w.device) == 3
        with pytest.raises(VirtqueueError, match="descriptor 3, which is not its to give"):
            w.device.get_available()
    with wire(8) as w:
        w.driver.add([(POOL_PA, 1)] * 2)
        w.driver.add([(POOL_PA, 1)])
        w.driver.publish()
        w.use((1, 0))  # in the middle of a chain
        with pytest.raises(VirtqueueError, match="descriptor 1, which is not its to give"):
            w.driver.get_used()
    with wire(8) as w:
        w.driver.add([(POOL_PA, 1)])
        w.driver.add([(POOL_PA, 1)])
        w.driver.publish()
        w.use((0, 0), (0, 0))  # twice
        assert w.driver.get_used() == (0, 0)
        with pytest.raises(VirtqueueError, match="descriptor 0, which is not its to give"):
            w.driver.get_used()


def test_fault_next_range() -> None:
    with wire(8, indirect=True) as w:
        w.descriptor(0, POOL_PA, 1, NEXT, 8)
        w.offer(0)
        with pytest.raises(VirtqueueError, match="next is 8; its table has 8 entries"):
            w.device.get_available()
    with wire(8, indirect=True) as w:
        struct.pack_into("<QIHH", w.pool, 0, POOL_PA, 1, NEXT, 2)
        w.descriptor(0, POOL_PA, 32, INDIRECT)
        w.offer(0)
        with pytest.raises(VirtqueueError, match="next is 2; its table has 2 entries"):
            w.device.get_available()


@pytest.mark.parametrize("length", [1, 2, 8])
def test_fault_chain_length(length: int) -> None:
    with wire(8) as w:
        for i in range(length):
            w.descriptor(i, POOL_PA, 1, NEXT, (i + 1) % length)
        w.offer(0)
        with pytest.raises(VirtqueueError, match=r"chain has 9 descriptors .* at most 8 .* loop"):
            w.device.get_available()


def test_fault_chain_length_with_an_indirect_table() -> None:
    """The table may be as long as the queue, but not the chain longer than it (2.7.5.3.1)."""
    with wire(4, indirect=True) as w:
        for i in range(4):
            struct.pack_into("<QIHH", w.pool, 16 * i, POOL_PA, 1, NEXT if i < 3 else 0, i + 1)
        w.descriptor(0, POOL_PA, 64, INDIRECT)
        w.descriptor(1, POOL_PA, 1, NEXT, 0)
        w.offer(0, 1)
        chain = w.device.get_available()
        assert chain is not None and len(chain.spans) == 4
        w.device.put_used(0, 0)
        with pytest.raises(VirtqueueError, match=r"chain has 5 descriptors .* at most 4"):
            w.device.get_available()
    with wire(4, indirect=True) as w:
        for i in range(2):
            struct.pack_into("<QIHH", w.pool, 16 * i, POOL_PA, 1, NEXT, 1 - i)
        w.descriptor(0, POOL_PA, 32, INDIRECT)
        w.offer(0)
        with pytest.raises(VirtqueueError, match=r"chain has 3 descriptors .* at most 2"):
            w.device.get_available()


@pytest.mark.parametrize(
    ("addr", "length"),
    [
        (0, 1),
        (POOL_PA - 1, 1),
        (POOL_PA - 1, 2),
        (POOL_PA + POOL_SIZE, 1),
        (POOL_PA + POOL_SIZE - 1, 2),
        (POOL_PA + POOL_SIZE + 1, 0),
        (POOL_PA, POOL_SIZE + 1),
        (POOL_PA + 1, 0xFFFF_FFFF),
        ((1 << 64) - 1, 2),
        ((1 << 64) - 1, 0xFFFF_FFFF),
    ],
)
def test_fault_address(addr: int, length: int) -> None:
    for flags in (0, WRITE, NEXT, INDIRECT):
        with wire(8, indirect=True) as w:
            w.descriptor(0, addr, length, flags)
            w.offer(0)
            with pytest.raises(VirtqueueError, match=f"points at {addr:#x} for {length} bytes"):
                w.device.get_available()


def indirect_not_negotiated(w: Wire) -> None:
    w.device.close()
    w.indirect = False
    w.device = w.end(Role.DEVICE)
    w.device.start()


@pytest.mark.parametrize(
    ("length", "flags", "nested", "change"),
    [
        (0, INDIRECT, 0, None),
        (15, INDIRECT, 0, None),
        (24, INDIRECT, 0, None),
        (16 * 9, INDIRECT, 0, None),
        (16, INDIRECT | NEXT, 0, None),
        (16, INDIRECT, INDIRECT, None),
        (16, INDIRECT, 0, indirect_not_negotiated),
    ],
    ids=["empty", "short", "half", "long", "and next", "nested", "not negotiated"],
)
def test_fault_indirect(
    length: int, flags: int, nested: int, change: Callable[[Wire], None] | None
) -> None:
    with wire(8, indirect=True) as w:
        if change is not None:
            change(w)
        struct.pack_into("<QIHH", w.pool, 0, POOL_PA, 16, nested, 0)
        w.descriptor(0, POOL_PA, length, flags, 1)
        w.offer(0)
        match = f"indirect table of {length} bytes; .* up to 128"
        with pytest.raises(VirtqueueError, match=match):
            w.device.get_available()


def test_fault_indirect_misaligned() -> None:
    with wire(8, indirect=True) as w:
        w.descriptor(0, POOL_PA + 4, 16, INDIRECT)
        w.offer(0)
        with pytest.raises(VirtqueueError, match="aligned to 8"):
            w.device.get_available()


def test_fault_order() -> None:
    with wire(8) as w:
        w.descriptor(0, POOL_PA, 1, NEXT | WRITE, 1)
        w.descriptor(1, POOL_PA, 1, 0)
        w.offer(0)
        with pytest.raises(VirtqueueError, match="descriptor 1 of a chain is readable after"):
            w.device.get_available()


def operations(queue: Virtqueue) -> list[Callable[[], object]]:
    shared: list[Callable[[], object]] = [queue.publish, queue.notify_on, lambda: queue.pending]
    if queue.role is Role.DRIVER:
        return [*shared, queue.get_used, lambda: queue.add([(POOL_PA, 1)])]
    return [*shared, queue.get_available, lambda: queue.put_used(0, 0)]


@BOTH_ROLES
def test_broken_is_for_good(role: Role) -> None:
    with wire(8) as w:
        queue = w.driver if role is Role.DRIVER else w.device
        index = w.used + 2 if role is Role.DRIVER else w.available + 2
        w.set_u16(index, 50)
        with pytest.raises(VirtqueueError) as first:
            queue.get_used() if role is Role.DRIVER else queue.get_available()
        w.set_u16(index, 0)  # too late
        before = bytes(w.ring)
        for operation in operations(queue):
            with pytest.raises(VirtqueueError) as again:
                operation()
            assert str(again.value) == str(first.value)
        assert bytes(w.ring) == before


# A peer that writes anything.

garbage_u16 = st.one_of(st.integers(0, 9), st.sampled_from([0x7FFF, 0x8000, 0xFFFF]))
garbage_addr = st.one_of(
    st.integers(POOL_PA, POOL_PA + POOL_SIZE),
    st.integers(0, (1 << 64) - 1),
    st.just(POOL_PA + 1024),
)
garbage_length = st.one_of(st.integers(0, 200), st.integers(0, 0xFFFF_FFFF), st.just(64))
descriptors = st.lists(
    st.tuples(garbage_addr, garbage_length, st.integers(0, 15), garbage_u16),
    min_size=8,
    max_size=8,
)
mutations = st.lists(st.tuples(st.integers(0, 4095), garbage_u16), max_size=4)


def check_chain(w: Wire, spans: tuple[Span, ...]) -> None:
    assert 1 <= len(spans) <= w.layout.num
    for span, after in itertools.pairwise(spans):
        assert after.writable or not span.writable
    for span in spans:
        assert span.pa >= POOL_PA and span.pa + span.view.nbytes <= POOL_PA + POOL_SIZE


def step(w: Wire, queue: Virtqueue, operation: Callable[[], T]) -> T:
    """Runs one operation; nothing but a VirtqueueError, and only this side's ring changes."""
    before = bytes(w.memory)
    try:
        return operation()
    except VirtqueueError as error:
        assert "the other side is at fault" in str(error)
        for other in operations(queue):
            with pytest.raises(VirtqueueError):
                other()
        raise
    finally:
        after = bytes(w.memory)
        start, end = (
            (w.ring_at, w.ring_at + w.layout.used_offset)
            if queue.role is Role.DRIVER
            else (w.ring_at + w.layout.used_offset, w.ring_at + w.layout.size)
        )
        assert after[:start] == before[:start] and after[end:] == before[end:]


@HOSTILE
@given(
    descriptors,
    st.lists(garbage_u16, min_size=8, max_size=8),
    st.integers(0, 9),
    descriptors,
    st.booleans(),
)
def test_hostile_get_available(
    table: list[tuple[int, int, int, int]],
    heads: list[int],
    count: int,
    in_pool: list[tuple[int, int, int, int]],
    event_idx: bool,
) -> None:
    with wire(8, event_idx=event_idx, indirect=True) as w, contextlib.suppress(VirtqueueError):
        for i, entry in enumerate(table):
            w.descriptor(i, *entry)
        for i, entry in enumerate(in_pool):
            struct.pack_into("<QIHH", w.pool, 1024 + 16 * i, *entry)
        for i, head in enumerate(heads):
            w.set_u16(w.available + 4 + 2 * i, head)
        w.set_u16(w.available + 2, count)
        seen: list[int] = []
        while chain := step(w, w.device, w.device.get_available):
            check_chain(w, chain.spans)
            seen.append(chain.head)
        assert seen == heads[:count] and len(set(seen)) == len(seen)
        for head in seen:
            w.device.put_used(head, 0)
        assert w.device.publish() in (False, True)


@HOSTILE
@given(
    st.lists(st.integers(1, 3), max_size=5),
    st.lists(st.tuples(garbage_u16, garbage_length), min_size=8, max_size=8),
    st.integers(0, 9),
)
def test_hostile_get_used(sizes: list[int], entries: list[tuple[int, int]], count: int) -> None:
    with wire(8) as w, contextlib.suppress(VirtqueueError):
        out = {w.driver.add([(POOL_PA, 1)] * size) for size in sizes}
        w.driver.publish()
        w.use(*entries)
        w.set_u16(w.used + 2, count)
        while got := step(w, w.driver, w.driver.get_used):
            assert got[0] in out
            out.remove(got[0])


@HOSTILE
@given(st.sampled_from(Role), st.binary(min_size=400, max_size=400), mutations)
def test_hostile_attach(role: Role, content: bytes, indexes: list[tuple[int, int]]) -> None:
    with wire(8, indirect=True, start=False) as w:
        w.ring[:] = (content + bytes(w.layout.size))[: w.layout.size]
        for _, value in indexes:  # nearer to something that works
            w.set_u16(w.available + 2, value)
            w.set_u16(w.used + 2, value - 3)
        queue = w.driver if role is Role.DRIVER else w.device
        with contextlib.suppress(VirtqueueError):
            step(w, queue, queue.attach)
            for _ in range(10):
                for operation in operations(queue):
                    with contextlib.suppress(ValueError):
                        step(w, queue, operation)


@HOSTILE
@given(
    st.sampled_from(Role),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 5), mutations), min_size=5, max_size=40),
)
def test_hostile_words_between_operations(
    victim_role: Role, event_idx: bool, steps: list[tuple[int, list[tuple[int, int]]]]
) -> None:
    """A working peer whose words in the ring are changed now and then."""
    with wire(8, event_idx=event_idx, indirect=True) as w:
        victim, peer = (w.driver, w.device) if victim_role is Role.DRIVER else (w.device, w.driver)
        hand: deque[int] = deque()

        def work(queue: Virtqueue, action: int) -> None:
            match action:
                case 0:
                    queue.publish()
                case 1:
                    queue.notify_on()
                case 2:
                    queue.notify_off()
                case 5 if queue.role is Role.DRIVER:
                    queue.get_used()
                case _ if queue.role is Role.DRIVER:
                    spans = [(POOL_PA + 64 * action, 64)] * (action - 2)
                    queue.add(spans[:1], spans[1:])
                case 5 if hand:
                    queue.put_used(hand.popleft(), 64)
                case _:
                    if chain := queue.get_available():
                        check_chain(w, chain.spans)
                        hand.append(chain.head)

        broken = False
        for action, changes in steps:
            for offset, value in changes:
                w.set_u16(offset % w.layout.size // 2 * 2, value)
            with contextlib.suppress(VirtqueueError, ValueError):
                work(peer, action)
                work(peer, 0)
            try:
                step(w, victim, partial(work, victim, action))
                assert not broken or action == 2
            except VirtqueueError:
                broken = True


# Closing.


def test_closed_is_not_usable() -> None:
    with wire() as w:
        for queue in (w.driver, w.device):
            queue.close()
            queue.close()
            for operation in [*operations(queue), queue.start, queue.attach, queue.notify_off]:
                with pytest.raises(ValueError, match="closed"):
                    operation()


def test_one_that_only_a_cycle_kept_is_collected_without_harm() -> None:
    """The collector may take memory and its users apart in any order."""
    program = """
import gc
from openamp_py.memory import MemoryMap, SharedMemory
from openamp_py.virtio import MessageRing, Role, SharedU8, SharedU32, Virtqueue
from openamp_py.vring import VringLayout

def leak():
    memory = MemoryMap([SharedMemory.create("leak", 1 << 20).region("r", 0)])
    view, layout = memory.regions[0].view, VringLayout(16, 4096)
    cycle = [memory, view, SharedU8(view, 0), SharedU32(view, 4)]
    for at, sender in ((0x10000, True), (0x20000, False)):
        queue = Virtqueue(layout, view[at : at + layout.size], memory, Role.DRIVER)
        pool = (0x40000, view[0x40000:0x50000])
        cycle += [queue, MessageRing(queue, sender=sender, buffer_size=64, pool=pool)]
    cycle.append(cycle)

leak()
gc.collect()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
