"""Name-service messages: our bytes, real senders' bytes, anybody's bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py.constants import ADDRESS_ANY, NAME_SERVICE_ADDRESS
from openamp_py.rpmsg.wire import (
    Announcement,
    Channel,
    decode_announcement_untrusted,
    encode_announcement,
    is_shutdown,
)

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "ns.jsonl"

deterministic = settings(derandomize=True, deadline=None)


def test_encodes_40_bytes_zero_padded() -> None:
    data = encode_announcement(Announcement(Channel("echo", 1024)))
    assert data == b"echo".ljust(32, b"\0") + (1024).to_bytes(4, "little") + bytes(4)


def test_destroy_is_flag_bit_0() -> None:
    data = encode_announcement(Announcement(Channel("echo", 1024), destroy=True))
    assert data[36:] == b"\1\0\0\0"


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"no captured messages at {GOLDEN}")
def test_decodes_what_real_senders_send() -> None:
    lines = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    assert len(lines) == 14
    for line in lines:
        announcement = decode_announcement_untrusted(bytes.fromhex(line["bytes"])[16:])
        channel = Channel(line["name"], line["addr"])
        assert announcement == Announcement(channel, destroy=bool(line["ns_flags"]))


@pytest.mark.parametrize("name", ["x", "n" * 31, "é" * 15])
def test_names_of_1_to_31_bytes_round_trip(name: str) -> None:
    announcement = Announcement(Channel(name, 7))
    assert decode_announcement_untrusted(encode_announcement(announcement)) == announcement


@pytest.mark.parametrize("name", ["", "n" * 32, "é" * 16, "a\0b"])
def test_refuses_names_that_do_not_fit(name: str) -> None:
    with pytest.raises(ValueError, match="1 to 31"):
        encode_announcement(Announcement(Channel(name, 7)))


def _raw(name: bytes, address: int = 1024, flags: int = 0) -> bytes:
    return name.ljust(32, b"\0") + address.to_bytes(4, "little") + flags.to_bytes(4, "little")


def test_a_name_without_terminator_is_cut_to_what_a_name_can_have() -> None:
    announcement = decode_announcement_untrusted(_raw(b"n" * 32))
    assert announcement is not None and announcement.channel.name == "n" * 31


def test_a_name_that_is_not_utf8_is_shown_escaped() -> None:
    announcement = decode_announcement_untrusted(_raw(b"a\xff"))
    assert announcement is not None and announcement.channel.name == "a\\xff"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        _raw(b"x")[:39],
        _raw(b"x") + b"\0",
        _raw(b""),
        _raw(b"x", ADDRESS_ANY),
        _raw(b"x", NAME_SERVICE_ADDRESS),
    ],
)
def test_refuses_what_is_no_announcement(payload: bytes) -> None:
    assert decode_announcement_untrusted(payload) is None


@deterministic
@given(st.binary(max_size=80) | st.binary(min_size=40, max_size=40))
def test_any_bytes_give_an_announcement_or_none(payload: bytes) -> None:
    announcement = decode_announcement_untrusted(payload)
    if announcement is not None:
        assert len(payload) == 40
        announcement.channel.name.encode()


def test_shutdown_is_told_by_its_first_word() -> None:
    assert is_shutdown(bytes.fromhex("5aa556ef"))
    assert is_shutdown(bytes.fromhex("5aa556ef") + b"more")
    assert not is_shutdown(bytes.fromhex("5aa556"))
    assert not is_shutdown(b"")
