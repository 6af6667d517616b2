"""A core's firmware, tested with pytest: ``pytest demos/test_firmware.py``.

Without an option the tests run on the native core; ``--openamp-core qemu:mps2-an385`` runs them on
an emulated Cortex-M3, and ``--openamp-firmware MINE.elf`` tests another firmware.
"""

from collections.abc import AsyncIterator

import pytest
import trio

import openamp_py


@pytest.fixture
async def echo(openamp_bus: openamp_py.Bus) -> AsyncIterator[openamp_py.Endpoint]:
    """An endpoint that is bound to the firmware's service."""
    async with openamp_bus.open_endpoint(openamp_py.ECHO_CHANNEL) as endpoint:
        await endpoint.wait_bound()
        yield endpoint


@pytest.mark.parametrize("size", [0, 1, 100, 496])
async def test_answers_with_the_same(echo: openamp_py.Endpoint, size: int) -> None:
    payload = bytes(range(256)) * 2
    await echo.send(payload[:size])
    assert (await echo.receive()).payload == payload[:size]


async def test_answers_in_order(echo: openamp_py.Endpoint) -> None:
    for number in range(100):
        await echo.send(b"%d" % number)
    for number in range(100):
        assert (await echo.receive()).payload == b"%d" % number


async def test_leaves_when_it_is_asked_to(
    openamp_session: openamp_py.Session, echo: openamp_py.Endpoint
) -> None:
    shutdown = await openamp_session.shutdown(echo, grace=5)
    assert shutdown.graceful


@pytest.mark.openamp(timeout=10)
async def test_an_order_to_crash_is_seen_as_a_crash(
    openamp_processor: openamp_py.RemoteProcessor, echo: openamp_py.Endpoint
) -> None:
    await echo.send(b"\x01\xa5\x56\xef")
    with pytest.raises(trio.BrokenResourceError):
        await echo.receive()
    assert isinstance(openamp_processor.failure, openamp_py.CoreCrashedError)
