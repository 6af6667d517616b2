"""What the other side has announced, remembered within a bound."""

from __future__ import annotations

from collections.abc import Iterator

from openamp_py.rpmsg.wire import Channel

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
