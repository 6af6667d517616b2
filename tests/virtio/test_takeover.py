"""Rings that other drivers left: OpenAMP's captures, Linux's, our own, and any bytes."""

from __future__ import annotations

import contextlib
import gzip
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py.errors import VirtqueueError
from openamp_py.memory import MemoryMap, SharedMemory
from openamp_py.virtio import MessageRing, Role, Virtqueue
from openamp_py.virtio.takeover import (
    LEFT_FREE,
    LEFT_OUT,
    Lent,
    RingCopy,
    find_receiving_untrusted,
    find_sending_untrusted,
)
from openamp_py.vring import VringLayout

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
PROPERTY = settings(derandomize=True, deadline=None, max_examples=300, database=None)
NUM, SIZE = 256, 512
RECEIVED_AT, SENT_AT = 0x1_0000, 0x3_0000

NEEDS_GOLDEN = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no captures in {GOLDEN}")


class Memory:
    """Shared memory with vrings in it, and the rings that a driver makes of them."""

    def __init__(self, content: bytes) -> None:
        self.shared = SharedMemory.create("openamp-test", len(content))
        region = self.shared.region("shm", 0)
        self.view = region.view
        self.view[:] = content
        self.map = MemoryMap([region])
        self.closing = contextlib.ExitStack()

    def queue(self, at: int, layout: VringLayout, role: Role = Role.DRIVER) -> Virtqueue:
        queue = Virtqueue(layout, self.view[at : at + layout.size], self.map, role)
        self.closing.callback(queue.close)
        return queue

    def ring(self, queue: Virtqueue, *, sender: bool, lent: Lent) -> MessageRing:
        size = lent.size * queue.layout.num
        pool = self.map.find_pa(lent.pa, size)
        assert pool is not None
        ring = MessageRing(
            queue, sender=sender, buffer_size=lent.size, pool=(lent.pa, pool), lent=lent
        )
        self.closing.callback(ring.close)
        return ring


@contextlib.contextmanager
def memory(content: bytes) -> Iterator[Memory]:
    made = Memory(content)
    try:
        yield made
    finally:
        made.closing.close()
        made.shared.close()


LAYOUT = VringLayout(NUM, 4096)


# OpenAMP's captures: messages that wait for the driver, and what it has out.
PENDING = {
    "driver_ok": (0, 0),
    "device_announced": (1, 0),
    "both_announced": (1, 1),
    "echo_to_device": (0, 1),
    "echo_to_driver": (1, 1),
    "sample_reply": (1, 1),
    "matrix_reply": (1, 1),
    "flood_device_stalled": (0, 256),
    "flood_driver_stalled": (256, 0),
    "echo_end": (1, 0),
}


@NEEDS_GOLDEN
@pytest.mark.parametrize("name", PENDING)
def test_what_an_openamp_driver_left(name: str) -> None:
    with memory(gzip.decompress((GOLDEN / "openamp" / f"{name}.bin.gz").read_bytes())) as mem:
        pending, out = PENDING[name]
        to_driver, to_device = mem.queue(0x4000, LAYOUT), mem.queue(0x8000, LAYOUT)
        received = find_receiving_untrusted(to_driver.copy())
        assert (received.pa, received.size) == (RECEIVED_AT, SIZE)
        sent = find_sending_untrusted(to_device.copy(), SENT_AT, SIZE)
        assert len(sent.heads) == out
        assert sorted(sent.offsets) == [SIZE * place for place in range(NUM)]
        receiving = mem.ring(to_driver, sender=False, lent=received)
        sending = mem.ring(to_device, sender=True, lent=sent)
        messages = []
        more = True
        while more:
            arrivals, _, more = receiving.receive()
            messages += [message.payload for each in arrivals for message in each.messages]
        assert len(messages) == pending
        if name == "flood_driver_stalled":
            numbers = [struct.unpack_from("<Q", payload)[0] for payload in messages]
            assert numbers == [*range(65499, 65755)]
        before = {
            head: bytes(mem.view[SENT_AT + sent.offsets[head] :][:SIZE]) for head in sent.heads
        }
        count = 0
        while sending.send(1024, 1025, b"new") >= 0:
            count += 1
        assert count == NUM - out
        for head, content in before.items():
            assert bytes(mem.view[SENT_AT + sent.offsets[head] :][:SIZE]) == content
        device = mem.queue(0x8000, LAYOUT, Role.DEVICE)
        device.attach()
        peer = MessageRing(device, sender=False, buffer_size=SIZE)
        mem.closing.callback(peer.close)
        found = []
        more = True
        while more:
            arrivals, _, more = peer.receive()
            found += [message.payload for each in arrivals for message in each.messages]
        assert len(found) == NUM and found[out:] == [b"new"] * count
        assert b"new" not in found[:out]


