"""OpenAMP's matrix demo: the host sends two 6 x 6 matrices, the remote returns the product.

    python demos/matrix_multiply.py                   both sides in this process
    python demos/matrix_multiply.py host shm:URL      the host, for OpenAMP's matrix_multiplyd
    python demos/matrix_multiply.py remote shm:URL    the remote, for OpenAMP's matrix_multiply

A matrix travels as its size and 36 elements, all u32; a request is two of them.
"""

from __future__ import annotations

import contextlib
import random
import struct
import sys

import trio

import openamp_py
from openamp_py import ECHO_CHANNEL, Link, LoopbackPlatform, ShmAddress, ShmLink

SIZE, ROUNDS = 6, 200
MATRIX = struct.Struct("<37I")

Rows = list[list[int]]


def pack(rows: Rows) -> bytes:
    """A matrix as it travels."""
    return MATRIX.pack(SIZE, *(element for row in rows for element in row))


def unpack(data: bytes) -> Rows:
    """The matrix in a message."""
    _size, *elements = MATRIX.unpack(data)
    return [elements[i : i + SIZE] for i in range(0, SIZE * SIZE, SIZE)]


def multiply(a: Rows, b: Rows) -> Rows:
    """The product of two matrices, each element modulo 2^32 as in C."""
    columns = list(zip(*b, strict=True))
    return [
        [sum(x * y for x, y in zip(row, column, strict=True)) & 0xFFFF_FFFF for column in columns]
        for row in a
    ]


async def remote(link: Link) -> None:
    """Multiplies until the host withdraws its endpoint or asks for the end."""
    async with (
        openamp_py.open_resources(link) as resources,
        openamp_py.open_bus(resources.rpmsg_device()) as bus,
        bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        async for message in endpoint:
            if len(message.payload) != 2 * MATRIX.size:
                break  # SHUTDOWN_MSG
            a, b = message.payload[: MATRIX.size], message.payload[MATRIX.size :]
            await endpoint.send_to(pack(multiply(unpack(a), unpack(b))), message.source)


async def host(session: openamp_py.Session) -> None:
    """Sends random matrices and checks the products."""
    errors = 0
    async with session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
        for _ in range(ROUNDS):
            a, b = (
                [[random.randrange(10) for _ in range(SIZE)] for _ in range(SIZE)] for _ in "ab"
            )
            await endpoint.send(pack(a) + pack(b))
            errors += unpack((await endpoint.receive()).payload) != multiply(a, b)
        print(f"{ROUNDS} products, {errors} errors")
        print("shutdown:", await session.shutdown(endpoint, grace=2.0))


async def main(arguments: list[str]) -> None:
    """One side of a link, or both of a loopback."""
    side, url = arguments or ("both", "")
    if side == "remote":
        with contextlib.closing(ShmLink(ShmAddress.parse(url))) as link:
            await remote(link)
    else:
        async with openamp_py.open_session(url or LoopbackPlatform(remote)) as session:
            await host(session)


trio.run(main, sys.argv[1:])
