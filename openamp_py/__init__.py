"""OpenAMP for Python on Linux: RPMsg over virtio, and the life cycle of remote processors."""

from __future__ import annotations

from openamp_py.constants import ADDRESS_ANY, ECHO_CHANNEL, SHUTDOWN_MSG
from openamp_py.echo import serve_echo
from openamp_py.errors import (
    CoreCrashedError,
    CoreDiedError,
    CoreResetError,
    FirmwareError,
    ImageError,
    OpenAMPError,
    PeerError,
    PeerGoneError,
    PlatformError,
    ResourceTableError,
    StateError,
    VirtqueueError,
)
from openamp_py.platforms import (
    LoopbackPlatform,
    NativePlatform,
    ProcessPlatform,
    ShmAddress,
    ShmLink,
)
from openamp_py.remoteproc import (
    Firmware,
    Link,
    Platform,
    ProcessorState,
    RemoteProcessor,
    Resources,
    ResourceTable,
    decode_elf_untrusted,
    decode_table_untrusted,
    encode_table,
    open_processor,
    open_resources,
)
from openamp_py.rpmsg import Bus, Channel, Drops, Endpoint, Message, open_bus
from openamp_py.session import Session, Shutdown, open_session
from openamp_py.virtio import Handshake, Role, VirtioDevice, Virtqueue

__all__ = [  # noqa: RUF022 - the most important first
    "open_session",
    "Session",
    "Bus",
    "Endpoint",
    "Message",
    "Channel",
    "Shutdown",
    "open_processor",
    "RemoteProcessor",
    "ProcessorState",
    "open_bus",
    "Drops",
    "open_resources",
    "Resources",
    "serve_echo",
    "Platform",
    "NativePlatform",
    "ProcessPlatform",
    "LoopbackPlatform",
    "Link",
    "ShmLink",
    "ShmAddress",
    "Firmware",
    "decode_elf_untrusted",
    "ResourceTable",
    "decode_table_untrusted",
    "encode_table",
    "Role",
    "Handshake",
    "VirtioDevice",
    "Virtqueue",
    "ADDRESS_ANY",
    "ECHO_CHANNEL",
    "SHUTDOWN_MSG",
    "OpenAMPError",
    "PeerError",
    "VirtqueueError",
    "PeerGoneError",
    "FirmwareError",
    "ImageError",
    "ResourceTableError",
    "PlatformError",
    "CoreDiedError",
    "CoreCrashedError",
    "CoreResetError",
    "StateError",
]
