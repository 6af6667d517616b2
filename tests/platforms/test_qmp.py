"""The client of QEMU's machine protocol, against a peer of our own."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from openamp_py.errors import PlatformError
from openamp_py.platforms.doorbell import create_pair
from openamp_py.platforms.qmp import Qmp

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}}}


class Peer:
    """QEMU's end of the connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._unread = b""

    async def say(self, message: object) -> None:
        await self.send(json.dumps(message).encode() + b"\r\n")

    async def send(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def hear(self) -> dict[str, Any]:
        while b"\n" not in self._unread:
            data = await self._stream.receive_some()
            assert data, "the client hung up"
            self._unread += data
        line, self._unread = self._unread.split(b"\n", 1)
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    async def answer(self, **fields: object) -> str:
        """Answers the next command, and returns its name."""
        command = await self.hear()
        await self.say({"id": command["id"], **(fields or {"return": {}})})
        return str(command["execute"])

    def hang_up(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)


@asynccontextmanager
async def _open(
    on_event: Callable[[str, dict[str, Any]], None] = lambda name, data: None,
) -> AsyncIterator[tuple[Qmp, Peer]]:
    ours, theirs = create_pair()
    theirs.setblocking(False)
    with theirs:
        qmp = Qmp(ours)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(qmp.run, on_event)
                yield qmp, Peer(theirs)
                nursery.cancel_scope.cancel()
        finally:
            qmp.close()


async def test_the_greeting_tells_the_version() -> None:
    async with _open() as (qmp, peer), trio.open_nursery() as nursery:
        await peer.say(GREETING)
        nursery.start_soon(peer.answer)
        assert await qmp.greet() == (7, 2, 22)


async def test_answers_find_their_commands_in_any_order() -> None:
    found: dict[str, object] = {}

    async def ask(name: str) -> None:
        found[name] = await qmp.execute(name, argument=name)

    async with _open() as (qmp, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "first")
            nursery.start_soon(ask, "second")
            commands = [await peer.hear(), await peer.hear()]
            for command in reversed(commands):
                assert command["arguments"] == {"argument": command["execute"]}
                await peer.say({"id": command["id"], "return": command["execute"] + "!"})
        assert found == {"first": "first!", "second": "second!"}


async def test_a_refusal_is_an_error_with_qemus_words() -> None:
    async with _open() as (qmp, peer), trio.open_nursery() as nursery:
        nursery.start_soon(lambda: peer.answer(error={"class": "Generic", "desc": "not now"}))
        with pytest.raises(PlatformError, match="QEMU refused cont: not now"):
            await qmp.execute("cont")


async def test_the_monitors_text_comes_as_it_is() -> None:
    async with _open() as (qmp, peer), trio.open_nursery() as nursery:
        nursery.start_soon(lambda: peer.answer(**{"return": "R00=0\r\n"}))
        assert await qmp.ask_monitor("info registers") == "R00=0\r\n"


async def test_events_come_between_answers() -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    async with _open(lambda name, data: events.append((name, data))) as (qmp, peer):
        await peer.say({"event": "STOP", "timestamp": {}})
        await peer.say({"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.answer)
            await qmp.execute("query-status")
    assert events == [("STOP", {}), ("SHUTDOWN", {"guest": True, "reason": "guest-reset"})]


async def test_only_one_nudge_is_under_way() -> None:
    async with _open() as (qmp, peer):
        qmp.nudge()
        qmp.nudge()
        assert await peer.answer() == "query-status"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qmp.execute, "stop")
            assert await peer.answer() == "stop"
        qmp.nudge()
        assert await peer.answer() == "query-status"


# Ends


async def test_the_end_wakes_whoever_waits() -> None:
    async with _open() as (qmp, peer), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(PlatformError, match="QEMU ended"):
                await qmp.execute("stop")

        nursery.start_soon(ask)
        await peer.hear()
        peer.hang_up()


async def test_a_command_after_the_end_is_an_error() -> None:
    async with _open() as (qmp, peer):
        peer.hang_up()
        with pytest.raises(PlatformError, match="no QMP greeting"):
            await qmp.greet()
        with pytest.raises(PlatformError, match="before it answered cont"):
            await qmp.execute("cont")
        qmp.post("quit")
        qmp.nudge()


async def test_a_peer_that_reads_nothing_holds_only_the_one_who_waits() -> None:
    async with _open() as (qmp, peer):
        long = "x" * (4 << 20)
        with trio.move_on_after(0.05) as scope:
            await qmp.execute("long", text=long)
        assert scope.cancelled_caught
        qmp.nudge()  # is not needed while that is in the way
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qmp.execute, "cont")
            command = await peer.hear()  # what was begun is sent whole, so the next is understood
            assert command["arguments"] == {"text": long}
            assert await peer.answer() == "cont"


async def test_a_full_socket_at_the_end_is_an_end_too() -> None:
    async with _open() as (qmp, peer), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(PlatformError, match="QEMU ended"):
                await qmp.execute("long", text="x" * (4 << 20))

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        peer.hang_up()


# What QEMU does not send


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b"17", b'{"id": []}', b'{"id": "x", "return": 1}', b"\xff\xfe", b"[" * 200_000],
)
async def test_what_is_no_qmp_ends_it(line: bytes) -> None:
    async with _open() as (qmp, peer):
        await peer.send(line + b"\n")
        with pytest.raises(PlatformError, match="no QMP greeting"):
            await qmp.greet()


@pytest.mark.parametrize(
    "greeting",
    [{"QMP": 1}, {"QMP": {"version": {}}}, {"QMP": {"version": {"qemu": {"major": "a"}}}}],
)
async def test_a_greeting_without_a_version_is_an_error(greeting: object) -> None:
    async with _open() as (qmp, peer):
        await peer.say(greeting)
        with pytest.raises(PlatformError, match="no QMP greeting"):
            await qmp.greet()


async def test_a_line_without_end_is_an_end() -> None:
    async with _open() as (qmp, peer), trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await peer.send(b"x" * 65536)

        async def ask() -> None:
            with pytest.raises(PlatformError):
                await qmp.greet()
            peer.hang_up()

        nursery.start_soon(send)
        nursery.start_soon(ask)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_an_end_or_nothing(data: bytes, lines: bool) -> None:
    async def main() -> None:
        async with _open() as (qmp, peer):
            await peer.send(data.replace(b" ", b"\n") if lines else data)
            peer.hang_up()
            with pytest.raises(PlatformError):
                await qmp.execute("cont")

    trio.run(main)
