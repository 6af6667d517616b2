"""Message rings: both directions from both ends, sizes, held buffers, and a lying other side."""

from __future__ import annotations

import contextlib
import itertools
import random
import struct
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py.errors import VirtqueueError
from openamp_py.memory import MemoryMap, Region, SharedMemory
from openamp_py.virtio import Arrival, Message, MessageRing, Role, Virtqueue
from openamp_py.virtio.message_ring import (
    BATCH,
    BROKEN,
    HEADER_SIZE,
    IN_PLACE,
    KEPT,
    KICK,
    MAX_BUFFER_SIZE,
    MIXED,
    POLL_HIT,
    POLLED,
    RETURNED,
    SEVERAL,
    encode_lengths,
)
from openamp_py.vring import VringLayout

HEADER = struct.Struct("<IIIHH")  # src, dst, reserved, length, flags
SRC, DST = 1024, 0xFFFF_FFFE
GUARD = 4096
RING_PA = 0x1000_0000
POOL_PA = 0x2000_0000

ANY = 0xFFFF_FFFF  # no address

NO_BUFFER, SMALL_BUFFER = -1, -3

BOTH_WISHES = pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
BOTH_WAYS = pytest.mark.parametrize("sender", Role, ids=lambda role: f"{role.value} sends")
PROPERTY = settings(derandomize=True, deadline=None, max_examples=200, database=None)


