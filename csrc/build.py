"""How the package's compiled parts come about; pyproject.toml names BuildCompiled.

The C extension is cffi in API mode. Its declarations are cut out of the headers, so
that there is no second copy to drift. The firmware and the programs that run it are
built by ``firmware/build.py`` and land beside ``openamp_py/firmware/__init__.py``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cffi
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent
CONCERNS = ("shared", "virtqueue", "message_ring", "polling", "yardstick")
PACKAGED = Path("openamp_py", "firmware")
EXTENSION = "openamp_py.virtio._ring"
COMPILE_FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Wshadow")
# cffi's generated wrapper is not ours to keep free of these.
WRAPPER_FLAGS = ("-Wno-conversion", "-Wno-unused-parameter", "-Wno-shadow")


def declarations(header: Path) -> str:
    """The lines of a header between its "cdef begin" and "cdef end" marks."""
    _, _, rest = header.read_text().partition("/* cdef begin")
    body, end, _ = rest.partition("/* cdef end */")
    if not end:
        raise SystemExit(f"{header}: no lines marked for cffi")
    return body[body.index("\n") :]


def generate(target: Path) -> None:
    """Writes the extension's C source, which includes the headers and calls into them."""
    ffi = cffi.FFI()
    for concern in CONCERNS:
        ffi.cdef(declarations(CSRC / f"{concern}.h"))
    ffi.set_source(EXTENSION, "".join(f'#include "{concern}.h"\n' for concern in CONCERNS))
    target.parent.mkdir(parents=True, exist_ok=True)
    ffi.emit_c_code(str(target))


class BuildCompiled(build_ext):
    """Builds the extension and the firmware, in place or into the build tree."""

    def build_extension(self, ext) -> None:  # type: ignore[no-untyped-def]
        wrapper = Path(self.build_temp) / "_ring_wrapper.c"
        generate(wrapper)
        sources = [f"csrc/{concern}.c" for concern in CONCERNS]
        ext.sources = [str(wrapper), *sources]
        ext.include_dirs = [str(CSRC)]
        ext.depends = [str(header) for header in CSRC.glob("*.h")]
        ext.extra_compile_args = [*COMPILE_FLAGS, *WRAPPER_FLAGS]
        super().build_extension(ext)
        # What is generated is not a source: setuptools lists these in the sdist.
        ext.sources = sources

    def run(self) -> None:
        super().run()
        in_place = self.inplace or self.editable_mode
        root = CSRC.parent if in_place else Path(self.build_lib)
        subprocess.run(
            [sys.executable, str(CSRC / "firmware" / "build.py"), str(root / PACKAGED)],
            check=True,
        )
