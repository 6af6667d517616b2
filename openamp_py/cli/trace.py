"""``openamp trace``: what a core writes into its trace buffer."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
from collections.abc import AsyncIterator

import trio

from openamp_py.background import open_background
from openamp_py.choosing import check_name, choose
from openamp_py.cli.common import (
    DONE,
    Subparsers,
    UsageError,
    add_core_options,
    crash_policy,
    printable,
    say_debugger,
    seconds,
    usage_errors,
)
from openamp_py.errors import CoreDiedError, OpenAMPError
from openamp_py.platforms import NativePlatform
from openamp_py.remoteproc import (
    Platform,
    RemoteProcessor,
    TraceFollower,
    open_processor,
    open_trace,
)
from openamp_py.remoteproc.sources import Image

# What may end the program in order: a core that was attached to would otherwise end with it.
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


_WAIT = 0.5


def add_parser(commands: Subparsers, common: argparse.ArgumentParser) -> None:
    """Declares ``openamp trace``."""
    parser = commands.add_parser(
        "trace",
        parents=[common],
        help="show what a core writes into its trace buffer",
        description="Boots firmware, or attaches to a core that was left running, and shows what "
        "it writes into a trace buffer: what comes within a while, or with -f until the core ends "
        "or Ctrl-C. A core that was attached to runs on.",
    )
    add_core_options(parser)
    parser.add_argument("--attach", metavar="PATH", help="a native core that was left running")
    parser.add_argument("--name", help="of the buffer; default: the first")
    parser.add_argument("-f", "--follow", action="store_true", help="until the core ends")
    parser.add_argument(
        "--wait",
        type=seconds,
        help=f"seconds to look without -f (default: {_WAIT}; until the core ends with --gdb)",
    )
    parser.add_argument("--json", action="store_true", help="a JSON object for each piece of text")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.attach is not None:
        for name in ("firmware", "gdb"):
            if getattr(options, name) is not None:
                raise UsageError(f"--attach takes no {name}: the core runs already")
    set_wait(options)
    with usage_errors():
        check_name(options.core, gdb=options.gdb)
        return trio.run(_trace, options)


def set_wait(options: argparse.Namespace) -> None:
    """Fills in the time to look, if it was not given: a debugger may hold the core for long."""
    if options.wait is None:
        options.wait = _WAIT if options.gdb is None else math.inf


async def _trace(options: argparse.Namespace) -> int:
    attach = options.attach is not None
    if attach:
        platform: Platform = NativePlatform(rendezvous=options.attach)
        image: Image = b""
    else:
        _, platform, image = await choose(options.core, options.firmware, gdb=options.gdb)
    async with open_processor(platform, policy=crash_policy(options)) as processor:
        if not attach:
            await processor.boot(image)
            say_debugger(platform, options.firmware or image)
        with trio.open_signal_receiver(*_ENDINGS) as signals:
            if attach:
                await processor.attach()
            try:
                async with open_trace(processor, options.name) as follower:
                    await _follow(options, processor, follower, signals)
            except KeyError as error:
                raise UsageError(str(error.args[0])) from None
            finally:
                if attach and processor.is_up and processor.core is not None:
                    with trio.CancelScope(shield=True):
                        await processor.detach(processor.core.note)
        if isinstance(processor.failure, CoreDiedError):
            raise processor.failure
    return DONE


async def _follow(
    options: argparse.Namespace,
    processor: RemoteProcessor,
    follower: TraceFollower,
    signals: AsyncIterator[int],
) -> None:
    """Prints until it is time to stop, and then what is left."""
    async with open_background() as nursery:

        async def show() -> None:
            async for text in follower:
                _print(options, text)

        async def interrupt() -> None:
            await anext(signals)
            nursery.cancel_scope.cancel()

        nursery.start_soon(show)
        nursery.start_soon(interrupt)
        with trio.move_on_after(math.inf if options.follow else options.wait):
            with contextlib.suppress(OpenAMPError):
                await processor.wait_exit()
            await processor.wait_settled()
    _print(options, follower.read_nowait())


def _print(options: argparse.Namespace, text: str) -> None:
    if text and options.json:
        print(json.dumps({"text": text}), flush=True)
    elif text:
        print(printable(text), end="", flush=True)