@NEEDS_GOLDEN
def test_memory_that_no_driver_worked_is_refused() -> None:
    content = gzip.decompress((GOLDEN / "openamp" / "table_only.bin.gz").read_bytes())
    with (
        memory(content) as mem,
        pytest.raises(VirtqueueError, match="cannot be taken over: its first buffer has 0 bytes"),
    ):
        find_receiving_untrusted(mem.queue(0x4000, LAYOUT).copy())


@NEEDS_GOLDEN
@pytest.mark.parametrize("version", ["6.1.192", "7.3.4"])
def test_what_linux_left(version: str) -> None:
    content = gzip.decompress((GOLDEN / "linux" / f"rings-uml-{version}.bin.gz").read_bytes())
    with memory(content) as mem:
        received = find_receiving_untrusted(mem.queue(0, LAYOUT).copy())
        assert received.size == SIZE and received.offsets == tuple(range(0, NUM * SIZE, SIZE))
        end = received.pa + NUM * SIZE
        assert find_sending_untrusted(mem.queue(0x3000, LAYOUT).copy(), end, SIZE).heads == ()


def test_a_linux_message_that_is_out_comes_back_as_a_whole_buffer() -> None:
    """Linux lends for as many bytes as the message has."""
    layout = VringLayout(2, 64)
    with memory(bytes(0x2000)) as mem:
        driver = mem.queue(0, layout)
        driver.start()
        for at in (0x1200, 0x1000):
            driver.add(readable=[(at, 16 + 3)])
            struct.pack_into("<IIIHH3s", mem.view, at, 1, 2, 0, 3, 0, b"old")
        driver.publish()
        lent = find_sending_untrusted(driver.copy(), 0x1000, 0x200)
        assert lent.offsets == (0x200, 0)
        sending = mem.ring(mem.queue(0, layout), sender=True, lent=lent)
        assert sending.send(1, 2, b"none is free") == -1
        device = mem.queue(0, layout, Role.DEVICE)
        device.attach()
        receiving = MessageRing(device, sender=False, buffer_size=0x200)
        mem.closing.callback(receiving.close)
        assert [a.messages[0].payload for a in receiving.receive()[0]] == [b"old"] * 2
        payload = b"x" * 0x1F0
        sent = 0
        for _ in range(8):
            sent += sending.send(1, 2, payload) >= 0
            for arrival in receiving.receive()[0]:
                assert arrival.messages[0].payload == payload
        assert sent >= 6 and receiving.bad_length == 0 and receiving.messages == 2 + sent


