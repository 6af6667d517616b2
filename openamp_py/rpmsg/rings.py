"""The two message rings of an RPMsg device: which is which, and how either role opens them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from openamp_py.constants import RPMSG_F_NS, VIRTIO_ID_RPMSG
from openamp_py.errors import ResourceTableError, VirtqueueError
from openamp_py.rpmsg.wire import DEFAULT_BUFFER_SIZE, TO_DEVICE, TO_DRIVER
from openamp_py.virtio import MessageRing, Role, VirtioDevice
from openamp_py.virtio.takeover import Lent, find_receiving_untrusted, find_sending_untrusted

# A remote waits for DRIVER_OK. Hosts kick after it, but not every host's kick arrives before
# the remote listens, so the status is looked at again this often (seconds) until then.
_STATUS_RECHECK = 0.02


async def _wait_driver(device: VirtioDevice) -> None:
    """Device: sleeps until the driver says DRIVER_OK."""
    lot = trio.lowlevel.ParkingLot()

    def wake(_: object = None) -> None:
        lot.unpark_all()

    device.on_notify = device.on_failure = wake
    try:
        while not device.poll_driver():
            if device.failure is not None:
                raise trio.BrokenResourceError(
                    f"{device.name}: the driver never came up: {device.failure}"
                ) from device.failure
            with trio.move_on_after(_STATUS_RECHECK):
                await lot.park()
    finally:
        device.on_notify = device.on_failure = None


def _find_lent(device: VirtioDevice, send_buffer_size: int) -> tuple[Lent, Lent]:
    """What the driver before lent to a device that is taken over: to receive, and to send."""
    with (
        contextlib.closing(device.open_queue(TO_DRIVER)) as to_driver,
        contextlib.closing(device.open_queue(TO_DEVICE)) as to_device,
    ):
        received = find_receiving_untrusted(to_driver.copy())
        end = received.pa + received.size * len(received.offsets)
        return received, find_sending_untrusted(to_device.copy(), end, send_buffer_size)


def _find_pool(device: VirtioDevice, lent: Lent) -> tuple[int, memoryview]:
    """The memory of the buffers of a device that is taken over."""
    size = lent.size * len(lent.offsets)
    view = device.memory.find_pa(lent.pa, size)
    if view is None:
        raise VirtqueueError(
            f"{device.name} cannot be taken over: its {size} bytes of buffers at {lent.pa:#x} "
            f"are not in memory: {device.memory}"
        )
    return lent.pa, view


@asynccontextmanager
async def open_rings(
    device: VirtioDevice,
    *,
    send_buffer_size: int = DEFAULT_BUFFER_SIZE,
    receive_buffer_size: int = DEFAULT_BUFFER_SIZE,
) -> AsyncIterator[tuple[MessageRing, MessageRing]]:
    """The bare message rings of an RPMsg device, for an `async with` block.

    What is below `open_bus`, for whoever works them by other means; takes and raises the same.
    A driver still has to say `set_driver_ok`, once it is ready to be notified, and to end the
    device; a device has been waited for.

    Returns:
        The sending and the receiving one.
    """
    if device.device_id != VIRTIO_ID_RPMSG:
        raise ValueError(f"{device.name} has virtio id {device.device_id}, not 7 (RPMsg)")
    if len(device.vrings) != 2:
        raise ResourceTableError(f"{device.name} has {len(device.vrings)} vrings; RPMsg needs 2")
    await trio.lowlevel.checkpoint()
    if device.failure is not None:
        raise trio.BrokenResourceError(f"{device.name}: {device.failure}") from device.failure
    driver = device.role is Role.DRIVER
    if driver:
        device.begin(RPMSG_F_NS)
    else:
        await _wait_driver(device)
    with contextlib.ExitStack() as stack:

        def open_ring(
            index: int,
            size: int,
            *,
            sender: bool,
            pool: tuple[int, memoryview] | None,
            lent: Lent | None,
        ) -> MessageRing:
            queue = stack.enter_context(contextlib.closing(device.open_queue(index)))
            ring = MessageRing(queue, sender=sender, buffer_size=size, pool=pool, lent=lent)
            stack.callback(ring.close)
            return ring

        try:
            receive_pool = send_pool = received = sent = None
            if device.is_adopted:
                received, sent = _find_lent(device, send_buffer_size)
                receive_buffer_size = received.size
                receive_pool, send_pool = (_find_pool(device, lent) for lent in (received, sent))
            elif driver:
                receives, sends = (vring.layout.num for vring in device.vrings)
                received_bytes = receives * receive_buffer_size
                pa, pool = device.buffers(received_bytes + sends * send_buffer_size)
                receive_pool = (pa, pool[:received_bytes])
                send_pool = (pa + received_bytes, pool[received_bytes:])
            from_peer, to_peer = (TO_DRIVER, TO_DEVICE) if driver else (TO_DEVICE, TO_DRIVER)
            receiving = open_ring(
                from_peer, receive_buffer_size, sender=False, pool=receive_pool, lent=received
            )
            sending = open_ring(to_peer, send_buffer_size, sender=True, pool=send_pool, lent=sent)
        except BaseException:
            if driver and not device.is_adopted:
                device.give_up()
            raise
        yield sending, receiving
