"""What keeps a machine's remote processors from being used, and what to do about it."""

from __future__ import annotations

import enum
import os
import re
import stat
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from openamp_py.linux.access import Access, MachineAccess
from openamp_py.linux.tree import DEBUG, PROCESSORS, RELEASE, LinuxProcessor, LinuxTree, read_tree

DEFAULT_GROUP: Final = "openamp"
"""Group that the udev rules give the nodes to, where none is named."""

_MAX_CONFIG: Final = 4 << 20
"""Bytes of a kernel's configuration, packed or not; a whole one has 300 KiB."""

_MAX_INDEX: Final = 16 << 20
"""Bytes of a modules.dep; a distribution's has 1 MiB."""

_GROUP = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,31}")
_WRITABLE: Final = ("state", "firmware", "recovery", "coredump")
_PACKED: Final = ("", ".zst", ".xz")
"""What the kernel puts behind a firmware's name while it looks for it."""

_UNUSED_NAME: Final = "rpmsg-tty-channel"
"""What rpmsg_tty's service was called before the driver was in Linux."""


class Level(enum.Enum):
    """How a check ended."""

    FINE = "ok"
    NOTE = "note"
    """Nothing is wrong, but somebody may wonder."""
    WRONG = "to do"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        subject: what was looked at: an option, a processor, a node.
        text: how it is.
        cure: what to do, a command where there is one.
    """

    level: Level
    subject: str
    text: str
    cure: str | None = None


@dataclass(frozen=True, slots=True)
class _Option:
    """A part of the kernel: its option, its module, since when it is one, and what it gives."""

    name: str
    module: str | None
    since: tuple[int, int]
    purpose: str
    needed: bool = True


_OPTIONS: Final = (
    _Option("REMOTEPROC", None, (0, 0), "processors"),
    _Option("RPMSG_VIRTIO", "virtio_rpmsg_bus", (0, 0), "channels"),
    _Option("RPMSG_CHAR", "rpmsg_char", (0, 0), "nodes of endpoints"),
    _Option("RPMSG_CTRL", "rpmsg_ctrl", (5, 18), "control nodes"),
    _Option("RPMSG_TTY", "rpmsg_tty", (5, 16), "terminals", needed=False),
    _Option("ALLOW_DEV_COREDUMP", None, (0, 0), "coredumps", needed=False),
    _Option("DEBUG_FS", None, (0, 0), "traces", needed=False),
)


def examine(access: Access | None = None) -> tuple[Check, ...]:
    """Looks at the kernel, its modules, the processors, their firmware and the nodes.

    Nothing is changed, and no node is opened.

    Args:
        access: the machine; None: the one that this runs on.
    """
    access = MachineAccess() if access is None else access
    tree = read_tree(access)
    return (
        *_check_kernel(access, tree),
        *_check_processors(access, tree),
        *_check_channels(tree),
        *_check_nodes(access, tree),
        *(Check(Level.WRONG, each.path, each.reason, _cure(each.reason)) for each in tree.problems),
    )


def udev_rules(group: str = DEFAULT_GROUP) -> str:
    """Rules for udev that let a group use all nodes and processors.

    Raises:
        ValueError: the name is none of a group.
    """
    if not _GROUP.fullmatch(group):
        raise ValueError(f"{group!r} is no name of a group")
    # Not "&&" between the two: older kernels do not have all of these files.
    share = "RUN+=\"/bin/sh -c 'cd %S%p && chgrp {0} {1}; chmod g+{2} {1}'\""
    attributes = " ".join(_WRITABLE)
    give = f'GROUP="{group}", MODE="0660"'
    return f"""\
