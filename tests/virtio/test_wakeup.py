"""No wake-up is lost: the C rings in every interleaving of two threads, under C11's memory."""

from __future__ import annotations

import re
import runpy
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PROGRAMS = ROOT / "tests" / "c"

# A search takes about a second at most; one that does not end has met a bug in the model.
TIMEOUT = 100

LOST = "lost wake-up"
RACE = "data race"

Compile = Callable[..., Path]


class Tally(NamedTuple):
    """What one side did in all executions together."""

    kicks: int
    publishes: int
    meanwhile: int
    asked: int


class Search(NamedTuple):
    """What the model printed about a search that found nothing."""

    executions: int
    ends: int
    sender: Tally
    receiver: Tally


@pytest.fixture(scope="module")
def compile_program() -> Compile:
    """Compiles a program of tests/c into a directory, with the ring's sources from another."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc)")
    flags = runpy.run_path(str(CSRC / "build.py"))["COMPILE_FLAGS"]

    def compile_(name: str, place: Path, sources: Path = CSRC) -> Path:
        source, program = PROGRAMS / f"{name}.c", place / name
        command = [compiler, *flags, "-Werror", f"-I{sources}", source, "-o", program]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        return program

    return compile_


class Change(NamedTuple):
    """Another piece of code instead of the one that is there."""

    file: str
    right: str
    wrong: str


def compile_changed(compile_program: Compile, name: str, place: Path, change: Change) -> Path:
    for source in CSRC.glob("*.[ch]"):
        shutil.copy(source, place)
    text = (place / change.file).read_text()
    assert text.count(change.right) == 1
    (place / change.file).write_text(text.replace(change.right, change.wrong))
    return compile_program(name, place, place)


@pytest.fixture(scope="module")
def litmus(compile_program: Compile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program("litmus", tmp_path_factory.mktemp("litmus"))


@pytest.fixture(scope="module")
def model(compile_program: Compile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program("wakeup_model", tmp_path_factory.mktemp("wakeup_model"))


@pytest.fixture(scope="module")
def messages(compile_program: Compile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program("message_model", tmp_path_factory.mktemp("message_model"))


@pytest.fixture(scope="module")
def soon_quiet(compile_program: Compile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same where one message is a flood: few are enough to meet all there is."""
    change = Change("message_ring.c", "#define QUIET_AFTER 4u", "#define QUIET_AFTER 1u")
    place = tmp_path_factory.mktemp("soon_quiet")
    return compile_changed(compile_program, "message_model", place, change)


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def search(program: Path, *arguments: str) -> Search:
    """A search that must not find anything."""
    done = run(program, *arguments)
    assert done.returncode == 0, done.stderr
    print(f"\n{' '.join(arguments)}: {done.stdout}", end="")
    numbers = [int(number) for number in re.findall(r"\d+", done.stdout)]
    executions, _complete, ends, _states, *tallies = numbers
    return Search(executions, ends, Tally(*tallies[:4]), Tally(*tallies[4:]))


def assert_found(done: subprocess.CompletedProcess[str], what: str) -> None:
    """A search that must find this, and show how it came about."""
    assert done.returncode == 1, done.stdout + done.stderr
    first, *trace = done.stderr.splitlines()
    assert first.startswith(what)
    assert len(trace) > 5 and all(re.match(r" *\d+  (sender|receiver)", line) for line in trace)


# The memory.

UNREDUCED = ("turns=every", "states=0")


@pytest.mark.parametrize("reductions", [(), UNREDUCED], ids=["reduced", "unreduced"])
@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("sb", "00 01 10 11"),
        ("sb_fence", "00 01 10 11"),
        ("sb_fences", "01 10 11"),
        ("mp", "00 01 10 11"),
        ("mp_release", "00 01 10 11"),
        ("mp_acquire", "00 01 10 11"),
        ("mp_both", "00 01 11"),
        ("mp_fences", "00 01 11"),
        ("corr", "00 01 11"),
        ("lb", "00 01 10"),
        ("kick", "01"),
        ("plain", "01 09"),
        ("plain_again", "00"),
    ],
)
def test_litmus(litmus: Path, name: str, results: str, reductions: tuple[str, ...]) -> None:
    """The model has exactly the results that C11 (RC11) allows."""
    done = run(litmus, name, *reductions)
    assert (done.returncode, done.stdout.strip()) == (0, results), done.stderr


