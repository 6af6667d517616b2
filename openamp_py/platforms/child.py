"""Cores that are processes: starting one, pausing it, listening to it, and how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from openamp_py.errors import CoreCrashedError, PeerGoneError, PlatformError
from openamp_py.memory import SharedMemory
from openamp_py.platforms.doorbell import Doorbell, DoorbellLink
from openamp_py.remoteproc.platform import Core

# A child that closes its doorbell is about to end; after so many seconds it is not.
_EXIT_GRACE = 1.0

# How often to look whether a process has stopped (seconds). The kernel tells only its parent's
# SIGCHLD handler and waitid(2), which would block a thread.
_LOOK_EVERY = 0.0005


class SignalledCore(DoorbellLink, Core):
    """A core that is a process, and pauses and breaks off by signals.

    Attributes:
        pid: the process, once it was started.
    """

    pid: int | None = None
    _alive = False  # whether `pid` is surely still ours: from its start until it is reaped

    def _signal(self, number: signal.Signals) -> None:
        """Sends a signal to all of the core.

        Raises:
            ProcessLookupError: it has ended.
        """
        if self.pid is None or not self._alive:
            raise ProcessLookupError
        os.kill(self.pid, number)

    def _stopped(self) -> bool:
        """Whether no thread of the core executes.

        Raises:
            ProcessLookupError: it has ended.
        """
        if self.pid is None or not self._alive:
            raise ProcessLookupError
        return is_stopped(self.pid)

    async def suspend(self) -> None:
        """Stops the process, and returns when none of its threads executes any more.

        Raises:
            PlatformError: the core does not run.

        Cancellation: the core goes on.
        """
        await trio.lowlevel.checkpoint()
        try:
            self._signal(signal.SIGSTOP)
            while not self._stopped():
                await trio.sleep(_LOOK_EVERY)
        except ProcessLookupError:
            raise self._not_running("suspended") from None
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                self._signal(signal.SIGCONT)
            raise

    async def resume(self) -> None:
        """Lets the process go on.

        Raises:
            PlatformError: the core does not run.
        """
        await trio.lowlevel.checkpoint()
        try:
            self._signal(signal.SIGCONT)
        except ProcessLookupError:
            raise self._not_running("resumed") from None

    async def describe(self) -> str:
        """Whether one of its threads has something to do: a core that waits for a kick has not."""
        await trio.lowlevel.checkpoint()
        if self.pid is None or not self._alive:
            return ""
        states = thread_states(self.pid)
        return "is busy" if "R" in states else "sleeps" if states else ""

    def interrupt(self) -> None:
        """Aborts the process: one that hangs, or is suspended, says where and ends."""
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGABRT)
            self._signal(signal.SIGCONT)

    def _not_running(self, what: str) -> PlatformError:
        why = "was never started" if self.pid is None else "has ended"
        return PlatformError(f"the {self.name} cannot be {what}: it {why}")


def is_stopped(pid: int) -> bool:
    """Whether every thread of a process is stopped.

    Raises:
        ProcessLookupError: it has ended, though perhaps nobody has reaped it.
    """
    states = thread_states(pid)
    if not states:
        raise ProcessLookupError
    return states <= {"T", "t"}


def thread_states(pid: int) -> set[str]:
    """What the threads of a process do, as in proc(5); empty when it has ended."""
    states = set()
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            states.add(thread.read_text().rpartition(")")[2].split()[0])
    return states - {"Z", "X"}  # zombie and dead; a leader is one before its threads are


def create_memory(name: str, size: int) -> SharedMemory:
    """New memory to share with a process.

    Raises:
        PlatformError: there are no descriptors or no room left.
    """
    try:
        return SharedMemory.create(name, size)
    except OSError as error:
        raise PlatformError(
            f"shared memory of {size:#x} bytes cannot be made: {error.strerror or error}"
        ) from error


def spawn(
    command: Sequence[str | os.PathLike[str]],
    pass_fds: Sequence[int],
    *,
    stderr: int | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a program with the given descriptors and no standard streams but stderr: ours, or one.

    From this very thread, on purpose: a parent-death signal fires when the thread that started
    the child ends, so a worker thread would not do.

    Raises:
        PlatformError: it cannot be started.
    """
    try:
        return subprocess.Popen(
            command,
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            process_group=0,  # Ctrl-C at the terminal is the host's business
        )
    except OSError as error:
        raise PlatformError(f"cannot run {command[0]}: {error.strerror or error}") from error


async def run_child(
    process: subprocess.Popen[bytes],
    doorbell: Doorbell,
    notified: Callable[[], None],
    task_status: trio.TaskStatus[None],
) -> None:
    """Listens to a child until it has ended; then `process.returncode` is set.

    Raises:
        PeerGoneError: it closed its doorbell and did not end; it was killed.

    Cancellation: the child is killed and reaped.
    """
    pidfd = -1
    deaf = False

    async def listen(nursery: trio.Nursery) -> None:
        nonlocal deaf
        await doorbell.run(notified)
        try:
            stopped = True
            while stopped:  # one that is suspended cannot end, and is not to blame
                stopped = is_stopped(process.pid)
                await trio.sleep(_EXIT_GRACE)
                stopped = is_stopped(process.pid) or stopped
        except ProcessLookupError:
            return
        deaf = True
        nursery.cancel_scope.cancel()

    try:
        pidfd = os.pidfd_open(process.pid)
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, nursery)
            await trio.lowlevel.wait_readable(pidfd)
            nursery.cancel_scope.cancel()
        # What it wrote last may have come without a kick that was heard.
        notified()
        if deaf:
            raise PeerGoneError("the core closed its doorbell and went on running")
    finally:
        if pidfd >= 0:
            os.close(pidfd)
        # The child leads a group of its own: what it started goes with it, unless it left.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def killed(what: str, returncode: int) -> CoreCrashedError:
    """The error for a child that a signal ended."""
    number = -returncode
    known = number in signal.Signals.__members__.values()
    return CoreCrashedError(
        f"{what} died of {signal.Signals(number).name if known else f'signal {number}'}",
        exit_code=returncode,
        signal=signal.Signals(number) if known else None,
    )
