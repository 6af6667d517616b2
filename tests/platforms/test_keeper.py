"""Native cores that are left running and taken over: real keepers, real hosts, and false ones."""

from __future__ import annotations

import array
import contextlib
import errno
import hashlib
import os
import platform as host_machine
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from openamp_py import (
    ECHO_CHANNEL,
    Core,
    CoreCrashedError,
    CoreDiedError,
    Firmware,
    LoopbackPlatform,
    NativePlatform,
    OpenAMPError,
    Platform,
    PlatformError,
    ProcessPlatform,
    open_session,
    serve_echo,
)
from openamp_py import firmware as shipped
from openamp_py.background import plain_errors
from openamp_py.memory import SharedMemory
from openamp_py.platforms import keeper as keeper_module
from openamp_py.platforms.child import is_stopped
from openamp_py.platforms.keeper import (
    NOTE_LIMIT,
    Description,
    KeptCore,
    _pid_of,
    connect_keeper,
    decode_description_untrusted,
    encode_description,
    start_keeper,
)
from openamp_py.platforms.native import RAM_DA, RAM_SIZE
from openamp_py.platforms.report import REPORT_SIZE
from openamp_py.remoteproc import Segment
from openamp_py.remoteproc.platform import run_link

pytestmark = pytest.mark.skipif(
    host_machine.machine() != "x86_64", reason="the machine code is x86-64's"
)
LIMIT = 30.0

# entry(soc): for each wait() that returns: counts, and kicks once
#     push rbx; mov rbx, rdi
#     1: call [rbx + 16]; inc dword [rip + COUNTER]; xor edi, edi; call [rbx + 8]; jmp 1b
CODE = bytes.fromhex("53 4889fb ff5310 ff05f3000000 31ff ff5308 ebf0")
COUNTER = 0x100
FIRMWARE = Firmware(64, 62, "x86-64", RAM_DA, (Segment(RAM_DA, CODE, len(CODE), 5),))


def _count(core: Core) -> int:
    view = core.memory.find_da(RAM_DA + COUNTER, 4)
    assert view is not None
    return int.from_bytes(view, "little")


