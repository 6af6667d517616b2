"""Virtqueues against the Linux kernel's own rings, which stand beside ours in the same histories.

The kernel's driver (virtio_ring.c) and device (vringh.c) are compiled from the distribution's
source where the tests run. A history runs on two rings at once: on one the kernel works both ends,
on the other our virtqueue stands in for one of them. What the ends return and what lies in memory
must be the same.
"""

from __future__ import annotations

import mmap
import os
import random
import runpy
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import cffi
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_source import find_kernel_source

from openamp_py.memory import MemoryMap, Region
from openamp_py.virtio import Role, Virtqueue
from openamp_py.vring import VringLayout

T = TypeVar("T")

pytestmark = pytest.mark.kernel_source

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "tests" / "c" / "kernel_rings.c"

# All that the two files include lies below these.
NEEDED = (
    "drivers/vhost",
    "drivers/virtio",
    "include/linux",
    "include/uapi/linux",
    "tools/include",
    "tools/virtio",
)
# Those of tools/virtio/Makefile that matter. Its headers lack data_race.
FLAGS = (
    *("-O2", "-fPIC", "-shared", "-pthread", "-Wl,-z,defs", "-U_FORTIFY_SOURCE", "-Ddata_race="),
    *("-fno-strict-overflow", "-fno-strict-aliasing", "-fno-common"),
    *("-I.", "-I../include", "-include", "../../include/linux/kconfig.h"),
)

ALIGN = 64
SPAN_SIZE = 32
MAX_SPANS = 12
"""More than the 8 that vringh has room for before it allocates more."""
PLACE_SIZE = SPAN_SIZE * MAX_SPANS
TABLE_SIZE = 16 * MAX_SPANS


# The kernel's rings.


class Kernel(NamedTuple):
    """The shim around them, loaded."""

    ffi: Any
    lib: Any


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """The kernel's rings, compiled."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc)")
    place = tmp_path_factory.mktemp("linux")
    tree = find_kernel_source(place, NEEDED)
    library = place / "libkernel_rings.so"
    files = [tree / "drivers/vhost/vringh.c", tree / "drivers/virtio/virtio_ring.c", SHIM]
    made = subprocess.run(
        [compiler, *FLAGS, *files, "-o", library],
        cwd=tree / "tools/virtio",
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    ffi = cffi.FFI()
    declarations = runpy.run_path(str(ROOT / "csrc" / "build.py"))["declarations"]
    ffi.cdef(declarations(SHIM.with_suffix(".h")))
    lib = ffi.dlopen(str(library))
    yield Kernel(ffi, lib)
    ffi.dlclose(lib)
    shutil.rmtree(place)


class Shape(NamedTuple):
    """What a history's rings are like."""

    num: int
    start: int
    """Where the indexes begin."""
    event_idx: bool
    indirect: bool


