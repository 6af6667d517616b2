"""The command ``openamp``."""

from __future__ import annotations

from openamp_py.cli.main import main

__all__ = ["main"]
