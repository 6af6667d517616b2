"""Messages that are sent together, as far as there are buffers."""

from __future__ import annotations

from collections.abc import Sequence

from openamp_py.virtio.message_ring import encode_lengths


class Batch:
    """Messages for one destination, of which some have been sent.

    Made by an endpoint for each call that sends several, and worked off by `Bus.send_batch`.

    Attributes:
        payloads: the messages.
        data: all their bytes, one after the other.
        lengths: their lengths as the ring takes them.
        done: how many have been sent, from the first on.
        offset: where in `data` the next one begins.
        is_done: none is left.
    """

    def __init__(self, payloads: Sequence[bytes]) -> None:
        self.data = b"".join(payloads)
        self.lengths = encode_lengths(payloads)
        self.payloads = payloads
        self.done = 0
        self.offset = 0
        self.is_done = not payloads

    def went(self, count: int) -> int:
        """So many more have been sent. Returns the bytes of those."""
        before, self.done = self.done, self.done + count
        self.is_done = self.done == len(self.payloads)
        if self.is_done:
            length = len(self.data) - self.offset
        else:
            length = sum(map(len, self.payloads[before : self.done]))
        self.offset += length
        return length