# Remote processors for members of the group {group}.
#   groupadd -rf {group}; usermod -aG {group} USER
#   openamp doctor --udev {group} > /etc/udev/rules.d/60-openamp.rules
#   udevadm control --reload; udevadm trigger --action=add
SUBSYSTEM=="rpmsg", KERNEL=="rpmsg[0-9]*|rpmsg_ctrl[0-9]*", {give}
SUBSYSTEM=="tty", KERNEL=="ttyRPMSG[0-9]*", {give}
SUBSYSTEM=="remoteproc", KERNEL=="remoteproc[0-9]*", {give}
SUBSYSTEM=="remoteproc", ACTION=="add", {share.format(group, attributes, "w")}
SUBSYSTEM=="devcoredump", ACTION=="add", {share.format(group, "data", "rw")}
"""


# The kernel


def _check_kernel(access: Access, tree: LinuxTree) -> Iterator[Check]:
    options = read_options(access, tree.release)
    built_in, loadable = (
        _text(access, f"/lib/modules/{tree.release}/modules.{name}") for name in ("builtin", "dep")
    )
    where = tree.release or f"no version in {RELEASE}"
    if options is None:
        places = " or ".join(_config_places(tree.release))
        yield Check(
            Level.NOTE, "kernel", f"{where}; its options are unknown: there is no {places}"
        )  # fmt: skip
    else:
        yield Check(Level.FINE, "kernel", where)
    for option in _OPTIONS:
        if _version(tree.release) < option.since:
            continue
        value = None if options is None else options.get(option.name, "n")
        yield _check_option(
            option,
            value,
            active=_is_active(access, tree, option)
            or f"/{option.module}.ko" in built_in.replace("-", "_"),
            loadable=f"/{option.module}.ko" in loadable.replace("-", "_"),
        )


def _check_option(option: _Option, value: str | None, *, active: bool, loadable: bool) -> Check:
    subject = f"CONFIG_{option.name}"
    bad = Level.WRONG if option.needed else Level.NOTE
    if active or value == "y":
        return Check(Level.FINE, subject, f"{option.purpose}: in the kernel")
    if loadable:
        text = f"{option.purpose}: the module {option.module} is not loaded"
        return Check(bad, subject, text, f"modprobe {option.module}")
    if value == "m":
        text = f"{option.purpose}: the module {option.module} is not installed"
        return Check(bad, subject, text, "install the modules of this very kernel")
    if value == "n":
        text = f"{option.purpose}: not in this kernel"
        return Check(bad, subject, text, f"build the kernel with {subject}")
    return Check(Level.NOTE, subject, f"{option.purpose}: no sign of it")


def _is_active(access: Access, tree: LinuxTree, option: _Option) -> bool:
    """Whether the part is at work: loaded, or what it makes is there."""
    made = {
        "REMOTEPROC": _there(access, PROCESSORS),
        "RPMSG_VIRTIO": bool(tree.channels),
        "RPMSG_CTRL": bool(tree.controls),
        "RPMSG_CHAR": bool(tree.endpoints),
        "ALLOW_DEV_COREDUMP": _there(access, "/sys/class/devcoredump"),
        "DEBUG_FS": _there(access, "/sys/kernel/debug"),
    }
    return made.get(option.name, False) or (
        option.module is not None and _there(access, f"/sys/module/{option.module}")
    )


def read_options(access: Access, release: str | None) -> Mapping[str, str] | None:
    """The kernel's options without CONFIG_, as y, m or a value; None: nobody tells them."""
    for path in _config_places(release):
        try:
            data = access.read(path, _MAX_CONFIG)
        except OSError:
            continue
        if path.endswith(".gz"):
            try:
                data = zlib.decompressobj(wbits=31).decompress(data, _MAX_CONFIG)
            except zlib.error:
                continue
        lines = re.findall(r"^CONFIG_(\w+)=(.*)$", data.decode("utf-8", "replace"), re.MULTILINE)
        return dict(lines)
    return None


def _config_places(release: str | None) -> tuple[str, ...]:
    own = (f"/boot/config-{release}", f"/lib/modules/{release}/config") if release else ()
    return ("/proc/config.gz", *own)


def _version(release: str | None) -> tuple[int, int]:
    """Of a kernel that does not say it: none, so that nothing new is asked of it."""
    found = re.match(r"([0-9]{1,4})\.([0-9]{1,4})", release or "")
    return (0, 0) if found is None else (int(found[1]), int(found[2]))


# Processors


def _check_processors(access: Access, tree: LinuxTree) -> Iterator[Check]:
    if not tree.processors:
        yield Check(
            Level.WRONG,
            "processors",
            f"none in {PROCESSORS}",
            "enable the processor in the device tree, load its driver, and see `dmesg | grep "
            "-e remoteproc -e rproc`",
        )
    names = [processor.name for processor in tree.processors]
    for processor in tree.processors:
        yield from _check_processor(access, tree, processor)
        if processor.name is not None and names.count(processor.name) > 1:
            yield Check(
                Level.NOTE, _title(processor), "another processor has this name, too: it cannot be "
                f"found by it; use {processor.kernel_name}"
            )  # fmt: skip
    for dump in tree.dumps:
        yield Check(
            Level.NOTE,
            dump.processor or dump.kernel_name,
            f"a coredump waits in {dump.data}; until it is dismissed, later ones are lost",
            f"cp {dump.data} FILE; echo 1 > {dump.data}",
        )


def _check_processor(access: Access, tree: LinuxTree, processor: LinuxProcessor) -> Iterator[Check]:
    title, state = _title(processor), processor.state
    files = f"{PROCESSORS}/{processor.kernel_name}"
    if state == "crashed":
        yield Check(
            Level.WRONG,
            title,
            f"crashed; recovery is {processor.recovery}",
            f"echo recover > {files}/recovery",
        )
    else:
        yield Check(Level.FINE, title, str(state))
    if processor.firmware not in (None, "unknown"):
        yield _check_firmware(access, tree, processor)
    for name in _WRITABLE:
        path = f"{files}/{name}"
        if not _there(access, path) or access.allowed(path, os.W_OK):
            continue
        found = _stat(access, path)
        if found is not None and not found.st_mode & stat.S_IWUSR:
            yield Check(Level.NOTE, title, f"its driver lets nobody write {path}")
        else:
            yield _not_permitted(access, path, "write")
    if state in ("running", "attached") and not processor.traces:
        yield Check(
            Level.NOTE,
            title,
            f"no trace in {DEBUG}/{processor.kernel_name}: the firmware has none, debugfs is not "
            "mounted, or is root's alone",
        )


