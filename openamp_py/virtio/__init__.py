"""Virtio: virtqueues from both ends and the device that carries them. Knows no trio."""

from __future__ import annotations

from openamp_py.virtio.device import Handshake, VirtioDevice, Vring
from openamp_py.virtio.message_ring import Arrival, Message, MessageRing
from openamp_py.virtio.shared import SharedU8, SharedU32, ToldWord
from openamp_py.virtio.virtqueue import Chain, RingParts, Role, Span, Virtqueue, VirtqueueState

__all__ = [
    "Arrival",
    "Chain",
    "Handshake",
    "Message",
    "MessageRing",
    "RingParts",
    "Role",
    "SharedU8",
    "SharedU32",
    "Span",
    "ToldWord",
    "VirtioDevice",
    "Virtqueue",
    "VirtqueueState",
    "Vring",
]
