"""Taking a coredump of a core, and putting it where it belongs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import trio

from openamp_py.errors import CoreCrashedError, OpenAMPError
from openamp_py.remoteproc.coredump import Coredump, dump_segments, encode_coredump
from openamp_py.remoteproc.crash import CoredumpSink
from openamp_py.remoteproc.plan import LoadPlan
from openamp_py.remoteproc.platform import Core, Platform
from openamp_py.remoteproc.resource_table import ResourceTable
from openamp_py.vring import VringLayout

_logger = logging.getLogger(__name__)

_PIECE = 1 << 20


async def make_dump(
    platform: Platform,
    core: Core | None,
    plan: LoadPlan | None,
    table: ResourceTable | None,
    added: Iterable[tuple[int, int]],
    failure: OpenAMPError | None,
) -> Coredump:
    """What is to be kept of a core; its memory is not copied.

    Args:
        platform: what kind of core.
        core: its latest life.
        plan: what was loaded; None of an attached core: then all its memory is in the dump.
        table: its resource table, with what the host decided.
        added: device address and size of what else is to be in the dump.
        failure: why it ended.
    """
    memory = platform.memory if core is None else core.memory
    firmware = plan.firmware if plan else None
    ranges = [*plan.carveouts.values()] if plan else [(r.da, r.size) for r in memory.regions]
    for vdev in table.vdevs if table else ():
        ranges += [(v.da, VringLayout(v.num, v.align).size) for v in vdev.vrings]
    loaded = firmware.segments if firmware else ()
    segments = [*dump_segments(loaded, platform.translate, [*ranges, *added])]
    try:
        segments += await platform.dump_segments()
    except OpenAMPError as error:
        _logger.error("platform %s: its part of the coredump is missing: %s", platform.name, error)
    crash = failure if isinstance(failure, CoreCrashedError) else None
    return Coredump(
        machine=core.machine if core else 0,
        elf_class=core.elf_class if core else 32,
        entry=firmware.entry if firmware else 0,
        segments=tuple(segments),
        reason="" if failure is None else str(failure),
        kind=crash.kind if crash else None,
        signal=int(crash.signal) if crash and crash.signal else 0,
        fault_address=crash.address if crash else None,
        registers=crash.registers if crash else {},
        time=time.time(),
    )


async def copy_dump(dump: Coredump) -> Coredump:
    """The dump with memory of its own, so that the core can be started again."""
    segments = []
    for segment in dump.segments:
        pieces = []
        for at in range(0, len(segment.data), _PIECE):
            pieces.append(bytes(segment.data[at : at + _PIECE]))
            await trio.lowlevel.checkpoint()
        segments.append(replace(segment, data=b"".join(pieces)))
    return replace(dump, segments=tuple(segments))


async def save_dump(dump: Coredump, where: CoredumpSink, name: str) -> Path | None:
    """Gives a dump to a function, or writes a file and returns its path.

    Args:
        where: a directory, in which the file is called `name`; a file; or a function.

    Raises:
        OSError: the file cannot be written; none is left half done.
    """
    if not isinstance(where, (str, os.PathLike)):
        await where(dump)
        return None
    path = trio.Path(where)
    if await path.is_dir():
        path /= name
    part = path.with_name(f".{path.name}.part")
    try:
        async with await part.open("wb") as file:
            for piece in encode_coredump(dump):
                await file.write(piece)
        await part.rename(path)
    except BaseException:
        with trio.CancelScope(shield=True):
            await part.unlink(missing_ok=True)
        raise
    return Path(path)
