"""Remote processors by name: registered once, booted and shut down by whoever uses them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from openamp_py.background import open_background
from openamp_py.errors import StateError, as_ours
from openamp_py.remoteproc import Platform, RemoteProcessor, open_processor
from openamp_py.remoteproc.crash import NO_POLICY, CrashPolicy
from openamp_py.remoteproc.sources import Image

_logger = logging.getLogger(__name__)

_BUSY_GRACE = 5.0
"""Seconds that another user's call has to end before a use does."""


class _Entry:
    """A registered processor, and who uses it."""

    def __init__(self, handle: int, name: str) -> None:
        self.handle = handle
        self.name = name
        self.references = 1
        self.unused = trio.Event()
        self.gone = trio.Event()


class Registry:
    """The processors of a program. Made by `open_registry`, which shuts them down.

    A processor belongs to the registry until it is removed and nobody has a reference any more.
    References keep the object, not the power: that is counted by `RemoteProcessor.boot` and
    `RemoteProcessor.shutdown`.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._names: dict[str, RemoteProcessor] = {}
        self._handles: dict[int, RemoteProcessor] = {}  # the same ones
        self._entries: dict[RemoteProcessor, _Entry] = {}
        self._next_handle = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of what is registered, in the order it came."""
        return tuple(self._names)

    async def add(
        self,
        platform: Platform,
        name: str,
        *,
        firmware: Image | None = None,
        policy: CrashPolicy = NO_POLICY,
        auto_boot: bool = False,
    ) -> RemoteProcessor:
        """Registers a processor, and boots it if it is to boot by itself.

        Args:
            platform: the kind of core; owned by the processor from here on.
            name: by which it is found.
            firmware: what it boots.
            policy: what happens when it crashes.
            auto_boot: boot it now: its virtio devices are there when this returns.

        Raises:
            ValueError: the name is taken.
            OpenAMPError: what booting raises; then it is not registered.
        """
        processor = await self._register(platform, name, firmware, policy)
        if auto_boot:
            try:
                await processor.boot()
            except BaseException:
                if self._names.get(name) is processor:  # nobody has removed it meanwhile
                    with trio.CancelScope(shield=True):
                        await self.remove(name)
                raise
        return processor

    async def add_in_background(
        self,
        platform: Platform,
        name: str,
        *,
        firmware: Image | None = None,
        policy: CrashPolicy = NO_POLICY,
    ) -> RemoteProcessor:
        """Registers a processor at once and boots it by itself, while the caller goes on.

        `RemoteProcessor.wait_state` tells when it is up. Where the boot fails, the error is
        logged, and is the processor's `failure`; it can be booted by hand then.

        Raises:
            ValueError: the name is taken.
        """
        processor = await self._register(platform, name, firmware, policy)
        await self._nursery.start(_boot, processor)
        return processor

    async def remove(self, name: str) -> None:
        """Takes a processor out; it is shut down once nobody has a reference any more.

        Raises:
            KeyError: there is none of that name; says which there are.
        """
        processor = self._names.get(name)
        if processor is None:
            raise self._unknown(name)
        entry = self._entries[processor]
        self._take_out(entry)
        self._drop(entry)
        if entry.unused.is_set():
            await entry.gone.wait()

    def get(self, key: str | int) -> RemoteProcessor:
        """The processor of a name or a handle, and a reference to it: see `put`.

        Raises:
            KeyError: there is none; says which there are.
        """
        processor = self._names.get(key) if isinstance(key, str) else self._handles.get(key)
        if processor is None:
            raise self._unknown(key)
        self._entries[processor].references += 1
        return processor

    def handle(self, processor: RemoteProcessor) -> int:
        """The number of a processor, which is never given to another one.

        Raises:
            KeyError: it is not of this registry, or gone.
        """
        return self._entries[processor].handle

    def put(self, processor: RemoteProcessor) -> None:
        """Gives back a reference that `get` gave.

        Raises:
            StateError: there is none to give back.
        """
        entry = self._entries.get(processor)
        if entry is None or entry.references <= (entry.handle in self._handles):
            raise StateError(f"no reference to processor {processor.name!r} is out")
        self._drop(entry)

    @asynccontextmanager
    async def use(self, key: str | int) -> AsyncIterator[RemoteProcessor]:
        """A reference to a processor, booted, for an `async with` block.

        At its end another user's call that is under way is waited for, a short time.

        Raises:
            KeyError: there is none.
            OpenAMPError: what booting raises.
            StateError: a call is under way still when the block has ended; its boot is not
                given back.
        """
        processor = self.get(key)
        try:
            await processor.boot()
            try:
                yield processor
            finally:
                with trio.CancelScope(shield=True):
                    with trio.move_on_after(_BUSY_GRACE):
                        await processor.wait_idle()
                    await processor.shutdown()
        finally:
            self.put(processor)

    async def _register(
        self, platform: Platform, name: str, firmware: Image | None, policy: CrashPolicy
    ) -> RemoteProcessor:
        entry = _Entry(self._next_handle, name)
        self._next_handle += 1
        processor: RemoteProcessor = await self._nursery.start(
            self._keep, entry, platform, firmware, policy
        )
        return processor

    async def _keep(
        self,
        entry: _Entry,
        platform: Platform,
        firmware: Image | None,
        policy: CrashPolicy,
        *,
        task_status: trio.TaskStatus[RemoteProcessor],
    ) -> None:
        """The processor's block, as long as it is used."""
        name = entry.name
        if name in self._names:
            platform.close()
            raise ValueError(f"there is a processor named {name!r} already")
        async with open_processor(
            platform, name=name, firmware=firmware, policy=policy
        ) as processor:
            assert name not in self._names, "nothing was awaited since"
            self._names[name] = self._handles[entry.handle] = processor
            self._entries[processor] = entry
            task_status.started(processor)
            try:
                await entry.unused.wait()
            finally:
                if entry.handle in self._handles:  # the registry's block ends
                    self._take_out(entry)
                del self._entries[processor]
        entry.gone.set()

    def _unknown(self, key: str | int) -> KeyError:
        return KeyError(f"no processor {key!r}; there are: {', '.join(self._names) or 'none'}")

    def _take_out(self, entry: _Entry) -> None:
        del self._names[entry.name], self._handles[entry.handle]

    def _drop(self, entry: _Entry) -> None:
        entry.references -= 1
        if entry.references == 0:
            entry.unused.set()


async def _boot(processor: RemoteProcessor, *, task_status: trio.TaskStatus[None]) -> None:
    task_status.started()
    try:
        await processor.boot()
    except Exception as error:  # of a stream, too: it is not to end the other processors
        processor.failure = as_ours(error, f"{processor.name} does not boot")
        _logger.error("%s does not boot: %s", processor.name, repr(error))


@asynccontextmanager
async def open_registry() -> AsyncIterator[Registry]:
    """Remote processors by name, for an `async with` block; all are shut down at its end."""
    async with open_background() as nursery:
        yield Registry(nursery)
