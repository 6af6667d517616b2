"""Cores that are child processes: starting one, listening to it, and saying how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Sequence

import trio

from openamp_py.errors import CoreCrashedError, PeerGoneError, PlatformError
from openamp_py.platforms.doorbell import Doorbell

# A child that closes its doorbell is about to end; after so many seconds it is not.
_EXIT_GRACE = 1.0


def spawn(
    command: Sequence[str | os.PathLike[str]], pass_fds: Sequence[int]
) -> subprocess.Popen[bytes]:
    """Starts a program with the given descriptors and no standard streams but stderr.

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
        await trio.sleep(_EXIT_GRACE)
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
