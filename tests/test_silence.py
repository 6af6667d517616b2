"""What is said of a remote that does not announce: each thing that can be seen of it."""

from __future__ import annotations

import os
import shutil
import signal
import struct
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from openamp_py import (
    Bus,
    Link,
    LoopbackPlatform,
    NativePlatform,
    RemoteProcessor,
    ResourceTable,
    Role,
    Trace,
    decode_elf_untrusted,
    encode_table,
    open_bus,
    open_host_bus,
    open_processor,
    open_resources,
    open_session,
    python_firmware,
    shipped_echo,
)
from openamp_py.bench_cores import create_first_word
from openamp_py.constants import ECHO_CHANNEL, NAME_SERVICE_ADDRESS
from openamp_py.platforms import child
from openamp_py.platforms.boards import find_board
from openamp_py.platforms.demo import BUFFERS_DA, TABLE, TABLE_DA
from openamp_py.platforms.qemu import QemuCore, QemuPlatform
from openamp_py.remoteproc.resource_table import place_entries
from openamp_py.silence import describe_silence

LIMIT = 30.0

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-system-arm") is None, reason="qemu-system-arm is not installed"
)

CRASH = struct.pack("<I", 0xEF56A501)  # csrc/firmware/echo_protocol.h


async def _see(
    application: Callable[[Link], Awaitable[None]],
    check: Callable[[Bus, RemoteProcessor], Awaitable[None]],
    table: ResourceTable = TABLE,
) -> str:
    """Describes a remote that does as the application says, once `check` is through."""
    async with open_processor(LoopbackPlatform(application)) as processor:
        await processor.boot(python_firmware(table))
        async with open_host_bus(processor) as bus:
            await check(bus, processor)
            return await describe_silence(bus, processor)


async def _settled(bus: Bus, processor: RemoteProcessor) -> None:
    await trio.testing.wait_all_tasks_blocked(0.01)


async def _hang(link: Link) -> None:
    await trio.sleep_forever()


def _announcing(*names: str) -> Callable[[Link], Awaitable[None]]:
    async def announce(link: Link) -> None:
        async with (
            open_resources(link, Role.DEVICE) as resources,
            open_bus(resources.rpmsg_device()) as bus,
            trio.open_nursery() as nursery,
        ):

            async def hold(name: str, *, task_status: Any) -> None:
                async with bus.open_endpoint(name):
                    task_status.started()
                    await trio.sleep_forever()

            for name in names:
                await nursery.start(hold, name)

    return announce


# Normal


async def test_a_core_that_has_not_seen_driver_ok() -> None:
    text = await _see(_hang, _settled)
    assert text == (
        "the core runs; kicks from it: 0; it has touched no ring (of 256 and 256 buffers): it has "
        "not seen DRIVER_OK (status word 0xf), or waits for something else"
    )


async def test_a_core_that_announced_something_else() -> None:
    text = await _see(_announcing("one", "two"), _settled)
    assert "messages from it: 2; not read by it: 0 of 0; announced: 'one', 'two'" in text
    assert "touched no ring" not in text


async def test_messages_that_it_has_not_read() -> None:
    async def announce_and_suspend() -> str:
        async with open_session("process") as session:
            await session.bus.wait_service(ECHO_CHANNEL)
            assert session.processor is not None
            await session.processor.suspend()
            async with session.bus.open_endpoint(destination=1) as endpoint:
                for _ in range(3):
                    await endpoint.send(b"x")
                return await session.describe_silence()

    text = await announce_and_suspend()
    assert text.startswith("the core is suspended; kicks from it: ")
    assert "; not read by it: 3 of 3; announced: 'rpmsg-openamp-demo-channel'" in text


async def test_a_table_without_a_name_service() -> None:
    (vdev,) = TABLE.vdevs
    text = await _see(_hang, _settled, place_entries([replace(vdev, device_features=0)]))
    assert "has no name service (feature bit 0), so it announces nothing" in text


async def test_a_status_word_that_was_overwritten() -> None:
    async def overwrite(bus: Bus, processor: RemoteProcessor) -> None:
        await trio.lowlevel.checkpoint()
        table = encode_table(TABLE)
        processor.map(da=TABLE_DA, size=len(table))[:] = table

    text = await _see(_hang, overwrite)
    assert "DRIVER_OK is gone from the status word (0x0): the firmware has overwritten it" in text


async def test_the_last_line_of_its_trace() -> None:
    async with open_session() as session, session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
        await endpoint.wait_bound()
        await endpoint.send(b"once it echoes it has written all that it writes")
        await endpoint.receive()
        text = await session.describe_silence()
    assert text.endswith("; last line of its trace: 'bound to 0x400 by name service'")


async def test_a_core_that_has_crashed() -> None:
    async with open_session() as session, session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
        await endpoint.wait_bound()
        await endpoint.send(CRASH)
        await session.bus.wait_failure()
        assert session.processor is not None
        await session.processor.wait_settled()
        text = await session.describe_silence()
    assert text.startswith("the core is crashed: the core died of SIG")
    assert "; the link has failed: the core died of SIG" in text
    assert "last line of its trace: " in text


