"""A virtqueue worked from either end, over the C fast path."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openamp_py.errors import VirtqueueError
from openamp_py.memory import MemoryMap
from openamp_py.virtio._ring import ffi, lib
from openamp_py.virtio.shared import Pinned
from openamp_py.virtio.takeover import RingCopy, copy_ring
from openamp_py.vring import VringLayout


class Role(enum.Enum):
    """Which end of a virtio device this side is."""

    DRIVER = "driver"
    """The remoteproc host: owns the buffers."""
    DEVICE = "device"
    """The remote."""


@dataclass(frozen=True, slots=True)
class Span:
    """One contiguous piece of a chain: where it is, and its bytes."""

    pa: int
    view: memoryview
    writable: bool


@dataclass(frozen=True, slots=True)
class Chain:
    """A buffer the driver made available: readable spans, then writable ones."""

    head: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class RingParts:
    """The memory of a vring whose parts do not lie one behind the other."""

    descriptors: memoryview
    """Aligned to 8: they hold u64 addresses."""
    available: memoryview
    """Aligned to 2."""
    used: memoryview
    """Aligned to 4."""


@dataclass(frozen=True, slots=True)
class VirtqueueState:
    """Where a virtqueue stands, seen from one end; indexes are free-running u16."""

    name: str
    role: str
    """This side's end: "driver" or "device"."""
    num: int
    event_idx: bool
    available_index: int | None
    """The driver's index in shared memory; None once closed."""
    used_index: int | None
    """The device's index in shared memory; None once closed."""
    next: int
    """The index this side publishes next."""
    published: int
    """The index of this side that the other one can see."""
    seen: int
    """Entries of the other side's ring taken so far."""
    outstanding: int
    """Driver: chains that are out; device: chains taken and not put back."""
    free: int | None
    """Driver: free descriptors; None for a device."""
    quiet: bool
    """This side asked not to be kicked, or its wish has lapsed."""
    fault: str | None
    """What broke it."""


# By VQ_FAULT_* of virtqueue.h; {0} is the value found, {1} the limit.
_FAULTS = {
    1: "its index jumped by {0} entries, at most {1} were possible",
    2: "it named descriptor {0} as the head of a chain; there are {1}",
    3: "it named descriptor {0}, which is not its to give: not outstanding, or already given",
    4: "a descriptor's next is {0}; its table has {1} entries",
    5: "a chain has {0} descriptors or more, at most {1} are allowed: a loop?",
    6: "a descriptor points at {0:#x} for {1} bytes, which is not in shared memory",
    7: "a descriptor points to an indirect table of {0} bytes; "
    "it must be allowed, alone, aligned to 8, and a multiple of 16 up to {1}",
    8: "descriptor {0} of a chain is readable after a writable one",
}


_PARTS = ("descriptors", "entries of the available ring", "entries of the used ring")


