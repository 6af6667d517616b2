"""``openamp bench`` as a user calls it."""

from __future__ import annotations

import json

import pytest

from openamp_py.cli import main

QUICK = ("--seconds", "0.002", "--repeat", "2")


def test_json_has_a_row_for_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *QUICK, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "", "progress is for terminals"
    result = json.loads(captured.out)
    assert (result["seconds"], result["repeat"]) == (0.002, 2)
    rows = {(row["core"], row["size"], row["case"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 3 * 2 * 2
    for row in rows.values():
        assert row["ratio"] > 0
        for figures in (row["python"], row["c"]):
            for unit in ("per_second", "us"):
                values = figures[unit]
                assert 0 < values["min"] <= values["median"] <= values["max"]


def test_the_table_has_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--core", "loopback", "--core", "native", "--size", "32", "--case", "flood"]
    assert main(["bench", *QUICK, *options]) == 0
    title, *rows = capsys.readouterr().out.splitlines()[:3]
    assert title.split()[:3] == ["core", "bytes", "case"]
    assert [row.split()[:3] for row in rows] == [
        ["loopback", "32", "flood"],
        ["native", "32", "flood"],
    ]


@pytest.mark.parametrize("size", ["4", "497"])
def test_an_impossible_size_is_a_mistake_of_usage(
    capsys: pytest.CaptureFixture[str], size: str
) -> None:
    assert main(["bench", *QUICK, "--core", "loopback", "--size", size]) == 2
    assert capsys.readouterr().err == (
        f"openamp bench: messages of {size} bytes; 8 to 496 are possible\n"
    )


@pytest.mark.parametrize("options", [["--case", "x"], ["--core", "x"], ["--repeat", "0"]])
def test_bad_options(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *options])
    assert caught.value.code == 2
