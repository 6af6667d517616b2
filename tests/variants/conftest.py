"""Firmware that does what other implementations of RPMsg do, built for each core when asked for."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import trio
from firmware_variants import NEEDS, PLATFORMS, Variant

from openamp_py import BusOptions, CrashPolicy, Session, open_session

BUILD = Path(__file__).parents[2] / "csrc" / "firmware" / "build.py"
LIMIT: Final = 60.0
"""Seconds after which a test has hung; nothing is measured by it."""

NO_POLICY: Final = CrashPolicy()

OpenVariant = Callable[..., AbstractAsyncContextManager[Session]]


@pytest.fixture(params=PLATFORMS)
def target(request: pytest.FixtureRequest) -> str:
    """Every core that there is firmware for."""
    missing = [program for program in NEEDS[request.param] if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return str(request.param)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant, str], Path]:
    """Builds firmware, each once."""
    build = runpy.run_path(str(BUILD))["build_firmware"]
    images: dict[object, Path] = {}

    def build_once(variant: Variant, target: str) -> Path:
        key = variant.application, target, *sorted(variant.switches.items())
        if key not in images:
            images[key] = build(
                tmp_path_factory.mktemp("variant"),
                target,
                variant.application,
                switches=variant.switches,
            )
        return images[key]

    return build_once


@pytest.fixture
def open_variant(built: Callable[[Variant, str], Path], target: str) -> OpenVariant:
    """Boots a variant's firmware, and opens the bus to it as it wants it."""

    @asynccontextmanager
    async def open_(
        variant: Variant, *, options: BusOptions | None = None, policy: CrashPolicy = NO_POLICY
    ) -> AsyncIterator[Session]:
        image = built(variant, target)
        with trio.fail_after(LIMIT):
            async with open_session(
                PLATFORMS[target](),
                image,
                options=options or variant.options,
                policy=policy,
                role=variant.role,
            ) as session:
                yield session

    return open_
