"""The memory layout of OpenAMP's Linux demo platform (machine "generic")."""

from __future__ import annotations

from typing import Final

from openamp_py.constants import RPMSG_F_NS, VIRTIO_ID_RPMSG
from openamp_py.errors import ImageError
from openamp_py.remoteproc.elf import Firmware, Segment
from openamp_py.remoteproc.resource_table import (
    ResourceTable,
    Vdev,
    Vring,
    encode_table,
    place_entries,
)

MEMORY_SIZE: Final = 0x8_0000
"""Bytes of shared memory; device addresses are offsets in it."""

TABLE_DA: Final = 0
BUFFERS_DA: Final = 0x1_0000
"""Device address of the buffers: 256 for each direction of, normally, 512 bytes each."""

TABLE: Final[ResourceTable] = place_entries(
    [
        Vdev(
            id=VIRTIO_ID_RPMSG,
            notify_id=0,
            device_features=RPMSG_F_NS,
            vrings=(
                Vring(da=0x4000, align=0x1000, num=256, notify_id=1),
                Vring(da=0x8000, align=0x1000, num=256, notify_id=2),
            ),
        )
    ]
)
"""One RPMsg device, as the demo platform's server writes it."""


def buffer_area(memory_size: int = MEMORY_SIZE) -> tuple[int, int]:
    """Device address and size of the memory for buffers: up to the end.

    Raises:
        ValueError: the memory is smaller than the layout.
    """
    if memory_size < MEMORY_SIZE:
        raise ValueError(f"shared memory of {memory_size} bytes; the layout needs {MEMORY_SIZE}")
    return (BUFFERS_DA, memory_size - BUFFERS_DA)


def python_firmware(table: ResourceTable = TABLE) -> Firmware:
    """An image for a remote written in Python: a resource table and no code."""
    table = place_entries(table.entries)
    data = encode_table(table)
    segment = Segment(da=TABLE_DA, data=data, memory_size=len(data), flags=0)
    return Firmware(segments=(segment,), table=table, table_da=TABLE_DA)


def check_python(core: str, firmware: Firmware) -> None:
    """Raises ImageError for an image with machine code: a remote in Python cannot run it."""
    if firmware.machine:
        raise ImageError(
            f"core {core} runs a remote written in Python, not {firmware.machine_name} code; "
            "it takes no firmware file"
        )