class Link:
    """One direction, both ends, over one mapping with guards around ring and pool."""

    def __init__(self, sender: Role, num: int, size: int, told: int, event_idx: bool) -> None:
        self.layout = VringLayout(num, 64)
        self.num, self.size = num, size
        ring_at = GUARD
        pool_at = ring_at + -(-self.layout.size // GUARD) * GUARD + GUARD
        self.shared = SharedMemory.create("openamp-test", pool_at + num * size + GUARD)
        memory = self.shared.region("all", 0).view
        self.ring = memory[ring_at : ring_at + self.layout.size]
        self.pool = memory[pool_at : pool_at + num * size]
        self.guards = [
            memory[:ring_at],
            memory[ring_at + self.layout.size : pool_at],
            memory[pool_at + num * size :],
        ]
        for guard in self.guards:
            guard[:] = b"\xa5" * len(guard)
        self.regions = MemoryMap(
            [
                Region("ring", RING_PA, RING_PA, self.ring),
                Region("pool", POOL_PA, POOL_PA, self.pool),
            ]
        )
        self.event_idx = event_idx
        self.rings: list[MessageRing] = []
        self.driver = self.end(Role.DRIVER, sender is Role.DRIVER, size)
        self.device = self.end(Role.DEVICE, sender is Role.DEVICE, told)
        self.send, self.receive = (
            (self.driver, self.device) if sender is Role.DRIVER else (self.device, self.driver)
        )

    def queue(self, role: Role) -> Virtqueue:
        return Virtqueue(
            self.layout, self.ring, self.regions, role, event_idx=self.event_idx, indirect=True
        )

    def end(self, role: Role, sender: bool, size: int) -> MessageRing:
        pool = (POOL_PA, self.pool) if role is Role.DRIVER else None
        ring = MessageRing(self.queue(role), sender=sender, buffer_size=size, pool=pool)
        self.rings.append(ring)
        return ring

    def close(self) -> None:
        for guard in self.guards:
            assert set(guard) == {0xA5}
        for ring in self.rings:
            ring.close()
        self.shared.close()

    def buffer(self, head: int) -> memoryview:
        return self.pool[head * self.size : (head + 1) * self.size]

    def at(self, pa: int, length: int) -> memoryview:
        """Memory that a ring names, which lies in the buffers."""
        assert POOL_PA <= pa <= pa + length <= POOL_PA + len(self.pool)
        return self.pool[pa - POOL_PA : pa - POOL_PA + length]

    def reserve(self) -> tuple[int, memoryview]:
        """Reserves a buffer that must be there: its head, and where the payload goes."""
        head, place, capacity = self.send.reserve()
        assert 0 <= head < self.num
        return head, self.at(place, capacity)

    def build(self, payload: bytes) -> int:
        """Reserves a buffer and writes a payload into it."""
        head, room = self.reserve()
        room[: len(payload)] = payload
        return head

    def break_ring(self, victim: MessageRing) -> None:
        """As the other side: publishes an index that cannot be."""
        layout = self.layout
        driver = victim.queue.role is Role.DRIVER
        at = layout.used_offset if driver else layout.available_offset
        struct.pack_into("<H", self.ring, at + 2, self.u16(at + 2) + 0x7FFF & 0xFFFF)

    def u16(self, offset: int) -> int:
        return int(struct.unpack_from("<H", self.ring, offset)[0])

    def offered(self) -> list[int]:
        """The heads that the driver made available last, oldest first, at most `num`."""
        at = self.layout.available_offset
        index = self.u16(at + 2)
        count = min(index, self.num)
        return [self.u16(at + 4 + 2 * ((index - count + i) % self.num)) for i in range(count)]

    def used(self) -> list[tuple[int, int]]:
        """What the device gave back last (head, length), oldest first, at most `num`."""
        at = self.layout.used_offset
        index = self.u16(at + 2)
        count = min(index, self.num)
        return [
            struct.unpack_from("<II", self.ring, at + 4 + 8 * ((index - count + i) % self.num))
            for i in range(count)
        ]

    def use(self, head: int, length: int) -> None:
        """As a device by hand: gives one buffer back, or a message."""
        at = self.layout.used_offset
        index = self.u16(at + 2)
        struct.pack_into("<II", self.ring, at + 4 + 8 * (index % self.num), head, length)
        struct.pack_into("<H", self.ring, at + 2, (index + 1) & 0xFFFF)

    def offer(self, head: int, *descriptors: tuple[int, int, int, int]) -> None:
        """As a driver by hand: a chain, given as descriptors from `head` on."""
        for i, descriptor in enumerate(descriptors):
            struct.pack_into("<QIHH", self.ring, 16 * (head + i), *descriptor)
        at = self.layout.available_offset
        index = self.u16(at + 2)
        struct.pack_into("<H", self.ring, at + 4 + 2 * (index % self.num), head)
        struct.pack_into("<H", self.ring, at + 2, (index + 1) & 0xFFFF)


@contextlib.contextmanager
def link(
    sender: Role = Role.DRIVER,
    num: int = 8,
    size: int = 512,
    *,
    told: int | None = None,
    event_idx: bool = False,
) -> Iterator[Link]:
    """`told` is the buffer size that the device was told of."""
    made = Link(sender, num, size, size if told is None else told, event_idx)
    try:
        yield made
    finally:
        made.close()


def flat(arrivals: Sequence[Arrival]) -> list[tuple[int, int, bytes]]:
    """The messages of some arrivals: source, destination, payload."""
    for arrival in arrivals:
        assert arrival.messages
        if arrival.kept == IN_PLACE:
            assert arrival.messages[0].payload == b""
        else:
            assert {len(message.payload) for message in arrival.messages} == {arrival.length}
        assert arrival.kept == RETURNED or len(arrival.messages) == 1
    return [(m.source, a.destination, m.payload) for a in arrivals for m in a.messages]


def send_many(
    ring: MessageRing,
    messages: Sequence[bytes],
    source: int = SRC,
    destination: int = DST,
    done: int = 0,
) -> tuple[int, bool]:
    offset = sum(map(len, messages[:done]))
    return ring.send_many(
        source, destination, b"".join(messages), encode_lengths(messages), done, offset
    )


def payloads(ring: MessageRing) -> list[bytes]:
    """Takes everything there is."""
    found = []
    more = True
    while more:
        arrivals, _, more = ring.receive()
        found += [payload for _, _, payload in flat(arrivals)]
    return found


# Messages.


@BOTH_WAYS
@BOTH_WISHES
@pytest.mark.parametrize("size", [HEADER_SIZE + 1, 64, 496, 512, 4096, MAX_BUFFER_SIZE])
def test_sizes(sender: Role, event_idx: bool, size: int) -> None:
    limit = size - HEADER_SIZE
    with link(sender, 4, size, event_idx=event_idx) as one:
        assert one.send.payload_limit == limit
        for length in sorted({0, 1, limit - 1, limit}):
            payload = bytes(i * 7 % 251 for i in range(length))
            assert one.send.send(SRC, DST, payload) == 1
            [arrival], _, more = one.receive.receive()
            assert arrival[:4] == (DST, [Message(payload, SRC)], length, RETURNED)
            assert not more
        before = bytes(one.ring)
        for length in (limit + 1, 0x10000, 0x1_0010):
            assert one.send.send(SRC, DST, bytes(length)) == SMALL_BUFFER
        assert bytes(one.ring) == before, "refused, and nothing was changed"
        assert one.receive.receive() == ([], False, False)


@BOTH_WAYS
def test_what_is_in_the_buffer(sender: Role) -> None:
    with link(sender) as one:
        one.pool[:] = b"\xee" * len(one.pool)
        one.send.send(SRC, DST, b"hello")
        expected = HEADER.pack(SRC, DST, 0, 5, 0) + b"hello"
        assert bytes(one.buffer(0)) == expected + b"\xee" * (512 - len(expected))
        # A driver lends the whole buffer, a device says that it filled the whole buffer:
        # an OpenAMP peer takes either for the buffer's size.
        assert struct.unpack_from("<I", one.ring, 8) == (512,)
        if sender is Role.DEVICE:
            assert struct.unpack_from("<II", one.ring, one.layout.used_offset + 4) == (0, 512)
        else:
            one.receive.receive()
            assert struct.unpack_from("<II", one.ring, one.layout.used_offset + 4) == (0, 512)


@pytest.mark.parametrize(("to_device", "to_driver"), [(64, 65536), (65536, 64), (100, 3000)])
def test_each_direction_has_its_own_size(to_device: int, to_driver: int) -> None:
    with (
        link(Role.DRIVER, 4, to_device) as down,
        link(Role.DEVICE, 4, to_driver) as up,
    ):
        for _ in range(10):
            request = bytes(to_device - HEADER_SIZE)
            assert down.send.send(1, 2, request) == 1
            assert payloads(down.receive) == [request]
            reply = b"\xff" * (to_driver - HEADER_SIZE)
            assert up.send.send(2, 1, reply) == 1
            assert payloads(up.receive) == [reply]


@BOTH_WAYS
@BOTH_WISHES
@pytest.mark.parametrize("num", [1, 2, 4, 256])
def test_in_order_past_index_65535(sender: Role, event_idx: bool, num: int) -> None:
    """As many as fit, then all taken: over and over, while kicks are honoured both ways."""
    rng = random.Random(num)
    with link(sender, num, 64, event_idx=event_idx) as one:
        sent = got = 0
        kicked = False
        while got < 66_000:
            for _ in range(rng.randint(1, 2 * num)):
                result = one.send.send(1, 2, sent.to_bytes(4, "little"))
                if result == NO_BUFFER:
                    assert sent - got == num
                    break
                kicked |= result == 1
                sent += 1
            # Receives only when it was kicked: a lost wake-up would end the progress.
            assert kicked
            kicked = False
            more = True
            while more:
                arrivals, _, more = one.receive.receive()
                for _, _, payload in flat(arrivals):
                    assert payload == got.to_bytes(4, "little")
                    got += 1
            assert got == sent
            if num < 256 and got > 3000:
                break
        assert one.receive.bad_length == 0


@BOTH_WISHES
def test_a_drain_as_long_as_one_call_still_ends_in_a_wish(event_idx: bool) -> None:
    """The call that finds nothing more renews the wish, whatever the calls before it did."""
    for num in (1, 2, 4, 64, 128):
        for count in {1, min(num, 3), min(num, 4), num}:
            for sender in Role:
                with link(sender, num, 64, event_idx=event_idx) as one:
                    for _ in range(3):
                        for _ in range(count):
                            assert one.send.send(1, 2, b"") >= 0
                        assert len(payloads(one.receive)) == count
                        assert one.send.send(1, 2, b"") == 1, "or nobody would come and look"
                        assert len(payloads(one.receive)) == 1


@BOTH_WISHES
def test_a_wish_that_was_renewed_within_a_call_lapses_too(event_idx: bool) -> None:
    """The other side goes on sending while the ring is drained, until a call comes back full."""
    with link(Role.DRIVER, 256, 64, event_idx=event_idx) as one:
        for count in (10, BATCH, BATCH - 1, 2 * BATCH, 5):
            for _ in range(count):
                assert one.send.send(1, 2, b"") >= 0
            arrivals, _, more = one.receive.receive()
            assert len(flat(arrivals)) == min(count, BATCH)
            for _ in range(3):
                one.send.send(1, 2, b"")
            assert more or one.receive.queue.pending
            payloads(one.receive)
            assert one.send.send(1, 2, b"") == 1
            payloads(one.receive)


@BOTH_WAYS
def test_a_batch_is_bounded(sender: Role) -> None:
    with link(sender, 128, 64) as one:
        for _ in range(BATCH + 1):
            one.send.send(1, 2, b"x")
        arrivals, _, more = one.receive.receive()
        assert (len(flat(arrivals)), more) == (BATCH, True)
        arrivals, _, more = one.receive.receive()
        assert (len(flat(arrivals)), more) == (1, False)


@BOTH_WISHES
def test_kicks_are_asked_off_while_a_flood_is_drained(event_idx: bool) -> None:
    with link(Role.DRIVER, 256, 64, event_idx=event_idx) as one:
        for _ in range(BATCH):
            one.send.send(1, 2, b"x")
        *_, more = one.receive.receive()
        assert more, "full, so it must be called again before anyone sleeps"
        assert one.send.send(1, 2, b"x") == 0, "no kick: the other side will look again"
        assert payloads(one.receive) == [b"x"]
        assert one.send.send(1, 2, b"x") == 1


@BOTH_WISHES
def test_returned_buffers_kick_only_who_waits_for_one(event_idx: bool) -> None:
    with link(Role.DRIVER, 2, 64, event_idx=event_idx) as one:
        for _ in range(3):
            assert one.send.send(1, 2, b"x") == 1
            assert one.send.send(1, 2, b"x") >= 0
            assert one.send.send(1, 2, b"x") == NO_BUFFER
            assert not one.send.want_buffer()
            arrivals, kick, _ = one.receive.receive()
            assert (len(flat(arrivals)), kick) == (2, True)
            assert one.send.want_buffer()
            one.send.queue.notify_off()
            one.send.send(1, 2, b"x")
            assert one.receive.receive()[1] is False
            payloads(one.receive)


@BOTH_WISHES
def test_a_device_waits_for_a_buffer(event_idx: bool) -> None:
    with link(Role.DEVICE, 2, 64, event_idx=event_idx) as one:
        assert one.send.want_buffer(), "two are there"
        assert one.send.send(1, 2, b"x") == 1
        assert one.send.send(1, 2, b"x") >= 0
        assert one.send.send(1, 2, b"x") == NO_BUFFER
        assert not one.send.want_buffer()
        assert one.receive.receive()[1] is True
        assert one.send.want_buffer()


def test_want_buffer_knows_of_those_never_used() -> None:
    with link(Role.DRIVER, 2) as one:
        assert one.send.want_buffer()
        one.send.send(1, 2, b"")
        assert one.send.want_buffer()
        one.send.send(1, 2, b"")
        assert not one.send.want_buffer()


def test_few_buffers_serve_where_few_are_needed() -> None:
    with link(Role.DRIVER, 8) as one:
        for _ in range(20):
            one.send.send(1, 2, b"")
            assert payloads(one.receive) == [b""]
        assert set(one.offered()) == {0}


# Many in one call.


LENGTHS = [0, 1, 7, 8, 9, 15, 16, 17, 47, 48, 0, 3]


@BOTH_WAYS
@BOTH_WISHES
def test_many_in_one_call(sender: Role, event_idx: bool) -> None:
    messages = [bytes([i]) * length for i, length in enumerate(LENGTHS)]
    with link(sender, 16, 64, event_idx=event_idx) as one, link(sender, 16, 64) as single:
        assert send_many(one.send, messages) == (len(messages), True)
        for message in messages:
            single.send.send(SRC, DST, message)
        assert bytes(one.pool) == bytes(single.pool), "they lie there as if sent one by one"
        assert flat(one.receive.receive()[0]) == [(SRC, DST, message) for message in messages]


@BOTH_WAYS
@BOTH_WISHES
def test_a_batch_kicks_once(sender: Role, event_idx: bool) -> None:
    with link(sender, 16, 64, event_idx=event_idx) as one:
        assert send_many(one.send, [b"x"] * 5) == (5, True)
        assert one.send.kicks == (1, 0)
        # Nobody looked meanwhile: the wish for the next entry was answered, a flag still stands.
        assert send_many(one.send, [b"x"] * 5) == (5, not event_idx)
        assert one.send.kicks == ((1, 1) if event_idx else (2, 0))
        assert len(payloads(one.receive)) == 10
        assert send_many(one.send, [b"x"] * 5) == (5, True)


@BOTH_WAYS
@pytest.mark.parametrize("num", [1, 4])
def test_many_go_as_far_as_there_are_buffers(sender: Role, num: int) -> None:
    messages = [bytes([i]) * i for i in range(11)]
    with link(sender, num, 64) as one:
        done = 0
        received = []
        while done < len(messages):
            sent, _ = send_many(one.send, messages, done=done)
            assert sent == min(num, len(messages) - done)
            done += sent
            before = bytes(one.ring)
            if sent == num:
                assert send_many(one.send, messages) == (NO_BUFFER, False)
                assert bytes(one.ring) == before
            received += payloads(one.receive)
        assert received == messages
        assert one.send.messages == 11 and one.send.payload_bytes == 55


@BOTH_WAYS
@pytest.mark.parametrize("length", [49, 64, 0x1_0000, 0x1_0010])
def test_many_end_at_one_that_is_too_long(sender: Role, length: int) -> None:
    messages = [b"one", b"two", bytes(length), b"four"]
    with link(sender, 8, 64) as one:
        assert send_many(one.send, messages) == (2, True)
        before = bytes(one.ring), bytes(one.pool)
        assert send_many(one.send, messages, done=2) == (SMALL_BUFFER, False)
        assert (bytes(one.ring), bytes(one.pool)) == before
        assert send_many(one.send, messages, done=3)[0] == 1
        assert payloads(one.receive) == [b"one", b"two", b"four"]
        assert (one.send.messages, one.send.payload_bytes) == (3, 10)


def test_nothing_to_send() -> None:
    for sender in Role:
        with link(sender) as one:
            before = bytes(one.ring)
            assert send_many(one.send, []) == (0, False)
            assert send_many(one.send, [b"sent"], done=1) == (0, False)
            assert bytes(one.ring) == before


def test_more_than_a_result_can_count() -> None:
    for sender in Role:
        with link(sender, 4, 64) as one:
            assert send_many(one.send, [b""] * 70_000) == (4, True)


@BOTH_WAYS
@BOTH_WISHES
def test_every_way_of_sending_past_index_65535(sender: Role, event_idx: bool) -> None:
    """Also with buffers that are kept, reserved and cancelled all the time; kicks are honoured."""
    rng = random.Random(3)
    with link(sender, 128, 64, event_idx=event_idx) as one:
        one.receive.keep({1: KEPT, 3: IN_PLACE})
        sent = got = kept = 0
        while got < 66_000:
            kicked = False
            for _ in range(rng.randint(1, 4)):
                destination = rng.randint(0, 3)
                messages = [(sent + i).to_bytes(4, "little") for i in range(rng.randint(1, 40))]
                count, kick = send_many(one.send, messages, 1, destination)
                sent += max(count, 0)
                kicked |= kick
                if count != len(messages):
                    assert sent - got == 128
                    break
                if not one.send.has_buffer():
                    continue
                head = one.build(sent.to_bytes(4, "little"))
                if rng.random() < 0.5:
                    one.send.cancel(head)
                else:
                    kicked |= one.send.commit(head, 1, destination, 4)
                    sent += 1
            assert kicked
            more = True
            while more:
                arrivals, _, more = one.receive.receive()
                for destination, messages_, length, how, head in arrivals:
                    assert (length, how) == (4, (RETURNED, KEPT, RETURNED, IN_PLACE)[destination])
                    place = one.receive.place(head)
                    for payload, _ in messages_:
                        held = payload if how != IN_PLACE else bytes(one.at(place, 4))
                        assert held == got.to_bytes(4, "little")
                        got += 1
                held_heads = [arrival.head for arrival in arrivals if arrival.kept != RETURNED]
                kept += len(held_heads)
                one.receive.release(held_heads)
            assert got == sent
        assert one.receive.messages == one.send.messages == sent and kept > 10_000


# Reserved buffers.


@BOTH_WAYS
@BOTH_WISHES
@pytest.mark.parametrize("length", [0, 1, 47, 48])
def test_a_message_is_built_in_its_buffer(sender: Role, event_idx: bool, length: int) -> None:
    payload = bytes(range(100, 100 + length))
    with link(sender, 4, 64, event_idx=event_idx) as one:
        head, room = one.reserve()
        assert len(room) == one.send.payload_limit == 48
        room[:length] = payload
        assert one.receive.receive() == ([], False, False), "nobody sees it yet"
        assert one.send.messages == 0
        assert one.send.commit(head, SRC, DST, length) is True
        assert (
            bytes(one.buffer(head)[: 16 + length]) == HEADER.pack(SRC, DST, 0, length, 0) + payload
        )
        if sender is Role.DRIVER:
            assert one.offered() == [head]
            described = struct.unpack_from("<QIH", one.ring, 16 * head)
            assert described == (POOL_PA + 64 * head, 64, 0)
        else:
            assert one.used() == [(head, 64)], "the capacity, like an ordinary send"
        assert flat(one.receive.receive()[0]) == [(SRC, DST, payload)]
        assert (one.send.messages, one.send.payload_bytes, one.send.kicks) == (1, length, (1, 0))


@BOTH_WAYS
def test_all_buffers_reserved_and_sent_in_any_order(sender: Role) -> None:
    rng = random.Random(2)
    with link(sender, 16, 64) as one:
        for _ in range(20):
            heads = [one.build(bytes([i])) for i in range(16)]
            assert sorted(heads) == list(range(16))
            assert one.send.reserve()[0] == NO_BUFFER
            assert one.send.send(1, 2, b"") == NO_BUFFER
            assert not one.send.has_buffer() and not one.send.want_buffer()
            one.send.queue.notify_off()
            order = rng.sample(range(16), 16)
            for i in order:
                one.send.commit(heads[i], 1, 2, 1)
            assert payloads(one.receive) == [bytes([i]) for i in order]


@BOTH_WAYS
def test_reserved_and_ordinary_messages_go_in_the_order_they_are_sent(sender: Role) -> None:
    with link(sender, 8, 64) as one:
        first = one.build(b"first")
        one.send.send(1, 2, b"1")
        second = one.build(b"second")
        assert send_many(one.send, [b"2", b"3"])[0] == 2
        one.send.commit(second, 1, 2, 6)
        one.send.send(1, 2, b"4")
        one.send.commit(first, 1, 2, 5)
        assert payloads(one.receive) == [b"1", b"2", b"3", b"second", b"4", b"first"]


@BOTH_WAYS
def test_a_reserved_buffer_is_nobody_elses(sender: Role) -> None:
    with link(sender, 4, 64) as one:
        head = one.build(b"mine")
        for i in range(20):
            sent, _ = send_many(one.send, [bytes([i])] * 4)
            assert sent == 3
            assert payloads(one.receive) == [bytes([i])] * 3
            other, room = one.reserve()
            assert other != head
            room[:] = b"\xff" * len(room)
            one.send.cancel(other)
        one.send.commit(head, 1, 2, 4)
        assert payloads(one.receive) == [b"mine"]


@BOTH_WAYS
@pytest.mark.parametrize("num", [1, 2, 8])
def test_a_cancelled_buffer_is_free_again(sender: Role, num: int) -> None:
    with link(sender, num, 64) as one:
        for turn in range(3):
            before = bytes(one.ring[16 * num :])
            heads = [one.build(b"no") for _ in range(num)]
            for head in heads:
                one.send.cancel(head)
                assert one.send.has_buffer() and one.send.want_buffer()
            one.send.queue.notify_off()
            assert bytes(one.ring[16 * num :]) == before, "the other side is told nothing"
            assert sorted(one.build(b"no") for _ in range(num)) == list(range(num))
            assert one.send.reserve()[0] == NO_BUFFER
            for head in heads:
                one.send.cancel(head)
            # Sending uses each of them, whichever way.
            assert one.send.send(1, 2, bytes([turn])) >= 0
            assert send_many(one.send, [b"y"] * num)[0] == (num - 1 or NO_BUFFER)
            assert one.send.send(1, 2, b"x") == NO_BUFFER
            assert payloads(one.receive) == [bytes([turn])] + [b"y"] * (num - 1)
        assert one.send.messages == 3 * num


def test_a_cancelled_chain_is_free_as_a_whole() -> None:
    """One of two descriptors, from a driver that was here before."""
    with link(Role.DRIVER, 4, 64) as one:
        one.offer(0, (POOL_PA, 64, 1, 1), (POOL_PA + 64, 64, 0, 0))
        one.use(0, 0)
        one.send.queue.attach(0)
        head, _ = one.reserve()
        assert head == 0
        one.send.cancel(head)
        assert sorted(one.reserve()[0] for _ in range(4)) == [0, 1, 2, 3]
        assert one.send.reserve()[0] == NO_BUFFER


@BOTH_WAYS
def test_what_is_not_reserved(sender: Role) -> None:
    with link(sender, 4, 64) as one:
        sent, cancelled, kept = (one.build(b"x") for _ in range(3))
        one.send.commit(sent, 1, 2, 1)
        one.send.cancel(cancelled)
        never = ({0, 1, 2, 3} - {sent, cancelled, kept}).pop()
        before = bytes(one.ring)
        for head in (sent, cancelled, never, 4, 0xFFFF):
            with pytest.raises(ValueError, match=f"buffer {head} is not reserved"):
                one.send.commit(head, 1, 2, 0)
            with pytest.raises(ValueError, match=f"buffer {head} is not reserved"):
                one.send.cancel(head)
        assert bytes(one.ring) == before
        one.receive.receive()
        with pytest.raises(ValueError, match="not reserved"):
            one.send.commit(sent, 1, 2, 0)
        one.send.commit(kept, 1, 2, 1)
        assert payloads(one.receive) == [b"x"]
        assert one.send.messages == 2
        assert len({one.reserve()[0] for _ in range(4)}) == 4, "each is free once"


@BOTH_WAYS
def test_too_long_for_a_reserved_buffer(sender: Role) -> None:
    with link(sender, 4, 64) as one:
        head = one.build(b"y" * 48)
        before = bytes(one.ring)
        for length in (49, 64, 0xFFFF, 0x1_0000, 0xFFFF_FFFF):
            with pytest.raises(ValueError, match=f"not reserved for {length} bytes"):
                one.send.commit(head, 1, 2, length)
        assert bytes(one.ring) == before and one.send.messages == 0
        one.send.commit(head, 1, 2, 48)
        assert payloads(one.receive) == [b"y" * 48]


@BOTH_WAYS
def test_the_largest_buffer_is_filled(sender: Role) -> None:
    with link(sender, 1, MAX_BUFFER_SIZE) as one:
        payload = b"z" * 0xFFFF
        one.send.commit(one.build(payload), 1, 2, 0xFFFF)
        assert payloads(one.receive) == [payload]


@pytest.mark.parametrize("lent", [16, 17, 63, 64, 65, 511, 512])
def test_a_reserved_buffer_has_what_the_driver_lent(lent: int) -> None:
    with link(Role.DEVICE, 4, 512, told=64) as one:
        struct.pack_into("<I", one.ring, 8, lent)
        limit = min(lent, 64) - HEADER_SIZE
        head, room = one.reserve()
        assert len(room) == limit
        room[:] = b"r" * limit
        with pytest.raises(ValueError, match="not reserved for"):
            one.send.commit(head, 1, 2, limit + 1)
        one.send.commit(head, 1, 2, limit)
        assert one.used() == [(0, lent)]
        assert payloads(one.receive) == [b"r" * limit]


def test_a_cancelled_buffer_is_as_small_as_it_was() -> None:
    with link(Role.DEVICE, 4, 512) as one:
        struct.pack_into("<I", one.ring, 8, 64)
        one.send.cancel(one.build(b""))
        before = bytes(one.ring)
        for _ in range(2):
            assert one.send.send(1, 2, bytes(49)) == SMALL_BUFFER
            assert send_many(one.send, [bytes(49)]) == (SMALL_BUFFER, False)
        assert bytes(one.ring) == before
        assert one.send.send(1, 2, b"s" * 48) == 1
        assert one.send.send(1, 2, b"t" * 496) == 1
        assert payloads(one.receive) == [b"s" * 48, b"t" * 496]


@pytest.mark.parametrize(
    "descriptor",
    [(POOL_PA, 15, 2, 0), (POOL_PA, 0, 2, 0), (POOL_PA, 512, 0, 0), (POOL_PA, 300, 3, 1)],
    ids=["no header", "empty", "readable", "in pieces"],
)
def test_a_chain_that_cannot_be_reserved(descriptor: tuple[int, int, int, int]) -> None:
    with link(Role.DEVICE, 4, 512) as one:
        struct.pack_into("<QIHH", one.ring, 0, *descriptor)
        before = bytes(one.ring)
        for _ in range(3):
            assert one.send.reserve() == (SMALL_BUFFER, 0, 0)
        assert bytes(one.ring) == before
        struct.pack_into("<QIHH", one.ring, 0, POOL_PA, 512, 2, 0)
        assert [one.reserve()[0] for _ in range(4)] == [0, 1, 2, 3], "it was not lost"


def test_a_chain_in_pieces_still_serves_for_sending() -> None:
    with link(Role.DEVICE, 4, 512) as one:
        struct.pack_into("<QIHH", one.ring, 0, POOL_PA, 300, 3, 1)
        assert one.send.reserve()[0] == SMALL_BUFFER
        assert one.send.send(1, 2, b"pieces") == 1
        assert one.used() == [(0, 812)]


@BOTH_WAYS
def test_reserved_when_the_ring_breaks(sender: Role) -> None:
    with link(sender, 1, 64) as one:
        head = one.build(b"x")
        one.break_ring(one.send)
        for _ in range(2):
            with pytest.raises(VirtqueueError, match="index jumped"):
                one.send.reserve()
            with pytest.raises(VirtqueueError, match="index jumped"):
                one.send.commit(head, 1, 2, 1)
            with pytest.raises(VirtqueueError, match="index jumped"):
                send_many(one.send, [b"x"])
            assert one.send.has_buffer(), "sending will tell"
        before = bytes(one.ring)
        one.send.cancel(head)
        with pytest.raises(VirtqueueError, match="index jumped"):
            one.send.send(1, 2, b"x")
        assert bytes(one.ring) == before and one.send.messages == 0


@BOTH_WAYS
def test_has_buffer(sender: Role) -> None:
    with link(sender, 2, 64) as one:
        for _ in range(3):
            assert one.send.has_buffer()
            one.send.send(1, 2, b"")
            assert one.send.has_buffer()
            one.send.send(1, 2, b"")
            assert not one.send.has_buffer()
            payloads(one.receive)
        assert one.send.send(1, 2, b"") >= 0
        one.reserve()
        assert not one.send.has_buffer()


# Buffers that are held.


@BOTH_WAYS
@BOTH_WISHES
def test_held_and_released_in_any_order(sender: Role, event_idx: bool) -> None:
    rng = random.Random(1)
    with link(sender, 16, 64, event_idx=event_idx) as one:
        held: list[int] = []
        sent = got = 0
        for _ in range(2000):
            for _ in range(rng.randint(0, 5)):
                if one.send.send(1, 2, sent.to_bytes(4, "little")) == NO_BUFFER:
                    assert len(held) + sent - got == 16
                    break
                sent += 1
            for arrival in one.receive.receive(give_back=False)[0]:
                assert arrival.messages == [Message(got.to_bytes(4, "little"), 1)]
                assert arrival.kept == KEPT and arrival.head not in held
                held.append(arrival.head)
                got += 1
            rng.shuffle(held)
            count = rng.randint(0, len(held))
            one.receive.release(held[:count])
            del held[:count]
        assert sent > 3000


@BOTH_WAYS
def test_a_held_buffer_keeps_its_bytes(sender: Role) -> None:
    with link(sender, 4, 64) as one:
        one.send.send(1, 2, b"keep")
        [(_, _, _, _, head)], _, _ = one.receive.receive(give_back=False)
        for i in range(20):
            assert one.send.send(1, 2, bytes([i])) >= 0
            assert len(payloads(one.receive)) == 1
        assert bytes(one.buffer(head)[HEADER_SIZE : HEADER_SIZE + 4]) == b"keep"
        one.receive.release([head])


@BOTH_WAYS
def test_only_what_is_held_can_be_released(sender: Role) -> None:
    with link(sender, 4, 64) as one:
        for _ in range(3):
            one.send.send(1, 2, b"x")
        arrivals, _, _ = one.receive.receive(give_back=False)
        first, second, third = (arrival.head for arrival in arrivals)
        free = ({0, 1, 2, 3} - {first, second, third}).pop()
        before = bytes(one.ring)
        for wrong in ([free], [first, free], [-1], [4], [65536], [first, first], [first, 2**40]):
            with pytest.raises(ValueError, match="not held"):
                one.receive.release(wrong)
            assert bytes(one.ring) == before, "not even the first was released"
        one.receive.release([second])
        with pytest.raises(ValueError, match="not held"):
            one.receive.release([second])
        assert one.receive.release([]) is False
        one.receive.release([third, first])


def test_one_message_that_was_given_back_cannot_be_released() -> None:
    for sender in Role:
        with link(sender) as one:
            one.send.send(1, 2, b"x")
            assert payloads(one.receive) == [b"x"]
            with pytest.raises(ValueError, match="not held"):
                one.receive.release([0])


def test_a_device_returns_buffers_in_any_order() -> None:
    with link(Role.DRIVER, 4, 64) as one:
        for i in range(4):
            one.send.send(1, 2, bytes([i]))
        for head in (2, 0, 3):
            one.use(head, 64)
        used = []
        while one.send.send(1, 2, b"again") >= 0:
            at = one.layout.available_offset
            index = one.u16(at + 2) - 1
            used.append(one.u16(at + 4 + 2 * (index % 4)))
        assert used == [2, 0, 3]


# Destinations whose messages keep their buffers.


@BOTH_WAYS
@BOTH_WISHES
def test_each_destination_has_its_way(sender: Role, event_idx: bool) -> None:
    with link(sender, 16, 64, event_idx=event_idx) as one:
        one.receive.keep({7: IN_PLACE, 5: KEPT, 0xFFFF_FFFE: IN_PLACE})
        sent = [(1, 5, b"kept"), (2, 6, b"returned"), (3, 7, b"in place"), (4, 5, b""),
                (5, 0xFFFF_FFFE, b"last"), (6, 0xFFFF_FFFF, b"no"), (7, 0, b"no")]  # fmt: skip
        for message in sent:
            one.send.send(*message)
        arrivals, _, more = one.receive.receive()
        assert not more
        ways = [KEPT, RETURNED, IN_PLACE, KEPT, IN_PLACE, RETURNED, RETURNED]
        assert [arrival.kept for arrival in arrivals] == ways
        assert [arrival.length for arrival in arrivals] == [len(message[2]) for message in sent]
        for arrival, (source, destination, payload) in zip(arrivals, sent, strict=True):
            copied = b"" if arrival.kept == IN_PLACE else payload
            assert flat([arrival]) == [(source, destination, copied)]
            if arrival.kept != RETURNED:
                place = one.receive.place(arrival.head)
                assert place == POOL_PA + 64 * arrival.head + HEADER_SIZE
                assert bytes(one.at(place, arrival.length)) == payload
        assert one.receive.messages == 7
        assert one.receive.payload_bytes == sum(len(message[2]) for message in sent)
        kept = [arrival.head for arrival in arrivals if arrival.kept != RETURNED]
        assert len(set(kept)) == 4
        # The hostile index is judged by this number: what a driver lent, or a device has taken.
        out = (16, 12) if sender is Role.DEVICE else (0, 4)
        assert one.receive.queue.snapshot().outstanding == out[1]
        # The other side has all but those four.
        assert send_many(one.send, [b""] * 20, destination=6)[0] == 12
        payloads(one.receive)
        one.receive.release(kept[::-1])
        assert one.receive.queue.snapshot().outstanding == out[0]
        assert send_many(one.send, [b""] * 20, destination=6)[0] == 16


def test_the_list_is_searched_right() -> None:
    """Every list of some of these destinations, and messages to all of them."""
    candidates = [0, 1, 2, 0x7FFF_FFFF, 0xFFFF_FFFF]
    with link(Role.DRIVER, 8, 64) as one:
        for chosen in range(32):
            listed = {
                destination: (KEPT, IN_PLACE)[i % 2]
                for i, destination in enumerate(candidates)
                if chosen >> i & 1
            }
            one.receive.keep(dict(sorted(listed.items(), key=lambda item: -item[0])))
            for destination in candidates:
                one.send.send(1, destination, b"x")
            arrivals, _, _ = one.receive.receive()
            assert [a.destination for a in arrivals for _ in a.messages] == candidates
            for arrival in arrivals:
                assert arrival.kept == listed.get(arrival.destination, RETURNED)
            one.receive.release([a.head for a in arrivals if a.kept != RETURNED])


@BOTH_WAYS
def test_what_is_in_place_stays_until_it_is_released(sender: Role) -> None:
    with link(sender, 4, 64) as one:
        one.receive.keep({2: IN_PLACE})
        one.send.send(1, 2, b"look")
        [arrival], _, _ = one.receive.receive()
        view = one.at(one.receive.place(arrival.head), arrival.length)
        for i in range(20):
            assert send_many(one.send, [bytes([i]) * 4] * 4, destination=3)[0] == 3
            assert len(payloads(one.receive)) == 3
            assert bytes(view) == b"look"
        one.receive.release([arrival.head])
        assert send_many(one.send, [b"new!"] * 4, destination=3)[0] == 4
        assert bytes(view) == b"new!", "it was used again"


@BOTH_WAYS
def test_all_kept_then_a_kick_for_who_waits(sender: Role) -> None:
    with link(sender, 4, 64) as one:
        one.receive.keep({DST: IN_PLACE})
        assert send_many(one.send, [b"x"] * 4)[0] == 4
        arrivals, kick, _ = one.receive.receive()
        assert not kick and not one.send.want_buffer()
        assert one.receive.release([arrivals[0].head]) is True
        assert one.send.want_buffer()


@BOTH_WAYS
def test_without_giving_back_all_are_copied_and_kept(sender: Role) -> None:
    with link(sender, 4, 64) as one:
        one.receive.keep({1: IN_PLACE})
        one.send.send(9, 1, b"one")
        one.send.send(9, 2, b"two")
        arrivals, _, _ = one.receive.receive(give_back=False)
        assert [arrival.kept for arrival in arrivals] == [KEPT, KEPT]
        assert flat(arrivals) == [(9, 1, b"one"), (9, 2, b"two")]
        one.receive.release([arrival.head for arrival in arrivals])


def test_the_list_can_change_and_end() -> None:
    for sender in Role:
        with link(sender, 4, 64) as one:
            for listed, way in (({2: KEPT}, KEPT), ({2: IN_PLACE}, IN_PLACE), ({}, RETURNED)):
                one.receive.keep(listed)
                one.send.send(1, 2, b"x")
                [arrival], _, _ = one.receive.receive()
                assert arrival.kept == way
                if way:
                    one.receive.release([arrival.head])


@pytest.mark.parametrize("way", [IN_PLACE, KEPT])
def test_in_place_needs_one_piece(way: int) -> None:
    with link(Role.DRIVER, 4) as one:  # but the test plays the driver
        one.receive.keep({DST: way})
        one.pool[:21] = HEADER.pack(SRC, DST, 0, 5, 0) + b"abcde"
        one.offer(0, (POOL_PA, 10, 1, 1), (POOL_PA + 10, 11, 0, 0))
        [arrival], _, _ = one.receive.receive()
        assert (arrival.kept, arrival.messages) == (KEPT, [Message(b"abcde", SRC)])
        assert one.used() == []
        one.receive.release([arrival.head])
        assert one.used() == [(0, 21)]


@BOTH_WAYS
@pytest.mark.parametrize("give_back", [True, False])
def test_a_source_that_means_any_is_dropped(sender: Role, give_back: bool) -> None:
    """Its buffer goes back at once, also where others are kept: nobody would release it."""
    with link(sender, 8, 64) as one:
        one.receive.keep({2: KEPT, 3: IN_PLACE})
        for destination in (1, 2, 3):
            one.send.send(ANY, destination, b"dropped")
            one.send.send(4, destination, b"taken")
        one.send.send(ANY, 1, b"lie")
        one.send.send(ANY - 1, 1, b"large")
        struct.pack_into("<H", one.buffer(6), 12, 49)
        arrivals, _, _ = one.receive.receive(give_back=give_back)
        assert [m.source for a in arrivals for m in a.messages] == [4, 4, 4, ANY - 1]
        assert (one.receive.bad_source, one.receive.bad_length) == (3, 1)
        assert (one.receive.messages, one.receive.payload_bytes) == (4, 20)
        held = [arrival.head for arrival in arrivals if arrival.kept]
        assert len(held) == (2 if give_back else 4)
        assert send_many(one.send, [b""] * 9, destination=1)[0] == 8 - len(held)
        payloads(one.receive)
        one.receive.release(held)


@BOTH_WAYS
def test_a_batch_of_nothing_but_bad_sources(sender: Role) -> None:
    with link(sender, 4, 64) as one:
        assert send_many(one.send, [b"x"] * 4, ANY)[0] == 4
        assert one.receive.receive()[0] == []
        assert one.receive.bad_source == 4 and one.receive.messages == 0
        assert send_many(one.send, [b"x"] * 5)[0] == 4


# The same, however it is received.


def take(ring: MessageRing) -> list[Arrival]:
    """Like `receive`, through `take`: what is alike comes there as one."""
    bits, destination, length, messages, arrivals = ring.take(0, None)
    assert not bits & (POLLED | POLL_HIT)
    if destination == MIXED:
        assert (length, messages) == (0, [])
        return arrivals
    assert arrivals == [] and all(type(message) is Message for message in messages)
    if destination == SEVERAL:
        assert len(set(ring.destinations)) > 1
        return [
            Arrival(each, [message], length, RETURNED, 0)
            for each, message in zip(ring.destinations, messages, strict=True)
        ]
    return [Arrival(destination, messages, length, RETURNED, 0)]


def look(one: Link, arrivals: Sequence[Arrival]) -> list[tuple[int, int, bytes, int]]:
    """Source, destination, payload wherever it is, and what became of the buffer."""
    flat(arrivals)
    return [
        (
            message.source,
            arrival.destination,
            bytes(one.at(one.receive.place(arrival.head), arrival.length))
            if arrival.kept == IN_PLACE
            else message.payload,
            arrival.kept,
        )
        for arrival in arrivals
        for message in arrival.messages
    ]


def heads(arrivals: Sequence[Arrival]) -> list[int]:
    return [arrival.head for arrival in arrivals if arrival.kept != RETURNED]


@PROPERTY
@given(
    st.sampled_from(Role),
    st.booleans(),
    st.dictionaries(st.integers(1, 3), st.sampled_from([KEPT, IN_PLACE]), max_size=2),
    st.lists(
        st.tuples(
            st.sampled_from([1, 2, 3, ANY]),
            st.sampled_from([1, 1, 1, 2, 3]),
            st.sampled_from([b"", b"alike", b"alike", b"other", b"longer " * 5]),
        ),
        max_size=20,
    ),
)
def test_a_batch_is_what_its_messages_are_one_by_one(
    sender: Role, event_idx: bool, keep: dict[int, int], sent: list[tuple[int, int, bytes]]
) -> None:
    with (
        link(sender, 32, 64, event_idx=event_idx) as batch,
        link(sender, 32, 64, event_idx=event_idx) as taken,
        link(sender, 32, 64, event_idx=event_idx) as single,
    ):
        links = (batch, taken, single)
        for one in links:
            one.receive.keep(keep)
        found = []
        for message in sent:
            assert single.send.send(*message) >= 0
            arrivals, _, _ = single.receive.receive()
            found += look(single, arrivals)
            single.receive.release(heads(arrivals))
        for (source, destination), run in itertools.groupby(sent, lambda message: message[:2]):
            payloads_ = [payload for *_, payload in run]
            for one in (batch, taken):
                assert send_many(one.send, payloads_, source, destination)[0] == len(payloads_)
        together, _, _ = batch.receive.receive()
        assert look(batch, together) == found
        quick = take(taken.receive)
        assert look(taken, quick) == found
        if found and not any(keep.get(destination) for _, destination, _, _ in found):
            alike = len({(destination, len(payload)) for _, destination, payload, _ in found}) == 1
            assert len(quick) == (1 if alike else len(found))
        batch.receive.release(heads(together))
        taken.receive.release(heads(quick))
        expected = [payload for source, _, payload in sent if source != ANY]
        for one in links:
            assert one.receive.bad_source == len(sent) - len(expected)
            assert (one.receive.messages, one.send.messages) == (len(expected), len(sent))
            assert one.receive.payload_bytes == sum(map(len, expected))
            assert one.send.payload_bytes == sum(len(payload) for *_, payload in sent)
            assert send_many(one.send, [b""] * 33)[0] == 32, "every buffer is back"


@BOTH_WAYS
def test_take_says_that_returned_buffers_are_wanted(sender: Role) -> None:
    with link(sender, 2, 64) as one:
        for wanted in (True, False):
            assert send_many(one.send, [b"x"] * 2)[0] == 2
            if wanted:
                assert not one.send.want_buffer()
            else:
                one.send.queue.notify_off()
            assert bool(one.receive.take(0, None)[0] & KICK) is wanted


def test_take_of_a_broken_ring() -> None:
    for sender in Role:
        with link(sender) as one:
            one.break_ring(one.receive)
            for _ in range(2):
                with pytest.raises(VirtqueueError, match="index jumped"):
                    one.receive.take(0, None)


# What is counted, and who is told.


@BOTH_WAYS
def test_messages_and_kicks_are_counted(sender: Role) -> None:
    with link(sender, 4, 64) as one:
        assert (one.send.messages, one.send.payload_bytes, one.send.kicks) == (0, 0, (0, 0))
        assert (one.receive.messages, one.receive.kicks) == (0, (0, 0))
        one.send.send(1, 2, b"four")
        one.send.send(1, 2, bytes(49))
        assert send_many(one.send, [b"a", b"bc", bytes(49)])[0] == 2
        one.receive.queue.notify_off()
        one.send.commit(one.build(b"built"), 1, 2, 5)
        assert one.send.reserve()[0] == NO_BUFFER
        assert one.send.send(1, 2, b"") == NO_BUFFER
        assert (one.send.messages, one.send.payload_bytes, one.send.kicks) == (4, 12, (2, 1))
        assert not one.send.want_buffer()
        one.receive.receive()
        assert (one.receive.messages, one.receive.payload_bytes) == (4, 12)
        assert one.receive.kicks == (1, 0)
        one.send.queue.notify_off()
        one.send.send(1, 2, b"held")
        [arrival], _, _ = one.receive.receive(give_back=False)
        assert one.receive.kicks == (1, 0), "nothing was published"
        one.receive.release([arrival.head])
        assert one.receive.kicks == (1, 1)
        assert (one.receive.messages, one.receive.payload_bytes) == (5, 16)


@BOTH_WAYS
@BOTH_WISHES
def test_an_end_that_stays_quiet(sender: Role, event_idx: bool) -> None:
    with link(sender, 8, 64, event_idx=event_idx) as one:
        one.receive.queue.notify_off()
        for count in (1, 3, 5):
            assert send_many(one.send, [b"x"] * count) == (count, False)
            arrivals, _, more = one.receive.receive(stay_quiet=True)
            assert len(flat(arrivals)) == count and not more
            assert one.receive.queue.is_quiet
        assert one.receive.receive(stay_quiet=True) == ([], False, False)
        assert one.send.send(1, 2, b"") == 0
        assert one.receive.queue.notify_on(), "who goes to sleep looks once more"
        assert payloads(one.receive) == [b""]
        assert one.send.send(1, 2, b"") == 1
        assert take(one.receive) == [Arrival(2, [Message(b"", 1)], 0, RETURNED, 0)]
        one.receive.queue.notify_off()
        assert one.send.send(1, 2, b"") == 0, "take stays quiet too"
        one.receive.take(0, None)
        assert one.send.send(1, 2, b"") == 0
        assert one.receive.receive()[2] is False
        assert one.send.send(1, 2, b"") == 1, "an ordinary receive asked again"


@BOTH_WAYS
@BOTH_WISHES
def test_a_full_call_that_stays_quiet_says_what_is_there(sender: Role, event_idx: bool) -> None:
    with link(sender, 128, 64, event_idx=event_idx) as one:
        for count, more_quiet, more in ((BATCH, False, True), (BATCH + 1, True, True)):
            for quiet, expected in ((True, more_quiet), (False, more)):
                assert send_many(one.send, [b"x"] * count)[0] == count
                arrivals, _, told = one.receive.receive(stay_quiet=quiet)
                assert (len(flat(arrivals)), told) == (BATCH, expected)
                payloads(one.receive)


# Where the two disagree about buffers.


@pytest.mark.parametrize("lent", [HEADER_SIZE + 1, 64, 511])
def test_a_device_is_lent_smaller_buffers_than_it_was_told_of(lent: int) -> None:
    with link(Role.DEVICE, 4, lent, told=512) as one:
        limit = lent - HEADER_SIZE
        before = bytes(one.ring)
        for _ in range(3):
            assert one.send.send(1, 2, bytes(limit + 1)) == SMALL_BUFFER
        assert bytes(one.ring) == before
        # It was kept: all four still serve for what fits.
        results = [one.send.send(1, 2, bytes([i]) * limit) for i in range(5)]
        assert results[0] == 1 and results[4] == NO_BUFFER and SMALL_BUFFER not in results
        assert payloads(one.receive) == [bytes([i]) * limit for i in range(4)]


def test_a_device_gets_more_than_it_was_told_of() -> None:
    """It has no room for it: dropped, whatever the driver's buffer holds."""
    with link(Role.DRIVER, 4, 512, told=64) as one:
        for length in (49, 48, 496):
            one.send.send(1, 2, bytes(length))
        assert payloads(one.receive) == [bytes(48)]
        assert one.receive.bad_length == 2


@pytest.mark.parametrize("length", [0, 15])
def test_a_buffer_without_room_for_a_header(length: int) -> None:
    with link(Role.DEVICE, 4, 512) as one:
        struct.pack_into("<I", one.ring, 8, length)
        assert one.send.send(1, 2, b"") == SMALL_BUFFER


def test_a_readable_chain_is_not_one_to_send_with() -> None:
    with link(Role.DEVICE, 4, 512) as one:
        struct.pack_into("<H", one.ring, 12, 0)
        assert one.send.send(1, 2, b"") == SMALL_BUFFER


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([(16 + 5, 0)], b"abcde"),
        ([(16, 0), (5, 0)], b"abcde"),
        ([(7, 0), (0, 0), (12, 0), (2, 0)], b"abcde"),
        ([(1, 0)] * 7 + [(100, 0)], b"abcde"),
        ([(16 + 5, 0), (100, 2)], b"abcde"),
        ([(16 + 4, 0), (100, 2)], None),
        ([(16 + 4, 0)], None),
        ([(15, 0)], None),
        ([(0, 0)], None),
        ([(100, 2)], None),
    ],
)
def test_a_message_in_pieces(pieces: list[tuple[int, int]], expected: bytes | None) -> None:
    with link(Role.DRIVER) as one:  # but the test plays the driver
        one.pool[:21] = HEADER.pack(SRC, DST, 7, 5, 9) + b"abcde"
        at, chain = 0, []
        for i, (length, flags) in enumerate(pieces):
            last = i == len(pieces) - 1
            chain.append((POOL_PA + at, length, flags | (0 if last else 1), i + 1))
            at += length
        one.offer(0, *chain)
        arrivals, _, _ = one.receive.receive()
        assert flat(arrivals) == ([] if expected is None else [(SRC, DST, expected)])
        assert one.receive.bad_length == (expected is None)
        assert struct.unpack_from("<I", one.ring, one.layout.used_offset + 4) == (0,)
        assert one.u16(one.layout.used_offset + 2) == 1, "returned in either case"


