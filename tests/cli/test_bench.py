"""``openamp bench`` as a user calls it."""

from __future__ import annotations

import json
import os

import pytest

from openamp_py.cli import main

COMMON = [
    "session",
    "boot",
    "recovery",
    "recovery-dump",
    "recovery-inline",
    "suspend",
    "resume",
]
STEPS = [
    *(("native", step) for step in (*COMMON, "detach", "attach")),
    *(
        ("native", f"{cycle}{what}")
        for cycle in ("boots", "crashes")
        for what in ("", "-memory", "-descriptors", "-children")
    ),
    ("-", "memcpy"),
    *(("native", step) for step in ("load", "load-ratio", "load-path")),
    ("-", "table"),
    *(("process", step) for step in COMMON),
]
TARGETS = {
    *(("native", step) for step in ("session", "boot", "recovery", "load-ratio")),
    *((core, step) for core, step in STEPS if step.count("-") and "s-" in step),
    ("-", "table"),
}

QUICK = ("--seconds", "0.002", "--repeat", "2")


def test_json_has_a_row_for_everything(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--case", "flood", "--endpoints", "1", "--endpoints", "2"]
    assert main(["bench", *QUICK, *options, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "", "progress is for terminals"
    result = json.loads(captured.out)
    assert (result["seconds"], result["repeat"]) == (0.002, 2)
    assert result["cpus"] == len(os.sched_getaffinity(0))
    rows = {
        (row["core"], row["case"], row["size"], row["endpoints"]): row for row in result["rows"]
    }
    assert len(rows) == len(result["rows"]) == 2 * 2
    for row in rows.values():
        assert row["ratio"] > 0
        assert isinstance(row["met"], bool)
        assert row["target"][:2] == ("<=" if row["ratio_is"] == "time" else ">=")
        for contender in ("python", "event", "polling"):
            for unit in ("per_second", "us"):
                values = row[contender][unit]
                assert 0 < values["min"] <= values["median"] <= values["max"]
    assert rows["process", "flood", 16, 1]["ratio_of"] == "(b)"
    assert rows["process", "flood", 496, 1]["ratio_of"] == "16 B"
    assert rows["process", "flood", 16, 2]["ratio_of"] == "1 ep"


def test_the_table_has_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--core", "loopback", "--core", "native", "--size", "32", "--case", "echo"]
    assert main(["bench", *QUICK, *options]) == 0
    title, *rows, legend = capsys.readouterr().out.splitlines()[:4]
    assert legend.startswith("Medians of 2; ")
    assert title.split()[:4] == ["core", "case", "bytes", "ep"]
    assert [row.split()[:4] for row in rows] == [
        ["loopback", "echo", "32", "1"],
        ["native", "echo", "32", "1"],
    ]
    assert [row.split()[7] for row in rows] == ["-", "-"], "there is no (b)"


def test_a_soak(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--case", "soak", "--messages", "1000"]) == 0
    _, row, summary = capsys.readouterr().out.splitlines()
    assert row.split()[-3:-1] == ["flat", "memory"]
    assert row.split()[-1] in ("met", "missed")
    assert summary.startswith("1,000 messages, none lost or out of order; host ")


def test_a_soak_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--case", "soak", "--messages", "1000", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["ratio"] is row["ratio_of"] is row["event"] is row["polling"] is None
    soak = row["soak"]
    assert (soak["messages"], soak["lost"], soak["out_of_order"]) == (1000, 0, 0)
    assert all(size > 1 << 20 for side in ("host", "core") for size in soak[f"{side}_bytes"])


LIFECYCLE = ("--case", "lifecycle", "--repeat", "1", "--cycles", "2")


def test_lifecycle(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *LIFECYCLE, "--core", "native", "--repeat", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "", "crashes are asked for, and nothing to warn of"
    title, *lines = captured.out.splitlines()
    assert title.split() == ["core", "step", "median", "from", "least", "to", "most", "target"]
    steps = [step for step in STEPS if step[0] != "process"]
    rows = {tuple(line.split()[:2]): line.split() for line in lines[: len(steps)]}
    assert [*rows] == steps
    assert lines[len(steps)].startswith("Medians of 2 in a warm program; ")
    for step in TARGETS:
        assert rows[step][-1] in ("met", "missed")
        assert rows[step][-3] in ("<=", ">=")
    children = " ".join(rows["native", "boots-children"][2:])
    assert children == "0 0 before, 0 after <= 0 met"
    assert len(rows["native", "boots"]) == 4, "all boots are one value"
    _, _, _, unit, _, to, _ = rows["native", "suspend"]
    assert (unit, to) == ("ms", "to")


def test_lifecycle_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *LIFECYCLE, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["repeat"], result["cycles"], result["rows"]) == (1, 2, [])
    rows = {(row["core"], row["step"]): row for row in result["lifecycle"]}
    assert [*rows] == STEPS
    for step, row in rows.items():
        assert row["min"] <= row["median"] <= row["max"]
        assert (row["target"] is not None) is isinstance(row["met"], bool) is (step in TARGETS)
    ratio = rows["native", "load-ratio"]
    assert (ratio["target"], ratio["unit"]) == (">= 0.5", "memcpy")
    grown = rows["native", "crashes-descriptors"]
    assert grown["median"] == grown["after"] - grown["before"]
    assert "before" not in rows["native", "crashes"]


def test_lifecycle_beside_messages(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--core", "native", "--case", "ping", "--size", "16", "--endpoints", "1"]
    assert main(["bench", *QUICK, *LIFECYCLE, *options]) == 0
    tables = capsys.readouterr().out.split("\n\n")
    assert [table.split()[:2] for table in tables] == [["core", "step"], ["core", "case"]]
    assert "native   session" in tables[0]
    assert "process  session" not in tables[0], "only what was asked for"
    assert "native   ping" in tables[1]


def test_lifecycle_on_a_core_without(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--core", "loopback", *LIFECYCLE]) == 2
    assert capsys.readouterr().err == (
        "openamp bench: core loopback has no case lifecycle; the cores with it are "
        "native, process\n"
    )


def test_cores(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--core", "native", "--core", "loopback", "--case", "cores"]
    assert main(["bench", *QUICK, *options]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split()[:2] == ["core", "step"]
    steps = ["first-message", "round-trip", "round-trip-p99", "flood"]
    rows = [(core, step) for core in ("native", "loopback") for step in steps]
    assert [tuple(line.split()[:2]) for line in lines[: len(rows)]] == rows
    assert lines[len(rows)].startswith("Medians of 2 in a warm program; 100 bytes of payload.")


def test_cores_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *QUICK, "--core", "loopback", "--case", "cores", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rows"] == []
    first = result["cores"][0]
    assert (first["core"], first["step"], first["unit"]) == ("loopback", "first-message", "ms")
    assert (first["target"], first["met"]) == (None, None)


def test_an_emulated_core_has_a_case_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--core", "qemu:virt-rv32"]) == 2
    assert "core qemu:virt-rv32 has none of the cases ping, " in capsys.readouterr().err


@pytest.mark.parametrize("size", ["4", "497"])
def test_an_impossible_size_is_a_mistake_of_usage(
    capsys: pytest.CaptureFixture[str], size: str
) -> None:
    assert main(["bench", *QUICK, "--core", "loopback", "--size", size]) == 2
    assert capsys.readouterr().err == (
        f"openamp bench: messages of {size} bytes; 8 to 496 are possible\n"
    )


def test_a_case_that_the_core_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--core", "loopback", "--case", "soak"]) == 2
    assert capsys.readouterr().err == (
        "openamp bench: core loopback has no case soak; there are ping, echo\n"
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--case", "x"],
        ["--core", "x"],
        ["--repeat", "0"],
        ["--endpoints", "0"],
        ["--messages", "0"],
        ["--cycles", "0"],
        ["--seconds", "-1"],
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *options])
    assert caught.value.code == 2
