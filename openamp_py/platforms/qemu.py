"""An emulated core: firmware for another machine, run by QEMU in RAM that both sides map."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import trio

from openamp_py.constants import EM_ARM, NOTIFY_ID_ANY
from openamp_py.errors import (
    CoreCrashedError,
    CoreDiedError,
    CoreResetError,
    CrashKind,
    OpenAMPError,
    PlatformError,
)
from openamp_py.memory import MemoryMap, Region
from openamp_py.platforms.boards import (
    Board,
    Window,
    boot_options,
    check_image,
    find_board,
    find_vectors,
)
from openamp_py.platforms.child import create_memory, killed
from openamp_py.platforms.debugger import Listener
from openamp_py.platforms.machine import MIN_VERSION, Machine, Tail, find_program
from openamp_py.platforms.qmp import Qmp
from openamp_py.platforms.registers import Fault, find_fault, parse_registers
from openamp_py.remoteproc.elf import Firmware
from openamp_py.remoteproc.platform import Core, Platform

HALT_BYTE: Final = 0xF0
"""A doorbell byte from here on switches the core off, on boards that have no way to do it; the
exit code is what it is above this."""

_CONSOLE_LIMIT: Final = 1 << 16
_WORDS_LIMIT: Final = 1 << 14

_EXAMINE_GRACE: Final = 0.8
"""Seconds that a QEMU whose core has ended has to say how; less than a processor waits for it."""

_START_GRACE: Final = 1.0
"""Seconds that a QEMU which has closed its QMP connection at the start has to end."""

_SPARE_AFTER: Final = 0.02
"""Seconds after a start until the spare for the next one is launched."""

_LOOK_FIRST, _LOOK_LAST = 0.001, 0.25
"""Seconds after the start until it is looked whether kicks arrive, and between looks at last."""

_HONEST_FENCES: Final = (8, 1)
"""Before this version QEMU leaves barriers out where there is one CPU."""

_UNREAD: Final = b"\xff"  # what is shown of memory that nobody could read

_FAULT_STATUS: Final = 0xE000_ED28  # Cortex-M: CFSR, HFSR, DFSR, MMFAR, BFAR
_FAULT_WORDS: Final = 5

_FATAL: Final = "qemu: fatal: "
"""What QEMU says before it aborts because of its core."""

_LINE: Final = "unnamed-gpio-in"  # QEMU's name of an interrupt controller's inputs

_SWITCHED_OFF: Final = ("guest-shutdown", "guest-panic")
"""Reasons of a SHUTDOWN after which QEMU ends with the exit code that the firmware has chosen. The
second is that of a RISC-V core with another code than 0, in versions that do not end at once; a
panic in earnest is an event of its own, which comes first."""

_WORDS_FOR: Final = {
    None: "the core was interrupted",
    "guest-reset": "the core faulted",
    "GUEST_PANICKED": "the core panicked",
    "WATCHDOG": "the core's watchdog has expired",
}
"""What is said of a core that is examined, by the event that QEMU reported."""


class QemuPlatform(Platform):
    """A board of QEMU: its RAM, and a QEMU process for each start.

    Nothing has a name in the file system, and QEMU ends when we do.

    Args:
        board: the board, or its name: `BOARDS` has them, `choose_board` finds one for an image.
        gdb: where the core is to wait for a debugger at each start, before its first instruction:
            a TCP port of this machine, or "unix:PATH".
        kick_interrupt: number of the interrupt that is raised for a kick, for firmware with a
            mailbox interrupt of its own; by default a byte is sent to the doorbell UART. The
            number is the interrupt controller's own; a GIC counts its shared ones from 0, and is
            to be told that this one is an edge.
        spare: keep a QEMU ready for the next start, once there was a first: that takes a few
            milliseconds then.

    Raises:
        ValueError: no such board, or it cannot share its RAM.
        PlatformError: there is no memory.
    """

    def __init__(
        self,
        board: Board | str,
        *,
        gdb: str | None = None,
        kick_interrupt: int | None = None,
        spare: bool = False,
    ) -> None:
        self.board = find_board(board) if isinstance(board, str) else board
        self.name = self.board.name
        if kick_interrupt is not None and not 0 <= kick_interrupt < 1024:
            raise ValueError(f"interrupt {kick_interrupt}; 0 to 1023 are possible")
        self._listener = None if gdb is None else Listener(gdb)
        self._kick_interrupt = kick_interrupt
        self._keeps_spare = spare
        self._spare: tuple[tuple[str, ...], Machine] | None = None
        self._private: dict[Window, memoryview] = {}
        self._console = Tail(_CONSOLE_LIMIT)
        self._shared = create_memory("openamp-qemu-ram", self.board.ram.size)
        whole = self._shared.region("ram", self.board.ram.da)
        window = self.board.window
        start = window.da - whole.da
        view = whole.view[start : start + window.size]
        self.memory = MemoryMap([Region("ram", window.da, window.da, view)])

    @property
    def console(self) -> str:
        """What the core of the latest start wrote to its console: the last 64 KiB."""
        return self._console.text

    def check(self, firmware: Firmware) -> None:
        """Raises ImageError unless the image is for this board."""
        check_image(self.board, firmware)

    async def prepare(self) -> None:
        """Looks for QEMU, and opens the debugger's door."""
        find_program(self.board)
        if self._listener is not None:
            self._listener.open()

    async def unprepare(self) -> None:
        """Closes the debugger's door."""
        if self._listener is not None:
            self._listener.close()

    def translate(self, da: int, size: int) -> memoryview | None:
        """The memory at a device address: shared, or what is loaded into RAM that is not."""
        found = self.memory.find_da(da, size)
        if found is not None:
            return found
        for window in self.board.private:
            if window.holds(da, size):
                if window not in self._private:
                    self._private[window] = memoryview(bytearray(window.size))
                return self._private[window][da - window.da :][:size]
        return None

    def private_parts(self, firmware: Firmware) -> list[tuple[int, memoryview]]:
        """What an image has in RAM that is not shared: device addresses and our copies."""
        parts = []
        for segment in firmware.segments:
            if segment.memory_size and self.memory.find_da(segment.da, segment.memory_size) is None:
                view = self.translate(segment.da, segment.memory_size)
                assert view is not None, "it was loaded"
                parts.append((segment.da, view))
        return parts

    def create_core(self, firmware: Firmware) -> QemuCore:
        """A core that will run the loaded image."""
        self._console = Tail(_CONSOLE_LIMIT)
        return QemuCore(self, firmware, self._console, self._kick_interrupt)

    def take_machine(
        self, arguments: tuple[str, ...], private: Sequence[tuple[int, memoryview]]
    ) -> Machine:
        """A QEMU for the next start: the spare, if there is one for the same image."""
        spare, self._spare = self._spare, None
        if spare is not None:
            if spare[0] == arguments and not private and spare[1].is_running:
                spare[1].process.send_signal(signal.SIGCONT)  # somebody may have stopped it
                spare[1].wants_reset = True
                return spare[1]
            spare[1].close()
        return self._launch(arguments, private)

    def keep_spare(self, arguments: tuple[str, ...]) -> None:
        """A core is up: the next one may be made ready, where that is wanted."""
        if self._keeps_spare and self._listener is None and self._spare is None:
            with contextlib.suppress(PlatformError):  # then the next start is an ordinary one
                self._spare = (arguments, self._launch(arguments, ()))

    def _launch(
        self, arguments: tuple[str, ...], private: Sequence[tuple[int, memoryview]]
    ) -> Machine:
        return Machine(
            self.board,
            self._shared,
            private,
            arguments,
            listener=None if self._listener is None else self._listener.socket,
            wants_interrupts=self._kick_interrupt is not None,
        )

    @property
    def debugger(self) -> str | None:
        """What a debugger's "target remote" takes, where the core waits for one."""
        return None if self._listener is None else self._listener.address

    @property
    def waits_for_debugger(self) -> bool:
        """Whether a core executes nothing until a debugger lets it."""
        return self._listener is not None

    def _close_spare(self) -> None:
        if self._spare is not None:
            self._spare[1].close()
            self._spare = None

    def close(self) -> None:
        """Gives the memory back. Idempotent."""
        self._close_spare()
        if self._listener is not None:
            self._listener.close()
        self._shared.close()


