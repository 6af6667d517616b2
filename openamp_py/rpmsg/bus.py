"""The RPMsg bus: messages between endpoints and the two message rings of a virtio device."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import trio

from openamp_py.constants import ADDRESS_ANY, NAME_SERVICE_ADDRESS, RPMSG_F_NS, VIRTIO_ID_RPMSG
from openamp_py.errors import (
    OpenAMPError,
    PeerError,
    PeerGoneError,
    ResourceTableError,
    VirtqueueError,
)
from openamp_py.rpmsg.addresses import AddressSpace, check_destination
from openamp_py.rpmsg.endpoint import Endpoint
from openamp_py.rpmsg.name_service import ChannelRegistry
from openamp_py.rpmsg.wire import (
    DEFAULT_BUFFER_SIZE,
    Channel,
    check_name,
    decode_announcement_untrusted,
)
from openamp_py.virtio import MessageRing, Role, VirtioDevice

_logger = logging.getLogger(__name__)

# Vring 0 carries messages from device to driver, vring 1 the other way.
_TO_DRIVER, _TO_DEVICE = 0, 1

# A remote waits for DRIVER_OK. Hosts kick after it, but not every host's kick arrives before
# the remote listens, so the status is looked at again this often (seconds) until then.
_STATUS_RECHECK = 0.02

_NO_BUFFER, _SMALL_BUFFER = -1, -3

DEFAULT_QUEUE_LIMIT = 256
"""Messages an endpoint keeps before further ones stay in their shared buffers."""


def _level(count: int) -> int:
    """The first of its kind is worth a warning; a peer must not be able to flood the log."""
    return logging.DEBUG if count else logging.WARNING


@dataclass(frozen=True, slots=True)
class Drops:
    """Messages from the peer that reached no endpoint, by reason."""

    unknown_destination: int = 0
    """Nobody listens at their destination."""
    bad_length: int = 0
    """Header and buffer contradict each other."""
    bad_source: int = 0
    """Their source is the address that means "any"; nobody could be answered."""
    bad_announcement: int = 0
    """Name-service messages that are malformed, withdraw what is unknown, or are too many."""


class _Turn:
    """A sender that waits for a buffer."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.called = trio.Event()


