"""Trace buffers: what is new from one look to the next, for every way a firmware may write them."""

from __future__ import annotations

import random
import struct

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py import ECHO_CHANNEL, open_session
from openamp_py.remoteproc.resource_table import Trace
from openamp_py.remoteproc.trace import TraceReader, decode_trace_untrusted
from openamp_py.session import Session

LIMIT = 30.0
CAPACITY = 256

# csrc/firmware/echo_protocol.h
CRASH = struct.pack("<I", 0xEF56A501)

deterministic = settings(derandomize=True, deadline=None, max_examples=500)


def buffer(text: str, capacity: int = CAPACITY) -> bytes:
    return text.encode().ljust(capacity, b"\0")


def lines(first: int, count: int) -> str:
    """Text of which no part comes twice."""
    return "".join(f"#{number:06}\n" for number in range(first, first + count))


# Text that grows


def test_what_is_there_at_first_is_new_and_then_what_was_added() -> None:
    reader = TraceReader()
    assert reader.poll(buffer("booted\n")) == "booted\n"
    assert reader.poll(buffer("booted\n")) == ""
    assert reader.poll(buffer("booted\nready\n")) == "ready\n"
    assert reader.gaps == 0


def test_an_empty_buffer_gets_its_first_line() -> None:
    reader = TraceReader()
    assert reader.poll(bytes(CAPACITY)) == ""
    assert reader.poll(buffer("booted\n")) == "booted\n"
    assert reader.gaps == 0


def test_what_stands_behind_the_first_nul_is_no_text() -> None:
    assert TraceReader().poll(buffer("booted\n\0garbage")) == "booted\n"
    assert decode_trace_untrusted(b"booted\n\0garbage") == "booted\n"
    assert decode_trace_untrusted(b"no end") == "no end"


def test_a_character_that_came_in_two_halves_is_one() -> None:
    reader = TraceReader()
    text = "21 \N{DEGREE SIGN}C".encode()
    assert reader.poll(text[:4].ljust(CAPACITY, b"\0")) == "21 "
    assert reader.poll(text.ljust(CAPACITY, b"\0")) == "\N{DEGREE SIGN}C"


def test_half_a_character_is_replaced_when_no_more_will_come() -> None:
    reader = TraceReader()
    assert reader.poll(b"21 \xc2".ljust(CAPACITY, b"\0"), final=True) == "21 \ufffd"


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert TraceReader().poll(b"a\xff\xfeb\0") == "a\ufffd\ufffdb"
    assert decode_trace_untrusted(b"a\xff\xfeb\0") == "a\ufffd\ufffdb"


def test_half_a_character_before_a_gap_is_not_joined_with_what_is_behind_it() -> None:
    reader = TraceReader()
    assert reader.poll(b"21 \xc2".ljust(CAPACITY, b"\0")) == "21 "
    assert reader.poll(b"\xb0C".ljust(CAPACITY, b"\0"), final=True) == "\ufffd\ufffdC"


# Text that moves down, and rings


def test_the_older_half_was_dropped() -> None:
    reader = TraceReader()
    assert reader.poll(buffer(lines(0, 31))) == lines(0, 31)
    assert reader.poll(buffer(lines(16, 17))) == lines(31, 2)
    assert reader.gaps == 0


@pytest.mark.parametrize("size", [CAPACITY, CAPACITY - 1], ids=["whole", "nul at its end"])
def test_a_ring_wraps_around_again_and_again(size: int) -> None:
    ring, reader = Ring(CAPACITY, size), TraceReader()
    written = got = ""
    for first in range(0, 300, 20):
        ring.write(lines(first, 20))
        written += lines(first, 20)
        got += reader.poll(ring.snapshot())
        # What is overwritten with the same characters comes with the next that differ.
        assert written.startswith(got) and len(written) - len(got) < 8
    assert reader.gaps == 0


def test_a_ring_that_was_full_at_the_first_look_shows_its_end_by_what_changes() -> None:
    ring, reader = Ring(CAPACITY, CAPACITY), TraceReader()
    ring.write(lines(0, 50))
    assert len(reader.poll(ring.snapshot())) == CAPACITY
    ring.write("hello\n")
    assert reader.poll(ring.snapshot()) == "hello\n"
    assert reader.gaps == 1, "what was equal before the hello is not known"
    ring.write("again\n")
    assert reader.poll(ring.snapshot()) == "again\n"
    assert reader.gaps == 1


# Gaps