class Memory:
    """A ring, room for messages, and room for indirect tables; addresses are this process' own."""

    def __init__(self, kernel: Kernel, num: int) -> None:
        self.layout = VringLayout(num, ALIGN)
        pool = -(-self.layout.size // ALIGN) * ALIGN
        tables = pool + num * PLACE_SIZE
        self.all = memoryview(mmap.mmap(-1, tables + num * TABLE_SIZE))
        self.ring = self.all[: self.layout.size]
        self.pool = self.all[pool:tables]
        self._pinned = kernel.ffi.from_buffer("uint8_t[]", self.all)
        self.ring_pointer = self._pinned
        self.pool_pointer = self._pinned + pool
        self.tables_pointer = self._pinned + tables
        self.pool_pa = int(kernel.ffi.cast("uintptr_t", self.pool_pointer))
        self.shared = self.all[pool:]
        """The pool and the tables: where descriptors may point."""

    def words(self) -> dict[str, int]:
        """The indexes and wishes, as they lie in the ring."""
        num, available, used = (
            self.layout.num,
            self.layout.available_offset,
            self.layout.used_offset,
        )
        places = {
            "available flags": available,
            "available index": available + 2,
            "used event": available + 4 + 2 * num,
            "used flags": used,
            "used index": used + 2,
            "available event": used + 4 + 8 * num,
        }
        words = {}
        for name, offset in places.items():
            words[name] = int.from_bytes(self.ring[offset : offset + 2], "little")
        return words

    def set_indexes(self, value: int) -> None:
        for ring in (self.layout.available_offset, self.layout.used_offset):
            self.ring[ring + 2 : ring + 4] = value.to_bytes(2, "little")


Piece = tuple[int, int]
"""Offset in the pool, length."""


@dataclass(frozen=True)
class Fetched:
    """A chain as a device got it."""

    head: int
    readable: list[Piece]
    writable: list[Piece]
    data: bytes


class Driver(Protocol):
    """What a history wants of a driver; the same is asked of the kernel's and of ours."""

    def add(self, message: int, readable: list[Piece], writable: list[Piece]) -> bool: ...
    def publish(self) -> bool: ...
    def take(self) -> tuple[int, int] | None: ...
    def quiet(self) -> None: ...
    def listen(self) -> bool: ...
    def listen_later(self) -> bool: ...
    def interrupt(self) -> None: ...
    def close(self) -> None: ...


class Device(Protocol):
    """The same of a device."""

    def take(self) -> Fetched | None: ...
    def put(self, chain: Fetched, data: bytes, length: int) -> None: ...
    def publish(self) -> bool: ...
    def quiet(self) -> None: ...
    def listen(self) -> bool: ...
    def close(self) -> None: ...


class Ours:
    """What our two ends have in common."""

    def __init__(self, memory: Memory, shape: Shape, role: Role) -> None:
        region = Region("shared", memory.pool_pa, memory.pool_pa, memory.shared)
        self.memory = memory
        self.queue = Virtqueue(
            memory.layout,
            memory.ring,
            MemoryMap([region]),
            role,
            event_idx=shape.event_idx,
            indirect=shape.indirect,
            name="ours",
        )
        if shape.start == 0:
            self.queue.start()
        else:
            memory.set_indexes(shape.start)
            self.queue.attach()
        self.publish = self.queue.publish
        self.quiet = self.queue.notify_off
        self.listen = self.queue.notify_on
        self.close = self.queue.close


class OurDriver(Ours):
    def __init__(self, memory: Memory, shape: Shape) -> None:
        super().__init__(memory, shape, Role.DRIVER)
        self.messages: dict[int, int] = {}

    def add(self, message: int, readable: list[Piece], writable: list[Piece]) -> bool:
        pa = self.memory.pool_pa
        spans = ([(pa + at, n) for at, n in pieces] for pieces in (readable, writable))
        head = self.queue.add(*spans)
        if head is None:
            return False
        assert head not in self.messages
        self.messages[head] = message
        return True

    def take(self) -> tuple[int, int] | None:
        got = self.queue.get_used()
        return None if got is None else (self.messages.pop(got[0]), got[1])

    def listen_later(self) -> bool:
        raise NotImplementedError("ours has nothing like it")

    def interrupt(self) -> None:
        pass


class OurDevice(Ours):
    def __init__(self, memory: Memory, shape: Shape) -> None:
        super().__init__(memory, shape, Role.DEVICE)
        self.writable: dict[int, list[memoryview]] = {}

    def take(self) -> Fetched | None:
        chain = self.queue.get_available()
        if chain is None:
            return None
        pieces: tuple[list[Piece], list[Piece]] = [], []
        for span in chain.spans:
            pieces[span.writable].append((span.pa - self.memory.pool_pa, span.view.nbytes))
        data = b"".join(span.view for span in chain.spans if not span.writable)
        self.writable[chain.head] = [span.view for span in chain.spans if span.writable]
        return Fetched(chain.head, *pieces, data)

    def put(self, chain: Fetched, data: bytes, length: int) -> None:
        for view in self.writable.pop(chain.head):
            part, data = data[: view.nbytes], data[view.nbytes :]
            view[: len(part)] = part
        self.queue.put_used(chain.head, length)


def _yes(result: int) -> bool:
    assert result in (0, 1), os.strerror(-result)
    return bool(result)


class KernelDriver:
    def __init__(self, kernel: Kernel, memory: Memory, shape: Shape) -> None:
        self.kernel, self.memory = kernel, memory
        tables = memory.tables_pointer if shape.indirect else kernel.ffi.NULL
        self.driver = kernel.lib.kernel_driver_new(
            memory.ring_pointer,
            shape.num,
            ALIGN,
            shape.event_idx,
            tables,
            TABLE_SIZE if shape.indirect else 0,
        )
        assert not kernel.lib.kernel_driver_run(self.driver, shape.start)

    def add(self, message: int, readable: list[Piece], writable: list[Piece]) -> bool:
        pool = self.memory.pool_pointer
        spans = [(pool + at, n, 0) for at, n in (*readable, *writable)]
        return _yes(
            self.kernel.lib.kernel_driver_add(
                self.driver,
                self.kernel.ffi.new("struct kernel_span[]", spans),
                len(readable),
                len(writable),
                message,
            )
        )

    def publish(self) -> bool:
        return _yes(self.kernel.lib.kernel_driver_kick(self.driver))

    def take(self) -> tuple[int, int] | None:
        message, length = self.kernel.ffi.new("uint64_t *"), self.kernel.ffi.new("uint32_t *")
        if not _yes(self.kernel.lib.kernel_driver_get(self.driver, message, length)):
            return None
        return int(message[0]), int(length[0])

    def quiet(self) -> None:
        self.kernel.lib.kernel_driver_disable(self.driver)

    def listen(self) -> bool:
        return not self.kernel.lib.kernel_driver_enable(self.driver)

    def listen_later(self) -> bool:
        return not self.kernel.lib.kernel_driver_enable_delayed(self.driver)

    def interrupt(self) -> None:
        self.kernel.lib.kernel_driver_interrupt(self.driver)

    @property
    def free(self) -> int:
        return int(self.kernel.lib.kernel_driver_free_descriptors(self.driver))

    def close(self) -> None:
        self.kernel.lib.kernel_driver_free(self.driver)


class KernelDevice:
    def __init__(self, kernel: Kernel, memory: Memory, shape: Shape) -> None:
        self.kernel, self.memory = kernel, memory
        self.device = kernel.lib.kernel_device_new(
            memory.ring_pointer,
            shape.num,
            ALIGN,
            shape.event_idx,
            shape.start,
            memory.pool_pointer,
            memory.shared.nbytes,
        )
        if shape.start:
            assert not self.listen()

    def take(self) -> Fetched | None:
        new = self.kernel.ffi.new
        head, count, size = new("uint16_t *"), new("uint32_t *"), new("uint32_t *")
        spans, data = new("struct kernel_span[]", MAX_SPANS), new("uint8_t[]", PLACE_SIZE)
        if not _yes(
            self.kernel.lib.kernel_device_get(
                self.device, head, spans, MAX_SPANS, count, data, PLACE_SIZE, size
            )
        ):
            return None
        pieces: tuple[list[Piece], list[Piece]] = [], []
        for span in spans[0 : count[0]]:
            pieces[span.writable].append((span.base - self.memory.pool_pointer, span.length))
        return Fetched(head[0], *pieces, bytes(self.kernel.ffi.buffer(data, size[0])))

    def put(self, chain: Fetched, data: bytes, length: int) -> None:
        written = self.kernel.lib.kernel_device_put(
            self.device, chain.head, data, len(data), length
        )
        assert written == len(data)

    def publish(self) -> bool:
        return _yes(self.kernel.lib.kernel_device_need_notify(self.device))

    def quiet(self) -> None:
        self.kernel.lib.kernel_device_disable(self.device)

    def listen(self) -> bool:
        return not self.kernel.lib.kernel_device_enable(self.device)

    def close(self) -> None:
        self.kernel.lib.kernel_device_free(self.device)


# Histories.


@dataclass
class Message:
    """A chain that is somewhere between its add and its take."""

    place: int
    readable: list[Piece]
    writable: list[Piece]
    data: bytes
    length: int = 0


class History:
    """Two rings to which the same happens: one all the kernel's, one with `ours` at one end.

    Both must answer the same, but for what follows from these differences:

    - The kernel shows each entry to the other side at once and only decides on the kick later;
      ours are hidden until they are published. The other end does not take what ours hides.
    - With EVENT_IDX the ends write other events where they do not want to be told: ours the one
      that was last, the kernel's driver 0 or nothing, its device nothing. The kernel's driver
      also wishes anew for each chain it takes, ours when it is told to. There our event is
      modelled, and the kick must be what follows from it.
    - Asked without anything new and without EVENT_IDX, the kernel says that the other side
      listens; ours, that it needs no kick.
    """

    def __init__(self, kernel: Kernel, shape: Shape, ours: Role) -> None:
        self.shape, self.ours = shape, ours
        self.memories = [Memory(kernel, shape.num) for _ in range(2)]
        mine, theirs = self.memories
        # The ring with ours first. The drivers bring the indexes to where they begin.
        self.drivers: list[Driver] = [
            OurDriver(mine, shape) if ours is Role.DRIVER else KernelDriver(kernel, mine, shape),
            KernelDriver(kernel, theirs, shape),
        ]
        self.devices: list[Device] = [
            OurDevice(mine, shape) if ours is Role.DEVICE else KernelDevice(kernel, mine, shape),
            KernelDevice(kernel, theirs, shape),
        ]
        self.places = list(range(shape.num))
        self.messages: list[Message] = []
        self.held: list[tuple[int, list[Fetched]]] = []
        # Chains since the start: added, taken by the device, put, taken back.
        self.added = self.fetched = self.put = self.taken = 0
        # Of those added and put: up to where the kick was decided.
        self.told = {Role.DRIVER: 0, Role.DEVICE: 0}
        # Our event, counted alike, and whether the kernel's is the same one.
        self.event, self.same_event = 0, True
        # Decisions that were the same.
        self.kicks: Counter[tuple[Role, bool]] = Counter()
        self.check()

    def close(self) -> None:
        for driver, device in zip(self.drivers, self.devices, strict=True):
            driver.close()
            device.close()

    def made(self, role: Role) -> int:
        """Entries that this end has put into its ring."""
        return self.added if role is Role.DRIVER else self.put

    def visible(self, role: Role) -> int:
        """Those that the other end can see on both rings."""
        return self.told[role] if role is self.ours else self.made(role)

    def hides(self, role: Role) -> bool:
        """Whether ours hides what the kernel already shows."""
        return self.visible(role) != self.made(role)

    @staticmethod
    def same(mine: T, theirs: T) -> T:
        assert mine == theirs
        return mine

    def check(self) -> None:
        """Compares the words in memory."""
        mine, theirs = (memory.words() for memory in self.memories)
        index, event = (
            ("available index", "used event")
            if self.ours is Role.DRIVER
            else ("used index", "available event")
        )
        assert mine[index] == (self.shape.start + self.told[self.ours]) % 0x10000
        different = set()
        if self.hides(self.ours):
            different.add(index)
        if not self.shape.event_idx:
            different |= {"used event", "available event"}  # mean nothing; the kernel writes one
        elif not self.same_event:
            different.add(event)
        for name in mine.keys() - different:
            assert mine[name] == theirs[name], name

    def wish(self, event: int, same: bool) -> None:
        self.event, self.same_event = event, same

    def publish(self, role: Role) -> None:
        """Decides on the kick for what this end has put into its ring."""
        ends: list[Driver] | list[Device] = self.drivers if role is Role.DRIVER else self.devices
        before, after = self.told[role], self.made(role)
        mine, theirs = (end.publish() for end in ends)
        self.told[role] = after
        if role is self.ours and before == after:
            assert not mine
        elif role is not self.ours and self.shape.event_idx and not self.same_event:
            assert mine == (before <= self.event < after)
        else:
            assert mine == theirs
            self.kicks[role, mine] += 1
        if role is Role.DEVICE and before != after:
            for driver, kicked in zip(self.drivers, (mine, theirs), strict=True):
                if kicked:
                    driver.interrupt()

    # The driver's steps. `number` is any; what it means is the step's own business.

    def add(self, number: int) -> bool:
        rng = random.Random(number)
        count = rng.choice([1, 1, 1, 2, 3, 4, rng.randint(1, MAX_SPANS)])
        count = min(count, self.shape.num)
        place = self.places[-1] if self.places else 0
        pieces = []
        for i in range(count):
            length = rng.choice([0, 1, SPAN_SIZE, rng.randint(0, SPAN_SIZE)])
            start = place * PLACE_SIZE + i * SPAN_SIZE + rng.randint(0, SPAN_SIZE - length)
            pieces.append((start, length))
        rng.shuffle(pieces)
        split = rng.randint(0, count)
        readable, writable = pieces[:split], pieces[split:]
        room = self.same(*[driver.add(self.added, readable, writable) for driver in self.drivers])
        if room:
            data = rng.randbytes(sum(n for _, n in readable))
            rest = data
            for start, length in readable:
                for memory in self.memories:
                    memory.pool[start : start + length] = rest[:length]
                rest = rest[length:]
            self.messages.append(Message(self.places.pop(), readable, writable, data))
            self.added += 1
        return room

    def fill(self, number: int) -> None:
        rng = random.Random(number)
        for _ in range(self.shape.num + 1):
            if not self.add(rng.getrandbits(16)):
                return
        raise AssertionError("more chains than entries")

    def take(self, _number: int = 0) -> bool:
        if self.taken == self.visible(Role.DEVICE):
            assert self.drivers[0].take() is None
            if not self.hides(Role.DEVICE):
                assert self.drivers[1].take() is None
            return False
        got = self.same(*[driver.take() for driver in self.drivers])
        assert got is not None
        message = self.messages[got[0]]
        assert got[1] == message.length
        assert self.memories[0].pool == self.memories[1].pool, "what the devices wrote"
        self.places.append(message.place)
        self.taken += 1
        if self.ours is Role.DRIVER:
            self.same_event = False
        return True

    def take_all(self, _number: int = 0) -> None:
        while self.take():
            pass

    def driver_publish(self, _number: int = 0) -> None:
        self.publish(Role.DRIVER)

    def driver_quiet(self, _number: int) -> None:
        for driver in self.drivers:
            driver.quiet()
        if self.ours is Role.DRIVER:
            self.wish(self.taken - 0x8000, False)

    def driver_listen(self, _number: int = 0) -> None:
        mine, theirs = (driver.listen() for driver in self.drivers)
        assert mine == (self.visible(Role.DEVICE) != self.taken)
        assert mine == theirs or self.hides(Role.DEVICE)
        if self.ours is Role.DRIVER:
            self.wish(self.taken, True)

    def driver_listen_later(self, number: int) -> None:
        if self.ours is Role.DRIVER:
            return self.driver_listen(number)
        mine, theirs = (driver.listen_later() for driver in self.drivers)
        assert mine == theirs or self.hides(Role.DEVICE)

    # The device's.

    def fetch(self, number: int) -> None:
        for _ in range(number % self.shape.num + 1):
            if self.fetched == self.visible(Role.DRIVER):
                assert self.devices[0].take() is None
                if not self.hides(Role.DRIVER):
                    assert self.devices[1].take() is None
                return
            chains = [device.take() for device in self.devices]
            message = self.messages[self.fetched]
            got = []
            for chain in chains:
                assert chain is not None
                assert chain.readable == message.readable
                assert chain.writable == message.writable
                assert chain.data == message.data
                got.append(chain)
            self.held.append((self.fetched, got))
            self.fetched += 1

    def give_back(self, number: int) -> None:
        """Some of what the device has, in any order."""
        rng = random.Random(number)
        for _ in range(rng.choice([1, 1, 2, rng.randint(1, self.shape.num)])):
            if not self.held:
                return
            position = rng.choice([0, 0, rng.randrange(len(self.held))])
            index, chains = self.held.pop(position)
            message = self.messages[index]
            data = rng.randbytes(rng.randint(0, sum(n for _, n in message.writable)))
            # A device may say anything.
            message.length = rng.choice([len(data)] * 4 + [rng.getrandbits(32)])
            for device, chain in zip(self.devices, chains, strict=True):
                device.put(chain, data, message.length)
            self.put += 1

    def device_publish(self, _number: int = 0) -> None:
        self.publish(Role.DEVICE)

    def device_quiet(self, _number: int) -> None:
        for device in self.devices:
            device.quiet()
        if self.ours is Role.DEVICE:
            self.wish(self.fetched - 0x8000, False)

    def device_listen(self, _number: int = 0) -> None:
        mine, theirs = (device.listen() for device in self.devices)
        assert mine == (self.visible(Role.DRIVER) != self.fetched)
        assert mine == theirs or self.hides(Role.DRIVER)
        if self.ours is Role.DEVICE:
            self.wish(self.fetched, True)

    def finish(self) -> None:
        """Everything comes back."""
        self.driver_publish()
        while self.fetched < self.added:
            self.fetch(self.shape.num - 1)
        self.fetch(0)
        while self.held:
            self.give_back(len(self.held))
        self.device_publish()
        self.take_all()
        self.check()
        assert self.added == self.taken and len(self.places) == self.shape.num
        for driver in self.drivers:
            assert not isinstance(driver, KernelDriver) or driver.free == self.shape.num


Step = tuple[Callable[[History, int], object], int]

# The more often, the more often it is here.
STEPS: list[Callable[[History, int], object]] = [
    *[History.add] * 4,
    *[History.driver_publish] * 2,
    History.fill,
    History.take,
    History.take_all,
    History.driver_quiet,
    History.driver_listen,
    History.driver_listen_later,
    *[History.fetch] * 3,
    *[History.give_back] * 3,
    *[History.device_publish] * 2,
    History.device_quiet,
    History.device_listen,
]

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=60, database=None)
NUMS = (1, 2, 4, 8, 16, 64, 256)
STARTS = (0, 0x7FF8, 65530, 65535)
LONG = 2000
"""Steps of a long history."""

