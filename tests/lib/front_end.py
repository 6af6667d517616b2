"""A vhost-user front end for tests: the guest's side, with our own driver end of the rings."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from openamp_py import Bus, Role, VirtioDevice, open_bus
from openamp_py.background import open_background
from openamp_py.constants import (
    RPMSG_F_NS,
    VIRTIO_F_VERSION_1,
    VIRTIO_ID_RPMSG,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
)
from openamp_py.memory import MemoryMap, Region, SharedMemory
from openamp_py.platforms import vhost_wire as wire
from openamp_py.platforms.vhost_wire import Request
from openamp_py.virtio import ToldWord, Vring
from openamp_py.vring import VringLayout, VringPlaces

ALL = RPMSG_F_NS | VIRTIO_F_VERSION_1 | VIRTIO_RING_F_EVENT_IDX | VIRTIO_RING_F_INDIRECT_DESC

_HEADER = struct.Struct("<III")
_STATE = struct.Struct("<II")
_SIZE = 0x100000
_STATUS_KICK = 99  # what our driver kicks with after a change of status, which has no message here


@dataclass(frozen=True)
class Guest:
    """What a front end of a test is like.

    Args:
        features: virtio features it accepts.
        protocol: protocol features it accepts.
        num: entries of each vring.
        parts: where descriptors, available and used ring of the two vrings are in memory.
        places: what of the memory is where; by default all of it at one place.
        empty_slots: how many the memory table has behind its regions.
        enable_first: enables the vrings before it has buffers, as User-Mode Linux does; otherwise
            afterwards, and gives other calls then, as QEMU does.
        socket_calls: is called by sockets, and not by eventfds.
    """

    features: int = ALL | wire.PROTOCOL_FEATURES
    protocol: int = wire.REPLY_ACK | wire.BACKEND_REQ | wire.RESET
    num: int = 16
    parts: tuple[tuple[int, int, int], tuple[int, int, int]] = (
        (0x0000, 0x1000, 0x2000),
        (0x4000, 0x5000, 0x6000),
    )
    places: tuple[wire.MemoryPlace, ...] = (
        wire.MemoryPlace(0x4000_0000, _SIZE, 0x7F00_0000_0000, 0),
    )
    empty_slots: int = 0
    enable_first: bool = True
    socket_calls: bool = False


UML = Guest()
QEMU = Guest(
    num=64,
    # The second vring begins where the first one ends, and no part is on a page of its own.
    parts=((0xD000, 0xD400, 0xD4C0), (0xF000, 0xF400, 0xF4C0)),
    enable_first=False,
)


def encode_request(number: int, payload: bytes = b"", flags: int = wire.VERSION) -> bytes:
    """A whole message."""
    return _HEADER.pack(number, flags, len(payload)) + payload


def encode_table(places: Sequence[wire.MemoryPlace], empty_slots: int = 0) -> bytes:
    """The payload of SET_MEM_TABLE."""
    data = struct.pack("<II", len(places), 0)
    for each in places:
        data += struct.pack("<QQQQ", each.guest_pa, each.size, each.user_va, each.offset)
    return data + bytes(32 * empty_slots)


def encode_address(index: int, places: VringPlaces) -> bytes:
    """The payload of SET_VRING_ADDR."""
    addresses = (places.descriptors, places.used, places.available, (1 << 64) - 1)
    return struct.pack("<IIQQQQ", index, 0, *addresses)


def encode_state(index: int, value: int) -> bytes:
    """The payload of most requests for one vring."""
    return _STATE.pack(index, value)


class FrontEndSide:
    """One connection of a guest. Made by `open_front_end`, which also closes it.

    Attributes:
        calls: interrupts that came, for each vring.
        device: the driver's device, for whoever works the rings.
    """

    def __init__(self, sock: socket.socket, guest: Guest) -> None:
        self.sock = sock
        self.guest = guest
        self.calls = [0, 0]
        self.stack = contextlib.ExitStack()
        self.shared = SharedMemory.create("openamp-guest", _SIZE)
        self.stack.callback(self.shared.close)
        self.memory = self.map(guest.places)
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)]
        for fd in self.kicks:
            self.stack.callback(os.close, fd)
        self._back_channel: socket.socket | None = None
        self._listening: dict[int, trio.CancelScope] = {}
        self.device = self.create_device()

    @property
    def _acknowledged(self) -> bool:
        return bool(self.guest.protocol & wire.REPLY_ACK)

    @property
    def _inband(self) -> bool:
        return bool(self.guest.protocol & wire.INBAND)

    def map(self, places: Iterable[wire.MemoryPlace]) -> MemoryMap:
        """The guest's memory as the rings see it."""
        view = self.shared.region("guest", 0).view
        return MemoryMap(
            Region(f"place {n}", p.user_va, p.guest_pa, view[p.offset : p.offset + p.size])
            for n, p in enumerate(places)
        )

    def clear_rings(self) -> None:
        """Zeroes the vrings, as a kernel that has made them anew."""
        view = self.shared.region("guest", 0).view
        for at in (at for parts in self.guest.parts for at in parts):
            view[at : at + 16 * self.guest.num] = bytes(16 * self.guest.num)

    def find(self, at: int) -> tuple[int, int]:
        """User and guest address of a place in the file."""
        for place in self.guest.places:
            if 0 <= at - place.offset < place.size:
                return place.user_va + at - place.offset, place.guest_pa + at - place.offset
        raise AssertionError(f"{at:#x} is in no region")

    def places(self, index: int) -> VringPlaces:
        """Where a vring is."""
        descriptors, available, used = (self.find(at)[0] for at in self.guest.parts[index])
        return VringPlaces(descriptors, available, used)

    def create_device(self) -> VirtioDevice:
        """A driver's device, for one life."""
        layout = VringLayout(self.guest.num, 4)
        view = self.shared.region("guest", 0).view

        def buffers(size: int) -> tuple[int, memoryview]:
            return self.find(_SIZE // 2)[1], view[_SIZE // 2 :][:size]

        self.device = VirtioDevice(
            role=Role.DRIVER,
            device_id=VIRTIO_ID_RPMSG,
            index=0,
            offered=self.guest.features & ~wire.PROTOCOL_FEATURES,
            status=ToldWord(),
            accepted=ToldWord(),
            vrings=[
                Vring(self.places(index).descriptors, layout, index, self.places(index))
                for index in range(2)
            ],
            notify_id=_STATUS_KICK,
            config=memoryview(b""),
            memory=self.memory,
            kick=self._kick,
            buffers=buffers,
        )
        return self.device

    def _kick(self, index: int) -> None:
        if index != _STATUS_KICK:
            self.kick(index)

    def kick(self, index: int) -> None:
        """Kicks one vring."""
        if self._inband:
            with contextlib.suppress(OSError):
                self.sock.send(encode_request(Request.VRING_KICK, encode_state(index, 0)))
        else:
            os.eventfd_write(self.kicks[index], 1)

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Sends bytes, with descriptors."""
        while data:
            await trio.lowlevel.wait_writable(self.sock)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
            data = data[self.sock.sendmsg([data], rights if fds else []) :]
            fds = ()

    async def read(self, size: int) -> bytes:
        """So many bytes, or fewer where the connection ends."""
        data = b""
        while len(data) < size:
            await trio.lowlevel.wait_readable(self.sock)
            try:
                part = self.sock.recv(size - len(data))
            except ConnectionResetError:
                part = b""
            if not part:
                break
            data += part
        return data

    async def reply(self, request: int) -> bytes:
        """The payload of a reply."""
        head = await self.read(_HEADER.size)
        if not head:
            raise ConnectionResetError("the back end closed the connection")
        number, flags, size = _HEADER.unpack(head)
        assert (number, flags) == (request, wire.VERSION | wire.REPLY)
        return await self.read(size)

    async def get(self, request: int, payload: bytes = b"") -> bytes:
        """Asks, and returns the answer."""
        await self.send(encode_request(request, payload))
        return await self.reply(request)

    async def set(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Tells, and waits for the acknowledgement where there are some."""
        flags = wire.VERSION | (wire.NEED_REPLY if self._acknowledged else 0)
        await self.send(encode_request(request, payload, flags), fds)
        if self._acknowledged:
            assert await self.reply(request) == bytes(8)

    async def set_ring(self, request: int, index: int, value: int) -> None:
        """Tells a number for one vring."""
        await self.set(request, encode_state(index, value))

    async def shake_hands(self, nursery: trio.Nursery) -> None:
        """All up to the memory table."""
        guest = self.guest
        await self.send(encode_request(Request.SET_OWNER))
        (offered,) = struct.unpack("<Q", await self.get(Request.GET_FEATURES))
        assert not guest.features & ~offered
        if guest.features & wire.PROTOCOL_FEATURES:
            (offered,) = struct.unpack("<Q", await self.get(Request.GET_PROTOCOL_FEATURES))
            assert not guest.protocol & ~offered
            await self.set(Request.SET_PROTOCOL_FEATURES, struct.pack("<Q", guest.protocol))
            if guest.protocol & wire.BACKEND_REQ:
                ours, theirs = socket.socketpair()
                self.stack.callback(ours.close)
                ours.setblocking(False)
                self._back_channel = ours
                with theirs:
                    await self.set(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
                nursery.start_soon(self._hear_requests, ours)
        await self.set(Request.SET_FEATURES, struct.pack("<Q", guest.features))
        await self.set_memory(guest.places)

    async def set_memory(self, places: Sequence[wire.MemoryPlace]) -> None:
        """Tells where the guest's memory is."""
        table = encode_table(places, self.guest.empty_slots)
        await self.set(Request.SET_MEM_TABLE, table, [self.shared.fd] * len(places))

    async def set_rings(self, nursery: trio.Nursery, bases: Sequence[int] = (0, 0)) -> None:
        """Tells where the vrings are, and by what they are kicked and called."""
        for index, base in enumerate(bases):
            await self.set_call(nursery, index)
            await self.set_ring(Request.SET_VRING_NUM, index, self.guest.num)
            await self.set_ring(Request.SET_VRING_BASE, index, base)
            await self.set(Request.SET_VRING_ADDR, encode_address(index, self.places(index)))
        if not self._inband:
            for index in range(2):
                payload = struct.pack("<Q", index)
                await self.set(Request.SET_VRING_KICK, payload, [self.kicks[index]])

    async def set_call(self, nursery: trio.Nursery, index: int) -> None:
        """Gives a new descriptor for interrupts of one vring."""
        if self._inband:
            return
        if self.guest.socket_calls:
            ours, theirs = socket.socketpair()
            self.stack.callback(ours.close)
            fd, given = ours.fileno(), theirs.fileno()
            ours.setblocking(False)
        else:
            fd = given = os.eventfd(0, os.EFD_NONBLOCK)
            self.stack.callback(os.close, fd)
        await self.set(Request.SET_VRING_CALL, struct.pack("<Q", index), [given])
        if self.guest.socket_calls:
            theirs.close()
        if index in self._listening:
            self._listening.pop(index).cancel()
        self._listening[index] = scope = trio.CancelScope()
        nursery.start_soon(self._hear_calls, fd, index, scope)

    async def enable(self, *indexes: int, on: bool = True) -> None:
        """Enables or disables vrings."""
        if self.guest.features & wire.PROTOCOL_FEATURES:
            for index in indexes or (0, 1):
                await self.set_ring(Request.SET_VRING_ENABLE, index, int(on))

    async def _hear_calls(self, fd: int, index: int, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                await trio.lowlevel.wait_readable(fd)
                data = os.read(fd, 4096)
                if not data:
                    return
                self._called(index)

    async def _hear_requests(self, channel: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(channel)
            data = channel.recv(20)
            if not data:
                return
            number, flags, size, index, rest = struct.unpack("<IIIII", data)
            assert (number, flags, size, rest) == (4, wire.VERSION, 8, 0)
            self._called(index)

    def _called(self, index: int) -> None:
        self.calls[index] += 1
        self.device.notified()

    def close(self) -> None:
        """Everything, at once."""
        self.sock.close()
        self.stack.close()


async def connect(path: Path) -> socket.socket:
    """Connects to a back end, as soon as that listens."""
    while True:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        try:
            sock.connect(str(path))
            return sock
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            sock.close()
            await trio.sleep(0.001)


@asynccontextmanager
async def open_front_end(
    path: Path, guest: Guest = UML
) -> AsyncIterator[tuple[FrontEndSide, trio.Nursery]]:
    """A connected front end that has said nothing yet, and a nursery for what it hears."""
    sock = await connect(path)
    side = FrontEndSide(sock, guest)
    try:
        async with open_background() as nursery:
            yield side, nursery
    finally:
        side.device.close()
        side.close()


@asynccontextmanager
async def open_driver(side: FrontEndSide, nursery: trio.Nursery) -> AsyncIterator[Bus]:
    """One life of the guest's driver, from the vrings on; they are stopped at its end.

    Unless the back end is gone by then.
    """
    if side.guest.enable_first:
        side.clear_rings()
        await side.set_rings(nursery)
        await side.enable()
    async with open_bus(side.create_device()) as bus:
        if not side.guest.enable_first:
            await side.set_rings(nursery)
            side.kick(0)
            await side.enable()
            for index in range(2):
                await side.set_call(nursery, index)
        side.kick(0)
        yield bus
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        await side.enable(1, 0, on=False)


@asynccontextmanager
async def open_guest(path: Path, guest: Guest = UML) -> AsyncIterator[Bus]:
    """A whole guest: the bus of its driver."""
    async with open_front_end(path, guest) as (side, nursery):
        await side.shake_hands(nursery)
        async with open_driver(side, nursery) as bus:
            yield bus
