"""What tests of links have in common: small tables, endpoints on both sides, and waiting."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio.testing

from openamp_py import Endpoint
from openamp_py.constants import RPMSG_F_NS
from openamp_py.remoteproc.resource_table import ResourceTable, Vdev, Vring

NAME = "test-service"


def make_table(num: int = 256, features: int = RPMSG_F_NS) -> ResourceTable:
    """One RPMsg device whose vrings have so many entries."""
    vrings = (Vring(0x4000, 0x1000, num, 1), Vring(0x8000, 0x1000, num, 2))
    return ResourceTable((Vdev(7, 0, features, vrings=vrings),))


async def settle() -> None:
    """Lets both sides handle what is under way: a bus looks when it is idle for the second time."""
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked()


@asynccontextmanager
async def open_linked(pair: Any, **options: Any) -> AsyncIterator[tuple[Endpoint, Endpoint]]:
    """An endpoint on each side, at agreed addresses: the host's, the remote's."""
    async with (
        pair.host.open_endpoint(address=5, destination=6, **options) as host,
        pair.remote.open_endpoint(address=6, destination=5, **options) as remote,
    ):
        await settle()
        yield host, remote
