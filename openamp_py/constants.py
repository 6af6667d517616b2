"""Numbers that several floors share, each with where it comes from."""

from __future__ import annotations

from typing import Final

ADDRESS_ANY: Final = 0xFFFF_FFFF
"""RPMSG_ADDR_ANY: as a destination, "not bound yet"; as a source, "choose one"."""

DA_ANY: Final = 0xFFFF_FFFF
"""FW_RSC_U32_ADDR_ANY: the firmware leaves the device address to the host."""

NOTIFY_ID_ANY: Final = 0xFFFF_FFFF
"""RSC_NOTIFY_ID_ANY: the firmware leaves the notify id to the host."""

VIRTIO_ID_RPMSG: Final = 7
"""Virtio device id of RPMsg (virtio 1.2, section 5)."""

RPMSG_F_NS: Final = 1 << 0
"""RPMsg feature bit: the device supports name-service announcements."""

VIRTIO_RING_F_INDIRECT_DESC: Final = 1 << 28
"""Virtio feature bit 28: a descriptor may point to a table of descriptors."""

VIRTIO_RING_F_EVENT_IDX: Final = 1 << 29
"""Virtio feature bit 29: notifications are suppressed by index, not by flag."""

VIRTIO_F_VERSION_1: Final = 1 << 32
"""Virtio feature bit 32: little endian, whatever the machine."""

NAME_SERVICE_ADDRESS: Final = 53
"""Where announcements go (rpmsg.h, RPMSG_NS_EPT_ADDR)."""

FIRST_DYNAMIC_ADDRESS: Final = 1024
"""Addresses below are for well-known services (rpmsg.h, RPMSG_RESERVED_ADDRESSES)."""

NAME_SIZE: Final = 32
"""Bytes of a channel's or a resource's name field; a name has at most one less."""

SHUTDOWN_MSG: Final = 0xEF56_A55A
"""First u32 of the message by which the echo test asks the remote to leave."""

EM_X86_64: Final = 62
EM_ARM: Final = 40
EM_AARCH64: Final = 183
EM_RISCV: Final = 243
"""Machine numbers of ELF files (elf.h)."""

ECHO_CHANNEL: Final = "rpmsg-openamp-demo-channel"
"""Channel of OpenAMP's echo and matrix demos, and of the shipped firmware."""
