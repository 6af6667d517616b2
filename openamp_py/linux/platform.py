"""Processors that this machine's Linux kernel boots: a platform over its remoteproc.

The kernel loads, starts and recovers the core and is the host of its virtio devices. What is left
to us is to say what it shall do, and to see what it did.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl

import trio

from openamp_py.background import plain_errors
from openamp_py.errors import (
    CoreCrashedError,
    ImageError,
    OpenAMPError,
    PeerGoneError,
    PlatformError,
    StateError,
)
from openamp_py.linux.access import Access, MachineAccess
from openamp_py.linux.dump import decode_dump_untrusted
from openamp_py.linux.faults import denied, write_fault
from openamp_py.linux.tree import DEBUG, FIRMWARE_PATH, LinuxProcessor, TreeReader, WaitingDump
from openamp_py.memory import MemoryMap
from openamp_py.remoteproc.coredump import Coredump
from openamp_py.remoteproc.crash import CoredumpMode, CrashPolicy
from openamp_py.remoteproc.elf import Firmware
from openamp_py.remoteproc.images import decode_image_untrusted
from openamp_py.remoteproc.plan import LoadPlan, Translate
from openamp_py.remoteproc.platform import Core, Platform

_logger = logging.getLogger(__name__)

SCHEME: Final = "linux"

DEFAULT_DIRECTORY: Final = "/lib/firmware"
"""Where the kernel looks for firmware after its own parameter."""

LOOK: Final = 0.25
"""Seconds between looks at the state of a core that runs: no kernel tells of a change."""

QUICK_LOOK: Final = 0.02
"""The same while the core is on its way from one state to another."""

_SETTLE: Final = 0.5
"""Seconds after which a core that is off while the kernel recovers it was stopped instead."""

_RECOVERY_LIMIT: Final = 10.0
"""Seconds after which a core that is still reported as crashed is not waited for any more."""

_DUMP_WAIT: Final = 1.0
"""Seconds that the coredump of a core that is back has to appear."""

_STOPS: Final = 64
"""Users that may have started the core: the kernel counts them, and each needs its own stop."""

_DUMP_LIMIT: Final = 1 << 30
"""Bytes of the largest coredump that is read."""

_PIECE: Final = 1 << 20
"""Bytes that are read at once, so that other tasks run."""

_UP: Final = ("running", "attached")
_VDEV: Final = re.compile(r"rproc-virtio\..+|.+#vdev[0-9]+buffer")  # since Linux 6.1, and before
_VIRTIO: Final = re.compile(r"virtio[0-9]+")
_TRACE: Final = re.compile(r"trace[0-9]{1,3}")
_TRACE_SIZE: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class LinuxFirmware(Firmware):
    """Firmware that the kernel loads itself: its segments and its table are not seen here.

    Attributes:
        image: the file's bytes; None: what is set already.
    """

    image: bytes | None = None


AS_SET: Final = LinuxFirmware()
"""What the processor has in its `firmware` file."""


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a processor was set to when it was found; None: it could not be read."""

    firmware: str | None
    recovery: str | None
    coredump: str | None


