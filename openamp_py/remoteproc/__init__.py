"""Remoteproc: firmware, resource tables, and the life cycle of remote processors."""

from __future__ import annotations

from openamp_py.remoteproc.coredump import Coredump, DumpSegment, encode_coredump
from openamp_py.remoteproc.crash import CoredumpMode, CrashPolicy
from openamp_py.remoteproc.elf import Firmware, Segment, decode_elf_untrusted
from openamp_py.remoteproc.images import (
    Loader,
    decode_image_untrusted,
    register_loader,
    with_table,
)
from openamp_py.remoteproc.lifecycle import ProcessorState
from openamp_py.remoteproc.lint import Finding, Severity, lint_firmware
from openamp_py.remoteproc.platform import Core, Link, Platform
from openamp_py.remoteproc.processor import RemoteProcessor, open_processor
from openamp_py.remoteproc.resource_table import (
    ResourceTable,
    decode_table_untrusted,
    encode_table,
    rpmsg_table,
)
from openamp_py.remoteproc.resources import Resources, open_resources
from openamp_py.remoteproc.sources import find_firmware
from openamp_py.remoteproc.states import StateWatch
from openamp_py.remoteproc.subdevices import Subdevice
from openamp_py.remoteproc.tracing import TraceFollower, open_trace, read_trace

__all__ = [
    "Core",
    "Coredump",
    "CoredumpMode",
    "CrashPolicy",
    "DumpSegment",
    "Finding",
    "Firmware",
    "Link",
    "Loader",
    "Platform",
    "ProcessorState",
    "RemoteProcessor",
    "ResourceTable",
    "Resources",
    "Segment",
    "Severity",
    "StateWatch",
    "Subdevice",
    "TraceFollower",
    "decode_elf_untrusted",
    "decode_image_untrusted",
    "decode_table_untrusted",
    "encode_coredump",
    "encode_table",
    "find_firmware",
    "lint_firmware",
    "open_processor",
    "open_resources",
    "open_trace",
    "read_trace",
    "register_loader",
    "rpmsg_table",
    "with_table",
]
