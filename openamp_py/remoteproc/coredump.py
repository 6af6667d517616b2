"""The state of a crashed core as an ELF core file, as Linux's remoteproc writes it, with notes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class DumpSegment:
    """Memory that goes into a coredump.

    Attributes:
        da: device address of its first byte.
        data: the bytes; of memory that is shared, or a copy of it.
    """

    da: int
    data: memoryview | bytes = field(repr=False)
