"""Boards: which one an image fits, why none, how its core begins; and what QEMU makes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py import firmware as shipped
from openamp_py.constants import DA_ANY, EM_AARCH64, EM_ARM, EM_RISCV
from openamp_py.errors import ImageError
from openamp_py.platforms.boards import (
    BOARDS,
    Board,
    boot_options,
    check_image,
    choose_board,
    find_board,
    find_vectors,
)
from openamp_py.remoteproc.elf import Firmware, Segment, decode_elf_untrusted
from openamp_py.remoteproc.resource_table import (
    Carveout,
    ResourceTable,
    Trace,
    Vdev,
    Vring,
    decode_table_untrusted,
    encode_table,
)

LIMIT = 30.0
CORTEX_M = [name for name, board in BOARDS.items() if board.vectors]
BEHIND = 0x40
"""Where behind a table's beginning the code of `cortex_m` lies."""


def cortex_m(da: int, *, stack: int = 0, architecture: str | None = "v7-M") -> Firmware:
    """A vector table and, behind it, a loop."""
    code = struct.pack("<II", stack or da + 0x1000, da + BEHIND | 1).ljust(BEHIND, b"\0")
    return image(Segment(da, code + b"\xfe\xe7" * 8, 0x200, 5), da + BEHIND, architecture)


def image(
    segment: Segment, entry: int, architecture: str | None = None, machine: int = EM_ARM
) -> Firmware:
    bits = 64 if machine == EM_AARCH64 else 32
    return Firmware(bits, machine, "its name", entry, (segment,), arm_architecture=architecture)


def code(da: int, machine: int, bits: int = 32) -> Firmware:
    loop = {EM_RISCV: 0x0000_006F, EM_ARM: 0xEAFF_FFFE, EM_AARCH64: 0x1400_0000}[machine]
    whole = image(Segment(da, struct.pack("<I", loop), 4, 5), da, None, machine)
    return dataclasses.replace(whole, elf_class=bits)


def with_parts(firmware: Firmware, *parts: Segment) -> Firmware:
    segments = sorted((*firmware.segments, *parts), key=lambda segment: segment.da)
    return dataclasses.replace(firmware, segments=tuple(segments))


def with_entries(firmware: Firmware, da: int, *entries: Any) -> Firmware:
    raw = encode_table(ResourceTable(tuple(entries)))
    table = decode_table_untrusted(raw)
    placed = with_parts(firmware, Segment(da, raw, len(raw), 6))
    return dataclasses.replace(placed, table=table, table_da=da)


# The table


def test_boards_are_found_by_name() -> None:
    assert find_board("mps2-an385").cpu == "Cortex-M3"
    assert find_board("virt-rv64").program == "qemu-system-riscv64"
    assert list(BOARDS) == [board.name for board in BOARDS.values()]


def test_windows_are_in_the_ram_and_nothing_overlaps() -> None:
    for board in BOARDS.values():
        assert board.ram.holds(board.window.da, board.window.size)
        windows = sorted((board.ram, *board.private), key=lambda window: window.da)
        for low, high in pairwise(windows):
            assert low.da + low.size <= high.da, board.name
        assert board.window.da + board.window.size <= 1 << 32, "a resource table's addresses"
        assert board.console != board.doorbell


def test_a_window_holds_what_lies_in_it_wholly() -> None:
    window = find_board("mps2-an385").window
    assert str(window) == "PSRAM 0x21000000..0x22000000"
    assert window.holds(0x2100_0000, 1 << 24)
    assert not window.holds(0x2100_0001, 1 << 24)
    assert not window.holds(0x20FF_FFFF, 2)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("lm3s6965evb", "cannot be used: QEMU makes its RAM itself"),
        ("musca-b1", "cannot be used: QEMU makes its RAM itself"),
        ("xlnx-zcu102", "cannot be used: QEMU leaves its Cortex-R5 cores off"),
        ("pdp-11", "no board is named 'pdp-11'; there are mps2-an385, mps2-an386"),
        ("", "no board is named ''"),
    ],
)
def test_a_board_that_cannot_be_had_is_refused_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        find_board(name)


# Which board an image fits