class Host:
    """One host's life with a core: what it hears, and how it ended."""

    def __init__(self, core: KeptCore, platform: NativePlatform) -> None:
        self.core = core
        self.platform = platform
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.error: OpenAMPError | None = None
        self._heard = trio.Event()

    def _notified(self) -> None:
        self._heard.set()
        self._heard = trio.Event()

    async def live(self, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            with self.scope:
                self.error = await run_link(self.core, self._notified, task_status)
        finally:
            self.ended.set()

    async def ring(self) -> None:
        """Kicks until the core has counted and rung back."""
        before = _count(self.core)
        heard = self._heard
        self.core.kick(0)
        await heard.wait()
        while _count(self.core) == before:
            await trio.lowlevel.checkpoint()

    async def leave(self, note: bytes = b"") -> None:
        await self.core.detach(note)
        self.scope.cancel()
        await self.ended.wait()


@asynccontextmanager
async def _host(path: Path, *, attach: bool = False) -> AsyncIterator[Host]:
    """A host that boots the counting firmware at `path`, or attaches to a core there."""
    with (
        plain_errors(),
        trio.fail_after(LIMIT),
        contextlib.closing(NativePlatform(rendezvous=path)) as platform,
    ):
        if attach:
            core = await platform.attach_core()
        else:
            platform.memory.regions[0].view[: len(CODE)] = CODE
            created = platform.create_core(FIRMWARE)
            assert isinstance(created, KeptCore)
            core = created
        host = Host(core, platform)
        async with trio.open_nursery() as nursery:
            await nursery.start(host.live)
            yield host
            host.scope.cancel()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Where a keeper may listen; none is left there when a test is over."""
    where = tmp_path / "core"
    yield where
    for _ in range(100):  # one whose host has just closed its connection needs a moment
        keepers = _keepers(where)
        if not keepers:
            break
    for pid in keepers:
        os.kill(pid, signal.SIGKILL)
    assert not keepers


def _keepers(path: Path) -> list[int]:
    """Keepers of this path that run. What they fork is for a moment not to be told from them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            pid = int(entry.name)
            if words[0].endswith(b"native-keeper") and words[1] == bytes(path):
                found += [pid] if os.getsid(pid) == pid else []
    return found


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def _gone(*pids: int) -> None:
    with trio.fail_after(LIMIT):
        while any(_is_running(pid) for pid in pids):
            await trio.lowlevel.checkpoint()


def _pid(core: KeptCore) -> int:
    assert core.pid is not None
    return core.pid


# Booting under a keeper


async def test_a_session_boots_talks_and_ends_under_a_keeper(path: Path) -> None:
    with trio.fail_after(LIMIT):
        for _ in range(2):
            async with (
                open_session(NativePlatform(rendezvous=path)) as session,
                session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
            ):
                for size in (0, 1, 496):
                    await endpoint.send(bytes(size))
                    assert (await endpoint.receive()).payload == bytes(size)
                assert path.stat().st_mode & 0o777 == 0o600
                assert (await session.shutdown(endpoint, grace=10)).graceful
            assert not path.exists()


async def test_a_core_that_is_not_left_ends_with_run(path: Path) -> None:
    async with _host(path) as host:
        await host.ring()
        pids = [_pid(host.core), *_keepers(path)]
        assert len(pids) == 2
        host.scope.cancel()
        await host.ended.wait()
        assert not any(_is_running(pid) for pid in pids)
        assert not path.exists()
    assert host.error is None


async def test_a_kept_core_is_suspended_resumed_and_interrupted(path: Path) -> None:
    async with _host(path) as host:
        await host.ring()
        await host.core.suspend()
        assert is_stopped(_pid(host.core))
        before = _count(host.core)
        host.core.kick(0)
        assert _count(host.core) == before
        await host.core.resume()
        while _count(host.core) == before:
            await trio.lowlevel.checkpoint()
        await host.core.suspend()
        host.core.interrupt()
        await host.ended.wait()
        assert isinstance(host.error, CoreCrashedError)
        assert host.error.signal is signal.SIGABRT and host.error.pc is not None
        for call in (host.core.suspend(), host.core.resume(), host.core.detach(b"")):
            with pytest.raises(PlatformError, match="it has ended"):
                await call


async def test_a_crash_is_told_with_the_last_words(path: Path) -> None:
    async with _host(path) as host:
        await host.ring()
        os.kill(_pid(host.core), signal.SIGSEGV)
        await host.ended.wait()
        assert isinstance(host.error, CoreCrashedError)
        assert host.error.signal is signal.SIGSEGV and "pc " in str(host.error)
        assert not path.exists()


async def test_a_core_that_cannot_be_set_up_says_why(path: Path) -> None:
    platform = NativePlatform(rendezvous=path, ram_da=0x100)
    with pytest.raises(PlatformError, match="could not be set up: window 0x100"):
        await platform.create_core(FIRMWARE).run(lambda: None)
    platform.close()
    assert not path.exists()


# Leaving and attaching

OTHER_HOST = """
import contextlib, os, sys, trio
from openamp_py import NativePlatform

async def main(path):
    with contextlib.closing(NativePlatform(rendezvous=path)) as platform:
        core = await platform.attach_core()
        assert core.memory is platform.memory
        view = core.memory.find_da(core.entry + 0x100, 4)
        before = int.from_bytes(view, "little")
        print(core.note.decode(), before, core.table_da, core.machine, core.elf_class, flush=True)
        async with trio.open_nursery() as nursery:
            heard = trio.Event()
            await nursery.start(core.run, lambda: heard.set())
            while int.from_bytes(view, "little") == before:
                heard = trio.Event()
                core.kick(0)
                await heard.wait()
            core.memory.find_da(core.entry + 0x200, 5)[:] = b"hello"
            if sys.argv[2] == "leave":
                await core.detach(b"from the other")
                nursery.cancel_scope.cancel()
            else:
                print(core.pid, flush=True)
                await trio.sleep_forever()

trio.run(main, sys.argv[1])
"""


async def test_another_process_takes_over_the_same_memory_and_doorbell(path: Path) -> None:
    async with _host(path) as host:
        await host.ring()
        pid = _pid(host.core)
        await host.leave(b"from-the-first")
        assert host.error is None and path.exists() and _is_running(pid)
        left = _count(host.core)
        other = await trio.run_process(
            [sys.executable, "-c", OTHER_HOST, str(path), "leave"], capture_stdout=True
        )
        assert other.stdout.decode().split() == ["from-the-first", str(left), "None", "62", "64"]
    async with _host(path, attach=True) as again:
        assert (again.core.note, again.core.pid) == (b"from the other", pid)
        assert _count(again.core) > left
        view = again.core.memory.find_da(RAM_DA + 0x200, 5)
        assert view is not None and bytes(view) == b"hello"
        await again.ring()
    await _gone(pid)


LEAVING_HOST = """
import sys, trio
from openamp_py import NativePlatform, open_session

async def main(path):
    async with open_session(NativePlatform(rendezvous=path)) as session:
        await session.processor.core.detach(b"gone")

trio.run(main, sys.argv[1])
"""


async def test_a_core_outlives_the_program_that_booted_it(path: Path) -> None:
    # Reading to the end of its standard error, which the keeper must not hold open.
    with trio.fail_after(LIMIT):
        await trio.run_process(
            [sys.executable, "-c", LEAVING_HOST, str(path)],
            capture_stdout=True,
            capture_stderr=True,
        )
    async with _host(path, attach=True) as host:
        assert host.core.note == b"gone"
        assert host.core.table_da is not None and host.core.memory.find_da(host.core.table_da, 16)
        assert _is_running(_pid(host.core))


async def test_the_memory_of_a_core_that_was_left_is_no_longer_ours(path: Path) -> None:
    async with _host(path) as host:
        await host.ring()
        assert host.platform.memory is host.core.memory
        await host.leave()
        assert bytes(host.platform.memory.regions[0].view[: len(CODE)]) == bytes(len(CODE))
        host.platform.memory.regions[0].view[: len(CODE)] = b"\xff" * len(CODE)
    async with _host(path, attach=True) as again:
        await again.ring()


async def test_an_attached_core_can_be_booted_anew(path: Path) -> None:
    async with _host(path) as host:
        await host.leave()
    async with _host(path, attach=True) as again:
        again.scope.cancel()
        await again.ended.wait()
        core = again.platform.create_core(FIRMWARE)
        assert isinstance(core, KeptCore)
        anew = Host(core, again.platform)
        async with trio.open_nursery() as nursery:
            await nursery.start(anew.live)
            await anew.ring()
            anew.scope.cancel()


async def test_leaving_and_attaching_leaks_nothing(path: Path) -> None:
    async with _host(path) as first:
        (keeper,) = _keepers(path)
        await first.leave(b"0")
    used = len(os.listdir(f"/proc/{keeper}/fd"))
    for number in range(50):
        async with _host(path, attach=True) as host:
            assert host.core.note == str(number).encode()
            await host.ring()
            await host.leave(str(number + 1).encode())
    with trio.fail_after(LIMIT):
        while len(os.listdir(f"/proc/{keeper}/fd")) > used:  # it has not heard of the last's end
            await trio.lowlevel.checkpoint()
    async with _host(path, attach=True):
        pass


async def test_the_longest_note_is_handed_on(path: Path) -> None:
    async with _host(path) as host:
        await host.leave(bytes(range(256)) * (NOTE_LIMIT // 256))
    async with _host(path, attach=True) as again:
        assert again.core.note == bytes(range(256)) * (NOTE_LIMIT // 256)


async def test_a_core_that_is_not_taken_stays_as_it_was(path: Path) -> None:
    async with _host(path) as host:
        await host.leave(b"note")
    platform = NativePlatform(rendezvous=path)
    for _ in range(2):
        assert (await platform.attach_core()).note == b"note"
    memory = platform.memory
    await platform.unprepare()
    assert platform.memory is not memory
    await platform.attach_core()
    platform.close()
    del memory
    async with _host(path, attach=True) as again:
        await again.ring()


async def test_a_suspended_core_stays_suspended_when_it_is_left(path: Path) -> None:
    async with _host(path) as host:
        await host.core.suspend()
        await host.leave()
    async with _host(path, attach=True) as again:
        assert is_stopped(_pid(again.core))
        await again.core.resume()
        await again.ring()


async def test_a_core_that_crashed_without_a_host_is_told_to_the_next(path: Path) -> None:
    async with _host(path) as host:
        pid = _pid(host.core)
        await host.ring()
        await host.leave()
    os.kill(pid, signal.SIGSEGV)
    await _gone(pid)
    with pytest.raises(PlatformError, match="a core was left running there; attach to it"):
        async with _host(path):
            pass
    async with _host(path, attach=True) as again:
        await again.ended.wait()
        assert isinstance(again.error, CoreCrashedError)
        assert str(again.error).startswith("the core died of SIGSEGV")
        assert str(again.error).endswith("while it had no host")
        assert again.error.signal is signal.SIGSEGV
        assert _count(again.core) > 0, "the memory is there for a look"
    assert not path.exists()


# Refusals


async def test_a_second_host_is_refused(path: Path) -> None:
    async with _host(path) as host:
        with pytest.raises(PlatformError, match=f"core at {path} has another host"):
            await connect_keeper(str(path))
        await host.core.detach(b"")
        with pytest.raises(PlatformError, match="has another host; that one must detach first"):
            await connect_keeper(str(path))
        await host.ring()
    async with _host(path, attach=True):
        pass


async def test_nobody_there_is_said(path: Path) -> None:
    platform = NativePlatform(rendezvous=path)
    with pytest.raises(PlatformError, match=f"no core was left running at {path}"):
        await platform.attach_core()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(str(path))
    with pytest.raises(PlatformError, match=f"no core was left running at {path}"):
        await platform.attach_core()
    platform.close()


async def test_without_a_rendezvous_nothing_is_left_nor_attached() -> None:
    platform = NativePlatform()
    with pytest.raises(PlatformError, match=r"NativePlatform\(rendezvous=PATH\)"):
        await platform.attach_core()
    with pytest.raises(PlatformError, match=r"NativePlatform\(rendezvous=PATH\)"):
        await platform.create_core(FIRMWARE).detach(b"")
    platform.close()


async def test_a_stale_socket_is_replaced_and_other_files_are_not(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(str(path))
    async with _host(path) as host:
        await host.ring()
    path.write_text("mine")
    with pytest.raises(PlatformError, match="it exists and is not a socket"):
        async with _host(path):
            pass
    assert path.read_text() == "mine"


async def test_a_path_that_cannot_be_is_a_platform_error(path: Path) -> None:
    for bad in (path / "nowhere", Path("/" + "x" * 200)):
        with pytest.raises(PlatformError, match=str(bad)):
            async with _host(bad):
                pass
        with pytest.raises(PlatformError, match=str(bad)):
            await connect_keeper(str(bad))


async def test_a_note_that_is_too_long_changes_nothing(path: Path) -> None:
    async with _host(path) as host:
        with pytest.raises(PlatformError, match=f"of {NOTE_LIMIT + 1} bytes .* limit is"):
            await host.core.detach(bytes(NOTE_LIMIT + 1))
        await host.ring()
        pid = _pid(host.core)
    assert not _is_running(pid)


async def test_a_core_that_was_never_started_is_not_left(path: Path) -> None:
    with contextlib.closing(NativePlatform(rendezvous=path)) as platform:
        core = platform.create_core(FIRMWARE)
        for call in (core.detach(b""), core.suspend(), core.resume()):
            with pytest.raises(PlatformError, match="it was never started"):
                await call
        core.interrupt()
    assert not path.exists()


async def test_a_missing_keeper_is_a_platform_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = Path("/nonexistent").joinpath
    monkeypatch.setattr("openamp_py.platforms.keeper.shipped.path", missing)
    with pytest.raises(PlatformError, match="cannot run /nonexistent/native-keeper"):
        async with _host(path):
            pass
    assert not path.exists()


async def test_a_core_whose_program_cannot_be_run_is_a_platform_error(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "native-core").write_text("not a program")
    (programs / "native-keeper").symlink_to(shipped.path("native-keeper"))
    monkeypatch.setattr("openamp_py.platforms.keeper.shipped.path", programs.joinpath)
    with pytest.raises(PlatformError, match=r"keeper: .*/native-core: Permission denied"):
        async with _host(path):
            pass
    assert not path.exists()


async def test_a_program_that_starts_at_the_same_time_is_told(path: Path) -> None:
    name = hashlib.sha256(bytes(path)).digest()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(b"\0openamp_py " + name)
        with pytest.raises(PlatformError, match="another program starts a core there"):
            async with _host(path):
                pass
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.bind(str(path))
        stranger.listen()
        with pytest.raises(PlatformError, match="another program listens there"):
            async with _host(path):
                pass


@contextlib.contextmanager
def _few_descriptors(free: int) -> Iterator[None]:
    """As if only so many descriptors could be opened."""
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    filler = [os.open("/dev/null", os.O_RDONLY)]
    while filler[-1] <= highest:  # each takes the lowest number: until none is free below
        filler.append(os.open("/dev/null", os.O_RDONLY))
    spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(free)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(filler + spare) + 1, hard))
    for descriptor in spare:
        os.close(descriptor)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in filler:
            os.close(descriptor)


def _loopback() -> Platform:
    return LoopbackPlatform(serve_echo)


@pytest.mark.parametrize("kept", [False, True])
async def test_too_few_descriptors_to_boot_are_a_platform_error(path: Path, kept: bool) -> None:
    for free in range(20):
        with _few_descriptors(free):
            try:
                with contextlib.closing(
                    NativePlatform(rendezvous=path if kept else None)
                ) as platform:
                    await _boot_and_end(platform)
                break
            except PlatformError as error:
                assert "no keeper of ours" not in str(error)
                assert "Too many open files" in str(error) or "no descriptors left" in str(error)
        while path.exists():  # a keeper whose host has no room for it ends
            await trio.lowlevel.checkpoint()
    else:
        raise AssertionError("it needs more than that")
    assert free > 5


@pytest.mark.parametrize("kind", [NativePlatform, ProcessPlatform, _loopback])
def test_no_descriptor_for_memory_is_a_platform_error(kind: Callable[[], Platform]) -> None:
    with _few_descriptors(0), pytest.raises(PlatformError, match="cannot be made: Too many open"):
        kind()


async def _boot_and_end(platform: NativePlatform) -> None:
    platform.memory.regions[0].view[: len(CODE)] = CODE
    core = platform.create_core(FIRMWARE)
    with plain_errors():
        async with trio.open_nursery() as nursery:
            await nursery.start(core.run, lambda: None)
            nursery.cancel_scope.cancel()


async def test_too_few_descriptors_to_attach_leave_the_core_where_it_is(path: Path) -> None:
    async with _host(path) as host:
        await host.leave()
    with contextlib.closing(NativePlatform(rendezvous=path)) as platform:
        for free in range(20):
            with _few_descriptors(free):
                try:
                    core = await platform.attach_core()
                    break
                except PlatformError as error:
                    assert "no keeper of ours" not in str(error)
        assert free > 5 and core.close()
    async with _host(path, attach=True) as again:
        await again.ring()


# Deaths


async def test_the_death_of_the_host_ends_core_and_keeper(path: Path) -> None:
    async with _host(path) as host:
        await host.leave()
    (keeper,) = _keepers(path)
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_HOST, str(path), "stay"], stdout=subprocess.PIPE
    )
    with other:
        assert other.stdout is not None
        other.stdout.readline()
        core = int(other.stdout.readline())
        assert _is_running(core) and _is_running(keeper)
        other.kill()
    await _gone(core, keeper)
    assert not path.exists()


BOOTING_HOST = """
import os, signal, sys, trio
from openamp_py import NativePlatform, open_session

async def main(path):
    async with open_session(NativePlatform(rendezvous=path)) as session:
        print(session.processor.core.pid, flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)

trio.run(main, sys.argv[1])
"""


async def test_a_stopped_host_is_waited_for_and_a_killed_one_is_not(path: Path) -> None:
    host = subprocess.Popen([sys.executable, "-c", BOOTING_HOST, str(path)], stdout=subprocess.PIPE)
    with host:
        assert host.stdout is not None
        core = int(host.stdout.readline())
        os.waitid(os.P_PID, host.pid, os.WSTOPPED | os.WNOWAIT)
        (keeper,) = _keepers(path)
        assert _is_running(core)
        with pytest.raises(PlatformError, match="has another host"):
            await connect_keeper(str(path))
        host.kill()
    await _gone(core, keeper)
    assert not path.exists()


async def test_a_core_that_dies_under_a_stopped_keeper_is_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "_END_GRACE", 0.05)
    async with _host(path) as host:
        (keeper,) = _keepers(path)
        os.kill(keeper, signal.SIGSTOP)
        os.kill(_pid(host.core), signal.SIGKILL)
        await host.ended.wait()
        assert isinstance(host.error, CoreDiedError)
        await _gone(keeper)


