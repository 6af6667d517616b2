"""The loops in C over real rings: both ends here, with and without a doorbell."""

from __future__ import annotations

import mmap
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from openamp_py import PeerError, PeerGoneError, Role, Virtqueue, VirtqueueError
from openamp_py.constants import NAME_SERVICE_ADDRESS
from openamp_py.memory import MemoryMap, Region
from openamp_py.virtio import MessageRing
from openamp_py.virtio.yardstick import Yardstick
from openamp_py.vring import VringLayout

BUFFER = 512
HOST, ECHO = 1024, 1025


@dataclass(frozen=True)
class Ends:
    """The rings of both sides of one link, sending and receiving, and their memory."""

    memory: memoryview
    host: tuple[MessageRing, MessageRing]
    remote: tuple[MessageRing, MessageRing]

    def close(self) -> None:
        for ring in (*self.host, *self.remote):
            ring.close()


def _create_ends(num: int) -> Ends:
    layout = VringLayout(num, 64)
    pool_offset = 1 << 16
    view = memoryview(mmap.mmap(-1, 2 * (pool_offset + num * BUFFER)))
    rings: list[tuple[MessageRing, MessageRing]] = []
    for half in range(2):
        start = half * len(view) // 2
        memory = MemoryMap([Region("ram", 0, 0, view)])
        driver, device = (
            Virtqueue(layout, view[start : start + layout.size], memory, role) for role in Role
        )
        pool = start + pool_offset
        buffers = (pool, view[pool : pool + num * BUFFER])
        to_remote = half == 1
        rings.append(
            (
                MessageRing(driver, sender=to_remote, buffer_size=BUFFER, pool=buffers),
                MessageRing(device, sender=not to_remote, buffer_size=BUFFER),
            )
        )
    (host_receives, remote_sends), (host_sends, remote_receives) = rings
    return Ends(view, (host_sends, host_receives), (remote_sends, remote_receives))


@pytest.fixture(params=[1, 4, 256])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    created = _create_ends(request.param)
    yield created
    created.close()


def _measure(
    yardstick: Yardstick, size: int = 16, in_flight: int | None = 1, seconds: float = 0.002
) -> float:
    return yardstick.measure(
        size=size, in_flight=in_flight, seconds=seconds, source=HOST, destination=ECHO
    )


# Normal


@pytest.mark.parametrize("in_flight", [1, None])
@pytest.mark.parametrize("size", [8, 496])
def test_both_ends_in_one_thread(ends: Ends, size: int, in_flight: int | None) -> None:
    yardstick = Yardstick(*ends.host, peer=Yardstick(*ends.remote))
    assert _measure(yardstick, size, in_flight) > 0
    assert _measure(yardstick, size, in_flight) > 0, "nothing of the first run is left"


@pytest.mark.parametrize("in_flight", [1, None])
def test_two_threads_and_a_doorbell(ends: Ends, in_flight: int | None) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        remote = Yardstick(*ends.remote, doorbell=theirs.fileno())
        thread = threading.Thread(target=remote.echo)
        thread.start()
        try:
            yardstick = Yardstick(*ends.host, doorbell=ours.fileno())
            assert _measure(yardstick, in_flight=in_flight) > 0
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_messages_for_others_are_passed_over(ends: Ends) -> None:
    ends.remote[0].send(ECHO, NAME_SERVICE_ADDRESS, b"an announcement")
    assert _measure(Yardstick(*ends.host, peer=Yardstick(*ends.remote))) > 0


# Limits and refusals


def test_an_echo_without_a_buffer_asks_for_one_and_loses_nothing(ends: Ends) -> None:
    while ends.remote[0].send(ECHO, NAME_SERVICE_ADDRESS, b"in the way") >= 0:
        pass
    ends.host[0].send(HOST, ECHO, b"payload")
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        remote = Yardstick(*ends.remote, doorbell=ours.fileno())
        remote.echo()
        _, kick, _ = ends.host[1].receive()
        assert kick
        remote.echo()
    arrivals = [arrival for _ in range(5) for arrival in ends.host[1].receive()[0]]
    assert arrivals[-1].destination == HOST
    assert arrivals[-1].messages[-1] == (b"payload", ECHO)


@pytest.mark.parametrize("size", [7, 497])
def test_sizes_that_are_not_possible(ends: Ends, size: int) -> None:
    with pytest.raises(ValueError, match=f"messages of {size} bytes; 8 to 496 are possible"):
        _measure(Yardstick(*ends.host, peer=Yardstick(*ends.remote)), size)


# Hostile input


@pytest.mark.parametrize(
    "reply",
    [
        struct.pack("<QQ", 0, 1),
        struct.pack("<QQ", 1, 0),
        struct.pack("<Q", 0),
        struct.pack("<QQQ", 0, 0, 0),
        b"",
    ],
    ids=["changed", "later number", "cut off", "longer", "empty"],
)
def test_a_reply_that_is_not_the_message(ends: Ends, reply: bytes) -> None:
    ends.remote[0].send(ECHO, HOST, reply)
    with pytest.raises(PeerError, match=r"changed or out of order \(1 messages sent, 0 came"):
        _measure(Yardstick(*ends.host, peer=Yardstick(*ends.remote)))


def test_a_peer_that_says_nothing(ends: Ends) -> None:
    other = _create_ends(4)
    with pytest.raises(PeerError, match=r"does not answer \(1 messages sent, 0 came back\)"):
        _measure(Yardstick(*ends.host, peer=Yardstick(*other.remote)))
    other.close()


