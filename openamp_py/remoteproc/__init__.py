"""Remoteproc: firmware, resource tables, and the life cycle of remote processors."""

from __future__ import annotations

from openamp_py.remoteproc.elf import Firmware, Segment, decode_elf_untrusted
from openamp_py.remoteproc.lifecycle import ProcessorState
from openamp_py.remoteproc.platform import Core, Link, Platform
from openamp_py.remoteproc.processor import RemoteProcessor, open_processor
from openamp_py.remoteproc.resource_table import (
    ResourceTable,
    decode_table_untrusted,
    encode_table,
)
from openamp_py.remoteproc.resources import Resources, open_resources

__all__ = [
    "Core",
    "Firmware",
    "Link",
    "Platform",
    "ProcessorState",
    "RemoteProcessor",
    "ResourceTable",
    "Resources",
    "Segment",
    "decode_elf_untrusted",
    "decode_table_untrusted",
    "encode_table",
    "open_processor",
    "open_resources",
]
