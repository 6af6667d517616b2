"""What is built with the package to run outside Python: firmware, its core, and a keeper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from openamp_py.errors import PlatformError

ECHO: Final[Mapping[str, str]] = MappingProxyType(
    {
        "native": "echo-native.elf",
        "mps2-an385": "echo-cortex-m3.elf",
        "mps2-an386": "echo-cortex-m3.elf",
        "mps2-an511": "echo-cortex-m3.elf",
        "mps2-an500": "echo-mps2-an500.elf",
        "mps2-an505": "echo-mps2-an505.elf",
        "mps2-an521": "echo-mps2-an505.elf",
        "mps3-an524": "echo-mps3-an524.elf",
        "mps3-an547": "echo-mps3-an547.elf",
        "virt-rv32": "echo-rv32.elf",
        "virt-rv64": "echo-rv64.elf",
    }
)
"""The echo firmware that is shipped, by the name of the core or board. See `path`."""


def path(name: str) -> Path:
    """Where a shipped file lies.

    Raises:
        PlatformError: it is not there: the package was not built, or is not complete.
    """
    found = Path(__file__).parent / name
    if not found.is_file():
        raise PlatformError(f"{found} is missing; install the package anew to build it")
    return found
