"""The rpmsg bus of a fake machine: channels, nodes, and the remote's side of it.

Semantics are those of virtio_rpmsg_bus, rpmsg_char and rpmsg_ctrl of Linux 6.1: one opener of an
endpoint, which lives only while its node is open; no EPOLLOUT; EPIPE before the queue is drained;
numbers that are given out again only when the last file is closed.
"""

from __future__ import annotations

import errno
import os
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from openamp_py.constants import ADDRESS_ANY, FIRST_DYNAMIC_ADDRESS, NAME_SERVICE_ADDRESS, NAME_SIZE
from openamp_py.linux.access import (
    CREATE_DEVICE,
    CREATE_ENDPOINT,
    DESTROY_ENDPOINT,
    RELEASE_DEVICE,
    MachineNode,
    Node,
)
from openamp_py.linux.fake_files import FakeFiles, fail
from openamp_py.linux.tree import CHANNELS, NODES, TTYS
from openamp_py.rpmsg.wire import Announcement, Channel, check_name, encode_announcement

MAX_PAYLOAD: Final = 496
"""Bytes of a message on Linux's virtio bus."""

MAX_QUEUED: Final = 4096
"""Messages that wait at an endpoint, where Linux has no bound; a pipe holds a byte for each."""

RAW, TTY = "rpmsg-raw", "rpmsg-tty"
"""Services that have a driver which makes nodes."""

_ENDPOINT_INFO = struct.Struct(f"={NAME_SIZE}sII")  # name, src, dst: struct rpmsg_endpoint_info
_DRIVERS = {
    RAW: ("rpmsg_chrdev", "rpmsg_char"),
    TTY: ("rpmsg_tty", "rpmsg_tty"),
    "rpmsg_ctrl": ("rpmsg_ctrl", "rpmsg_ctrl"),
}
"""Driver and module by the channel's name."""


@dataclass(frozen=True, slots=True)
class FakeMessage:
    """A message as the remote gets it."""

    payload: bytes
    source: int
    destination: int


class FakeRemote:
    """What a fake processor runs: its side of the bus. It is made at each start.

    Attributes:
        firmware: name of the image that was started.
        image: what is in it.
        dropped: messages to addresses where nobody listens.
        crash: ends it, as a fault does.
        trace: writes text into its trace buffer.
    """

    def __init__(
        self,
        bus: FakeBus,
        firmware: str,
        image: bytes,
        crash: Callable[[], None],
        trace: Callable[[str], None],
    ) -> None:
        self.firmware = firmware
        self.image = image
        self.crash = crash
        self.trace = trace
        self.dropped = 0
        self._bus = bus

    def announce(self, name: str, address: int) -> None:
        """Announces a service at an address; a second time nothing happens.

        Raises:
            ValueError: the name is too long, or empty.
        """
        check_name(name)
        self._bus.create_channel(name, ADDRESS_ANY, address)

    def withdraw(self, name: str, address: int) -> None:
        """Takes a service back; unknown ones are ignored."""
        self._bus.destroy_channel(name, address)

    def send(self, payload: bytes, destination: int, *, source: int) -> None:
        """Sends a message to an address of the host.

        Raises:
            ValueError: more than 496 bytes.
        """
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(f"payload of {len(payload)} bytes; a buffer takes {MAX_PAYLOAD}")
        deliver = self._bus.listeners.get(destination)
        if deliver is None or not deliver(payload):
            self.dropped += 1

    async def receive(self) -> FakeMessage:
        """The next message, to any address; this gives its buffer back."""
        return await self._bus.to_remote.receive()

    def __aiter__(self) -> FakeRemote:
        return self

    async def __anext__(self) -> FakeMessage:
        return await self.receive()


Service = Callable[[FakeRemote], Awaitable[None]]
"""What a remote runs; when it returns, the core idles."""


