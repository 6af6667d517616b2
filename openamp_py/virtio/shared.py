"""Single words in shared memory, read with acquire and written with release."""

from __future__ import annotations

from openamp_py.virtio._ring import ffi, lib


class SharedU8:
    """One byte in shared memory."""

    def __init__(self, view: memoryview, offset: int) -> None:
        self._word = ffi.from_buffer("uint8_t[1]", view[offset : offset + 1], True)

    def load(self) -> int:
        """The value now; what its writer wrote before it is visible after this."""
        return int(lib.shared_load_u8(self._word))

    def store(self, value: int) -> None:
        """Sets the value; what was written before is visible to whoever loads it."""
        lib.shared_store_u8(self._word, value)

    def close(self) -> None:
        """Lets go of the memory. Idempotent; using it afterwards is a TypeError."""
        if self._word is not None:
            ffi.release(self._word)
            self._word = None  # which C is not given: it would touch memory that may be gone


class SharedU32:
    """A little-endian u32 in shared memory, at an address that is a multiple of four."""

    def __init__(self, view: memoryview, offset: int) -> None:
        self._word = ffi.from_buffer("uint8_t[4]", view[offset : offset + 4], True)
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
        if self._word is not None:
            ffi.release(self._word)
            self._word = None  # which C is not given: it would touch memory that may be gone