def _check_firmware(access: Access, tree: LinuxTree, processor: LinuxProcessor) -> Check:
    title, name = _title(processor), processor.firmware
    places = firmware_places(tree)
    for place in places:
        for packed in _PACKED:
            if _there(access, f"{place}/{name}{packed}"):
                return Check(Level.FINE, title, f"firmware {place}/{name}{packed}")
    level = Level.WRONG if processor.state == "offline" else Level.NOTE
    return Check(
        level,
        title,
        f"firmware {name} is in none of {', '.join(places)}",
        f"copy it there, or name another: echo NAME > {PROCESSORS}/{processor.kernel_name}/firmware"
    )  # fmt: skip


def firmware_places(tree: LinuxTree) -> tuple[str, ...]:
    """The directories in which this kernel looks for firmware, the first first."""
    own = (tree.firmware_path.rstrip("/"),) if tree.firmware_path else ()
    release = tree.release
    subs = (f"/updates/{release}", "/updates", f"/{release}", "") if release else ("/updates", "")
    return (*own, *(f"/lib/firmware{sub}" for sub in subs))


# Channels and nodes


def _check_channels(tree: LinuxTree) -> Iterator[Check]:
    for processor in tree.processors:
        if processor.state not in ("running", "attached"):
            continue
        title = _title(processor)
        if not any(each.processor == processor.kernel_name for each in tree.channels):
            yield Check(
                Level.NOTE,
                title,
                "it runs, and has no rpmsg bus",
                "if it should have one: see that the firmware's resource table has an RPMsg device "
                "(`openamp lint`), and that virtio_rpmsg_bus is loaded",
            )
        elif not any(each.processor == processor.kernel_name for each in tree.controls):
            yield Check(
                Level.WRONG, title, "it has no control node", "modprobe -a rpmsg_ctrl rpmsg_char"
            )
    for channel in tree.channels:
        module = {"rpmsg-raw": "rpmsg_char", "rpmsg-tty": "rpmsg_tty"}.get(channel.name or "")
        if module is not None and channel.driver is None:
            yield Check(
                Level.WRONG,
                channel.kernel_name,
                "no driver has taken this channel",
                f"modprobe {module}",
            )
        if channel.name == _UNUSED_NAME:
            yield Check(
                Level.NOTE,
                channel.kernel_name,
                "Linux makes no terminal for this name",
                "call the firmware's service rpmsg-tty",
            )


def _check_nodes(access: Access, tree: LinuxTree) -> Iterator[Check]:
    nodes = [
        *(each.node for each in tree.processors if each.node is not None),
        *(each.node for each in tree.controls),
        *(each.node for each in tree.endpoints),
        *(each.node for each in tree.ttys),
    ]
    if not nodes:
        yield Check(Level.NOTE, "nodes", "none: they are there while a processor runs")
    fine = []
    for node in nodes:
        if not _there(access, node):
            yield Check(
                Level.WRONG,
                node,
                "sysfs has it, /dev does not",
                "mount devtmpfs or start udev; let the container have the device",
            )
        elif not access.allowed(node, os.R_OK | os.W_OK):
            yield _not_permitted(access, node, "open")
        else:
            fine.append(node)
    if fine:
        yield Check(Level.FINE, "nodes", ", ".join(fine))


def _not_permitted(access: Access, path: str, what: str) -> Check:
    found = _stat(access, path)
    whose = ""
    if found is not None:
        whose = f" ({stat.filemode(found.st_mode)}, user {found.st_uid}, group {found.st_gid})"
    return Check(
        Level.WRONG,
        path,
        f"this user may not {what} it{whose}",
        "give it to a group: openamp doctor --udev",
    )


def _cure(reason: str) -> str | None:
    denied = reason.startswith(("EACCES", "EPERM"))
    return "run it as root, or see openamp doctor --udev" if denied else None


def _title(processor: LinuxProcessor) -> str:
    return f"{processor.name or '?'} ({processor.kernel_name})"


def _there(access: Access, path: str) -> bool:
    return access.allowed(path, os.F_OK)


def _stat(access: Access, path: str) -> os.stat_result | None:
    try:
        return access.stat(path)
    except OSError:
        return None


def _text(access: Access, path: str) -> str:
    try:
        return access.read(path, _MAX_INDEX).decode("utf-8", "replace")
    except OSError:
        return ""
