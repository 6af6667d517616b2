"""Boots in numbers: the shipped firmware hears the host's first kick, every time."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio
from qemu_images import boards, needs

from csrc.firmware.build import FIRMWARE_DIR
from openamp_py import ECHO_CHANNEL, QemuPlatform, firmware, open_bus, open_processor
from openamp_py.platforms.qmp import Qmp

BOOTS = 200
PATIENCE = 1.0
"""Seconds until an echo counts as lost: with a few milliseconds it is far from both."""

ECHOES = {
    "mps2-an385": "echo-cortex-m3.elf",
    "virt-rv32": "echo-rv32.elf",
    "virt-rv64": "echo-rv64.elf",
}


async def _time_boots(
    platform: QemuPlatform, image: Path, boots: int, stay: float = 0
) -> tuple[list[float], int]:
    """Boots, and sends one message as soon as the core is bound.

    A plain bus: it looks at its rings when the core kicks and at no other time, and kicks when
    the core asks for it.

    Returns:
        Seconds that each took, and how many echoes did not come.
    """
    seconds, lost = [], 0
    async with open_processor(platform) as processor:
        for _ in range(boots):
            begin = time.perf_counter()
            await processor.boot(image)
            async with (
                open_bus(processor.rpmsg_device()) as bus,
                bus.open_endpoint(ECHO_CHANNEL) as endpoint,
            ):
                with trio.move_on_after(PATIENCE) as scope:
                    await endpoint.send(b"first")
                    assert (await endpoint.receive()).payload == b"first"
                lost += scope.cancelled_caught
            seconds.append(time.perf_counter() - begin)
            await trio.sleep(stay)
            await processor.shutdown()
    return seconds, lost


@pytest.mark.soak
@pytest.mark.parametrize("spare", [False, True], ids=["launched", "spare"])
@pytest.mark.parametrize("board", boards(*ECHOES))
async def test_no_first_kick_is_lost(
    board: str, spare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes up for firmware that loses kicks is off: QEMU is not nudged."""
    monkeypatch.setattr(Qmp, "nudge", lambda self: None)
    boots, stay = (BOOTS // 4, 0.2) if spare else (BOOTS, 0)  # in which the spare gets ready
    image = firmware.path(ECHOES[board])
    seconds, lost = await _time_boots(QemuPlatform(board, spare=spare), image, boots, stay)
    del seconds[:1]  # that of a spare, too, is an ordinary one
    seconds.sort()
    p99 = seconds[len(seconds) * 99 // 100]
    print(
        f"{board}{' (spare)' if spare else ''}: {boots} boots, {lost} first kicks lost; to the "
        f"first echo {seconds[0] * 1e3:.0f} ms at best, {statistics.median(seconds) * 1e3:.0f} "
        f"median, {p99 * 1e3:.0f} p99, {seconds[-1] * 1e3:.0f} at worst"
    )
    assert lost == 0


@needs("mps2-an385")
@pytest.mark.soak
@pytest.mark.skipif(
    shutil.which("arm-none-eabi-gcc") is None,
    reason="needs arm-none-eabi-gcc (Debian package gcc-arm-none-eabi)",
)
async def test_firmware_that_loses_kicks_gets_them_again(tmp_path: Path) -> None:
    """Foreign firmware does not know of QEMU's habit: without a nudge it misses one in ten."""
    shutil.copytree(FIRMWARE_DIR, tmp_path / "firmware")
    port = tmp_path / "firmware" / "port_cortexm.c"
    looks_again = "    (void)DOORBELL->data;\n    INTERRUPT_ENABLE"
    text = port.read_text()
    assert looks_again in text
    port.write_text(text.replace(looks_again, "    INTERRUPT_ENABLE"))
    subprocess.run(
        [sys.executable, "firmware/build.py", ".", "cortex-m3"], cwd=tmp_path, check=True
    )
    _, lost = await _time_boots(QemuPlatform("mps2-an385"), tmp_path / "echo-cortex-m3.elf", 100)
    assert lost == 0