@pytest.mark.parametrize(
    ("name", "what"),
    [("plain_relaxed", RACE), ("plain_again_relaxed", RACE), ("no_kick", "stuck")],
)
def test_litmus_finds(litmus: Path, name: str, what: str) -> None:
    done = run(litmus, name)
    assert done.returncode == 1 and done.stderr.startswith(what)


# The rings.

EVENT_IDX = pytest.mark.parametrize(
    "event_idx", ["event_idx=0", "event_idx=1"], ids=["flags", "event_idx"]
)
SENDER = pytest.mark.parametrize("sender", ["sender=driver", "sender=device"])
RECEIVER = pytest.mark.parametrize("receiver", ["receiver=always", "receiver=off", "receiver=lazy"])


@EVENT_IDX
@SENDER
@RECEIVER
@pytest.mark.parametrize(
    "variant",
    [
        "messages=4",
        "messages=4 batch=2 start=0",
        "messages=3 each=0",
        "messages=3 num=1 start=65535",
        "messages=4 num=4 batch=2",
        "messages=3 sender_off=0",
        "messages=3 spurious=1",
    ],
)
def test_no_wake_up_is_lost(
    model: Path, variant: str, receiver: str, sender: str, event_idx: str
) -> None:
    """No side sleeps for good, and messages arrive in order; the indexes wrap meanwhile."""
    found = search(model, *variant.split(), receiver, sender, event_idx)
    assert found.sender.publishes and found.receiver.publishes
    # There was something to lose: kicks were saved, and something came while a side asked.
    if "num=4" not in variant:  # else the sender never waits
        assert 0 < found.sender.meanwhile < found.sender.asked
        assert 0 < found.receiver.kicks < found.receiver.publishes
    if (receiver, event_idx) != ("receiver=always", "event_idx=0"):
        assert 0 < found.receiver.meanwhile < found.receiver.asked
        assert 0 < found.sender.kicks < found.sender.publishes


@EVENT_IDX
@SENDER
@pytest.mark.parametrize("limits", ["quiet_after=1 max=2", "quiet_after=2"])
def test_no_wake_up_is_lost_between_two_drains(
    model: Path, limits: str, sender: str, event_idx: str
) -> None:
    """The receiver stops at a limit, and sleeps only when it need not ask again."""
    search(model, "messages=4", "receiver=lazy", *limits.split(), sender, event_idx)


@EVENT_IDX
@SENDER
@RECEIVER
def test_reductions_change_nothing(model: Path, receiver: str, sender: str, event_idx: str) -> None:
    """Neither what the search leaves out nor how it merges states hides an end."""
    arguments = (receiver, sender, event_idx)
    one, two = "messages=1", "messages=2"
    assert search(model, one, *arguments).ends == search(model, one, *arguments, "states=0").ends
    assert search(model, two, *arguments).ends == search(model, two, *arguments, "turns=every").ends
    if receiver == "receiver=lazy":  # thousands of executions; millions for the others
        assert (
            search(model, one, *arguments).ends == search(model, one, *arguments, *UNREDUCED).ends
        )


# The same through messages.


@EVENT_IDX
@SENDER
@pytest.mark.parametrize(
    "variant",
    [
        "messages=4",
        "messages=4 batch=2 start=0",
        "messages=3 give_back=0",
        "messages=3 max=1 start=65535",
        "messages=3 num=4",
        "messages=3 num=1",
        "messages=3 sender_off=0",
        "messages=3 spurious=1",
        "messages=3 polls=1",
        "messages=3 polls=2",
    ],
)
def test_no_message_is_left(soon_quiet: Path, variant: str, sender: str, event_idx: str) -> None:
    """Sending, receiving and waiting for a free buffer, as the floors above do."""
    found = search(soon_quiet, *variant.split(), sender, event_idx)
    if "num=4" not in variant:
        assert 0 < found.sender.meanwhile < found.sender.asked
        assert 0 < found.receiver.kicks < found.receiver.publishes
    assert 0 < found.sender.kicks < found.sender.publishes


