"""What a failure looks like: ``pytest demos/failing_firmware.py``, of which every test fails.

Each report ends with what happened, the last messages, the trace, the console, the state of the
bus, and a coredump with the command to open it.
"""

from collections.abc import AsyncIterator

import pytest

import openamp_py

CRASH, HANG = b"\x01\xa5\x56\xef", b"\x02\xa5\x56\xef"  # what the echo firmware takes for orders


@pytest.fixture
async def echo(openamp_bus: openamp_py.Bus) -> AsyncIterator[openamp_py.Endpoint]:
    async with openamp_bus.open_endpoint(openamp_py.ECHO_CHANNEL) as endpoint:
        await endpoint.wait_bound()
        yield endpoint


async def test_expects_another_answer(echo: openamp_py.Endpoint) -> None:
    await echo.send(b"hello, core")
    message = await echo.receive()
    assert message.payload == b"hello, host"


async def test_meets_a_crash(echo: openamp_py.Endpoint) -> None:
    await echo.send(CRASH)
    await echo.receive()


@pytest.mark.openamp(timeout=1)
async def test_meets_a_hang(echo: openamp_py.Endpoint) -> None:
    await echo.send(HANG)
    await echo.receive()


@pytest.mark.openamp(timeout=1)
async def test_waits_for_a_service_that_never_comes(openamp_bus: openamp_py.Bus) -> None:
    await openamp_bus.wait_service("thermometer")