def test_a_device_fills_a_buffer_in_pieces() -> None:
    with link(Role.DEVICE, 8, 512) as one:
        # The driver's first chain becomes three writable pieces of its own first buffer.
        for i, (at, length) in enumerate([(0, 10), (10, 10), (20, 492)]):
            flags = 2 | (1 if i < 2 else 0)
            struct.pack_into("<QIHH", one.ring, 16 * i, POOL_PA + at, length, flags, i + 1)
        assert one.send.send(SRC, DST, b"0123456789") == 1
        assert bytes(one.pool[:26]) == HEADER.pack(SRC, DST, 0, 10, 0) + b"0123456789"
        assert struct.unpack_from("<II", one.ring, one.layout.used_offset + 4) == (0, 512)


@BOTH_WAYS
@pytest.mark.parametrize("length", [497, 512, 0x7FFF, 0xFFFF])
def test_a_header_that_claims_more_than_its_buffer(sender: Role, length: int) -> None:
    with link(sender) as one:
        one.send.send(1, 2, b"lie")
        one.send.send(1, 2, b"true")
        struct.pack_into("<H", one.buffer(0), 12, length)
        arrivals, _, _ = one.receive.receive(give_back=False)
        assert flat(arrivals) == [(1, 2, b"true")]
        assert one.receive.bad_length == 1
        with pytest.raises(ValueError, match="not held"):
            one.receive.release([0])  # went back at once: nobody else would return it