@SENDER
def test_no_message_is_left_after_a_flood(messages: Path, sender: str) -> None:
    """With flags, and so many messages that the receiver turns its notifications off."""
    found = search(messages, "messages=5", "num=4", sender)
    assert 0 < found.sender.kicks < found.sender.publishes


# The models can fail.


@EVENT_IDX
@SENDER
@pytest.mark.parametrize("thread", ["sender", "receiver"])
@pytest.mark.parametrize(
    ("without", "what"),
    [
        ("fence:publish", LOST),
        ("fence:vq_notify_on", LOST),
        ("result:ask", LOST),
        ("release:publish", RACE),
        ("acquire:poll_other", RACE),
    ],
)
def test_what_is_left_out_is_missed(
    model: Path, without: str, what: str, thread: str, sender: str, event_idx: str
) -> None:
    """Each fence and each order is needed, on each side."""
    done = run(model, "receiver=lazy", f"without={without}:{thread}", sender, event_idx)
    assert_found(done, what)


@EVENT_IDX
@SENDER
@pytest.mark.parametrize(
    ("without", "what"),
    [
        ("fence:publish:sender", LOST),
        ("fence:publish:receiver", LOST),
        ("fence:vq_notify_on:sender", LOST),
        ("fence:vq_notify_on:receiver", LOST),
        ("result:send_all:sender", LOST),
        ("release:publish:sender", RACE),
        ("release:publish:receiver", RACE),
        ("acquire:poll_other:sender", RACE),
        ("acquire:poll_other:receiver", RACE),
    ],
)
def test_what_is_left_out_is_missed_by_messages(
    soon_quiet: Path, without: str, what: str, sender: str, event_idx: str
) -> None:
    # One at once: else the fence before each sleep often does what the release should.
    done = run(soon_quiet, "max=1", f"without={without}", sender, event_idx)
    assert_found(done, what)


FEWER_EVENTS = Change(
    "virtqueue_inline.h",
    "(uint16_t)(to - event - 1u) < (uint16_t)(to - from)",
    "event == (uint16_t)(to - 1u)",
)
NEXT_EVENT = Change("virtqueue_inline.h", "(to - event - 1u) <", "(to - event) <")
PENDING = Change("virtqueue.c", "ACQUIRE) != q->seen", "ACQUIRE) != q->limit")
NO_WISH = Change("virtqueue.c", "store16(&own_ring(q, q->driver)[0], 0);", "(void)0;")
PLAIN_LOAD = Change(
    "virtqueue_inline.h",
    "__atomic_load_n(word, __ATOMIC_RELAXED);",
    "*(const volatile uint16_t *)word;",
)


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        (FEWER_EVENTS, "event_idx=1 batch=2"),
        (NEXT_EVENT, "event_idx=1"),
        (PENDING, "receiver=lazy max=2"),
        (NO_WISH, "receiver=lazy"),
    ],
    ids=["fewer_events", "next_event", "pending", "no_wish"],
)
def test_a_wrong_line_loses_a_wake_up(
    compile_program: Compile, tmp_path: Path, change: Change, arguments: str
) -> None:
    program = compile_changed(compile_program, "wakeup_model", tmp_path, change)
    for sender in ("sender=driver", "sender=device"):
        assert_found(run(program, *arguments.split(), sender), LOST)


def test_every_shared_access_is_seen(compile_program: Compile, tmp_path: Path) -> None:
    """One that is not through the builtins crashes: nothing escapes the model."""
    program = compile_changed(compile_program, "wakeup_model", tmp_path, PLAIN_LOAD)
    assert run(program).returncode == -signal.SIGSEGV


@pytest.mark.parametrize(
    "arguments",
    ["without=fence:nowhere", "without=fence", "nothing", "depth=1", "num=3", "messages=a"],
)
def test_what_the_model_cannot_do(model: Path, arguments: str) -> None:
    done = run(model, *arguments.split())
    assert done.returncode == 2 and done.stderr.startswith("the model cannot do this: ")
