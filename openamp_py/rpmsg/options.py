"""What can be chosen about a bus."""

from __future__ import annotations

from dataclasses import dataclass

from openamp_py.rpmsg.polling import Polling
from openamp_py.rpmsg.wire import DEFAULT_BUFFER_SIZE
from openamp_py.virtio.message_ring import HEADER_SIZE, MAX_BUFFER_SIZE


@dataclass(frozen=True, slots=True)
class BusOptions:
    """How a bus works its link.

    Raises:
        ValueError: a size or a time that is not possible.
    """

    send_buffer_size: int = DEFAULT_BUFFER_SIZE
    """Bytes of a buffer, header included, in the sending direction. A driver chooses both sizes;
    a device has to be told what its driver chose."""
    receive_buffer_size: int = DEFAULT_BUFFER_SIZE
    """The same for the receiving direction."""
    polling: float | None = None
    """Seconds that a task that waits may look at the rings before it sleeps, and so the longest
    that other tasks are kept waiting by it. 0: never. None: 0.1 ms, or never where this process has
    one CPU. It learns whether it pays, and costs nothing while nothing happens."""
    patience: float = 1.0
    """Seconds until an endpoint that is not read loses the buffers it keeps, where half of the
    link's buffers are kept; ``math.inf`` for never. See `WhenFull.HOLD_BACK`."""
    always_kick: bool = False
    """Kicks whatever the peer says: for one whose wish cannot be trusted (rpmsg-lite masters)."""
    recheck: float | None = None
    """Seconds after which the rings are looked at again without a kick: for a peer that
    loses some (single-CPU QEMU before 8.1)."""

    def __post_init__(self) -> None:
        Polling(self.polling)
        for direction in ("send", "receive"):
            size = getattr(self, f"{direction}_buffer_size")
            if not HEADER_SIZE < size <= MAX_BUFFER_SIZE:
                raise ValueError(
                    f"{direction} buffers of {size} bytes; "
                    f"{HEADER_SIZE + 1} to {MAX_BUFFER_SIZE} are possible"
                )
        if not self.patience >= 0:
            raise ValueError(f"a patience of {self.patience} s; 0 s or more are possible")
        if self.recheck is not None and not 0 < self.recheck < float("inf"):
            raise ValueError(f"a recheck every {self.recheck} s; more than 0 s are possible")


DEFAULT_OPTIONS = BusOptions()
