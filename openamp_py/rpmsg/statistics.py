"""What buses and endpoints counted, and a report of them that a person can read."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from openamp_py.rpmsg.wire import Channel
from openamp_py.virtio import MessageRing


@dataclass(frozen=True, slots=True)
class Drops:
    """Messages from the peer that reached no application, by reason."""

    unknown_destination: int = 0
    """Nobody listens at their destination."""
    bad_length: int = 0
    """Header and buffer contradict each other."""
    bad_source: int = 0
    """Their source is the address that means "any"; nobody could be answered."""
    bad_announcement: int = 0
    """Name-service messages that are malformed, withdraw what is unknown, or are too many."""
    full: int = 0
    """Their endpoint was full and was opened to drop the oldest or the newest."""
    unread: int = 0
    """Their endpoint held the peer back, and was not read for too long."""
    stale: int = 0
    """They were still queued when the bus went on over a new device."""


@dataclass(frozen=True, slots=True)
class BusStatistics:
    """What a bus counted since it was opened, over all its generations."""

    generation: int
    """How often the bus went on over a new device."""
    sent: int
    """Messages, those of the name service among them."""
    sent_bytes: int
    """Bytes of their payloads."""
    received: int
    received_bytes: int
    kicks_sent: int
    kicks_suppressed: int
    """Times the peer did not want to be told."""
    kicks_received: int
    """Notifications heard; several kicks may be one."""
    buffer_waits: int
    """Sends that had to wait for a free buffer."""
    polls: int
    """Waits that looked at the rings before they slept."""
    poll_hits: int
    """Those that thereby needed no sleep."""
    held: int
    """Received buffers that are not given back yet: by endpoints that are full, and in place."""
    reserved: int
    """Buffers taken for messages that are being built."""
    drops: Drops


@dataclass(frozen=True, slots=True)
class EndpointStatistics:
    """What an endpoint counted since it was opened."""

    sent: int
    sent_bytes: int
    received: int
    """Messages that came for it, the dropped ones among them."""
    received_bytes: int
    buffer_waits: int
    """Sends that had to wait for a free buffer."""
    queued: int
    """Messages that wait to be received."""
    held: int
    """Shared buffers that its messages occupy."""
    dropped: int
    """Messages it lost because it was full, or not read."""


@dataclass(frozen=True, slots=True)
class EndpointReport:
    """An endpoint as `Bus.dump` shows it."""

    name: str | None
    address: int
    destination: int | None
    when_full: str
    statistics: EndpointStatistics


@dataclass(frozen=True, slots=True)
class BusDump:
    """A bus at one moment, for a bug report: ``str()`` gives text, `to_json` the same as JSON."""

    device: str
    role: str
    status: int
    """The device's status byte."""
    features: int
    failure: str | None
    payload_limit: int
    receive_payload_limit: int
    polling: float
    rings: tuple[Any, ...]
    """The sending and the receiving virtqueue: dataclasses of names and numbers."""
    endpoints: tuple[EndpointReport, ...]
    channels: tuple[Channel, ...]
    statistics: BusStatistics
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """All of it as one JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        lines = [
            f"bus on {self.device} ({self.role}): status {self.status:#x}, features "
            f"{self.features:#x}, generation {self.statistics.generation}",
            f"  failure: {self.failure or 'none'}",
            f"  payload limit: {self.payload_limit} sent, {self.receive_payload_limit} received; "
            f"polling {self.polling * 1e6:g} us",
        ]
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        lines += [f"  options: {options}"]
        lines += [f"  {_fields(ring)}" for ring in self.rings]
        lines += [f"  {_fields(self.statistics)}"]
        lines += [f"endpoints: {len(self.endpoints)}"]
        for endpoint in self.endpoints:
            peer = "not bound" if endpoint.destination is None else f"{endpoint.destination:#x}"
            lines += [
                f"  {endpoint.address:#x} -> {peer} {endpoint.name or '(no name)'}, "
                f"{endpoint.when_full}: {_fields(endpoint.statistics)}"
            ]
        lines += [f"channels announced by the peer: {len(self.channels)}"]
        # A peer's name may be anything, also what a terminal obeys.
        lines += [f"  {channel.name!r} at {channel.address:#x}" for channel in self.channels]
        return "\n".join(lines)


def count_rings(sending: MessageRing, receiving: MessageRing) -> Counter[str]:
    """What the rings of one device counted, in words of `BusStatistics` and `Drops`."""
    (kicks, unkicked), (more_kicks, more_unkicked) = sending.kicks, receiving.kicks
    return Counter(
        sent=sending.messages,
        sent_bytes=sending.payload_bytes,
        received=receiving.messages,
        received_bytes=receiving.payload_bytes,
        kicks=kicks + more_kicks,
        unkicked=unkicked + more_unkicked,
        bad_length=receiving.bad_length,
        bad_source=receiving.bad_source,
    )


def _fields(value: Any) -> str:
    parts = []
    for each in dataclasses.fields(value):
        content = getattr(value, each.name)
        if dataclasses.is_dataclass(content):
            parts.append(f"{each.name} ({_fields(content)})")
        elif content is not None:
            parts.append(f"{each.name} {content}")
    return ", ".join(parts)
