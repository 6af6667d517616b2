"""Memory that two sides share: mapping it, finding addresses in it, giving parts of it away."""

from __future__ import annotations

import bisect
import ctypes
import fcntl
import itertools
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """A stretch of mapped memory as the remote core addresses it.

    Args:
        name: what it is called in errors and look-ups.
        da: device address of its first byte.
        pa: physical address of its first byte: what virtio descriptors hold.
        view: its bytes, writable.
    """

    name: str
    da: int
    pa: int
    view: memoryview = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes in the region."""
        return self.view.nbytes


class MemoryMap:
    """The regions of one processor, and the translation of addresses in them.

    Immutable; the regions' memory belongs to whoever made them.
    """

    def __init__(self, regions: Iterable[Region]) -> None:
        self.regions = tuple(regions)
        ordered = sorted(self.regions, key=lambda region: region.da)
        for low, high in itertools.pairwise(ordered):
            if low.da + low.size > high.da:
                raise ValueError(
                    f"region {high.name!r} at {high.da:#x} overlaps region {low.name!r}, "
                    f"which ends at {low.da + low.size:#x}"
                )

    def find_da(self, da: int, size: int) -> memoryview | None:
        """The `size` bytes at device address `da`, or None where they are not in one region."""
        for region in self.regions:
            offset = da - region.da
            if offset >= 0 and offset + size <= region.size:
                return region.view[offset : offset + size]
        return None

    def find_pa(self, pa: int, size: int) -> memoryview | None:
        """The `size` bytes at physical address `pa`, or None where they are not in one region."""
        for region in self.regions:
            offset = pa - region.pa
            if offset >= 0 and offset + size <= region.size:
                return region.view[offset : offset + size]
        return None

    def find_name(self, name: str) -> Region | None:
        """The first region of that name, or None."""
        return next((region for region in self.regions if region.name == name), None)

    def find_view(self, view: memoryview) -> tuple[Region, int] | None:
        """The region in which a piece of its memory lies, and where in it; or None.

        What a virtual address is to C: the piece is any view of a region's bytes.
        """
        for region in self.regions:
            if view.obj is region.view.obj and view.nbytes:
                offset = _address(view) - _address(region.view)
                if offset >= 0 and offset + view.nbytes <= region.size:
                    return region, offset
        return None

    def pa_of(self, da: int) -> int:
        """The physical address of a device address that lies in a region."""
        for region in self.regions:
            if 0 <= da - region.da < region.size:
                return region.pa + da - region.da
        raise ValueError(f"device address {da:#x} is in no region: {self}")

    def __str__(self) -> str:
        return ", ".join(f"{r.name} {r.da:#x}..{r.da + r.size:#x}" for r in self.regions) or "none"


class Arena:
    """Which parts of a memory map are taken; finds room for more. Knows no bytes, only addresses.

    One for each loaded image; used by one task at a time.
    """

    def __init__(self, memory: MemoryMap) -> None:
        self._memory = memory
        self._taken: list[tuple[int, int]] = []

    def reserve(self, da: int, size: int) -> None:
        """Takes a given range; ranges may overlap."""
        if size:
            bisect.insort(self._taken, (da, da + size))

    def allocate(self, size: int, align: int, *, below: int = 1 << 64) -> int | None:
        """Takes the lowest free range of the first region that has one.

        Args:
            below: where it ends at the latest.

        Returns:
            Its device address, or None without room.
        """
        for region in self._memory.regions:
            da = _align_up(region.da, align)
            for start, end in self._taken:
                if end <= da:
                    continue
                if start >= da + size:
                    break
                da = _align_up(end, align)
            if da + size <= min(region.da + region.size, below):
                self.reserve(da, size)
                return da
        return None


def _address(view: memoryview) -> int:
    """Where a writable view's bytes are in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _align_up(value: int, align: int) -> int:
    return (value + align - 1) // align * align


_SIZE_IS_FINAL = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedMemory:
    """A file descriptor of shared memory and its mapping in this process.

    Created by a platform or a link, which closes it. The mapping itself goes when the last
    view of it goes, so that closing too early can never pull memory from under a ring.
    """

    def __init__(self, fd: int, size: int | None = None) -> None:
        """Maps `size` bytes (or the whole) of `fd`, and owns `fd` from then on."""
        self.fd = fd
        try:
            self.size = size or os.fstat(fd).st_size
            self._view: memoryview | None = memoryview(mmap.mmap(fd, self.size))
        except (OSError, ValueError):
            os.close(fd)
            raise

    @classmethod
    def create(cls, name: str, size: int) -> SharedMemory:
        """New zeroed memory without a name in the file system (memfd)."""
        if size < 1:
            raise ValueError(f"shared memory of {size} bytes; at least 1 is needed")
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            # Whoever else has it cannot take the memory from under our mapping.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_IS_FINAL)
        except OSError:
            os.close(fd)
            raise
        return cls(fd)

    def region(self, name: str, da: int) -> Region:
        """All of it as a region at device and physical address `da`."""
        assert self._view is not None, "not closed"
        return Region(name, da, da, self._view)

    def close(self) -> None:
        """Closes the descriptor and lets go of the mapping. Idempotent."""
        if self._view is not None:
            self._view = None
            os.close(self.fd)
