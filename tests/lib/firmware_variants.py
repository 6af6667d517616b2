"""What the tests of firmware variants share: what a variant is, and where it can run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from openamp_py import (
    ECHO_CHANNEL,
    BusOptions,
    Endpoint,
    NativePlatform,
    Platform,
    Role,
    Session,
)
from openamp_py.platforms.qemu import QemuPlatform
from openamp_py.rpmsg.options import DEFAULT_OPTIONS

PLATFORMS: Mapping[str, Callable[[], Platform]] = {
    "native": NativePlatform,
    "cortex-m3": lambda: QemuPlatform("mps2-an385"),
    "rv32": lambda: QemuPlatform("virt-rv32"),
}
"""The cores to try, by what firmware is built for."""

NEEDS: Mapping[str, tuple[str, ...]] = {
    "native": (),
    "cortex-m3": ("qemu-system-arm", "arm-none-eabi-gcc"),
    "rv32": ("qemu-system-riscv32", "riscv64-unknown-elf-gcc"),
}
"""The programs that each takes."""


@dataclass(frozen=True)
class Variant:
    """One way to be another implementation, and how a user's program meets it.

    Args:
        role: this side's; the firmware has the other one.
        switches: of `csrc/firmware/variant.h`.
        options: what the bus has to know.
        address: of the firmware's endpoint and of ours, where there is no name service.
        name: of the service, where there is one.
    """

    role: Role = Role.DRIVER
    switches: Mapping[str, object] = field(default_factory=dict)
    options: BusOptions = DEFAULT_OPTIONS
    address: tuple[int, int] | None = None
    name: str = ECHO_CHANNEL

    @property
    def application(self) -> str:
        """What of `build.py` it is."""
        return "echo" if self.role is Role.DRIVER else "echo-driver"


@asynccontextmanager
async def open_echo(session: Session, variant: Variant) -> AsyncIterator[Endpoint]:
    """An endpoint to the echo service: by its name, or at addresses that were agreed on."""
    if variant.address is not None:
        theirs, ours = variant.address
        opening = session.bus.open_endpoint(address=ours, destination=theirs, rebind=True)
    else:
        opening = session.bus.open_endpoint(variant.name, rebind=True)
    async with opening as endpoint:
        await endpoint.wait_bound()
        yield endpoint
