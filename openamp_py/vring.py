"""Where the parts of a split vring lie (virtio 1.2, section 2.7; the legacy alignment)."""

from __future__ import annotations

from dataclasses import dataclass

MAX_NUM = 32768
"""Largest number of entries (virtio 1.2, 2.7)."""

MIN_ALIGN = 4
"""Alignment that a used ring needs (virtio 1.2, 2.7)."""

_DESCRIPTOR_SIZE = 16
_USED_ELEMENT_SIZE = 8


@dataclass(frozen=True, slots=True)
class VringPlaces:
    """Device addresses of the three parts of a vring, each of which may lie anywhere."""

    descriptors: int
    available: int
    used: int


@dataclass(frozen=True, slots=True)
class VringLayout:
    """The shape of a vring: descriptors at 0, then the available ring, then the used ring.

    Args:
        num: entries, a power of two up to 32768.
        align: alignment of the used ring and of the vring itself, a power of two.
    """

    num: int
    align: int

    def __post_init__(self) -> None:
        if not 1 <= self.num <= MAX_NUM or self.num & (self.num - 1):
            raise ValueError(f"vring of {self.num} entries; it must be a power of two <= {MAX_NUM}")
        if self.align < MIN_ALIGN or self.align & (self.align - 1):
            raise ValueError(
                f"vring alignment {self.align}; it must be a power of two >= {MIN_ALIGN}"
            )

    @property
    def available_offset(self) -> int:
        """Of the available ring: flags, idx, ring[num], used_event, all u16."""
        return _DESCRIPTOR_SIZE * self.num

    @property
    def used_offset(self) -> int:
        """Of the used ring: flags u16, idx u16, {id u32, length u32}[num], avail_event u16."""
        end = self.available_offset + self.available_size
        return (end + self.align - 1) // self.align * self.align

    @property
    def available_size(self) -> int:
        """Bytes of the available ring."""
        return 2 * (3 + self.num)

    @property
    def used_size(self) -> int:
        """Bytes of the used ring."""
        return 2 * 3 + _USED_ELEMENT_SIZE * self.num

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self.used_offset + self.used_size

    def places(self, da: int) -> VringPlaces:
        """Where the parts of a vring of this shape are that begins at a device address."""
        return VringPlaces(da, da + self.available_offset, da + self.used_offset)
