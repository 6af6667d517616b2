"""Name-service messages and control messages as bytes; the header itself is the C ring's."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from openamp_py.constants import ADDRESS_ANY, NAME_SERVICE_ADDRESS, NAME_SIZE, SHUTDOWN_MSG

DEFAULT_BUFFER_SIZE: Final = 512
"""Bytes of a buffer, header included, that OpenAMP and Linux use."""

# Vring 0 carries messages from device to driver, vring 1 the other way.
TO_DRIVER: Final = 0
TO_DEVICE: Final = 1

# name[32], addr u32, flags u32
_NAME_SERVICE = struct.Struct(f"<{NAME_SIZE}sII")

_DESTROY = 1
"""The only flag bit (rpmsg.h, RPMSG_NS_DESTROY)."""

SHUTDOWN_REQUEST: Final = struct.pack("<I", SHUTDOWN_MSG)
"""What the host sends to ask the remote to leave; the remote acknowledges with the same."""


@dataclass(frozen=True, slots=True)
class Channel:
    """An announced service: its name and the address it listens at."""

    name: str
    address: int


@dataclass(frozen=True, slots=True)
class Announcement:
    """A name-service message: a channel comes, or goes."""

    channel: Channel
    destroy: bool = False


def check_name(name: str) -> bytes:
    """The bytes of a channel name.

    Raises:
        ValueError: empty, longer than 31 bytes as UTF-8, or with a NUL in it.
    """
    encoded = name.encode()
    if not 1 <= len(encoded) < NAME_SIZE or 0 in encoded:
        raise ValueError(
            f"channel name {name!r} has {len(encoded)} bytes; "
            f"1 to {NAME_SIZE - 1} are possible, none of them NUL"
        )
    return encoded


def encode_announcement(announcement: Announcement) -> bytes:
    """The 40 bytes of a name-service message, zero padded."""
    channel = announcement.channel
    flags = _DESTROY if announcement.destroy else 0
    return _NAME_SERVICE.pack(check_name(channel.name), channel.address, flags)


def decode_announcement_untrusted(payload: bytes) -> Announcement | None:
    """A name-service message from a peer, or None where it is not one.

    The name ends at the first NUL and what follows it is ignored; without one it is cut to the
    31 bytes that a name can have, as Linux does. Bytes that are not UTF-8 are shown as escapes.
    Refused: other lengths than 40, an empty name, and addresses nobody can listen at (any, and
    the name service's own).
    """
    if len(payload) != _NAME_SERVICE.size:
        return None
    field, address, flags = _NAME_SERVICE.unpack(payload)
    name = field[: NAME_SIZE - 1].partition(b"\0")[0].decode("utf-8", "backslashreplace")
    if not name or address in (ADDRESS_ANY, NAME_SERVICE_ADDRESS):
        return None
    return Announcement(Channel(name, address), bool(flags & _DESTROY))


def is_shutdown(payload: bytes) -> bool:
    """Whether a message is SHUTDOWN_MSG: as in OpenAMP, only its first u32 counts."""
    return payload[:4] == SHUTDOWN_REQUEST
