"""A guest's device over vhost-user: negotiation, lives, reconnects, and front ends that lie."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import itertools
import logging
import os
import select
import signal
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from front_end import (
    ALL,
    QEMU,
    UML,
    FrontEndSide,
    Guest,
    connect,
    encode_address,
    encode_request,
    encode_state,
    encode_table,
    open_driver,
    open_front_end,
    open_guest,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openamp_py import (
    Bus,
    PeerGoneError,
    PlatformError,
    VhostUserAddress,
    VhostUserError,
    VhostUserLink,
    open_bus,
    serve_remote,
)
from openamp_py.background import open_background
from openamp_py.constants import (
    RPMSG_F_NS,
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
)
from openamp_py.memory import MemoryMap, SharedMemory
from openamp_py.platforms import vhost_wire as wire
from openamp_py.platforms.vhost_descriptors import BackChannel, Kick
from openamp_py.platforms.vhost_wire import MemoryPlace, Request
from openamp_py.remote import BusApplication
from openamp_py.rpmsg.recent import RecentMessages, recent_messages
from openamp_py.vring import VringPlaces

Requests = Sequence[tuple[int, bytes]]

NAME = "test-service"
LIMIT = 20.0


async def _echo(bus: Bus) -> None:
    async with bus.open_endpoint(NAME, rebind=True) as endpoint:
        async for message in endpoint:
            await endpoint.send_to(message.payload, message.source)


@asynccontextmanager
async def _served(
    path: Path, application: BusApplication = _echo, **options: bool
) -> AsyncIterator[trio.Event]:
    """The device is served during the block; the event says that it is not any more."""
    ended = trio.Event()
    with trio.fail_after(LIMIT):
        async with open_background() as nursery:

            async def serve() -> None:
                link = VhostUserLink(VhostUserAddress(str(path), **options))
                await serve_remote(link, application)
                ended.set()

            nursery.start_soon(serve)
            yield ended


async def _exchange(bus: Bus, count: int = 40) -> None:
    """Messages of all lengths go to the echo and come back, more than there are buffers."""
    async with bus.open_endpoint(NAME, announce=False) as endpoint:
        await endpoint.wait_bound()
        for number in range(count):
            payload = bytes((number,)) * (number * 13 % 497)
            await endpoint.send(payload)
            assert (await endpoint.receive()).payload == payload
        for number in range(3):
            await endpoint.send(bytes((number,)))
        for number in range(3):
            assert (await endpoint.receive()).payload == bytes((number,))


# What front ends are like


@pytest.mark.parametrize("guest", [UML, QEMU], ids=["uml", "qemu"])
async def test_messages_go_both_ways(tmp_path: Path, guest: Guest) -> None:
    async with _served(tmp_path / "s"), open_guest(tmp_path / "s", guest) as bus:
        await _exchange(bus)


@pytest.mark.parametrize("acknowledged", [False, True])
@pytest.mark.parametrize("inband", [False, True])
@pytest.mark.parametrize("order", [UML, QEMU], ids=["uml", "qemu"])
async def test_protocol_features(
    tmp_path: Path, acknowledged: bool, inband: bool, order: Guest
) -> None:
    protocol = wire.BACKEND_REQ
    protocol |= wire.REPLY_ACK if acknowledged else 0
    protocol |= wire.INBAND if inband else 0
    guest = dataclasses.replace(order, protocol=protocol)
    async with (
        _served(tmp_path / "s", inband=inband),
        open_guest(tmp_path / "s", guest) as bus,
    ):
        await _exchange(bus)


@pytest.mark.parametrize("event_idx", [0, VIRTIO_RING_F_EVENT_IDX])
@pytest.mark.parametrize("indirect", [0, VIRTIO_RING_F_INDIRECT_DESC])
@pytest.mark.parametrize("version_1", [0, VIRTIO_F_VERSION_1])
@pytest.mark.parametrize("sockets", [False, True])
async def test_virtio_features(
    tmp_path: Path, event_idx: int, indirect: int, version_1: int, sockets: bool
) -> None:
    features = RPMSG_F_NS | event_idx | indirect | version_1
    guest = Guest(features | wire.PROTOCOL_FEATURES, socket_calls=sockets)
    seen = []

    async def application(bus: Bus) -> None:
        seen.append(bus.dump().features)
        await _echo(bus)

    async with (
        _served(tmp_path / "s", application),
        open_guest(tmp_path / "s", guest) as bus,
    ):
        await _exchange(bus)
        assert seen == [features]


async def test_without_any_protocol_features(tmp_path: Path) -> None:
    """As front ends of old: a vring with a kick descriptor is enabled."""
    guest = Guest(ALL, protocol=0)
    async with _served(tmp_path / "s"), open_guest(tmp_path / "s", guest) as bus:
        await _exchange(bus)


@pytest.mark.parametrize("num", [1, 2, 8, 256])
async def test_vrings_of_any_size(tmp_path: Path, num: int) -> None:
    guest = Guest(num=num)
    async with _served(tmp_path / "s"), open_guest(tmp_path / "s", guest) as bus:
        if num > 2:
            await _exchange(bus)
        else:
            async with bus.open_endpoint(NAME, announce=False) as endpoint:
                await endpoint.wait_bound()
                await endpoint.send(b"x")
                assert (await endpoint.receive()).payload == b"x"


@pytest.mark.parametrize("order", list(itertools.permutations((0x8000, 0x1000, 0x42C4 & ~15))))
async def test_parts_of_vrings_in_any_order(tmp_path: Path, order: tuple[int, int, int]) -> None:
    second = (order[0] + 0x10000, order[1] + 0x10000, order[2] + 0x10000)
    guest = Guest(parts=(order, second))
    async with _served(tmp_path / "s"), open_guest(tmp_path / "s", guest) as bus:
        await _exchange(bus)


async def test_what_went_over_vrings_in_parts_can_be_read_afterwards(tmp_path: Path) -> None:
    guest = Guest(parts=((0x8000, 0x1000, 0x42C0), (0x18000, 0x11000, 0x142C0)))
    async with (
        _served(tmp_path / "s"),
        open_front_end(tmp_path / "s", guest) as (side, nursery),
    ):
        await side.shake_hands(nursery)
        async with open_driver(side, nursery) as bus:
            async with bus.open_endpoint(NAME, announce=False) as endpoint:
                await endpoint.wait_bound()
                await endpoint.send(b"one")
                await endpoint.receive()
            recent = recent_messages(side.device)
            assert [each.payload for each in recent.sent] == [b"one"]
            assert recent.received[-1].payload == b"one"
            memory, side.device.memory = side.device.memory, MemoryMap(())
            assert recent_messages(side.device) == RecentMessages((), ())
            side.device.memory = memory


async def test_memory_in_several_places(tmp_path: Path) -> None:
    """The parts of a vring, and the buffers, are in regions of their own, in no order."""
    places = (
        MemoryPlace(0x8000_0000, 0x80000, 0x7000_0000, 0x80000),
        MemoryPlace(0x1000_0000, 0x1000, 0x7F00_0000_0000, 0x0000),
        MemoryPlace(0x0000_0000, 0x2000, 0x1000, 0x1000),
        MemoryPlace(0xFFFF_FFFF_FFF0_0000, 0x8000, 0xFFFF_FFFF_0000_0000, 0x3000),
    )
    guest = Guest(places=places, empty_slots=1)
    async with _served(tmp_path / "s"), open_guest(tmp_path / "s", guest) as bus:
        await _exchange(bus)


async def test_a_region_that_begins_anywhere_in_its_file(tmp_path: Path) -> None:
    place = MemoryPlace(0x4000_0010, 0xF0000, 0x7F00_0000_0010, 0x10)
    parts = ((0x10, 0x1000, 0x2000), (0x4000, 0x5000, 0x6000))
    guest = Guest(places=(place,), parts=parts)
    async with _served(tmp_path / "s"), open_guest(tmp_path / "s", guest) as bus:
        await _exchange(bus)


@pytest.mark.parametrize("event_idx", [0, VIRTIO_RING_F_EVENT_IDX])
async def test_calls_that_nobody_wants_are_not_made(tmp_path: Path, event_idx: int) -> None:
    buses: list[Bus] = []

    async def application(bus: Bus) -> None:
        buses.append(bus)
        await trio.sleep_forever()

    guest = Guest(RPMSG_F_NS | event_idx | wire.PROTOCOL_FEATURES)
    async with (
        _served(tmp_path / "s", application),
        open_front_end(tmp_path / "s", guest) as (side, nursery),
    ):
        await side.shake_hands(nursery)
        await side.set_rings(nursery)
        await side.enable()
        queues = [side.device.open_queue(index) for index in range(2)]
        side.device.begin(RPMSG_F_NS)
        with contextlib.ExitStack() as stack:
            queues = [
                stack.enter_context(contextlib.closing(side.device.open_queue(index)))
                for index in range(2)
            ]
            for queue in queues:
                queue.start()
            buffers, _ = side.device.buffers(512 * guest.num)
            for number in range(guest.num):
                queues[0].add(writable=[(buffers + 512 * number, 512)])
            queues[0].publish()
            side.kick(0)
            while not buses:
                await trio.testing.wait_all_tasks_blocked()
            async with buses[0].open_endpoint(address=5) as endpoint:
                for wanted in (True, False, True):
                    if wanted:
                        queues[0].notify_on()
                    else:
                        queues[0].notify_off()
                    before = side.calls[0]
                    await endpoint.send_to(b"x", 6)
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    assert (side.calls[0] > before) is wanted
                    while queues[0].get_used() is not None:
                        pass


# Lives


async def test_a_driver_that_stops_its_vrings_and_comes_back(tmp_path: Path) -> None:
    lives = []

    async def application(bus: Bus) -> None:
        lives.append("begun")
        try:
            await _echo(bus)
        finally:
            lives.append("ended")

    async with (
        _served(tmp_path / "s", application),
        open_front_end(tmp_path / "s") as (side, nursery),
    ):
        await side.shake_hands(nursery)
        for count in range(1, 4):
            async with open_driver(side, nursery) as bus:
                await _exchange(bus)
                assert lives.count("begun") == count
            await trio.testing.wait_all_tasks_blocked()
            assert lives.count("ended") == count


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("base", "stopped vring 1"),
        ("disable", "stopped vring 1"),
        ("memory", "changed its memory"),
        ("reset", "reset the device (RESET_DEVICE)"),
        ("owner", "reset the device (RESET_OWNER)"),
    ],
)
async def test_what_ends_a_life(tmp_path: Path, how: str, why: str) -> None:
    failures = []

    async def application(bus: Bus) -> None:
        failures.append(await bus.wait_failure())
        await trio.sleep_forever()

    async with (
        _served(tmp_path / "s", application),
        open_front_end(tmp_path / "s") as (side, nursery),
    ):
        await side.shake_hands(nursery)
        async with open_driver(side, nursery):
            await trio.testing.wait_all_tasks_blocked()
            assert not failures
            match how:
                case "base":
                    await side.get(Request.GET_VRING_BASE, encode_state(1, 0))
                case "disable":
                    await side.enable(1, on=False)
                case "memory":
                    await side.set_memory(side.guest.places)
                case "reset":
                    await side.set(Request.RESET_DEVICE)
                case "owner":
                    await side.set(Request.RESET_OWNER)
                    await side.set(Request.SET_OWNER)
            await trio.testing.wait_all_tasks_blocked()
            assert [type(each) for each in failures] == [PeerGoneError]
    assert why in str(failures[0])


async def test_a_vring_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """What was sent while it was stopped is taken afterwards, and nothing is taken twice."""
    buses: list[Bus] = []

    async def application(bus: Bus) -> None:
        buses.append(bus)
        await trio.sleep_forever()

    async with (
        _served(tmp_path / "s", application),
        open_front_end(tmp_path / "s") as (side, nursery),
    ):
        await side.shake_hands(nursery)
        await side.set_rings(nursery)
        await side.enable()
        async with (
            open_bus(side.create_device()) as bus,
            bus.open_endpoint(address=6, destination=5) as endpoint,
        ):
            side.kick(0)
            await trio.testing.wait_all_tasks_blocked(0.01)
            for _ in range(20):
                await endpoint.send(b"x")
            await trio.testing.wait_all_tasks_blocked(0.01)
            bases = [
                struct.unpack("<II", await side.get(Request.GET_VRING_BASE, encode_state(n, 0)))
                for n in range(2)
            ]
            assert bases == [(0, 0), (1, 20)]
            for _ in range(4):
                await endpoint.send(b"x")
            assert [bus.statistics.received for bus in buses] == [20]
            await side.set_rings(nursery, [base for _, base in bases])
            side.kick(0)
            await endpoint.send(b"last")
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert [bus.statistics.received for bus in buses] == [20, 5]


async def test_a_new_call_descriptor_is_written_once(tmp_path: Path) -> None:
    """What was called by the old one may never have been heard."""
    async with (
        _served(tmp_path / "s"),
        open_front_end(tmp_path / "s") as (side, nursery),
    ):
        await side.shake_hands(nursery)
        await side.set_call(nursery, 0)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert side.calls == [0, 0], "nothing can have been missed yet"
        async with open_driver(side, nursery):
            await trio.testing.wait_all_tasks_blocked(0.01)
            before = list(side.calls)
            await side.set_call(nursery, 1)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert side.calls == [before[0], before[1] + 1]


# Connections


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _guest_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("openamp-guest")


async def test_one_guest_after_the_other(tmp_path: Path) -> None:
    async with _served(tmp_path / "s") as ended:
        counts = set()
        for number in range(20):
            async with open_guest(tmp_path / "s", (UML, QEMU)[number % 2]) as bus:
                await _exchange(bus, 3)
            del bus
            await trio.testing.wait_all_tasks_blocked(0.01)
            gc.collect()
            counts.add(_open_files())
            assert _guest_mappings() == 0
        assert len(counts) == 1
        assert not ended.is_set()


@pytest.mark.parametrize("steps", range(12))
async def test_a_guest_that_is_killed_at_any_moment(tmp_path: Path, steps: int) -> None:
    """It leaves after so many requests, and the next one is served."""

    class Killed(Exception):
        pass

    class Mortal(FrontEndSide):
        left = steps

        async def send(self, data: bytes, fds: object = ()) -> None:
            if not self.left:
                raise Killed
            self.left -= 1
            await super().send(data, fds)  # type: ignore[arg-type]

    async with _served(tmp_path / "s"):
        with contextlib.suppress(Killed):
            sock = await connect(tmp_path / "s")
            side = Mortal(sock, UML)
            try:
                async with open_background() as nursery:
                    await side.shake_hands(nursery)
                    async with open_driver(side, nursery) as bus:
                        await _exchange(bus)
                        raise Killed
            finally:
                side.device.close()
                side.close()
        async with open_guest(tmp_path / "s") as bus:
            await _exchange(bus)


async def test_a_guest_sees_that_its_device_is_gone(tmp_path: Path) -> None:
    async with open_background() as nursery:
        await nursery.start(_run_served, tmp_path / "s")
        async with open_front_end(tmp_path / "s") as (side, inner):
            await side.shake_hands(inner)
            await side.set_rings(inner)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                assert await side.read(1) == b""


async def _run_served(path: Path, *, task_status: trio.TaskStatus[None]) -> None:
    async with _served(path):
        while not path.exists():
            await trio.sleep(0.001)
        task_status.started()
        await trio.sleep_forever()


async def test_it_connects_to_a_front_end_that_listens(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        async with _served(tmp_path / "s", connect=True) as ended:
            with trio.fail_after(LIMIT):
                sock = await trio.to_thread.run_sync(lambda: listener.accept()[0])
            sock.setblocking(False)
            side = FrontEndSide(sock, UML)
            try:
                async with open_background() as nursery:
                    await side.shake_hands(nursery)
                    async with open_driver(side, nursery) as bus:
                        await _exchange(bus)
            finally:
                side.device.close()
                side.close()
            await ended.wait()


async def test_one_that_it_connected_to_and_that_lies_is_an_error(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        with pytest.raises(VhostUserError, match="the front end was dropped: request 99"):
            async with _served(tmp_path / "s", connect=True) as ended:
                sock = await trio.to_thread.run_sync(lambda: listener.accept()[0])
                with sock:
                    sock.send(encode_request(99))
                    await ended.wait()


async def test_a_socket_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PlatformError, match="it exists and is not a socket"):
        await serve_remote(VhostUserLink(VhostUserAddress(str(tmp_path / "file"))), _echo)
    with pytest.raises(PlatformError, match="No such file"):
        await serve_remote(VhostUserLink(VhostUserAddress(str(tmp_path / "a" / "b"))), _echo)
    async with _served(tmp_path / "s"):
        await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(PlatformError, match="another program listens"):
            await serve_remote(VhostUserLink(VhostUserAddress(str(tmp_path / "s"))), _echo)


async def test_an_application_that_is_done_ends_it(tmp_path: Path) -> None:
    async def application(bus: Bus) -> None:
        await trio.lowlevel.checkpoint()

    async with (
        _served(tmp_path / "s", application) as ended,
        open_front_end(tmp_path / "s") as (side, nursery),
    ):
        await side.shake_hands(nursery)
        async with open_driver(side, nursery):
            await ended.wait()


# Addresses


def test_urls_are_read() -> None:
    assert VhostUserAddress.parse("vhost-user:/a") == VhostUserAddress("/a")
    assert VhostUserAddress.parse("vhost-user:a?connect=1&inband=0") == VhostUserAddress("a", True)
    assert VhostUserAddress.parse("vhost-user:/a?inband=1&sealed=1") == VhostUserAddress(
        "/a", inband=True, sealed=True
    )
    assert VhostUserAddress.matches("vhost-user:") and not VhostUserAddress.matches("shm:/a")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("shm:/a", "is not a link to a guest; want vhost-user:PATH"),
        ("vhost-user:", "is not a link to a guest"),
        ("vhost-user:?connect=1", "is not a link to a guest"),
        ("vhost-user:/a?connect=yes", "connect=yes; 0 or 1"),
        ("vhost-user:/a?speed=1", "unknown option 'speed'"),
        ("vhost-user:/a?nonsense", "not key=value"),
    ],
)
def test_bad_urls_say_what_is_wrong(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VhostUserAddress.parse(url)


# Front ends that lie: each loses its connection, with a reason, and the next one is served.

_OWNER: list[tuple[int, bytes]] = [(Request.SET_OWNER, b"")]
_U64 = struct.Struct("<Q")
_TABLE = encode_table([MemoryPlace(0x4000_0000, 0x10000, 0x7000_0000, 0)])


def _memory(*places: MemoryPlace) -> Requests:
    return [*_OWNER, (Request.SET_MEM_TABLE, encode_table(places))]


def _table(*values: tuple[int, int, int, int]) -> Requests:
    return _memory(*(MemoryPlace(*each) for each in values))


_LIES: list[tuple[str, Requests, list[str], str]] = [
    # name, requests, descriptors with the last one, reason
    ("unknown", [(99, b"")], [], "request 99 with 0 bytes is none"),
    ("no owner", [(Request.SET_VRING_NUM, encode_state(0, 4))], [], "NUM came before SET_OWNER"),
    ("owner twice", _OWNER * 2, [], "SET_OWNER came a second time"),
    ("long", [(Request.SET_OWNER, b"x")], [], "SET_OWNER: 1 bytes; 0 belong"),
    ("short", [*_OWNER, (Request.SET_FEATURES, b"1234")], [], "SET_FEATURES: 4 bytes; 8 belong"),
    (
        "not offered",
        [*_OWNER, (Request.SET_FEATURES, _U64.pack(1 << 34))],
        [],
        "0x400000000, of which 0x400000000 were not offered",
    ),
    (
        "protocol not offered",
        [(Request.SET_PROTOCOL_FEATURES, _U64.pack(1 << 16))],
        [],
        "of which 0x10000 were not offered",
    ),
    (
        "in-band without its feature",
        [*_OWNER, (Request.VRING_KICK, encode_state(0, 0))],
        [],
        "VRING_KICK needs the protocol feature 0x4000",
    ),
    (
        "enable without its feature",
        [*_OWNER, (Request.SET_VRING_ENABLE, encode_state(0, 1))],
        [],
        "SET_VRING_ENABLE needs the feature 0x40000000",
    ),
    ("vring 2", [*_OWNER, (Request.SET_VRING_NUM, encode_state(2, 4))], [], "vring 2; there are 2"),
    ("num 0", [*_OWNER, (Request.SET_VRING_NUM, encode_state(0, 0))], [], "0 entries for vring 0"),
    ("num 17", [*_OWNER, (Request.SET_VRING_NUM, encode_state(1, 17))], [], "17 entries for"),
    ("num huge", [*_OWNER, (Request.SET_VRING_NUM, encode_state(1, 65536))], [], "at most 32768"),
    ("base", [*_OWNER, (Request.SET_VRING_BASE, encode_state(1, 65536))], [], "at most 65535"),
    (
        "descriptor for nobody",
        [(Request.GET_FEATURES, b"")],
        ["eventfd"],
        "GET_FEATURES: 1 descriptors came with it; 0 belong",
    ),
    ("no kick", [*_OWNER, (Request.SET_VRING_KICK, _U64.pack(0))], [], "0 descriptors came"),
    (
        "two kicks",
        [*_OWNER, (Request.SET_VRING_KICK, _U64.pack(0))],
        ["eventfd"] * 2,
        "2 descriptors came with it; 1 belong",
    ),
    (
        "nine",
        [*_OWNER, (Request.SET_VRING_KICK, _U64.pack(0))],
        ["eventfd"] * 9,
        "more descriptors came with one message than the 8",
    ),
    (
        "polling",
        [*_OWNER, (Request.SET_VRING_KICK, _U64.pack(0x100))],
        [],
        "no descriptor for vring 0; to look at it all the time is not done",
    ),
    ("bits", [*_OWNER, (Request.SET_VRING_CALL, _U64.pack(0x200))], [], "bits that mean nothing"),
    ("index", [*_OWNER, (Request.SET_VRING_CALL, _U64.pack(7))], ["eventfd"], "vring 7"),
    (
        "kick is a file",
        [*_OWNER, (Request.SET_VRING_KICK, _U64.pack(0))],
        ["memory"],
        "the kick descriptor of vring 0 is not an eventfd",
    ),
    (
        "kick is a pipe",
        [*_OWNER, (Request.SET_VRING_KICK, _U64.pack(1))],
        ["pipe"],
        "the kick descriptor of vring 1 is not an eventfd",
    ),
    *(
        (
            f"kick is a {kind}",
            [*_OWNER, (Request.SET_VRING_KICK, _U64.pack(0))],
            [kind],
            "the kick descriptor of vring 0 is not an eventfd",
        )
        for kind in ("directory", "terminal", "epoll", "zero", "socket", "distant")
    ),
    *(
        (
            f"call is a {kind}",
            [*_OWNER, (Request.SET_VRING_CALL, _U64.pack(0))],
            [kind],
            "call descriptor of vring 0 is neither an eventfd nor a socket",
        )
        for kind in ("directory", "terminal", "epoll", "zero", "distant", "pipe")
    ),
    (
        "call is a file",
        [*_OWNER, (Request.SET_VRING_CALL, _U64.pack(1))],
        ["memory"],
        "call descriptor of vring 1 is neither an eventfd nor a socket",
    ),
    (
        "in-band without a channel",
        [(Request.SET_PROTOCOL_FEATURES, _U64.pack(wire.INBAND))],
        [],
        "in-band notifications",
    ),
    (
        "channel is a file",
        [
            (Request.SET_PROTOCOL_FEATURES, _U64.pack(wire.BACKEND_REQ)),
            (Request.SET_BACKEND_REQ_FD, b""),
        ],
        ["memory"],
        "is not a socket",
    ),
    ("address", [*_OWNER, (Request.SET_VRING_ADDR, bytes(39))], [], "39 bytes; 40 belong"),
    (
        "odd address",
        [*_OWNER, (Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, 8, 0, 0, 0))],
        [],
        "descriptors of vring 0 at 0x8; a multiple of 16",
    ),
    ("no table", [*_OWNER, (Request.SET_MEM_TABLE, b"")], [], "0 bytes; 8, and 32 for each"),
    ("half a table", [*_OWNER, (Request.SET_MEM_TABLE, _TABLE[:-1])], ["memory"], "39 bytes"),
    ("no regions", _memory(), [], "0 regions in 0 slots"),
    (
        "too many regions",
        [*_OWNER, (Request.SET_MEM_TABLE, struct.pack("<II", 9, 0) + bytes(32 * 8))],
        ["memory"] * 8,
        "9 regions in 8 slots",
    ),
    ("huge", [*_OWNER, (Request.SET_MEM_TABLE, bytes(8 + 32 * 9))], [], "296 bytes; 268 are"),
    ("empty region", _table((0, 0, 0, 0)), ["memory"], "empty, or beyond 64 bits"),
    ("wraps", _table((0, 2, (1 << 64) - 1, 0)), ["memory"], "empty, or beyond 64 bits"),
    ("ends at 0", _table(((1 << 64) - 4096, 4096, 0, 0)), ["memory"], "empty, or beyond 64 bits"),
    ("no file", _table((0, 4096, 0, 0)), [], "0 descriptors came with it; 1 belong"),
    (
        "one file for two",
        _table((0, 4096, 0, 0), (8192, 4096, 8192, 0)),
        ["memory"],
        "1 descriptors came with it; 2 belong",
    ),
    (
        "overlap in the guest",
        _table((0, 4097, 0, 0), (4096, 4096, 8192, 0)),
        ["memory"] * 2,
        "overlap: the second begins at guest_pa 0x1000",
    ),
    (
        "overlap in the front end",
        _table((0, 4096, 100, 0), (8192, 4096, 0, 0)),
        ["memory"] * 2,
        "overlap: the second begins at user_va 0x64",
    ),
    ("beyond its file", _table((0, 0x10000, 0, 1)), ["memory"], "the file has 0x10000 bytes"),
    ("far beyond", _table((0, 1 << 62, 0, 1 << 62)), ["memory"], "the file has 0x10000 bytes"),
    ("memory is a pipe", _table((0, 4096, 0, 0)), ["pipe"], "is not a file"),
    ("memory is a device", _table((0, 4096, 0, 0)), ["zero"], "is not a file"),
    ("memory is a directory", _table((0, 4096, 0, 0)), ["directory"], "is not a file"),
    ("memory is an eventfd", _table((0, 4096, 0, 0)), ["eventfd"], "is not a file"),
    ("memory is a socket", _table((0, 4096, 0, 0)), ["socket"], "is not a file"),
    ("memory to read", _table((0, 4096, 0, 0)), ["readonly"], "cannot be mapped"),
]


class _Descriptors:
    """Descriptors of all kinds; closed by whoever made it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = contextlib.ExitStack()

    def create(self, kind: str) -> int:
        if kind == "eventfd":
            fd = os.eventfd(0)
        elif kind == "memory":
            shared = SharedMemory.create("openamp-lie", 0x10000)
            self._stack.callback(shared.close)
            return shared.fd
        elif kind == "pipe":
            fd, other = os.pipe()
            self._stack.callback(os.close, other)
        elif kind == "zero":
            fd = os.open("/dev/zero", os.O_RDWR)
        elif kind == "directory":
            fd = os.open(self._directory, os.O_RDONLY)
        elif kind == "terminal":
            fd, other = os.openpty()
            self._stack.callback(os.close, other)
        elif kind == "epoll":
            # That of an epoll in it is readable, and cannot be read.
            epoll = self._stack.enter_context(select.epoll())
            ready = self.create("eventfd")
            os.eventfd_write(ready, 1)
            epoll.register(ready)
            return epoll.fileno()
        elif kind == "socket":
            ours, theirs = socket.socketpair()
            self._stack.callback(ours.close)
            self._stack.callback(theirs.close)
            return theirs.fileno()
        elif kind == "distant":
            fd = self._create_distant()
        else:
            (self._directory / "readonly").write_bytes(bytes(0x10000))
            fd = os.open(self._directory / "readonly", os.O_RDONLY)
        self._stack.callback(os.close, fd)
        return fd

    def _create_distant(self) -> int:
        """A file whose path is longer than any that can be told."""
        at = os.open(self._directory, os.O_RDONLY)
        try:
            for _ in range(24):
                with contextlib.suppress(FileExistsError):
                    os.mkdir("d" * 200, dir_fd=at)
                below = os.open("d" * 200, os.O_RDONLY, dir_fd=at)
                os.close(at)
                at = below
            return os.open("file", os.O_RDWR | os.O_CREAT, dir_fd=at)
        finally:
            os.close(at)

    def close(self) -> None:
        self._stack.close()


