"""``openamp lint`` and ``openamp inspect`` on images of any format, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openamp_py.cli import main
from openamp_py.constants import DA_ANY
from openamp_py.platforms.native import shipped_echo
from openamp_py.remoteproc import sources
from openamp_py.remoteproc.elf import decode_elf_untrusted
from openamp_py.remoteproc.resource_table import DevMem, encode_table, rpmsg_table

ECHO = shipped_echo()


def _status_at() -> int:
    """Where in the shipped file the status of its virtio device is."""
    table = decode_elf_untrusted(ECHO.read_bytes()).table
    assert table is not None
    return ECHO.read_bytes().index(table.raw) + table.vdevs[0].offset + 24


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """The shipped firmware with a status in its table, which is a warning."""
    image = bytearray(ECHO.read_bytes())
    image[_status_at()] = 4
    changed = tmp_path / "preset.elf"
    changed.write_bytes(image)
    return changed


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The same with one vring and, before it, a status."""
    image = bytearray(ECHO.read_bytes())
    image[_status_at() : _status_at() + 2] = b"\4\1"
    changed = tmp_path / "broken.elf"
    changed.write_bytes(image)
    return changed


def test_the_shipped_firmware_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", "--strict", "--ram", "0x20000000:0x1000000", str(ECHO)]) == 0
    assert capsys.readouterr().out == f"{ECHO}: clean\n"


def test_each_finding_is_a_paragraph(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(broken)]) == 1
    one, two, end = capsys.readouterr().out.split("\n\n")
    fault, why, cure = one.splitlines()
    assert fault.startswith("error: table entry 2 (vdev) at ")
    assert fault.endswith(": 1 vrings, expected 2 [rpmsg-vrings]")
    assert why.startswith("  why:  ") and cure.startswith("  cure: ")
    assert two.startswith("warning: ") and "[status-preset]" in two
    assert end == f"{broken}: 1 error, 1 warning\n"


def test_a_warning_fails_only_when_strict(preset: Path) -> None:
    assert main(["lint", str(preset)]) == 0
    assert main(["lint", "--strict", str(preset)]) == 1


def test_a_note_never_fails(tmp_path: Path) -> None:
    image = tmp_path / "image.hex"
    image.write_text(":010000007887\n:00000001FF\n")
    assert main(["lint", "--strict", str(image)]) == 0


def test_memory_that_the_core_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", "--ram", "0:4096", "--ram", "0x30000000:4096", "--json", str(ECHO)]) == 1
    result = json.loads(capsys.readouterr().out)
    assert {finding["code"] for finding in result["findings"]} == {"outside-ram"}
    assert "0x0..0x1000, 0x30000000..0x30001000" in result["findings"][0]["what"]


def test_json_is_one_object(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", "--json", str(broken)]) == 1
    result = json.loads(capsys.readouterr().out)
    findings = result.pop("findings")
    assert result == {"firmware": str(broken), "errors": 1, "warnings": 1, "notes": 0}
    assert [finding["code"] for finding in findings] == ["rpmsg-vrings", "status-preset"]
    assert all(
        list(finding) == ["code", "severity", "where", "what", "why", "cure"]
        for finding in findings
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["lint"],
        ["lint", "--ram", "5", "x"],
        ["lint", "--ram", "0:-1", "x"],
        ["lint", "--ram", "a:b", "x"],
        ["inspect", "--loader", "uf2", "x"],
        ["inspect", "--address", "ten", "x"],
    ],
)
def test_wrong_use(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "_memory" not in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(tmp_path / "none.elf")]) == 1
    assert "no such file" in capsys.readouterr().err.lower()


@pytest.mark.parametrize("command", ["lint", "inspect"])
@pytest.mark.parametrize(
    ("name", "message"),
    [("/", "Is a directory"), ("/dev/zero", "more; the limit is"), ("sparse", "more; the limit")],
)
def test_what_cannot_be_read_is_one_line(
    command: str,
    name: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sources, "IMAGE_LIMIT", 1 << 22)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate((1 << 22) + 1)
    assert main([command, str(tmp_path / name)]) == 1
    out, err = capsys.readouterr()
    assert not out and message in err
    assert err.startswith(f"openamp {command}: ") and err.count("\n") == 1


def test_firmware_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAMP_FIRMWARE_PATH", str(ECHO.parent))
    assert main(["lint", ECHO.name]) == 0
    assert main(["inspect", ECHO.name]) == 0


def test_inspect_shows_images_of_other_formats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "image.bin"
    image.write_bytes(b"code")
    assert main(["inspect", "--loader", "raw", "--address", "0x1000", str(image)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{image}: no ELF, entry 0x1000\nsegment 0: da 0x1000, 0x4 bytes")
    assert main(["inspect", str(image)]) == 1
    assert "name the loader, raw, and give its address" in capsys.readouterr().err


def test_inspect_shows_what_is_not_mapped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = decode_elf_untrusted(ECHO.read_bytes()).table
    assert table is not None
    other = rpmsg_table(extra=[DevMem(0x4000_0000, DA_ANY, 0x1000, 0, "uart")])
    image = tmp_path / "devmem.elf"
    image.write_bytes(ECHO.read_bytes().replace(table.raw, encode_table(other).ljust(200, b"\0")))
    assert main(["inspect", str(image)]) == 0
    assert "  1: devmem (not mapped): offset" in capsys.readouterr().out
