"""Memory captured from the OpenAMP C programs: what our rings see in it, in either role."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openamp_py.errors import VirtqueueError
from openamp_py.memory import MemoryMap, Region, SharedMemory
from openamp_py.virtio import MessageRing, Role, Virtqueue
from openamp_py.vring import VringLayout

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "openamp"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no captures in {GOLDEN}")

NAMES = [
    "table_only",
    "driver_ok",
    "device_announced",
    "both_announced",
    "echo_to_device",
    "echo_to_driver",
    "sample_reply",
    "matrix_reply",
    "flood_device_stalled",
    "flood_driver_stalled",
    "echo_end",
]
TRAFFIC = NAMES[1:]

SIZE = 0x80000
NUM, BUFFER_SIZE = 256, 512
RINGS = (0x4000, 0x8000)  # device to driver, driver to device
BUFFERS = 0x10000
LAYOUT = VringLayout(NUM, 4096)
HEADER = struct.Struct("<IIIHH")

ALL = pytest.mark.parametrize("name", NAMES)


def expected(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())[name]
    return found


class Snapshot:
    """One capture, in memory of our own."""

    def __init__(self, name: str) -> None:
        content = gzip.decompress((GOLDEN / f"{name}.bin.gz").read_bytes())
        self.shared = SharedMemory.create("openamp-test", len(content))
        self.region = self.shared.region("shm", 0)
        self.memory = self.region.view
        self.memory[:] = content
        self.vrings = expected(name)["vrings"]
        self.queues: list[Virtqueue] = []

    def queue(self, index: int, role: Role) -> Virtqueue:
        at = RINGS[index]
        ring = self.memory[at : at + LAYOUT.size]
        queue = Virtqueue(LAYOUT, ring, MemoryMap([self.region]), role)
        self.queues.append(queue)
        return queue

    def u16(self, at: int) -> int:
        return int(struct.unpack_from("<H", self.memory, at)[0])

    def available(self, index: int) -> tuple[int, list[int]]:
        """Index of the available ring, and the heads in its slots."""
        at = RINGS[index] + LAYOUT.available_offset
        return self.u16(at + 2), list(struct.unpack_from(f"<{NUM}H", self.memory, at + 4))

    def used(self, index: int) -> tuple[int, list[tuple[int, int]]]:
        at = RINGS[index] + LAYOUT.used_offset
        return self.u16(at + 2), list(
            struct.iter_unpack("<II", self.memory[at + 4 : at + 4 + 8 * NUM])
        )

    def outstanding(self, index: int) -> list[int]:
        """Heads between the used and the available index."""
        heads = self.available(index)[1]
        start, end = self.used(index)[0], self.available(index)[0]
        return [heads[(start + i) % NUM] for i in range((end - start) % 65536)]

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
        self.shared.close()


@contextlib.contextmanager
def snapshot(name: str) -> Iterator[Snapshot]:
    made = Snapshot(name)
    try:
        yield made
    finally:
        made.close()


def agrees(heads: list[int], shortened: list[int | str]) -> bool:
    """Whether a list is one of expected.json's, in which "..." stands for some left out."""
    if "..." not in shortened:
        return heads == shortened
    at = shortened.index("...")
    tail = len(shortened) - at - 1
    return heads[:at] == shortened[:at] and heads[-tail:] == shortened[at + 1 :]


def test_the_layout_is_the_c_programs() -> None:
    assert (LAYOUT.available_offset, LAYOUT.used_offset, LAYOUT.size) == (0x1000, 0x2000, 0x2806)


@ALL
def test_ring_words_lie_where_the_layout_says(name: str) -> None:
    with snapshot(name) as snap:
        assert len(snap.memory) == SIZE
        for index, (ring, vring) in enumerate(zip(RINGS, snap.vrings, strict=True)):
            queue = snap.queue(index, Role.DEVICE)
            assert queue.available_index == vring["avail_idx"]
            assert queue.used_index == vring["used_idx"]
            assert snap.u16(ring + LAYOUT.available_offset) == vring["avail_flags"]
            assert snap.u16(ring + LAYOUT.used_offset) == vring["used_flags"]
            table = list(struct.iter_unpack("<QIHH", snap.memory[ring : ring + 16 * NUM]))
            for at, key in ((0, "desc_first"), (1, "desc_second"), (-1, "desc_last")):
                assert list(table[at]) == vring[key]
            assert sum(1 for entry in table if entry[0]) == vring["filled_descriptors"]
            for entry in vring["last_used"]:
                assert snap.used(index)[1][entry["slot"]] == (entry["id"], entry["len"])
            # EVENT_IDX is off: used_event and avail_event.
            assert snap.u16(ring + 0x1000 + 4 + 2 * NUM) == 0
            assert snap.u16(ring + 0x2000 + 4 + 8 * NUM) == 0


