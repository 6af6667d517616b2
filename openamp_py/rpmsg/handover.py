"""What a host that leaves a device running tells the next one: rings alone do not say it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from openamp_py.constants import ADDRESS_ANY, NAME_SERVICE_ADDRESS
from openamp_py.rpmsg.wire import Channel

SIZE_LIMIT: Final = 1 << 20
"""Most bytes of an encoded handover: several thousand endpoints and all channels."""

# A name of 31 bytes of which none is UTF-8, each shown as four characters.
_NAME_LIMIT = 4 * 31


@dataclass(frozen=True, slots=True)
class HandedEndpoint:
    """An endpoint as the other side knows it."""

    name: str | None
    address: int
    destination: int | None = None
    """Its peer, where it was bound."""
    announced: bool = False
    """The other side was told of it."""


@dataclass(frozen=True, slots=True)
class Handover:
    """The other side's channels and this side's endpoints at one moment: see `Bus.handover`."""

    channels: tuple[Channel, ...] = ()
    endpoints: tuple[HandedEndpoint, ...] = ()


NOTHING: Final = Handover()


def encode_handover(handover: Handover) -> bytes:
    """A handover as bytes, for `decode_handover_untrusted`.

    Raises:
        ValueError: it is too long.
    """
    content = {
        "channels": [[channel.name, channel.address] for channel in handover.channels],
        "endpoints": [
            [each.name, each.address, each.destination, each.announced]
            for each in handover.endpoints
        ],
    }
    data = json.dumps(content, separators=(",", ":")).encode()
    if len(data) > SIZE_LIMIT:
        raise ValueError(f"a handover of {len(data)} bytes; the limit is {SIZE_LIMIT}")
    return data


def decode_handover_untrusted(data: bytes) -> Handover:
    """What `encode_handover` made; no bytes at all are a handover of nothing.

    Raises:
        ValueError: it is too long, or is none.
    """
    if not data:
        return NOTHING
    if len(data) > SIZE_LIMIT:
        raise ValueError(f"a handover of {len(data)} bytes; the limit is {SIZE_LIMIT}")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a handover that is no JSON: {error}") from None
    channels, endpoints = [], []
    for name, address in _rows(content, "channels", 2):
        if address == NAME_SERVICE_ADDRESS:
            raise ValueError(f"handover: a channel at {address}, the name service's address")
        channels.append(Channel(_name(name), _address(address)))
    for name, address, destination, announced in _rows(content, "endpoints", 4):
        if not isinstance(announced, bool):
            raise ValueError(f"handover: {announced!r:.80} where true or false was expected")
        if address == NAME_SERVICE_ADDRESS:
            raise ValueError(f"handover: an endpoint at {address}, the name service's address")
        endpoints.append(
            HandedEndpoint(
                None if name is None else _name(name),
                _address(address),
                None if destination is None else _address(destination),
                announced,
            )
        )
    if len({each.address for each in endpoints}) < len(endpoints):
        raise ValueError("handover: two endpoints have the same address")
    return Handover(tuple(channels), tuple(endpoints))


def _rows(content: object, key: str, width: int) -> list[list[Any]]:
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and len(row) == width for row in rows
    ):
        raise ValueError(f"handover: {key!r} is not a list of rows of {width}")
    return rows


def _name(value: object) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= _NAME_LIMIT:
        raise ValueError(f"handover: {value!r:.80} is not a name of 1 to {_NAME_LIMIT} characters")
    value.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
    return value


def _address(value: object) -> int:
    if type(value) is not int or not 0 <= value < ADDRESS_ANY:
        raise ValueError(f"handover: {value!r:.80} is not an address")
    return value