@pytest.mark.parametrize("filled", [0, 15, 513, 0x8000_0000, 0xFFFF_FFFF])
def test_a_used_length_that_cannot_be(filled: int) -> None:
    with link(Role.DEVICE) as one:
        one.buffer(3)[:16] = HEADER.pack(1, 2, 0, 0, 0)
        one.use(3, filled)
        assert one.receive.receive()[0] == []
        assert one.receive.bad_length == 1


def test_a_used_length_bounds_the_message() -> None:
    with link(Role.DEVICE) as one:
        for length, filled in ((4, 20), (5, 20), (4, 19)):
            head = {20: 0, 19: 2}[filled] if length == 4 else 1
            one.buffer(head)[:20] = HEADER.pack(1, 2, 0, length, 0) + b"abcd"
            one.use(head, filled)
        assert flat(one.receive.receive()[0]) == [(1, 2, b"abcd")]
        assert one.receive.bad_length == 2


def test_only_bad_messages_are_bounded_too() -> None:
    with link(Role.DRIVER, 128, 64) as one:
        for _ in range(128):
            one.send.send(1, 2, b"x")
        for head in range(128):
            struct.pack_into("<H", one.buffer(head), 12, 0xFFFF)
        arrivals, _, more = one.receive.receive()
        assert (arrivals, more, one.receive.bad_length) == ([], True, BATCH)
        assert payloads(one.receive) == []
        assert one.receive.bad_length == 128
        assert one.send.send(1, 2, b"x") == 1, "all buffers are back"


