"""The Linux kernel's source, as Debian packages it, for tests that compile parts of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

PACKAGED = Path("/usr/src/linux-source-6.1.tar.xz")


def find_kernel_source(place: Path, needed: Sequence[str]) -> Path:
    """The kernel's source tree; unpacked in `place`, where it is not yet.

    Args:
        needed: what is to be unpacked: files, and directories with all that is in them.
    """
    named = Path(os.environ.get("OPENAMP_LINUX_SOURCE", PACKAGED))
    if named.is_dir():
        return named.resolve()
    if not named.exists():
        pytest.skip(f"no {named} (Debian package linux-source-6.1)")
    members = [f"linux-*/{name}" for name in needed]
    wildcards = ("--wildcards", "--no-wildcards-match-slash")
    subprocess.run(
        ["tar", "-xf", named, "-C", place, "--strip-components=1", *wildcards, *members],
        env={**os.environ, "XZ_OPT": "-T0"},
        check=True,
    )
    return place.resolve()
