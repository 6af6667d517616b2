"""Single words that two sides share: in memory, read with acquire and written with release."""

from __future__ import annotations

from typing import Protocol

from openamp_py.virtio._ring import ffi, lib


class Pinned:
    """The bytes of a view as C sees them; their memory stays as long as this is open.

    Holds the object that the view is of, and not the view: a memoryview that the garbage
    collector takes apart while C has its bytes crashes the interpreter.

    Attributes:
        pointer: to the first byte.
    """

    def __init__(self, view: memoryview) -> None:
        self._owner = ffi.from_buffer("uint8_t[]", view.obj, True)
        with ffi.from_buffer("uint8_t[]", view, True) as part:
            offset = int(ffi.cast("uintptr_t", part)) - int(ffi.cast("uintptr_t", self._owner))
        self.pointer = self._owner + offset

    def close(self) -> None:
        """Lets go of the memory. Idempotent."""
        ffi.release(self._owner)


class Word(Protocol):
    """A word of a virtio device's configuration, wherever it is."""

    def load(self) -> int:
        """The value now."""
        ...

    def store(self, value: int) -> None:
        """Sets the value."""
        ...

    def close(self) -> None:
        """Lets go of the memory, if it is in any. Idempotent."""
        ...


class ToldWord:
    """A word that this side has alone: the transport tells of what the other side does."""

    def __init__(self, value: int = 0) -> None:
        self._value = value

    def load(self) -> int:
        """The value now."""
        return self._value

    def store(self, value: int) -> None:
        """Sets the value."""
        self._value = value

    def close(self) -> None:
        """Does nothing: it is in no memory."""


class SharedU8:
    """One byte in shared memory."""

    def __init__(self, view: memoryview, offset: int) -> None:
        self._memory = Pinned(view[offset : offset + 1])
        self._word = self._memory.pointer

    def load(self) -> int:
        """The value now; what its writer wrote before it is visible after this."""
        return int(lib.shared_load_u8(self._word))

    def store(self, value: int) -> None:
        """Sets the value; what was written before is visible to whoever loads it."""
        lib.shared_store_u8(self._word, value)

    def close(self) -> None:
        """Lets go of the memory. Idempotent; using it afterwards is a TypeError."""
        self._memory.close()
        self._word = None  # which C is not given: it would touch memory that may be gone


class SharedU32:
    """A little-endian u32 in shared memory, at an address that is a multiple of four."""

    def __init__(self, view: memoryview, offset: int) -> None:
        self._memory = Pinned(view[offset : offset + 4])
        self._word = self._memory.pointer
        if int(ffi.cast("uintptr_t", self._word)) % 4:
            raise ValueError(f"shared word at offset {offset:#x} is not at a multiple of 4")

    def load(self) -> int:
        """The value now; what its writer wrote before it is visible after this."""
        return int(lib.shared_load_u32(self._word))

    def store(self, value: int) -> None:
        """Sets the value; what was written before is visible to whoever loads it."""
        lib.shared_store_u32(self._word, value)

    def close(self) -> None:
        """Lets go of the memory. Idempotent; using it afterwards is a TypeError."""
        self._memory.close()
        self._word = None  # which C is not given: it would touch memory that may be gone
