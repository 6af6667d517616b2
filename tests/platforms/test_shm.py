"""The demo platform's link: every combination of ends and roles, addresses, and bad peers."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from openamp_py import (
    ECHO_CHANNEL,
    ImageError,
    PeerGoneError,
    PlatformError,
    ProcessPlatform,
    ResourceTableError,
    Role,
    ShmAddress,
    ShmLink,
    open_processor,
    open_resources,
    open_session,
    serve_echo,
)
from openamp_py.platforms.native import shipped_echo

LIMIT = 30.0
GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "openamp"
TABLE = bytes.fromhex(
    "01000000010000000000000000000000140000000300000007000000000000000100000000000000"
    "00000000000200000040000000100000000100000100000000000000008000000010000000010000"
    "0200000000000000"
)
"""The 88 bytes that the C server writes (golden README, section 1), nothing negotiated yet."""


def _url(folder: Path, *, listen: bool) -> str:
    return f"shm:{folder}/memory?doorbell=unix:{folder}/bell" + ("&listen=1" if listen else "")


async def _serve(url: str) -> None:
    with contextlib.closing(ShmLink(ShmAddress.parse(url))) as link:
        await serve_echo(link)


@pytest.mark.parametrize("remote_listens", [True, False])
async def test_either_side_may_listen(tmp_path: Path, remote_listens: bool) -> None:
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve, _url(tmp_path, listen=remote_listens))
            async with (
                open_session(_url(tmp_path, listen=not remote_listens)) as session,
                session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
            ):
                for number in range(600):
                    await endpoint.send(number.to_bytes(4, "little"))
                    assert (await endpoint.receive()).payload == number.to_bytes(4, "little")
                assert (await session.shutdown(endpoint, grace=10)).graceful


async def test_the_listener_lays_the_table_and_the_file_is_private(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_serve, _url(tmp_path, listen=True))
        await trio.testing.wait_all_tasks_blocked()
        memory = tmp_path / "memory"
        assert memory.stat().st_size == 0x80000
        assert stat.S_IMODE(memory.stat().st_mode) == 0o600
        assert memory.read_bytes()[:88] == TABLE
        nursery.cancel_scope.cancel()
    assert not (tmp_path / "bell").exists()


async def test_the_driver_writes_the_status_that_the_c_library_writes(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_serve, _url(tmp_path, listen=True))
        async with open_session(_url(tmp_path, listen=False)):
            memory = (tmp_path / "memory").read_bytes()
            assert (memory[36:40], memory[44]) == (b"\1\0\0\0", 4)
            assert memory[0x5000:0x5004] == b"\0\0\0\1"  # ring 0: 256 buffers, kicks wanted
            assert memory[0x9000:0x9002] == b"\1\0"  # ring 1: no tx-complete kicks
            first = memory[0x4000:0x4010]
            assert first == bytes.fromhex("00000100 00000000 00020000 0200 0100")


async def test_stale_memory_is_started_over(tmp_path: Path) -> None:
    """A file that an earlier pair left behind looks alive: status 4, indexes in mid-flight."""
    (tmp_path / "memory").write_bytes(TABLE[:44] + b"\4" + TABLE[45:] + b"\xaa" * 0x7FFA8)
    await test_either_side_may_listen(tmp_path, True)


async def test_a_connector_waits_until_its_peer_listens(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:

            async def serve_later() -> None:
                await trio.testing.wait_all_tasks_blocked(0.03)
                await _serve(_url(tmp_path, listen=True))

            nursery.start_soon(serve_later)
            async with open_session(_url(tmp_path, listen=False)) as session:
                await session.bus.wait_service(ECHO_CHANNEL)


async def test_waiting_for_a_peer_can_be_cancelled(tmp_path: Path) -> None:
    for listen in (True, False):
        with trio.move_on_after(0.05) as scope:
            async with open_session(_url(tmp_path, listen=listen)):
                pass
        assert scope.cancelled_caught


# Addresses


def test_urls_are_read() -> None:
    assert ShmAddress.parse("shm:/a?doorbell=unix:/b") == ShmAddress("/a", "/b")
    assert ShmAddress.parse("shm:/a?doorbell=unix:/b&listen=1") == ShmAddress("/a", "/b", True)
    assert ShmAddress.parse("shm:fd:4?doorbell=fd:5") == ShmAddress(4, 5)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("tcp:/a", "is not a link"),
        ("shm:?doorbell=unix:/b", "is not a link"),
        ("shm:/a", "doorbell ''"),
        ("shm:/a?doorbell=tcp:5", "want unix:PATH or fd:N"),
        ("shm:/a?doorbell=unix:", "want unix:PATH or fd:N"),
        ("shm:/a?doorbell=unix:/b&listen=yes", "listen=yes"),
        ("shm:/a?doorbell=unix:/b&speed=9", "unknown option 'speed'"),
        ("shm:/a?nonsense", "not key=value"),
        ("shm:fd:x?doorbell=unix:/b", "'x' is not the number"),
        ("shm:fd:4?doorbell=fd:5&listen=1", "cannot listen"),
    ],
)
def test_bad_urls_say_what_is_wrong(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShmAddress.parse(url)


async def test_an_unknown_core_is_named() -> None:
    with pytest.raises(ValueError, match="unknown core 'qemux'; there are auto, native, loopback"):
        async with open_session("qemux"):
            pass


async def test_a_link_takes_no_firmware(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes no firmware"):
        async with open_session(_url(tmp_path, listen=False), shipped_echo()):
            pass


async def test_a_python_remote_takes_no_machine_code() -> None:
    async with open_processor(ProcessPlatform()) as processor:
        with pytest.raises(ImageError, match="core process runs a remote written in Python"):
            await processor.boot(shipped_echo())


# Bad peers


@contextlib.contextmanager
def _listener(folder: Path, memory: bytes | None = None) -> Iterator[socket.socket]:
    (folder / "memory").write_bytes(TABLE.ljust(0x80000, b"\0") if memory is None else memory)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "bell"))
        sock.listen()
        yield sock


async def test_a_doorbell_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "bell").write_text("precious")
    with pytest.raises(PlatformError, match="it exists and is not a socket"):
        await _serve(_url(tmp_path, listen=True))
    assert (tmp_path / "bell").read_text() == "precious"


async def test_memory_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    url = f"shm:{tmp_path}/no/memory?doorbell=unix:{tmp_path}/bell&listen=1"
    with pytest.raises(PlatformError, match=r"shared memory .*/no/memory: No such file"):
        await _serve(url)


async def test_memory_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with (
        _listener(tmp_path, b"\0" * 4096),
        pytest.raises(PlatformError, match="4096 bytes; the layout needs 524288"),
    ):
        await _serve(_url(tmp_path, listen=False))


async def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    with (
        _listener(tmp_path, b"\xff" * 0x80000),
        pytest.raises(ResourceTableError, match="version"),
    ):
        await _serve(_url(tmp_path, listen=False))


async def test_a_peer_that_leaves_ends_the_wait_for_its_driver(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT), _listener(tmp_path) as sock:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve, _url(tmp_path, listen=False))
            peer, _ = await trio.to_thread.run_sync(sock.accept)
            await trio.testing.wait_all_tasks_blocked()
            peer.close()


async def test_a_peer_that_leaves_breaks_what_is_open(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT), _listener(tmp_path) as sock:
        link = ShmLink(ShmAddress.parse(_url(tmp_path, listen=False)))
        with contextlib.closing(link):
            async with open_resources(link, Role.DRIVER) as resources:
                peer, _ = sock.accept()
                device = resources.rpmsg_device()
                failed = trio.Event()
                device.on_failure = lambda _: failed.set()
                peer.close()
                await failed.wait()
                assert isinstance(device.failure, PeerGoneError)


async def test_a_peer_that_connects_and_leaves_at_once_is_noticed(tmp_path: Path) -> None:
    for _ in range(20):
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_serve, _url(tmp_path, listen=True))
                with socket.socket(socket.AF_UNIX) as peer:
                    while peer.connect_ex(str(tmp_path / "bell")):
                        await trio.lowlevel.checkpoint()


async def test_a_second_listener_leaves_the_first_ones_memory_alone(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve, _url(tmp_path, listen=True))
            async with (
                open_session(_url(tmp_path, listen=False)) as session,
                session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
            ):
                await endpoint.wait_bound()
                with pytest.raises(PlatformError, match="another program listens"):
                    await _serve(_url(tmp_path, listen=True))
                await endpoint.send(b"undisturbed")
                assert (await endpoint.receive()).payload == b"undisturbed"


async def test_a_second_listener_leaves_the_first_ones_doorbell_alone(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_serve, _url(tmp_path, listen=True))
        await trio.testing.wait_all_tasks_blocked()
        other = f"shm:{tmp_path}/other?doorbell=unix:{tmp_path}/bell&listen=1"
        with pytest.raises(PlatformError, match="another program listens on it"):
            await _serve(other)
        assert (tmp_path / "bell").exists()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("url", ["shm:/dev/null?doorbell=unix:/tmp/x&listen=1"])
async def test_memory_that_is_no_memory_is_refused(url: str) -> None:
    with pytest.raises(PlatformError, match="shared memory /dev/null"):
        await _serve(url)


async def test_a_descriptor_that_is_no_socket_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        with pytest.raises(PlatformError, match="doorbell fd:"):
            await _serve(f"shm:{tmp_path}/memory?doorbell=fd:{file.fileno()}")
        assert not file.closed


async def test_a_doorbell_that_is_full_does_not_block_the_kick(tmp_path: Path) -> None:
    with _listener(tmp_path) as sock:
        link = ShmLink(ShmAddress.parse(_url(tmp_path, listen=False)))
        with contextlib.closing(link):
            async with open_resources(link, Role.DRIVER):
                peer, _ = sock.accept()
                for _ in range(100_000):
                    link.kick(1)
                assert set(peer.recv(100)) == {1}
                peer.close()
                link.kick(1)
    assert os.path.exists(tmp_path / "bell"), "the connector leaves what it did not make"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no captured memory at {GOLDEN}")
def test_our_table_is_the_c_servers_table() -> None:
    import gzip

    captured = gzip.decompress((GOLDEN / "table_only.bin.gz").read_bytes())
    assert captured[:88] == TABLE
