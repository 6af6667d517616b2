"""The virtio device: both handshakes step by step, the reset, and refused calls."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from collections.abc import Callable, Iterator

import pytest

from openamp_py.constants import (
    RPMSG_F_NS,
    VIRTIO_ID_RPMSG,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
)
from openamp_py.errors import (
    DetachedError,
    OpenAMPError,
    PeerGoneError,
    ResourceTableError,
    StateError,
)
from openamp_py.memory import MemoryMap, Region, SharedMemory
from openamp_py.virtio import Handshake, Role, SharedU8, SharedU32, VirtioDevice, Vring
from openamp_py.virtio.device import TRANSPORT_FEATURES
from openamp_py.vring import VringLayout, VringPlaces

DA, PA, SIZE = 0x1000_0000, 0x9000_0000, 0x4000
STATUS_AT, ACCEPTED_AT, RING_AT = 0, 4, 0x1000
LAYOUT = VringLayout(16, 4096)
VRINGS = (Vring(DA + RING_AT, LAYOUT, 7), Vring(DA + RING_AT + 0x2000, VringLayout(4, 16), 9))
DEVICE_NOTIFY = 3
UNKNOWN_FEATURE = 1 << 5

FULL_WALK = [0, 1, 3, 0xB]
DRIVER_OK, NEEDS_RESET, FAILED = 4, 0x40, 0x80

BOTH_HANDSHAKES = pytest.mark.parametrize("handshake", Handshake, ids=lambda h: h.value)
BOTH_ROLES = pytest.mark.parametrize("role", Role, ids=lambda role: role.value)


class Recorded(SharedU8):
    """The status byte, with every value that was written to it."""

    def __init__(self, view: memoryview, offset: int, log: list[tuple[str, int]]) -> None:
        super().__init__(view, offset)
        self.log = log

    def store(self, value: int) -> None:
        self.log.append(("status", value))
        super().store(value)


class RecordedFeatures(SharedU32):
    """The accepted features, likewise."""

    def __init__(self, view: memoryview, offset: int, log: list[tuple[str, int]]) -> None:
        super().__init__(view, offset)
        self.log = log

    def store(self, value: int) -> None:
        self.log.append(("features", value))
        super().store(value)


class Bench:
    """Both sides' view of one device, and what each wrote and kicked, in order."""

    def __init__(self, offered: int, handshake: Handshake, vrings: tuple[Vring, ...]) -> None:
        self.shared = SharedMemory.create("openamp-test", SIZE)
        self.view = self.shared.region("all", 0).view
        memory = MemoryMap([Region("ram", DA, PA, self.view)])
        self.log: list[tuple[str, int]] = []
        self.sides = {
            role: VirtioDevice(
                role=role,
                device_id=VIRTIO_ID_RPMSG,
                index=2,
                offered=offered,
                status=Recorded(self.view, STATUS_AT, self.log),
                accepted=RecordedFeatures(self.view, ACCEPTED_AT, self.log),
                vrings=vrings,
                notify_id=DEVICE_NOTIFY,
                config=self.view[:0],
                memory=memory,
                kick=lambda notify_id: self.log.append(("kick", notify_id)),
                buffers=lambda size: (PA, self.view[:size]),
                handshake=handshake,
            )
            for role in Role
        }
        self.driver, self.device = self.sides[Role.DRIVER], self.sides[Role.DEVICE]

    def close(self) -> None:
        for side in self.sides.values():
            side.close()
        self.shared.close()


@contextlib.contextmanager
def bench(
    offered: int = RPMSG_F_NS,
    handshake: Handshake = Handshake.FULL,
    vrings: tuple[Vring, ...] = VRINGS,
) -> Iterator[Bench]:
    made = Bench(offered, handshake, vrings)
    try:
        yield made
    finally:
        made.close()


# The handshake.


def test_the_full_walk() -> None:
    with bench() as b:
        assert not b.device.poll_driver()
        assert b.driver.begin(RPMSG_F_NS) == RPMSG_F_NS
        assert b.log == [
            ("status", 0),
            ("status", 1),
            ("status", 3),
            ("features", RPMSG_F_NS),
            ("status", 0xB),
            ("kick", DEVICE_NOTIFY),
        ]
        assert not b.device.poll_driver() and not b.device.is_up
        b.log.clear()
        b.driver.set_driver_ok()
        assert b.log == [("status", 0xF), ("kick", DEVICE_NOTIFY)]
        assert b.device.poll_driver() and b.device.is_up and b.driver.is_up
        b.log.clear()
        b.driver.end()
        assert b.log == [("status", 0), ("kick", DEVICE_NOTIFY)]
        assert not b.device.is_up and not b.device.poll_driver()


