"""The native core: firmware in this machine's own instruction set, run by a child process."""

from __future__ import annotations

import contextlib
import os
import platform as host_machine
from collections.abc import Callable
from pathlib import Path

import trio

from openamp_py import firmware as shipped
from openamp_py.constants import EM_AARCH64, EM_X86_64
from openamp_py.errors import ImageError, PlatformError
from openamp_py.memory import MemoryMap, SharedMemory
from openamp_py.platforms.child import SignalledCore, create_memory, run_child, spawn
from openamp_py.platforms.doorbell import Doorbell, create_pair
from openamp_py.platforms.keeper import Description, KeptCore, connect_keeper
from openamp_py.platforms.report import REPORT_SIZE, judge
from openamp_py.remoteproc.elf import Firmware, machine_name
from openamp_py.remoteproc.platform import Platform

RAM_DA = 0x2000_0000
"""Where the core's RAM begins: below 4 GiB, because a resource table holds u32 addresses."""

RAM_SIZE = 16 << 20
"""Bytes of RAM; only what is touched costs memory."""

_MACHINES = {"x86_64": EM_X86_64, "aarch64": EM_AARCH64}
"""ELF machine numbers by the name of the machine."""

_CLASS = 64


def native_machine() -> int | None:
    """ELF's number of this machine; None where there is no native core."""
    return _MACHINES.get(host_machine.machine())


def is_native(firmware: Firmware) -> bool:
    """Whether an image is built for this machine."""
    return (firmware.machine, firmware.elf_class) == (native_machine(), _CLASS)


class NativePlatform(Platform):
    """Memory and cores for firmware that is built for this machine.

    Args:
        ram_da: device address at which the firmware is linked; by default 0x20000000.
        ram_size: bytes of RAM, a multiple of the page size; by default 16 MiB.
        rendezvous: path of a socket. Given, cores are started under a keeper that listens there:
            they can be left running, and attached to by another host of the same user.

    Raises:
        PlatformError: this machine's instruction set is not supported.
    """

    name = "native"

    def __init__(
        self,
        *,
        ram_da: int = RAM_DA,
        ram_size: int = RAM_SIZE,
        rendezvous: str | os.PathLike[str] | None = None,
    ) -> None:
        machine = native_machine()
        if machine is None:
            raise PlatformError(
                f"the native core runs on {' and '.join(_MACHINES)}; this machine is "
                f"{host_machine.machine()}"
            )
        self._machine = machine
        self._ram_da = ram_da
        self._ram_size = ram_size
        self._rendezvous = None if rendezvous is None else os.fspath(rendezvous)
        self._attached: KeptCore | None = None
        self._use(create_memory("openamp-native-ram", ram_size), ram_da)

    def _use(self, shared: SharedMemory, ram_da: int) -> None:
        self._shared = shared
        self.memory = MemoryMap([shared.region("ram", ram_da)])

    def _renew(self) -> None:
        """Memory for the next core: what there was belongs to one that runs on without us."""
        fresh = create_memory("openamp-native-ram", self._ram_size)
        self._shared.close()
        self._use(fresh, self._ram_da)

    def check(self, firmware: Firmware) -> None:
        """Raises ImageError unless the image is for this machine and begins in its RAM."""
        if not is_native(firmware):
            raise ImageError(
                f"the image is for {firmware.machine_name or 'no machine'} "
                f"({firmware.elf_class} bit); this one runs "
                f"{machine_name(self._machine)} ({_CLASS} bit)"
            )
        if self.memory.find_da(firmware.entry, 1) is None:
            raise ImageError(
                f"entry point {firmware.entry:#x} lies outside the core's memory: {self.memory}"
            )

    def create_core(self, firmware: Firmware) -> NativeCore | KeptCore:
        """A core that will run the loaded image."""
        ram = self.memory.regions[0]
        if self._rendezvous is None:
            window = f"{ram.da:#x}:{ram.size:#x}:0"
            return NativeCore(self.memory, self._shared.fd, window, firmware)
        description = Description(
            firmware.machine,
            firmware.elf_class,
            ram.da,
            ram.size,
            firmware.entry,
            firmware.table_da,
        )
        return KeptCore(
            self._rendezvous, self.memory, description, self._shared.fd, left=self._renew
        )

    async def attach_core(self) -> KeptCore:
        """The core that was left running at the rendezvous; its memory becomes the platform's.

        Raises:
            PlatformError: there is none, or it has another host, or it is none of ours.

        Cancellation: the core stays with its keeper.
        """
        if self._rendezvous is None:
            raise PlatformError(
                "a native core is attached to at its rendezvous: NativePlatform(rendezvous=PATH)"
            )
        self._let_go()
        connection, description, note = await connect_keeper(self._rendezvous)
        try:
            shared = SharedMemory(os.dup(connection.memory), description.ram_size)
        except (OSError, ValueError) as error:
            connection.close()
            raise PlatformError(f"memory of the core at {self._rendezvous}: {error}") from error
        self._shared.close()
        self._use(shared, description.ram_da)
        self._attached = KeptCore(
            self._rendezvous,
            self.memory,
            description,
            shared.fd,
            connection=connection,
            note=note,
            left=self._renew,
        )
        return self._attached

    async def unprepare(self) -> None:
        """Lets go of a core that was to be attached and was not."""
        self._let_go()

    def _let_go(self) -> None:
        if self._attached is not None and self._attached.close():
            self._renew()
        self._attached = None

    def close(self) -> None:
        """Gives the RAM back. Idempotent."""
        if self._attached is not None:
            self._attached.close()
        self._shared.close()


class NativeCore(SignalledCore):
    """One boot of the native core: a child process, its doorbell and its last words."""

    name = "native core"

    def __init__(self, memory: MemoryMap, fd: int, window: str, firmware: Firmware) -> None:
        self.memory = memory
        self.table_da = firmware.table_da
        self.machine = firmware.machine
        self.elf_class = firmware.elf_class
        self._fd = fd
        self._window = window
        self._entry = firmware.entry

    async def run(
        self,
        notified: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Boots the core and listens to it until it ends. See `Link.run`."""
        with contextlib.ExitStack() as stack:
            ours, theirs = create_pair()
            stack.callback(theirs.close)
            self.doorbell = Doorbell(ours)
            stack.callback(self.doorbell.close)
            # Memory of just its size: still there after any death, and never more than that.
            report = create_memory("openamp-report", REPORT_SIZE)
            stack.callback(report.close)
            process = spawn(
                [
                    shipped.path("native-core"),
                    str(self._fd),
                    str(theirs.fileno()),
                    str(report.fd),
                    hex(self._entry),
                    self._window,
                ],
                pass_fds=(self._fd, theirs.fileno(), report.fd),
            )
            theirs.close()
            self.pid = process.pid
            self._alive = True
            stack.callback(setattr, self, "_alive", False)
            await run_child(process, self.doorbell, notified, task_status)
            judge(process.returncode, os.pread(report.fd, REPORT_SIZE, 0))

    async def detach(self, note: bytes) -> None:
        """Refused: the core ends with its host.

        Raises:
            PlatformError: always.
        """
        await trio.lowlevel.checkpoint()
        raise PlatformError(
            "a native core can only be left running at a rendezvous: "
            "NativePlatform(rendezvous=PATH)"
        )


def shipped_echo() -> Path:
    """The echo firmware for this machine that comes with the package."""
    return shipped.path("echo-native.elf")
