"""The RPMsg bus: messages between endpoints and the two message rings of a virtio device."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from time import perf_counter

import trio

from openamp_py.background import open_background
from openamp_py.constants import ADDRESS_ANY, NAME_SERVICE_ADDRESS, RPMSG_F_NS
from openamp_py.errors import OpenAMPError, PeerGoneError, PlatformError, StateError, VirtqueueError
from openamp_py.rpmsg.addresses import AddressSpace, check_destination
from openamp_py.rpmsg.endpoint import DEFAULT_QUEUE_LIMIT, Endpoint, WhenFull
from openamp_py.rpmsg.handover import NOTHING, Handover
from openamp_py.rpmsg.kept import KeptBuffers
from openamp_py.rpmsg.name_service import NameService
from openamp_py.rpmsg.options import DEFAULT_OPTIONS, BusOptions
from openamp_py.rpmsg.polling import Polling
from openamp_py.rpmsg.recent import RecentMessages, recent_messages
from openamp_py.rpmsg.rings import open_rings
from openamp_py.rpmsg.sender import Sender
from openamp_py.rpmsg.statistics import BusDump, BusStatistics, Drops, count_rings
from openamp_py.rpmsg.watch import ServiceWatch
from openamp_py.rpmsg.wire import TO_DEVICE, TO_DRIVER, Announcement, Channel, check_name
from openamp_py.virtio import Message, Role, VirtioDevice
from openamp_py.virtio.message_ring import KICK, MORE, POLL_HIT, POLLED, RETURNED, SEVERAL, Arrival

# What others find here: the bus, and what is chosen about it or used in its stead.
_logger = logging.getLogger(__name__)

# Calls that need not wait run so long (seconds) before other tasks get their turn: a scheduler
# pass takes as long as several messages, so there must be more messages than passes.
_SLICE = 200e-6


class _Watch(trio.abc.Instrument):
    """Tells a bus when trio goes to sleep and when it wakes.

    While tasks run, the rings are looked at by those who use them and notifications can be off.
    Only when trio is about to sleep does the peer have to know that it must kick.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    def before_io_wait(self, timeout: float) -> None:
        self._bus.before_sleep(timeout)

    def after_io_wait(self, timeout: float) -> None:
        if timeout > 0:
            self._bus.after_sleep()