def test_the_openamp_walk() -> None:
    with bench(handshake=Handshake.OPENAMP) as b:
        b.driver.begin(RPMSG_F_NS)
        assert b.log == [("status", 0), ("features", RPMSG_F_NS), ("kick", DEVICE_NOTIFY)]
        b.log.clear()
        b.driver.set_driver_ok()
        assert b.log == [("status", 4), ("kick", DEVICE_NOTIFY)]
        assert b.device.poll_driver()
        b.log.clear()
        b.driver.end()
        assert b.log == [], "an OpenAMP program leaves the status as it is"
        assert b.device.is_up


@BOTH_HANDSHAKES
def test_a_stale_status_is_begun_from_zero(handshake: Handshake) -> None:
    with bench(handshake=handshake) as b:
        b.view[STATUS_AT] = 4
        b.driver.begin(RPMSG_F_NS)
        assert not b.device.poll_driver(), "not up before the queues are ready"
        b.driver.set_driver_ok()
        assert b.device.poll_driver()


def test_a_device_is_begun_once() -> None:
    """The other side may still work the rings of the first time."""
    with bench() as b:
        b.driver.begin(RPMSG_F_NS)
        status = b.driver.status
        with pytest.raises(StateError, match="driven before; start its processor anew"):
            b.driver.begin(RPMSG_F_NS)
        assert b.driver.status == status


@pytest.mark.parametrize("status", [4, 7, 0xF])
def test_every_drivers_driver_ok(status: int) -> None:
    """OpenAMP writes 4, Linux 7 (legacy) or 0xF."""
    with bench() as b:
        b.view[STATUS_AT] = status
        assert b.device.poll_driver() and b.log == []


@pytest.mark.parametrize("status", [0, 1, 3, 0xB, 0x80, 0x84, 0x8F])
def test_not_up(status: int) -> None:
    with bench() as b:
        b.view[STATUS_AT] = status
        assert not b.device.poll_driver() and not b.driver.is_up and b.log == []


@pytest.mark.parametrize("status", [NEEDS_RESET, NEEDS_RESET | 0xF, NEEDS_RESET | FAILED])
def test_a_reset_is_granted(status: int) -> None:
    with bench() as b:
        b.view[STATUS_AT] = status
        assert not b.device.is_up
        assert not b.device.poll_driver()
        assert b.log == [("status", 0)] and b.driver.status == 0
        b.driver.begin(RPMSG_F_NS)
        b.driver.set_driver_ok()
        assert b.device.poll_driver()


def test_a_reset_is_seen() -> None:
    with bench() as b:
        b.driver.begin(RPMSG_F_NS)
        b.driver.set_driver_ok()
        assert b.device.is_up
        b.view[STATUS_AT] = 0
        assert not b.device.is_up and not b.driver.is_up and b.device.status == 0


# Features.


@pytest.mark.parametrize(
    ("offered", "supported", "used"),
    [
        (0, RPMSG_F_NS, 0),
        (RPMSG_F_NS, 0, 0),
        (RPMSG_F_NS, RPMSG_F_NS, RPMSG_F_NS),
        (UNKNOWN_FEATURE | RPMSG_F_NS, RPMSG_F_NS, RPMSG_F_NS),
        (0xFFFF_FFFF, RPMSG_F_NS, RPMSG_F_NS | TRANSPORT_FEATURES),
        (VIRTIO_RING_F_EVENT_IDX, RPMSG_F_NS, VIRTIO_RING_F_EVENT_IDX),
    ],
)
def test_features_are_what_both_do(offered: int, supported: int, used: int) -> None:
    with bench(offered) as b:
        assert b.driver.begin(supported) == used
        assert struct.unpack_from("<I", b.view, ACCEPTED_AT) == (used,)
        b.driver.set_driver_ok()
        assert b.device.poll_driver()
        assert b.driver.features == b.device.features == used
        struct.pack_into("<I", b.view, ACCEPTED_AT, 0xFFFF_FFFF)
        assert b.driver.features == b.device.features == used, "fixed once they are chosen"


def test_a_driver_that_accepts_what_was_not_offered() -> None:
    with bench(RPMSG_F_NS) as b:
        struct.pack_into("<I", b.view, ACCEPTED_AT, 0xFFFF_FFFF)
        b.driver.set_driver_ok()
        assert b.device.poll_driver()
        assert b.device.features == RPMSG_F_NS


@pytest.mark.parametrize("feature", [0, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC])
def test_queues_do_what_was_negotiated(feature: int) -> None:
    with bench(feature) as b:
        b.driver.begin(0)
        b.driver.set_driver_ok()
        assert b.device.poll_driver()
        with contextlib.closing(b.device.open_queue(0)) as queue:
            assert queue.handle.event_idx == bool(feature & VIRTIO_RING_F_EVENT_IDX)
            assert queue.handle.indirect == bool(feature & VIRTIO_RING_F_INDIRECT_DESC)


