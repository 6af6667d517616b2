"""From the command line to a subcommand, and from its end to an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from openamp_py.cli import bench, cores, doctor, explain, inspect, lint, ping, serve, trace
from openamp_py.cli import list as list_
from openamp_py.cli.common import FAILED, USAGE, Command, UsageError
from openamp_py.errors import OpenAMPError

_COMMANDS: tuple[Command, ...] = (
    ping,
    serve,
    trace,
    cores,
    list_,
    doctor,
    inspect,
    lint,
    explain,
    bench,
)

_INTERRUPTED = 128 + 2  # as a shell reports SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code. An error is one line on stderr."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="openamp: %(levelname)s: %(name)s: %(message)s")
    # Without -v, what the library warns of is part of the command's own result or error.
    logging.getLogger("openamp_py").setLevel(logging.DEBUG if options.verbose else logging.ERROR)
    try:
        code: int = options.run(options)
        if sys.stdout is not None:  # None: the shell closed it
            sys.stdout.flush()
    except UsageError as error:
        return _say(options, error, USAGE)
    except BrokenPipeError:
        # Whoever read the output has left; the interpreter must not flush to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (OpenAMPError, OSError) as error:
        return _say(options, error, FAILED)
    except KeyboardInterrupt:
        return _INTERRUPTED
    return code


def _say(options: argparse.Namespace, error: Exception, code: int) -> int:
    logging.getLogger(__name__).debug("the error in full", exc_info=error)
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    print(f"openamp {options.command}: {text}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="openamp", description="Talk to remote processors, or play one."
    )
    parser.add_argument(
        "--version", action="version", version=f"openamp_py {version('openamp_py')}"
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "-v", "--verbose", action="store_true", help="log on stderr, with the traceback of errors"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands, common)
    return parser