@pytest.mark.parametrize(
    ("firmware", "name"),
    [
        (cortex_m(0x2100_0000), "mps2-an385"),
        (cortex_m(0x2100_0000, architecture="v6S-M"), "mps2-an385"),
        (cortex_m(0x2100_0000, architecture=None), "mps2-an385"),
        (cortex_m(0x2100_0000, architecture="v7E-M"), "mps2-an386"),
        (cortex_m(0, stack=0x2040_0000), "mps2-an385"),
        (cortex_m(0x80_0000, stack=0x2000_1000), "mps2-an511"),
        (cortex_m(0x6000_0000), "mps2-an500"),
        (cortex_m(0x6000_0000, architecture="v7E-M"), "mps2-an500"),
        (cortex_m(0x6000_0000, architecture="v8-M.main"), "mps3-an524"),
        (cortex_m(0x6000_0000, architecture="v8.1-M.main"), "mps3-an547"),
        (cortex_m(0x8000_0000, architecture="v8-M.main"), "mps2-an521"),
        (cortex_m(0x8000_0000, architecture="v8-M.base"), "mps2-an521"),
        (cortex_m(0x1000_0000, architecture="v8-M.main"), "mps2-an521"),
        (cortex_m(0x1000_0000, architecture="v8.1-M.main"), "mps3-an547"),
        (code(0x4020_0000, EM_ARM), "virt-arm"),
        (code(0x4020_0000, EM_AARCH64, 64), "virt-aarch64"),
        (code(0x8000_0000, EM_RISCV), "virt-rv32"),
        (code(0x8000_0000, EM_RISCV, 64), "virt-rv64"),
    ],
)
def test_a_board_is_chosen_by_architecture_and_addresses(firmware: Firmware, name: str) -> None:
    assert choose_board(firmware).name == name
    check_image(find_board(name), firmware)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("echo-cortex-m3.elf", "mps2-an385"),
        ("echo-mps2-an500.elf", "mps2-an500"),
        ("echo-mps2-an505.elf", "mps2-an521"),
        ("echo-mps3-an524.elf", "mps3-an524"),
        ("echo-rv32.elf", "virt-rv32"),
        ("echo-rv64.elf", "virt-rv64"),
    ],
)
def test_the_shipped_firmware_finds_its_board(file: str, name: str) -> None:
    firmware = decode_elf_untrusted(shipped.path(file).read_bytes())
    board = choose_board(firmware)
    assert board.name == name
    if board.vectors:
        assert find_vectors(board, firmware) == (board.window.da, firmware.entry | 1)


def test_code_in_private_ram_with_what_is_shared_in_the_window_fits() -> None:
    vdev = Vdev(7, 0, 1, vrings=(Vring(0x2110_0000, 4096, 16, 0), Vring(DA_ANY, 4096, 16, 1)))
    buffers = Carveout(0x2120_0000, 0, 0x1000, 0, "vdev0buffer")
    mine = Carveout(0x2000_2000, 0, 0x100, 0, "heap")
    code_at_0 = cortex_m(0, stack=0x2000_1000)
    firmware = with_entries(code_at_0, 0x2100_0000, vdev, buffers, mine)
    assert choose_board(firmware).name == "mps2-an385"


@pytest.mark.parametrize(
    ("firmware", "message"),
    [
        (
            Firmware(64, 62, "x86-64"),
            "no board runs the image, which is for x86-64 (64 bit); there are mps2-an385 "
            "(Cortex-M3), mps2-an386",
        ),
        (Firmware(), "which is for no machine that it names; there are mps2-an385"),
        (code(0x8000_0000, EM_AARCH64), "which is for AArch64 (32 bit); there are"),
        (cortex_m(0x2100_0000, architecture="v7-R"), "which is for ARM (32 bit), v7-R; there are"),
        (
            cortex_m(0x5000_0000),
            "no board fits the image, for ARM (32 bit), v7-M; nearest is mps2-an385: segment 0: "
            "0x200 bytes at 0x50000000 lie outside its memory; link the image into PSRAM",
        ),
        (
            with_parts(cortex_m(0x2100_0000), Segment(0x9000_0000, b"", 4, 6)),
            "nearest is mps2-an385: segment 1: 0x4 bytes at 0x90000000 lie outside its memory; "
            "link the image into PSRAM 0x21000000..0x22000000, SSRAM1 0x0..0x400000",
        ),
        (
            code(0x8100_0000, EM_RISCV),
            "segment 0: 0x4 bytes at 0x81000000 lie in RAM that is not for firmware (QEMU writes "
            "its device tree there); link the image into RAM 0x80000000..0x81000000",
        ),
        (code(0x4000_0000, EM_AARCH64, 64), "lie in RAM that is not for firmware"),
    ],
)
def test_an_image_that_fits_no_board_is_refused_with_the_nearest(
    firmware: Firmware, message: str
) -> None:
    with pytest.raises(ImageError, match=re.escape(message)):
        choose_board(firmware)


# Refusals of one board

ANY = Vring(DA_ANY, 4096, 16, 1)
RINGS = (Vring(0x2000_0000, 4096, 16, 0), ANY)