ENDS = pytest.mark.parametrize(
    ("ours", "indirect"),
    [(Role.DRIVER, False), (Role.DEVICE, False), (Role.DEVICE, True)],
    ids=["driver", "device", "device-indirect"],  # our driver makes no indirect tables
)
BOTH_WISHES = pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])


def run(kernel: Kernel, shape: Shape, ours: Role, steps: Iterable[Step]) -> History:
    history = History(kernel, shape, ours)
    try:
        for step, number in steps:
            step(history, number)
            history.check()
        history.finish()
    finally:
        history.close()
    return history


@pytest.mark.parametrize("num", [1, 2, 256, 32768])
@pytest.mark.parametrize("align", [4, 64, 4096])
def test_where_the_parts_lie(kernel: Kernel, num: int, align: int) -> None:
    theirs = kernel.ffi.new("struct kernel_layout *")
    kernel.lib.kernel_layout(num, align, theirs)
    ours = VringLayout(num, align)
    assert (ours.available_offset, ours.used_offset) == (theirs.available, theirs.used)
    assert ours.size == theirs.size


@ENDS
@BOTH_WISHES
@EXAMPLES
@given(
    st.sampled_from(NUMS),
    st.sampled_from(STARTS),
    st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 0xFFFF)), min_size=5, max_size=150),
)
def test_short_histories(
    kernel: Kernel,
    ours: Role,
    indirect: bool,
    event_idx: bool,
    num: int,
    start: int,
    steps: list[Step],
) -> None:
    """These become shorter still where one fails."""
    run(kernel, Shape(num, start, event_idx, indirect), ours, steps)


@ENDS
@BOTH_WISHES
@pytest.mark.parametrize("num", NUMS)
def test_long_histories(
    kernel: Kernel, num: int, event_idx: bool, ours: Role, indirect: bool
) -> None:
    """Far more happens in these: chains come back, and kicks are wanted and are not."""
    taken = 0
    kicks: Counter[tuple[Role, bool]] = Counter()
    for start in (0, 65530):
        rng = random.Random(start + num)
        steps = ((rng.choice(STEPS), rng.getrandbits(16)) for _ in range(LONG))
        history = run(kernel, Shape(num, start, event_idx, indirect), ours, steps)
        taken += history.taken
        kicks += history.kicks
    assert taken >= 50
    assert all(kicks[role, kicked] >= 10 for role in Role for kicked in (False, True)), kicks
