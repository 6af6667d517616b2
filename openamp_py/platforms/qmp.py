"""A client of QEMU's machine protocol (QMP): commands, answers and events, a line of JSON each."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
from collections.abc import Callable
from typing import Any, Final

import trio

from openamp_py.errors import PlatformError

_PIECE: Final = 65536
_LONGEST_LINE: Final = 1 << 20  # registers and the like come to a few KB

EventHandler = Callable[[str, dict[str, Any]], None]
"""What is told of an event: its name and data."""


class Qmp:
    """The host's end of a QMP connection.

    Made, and closed, by whoever starts the QEMU. Its `run` reads, and is to be going on while
    commands are executed.

    Attributes:
        ended: nothing comes any more.

    Args:
        sock: one end of a stream socket; owned from here on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._outbox = bytearray()
        self._sending = trio.Lock()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, trio.Event] = {}
        self._answers: dict[int, dict[str, Any]] = {}
        self._greeting: dict[str, Any] = {}
        self._greeted = trio.Event()
        self.ended = False
        self._nudges: set[int] = set()

    async def run(self, on_event: EventHandler) -> None:
        """Reads until the other end is closed. Who waits for an answer then is told.

        What makes no sense ends it too: `execute` then says so.
        """
        try:
            unread = bytearray()
            while True:
                await trio.lowlevel.wait_readable(self._socket)
                try:
                    data = self._socket.recv(_PIECE)
                except BlockingIOError:
                    continue
                except ConnectionResetError:
                    data = b""
                unread += data
                *lines, unread = unread.split(b"\n")
                if not data or len(unread) > _LONGEST_LINE:
                    return
                for line in lines:
                    if line.strip() and not self._take(line, on_event):
                        return
        finally:
            self.ended = True
            self._greeted.set()
            trio.lowlevel.notify_closing(self._socket)  # who waits to send to it is told, too
            for event in self._waiting.values():
                event.set()

    def _take(self, line: bytearray, on_event: EventHandler) -> bool:
        """One line. Returns whether it made sense."""
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return False
        if not isinstance(message, dict):
            return False
        if "QMP" in message:
            self._greeting = message
            self._greeted.set()
        elif "event" in message:
            data = message.get("data")
            on_event(str(message["event"]), data if isinstance(data, dict) else {})
        else:
            number = message.get("id")
            if not isinstance(number, int):
                return False
            self._nudges.discard(number)
            if number in self._waiting:
                self._answers[number] = message
                self._waiting[number].set()
        return True

    async def greet(self) -> tuple[int, int, int]:
        """Waits for the greeting and enters the mode in which commands are taken.

        Returns:
            QEMU's version.

        Raises:
            PlatformError: it ended, or what came is no greeting.
        """
        await self._greeted.wait()
        try:
            version = self._greeting["QMP"]["version"]["qemu"]
            numbers = int(version["major"]), int(version["minor"]), int(version["micro"])
        except (KeyError, TypeError, ValueError):
            raise PlatformError("QEMU ended, or sent no QMP greeting") from None
        await self.execute("qmp_capabilities")
        return numbers

    async def execute(self, command: str, **arguments: object) -> Any:
        """Sends a command and waits for its answer.

        Raises:
            PlatformError: QEMU refused the command, or ended.

        Cancellation: the command may be carried out all the same.
        """
        number = next(self._numbers)
        self._waiting[number] = trio.Event()
        try:
            self._queue(number, command, arguments)
            await self._flush()
            if not self.ended:
                await self._waiting[number].wait()
            answer = self._answers.pop(number, None)
        finally:
            del self._waiting[number]
            self._answers.pop(number, None)
        if answer is None:
            raise PlatformError(f"QEMU ended, or broke its protocol, before it answered {command}")
        if "error" in answer:
            error = answer["error"]
            why = error.get("desc", error) if isinstance(error, dict) else error
            raise PlatformError(f"QEMU refused {command}: {why}")
        return answer.get("return")

    async def ask_monitor(self, line: str) -> str:
        """What QEMU's monitor for people prints for a command line.

        Raises:
            PlatformError: as `execute`.
        """
        return str(await self.execute("human-monitor-command", **{"command-line": line}))

    def post(self, command: str) -> None:
        """Sends a command for which nobody waits; what cannot be sent now is sent with the next."""
        self._queue(next(self._numbers), command, {})
        self._send()

    def nudge(self) -> None:
        """Lets QEMU's main loop look at everything once more. Nothing, if it has that to do yet."""
        if not self._nudges and not self._outbox:
            number = next(self._numbers)
            self._nudges.add(number)
            self._queue(number, "query-status", {})
            self._send()

    def close(self) -> None:
        """Closes this end. Idempotent."""
        self._socket.close()

    def _queue(self, number: int, command: str, arguments: dict[str, object]) -> None:
        request = {"execute": command, "arguments": arguments, "id": number}
        self._outbox += json.dumps(request).encode() + b"\n"

    def _send(self) -> None:
        """Sends what can be sent without waiting."""
        try:
            while self._outbox:
                del self._outbox[: self._socket.send(self._outbox)]
        except BlockingIOError:
            pass
        except OSError:  # it ended, which `run` notices
            self._outbox.clear()

    async def _flush(self) -> None:
        self._send()
        while self._outbox and not self.ended:
            async with self._sending:
                with contextlib.suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_writable(self._socket)
                self._send()
