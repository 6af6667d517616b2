"""Handovers as bytes: what one host writes, the next one reads, and nonsense is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py.rpmsg.handover import (
    NOTHING,
    SIZE_LIMIT,
    HandedEndpoint,
    Handover,
    decode_handover_untrusted,
    encode_handover,
)
from openamp_py.rpmsg.wire import Channel

PROPERTY = settings(derandomize=True, deadline=None, max_examples=300, database=None)

FULL = Handover(
    (Channel("a", 1024), Channel("\\xff\u00e9", 0)),
    (
        HandedEndpoint("a", 1024, 1025, announced=True),
        HandedEndpoint(None, 7),
        HandedEndpoint("b", 0xFFFF_FFFE, 0),
    ),
)


@pytest.mark.parametrize("handover", [NOTHING, FULL], ids=["nothing", "full"])
def test_comes_back_as_it_was(handover: Handover) -> None:
    assert decode_handover_untrusted(encode_handover(handover)) == handover


def test_no_bytes_are_nothing() -> None:
    assert decode_handover_untrusted(b"") == NOTHING


def test_as_many_as_fit() -> None:
    endpoints = tuple(HandedEndpoint("n" * 31, 1024 + i, 0xFFFF_FFFE, True) for i in range(10_000))
    data = encode_handover(Handover((), endpoints))
    assert decode_handover_untrusted(data).endpoints == endpoints
    with pytest.raises(ValueError, match=f"the limit is {SIZE_LIMIT}"):
        encode_handover(Handover((), 3 * endpoints))
    with pytest.raises(ValueError, match=f"the limit is {SIZE_LIMIT}"):
        decode_handover_untrusted(data * 3)


def _encoded(channels: object = (), endpoints: object = ()) -> bytes:
    return json.dumps({"channels": channels, "endpoints": endpoints}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"[" * 100_000,
        b"1" * 10_000,
        b"null",
        b"{}",
        _encoded(channels=3),
        _encoded(channels=[3]),
        _encoded(channels=[["a"]]),
        _encoded(channels=[["", 1]]),
        _encoded(channels=[["n" * 125, 1]]),
        _encoded(channels=[["\ud800", 1]]),
        _encoded(channels=[[1, 1]]),
        _encoded(channels=[["a", -1]]),
        _encoded(channels=[["a", 0xFFFF_FFFF]]),
        _encoded(channels=[["a", 1.0]]),
        _encoded(channels=[["a", True]]),
        _encoded(channels=[["a", 53]]),
        _encoded(endpoints=[["a", 1, None]]),
        _encoded(endpoints=[["a", 1, None, 1]]),
        _encoded(endpoints=[["a", None, None, True]]),
        _encoded(endpoints=[["a", 53, None, True]]),
        _encoded(endpoints=[["a", 1, "b", True]]),
        _encoded(endpoints=[["a", 1, 2, True], [None, 1, 2, True]]),
    ],
)
def test_what_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode_handover_untrusted(data)


@PROPERTY
@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 60))
def test_any_bytes_are_a_handover_or_refused(piece: bytes, at: int, cut: int) -> None:
    good = encode_handover(FULL)
    for data in (piece, good[:at] + piece + good[at + cut :]):
        try:
            found = decode_handover_untrusted(data)
        except ValueError:
            continue
        assert decode_handover_untrusted(encode_handover(found)) == found
