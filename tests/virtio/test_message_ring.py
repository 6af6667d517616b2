"""Message rings: both directions from both ends, sizes, held buffers, and a lying other side."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py.errors import VirtqueueError
from openamp_py.memory import MemoryMap, Region, SharedMemory
from openamp_py.virtio import MessageRing, Role, Virtqueue
from openamp_py.virtio.message_ring import BATCH, HEADER_SIZE, MAX_BUFFER_SIZE
from openamp_py.vring import VringLayout

HEADER = struct.Struct("<IIIHH")  # src, dst, reserved, length, flags
SRC, DST = 1024, 0xFFFF_FFFE
GUARD = 4096
RING_PA = 0x1000_0000
POOL_PA = 0x2000_0000

NO_BUFFER, SMALL_BUFFER = -1, -3

BOTH_WISHES = pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
BOTH_WAYS = pytest.mark.parametrize("sender", Role, ids=lambda role: f"{role.value} sends")
HOSTILE = settings(derandomize=True, deadline=None, max_examples=200, database=None)


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

    def u16(self, offset: int) -> int:
        return int(struct.unpack_from("<H", self.ring, offset)[0])

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


def payloads(ring: MessageRing) -> list[bytes]:
    """Takes everything there is."""
    found = []
    more = True
    while more:
        messages, _, more = ring.receive()
        found += [payload for _, _, _, payload in messages]
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
            messages, _, more = one.receive.receive()
            assert [message[:2] + message[3:] for message in messages] == [(SRC, DST, payload)]
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
                messages, _, more = one.receive.receive()
                for *_, payload in messages:
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
            messages, _, more = one.receive.receive()
            assert len(messages) == min(count, BATCH)
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
        messages, _, more = one.receive.receive()
        assert (len(messages), more) == (BATCH, True)
        messages, _, more = one.receive.receive()
        assert (len(messages), more) == (1, False)


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
            messages, kick, _ = one.receive.receive()
            assert (len(messages), kick) == (2, True)
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
        heads = set()
        for _ in range(20):
            one.send.send(1, 2, b"")
            heads |= {head for _, _, head, _ in one.receive.receive()[0]}
        assert heads == {0}


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
            for *_, head, payload in one.receive.receive(give_back=False)[0]:
                assert payload == got.to_bytes(4, "little")
                assert head not in held
                held.append(head)
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
        [(_, _, head, _)], _, _ = one.receive.receive(give_back=False)
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
        messages, _, _ = one.receive.receive(give_back=False)
        first, second, third = (head for _, _, head, _ in messages)
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
            [(_, _, head, _)], _, _ = one.receive.receive()
            with pytest.raises(ValueError, match="not held"):
                one.receive.release([head])


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
        messages, _, _ = one.receive.receive()
        assert messages == ([] if expected is None else [(SRC, DST, 0, expected)])
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
        messages, _, _ = one.receive.receive(give_back=False)
        assert [payload for *_, payload in messages] == [b"true"]
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
        assert [payload for *_, payload in one.receive.receive()[0]] == [b"abcd"]
        assert one.receive.bad_length == 2


def test_only_bad_messages_are_bounded_too() -> None:
    with link(Role.DRIVER, 128, 64) as one:
        for _ in range(128):
            one.send.send(1, 2, b"x")
        for head in range(128):
            struct.pack_into("<H", one.buffer(head), 12, 0xFFFF)
        messages, _, more = one.receive.receive()
        assert (messages, more, one.receive.bad_length) == ([], True, BATCH)
        assert payloads(one.receive) == []
        assert one.receive.bad_length == 128
        assert one.send.send(1, 2, b"x") == 1, "all buffers are back"


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


def work(ring: MessageRing, sends: bool, rng: random.Random) -> None:
    """One random call or two on an end; nothing but a VirtqueueError may come of them."""
    if sends:
        result = ring.send(1, 2, b"\x5a" * rng.randint(0, ring.payload_limit + 1))
        assert result in (0, 1, NO_BUFFER, SMALL_BUFFER)
        ring.want_buffer()
        return
    messages, _, _ = ring.receive(give_back=rng.random() < 0.5)
    for *_, payload in messages:
        assert len(payload) <= ring.payload_limit
    with contextlib.suppress(ValueError):
        ring.release([head for _, _, head, _ in messages[: rng.randint(0, 3)]])


@HOSTILE
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
    with link(sender, 8, 64, event_idx=event_idx) as one:
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


@HOSTILE
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
        expected = [(src, dst, 0, held[16 : 16 + length])] if good else []
        assert one.receive.receive()[0] == expected
        assert one.receive.bad_length == (not good)


# Closing.


def test_closed_is_not_usable() -> None:
    for sender in Role:
        with link(sender) as one:
            for ring in (one.send, one.receive):
                ring.close()
                ring.close()
                with pytest.raises(ValueError, match="closed"):
                    _ = ring.handle
            with pytest.raises(TypeError):
                one.send.send(1, 2, b"")
            with pytest.raises(TypeError):
                one.send.want_buffer()
            with pytest.raises(TypeError):
                one.receive.receive()
            with pytest.raises(TypeError):
                one.receive.release([0])
