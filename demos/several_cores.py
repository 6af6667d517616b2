"""Three cores by name: booted by whoever needs them, off when nobody does.

python demos/several_cores.py
"""

from __future__ import annotations

import trio

import openamp_py
from openamp_py import Link, LoopbackPlatform, NativePlatform, Registry


async def sensor(link: Link) -> None:
    """A remote in Python: answers any question with a temperature."""
    async with (
        openamp_py.open_resources(link) as resources,
        openamp_py.open_bus(resources.rpmsg_device()) as bus,
        bus.open_endpoint("sensor") as endpoint,
    ):
        async for question in endpoint:
            await endpoint.send_to(b"21 C", question.source)


async def ask(registry: Registry, core: str, service: str, question: bytes) -> None:
    """Boots a core if it is off, asks it, and lets go of it."""
    async with (
        registry.use(core) as processor,
        openamp_py.open_host_bus(processor) as bus,
        bus.open_endpoint(service) as endpoint,
    ):
        await endpoint.send(question)
        print(f"{core}: {(await endpoint.receive()).payload.decode()}")


async def main() -> None:
    """Registers them, and talks to each."""
    async with openamp_py.open_registry() as registry:
        for name in ("dsp0", "dsp1"):
            await registry.add(NativePlatform(), name, firmware=openamp_py.shipped_echo())
        await registry.add(
            LoopbackPlatform(sensor), "sensor", firmware=openamp_py.python_firmware()
        )
        print("there are:", ", ".join(registry.names))
        await ask(registry, "dsp0", openamp_py.ECHO_CHANNEL, b"hello, DSP")
        await ask(registry, "dsp1", openamp_py.ECHO_CHANNEL, b"hello, other DSP")
        await ask(registry, "sensor", "sensor", b"how warm is it?")
        states = [registry.get(name).state.value for name in registry.names]
        print("afterwards:", ", ".join(states))


trio.run(main)
