"""Every error this library raises of its own, by whose fault it is.

    OpenAMPError
    ├── PeerError                the other side broke the protocol
    │   ├── VirtqueueError         it wrote an impossible value into a ring
    │   ├── VhostUserError         it sent a vhost-user request that no working front end sends
    │   └── PeerGoneError          it left, or its end of the doorbell closed
    ├── FirmwareError            the image cannot be used (also a ValueError)
    │   ├── ImageError             the ELF file
    │   └── ResourceTableError     the resource table, in an image or in memory
    ├── PlatformError            the platform could not do what was asked
    │   ├── AccessDeniedError      this user may not (also a PermissionError)
    │   └── CoreDiedError          a core that ran, ended when it should not have
    │       ├── CoreCrashedError     by a fault or a signal, or it was reported as crashed
    │       ├── CoreResetError       it asked for a reset
    │       └── CrashLoopError       it crashed again and again, and was given up
    └── StateError               the caller's: not in this state (also a RuntimeError)
        └── DetachedError          the device was left to another host

A bad argument is a plain ``ValueError`` or ``TypeError``. An endpoint raises
trio's own classes: ``trio.ClosedResourceError`` when this side closed it,
``trio.BrokenResourceError`` (with one of the above as its ``__cause__``) when the
other side failed, ``trio.EndOfChannel`` when the other side withdrew the channel, and
``trio.WouldBlock`` from the ``_nowait`` forms.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping


class OpenAMPError(Exception):
    """Base of every error of this library."""


class PeerError(OpenAMPError):
    """The other side broke the protocol or is gone."""


class VirtqueueError(PeerError):
    """The other side wrote a value into a ring that no working peer can write.

    The virtqueue is broken for good: only a new one, after a reset, can be used.
    """


class VhostUserError(PeerError):
    """A vhost-user front end broke the protocol; its connection is closed for that."""


class PeerGoneError(PeerError):
    """The other side left, or closed its end of the doorbell."""


class FirmwareError(OpenAMPError, ValueError):
    """A firmware image, or the table in it, cannot be used."""


class ImageError(FirmwareError):
    """The firmware file is not an image that this core can run."""


class ResourceTableError(FirmwareError):
    """A resource table is malformed or asks for something impossible."""


class PlatformError(OpenAMPError):
    """A platform could not do what was asked of it."""


class AccessDeniedError(PlatformError, PermissionError):
    """This user may not use a file or a device node; says which, and what cures it."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()


class CoreDiedError(PlatformError):
    """A running core ended when it should not have.

    Attributes:
        exit_code: what the core's process returned, if it has one.
    """

    def __init__(self, message: str, *, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CrashKind(enum.Enum):
    """What kind of crash was reported, in Linux's words."""

    MMU_FAULT = "mmufault"
    """It touched memory that is not its own."""
    WATCHDOG = "watchdog"
    """It did not answer in time."""
    FATAL_ERROR = "fatal error"
    """Anything else that it cannot go on after."""


class CoreCrashedError(CoreDiedError):
    """A core was ended by a fault of its own or by a signal, or was reported as crashed.

    Attributes:
        kind: what was reported; a fatal error where nobody said more.
        registers: the core's registers by name, as the debugger calls them; empty where the
            platform cannot tell.
        signal: number of the signal, if there was one.
        address: the address that faulted, where the platform knows it.
        pc: the instruction that faulted, where the platform knows it.
        fault: what the machine says about the fault, in words, where the platform can ask it.
    """

    def __init__(
        self,
        message: str,
        *,
        exit_code: int | None = None,
        signal: signal.Signals | None = None,
        address: int | None = None,
        pc: int | None = None,
        kind: CrashKind = CrashKind.FATAL_ERROR,
        registers: Mapping[str, int] | None = None,
        fault: str | None = None,
    ) -> None:
        super().__init__(message, exit_code=exit_code)
        self.signal = signal
        self.address = address
        self.pc = pc
        self.kind = kind
        self.registers = dict(registers or {})
        self.fault = fault


class CoreResetError(CoreDiedError):
    """A core asked for a reset: all it knew of its virtio devices is lost."""


class CrashLoopError(CoreDiedError):
    """A core crashed too often to be recovered once more; its last crash is the cause."""


class StateError(OpenAMPError, RuntimeError):
    """A call came at a time when it is not allowed; nothing was changed."""


class DetachedError(StateError):
    """The device was detached here: it goes on, and another host may have it."""


def as_ours(error: Exception, what: str) -> OpenAMPError:
    """An error of the tree as it is; any other as the cause of a PlatformError that says what."""
    if isinstance(error, OpenAMPError):
        return error
    ours = PlatformError(f"{what}: {error!r}")
    ours.__cause__ = error
    return ours
