"""Buses that go on through the lives of a processor's core."""

from __future__ import annotations

import pytest
import trio

from openamp_py import (
    ECHO_CHANNEL,
    CrashPolicy,
    Link,
    LoopbackPlatform,
    NativePlatform,
    StateError,
    open_host_bus,
    open_processor,
    open_registry,
    python_firmware,
    rpmsg_table,
    serve_remote,
    shipped_echo,
)
from openamp_py.platforms.keeper import KeptCore
from openamp_py.platforms.native import NativeCore
from openamp_py.remoteproc.elf import Firmware
from openamp_py.rpmsg import Bus

CRASH = (0xEF56A501).to_bytes(4, "little")
LIMIT = 20.0


async def test_a_registered_core_recovers_and_its_endpoint_lives_on() -> None:
    with trio.fail_after(LIMIT):
        async with open_registry() as registry:
            await registry.add(
                NativePlatform(), "m4", firmware=shipped_echo(), policy=CrashPolicy(recovery=True)
            )
            async with (
                registry.use("m4") as processor,
                open_host_bus(processor) as bus,
                bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
            ):
                for number in range(3):
                    await endpoint.wait_bound()
                    await endpoint.send(b"%d" % number)
                    assert (await endpoint.receive()).payload == b"%d" % number
                    await endpoint.send(CRASH)
                    with pytest.raises(trio.BrokenResourceError, match="SIGSEGV"):
                        await endpoint.receive()
                    await processor.wait_up()
                    assert bus.failure is None, "the bus goes on before the core counts as up"
                assert bus.generation == processor.crashes == 3


async def test_each_device_of_a_table_has_a_bus() -> None:
    async def application(bus: Bus) -> None:
        async with bus.open_endpoint("ear", rebind=True) as endpoint:
            async for message in endpoint:
                await endpoint.send_to(message.payload[::-1], message.source)

    async def remote(link: Link) -> None:
        await serve_remote(link, application)

    with trio.fail_after(LIMIT):
        async with open_processor(LoopbackPlatform(remote, memory_size=1 << 21)) as processor:
            firmware = python_firmware(rpmsg_table(vdevs=2))
            await processor.boot(firmware)
            async with (
                open_host_bus(processor, index=0) as one,
                open_host_bus(processor, index=1) as two,
                one.open_endpoint("ear", rebind=True) as first,
                two.open_endpoint("ear", rebind=True) as second,
            ):
                for generation in range(2):
                    for endpoint, payload in ((first, b"ab"), (second, b"cd")):
                        await endpoint.wait_bound()
                        await endpoint.send(payload)
                        assert (await endpoint.receive()).payload == payload[::-1]
                    assert one.generation == two.generation == generation
                    await processor.shutdown()
                    await processor.boot(firmware)
                with pytest.raises(ValueError, match="no virtio device 2: the table has 2"):
                    async with open_host_bus(processor, index=2):
                        pass


async def test_a_core_that_is_off_has_no_bus() -> None:
    async with open_processor(NativePlatform()) as processor:
        with pytest.raises(StateError, match="it is offline"):
            async with open_host_bus(processor):
                pass


async def test_a_bus_that_was_closed_does_not_stop_the_next_start() -> None:
    async with open_processor(NativePlatform()) as processor:
        await processor.boot(shipped_echo())
        async with open_host_bus(processor) as bus:
            await bus.aclose()
            await processor.shutdown()
            await processor.boot()
            assert processor.is_up


class _OutOfOrderPlatform(NativePlatform):
    def create_core(self, firmware: Firmware) -> NativeCore | KeptCore:
        core = super().create_core(firmware)
        core.is_out_of_order = True
        return core


@pytest.mark.parametrize("kind", [NativePlatform, _OutOfOrderPlatform])
async def test_a_core_that_is_out_of_order_is_always_kicked(kind: type[NativePlatform]) -> None:
    with trio.fail_after(LIMIT):
        async with open_processor(kind()) as processor:
            await processor.boot(shipped_echo())
            async with (
                open_host_bus(processor) as bus,
                bus.open_endpoint(ECHO_CHANNEL) as endpoint,
            ):
                await endpoint.wait_bound()
                sent = 0
                while not bus.statistics.kicks_suppressed and sent < 2000:
                    await endpoint.send_many([b"x"] * 100)
                    sent += 100
                    for _ in range(100):
                        await endpoint.receive()
                assert (bus.statistics.kicks_suppressed == 0) == (kind is _OutOfOrderPlatform)
