"""RPMsg: buses, endpoints and the name service. Knows devices, not where they come from."""

from __future__ import annotations

from openamp_py.rpmsg.bus import Bus, Drops, open_bus
from openamp_py.rpmsg.endpoint import Endpoint, Message
from openamp_py.rpmsg.wire import Channel

__all__ = ["Bus", "Channel", "Drops", "Endpoint", "Message", "open_bus"]
