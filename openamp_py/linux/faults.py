"""What an errno of the kernel's remoteproc and rpmsg means, as an error of this library.

Reference: Linux, ``remoteproc_sysfs.c``, ``remoteproc_core.c``, ``rpmsg_char.c``.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Mapping
from typing import Final

from openamp_py.constants import NAME_SIZE
from openamp_py.errors import (
    AccessDeniedError,
    ImageError,
    OpenAMPError,
    PlatformError,
    StateError,
)
from openamp_py.rpmsg.wire import check_name

# struct rpmsg_endpoint_info: name[32], src u32, dst u32; in the kernel's own byte order
_ENDPOINT_INFO = struct.Struct(f"={NAME_SIZE}sII")

_DENIED: Final = (errno.EACCES, errno.EPERM, errno.EROFS)

_Key = tuple[str, str | None, int]

_FAULTS: Final[Mapping[_Key, tuple[type[OpenAMPError], str]]] = {
    ("state", "start", errno.ENOENT): (
        ImageError,
        "the kernel finds no firmware of the name in its `firmware` file: it looks in the "
        "directory of /sys/module/firmware_class/parameters/path and in /lib/firmware",
    ),
    ("state", "start", errno.EINVAL): (
        ImageError,
        "the kernel refuses the firmware, or its driver cannot start it: the kernel's log "
        "(dmesg) says why, and `openamp lint` looks at the file",
    ),
    ("state", "start", errno.ENOMEM): (
        PlatformError,
        "no memory for a carveout of the resource table, or for the image",
    ),
    ("state", "start", errno.ENODEV): (PlatformError, "the driver of the processor is gone"),
    ("state", "start", errno.EBUSY): (PlatformError, "the processor is in use elsewhere"),
    ("state", "start", errno.ETIMEDOUT): (PlatformError, "the core did not come up in time"),
    ("state", "stop", errno.EINVAL): (StateError, "it is neither running, attached nor crashed"),
    ("state", "detach", errno.EINVAL): (
        PlatformError,
        "only a core that is attached can be detached, and only where its driver can do that",
    ),
    ("firmware", None, errno.EBUSY): (
        StateError,
        "firmware can be chosen only while the processor is offline",
    ),
    ("firmware", None, errno.EINVAL): (PlatformError, "the name of the firmware is empty"),
    ("recovery", "recover", errno.EINVAL): (StateError, "there is nothing to recover from"),
    ("recovery", None, errno.EINVAL): (
        PlatformError,
        "this kernel does not know that recovery mode",
    ),
    ("coredump", None, errno.EBUSY): (
        StateError,
        "the mode cannot be changed while the processor is crashed",
    ),
    ("coredump", None, errno.EINVAL): (
        PlatformError,
        "this kernel does not know that coredump mode",
    ),
}
"""By file, what was written (None: anything) and errno."""


def encode_endpoint(name: str, source: int, destination: int) -> bytes:
    """The argument of the control node's ioctls.

    Raises:
        ValueError: the name is not possible.
    """
    return _ENDPOINT_INFO.pack(check_name(name), source, destination)


def write_fault(path: str, word: str, error: OSError) -> OpenAMPError:
    """The error for a sysfs file that did not take a word, with the kernel's as its cause."""
    code = error.errno or 0
    file = path.rpartition("/")[2]
    if code in _DENIED:
        return denied(path, error)
    found = _FAULTS.get((file, word, code)) or _FAULTS.get((file, None, code))
    kind, text = found or (PlatformError, os.strerror(code))
    ours = kind(f"{path} does not take {word!r} ({_code(error)}): {text}")
    ours.__cause__ = error
    return ours


def denied(path: str, error: OSError) -> OpenAMPError:
    """The error for a file or a node that this user may not use, with the cure."""
    if error.errno == errno.EROFS:
        cure = "it, or the whole file system, cannot be written here"
    elif path.startswith("/dev/"):
        cure = (
            "a udev rule gives a group the node (`openamp doctor --udev` prints one; then add "
            "this user to the group and log in again), or run as root"
        )
    else:
        cure = "run as root, or give a group the file at boot (`openamp doctor --udev` prints how)"
    ours = AccessDeniedError(error.errno, f"{path}: no permission ({_code(error)}); {cure}")
    ours.__cause__ = error
    return ours


def node_fault(path: str, what: str, error: OSError) -> OpenAMPError:
    """The error for a device node that could not be opened or controlled."""
    if error.errno in _DENIED:
        return denied(path, error)
    ours = PlatformError(f"{path}: {what}: {_code(error)}, {os.strerror(error.errno or 0)}")
    ours.__cause__ = error
    return ours


def _code(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))