async def test_last_words_are_told_where_the_keeper_has_none(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "_END_GRACE", 0.05)
    async with _host(path) as host:
        await host.ring()
        os.kill(_keepers(path)[0], signal.SIGSTOP)
        os.kill(_pid(host.core), signal.SIGSEGV)
        await host.ended.wait()
        assert isinstance(host.error, CoreCrashedError)
        assert host.error.signal is signal.SIGSEGV and host.error.pc is not None


async def test_a_core_that_was_taken_back_ends_with_its_host_whatever_it_has_not_read(
    path: Path,
) -> None:
    platform = NativePlatform(rendezvous=path)
    view = platform.memory.regions[0].view
    view[: len(CODE)] = CODE
    connection = await start_keeper(
        str(path), platform._shared.fd, RAM_DA, f"{RAM_DA:#x}:{RAM_SIZE:#x}:0"
    )
    core, (keeper,) = _pid_of(connection.core), _keepers(path)
    connection.control.send(struct.pack("=HHI", 1, 2, 1) + RAM)
    await trio.lowlevel.wait_readable(connection.control)  # the answer, which stays there
    os.kill(keeper, signal.SIGSTOP)
    while not is_stopped(keeper):
        await trio.lowlevel.checkpoint()
    connection.control.send(struct.pack("=HHI", 1, 1, 1))
    connection.close()
    os.kill(keeper, signal.SIGCONT)
    await _gone(core, keeper)
    del view
    platform.close()


