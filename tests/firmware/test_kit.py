"""The firmware kit: it builds without a warning, what is shipped is what it builds, and it runs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from csrc.firmware import build
from csrc.firmware.build import APPLICATIONS, TARGETS, BuildError, build_firmware
from openamp_py import ECHO_CHANNEL, CoreCrashedError, open_session
from openamp_py.firmware import ECHO, path
from openamp_py.platforms.boards import check_image, choose_board, find_board
from openamp_py.platforms.qemu import QemuPlatform
from openamp_py.remoteproc.elf import decode_elf_untrusted
from openamp_py.remoteproc.lint import lint_firmware

EMULATED = sorted(set(TARGETS) - {"native"})
BOARDS = sorted(set(ECHO) - {"native"})
LIMIT = 60.0
CRASH, CRASH_ADDRESS = 0xEF56_A501, 0xDEAD_0000  # csrc/firmware/echo_protocol.h
PAGE = 4096

MADE_WITH = {
    "arm-none-eabi-gcc": "arm-none-eabi-gcc (15:12.2.rel1-1) 12.2.1 20221205",
    "riscv64-unknown-elf-gcc": "riscv64-unknown-elf-gcc (12.2.0-14+deb12u1+11+b2) 12.2.0",
}
"""Debian 12's compilers, which made the shipped files: another one would make others."""

needs_zig = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None, reason="needs PyPI's ziglang: the extra zig"
)


def need_gcc(target: str) -> str:
    chosen = TARGETS[target]
    if shutil.which(chosen.gcc) is None:
        pytest.skip(f"needs {chosen.gcc} (Debian package {chosen.package})")
    return chosen.gcc


def need_board(name: str) -> None:
    board = find_board(name)
    if shutil.which(board.program) is None:
        pytest.skip(f"needs {board.program} (Debian package {board.package})")


def target_of(board: str) -> str:
    return ECHO[board].removeprefix("echo-").removesuffix(".elf")


async def _echo(board: str, image: Path) -> str:
    """Boots the image, has messages of all sizes echoed, and returns the console."""
    platform = QemuPlatform(board)
    with trio.fail_after(LIMIT):
        async with (
            open_session(platform, image) as session,
            session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
        ):
            await endpoint.wait_bound()
            for length in range(0, 497, 4):
                payload = struct.pack("<I", length) * (length // 4)
                await endpoint.send(payload)
                assert (await endpoint.receive()).payload == payload
            shutdown = await session.shutdown(endpoint, grace=LIMIT)
            assert shutdown.graceful, shutdown.reason
    return platform.console


# ---- what is shipped ----


@pytest.mark.parametrize("target", EMULATED)
def test_debians_compiler_makes_the_shipped_file_anew(
    target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gcc = need_gcc(target)
    made = build_firmware(tmp_path, target)
    assert capfd.readouterr().err == ""
    version = subprocess.run([gcc, "--version"], capture_output=True, text=True).stdout
    if version.partition("\n")[0] != MADE_WITH[gcc]:
        pytest.skip(f"what is shipped was made by {MADE_WITH[gcc]}")
    assert made.read_bytes() == path(made.name).read_bytes(), (
        "the sources or the flags changed: python3 csrc/firmware/build.py openamp_py/firmware "
        + " ".join(EMULATED)
    )


def test_the_place_of_the_sources_does_not_show(tmp_path: Path) -> None:
    need_gcc("cortex-m3")
    shutil.copytree(build.FIRMWARE_DIR, tmp_path / "elsewhere")
    subprocess.run(
        [sys.executable, "elsewhere/build.py", ".", "cortex-m3"], cwd=tmp_path, check=True
    )
    there = (tmp_path / "echo-cortex-m3.elf").read_bytes()
    assert there == build_firmware(tmp_path / "here", "cortex-m3").read_bytes()


def test_every_board_has_its_file_and_every_file_a_board() -> None:
    assert {target_of(board) for board in BOARDS} == set(EMULATED)
    for board in BOARDS:
        firmware = decode_elf_untrusted(path(ECHO[board]).read_bytes())
        check_image(find_board(board), firmware)
        assert firmware.table_da is not None


@pytest.mark.parametrize("target", EMULATED)
def test_a_shipped_file_finds_a_board_of_its_own(target: str) -> None:
    name = f"echo-{target}.elf"
    assert ECHO[choose_board(decode_elf_untrusted(path(name).read_bytes())).name] == name


@pytest.mark.parametrize("name", sorted(set(ECHO.values())))
def test_what_is_shipped_is_sound_and_its_code_is_apart_from_its_data(name: str) -> None:
    image = path(name).read_bytes()
    assert lint_firmware(image) == ()
    code, data = decode_elf_untrusted(image).segments
    assert code.da + code.memory_size <= data.da
    assert data.da % PAGE == 0


# ---- both compilers ----


@needs_zig
@pytest.mark.parametrize("target", EMULATED)
def test_zig_builds_it_without_a_warning(
    target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = build_firmware(tmp_path, target, zig=True)
    assert capfd.readouterr().err == ""
    assert lint_firmware(made.read_bytes()) == ()


@needs_zig
@pytest.mark.parametrize("board", ["mps2-an385", "virt-rv32", "virt-rv64"])
async def test_what_zig_built_runs(board: str, tmp_path: Path) -> None:
    need_board(board)
    await _echo(board, build_firmware(tmp_path, target_of(board), zig=True))


# ---- it runs ----


@pytest.mark.parametrize("board", BOARDS)
async def test_the_shipped_firmware_echoes_and_powers_down(board: str) -> None:
    need_board(board)
    console = await _echo(board, path(ECHO[board]))
    if find_board(board).console is None:
        assert console == ""
    else:
        assert console.startswith("booted: echo on ")
        assert console.endswith("shutdown\n")


@pytest.mark.parametrize("board", BOARDS)
async def test_the_order_to_crash_faults_at_its_address_on_each_board(board: str) -> None:
    need_board(board)
    with trio.fail_after(LIMIT):
        async with (
            open_session(QemuPlatform(board), path(ECHO[board])) as session,
            session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
        ):
            await endpoint.send(struct.pack("<I", CRASH))
            with pytest.raises(trio.BrokenResourceError) as caught:
                await endpoint.receive()
    error = caught.value.__cause__
    assert isinstance(error, CoreCrashedError)
    assert error.address == CRASH_ADDRESS
    code = decode_elf_untrusted(path(ECHO[board]).read_bytes()).segments[0]
    assert error.pc is not None and code.da <= error.pc < code.da + code.memory_size


# ---- refusals ----


def test_a_missing_compiler_is_told_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    for target, package in (
        ("rv32", "gcc-riscv64-unknown-elf"),
        ("cortex-m3", "gcc-arm-none-eabi"),
    ):
        with pytest.raises(
            BuildError, match=f"No such file.*install the Debian package {package}$"
        ):
            build_firmware(tmp_path, target)
    assert list(tmp_path.iterdir()) == []


def test_what_the_compiler_says_is_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_gcc("rv32")
    monkeypatch.setattr(build, "APPLICATIONS", {**APPLICATIONS, "echo": ("no-such.c",)})
    with pytest.raises(BuildError, match=r"no-such\.c: No such file"):
        build_firmware(tmp_path, "rv32")


def test_an_unknown_target_is_refused_with_those_there_are(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, os.fspath(Path(build.__file__)), os.fspath(tmp_path), "cortex-m4"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no target 'cortex-m4'; there are native, cortex-m3, " in done.stderr
