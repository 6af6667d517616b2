"""The text in a trace buffer, and what of it is new since it was last looked at.

A trace buffer is memory that the core writes text into and the host only reads; nothing but the
text itself tells how far the core has come. What new text looks like depends on the firmware:

    grows      the text goes on behind what was there
    moves down when full, the older half is dropped and the rest moved to the start (ours)
    ring       when full, the oldest text is overwritten (Zephyr's RAM console)
    anew       the core was restarted, or the firmware empties its buffer when it is full
"""

from __future__ import annotations

import codecs
from typing import Final, NamedTuple

_OVERLAP: Final = 64
"""Equal bytes by which old and new text are joined; fewer may be equal by chance."""

_OVERLAP_SHARE: Final = 8
"""In a small buffer that is too much to ask: an eighth of it then."""

_MAX_PLACES: Final = 256
"""Places at which old and new text are tried; text that repeats itself has more."""

_ROLLED_EIGHTHS: Final = 3
"""A buffer that has dropped its older half at some time holds so many eighths, or more."""


def decode_trace_untrusted(snapshot: bytes) -> str:
    """The whole text of a buffer: up to the first NUL, with bytes that are no UTF-8 replaced."""
    return _text(snapshot).decode(errors="replace")


class TraceReader:
    """Tells what text is new from one snapshot of a trace buffer to the next.

    One for each buffer, made by whoever polls it. Knows no memory and no time: it is given copies.
    A poll costs time in proportion to the buffer, whatever the core writes.

    Between two polls the core should write less than the buffer holds. When more was written, when
    it is seen that the text can be continued in several ways, or when the buffer began anew, `gaps`
    goes up and the text begins with what the buffer has. A ring has no mark where its newest text
    ends: characters that equal those which they overwrite come together with the next ones that
    differ. Of a line that is written again and again, then, some may be missing, or come twice,
    without a gap: nothing in the buffer shows how many there were.

    Attributes:
        gaps: how often text may be missing before what was returned.
    """

    def __init__(self) -> None:
        self.gaps = 0
        self.restart()

    def restart(self) -> None:
        """What comes next is of a new life of the core, and no gap.

        Without it, a restart is a gap, or not seen at all where the new text begins as the old.
        """
        self._seen: bytes | None = None
        self._end: int | None = 0  # where a ring is written next; None: somewhere
        self._doubtful = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def poll(self, snapshot: bytes, *, final: bool = False) -> str:
        """Returns the text that was not returned before.

        A snapshot that does not continue the one before may have been taken while the core was at
        work in the buffer: it is believed when the next one does not continue either.

        Args:
            snapshot: a copy of the whole buffer.
            final: no further one will come for now (the core has ended): all is believed.
        """
        text = _text(snapshot)
        if self._seen is None:
            step = _begin(text, len(snapshot))
        elif text == self._seen:
            step = _Step(b"", self._end)
        else:
            found = _continue(self._seen, self._end, text, len(snapshot))
            if found is None and not (final or self._doubtful):
                self._doubtful = True
                return ""
            step = found or _begin(text, len(snapshot))._replace(gap=True)
        self._doubtful = False
        self._seen = text
        self._end = step.end
        rest = ""
        if step.gap:
            self.gaps += 1
            rest = self._decoder.decode(b"", True)
        return rest + self._decoder.decode(step.new, final)


class _Step(NamedTuple):
    """What a snapshot adds to the one before."""

    new: bytes
    end: int | None  # where a ring is written next; None: somewhere
    gap: bool = False  # text may be missing before it


def _text(snapshot: bytes) -> bytes:
    return snapshot.partition(b"\0")[0]


def _is_full(text: bytes, capacity: int) -> bool:
    return len(text) >= capacity - 1  # some keep a NUL at the end


def _begin(text: bytes, capacity: int) -> _Step:
    """All of it is new, and nothing is known of how it came there."""
    return _Step(text, None if _is_full(text, capacity) else len(text))


def _continue(old: bytes, end: int | None, text: bytes, capacity: int) -> _Step | None:
    """The most likely way from one text to the next, or None where they have nothing in common."""
    least = max(1, min(_OVERLAP, capacity // _OVERLAP_SHARE))
    if text.startswith(old):
        # What is little may have come back by chance after the buffer was filled anew.
        if len(old) < least and len(text) * 8 >= capacity * _ROLLED_EIGHTHS:
            return _begin(text, capacity)._replace(new=text[len(old) :], gap=True)
        return _Step(text[len(old) :], len(text))
    kept, several = _moved_down(old, text, least)
    if _is_full(text, capacity):
        spared, step = _overwritten(old, end, text)
        if spared >= max(least, kept):
            return step
    if not kept:
        return None
    return _Step(text[kept:], len(text), gap=several)


def _moved_down(old: bytes, text: bytes, least: int) -> tuple[int, bool]:
    """How many bytes of the old text's end the new one begins with; whether it may be fewer."""
    head = text[:least]
    kept = place = 0
    if len(head) < least:
        return 0, False
    for _ in range(_MAX_PLACES):
        place = old.find(head, place + 1)
        if place < 0:
            return kept, False
        if text.startswith(old[place:]):
            if kept:
                return kept, True
            kept = len(old) - place
    return kept, True


def _overwritten(old: bytes, end: int | None, text: bytes) -> tuple[int, _Step]:
    """What a full ring got from its last end on; and how many bytes it left as they were."""
    size = len(text)
    if len(old) != size and end != len(old):
        return 0, _Step(b"", None)
    if end is None:
        # Only what differs shows where it was written.
        first, last = _common_head(old, text), _common_tail(old, text)
        line = text.rfind(b"\n", 0, first) + 1
        return first + last, _Step(text[line : size - last], size - last, gap=True)
    spared = _common_tail(old[:end], text[:end])
    if spared < end:
        return spared, _Step(text[end:] + text[: end - spared], end - spared)
    behind = _common_tail(old[end:], text[end:])
    return spared + behind, _Step(text[end : size - behind], size - behind)


# Whole texts are compared as two numbers: there is nothing faster for bytes in Python.


def _common_tail(one: bytes, other: bytes) -> int:
    """Bytes at the end that are the same in two texts of one length."""
    different = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
    return len(one) - (different.bit_length() + 7) // 8


def _common_head(one: bytes, other: bytes) -> int:
    """Bytes at the beginning that are the same in two texts of one length."""
    different = int.from_bytes(one, "big") ^ int.from_bytes(other, "big")
    return len(one) - (different.bit_length() + 7) // 8