@pytest.mark.parametrize("way", ["receive", "take"])
@pytest.mark.parametrize("count", [1, 3])
@BOTH_WAYS
def test_what_came_before_a_fault_is_received(sender: Role, count: int, way: str) -> None:
    with link(sender, 8, 64) as one:
        for number in range(count):
            one.send.send(1, 2, bytes([number]))
        if sender is Role.DRIVER:
            one.offer(999)
        else:
            one.use(999, 20)
        call = one.receive.receive if way == "receive" else lambda: take(one.receive)
        result = call()
        arrivals = result[0] if isinstance(result, tuple) else result
        assert flat(arrivals) == [(1, 2, bytes([number])) for number in range(count)]
        for _ in range(2):
            with pytest.raises(VirtqueueError, match="999"):
                call()
        assert one.receive.messages == count


# Refusals.


@pytest.mark.parametrize("size", [0, 15, 16, MAX_BUFFER_SIZE + 1])
def test_impossible_buffer_sizes(size: int) -> None:
    with link() as one:
        queue = one.queue(Role.DEVICE)
        with (
            contextlib.closing(queue),
            pytest.raises(ValueError, match=f"buffers of {size} bytes; 17 to 65551"),
        ):
            MessageRing(queue, sender=True, buffer_size=size)


def test_a_pool_that_is_too_small() -> None:
    with link() as one:
        queue = one.queue(Role.DRIVER)
        before = bytes(one.ring)
        with contextlib.closing(queue):
            for pool in (None, (POOL_PA, one.pool[:-1])):
                with pytest.raises(ValueError, match="4096 bytes of buffers are needed"):
                    MessageRing(queue, sender=True, buffer_size=512, pool=pool)
        assert bytes(one.ring) == before


