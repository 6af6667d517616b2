"""What real kernels asked of a back end, asked again: recorded handshakes, kicks and messages."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from front_end import connect

from openamp_py import Bus, VhostUserAddress, VhostUserLink, serve_remote
from openamp_py.background import open_background
from openamp_py.memory import MemoryMap, Region, SharedMemory
from openamp_py.platforms import vhost_wire as wire
from openamp_py.platforms.vhost_wire import Request
from openamp_py.vring import VringLayout, VringPlaces

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "linux"
NAMES = (
    "uml-6.1.192",
    "uml-6.1.192-no-ns",
    "uml-6.12.117",
    "uml-6.12.117-eventidx",
    "uml-7.3.4",
    "uml-7.3.4-inband",
    "qemu11-pci",
    "qemu11-mmio",
)
_REQUEST = {"request", "flags", "size", "payload", "fds"}


def _lines(name: str) -> list[dict[str, Any]]:
    path = GOLDEN / f"vhost-user-{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there: the recorded handshakes are not in this tree")
    return [json.loads(line) for line in path.read_text().splitlines()]


class Replay:
    """The recorded front end, with a small memory in the place of the guest's.

    Rings are put where the recording says, as far as the guest's memory is concerned; so the
    recorded memory table, ring addresses and buffer addresses are used as they are, on a sparse
    file of the recorded size.
    """

    def __init__(self, sock: socket.socket, lines: list[dict[str, Any]]) -> None:
        self.sock = sock
        self.lines = lines
        self.stack = contextlib.ExitStack()
        self.size = next(
            int(fd.split(":")[1], 16)
            for line in lines
            for fd in line.get("fds", ())
            if fd.startswith("memory:")
        )
        self.shared = SharedMemory.create("openamp-guest", self.size)
        self.stack.callback(self.shared.close)
        self.view = self.shared.region("all", 0).view
        self.memory = MemoryMap(())
        self.kicks: dict[int, int] = {}
        self.calls: list[tuple[int, socket.socket | int]] = []
        self.rings: dict[int, VringPlaces] = {}
        self.nums: dict[int, int] = {}
        self.back_channel: socket.socket | None = None

    def close(self) -> None:
        self.memory = MemoryMap(())
        self.sock.close()
        self.stack.close()

    def _descriptor(self, kind: str, line: dict[str, Any]) -> int:
        if kind.startswith("memory:"):
            return self.shared.fd
        index = bytes.fromhex(line["payload"])[0] if line["payload"] else 0
        if kind == "eventfd":
            fd = os.eventfd(0, os.EFD_NONBLOCK)
            self.stack.callback(os.close, fd)
            if line["request"] == Request.SET_VRING_KICK:
                self.kicks[index] = fd
            elif line["request"] == Request.SET_VRING_CALL:
                self.calls.append((index, fd))
            return fd
        ours, theirs = socket.socketpair()
        self.stack.callback(ours.close)
        self.stack.callback(theirs.close)
        ours.setblocking(False)
        if line["request"] == Request.SET_BACKEND_REQ_FD:
            self.back_channel = ours
        else:
            self.calls.append((index, ours))
        return theirs.fileno()

    async def send(self, line: dict[str, Any]) -> None:
        """One recorded request."""
        payload = bytes.fromhex(line["payload"])
        self._learn(line["request"], payload)
        head = struct.pack("<III", line["request"], line["flags"], line["size"])
        fds = [self._descriptor(kind, line) for kind in line["fds"]]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
        self.sock.sendmsg([head + payload], rights if fds else [])

    def _learn(self, request: int, payload: bytes) -> None:
        if request == Request.SET_MEM_TABLE:
            self.memory = MemoryMap(
                Region("guest", p.user_va, p.guest_pa, self.view[p.offset :][: p.size])
                for p in wire.decode_memory_untrusted(payload)
            )
        elif request == Request.SET_VRING_ADDR:
            index, places = wire.decode_address_untrusted(payload)
            self.rings[index] = places
        elif request == Request.SET_VRING_NUM:
            index, self.nums[index] = wire.decode_num_untrusted(payload)

    async def expect(self, line: dict[str, Any]) -> None:
        """One recorded reply."""
        data = b""
        while len(data) < wire.HEADER_SIZE + line["size"]:
            await trio.lowlevel.wait_readable(self.sock)
            part = self.sock.recv(wire.HEADER_SIZE + line["size"] - len(data))
            assert part, f"dropped instead of reply {line['n']}"
            data += part
        head = struct.pack("<III", line["request"], line["flags"], line["size"])
        assert data == head + bytes.fromhex(line["payload"]), line

    # The driver's hand in the rings.

    def _part(self, address: int, size: int) -> memoryview:
        view = self.memory.find_da(address, size)
        assert view is not None
        return view

    def fill(self, index: int, available: int) -> None:
        """Makes receive buffers available up to an index, as the kernel's driver does."""
        num, places = self.nums[index], self.rings[index]
        base = self.memory.regions[0].pa + (self.memory.regions[0].size // 2 & ~0xFFF)
        descriptors = self._part(places.descriptors, 16 * num)
        ring = self._part(places.available, VringLayout(num, 4).available_size)
        for n in range(num):
            struct.pack_into("<QIHH", descriptors, 16 * n, base + 512 * n, 512, 2, (n + 1) % num)
            struct.pack_into("<H", ring, 4 + 2 * n, n)
        struct.pack_into("<H", ring, 2, available & 0xFFFF)

    def put(self, line: dict[str, Any]) -> None:
        """A recorded message of the driver: into the buffer after the receive buffers."""
        num, places = self.nums[1], self.rings[1]
        region = self.memory.regions[0]
        data = bytes.fromhex(line["bytes"])
        at = region.pa + (region.size // 2 & ~0xFFF) + 512 * (num + line["head"])
        target = self.memory.find_pa(at, len(data))
        assert target is not None
        target[:] = data
        descriptors = self._part(places.descriptors, 16 * num)
        struct.pack_into("<QIHH", descriptors, 16 * line["head"], at, line["desc_len"], 0, 0)
        ring = self._part(places.available, VringLayout(num, 4).available_size)
        (available,) = struct.unpack_from("<H", ring, 2)
        struct.pack_into("<H", ring, 4 + 2 * (available % num), line["head"])
        struct.pack_into("<H", ring, 2, (available + 1) & 0xFFFF)

    def used(self, index: int) -> int:
        """Where the device is."""
        return int(struct.unpack_from("<H", self._part(self.rings[index].used, 4), 2)[0])

    def kick(self, index: int) -> None:
        """By descriptor, where there is one."""
        if index in self.kicks:
            os.eventfd_write(self.kicks[index], 1)

    def heard_calls(self, index: int) -> int:
        """How often the newest call descriptor of a vring, or the channel, was written."""
        if self.back_channel is not None and not self.calls:
            with contextlib.suppress(BlockingIOError):
                data = self.back_channel.recv(1 << 16)
                assert all(
                    each[:3] == (4, wire.VERSION, 8) for each in struct.iter_unpack("<IIIII", data)
                )
                return len(data) // 20
            return 0
        call = [each for number, each in self.calls if number == index][-1]
        with contextlib.suppress(BlockingIOError):
            return os.eventfd_read(call) if isinstance(call, int) else len(call.recv(1 << 16)) // 8
        return 0


@pytest.mark.parametrize("name", NAMES)
async def test_a_recorded_kernel_is_served(name: str, tmp_path: Path) -> None:
    """Every request gets the recorded reply; every message of the kernel arrives as it was sent."""
    lines = _lines(name)
    run = lines[0]
    link = VhostUserLink(
        VhostUserAddress(str(tmp_path / "s")),
        features=int(run["offered_features"], 16) & ~wire.PROTOCOL_FEATURES,
        protocol=int(run["offered_protocol_features"], 16),
    )
    lives: list[Bus] = []
    arrived: list[tuple[int, bytes]] = []

    async def application(bus: Bus) -> None:
        lives.append(bus)
        async with trio.open_nursery() as nursery:
            for address in sorted({d for d, _ in _sent(lines)} - {53}):
                nursery.start_soon(_collect, bus, address, arrived)

    with trio.fail_after(20):
        async with open_background() as nursery:
            nursery.start_soon(serve_remote, link, application)
            replay = Replay(await connect(tmp_path / "s"), lines)
            try:
                await _replay(replay, lines, lives)
                while not lives:
                    await trio.testing.wait_all_tasks_blocked()
            finally:
                replay.close()
    sent = [each for each in _sent(lines) if each[0] != 53]
    assert arrived == sent
    assert len(lives) == 1


def _sent(lines: list[dict[str, Any]]) -> list[tuple[int, bytes]]:
    """Destination and payload of what the kernel sent."""
    found = []
    for line in lines:
        if line["kind"] == "message" and line["from"] == "linux":
            data = bytes.fromhex(line["bytes"])
            _, destination, _, length, _ = struct.unpack_from("<IIIHH", data)
            found.append((destination, data[16 : 16 + length]))
    return found


async def _collect(bus: Bus, address: int, arrived: list[tuple[int, bytes]]) -> None:
    async with bus.open_endpoint(address=address) as endpoint:
        async for message in endpoint:
            arrived.append((address, message.payload))


async def _replay(replay: Replay, lines: list[dict[str, Any]], lives: list[Bus]) -> None:
    called = 0
    last_used = None
    pending_request: dict[str, Any] | None = None
    for line in lines[1:]:
        match line["kind"]:
            case "request":
                pending_request = line
                if line["request"] == Request.GET_VRING_BASE:
                    last_used = replay.used(bytes.fromhex(line["payload"])[0])
                if line["request"] == Request.VRING_KICK and not lives:
                    replay.fill(0, replay.nums[0])
                qemu = not lives and line["request"] == Request.SET_VRING_ENABLE
                if qemu and "QEMU" in lines[0]["frontend"]:
                    replay.fill(0, replay.nums[0])
                await replay.send(line)
            case "reply":
                assert pending_request is not None
                if line["request"] == Request.GET_VRING_BASE:
                    # How many there were depends on what our application sent.
                    payload = bytearray(bytes.fromhex(line["payload"]))
                    assert last_used is not None
                    struct.pack_into("<I", payload, 4, last_used)
                    line = {**line, "payload": payload.hex()}
                await replay.expect(line)
            case "kick":
                if line["by"] != "enable" and not lives and line["queue"] == 0:
                    replay.fill(0, line["avail_idx"])
                if line["by"] == "fd":
                    replay.kick(line["queue"])
                await trio.testing.wait_all_tasks_blocked(0.002)
            case "message" if line["from"] == "linux":
                while not lives:
                    await trio.testing.wait_all_tasks_blocked(0.002)
                replay.put(line)
                replay.kick(1)
                await trio.testing.wait_all_tasks_blocked(0.002)
                assert replay.used(1) > 0
                called += replay.heard_calls(1)
            case _:
                pass
    assert called, "buffers that came back were never said to"