class Bus:
    """Endpoints over one RPMsg virtio device, in either role.

    Made by `open_bus`. It has no task of its own: notifications are handled in the task
    that listens to the doorbell, and a receiver looks into the ring before it sleeps.
    All its users share one trio thread.
    """

    def __init__(self, device: VirtioDevice, sending: MessageRing, receiving: MessageRing) -> None:
        self._device = device
        self._sending = sending
        self._receiving = receiving
        driver = device.role is Role.DRIVER
        self._send_index = _TO_DEVICE if driver else _TO_DRIVER
        self._receive_index = _TO_DRIVER if driver else _TO_DEVICE
        self._names = bool(device.features & RPMSG_F_NS)
        self._endpoints: dict[int, Endpoint] = {}
        self._full: set[Endpoint] = set()
        self._addresses = AddressSpace()
        self._registry = ChannelRegistry()
        self._replies: dict[Endpoint, None] = {}
        self._turns: deque[_Turn] = deque()
        self._news = trio.lowlevel.ParkingLot()
        self._drops = Drops()
        self._closed = False
        self._trio_token = trio.lowlevel.current_trio_token()
        self.failure: OpenAMPError | None = None
        device.on_notify = self._notified
        device.on_failure = self._device_failed

    @property
    def payload_limit(self) -> int:
        """Most bytes that one sent message can carry."""
        return self._sending.payload_limit

    @property
    def role(self) -> Role:
        """This side's end of the link."""
        return self._device.role

    @property
    def channels(self) -> tuple[Channel, ...]:
        """What the other side has announced and not withdrawn, oldest first."""
        return tuple(self._registry)

    @property
    def drops(self) -> Drops:
        """Messages from the peer that reached no endpoint so far."""
        return replace(self._drops, bad_length=self._receiving.bad_length)

    async def wait_service(self, name: str) -> Channel:
        """Waits until the other side has announced a service of this name.

        Raises:
            trio.BrokenResourceError: the other side is gone.
            trio.ClosedResourceError: the bus was closed here.
        """
        await trio.lowlevel.checkpoint()
        while True:
            for channel in self._registry:
                if channel.name == name:
                    return channel
            self._check_usable()
            await self._news.park()

    @asynccontextmanager
    async def open_endpoint(
        self,
        name: str | None = None,
        *,
        address: int = ADDRESS_ANY,
        destination: int = ADDRESS_ANY,
        announce: bool = True,
        queue_limit: int = DEFAULT_QUEUE_LIMIT,
    ) -> AsyncIterator[Endpoint]:
        """Opens an endpoint for an `async with` block and closes it at its end.

        With a name it is bound to the other side's service of that name, now or when
        that is announced. It announces itself if it may (`announce`, no fixed
        `destination`, and the link has a name service); a host thereby also acknowledges
        the service it binds to.

        Args:
            name: the service's name, 1 to 31 bytes as UTF-8; None for a bare address.
            address: local address; by default the lowest free one from 1024 on.
            destination: the peer's address where it is known in advance.
            announce: whether to tell the other side.
            queue_limit: received messages kept before further ones stay in their buffers and
                hold the peer back; one batch of up to 64 may still come on top.

        Raises:
            ValueError: a bad name, an address that is in use or not possible.
            trio.BrokenResourceError: the other side is gone.
        """
        if name is not None:
            check_name(name)
        if destination != ADDRESS_ANY:
            check_destination(destination)
        if queue_limit < 1:
            raise ValueError(f"queue_limit is {queue_limit}; at least 1 is needed")
        self._check_usable()
        endpoint = Endpoint(self, name, self._addresses.take(address), destination, queue_limit)
        self._endpoints[endpoint.address] = endpoint
        try:
            if name is not None and not endpoint.is_bound:
                self._bind_to_known(endpoint, name)
                if announce and self._names and destination == ADDRESS_ANY:
                    await endpoint.announce()
            yield endpoint
        finally:
            await endpoint.aclose()

    async def aclose(self) -> None:
        """Takes the link down: a host resets the device, so that the remote sees it. Idempotent.

        Endpoints still open are closed without a word to the peer.
        """
        if not self._closed:
            for endpoint in tuple(self._endpoints.values()):
                endpoint.close()
            self._closed = True
            self._wake_all()
            self._device.on_notify = self._device.on_failure = None
            if self.role is Role.DRIVER and self.failure is None:
                self._device.end()
            self._sending.close()
            self._receiving.close()
        await trio.lowlevel.cancel_shielded_checkpoint()

    # What follows is for the endpoints.

    def broken(self, what: str) -> trio.BrokenResourceError:
        """The error for a user of a link that failed, with the failure as its cause."""
        error = trio.BrokenResourceError(f"{what}: {self.failure}")
        error.__cause__ = self.failure
        return error

    def send_nowait(self, source: int, destination: int, payload: bytes) -> bool:
        """Sends a message now, unless others wait for a buffer. Returns whether it went."""
        return not self._turns and self._try_send(source, destination, payload)

    async def send_when_free(self, endpoint: Endpoint, destination: int, payload: bytes) -> None:
        """Waits for a buffer, behind those who wait already, and sends.

        Cancellation: nothing was sent.
        """
        turn = _Turn(endpoint)
        self._turns.append(turn)
        try:
            while True:
                endpoint.check_usable()
                # The wish comes before the look, so a buffer that is freed in between is notified.
                if (
                    self._turns[0] is turn
                    and self._want_buffer()
                    and self._try_send(endpoint.address, destination, payload)
                ):
                    break
                endpoint.check_usable()
                turn.called = trio.Event()
                await turn.called.wait()
        finally:
            self._turns.remove(turn)
            self._call_next()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def drain(self) -> None:
        """Takes what has come in and delivers it; what is too much for once follows soon."""
        try:
            give_back = not self._full
            messages, kick, more = self._receiving.receive(give_back)
            done = []
            for source, destination, head, payload in messages:
                if not self._deliver(source, destination, None if give_back else head, payload):
                    done.append(head)
            if done and not give_back:
                kick |= self._receiving.release(done)
        except VirtqueueError as error:
            self._fail(error)
            return
        if kick:
            self._device.kick(self._receive_index)
        if more:
            self._trio_token.run_sync_soon(self._drain_on, idempotent=True)

    def catch_up(self) -> None:
        """Handles what happened to the device before the bus listened to it."""
        if self._device.failure is not None:
            self._device_failed(self._device.failure)
        else:
            self.drain()

    def took_message(self, endpoint: Endpoint, head: int | None) -> None:
        """A message was received that held its buffer, or that made room."""
        if not endpoint.is_full:
            self._full.discard(endpoint)
        if head is not None:
            self._release([head])

    def forget(self, endpoint: Endpoint, heads: list[int]) -> None:
        """An endpoint was closed; `heads` are the buffers its messages held."""
        del self._endpoints[endpoint.address]
        self._addresses.give_back(endpoint.address)
        self._full.discard(endpoint)
        self._replies.pop(endpoint, None)
        self._release(heads)
        for turn in self._turns:
            if turn.endpoint is endpoint:
                turn.called.set()

    # Inside.

    def _check_usable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("the bus was closed")
        if self.failure is not None:
            raise self.broken("bus")

    def _try_send(self, source: int, destination: int, payload: bytes) -> bool:
        try:
            result = self._sending.send(source, destination, payload)
        except VirtqueueError as error:
            self._fail(error)
            raise self.broken("send") from error
        if result == _NO_BUFFER:
            return False
        if result == _SMALL_BUFFER:
            raise trio.BrokenResourceError("send") from PeerError(
                f"{self._device.name}: the driver lent a buffer that is too small for "
                f"{len(payload)} bytes of payload; this side was told of "
                f"{self._sending.buffer_size} bytes with header"
            )
        if result:
            self._device.kick(self._send_index)
        return True

    def _want_buffer(self) -> bool:
        """Asks to be notified of a free buffer. Returns whether there is one already."""
        try:
            return self._sending.want_buffer()
        except VirtqueueError as error:
            self._fail(error)
            return False

    def _call_next(self) -> None:
        """Calls the first who waits for a buffer, if there is one; else asks to be told."""
        if self._closed or self.failure is not None:
            return
        if not (self._turns or self._replies):
            self._sending.queue.notify_off()
        elif self._turns and self._want_buffer():
            self._turns[0].called.set()

    def _release(self, heads: list[int]) -> None:
        if heads and self.failure is None:
            try:
                kick = self._receiving.release(heads)
            except VirtqueueError as error:
                self._fail(error)
                return
            if kick:
                self._device.kick(self._receive_index)

    def _notified(self) -> None:
        if self.failure is not None:
            return
        self.drain()
        if self.failure is None and not self._device.is_up:
            self._device_failed(
                PeerGoneError(
                    f"{self._device.name}: the other side reset the device "
                    f"(status {self._device.status:#x})"
                )
            )
        if self._replies or self._turns:
            self._send_replies()

    def _drain_on(self) -> None:
        if not self._closed and self.failure is None:
            self.drain()

    def _deliver(self, source: int, destination: int, head: int | None, payload: bytes) -> bool:
        """Hands one message on. Returns whether it keeps its buffer `head`."""
        if source == ADDRESS_ANY:
            count = self._drops.bad_source
            self._drops = replace(self._drops, bad_source=count + 1)
            _logger.log(_level(count), "%s: dropped a message from no address", self._device.name)
            return False
        endpoint = self._endpoints.get(destination)
        if endpoint is None:
            if destination == NAME_SERVICE_ADDRESS and self._names:
                self._handle_announcement(payload)
            else:
                count = self._drops.unknown_destination
                self._drops = replace(self._drops, unknown_destination=count + 1)
                _logger.log(
                    _level(count),
                    "%s: dropped a message of %d bytes from %#x: nobody listens at %#x",
                    self._device.name,
                    len(payload),
                    source,
                    destination,
                )
            return False
        keeps = head is not None and endpoint.is_full
        endpoint.deliver(payload, source, head if keeps else None)
        if endpoint.is_full:
            self._full.add(endpoint)
        return keeps

    def _handle_announcement(self, payload: bytes) -> None:
        announcement = decode_announcement_untrusted(payload)
        if announcement is None:
            self._refuse_announcement(repr(payload[:40]), "it is malformed")
            return
        channel = announcement.channel
        if announcement.destroy:
            refusal = self._registry.destroy(channel)
            for endpoint in self._endpoints.values():
                if endpoint.name == channel.name and endpoint.destination == channel.address:
                    endpoint.unbind()
        else:
            refusal = self._registry.create(channel)
            self._bind_and_acknowledge(channel)
        if refusal:
            self._refuse_announcement(f"{channel}", refusal)
        self._news.unpark_all()

    def _refuse_announcement(self, what: str, why: str) -> None:
        count = self._drops.bad_announcement
        self._drops = replace(self._drops, bad_announcement=count + 1)
        _logger.log(
            _level(count), "%s: announcement of %s refused: %s", self._device.name, what, why
        )

    def _bind_and_acknowledge(self, channel: Channel) -> None:
        """Binds the first endpoint that waits for this service; a host answers for it."""
        for endpoint in self._endpoints.values():
            if endpoint.name == channel.name and endpoint.destination in (None, channel.address):
                endpoint.bind(channel.address)
                if self.role is Role.DRIVER and endpoint.announces:
                    self._replies[endpoint] = None
                    self._send_replies()
                return

    def _bind_to_known(self, endpoint: Endpoint, name: str) -> None:
        """Binds a new endpoint to a service announced before, that no other one is bound to."""
        taken = {other.destination for other in self._endpoints.values() if other.name == name}
        for channel in self._registry:
            if channel.name == name and channel.address not in taken:
                endpoint.bind(channel.address)
                return

    def _send_replies(self) -> None:
        """Sends acknowledgements that are due, as far as there are buffers."""
        try:
            while self._replies and self.failure is None:
                endpoint = next(iter(self._replies))
                if not self._want_buffer():
                    return  # and a notification will come
                announcement = endpoint.announcement()
                if not self._try_send(endpoint.address, NAME_SERVICE_ADDRESS, announcement):
                    return
                endpoint.was_told()
                del self._replies[endpoint]
        except trio.BrokenResourceError:
            return
        self._call_next()

    def _fail(self, cause: OpenAMPError) -> None:
        """The link is over: everyone who waits wakes with this cause."""
        if self.failure is None:
            self.failure = cause
            self._wake_all()

    def _device_failed(self, cause: OpenAMPError) -> None:
        """The other side is gone; what it sent before is still delivered."""
        for _ in range(self._receiving.queue.layout.num):
            if self.failure is not None or not self._receiving.queue.pending:
                break
            self.drain()
        self._fail(cause)

    def _wake_all(self) -> None:
        for endpoint in self._endpoints.values():
            endpoint.wake()
        for turn in self._turns:
            turn.called.set()
        self._news.unpark_all()


