"""Handing out endpoint addresses."""

from __future__ import annotations

import heapq

from openamp_py.constants import ADDRESS_ANY, FIRST_DYNAMIC_ADDRESS, NAME_SERVICE_ADDRESS


def check_destination(address: int) -> int:
    """Passes an address on the other side through.

    Raises:
        ValueError: it is not a u32, or is the one that means "any".
    """
    if not 0 <= address < ADDRESS_ANY:
        raise ValueError(f"destination {address:#x} is not possible: 0 to {ADDRESS_ANY - 1:#x} are")
    return address


class AddressSpace:
    """Which local addresses are in use: the lowest free one from 1024 on, or a chosen one."""

    def __init__(self) -> None:
        self._used: set[int] = set()
        self._next = FIRST_DYNAMIC_ADDRESS
        self._returned: list[int] = []
        self._waiting: set[int] = set()  # the same addresses

    def take(self, address: int = ADDRESS_ANY) -> int:
        """Takes `address`, or with ADDRESS_ANY a free one.

        Raises:
            ValueError: the address is in use, or is one nobody can have.
        """
        if address == ADDRESS_ANY:
            address = self._lowest_free()
        elif not 0 <= address < ADDRESS_ANY or address == NAME_SERVICE_ADDRESS:
            raise ValueError(
                f"address {address:#x} is not possible: it must be a u32, neither "
                f"{ADDRESS_ANY:#x} (any) nor {NAME_SERVICE_ADDRESS} (the name service)"
            )
        elif address in self._used:
            raise ValueError(f"address {address:#x} is in use on this bus")
        self._used.add(address)
        return address

    def give_back(self, address: int) -> None:
        """Frees an address that `take` returned."""
        self._used.remove(address)
        if FIRST_DYNAMIC_ADDRESS <= address < self._next and address not in self._waiting:
            self._waiting.add(address)
            heapq.heappush(self._returned, address)

    def _lowest_free(self) -> int:
        while self._returned:
            address = heapq.heappop(self._returned)
            self._waiting.remove(address)
            if address not in self._used:
                return address
        while self._next in self._used:
            self._next += 1
        self._next += 1
        return self._next - 1
