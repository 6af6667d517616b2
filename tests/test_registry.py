"""Processors by name: references, handles, booting by itself."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from openamp_py import (
    LoopbackPlatform,
    OpenAMPError,
    PlatformError,
    ProcessorState,
    StateError,
    Subdevice,
)
from openamp_py.echo import serve_echo
from openamp_py.platforms.demo import python_firmware
from openamp_py.registry import open_registry

LIMIT = 10.0


class _Panics(LoopbackPlatform):
    """Tells whether it was asked to panic, and whether it was closed."""

    def __init__(self) -> None:
        super().__init__(serve_echo)
        self.panicked = self.closed = False

    def panic(self) -> None:
        self.panicked = True

    def close(self) -> None:
        self.closed = True
        super().close()


class _Fails(LoopbackPlatform):
    def __init__(self) -> None:
        super().__init__(serve_echo)

    async def prepare(self) -> None:
        raise PlatformError("no power")


class _Hangs(LoopbackPlatform):
    def __init__(self) -> None:
        super().__init__(serve_echo)

    async def prepare(self) -> None:
        await trio.sleep_forever()


def _platform() -> LoopbackPlatform:
    return LoopbackPlatform(serve_echo)


async def test_names_and_handles() -> None:
    with trio.fail_after(LIMIT):
        async with open_registry() as registry:
            one = await registry.add(_platform(), "one")
            two = await registry.add(_platform(), "two")
            assert registry.names == ("one", "two")
            assert registry.handle(one) != registry.handle(two)
            assert registry.get("two") is two and registry.get(registry.handle(one)) is one
            with pytest.raises(KeyError, match="no processor 'three'; there are: one, two"):
                registry.get("three")
            old = registry.handle(one)
            registry.put(one)
            await registry.remove("one")
            again = await registry.add(_platform(), "one")
            assert registry.handle(again) != old
            with pytest.raises(KeyError):
                registry.get(old)
            with pytest.raises(KeyError):
                registry.handle(one)
            with pytest.raises(KeyError, match="no processor 'three'; there are: two, one"):
                await registry.remove("three")


async def test_a_reference_outlives_the_removal() -> None:
    with trio.fail_after(LIMIT):
        async with open_registry() as registry:
            processor = await registry.add(_platform(), "one", firmware=python_firmware())
            assert registry.get("one") is processor
            await registry.remove("one")
            assert registry.names == ()
            new = await registry.add(_platform(), "one")
            await processor.boot()
            assert processor.is_up and new is not processor
            registry.put(processor)
            await processor.wait_state(ProcessorState.OFFLINE)
            with pytest.raises(StateError, match="no reference"):
                registry.put(processor)
            assert registry.get("one") is new


async def test_a_reference_that_was_not_given_cannot_be_given_back() -> None:
    async with open_registry() as registry:
        processor = await registry.add(_platform(), "one")
        with pytest.raises(StateError, match="no reference to processor 'one' is out"):
            registry.put(processor)
        with pytest.raises(KeyError):
            await registry.remove("two")
        assert registry.get("one") is processor


async def test_a_name_that_is_taken() -> None:
    """The one that is refused is closed, and is told of no panic."""
    with trio.fail_after(LIMIT):
        async with open_registry() as registry:
            platforms = [_Panics() for _ in range(5)]
            refused = []

            async def add(platform: _Panics) -> None:
                try:
                    await registry.add(platform, "one")
                except ValueError as error:
                    refused.append(str(error))

            async with trio.open_nursery() as nursery:
                for platform in platforms:
                    nursery.start_soon(add, platform)
            assert refused == ["there is a processor named 'one' already"] * 4
            assert sum(platform.closed for platform in platforms) == 4
            assert not any(platform.panicked for platform in platforms)
        assert all(platform.closed for platform in platforms)


async def test_one_that_is_to_boot_by_itself() -> None:
    with trio.fail_after(LIMIT):
        async with open_registry() as registry:
            image = python_firmware()
            one = await registry.add(_platform(), "one", firmware=image, auto_boot=True)
            assert len(one.devices) == 1
            two = await registry.add_in_background(_platform(), "two", firmware=image)
            await two.wait_up()
        assert one.state is two.state is ProcessorState.OFFLINE


async def test_one_that_cannot_boot_is_not_registered() -> None:
    with trio.fail_after(LIMIT):
        async with open_registry() as registry:
            with pytest.raises(PlatformError, match="no power"):
                await registry.add(_Fails(), "one", firmware=python_firmware(), auto_boot=True)
            assert registry.names == ()
            await registry.add(_platform(), "one")


async def test_one_that_cannot_boot_in_the_background_can_by_hand(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with trio.fail_after(LIMIT):
        async with open_registry() as registry:
            processor = await registry.add_in_background(_platform(), "one", firmware=b"\x7fELF")
            await trio.testing.wait_all_tasks_blocked()
            assert isinstance(processor.failure, OpenAMPError)
            assert "one does not boot" in caplog.text
            await processor.boot(python_firmware())
            assert processor.is_up and processor.failure is None


async def test_a_use_boots_and_shuts_down() -> None:
    with trio.fail_after(LIMIT):
        async with open_registry() as registry:
            processor = await registry.add(_platform(), "one", firmware=python_firmware())
            async with registry.use("one") as used, registry.use("one"):
                assert used is processor and processor.power_count == 2
            assert processor.state is ProcessorState.OFFLINE
            async with trio.open_nursery() as nursery:

                async def use() -> None:
                    async with registry.use("one") as used:
                        assert used.is_up

                for _ in range(20):
                    nursery.start_soon(use)
            assert (processor.state, processor.power_count) == (ProcessorState.OFFLINE, 0)
            with pytest.raises(StateError):
                registry.put(processor)


@pytest.mark.parametrize("ends", [True, False])
async def test_a_use_that_ends_while_a_call_is_under_way(
    ends: bool, autojump_clock: trio.testing.MockClock
) -> None:
    class Slow(Subdevice):
        async def stop(self, *, crashed: bool) -> None:
            await trio.sleep(1 if ends else 4)

    async with open_registry() as registry:
        processor = await registry.add(_platform(), "one", firmware=python_firmware())
        for _ in range(1 if ends else 2):
            processor.add_subdevice(Slow())
        async with trio.open_nursery() as nursery:
            with contextlib.nullcontext() if ends else pytest.raises(StateError, match="under way"):
                async with registry.use("one"):
                    nursery.start_soon(processor.stop)
                    await trio.testing.wait_all_tasks_blocked()
        assert processor.state is (ProcessorState.OFFLINE if ends else ProcessorState.STOPPED)


async def test_the_registry_ends_what_runs() -> None:
    with trio.fail_after(LIMIT):
        async with open_registry() as registry:
            processor = await registry.add(
                _platform(), "one", firmware=python_firmware(), auto_boot=True
            )
        assert processor.state is ProcessorState.OFFLINE and processor.closed
        assert registry.names == ()
        with pytest.raises(KeyError, match="there are: none"):
            registry.get("one")


async def test_one_that_is_removed_while_it_boots() -> None:
    """Whoever has its name by then is left alone."""
    with trio.fail_after(5):
        async with open_registry() as registry, trio.open_nursery() as nursery:

            async def add() -> None:
                with pytest.raises(StateError, match="block ended while configure was under way"):
                    await registry.add(_Hangs(), "dsp", firmware=python_firmware(), auto_boot=True)

            nursery.start_soon(add)
            await trio.testing.wait_all_tasks_blocked()
            await registry.remove("dsp")
            other = await registry.add(_platform(), "dsp")
            await trio.testing.wait_all_tasks_blocked()
            assert registry.get("dsp") is other and registry.names == ("dsp",)
            registry.put(other)


async def test_whatever_a_boot_in_the_background_raises_is_its_failure() -> None:
    async def stream() -> AsyncIterator[bytes]:
        yield b"\x7fELF"
        raise RuntimeError("connection lost")

    with trio.fail_after(5):
        async with open_registry() as registry:
            processor = await registry.add_in_background(
                LoopbackPlatform(serve_echo), "dsp", firmware=stream()
            )
            with pytest.raises(PlatformError, match="dsp does not boot: RuntimeError"):
                await processor.wait_up()
