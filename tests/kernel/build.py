"""A User-Mode Linux with our remote processor driver, built from the distribution's source.

What was built is kept, by what it was built from, below $OPENAMP_KERNEL_CACHE (by default
``~/.cache/openamp_py/kernel``). As a program this builds what is not there, and says how long it
took.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
FRAGMENT = HERE / "kernel.config"
INIT = HERE / "init"
MODULE = HERE / "module"
PACKAGED = Path("/usr/src/linux-source-6.1.tar.xz")
BUSYBOX = Path("/bin/busybox")

TOOLS = {
    "bc": "bc",
    "bison": "bison",
    "cc": "gcc",
    "flex": "flex",
    "m4": "m4",
    "make": "make",
    "perl": "perl",
    "xz": "xz-utils",
}
"""Programs that the build runs, and the Debian packages they are in."""

# Sources that no configuration of ours compiles; their Kconfig and Makefile stay.
_LEFT_OUT = (
    *("drivers/gpu", "drivers/iio", "drivers/infiniband", "drivers/media", "drivers/net/ethernet"),
    *("drivers/net/wireless", "drivers/scsi", "drivers/staging", "drivers/usb"),
    *("sound", "tools/perf", "tools/testing"),
)

_BUILD_LIMIT = 1800.0
"""Seconds that one step of the build may take."""


class Unavailable(Exception):
    """What the build needs is not on this machine; the message says what, and the package."""


class Kernel(NamedTuple):
    """What a guest boots."""

    linux: Path
    """The program that is the kernel."""
    initrd: Path
    """Busybox, our /init and the modules."""


def build() -> Kernel:
    """Builds what is not there yet.

    Raises:
        Unavailable: the source or a tool is missing.
        RuntimeError: a step of the build failed; its output is in the message.
    """
    source = _find_source()
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if not _is_static(BUSYBOX):
        missing.append("busybox-static")
    if missing:
        raise Unavailable(f"the kernel's build needs the Debian packages {' '.join(missing)}")
    cache = Path(os.environ.get("OPENAMP_KERNEL_CACHE") or Path.home() / ".cache/openamp_py/kernel")
    cache.mkdir(parents=True, exist_ok=True)
    tree = cache / _hash(FRAGMENT.read_bytes(), _identity(source))
    files = sorted(MODULE.iterdir())
    parts = [INIT.read_bytes(), *(file.read_bytes() for file in files)]
    kernel = Kernel(tree / "linux", tree / f"initrd-{_hash(*parts)}.gz")
    with _locked(cache / "lock"):
        if not kernel.linux.exists():
            shutil.rmtree(tree, ignore_errors=True)
            tree.mkdir()
            _build_linux(source, tree)
        if not kernel.initrd.exists():
            _build_initrd(tree, kernel.initrd)
    return kernel


def _find_source() -> Path:
    if not MODULE.is_dir():
        raise Unavailable(f"no {MODULE}: our driver is in the repository, not in what is packaged")
    source = Path(os.environ.get("OPENAMP_LINUX_SOURCE", PACKAGED))
    if not source.exists():
        raise Unavailable(f"no {source} (Debian package linux-source-6.1)")
    return source


def _is_static(program: Path) -> bool:
    """Whether a program is there and needs no dynamic linker."""
    if not program.exists():
        return False
    with program.open("rb") as file:
        return b"/ld-" not in file.read(4096)  # where linkers put the name of the dynamic linker


def _identity(source: Path) -> bytes:
    """What tells one source from another, without reading all of it."""
    status = (source / "Makefile" if source.is_dir() else source).stat()
    return f"{source.name} {status.st_size} {status.st_mtime_ns}".encode()


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps others, who build the same, waiting."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(*command: str | Path) -> None:
    """Runs one step of the build.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_BUILD_LIMIT,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}")


def _build_linux(source: Path, tree: Path) -> None:
    """Makes `tree`/linux last: what was interrupted is begun anew."""
    if not source.is_dir():
        unpacked = tree / "source"
        unpacked.mkdir()
        left_out = (f"--exclude=*/{name}/*.{kind}" for name in _LEFT_OUT for kind in ("c", "h"))
        _run("tar", "-xf", source, "-C", unpacked, "--strip-components=1", *left_out)
        source = unpacked
    objects = tree / "objects"
    make = ("make", "-s", "-C", source, "ARCH=um", f"O={objects}")
    _run(*make, f"KCONFIG_ALLCONFIG={FRAGMENT}", "allnoconfig")
    _run(*make, f"-j{os.cpu_count()}", "linux", "modules")
    (objects / "linux").rename(tree / "linux")
    (objects / "vmlinux").unlink()


def _build_initrd(tree: Path, target: Path) -> None:
    module = tree / "module"
    shutil.rmtree(module, ignore_errors=True)
    shutil.copytree(MODULE, module)
    objects = tree / "objects"
    _run("make", "-s", "-C", objects, "ARCH=um", f"M={module}", "modules")
    directory, program, file = 0o040755, 0o100755, 0o100644
    archive = b"".join(
        _encode_member(name, mode, data)
        for name, mode, data in (
            ("bin", directory, b""),
            ("bin/busybox", program, BUSYBOX.read_bytes()),
            ("init", program, INIT.read_bytes()),
            ("program_rproc.ko", file, (module / "program_rproc.ko").read_bytes()),
            (
                "rpmsg_client_sample.ko",
                file,
                (objects / "samples/rpmsg/rpmsg_client_sample.ko").read_bytes(),
            ),
            ("TRAILER!!!", 0, b""),
        )
    )
    partial = target.with_suffix(".part")
    partial.write_bytes(gzip.compress(archive, 6, mtime=0))
    partial.rename(target)


def _encode_member(name: str, mode: int, data: bytes) -> bytes:
    """One file of a cpio archive of the kind that kernels unpack (newc)."""
    # inode, mode, uid, gid, links, time, size, device, special device, length of the name, sum
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def main() -> None:
    """Builds, and says how long it took."""
    begin = time.monotonic()
    kernel = build()
    print(f"{kernel.linux.parent}: {time.monotonic() - begin:.1f} s")


if __name__ == "__main__":
    main()
