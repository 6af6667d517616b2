"""The name service: what the other side announced, and which endpoint talks with what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from openamp_py.rpmsg.wire import Channel, decode_announcement_untrusted

if TYPE_CHECKING:
    from openamp_py.rpmsg.endpoint import Endpoint
    from openamp_py.rpmsg.watch import ServiceWatch

CHANNEL_LIMIT = 1024
"""Channels remembered for each bus; a peer that announces more is refused and counted."""


class ChannelRegistry:
    """The channels a peer has announced and not withdrawn, oldest first."""

    def __init__(self, limit: int = CHANNEL_LIMIT) -> None:
        self._limit = limit
        self._channels: dict[Channel, None] = {}

    def __iter__(self) -> Iterator[Channel]:
        return iter(tuple(self._channels))

    def create(self, channel: Channel) -> str | None:
        """Remembers a channel; again is no harm. Returns why not, where there are too many."""
        if channel not in self._channels and len(self._channels) >= self._limit:
            return f"{self._limit} channels are announced, which is the limit"
        self._channels[channel] = None
        return None

    def destroy(self, channel: Channel) -> str | None:
        """Forgets a channel. Returns why not, if it is refused."""
        if channel not in self._channels:
            return "it is not announced"
        del self._channels[channel]
        return None


class NameService:
    """What is announced over one device, and what that means for the endpoints of a bus.

    Made by the bus for each device that it works. It knows endpoints and watches, but no rings:
    the bus brings what came for the name service, and sends the `replies`.

    Args:
        endpoints: those of the bus by address; the bus opens and closes them meanwhile.
        acknowledges: a service that an endpoint is bound to is answered, as a host has to.

    Attributes:
        replies: endpoints of which the other side is to be told, the first of them first. The bus
            takes out whom it told.
        watches: who follows the announcements. The bus adds and removes them.
    """

    def __init__(self, endpoints: Mapping[int, Endpoint], *, acknowledges: bool) -> None:
        self.replies: dict[Endpoint, None] = {}
        self.watches: set[ServiceWatch] = set()
        self._endpoints = endpoints
        self._acknowledges = acknowledges
        self._registry = ChannelRegistry()

    @property
    def channels(self) -> tuple[Channel, ...]:
        """What is announced and not withdrawn, oldest first."""
        return tuple(self._registry)

    def find(self, name: str) -> Channel | None:
        """The oldest channel of this name."""
        return next((channel for channel in self._registry if channel.name == name), None)

    def take_over(self, channel: Channel) -> str | None:
        """A channel that was announced to the host before. Returns why it is refused, if it is."""
        return self._registry.create(channel)

    def handle_untrusted(self, payload: bytes) -> tuple[str, str] | None:
        """A message for the name service came. Returns what of it is refused, and why."""
        announcement = decode_announcement_untrusted(payload)
        if announcement is None:
            return repr(payload[:40]), "it is malformed"
        channel = announcement.channel
        if announcement.destroy:
            refusal = self._registry.destroy(channel)
            if self._unbind(channel):
                refusal = None  # it was bound by a message, without an announcement
        else:
            refusal = self._registry.create(channel)
            if refusal is None:
                self._bind(channel)
        if refusal is not None:
            return f"{channel}", refusal
        for watch in self.watches:
            watch.add(announcement)
        return None

    def bind_to_known(self, endpoint: Endpoint) -> None:
        """Binds an endpoint to a service announced before, that no other one is bound to."""
        same = (each for each in self._endpoints.values() if each.name == endpoint.name)
        taken = {each.destination for each in same}
        for channel in self._registry:
            if channel.name == endpoint.name and channel.address not in taken:
                self._bind_endpoint(endpoint, channel)
                return

    def bind_successors(self, closed: Endpoint) -> None:
        """The peer of an endpoint that was closed may be what others of its name wait for."""
        for other in self._endpoints.values():
            if other.name is not None and other.name == closed.name and not other.is_bound:
                self.bind_to_known(other)

    def _unbind(self, channel: Channel) -> bool:
        """Returns whether any endpoint was bound to it."""
        bound = [
            endpoint
            for endpoint in self._endpoints.values()
            if endpoint.name == channel.name and endpoint.destination == channel.address
        ]
        for endpoint in bound:
            endpoint.unbind()
            if not endpoint.is_bound and not endpoint.is_withdrawn:
                self.bind_to_known(endpoint)
        return bool(bound)

    def _bind(self, channel: Channel) -> None:
        """Binds the endpoint that has this peer, or the first that waits for this service."""
        named = [each for each in self._endpoints.values() if each.name == channel.name]
        for destination in (channel.address, None):
            for endpoint in named:
                if endpoint.destination == destination:
                    self._bind_endpoint(endpoint, channel)
                    return

    def _bind_endpoint(self, endpoint: Endpoint, channel: Channel) -> None:
        endpoint.bind(channel.address)
        if self._acknowledges and endpoint.announces:
            self.replies[endpoint] = None