async def _wait_driver(device: VirtioDevice) -> None:
    """Device: sleeps until the driver says DRIVER_OK."""
    lot = trio.lowlevel.ParkingLot()

    def wake(_: object = None) -> None:
        lot.unpark_all()

    device.on_notify = device.on_failure = wake
    try:
        while not device.poll_driver():
            if device.failure is not None:
                raise trio.BrokenResourceError(
                    f"{device.name}: the driver never came up: {device.failure}"
                ) from device.failure
            with trio.move_on_after(_STATUS_RECHECK):
                await lot.park()
    finally:
        device.on_notify = device.on_failure = None


@asynccontextmanager
async def open_rings(
    device: VirtioDevice,
    *,
    send_buffer_size: int = DEFAULT_BUFFER_SIZE,
    receive_buffer_size: int = DEFAULT_BUFFER_SIZE,
) -> AsyncIterator[tuple[MessageRing, MessageRing]]:
    """The bare message rings of an RPMsg device, for an `async with` block.

    What is below `open_bus`, for whoever works them by other means; takes and raises the same.
    A driver still has to say `set_driver_ok`, once it is ready to be notified, and to end the
    device; a device has been waited for.

    Returns:
        The sending and the receiving one.
    """
    if device.device_id != VIRTIO_ID_RPMSG:
        raise ValueError(f"{device.name} has virtio id {device.device_id}, not 7 (RPMsg)")
    if len(device.vrings) != 2:
        raise ResourceTableError(f"{device.name} has {len(device.vrings)} vrings; RPMsg needs 2")
    await trio.lowlevel.checkpoint()
    if device.failure is not None:
        raise trio.BrokenResourceError(f"{device.name}: {device.failure}") from device.failure
    driver = device.role is Role.DRIVER
    if driver:
        device.begin(RPMSG_F_NS)
    else:
        await _wait_driver(device)
    with contextlib.ExitStack() as stack:

        def open_ring(
            index: int, size: int, *, sender: bool, pool: tuple[int, memoryview] | None
        ) -> MessageRing:
            queue = stack.enter_context(contextlib.closing(device.open_queue(index)))
            ring = MessageRing(queue, sender=sender, buffer_size=size, pool=pool)
            stack.callback(ring.close)
            return ring

        try:
            receive_pool = send_pool = None
            if driver:
                receives, sends = (vring.layout.num for vring in device.vrings)
                received_bytes = receives * receive_buffer_size
                pa, pool = device.buffers(received_bytes + sends * send_buffer_size)
                receive_pool = (pa, pool[:received_bytes])
                send_pool = (pa + received_bytes, pool[received_bytes:])
            from_peer, to_peer = (_TO_DRIVER, _TO_DEVICE) if driver else (_TO_DEVICE, _TO_DRIVER)
            receiving = open_ring(from_peer, receive_buffer_size, sender=False, pool=receive_pool)
            sending = open_ring(to_peer, send_buffer_size, sender=True, pool=send_pool)
        except BaseException:
            if driver:
                device.give_up()
            raise
        yield sending, receiving


