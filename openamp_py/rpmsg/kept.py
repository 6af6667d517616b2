"""Buffers that received messages keep, and what is done when there are no others left."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import trio

from openamp_py.errors import VirtqueueError
from openamp_py.rpmsg.in_place import HeldMessage
from openamp_py.virtio.message_ring import IN_PLACE, KEPT

if TYPE_CHECKING:
    from openamp_py.rpmsg.bus import Bus
    from openamp_py.rpmsg.endpoint import Endpoint
    from openamp_py.virtio import MessageRing, VirtioDevice

_logger = logging.getLogger(__name__)


class KeptBuffers:
    """Buffers of the receiving ring that the peer lacks, because messages in them are still needed.

    They are occupied by messages that wait in an endpoint, or held by whoever received one. Made by
    the bus, which runs `run` and calls `begin` for each device that it works. All of it is called
    in the bus's thread and takes effect at once.

    Args:
        bus: whose ring it is.
        endpoints: those of the bus by address; the bus opens and closes them meanwhile.
        patience: see `BusOptions.patience`.

    Attributes:
        queued: buffers that waiting messages occupy. The bus counts those that come.
    """

    def __init__(self, bus: Bus, endpoints: Mapping[int, Endpoint], patience: float) -> None:
        self.queued = 0
        self._bus = bus
        self._endpoints = endpoints
        self._patience = patience
        self._modes: dict[int, int] = {}  # by address, for the ring
        self._held: dict[HeldMessage, int] = {}
        self._starved = trio.Event()

    def begin(self, device: VirtioDevice, ring: MessageRing, index: int) -> None:
        """Goes on with another device, of which nothing is kept yet.

        Args:
            index: of the vring, for kicks.
        """
        self._device = device
        self._ring = ring
        self._index = index
        self.queued = 0
        self._modes = {
            endpoint.address: IN_PLACE for endpoint in self._endpoints.values() if endpoint.in_place
        }
        ring.keep(self._modes)

    async def run(self) -> None:
        """Where all buffers are kept, makes endpoints that are not read give theirs up."""
        while True:
            await self._starved.wait()
            self._starved = trio.Event()
            generation = self._bus.generation
            before = {
                endpoint: endpoint.taken
                for endpoint in self._endpoints.values()
                if endpoint.occupies
            }
            await trio.sleep(self._patience)
            if not (self._bus.usable and self.is_starved):
                continue
            if generation != self._bus.generation:
                before.clear()
            for endpoint, taken in before.items():
                if endpoint.occupies and endpoint.taken == taken:
                    # As text: whoever keeps the record must not keep the bus.
                    what = repr(endpoint)
                    _logger.warning("%s keeps the link's buffers and is not read", what)
                    endpoint.give_up_held()
            if self.is_starved:
                self.begin_patience()

    def begin_patience(self) -> None:
        """It `is_starved`: who is not read from now on has to give up, if it stays like that."""
        self._starved.set()

    @property
    def is_starved(self) -> bool:
        """Whether queued messages keep so many buffers that the peer may have no other.

        How many it has is not known: not more than entries, but perhaps fewer, or some of them
        are being built in, or a message takes several.
        """
        num = self._ring.queue.layout.num
        return self.queued > 0 and 2 * (self.queued + len(self._held)) >= num

    @property
    def count(self) -> int:
        """How many the peer lacks."""
        return self.queued + len(self._held)

    # What follows is for the endpoints.

    def choose(self, endpoint: Endpoint) -> None:
        """Whether the buffers of further messages for an endpoint are kept has changed."""
        if endpoint.in_place:
            self._modes[endpoint.address] = IN_PLACE
        elif endpoint.holds_back:
            self._modes[endpoint.address] = KEPT
        else:
            self._modes.pop(endpoint.address, None)
        if self._bus.usable:
            self._ring.keep(self._modes)

    def release(self, heads: Sequence[int]) -> None:
        """Gives buffers back that queued messages occupied."""
        self.queued -= len(heads)
        self.give_back_heads(heads)

    def open_held(self, head: int, length: int, source: int) -> HeldMessage:
        """A queued message that is only in its buffer, in the hands of whoever asked."""
        view = self._device.memory.find_pa(self._ring.place(head), length)
        assert view is not None, "translated before"
        held = HeldMessage(view.toreadonly(), source, self)
        self._held[held] = head
        self.queued -= 1
        return held

    def copy(self, head: int, length: int) -> bytes:
        """The payload in a buffer that a queued message occupies."""
        view = self._device.memory.find_pa(self._ring.place(head), length)
        assert view is not None, "translated before"
        return bytes(view)

    # What follows is for held messages and the bus.

    def give_back(self, held: HeldMessage) -> Exception | None:
        """A held message was released. Returns why that is of no use, where the link is over."""
        head = self._held.pop(held)
        if not self._bus.usable:
            return self._bus.ended()
        self.give_back_heads([head])
        return None

    def give_back_heads(self, heads: Sequence[int]) -> None:
        """Gives buffers back that are not counted here."""
        if heads and self._bus.usable:
            try:
                kick = self._ring.release(heads)
            except VirtqueueError as error:
                self._bus.fail(error)
                return
            self._bus.tell(self._index, wanted=kick)

    def forget(self, endpoint: Endpoint, heads: Sequence[int]) -> None:
        """An endpoint was closed; `heads` are the buffers that its messages occupied."""
        self._modes.pop(endpoint.address, None)
        self.release(heads)
        if self._bus.usable:
            self._ring.keep(self._modes)

    def vacate(self) -> list[int]:
        """Before `take_away`, where the device goes on without us: what waits is copied.

        Returns:
            All the buffers, for `give_back_heads`.
        """
        heads = [*self._held.values()]
        for endpoint in self._endpoints.values():
            heads += endpoint.vacate()
        return heads

    def take_away(self, error: Exception) -> None:
        """The buffers are not ours any more; `error` is for whoever releases one he holds."""
        for held in self._held:
            held.take_away(error)
        self._held.clear()
        self.queued = 0