@pytest.mark.parametrize(
    ("firmware", "message"),
    [
        (
            code(0x8000_0000, EM_RISCV),
            "the image is for RISC-V (32 bit); mps2-an385 (Cortex-M3) runs ARM (32 bit)",
        ),
        (
            cortex_m(0x2100_0000, architecture="v8-M.main"),
            "the image is built for v8-M.main; mps2-an385 (Cortex-M3) runs v6-M, v6S-M, v7-M",
        ),
        (Firmware(32, EM_ARM), "the entry point 0x0 lies in none of the image's segments"),
        (
            dataclasses.replace(cortex_m(0x2100_0000), entry=0x2100_0201),
            "the entry point 0x21000201 lies in none of the image's segments",
        ),
        (
            with_entries(cortex_m(0x2100_0000), 0x2000_0000),
            "the resource table: 0x10 bytes at 0x20000000 lie in SSRAM23 of mps2-an385, which "
            "host and core cannot share; link it into PSRAM 0x21000000..0x22000000, "
            "with no load address elsewhere (AT>)",
        ),
        (
            with_entries(cortex_m(0x2100_0000), 0x2100_8000, Vdev(7, 0, 1, vrings=RINGS)),
            "vdev 0 vring 0: 0x1086 bytes at 0x20000000 lie in SSRAM23",
        ),
        (
            with_entries(
                cortex_m(0x2100_0000),
                0x2100_8000,
                Vdev(7, 0, 1, vrings=(ANY, ANY)),
                Carveout(0x1000, 0, 0x100, 0, "vdev0buffer"),
            ),
            "carveout 'vdev0buffer': 0x100 bytes at 0x1000 lie in SSRAM1",
        ),
    ],
)
def test_what_a_board_cannot_run_is_refused_with_the_cure(firmware: Firmware, message: str) -> None:
    with pytest.raises(ImageError, match=re.escape(message)):
        check_image(find_board("mps2-an385"), firmware)


def test_an_image_that_names_no_machine_is_taken_at_its_word() -> None:
    """HEX and S-record files do not."""
    plain = dataclasses.replace(cortex_m(0x2100_0000), machine=0, elf_class=0)
    check_image(find_board("mps2-an385"), plain)


def test_a_trace_that_the_host_cannot_see_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    for da, said in ((0x2000_0000, True), (0x2101_0000, False), (DA_ANY, False)):
        firmware = with_entries(cortex_m(0x2100_0000), 0x2100_8000, Trace(da, 64, "trace0"))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_image(choose_board(firmware), firmware)
        assert [record.levelname for record in caplog.records] == ["WARNING"] * said
    assert "trace 'trace0'" in caplog.text or not caplog.text


# How a core begins


def test_the_vector_table_is_where_stack_and_entry_are() -> None:
    board = find_board("mps2-an385")
    assert find_vectors(board, cortex_m(0x2100_0000)) == (0x2100_0000, 0x2100_0041)
    table = struct.pack("<II", 0x2100_4000, 0x2100_0041)
    before = Segment(0x2100_0000, b"\0" * 0x180 + table, 0x200, 5)
    assert find_vectors(board, image(before, 0x2100_0041)) == (0x2100_0180, 0x2100_0041)
    odd = Segment(0x2100_0004, b"\0" * 0x180 + table, 0x200, 5)
    assert find_vectors(board, image(odd, 0x2100_0041)) is None, "not aligned to 128"
    top = struct.pack("<II", 0x2200_0000, 0x2100_0041)
    assert find_vectors(board, image(Segment(0x2100_0000, top, 0x200, 5), 0x2100_0040))


def test_an_image_with_another_entry_is_booted_by_its_lowest_segment() -> None:
    board = find_board("mps2-an385")
    firmware = dataclasses.replace(cortex_m(0x2100_0000), entry=0x2100_0044)
    assert find_vectors(board, firmware) == (0x2100_0000, 0x2100_0041)


@pytest.mark.parametrize(
    "words",
    [
        (0x2100_1000, 0x2100_0040),  # no Thumb bit
        (0x2100_1000, 0x2200_0001),  # in no segment
        (0x2100_1002, 0x2100_0041),  # no stack: not aligned,
        (0x2100_0000, 0x2100_0041),  # below RAM,
        (0x5000_0000, 0x2100_0041),  # elsewhere
    ],
)
def test_what_is_no_vector_table_is_not_taken_for_one(words: tuple[int, int]) -> None:
    firmware = image(Segment(0x2100_0000, struct.pack("<II", *words), 0x100, 5), 0x2100_0050)
    board = find_board("mps2-an385")
    assert find_vectors(board, firmware) is None
    assert boot_options(board, firmware) == ("-device", "loader,addr=0x21000051,cpu-num=0")