async def test_an_attached_core_that_was_not_taken_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _host(path) as host:
        await host.leave()

    def fail(pidfd: int) -> int:
        raise OSError(errno.EMFILE, "no room")

    with monkeypatch.context() as patched:
        patched.setattr(keeper_module, "_pid_of", fail)
        with pytest.raises(PlatformError, match="no room"):
            async with _host(path, attach=True):
                pass
    async with _host(path, attach=True) as again:
        await again.ring()


async def test_a_stopped_keeper_is_given_up_and_nothing_is_taken(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _host(path) as host:
        await host.leave()
    (keeper,) = _keepers(path)
    os.kill(keeper, signal.SIGSTOP)
    while not is_stopped(keeper):
        await trio.lowlevel.checkpoint()
    with contextlib.closing(NativePlatform(rendezvous=path)) as platform:
        with trio.move_on_after(0.01) as scope:
            await platform.attach_core()
        assert scope.cancelled_caught
        monkeypatch.setattr(keeper_module, "_ANSWER_TIME", 0.01)
        with pytest.raises(PlatformError, match=r"does not answer within 0.01 s"):
            await platform.attach_core()
    os.kill(keeper, signal.SIGKILL)


async def test_a_stopped_keeper_gets_no_order_before_it_answered_the_last(path: Path) -> None:
    async with _host(path) as host:
        (keeper,) = _keepers(path)
        os.kill(keeper, signal.SIGSTOP)
        while not is_stopped(keeper):
            await trio.lowlevel.checkpoint()
        for _ in range(20):  # many times what the socket holds
            async with trio.open_nursery() as nursery:
                nursery.start_soon(host.core.detach, bytes(NOTE_LIMIT))
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        os.kill(keeper, signal.SIGCONT)
        await host.ring()
        os.kill(_pid(host.core), signal.SIGKILL)
        await host.ended.wait()
        assert "the core died of SIGKILL" in str(host.error), "told to who has the core"


async def test_the_death_of_the_keeper_ends_the_core(path: Path) -> None:
    async with _host(path) as host:
        (keeper,) = _keepers(path)
        os.kill(keeper, signal.SIGKILL)
        await host.ended.wait()
        assert isinstance(host.error, CoreDiedError)
        assert "its keeper was killed" in str(host.error)
        await _gone(_pid(host.core))
    async with _host(path) as again:  # what it left behind is no obstacle
        await again.ring()


async def test_the_death_of_the_keeper_while_nobody_is_there_ends_the_core(path: Path) -> None:
    async with _host(path) as host:
        pid = _pid(host.core)
        await host.leave()
    os.kill(_keepers(path)[0], signal.SIGKILL)
    await _gone(pid)
    with pytest.raises(PlatformError, match="no core was left running"):
        await connect_keeper(str(path))


async def test_a_keeper_shrugs_signals_of_a_terminal_off(path: Path) -> None:
    async with _host(path) as host:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE):
            os.kill(_keepers(path)[0], number)
        await host.leave()
    async with _host(path, attach=True) as again:
        await again.ring()