@ALL
def test_messages_are_where_expected(name: str) -> None:
    with snapshot(name) as snap:
        for index, vring in enumerate(snap.vrings):
            for message in vring["messages"]:
                head = message["head"]
                table = RINGS[index] + 16 * head
                assert struct.unpack_from("<QI", snap.memory, table) == (message["offset"], 512)
                header = HEADER.unpack_from(snap.memory, message["offset"])
                keys = ("src", "dst", "reserved", "length", "flags")
                assert list(header) == [message[key] for key in keys]
                start = message["offset"] + HEADER.size
                payload = bytes(snap.memory[start : start + header[3]])
                assert payload == bytes.fromhex(message["payload"])


@ALL
@pytest.mark.parametrize("index", [0, 1])
def test_a_device_attaches_to_what_is_outstanding(name: str, index: int) -> None:
    with snapshot(name) as snap:
        vring = snap.vrings[index]
        heads = snap.outstanding(index)
        assert len(heads) == vring["outstanding"]
        assert agrees(heads, vring["outstanding_heads"])
        queue = snap.queue(index, Role.DEVICE)
        queue.attach()
        assert queue.pending == bool(heads)
        found = []
        while chain := queue.get_available():
            [span] = chain.spans
            assert span.view.nbytes == BUFFER_SIZE and span.writable == (index == 0)
            if index == 0:
                assert span.pa == BUFFERS + BUFFER_SIZE * chain.head
            found.append(chain.head)
        assert found == heads
        start = queue.used_index
        for head in heads:
            queue.put_used(head, BUFFER_SIZE)
        queue.publish()
        assert queue.used_index == (start + len(heads)) % 65536 == queue.available_index


@ALL
@pytest.mark.parametrize("index", [0, 1])
def test_a_driver_attaches_to_what_comes_back(name: str, index: int) -> None:
    """As if it had looked at nothing that its last 256 buffers brought."""
    with snapshot(name) as snap:
        available = snap.available(index)[0]
        count, used = snap.used(index)
        lent = NUM if index == 0 and available else snap.vrings[index]["outstanding"]
        seen = (available - lent) % 65536
        queue = snap.queue(index, Role.DRIVER)
        queue.attach(seen=seen)
        back = [used[(seen + i) % NUM] for i in range((count - seen) % 65536)]
        assert queue.pending == bool(back)
        assert list(iter(queue.get_used, None)) == back
        assert len(back) + snap.vrings[index]["outstanding"] == lent
        # What came back and what was never lent is free; the rest is still with the device.
        free = NUM - snap.vrings[index]["outstanding"]
        if free:
            assert queue.add(writable=[(BUFFERS, 1)] * free) is not None
        assert queue.add(writable=[(BUFFERS, 1)]) is None


@pytest.mark.parametrize("name", TRAFFIC)
def test_a_receiving_device_decodes_what_waits(name: str) -> None:
    with snapshot(name) as snap:
        queue = snap.queue(1, Role.DEVICE)
        ring = MessageRing(queue, sender=False, buffer_size=BUFFER_SIZE)
        heads, start = snap.outstanding(1), queue.used_index
        messages = _receive_all(ring)
        assert len(messages) == len(heads) == ring.messages
        assert ring.bad_length == ring.bad_source == 0
        waiting = {
            message["head"]: (message["src"], message["dst"], bytes.fromhex(message["payload"]))
            for message in snap.vrings[1]["messages"]
            if message["state"].startswith("available")
        }
        for head, found in zip(heads, messages, strict=True):
            assert found == waiting.get(head, found)
        assert set(waiting) <= set(heads)
        end, used = snap.used(1)
        assert end == snap.available(1)[0]
        back = [used[(start + i) % NUM] for i in range(len(heads))]
        assert back == [(head, BUFFER_SIZE) for head in heads]
        ring.close()