def test_a_device_that_saw_its_driver_come_up_knows_that_nothing_was_put_back() -> None:
    with bench() as b:
        assert not b.device.is_fresh
        assert not b.device.poll_driver()
        b.driver.begin(0)
        b.driver.set_driver_ok()
        assert b.device.poll_driver() and b.device.is_fresh
        assert b.device.poll_driver() and not b.device.is_fresh


def test_a_device_knows_it_also_where_the_driver_was_quick() -> None:
    with bench() as b:
        b.driver.begin(0)
        b.driver.set_driver_ok()
        assert b.device.poll_driver() and b.device.is_fresh


# Queues and kicks.


def test_queues_of_both_sides_meet() -> None:
    with bench() as b:
        b.driver.begin(RPMSG_F_NS)
        for index, vring in enumerate(VRINGS):
            with (
                contextlib.closing(b.driver.open_queue(index)) as driver,
                contextlib.closing(b.device.open_queue(index)) as device,
            ):
                assert driver.role is Role.DRIVER and device.role is Role.DEVICE
                assert driver.layout == device.layout == vring.layout
                driver.start()
                device.attach()
                head = driver.add([(PA, 4)])
                driver.publish()
                chain = device.get_available()
                assert chain is not None and chain.head == head


@pytest.mark.parametrize("index", [-1, 2])
def test_no_such_vring(index: int) -> None:
    with bench() as b, pytest.raises(ValueError, match=f"vdev2 has 2 vrings, no vring {index}"):
        b.driver.open_queue(index)


@pytest.mark.parametrize(
    ("da", "match"),
    [
        (0xFFFF_FFFF, "4230 bytes at 0xffffffff are not in memory: ram 0x10000000..0x10004000"),
        (DA - 4096, "not in memory"),
        (DA + 0x3000, "not in memory"),
        (DA + 0x1004, "not aligned to 4096"),
    ],
)
@BOTH_ROLES
def test_a_vring_that_memory_does_not_hold(role: Role, da: int, match: str) -> None:
    with bench(vrings=(Vring(da, LAYOUT, 0),)) as b, pytest.raises(ValueError, match=match):
        b.sides[role].open_queue(0)


@pytest.mark.parametrize(
    ("part", "match"),
    [
        ("descriptors", "vdev2 vring 0, descriptors: 128 bytes at 0x10004000"),
        ("available", "vdev2 vring 0, available ring: 22 bytes"),
        ("used", "vdev2 vring 0, used ring: 70 bytes"),
    ],
)
def test_parts_of_a_vring_that_memory_does_not_hold(part: str, match: str) -> None:
    inside = VringPlaces(DA + 0x1000, DA + 0x2000, DA + 0x3000)
    places = dataclasses.replace(inside, **{part: DA + 0x4000})
    vring = Vring(inside.descriptors, VringLayout(8, 4), 0, places)
    with bench(vrings=(vring,)) as b, pytest.raises(ResourceTableError, match=match):
        b.device.open_queue(0)


def test_a_vring_in_parts_begins_where_it_is_told() -> None:
    places = VringPlaces(DA + 0x3000, DA + 0x2000, DA + 0x1000)
    vring = Vring(places.descriptors, VringLayout(8, 4), 0, places, start=2)
    with bench(vrings=(vring,)) as b, contextlib.closing(b.driver.open_queue(0)) as driver:
        driver.start()
        heads = [driver.add([(PA, 4)]) for _ in range(4)]
        driver.publish()
        with contextlib.closing(b.device.open_queue(0)) as device:
            device.attach()
            assert [chain.head for chain in iter(device.get_available, None)] == heads[2:]


def test_kicks_carry_the_notify_id() -> None:
    with bench() as b:
        b.driver.kick(0)
        b.device.kick(1)
        assert b.log == [("kick", 7), ("kick", 9)]


def test_notifications_and_failure_reach_who_drives_it() -> None:
    with bench() as b:
        b.device.notified()
        seen: list[object] = []
        b.device.on_notify = lambda: seen.append("notified")
        b.device.on_failure = seen.append
        b.device.notified()
        first = PeerGoneError("gone")
        b.device.fail(first)
        b.device.fail(PeerGoneError("again"))
        assert seen == ["notified", first] and b.device.failure is first


# Refusals and closing.


