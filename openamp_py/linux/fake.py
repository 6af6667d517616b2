"""A fake machine with remote processors, for tests of programs that drive Linux boards.

    async with open_fake_tree() as tree:
        m4 = tree.add_processor("m4")            # runs an echo when it is started
        await tree.write(f"{m4.path}/state", b"start")
        ...
        m4.crash()                               # and the kernel recovers it

A program that takes an ``Access`` takes the tree in its place. What the files do, and with which
errno they refuse, is what Linux 6.1 does.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from openamp_py.background import open_background
from openamp_py.constants import ECHO_CHANNEL
from openamp_py.linux.fake_bus import RAW, FakeBus, FakeRemote, Service
from openamp_py.linux.fake_files import FakeFiles, fail
from openamp_py.linux.tree import DEBUG, DUMPS, FIRMWARE_PATH, PROCESSORS, RELEASE
from openamp_py.remoteproc.coredump import Coredump, encode_coredump

MODULES: Final = ("virtio_rpmsg_bus", "rpmsg_ctrl", "rpmsg_char", "rpmsg_tty")
"""Modules of a fake machine, where not said otherwise."""

FIRMWARE: Final = "fake.elf"
"""Name of the firmware that a fake processor has from the beginning."""

_MEMORY: Final = "/dev/shm"
_EM_ARM: Final = 40
_DUMP_KEPT: Final = 300.0
"""Seconds that an inline dump waits for its reader (devcoredump.c, DEVCD_TIMEOUT)."""

Hook = Callable[[], Awaitable[None]]
"""What a driver does in start, stop, attach, detach or recover; an OSError of it refuses."""


async def fake_echo(remote: FakeRemote) -> None:
    """The remote's application where none is given: returns every message to its sender.

    It announces OpenAMP's echo channel at 1024 and rpmsg-raw at 1025, but answers at any address.
    """
    remote.announce(ECHO_CHANNEL, 1024)
    remote.announce(RAW, 1025)
    remote.trace(f"booted: echo of {remote.firmware}\n")
    async for message in remote:
        remote.send(message.payload, message.source, source=message.destination)


@asynccontextmanager
async def open_fake_tree(
    *, release: str = "6.1.0-fake", modules: Collection[str] = MODULES
) -> AsyncIterator[FakeTree]:
    """Makes a fake machine in a directory of its own, which is removed in the end.

    Args:
        release: the kernel's version that it says it has.
        modules: those that are loaded. Without virtio_rpmsg_bus a started processor has no
            channels, without rpmsg_ctrl no control node, without rpmsg_char no endpoints.
    """
    # Where files are replaced in memory: some file systems flush each to its disk.
    place = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="openamp-fake-", dir=place) as root:
        async with open_background() as kernel:
            tree = FakeTree(Path(root), kernel)
            tree.put(RELEASE, f"{release}\n")
            tree.put(FIRMWARE_PATH, "\n")
            tree.put(f"/lib/firmware/{FIRMWARE}", b"\x7fELF")
            for name in ("dev", "sys/class/remoteproc", "sys/bus/rpmsg/devices"):
                tree.directory(f"/{name}")
            for module in modules:
                tree.directory(f"/sys/module/{module}")
            try:
                yield tree
            finally:
                tree.close()


class FakeTree(FakeFiles):
    """A fake machine: an ``Access``, and the hand that makes things happen in it.

    ``open_fake_tree`` creates and closes it. All methods belong to its trio run.
    """

    def __init__(self, root: Path, kernel: trio.Nursery) -> None:
        super().__init__(root, kernel)
        self._processors: list[FakeProcessor] = []

    def add_processor(
        self,
        name: str,
        *,
        service: Service = fake_echo,
        firmware: str = FIRMWARE,
        attached: bool = False,
        buffers: int = 256,
        full: int = errno.EAGAIN,
    ) -> FakeProcessor:
        """Adds a processor, as the load of its driver does.

        Args:
            name: the driver's name for it.
            service: what it runs from each start on.
            firmware: its image; it is looked for at start, where the kernel looks.
            attached: something else has started it: state detached, and the first start attaches.
            buffers: messages on their way to it that fill the bus.
            full: errno of a full bus; ENOMEM on older kernels.
        """
        processor = FakeProcessor(
            self,
            f"remoteproc{len(self._processors)}",
            name,
            service,
            firmware,
            attached,
            buffers=buffers,
            full=full,
        )
        self._processors.append(processor)
        return processor

    def close(self) -> None:
        """Removes all processors: files that are open are dead. The directory stays."""
        for processor in self._processors:
            processor.remove()


class FakeProcessor:
    """A processor of a fake machine. ``FakeTree.add_processor`` creates it.

    Attributes:
        name: the driver's name for it.
        kernel_name: ``remoteprocN``.
        hooks: what its driver does in ``start``, ``stop``, ``attach``, ``detach`` and ``recover``,
            before the state changes: wait, or refuse with an ``OSError``.
        dump: what a coredump of it is.
        remote: what it runs now; None while it does not.
    """

    def __init__(
        self,
        tree: FakeTree,
        kernel_name: str,
        name: str,
        service: Service,
        firmware: str,
        attached: bool,
        *,
        buffers: int,
        full: int,
    ) -> None:
        self.name = name
        self.kernel_name = kernel_name
        self.hooks: dict[str, Hook] = {}
        self.dump = b"".join(encode_coredump(Coredump(_EM_ARM, 32, 0)))
        self.remote: FakeRemote | None = None
        self._tree = tree
        self._path = f"/sys/devices/platform/fake.{name.replace('/', '!')}/remoteproc/{kernel_name}"
        self._service = service
        self._firmware = firmware
        self._buffers, self._full = buffers, full
        self._virtio = f"{self._path}/rproc-virtio.0.auto"
        self._state = "detached" if attached else "offline"
        self._power = 0
        self._recovery = "enabled"
        self._coredump = "disabled"
        self._trace = ""
        self._lock = trio.Lock()
        self._removed = False
        self._bus: FakeBus | None = None
        self._life = trio.CancelScope()
        self._dump_path: str | None = None
        self._dump_read = trio.Event()
        self._add()

    @property
    def state(self) -> str:
        """The word in its sysfs file."""
        return self._state

    @property
    def path(self) -> str:
        """Its directory, ``/sys/class/remoteproc/remoteprocN``."""
        return f"{PROCESSORS}/{self.kernel_name}"

    def crash(self) -> None:
        """The remote is gone, and the driver reports it; recovery begins, where it is enabled.

        Ignored as by the kernel: where it does not run, or has crashed already.
        """
        if self._state not in ("running", "attached"):
            return
        self._life.cancel()
        self._set_state("crashed")
        if self._recovery == "enabled":
            self._tree.kernel.start_soon(self._recover)

    def renumber(self) -> FakeProcessor:
        """Reloads its driver: it comes back offline under the next number, as a new object."""
        self.remove()
        return self._tree.add_processor(
            self.name,
            service=self._service,
            firmware=self._firmware,
            buffers=self._buffers,
            full=self._full,
        )

    def remove(self) -> None:
        """Unloads its driver, for good; again: nothing happens."""
        self._removed = True
        self._state = "offline"
        self._take_down()
        self._drop_dump()
        for directory in (self._path, f"{DEBUG}/{self.kernel_name}"):
            self._tree.remove(directory)

    def _add(self) -> None:
        stores = {
            "state": self._store_state,
            "firmware": self._store_firmware,
            "recovery": self._store_recovery,
            "coredump": self._store_coredump,
        }
        for name, act in stores.items():
            self._tree.store(f"{self._path}/{name}", "", act)
        self._tree.put(f"{self._path}/name", f"{self.name}\n")
        self._tree.store(f"{DEBUG}/{self.kernel_name}/crash", "", self._store_crash)
        self._tree.link(self.path, self._path)
        self._publish()

    def _publish(self) -> None:
        if self._removed:
            return
        firmware = "unknown" if self._state == "attached" else self._firmware
        for name, text in (
            ("state", self._state),
            ("firmware", firmware),
            ("recovery", self._recovery),
            ("coredump", self._coredump),
        ):
            self._tree.put(f"{self._path}/{name}", f"{text}\n")

    def _set_state(self, state: str) -> None:
        self._state = state
        self._publish()

    # What its files do

    async def _store_state(self, data: bytes) -> None:
        act = {b"start": self._boot, b"stop": self._shut_down, b"detach": self._detach}.get(
            data.removesuffix(b"\n")
        )
        if act is None:
            raise fail(errno.EINVAL)
        async with self._lock:
            self._check_there()
            await act()

    async def _store_firmware(self, data: bytes) -> None:
        name = data.partition(b"\n")[0].decode("utf-8", "surrogateescape")
        async with self._lock:
            self._check_there()
            if self._state != "offline":
                raise fail(errno.EBUSY)
            if not name:
                raise fail(errno.EINVAL)
            self._firmware = name
            self._publish()

    async def _store_recovery(self, data: bytes) -> None:
        word = data.removesuffix(b"\n").decode("ascii", "replace")
        if word not in ("enabled", "disabled", "recover"):
            raise fail(errno.EINVAL)
        if word != "recover":
            self._recovery = word
            self._publish()
        if word != "disabled":
            await self._recover()

    async def _store_coredump(self, data: bytes) -> None:
        word = data.removesuffix(b"\n").decode("ascii", "replace")
        if self._state == "crashed":
            raise fail(errno.EBUSY)
        if word not in ("disabled", "enabled", "inline"):
            raise fail(errno.EINVAL)
        self._coredump = word
        self._publish()

    async def _store_crash(self, data: bytes) -> None:
        if not data.strip().isdigit():  # the kind of crash, which only the kernel's log shows
            raise fail(errno.EINVAL)
        self.crash()

    # What the kernel does; under its lock

    async def _boot(self) -> None:
        self._power += 1
        if self._power > 1:  # only counted, even where it has crashed
            return
        attach = self._state == "detached"
        try:
            await self._hook("attach" if attach else "start")
            image = b"" if attach else self._load()
        except OSError:
            self._power -= 1
            raise
        self._bring_up(image)
        self._set_state("attached" if attach else "running")

    async def _shut_down(self) -> None:
        if self._state not in ("running", "attached", "crashed"):
            raise fail(errno.EINVAL)
        await self._leave("stop", "offline")

    async def _detach(self) -> None:
        if self._state != "attached":
            raise fail(errno.EINVAL)
        await self._leave("detach", "detached")

    async def _leave(self, hook: str, state: str) -> None:
        if self._power > 1:
            self._power -= 1
            return
        await self._hook(hook)
        self._power = 0
        self._take_down()
        self._set_state(state)

    async def _recover(self) -> None:
        async with self._lock:
            if self._state != "crashed":
                return
            self._take_down()
            self._set_state("offline")
            try:
                await self._dump()
                await self._hook("recover")
                image = self._load()
            except OSError:
                return  # nobody is told: it is offline, and still counted as started
            self._bring_up(image)
            self._set_state("running")

    async def _hook(self, name: str) -> None:
        hook = self.hooks.get(name)
        if hook is not None:
            await hook()
        self._check_there()

    def _check_there(self) -> None:
        if self._removed:  # while something was waited for
            raise fail(errno.ENODEV)

    def _load(self) -> bytes:
        first = self._tree.read(FIRMWARE_PATH).decode().strip()
        release = self._tree.read(RELEASE).decode().strip()
        places = [first] if first else []
        places += [f"/lib/firmware/{sub}" for sub in (f"updates/{release}", "updates", release, "")]
        for place in places:
            try:
                image = self._tree.read(f"{place.rstrip('/')}/{self._firmware}", 1 << 30)
            except OSError:
                continue
            if not image.startswith(b"\x7fELF"):
                raise fail(errno.EINVAL)
            return image
        raise fail(errno.ENOENT)

    def _bring_up(self, image: bytes) -> None:
        self._bus = FakeBus(self._tree, self._virtio, buffers=self._buffers, full=self._full)
        self._trace = ""
        self._print("")
        self.remote = FakeRemote(self._bus, self._firmware, image, self.crash, self._print)
        self._life = trio.CancelScope()
        self._tree.kernel.start_soon(self._run, self.remote, self._life)

    async def _run(self, remote: FakeRemote, life: trio.CancelScope) -> None:
        with life:
            await self._service(remote)

    def _take_down(self) -> None:
        self._life.cancel()
        self.remote = None
        if self._bus is not None:
            self._bus.close()
            self._bus = None
            self._tree.remove(self._virtio)

    def _print(self, text: str) -> None:
        if self._bus is None:  # a service that was stopped has no say any more
            return
        self._trace += text
        self._tree.put(f"{DEBUG}/{self.kernel_name}/trace0", self._trace)

    # Coredumps

    async def _dump(self) -> None:
        """Makes a dump, unless one of before stands; an inline one is waited for."""
        if self._coredump == "disabled" or self._dump_path is not None:
            return
        name = f"devcd{self._tree.take_number('devcd')}"
        path = self._dump_path = f"/sys/devices/virtual/devcoredump/{name}"
        tree = self._tree

        async def dismiss(data: bytes) -> None:
            self._drop_dump()

        tree.store(f"{path}/data", self.dump, dismiss)
        tree.link(f"{path}/failing_device", self._path)
        tree.link(f"{DUMPS}/{name}", path)
        self._dump_read = trio.Event()
        tree.at_end(f"{path}/data", self._dump_read.set)
        if self._coredump == "inline":
            with trio.move_on_after(_DUMP_KEPT):
                await self._dump_read.wait()
            self._check_there()

    def _drop_dump(self) -> None:
        path, self._dump_path = self._dump_path, None
        self._dump_read.set()
        if path is not None:
            self._tree.remove(path)
