"""Imports run downwards only, and the C extension and trio stay on their floors."""

from __future__ import annotations

import ast
from pathlib import Path

import openamp_py

PACKAGE = Path(openamp_py.__file__).parent

# By longest matching prefix of the module's name below the package.
FLOORS = {
    "errors": 0,
    "constants": 0,
    "memory": 1,
    "vring": 1,
    "virtio": 2,
    "rpmsg.wire": 3,
    "rpmsg.addresses": 3,
    "rpmsg.batch": 3,
    "rpmsg.options": 3,
    "rpmsg.polling": 3,
    "rpmsg.recent": 3,
    "rpmsg.statistics": 3,
    "rpmsg.in_place": 3,
    "rpmsg.handover": 3,
    "remoteproc.attributes": 3,
    "remoteproc.elf": 3,
    "remoteproc.images": 3,
    "remoteproc.lint": 3,
    "remoteproc.resource_table": 3,
    "remoteproc.coredump": 3,
    "remoteproc.trace": 3,
    "remoteproc.crash": 3,
    "remoteproc.lifecycle": 3,
    "remoteproc.plan": 3,
    "firmware": 3,
    "platforms.boards": 3,
    "platforms.registers": 3,
    "platforms.vhost_wire": 3,
    "background": 4,
    "feed": 4,
    "host": 4,
    "linux": 4,
    "linux.dump": 3,
    "linux.faults": 3,
    "rpmsg": 4,
    "remoteproc": 4,
    "platforms": 4,
    "echo": 4,
    "remote": 4,
    "bench": 4,
    "bench_lifecycle": 4,
    "porting": 0,
    "registry": 4,
    "session": 4,
    "choosing": 4,
    "silence": 4,
    "bench_cores": 4,
    "watchdog": 4,
    "pytest_plugin": 5,
    "pytest_watch": 5,
    "cli": 5,
    "__main__": 5,
}
LOWEST_WITH_TRIO = 4
C_EXTENSION = "openamp_py.virtio._ring"


def _floor(module: str) -> int:
    name = module.removeprefix("openamp_py.")
    while name not in FLOORS:
        name, dot, _ = name.rpartition(".")
        assert dot, f"{module} is on no floor: add it to FLOORS"
    return FLOORS[name]


def _modules() -> dict[str, ast.Module]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text())
    return found


def _imports(tree: ast.Module) -> set[str]:
    """Modules imported, also for types alone; a module for each name that is one."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = str(node.module)
            found |= {f"{module}.{alias.name}" for alias in node.names}
            found.add(module)
    return found


MODULES = _modules()


def _package_imports(name: str) -> set[str]:
    names = set()
    for imported in _imports(MODULES[name]):
        if imported in MODULES and imported != "openamp_py":
            names.add(imported)
    # "from package import module" counts as the module, not as the package around it.
    return {n for n in names if not any(other.startswith(f"{n}.") for other in names)}


def test_imports_run_downwards() -> None:
    wrong = [
        f"{name} (floor {_floor(name)}) imports {imported} (floor {_floor(imported)})"
        for name in MODULES
        if name != "openamp_py"
        for imported in _package_imports(name)
        if _floor(imported) > _floor(name)
    ]
    assert not wrong


def test_only_the_virtio_floor_imports_the_extension() -> None:
    users = {name for name, tree in MODULES.items() if C_EXTENSION in _imports(tree)}
    assert users
    assert all(_floor(name) == 2 for name in users)


def test_trio_stays_above_the_values() -> None:
    users = {name for name, tree in MODULES.items() if "trio" in _imports(tree)}
    assert users
    assert all(_floor(name) >= LOWEST_WITH_TRIO for name in users)


def test_rpmsg_and_remoteproc_do_not_know_each_other() -> None:
    for one, other in (("rpmsg", "remoteproc"), ("remoteproc", "rpmsg")):
        for name in MODULES:
            if name.startswith(f"openamp_py.{one}"):
                assert not [i for i in _imports(MODULES[name]) if f"openamp_py.{other}" in i], name