@pytest.mark.parametrize("again", [False, True])
async def test_a_cancelled_detach_leaves_the_core_ours(path: Path, again: bool) -> None:
    async with _host(path) as host:
        (keeper,) = _keepers(path)
        os.kill(keeper, signal.SIGSTOP)
        while not is_stopped(keeper):
            await trio.lowlevel.checkpoint()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.core.detach, b"")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        os.kill(keeper, signal.SIGCONT)
        pid = _pid(host.core)
        await host.ring()
        if again:
            await host.leave(b"again")
    if again:
        async with _host(path, attach=True) as other:
            assert other.core.note == b"again"
    await _gone(pid, keeper)
    assert not path.exists()


async def test_detach_fails_when_the_core_ends_meanwhile(path: Path) -> None:
    async with _host(path) as host:
        (keeper,) = _keepers(path)
        os.kill(keeper, signal.SIGSTOP)
        while not is_stopped(keeper):
            await trio.lowlevel.checkpoint()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_kill_when_asked, keeper)
            with pytest.raises(PlatformError, match="cannot be left running: it has ended"):
                await host.core.detach(b"")


async def _kill_when_asked(pid: int) -> None:
    await trio.lowlevel.checkpoint()
    os.kill(pid, signal.SIGKILL)


# Hosts and keepers that are none


