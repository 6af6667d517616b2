"""Which core is chosen by name and image, and what is said of those that cannot be had."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from openamp_py import (
    Firmware,
    ImageError,
    LoopbackPlatform,
    NativePlatform,
    PlatformError,
    ProcessPlatform,
    decode_elf_untrusted,
    open_session,
    python_firmware,
    shipped_echo,
)
from openamp_py.bench_cores import create_first_word
from openamp_py.choosing import (
    CORES,
    check_name,
    choose,
    choose_core,
    create_platform,
    find_version,
    list_cores,
    shipped_firmware,
)
from openamp_py.platforms.boards import BOARDS, find_board
from openamp_py.platforms.qemu import QemuPlatform
from openamp_py.remoteproc.sources import Image

HEX = b":0400000001020304F2\n:00000001FF\n"


# By the image


async def test_without_an_image_it_is_the_native_echo() -> None:
    choice = await choose("auto")
    choice.platform.close()
    assert (choice.name, choice.image) == ("native", shipped_echo())
    assert isinstance(choice.platform, NativePlatform)


@pytest.mark.parametrize("kind", [str, Path, Path.read_bytes, open])
async def test_an_image_of_this_machine_is_native(kind: type) -> None:
    image = kind(shipped_echo()) if kind is not open else shipped_echo().open("rb")
    choice = await choose("auto", image)
    if kind is open:
        image.close()
    choice.platform.close()
    assert choice.name == "native"
    assert choice.image == decode_elf_untrusted(shipped_echo().read_bytes())


@pytest.mark.parametrize("board", ["mps2-an385", "mps2-an500", "virt-rv32", "virt-rv64"])
@pytest.mark.parametrize("name", ["auto", "qemu"])
async def test_an_image_of_another_machine_is_emulated(name: str, board: str) -> None:
    firmware, _ = create_first_word(find_board(board))
    choice = await choose(name, firmware)
    choice.platform.close()
    assert (choice.name, choice.image) == (f"qemu:{board}", firmware)
    assert isinstance(choice.platform, QemuPlatform)
    assert choice.platform.board is BOARDS[board]


async def test_a_stream_is_read_once() -> None:
    reads = 0

    async def stream() -> AsyncIterator[bytes]:
        nonlocal reads
        reads += 1
        yield shipped_echo().read_bytes()

    async with open_session(image=stream()) as session:
        assert session.processor is not None
        assert isinstance(session.processor.platform, NativePlatform)
    assert reads == 1


async def test_this_machine_s_image_can_be_emulated_only_where_a_board_fits() -> None:
    with pytest.raises(ImageError):
        choose_core(decode_elf_untrusted(shipped_echo().read_bytes()), emulated=True)


@pytest.mark.parametrize("name", ["auto", "qemu"])
@pytest.mark.parametrize("image", [python_firmware(), Firmware(), HEX])
async def test_an_image_without_a_machine_needs_a_name(name: str, image: Image) -> None:
    with pytest.raises(ImageError, match=r"which machine .*--core\): native, qemu:BOARD, or proc"):
        await choose(name, image)


@pytest.mark.parametrize("image", [b"", b"\x7fELF", b"\x7fELF\x02\x01\x01" + bytes(57)])
async def test_an_image_that_is_none(image: bytes) -> None:
    with pytest.raises(ImageError):
        await choose("auto", image)


async def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await choose("auto", tmp_path / "missing.elf")


async def test_an_image_for_a_machine_that_nobody_has() -> None:
    firmware, _ = create_first_word(find_board("virt-rv32"))
    with pytest.raises(ImageError):
        await choose("auto", replace(firmware, machine=8, machine_name="MIPS"))


# By name


@pytest.mark.parametrize("name", CORES)
async def test_a_name_leaves_no_choice(name: str) -> None:
    kinds = {
        "native": NativePlatform,
        "process": ProcessPlatform,
        "loopback": LoopbackPlatform,
    }
    image = object()  # whatever it is: the processor reads it
    choice = await choose(name, image)  # type: ignore[arg-type]
    choice.platform.close()
    assert type(choice.platform) is kinds[name]
    assert choice.image is image


async def test_a_board_by_name_takes_its_own_echo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "echo-rv32.elf").write_bytes(b"")
    monkeypatch.setattr("openamp_py.firmware.path", tmp_path.joinpath)
    choice = await choose("qemu:virt-rv32")
    choice.platform.close()
    assert (choice.name, choice.image) == ("qemu:virt-rv32", tmp_path / "echo-rv32.elf")


async def test_a_board_without_an_echo() -> None:
    with pytest.raises(PlatformError, match="no echo firmware is shipped for virt-aarch64"):
        await choose("qemu:virt-aarch64")
    with pytest.raises(PlatformError, match="name your own"):
        shipped_firmware(find_board("virt-aarch64"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", r"unknown core 'nonsense'; there are auto, native, .* qemu:BOARD"),
        ("", "unknown core ''"),
        ("qemu:nonsense", "nonsense.*mps2-an385"),
        ("qemu:", "mps2-an385"),
        ("shm:/a", "unknown core 'shm:/a'"),
    ],
)
async def test_names_of_no_core(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_name(name)
    with pytest.raises(ValueError, match=message):
        await choose(name)


async def test_which_board() -> None:
    with pytest.raises(ValueError, match=r"which board\? .*qemu:BOARD"):
        await choose("qemu")


# Debuggers


@pytest.mark.parametrize("name", CORES)
async def test_only_emulated_cores_take_a_debugger(name: str) -> None:
    with pytest.raises(ValueError, match=f"core {name} takes no debugger"):
        check_name(name, gdb="1234")


@pytest.mark.parametrize("image", [None, shipped_echo()])
async def test_a_native_core_that_was_chosen_takes_no_debugger(image: Path | None) -> None:
    with pytest.raises(ValueError, match="core native takes no debugger"):
        await choose("auto", image, gdb="1234")


def test_the_debugger_s_place_reaches_the_platform(tmp_path: Path) -> None:
    platform = create_platform("qemu:virt-rv64", gdb=f"unix:{tmp_path}/gdb")
    assert isinstance(platform, QemuPlatform)
    assert platform.debugger == f"{tmp_path}/gdb"
    platform.close()
    with pytest.raises(ValueError, match="no place for a debugger"):
        create_platform("qemu:virt-rv64", gdb="nowhere")


# What is installed


def _install(directory: Path, program: str, says: str) -> None:
    path = directory / program
    path.write_text(f"#!/bin/sh\n{says}\n")
    path.chmod(0o755)


async def test_a_missing_qemu_is_one_line_that_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    firmware, _ = create_first_word(find_board("mps2-an385"))
    with pytest.raises(PlatformError) as caught:
        async with open_session(image=firmware):
            pass
    text = str(caught.value)
    assert "Cortex-M3" in text and text.endswith("apt install qemu-system-arm")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("echo 'QEMU emulator version 7.2.22 (Debian 1:7.2)'", (7, 2, 22)),
        ("echo 'QEMU emulator version 9.0'", (9, 0)),
        ("echo 'QEMU emulator version x'", None),
        ("echo", None),
        ("exit 1", None),
        ("kill -9 $$", None),
    ],
)
async def test_the_version_that_a_program_says(
    says: str, version: tuple[int, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(tmp_path, "qemu", says)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert await find_version("qemu") == version


async def test_a_program_that_cannot_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "qemu").write_bytes(b"\x7fELF")
    (tmp_path / "qemu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert await find_version("qemu") is None
    assert await find_version("missing") is None


async def test_every_core_is_listed_with_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(tmp_path, "qemu-system-arm", "echo 'QEMU emulator version 7.2.22'")
    _install(tmp_path, "qemu-system-riscv32", "echo 'QEMU emulator version 6.2.0'")
    monkeypatch.setenv("PATH", str(tmp_path))
    cores = {core.name: core for core in await list_cores()}
    assert [*cores] == ["native", "process", "loopback", *(f"qemu:{name}" for name in BOARDS)]
    assert all(cores[name].installed and cores[name].program is None for name in CORES)
    m3 = cores["qemu:mps2-an385"]
    assert (m3.cpu, m3.ram) == ("Cortex-M3", (0x2100_0000, 16 << 20))
    assert (m3.installed, m3.version, m3.remark) == (True, "7.2.22", "")
    assert m3.firmware == "echo-cortex-m3.elf"
    old, missing = cores["qemu:virt-rv32"], cores["qemu:virt-rv64"]
    assert (old.installed, old.version) == (False, "6.2.0")
    assert old.remark == "too old: QEMU 7.0 is needed"
    assert (missing.installed, missing.version) == (False, None)
    assert missing.remark == "apt install qemu-system-misc"