class FakeBus:
    """A bus from the start of a remote to its stop. A fake processor makes it and closes it.

    Args:
        path: the virtio device in sysfs.
        buffers: messages that the remote does not take before the bus is full.
        full: the errno of a full bus: EAGAIN, or ENOMEM as older kernels had it.
    """

    def __init__(self, files: FakeFiles, parent: str, *, buffers: int, full: int) -> None:
        self.files = files
        self.full = full
        self.listeners: dict[int, Callable[[bytes], bool]] = {}
        self._from_host, self.to_remote = trio.open_memory_channel[FakeMessage](buffers)
        self._number = files.take_number("virtio")
        self.name = f"virtio{self._number}"
        self.path = f"{parent}/{self.name}"
        self._channels: dict[tuple[str, int, int], _Channel] = {}
        self._closed = False
        files.directory(self.path)
        files.link(f"/sys/bus/virtio/devices/{self.name}", self.path)
        if self.has_module("virtio_rpmsg_bus"):
            self.create_channel("rpmsg_ns", NAME_SERVICE_ADDRESS, NAME_SERVICE_ADDRESS)
            self.create_channel("rpmsg_ctrl", 0, 0)

    def has_module(self, name: str) -> bool:
        return (self.files.root / "sys/module" / name).is_dir()

    def close(self) -> None:
        """Ends all channels; files that are open get EPIPE."""
        for channel in reversed(self._channels.values()):
            channel.close()
        self._channels.clear()
        self._closed = True
        self.files.remove(self.path)
        self.files.give_number("virtio", self._number)
        self._from_host.close()
        self.to_remote.close()

    def create_channel(self, name: str, source: int, destination: int) -> bool:
        """Makes a channel; False: there is such a one, or no bus."""
        key = (name, source, destination)
        if self._closed or not self.has_module("virtio_rpmsg_bus") or key in self._channels:
            return False
        self._channels[key] = _Channel(self, *key)
        return True

    def destroy_channel(self, name: str, destination: int, source: int | None = None) -> bool:
        """Ends a channel; None as the source: whatever it is."""
        for key in self._channels:
            if (key[0], key[2]) == (name, destination) and source in (None, key[1]):
                self._channels.pop(key).close()
                return True
        return False

    def listen(self, address: int, deliver: Callable[[bytes], bool]) -> int | None:
        """Takes an address, or the lowest that is free; None: it is taken."""
        if address == ADDRESS_ANY:
            address = FIRST_DYNAMIC_ADDRESS
            while address in self.listeners:
                address += 1
        if address in self.listeners:
            return None
        self.listeners[address] = deliver
        return address

    def send(self, payload: bytes, source: int, destination: int) -> None:
        """Sends to the remote, or fails with the errno of a write."""
        if len(payload) > MAX_PAYLOAD:
            raise fail(errno.EMSGSIZE)
        if destination == ADDRESS_ANY:
            raise fail(errno.EINVAL)
        try:
            self._from_host.send_nowait(FakeMessage(payload, source, destination))
        except trio.WouldBlock:
            raise fail(self.full) from None


class _Channel:
    """A device on the bus, with the nodes that its driver makes."""

    def __init__(self, bus: FakeBus, name: str, source: int, destination: int) -> None:
        self._bus, self._files = bus, bus.files
        self._announced: Announcement | None = None
        self._device: _Device | None = None
        self._source: int | None = None
        # A slash cannot be in a file's name; numbers are signed.
        kernel_name = f"{bus.name}.{name}.{_signed(source)}.{_signed(destination)}"
        self._path = f"{bus.path}/{kernel_name.replace('/', '!')}"
        driver, module = _DRIVERS.get(name, ("", ""))
        bound = bool(driver) and bus.has_module(module)
        if bound and name in (RAW, TTY):
            self._source = bus.listen(source, self._deliver)
            if self._source is None:
                bound = False
        shown = source if self._source is None else self._source
        put = self._files.put
        put(f"{self._path}/name", f"{name}\n")
        put(f"{self._path}/src", f"{shown:#x}\n")
        put(f"{self._path}/dst", f"{destination:#x}\n")
        put(f"{self._path}/announce", f"{str(source != ADDRESS_ANY).lower()}\n")
        put(f"{self._path}/modalias", f"rpmsg:{name}\n")
        put(f"{self._path}/driver_override", "(null)\n")
        self._files.link(f"{CHANNELS}/{self._path.rpartition('/')[2]}", self._path)
        if not bound:
            return
        self._files.directory(f"/sys/bus/rpmsg/drivers/{driver}")
        self._files.link(f"{self._path}/driver", f"/sys/bus/rpmsg/drivers/{driver}")
        if name == "rpmsg_ctrl":
            self._device = _Control(bus, self._path)
        elif name == TTY:
            self._device = _Tty(bus, self._path, shown, destination)
        else:
            parent = f"{self._path}/rpmsg"
            self._device = _Endpoint(bus, parent, name, shown, destination, default=True)
        if name in (RAW, TTY) and source != ADDRESS_ANY:
            self._announced = Announcement(Channel(name, source))
            self._tell_remote()

    def close(self) -> None:
        if self._device is not None:
            self._device.remove()
        if self._source is not None:
            del self._bus.listeners[self._source]
        if self._announced is not None:
            self._announced = Announcement(self._announced.channel, destroy=True)
            self._tell_remote()
        self._files.remove(self._path)

    def _deliver(self, payload: bytes) -> bool:
        return self._device is not None and self._device.deliver(payload)

    def _tell_remote(self) -> None:
        """The kernel waits for a buffer here; the fake does without if there is none."""
        if self._announced is not None:
            message = encode_announcement(self._announced)
            try:
                self._bus.send(message, NAME_SERVICE_ADDRESS, NAME_SERVICE_ADDRESS)
            except OSError:
                return


