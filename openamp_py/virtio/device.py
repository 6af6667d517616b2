"""A virtio device as one side sees it: status, features, vrings, and who to notify."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from openamp_py.constants import VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC
from openamp_py.errors import (
    DetachedError,
    OpenAMPError,
    ResourceTableError,
    StateError,
)
from openamp_py.memory import MemoryMap
from openamp_py.virtio.shared import Word
from openamp_py.virtio.virtqueue import RingParts, Role, Virtqueue
from openamp_py.vring import VringLayout, VringPlaces

ACKNOWLEDGE = 1
DRIVER = 2
DRIVER_OK = 4
FEATURES_OK = 8
NEEDS_RESET = 0x40
FAILED = 0x80
"""Bits of the device status (virtio 1.2, section 2.1)."""

TRANSPORT_FEATURES = VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX
"""What the virtqueues here can do; a device adds the features of its own kind."""


class Handshake(enum.Enum):
    """How a driver walks the status word up to DRIVER_OK."""

    FULL = "full"
    """ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK: each bit added in turn."""
    OPENAMP = "openamp"
    """DRIVER_OK alone, as the OpenAMP C library writes it."""


@dataclass(frozen=True, slots=True)
class Vring:
    """One vring of a device: its device address, its shape and the id it is kicked by.

    Args:
        da: where it begins, or where its descriptors are.
        places: where all its parts are, where they are not at their offsets from `da`.
        start: device: the entry of the available ring to begin at, where the transport says so.
    """

    da: int
    layout: VringLayout
    notify_id: int
    places: VringPlaces | None = None
    start: int | None = None


class BufferMemory(Protocol):
    """Gives a driver memory for its buffers."""

    def __call__(self, size: int) -> tuple[int, memoryview]:
        """Physical address and bytes of `size` bytes, the same at each call.

        Raises:
            ResourceTableError: there is no room for so much.
        """
        ...


class VirtioDevice:
    """One side's view of a virtio device whose status and features are words that both sides see.

    Made and closed by the remoteproc layer, one life long: a new start makes a new
    object. Whoever drives it (the RPMsg bus) sets `on_notify`, `on_failure` and `on_detach`. One
    task at a time.

    Args:
        role: this side's end.
        device_id: what kind of device it is (7: RPMsg).
        index: its position among the devices of its processor.
        offered: the features the device side offers.
        status: the status byte.
        accepted: the word that holds the features the driver accepted.
        vrings: its vrings.
        notify_id: what a change of status or features is kicked by.
        config: its configuration space.
        memory: where its vrings and buffers lie.
        kick: called with a notify id to wake the other side; never blocks.
        buffers: a driver's source of buffer memory.
        handshake: how a driver here walks the status word.
        find_vrings: device only: where its vrings are by the time its driver has come up; without
            it they stay where they were.
        adopt: driver only: where another driver has the device up, it is taken over as it is.

    Attributes:
        is_adopted: driver: it was taken over.
        is_fresh: device: its driver came up before the latest `poll_driver`, and was not up at the
            one before, so nothing of its rings was worked yet.
    """

    def __init__(
        self,
        *,
        role: Role,
        device_id: int,
        index: int,
        offered: int,
        status: Word,
        accepted: Word,
        vrings: Sequence[Vring],
        notify_id: int,
        config: memoryview,
        memory: MemoryMap,
        kick: Callable[[int], None],
        buffers: BufferMemory,
        handshake: Handshake = Handshake.FULL,
        find_vrings: Callable[[], Sequence[Vring]] | None = None,
        adopt: bool = False,
    ) -> None:
        self.role = role
        self.device_id = device_id
        self.index = index
        self.offered = offered
        self.vrings = tuple(vrings)
        self.notify_id = notify_id
        self.config = config
        self.memory = memory
        self.buffers = buffers
        self.handshake = handshake
        self.adopt = adopt
        self.is_adopted = False
        self.on_notify: Callable[[], None] | None = None
        self.on_failure: Callable[[OpenAMPError], None] | None = None
        self.on_detach: Callable[[OpenAMPError], int] | None = None
        self.failure: OpenAMPError | None = None
        self._status = status
        self._accepted = accepted
        self._kick = kick
        self._find_vrings = find_vrings
        self._features = 0
        self._begun = False
        self._closed = False
        self._was_down = not self.is_up
        self.is_fresh = False

    @property
    def name(self) -> str:
        """Name of the device in messages, as Linux numbers them."""
        return f"vdev{self.index}"

    @property
    def closed(self) -> bool:
        """Whether it has let go of the shared memory."""
        return self._closed

    @property
    def status(self) -> int:
        """The status byte as it stands in memory."""
        return 0 if self._closed else self._status.load()

    @property
    def features(self) -> int:
        """The features in use: offered by the device and accepted by the driver.

        Fixed once the driver has chosen, whatever is written into the shared word later.
        """
        return self._features

    @property
    def is_up(self) -> bool:
        """Whether the driver has said DRIVER_OK and nobody wants a reset."""
        return self.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK

    def begin(self, supported: int) -> int:
        """Driver: resets the device and accepts what both sides can do.

        One that is to be adopted and is up is not reset, and goes on with the features that were
        accepted before; then `is_adopted` is true, and nothing is written.

        Args:
            supported: features of this kind of device that the caller implements.

        Returns:
            The features in use.

        Raises:
            StateError: it was begun before.
            ResourceTableError: the features accepted before are not offered, or not known here.
        """
        self._check_role(Role.DRIVER)
        if self._begun:
            # The other side may not have seen the reset, and works the old rings still.
            raise StateError(f"{self.name} was driven before; start its processor anew")
        possible = self.offered & (supported | TRANSPORT_FEATURES)
        if self.adopt and self.is_up:
            accepted = self._accepted.load()
            if accepted & ~possible:
                raise ResourceTableError(
                    f"{self.name} cannot be taken over: the features {accepted:#x} were accepted, "
                    f"of which {accepted & ~possible:#x} are not offered or not known here"
                )
            self._begun = self.is_adopted = True
            self._features = accepted
            return accepted
        self._begun = True
        self._features = features = possible
        self._status.store(0)
        if self.handshake is Handshake.FULL:
            self._status.store(ACKNOWLEDGE)
            self._status.store(ACKNOWLEDGE | DRIVER)
        self._accepted.store(features)
        if self.handshake is Handshake.FULL:
            self._status.store(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        self._kick(self.notify_id)
        return features

    def set_driver_ok(self) -> None:
        """Driver: the queues are ready, the device may begin.

        One that was adopted is only kicked, for every vring too: a kick for the driver before may
        have been lost.
        """
        self._check_role(Role.DRIVER)
        if self.is_adopted:
            for index in range(len(self.vrings)):
                self.kick(index)
        else:
            self._status.store(self._status.load() | DRIVER_OK)
        self._kick(self.notify_id)

    def poll_driver(self) -> bool:
        """Device: whether the driver has come up. Grants a reset where one is asked for.

        Raises:
            ResourceTableError: the vrings of a driver that is up cannot be found.
        """
        self._check_role(Role.DEVICE)
        if self.status & NEEDS_RESET:
            self._status.store(0)
        up = self.is_up
        self.is_fresh = up and self._was_down
        self._was_down = not up
        if up:
            self._features = self.offered & self._accepted.load()
            if self._find_vrings is not None:
                self.vrings = tuple(self._find_vrings())
        return up

    def succeed(self, old: VirtioDevice) -> None:
        """Device: takes the place of another object, in the same life of the driver."""
        self._was_down = old.is_fresh

    def give_up(self) -> None:
        """Driver: the device cannot be used; its side is told so."""
        self._check_role(Role.DRIVER)
        if not self._closed:
            self._status.store(self._status.load() | FAILED)
            self._kick(self.notify_id)

    def end(self) -> None:
        """Driver: leaves the device, so that the other side stops using the queues.

        With the OpenAMP handshake nothing is written: its library leaves the status as it is,
        and its programs take a status of 0 for "no buffer" and wait for one.
        """
        self._check_role(Role.DRIVER)
        if not self._closed and self.handshake is Handshake.FULL:
            self._status.store(0)
            self._kick(self.notify_id)

    def open_queue(self, index: int) -> Virtqueue:
        """The virtqueue of one vring, not started; closed by the caller.

        Raises:
            ValueError: there is no such vring.
            ResourceTableError: it lies outside the memory.
        """
        if not 0 <= index < len(self.vrings):
            raise ValueError(f"{self.name} has {len(self.vrings)} vrings, no vring {index}")
        vring = self.vrings[index]
        name = f"{self.name} vring {index}"
        features = self.features
        return Virtqueue(
            vring.layout,
            self._find_ring(name, vring),
            self.memory,
            self.role,
            event_idx=bool(features & VIRTIO_RING_F_EVENT_IDX),
            fresh=self.is_fresh,
            start=vring.start,
            indirect=bool(features & VIRTIO_RING_F_INDIRECT_DESC),
            name=name,
        )

    def _find_ring(self, name: str, vring: Vring) -> memoryview | RingParts:
        layout, places = vring.layout, vring.places
        if places is None:
            return self._find(name, vring.da, layout.size)
        return RingParts(
            self._find(f"{name}, descriptors", places.descriptors, layout.available_offset),
            self._find(f"{name}, available ring", places.available, layout.available_size),
            self._find(f"{name}, used ring", places.used, layout.used_size),
        )

    def _find(self, name: str, da: int, size: int) -> memoryview:
        view = self.memory.find_da(da, size)
        if view is None:
            raise ResourceTableError(
                f"{name}: {size} bytes at {da:#x} are not in memory: {self.memory}"
            )
        return view

    def kick(self, index: int) -> None:
        """Wakes the other side for a vring."""
        if not self._closed:
            self._kick(self.vrings[index].notify_id)

    def notified(self) -> None:
        """A notification came in that may be for this device."""
        if self.on_notify is not None and not self._closed:
            self.on_notify()

    def fail(self, cause: OpenAMPError) -> None:
        """The other side is gone: whoever drives the device is told, once."""
        if self.failure is None and not self._closed:
            self.failure = cause
            if self.on_failure is not None:
                self.on_failure(cause)

    def detach(self) -> int:
        """Driver: leaves the device up, for another driver to take over. Idempotent.

        Whoever drives it stops at once, and its users hear of it by a DetachedError.

        Returns:
            Messages taken from the device that no application has received yet.
        """
        self._check_role(Role.DRIVER)
        if self._closed or self.failure is not None:
            return 0
        cause = DetachedError(
            f"{self.name}: the device was detached, and goes on without this host"
        )
        unread = 0 if self.on_detach is None else self.on_detach(cause)
        self.failure = cause
        return unread

    def close(self) -> None:
        """Lets go of the shared memory. Idempotent."""
        if not self._closed:
            self._closed = True
            self._status.close()
            self._accepted.close()

    def _check_role(self, role: Role) -> None:
        if self.role is not role:
            raise ValueError(f"{self.name}: only the {role.value} does this")
