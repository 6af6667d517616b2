"""What is built with the package to run outside Python: firmware, its core, and a keeper."""

from __future__ import annotations

from pathlib import Path

from openamp_py.errors import PlatformError


def path(name: str) -> Path:
    """Where a shipped file lies.

    Raises:
        PlatformError: it is not there: the package was not built, or is not complete.
    """
    found = Path(__file__).parent / name
    if not found.is_file():
        raise PlatformError(f"{found} is missing; install the package anew to build it")
    return found
