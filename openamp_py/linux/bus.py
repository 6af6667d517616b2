"""The RPMsg bus of a processor that this machine's kernel boots: control node and endpoint nodes.

The kernel is the host of the virtio device. Its name service makes a device for each service that
the remote announces; an endpoint for one is made through the control node of the same bus, and is
a node then. Only sysfs says who belongs to whom.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import re
import termios
import tty
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Final, NoReturn

import trio

from openamp_py.background import open_background
from openamp_py.constants import ADDRESS_ANY, NAME_SERVICE_ADDRESS
from openamp_py.errors import CoreDiedError, OpenAMPError, PeerGoneError, PlatformError, as_ours
from openamp_py.linux.access import CREATE_ENDPOINT, Access, Node
from openamp_py.linux.endpoint import LinuxEndpoint, OpenNode
from openamp_py.linux.faults import encode_endpoint, node_fault
from openamp_py.linux.news import News, open_news
from openamp_py.linux.platform import LinuxPlatform
from openamp_py.linux.tree import CHANNELS, ControlNode, LinuxChannel, TreeReader
from openamp_py.remoteproc import RemoteProcessor, Subdevice
from openamp_py.rpmsg import (
    Announcement,
    Bus,
    BusDump,
    BusStatistics,
    Channel,
    Drops,
    Handover,
    ServiceWatch,
    WhenFull,
)
from openamp_py.rpmsg.addresses import check_destination
from openamp_py.rpmsg.endpoint import DEFAULT_QUEUE_LIMIT
from openamp_py.rpmsg.handover import NOTHING
from openamp_py.rpmsg.wire import DEFAULT_BUFFER_SIZE, check_name
from openamp_py.virtio import Role, VirtioDevice
from openamp_py.virtio.message_ring import HEADER_SIZE

_logger = logging.getLogger(__name__)

PAYLOAD_LIMIT: Final = DEFAULT_BUFFER_SIZE - HEADER_SIZE
"""Most bytes of a message: the kernel's buffers are of this size, and it does not say so."""

BUS_GRACE: Final = 5.0
"""Seconds that the control node has to appear when a core is up: its module may be loaded now."""

NODE_GRACE: Final = 1.0
"""Seconds that a new node has until it can be opened: udev gives it its group."""

FIRST_ADDRESS: Final = 2048
"""The first address of ours. The kernel's own begin at 1024, and sysfs does not show all of them;
one that is in use makes a node that nobody can open."""

_QUICK: Final = 0.02
_IDLE: Final = 0.25
"""Seconds between looks at sysfs while something is waited for, and while nothing is, where the
kernel's events are not heard."""

_FIRST_RETRY: Final = 0.001
_RETRY: Final = 0.005
_DOUBT: Final = 0.25
"""Seconds after which a bus whose endpoint went is still there, so it was the endpoint alone."""

_ADDRESSES: Final = 64
"""Addresses that are tried for a new endpoint."""

_ENDPOINT: Final = re.compile(r"rpmsg[0-9]{1,10}")
_TTY: Final = re.compile(r"ttyRPMSG[0-9]{1,10}")
_NOT_YET: Final = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENXIO)