def test_more_than_the_buffer_holds_is_a_gap() -> None:
    reader = TraceReader()
    reader.poll(buffer(lines(0, 30)))
    assert reader.poll(buffer(lines(100, 20))) == "", "it might be half written"
    assert reader.poll(buffer(lines(100, 21))) == lines(100, 21)
    assert reader.gaps == 1
    assert reader.poll(buffer(lines(100, 22))) == lines(121, 1)
    assert reader.gaps == 1


def test_more_than_the_buffer_holds_is_a_gap_where_nothing_was_before() -> None:
    reader = TraceReader()
    reader.poll(bytes(CAPACITY))
    assert reader.poll(buffer(lines(100, 20))) == lines(100, 20)
    assert reader.gaps == 1


def test_a_ring_that_was_overwritten_is_a_gap_once_found() -> None:
    ring, reader = Ring(CAPACITY, CAPACITY), TraceReader()
    ring.write(lines(0, 30))
    reader.poll(ring.snapshot())
    ring.write(lines(30, 100))
    reader.poll(ring.snapshot(), final=True)
    assert reader.gaps == 1
    ring.write("hello\n")
    assert reader.poll(ring.snapshot()) == "hello\n"


def test_a_ring_that_ends_elsewhere_than_before_is_no_ring() -> None:
    ring, reader = Ring(CAPACITY, CAPACITY - 1), TraceReader()
    for first in range(0, 45, 15):
        ring.write(lines(first, 15))
        reader.poll(ring.snapshot())
    assert reader.gaps == 0
    snapshot = ring.snapshot()
    reader.poll(snapshot[:200] + b"?" + snapshot[201:-1] + b"!", final=True)
    assert reader.gaps == 1


def test_text_that_repeats_itself_may_be_a_gap() -> None:
    reader = TraceReader()
    reader.poll(buffer("tick\n" * 50))
    assert reader.poll(buffer("tick\n" * 26)) == "", "26 or 1, or any number between"
    assert reader.gaps == 1


def test_a_snapshot_from_the_midst_of_a_move_is_not_believed() -> None:
    before, after = buffer(lines(0, 31)), buffer(lines(16, 17))
    for moved in range(0, 120):
        reader = TraceReader()
        reader.poll(before)
        # csrc/firmware/trace.c: an end mark first, then the text
        torn = after[:moved] + before[moved:120] + b"\0" + before[121:]
        assert reader.poll(torn) == ""
        assert reader.poll(after) == lines(31, 2)
        assert reader.poll(torn) == "", "it is doubted anew"
        assert reader.poll(after) == ""
        assert reader.gaps == 0


def test_what_comes_last_is_believed() -> None:
    reader = TraceReader()
    reader.poll(buffer(lines(0, 31)))
    assert reader.poll(buffer("oops\n"), final=True) == "oops\n"
    assert reader.gaps == 1


# Restarts


def test_a_restart_that_is_known_is_no_gap_even_with_the_same_text() -> None:
    reader = TraceReader()
    assert reader.poll(buffer("booted\nold\n"), final=True) == "booted\nold\n"
    reader.restart()
    assert reader.poll(buffer("booted\n")) == "booted\n"
    assert reader.poll(buffer("booted\nnew\n")) == "new\n"
    assert reader.gaps == 0


def test_a_restart_that_nobody_told_is_a_gap() -> None:
    reader = TraceReader()
    reader.poll(buffer("booted\nold\n"))
    assert reader.poll(buffer("booted\n")) == ""
    assert reader.poll(buffer("booted\n"), final=True) == "booted\n"
    assert reader.gaps == 1
    assert reader.poll(buffer("booted\nnew\n")) == "new\n"


def test_a_buffer_that_was_emptied_goes_on() -> None:
    reader = TraceReader()
    reader.poll(buffer(lines(0, 31)))
    assert [reader.poll(bytes(CAPACITY)) for _ in range(2)] == ["", ""]
    assert reader.poll(buffer("on\n")) == "on\n"
    assert reader.gaps == 1


# Models of what writes such buffers


class Ring:
    """Overwrites its oldest text; `size` is below the capacity where a NUL is kept at the end."""

    def __init__(self, capacity: int, size: int) -> None:
        self._bytes = bytearray(capacity)
        self._size = size
        self._next = 0

    def write(self, text: str) -> None:
        for byte in text.encode():
            self._bytes[self._next] = byte
            self._next = (self._next + 1) % self._size

    def snapshot(self) -> bytes:
        return bytes(self._bytes)