class QemuCore(Core):
    """One start of an emulated core: a QEMU process.

    Attributes:
        pid: the process, once it was started.
    """

    pid: int | None = None

    def __init__(
        self,
        platform: QemuPlatform,
        firmware: Firmware,
        console: Tail,
        kick_interrupt: int | None,
    ) -> None:
        board = platform.board
        self.name = f"{board.name} core"
        self.memory = platform.memory
        self.table_da = firmware.table_da
        self.machine = board.elf_machine
        self.elf_class = board.elf_class
        self._platform = platform
        self._board = board
        self._private = platform.private_parts(firmware)
        self._console = console
        self._kick_interrupt = kick_interrupt
        self._arguments = boot_options(board, firmware)
        self._lacks_vectors = bool(board.vectors) and find_vectors(board, firmware) is None
        self._machine: Machine | None = None
        self._words = Tail(_WORDS_LIMIT)
        self._gone = trio.Event()  # the process
        self._ended = trio.Event()  # the core, and with it all that is waited for
        self._halted: int | None = None
        self._event: str | None = None
        self._interrupted = False
        table = firmware.table
        ids = [v.notify_id for vdev in table.vdevs for v in vdev.vrings] if table else []
        # An id of the firmware's own choice that looks like an order to switch off is none.
        self._halts = board.halt_bytes and not any(
            notify_id & 0xFF >= HALT_BYTE and notify_id != NOTIFY_ID_ANY for notify_id in ids
        )

    def kick(self, notify_id: int) -> None:
        """Wakes the core: a byte on its doorbell, or the interrupt that was chosen."""
        if self._machine is None:
            return
        if self._kick_interrupt is None:
            self._machine.doorbell.kick(notify_id)
        else:
            self._machine.raise_interrupt(self._kick_interrupt)

    async def run(
        self,
        notified: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Boots the core and listens to it until it ends. See `Link.run`."""
        machine = self._platform.take_machine(self._arguments, self._private)
        with contextlib.ExitStack() as stack:
            stack.callback(machine.close)
            pidfd = _open_pidfd(machine.process.pid)
            stack.callback(os.close, pidfd)
            self.pid = machine.process.pid
            self._machine = machine
            stack.callback(setattr, self, "_machine", None)
            error: OpenAMPError | None = None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(machine.qmp.run, self._on_event)
                nursery.start_soon(machine.listen, self._console, self._words)
                nursery.start_soon(self._watch, pidfd)
                try:
                    await self._boot(machine)
                except PlatformError as problem:
                    error = await self._explain(machine, problem)
                else:
                    task_status.started()
                    nursery.start_soon(machine.doorbell.run, notified, self._on_bytes)
                    nursery.start_soon(self._see_to_kicks, machine)
                    if not self._private:  # the next one's is not known yet
                        nursery.start_soon(self._keep_spare)
                    await self._ended.wait()
                    error = await self._judge(machine)
                nursery.cancel_scope.cancel()
            # What it wrote last may have come without a kick that was heard.
            notified()
            if error is not None:
                raise error

    async def _boot(self, machine: Machine) -> None:
        """From a process that executes nothing to a core that does."""
        qmp = machine.qmp
        version = await qmp.greet()
        if version[:2] < MIN_VERSION:
            raise PlatformError(
                f"{self._board.program} is version {_dotted(version)}; "
                f"{_dotted(MIN_VERSION)} or newer is needed"
            )
        if version[:2] < _HONEST_FENCES:
            self.is_out_of_order = True
        if self._kick_interrupt is not None:
            await self._check_interrupt(qmp, self._kick_interrupt)
        if machine.wants_reset:  # it has not seen what was loaded since
            await qmp.execute("system_reset")
        await qmp.execute("set-action", reboot="shutdown", shutdown="pause", watchdog="pause")
        if not self._platform.waits_for_debugger:
            try:
                await qmp.execute("cont")
            except PlatformError:
                if not qmp.ended:
                    raise
                # The core has ended in its first instructions: that is for whoever hears its end.

    async def _check_interrupt(self, qmp: Qmp, line: int) -> None:
        """Refuses a line that the board does not have: QEMU would abort at the first kick."""
        found = await qmp.execute("qom-list", path=self._board.interrupts)
        names = [str(member.get("name")) for member in found]
        lines = sum(name.startswith(_LINE) for name in names)
        if f"{_LINE}[{line}]" not in names:
            raise PlatformError(
                f"{self._board.name} has interrupts 0 to {lines - 1}; {line} was asked for "
                "(kick_interrupt)"
            )

    async def _explain(self, machine: Machine, problem: PlatformError) -> PlatformError:
        """Why a QEMU did not start, in its own words if it has any."""
        if machine.qmp.ended:
            with trio.move_on_after(_START_GRACE):
                await self._gone.wait()
        code = machine.process.poll()
        if code is None:
            return problem
        machine.read_rest(self._words)
        said = _last_line(self._words.text)
        how = f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"
        return PlatformError(f"{self._board.program} {how} at its start{said and f': {said}'}")

    async def _keep_spare(self) -> None:
        """Makes the next QEMU ready, once this core has had its first moments for itself."""
        await trio.sleep(_SPARE_AFTER)
        self._platform.keep_spare(self._arguments)

    async def _watch(self, pidfd: int) -> None:
        await trio.lowlevel.wait_readable(pidfd)
        self._gone.set()
        self._ended.set()

    async def _see_to_kicks(self, machine: Machine) -> None:
        """Sees to it that kicks arrive which come before the core listens.

        QEMU stops to look at the doorbell while the core's UART is off, and looks again only when
        its main loop does something else: a command makes it.
        """
        pause = _LOOK_FIRST
        while True:
            await trio.sleep(pause)
            if machine.doorbell.is_unheard:
                machine.qmp.nudge()
            pause = min(2 * pause, _LOOK_LAST)

    def _on_bytes(self, data: bytes) -> None:
        if self._halts and self._halted is None:
            code = next((byte - HALT_BYTE for byte in data if byte >= HALT_BYTE), None)
            if code is not None:
                self._halted = code
                self._ended.set()

    def _on_event(self, name: str, data: dict[str, Any]) -> None:
        if self._event is not None:
            return
        if name == "SHUTDOWN" and data.get("reason") != "host-qmp-quit":
            self._event = str(data.get("reason"))
        elif name in ("WATCHDOG", "GUEST_PANICKED"):
            self._event = name
        else:
            return
        self._ended.set()

    # The end

    async def _judge(self, machine: Machine) -> OpenAMPError | None:
        """How the core ended; None where that was in good order."""
        if self._halted is not None:
            if self._halted:
                await self._keep_private(machine)
            return _exited(self._halted)
        event = self._event
        if event == "host-signal":
            return CoreCrashedError("the core's QEMU was told to end by a signal")
        if event is not None or self._interrupted:
            with trio.move_on_after(_EXAMINE_GRACE):
                try:
                    return await self._examine(machine, event)
                except PlatformError:
                    if event is not None:
                        self._lose_private()
                        return CoreDiedError(f"the core ended ({event}), and its QEMU with it")
        code = machine.process.poll()
        self._lose_private()
        if code is None:
            return CoreCrashedError("the core's QEMU does not answer, and is killed")
        machine.read_rest(self._words)
        return self._judge_process(code)

    def _judge_process(self, code: int) -> OpenAMPError | None:
        """What the end of the process says."""
        said = self._words.text
        if code >= 0:
            return _exited(code, _last_line(said))
        death = killed("the core's QEMU", code)
        if death.signal is not signal.SIGABRT:
            return death
        registers = parse_registers(self.machine, said)
        _, fatal, rest = said.partition(_FATAL)
        if not fatal:  # it failed itself
            death.args = (f"{death}: {_last_line(said) or 'it did not say why'}",)
            return death
        fault = self._find_fault(registers, {})
        what = f"the core locked up: {_first_line(rest)}"
        if self._lacks_vectors:
            what += "; no vector table was found in the image"
        return self._crash(what, registers, fault, number=signal.SIGABRT)

    async def _examine(self, machine: Machine, event: str | None) -> OpenAMPError | None:
        """Asks a QEMU that has paused, or is to pause, how its core stands; ends it."""
        qmp = machine.qmp
        if event in _SWITCHED_OFF:
            return await self._quit(machine)
        machine.process.send_signal(signal.SIGCONT)  # somebody may have stopped it
        await qmp.execute("stop")
        registers = parse_registers(self.machine, await qmp.ask_monitor("info registers"))
        status = await self._read_fault_status(machine)
        await self._save_private(machine)
        fault = self._find_fault(registers, status)
        if event == "guest-reset" and fault is None:
            return CoreResetError("the core asked for a reset")
        what = _WORDS_FOR.get(event, f"the core ended ({event})")
        kind = CrashKind.WATCHDOG if event == "WATCHDOG" else None
        return self._crash(what, registers, fault, kind=kind)

    async def _quit(self, machine: Machine) -> OpenAMPError | None:
        """A core that has switched itself off: its exit code is QEMU's."""
        machine.qmp.post("quit")
        await self._gone.wait()
        return _exited(machine.process.wait())

    async def _read_fault_status(self, machine: Machine) -> dict[int, bytes]:
        """Words at device addresses that say what a Cortex-M's fault was."""
        if self.machine != EM_ARM:
            return {}
        text = await machine.qmp.ask_monitor(f"x /{_FAULT_WORDS}wx {_FAULT_STATUS:#x}")
        words: dict[int, bytes] = {}
        for line in text.splitlines():
            at, _, values = line.partition(":")
            with contextlib.suppress(ValueError):
                da = int(at, 16)
                for number, value in enumerate(values.split()):
                    words[da + 4 * number] = struct.pack("<I", int(value, 16) & 0xFFFF_FFFF)
        return words

    def _find_fault(
        self, registers: Mapping[str, int], status: Mapping[int, bytes]
    ) -> Fault | None:
        def read(da: int, size: int) -> bytes | None:
            if all(da + at in status for at in range(0, size, 4)):
                return b"".join(status[da + at] for at in range(0, size, 4))[:size]
            found = self._platform.translate(da, size)
            return None if found is None else bytes(found)

        return find_fault(self.machine, registers, read)

    def _crash(
        self,
        what: str,
        registers: Mapping[str, int],
        fault: Fault | None,
        *,
        number: signal.Signals | None = None,
        kind: CrashKind | None = None,
    ) -> CoreCrashedError:
        pc = registers.get("pc")
        address = said = None
        if fault is not None:
            registers, pc = fault.registers, fault.pc
            address, said = fault.address, fault.what
            what = f"{what}: {said}"
            kind = kind or fault.kind
        where = "pc unknown" if pc is None else f"pc {pc:#x}"
        return CoreCrashedError(
            f"{what} ({where})",
            signal=number,
            address=address,
            pc=pc,
            kind=kind or CrashKind.FATAL_ERROR,
            registers=registers,
            fault=said,
        )

    async def _save_private(self, machine: Machine) -> None:
        """Takes what RAM that is not shared holds, for the coredump."""
        if machine.scratch is None:
            return
        path = f"/proc/self/fd/{machine.scratch}"
        for da, held in self._private:
            try:  # as the core sees it: what TrustZone has at two addresses is nowhere else
                await machine.qmp.execute("memsave", val=da, size=len(held), filename=path)
            except PlatformError:
                if machine.qmp.ended:
                    raise
                held[:] = _UNREAD * len(held)
                continue
            saved = os.pread(machine.scratch, len(held), 0)
            held[: len(saved)] = saved

    async def _keep_private(self, machine: Machine) -> None:
        """The same of a core that has said itself how it ended, and may execute still."""
        with trio.move_on_after(_EXAMINE_GRACE):
            try:
                await machine.qmp.execute("stop")
                await self._save_private(machine)
            except PlatformError:
                self._lose_private()
            return
        self._lose_private()

    def _lose_private(self) -> None:
        """QEMU took RAM that is not shared with it: it reads as what nobody could read."""
        for _, held in self._private:
            held[:] = _UNREAD * len(held)

    # What else can be asked of it

    async def suspend(self) -> None:
        """Lets the core execute nothing until `resume`.

        Raises:
            PlatformError: the core does not run.

        Cancellation: the core goes on.
        """
        machine = self._running("suspended")
        try:
            await machine.qmp.execute("stop")
        except trio.Cancelled:
            machine.qmp.post("cont")
            raise

    async def resume(self) -> None:
        """Lets the core go on.

        Raises:
            PlatformError: the core does not run.
        """
        await self._running("resumed").qmp.execute("cont")

    async def describe(self) -> str:
        """Where the core is, whether QEMU lets it run, and the fault whose handler it is in."""
        if self._machine is None:
            return ""
        qmp = self._machine.qmp
        try:
            status = await qmp.execute("query-status")
            registers = parse_registers(self.machine, await qmp.ask_monitor("info registers"))
            fault = self._find_fault(registers, await self._read_fault_status(self._machine))
        except PlatformError:  # it is about to end
            return ""
        where = f" at pc {registers['pc']:#x}" if "pc" in registers else ""
        if fault is not None:
            where += f", after a fault: {fault.what}"
            where += "" if fault.pc is None else f" (pc {fault.pc:#x})"
        held = isinstance(status, dict) and status.get("running") is False
        return f"is held{where}" if held else f"is{where}" if where else ""

    def interrupt(self) -> None:
        """Makes the core stop, say where it is, and end."""
        self._interrupted = True
        self._ended.set()

    def _running(self, what: str) -> Machine:
        if self._machine is None:
            why = "was never started" if self.pid is None else "has ended"
            raise PlatformError(f"the {self.name} cannot be {what}: it {why}")
        return self._machine


def _open_pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise PlatformError(f"the core's process cannot be watched: {error.strerror}") from error


def _exited(code: int, said: str = "") -> CoreDiedError | None:
    if code == 0:
        return None
    return CoreDiedError(
        f"the core ended with exit code {code}{said and f': {said}'}", exit_code=code
    )


def _first_line(text: str) -> str:
    return text.partition("\n")[0].strip()


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and "warning:" not in line]
    return lines[-1].strip() if lines else ""


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
