"""What a machine's sysfs and /dev say about remote processors, as values.

Files come and go while they are read: a processor that leaves meanwhile is not in the tree, and
what cannot be read is None, with a line in ``problems`` that says why.

    /sys/devices/.../remoteproc/remoteproc0        a processor
      .../virtio0                                    the bus
        virtio0.rpmsg-raw.-1.1024                      a channel
          rpmsg/rpmsg1                                   the node of its own endpoint
          tty/ttyRPMSG0                                  or its terminal
        virtio0.rpmsg_ctrl.0.0/rpmsg/rpmsg_ctrl0       the control node
          rpmsg0                                         an endpoint made through it

Who belongs to whom is read out of these paths, never out of the numbers.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeVar

from openamp_py.linux.access import Access, MachineAccess

PROCESSORS: Final = "/sys/class/remoteproc"
CHANNELS: Final = "/sys/bus/rpmsg/devices"
NODES: Final = "/sys/class/rpmsg"
TTYS: Final = "/sys/class/tty"
DUMPS: Final = "/sys/class/devcoredump"
DEBUG: Final = "/sys/kernel/debug/remoteproc"
FIRMWARE_PATH: Final = "/sys/module/firmware_class/parameters/path"
RELEASE: Final = "/proc/sys/kernel/osrelease"

_U32: Final = 0xFFFF_FFFF
_MAX_ENTRIES: Final = 4096
"""Entries of a directory that are looked at; a peer can announce channels without end."""

_DEVICE_NUMBER = re.compile(r"([0-9]{1,10}):([0-9]{1,10})")
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ENODEV)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is there and could not be read, or has no sense."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class LinuxProcessor:
    """A processor in /sys/class/remoteproc.

    Attributes:
        kernel_name: ``remoteproc0``; changes with each load of the driver.
        path: where sysfs really has it.
        name: the driver's name for it, by which it is found again.
        state: the kernel's word: offline, running, crashed, attached, detached...
        firmware: the file's name, below the kernel's search path.
        recovery: enabled or disabled.
        coredump: disabled, enabled or inline.
        node: its device node, where the kernel has REMOTEPROC_CDEV.
        traces: trace buffers in debugfs, which only root sees.
    """

    kernel_name: str
    path: str
    name: str | None
    state: str | None
    firmware: str | None
    recovery: str | None
    coredump: str | None
    node: str | None
    traces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LinuxChannel:
    """A device on the rpmsg bus: an announced service, or the control device.

    Attributes:
        kernel_name: ``virtio0.rpmsg-raw.-1.1024``.
        bus: the device that carries the bus, ``virtio0``.
        processor: kernel name of the processor; None: the bus is not one's.
        source: local address; ADDRESS_ANY where the channel has none.
        driver: what is bound to it.
    """

    kernel_name: str
    path: str
    bus: str
    processor: str | None
    name: str | None
    source: int | None
    destination: int | None
    announce: bool | None
    driver: str | None


@dataclass(frozen=True, slots=True)
class ControlNode:
    """A node that makes endpoints on one bus.

    Attributes:
        node: ``/dev/rpmsg_ctrl0``.
        channel: the rpmsg device it belongs to.
        device: major and minor number.
    """

    kernel_name: str
    path: str
    node: str
    bus: str | None
    channel: str | None
    processor: str | None
    device: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class EndpointNode:
    """The node of an endpoint.

    Attributes:
        node: ``/dev/rpmsg0``.
        control: kernel name of the control node that made it; None: it is a channel's own.
        source: local address; ADDRESS_ANY: the kernel chose one when the node was opened, and
            does not tell.
    """

    kernel_name: str
    path: str
    node: str
    bus: str | None
    channel: str | None
    processor: str | None
    control: str | None
    name: str | None
    source: int | None
    destination: int | None
    device: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class TtyNode:
    """A terminal on a channel of the service rpmsg-tty."""

    kernel_name: str
    path: str
    node: str
    bus: str | None
    channel: str | None
    processor: str | None


@dataclass(frozen=True, slots=True)
class WaitingDump:
    """A coredump that the kernel keeps until it is read or dismissed.

    Attributes:
        data: the file to read; any write dismisses the dump.
        processor: whose it is; None: another device's.
    """

    kernel_name: str
    data: str
    processor: str | None


@dataclass(frozen=True, slots=True)
class LinuxTree:
    """All that a machine says about remote processors, at one look.

    Attributes:
        release: the kernel's version, ``6.1.0-50-armmp``.
        firmware_path: where the kernel looks first for firmware; empty: nowhere of its own.
        nodes: names in /dev that are of rpmsg or remoteproc, whoever they belong to.
        problems: what could not be read, and why.
    """

    release: str | None
    firmware_path: str | None
    processors: tuple[LinuxProcessor, ...]
    channels: tuple[LinuxChannel, ...]
    controls: tuple[ControlNode, ...]
    endpoints: tuple[EndpointNode, ...]
    ttys: tuple[TtyNode, ...]
    dumps: tuple[WaitingDump, ...]
    nodes: tuple[str, ...]
    problems: tuple[Problem, ...]


def read_tree(access: Access | None = None) -> LinuxTree:
    """Reads the machine's tree.

    Args:
        access: the machine; None: the one that this runs on.
    """
    reader = TreeReader(access)
    processors = reader.processors()
    channels = reader.channels()
    controls, endpoints = reader.nodes()
    ttys, dumps = reader.ttys(), reader.dumps()
    return LinuxTree(
        release=reader.text(RELEASE),
        firmware_path=reader.text(FIRMWARE_PATH),
        processors=processors,
        channels=channels,
        controls=controls,
        endpoints=endpoints,
        ttys=ttys,
        dumps=dumps,
        nodes=reader.device_names(),
        problems=tuple(dict.fromkeys(reader.problems)),
    )


Entry = TypeVar("Entry")


class TreeReader:
    """Reads parts of the tree, for who does not need all of it. It holds nothing open.

    Args:
        access: the machine; None: the one that this runs on.

    Attributes:
        problems: what could not be read so far, and why.
    """

    def __init__(self, access: Access | None = None) -> None:
        self._access = MachineAccess() if access is None else access
        self.problems: list[Problem] = []

    def processors(self) -> tuple[LinuxProcessor, ...]:
        """The processors, by their numbers."""
        return self._entries(PROCESSORS, r"remoteproc[0-9]+", self._processor)

    def channels(self, only: Collection[str] | None = None) -> tuple[LinuxChannel, ...]:
        """The devices on all rpmsg buses.

        Args:
            only: kernel names of those that are read; by default all.
        """
        return self._entries(CHANNELS, r"(?s).+", self._channel, only)

    def nodes(self) -> tuple[tuple[ControlNode, ...], tuple[EndpointNode, ...]]:
        """The control nodes and those of endpoints, by their numbers."""
        controls = self._entries(NODES, r"rpmsg_ctrl[0-9]+", self._control)
        return controls, self._entries(NODES, r"rpmsg[0-9]+", self._endpoint)

    def ttys(self) -> tuple[TtyNode, ...]:
        """The terminals, by their numbers."""
        return self._entries(TTYS, r"ttyRPMSG[0-9]+", self._tty)

    def dumps(self) -> tuple[WaitingDump, ...]:
        """Coredumps of any device that wait to be read."""
        return self._entries(DUMPS, r"devcd[0-9]+", self._dump)

    def device_names(self) -> tuple[str, ...]:
        """Paths in /dev whose names are of rpmsg or remoteproc."""
        names = self._names("/dev", r"(rpmsg(_ctrl)?|remoteproc|ttyRPMSG)[0-9]+")
        return tuple(f"/dev/{name}" for name in names)

    def text(self, path: str) -> str | None:
        """A file's text without the newline at its end; None: not there, or a problem."""
        try:
            data = self._access.read(path)
        except OSError as error:
            self._note(path, error)
            return None
        # Names are the firmware's choice, and can be any bytes.
        return data.decode("utf-8", "backslashreplace").removesuffix("\n")

    def _note(self, path: str, error: OSError) -> None:
        if error.errno not in _GONE:  # what is not there is no problem here
            code = errno.errorcode.get(error.errno or 0, str(error.errno))
            self.problems.append(Problem(path, f"{code}, {os.strerror(error.errno or 0)}"))

    def _names(self, directory: str, pattern: str) -> list[str]:
        try:
            names = self._access.names(directory)
        except OSError as error:
            self._note(directory, error)
            return []
        found = sorted((name for name in names if re.fullmatch(pattern, name)), key=_by_number)
        if len(found) > _MAX_ENTRIES:
            self.problems.append(
                Problem(directory, f"{len(found)} entries; only {_MAX_ENTRIES} were read")
            )
        return found[:_MAX_ENTRIES]

    def _entries(
        self,
        directory: str,
        pattern: str,
        read: Callable[[str, str], Entry | None],
        only: Collection[str] | None = None,
    ) -> tuple[Entry, ...]:
        found = []
        for name in self._names(directory, pattern):
            if only is not None and name not in only:
                continue
            path = self._resolve(f"{directory}/{name}")
            before = len(self.problems)
            entry = None if path is None else read(name, path)
            if path is None or entry is None:
                continue
            if self._resolve(path) is None:  # it left while it was read
                del self.problems[before:]
                continue
            found.append(entry)
        return tuple(found)

    def _resolve(self, path: str) -> str | None:
        try:
            return self._access.resolve(path)
        except OSError as error:
            self._note(path, error)
            return None

    def _processor(self, name: str, path: str) -> LinuxProcessor:
        text = self.text
        has_node = text(f"{path}/dev") is not None
        return LinuxProcessor(
            kernel_name=name,
            path=path,
            name=text(f"{path}/name"),
            state=text(f"{path}/state"),
            firmware=text(f"{path}/firmware"),
            recovery=text(f"{path}/recovery"),
            coredump=text(f"{path}/coredump"),
            node=f"/dev/{name}" if has_node else None,
            traces=self._traces(f"{DEBUG}/{name}"),
        )

    def _traces(self, directory: str) -> tuple[str, ...]:
        """Trace files; that only root sees debugfs is no problem of the tree."""
        before = len(self.problems)
        names = self._names(directory, r"trace[0-9]+")
        del self.problems[before:]
        return tuple(f"{directory}/{name}" for name in names)

    def _channel(self, name: str, path: str) -> LinuxChannel:
        announce = self.text(f"{path}/announce")
        driver = self._resolve(f"{path}/driver")
        return LinuxChannel(
            kernel_name=name,
            path=path,
            bus=path.split("/")[-2],
            processor=_processor_above(path),
            name=self.text(f"{path}/name"),
            source=self._address(f"{path}/src"),
            destination=self._address(f"{path}/dst"),
            announce=None if announce is None else announce == "true",
            driver=None if driver is None else driver.rpartition("/")[2],
        )

    def _control(self, name: str, path: str) -> ControlNode:
        bus, channel = _bus_and_channel(path)
        return ControlNode(
            kernel_name=name,
            path=path,
            node=f"/dev/{name}",
            bus=bus,
            channel=channel,
            processor=_processor_above(path),
            device=self._device_number(f"{path}/dev"),
        )

    def _endpoint(self, name: str, path: str) -> EndpointNode:
        bus, channel = _bus_and_channel(path)
        return EndpointNode(
            kernel_name=name,
            path=path,
            node=f"/dev/{name}",
            bus=bus,
            channel=channel,
            processor=_processor_above(path),
            control=_last(path, r"rpmsg_ctrl[0-9]+"),
            name=self.text(f"{path}/name"),
            source=self._address(f"{path}/src"),
            destination=self._address(f"{path}/dst"),
            device=self._device_number(f"{path}/dev"),
        )

    def _tty(self, name: str, path: str) -> TtyNode:
        bus, channel = _bus_and_channel(path)
        return TtyNode(
            kernel_name=name,
            path=path,
            node=f"/dev/{name}",
            bus=bus,
            channel=channel,
            processor=_processor_above(path),
        )

    def _dump(self, name: str, path: str) -> WaitingDump:
        device = self._resolve(f"{path}/failing_device")
        processor = None if device is None else _processor_above(f"{device}/")
        return WaitingDump(kernel_name=name, data=f"{path}/data", processor=processor)

    def _address(self, path: str) -> int | None:
        """An address: the bus writes it as 0xffffffff, an endpoint as -1."""
        text = self.text(path)
        if text is None:
            return None
        if re.fullmatch(r"0x[0-9a-fA-F]{1,8}|-?[0-9]{1,10}", text):
            number = int(text, 0) if text.startswith("0x") else int(text)
            if -1 << 31 <= number <= _U32:
                return number & _U32
        self.problems.append(Problem(path, f"{text[:40]!r} is not an address"))
        return None

    def _device_number(self, path: str) -> tuple[int, int] | None:
        text = self.text(path)
        found = _DEVICE_NUMBER.fullmatch(text or "")
        return None if found is None else (int(found[1]), int(found[2]))


def _by_number(name: str) -> tuple[str, int, str]:
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or -1), name


def _last(path: str, pattern: str) -> str | None:
    """The lowest directory above the last component that is called so."""
    above: Iterable[str] = reversed(path.split("/")[:-1])
    return next((name for name in above if re.fullmatch(pattern, name)), None)


def _processor_above(path: str) -> str | None:
    return _last(path, r"remoteproc[0-9]+")


def _bus_and_channel(path: str) -> tuple[str | None, str | None]:
    """Names of the bus and of the rpmsg device above a node: `virtio0/virtio0.name.-1.1024/...`.

    A channel's name is its bus's, and more; nothing else in these paths is called so.
    """
    for bus, channel in reversed([*pairwise(path.split("/")[:-1])]):
        if bus and channel.startswith(f"{bus}."):
            return bus, channel
    return None, None
