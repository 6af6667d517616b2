"""Where remotes run: native or emulated cores, another process, this one, or elsewhere."""

from __future__ import annotations

from openamp_py.platforms.loopback import LoopbackPlatform
from openamp_py.platforms.native import NativePlatform
from openamp_py.platforms.process import ProcessPlatform
from openamp_py.platforms.qemu import QemuPlatform
from openamp_py.platforms.shm import ShmAddress, ShmLink
from openamp_py.platforms.vhost_user import VhostUserAddress, VhostUserLink

__all__ = [
    "LoopbackPlatform",
    "NativePlatform",
    "ProcessPlatform",
    "QemuPlatform",
    "ShmAddress",
    "ShmLink",
    "VhostUserAddress",
    "VhostUserLink",
]
