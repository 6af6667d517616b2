"""The files of a fake machine: a directory, with what a directory alone cannot play."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from fnmatch import fnmatchcase
from pathlib import Path

import trio

from openamp_py.linux.access import ATTRIBUTE_SIZE, MachineAccess, Node

Store = Callable[[bytes], Awaitable[None]]
"""What a write does; an OSError of it is what the writer sees."""


def fail(code: int, path: str = "") -> OSError:
    """The error that the kernel would give."""
    return OSError(code, os.strerror(code), path or None)


class FakeFiles(MachineAccess):
    """Files below a directory, of which some are hidden, refused, or act when written.

    Patterns are as of ``fnmatch``, and match a file by any of its paths:
    ``/sys/class/remoteproc/*/state`` is also what the link leads to.

    Attributes:
        root: the directory. Programs can read there; only writes through this object act.
        kernel: the parent of all that the kernel and the remotes do.
    """

    def __init__(self, root: Path, kernel: trio.Nursery) -> None:
        super().__init__(root)
        self.kernel = kernel
        self.root = Path(os.path.realpath(root))
        self._denied: dict[str, int] = {}
        self._hidden: set[str] = set()
        self._links: dict[str, str] = {}
        self._stores: dict[str, Store] = {}
        self._nodes: dict[str, Callable[[], Node]] = {}
        self._ends: dict[str, Callable[[], None]] = {}
        self._numbers: dict[str, set[int]] = {}

    # For tests

    def deny(self, pattern: str, mode: int = os.R_OK | os.W_OK) -> None:
        """Takes the permission to read or write; EACCES from now on."""
        self._denied[pattern] = mode

    def hide(self, pattern: str) -> None:
        """Keeps files out of sight: a node that never appears; ENOENT from now on."""
        self._hidden.add(pattern)

    def restore(self, pattern: str) -> None:
        """Takes back what deny and hide did with this very pattern."""
        self._denied.pop(pattern, None)
        self._hidden.discard(pattern)

    def put(self, path: str, data: bytes | str) -> None:
        """Writes a file, with its directories; nobody ever sees half of it."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        new = self.root / ".new"
        new.write_bytes(data.encode() if isinstance(data, str) else data)
        new.replace(target)

    # For the rest of the fake

    def store(self, path: str, data: bytes | str, act: Store) -> None:
        """Makes a file that acts when it is written."""
        self.put(path, data)
        self._stores[path] = act

    def node(self, path: str, opened: Callable[[], Node]) -> None:
        """Makes a device node; a file stands for it in /dev."""
        self.put(path, b"")
        self._nodes[path] = opened

    def link(self, path: str, target: str) -> None:
        """Makes a symbolic link, relative as those of sysfs."""
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(self.root / target.lstrip("/"), place.parent))
        self._links[path] = target

    def directory(self, path: str) -> None:
        """Makes a directory."""
        (self.root / path.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def remove(self, path: str) -> None:
        """Removes a file, link or directory, and the links that lead into it."""
        place = self.root / path.lstrip("/")
        if place.is_dir() and not place.is_symlink():
            # It is kept out of sight: sysfs never gives a new directory the number of an old one.
            gone = self.root / ".gone"
            gone.mkdir(exist_ok=True)
            place.rename(gone / str(len(os.listdir(gone))))
        else:
            place.unlink(missing_ok=True)
        for table in (self._stores, self._nodes, self._ends, self._links):
            for key in [key for key in table if _is_below(key, path)]:
                del table[key]
        for link in [link for link, target in self._links.items() if _is_below(target, path)]:
            self.remove(link)

    def at_end(self, path: str, act: Callable[[], None]) -> None:
        """Calls back when a file was read to its end."""
        self._ends[path] = act

    def take_number(self, kind: str) -> int:
        """The lowest number that is free, as the kernel gives them out."""
        taken = self._numbers.setdefault(kind, set())
        number = next(n for n in range(len(taken) + 1) if n not in taken)
        taken.add(number)
        return number

    def give_number(self, kind: str, number: int) -> None:
        """Gives a number back."""
        self._numbers[kind].discard(number)

    # Access

    def names(self, directory: str) -> list[str]:
        self._check(directory, os.R_OK)
        below = directory.rstrip("/")
        return [name for name in super().names(directory) if not self._gone(f"{below}/{name}")]

    def read(self, path: str, size: int = ATTRIBUTE_SIZE, offset: int = 0) -> bytes:
        self._check(path, os.R_OK)
        data = super().read(path, size, offset)
        act = self._ends.get(super().resolve(path))
        if act is not None and len(data) < size:
            act()
        return data

    def resolve(self, path: str) -> str:
        self._check(path, 0)
        return super().resolve(path)

    def allowed(self, path: str, mode: int) -> bool:
        try:
            self._check(path, mode)
        except OSError:
            return False
        return super().allowed(path, os.F_OK)

    def stat(self, path: str) -> os.stat_result:
        self._check(path, 0)
        return super().stat(path)

    async def write(self, path: str, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._check(path, os.W_OK)
        act = self._stores.get(super().resolve(path))
        if act is None:
            raise fail(errno.EACCES, path)
        await self._carry_out(act, data)

    def open_node(self, path: str) -> Node:
        self._check(path, os.R_OK | os.W_OK)
        opened = self._nodes.get(super().resolve(path))
        if opened is None:
            raise fail(errno.ENXIO, path)
        return opened()

    async def _carry_out(self, act: Store, data: bytes) -> None:
        """Lets the kernel's own task act: as there, the writer's end does not end it."""
        errors = [fail(errno.ENODEV)]  # what a writer sees when the whole fake is closed meanwhile
        done = trio.Event()

        async def run() -> None:
            try:
                await act(data)
                errors.clear()
            except OSError as error:
                errors[0] = error
            finally:
                done.set()

        self.kernel.start_soon(run)
        with trio.CancelScope(shield=True):
            await done.wait()
        if errors:
            raise errors[0]

    def _paths(self, path: str) -> list[str]:
        """The path, where it really lies, and all that links make of that."""
        try:
            real = super().resolve(path)
        except OSError:
            return [path]
        links = [
            link + real.removeprefix(target)
            for link, target in self._links.items()
            if _is_below(real, target)
        ]
        return [path, real, *links]

    def _gone(self, path: str) -> bool:
        return self._matches(path, self._hidden)

    def _matches(self, path: str, patterns: set[str]) -> bool:
        if not patterns:
            return False
        paths = self._paths(path)
        return any(fnmatchcase(each, pattern) for each in paths for pattern in patterns)

    def _check(self, path: str, mode: int) -> None:
        if self._gone(path):
            raise fail(errno.ENOENT, path)
        if self._matches(path, {pattern for pattern, no in self._denied.items() if no & mode}):
            raise fail(errno.EACCES, path)


def _is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(f"{directory}/")