class Virtqueue:
    """One end of a split virtqueue in shared memory.

    Made by a VirtioDevice, or by hand for tests and tools. Starts unusable: call `start`
    or `attach`. One task at a time; every method raises VirtqueueError once the
    other side has written an impossible value.

    Args:
        layout: the vring's shape.
        ring: the vring's bytes, at least ``layout.size``, aligned to ``layout.align`` and to 8
            (descriptors hold u64 addresses); or its parts, wherever they are.
        memory: where the buffers may lie (their physical addresses are checked against it).
        role: this side's end.
        event_idx: VIRTIO_RING_F_EVENT_IDX was negotiated.
        indirect: VIRTIO_RING_F_INDIRECT_DESC was negotiated; the device end follows them.
        fresh: for a device: its driver has just begun, so nothing was put back yet.
        start: for a device: where in the available ring `attach` begins, where the transport says
            so.

    Raises:
        ValueError: the ring's memory is too small or badly aligned.
    """

    def __init__(
        self,
        layout: VringLayout,
        ring: memoryview | RingParts,
        memory: MemoryMap,
        role: Role,
        *,
        event_idx: bool = False,
        indirect: bool = False,
        fresh: bool = False,
        start: int | None = None,
        name: str = "virtqueue",
    ) -> None:
        parts = _pin_parts(name, layout, ring)
        self.layout = layout
        self.role = role
        self.name = name
        self._memory = memory
        self._fresh = fresh
        self._start = start
        one = isinstance(ring, memoryview)
        self._padding = layout.used_offset - layout.available_offset if one else 0
        bases = [Pinned(region.view) for region in memory.regions]
        self._pinned = (*parts, *bases)
        self._regions = ffi.new("struct vq_region[]", len(memory.regions))
        for i, region in enumerate(memory.regions):
            self._regions[i] = (region.pa, region.size, bases[i].pointer)
        self._slots = ffi.new("struct vq_slot[]", layout.num)
        self._spans = ffi.new("struct vq_span[]", layout.num)
        self._number = ffi.new("uint32_t *")
        self._q = ffi.new("struct vq *")
        descriptors, available, used = parts
        self._q.ring = descriptors.pointer
        self._q.available = ffi.cast("uint16_t *", available.pointer)
        self._q.used = ffi.cast("uint16_t *", used.pointer)
        self._q.slots = self._slots
        self._q.regions = self._regions
        self._q.region_count = len(memory.regions)
        self._q.num = layout.num
        self._q.mask = layout.num - 1
        self._q.driver = role is Role.DRIVER
        self._q.event_idx = event_idx
        self._q.indirect = indirect
        self._closed = False

    @property
    def handle(self) -> Any:
        """The C structure, for the other wrappers on this floor."""
        self._check_open()
        return self._q

    @property
    def available_index(self) -> int:
        """The driver's index as it stands in memory."""
        return int(lib.vq_available_index(self.handle))

    @property
    def used_index(self) -> int:
        """The device's index as it stands in memory."""
        return int(lib.vq_used_index(self.handle))

    @property
    def is_begun_anew(self) -> bool:
        """Device: whether the driver cleared the ring: the used index is not what was published."""
        return bool(self.used_index != self.handle.published)

    def start(self) -> None:
        """Begins from zero; the driver clears the ring's memory, also between its parts."""
        if self.role is Role.DRIVER and self._padding:
            ffi.memmove(self.handle.available, bytes(self._padding), self._padding)
        lib.vq_start(self.handle)

    def attach(self, seen: int | None = None) -> None:
        """Continues with the indexes found in memory, where a peer is already running.

        What is out is taken to be what was made available since `seen`, which is right where
        the device returns chains in the order it got them, as RPMsg devices do.

        Args:
            seen: index in the other side's ring of the first entry not dealt with yet.
                By default the used index: a device then takes all chains that were not put
                back, a driver has looked at everything that was. Where a driver has put all its
                buffers into the used ring before it began, as rpmsg-lite's does, a device begins
                as much earlier.

        Raises:
            VirtqueueError: the indexes contradict each other.
        """
        start = self._find_start() if seen is None else seen
        if not 0 <= start <= 0xFFFF:
            raise ValueError(f"{self.name}: an index of {start}; 0 to 65535 are possible")
        self.result(lib.vq_attach(self.handle, start))

    def _find_start(self) -> int:
        """Where `attach` begins by default."""
        used, num = self.used_index, self.layout.num
        if self._start is not None:
            return self._start
        if self.role is Role.DRIVER:
            return used
        available, filled = self.available_index, (used - num) & 0xFFFF
        ahead = (available - used) & 0xFFFF
        # Equal indexes are a filled ring of which all was sent, or one with nothing to take. Only
        # before anything was put back do they tell which.
        is_filled = ahead > num or (self._fresh and used == available == num)
        return filled if is_filled and (available - filled) & 0xFFFF <= num else used

    def copy(self) -> RingCopy:
        """The vring as it stands in memory, for `takeover`."""
        available, used = self.available_index, self.used_index
        descriptors = bytes(ffi.buffer(self._q.ring, self.layout.available_offset))
        ring = bytes(ffi.buffer(self._q.available, self.layout.available_size))
        return copy_ring(self.name, self.layout, available, used, descriptors, ring)

    def resume(self, available: int, heads: Sequence[int], whole: int) -> None:
        """Driver: goes on where another driver left, whose chains were one descriptor each.

        Args:
            available: the index that it published.
            heads: what is out, or came back and was not looked at, from before that index.
            whole: bytes of each buffer; it may have lent fewer.

        Raises:
            VirtqueueError: the device's index, or a head, contradicts that.
        """
        self._check_role(Role.DRIVER)
        known = ffi.new("uint16_t[]", list(heads))
        if lib.vq_resume(self.handle, available, known, len(known), whole) < 0:
            raise VirtqueueError(f"{self.name} cannot be taken over: {self._describe_fault()}")

    def leave(self) -> None:
        """Driver of such chains: notes in the descriptors what is out, for the next driver."""
        self._check_role(Role.DRIVER)
        lib.vq_leave(self.handle)

    def add(
        self,
        readable: Sequence[tuple[int, int]] = (),
        writable: Sequence[tuple[int, int]] = (),
    ) -> int | None:
        """Driver: adds a chain of (physical address, length) spans; seen after `publish`.

        Returns:
            The head, or None when too few descriptors are free.
        """
        self._check_role(Role.DRIVER)
        spans = [*readable, *writable]
        if not 1 <= len(spans) <= self.layout.num:
            raise ValueError(f"a chain of {len(spans)} spans; 1 to {self.layout.num} are possible")
        for pa, length in spans:
            if not (0 <= pa < 1 << 64 and 0 <= length < 1 << 32):
                raise ValueError(f"a span of {length} bytes at {pa:#x}; a u32 at a u64 is possible")
        chain = ffi.new("struct vq_span[]", [(pa, ffi.NULL, length, 0) for pa, length in spans])
        head = self.result(lib.vq_add(self.handle, chain, len(readable), len(writable)))
        return None if head < 0 else head

    def get_used(self) -> tuple[int, int] | None:
        """Driver: takes back one chain as (head, bytes the device says it wrote), or None."""
        self._check_role(Role.DRIVER)
        head = self.result(lib.vq_get_used(self.handle, self._number))
        return None if head < 0 else (head, int(self._number[0]))

    def get_available(self) -> Chain | None:
        """Device: takes one chain, or None."""
        self._check_role(Role.DEVICE)
        number = self._number
        head = self.result(lib.vq_get_available(self.handle, self._spans, self.layout.num, number))
        if head < 0:
            return None
        return Chain(head, tuple(self._span(self._spans[i]) for i in range(number[0])))

    def put_used(self, head: int, length: int) -> None:
        """Device: gives a chain back with the number of bytes written; seen after `publish`.

        Raises:
            ValueError: no chain with this head is out.
        """
        self._check_role(Role.DEVICE)
        if not 0 <= length < 1 << 32:
            raise ValueError(f"{self.name}: {length} bytes written; a u32 is possible")
        if not 0 <= head < self.layout.num or self.result(
            lib.vq_put_used(self.handle, head, length)
        ):
            raise ValueError(f"{self.name}: no chain with head {head} was taken")

    def publish(self) -> bool:
        """Makes what was added or put visible. Returns whether the other side wants a kick."""
        return bool(self.result(lib.vq_publish(self.handle)))

    @property
    def pending(self) -> bool:
        """Whether the other side's ring holds an entry not yet taken."""
        return bool(self.result(lib.vq_pending(self.handle)))

    @property
    def is_quiet(self) -> bool:
        """Whether this side asked not to be kicked, or its wish has lapsed."""
        return bool(self._q.quiet)

    def notify_off(self) -> None:
        """Asks the other side not to kick."""
        lib.vq_notify_off(self.handle)

    def notify_on(self) -> bool:
        """Asks for kicks. Returns whether something came in meanwhile, which brings none."""
        return bool(self.result(lib.vq_notify_on(self.handle)))

    def result(self, value: int) -> int:
        """Passes a C result through; raises for a broken queue."""
        if value == lib.VQ_BROKEN:
            raise VirtqueueError(
                f"{self.name} is broken: the other side is at fault: {self._describe_fault()}"
            )
        return value

    def snapshot(self) -> VirtqueueState:
        """Where the queue stands, for a report; also of one that is broken or closed."""
        q = self._q
        return VirtqueueState(
            name=self.name,
            role=self.role.value,
            num=self.layout.num,
            event_idx=bool(q.event_idx),
            available_index=None if self._closed else self.available_index,
            used_index=None if self._closed else self.used_index,
            next=q.next,
            published=q.published,
            seen=q.seen,
            outstanding=q.outstanding,
            free=q.free_count if self.role is Role.DRIVER else None,
            quiet=bool(q.quiet),
            fault=self._describe_fault() if q.fault else None,
        )

    def _describe_fault(self) -> str:
        q = self._q
        return _FAULTS[q.fault].format(q.fault_value, q.fault_limit)

    def close(self) -> None:
        """Lets go of the shared memory. Idempotent; nothing else may be called after it."""
        if not self._closed:
            self._closed = True
            self._memory = MemoryMap(())
            for pinned in self._pinned:
                pinned.close()

    def _span(self, span: Any) -> Span:
        view = self._memory.find_pa(span.pa, span.length)
        assert view is not None, "translated before"
        return Span(span.pa, view, bool(span.writable))

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self.name} is closed")

    def _check_role(self, role: Role) -> None:
        if self.role is not role:
            raise ValueError(f"{self.name}: only the {role.value} end does this")