@pytest.mark.parametrize("name", TRAFFIC)
def test_a_sending_device_goes_on_where_the_last_one_stopped(name: str) -> None:
    with snapshot(name) as snap:
        heads = snap.outstanding(0)
        ring = MessageRing(snap.queue(0, Role.DEVICE), sender=True, buffer_size=BUFFER_SIZE)
        sent = list(itertools.takewhile(lambda result: result >= 0, _sends(ring)))
        assert len(sent) == len(heads) and all(sent), "this driver wants every kick"
        for i, head in enumerate(heads):
            at = BUFFERS + BUFFER_SIZE * head
            assert HEADER.unpack_from(snap.memory, at) == (1024, 1025, 0, 2, 0)
            assert snap.u16(at + HEADER.size) == i
        ring.close()


def _receive_all(ring: MessageRing) -> list[tuple[int, int, bytes]]:
    """Everything there is: source, destination, payload."""
    found = []
    more = True
    while more:
        arrivals, _, more = ring.receive()
        found += [(m.source, a.destination, m.payload) for a in arrivals for m in a.messages]
    return found


def _sends(ring: MessageRing) -> Iterator[int]:
    for i in itertools.count():
        yield ring.send(1024, 1025, i.to_bytes(2, "little"))


def test_the_flood_is_complete_and_in_order() -> None:
    with snapshot("flood_device_stalled") as snap:
        ring = MessageRing(snap.queue(1, Role.DEVICE), sender=False, buffer_size=BUFFER_SIZE)
        payloads = [payload for *_, payload in _receive_all(ring)]
        assert payloads == [struct.pack("<QQ", i, 1) + b"\xa5" for i in range(65499, 65755)]
        ring.close()
    with snapshot("flood_driver_stalled") as snap:
        queue = snap.queue(0, Role.DRIVER)
        queue.attach(seen=65500)
        back = list(iter(queue.get_used, None))
        assert [head for head, _ in back] == [*range(220, 256), *range(220)]
        for number, (head, length) in enumerate(back, 65499):
            at = BUFFERS + BUFFER_SIZE * head
            assert length == BUFFER_SIZE
            assert struct.unpack_from("<Q", snap.memory, at + HEADER.size) == (number,)


def test_our_driver_writes_the_rings_that_the_c_driver_writes() -> None:
    """driver_ok is what a C driver leaves before its device looks: ours leaves the same."""
    with snapshot("driver_ok") as snap:
        golden = bytes(snap.memory[0x4000:SIZE])
        snap.memory[0x4000:SIZE] = b"\xee" * (SIZE - 0x4000)
        pool = snap.memory[BUFFERS : BUFFERS + 2 * NUM * BUFFER_SIZE]
        half = NUM * BUFFER_SIZE
        pool[:] = bytes(2 * half)
        receiving = MessageRing(
            snap.queue(0, Role.DRIVER),
            sender=False,
            buffer_size=BUFFER_SIZE,
            pool=(BUFFERS, pool[:half]),
        )
        sending = MessageRing(
            snap.queue(1, Role.DRIVER),
            sender=True,
            buffer_size=BUFFER_SIZE,
            pool=(BUFFERS + half, pool[half:]),
        )
        for at in RINGS:
            assert bytes(snap.memory[at : at + LAYOUT.size]) == golden[at - 0x4000 :][: LAYOUT.size]
        receiving.close()
        sending.close()


def test_a_region_that_ends_before_the_buffers_breaks_the_ring_not_us() -> None:
    with snapshot("echo_to_device") as snap:
        small = MemoryMap([Region("shm", 0, 0, snap.memory[:BUFFERS])])
        ring = snap.memory[RINGS[1] : RINGS[1] + LAYOUT.size]
        queue = Virtqueue(LAYOUT, ring, small, Role.DEVICE)
        snap.queues.append(queue)
        queue.attach()
        with pytest.raises(VirtqueueError, match="points at 0x30200 for 512 bytes"):
            queue.get_available()
