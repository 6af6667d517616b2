"""Unix stream sockets by their paths: listening where nobody does, connecting to who will."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from openamp_py.errors import PlatformError

# How often a connector looks whether its peer is there yet (seconds): doubling, from, to.
_CONNECT_EVERY = (0.005, 0.2)

# The flag in /proc/net/unix of a socket that accepts connections (__SO_ACCEPTCON).
_ACCEPTS = 0x10000


@contextmanager
def open_listener(path: str, what: str) -> Iterator[socket.socket]:
    """Listens on a path during a `with` block; a socket that nobody listens on is replaced.

    Args:
        what: what the socket is, for messages.

    Raises:
        PlatformError: another program listens there, it is another kind of file, or there cannot
            be one.
    """
    with contextlib.ExitStack() as stack:
        try:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.setblocking(False)
            if os.path.lexists(path):
                if not stat.S_ISSOCK(os.lstat(path).st_mode):
                    raise PlatformError(f"{what} {path}: it exists and is not a socket")
                if _is_listening(path):
                    raise PlatformError(f"{what} {path}: another program listens on it")
                os.unlink(path)
            listener.bind(path)
            stack.callback(_unlink, path)
            listener.listen(1)
        except OSError as error:
            raise PlatformError(f"{what} {path}: {error.strerror or error}") from error
        yield listener


async def accept(listener: socket.socket) -> socket.socket:
    """Waits for one peer."""
    while True:
        await trio.lowlevel.wait_readable(listener)
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            return listener.accept()[0]


async def connect(path: str, what: str) -> socket.socket:
    """Connects as soon as the peer listens.

    Raises:
        PlatformError: that is not possible there.
    """
    pause, longest = _CONNECT_EVERY
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(path)
            await trio.lowlevel.checkpoint()
            return sock
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            sock.close()
        except OSError as error:
            sock.close()
            raise PlatformError(f"{what} {path}: {error.strerror or error}") from error
        except BaseException:
            sock.close()
            raise
        await trio.sleep(pause)
        pause = min(2 * pause, longest)


def _is_listening(path: str) -> bool:
    """Whether a program accepts connections there. To connect would make us its one peer."""
    with open("/proc/net/unix") as sockets:
        next(sockets)
        for line in sockets:
            # Num, RefCount, Protocol, Flags, Type, St, Inode, Path
            fields = line.rstrip("\n").split(None, 7)
            if len(fields) == 8 and fields[7] == path and int(fields[3], 16) & _ACCEPTS:
                return True
    return False


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