def test_a_device_that_returns_out_of_order_is_known_by_what_our_driver_noted() -> None:
    layout = VringLayout(4, 64)
    with memory(bytes(0x2000)) as mem:
        pool = (0x1000, mem.view[0x1000:0x1800])
        queue = mem.queue(0, layout)
        first = MessageRing(queue, sender=True, buffer_size=0x200, pool=pool)
        mem.closing.callback(first.close)
        device = mem.queue(0, layout, Role.DEVICE)
        device.attach()
        first.send(1, 2, b"held")
        held = device.get_available()
        assert held is not None
        for _ in range(9):  # the other buffers circulate, so that the ring forgets this one
            first.send(1, 2, b"x")
            chain = device.get_available()
            assert chain is not None
            device.put_used(chain.head, 0)
            device.publish()
        first.leave()
        lent = find_sending_untrusted(mem.queue(0, layout).copy(), 0x1000, 0x200)
        assert held.head in lent.heads
        second = mem.ring(mem.queue(0, layout), sender=True, lent=lent)
        count = 0
        while second.send(1, 2, b"new") >= 0:
            count += 1
        assert count == 3
        assert bytes(held.spans[0].view[16:20]) == b"held"
        device.put_used(held.head, 0)
        device.publish()
        assert second.send(1, 2, b"new") >= 0
        # What was noted holds no longer, also for one that comes after.
        assert all(mark not in (LEFT_OUT, LEFT_FREE) for *_, mark in queue.copy().descriptors)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_a_host_that_is_killed_while_it_keeps_messages(order: tuple[int, ...]) -> None:
    """The next one sees none of them again, and the device gets all buffers back."""
    layout = VringLayout(4, 64)
    with memory(bytes(0x2000)) as mem:
        pool = (0x1000, mem.view[0x1000:0x1800])
        first = MessageRing(mem.queue(0, layout), sender=False, buffer_size=0x200, pool=pool)
        mem.closing.callback(first.close)
        device = mem.queue(0, layout, Role.DEVICE)
        peer = MessageRing(device, sender=True, buffer_size=0x200)
        mem.closing.callback(peer.close)
        kept = []
        for number in range(4):
            assert peer.send(1, 2, b"%d" % number) >= 0
            kept += [arrival.head for arrival in first.receive(give_back=False)[0]]
        first.release([kept[number] for number in order[:3]])
        for number in range(4, 9):  # these circulate, past the one that is kept
            assert peer.send(1, 2, b"%d" % number) >= 0
            if number < 7:
                first.receive()
        lent = find_receiving_untrusted(mem.queue(0, layout).copy())
        assert set(range(4)) - set(lent.heads) == {kept[order[3]]}
        second = mem.ring(mem.queue(0, layout), sender=False, lent=lent)
        found = [message.payload for each in second.receive()[0] for message in each.messages]
        assert found == [b"7", b"8"]
        count = 0
        while peer.send(1, 2, b"new") >= 0:
            count += 1
        assert count == 4
        assert len(second.receive()[0]) == 4


# Refusals

GOOD = ((0x1000, 512, 2, 1), (0x1200, 512, 2, 0))


@pytest.mark.parametrize(
    ("descriptors", "message"),
    [
        (((0x1000, 16, 2, 0),) * 2, "its first buffer has 16 bytes; 17 to 65551 are possible"),
        (((0x1000, 65552, 2, 0),) * 2, "65552 bytes"),
        ((GOOD[0], (0x1200, 511, 2, 0)), "descriptor 1 has flags 0x2 and 511 bytes"),
        ((GOOD[0], (0x1200, 512, 3, 0)), "descriptor 1 has flags 0x3"),
        ((GOOD[0], (0x1201, 512, 2, 0)), "descriptor 1 points at 0x1201, which is none of 2"),
        ((GOOD[0], (0x1400, 512, 2, 0)), "descriptor 1 points at 0x1400"),
        ((GOOD[0], GOOD[0]), "descriptor 1, or its buffer at 0x1000, is out twice"),
    ],
)
def test_receiving_buffers_that_are_none(
    descriptors: tuple[tuple[int, int, int, int], ...], message: str
) -> None:
    with pytest.raises(VirtqueueError, match=message) as caught:
        find_receiving_untrusted(RingCopy("ring", 2, 0, (0, 1), descriptors))
    assert str(caught.value).startswith("ring cannot be taken over: ")


SENT = ((0x1000, 512, 0, 1), (0x1200, 100, 0, 0))