class LinuxBus(Bus):
    """Endpoints on a processor's bus, through the kernel. Made by `open_linux_bus`.

    It has the calls of a `Bus`, of which it shares nothing else. Those that need the rings raise
    PlatformError: `recent`, `restart`. Looking at sysfs costs nothing while nobody waits for a
    service, where the kernel's events can be heard.

    Attributes:
        failure: what ended the link; None while it is well.
    """

    def __init__(self, platform: LinuxPlatform) -> None:
        self._platform = platform
        self._access: Access = platform.access
        self._open_endpoints: set[LinuxEndpoint] = set()
        self._announced: tuple[Channel, ...] = ()
        self._devices: dict[Channel, LinuxChannel] = {}
        self._read: dict[str, LinuxChannel] = {}  # by the kernel's names
        self._wanted: dict[LinuxEndpoint, int] = {}  # the addresses they were opened with
        self._watches: set[ServiceWatch] = set()
        self._waiters = 0  # tasks that wait for a service
        self._doubts: dict[LinuxEndpoint, tuple[float, OpenAMPError]] = {}
        self._control: Node | None = None
        self._control_path = self._bus_name = ""
        self._identity = 0
        self._making = trio.Lock()
        self._parked = trio.lowlevel.ParkingLot()
        self._looking: trio.CancelScope | None = None
        self._generation = 0
        self._closed_counts = dict.fromkeys(
            ("sent", "sent_bytes", "received", "received_bytes", "buffer_waits"), 0
        )
        self._short = 0
        self._ended = False
        self.failure: OpenAMPError | None = None
        self.usable = False

    # What a program sees

    @property
    def payload_limit(self) -> int:
        """Most bytes that one sent message can carry."""
        return PAYLOAD_LIMIT

    @property
    def receive_payload_limit(self) -> int:
        """Most bytes that one received message can carry."""
        return PAYLOAD_LIMIT

    @property
    def role(self) -> Role:
        """The kernel's end of the link: it is the driver."""
        return Role.DRIVER

    @property
    def generation(self) -> int:
        """How often it went on over a new device."""
        return self._generation

    @property
    def channels(self) -> tuple[Channel, ...]:
        """What the other side has announced and not withdrawn."""
        if self.usable:
            self.look()
        return self._announced

    @property
    def handover(self) -> Handover:
        """Nothing: the kernel remains the host, and knows all."""
        return NOTHING

    @property
    def drops(self) -> Drops:
        """What the kernel drops, it tells nobody but its log."""
        return Drops()

    @property
    def statistics(self) -> BusStatistics:
        """What its endpoints counted; the kernel's kicks and buffers are not seen."""
        total = dict(self._closed_counts)
        for endpoint in self._open_endpoints:
            counts = endpoint.statistics
            for name in total:
                total[name] += getattr(counts, name)
        return BusStatistics(
            generation=self._generation,
            sent=total["sent"],
            sent_bytes=total["sent_bytes"],
            received=total["received"],
            received_bytes=total["received_bytes"],
            kicks_sent=0,
            kicks_suppressed=0,
            kicks_received=0,
            buffer_waits=total["buffer_waits"],
            polls=0,
            poll_hits=0,
            held=0,
            reserved=0,
            drops=Drops(),
        )

    def dump(self) -> BusDump:
        """What can be seen of it at this moment; the kernel's rings cannot."""
        reader = TreeReader(self._access)
        device = f"/sys/bus/virtio/devices/{self._bus_name}"
        bits = reader.text(f"{device}/features") or ""
        return BusDump(
            device=f"{self._platform.name} ({self._bus_name or 'no bus'})",
            role=self.role.value,
            status=max(0, _number(reader.text(f"{device}/status"))),
            features=sum(1 << place for place, bit in enumerate(bits) if bit == "1"),
            failure=None if self.failure is None else str(self.failure),
            payload_limit=self.payload_limit,
            receive_payload_limit=self.receive_payload_limit,
            polling=0.0,
            rings=(),
            endpoints=tuple(endpoint.report() for endpoint in self._open_endpoints),
            channels=self._announced,
            statistics=self.statistics,
        )

    def recent(self) -> NoReturn:
        """Refused: the kernel has the rings."""
        raise PlatformError(
            f"{self._platform.name}: the kernel has the rings, and shows them to nobody"
        )

    async def wait_failure(self) -> OpenAMPError:
        """Waits until the link fails; see `Bus.wait_failure`."""
        await trio.lowlevel.checkpoint()
        while self.failure is None:
            if self._ended:
                raise trio.ClosedResourceError("the bus was closed")
            await self._parked.park()
        return self.failure

    async def wait_service(self, name: str) -> Channel:
        """Waits until the other side has announced a service; see `Bus.wait_service`."""
        await trio.lowlevel.checkpoint()
        generation = self._generation
        while True:
            if self.usable:
                self.look()
            self.check_generation(generation)
            for channel in self._announced:
                if channel.name == name:
                    return channel
            self._check()
            self._waiters += 1
            self.hurry()
            try:
                await self._parked.park()
            finally:
                self._waiters -= 1

    @asynccontextmanager
    async def open_watch(self) -> AsyncIterator[ServiceWatch]:
        """A stream of the other side's announcements; see `Bus.open_watch`."""
        self._check()
        await trio.lowlevel.checkpoint()
        watch = ServiceWatch([Announcement(channel) for channel in self.channels])
        self._watches.add(watch)
        self.hurry()
        try:
            if not self.usable:
                watch.end(self.ended())
            yield watch
        finally:
            self._watches.discard(watch)
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
    ) -> AsyncIterator[LinuxEndpoint]:
        """Opens an endpoint for an `async with` block and closes it at its end.

        With a name it is bound to the remote's service of that name, now or when that is
        announced: the kernel's endpoint is made then. Where the kernel's own driver has a node for
        that service (`rpmsg-raw`), this is opened; without a control node its tty is, which keeps
        no boundaries between messages. Without a name it is made by the first `send_to`, or at
        once where an address is given.

        Args:
            name: the service's name.
            address: local address; by default a free one from `FIRST_ADDRESS` on. Not known of a
                tty.
            destination: the peer's address where it is known in advance.
            announce: without effect: Linux announces only what its own drivers serve.
            queue_limit: without effect: the kernel queues without a limit.
            when_full: the same.
            in_place: refused.
            rebind: see `Bus.open_endpoint`.

        Raises:
            ValueError: a bad name, an address that is in use or not possible.
            PlatformError: `in_place`; or the node cannot be made or opened.
            AccessDeniedError: this user may not open the node.
            trio.BrokenResourceError: the other side is gone.
        """
        if name is not None:
            check_name(name)
        if destination != ADDRESS_ANY:
            check_destination(destination)
        if address != ADDRESS_ANY and (
            not 0 <= address < ADDRESS_ANY or address == NAME_SERVICE_ADDRESS
        ):
            raise ValueError(f"address {address:#x} is not possible")
        if queue_limit < 1:
            raise ValueError(f"queue_limit is {queue_limit}; at least 1 is needed")
        if in_place:
            raise PlatformError(
                f"{self._platform.name}: the kernel has the buffers, so nothing is received in "
                "place"
            )
        self._check()
        endpoint = LinuxEndpoint(
            self,
            name,
            address,
            destination=destination,
            when_full=when_full,
            rebind=rebind,
        )
        self._wanted[endpoint] = address
        self._open_endpoints.add(endpoint)
        try:
            self.look()
            if destination != ADDRESS_ANY or (name is None and address != ADDRESS_ANY):
                await self._bind(endpoint, destination, None)
            else:
                await self._bind_announced(endpoint)
            yield endpoint
        finally:
            await endpoint.aclose()

    async def restart(self, device: VirtioDevice, handover: Handover = NOTHING) -> NoReturn:
        """Refused: the kernel has the devices; the bus goes on with its processor by itself."""
        await trio.lowlevel.checkpoint()
        raise PlatformError(f"{self._platform.name}: the kernel has the virtio devices")

    async def aclose(self) -> None:
        """Closes the endpoints and the control node; the link stays the kernel's. Idempotent."""
        if not self._ended:
            for endpoint in tuple(self._open_endpoints):
                endpoint.close()
            self._ended = True
            self.usable = False
            self._drop_control()
            self._wake()
        await trio.lowlevel.cancel_shielded_checkpoint()

    # What follows is for its endpoints, and for open_linux_bus.

    def ended(self) -> Exception:
        """The error for a user of a bus that is not `usable`."""
        if self._ended or self.failure is None:
            return trio.ClosedResourceError("the bus was closed")
        return self.broken("bus")

    def hurry(self) -> None:
        """Somebody waits for something: sysfs is to be looked at more often from now on."""
        if self._looking is not None:
            self._looking.cancel()

    def forget(self, endpoint: LinuxEndpoint) -> None:  # type: ignore[override]
        """An endpoint was closed."""
        if endpoint in self._open_endpoints:
            self._open_endpoints.remove(endpoint)
            self._wanted.pop(endpoint, None)
            self._doubts.pop(endpoint, None)
            counts = endpoint.statistics
            for name in self._closed_counts:
                self._closed_counts[name] += getattr(counts, name)

    def count_short(self, missing: int) -> None:
        """A tty took less than it was given."""
        self._short += missing
        _logger.warning("%s: a tty took %d bytes too few", self._platform.name, missing)

    def doubt(self, endpoint: LinuxEndpoint, cause: OpenAMPError) -> None:
        """The node of an endpoint went; soon it shows whether the whole bus did."""
        self._doubts[endpoint] = (trio.current_time() + _DOUBT, cause)
        self.hurry()

    def fail(self, cause: OpenAMPError) -> None:
        """The link is over: everyone who waits wakes with this cause."""
        if self.failure is not None or self._ended:
            return
        self.failure = cause
        self.usable = False
        self._drop_control()
        for endpoint in tuple(self._open_endpoints):
            endpoint.lose(cause)
        self._wake()

    def look(self) -> None:
        """Sees what came and went, and tells those who want to know."""
        if not self.usable:
            return
        try:
            identity = self._access.stat(self._control_path).st_ino
            names = frozenset(
                name
                for name in self._access.names(CHANNELS)
                if name.startswith(f"{self._bus_name}.")
            )
        except OSError:
            identity, names = -1, frozenset()
        if identity != self._identity:
            self.fail(self._platform.explain_loss(f"its RPMsg bus {self._bus_name} is gone"))
            self._platform.bus_lost.set()  # so that its state is looked at, too
            return
        if names != self._read.keys():
            self._take_channels(names)
        now = trio.current_time()
        for endpoint, (until, cause) in tuple(self._doubts.items()):
            if now >= until:
                del self._doubts[endpoint]
                endpoint.lose(cause)

    async def bind_bare(self, endpoint: LinuxEndpoint, destination: int) -> None:
        """An endpoint without a name wants to send, and nobody knew to whom."""
        await self._bind(endpoint, destination, None)

    async def begin(self) -> None:
        """Finds the bus of the processor, and opens its control node.

        Raises:
            PlatformError: there is none in time; says what may be missing.
        """
        self._drop_control()  # of a start that did not get further
        control = await self._find_control()
        if control is not None:
            self._control = await self._open(control.node)
            self._control_path, self._bus_name = control.path, str(control.bus)
        try:
            self._identity = self._access.stat(self._control_path).st_ino
        except OSError as error:
            raise node_fault(self._control_path, "it went again", error) from error
        self._announced, self._devices, self._read = (), {}, {}
        self.failure = None
        self.usable = not self._ended
        self.look()

    async def go_on(self) -> None:
        """The processor was started anew: goes on over its new bus."""
        if self._ended:
            return
        self.fail(PeerGoneError(f"{self._platform.name} was started anew"))
        for endpoint in tuple(self._open_endpoints):
            if not endpoint.rebinds:
                self.forget(endpoint)
        self._platform.find()
        await self.begin()
        self._generation += 1
        for endpoint in tuple(self._open_endpoints):
            endpoint.go_on()
            if endpoint.fixed_destination != ADDRESS_ANY:
                await self._bind_or_fail(endpoint)
        self.hurry()
        self._wake()

    async def run(  # type: ignore[override]
        self, news: News, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Looks when there are news, and binds endpoints to services that came."""
        task_status.started()
        while True:
            with trio.CancelScope() as self._looking:
                await news.wait(self._interval(news))
            self._looking = None
            self.look()
            for endpoint in tuple(self._open_endpoints):
                if endpoint.waits_for_service and endpoint not in self._doubts:
                    await self._bind_or_fail(endpoint)

    # Inside.

    def _interval(self, news: News) -> float:
        if not self.usable:
            return math.inf
        if self._doubts:
            return _RETRY
        waits = bool(self._waiters or self._watches) or any(
            endpoint.waits_for_service for endpoint in self._open_endpoints
        )
        if news.tells:
            return _IDLE if waits else math.inf
        return _QUICK if waits else _IDLE

    def _check(self) -> None:
        if not self.usable:
            raise self.ended()

    def _drop_control(self) -> None:
        control, self._control = self._control, None
        if control is not None:
            control.close()

    def _wake(self) -> None:
        self._parked.unpark_all()
        for endpoint in self._open_endpoints:
            endpoint.wake()
        if not self.usable:
            for watch in self._watches:
                watch.end(self.ended())

    def _take_channels(self, names: frozenset[str]) -> None:
        """The services that are announced now."""
        # A remote announces as many as it likes, so each is read only once; its name and address
        # are in the kernel's name for it. What could not be read is tried again at the next look.
        known = {name: found for name, found in self._read.items() if name in names}
        new = TreeReader(self._access).channels(names - known.keys())
        self._read = known | {
            found.kernel_name: found
            for found in new
            if found.name is not None and found.destination is not None
        }
        devices = {
            Channel(found.name, found.destination): found
            for found in self._read.values()
            if found.bus == self._bus_name
            and found.processor == self._platform.kernel_name
            and found.name
            and found.destination is not None
            and _is_service(found)
        }
        before, now = self._devices, devices
        self._announced, self._devices = tuple(devices), devices
        for channel in before:
            if channel not in devices:
                self._tell(Announcement(channel, destroy=True))
                for endpoint in tuple(self._open_endpoints):
                    if endpoint.bound_to(channel) or endpoint in self._doubts:
                        self._doubts.pop(endpoint, None)
                        endpoint.withdraw()
        for channel in now:
            if channel not in before:
                self._tell(Announcement(channel))
        if before.keys() != now.keys():
            self._parked.unpark_all()

    def _tell(self, announcement: Announcement) -> None:
        for watch in self._watches:
            watch.add(announcement)

    async def _find_control(self) -> ControlNode | None:
        """The control node of the processor's bus; None where only a channel's node is there."""
        deadline = trio.current_time() + BUS_GRACE
        while True:
            reader = TreeReader(self._access)
            mine = self._platform.kernel_name
            for control in reader.nodes()[0]:
                if control.processor == mine and control.bus is not None:
                    return control
            if trio.current_time() >= deadline:
                break
            if self._platform.state() not in ("running", "attached"):
                raise PlatformError(
                    f"{self._platform.name} is {self._platform.state()}: it has no RPMsg bus"
                )
            await trio.sleep(_QUICK)
        for found in reader.channels():
            if found.processor == mine and _is_service(found):
                self._control_path = found.path.rpartition("/")[0]
                self._bus_name = found.bus
                _logger.warning(
                    "%s: there is no control node (module rpmsg_ctrl); only services with a node "
                    "or a tty of the kernel's own can be used",
                    self._platform.name,
                )
                return None
        raise PlatformError(
            f"{self._platform.name} has no RPMsg control node {BUS_GRACE} s after its start: its "
            "firmware has no RPMsg device in its resource table, or a module is missing "
            "(rpmsg_ctrl and rpmsg_char, virtio_rpmsg_bus): `openamp doctor` tells which"
        )

    async def _bind_or_fail(self, endpoint: LinuxEndpoint) -> None:
        """Binds it where it can be bound now; what forbids that ends this endpoint alone."""
        try:
            if endpoint.fixed_destination != ADDRESS_ANY:
                await self._bind(endpoint, endpoint.fixed_destination, None)
            else:
                await self._bind_announced(endpoint)
        except (OpenAMPError, ValueError) as error:
            endpoint.fail(as_ours(error, f"{endpoint!r} cannot be bound"))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it knows

    async def _bind_announced(self, endpoint: LinuxEndpoint) -> None:
        """Binds it where its service is there."""
        for channel in self._announced if self.usable else ():
            if channel.name == endpoint.name and endpoint.waits_for_service:
                await self._bind(endpoint, channel.address, self._devices[channel])
                return
        await trio.lowlevel.checkpoint()

    async def _bind(
        self, endpoint: LinuxEndpoint, destination: int, device: LinuxChannel | None
    ) -> None:
        async with self._making:
            if device is not None and not endpoint.waits_for_service:
                return  # somebody else has done it
            generation = self._generation
            opened = await self._open_own(device) if device is not None else None
            if opened is None:
                opened = await self._make(endpoint, destination)
            if generation != self._generation or not self.usable or endpoint.is_closed:
                opened.close()
                self._check()
                return
            endpoint.attach_node(opened, destination)
        if device is not None and device not in self._devices.values():
            endpoint.withdraw()  # meanwhile

    async def _open_own(self, device: LinuxChannel) -> OpenNode | None:
        """The node that the kernel's driver has for a service; None where it has none, or it is
        in use."""
        for found in TreeReader(self._access).channels([device.kernel_name]):
            device = found  # its driver may have come since, and chosen the source
        source = ADDRESS_ANY if device.source is None else device.source
        for name in self._children(f"{device.path}/rpmsg", _ENDPOINT):
            path = f"/dev/{name}"
            try:
                return OpenNode(await self._open(path, busy=True), path, source, made=False)
            except BlockingIOError:
                continue
        if self._control is None:
            for name in self._children(f"{device.path}/tty", _TTY):
                path = f"/dev/{name}"
                node = await self._open(path)
                try:
                    tty.setraw(node.fileno())
                except termios.error as error:
                    node.close()
                    raise PlatformError(f"{path} cannot be made raw: {error}") from error
                return OpenNode(node, path, source, made=False, keeps_boundaries=False)
        return None

    async def _make(self, endpoint: LinuxEndpoint, destination: int) -> OpenNode:
        """Lets the kernel make an endpoint, and opens its node."""
        self._check()
        if self._control is None:
            raise PlatformError(
                f"{self._platform.name}: endpoints cannot be made without a control node: is the "
                "module rpmsg_ctrl there?"
            )
        wanted = self._wanted.get(endpoint, ADDRESS_ANY)
        for source in self._sources(wanted):
            name = endpoint.name or "openamp_py"
            info = encode_endpoint(name, source, destination)
            before = self._made_nodes()
            self._check()
            try:
                self._control.ioctl(CREATE_ENDPOINT, info)
            except OSError as error:
                self.look()
                self._check()
                raise node_fault(
                    self._control_path, f"no endpoint {name!r} was made", error
                ) from error
            try:
                found = await self._find_made(before, source, destination)
                node = await self._open(f"/dev/{found}", busy=True, taken=True)
            except BlockingIOError:
                continue  # it stays: only who can open it could destroy it
            except BaseException:
                self._destroy_made(before, source, destination)
                raise
            return OpenNode(node, f"/dev/{found}", source, made=True)
        raise ValueError(
            f"address {wanted:#x} is in use on {self._bus_name}"
            if wanted != ADDRESS_ANY
            else f"no free address on {self._bus_name} after {_ADDRESSES} that were in use"
        )

    async def _find_made(
        self, before: frozenset[tuple[str, int]], source: int, destination: int
    ) -> str:
        """The name of the node that was just made."""
        deadline = trio.current_time() + NODE_GRACE
        for pause in _pauses():
            found = self._new_nodes(before, source, destination)
            if found:
                return found[0]
            if trio.current_time() >= deadline:
                break
            self.look()
            self._check()
            await trio.sleep(pause)
        raise PlatformError(
            f"the endpoint {source:#x} -> {destination:#x} that was made on "
            f"{self._control_path} does not appear there within {NODE_GRACE} s"
        )

    def _made_nodes(self) -> frozenset[tuple[str, int]]:
        """Names and inodes of the control node's endpoints: a name is soon given out again."""
        found = set()
        for name in self._children(self._control_path, _ENDPOINT):
            with contextlib.suppress(OSError):  # they come and go
                found.add((name, self._access.stat(f"{self._control_path}/{name}").st_ino))
        return frozenset(found)

    def _new_nodes(
        self, before: frozenset[tuple[str, int]], source: int, destination: int
    ) -> list[str]:
        """Names of nodes that were not there before, and have these addresses."""
        reader = TreeReader(self._access)
        found = []
        for name, _ in sorted(self._made_nodes() - before):
            directory = f"{self._control_path}/{name}"
            addresses = (reader.text(f"{directory}/src"), reader.text(f"{directory}/dst"))
            if tuple(map(_number, addresses)) == (source, destination):
                found.append(name)
        return found

    def _destroy_made(
        self, before: frozenset[tuple[str, int]], source: int, destination: int
    ) -> None:
        """Takes back an endpoint that nobody waits for any more, where its node can be opened."""
        for name in self._new_nodes(before, source, destination):
            path = f"/dev/{name}"
            with contextlib.suppress(OSError):
                OpenNode(self._access.open_node(path), path, source, made=True).close()

    def _sources(self, wanted: int) -> Iterator[int]:
        """Addresses to try."""
        if wanted != ADDRESS_ANY:
            yield wanted
            return
        reader = TreeReader(self._access)
        used = {endpoint.address for endpoint in self._open_endpoints}
        used |= {device.source for device in self._devices.values() if device.source is not None}
        for name in self._children(self._control_path, _ENDPOINT):
            used.add(_number(reader.text(f"{self._control_path}/{name}/src")))
        address = FIRST_ADDRESS
        for _ in range(_ADDRESSES):
            while address in used:
                address += 1
            yield address
            address += 1

    def _children(self, directory: str, pattern: re.Pattern[str]) -> list[str]:
        try:
            return sorted(filter(pattern.fullmatch, self._access.names(directory)))
        except OSError:
            return []

    async def _open(self, path: str, *, busy: bool = False, taken: bool = False) -> Node:
        """Opens a node, as soon as udev has given it to us.

        Args:
            path: of the node.
            busy: raise BlockingIOError where another program has it open.
            taken: the same, where its address is in use.
        """
        deadline = trio.current_time() + NODE_GRACE
        pauses = _pauses()
        while True:
            await trio.lowlevel.checkpoint()
            try:
                return self._access.open_node(path)
            except OSError as error:
                if (busy and error.errno == errno.EBUSY) or (taken and error.errno == errno.EINVAL):
                    raise BlockingIOError(error.errno, path) from error
                if error.errno not in _NOT_YET or trio.current_time() >= deadline:
                    why = (
                        "another program has it open"
                        if error.errno == errno.EBUSY
                        else ("it cannot be opened")
                    )
                    raise node_fault(path, why, error) from error
            if self.usable:
                self.look()
                self._check()
            await trio.sleep(next(pauses))


class _LinuxBusSubdevice(Subdevice):
    """Lets the bus go on with each start of its processor, and end with it."""

    def __init__(self, bus: LinuxBus, processor: RemoteProcessor) -> None:
        self._bus = bus
        self._processor = processor

    async def start(self) -> None:
        """The core is up again."""
        await self._bus.go_on()

    async def stop(self, *, crashed: bool) -> None:
        """The core is over, or about to be."""
        cause = self._processor.failure
        if not crashed or not isinstance(cause, CoreDiedError):
            cause = PeerGoneError(f"{self._processor.name} was stopped")
        self._bus.fail(cause)
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def open_linux_bus(processor: RemoteProcessor) -> AsyncIterator[LinuxBus]:
    """A bus to a core that this machine's kernel has started, for an `async with` block.

    With each new start of the core the bus goes on; see `open_host_bus`, which calls this.

    Args:
        processor: whose platform is a `LinuxPlatform`.

    Raises:
        TypeError: its platform is another one.
        AccessDeniedError: this user may not open the control node.
        PlatformError: the core has no RPMsg bus.
    """
    platform = processor.platform
    if not isinstance(platform, LinuxPlatform):
        raise TypeError(f"{platform.name} is no processor of this machine's kernel")
    bus = LinuxBus(platform)
    async with open_news(platform.access) as news, open_background() as nursery:
        try:
            await bus.begin()
            await nursery.start(bus.run, news)
            subdevice = _LinuxBusSubdevice(bus, processor)
            processor.add_subdevice(subdevice)
            try:
                yield bus
            finally:
                processor.remove_subdevice(subdevice)
        finally:
            await bus.aclose()


def _is_service(found: LinuxChannel) -> bool:
    """Whether a device on the bus is what the remote has announced, and not the kernel's own."""
    control = found.name == "rpmsg_chrdev" and found.destination == 0  # before Linux 6.0
    return found.name not in ("rpmsg_ctrl", "rpmsg_ns") and not control


def _pauses() -> Iterator[float]:
    """Seconds between tries of what comes soon, or not at all."""
    pause = _FIRST_RETRY
    while True:
        yield pause
        pause = min(2 * pause, _QUICK)


def _number(text: str | None) -> int:
    """A number of sysfs, as u32; -1 where it is none."""
    try:
        return int(text or "", 0) & 0xFFFF_FFFF
    except ValueError:
        return -1
