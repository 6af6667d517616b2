"""Sessions in the device's role with drivers in Python: on a core of this process, and a link."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from openamp_py import (
    CoreCrashedError,
    Link,
    LoopbackPlatform,
    NativePlatform,
    PeerGoneError,
    Role,
    StateError,
    open_bus,
    open_processor,
    open_resources,
    open_session,
)
from openamp_py.platforms.demo import python_firmware

LIMIT = 30.0


async def _drive(link: Link) -> None:
    """Sends back what comes to "drives"."""
    async with (
        open_resources(link, Role.DRIVER) as resources,
        open_bus(resources.rpmsg_device()) as bus,
        bus.open_endpoint("drives") as endpoint,
    ):
        async for message in endpoint:
            await endpoint.send(message.payload)


async def test_a_core_in_python_may_be_the_driver() -> None:
    with trio.fail_after(LIMIT):
        async with (
            open_session(LoopbackPlatform(_drive), python_firmware(), role=Role.DEVICE) as session,
            session.bus.open_endpoint("drives", rebind=True) as endpoint,
        ):
            assert session.processor is not None
            assert session.bus.role is session.processor.role is Role.DEVICE
            for _ in range(3):
                await endpoint.send(b"round")
                assert (await endpoint.receive()).payload == b"round"
                await session.restart()


async def test_a_peer_on_a_link_may_be_the_driver(tmp_path: Path) -> None:
    url = f"shm:{tmp_path}/memory?doorbell=unix:{tmp_path}/bell"
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:

            async def drive() -> None:
                async with (
                    open_session(url) as session,
                    session.bus.open_endpoint("drives") as endpoint,
                ):
                    await endpoint.send((await endpoint.receive()).payload)
                    await trio.sleep_forever()

            nursery.start_soon(drive)
            async with (
                open_session(f"{url}&listen=1", role=Role.DEVICE) as session,
                session.bus.open_endpoint("drives") as endpoint,
            ):
                await endpoint.send(b"round")
                assert (await endpoint.receive()).payload == b"round"
                nursery.cancel_scope.cancel()


# What cannot work


async def test_a_core_that_dies_before_it_drives() -> None:
    async def die(link: Link) -> None:
        async with open_resources(link):
            raise ZeroDivisionError("before it was up")

    with trio.fail_after(LIMIT), pytest.raises(trio.BrokenResourceError) as caught:
        async with open_session(LoopbackPlatform(die), python_firmware(), role=Role.DEVICE):
            pass
    assert "vdev0: the driver never came up: " in str(caught.value)
    assert isinstance(caught.value.__cause__, CoreCrashedError)


async def test_a_driver_that_resets_the_device_has_left() -> None:
    async def drive_briefly(link: Link) -> None:
        async with open_resources(link, Role.DRIVER) as resources:
            async with open_bus(resources.rpmsg_device()) as bus:
                await bus.wait_service("served")
            await trio.sleep_forever()

    with trio.fail_after(LIMIT):
        async with (
            open_session(
                LoopbackPlatform(drive_briefly), python_firmware(), role=Role.DEVICE
            ) as session,
            session.bus.open_endpoint("served"),
        ):
            failure = await session.bus.wait_failure()
    assert isinstance(failure, PeerGoneError)
    assert "the driver reset the device" in str(failure)


async def test_the_device_of_a_service_that_is_one_too(core: str) -> None:
    with pytest.raises(ValueError, match="is a device: name a driver's image"):
        async with open_session(core, role=Role.DEVICE):
            pass


async def test_only_a_driver_attaches() -> None:
    async with open_processor(NativePlatform(), role=Role.DEVICE) as processor:
        with pytest.raises(StateError, match="the core is the driver of its devices"):
            await processor.attach()