async def test_a_peer_that_was_not_booted_here(create_ends: Any) -> None:
    ours, _ = create_ends(TABLE)
    async with (
        open_resources(ours, Role.DRIVER) as resources,
        open_bus(resources.rpmsg_device()) as bus,
    ):
        text = await describe_silence(bus)
    assert text.startswith("kicks from it: 0; it has touched no ring")


async def test_this_side_as_the_device(open_pair: Any) -> None:
    async with open_pair() as pair:
        text = await describe_silence(pair.remote)
    assert text.startswith("kicks from it: ") and text.endswith("; messages from it: 0")


# What a core does


@pytest.mark.parametrize(
    ("states", "doing"), [({"S"}, " and sleeps"), ({"S", "R"}, " and is busy"), (set(), "")]
)
async def test_what_the_threads_of_a_process_do(
    states: set[str], doing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_session() as session:
        monkeypatch.setattr(child, "thread_states", lambda pid: states)
        assert (await session.describe_silence()).startswith(f"the core runs{doing}; kicks")


async def test_a_core_that_never_ran_does_nothing() -> None:
    platform = NativePlatform()
    core = platform.create_core(decode_elf_untrusted(shipped_echo().read_bytes()))
    assert await core.describe() == ""
    platform.close()


async def test_a_core_that_does_not_say_what_it_does(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def unclear(bus: Bus, processor: RemoteProcessor) -> None:
        await trio.lowlevel.checkpoint()
        assert processor.core is not None
        processor.core.describe = trio.sleep_forever  # type: ignore[method-assign]

    text = await _see(_hang, unclear)
    assert text.startswith("the core runs and does not say within 0.5 s what it does; kicks from")


@needs_qemu
async def test_a_qemu_that_is_stopped_says_nothing() -> None:
    async with open_session("qemu:mps2-an385") as session:
        assert session.processor is not None and isinstance(session.processor.core, QemuCore)
        assert session.processor.core.pid is not None
        os.kill(session.processor.core.pid, signal.SIGSTOP)
        text = await session.describe_silence()
    assert text.startswith("the core runs and does not say within 0.5 s what it does; ")


@needs_qemu
async def test_an_emulated_core_says_where_it_is() -> None:
    firmware, word = create_first_word(find_board("mps2-an385"))
    platform = QemuPlatform("mps2-an385")
    async with open_processor(platform) as processor:
        await processor.boot(firmware)
        mark = processor.map(da=word, size=4)
        with trio.fail_after(LIMIT):
            while not any(mark):
                await trio.sleep(0)
        assert processor.core is not None
        loop = firmware.entry + 4  # a jump to itself
        assert await processor.core.describe() == f"is at pc {loop:#x}"
        await processor.suspend()
        assert await processor.core.describe() == f"is held at pc {loop:#x}"
        core = processor.core
    assert await core.describe() == ""


@needs_qemu
async def test_an_emulated_core_in_the_handler_of_a_fault_says_so() -> None:
    firmware, _ = create_first_word(find_board("mps2-an385"))
    (segment,) = firmware.segments
    at, entry = firmware.entry - segment.da, firmware.entry
    image = bytearray(segment.data)
    image[12:16] = struct.pack("<I", entry + 4 | 1)  # the vector of a hard fault
    image[at + 4 : at + 10] = image[at : at + 6]  # writes a word, stays there
    image[at : at + 2] = struct.pack("<H", 0xDE00)  # udf #0
    segment = replace(segment, data=bytes(image))
    async with open_processor(QemuPlatform("mps2-an385")) as processor:
        await processor.boot(replace(firmware, segments=(segment,)))
        mark = processor.map(da=entry + 20, size=4)
        with trio.fail_after(LIMIT):
            while not any(mark):
                await trio.sleep(0)
        assert processor.core is not None
        said = await processor.core.describe()
    assert said.endswith(f", after a fault: usage fault, undefined instruction (pc {entry:#x})")


# Hostile remotes


async def test_what_a_remote_says_is_quoted_and_bounded() -> None:
    names = ["\x1b[2J", *(f"service-{number}" for number in range(20))]
    text = await _see(_announcing(*names), _settled)
    assert "announced: '\\x1b[2J', 'service-0', " in text
    assert text.endswith("'service-6' and 13 more")


async def test_announcements_that_were_refused() -> None:
    async def malform(link: Link) -> None:
        async with (
            open_resources(link, Role.DEVICE) as resources,
            open_bus(resources.rpmsg_device()) as bus,
            bus.open_endpoint(destination=NAME_SERVICE_ADDRESS, announce=False) as endpoint,
        ):
            await endpoint.send(b"short")
            await trio.sleep_forever()

    text = await _see(malform, _settled)
    assert text.endswith("; announcements of it that were refused: 1")


async def test_a_trace_without_an_end_of_line() -> None:
    (vdev,) = TABLE.vdevs
    trace = Trace(da=BUFFERS_DA - 0x1000, length=0x1000, name="endless")
    table = place_entries([vdev, trace])

    async def fill(bus: Bus, processor: RemoteProcessor) -> None:
        await trio.lowlevel.checkpoint()
        processor.map(da=trace.da, size=trace.length)[:] = b"\x07" * trace.length

    text = await _see(_hang, fill, table)
    assert text.endswith("last line of its trace: '" + "\\x07" * 160 + "'")