@pytest.mark.parametrize(
    ("role", "call"),
    [
        (Role.DRIVER, lambda side: side.begin(0)),
        (Role.DRIVER, lambda side: side.set_driver_ok()),
        (Role.DRIVER, lambda side: side.end()),
        (Role.DEVICE, lambda side: side.poll_driver()),
    ],
    ids=["begin", "set_driver_ok", "end", "poll_driver"],
)
def test_only_the_right_side(role: Role, call: Callable[[VirtioDevice], object]) -> None:
    with bench() as b:
        wrong = b.device if role is Role.DRIVER else b.driver
        with pytest.raises(ValueError, match=f"vdev2: only the {role.value} does this"):
            call(wrong)
        assert b.log == []
        call(b.sides[role])


@BOTH_ROLES
def test_closed_touches_no_memory(role: Role) -> None:
    with bench() as b:
        b.driver.begin(RPMSG_F_NS)
        b.driver.set_driver_ok()
        b.log.clear()
        side = b.sides[role]
        seen: list[object] = []
        side.on_notify = lambda: seen.append("notified")
        side.on_failure = seen.append
        side.close()
        side.close()
        assert (side.status, side.is_up) == (0, False)
        side.kick(0)
        side.notified()
        side.fail(PeerGoneError("gone"))
        if role is Role.DRIVER:
            side.end()
        else:
            assert not side.poll_driver()
        assert (b.log, seen, side.failure) == ([], [], None)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_a_shared_u32_is_aligned(offset: int) -> None:
    with bench() as b, pytest.raises(ValueError, match=f"offset {offset:#x} is not at a multiple"):
        SharedU32(b.view, offset)


def test_shared_words() -> None:
    with bench() as b:
        byte, word = SharedU8(b.view, 9), SharedU32(b.view, 12)
        byte.store(0xAB)
        word.store(0x0102_0304)
        assert bytes(b.view[8:16]) == b"\0\xab\0\0\x04\x03\x02\x01"
        assert (byte.load(), word.load()) == (0xAB, 0x0102_0304)
        for shared in (byte, word):
            shared.close()
            shared.close()
            with pytest.raises(TypeError):
                shared.load()
            with pytest.raises(TypeError):
                shared.store(1)


# Taking over and leaving


def test_a_device_that_is_up_is_taken_over_as_it_is() -> None:
    with bench(offered=RPMSG_F_NS | VIRTIO_RING_F_EVENT_IDX) as b:
        b.view[STATUS_AT] = 0xF
        struct.pack_into("<I", b.view, ACCEPTED_AT, RPMSG_F_NS)
        b.driver.adopt = True
        assert b.driver.begin(RPMSG_F_NS) == b.driver.features == RPMSG_F_NS
        assert b.driver.is_adopted and b.log == []
        b.driver.set_driver_ok()
        assert b.log == [("kick", 7), ("kick", 9), ("kick", DEVICE_NOTIFY)]
        with pytest.raises(StateError):
            b.driver.begin(RPMSG_F_NS)


@pytest.mark.parametrize("status", [0, 0xB, 0xF | NEEDS_RESET, 0xF | FAILED])
def test_one_that_is_not_up_is_begun(status: int) -> None:
    with bench() as b:
        b.view[STATUS_AT] = status
        b.driver.adopt = True
        b.driver.begin(RPMSG_F_NS)
        b.driver.set_driver_ok()
        assert not b.driver.is_adopted and b.driver.status == 0xF


@pytest.mark.parametrize("accepted", [RPMSG_F_NS | UNKNOWN_FEATURE, VIRTIO_RING_F_EVENT_IDX])
def test_features_that_cannot_have_been_accepted(accepted: int) -> None:
    with bench(offered=RPMSG_F_NS | UNKNOWN_FEATURE) as b:
        b.view[STATUS_AT] = 0xF
        struct.pack_into("<I", b.view, ACCEPTED_AT, accepted)
        b.driver.adopt = True
        with pytest.raises(ResourceTableError, match="vdev2 cannot be taken over: the features"):
            b.driver.begin(RPMSG_F_NS)
        assert b.log == [] and b.view[STATUS_AT] == 0xF


def test_a_device_that_is_left_stays_up() -> None:
    with bench() as b:
        b.driver.begin(RPMSG_F_NS)
        b.driver.set_driver_ok()
        causes: list[OpenAMPError] = []

        def left(cause: OpenAMPError) -> int:
            causes.append(cause)
            return 3

        b.driver.on_detach = left
        assert [b.driver.detach(), b.driver.detach()] == [3, 0]
        assert b.driver.failure is causes[0] and isinstance(causes[0], DetachedError)
        assert b.driver.status == 0xF and len(causes) == 1
        with pytest.raises(ValueError, match="only the driver"):
            b.device.detach()


def test_one_that_failed_or_is_closed_cannot_be_left() -> None:
    for end in (VirtioDevice.close, lambda device: device.fail(PeerGoneError("gone"))):
        with bench() as b:
            end(b.driver)
            b.driver.on_detach = lambda _: pytest.fail("called")
            assert b.driver.detach() == 0