def test_a_ring_index_that_jumps(ends: Ends) -> None:
    layout = ends.host[1].queue.layout
    struct.pack_into("<H", ends.memory, layout.used_offset + 2, 0x8000)
    with pytest.raises(VirtqueueError, match="its index jumped by 32768 entries"):
        _measure(Yardstick(*ends.host, peer=Yardstick(*ends.remote)))


def test_the_other_ends_fault_is_told_too(ends: Ends) -> None:
    layout = ends.remote[0].queue.layout
    struct.pack_into("<H", ends.memory, layout.available_offset + 2, 0x8000)
    with pytest.raises(VirtqueueError, match="its index jumped by 32768 entries"):
        _measure(Yardstick(*ends.host, peer=Yardstick(*ends.remote)))


# Closing


def test_a_peer_that_closes_its_doorbell(ends: Ends) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        with pytest.raises(PeerGoneError, match=r"closed its end .* \(1 messages sent, 0 came"):
            _measure(Yardstick(*ends.host, doorbell=ours.fileno()))
        Yardstick(*ends.remote, doorbell=ours.fileno()).echo()


def test_closed_rings_are_not_touched(ends: Ends) -> None:
    remote = Yardstick(*ends.remote)
    yardstick = Yardstick(*ends.host, peer=remote)
    ends.remote[1].close()
    with pytest.raises(ValueError, match="is closed"):
        _measure(yardstick)


# Floods, and an end that polls

SINK = 1026


def _flood(yardstick: Yardstick, batch: int = 64, size: int = 16, sources: int = 1) -> float:
    return yardstick.flood(
        size=size,
        batch=batch,
        seconds=0.002,
        source=HOST,
        sources=sources,
        destination=SINK,
    )


@pytest.mark.parametrize("sources", [1, 3])
@pytest.mark.parametrize("batch", [1, 64])
def test_a_flood_in_one_thread(ends: Ends, batch: int, sources: int) -> None:
    yardstick = Yardstick(*ends.host, peer=Yardstick(*ends.remote, sink=SINK))
    assert _flood(yardstick, batch, 496, sources) > 0
    assert _flood(yardstick, batch, 8, sources) > 0, "nothing of the first run is left"
    assert _measure(yardstick) > 0, "all else still returns"


@pytest.mark.parametrize("sources", [2, 1000])
def test_several_sources(ends: Ends, sources: int) -> None:
    yardstick = Yardstick(*ends.host, peer=Yardstick(*ends.remote))
    assert (
        yardstick.measure(
            size=16, in_flight=None, seconds=0.002, source=HOST, sources=sources, destination=ECHO
        )
        > 0
    )


@pytest.mark.parametrize(
    ("host_polls", "remote_polls"), [(False, False), (False, True), (True, False), (True, True)]
)
def test_ends_that_poll_and_ends_that_sleep(
    ends: Ends, host_polls: bool, remote_polls: bool
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        remote = Yardstick(*ends.remote, doorbell=theirs.fileno(), polling=remote_polls, sink=SINK)
        thread = threading.Thread(target=remote.echo)
        thread.start()
        try:
            yardstick = Yardstick(*ends.host, doorbell=ours.fileno(), polling=host_polls)
            for _ in range(2):
                assert _measure(yardstick) > 0
                assert _measure(yardstick, in_flight=None) > 0
                assert _flood(yardstick) > 0
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    "first", [struct.pack("<Q", 1), struct.pack("<I", 0), b""], ids=["number", "short", "empty"]
)
def test_a_sink_tells_of_another_order(ends: Ends, first: bytes) -> None:
    yardstick = Yardstick(*ends.host, peer=Yardstick(*ends.remote, sink=SINK))
    ends.host[0].send(HOST, SINK, first)
    with pytest.raises(PeerError, match=r"lost or came out of order \(\d+ messages sent, some out"):
        _flood(yardstick)
    assert _flood(yardstick) > 0, "the next flood is counted anew"


def test_a_count_that_is_not_right(ends: Ends) -> None:
    ends.remote[0].send(ECHO, NAME_SERVICE_ADDRESS, b"an announcement")
    yardstick = Yardstick(*ends.host, peer=Yardstick(*ends.remote, sink=SINK))
    assert _flood(yardstick) > 0, "what is for others is passed over"
    ends.remote[0].send(SINK, HOST, struct.pack("<Q", 5))
    with pytest.raises(PeerError, match=r"lost or came out of order \(\d+ messages sent, 5 count"):
        _flood(yardstick)


def test_a_flood_that_nobody_receives(ends: Ends) -> None:
    other = _create_ends(4)
    with pytest.raises(PeerError, match=r"does not answer \(\d+ messages sent, 0 counted\)"):
        _flood(Yardstick(*ends.host, peer=Yardstick(*other.remote)))
    other.close()


@pytest.mark.parametrize("size", [7, 497])
def test_floods_that_are_not_possible(ends: Ends, size: int) -> None:
    with pytest.raises(ValueError, match=f"messages of {size} bytes; 8 to 496 are possible"):
        _flood(Yardstick(*ends.host, peer=Yardstick(*ends.remote)), size=size)


def test_a_peer_that_leaves_while_this_end_polls(ends: Ends) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        yardstick = Yardstick(*ends.host, doorbell=ours.fileno(), polling=True)
        with pytest.raises(PeerGoneError, match=r"\(1 messages sent, 0 came"):
            _measure(yardstick)
        with pytest.raises(PeerGoneError, match=r"messages sent, 0 counted"):
            _flood(yardstick)
        Yardstick(*ends.remote, doorbell=ours.fileno(), polling=True).echo()