# A peer that writes anything.


POOL_SIZE = 8 * 64


def work(ring: MessageRing, sends: bool, rng: random.Random) -> None:
    """One random call or two on an end; nothing but a VirtqueueError may come of them."""
    limit = ring.payload_limit
    if sends:
        if rng.random() < 0.5:
            result = ring.send(1, rng.randint(2, 4), b"\x5a" * rng.randint(0, limit + 1))
            assert result in (0, 1, NO_BUFFER, SMALL_BUFFER)
        else:
            count = rng.randint(1, 3)
            result, _ = send_many(ring, [b"\x5a" * rng.randint(0, limit + 1)] * count)
            assert result in (NO_BUFFER, SMALL_BUFFER) or 1 <= result <= count
        head, place, capacity = ring.reserve()
        assert head in (NO_BUFFER, SMALL_BUFFER) or (
            POOL_PA <= place <= POOL_PA + POOL_SIZE - capacity and capacity <= limit
        )
        with contextlib.suppress(ValueError):
            ring.commit(max(head, 0), 1, 3, rng.randint(0, limit))
        with contextlib.suppress(ValueError):
            ring.cancel(rng.randint(0, 8))
        ring.want_buffer()
        return
    ring.keep({3: KEPT, 4: IN_PLACE})
    arrivals, _, _ = ring.receive(give_back=rng.random() < 0.5, stay_quiet=rng.random() < 0.5)
    for arrival in arrivals:
        assert arrival.length <= limit
        if arrival.kept == IN_PLACE:
            place = ring.place(arrival.head)
            assert POOL_PA <= place <= POOL_PA + POOL_SIZE - arrival.length
    flat(arrivals)
    with contextlib.suppress(ValueError):
        ring.release([arrival.head for arrival in arrivals[: rng.randint(0, 3)]])


