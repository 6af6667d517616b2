"""Where a debugger finds a core that waits for it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import Final

from openamp_py.errors import PlatformError

_UNIX: Final = "unix:"
_HIGHEST_PORT: Final = 65535


class Listener:
    """A listening socket that an emulator takes over.

    Owned by a platform, which opens and closes it.

    Args:
        address: a TCP port of this machine ("0": any free one), or "unix:PATH".

    Raises:
        ValueError: the address is neither.
    """

    def __init__(self, address: str) -> None:
        self._path = address.removeprefix(_UNIX) if address.startswith(_UNIX) else None
        self._port = 0
        self.socket: socket.socket | None = None
        if self._path is None:
            if not address.isdecimal() or not 0 <= int(address) <= _HIGHEST_PORT:
                raise ValueError(
                    f"no place for a debugger: {address!r}; a port (0 to {_HIGHEST_PORT}) or "
                    "unix:PATH is possible"
                )
            self._port = int(address)
        elif not self._path or "\0" in self._path:
            raise ValueError(f"no place for a debugger: {address!r}; unix: needs a path")

    @property
    def address(self) -> str:
        """What a debugger's "target remote" takes."""
        if self._path is not None:
            return self._path
        return f"localhost:{self.socket.getsockname()[1] if self.socket else self._port}"

    def open(self) -> None:
        """Begins to listen.

        Raises:
            PlatformError: somebody else does, or it is not allowed.
        """
        family = socket.AF_INET if self._path is None else socket.AF_UNIX
        where = ("127.0.0.1", self._port) if self._path is None else self._path
        try:
            with contextlib.ExitStack() as stack:
                made = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                made.bind(where)
                made.listen(1)
                stack.pop_all()
        except OSError as error:
            cure = ""
            if error.errno == errno.EADDRINUSE:
                cure = "; choose another" if self._path is None else "; remove it if nobody listens"
            raise PlatformError(
                f"a debugger cannot be waited for at {self.address}: "
                f"{error.strerror or error}{cure}"
            ) from error
        self.socket = made

    def close(self) -> None:
        """Listens no more. Idempotent."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None
            if self._path is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path)
