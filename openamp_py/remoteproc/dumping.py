"""Taking a coredump of a core, and putting it where it belongs."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import trio

from openamp_py.errors import CoreCrashedError, OpenAMPError
from openamp_py.remoteproc.coredump import PIECE_SIZE, Coredump, dump_segments, encode_coredump
from openamp_py.remoteproc.crash import CoredumpSink
from openamp_py.remoteproc.plan import LoadPlan, Translate
from openamp_py.remoteproc.platform import Core, Platform
from openamp_py.remoteproc.resource_table import ResourceTable
from openamp_py.vring import VringLayout

_logger = logging.getLogger(__name__)


async def make_dump(
    platform: Platform,
    translate: Translate,
    core: Core | None,
    plan: LoadPlan | None,
    table: ResourceTable | None,
    added: Iterable[tuple[int, int]],
    failure: OpenAMPError | None,
) -> Coredump:
    """What is to be kept of a core; its memory is not copied.

    Args:
        platform: what kind of core.
        translate: the memory at a device address.
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
    segments = [*dump_segments(loaded, translate, [*ranges, *added])]
    try:
        segments += await platform.dump_segments()
    except Exception as error:
        _logger.error(
            "platform %s: its part of the coredump is missing: %s", platform.name, repr(error)
        )
    crash = failure if isinstance(failure, CoreCrashedError) else None
    source = core or firmware  # loaded, and never started: what it was loaded for
    return Coredump(
        machine=source.machine if source else 0,
        elf_class=source.elf_class if source else 32,
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
        source = memoryview(segment.data).cast("B")
        copy = bytearray(len(source))
        for at in range(0, len(source), PIECE_SIZE):
            copy[at : at + PIECE_SIZE] = source[at : at + PIECE_SIZE]
            await trio.lowlevel.checkpoint()
        segments.append(replace(segment, data=memoryview(copy)))
    return replace(dump, segments=tuple(segments))


async def save_dump(dump: Coredump, where: CoredumpSink, name: str) -> Path | None:
    """Gives a dump to a function, or writes a file that only this user can read.

    Args:
        where: a directory (made if it ends with "/"), in which the file is called `name`, with a
            number in it where that is taken; a file, which is replaced in one step; or a function.

    Returns:
        The file, where there is one.

    Raises:
        OSError: the file cannot be written, or not as a core file; none is left half done.
    """
    if not isinstance(where, (str, os.PathLike)):
        await where(dump)
        return None
    path = trio.Path(where)
    if os.fspath(where).endswith(os.sep):
        await path.mkdir(parents=True, exist_ok=True)
    into_directory = await path.is_dir()
    if into_directory:
        path /= name
    elif await path.exists() and not await path.is_file():
        raise FileExistsError(errno.EEXIST, "it exists and is not a regular file", str(path))
    try:
        pieces = encode_coredump(dump)
    except ValueError as error:
        raise OSError(errno.EFBIG, f"no core file can hold it: {error}", str(path)) from error
    # A name that nobody can foresee: what already bears it might be a link to anything.
    descriptor, made = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    part = trio.Path(made)
    try:
        async with trio.wrap_file(os.fdopen(descriptor, "wb")) as file:
            for piece in pieces:
                await file.write(piece)
        if into_directory:
            return await trio.to_thread.run_sync(_rename_to_free, Path(made), Path(path))
        await part.rename(path)
    except BaseException:
        with trio.CancelScope(shield=True):
            await part.unlink(missing_ok=True)
        raise
    return Path(path)


def _rename_to_free(part: Path, wanted: Path) -> Path:
    """Gives a file a name that nothing had: another core's dump, or an older one, stays."""
    path = wanted
    for number in itertools.count(2):
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            break
        except FileExistsError:
            path = wanted.with_name(f"{wanted.stem}.{number}{wanted.suffix}")
    try:
        part.replace(path)
    except OSError:
        path.unlink()
        raise
    return path
