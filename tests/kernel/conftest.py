"""A real kernel for tests: built once, booted for each of them."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import pytest
import trio

from openamp_py import BusApplication
from tests.kernel.build import Kernel, Unavailable, build
from tests.kernel.core import DEVICE_ID, RemoteCore, open_core
from tests.kernel.guest import Guest, GuestError, open_guest


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    """The kernel that guests boot; the first time it is built, which takes minutes."""
    try:
        built = build()
    except Unavailable as error:
        pytest.skip(str(error))
    try:
        trio.run(_boot_once, built)
    except GuestError as error:
        pytest.skip(f"User-Mode Linux does not run on this machine: {error}")
    return built


async def _boot_once(kernel: Kernel) -> None:
    with tempfile.TemporaryDirectory(prefix="openamp-") as directory:
        async with open_guest(kernel, Path(directory)) as guest:
            await guest.run("true")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of the host that guests see as /work; short, since sockets are in it."""
    directory = Path(tempfile.mkdtemp(prefix="openamp-"))
    yield directory
    shutil.rmtree(directory)


class Boot(Protocol):
    """Boots a guest whose remote processor's core is a program of the test."""

    def __call__(
        self,
        image: bytes,
        application: BusApplication | None = None,
        *,
        attach_table: bytes = b"",
        module: str = "",
    ) -> AbstractAsyncContextManager[tuple[Guest, RemoteCore]]:
        """For an `async with` block, which gives the guest and the core.

        Args:
            image: what is in core.elf.
            application: see `RemoteCore`.
            attach_table: see `RemoteCore`.
            module: parameters of the driver.
        """
        ...


@contextlib.asynccontextmanager
async def open_booted(
    kernel: Kernel,
    place: Path,
    image: bytes,
    application: BusApplication | None = None,
    *,
    attach_table: bytes = b"",
    module: str = "",
) -> AsyncIterator[tuple[Guest, RemoteCore]]:
    """See `Boot`."""
    (place / "core.elf").write_bytes(image)
    path = place / "core.sock"
    async with (
        open_core(path, application, attach_table=attach_table) as core,
        open_guest(kernel, place, [(path, DEVICE_ID)]) as guest,
    ):
        await guest.run(f"insmod /program_rproc.ko {module}")
        yield guest, core


@pytest.fixture
def boot(kernel: Kernel, place: Path) -> Boot:
    """Boots guests with our remote processor driver loaded."""
    return functools.partial(open_booted, kernel, place)
