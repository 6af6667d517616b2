"""RPMsg: buses, endpoints and the name service. Knows devices, not where they come from."""

from __future__ import annotations

from openamp_py.rpmsg.bus import Bus, open_bus
from openamp_py.rpmsg.endpoint import Endpoint, WhenFull
from openamp_py.rpmsg.handover import (
    Handover,
    decode_handover_untrusted,
    encode_handover,
)
from openamp_py.rpmsg.in_place import HeldMessage, Reservation
from openamp_py.rpmsg.options import BusOptions
from openamp_py.rpmsg.recent import RecentMessage, RecentMessages, recent_messages
from openamp_py.rpmsg.statistics import BusDump, BusStatistics, Drops, EndpointStatistics
from openamp_py.rpmsg.watch import ServiceWatch
from openamp_py.rpmsg.wire import Announcement, Channel
from openamp_py.virtio import Message

__all__ = [
    "Announcement",
    "Bus",
    "BusDump",
    "BusOptions",
    "BusStatistics",
    "Channel",
    "Drops",
    "Endpoint",
    "EndpointStatistics",
    "Handover",
    "HeldMessage",
    "Message",
    "RecentMessage",
    "RecentMessages",
    "Reservation",
    "ServiceWatch",
    "WhenFull",
    "decode_handover_untrusted",
    "encode_handover",
    "open_bus",
    "recent_messages",
]
