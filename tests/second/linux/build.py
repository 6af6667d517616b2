# SPDX-License-Identifier: BSD-3-Clause
"""Builds firmware around the Linux kernel's own RPMsg bus, from the distribution's source."""

from __future__ import annotations

import runpy
import tempfile
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
FIRMWARE_DIR = HERE.parents[2] / "csrc" / "firmware"
KIT_BUILD = runpy.run_path(str(FIRMWARE_DIR / "build.py"))

NEEDED = (
    "drivers/rpmsg",
    "drivers/virtio",
    "include/linux",
    "include/uapi/linux",
    "samples/rpmsg",
)
"""Directories of the kernel's tree that are read."""

# The kernel's files, and what each is called as a module.
KERNEL_FILES = (
    ("drivers/virtio/virtio.c", "virtio"),
    ("drivers/virtio/virtio_anchor.c", "virtio_anchor"),
    ("drivers/virtio/virtio_ring.c", "virtio_ring"),
    ("drivers/rpmsg/rpmsg_core.c", "rpmsg_core"),
    ("drivers/rpmsg/rpmsg_ns.c", "rpmsg_ns"),
    ("drivers/rpmsg/virtio_rpmsg_bus.c", "virtio_rpmsg_bus"),
    ("samples/rpmsg/rpmsg_client_sample.c", "rpmsg_client_sample"),
)

# Headers that services.h stands in for. All others are the kernel's.
REPLACED = (
    *("asm/barrier.h", "generated/autoconf.h", "xen/xen.h"),
    *(
        f"linux/{name}.h"
        for name in (
            *("bug", "build_bug", "compiler", "compiler_types", "const", "device", "err"),
            *("dma-mapping", "gfp", "hrtimer", "idr", "ioctl", "irqreturn", "jiffies", "kernel"),
            *("kmsan", "kref", "module", "mutex", "of", "of_device", "pm_domain", "poll", "sched"),
            *("scatterlist", "slab", "spinlock", "stddef", "types", "uuid", "wait"),
        )
    ),
)

# Beside these and the port: what of the firmware kit is needed.
OURS = ("remote.c", "services.c")
KIT = ("trace.c", "freestanding.c", "table.S")


def _write_headers(place: Path) -> None:
    for name in REPLACED:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#include "services.h"\n')


def _write_module(place: Path, path_in_tree: str, name: str) -> Path:
    """A source that takes in one of the kernel's, told what it is called."""
    source = place / f"{name}.c"
    source.write_text(
        f'#define KBUILD_MODNAME "{name}"\n'
        f"#define MODULE_ENTRY {name}_entry\n"
        '#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"\n'
        "#include <linux/kconfig.h>\n"
        f"#include <{path_in_tree}>\n"
    )
    return source


def build(output: Path, target: str, tree: Path, switches: Mapping[str, object]) -> None:
    """Compiles the firmware.

    Args:
        output: where it is to be.
        target: of `csrc/firmware/build.py`.
        tree: the kernel's source.
        switches: macros, as `csrc/firmware/variant.h` has them.

    Raises:
        OSError, RuntimeError: as the firmware kit's `compile_firmware`.
    """
    with tempfile.TemporaryDirectory(prefix="linux-rpmsg-") as scratch:
        place = Path(scratch)
        _write_headers(place / "replaced")
        modules = [_write_module(place, *file) for file in KERNEL_FILES]
        system = ("include", "include/uapi", "drivers/rpmsg", "")
        flags = [
            "-std=gnu11",
            "-D__KERNEL__",
            # The kernel counts on them.
            *("-fno-strict-aliasing", "-fno-strict-overflow", "-fno-common"),
            *("-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections"),
            *(f"-D{name}={value}" for name, value in switches.items()),
            *(f"-I{path}" for path in (HERE, FIRMWARE_DIR, place / "replaced")),
            # As the system's: it is not for us to see to their warnings.
            *(argument for name in system for argument in ("-isystem", str(tree / name))),
        ]
        sources = [*KIT, *(str(HERE / name) for name in OURS), *map(str, modules)]
        KIT_BUILD["compile_firmware"](output, target, sources, flags)
