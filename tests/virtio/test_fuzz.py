"""The C rings fuzzed: libFuzzer makes up what a hostile peer does, guided by what the rings do."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.fuzz

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PROGRAMS = ROOT / "tests" / "c"
SOURCES = ("virtqueue.c", "message_ring.c", "polling.c")

SECONDS = int(os.environ.get("OPENAMP_FUZZ_SECONDS", "10"))

MUTANT_SECONDS = 60
"""Most that it may take to find a bug that was put in. Nearly all are found in one."""

ROUND_SECONDS = 5
"""A round takes less than a millisecond; one that takes this long does not end."""

INPUT_SIZE = 1024
"""Enough for about a hundred calls; longer ones find no more, and take longer."""

SANITIZERS = "-fsanitize=fuzzer,address,undefined"
FAULTS = range(1, 9)
"""VQ_FAULT_..."""

Compile = Callable[[Path, Path], Path]


class Mutant(NamedTuple):
    """Another piece of code instead of the one that is there."""

    file: str
    right: str
    wrong: str


MUTANTS = {
    "id": Mutant("virtqueue_inline.h", "if (id >= q->num)", "if (id > 0xFFFFFFu)"),
    "region": Mutant("virtqueue_inline.h", "length <= region->size", "length / 2 <= region->size"),
    "next": Mutant("virtqueue.c", "if (d.next >= entries)", "if (d.next > 4096u)"),
    "order": Mutant("virtqueue.c", "&& !spans[n].writable", "&& spans[n].writable > 1"),
    "writable": Mutant("message_ring.c", "!(d.flags & DESC_WRITE) || d.len", "d.len"),
    "spare": Mutant("message_ring.c", "ring->spares[i] == head", "ring->spares[i] > 64u"),
    "twice": Mutant(
        "virtqueue_inline.h", "(int32_t)id;", "(int32_t)__atomic_load_n(&element->id, 0);"
    ),
    "header": Mutant("message_ring.c", "chain.filled >= MESSAGE_HEADER &&", ""),
    "resume": Mutant("virtqueue.c", "if (heads[i] >= q->num)", "if (heads[i] > 0x8000u)"),
    "count": Mutant("virtqueue_inline.h", "(uint16_t)(q->free_count + count)", "q->free_count"),
}


@pytest.fixture(scope="module")
def compile_fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles the program into a directory, with the ring's sources from another."""
    compiler = shutil.which("clang")
    if compiler is None:
        pytest.skip("no clang (Debian packages clang and libclang-rt-dev)")
    flags = runpy.run_path(str(CSRC / "build.py"))["COMPILE_FLAGS"]
    probe = tmp_path_factory.mktemp("probe") / "probe.c"
    probe.write_text(
        "int LLVMFuzzerTestOneInput(const unsigned char *bytes, unsigned long size);\n"
        "int LLVMFuzzerTestOneInput(const unsigned char *bytes, unsigned long size)\n"
        "{ return size && bytes[0] > 255; }\n"
    )
    made = run(compiler, SANITIZERS, "-w", str(probe), "-o", str(probe.with_suffix("")))
    if made.returncode:
        reason = made.stderr.strip()
        pytest.skip(f"no libFuzzer (Debian package libclang-rt-dev): {reason}")

    def compile_(place: Path, sources: Path) -> Path:
        program = place / "ring_fuzz"
        made = run(
            compiler, *flags, "-Werror", "-g", SANITIZERS, "-fno-sanitize-recover=all",
            "-DCOVERAGE_GUIDED", f"-I{sources}", "-include", str(PROGRAMS / "racing_peer.h"),
            str(PROGRAMS / "ring_fuzz.c"), *(str(sources / source) for source in SOURCES),
            "-o", str(program),
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        return program

    return compile_


def run(*command: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
    )


def fuzz(program: Path, seconds: int) -> subprocess.CompletedProcess[str]:
    """Begins with nothing: the program takes any bytes, so that a corpus is soon made up."""
    return run(
        str(program),
        f"-max_total_time={seconds}",
        f"-max_len={INPUT_SIZE}",
        "-len_control=0",
        f"-timeout={ROUND_SECONDS}",
        "-seed=1",
        f"-artifact_prefix={program.parent}/",
        seconds=seconds + 60,
    )


def found(program: Path) -> list[Path]:
    """The inputs that went wrong."""
    kinds = ("crash", "leak", "oom", "timeout")
    return [path for kind in kinds for path in program.parent.glob(f"{kind}-*")]


def explain(program: Path, done: subprocess.CompletedProcess[str]) -> str:
    """What went wrong, and the input with which it does again."""
    inputs = [f"{program} {path}\n{path.read_bytes().hex()}" for path in found(program)]
    return "\n".join([done.stderr[-6000:], "Reproduce with:", *inputs])


def test_fuzz(compile_fuzzer: Compile, tmp_path: Path) -> None:
    """Nothing goes wrong, and there was no fault that a peer could not bring about."""
    program = compile_fuzzer(tmp_path, CSRC)
    done = fuzz(program, SECONDS)
    assert done.returncode == 0, explain(program, done)
    covered = re.search(r"DONE +cov: (\d+)", done.stderr)
    runs = re.search(r"Done (\d+) runs in (\d+) second", done.stderr)
    assert covered and runs, done.stderr
    each = int(runs[1]) / int(runs[2])
    print(f"\n{runs[1]} executions in {runs[2]} s ({each:.0f}/s), {covered[1]} edges covered")
    print(done.stdout, end="")
    faults = [int(number) for number in done.stdout.partition("faults")[2].split()]
    assert len(faults) == len(FAULTS) and all(faults), f"every fault was met: {done.stdout}"


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_bug_is_found(compile_fuzzer: Compile, tmp_path: Path, mutant: Mutant) -> None:
    """The fuzzer can fail: without one check, or with one load too many, it soon does."""
    for source in CSRC.glob("*.[ch]"):
        shutil.copy(source, tmp_path)
    text = (tmp_path / mutant.file).read_text()
    assert text.count(mutant.right) == 1
    (tmp_path / mutant.file).write_text(text.replace(mutant.right, mutant.wrong))
    program = compile_fuzzer(tmp_path, tmp_path)
    done = fuzz(program, MUTANT_SECONDS)
    assert done.returncode != 0 and found(program), done.stderr[-2000:]
    executions = re.findall(r"^#(\d+)", done.stderr, re.MULTILINE)[-1]
    print(f"\nfound after {executions} executions")
