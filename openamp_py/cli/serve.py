"""``openamp serve``: play a remote for a host that runs elsewhere."""

from __future__ import annotations

import argparse

import trio

from openamp_py.cli.common import DONE, Subparsers, plain_errors, usage_errors
from openamp_py.constants import ECHO_CHANNEL
from openamp_py.echo import serve_echo
from openamp_py.platforms import ShmAddress, ShmLink, VhostUserAddress, VhostUserLink
from openamp_py.rpmsg.wire import check_name

DEFAULT_LINK = "shm:/dev/shm/openamp.shm?doorbell=unix:/tmp/openamp.event.0&listen=1"
"""Where OpenAMP's own demo programs expect their server."""


def add_parser(commands: Subparsers, common: argparse.ArgumentParser) -> None:
    """Declares ``openamp serve``."""
    parser = commands.add_parser(
        "serve",
        parents=[common],
        help="play a remote for a host elsewhere",
        description="Plays the remote, in the virtio device role, until the host sends "
        "SHUTDOWN_MSG, withdraws its endpoint, or is gone. A vhost-user: link that listens serves "
        "one guest after the other, until one sends SHUTDOWN_MSG.",
    )
    parser.add_argument("service", choices=["echo"], help="what to play")
    parser.add_argument(
        "--core",
        default=DEFAULT_LINK,
        help=f"the link to serve: shm:PATH?doorbell=unix:PATH[&listen=1] (default: "
        f"{DEFAULT_LINK}, as OpenAMP's demo programs), or vhost-user:PATH for a Linux guest "
        "(User-Mode Linux: virtio_uml.device=PATH:7)",
    )
    parser.add_argument("--channel", default=ECHO_CHANNEL, help="name to announce")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with usage_errors():
        check_name(options.channel)
        link = _create_link(options.core)
    with plain_errors():
        try:
            trio.run(serve_echo, link, options.channel)
        finally:
            if isinstance(link, ShmLink):
                link.close()
    return DONE


def _create_link(url: str) -> ShmLink | VhostUserLink:
    """
    Raises:
        ValueError: the URL is of neither kind.
    """
    if VhostUserAddress.matches(url):
        return VhostUserLink(VhostUserAddress.parse(url))
    return ShmLink(ShmAddress.parse(url))
