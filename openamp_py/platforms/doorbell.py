"""A doorbell between two processes: one byte on a stream socket for each kick."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import termios
from collections.abc import Callable

import trio

from openamp_py.errors import PlatformError

# Bytes are hints and coalesce; this many are taken away at once.
_BYTES = 4096


class Doorbell:
    """One end of a doorbell.

    Owned by a link, which closes it. A byte's value tells which vring was meant, but whoever
    hears it looks at everything.
    """

    def __init__(self, sock: socket.socket, *, constant: int | None = None) -> None:
        """Owns `sock` from now on. `constant`: send this byte instead of the notify id."""
        sock.setblocking(False)
        self._socket = sock
        self._constant = constant

    def kick(self, notify_id: int) -> None:
        """Sends one byte. A full socket means that the peer has unheard kicks: enough."""
        value = notify_id & 0xFF if self._constant is None else self._constant
        try:
            self._socket.send(bytes((value,)))
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            pass
        except OSError:
            if self._socket.fileno() >= 0:
                raise

    @property
    def is_unheard(self) -> bool:
        """Whether there are kicks that the other end has not taken yet."""
        count = bytearray(4)
        with contextlib.suppress(OSError):  # closed
            fcntl.ioctl(self._socket, termios.TIOCOUTQ, count)
        return any(count)

    def fileno(self) -> int:
        """The socket's descriptor, for a loop in C that kicks and waits itself; -1 once closed."""
        return self._socket.fileno()

    async def run(
        self, notified: Callable[[], None], heard_bytes: Callable[[bytes], None] | None = None
    ) -> None:
        """Calls `notified` for each batch of kicks, until the other end is closed.

        Args:
            heard_bytes: is told of the bytes themselves first, for who finds more in them.
        """
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            # Whoever a look at the rings woke already answers first: the peer may be waiting.
            await trio.lowlevel.cancel_shielded_checkpoint()
            try:
                heard = self._socket.recv(_BYTES)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                heard = b""
            if heard_bytes is not None:
                heard_bytes(heard)
            notified()
            if not heard:
                return

    def close(self) -> None:
        """Closes this end. Idempotent."""
        self._socket.close()


class DoorbellLink:
    """What links over a doorbell have in common.

    Attributes:
        doorbell: this side's end of the doorbell, once there is one.
    """

    doorbell: Doorbell | None = None

    def kick(self, notify_id: int) -> None:
        """Wakes the other side."""
        if self.doorbell is not None:
            self.doorbell.kick(notify_id)


def create_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a doorbell: ours, and one for a child process.

    Raises:
        PlatformError: there are no descriptors left.
    """
    try:
        return socket.socketpair()
    except OSError as error:
        raise PlatformError(f"no doorbell can be made: {error.strerror}") from error