def test_options_by_which_cores_begin() -> None:
    assert boot_options(find_board("mps2-an500"), cortex_m(0x6000_0000)) == (
        *("-global", "armv7m.init-nsvtor=0x60000000"),
    )
    assert boot_options(find_board("mps2-an521"), cortex_m(0x8000_0000)) == (
        *("-device", "loader,addr=0x50021110,data=0x80000000,data-len=4"),
        *("-device", "loader,addr=0x80000041,cpu-num=0"),
    )
    virt = find_board("virt-rv32")
    assert boot_options(virt, code(0x8000_0000, EM_RISCV)) == ()
    elsewhere = ("-device", "loader,addr=0x80000100,cpu-num=0")
    assert boot_options(virt, code(0x8000_0100, EM_RISCV)) == elsewhere
    assert boot_options(find_board("virt-arm"), code(0x4020_0000, EM_ARM)) == (
        *("-device", "loader,addr=0x40200000,cpu-num=0"),
    )


# Images from anywhere

addresses = st.sampled_from([0, 0x2000_0000, 0x2100_0000, 0x8000_0000, 0xFFFF_FFF0, 1 << 63])


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.sampled_from([(EM_ARM, 32), (EM_RISCV, 32), (EM_RISCV, 64), (0, 0), (62, 64)]),
    st.lists(st.tuples(addresses, st.binary(max_size=300), st.integers(0, 1 << 32)), max_size=3),
    addresses,
    st.sampled_from([None, "v7-M", "v8-M.main", "", "\ud800"]),
)
def test_any_image_is_accepted_or_refused(
    kind: tuple[int, int],
    parts: list[tuple[int, bytes, int]],
    entry: int,
    architecture: str | None,
) -> None:
    segments = tuple(Segment(da, data, len(data) + more, 7) for da, data, more in parts)
    firmware = Firmware(kind[1], kind[0], "", entry, segments, arm_architecture=architecture)
    for board in BOARDS.values():
        with contextlib.suppress(ImageError):
            check_image(board, firmware)
        assert all(isinstance(option, str) for option in boot_options(board, firmware))
    with contextlib.suppress(ImageError):
        assert choose_board(firmware).name in BOARDS


# The real thing


class Qemu:
    """A QEMU that executes nothing until it is told to."""

    def __init__(self, qmp: socket.socket, ram: int) -> None:
        self._file = qmp.makefile("rw")
        self.ram = ram
        assert "QMP" in json.loads(self._file.readline())
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "event" not in answer:
                return answer["return"]

    def words(self, da: int, count: int) -> list[int]:
        """Memory as the core sees it."""
        command = f"x /{count}wx {da:#x}"
        text = self.execute("human-monitor-command", **{"command-line": command})
        return [int(word, 16) for word in re.findall(r"(?<= )0x(\w{8})\b", text)]

    def registers(self) -> str:
        text = self.execute("human-monitor-command", **{"command-line": "info registers"})
        assert isinstance(text, str)
        return text

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def qemu(board: Board, content: dict[int, bytes], *options: str) -> Iterator[Qemu]:
    """A QEMU of a board, with that in its shared RAM."""
    program = shutil.which(board.program)
    if program is None:
        pytest.skip(f"{board.program} (Debian package {board.package})")
    ours, theirs = socket.socketpair()
    ours.settimeout(LIMIT)
    ram = os.memfd_create("openamp-test-ram")
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, ram)
        stack.callback(ours.close)
        os.ftruncate(ram, board.ram.size)
        for da, data in content.items():
            os.pwrite(ram, data, da - board.ram.da)
        backend = f"id=ram,size={board.ram.size},mem-path=/proc/self/fd/{ram},share=on"
        process = subprocess.Popen(
            [
                *(program, "-S", "-display", "none", "-nodefaults", "-no-user-config"),
                *("-monitor", "none", "-object", f"memory-backend-file,{backend}"),
                *("-machine", f"{board.machine},memory-backend=ram"),
                *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}"),
                *("-mon", "chardev=qmp,mode=control", *board.options, *options),
            ],
            pass_fds=(ram, theirs.fileno()),
            stderr=subprocess.DEVNULL,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        theirs.close()
        machine = Qemu(ours, ram)
        stack.callback(machine.close)
        yield machine


def boot(board: Board, firmware: Firmware) -> contextlib.AbstractContextManager[Qemu]:
    content = {s.da: bytes(s.data) for s in firmware.segments if board.window.holds(s.da, 1)}
    return qemu(board, content, *boot_options(board, firmware))