async def _lie(
    path: Path, requests: Requests, kinds: list[str], flags: int = wire.VERSION
) -> bytes:
    """Sends requests, the last one with descriptors. Returns what came until it was dropped."""
    with contextlib.closing(_Descriptors(path.parent)) as descriptors:
        sock = await connect(path)
        side = FrontEndSide(sock, UML)
        try:
            for number, (request, payload) in enumerate(requests):
                last = number == len(requests) - 1
                fds = [descriptors.create(kind) for kind in kinds] if last else []
                with contextlib.suppress(BrokenPipeError):
                    await side.send(encode_request(request, payload, flags), fds)
            return await side.read(1 << 20)
        finally:
            side.device.close()
            side.close()


@pytest.mark.parametrize(
    ("requests", "kinds", "reason"),
    [lie[1:] for lie in _LIES],
    ids=[lie[0] for lie in _LIES],
)
async def test_who_lies_is_dropped(
    tmp_path: Path,
    requests: Requests,
    kinds: list[str],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with _served(tmp_path / "s", inband=True):
        files: set[int] = set()
        for _ in range(3):
            await _lie(tmp_path / "s", requests, kinds)
            await trio.testing.wait_all_tasks_blocked()
            gc.collect()
            files.add(_open_files())
        assert len(files) == 1
        records = [each for each in caplog.records if each.levelno == logging.WARNING]
        assert len(records) == 3
        assert "the front end was dropped: " in records[0].message
        assert reason in records[0].message
        async with open_guest(tmp_path / "s") as bus:
            await _exchange(bus, 3)


@pytest.mark.parametrize("flags", [0, 2, 3, 5, 1 | 16, 1 | 1 << 31])
async def test_headers_of_another_protocol(
    tmp_path: Path, flags: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with _served(tmp_path / "s"):
        await _lie(tmp_path / "s", [(Request.GET_FEATURES, b"")], [], flags)
        assert f"GET_FEATURES: the header's flags are {flags:#x}" in caplog.text


@pytest.mark.parametrize("length", [1, 11, 12, 19])
async def test_a_message_that_breaks_off(
    tmp_path: Path, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    message = encode_request(Request.SET_PROTOCOL_FEATURES, bytes(8))
    async with _served(tmp_path / "s"):
        with await connect(tmp_path / "s") as sock:
            sock.send(message[:length])
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert "the connection ends" in caplog.text


async def test_a_message_in_single_bytes(tmp_path: Path) -> None:
    async with _served(tmp_path / "s"):
        with await connect(tmp_path / "s") as sock:
            for byte in encode_request(Request.GET_QUEUE_NUM):
                sock.send(bytes((byte,)))
                await trio.testing.wait_all_tasks_blocked()
            await trio.lowlevel.wait_readable(sock)
            assert sock.recv(100) == struct.pack("<IIIQ", Request.GET_QUEUE_NUM, 5, 8, 2)


async def test_a_refused_request_is_answered_where_that_was_asked_for(tmp_path: Path) -> None:
    async with _served(tmp_path / "s"):
        accept = [(Request.SET_PROTOCOL_FEATURES, _U64.pack(wire.REPLY_ACK)), *_OWNER * 2]
        answers = await _lie(tmp_path / "s", accept, [], wire.VERSION | wire.NEED_REPLY)
        results = [each[3] for each in struct.iter_unpack("<IIIQ", answers)]
        assert results == [0, 0, 1]


async def test_there_is_no_configuration(tmp_path: Path) -> None:
    guest = Guest(protocol=wire.BACKEND_REQ | wire.CONFIG)
    async with (
        _served(tmp_path / "s"),
        open_front_end(tmp_path / "s", guest) as (side, nursery),
    ):
        await side.shake_hands(nursery)
        question = struct.pack("<III", 0, 4, 0) + bytes(4)
        assert await side.get(Request.GET_CONFIG, question) == b""
        await side.set(Request.SET_CONFIG, question)
        assert await side.get(Request.GET_QUEUE_NUM) == _U64.pack(2)


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("where", [0x7EFF_FFFF_FFF0, 0x7F00_000F_FFF0, 0, (1 << 64) - 16])
async def test_vrings_outside_of_memory(
    tmp_path: Path, part: int, where: int, caplog: pytest.LogCaptureFixture
) -> None:
    class Outside(FrontEndSide):
        def places(self, index: int) -> VringPlaces:
            inside = super().places(index)
            parts = [inside.descriptors, inside.available, inside.used]
            parts[part] = where
            return VringPlaces(*parts)

    async with _served(tmp_path / "s"):
        side = Outside(await connect(tmp_path / "s"), dataclasses.replace(UML, protocol=0x20))
        try:
            async with open_background() as nursery:
                await side.shake_hands(nursery)
                await side.set_rings(nursery)
                with contextlib.suppress(BrokenPipeError):
                    await side.enable()
                assert await side.read(1) == b""
        finally:
            side.device.close()
            side.close()
    assert "a vring that cannot be used" in caplog.text
    assert "are not in memory" in caplog.text


async def test_requests_that_do_not_fit_a_driver_that_is_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [
        (Request.SET_VRING_NUM, encode_state(0, 32)),
        (Request.SET_VRING_BASE, encode_state(0, 32)),
        (Request.SET_VRING_ADDR, encode_address(0, VringPlaces(0, 0, 0))),
        (Request.SET_FEATURES, _U64.pack(wire.PROTOCOL_FEATURES)),
        (Request.SET_PROTOCOL_FEATURES, _U64.pack(wire.BACKEND_REQ)),
    ]
    async with _served(tmp_path / "s"):
        for request, payload in requests:
            async with open_front_end(tmp_path / "s") as (side, nursery):
                await side.shake_hands(nursery)
                async with open_driver(side, nursery):
                    await trio.testing.wait_all_tasks_blocked()
                    await side.send(encode_request(request, payload))
                    assert await side.read(1) == b""
            assert f"{request.name} came while the driver was up" in caplog.text


async def test_what_a_driver_that_is_up_may_say_again(tmp_path: Path) -> None:
    async with (
        _served(tmp_path / "s"),
        open_front_end(tmp_path / "s") as (side, nursery),
    ):
        await side.shake_hands(nursery)
        async with open_driver(side, nursery) as bus:
            await side.set(Request.SET_FEATURES, _U64.pack(side.guest.features))
            await side.set(Request.SET_PROTOCOL_FEATURES, _U64.pack(side.guest.protocol))
            await side.set(Request.SET_VRING_ADDR, encode_address(1, side.places(1)))
            await side.set(Request.SET_VRING_ERR, _U64.pack(0), [side.kicks[0]])
            await side.set(Request.SET_VRING_ERR, _U64.pack(0x101))
            await side.set(Request.SET_VRING_KICK, _U64.pack(1), [side.kicks[1]])
            await _exchange(bus)


async def test_a_guest_that_breaks_a_ring_is_dropped_and_the_next_one_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with _served(tmp_path / "s") as ended:
        async with open_front_end(tmp_path / "s") as (side, nursery):
            await side.shake_hands(nursery)
            async with open_driver(side, nursery) as bus:
                await _exchange(bus)
                at = side.guest.parts[1][1]
                side.shared.region("guest", 0).view[at + 2 : at + 4] = b"\xff\x7f"
                side.kick(1)
                assert await side.read(1) == b""
        assert "was dropped: vdev0 vring 1 is broken" in caplog.text
        async with open_guest(tmp_path / "s") as bus:
            await _exchange(bus)
        assert not ended.is_set()


async def test_the_next_guest_does_not_pay_for_the_one_that_broke_a_ring(
    tmp_path: Path,
) -> None:
    """The application of the one before takes so long to end that the next one is there by then."""
    release = trio.Event()
    lives = []

    async def application(bus: Bus) -> None:
        lives.append(bus)
        if len(lives) > 1:
            await _echo(bus)
        with trio.CancelScope(shield=True):
            await release.wait()

    async with _served(tmp_path / "s", application):
        async with open_front_end(tmp_path / "s") as (side, nursery):
            await side.shake_hands(nursery)
            async with open_driver(side, nursery):
                await trio.testing.wait_all_tasks_blocked(0.01)
                at = side.guest.parts[1][1]
                side.shared.region("guest", 0).view[at + 2 : at + 4] = b"\xff\x7f"
                side.kick(1)
                await trio.testing.wait_all_tasks_blocked(0.01)
        async with open_guest(tmp_path / "s") as bus:
            await trio.testing.wait_all_tasks_blocked(0.01)
            release.set()
            await _exchange(bus)
    assert len(lives) == 2


async def test_in_band_without_its_channel(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Silent(FrontEndSide):
        async def set(self, request: int, payload: bytes = b"", fds: object = ()) -> None:
            if request != Request.SET_BACKEND_REQ_FD:
                await super().set(request, payload, fds)  # type: ignore[arg-type]

    guest = Guest(protocol=wire.BACKEND_REQ | wire.INBAND)
    async with _served(tmp_path / "s", inband=True):
        side = Silent(await connect(tmp_path / "s"), guest)
        try:
            async with open_background() as nursery:
                await side.shake_hands(nursery)
                await side.set_rings(nursery)
                with contextlib.suppress(BrokenPipeError):
                    await side.enable()
                assert await side.read(1) == b""
        finally:
            side.device.close()
            side.close()
    assert "SET_BACKEND_REQ_FD never came" in caplog.text


async def test_calls_that_are_never_heard_do_not_stop_it(tmp_path: Path) -> None:
    """A call descriptor that is full, or whose other end is closed, or that would block."""
    async with (
        _served(tmp_path / "s"),
        open_front_end(tmp_path / "s", Guest(socket_calls=True)) as (side, nursery),
    ):
        await side.shake_hands(nursery)
        async with open_driver(side, nursery) as bus:
            full = os.eventfd(0)
            os.eventfd_write(full, (1 << 64) - 2)
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while theirs.send(bytes(4096)):
                    pass
            for fd in (full, theirs.fileno()):
                await side.set(Request.SET_VRING_CALL, _U64.pack(0), [fd])
            ours.close()
            theirs.close()
            await side.set(Request.SET_VRING_CALL, _U64.pack(0), [full])
            os.set_blocking(full, True)
            os.eventfd_read(full)
            os.eventfd_write(full, (1 << 64) - 2)
            async with bus.open_endpoint(NAME, announce=False) as endpoint:
                await endpoint.send_to(b"x", 1024)
                await trio.testing.wait_all_tasks_blocked(0.01)
            await side.set(Request.SET_VRING_CALL, _U64.pack(0x100))
            os.close(full)
            await side.set_call(nursery, 0)
            await _exchange(bus)


async def test_a_kick_that_somebody_else_takes_is_waited_for_on() -> None:
    """The front end has the eventfd too, and says whether reading it waits."""
    fd = os.eventfd(0)
    kicks = [Kick(os.dup(fd), 0) for _ in range(2)]
    heard = []

    async def hear(kick: Kick) -> None:
        with contextlib.suppress(trio.ClosedResourceError):
            while True:
                await kick.wait()
                heard.append(kick)

    try:
        async with trio.open_nursery() as nursery:
            for kick in kicks:
                nursery.start_soon(hear, kick)
            for count in range(1, 4):
                await trio.testing.wait_all_tasks_blocked()
                os.eventfd_write(fd, 1)
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert len(heard) == count
            for kick in kicks:
                kick.close()
                kick.close()
    finally:
        os.close(fd)


async def test_a_kick_that_one_write_keeps_readable_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fd = os.eventfd(0, os.EFD_SEMAPHORE)
    try:
        if "semaphore" not in Path(f"/proc/self/fdinfo/{fd}").read_text():
            pytest.skip("this kernel does not tell which eventfd is a semaphore (Linux 6.5 does)")
        async with _served(tmp_path / "s"), open_front_end(tmp_path / "s") as (side, _):
            await side.send(encode_request(Request.SET_OWNER))
            await side.send(encode_request(Request.SET_VRING_KICK, _U64.pack(0)), [fd])
            assert await side.read(1) == b""
        assert "vring 0 is an eventfd that is a semaphore" in caplog.text
    finally:
        os.close(fd)


def test_a_channel_that_python_knows_no_socket_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of the kernel's cryptography, which have no name."""

    def refuse(*, fileno: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = os.dup(theirs.fileno())
        monkeypatch.setattr(socket, "socket", refuse)
        with pytest.raises(VhostUserError, match=r"SET_BACKEND_REQ_FD: .* not supported"):
            BackChannel(fd)
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


async def test_a_refusal_that_nobody_hears_kills_nobody(tmp_path: Path) -> None:
    """Programs that write to pipes end by SIGPIPE."""
    signals = []
    before = signal.signal(signal.SIGPIPE, lambda number, _: signals.append(number))
    try:
        async with _served(tmp_path / "s"):
            async with open_front_end(tmp_path / "s") as (side, _):
                await side.set(Request.SET_PROTOCOL_FEATURES, _U64.pack(wire.REPLY_ACK))
                flags = wire.VERSION | wire.NEED_REPLY
                await side.send(encode_request(Request.SET_VRING_NUM, encode_state(0, 4), flags))
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert not signals
    finally:
        signal.signal(signal.SIGPIPE, before)


# Memory that is cut off


@pytest.mark.parametrize("asked", [False, True])
async def test_memory_that_takes_a_seal_is_sealed(tmp_path: Path, asked: bool) -> None:
    fd = os.memfd_create("openamp-guest", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 0x100000)
        async with (
            _served(tmp_path / "s", sealed=asked),
            open_front_end(tmp_path / "s") as (side, nursery),
        ):
            await side.shake_hands(nursery)
            await side.set(Request.SET_MEM_TABLE, encode_table(UML.places), [fd])
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 4096)
    finally:
        os.close(fd)


@pytest.mark.parametrize("sealed", [False, True])
async def test_memory_that_takes_no_seal(
    tmp_path: Path, sealed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "memory"
    file.write_bytes(bytes(0x100000))
    fd = os.open(file, os.O_RDWR)
    try:
        async with (
            _served(tmp_path / "s", sealed=sealed),
            open_front_end(tmp_path / "s", Guest(protocol=0x20)) as (side, nursery),
        ):
            await side.shake_hands(nursery)
            await side.send(encode_request(Request.SET_MEM_TABLE, encode_table(UML.places)), [fd])
            if sealed:
                assert await side.read(1) == b""
                assert "only sealed memory is wanted" in caplog.text
            else:
                assert await side.get(Request.GET_QUEUE_NUM) == _U64.pack(2)
    finally:
        os.close(fd)


# Anything at all


_DISORDER = settings(
    derandomize=True,
    deadline=None,
    max_examples=80,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

_places = st.builds(
    MemoryPlace,
    st.sampled_from([0, 0x4000_0000, 0x4008_0000, (1 << 64) - 0x8000]),
    st.sampled_from([0, 0x1000, 0x8000, 0x10000, 1 << 40]),
    st.sampled_from([0, 0x7000_0000, 0x7000_8000]),
    st.sampled_from([0, 1, 0x1000, 0x8000]),
)
_addresses = st.integers(0, 0x11).map(lambda n: 0x7000_0000 + 0x1000 * n)
_payloads = st.one_of(
    st.just(b""),
    st.binary(max_size=48),
    st.builds(encode_state, st.integers(0, 2), st.sampled_from([0, 1, 4, 256, 0x100, 1 << 31])),
    st.sampled_from([0, 1, 0x100, wire.PROTOCOL_FEATURES, 0x4028, 0x28, 0x1_7000_0001]).map(
        _U64.pack
    ),
    st.lists(_places, max_size=3).map(encode_table),
    st.builds(
        encode_address,
        st.integers(0, 1),
        st.builds(VringPlaces, _addresses, _addresses, _addresses),
    ),
)
_steps = st.tuples(
    st.one_of(st.sampled_from(Request), st.integers(0, 45)),
    _payloads,
    st.sampled_from([wire.VERSION, wire.VERSION | wire.NEED_REPLY]),
    st.lists(
        st.sampled_from(
            ["eventfd", "memory", "pipe", "zero", "directory", "terminal", "epoll", "socket"]
        ),
        max_size=2,
    ),
)


async def _behave_at_random(
    path: Path, steps: list[tuple[int, bytes, int, list[str]]], prepared: bool
) -> None:
    with contextlib.closing(_Descriptors(path.parent)) as descriptors:
        side = FrontEndSide(await connect(path), UML)
        try:
            async with open_background() as nursery:
                if prepared:
                    await side.shake_hands(nursery)
                    await side.set_rings(nursery)
                    await side.enable()
                for request, payload, flags, kinds in steps:
                    fds = [descriptors.create(kind) for kind in kinds]
                    await side.send(encode_request(request, payload, flags), fds)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            side.device.close()
            side.close()


@given(st.lists(_steps, max_size=30), st.booleans())
@_DISORDER
def test_requests_in_any_order(
    tmp_path: Path, steps: list[tuple[int, bytes, int, list[str]]], prepared: bool
) -> None:
    """Handshakes that make no sense end a connection at worst, and nothing is left behind."""

    async def main() -> None:
        async with _served(tmp_path / "s", inband=True):
            await trio.testing.wait_all_tasks_blocked()
            gc.collect()
            before = _open_files()
            await _behave_at_random(tmp_path / "s", steps, prepared)
            await trio.testing.wait_all_tasks_blocked(0.002)
            gc.collect()
            assert _open_files() == before
            async with open_guest(tmp_path / "s") as bus, bus.open_endpoint(NAME) as endpoint:
                await endpoint.wait_bound()

    trio.run(main)


@given(st.binary(max_size=400), st.integers(0, 11))
@_DISORDER
def test_bytes_in_any_order(tmp_path: Path, data: bytes, cut: int) -> None:
    async def main() -> None:
        async with _served(tmp_path / "s"):
            with await connect(tmp_path / "s") as sock, contextlib.suppress(BrokenPipeError):
                sock.send(encode_request(Request.SET_OWNER)[:cut] + data)
            await trio.testing.wait_all_tasks_blocked()

    trio.run(main)