class Bus:
    """Endpoints over one RPMsg virtio device, in either role.

    Made by `open_bus`. Notifications are handled in the task that listens to the doorbell, a
    receiver looks into the ring before it sleeps, and both rings are looked at when trio wakes.
    All its users share one trio thread.

    It takes what comes to where it belongs, and lives through failures and new devices. What goes
    out is the work of its `Sender`, buffers that messages stay in of its `KeptBuffers`, who talks
    with whom of its `NameService`.

    Attributes:
        failure: what ended the link; None while it is well.
        usable: open, and the link is well.
        sender: its sending ring, and those who wait for a buffer of it.
        kept: the buffers of its receiving ring that messages keep.
        asked: the peer was asked to kick for all that is waited for, so trio can sleep.
        poll_now: nanoseconds that a task that would wait may look for something first.
        slice_end: until when (``perf_counter``) calls need not let other tasks run.
    """

    def __init__(self, options: BusOptions, device: VirtioDevice) -> None:
        self._options = options
        self._polling = Polling(options.polling)
        self.poll_now = self._poll_nanoseconds = int(self._polling.seconds * 1e9)
        self._endpoints: dict[int, Endpoint] = {}
        self._stand_ins: dict[int, Endpoint] = {}
        self._addresses = AddressSpace()
        self._name_service = NameService(self._endpoints, acknowledges=device.role is Role.DRIVER)
        self.kept = KeptBuffers(self, self._endpoints, options.patience)
        self.sender = Sender(self, always_kick=options.always_kick)
        self._news = trio.lowlevel.ParkingLot()
        self._counts: Counter[str] = Counter()
        self._kicks_received = self._unwanted_kicks = 0
        self._generation = 0
        self._past: Counter[str] = Counter()
        self._closed = self._restarting = False
        self.usable = False
        self._begun = False  # the device is up and ours
        self._looked = self.asked = self._more = False
        self._trio_token = trio.lowlevel.current_trio_token()
        self._rings = AsyncExitStack()
        self.failure: OpenAMPError | None = None
        self.slice_end = 0.0
        self._device = device

    @asynccontextmanager
    async def open_rings(self, device: VirtioDevice, handover: Handover) -> AsyncIterator[None]:
        """For `open_bus`: the rings of its device, and of those that come after it."""
        try:
            await self._begin(device, Counter(), handover)
            yield
        finally:
            await self.aclose()
            await self._rings.aclose()

    async def _begin(self, device: VirtioDevice, past: Counter[str], handover: Handover) -> None:
        """Brings a device up and works its rings from then on; `past` was counted before."""
        sending, receiving = await self._rings.enter_async_context(
            open_rings(
                device,
                send_buffer_size=self._options.send_buffer_size,
                receive_buffer_size=self._options.receive_buffer_size,
            )
        )
        self._device = device
        self._past = past
        self._sending = sending
        self._receiving = receiving
        driver = device.role is Role.DRIVER
        self._receive_index = TO_DRIVER if driver else TO_DEVICE
        self._has_name_service = bool(device.features & RPMSG_F_NS)
        self.sender.begin(device, sending, TO_DEVICE if driver else TO_DRIVER)
        self.kept.begin(device, receiving, self._receive_index)
        self.failure = None
        self._begun = True
        self.usable = not self._closed
        device.on_notify = self._notified
        device.on_failure = self._device_failed
        device.on_detach = self._detached
        if device.is_adopted:
            self._take_over(handover)
        if driver:
            device.set_driver_ok()
        # What came in, or went wrong, before there was a bus has been told already.
        if device.failure is not None:
            self._device_failed(device.failure)
        else:
            self.drain()

    def _take_over(self, handover: Handover) -> None:
        """Goes on where the host before stopped: what comes for its endpoints is kept for ours."""
        for channel in handover.channels:
            refusal = self._name_service.take_over(channel)
            if refusal is not None:
                self._refuse_announcement(f"{channel}", refusal)
        for handed in handover.endpoints:
            endpoint = self._endpoints.get(handed.address)
            if endpoint is None:
                address = self._addresses.take(handed.address)
                endpoint = Endpoint(self, handed.name, address)
                self._endpoints[address] = self._stand_ins[address] = endpoint
            endpoint.take_over(handed)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """For `open_bus`: listens to trio, and does what takes time."""
        watch = _Watch(self)
        trio.lowlevel.add_instrument(watch)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.kept.run)
                if self._options.recheck is not None:
                    nursery.start_soon(self._recheck, self._options.recheck)
                task_status.started()
        finally:
            with contextlib.suppress(KeyError):  # trio removes one that raised
                trio.lowlevel.remove_instrument(watch)

    @property
    def payload_limit(self) -> int:
        """Most bytes that one sent message can carry."""
        return self._sending.payload_limit

    @property
    def receive_payload_limit(self) -> int:
        """Most bytes that one received message can carry."""
        return self._receiving.payload_limit

    @property
    def role(self) -> Role:
        """This side's end of the link."""
        return self._device.role

    @property
    def generation(self) -> int:
        """How often it went on over a new device; what belongs to an older one is not seen."""
        return self._generation

    @property
    def channels(self) -> tuple[Channel, ...]:
        """What the other side has announced and not withdrawn, oldest first."""
        return self._name_service.channels

    @property
    def handover(self) -> Handover:
        """What the next host has to know to go on, once the device was detached here.

        To be read before or after that, as long as endpoints are open: see `open_bus`.
        """
        return Handover(self.channels, tuple(each.handed() for each in self._endpoints.values()))

    @property
    def drops(self) -> Drops:
        """Messages from the peer that reached no application so far."""
        rings = self._count_rings()
        return Drops(**self._counts, bad_length=rings["bad_length"], bad_source=rings["bad_source"])

    @property
    def statistics(self) -> BusStatistics:
        """What it counted so far."""
        rings = self._count_rings()
        return BusStatistics(
            generation=self._generation,
            sent=rings["sent"],
            sent_bytes=rings["sent_bytes"],
            received=rings["received"],
            received_bytes=rings["received_bytes"],
            kicks_sent=rings["kicks"] + self._unwanted_kicks,
            kicks_suppressed=rings["unkicked"] - self._unwanted_kicks,
            kicks_received=self._kicks_received,
            buffer_waits=self.sender.waits,
            polls=self._polling.tried,
            poll_hits=self._polling.hits,
            held=self.kept.count,
            reserved=len(self.sender.reserved),
            drops=self.drops,
        )

    def _count_rings(self) -> Counter[str]:
        """What the rings counted, those of former devices included."""
        return self._past + count_rings(self._sending, self._receiving)

    def dump(self) -> BusDump:
        """Everything about it at this moment, for a bug report: print it, or `to_json`."""
        return BusDump(
            device=self._device.name,
            role=self.role.value,
            status=self._device.status,
            features=self._device.features,
            failure=None if self.failure is None else str(self.failure),
            payload_limit=self.payload_limit,
            receive_payload_limit=self.receive_payload_limit,
            polling=self._polling.seconds,
            rings=(self._sending.queue.snapshot(), self._receiving.queue.snapshot()),
            endpoints=tuple(endpoint.report() for endpoint in self._endpoints.values()),
            channels=self.channels,
            statistics=self.statistics,
            options={
                name: str(value) if value == math.inf else value  # which JSON cannot say
                for name, value in asdict(self._options).items()
            },
        )

    def recent(self) -> RecentMessages:
        """The last messages of both directions, as far as the rings still hold them.

        Also of a link that failed: see `recent_messages`.
        """
        return recent_messages(self._device)

    async def wait_failure(self) -> OpenAMPError:
        """Waits until the link fails, and returns what ended it.

        Raises:
            trio.ClosedResourceError: the bus was closed here.
        """
        await trio.lowlevel.checkpoint()
        while self.failure is None:
            if self._closed:
                raise trio.ClosedResourceError("the bus was closed")
            await self._news.park()
        return self.failure

    async def wait_service(self, name: str) -> Channel:
        """Waits until the other side has announced a service of this name.

        Raises:
            trio.BrokenResourceError: the other side is gone.
            trio.ClosedResourceError: the bus was closed here.
        """
        await trio.lowlevel.checkpoint()
        generation = self._generation
        while True:
            self.check_generation(generation)
            channel = self._name_service.find(name)
            if channel is not None:
                return channel
            self._check_usable()
            await self._news.park()

    @asynccontextmanager
    async def open_watch(self) -> AsyncIterator[ServiceWatch]:
        """A stream of the other side's announcements, for an `async with` block.

        It begins with what is announced already. See `ServiceWatch`.

        Raises:
            trio.ClosedResourceError: the bus was closed here.
            trio.BrokenResourceError: the other side is gone.
        """
        self._check_usable()
        await trio.lowlevel.checkpoint()
        watch = ServiceWatch([Announcement(channel) for channel in self.channels])
        watches = self._name_service.watches
        watches.add(watch)
        try:
            if self._closed or self.failure is not None:
                watch.end(self.ended())
            yield watch
        finally:
            watches.remove(watch)
            watch.end(trio.ClosedResourceError("the watch was closed"))

    @asynccontextmanager
    async def open_endpoint(
        self,
        name: str | None = None,
        *,
        address: int = ADDRESS_ANY,
        destination: int = ADDRESS_ANY,
        announce: bool = True,
        queue_limit: int = DEFAULT_QUEUE_LIMIT,
        when_full: WhenFull = WhenFull.HOLD_BACK,
        in_place: bool = False,
        rebind: bool = False,
    ) -> AsyncIterator[Endpoint]:
        """Opens an endpoint for an `async with` block and closes it at its end.

        With a name it is bound to the other side's service of that name, now or when
        that is announced. It announces itself if it may (`announce`, no fixed
        `destination`, and the link has a name service); a host thereby also acknowledges
        the service it binds to.

        On a device that was taken over from a host that left a handover, one that this host had
        (by its name, or by its address) is continued: at the same address, with the messages that
        came for it, and without being announced again.

        Args:
            name: the service's name, 1 to 31 bytes as UTF-8; None for a bare address.
            address: local address; by default the lowest free one from 1024 on. Those below are
                for services whose address is agreed on.
            destination: the peer's address where it is known in advance.
            announce: whether to tell the other side.
            queue_limit: received messages kept before `when_full` decides about further ones.
            when_full: what becomes of those. With HOLD_BACK one batch of up to 64 may still
                come on top.
            in_place: messages stay in their shared buffers until they are received, for `hold`.
                There are no more of them than buffers, so it is to be read quickly.
            rebind: go on when the peer withdrew the channel or the bus went on over a new
                device: what waits meanwhile waits for the peer to be back.

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
        stand_in = self._find_stand_in(name, address)
        endpoint = Endpoint(
            self,
            name,
            self._addresses.take(address) if stand_in is None else stand_in.address,
            destination=destination,
            announces=announce and name is not None and destination == ADDRESS_ANY,
            queue_limit=queue_limit,
            when_full=when_full,
            in_place=in_place,
            rebind=rebind,
        )
        self._endpoints[endpoint.address] = endpoint
        try:
            if stand_in is not None:
                del self._stand_ins[endpoint.address]
                endpoint.inherit(stand_in)
            if in_place or stand_in is not None:
                self.kept.choose(endpoint)
            if name is not None and not endpoint.is_bound:
                self._name_service.bind_to_known(endpoint)
                self._answer()
            if endpoint.wants_announcing and self._has_name_service and not endpoint.is_told:
                await endpoint.announce()
            yield endpoint
        finally:
            await endpoint.aclose()

    def _find_stand_in(self, name: str | None, address: int) -> Endpoint | None:
        """What stands in for an endpoint that is about to be opened."""
        if address != ADDRESS_ANY:
            return self._stand_ins.get(address)
        for endpoint in self._stand_ins.values():
            if name is not None and endpoint.name == name:
                return endpoint
        return None

    async def restart(self, device: VirtioDevice, handover: Handover = NOTHING) -> None:
        """Goes on over a new device, after the old one failed, was detached or was given up.

        Endpoints that were opened with `rebind` live on: they are announced again, and bound
        when the peer announces itself. All others stay broken. Messages that were not received
        yet, announcements, held and reserved buffers belong to the old device and are gone; the
        generation counts on.

        A device that is taken over goes on with the `handover` of the host before, as with
        `open_bus`; endpoints with `rebind` that are in it stay bound, and are not announced again.

        Raises what `open_bus` raises, and:
            trio.ClosedResourceError: the bus was closed.

        Cancellation: the bus is broken; it can be tried again.
        """
        if self._closed:
            raise trio.ClosedResourceError("the bus was closed")
        if self._restarting:
            raise StateError("the bus is being restarted already")
        if device is self._device:
            raise StateError(f"{device.name} was driven before; start its processor anew")
        failure = self.failure or PeerGoneError(f"{self._device.name} was given up here")
        self.fail(failure)
        self._let_go(self.broken("bus"))
        self._name_service = NameService(self._endpoints, acknowledges=device.role is Role.DRIVER)
        self._stand_ins.clear()
        for endpoint in tuple(self._endpoints.values()):
            if not endpoint.revive():
                endpoint.lose(failure)
                self._remove(endpoint)
        self._restarting = True
        try:
            await self._rings.aclose()
            self._rings = AsyncExitStack()
            await self._begin(device, self._count_rings(), handover)
            if self._closed:
                self._let_go(trio.ClosedResourceError("the bus was closed"))
                await self._rings.aclose()
                raise trio.ClosedResourceError("the bus was closed")
        except BaseException:
            self.failure = failure
            self.sender.blocked = True
            self.usable = False
            raise
        finally:
            self._restarting = False
        self._generation += 1
        for endpoint in self._endpoints.values():
            if endpoint.announces_again() and self._has_name_service and not endpoint.is_told:
                self._name_service.replies[endpoint] = None
        self._send_replies()
        self._wake_all()

    async def aclose(self) -> None:
        """Takes the link down: a host resets the device, so that the remote sees it. Idempotent.

        Endpoints still open are closed without a word to the peer.
        """
        if not self._closed:
            for endpoint in tuple(self._endpoints.values()):
                endpoint.close()
            self._closed = True
            self.usable = False
            self._wake_all()
            self._let_go(trio.ClosedResourceError("the bus was closed"))
        await trio.lowlevel.cancel_shielded_checkpoint()

    # What follows is for the endpoints, and for what the bus consists of.

    def fail(self, cause: OpenAMPError) -> None:
        """The link is over: everyone who waits wakes with this cause."""
        if self.failure is None:
            if isinstance(cause, VirtqueueError) and self._is_begun_anew():
                what = f"{self._device.name}: the driver reset the device, and began anew"
                reset = PeerGoneError(what)
                reset.__cause__ = cause
                cause = reset
            self.failure = cause
            self.sender.blocked = True
            self.usable = False
            self._wake_all()

    def ended(self) -> Exception:
        """The error for a user of a bus that is not `usable`."""
        return (
            trio.ClosedResourceError("the bus was closed") if self._closed else self.broken("bus")
        )

    def broken(self, what: str, failure: OpenAMPError | None = None) -> trio.BrokenResourceError:
        """The error for a user of a link that failed, with the failure as its cause."""
        cause = failure or self.failure
        error = trio.BrokenResourceError(f"{what}: {cause}")
        error.__cause__ = cause
        return error

    async def rest(self) -> None:
        """Lets other tasks run, and begins a new slice."""
        await trio.lowlevel.checkpoint()
        self.slice_end = perf_counter() + _SLICE

    async def pause(self) -> None:
        """Lets other tasks run if it is time to, and raises in a scope that was cancelled."""
        if perf_counter() >= self.slice_end:
            await self.rest()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()

    def begin_slice(self) -> None:
        """A task that uses the bus was asleep: other tasks had their turn."""
        self.slice_end = perf_counter() + _SLICE

    def check_generation(self, generation: int) -> None:
        """Raises where the bus went on over a new device since."""
        if generation != self._generation:
            raise trio.BrokenResourceError("the other side was restarted meanwhile") from (
                PeerGoneError("the other side was restarted")
            )

    def tell(self, index: int, *, wanted: bool) -> None:
        """Kicks for a vring where the other side wants it, or is never believed."""
        if wanted or self._options.always_kick:
            self._unwanted_kicks += not wanted
            self.kick(index)

    def kick(self, index: int) -> None:
        """Kicks for a vring; where that is not possible the link is over."""
        try:
            self._device.kick(index)
        except OSError as error:
            self.fail(PlatformError(f"{self._device.name}: cannot kick: {error}"))

    def hush(self) -> None:
        """Somebody found the buffers he waited for: notifications of them may be of no use now."""
        if self.usable and not (self.sender.turns or self._name_service.replies):
            self._sending.queue.notify_off()

    def drain(self, nanoseconds: int = 0) -> bool:
        """Takes what has come in, as much as one call takes, and delivers it.

        Args:
            nanoseconds: how long to look for something where nothing is there.

        Returns:
            Whether anything was taken, or a free buffer found for one who waits.
        """
        if not self.usable:
            return False
        self._looked = True
        self.asked = False
        turns = self.sender.turns
        try:
            bits, destination, length, messages, mixed = self._receiving.take(
                nanoseconds, self._sending if turns else None
            )
        except VirtqueueError as error:
            self.fail(error)
            return True
        if bits & POLLED:
            hit = bool(bits & POLL_HIT)
            self._polling.learn(hit)
            if not hit:
                self.poll_now = 0  # until trio ran the other tasks
        self._more = bool(bits & MORE)
        if destination >= 0:
            endpoint = self._endpoints.get(destination)
            if endpoint is not None:
                endpoint.deliver(messages, length)
            else:
                self._deliver_elsewhere(destination, messages)
        elif destination == SEVERAL:
            endpoints = self._endpoints
            for each, message in zip(self._receiving.destinations, messages, strict=True):
                endpoint = endpoints.get(each)
                if endpoint is not None:
                    endpoint.deliver_one(message, length)
                else:
                    self._deliver_elsewhere(each, [message])
        elif mixed:
            self._deliver_mixed(mixed)
        if turns:
            self.sender.call_next()
        came = bool(messages or mixed)
        if bits & KICK or (came and self._options.always_kick):
            self.tell(self._receive_index, wanted=bool(bits & KICK))
        return came or bool(bits & POLL_HIT)

    def _deliver_mixed(self, arrivals: list[Arrival]) -> None:
        kept_buffers = self.kept
        for arrival in arrivals:
            destination, messages, length, kept, head = arrival
            endpoint = self._endpoints.get(destination)
            if endpoint is None:
                if kept:
                    kept_buffers.give_back_heads([head])
                self._deliver_elsewhere(destination, messages)
            elif kept == RETURNED:
                endpoint.deliver(messages, length)
            else:
                kept_buffers.queued += 1
                endpoint.deliver_kept(arrival)
        if kept_buffers.queued and kept_buffers.is_starved:
            kept_buffers.begin_patience()

    def count_drops(self, **counts: int) -> None:
        """Messages were dropped, by reason of `Drops`."""
        for reason, count in counts.items():
            if count:
                self._count_drops(reason, count, "dropped %d messages: %s", count, reason)

    def forget(self, endpoint: Endpoint, heads: Sequence[int]) -> None:
        """An endpoint was closed; `heads` are the buffers its messages occupied."""
        if self._endpoints.get(endpoint.address) is not endpoint:
            return  # it did not go on over the present device
        self._remove(endpoint)
        self.kept.forget(endpoint, heads)
        if self.usable:
            self._name_service.bind_successors(endpoint)
            self._answer()
        self.sender.call(endpoint)

    # What follows is for _Watch.

    def before_sleep(self, timeout: float) -> None:
        """Trio looks for events now, and sleeps for up to `timeout` seconds."""
        if not self.poll_now and self._polling.wants():
            self.poll_now = self._poll_nanoseconds
        if self.asked:
            return
        if timeout > 0 or not self._looked:
            self._ask_for_kicks()
        self._looked = False

    def after_sleep(self) -> None:
        """Trio woke up: what came is delivered before the first task runs."""
        if not self.usable:
            return
        self.drain()
        if self.sender.turns or self._name_service.replies:
            self._look()

    # Inside.

    def _check_usable(self) -> None:
        if not self.usable:
            raise self.ended()

    def _ask_for_kicks(self) -> None:
        """From now on the peer has to kick for what comes."""
        self.asked = True
        if not self.usable:
            return
        receiving = self._receiving.queue
        try:
            # Where it has been asked already, it has kicked for all that came after the last look,
            # but for what was too much for that.
            there = receiving.notify_on() if receiving.is_quiet else self._more
            waits = self.sender.turns or self._name_service.replies
            if waits and self._sending.want_buffer():
                there = True
        except VirtqueueError as error:
            self.fail(error)
            there = True
        if there:
            # Trio has decided already how long to sleep; this wakes it.
            self._trio_token.run_sync_soon(self._look, idempotent=True)

    def _notified(self) -> None:
        if self.usable:
            self._kicks_received += 1
            self._look()
        self._check_up()

    def _check_up(self) -> None:
        if self.usable and not self._device.is_up:
            self._device_failed(
                PeerGoneError(
                    f"{self._device.name}: {self._peer} reset the device "
                    f"(status {self._device.status:#x})"
                )
            )

    @property
    def _peer(self) -> str:
        return "the driver" if self.role is Role.DEVICE else "the other side"

    def _look(self) -> None:
        """Handles whatever there is."""
        if self.usable:
            self.drain()
            if self._name_service.replies:
                self._send_replies()
            self.sender.call_next()

    async def _recheck(self, seconds: float) -> None:
        while True:
            await trio.sleep(seconds)
            self._look()
            self._check_up()

    def _let_go(self, error: Exception) -> None:
        """The device is not ours any more, nor are the buffers that users have in hand."""
        if self._begun and self.role is Role.DRIVER and self._device.failure is None:
            with contextlib.suppress(OSError):  # of a kick: it is over anyway
                self._device.end()
        self._begun = False
        self._device.on_notify = self._device.on_failure = self._device.on_detach = None
        self.sender.take_away(error)
        self.kept.take_away(error)

    def _detached(self, cause: OpenAMPError) -> int:
        """The device goes on without us: all its buffers go back to it.

        Returns:
            Messages that were taken and not received; their endpoints still have them.
        """
        heads = self.kept.vacate()
        reserved = self.sender.reserved
        self._begun = False  # so that the device is not reset
        self._let_go(self.broken("bus", cause))
        if self.usable:
            for head in reserved:
                self._sending.cancel(head)
            self.kept.give_back_heads(heads)
        if self.usable:
            self._sending.leave()
        self.fail(cause)
        unread = sum(endpoint.statistics.queued for endpoint in self._endpoints.values())
        _logger.log(
            logging.WARNING if unread else logging.INFO,
            "%s: detached; %d messages were taken from it and are not received yet",
            self._device.name,
            unread,
        )
        return unread

    def _remove(self, endpoint: Endpoint) -> None:
        del self._endpoints[endpoint.address]
        self._addresses.give_back(endpoint.address)
        self._name_service.replies.pop(endpoint, None)

    def _deliver_elsewhere(self, destination: int, messages: Sequence[Message]) -> None:
        """Messages for no endpoint: announcements, or nobody's."""
        if destination == NAME_SERVICE_ADDRESS and self._has_name_service:
            for message in messages:
                self._handle_announcement(message.payload)
            return
        self._count_drops(
            "unknown_destination",
            len(messages),
            "dropped a message of %d bytes from %#x: nobody listens at %#x",
            len(messages[0].payload),
            messages[0].source,
            destination,
        )

    def _handle_announcement(self, payload: bytes) -> None:
        refusal = self._name_service.handle_untrusted(payload)
        if refusal is not None:
            self._refuse_announcement(*refusal)
            return
        self._answer()
        self._news.unpark_all()

    def _refuse_announcement(self, what: str, why: str) -> None:
        self._count_drops("bad_announcement", 1, "announcement of %s refused: %s", what, why)

    def _count_drops(self, reason: str, count: int, text: str, *values: object) -> None:
        # The first of its kind is worth a warning; a peer must not be able to flood the log.
        level = logging.DEBUG if self._counts[reason] else logging.WARNING
        _logger.log(level, f"%s: {text}", self._device.name, *values)
        self._counts[reason] += count

    def _answer(self) -> None:
        """Endpoints may have been bound: sends what is due for that."""
        if self._name_service.replies:
            self.asked = False
            self._send_replies()

    def _send_replies(self) -> None:
        """Sends announcements that are due, as far as there are buffers."""
        replies = self._name_service.replies
        while replies and self.usable:
            endpoint = next(iter(replies))
            try:
                if not self.sender.send_nowait(
                    endpoint.address, NAME_SERVICE_ADDRESS, endpoint.announcement(), has_turn=True
                ):
                    return  # and the peer is asked for a notification
            except (trio.BrokenResourceError, ValueError) as error:
                # As text: whoever keeps the record must not keep the bus.
                what, why = repr(endpoint), str(error.__cause__ or error)
                _logger.warning("%s cannot be announced: %s", what, why)
            else:
                endpoint.was_told()
            replies.pop(endpoint, None)
        self.hush()

    def _is_begun_anew(self) -> bool:
        """Device: whether the driver was reset and came up again before this side saw it."""
        return self.role is Role.DEVICE and any(
            ring.queue.is_begun_anew for ring in (self._sending, self._receiving)
        )

    def _device_failed(self, cause: OpenAMPError) -> None:
        """The other side is gone; what it sent before is still delivered."""
        for _ in range(self._receiving.queue.layout.num):
            if self.failure is not None or not self._receiving.queue.pending:
                break
            self.drain()
        self.fail(cause)

    def _wake_all(self) -> None:
        for endpoint in self._endpoints.values():
            endpoint.wake()
        self.sender.call_all()
        self._news.unpark_all()
        if not self.usable:
            for watch in self._name_service.watches:
                watch.end(self.ended())