class Dropping:
    """Drops its older half up to the end of a line, as csrc/firmware/trace.c does."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._text = ""

    def write(self, text: str) -> None:
        for line in text.splitlines(keepends=True):
            if len(self._text) + len(line) > self._capacity - 1:
                self._text = self._text[self._text.index("\n", len(self._text) // 2) + 1 :]
            self._text += line

    def snapshot(self) -> bytes:
        return buffer(self._text, self._capacity)


WRITERS = st.one_of(
    st.builds(Dropping, st.sampled_from([128, 256, 1024])),
    st.sampled_from([(128, 128), (256, 255), (1024, 1024)]).map(lambda sizes: Ring(*sizes)),
)


@deterministic
@given(WRITERS, st.lists(st.integers(0, 60), max_size=30))
def test_what_was_read_is_what_was_written_unless_a_gap_is_told(
    writer: Ring | Dropping, counts: list[int]
) -> None:
    reader = TraceReader()
    reader.poll(writer.snapshot())
    total = written = got = ""
    number = gaps = 0
    for count in counts:
        text = lines(number, count)
        number += count
        writer.write(text)
        total += text
        written += text
        new = reader.poll(writer.snapshot(), final=True)
        if reader.gaps != gaps:
            gaps = reader.gaps
            assert new
            # Of a ring that was written all over, what is newest shows by the next gap.
            written = total[total.index(new) :] if new in total else new
            got = ""
        got += new
        assert written.startswith(got) and len(written) - len(got) < 8


@deterministic
@given(st.lists(st.tuples(st.binary(max_size=80), st.booleans()), max_size=8), st.integers(1, 60))
def test_any_bytes_are_some_text(snapshots: list[tuple[bytes, bool]], capacity: int) -> None:
    reader = TraceReader()
    for data, final in snapshots:
        snapshot = data[:capacity].ljust(capacity, b"\0")
        new = reader.poll(snapshot, final=final)
        assert len(new) <= capacity + 1
        assert decode_trace_untrusted(snapshot) == snapshot.partition(b"\0")[0].decode(
            errors="replace"
        )


@pytest.mark.parametrize("period", [b"a", b"tick\n", b"a" * 63 + b"b", b"a" * 70_000 + b"b"])
def test_a_large_buffer_of_repetitions_costs_no_more_than_other_text(period: bytes) -> None:
    """Hangs for minutes where places are tried without a bound."""
    size = 1 << 20
    old = period * (size // len(period))
    reader = TraceReader()
    reader.poll(old[:-2])
    for changed in (old[:-9] + b"x", b"x" + old[:-3], old[7:-9] + b"xyz", old[: size // 2] + b"x"):
        reader.poll(changed.ljust(size, b"\0"), final=True)
    noise = random.Random(1)
    for _ in range(3):
        reader.poll(noise.randbytes(size).replace(b"\0", b"a"), final=True)


# The real thing


def _snapshot(session: Session) -> bytes:
    """The core's trace buffer, as the host sees it."""
    processor = session.processor
    assert processor is not None and processor.table is not None
    (trace,) = [entry for entry in processor.table.entries if isinstance(entry, Trace)]
    view = processor.platform.memory.find_da(trace.da, trace.length)
    assert view is not None
    return bytes(view)


async def test_a_running_core_is_followed_to_its_crash_and_through_its_restart() -> None:
    reader = TraceReader()
    with trio.fail_after(LIMIT):
        async with (
            open_session("native") as session,
            session.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
        ):
            await endpoint.wait_bound()
            first = reader.poll(_snapshot(session))
            assert first.startswith(f"booted: echo on {ECHO_CHANNEL}\ndriver ready")
            await endpoint.send(b"echo")
            await endpoint.receive()
            assert reader.poll(_snapshot(session)).startswith("bound to 0x") or "bound" in first
            await endpoint.send(CRASH)
            with pytest.raises(trio.BrokenResourceError):
                await endpoint.receive()
            last = reader.poll(_snapshot(session), final=True)
            assert last.endswith("crash on request\n")
            await session.restart()
            reader.restart()
            await endpoint.wait_bound()
            await endpoint.send(b"echo")
            await endpoint.receive()
            assert reader.poll(_snapshot(session)).startswith("booted: echo on ")
            assert reader.gaps == 0


async def test_a_core_that_drops_the_older_half_is_followed() -> None:
    reader = TraceReader()
    text = ""
    with trio.fail_after(LIMIT):
        async with open_session("native") as session:
            for address in range(2000, 2200):
                async with session.bus.open_endpoint(ECHO_CHANNEL, address=address) as endpoint:
                    await endpoint.send(b"echo")
                    await endpoint.receive()
                text += reader.poll(_snapshot(session))
    assert reader.gaps == 0
    bound = [line for line in text.splitlines() if line.startswith("bound to ")]
    assert bound == [f"bound to {address:#x} by name service" for address in range(2000, 2200)]
    assert len(text) > 2 * 4096, "the buffer was full more than once"