@pytest.mark.parametrize("name", CORTEX_M)
def test_a_cortex_m_begins_with_stack_entry_and_vector_table(name: str) -> None:
    board = find_board(name)
    da = board.window.da + 0x8000
    firmware = cortex_m(da, architecture=None)
    check_image(board, firmware)
    with boot(board, firmware) as machine:
        machine.execute("cont")
        machine.execute("stop")
        text = machine.registers()
        assert f"R13={da + 0x1000:08x}" in text
        assert f"R15={da + BEHIND:08x}" in text
        assert machine.words(0xE000_ED08, 1) == [da], "VTOR"
        assert machine.words(da, 2) == [da + 0x1000, da + BEHIND | 1]


@pytest.mark.parametrize("name", CORTEX_M)
def test_a_cortex_m_begins_in_private_ram_too(name: str, tmp_path: Path) -> None:
    board = find_board(name)
    file = tmp_path / "image"
    for da in {board.private[0].da, board.private[len(board.private) // 2].da}:
        firmware = cortex_m(da, architecture=None)
        file.write_bytes(firmware.segments[0].data)
        load = ("-device", f"loader,file={file},addr={da:#x},force-raw=on")
        with qemu(board, {}, *load, *boot_options(board, firmware)) as machine:
            machine.execute("cont")
            machine.execute("stop")
            text = machine.registers()
            assert f"R13={da + 0x1000:08x}" in text
            assert f"R15={da + BEHIND:08x}" in text
            assert machine.words(0xE000_ED08, 1) == [da], "VTOR"


@pytest.mark.parametrize("name", ["virt-rv32", "virt-rv64", "virt-arm", "virt-aarch64"])
@pytest.mark.parametrize("offset", [0, 0x1000])
def test_other_cores_begin_at_the_entry(name: str, offset: int) -> None:
    board = find_board(name)
    da = board.window.da + offset
    firmware = code(da, board.elf_machine, board.elf_class)
    check_image(board, firmware)
    with boot(board, firmware) as machine:
        machine.execute("cont")
        for _ in range(1000):  # until the reset's ROM is done
            if re.search(rf"(?i)(R15=|\bPC=|\bpc +)0*{da:x}\b", machine.registers()):
                break
        else:
            pytest.fail(machine.registers())


@pytest.mark.parametrize("name", BOARDS)
def test_qemu_leaves_the_window_alone(name: str) -> None:
    """Also at the first reset, which writes the device tree."""
    board = find_board(name)
    last = board.window.da + board.window.size - 4
    with qemu(board, {last: b"last"}) as machine:
        machine.execute("system_reset")
        start = board.window.da - board.ram.da
        size = min(board.window.size, 32 << 20)
        assert os.pread(machine.ram, size, start).rstrip(b"last").strip(b"\0") == b""
        assert machine.words(last, 1) == [int.from_bytes(b"last", "little")]


@pytest.mark.parametrize("name", CORTEX_M)
def test_private_ram_is_there_and_can_be_loaded(name: str, tmp_path: Path) -> None:
    board = find_board(name)
    places = [da for w in board.private for da in (w.da, w.da + w.size - 4)]
    # The secure half is the same RAM at other addresses.
    secure = sum("secure" in window.name for window in board.private)
    for part in (places[: len(places) // 2], places[len(places) // 2 :]) if secure else (places,):
        options = []
        for number, da in enumerate(part):
            file = tmp_path / hex(da)
            file.write_bytes(struct.pack("<I", number + 1))
            options += ["-device", f"loader,file={file},addr={da:#x},force-raw=on"]
        with qemu(board, {}, *options) as machine:
            assert [machine.words(da, 1)[0] for da in part] == list(range(1, len(part) + 1))


@pytest.mark.parametrize("name", BOARDS)
def test_the_interrupt_controller_is_where_the_board_says(name: str) -> None:
    board = find_board(name)
    with qemu(board, {}) as machine:
        kind = machine.execute("qom-get", path=board.interrupts, property="type")
    assert kind in ("armv7m", "arm_gic", "riscv.sifive.plic")


@pytest.mark.parametrize("name", ["lm3s6965evb", "netduinoplus2", "microbit", "musca-b1"])
def test_what_is_said_of_other_boards_is_so(name: str) -> None:
    with qemu(find_board("mps2-an385"), {}) as machine:
        machines = {m["name"]: m for m in machine.execute("query-machines")}
    assert name in machines
    assert "default-ram-id" not in machines[name]
    assert "default-ram-id" in machines["mps2-an385"]