class LinuxPlatform(Platform):
    """A processor in /sys/class/remoteproc, by the name that its driver gave it.

    Owned by its RemoteProcessor. The kernel has the memory: `map` and `suspend` are refused, the
    table and the virtio devices are not seen, and `open_host_bus` gives a bus over /dev/rpmsg*.
    A core that ran before is left running when the processor's block ends; `stop` and `shutdown`
    stop it all the same. `detach` leaves the core running; one that is attached the kernel lets
    go of, too.

    Args:
        processor: its name (the file `name`), or the kernel's (``remoteproc0``) where no other
            has that.
        access: the machine; by default the one that this runs on.
        firmware: name of a file that the kernel finds itself; by default what is set, or the
            image that is booted.
        recovery: whether the kernel starts a crashed core again; None leaves it as it is.
        coredump: when the kernel keeps a crashed core's memory; None leaves it as it is.
        replace: stop a core that runs when other firmware is to be booted, instead of refusing.
        restore: set firmware, recovery and coredump back to what they were, at the end.
        directory: where images are put for the kernel to find; by default its own parameter's
            directory, or /lib/firmware.
        look: seconds between looks at the state.

    Raises:
        ValueError: no name, of the processor or of the firmware.
    """

    def __init__(
        self,
        processor: str,
        *,
        access: Access | None = None,
        firmware: str | None = None,
        recovery: bool | None = None,
        coredump: CoredumpMode | None = None,
        replace: bool = False,
        restore: bool = True,
        directory: str | os.PathLike[str] | None = None,
        look: float = LOOK,
    ) -> None:
        if not processor:
            raise ValueError("which processor? Name it (linux:NAME); `openamp list` shows them")
        if firmware == "":
            raise ValueError("the name of the firmware is empty; without one, what is set is used")
        self.name = f"{SCHEME}:{processor}"
        self.memory = MemoryMap([])
        self.access: Access = MachineAccess() if access is None else access
        self.bus_lost = trio.Event()
        self.look = look
        self._processor = processor
        self._firmware = firmware
        self._recovery = recovery
        self._coredump = coredump
        self._replace = replace
        self._restore = restore
        self._directory = directory
        self._path = ""
        self._settings: _Settings | None = None
        self._staged: Path | None = None
        self._search_path: bytes | None = None
        self._old_dumps: frozenset[str] = frozenset()
        self._crashed = False
        self._joins = False
        self._must_stop = False

    @classmethod
    def parse(cls, url: str) -> LinuxPlatform:
        """The platform of a URL: ``linux:NAME[?firmware=FILE][&replace=1][&restore=0]``.

        Raises:
            ValueError: it is no such URL.
        """
        scheme, _, rest = url.partition(":")
        processor, _, query = rest.partition("?")
        if scheme != SCHEME:
            raise ValueError(f"{url!r} is not a {SCHEME}: URL")
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
        firmware = options.pop("firmware", None)
        flags = {}
        for name, default in (("replace", "0"), ("restore", "1")):
            value = options.pop(name, default)
            if value not in ("0", "1"):
                raise ValueError(f"{name}={value} in {url!r}; 0 and 1 are possible")
            flags[name] = value == "1"
        if options:
            known = "firmware, replace, restore"
            raise ValueError(f"unknown {', '.join(options)} in {url!r}; there are {known}")
        return cls(processor, firmware=firmware, replace=flags["replace"], restore=flags["restore"])

    # What the kernel says

    def find(self) -> LinuxProcessor:
        """The processor as it is now.

        Raises:
            PlatformError: there is none of that name, or more than one; says which there are.
        """
        found = TreeReader(self.access).processors()
        named = [each for each in found if each.name == self._processor]
        named = named or [each for each in found if each.kernel_name == self._processor]
        if len(named) == 1:
            self._path = named[0].path
            return named[0]
        names = ", ".join(str(each.name) for each in found)
        if named:
            which = ", ".join(each.kernel_name for each in named)
            raise PlatformError(
                f"{len(named)} processors are called {self._processor!r}: {which}; name one of them"
            )
        there = f"there are: {names}" if names else "there is none (`openamp doctor` tells why)"
        raise PlatformError(f"no processor {self._processor!r} on this machine; {there}")

    @property
    def kernel_name(self) -> str:
        """``remoteproc0``; until the driver is loaded anew."""
        return self._path.rpartition("/")[2]

    def state(self) -> str:
        """The kernel's word for where the processor stands.

        Raises:
            PlatformError: it is gone, or cannot be read.
        """
        return self._read("state")

    def waiting_dump(self) -> WaitingDump | None:
        """The coredump of this processor that waits to be read, and was not there at the start."""
        return next(
            (dump for dump in self._dumps() if dump.kernel_name not in self._old_dumps), None
        )

    def virtio_devices(self) -> frozenset[tuple[str, int]]:
        """The processor's virtio devices: others after each start, also where it is as before.

        A recovery may be over before anybody looks, but what it made is new.
        """
        found = set()
        with contextlib.suppress(OSError):  # they come and go
            for parent in filter(_VDEV.fullmatch, self.access.names(self._path)):
                directory = f"{self._path}/{parent}"
                for name in filter(_VIRTIO.fullmatch, self.access.names(directory)):
                    found.add((name, self.access.stat(f"{directory}/{name}").st_ino))
        return frozenset(found)

    def explain_loss(self, what: str) -> OpenAMPError:
        """Why a link of the core has ended, as far as the kernel says it now."""
        with contextlib.suppress(PlatformError):
            state = self.state()
            if state == "crashed":
                return self.crash("the kernel reports it as crashed")
            return PeerGoneError(f"{self.name}: {what}; the processor is {state}")
        return PeerGoneError(f"{self.name}: {what}, and so is the processor")

    def read_trace(self, name: str | None) -> bytes:
        """A trace buffer's text.

        Args:
            name: ``trace0``; by default the first.

        Raises:
            KeyError: there is none of that name.
            AccessDeniedError: only root sees debugfs.
            PlatformError: it cannot be read.
        """
        wanted = "trace0" if name is None else name
        directory = f"{DEBUG}/{self._located()}"
        try:
            names = sorted(n for n in self.access.names(directory) if _TRACE.fullmatch(n))
            if wanted not in names:
                there = ", ".join(names) or "none"
                raise KeyError(f"no trace buffer {wanted!r}; there are: {there}")
            return self.access.read(f"{directory}/{wanted}", _TRACE_SIZE)
        except PermissionError as error:
            raise denied(directory, error) from error
        except OSError as error:
            raise PlatformError(
                f"{directory}/{wanted} cannot be read: {error}; is debugfs mounted, and does the "
                "core run?"
            ) from error

    async def fetch_coredump(self, path: str | os.PathLike[str]) -> int:
        """Writes the coredump that the kernel keeps of this processor into a file.

        The kernel drops it then, so that it can take the next one.

        Returns:
            Its size in bytes.

        Raises:
            PlatformError: there is none, or it cannot be read.
            OSError: the file cannot be written.
        """
        self.find()
        dump = next(iter(self._dumps()), None)
        if dump is None:
            raise PlatformError(f"{self.name}: the kernel keeps no coredump of it{self._mode()}")
        data = await self._read_dump(dump)
        await trio.Path(path).write_bytes(data)
        await self._dismiss(dump)
        return len(data)

    # What it is told

    async def tell(self, file: str, word: str) -> None:
        """Writes a word into one of the processor's files: ``state``, ``recovery``...

        Raises:
            AccessDeniedError: this user may not.
            StateError: not now.
            ImageError: the firmware is missing or refused.
            PlatformError: anything else.

        Cancellation: before it is written only.
        """
        self._located()
        path = f"{self._path}/{file}"
        try:
            await self.access.write(path, word.encode())
        except OSError as error:
            fault = write_fault(path, word, error)
            fault.add_note(
                f"the processor is {self.word('state')}, its firmware is {self.word('firmware')!r}"
            )
            raise fault from error

    async def stop_core(self) -> None:
        """Stops the core, whoever has started it.

        Raises:
            PlatformError: it still runs.
        """
        for _ in range(_STOPS):
            state = self.state()
            if state in ("offline", "detached"):
                return
            try:
                await self.tell("state", "stop")
            except OpenAMPError:
                if self.state() not in ("offline", "detached"):  # not somebody else at this moment
                    raise
        raise PlatformError(f"{self.name} still runs: it was started more than {_STOPS} times")

    # What a RemoteProcessor asks of it

    def heed(self, policy: CrashPolicy) -> None:
        """A coredump that the policy wants, the kernel has to take."""
        if self._coredump is None and policy.coredump is not CoredumpMode.DISABLED:
            self._coredump = policy.coredump

    async def prepare(self) -> None:
        """Finds the processor, and sets what was asked for."""
        await trio.lowlevel.checkpoint()
        found = self.find()
        if self._settings is None:
            self._settings = _Settings(found.firmware, found.recovery, found.coredump)
        self._old_dumps = frozenset(dump.kernel_name for dump in self._dumps())
        if self._old_dumps:
            _logger.warning(
                "%s: an older coredump waits (%s); the kernel takes no other until it is fetched",
                self.name,
                ", ".join(self._old_dumps),
            )
        wanted = {
            "recovery": None if self._recovery is None else _ENABLED[self._recovery],
            "coredump": None if self._coredump is None else self._coredump.value,
        }
        for file, word in wanted.items():
            if word is not None and self.word(file) != word:
                await self.tell(file, word)

    async def unprepare(self) -> None:
        """Sets back what was changed, if that is wanted."""
        self._crashed = False
        if self._must_stop:  # it crashed, and the kernel may have it running again
            # While the kernel recovers it, its state is offline: a stop waits for the end of that.
            with contextlib.suppress(StateError):
                await self.tell("state", "stop")
            await self.stop_core()
            self._must_stop = False
        settings, self._settings = self._settings, None
        if settings is not None and self._restore:
            with contextlib.suppress(PlatformError):  # it may be gone
                await self._set_back(settings)
        if self._restore and self._staged is not None:
            staged, self._staged = self._staged, None
            staged.unlink(missing_ok=True)
        if self._search_path is not None:
            before, self._search_path = self._search_path, None
            with contextlib.suppress(OSError):
                await self.access.write(FIRMWARE_PATH, before or b"\0")
        await trio.lowlevel.checkpoint()

    def decode(self, data: bytes) -> LinuxFirmware:
        """An image for the kernel, which does the rest itself.

        Raises:
            FirmwareError: it cannot be used. An RPMsg device without two vrings would crash the
                kernel when it is stopped.
        """
        firmware = decode_image_untrusted(data)
        return LinuxFirmware(
            elf_class=firmware.elf_class,
            machine=firmware.machine,
            machine_name=firmware.machine_name,
            entry=firmware.entry,
            arm_architecture=firmware.arm_architecture,
            image=bytes(data),
        )

    def check(self, firmware: Firmware) -> None:
        """Raises ImageError for what is no file: only the kernel loads, and it loads files."""
        if not isinstance(firmware, LinuxFirmware) or firmware.segments or firmware.table:
            raise ImageError(
                f"{self.name}: the kernel loads whole files: give a path or bytes, and no table "
                "of its own"
            )

    async def load(self, plan: LoadPlan, translate: Translate) -> None:
        """Puts the image where the kernel finds it, and says its name.

        A core that crashed is started again by the kernel, with what it has.
        """
        firmware = plan.firmware
        assert isinstance(firmware, LinuxFirmware), "checked"
        self._joins = False
        state = self.state()
        if self._crashed and state != "offline":
            return
        if state == "crashed":
            await self.stop_core()
        elif state in _UP:
            self._joins = firmware.image is None and self._firmware is None
            if not self._joins:
                await self._make_room(state)
        elif state == "detached" and firmware.image is not None:
            raise PlatformError(
                f"{self.name} executes already what the boot loader has started, and the kernel "
                "has not attached to it: it takes no firmware; leave the image out"
            )
        name = self._firmware
        if firmware.image is not None:
            name = await self._stage(firmware.image)
        if name is not None and self.word("firmware") != name:
            await self.tell("firmware", name)

    def create_core(self, firmware: Firmware) -> LinuxCore:
        """What the kernel is about to start."""
        return LinuxCore(self, firmware, owned=not self._joins)

    async def attach_core(self) -> LinuxCore:
        """What the kernel runs, or what a boot loader has started.

        Raises:
            PlatformError: nothing runs.
        """
        await trio.lowlevel.checkpoint()
        state = self.state()
        if state not in (*_UP, "detached"):
            raise PlatformError(f"{self.name} cannot be attached to: it is {state}")
        return LinuxCore(self, AS_SET, owned=False)

    async def take_coredump(self, failure: OpenAMPError | None) -> Coredump:
        """The kernel's coredump of a core that crashed.

        The kernel takes it when it recovers the core; where its recovery is disabled, it is told
        to recover this once.

        Raises:
            PlatformError: there is none.
        """
        with plain_errors():
            async with trio.open_nursery() as nursery:
                if self.word("state") == "crashed" and self.word("recovery") == "disabled":
                    nursery.start_soon(self._recover_quietly)
                dump = await self._wait_dump()
                data = await self._read_dump(dump)
                await self._dismiss(dump)  # also what an inline recovery waits for
        taken = decode_dump_untrusted(data)
        _logger.info("%s: took the kernel's coredump of %d bytes", self.name, len(data))
        return taken

    # Inside

    def note_crash(self, *, owned: bool) -> None:
        """For its core: that has crashed, so the next start is the kernel's recovery.

        Args:
            owned: it was started here, and is to be off in the end.
        """
        self._crashed = True
        self._must_stop = owned

    def note_up(self) -> None:
        """For its core: that is up, and sees to its end itself."""
        self._crashed = self._must_stop = False

    @property
    def is_recovering(self) -> bool:
        """Whether the next start is that of a core that crashed."""
        return self._crashed

    def crash(self, why: str) -> CoreCrashedError:
        """For its core: what its crash is called."""
        return CoreCrashedError(f"{self.name}: {why}; the kernel's log (dmesg) says more")

    def _located(self) -> str:
        if not self._path:
            self.find()
        return self.kernel_name

    def _read(self, file: str) -> str:
        self._located()
        path = f"{self._path}/{file}"
        try:
            data = self.access.read(path)
        except PermissionError as error:
            raise denied(path, error) from error
        except OSError as error:
            raise PlatformError(f"{self.name} is gone: {path}: {error.strerror}") from error
        return data.decode("utf-8", "backslashreplace").rstrip("\n")

    def word(self, file: str) -> str:
        """What a file of the processor says; "unknown" where it cannot be read."""
        try:
            return self._read(file)
        except PlatformError:
            return "unknown"

    def _mode(self) -> str:
        mode = self.word("coredump")
        return "" if mode != "disabled" else " (its mode is `disabled`: see the file `coredump`)"

    def _dumps(self) -> list[WaitingDump]:
        dumps = TreeReader(self.access).dumps()
        return [dump for dump in dumps if dump.processor == self.kernel_name]

    async def _wait_dump(self) -> WaitingDump:
        deadline = trio.current_time() + _DUMP_WAIT
        limit = trio.current_time() + _RECOVERY_LIMIT
        while True:
            dump = self.waiting_dump()
            if dump is not None:
                return dump
            now = trio.current_time()
            if self.word("state") == "crashed":  # the kernel has not begun
                deadline = min(now + _DUMP_WAIT, limit)
            if self.word("coredump") == "disabled" or now >= deadline:
                old = ", ".join(self._old_dumps & {each.kernel_name for each in self._dumps()})
                why = f": an older one ({old}) is in the way" if old else self._mode()
                raise PlatformError(f"{self.name}: the kernel has kept no coredump{why}")
            await trio.sleep(QUICK_LOOK)

    async def _read_dump(self, dump: WaitingDump) -> bytes:
        data = bytearray()
        try:
            while len(data) <= _DUMP_LIMIT:
                piece = self.access.read(dump.data, _PIECE, len(data))
                data += piece
                if len(piece) < _PIECE:
                    break
                await trio.lowlevel.checkpoint()
            if len(data) > _DUMP_LIMIT:
                raise PlatformError(f"{dump.data} has more than {_DUMP_LIMIT} bytes; it stays")
        except PermissionError as error:
            raise denied(dump.data, error) from error
        except OSError as error:
            raise PlatformError(f"{dump.data} cannot be read: {error}") from error
        return bytes(data)

    async def _dismiss(self, dump: WaitingDump) -> None:
        try:
            await self.access.write(dump.data, b"1")
        except OSError as error:
            _logger.warning("%s: the coredump %s stays: %s", self.name, dump.data, str(error))

    async def _recover_quietly(self) -> None:
        """Where this fails, the next start says so."""
        with contextlib.suppress(OpenAMPError):
            await self.tell("recovery", "recover")

    async def _make_room(self, state: str) -> None:
        if not self._replace:
            raise PlatformError(
                f"{self.name} is {state} with {self.word('firmware')!r}: stop it first, or say "
                "that it may be replaced (linux:NAME?replace=1, replace=True); or leave the "
                "image out to use what runs"
            )
        await self.stop_core()

    async def _stage(self, image: bytes) -> str:
        """Puts a file where the kernel looks; its name is nobody else's."""
        if self._staged is not None:
            await trio.Path(self._staged).write_bytes(image)
            return self._staged.name
        chosen = self._directory
        if chosen is None:
            own = TreeReader(self.access).text(FIRMWARE_PATH)
            chosen = self.access.local(own or DEFAULT_DIRECTORY)
        try:
            self._staged = await trio.to_thread.run_sync(_write_file, Path(chosen), image)
        except OSError as error:
            if self._directory is not None:
                raise denied(str(chosen), error) from error
            self._staged = await self._stage_elsewhere(str(chosen), image, error)
        return self._staged.name

    async def _stage_elsewhere(self, chosen: str, image: bytes, refusal: OSError) -> Path:
        """Lets the kernel look in a directory of ours, where its own cannot be written."""
        directory = Path(tempfile.gettempdir()) / f"openamp_py-firmware-{os.getuid()}"
        try:
            before = self.access.read(FIRMWARE_PATH).rstrip(b"\n")
            directory.mkdir(mode=0o700, exist_ok=True)
            found = directory.lstat()
            others = found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if others or not stat.S_ISDIR(found.st_mode):  # a link could lead anywhere
                raise PermissionError(errno.EPERM, "others can change it", str(directory))
            staged = _write_file(directory, image)
            await self.access.write(FIRMWARE_PATH, str(directory).encode())
        except OSError:
            raise denied(chosen, refusal) from refusal
        self._search_path = before
        return staged

    async def _set_back(self, settings: _Settings) -> None:
        for file in ("firmware", "recovery", "coredump"):
            word = getattr(settings, file)
            if word is None or self.word(file) == word:
                continue
            if file == "firmware" and self.word("state") != "offline":
                continue  # it cannot be changed, and is in use
            try:
                await self.tell(file, word)
            except OpenAMPError as error:
                _logger.warning("%s: %s stays: %s", self.name, file, str(error))


