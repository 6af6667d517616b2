"""The C rings on their own: two threads under sanitizers, a hostile peer, instructions counted."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PROGRAMS = ROOT / "tests" / "c"
SOURCES = ("virtqueue.c", "message_ring.c", "polling.c")

# A program that lost a wake-up hangs; none here takes more than a few seconds.
TIMEOUT = 100

MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# GCC warns that its thread sanitizer does not see fences. Nothing here relies on them for
# order between plain accesses: they are for a store before a load, and both are atomic.
THREAD = ("-fsanitize=thread", "-Wno-tsan")

INSTRUCTIONS = {(1, 0): 400, (1, 1): 450, (16, 0): 200, (16, 1): 200}
"""Most that one message one way may take, by messages in a batch and EVENT_IDX (the OpenAMP C
library: 918). One at a time, EVENT_IDX pays for re-arming the event after each message: its wish
is for one entry and lapses, a flag stays."""

Build = Callable[..., Path]


def run(
    *command: str | Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, check=False
    )


@pytest.fixture(scope="module")
def compile_flags() -> tuple[str, ...]:
    """Those that the extension is built with."""
    flags = runpy.run_path(str(CSRC / "build.py"))["COMPILE_FLAGS"]
    return (*flags, "-Werror")


@pytest.fixture(scope="module")
def build(
    tmp_path_factory: pytest.TempPathFactory, compile_flags: tuple[str, ...]
) -> Callable[..., Path]:
    """Compiles a program with the ring's sources, once for the same flags."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc)")
    built: dict[tuple[str, ...], Path] = {}
    probed: dict[tuple[str, ...], str] = {}

    def probe(flags: tuple[str, ...]) -> str:
        """Why a program with these flags cannot be built or run here; empty if it can."""
        source = tmp_path_factory.mktemp("probe") / "probe.c"
        source.write_text("int main(void) { return 0; }\n")
        program = source.with_suffix("")
        made = run(compiler, *flags, source, "-o", program)
        ran = made if made.returncode else run(program)
        return ran.stderr or f"exit code {ran.returncode}" if ran.returncode else ""

    def make(name: str, *flags: str) -> Path:
        if (name, *flags) not in built:
            sanitizer = tuple(flag for flag in flags if flag.startswith("-fsanitize"))
            if sanitizer not in probed:
                probed[sanitizer] = probe(sanitizer)
            if probed[sanitizer]:
                pytest.skip(f"{compiler} {' '.join(sanitizer)}: {probed[sanitizer].strip()}")
            program = tmp_path_factory.mktemp(name) / name
            sources = [PROGRAMS / f"{name}.c", *(CSRC / source for source in SOURCES)]
            made = run(
                compiler, *compile_flags, "-g", *flags, f"-I{CSRC}", *sources, "-o", program,
                "-pthread",
            )  # fmt: skip
            assert made.returncode == 0, made.stderr
            built[name, *flags] = program
        return built[name, *flags]

    return make


# Two threads.


@pytest.mark.parametrize("event_idx", [0, 1], ids=["flags", "event_idx"])
@pytest.mark.parametrize("num", [1, 2, 16, 256])
@pytest.mark.parametrize("mode", ["sleep", "spin"])
@pytest.mark.parametrize("sanitizer", [MEMORY, THREAD], ids=["memory", "thread"])
def test_stress(
    build: Build, sanitizer: tuple[str, ...], mode: str, num: int, event_idx: int
) -> None:
    """Every byte arrives in order, no wake-up is lost, no sanitizer complains."""
    # More than 65536 where a message is cheap, so that the indexes wrap.
    total = 70_000 if num == 256 else 5_000
    done = run(build("ring_stress", *sanitizer), mode, str(total), str(num), str(event_idx))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{total} messages each way\n"


def test_a_missing_release_is_seen(build: Build) -> None:
    """The sanitizer can fail: without the release in vq_publish it must report a race."""
    program = build("ring_stress", *THREAD, "-DVQ_PUBLISH_ORDER=__ATOMIC_RELAXED")
    done = run(program, "spin", "20000", "16", "0", environment={"TSAN_OPTIONS": "exitcode=66"})
    assert done.returncode == 66, done.stderr
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


# A hostile peer.


def test_hostile_peer(build: Build) -> None:
    racing = ("-include", str(PROGRAMS / "racing_peer.h"))
    done = run(build("ring_fuzz", *MEMORY, *racing), "0", "50000")
    assert done.returncode == 0, done.stderr
    faults = [int(number) for number in done.stdout.partition("faults")[2].split()]
    assert len(faults) == 8 and all(faults), f"every fault was met: {done.stdout}"


# Instructions.


@pytest.fixture(scope="module")
def count_program(
    tmp_path_factory: pytest.TempPathFactory, compile_flags: tuple[str, ...]
) -> tuple[str, Path]:
    """valgrind, and the program with the rings in a shared library, as they are in Python."""
    valgrind, compiler = shutil.which("valgrind"), shutil.which("cc")
    if valgrind is None:
        pytest.skip("no valgrind (Debian package valgrind)")
    if compiler is None:
        pytest.skip("no C compiler (cc)")
    place = tmp_path_factory.mktemp("count")
    flags = (*compile_flags, f"-I{CSRC}")
    sources = [CSRC / source for source in SOURCES]
    made = run(compiler, *flags, "-shared", "-fPIC", *sources, "-o", place / "libring.so")
    assert made.returncode == 0, made.stderr
    link = (f"-L{place}", "-lring", f"-Wl,-rpath,{place}", "-Wl,-z,now")
    program = place / "ring_count"
    made = run(compiler, *flags, PROGRAMS / "ring_count.c", "-o", program, *link)
    assert made.returncode == 0, made.stderr
    return valgrind, program


@pytest.mark.valgrind
@pytest.mark.parametrize("event_idx", [0, 1], ids=["flags", "event_idx"])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("sender", ["driver", "device"])
def test_instructions_of_a_message(
    count_program: tuple[str, Path], sender: str, batch: int, event_idx: int
) -> None:
    """16 bytes sent, received with a copy, their buffer returned and taken again."""
    valgrind, program = count_program
    total = 8000
    done = run(
        valgrind,
        "--tool=callgrind",
        f"--callgrind-out-file={program}.out",
        "--toggle-collect=message_ring_*",
        program,
        sender,
        str(batch),
        str(total),
        str(event_idx),
    )
    assert done.returncode == 0, done.stderr
    collected = re.search(r"Collected : (\d+)", done.stderr)
    assert collected is not None, done.stderr
    each = int(collected[1]) / total
    print(f"\n{sender} sends, batches of {batch}, event_idx {event_idx}: {each:.0f} instructions")
    assert 50 < each <= INSTRUCTIONS[batch, event_idx]