@pytest.mark.parametrize(
    ("available", "heads", "descriptors", "message"),
    [
        (3, (0, 1), SENT, "3 of its entries are out .available index 3, used index 0.; at most 2"),
        (0xFFFF, (0, 1), SENT, "65535 of its entries"),
        (1, (2, 0), SENT, "descriptor 2 is out; there are 2"),
        (2, (0, 0), SENT, "descriptor 0, or its buffer at 0x1000, is out twice"),
        (1, (0, 1), ((0x1000, 512, 2, 1), SENT[1]), "descriptor 0, which is out, has flags 0x2"),
        (1, (0, 1), ((0x1000, 15, 0, 1), SENT[1]), "15 bytes; 0 and 16 to 512 bytes"),
        (1, (0, 1), ((0x1001, 0, 0, 1), SENT[1]), "0 bytes; 0 and 16 to 512 bytes"),
        # Also where nothing is out.
        (0, (0, 1), ((0x1000, 513, 0, 1), SENT[1]), "descriptor 0 was last used for 513 bytes"),
        (0, (0, 1), ((0xFFF, 512, 0, 1), SENT[1]), "at 0xfff, which are in none of 2 buffers"),
        (0, (0, 1), (SENT[0], (0x1400, 9, 0, 1)), "descriptor 1 .*9 bytes at 0x1400"),
        (0, (0, 1), (SENT[0], (0x1100, 256, 0, 1)), "send_buffer_size the same as before"),
    ],
)
def test_sending_rings_that_contradict_themselves(
    available: int,
    heads: tuple[int, ...],
    descriptors: tuple[tuple[int, int, int, int], ...],
    message: str,
) -> None:
    with pytest.raises(VirtqueueError, match=message):
        find_sending_untrusted(RingCopy("ring", available, 0, heads, descriptors), 0x1000, 512)


@pytest.mark.parametrize(
    ("heads", "message"),
    [([0, 4], "descriptor 4 as the head"), ([1, 1], "descriptor 1"), ([0], "jumped by 2")],
)
def test_a_queue_refuses_to_resume_with_what_cannot_be(heads: list[int], message: str) -> None:
    layout = VringLayout(4, 64)
    with memory(bytes(0x1000)) as mem:
        struct.pack_into("<H", mem.view, layout.used_offset + 2, 3)
        with pytest.raises(VirtqueueError, match=f"cannot be taken over: .*{message}"):
            mem.queue(0, layout).resume(3 if len(heads) > 1 else 2, heads, 512)


# Hostile input


@PROPERTY
@given(
    data=st.data(),
    marked=st.booleans(),
)
def test_any_ring_is_taken_over_or_refused(data: st.DataObject, marked: bool) -> None:
    """And what was taken over works, or breaks with the documented error."""
    num = data.draw(st.sampled_from([1, 2, 4]))
    layout = VringLayout(num, 64)
    word = st.sampled_from([0, 1, 2, 3, num, 0xFFFE, 0xFFFF]) | st.integers(0, 0xFFFF)
    with memory(bytes(0x2000)) as mem:
        for sender in (False, True):
            at = 0x800 * sender
            for head in range(num):
                address = 0x1000 + 0x100 * data.draw(st.integers(-1, num))
                length = data.draw(st.sampled_from([0x100, 0x100, 0x100, 16, 15, 0x101]))
                flags = data.draw(st.sampled_from([0, 0, 1]) if sender else st.sampled_from([2, 3]))
                mark = data.draw(st.sampled_from([LEFT_OUT, LEFT_FREE])) if marked else 0
                struct.pack_into("<QIHH", mem.view, at + 16 * head, address, length, flags, mark)
            for offset in (layout.available_offset, layout.used_offset):
                for place in range(0, 4 + 8 * num, 2):
                    struct.pack_into("<H", mem.view, at + offset + place, data.draw(word))
            queue = mem.queue(at, layout)
            try:
                copy = queue.copy()
                lent = (
                    find_sending_untrusted(copy, 0x1000, 0x100)
                    if sender
                    else find_receiving_untrusted(copy)
                )
                if not 0x1000 <= lent.pa <= 0x2000 - lent.size * num:
                    continue  # which the bus refuses
                ring = mem.ring(queue, sender=sender, lent=lent)
                for _ in range(2 * num):
                    _ = ring.send(1, 2, b"x") if sender else ring.receive()
            except VirtqueueError as error:
                assert str(error)