class _Device:
    """A class device with a node, whose number is free when it is gone and nobody has it open."""

    def __init__(self, bus: FakeBus, kind: str, parent: str, links: str) -> None:
        self.bus, self._files = bus, bus.files
        self._kind = kind
        self._number = bus.files.take_number(kind)
        self._minor = bus.files.take_number("minor")
        self.name = f"{kind}{self._number}"
        self.path = f"{parent}/{self.name}"
        self.alive = True
        self.opened = 0
        bus.files.put(f"{self.path}/dev", f"241:{self._minor}\n")
        bus.files.link(f"{links}/{self.name}", self.path)
        bus.files.node(f"/dev/{self.name}", self.open)

    def open(self) -> Node:
        raise NotImplementedError

    def deliver(self, payload: bytes) -> bool:
        raise NotImplementedError

    def remove(self) -> None:
        """Takes the node away; again: nothing happens."""
        if not self.alive:
            return
        self.alive = False
        self._files.remove(f"/dev/{self.name}")
        self._files.remove(self.path)
        self._release()

    def closed(self) -> None:
        self.opened -= 1
        self._release()

    def _release(self) -> None:
        if not self.alive and not self.opened:
            self._files.give_number(self._kind, self._number)
            self._files.give_number("minor", self._minor)


class _Control(_Device):
    """/dev/rpmsg_ctrlN."""

    def __init__(self, bus: FakeBus, channel: str) -> None:
        super().__init__(bus, "rpmsg_ctrl", f"{channel}/rpmsg", NODES)
        self._endpoints: list[_Endpoint] = []

    def open(self) -> Node:
        self.opened += 1
        return _ControlFile(self)

    def remove(self) -> None:
        for endpoint in self._endpoints:
            endpoint.remove()
        super().remove()

    def control(self, request: int, argument: bytes | int) -> bytes:
        if not self.alive:
            raise fail(errno.ENODEV)
        if isinstance(argument, int) or len(argument) != _ENDPOINT_INFO.size:
            raise fail(errno.EFAULT)
        field, source, destination = _ENDPOINT_INFO.unpack(argument)
        raw = field[: NAME_SIZE - 1].partition(b"\0")[0]
        name = raw.decode("utf-8", "surrogateescape")
        if request == CREATE_ENDPOINT:
            if not self.bus.has_module("rpmsg_char"):
                raise fail(errno.EINVAL)
            endpoint = _Endpoint(self.bus, self.path, name, source, destination, default=False)
            self._endpoints = [*(each for each in self._endpoints if each.alive), endpoint]
        elif request == CREATE_DEVICE:
            if not self.bus.create_channel(name, source, destination):
                raise fail(errno.ENXIO)
        elif request == RELEASE_DEVICE:
            if not self.bus.destroy_channel(name, destination, source):
                raise fail(errno.EINVAL)
        else:
            raise fail(errno.EINVAL)
        return argument


class _ControlFile:
    """An open control node."""

    def __init__(self, device: _Control) -> None:
        self._device: _Control | None = device
        self._fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def read(self, size: int) -> bytes:
        raise fail(errno.EINVAL)

    def write(self, data: bytes) -> int:
        raise fail(errno.EINVAL)

    def ioctl(self, request: int, argument: bytes | int = 0) -> bytes:
        if self._device is None:
            raise fail(errno.EBADF)
        return self._device.control(request, argument)

    def close(self) -> None:
        device, self._device = self._device, None
        if device is not None:
            os.close(self._fd)
            self._fd = -1
            device.closed()


