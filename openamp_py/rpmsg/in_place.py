"""Messages in their shared buffers: one being built, and one that is held."""

from __future__ import annotations

import contextlib
from typing import Protocol, Self

from openamp_py.errors import StateError


def _release(view: memoryview) -> None:
    """Makes a view of no use, unless something was made of it: that keeps the memory alive."""
    with contextlib.suppress(BufferError):
        view.release()


class SendBuffers(Protocol):
    """Sends a reserved buffer, or takes it back. Each is called at most once for one."""

    def commit(self, reservation: Reservation, destination: int) -> None:
        """Sends the first `length` bytes. Raises trio's errors."""
        ...

    def cancel(self, reservation: Reservation) -> None:
        """Makes the buffer free again."""
        ...


class Reservation:
    """A message that is being built in a shared buffer.

    Made by `Endpoint.reserve`, which sends it at the end of its block or gives it back.

    Attributes:
        view: the payload's bytes in shared memory, to be written. Of no use after the block, nor
            once the bus is closed or goes on over a new device.
    """

    def __init__(self, view: memoryview, length: int, buffers: SendBuffers) -> None:
        self.view = view
        self._size = view.nbytes
        self._length = length
        self._buffers = buffers
        self._over = False
        self._error: Exception | None = None

    @property
    def length(self) -> int:
        """Bytes of `view` that are sent. Can be set, up to its size.

        Raises:
            ValueError: set to more than there is.
        """
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        if not 0 <= length <= self._size:
            raise ValueError(f"a message of {length} bytes; the buffer has {self._size} bytes")
        self._length = length

    @property
    def is_discarded(self) -> bool:
        """Whether it was given back, and will not be sent."""
        return self._over and self._error is None

    def discard(self) -> None:
        """Gives the buffer back unsent. Idempotent."""
        if self._end():
            self._buffers.cancel(self)

    close = discard

    def commit(self, destination: int) -> None:
        """For the endpoint: sends the message."""
        if self._error is not None:
            raise self._error
        if self._end():
            self._buffers.commit(self, destination)

    def take_away(self, error: Exception) -> None:
        """For the bus: the buffer is not ours any more; `error` is for whoever wants to send it."""
        self._end()
        self._error = error

    def _end(self) -> bool:
        ends = not self._over
        self._over = True
        _release(self.view)
        return ends


class ReceiveBuffers(Protocol):
    """Takes a held message's buffer back."""

    def give_back(self, held: HeldMessage) -> Exception | None:
        """Called once. Returns an error of trio's where the link is over."""
        ...


class HeldMessage:
    """A received message in its shared buffer, which the peer lacks until it is released.

    Made by `Endpoint.hold`; released by whoever holds it, at best with a `with` block. The peer can
    still write to it: what is checked must be copied first.

    Attributes:
        view: the payload, read-only. Of no use after release, nor once the bus is closed or goes
            on over a new device.
        source: the sender's address.
    """

    def __init__(self, view: memoryview, source: int, buffers: ReceiveBuffers | None) -> None:
        self.view = view
        self.source = source
        self._buffers = buffers
        self._released = False
        self._error: Exception | None = None

    def release(self) -> None:
        """Gives the buffer back to the peer.

        Raises:
            StateError: it was released before.
            trio.BrokenResourceError: the other side was reset or is gone: it has the buffer.
            trio.ClosedResourceError: the bus was closed.
        """
        if self._released:
            raise self._error or StateError("the message was released before")
        error = self._give_back()
        if error is not None:
            raise error

    def take_away(self, error: Exception) -> None:
        """For the bus: the buffer is not ours any more; `error` is for whoever releases it."""
        self._released = True
        self._error = error
        _release(self.view)

    @property
    def is_released(self) -> bool:
        """Whether `view` is of no use any more."""
        return self._released

    def _give_back(self) -> Exception | None:
        self._released = True
        _release(self.view)
        return None if self._buffers is None else self._buffers.give_back(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._released:
            self._give_back()