@asynccontextmanager
async def open_bus(
    device: VirtioDevice,
    *,
    send_buffer_size: int = DEFAULT_BUFFER_SIZE,
    receive_buffer_size: int = DEFAULT_BUFFER_SIZE,
) -> AsyncIterator[Bus]:
    """Brings an RPMsg device up for an `async with` block and takes it down at its end.

    A driver (host) sets the device up at once, and once in its life; a device (remote) waits for
    its driver.

    Args:
        device: an RPMsg device, from a `RemoteProcessor` or `open_resources`.
        send_buffer_size: bytes of a buffer, header included, in the sending direction.
        receive_buffer_size: the same for the receiving direction. A driver chooses both;
            a device has to be told what its driver chose.

    Raises:
        ValueError: it is not an RPMsg device, or a buffer size is not possible.
        ResourceTableError: its vrings or buffers do not fit its memory.
        StateError: a driver had it before; a new start of the processor makes a new device.
        trio.BrokenResourceError: the other side is gone.
    """
    async with open_rings(
        device, send_buffer_size=send_buffer_size, receive_buffer_size=receive_buffer_size
    ) as (sending, receiving):
        bus = Bus(device, sending, receiving)
        try:
            if device.role is Role.DRIVER:
                device.set_driver_ok()
            # What came in, or went wrong, before there was a bus has been told already.
            bus.catch_up()
            yield bus
        finally:
            await bus.aclose()