@pytest.mark.parametrize(
    "order",
    [
        b"x",
        struct.pack("=HHI", 2, 1, 0),  # another version
        struct.pack("=HHI", 1, 1, 0) + b"x",  # take, with a body
        struct.pack("=HHI", 1, 3, 0),  # no such order
        struct.pack("=HHI", 1, 2, 0) + bytes(40_000),  # more than can be left
    ],
)
async def test_a_visitor_that_talks_nonsense_is_sent_away(path: Path, order: bytes) -> None:
    async with _host(path) as host:
        await host.leave(b"note")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
        visitor.settimeout(LIMIT)
        visitor.connect(str(path))
        assert visitor.recv(1 << 16)
        visitor.send(order)
        with contextlib.suppress(ConnectionResetError):
            assert visitor.recv(1 << 16) == b""
    async with _host(path, attach=True) as again:
        assert again.core.note == b"note"
        await again.ring()


RAM = encode_description(Description(62, 64, RAM_DA, RAM_SIZE, RAM_DA, RAM_DA))
HELLO = struct.pack("=HHI", 1, 1, 0)


class _Fake:
    """Descriptors as a keeper hands them over."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.memory = SharedMemory.create("openamp-fake", RAM_SIZE)
        stack.callback(self.memory.close)
        self.report = SharedMemory.create("openamp-fake", REPORT_SIZE)
        stack.callback(self.report.close)
        pair = socket.socketpair()
        self.doorbell = stack.enter_context(pair[0])
        stack.enter_context(pair[1])
        self.datagrams = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.single = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        self.pidfd = os.pidfd_open(os.getpid())
        stack.callback(os.close, self.pidfd)
        self.cuttable = os.memfd_create("openamp-fake", os.MFD_CLOEXEC)
        stack.callback(os.close, self.cuttable)

    def good(self) -> list[int]:
        doorbell = self.doorbell.fileno()
        return [self.memory.fd, doorbell, self.report.fd, self.pidfd, self.pidfd]


Lie = Callable[[_Fake], tuple[bytes, list[int]]]


def _with(index: int, choose: Callable[[_Fake], int]) -> Lie:
    def lie(fake: _Fake) -> tuple[bytes, list[int]]:
        handed = fake.good()
        handed[index] = choose(fake)
        return HELLO + RAM, handed

    return lie


LIES: dict[str, tuple[Lie, str]] = {
    "nothing": (lambda fake: (b"", []), "ended, or does not serve this user"),
    "no header": (lambda fake: (b"\1", []), "message 0 with 0 descriptors"),
    "version": (lambda fake: (struct.pack("=HHI", 2, 1, 0), fake.good()), "version 2"),
    "no error": (
        lambda fake: (struct.pack("=HHI", 1, 3, 1 << 31), []),
        "keeper: : error 2147483648",
    ),
    "length": (lambda fake: (HELLO + bytes(1 << 16), fake.good()), "a message of"),
    "kind": (lambda fake: (struct.pack("=HHI", 1, 9, 0), fake.good()), "message 9 with 5 desc"),
    "busy": (lambda fake: (struct.pack("=HHI", 1, 2, 0), []), "has another host"),
    "failed": (
        lambda fake: (struct.pack("=HHI", 1, 3, 1) + b"\xff" * 99, []),
        "keeper: .*: Operation not permitted",
    ),
    "too few": (lambda fake: (HELLO + RAM, fake.good()[:4]), "message 1 with 4 desc"),
    "too many": (lambda fake: (HELLO + RAM, fake.good() * 2), "message 1 with 5 desc"),
    "no description": (lambda fake: (HELLO, fake.good()), "a description of 0 bytes"),
    "other size": (
        lambda fake: (HELLO + RAM, [fake.report.fd, *fake.good()[1:]]),
        f"RAM of {RAM_SIZE:#x} bytes in memory of",
    ),
    "memory is none": (_with(0, lambda fake: fake.pidfd), "Invalid argument"),
    "memory can be cut": (_with(0, lambda fake: fake.cuttable), "its memory can be cut"),
    "doorbell is none": (_with(1, lambda fake: fake.pidfd), "its doorbell is no socket"),
    "doorbell of datagrams": (
        _with(1, lambda fake: fake.datagrams.fileno()),
        "its doorbell is no Unix stream socket",
    ),
    "doorbell with one end": (
        _with(1, lambda fake: fake.single.fileno()),
        "Transport endpoint is not connected",
    ),
    "report is none": (_with(2, lambda fake: fake.pidfd), "Invalid argument"),
    "report too long": (_with(2, lambda fake: fake.memory.fd), "its report is not of"),
    "core is none": (_with(3, lambda fake: fake.report.fd), "Bad file descriptor"),
    "keeper is none": (_with(4, lambda fake: fake.report.fd), "Bad file descriptor"),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_keeper_that_lies_is_a_platform_error(path: Path, lie: str) -> None:
    tell, message = LIES[lie]
    with contextlib.ExitStack() as stack:
        fake = _Fake(stack)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(str(path))
        listener.listen()
        data, descriptors = tell(fake)

        def serve() -> None:
            visitor, _ = listener.accept()
            with visitor:
                if data:
                    rights = array.array("i", descriptors)
                    visitor.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            platform = NativePlatform(rendezvous=path)
            stack.callback(platform.close)
            memory = platform.memory
            with pytest.raises(PlatformError, match=message):
                await platform.attach_core()
            assert platform.memory is memory
        finally:
            thread.join()


@given(st.binary(max_size=128))
def test_any_bytes_are_a_description_or_a_value_error(data: bytes) -> None:
    try:
        description, note = decode_description_untrusted(data)
    except ValueError:
        return
    assert encode_description(description) + note == data


U64 = st.integers(0, (1 << 64) - 1)


@given(
    st.integers(0, (1 << 32) - 1),
    st.sampled_from([32, 64]),
    U64,
    U64,
    U64,
    st.none() | U64,
    st.binary(max_size=32),
)
def test_a_description_comes_back_or_is_refused_for_its_memory(
    machine: int,
    elf_class: int,
    ram_da: int,
    ram_size: int,
    entry: int,
    table_da: int | None,
    note: bytes,
) -> None:
    description = Description(machine, elf_class, ram_da, ram_size, entry, table_da)
    fits = 0 < ram_size <= (1 << 64) - ram_da
    inside = table_da is None or ram_da <= table_da < ram_da + ram_size
    data = encode_description(description) + note
    if fits and inside and table_da != (1 << 64) - 1:
        assert decode_description_untrusted(data) == (description, note)
    elif table_da != (1 << 64) - 1:
        with pytest.raises(ValueError, match="RAM"):
            decode_description_untrusted(data)