@PROPERTY
@given(
    st.sampled_from(Role),
    st.sampled_from(Role),
    st.booleans(),
    st.integers(0, 2**32),
    st.lists(
        st.lists(
            st.tuples(
                st.integers(0, 1023),
                st.one_of(st.integers(0, 16), st.integers(0, 0xFFFF)),
            ),
            max_size=3,
        ),
        min_size=3,
        max_size=25,
    ),
)
def test_hostile_words_between_operations(
    sender: Role,
    victim_role: Role,
    event_idx: bool,
    seed: int,
    steps: list[list[tuple[int, int]]],
) -> None:
    """A working peer whose words in the ring and in the buffers are changed now and then."""
    rng = random.Random(seed)
    with link(sender, 8, POOL_SIZE // 8, event_idx=event_idx) as one:
        victim, peer = (
            (one.driver, one.device) if victim_role is Role.DRIVER else (one.device, one.driver)
        )
        broken = False
        for changes in steps:
            with contextlib.suppress(VirtqueueError):
                work(peer, victim_role is not sender, rng)
            for at, value in changes:
                view = one.ring if at % 2 else one.pool
                struct.pack_into("<H", view, at // 2 * 2 % (len(view) - 1), value)
            pool, ring = bytes(one.pool), bytes(one.ring)
            try:
                work(victim, victim_role is sender, rng)
                assert not broken, "broken is for good"
            except VirtqueueError as error:
                assert "the other side is at fault" in str(error)
                broken = True
            # The victim writes its own half of the ring, and into buffers only as a sender.
            if victim_role is not sender:
                assert bytes(one.pool) == pool
            half = one.layout.used_offset
            if victim_role is Role.DRIVER:
                assert bytes(one.ring)[half:] == ring[half:]
            elif victim_role is not sender:
                assert bytes(one.ring)[:half] == ring[:half]


@PROPERTY
@given(st.sampled_from(Role), st.binary(max_size=600), st.integers(0, 0xFFFF_FFFF))
def test_hostile_message(sender: Role, content: bytes, filled: int) -> None:
    with link(sender) as one:
        one.send.send(1, 2, b"")
        one.buffer(0)[: len(content[:512])] = content[:512]
        if sender is Role.DEVICE:
            struct.pack_into("<I", one.ring, one.layout.used_offset + 8, filled)
            capacity = filled if filled <= 512 else 0
        else:
            capacity = 512
        held = bytes(one.buffer(0))
        src, dst, _, length, _ = HEADER.unpack(held[:16])
        good = capacity >= 16 and length <= capacity - 16
        taken = good and src != ANY
        expected = [(src, dst, held[16 : 16 + length])] if taken else []
        assert flat(one.receive.receive()[0]) == expected
        assert one.receive.bad_length == (not good)
        assert one.receive.bad_source == (good and src == ANY)
        assert one.receive.messages == taken
        assert one.receive.payload_bytes == (length if taken else 0)


# Closing.


def uses_of_a_reserved_buffer(ring: MessageRing) -> list[Callable[[], object]]:
    return [ring.reserve, lambda: ring.commit(0, 1, 2, 0), lambda: ring.cancel(0)]


def test_closed_is_not_usable() -> None:
    for sender in Role:
        with link(sender) as one:
            one.send.send(1, 2, b"last")
            one.receive.receive()
            for ring in (one.send, one.receive):
                ring.close()
                ring.close()
                with pytest.raises(ValueError, match="closed"):
                    _ = ring.handle
            with pytest.raises(ValueError, match="closed"):
                one.send.send(1, 2, b"")
            assert one.send.transmit(1, 2, b"", 0) == BROKEN
            for use in uses_of_a_reserved_buffer(one.send):
                with pytest.raises(ValueError, match="closed"):
                    use()
            with pytest.raises(TypeError):
                send_many(one.send, [b""])
            with pytest.raises(TypeError):
                one.send.has_buffer()
            with pytest.raises(ValueError, match="closed"):
                one.receive.keep({1: KEPT})
            assert one.send.messages == one.receive.messages == 1, "what was counted stays"
            assert one.send.kicks == (1, 0) and one.receive.payload_bytes == 4
            with pytest.raises(TypeError):
                one.send.want_buffer()
            with pytest.raises(TypeError):
                one.receive.receive()
            with pytest.raises(TypeError):
                one.receive.release([0])
