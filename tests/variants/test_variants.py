"""One body for what OpenAMP, rpmsg-lite and Linux do differently, in both roles."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

import pytest
import trio
import trio.testing
from firmware_variants import Variant, open_echo

from openamp_py import (
    BusOptions,
    Channel,
    CoreCrashedError,
    CoreResetError,
    CrashPolicy,
    Endpoint,
    ProcessorState,
    ResourceTableError,
    Role,
    Session,
    StateError,
)
from openamp_py.rpmsg.statistics import Drops

MESSAGES: Final = 1000
AFTER_RESTART: Final = 200

# csrc/firmware/echo_protocol.h
CRASH, HANG, RESET = (struct.pack("<I", 0xEF56A500 + order) for order in (1, 2, 3))

STATIC: Final = {"TABLE_FEATURES": 0, "ECHO_ADDRESS": 30}
LITE: Final = {**STATIC, "VARIANT_PREFILLED": 1, "VARIANT_NO_INTERRUPT": 1, "VRING_ALIGN": 16}
ALWAYS: Final = BusOptions(always_kick=True)

VARIANTS: Mapping[str, Variant] = {
    # This side is the driver
    "device": Variant(),
    "used ring aligned to 4": Variant(switches={"VRING_ALIGN": 4}),
    "used ring aligned to 16": Variant(switches={"VRING_ALIGN": 16}),
    "used ring aligned to 8192": Variant(switches={"VRING_ALIGN": 8192}),
    "2 buffers": Variant(switches={"VRING_NUM": 2, "VRING_ALIGN": 16}),
    "1024 buffers": Variant(switches={"VRING_NUM": 1024}),
    "small buffers": Variant(
        switches={"RPMSG_TO_HOST_SIZE": 64, "RPMSG_FROM_HOST_SIZE": 64},
        options=BusOptions(send_buffer_size=64, receive_buffer_size=64),
    ),
    "large buffers": Variant(
        switches={"VRING_NUM": 16, "RPMSG_TO_HOST_SIZE": 65536, "RPMSG_FROM_HOST_SIZE": 65536},
        options=BusOptions(send_buffer_size=65536, receive_buffer_size=65536),
    ),
    "larger buffers to the remote": Variant(
        switches={"RPMSG_TO_HOST_SIZE": 128, "RPMSG_FROM_HOST_SIZE": 2048},
        options=BusOptions(send_buffer_size=2048, receive_buffer_size=128),
    ),
    "larger buffers to the host": Variant(
        switches={"RPMSG_TO_HOST_SIZE": 2048, "RPMSG_FROM_HOST_SIZE": 128},
        options=BusOptions(send_buffer_size=128, receive_buffer_size=2048),
    ),
    "used length as written": Variant(switches={"VARIANT_USED_LENGTH": "USED_WRITTEN"}),
    "returned out of order": Variant(switches={"VARIANT_HOLD": 7, "VARIANT_SWAP": 1}),
    "held for long": Variant(switches={"VARIANT_HOLD": 250}),
    "kicks by a constant": Variant(switches={"VARIANT_KICK_ID": 1}),
    "kicks always": Variant(switches={"VARIANT_ALWAYS_KICK": 1}),
    "as rpmsg-lite": Variant(
        switches={
            **STATIC,
            "VRING_NUM": 2,
            "VRING_ALIGN": 16,
            "VARIANT_ALWAYS_KICK": 1,
            "VARIANT_NEVER_QUIET": 1,
        },
        address=(30, 40),
    ),
    "announced before DRIVER_OK": Variant(switches={"VARIANT_ANNOUNCE": "ANNOUNCE_EARLY"}),
    "announced twice": Variant(switches={"VARIANT_ANNOUNCE": "ANNOUNCE_TWICE"}),
    "name of 31 bytes": Variant(switches={"ECHO_CHANNEL_NAME": f'"{"n" * 31}"'}, name="n" * 31),
    "name without an end": Variant(switches={"ECHO_CHANNEL_NAME": f'"{"n" * 32}"'}, name="n" * 31),
    "no name service": Variant(switches=STATIC, address=(30, 40)),
    # This side is the device
    "driver": Variant(Role.DEVICE),
    "driver, 2 buffers": Variant(Role.DEVICE, {"VRING_NUM": 2}),
    "driver, as OpenAMP": Variant(Role.DEVICE, {"VARIANT_ONLY_DRIVER_OK": 1, "VARIANT_KICK_ID": 1}),
    "driver, never quiet": Variant(Role.DEVICE, {"VARIANT_NEVER_QUIET": 1}),
    "driver, indexes from 65500": Variant(Role.DEVICE, {"VARIANT_FIRST_INDEX": 65500}),
    "driver, used ring filled": Variant(Role.DEVICE, {"VARIANT_PREFILLED": 1}),
    "driver, used ring filled, from 40000": Variant(
        Role.DEVICE, {"VARIANT_PREFILLED": 1, "VARIANT_FIRST_INDEX": 40000}
    ),
    "driver, used ring filled and all sent": Variant(
        Role.DEVICE,
        {
            "VARIANT_PREFILLED": 1,
            "VRING_NUM": 2,
            "VARIANT_SENT_BEFORE": 2,
            "VARIANT_ANNOUNCE": "ANNOUNCE_TWICE",
        },
    ),
    "driver, sends before DRIVER_OK": Variant(Role.DEVICE, {"VARIANT_SENT_BEFORE": 1}),
    "driver, descriptors as long as messages": Variant(
        Role.DEVICE, {"VARIANT_EXACT_DESCRIPTORS": 1}
    ),
    "driver, kicks always by a constant": Variant(
        Role.DEVICE, {"VARIANT_ALWAYS_KICK": 1, "VARIANT_KICK_ID": 1}
    ),
    "driver, wants no kicks and sleeps": Variant(
        Role.DEVICE, {"VARIANT_NO_INTERRUPT": 1}, options=ALWAYS
    ),
    "driver, larger buffers to the host": Variant(
        Role.DEVICE,
        {"RPMSG_TO_HOST_SIZE": 2048, "RPMSG_FROM_HOST_SIZE": 128},
        options=BusOptions(send_buffer_size=128, receive_buffer_size=2048),
    ),
    "driver, larger buffers from the host": Variant(
        Role.DEVICE,
        {"RPMSG_TO_HOST_SIZE": 128, "RPMSG_FROM_HOST_SIZE": 2048},
        options=BusOptions(send_buffer_size=2048, receive_buffer_size=128),
    ),
    "driver, holds buffers": Variant(Role.DEVICE, {"VARIANT_HOLD": 200}),
    "driver, used ring aligned to 4": Variant(Role.DEVICE, {"VRING_ALIGN": 4}),
    "driver, no name service": Variant(Role.DEVICE, STATIC, address=(30, 40)),
    "driver, as rpmsg-lite": Variant(Role.DEVICE, {**LITE, "VRING_NUM": 2}, ALWAYS, (30, 40)),
    "driver, as rpmsg-lite, 64 buffers": Variant(
        Role.DEVICE, {**LITE, "VRING_NUM": 64}, ALWAYS, (30, 40)
    ),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Variant:
    """Every variant."""
    return VARIANTS[request.param]


def _payload(number: int, limit: int) -> bytes:
    """Different for each number, and of every length that there is."""
    length = (number * 37) % (limit + 1) if number % 10 else (0, limit)[number // 10 % 2]
    return bytes((number + i) & 0xFF for i in range(min(length, 64))) * -(-length // 64)


async def _exchange(session: Session, endpoint: Endpoint, count: int) -> None:
    """All of `count` messages come back, whole and in order."""
    bus = session.bus
    limit = min(bus.payload_limit, bus.receive_payload_limit)
    payloads = [_payload(number, limit)[:limit] for number in range(count)]
    before = bus.statistics
    async with trio.open_nursery() as nursery:

        async def flood() -> None:
            for payload in payloads:
                await endpoint.send(payload)

        nursery.start_soon(flood)
        for payload in payloads:
            message = await endpoint.receive()
            assert (message.payload, message.source) == (payload, endpoint.destination)
    after = bus.statistics
    assert after.sent - before.sent == after.received - before.received == count
    assert after.drops == Drops()


async def test_every_message_comes_back_also_after_a_restart(
    open_variant: Any, variant: Variant
) -> None:
    async with open_variant(variant) as session, open_echo(session, variant) as endpoint:
        await _exchange(session, endpoint, MESSAGES)
        await session.restart()
        await endpoint.wait_bound()
        await _exchange(session, endpoint, AFTER_RESTART)
        assert (await session.shutdown(endpoint, grace=10)).graceful


async def test_what_was_announced_late_is_found(open_variant: Any) -> None:
    variant = Variant(switches={"VARIANT_ANNOUNCE": "ANNOUNCE_ASKED"})
    async with (
        open_variant(variant) as session,
        session.bus.open_endpoint(destination=1025) as asking,
        session.bus.open_endpoint(variant.name) as endpoint,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint.send, b"waits until it is bound")
            await trio.testing.wait_all_tasks_blocked()
            assert session.bus.channels == () and not endpoint.is_bound
            await asking.send(b"announce now")
        assert (await endpoint.receive()).payload == b"waits until it is bound"


async def test_an_announcement_that_comes_twice_is_one_channel(open_variant: Any) -> None:
    variant = VARIANTS["announced twice"]
    async with open_variant(variant) as session, open_echo(session, variant) as endpoint:
        await _exchange(session, endpoint, 1)
        assert session.bus.channels == (Channel(variant.name, 1024),)


async def test_a_message_that_only_one_direction_has_room_for(
    open_variant: Any,
) -> None:
    """The remote takes it, and has no buffer for so long an answer."""
    variant = VARIANTS["larger buffers to the remote"]
    async with open_variant(variant) as session, open_echo(session, variant) as endpoint:
        assert (endpoint.payload_limit, session.bus.receive_payload_limit) == (2032, 112)
        await endpoint.send(bytes(2032))
        await _exchange(session, endpoint, 10)
        assert b"dropped: reply of 2032 for a buffer of 128" in _trace(session)


@pytest.mark.parametrize("role", Role)
async def test_the_firmware_hears_of_our_endpoint_by_the_name_service(
    open_variant: Any, role: Role
) -> None:
    variant = Variant(role)
    async with open_variant(variant) as session, open_echo(session, variant) as endpoint:
        await _exchange(session, endpoint, 1)
        assert b"bound to 0x400 by name service\n" in _trace(session)


async def test_without_a_name_service_it_hears_of_it_by_the_first_message(
    open_variant: Any,
) -> None:
    variant = VARIANTS["no name service"]
    async with open_variant(variant) as session, open_echo(session, variant) as endpoint:
        await _exchange(session, endpoint, 1)
        assert b"bound to 0x28 by its first message\n" in _trace(session)
        assert session.bus.channels == ()


@pytest.mark.parametrize("role", Role)
async def test_a_core_that_crashed_is_recovered(open_variant: Any, role: Role) -> None:
    variant = Variant(role)
    policy = CrashPolicy(recovery=True, limit=1000)
    async with (
        open_variant(variant, policy=policy) as session,
        open_echo(session, variant) as endpoint,
    ):
        for crash, kind in ((CRASH, CoreCrashedError), (RESET, CoreResetError)) * 3:
            await _exchange(session, endpoint, 100)
            await endpoint.send(crash)
            with pytest.raises(trio.BrokenResourceError) as caught:
                await endpoint.receive()
            assert isinstance(caught.value.__cause__, kind)
            await session.wait_up()
            await endpoint.wait_bound()
        assert session.processor.crashes == 6
        await _exchange(session, endpoint, 100)
        assert (await session.shutdown(endpoint, grace=10)).graceful


@pytest.mark.parametrize("role", Role)
async def test_a_core_that_hangs_is_shut_down_hard(open_variant: Any, role: Role) -> None:
    variant = Variant(role)
    async with open_variant(variant) as session, open_echo(session, variant) as endpoint:
        await endpoint.send(HANG)
        shutdown = await session.shutdown(endpoint, grace=0.05)
        assert shutdown.reason == "the remote did not leave within 0.05 s"
        assert session.processor.state is ProcessorState.OFFLINE


async def test_messages_wait_for_a_core_that_is_suspended(open_variant: Any) -> None:
    variant = Variant(Role.DEVICE)
    async with open_variant(variant) as session, open_echo(session, variant) as endpoint:
        await session.processor.suspend()
        await endpoint.send(b"waits")
        await session.processor.resume()
        assert (await endpoint.receive()).payload == b"waits"


# What cannot work


async def test_a_driver_s_buffers_that_are_smaller_than_was_said(open_variant: Any) -> None:
    variant = VARIANTS["driver, larger buffers to the host"]
    told = BusOptions(receive_buffer_size=2048)
    async with open_variant(variant, options=told) as session, open_echo(session, variant) as ept:
        await ept.send(bytes(112))
        assert (await ept.receive()).payload == bytes(112)
        with pytest.raises(trio.BrokenResourceError) as caught:
            await ept.send(bytes(113))
        assert str(caught.value.__cause__) == (
            "vdev0: the driver lent a buffer that is too small for 113 bytes of payload; "
            "this side was told of 512 bytes with header"
        )


async def test_buffers_that_the_firmware_has_no_room_for(open_variant: Any) -> None:
    with pytest.raises(ResourceTableError) as caught:
        async with open_variant(Variant(), options=BusOptions(receive_buffer_size=1024)):
            pass
    assert "393216 bytes of buffers are needed, their memory at" in str(caught.value)
    assert str(caught.value).endswith("has 262144")


async def test_used_entries_without_a_length_are_messages_without_one(open_variant: Any) -> None:
    """Linux drops them as well: a message cannot be longer than what was written."""
    variant = Variant(switches={"VARIANT_USED_LENGTH": "USED_ZERO"})
    async with open_variant(variant) as session:
        while not session.bus.drops.bad_length:
            await trio.testing.wait_all_tasks_blocked(0.001)
        assert session.bus.channels == ()


async def test_a_core_that_is_the_driver_is_not_handed_on(open_variant: Any) -> None:
    variant = Variant(Role.DEVICE)
    async with open_variant(variant) as session, open_echo(session, variant) as endpoint:
        for call in (session.detach, session.attach):
            with pytest.raises(StateError, match="the core is the driver of its devices"):
                await call()
        with pytest.raises(ValueError, match="only the driver role does this"):
            session.processor.remove_virtio(session.processor.rpmsg_device())
        await _exchange(session, endpoint, 1)


def _trace(session: Session) -> bytes:
    processor = session.processor
    assert processor is not None and processor.table is not None
    (trace,) = processor.table.traces
    return bytes(processor.map(da=trace.da, size=trace.length))