@asynccontextmanager
async def open_bus(
    device: VirtioDevice, options: BusOptions = DEFAULT_OPTIONS, handover: Handover = NOTHING
) -> AsyncIterator[Bus]:
    """Brings an RPMsg device up for an `async with` block and takes it down at its end.

    A driver (host) sets the device up at once, and once in its life; a device (remote) waits for
    its driver.

    A device that a host takes over from another one (`VirtioDevice.adopt`) goes on as it is: its
    rings say how large the receiving buffers are; `send_buffer_size` must be the same as before.
    What the remote sent meanwhile is received. Messages for endpoints that are in no handover,
    and are not open yet, are dropped and counted.

    Args:
        device: an RPMsg device, from a `RemoteProcessor` or `open_resources`.
        options: how to work the link.
        handover: what the host before left (`Bus.handover`), where the device is taken over.

    Raises:
        ValueError: it is not an RPMsg device, or a buffer size is not possible.
        ResourceTableError: its vrings or buffers do not fit its memory; or the table in memory
            became another until the driver was up.
        StateError: a driver had it before; a new start of the processor makes a new device.
        VirtqueueError: it cannot be taken over: its rings contradict themselves.
        trio.BrokenResourceError: the other side is gone.
    """
    bus = Bus(options, device)
    async with bus.open_rings(device, handover), open_background() as nursery:
        await nursery.start(bus.run)
        yield bus