def _pin_parts(
    name: str, layout: VringLayout, ring: memoryview | RingParts
) -> tuple[Pinned, Pinned, Pinned]:
    """The descriptors, the available and the used ring, as C sees them.

    Raises:
        ValueError: their memory is too small or badly aligned.
    """
    if isinstance(ring, RingParts):
        views = (ring.descriptors, ring.available, ring.used)
        alignments = (8, 2, 4)  # virtio 1.2, 2.7; of descriptors what C needs
    else:
        if ring.nbytes < layout.size:
            raise ValueError(f"{name}: {ring.nbytes} bytes for a vring of {layout.size}")
        views = (ring, ring[layout.available_offset :], ring[layout.used_offset :])
        # A mapping is not aligned to more than a page.
        alignments = (max(8, min(layout.align, 4096)), 2, 4)
    sizes = (layout.available_offset, layout.available_size, layout.used_size)
    with contextlib.ExitStack() as stack:
        parts = []
        for what, view, size, alignment in zip(_PARTS, views, sizes, alignments, strict=True):
            if view.nbytes < size:
                raise ValueError(f"{name}: {view.nbytes} bytes for the {what}, which take {size}")
            part = Pinned(view)
            stack.callback(part.close)
            if int(ffi.cast("uintptr_t", part.pointer)) % alignment:
                raise ValueError(f"{name}: the {what} are not aligned to {alignment} bytes")
            parts.append(part)
        stack.pop_all()
    descriptors, available, used = parts
    return descriptors, available, used