_ENABLED: Final = {True: "enabled", False: "disabled"}


class LinuxCore(Core):
    """One run of a core, as the kernel tells of it.

    The kernel does not tell of an end that the firmware finds by itself.
    """

    tells_exit = False

    def __init__(self, platform: LinuxPlatform, firmware: Firmware, *, owned: bool) -> None:
        self.name = f"processor {platform.name}"
        self.memory = platform.memory
        self.machine = firmware.machine
        self.elf_class = firmware.elf_class or 32
        self._platform = platform
        self._owned = owned
        self._leaves = False

    def kick(self, notify_id: int) -> None:
        """The kernel's drivers kick; nobody here has to."""

    def part(self) -> None:
        """The block of the processor ends: a core that ran before goes on."""
        self._leaves = self._leaves or not self._owned

    async def detach(self, note: bytes) -> None:
        """Lets the core run on; one that is attached, the kernel lets go of.

        Args:
            note: nobody keeps it: the kernel remains the host.
        """
        await trio.lowlevel.checkpoint()
        self._leaves = True  # what is seen from now on is nobody else's doing
        try:
            if self._platform.state() == "attached":
                await self._platform.tell("state", "detach")
        except BaseException:
            self._leaves = False
            raise

    async def describe(self) -> str:
        """What the kernel says of it."""
        await trio.lowlevel.checkpoint()
        return f"is {self._platform.state()}, the kernel says"

    async def run(
        self,
        notified: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Has the core started where it is not up, and looks at it until it ends."""
        platform = self._platform
        up = False
        try:
            await self._bring_up()
            await trio.lowlevel.checkpoint_if_cancelled()
            up = True
            platform.bus_lost = trio.Event()
            platform.note_up()
            task_status.started()
            await self._watch()
        except CoreCrashedError:
            platform.note_crash(owned=self._owned)
            raise
        except (PlatformError, PeerGoneError):
            raise
        except BaseException:  # it is ended from here
            if not self._leaves and (up or self._owned):
                with trio.CancelScope(shield=True):
                    await self._stop()
            raise

    async def _stop(self) -> None:
        try:
            await self._platform.stop_core()
        except OpenAMPError as error:
            _logger.error("%s is not stopped: %s", self.name, str(error))

    async def _bring_up(self) -> None:
        platform = self._platform
        state = platform.state()
        if platform.is_recovering and state != "offline":
            await self._wait_recovery()
            return
        if state not in _UP:
            await platform.tell("state", "start")
        state = platform.state()
        if state not in _UP:
            if state == "crashed":
                raise platform.crash("it crashed while it was started")
            raise PlatformError(f"{platform.name} is {state} after its start")

    async def _wait_recovery(self) -> None:
        platform = self._platform
        if platform.state() == "crashed" and platform.word("recovery") == "disabled":
            await platform.tell("recovery", "recover")
        else:
            await self._settled()
        state = platform.state()
        if state not in _UP:
            raise PlatformError(f"{platform.name} is {state}: the kernel did not recover it")

    async def _settled(self) -> str:
        """Waits while the kernel may be recovering the core, and returns its state then."""
        platform = self._platform
        quiet = trio.current_time() + _SETTLE
        limit = trio.current_time() + _RECOVERY_LIMIT
        while True:
            state = platform.state()
            if state in (*_UP, "detached"):
                return state
            waits = platform.waiting_dump() is not None and platform.word("coredump") == "inline"
            stuck = state == "crashed" and platform.word("recovery") == "disabled"
            if stuck or waits:
                return "crashed"
            if state == "crashed":  # the kernel has not begun
                quiet = trio.current_time() + _SETTLE
            if trio.current_time() >= min(quiet, limit):
                return state
            await trio.sleep(QUICK_LOOK)

    async def _watch(self) -> None:
        platform = self._platform
        devices = platform.virtio_devices()
        while True:
            with trio.move_on_after(platform.look):
                await platform.bus_lost.wait()
            if self._leaves:
                await trio.sleep_forever()
            state = platform.state()
            now = platform.virtio_devices()
            if state in _UP and devices <= now:
                devices = now
                platform.bus_lost = trio.Event()
                continue
            if state == "crashed":
                raise platform.crash("the kernel reports it as crashed")
            state = await self._settled()
            if state in _UP or state == "crashed":
                raise platform.crash(
                    "it crashed and the kernel recovers it, or its bus was unbound"
                )
            raise PeerGoneError(f"{platform.name} is {state}: somebody else has stopped it")


def _write_file(directory: Path, image: bytes) -> Path:
    """A new file of a name that nothing had."""
    for number in itertools.count(1):
        path = directory / f"openamp_py-{os.getpid()}-{number}.elf"
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            continue
        try:
            with os.fdopen(file, "wb") as stream:
                stream.write(image)
        except BaseException:
            path.unlink()
            raise
        break
    return path