class _Endpoint(_Device):
    """/dev/rpmsgN: an endpoint's, or (`default`) that of a channel."""

    def __init__(
        self, bus: FakeBus, parent: str, name: str, source: int, destination: int, *, default: bool
    ) -> None:
        super().__init__(bus, "rpmsg", parent, NODES)
        self.destination = destination
        self.default = default
        self.queue: deque[bytes] = deque()
        self._chosen = source
        self.address: int | None = source if default else None
        self.file: _EndpointFile | None = None
        # What the kernel chooses for "any" it never tells.
        bus.files.put(f"{self.path}/name", os.fsencode(f"{name}\n"))
        bus.files.put(f"{self.path}/src", f"{_signed(source)}\n")
        bus.files.put(f"{self.path}/dst", f"{_signed(destination)}\n")

    def open(self) -> Node:
        if self.opened:
            raise fail(errno.EBUSY)
        if not self.default:
            self.address = self.bus.listen(self._chosen, self.deliver)
            if self.address is None:
                raise fail(errno.EINVAL)
        self.opened += 1
        self.file = _EndpointFile(self)
        return self.file

    def deliver(self, payload: bytes) -> bool:
        if len(self.queue) == MAX_QUEUED:
            return False
        self.queue.append(payload)
        if self.file is not None:
            self.file.wake()
        return True

    def remove(self) -> None:
        self._unlisten()
        if self.alive and self.file is not None:
            self.file.lose()
        super().remove()

    def closed(self) -> None:
        self._unlisten()
        self.file = None
        self.queue.clear()
        super().closed()

    def _unlisten(self) -> None:
        if not self.default and self.address is not None:
            del self.bus.listeners[self.address]
            self.address = None


class _EndpointFile:
    """An open endpoint. Its descriptor is a pipe's, with a byte for each message that waits:
    that end of a pipe is never writable, as the kernel's nodes are not before 7.0."""

    def __init__(self, device: _Endpoint) -> None:
        self._device: _Endpoint | None = device
        self._fd, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for _ in device.queue:
            self.wake()

    def fileno(self) -> int:
        return self._fd

    def wake(self) -> None:
        os.write(self._wake, b"\0")

    def lose(self) -> None:
        """The endpoint is gone: who waits wakes up, and is told so."""
        os.close(self._wake)
        self._wake = -1

    def read(self, size: int) -> bytes:
        queue = self._live().queue
        if not queue:
            raise fail(errno.EAGAIN)
        os.read(self._fd, 1)
        return queue.popleft()[:size]

    def write(self, data: bytes) -> int:
        device = self._live()
        assert device.address is not None, "an open endpoint has an address"
        device.bus.send(bytes(data), device.address, device.destination)
        return len(data)

    def ioctl(self, request: int, argument: bytes | int = 0) -> bytes:
        if self._device is None:
            raise fail(errno.EBADF)
        if request != DESTROY_ENDPOINT or self._device.default:
            raise fail(errno.EINVAL)
        self._device.remove()
        return b""

    def close(self) -> None:
        device, self._device = self._device, None
        if device is None:
            return
        os.close(self._fd)
        self._fd = -1
        if self._wake != -1:
            self.lose()
        device.closed()

    def _live(self) -> _Endpoint:
        if self._device is None:
            raise fail(errno.EBADF)
        if self._wake == -1:
            raise fail(errno.EPIPE)
        return self._device


class _Tty(_Device):
    """/dev/ttyRPMSGN: a pseudo-terminal in its default mode, which echoes, as the kernel's."""

    def __init__(self, bus: FakeBus, channel: str, source: int, destination: int) -> None:
        super().__init__(bus, "ttyRPMSG", f"{channel}/tty", TTYS)
        self._source, self._destination = source, destination
        self._kernel, self._user = os.openpty()
        os.set_blocking(self._kernel, False)
        self._scope = trio.CancelScope()
        bus.files.kernel.start_soon(self._run)

    def open(self) -> Node:
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        node = _TtyFile(os.open(os.ttyname(self._user), flags), self)
        self.opened += 1
        return node

    def deliver(self, payload: bytes) -> bool:
        if not self.opened:
            return False
        try:
            return os.write(self._kernel, payload) == len(payload)
        except BlockingIOError:
            return False

    def remove(self) -> None:
        self._scope.cancel()
        super().remove()

    async def _run(self) -> None:
        """Sends what is typed, in pieces of a buffer; what does not fit then is lost."""
        try:
            with self._scope:
                while True:
                    await trio.lowlevel.wait_readable(self._kernel)
                    self._send_typed()
        finally:
            os.close(self._kernel)
            os.close(self._user)

    def _send_typed(self) -> None:
        try:
            typed = os.read(self._kernel, MAX_PAYLOAD)
            self.bus.send(typed, self._source, self._destination)
        except OSError:
            return  # as the kernel's, this terminal cannot say that it lost something


class _TtyFile(MachineNode):
    """An open terminal."""

    def __init__(self, fd: int, device: _Tty) -> None:
        super().__init__(fd)
        self._device: _Tty | None = device

    def close(self) -> None:
        device, self._device = self._device, None
        super().close()
        if device is not None:
            device.closed()


def _signed(address: int) -> int:
    return address - (1 << 32) if address >= 1 << 31 else address
