"""Firmware around Linux's own RPMsg bus, built for each core when asked for, and booted."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Final

import pytest
import trio
from kernel_source import find_kernel_source

from openamp_py import NativePlatform, Platform, Role, Session, open_session
from openamp_py.platforms.boards import find_board
from openamp_py.platforms.qemu import QemuPlatform

BUILD: Final = runpy.run_path(str(Path(__file__).with_name("linux") / "build.py"))
BOARDS: Final = {"cortex-m3": "mps2-an385", "rv32": "virt-rv32", "rv64": "virt-rv64"}
"""By what firmware is built for."""

LIMIT: Final = 60.0
"""Seconds after which a test has hung; nothing is measured by it."""

NONE: Final[Mapping[str, object]] = MappingProxyType({})

OpenLinux = Callable[..., AbstractAsyncContextManager[Session]]


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel's source."""
    return find_kernel_source(tmp_path_factory.mktemp("linux"), BUILD["NEEDED"])


@pytest.fixture(scope="session")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds firmware, each once."""
    place = tmp_path_factory.mktemp("firmware")
    images: dict[object, Path] = {}

    def build_once(target: str, switches: Mapping[str, object]) -> Path:
        key = target, *sorted(switches.items())
        if key not in images:
            compiler = BUILD["KIT_BUILD"]["TARGETS"][target].gcc or "cc"
            if shutil.which(compiler) is None:
                pytest.skip(f"no C compiler for {target} ({compiler})")
            image = place / f"linux-{target}-{len(images)}.elf"
            BUILD["build"](image, target, tree, switches)
            images[key] = image
        return images[key]

    return build_once


@pytest.fixture(params=["native", *BOARDS])
def target(request: pytest.FixtureRequest) -> str:
    """Every core that the firmware is built for."""
    return str(request.param)


@pytest.fixture
def open_linux(built: Callable[..., Path], target: str) -> OpenLinux:
    """Boots the firmware with this side as the device, and opens the bus."""

    def create_platform() -> Platform:
        if target == "native":
            return NativePlatform()
        board = find_board(BOARDS[target])
        if shutil.which(board.program) is None:
            pytest.skip(f"no {board.program} (Debian package {board.package})")
        return QemuPlatform(board)

    @asynccontextmanager
    async def open_(switches: Mapping[str, object] = NONE) -> AsyncIterator[Session]:
        image = built(target, switches)
        with trio.fail_after(LIMIT):
            async with open_session(create_platform(), image, role=Role.DEVICE) as session:
                yield session

    return open_
