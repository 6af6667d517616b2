"""Where remotes run: the native core, another process, this process, or a program elsewhere."""

from __future__ import annotations

from openamp_py.platforms.loopback import LoopbackPlatform
from openamp_py.platforms.native import NativePlatform
from openamp_py.platforms.process import ProcessPlatform
from openamp_py.platforms.shm import ShmAddress, ShmLink

__all__ = ["LoopbackPlatform", "NativePlatform", "ProcessPlatform", "ShmAddress", "ShmLink"]
