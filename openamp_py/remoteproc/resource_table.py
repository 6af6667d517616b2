"""The resource table: what a firmware asks of its host, as values.

A table is a header, an array of offsets, and the entries they point to. It lies in the
firmware image, and once loaded in memory that the remote can write as well, so decoding
copies it once and checks the copy; what is decoded never changes.

An entry knows its ``offset`` from the table's start, for the host writes addresses,
notify ids, features and status back in place: the ``..._OFFSET`` constants are relative
to it.

A vring at device address 0 lies at 0: only ``DA_ANY`` leaves the place to the host, as in
Linux. Some old firmware means ANY by 0; ``openamp lint`` says so.

Reference: open-amp, ``openamp/remoteproc.h``; Linux, ``linux/remoteproc.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from struct import Struct, error, pack_into, unpack_from
from typing import ClassVar, Final, TypeAlias, TypeVar, cast

from openamp_py.constants import (
    DA_ANY,
    NAME_SIZE,
    NOTIFY_ID_ANY,
    RPMSG_F_NS,
    VIRTIO_ID_RPMSG,
)
from openamp_py.errors import ResourceTableError
from openamp_py.vring import MAX_NUM, MIN_ALIGN, VringLayout

TABLE_VERSION: Final = 1
"""The only version there is."""

MAX_ENTRIES: Final = 1024
"""Our limit: far above any firmware, and it bounds what a hostile table costs."""

TABLE_LIMIT: Final = 0x1_0000
"""Most bytes of a table that a host reads: in memory a table has no stated length."""

RPMSG_VRINGS: Final = 2
"""Vrings of an RPMsg device; with fewer, Linux boots and then panics at stop."""

DESCRIPTOR_TABLE_ALIGN: Final = 16
"""Alignment that a descriptor table, where a vring begins, needs (virtio 1.2, 2.7)."""

VENDOR_TYPES: Final = range(128, 513)
"""RSC_VENDOR_START to RSC_VENDOR_END, inclusive."""

# Table header
#   u32 ver           1
#   u32 num           of entries
#   u32 reserved[2]   zero
#   u32 offset[num]   of each entry, from the table's start
_HEADER: Final = Struct("<4I")
_OFFSET_SIZE: Final = 4
_WORD_SIZE: Final = 4

# Word with which every entry begins
#   u32 type
_TYPE: Final = Struct("<I")

# Carveout (type 0) and devmem (type 1)
#    0  u32 type
#    4  u32 da        device address, or ANY
#    8  u32 pa        physical address, or ANY
#   12  u32 len       bytes
#   16  u32 flags     of an IOMMU mapping
#   20  u32 reserved  zero
#   24  u8 name[32]   a NUL at the end is not guaranteed
_MEMORY: Final = Struct(f"<6I{NAME_SIZE}s")
MEMORY_DA_OFFSET: Final = 4
MEMORY_PA_OFFSET: Final = 8

# Trace (type 2)
#    0  u32 type
#    4  u32 da
#    8  u32 len       bytes
#   12  u32 reserved  zero
#   16  u8 name[32]   a NUL at the end is not guaranteed
_TRACE: Final = Struct(f"<4I{NAME_SIZE}s")

# Vdev (type 3)
#    0  u32 type
#    4  u32 id              virtio device id
#    8  u32 notifyid        for a change of the config space
#   12  u32 dfeatures       offered by the device
#   16  u32 gfeatures       accepted by the driver
#   20  u32 config_len      bytes
#   24  u8 status           virtio device status, written by the driver
#   25  u8 num_of_vrings
#   26  u8 reserved[2]      zero
#   28  vring[num_of_vrings], then the config space
_VDEV: Final = Struct("<6I2BH")
VDEV_NOTIFY_ID_OFFSET: Final = 8
VDEV_DRIVER_FEATURES_OFFSET: Final = 16
VDEV_STATUS_OFFSET: Final = 24
VDEV_VRINGS_OFFSET: Final = 28

# Vring, inside a vdev
#    0  u32 da
#    4  u32 align
#    8  u32 num       entries
#   12  u32 notifyid
#   16  u32 pa        Linux's name; "reserved" elsewhere
_VRING: Final = Struct("<5I")
VRING_SIZE: Final = 20
VRING_DA_OFFSET: Final = 0
VRING_NOTIFY_ID_OFFSET: Final = 12

# Vendor (types 128 to 512)
#    0  u32 type
#    4  anything; in OpenAMP a u32 with the bytes of private data, and then those
_LENGTH: Final = Struct("<I")


# The two bases only declare fields: what dataclass would generate for them costs import time.


@dataclass(frozen=True, slots=True, init=False, repr=False, eq=False)
class _Placed:
    """Where an entry lies; 0, where the header is, for one that is not in a table yet."""

    offset: int = field(default=0, compare=False, kw_only=True)


@dataclass(frozen=True, slots=True, init=False, repr=False, eq=False)
class _Memory(_Placed):
    """The fields that a carveout and a devmem share."""

    da: int
    pa: int
    length: int
    flags: int
    name: str


@dataclass(frozen=True, slots=True)
class Carveout(_Memory):
    """Memory for the remote; the host allocates it where ``da`` is ``DA_ANY``."""

    TYPE: ClassVar[int] = 0


@dataclass(frozen=True, slots=True)
class DevMem(_Memory):
    """A peripheral that the host is asked to map for the remote."""

    TYPE: ClassVar[int] = 1


@dataclass(frozen=True, slots=True)
class Trace(_Placed):
    """A buffer in which the remote writes its log."""

    TYPE: ClassVar[int] = 2

    da: int
    length: int
    name: str


@dataclass(frozen=True, slots=True)
class Vring:
    """One vring of a virtio device: where it lies, or may lie, and how large it is."""

    da: int
    align: int
    num: int
    notify_id: int
    pa: int = 0


@dataclass(frozen=True, slots=True)
class Vdev(_Placed):
    """A virtio device, with the status and features that were found in the table."""

    TYPE: ClassVar[int] = 3

    id: int
    notify_id: int
    device_features: int
    driver_features: int = 0
    status: int = 0
    vrings: tuple[Vring, ...] = ()
    config: bytes = b""

    @property
    def config_offset(self) -> int:
        """Where the config space lies, from the start of this entry."""
        return VDEV_VRINGS_OFFSET + VRING_SIZE * len(self.vrings)


@dataclass(frozen=True, slots=True)
class Vendor(_Placed):
    """An entry for one platform alone; data goes on to the next entry or the end.

    Linux hands on all that follows the type; OpenAMP begins it with a length: `payload`.
    """

    type: int
    data: bytes = field(repr=False)

    @classmethod
    def of(cls, type: int, payload: bytes) -> Vendor:
        """Make an entry in OpenAMP's form: the payload's length before it, zeros behind."""
        return cls(type, _LENGTH.pack(len(payload)) + payload + bytes(-len(payload) % _WORD_SIZE))

    @property
    def payload(self) -> bytes | None:
        """What the first word of the data counts; None where that word is no length."""
        if len(self.data) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self.data)
        end = _LENGTH.size + length
        return self.data[_LENGTH.size : end] if end <= len(self.data) else None


@dataclass(frozen=True, slots=True)
class Unknown(_Placed):
    """An entry of a type that is skipped; data goes on to the next entry or the end."""

    type: int
    data: bytes = field(repr=False)


Entry: TypeAlias = Carveout | DevMem | Trace | Vdev | Vendor | Unknown
_E = TypeVar("_E", bound=Entry)
_M = TypeVar("_M", Carveout, DevMem)

_TYPE_NAMES: Final = {
    Carveout.TYPE: "carveout",
    DevMem.TYPE: "devmem",
    Trace.TYPE: "trace",
    Vdev.TYPE: "vdev",
    # Removed from OpenAMP in 2018; Linux never had them.
    4: "rproc_mem (historical)",
    5: "fw_chksum (historical)",
}


@dataclass(frozen=True, slots=True)
class ResourceTable:
    """All entries of a table, in the order of its offset array.

    Attributes:
        length: how many bytes the table takes; 0 for one that is not placed yet.
        raw: the bytes it was decoded from; `encode_table` keeps what no entry holds.
    """

    entries: tuple[Entry, ...] = ()
    length: int = field(default=0, compare=False, kw_only=True)
    raw: bytes = field(default=b"", compare=False, repr=False, kw_only=True)

    @property
    def carveouts(self) -> tuple[Carveout, ...]:
        return self._of(Carveout)

    @property
    def devmems(self) -> tuple[DevMem, ...]:
        return self._of(DevMem)

    @property
    def traces(self) -> tuple[Trace, ...]:
        return self._of(Trace)

    @property
    def vdevs(self) -> tuple[Vdev, ...]:
        return self._of(Vdev)

    @property
    def vendors(self) -> tuple[Vendor, ...]:
        return self._of(Vendor)

    @property
    def unknowns(self) -> tuple[Unknown, ...]:
        """The entries that nothing will be done about: report them."""
        return self._of(Unknown)

    @property
    def end(self) -> int:
        """Where the last entry ends, from the table's start: in memory no length is stated."""
        return max(
            (entry.offset + _entry_size(entry) for entry in self.entries), default=_HEADER.size
        )

    def _of(self, kind: type[_E]) -> tuple[_E, ...]:
        return tuple(entry for entry in self.entries if isinstance(entry, kind))

    def to_dict(self) -> dict[str, object]:
        """Return the table as plain JSON: every field by name, bytes as hex."""
        return {
            "length": self.length,
            "entries": [
                {"kind": type(entry).__name__.lower(), "type": entry_type(entry)} | _plain(entry)
                for entry in self.entries
            ],
        }


def entry_type(entry: Entry) -> int:
    """Return the type word of an entry."""
    return entry.type if isinstance(entry, (Vendor, Unknown)) else entry.TYPE


def type_name(type_: int) -> str:
    """Name the type of an entry, also of the two that only history knows."""
    if type_ in VENDOR_TYPES:
        return f"vendor {type_}"
    return _TYPE_NAMES.get(type_, f"unknown type {type_}")


# Decoding


def decode_table_untrusted(data: bytes | memoryview) -> ResourceTable:
    """Decode a table from an image or from memory that the other side may write.

    Args:
        data: the table from its header on; what follows its last entry is ignored. It is
            read once.

    Raises:
        ResourceTableError: it is malformed, or asks for what no host can give.
    """
    raw = bytes(data)
    offsets = _decode_offsets(raw)
    order = sorted(range(len(offsets)), key=offsets.__getitem__)
    borders = [*(offsets[index] for index in order[1:]), len(raw)]
    found: dict[int, Entry] = {}
    # One by one, so that entries that lie on each other are not all decoded first.
    for index, border in zip(order, borders, strict=False):
        entry = found[index] = _decode_entry(raw, offsets[index], index, border)
        end = entry.offset + _entry_size(entry)
        if end > border:
            following = order[len(found)]
            raise ResourceTableError(
                f"resource table: entry {index} at offset {entry.offset:#x} ends at "
                f"{end:#x}, inside entry {following} at offset {border:#x}"
            )
    entries = tuple(found[index] for index in range(len(offsets)))
    return ResourceTable(entries, length=len(raw), raw=raw)


def _decode_offsets(raw: bytes) -> tuple[int, ...]:
    if len(raw) < _HEADER.size:
        raise ResourceTableError(
            f"resource table: {len(raw)} bytes; the header alone has {_HEADER.size}"
        )
    version, num, *reserved = _HEADER.unpack_from(raw)
    if version != TABLE_VERSION:
        raise ResourceTableError(f"resource table: version {version}, expected {TABLE_VERSION}")
    if any(reserved):
        raise ResourceTableError(
            f"resource table: reserved words {reserved[0]:#x}, {reserved[1]:#x} are not zero"
        )
    if num > MAX_ENTRIES:
        raise ResourceTableError(f"resource table: {num} entries, limit {MAX_ENTRIES}")
    end = _HEADER.size + _OFFSET_SIZE * num
    if end > len(raw):
        raise ResourceTableError(
            f"resource table: the offsets of {num} entries end at {end:#x}, "
            f"beyond the table ({len(raw):#x} bytes)"
        )
    offsets: tuple[int, ...] = unpack_from(f"<{num}I", raw, _HEADER.size)
    for index, offset in enumerate(offsets):
        if not end <= offset <= len(raw) - _TYPE.size:
            raise ResourceTableError(
                f"resource table: offset of entry {index} is {offset:#x}, not between the end "
                f"of the offsets ({end:#x}) and the last word of the table ({len(raw):#x} bytes)"
            )
    return offsets


def _decode_entry(raw: bytes, offset: int, index: int, border: int) -> Entry:
    (type_,) = _TYPE.unpack_from(raw, offset)
    decode = _DECODERS.get(type_)
    if decode is not None:
        where = f"resource table: entry {index} ({_TYPE_NAMES[type_]}) at offset {offset:#x}"
        return decode(raw, offset, where)
    kind = Vendor if type_ in VENDOR_TYPES else Unknown
    return kind(type_, raw[offset + _TYPE.size : border], offset=offset)


def _decode_carveout(raw: bytes, offset: int, where: str) -> Carveout:
    return _decode_memory(Carveout, raw, offset, where)


def _decode_devmem(raw: bytes, offset: int, where: str) -> DevMem:
    return _decode_memory(DevMem, raw, offset, where)


def _decode_memory(kind: type[_M], raw: bytes, offset: int, where: str) -> _M:
    _check_fits(raw, offset, _MEMORY.size, where)
    _, da, pa, length, flags, reserved, name = _MEMORY.unpack_from(raw, offset)
    _check_reserved(reserved, where)
    return kind(da, pa, length, flags, _decode_name(name), offset=offset)


def _decode_trace(raw: bytes, offset: int, where: str) -> Trace:
    _check_fits(raw, offset, _TRACE.size, where)
    _, da, length, reserved, name = _TRACE.unpack_from(raw, offset)
    _check_reserved(reserved, where)
    return Trace(da, length, _decode_name(name), offset=offset)


def _decode_vdev(raw: bytes, offset: int, where: str) -> Vdev:
    _check_fits(raw, offset, _VDEV.size, where)
    _, id_, notify_id, offered, accepted, config_length, status, vrings, reserved = (
        _VDEV.unpack_from(raw, offset)
    )
    _check_reserved(reserved, where)
    if offset % _WORD_SIZE:
        raise ResourceTableError(
            f"{where}: offset {offset:#x} is not a multiple of {_WORD_SIZE}; both sides write "
            "words of it in place"
        )
    if id_ == VIRTIO_ID_RPMSG and vrings != RPMSG_VRINGS:
        raise ResourceTableError(
            f"{where}: {vrings} vrings; an RPMsg device (id {id_}) has {RPMSG_VRINGS}"
        )
    config = offset + VDEV_VRINGS_OFFSET + VRING_SIZE * vrings
    if config + config_length > len(raw):
        raise ResourceTableError(
            f"{where}: {vrings} vrings and {config_length:#x} bytes of config space end at "
            f"{config + config_length:#x}, beyond the table ({len(raw):#x} bytes)"
        )
    return Vdev(
        id_,
        notify_id,
        offered,
        accepted,
        status,
        tuple(
            _decode_vring(raw, at, where, number)
            for number, at in enumerate(range(offset + VDEV_VRINGS_OFFSET, config, VRING_SIZE))
        ),
        raw[config : config + config_length],
        offset=offset,
    )


def _decode_vring(raw: bytes, offset: int, where: str, number: int) -> Vring:
    vring = Vring(*_VRING.unpack_from(raw, offset))
    step = max(vring.align, DESCRIPTOR_TABLE_ALIGN)
    if not _is_power_of_two(vring.num) or vring.num > MAX_NUM:
        wrong = f"num {vring.num} is not a power of two from 1 to {MAX_NUM}"
    elif not _is_power_of_two(vring.align) or vring.align < MIN_ALIGN:
        wrong = f"align {vring.align:#x} is not a power of two of at least {MIN_ALIGN}"
    elif vring.da != DA_ANY and vring.da % step:
        wrong = f"da {vring.da:#x} is not a multiple of {step:#x} (its align is {vring.align:#x})"
    else:
        return vring
    raise ResourceTableError(f"{where}, vring {number}: {wrong}")


_DECODERS: Final[dict[int, Callable[[bytes, int, str], Entry]]] = {
    Carveout.TYPE: _decode_carveout,
    DevMem.TYPE: _decode_devmem,
    Trace.TYPE: _decode_trace,
    Vdev.TYPE: _decode_vdev,
}


def _check_fits(raw: bytes, offset: int, size: int, where: str) -> None:
    if offset + size > len(raw):
        raise ResourceTableError(
            f"{where}: its {size:#x} bytes end at {offset + size:#x}, "
            f"beyond the table ({len(raw):#x} bytes)"
        )


def _check_reserved(reserved: int, where: str) -> None:
    if reserved:
        raise ResourceTableError(f"{where}: reserved field is {reserved:#x}, not zero")


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


# Building


def rpmsg_table(
    *,
    vdevs: int = 1,
    num: int = 256,
    align: int = 4096,
    features: int = RPMSG_F_NS,
    extra: Iterable[Entry] = (),
) -> ResourceTable:
    """Build the usual table: RPMsg devices whose addresses and notify ids the host chooses.

    Args:
        vdevs: how many devices.
        num: entries of each vring, a power of two.
        align: of each vring.
        features: what every device offers.
        extra: entries that follow, such as a `Trace`.

    Raises:
        ValueError: there is no such vring, or `place_entries` says so.
    """
    VringLayout(num, align)
    vring = Vring(DA_ANY, align, num, NOTIFY_ID_ANY)
    vdev = Vdev(VIRTIO_ID_RPMSG, NOTIFY_ID_ANY, features, vrings=(vring,) * RPMSG_VRINGS)
    return place_entries([*(vdev for _ in range(vdevs)), *extra])


def place_entries(entries: Iterable[Entry]) -> ResourceTable:
    """Give each entry the offset at which `encode_table` puts it.

    Entries follow the offset array in order, each at the next multiple of 4.

    Raises:
        ValueError: too many entries, or a vendor's or unknown entry that is not the last and
            whose data would not end where the next entry begins.
    """
    entries = tuple(entries)
    if len(entries) > MAX_ENTRIES:
        raise ValueError(f"{len(entries)} entries, limit {MAX_ENTRIES}")
    placed: list[Entry] = []
    end = _HEADER.size + _OFFSET_SIZE * len(entries)
    for index, entry in enumerate(entries):
        if end % 4 and isinstance(entries[index - 1], (Vendor, Unknown)):
            raise ValueError(
                f"entry {index - 1}: a vendor's or unknown entry before another needs data of a "
                f"multiple of 4 bytes, and has {_entry_size(entries[index - 1]) - _TYPE.size}"
            )
        offset = (end + 3) & ~3
        placed.append(replace(entry, offset=offset))
        end = offset + _entry_size(entry)
    return ResourceTable(tuple(placed), length=end)


# Encoding


def encode_table(table: ResourceTable | Iterable[Entry]) -> bytes:
    """Encode a table; `decode_table_untrusted` gives it back.

    One that was decoded becomes the bytes it came from, with what was changed since written
    over them. Where the entries no longer fit their places, and for a table that was built,
    they lie as `place_entries` lays them out.

    What a decoder would refuse can be encoded, for tests of decoders.

    Raises:
        ValueError: a field does not fit its place, or `place_entries` says so.
    """
    if isinstance(table, ResourceTable):
        in_place = _encode_in_place(table) if table.raw else None
        if in_place is not None:
            return in_place
        table = table.entries
    placed = place_entries(table)
    raw = bytearray(placed.length)
    offsets = [entry.offset for entry in placed.entries]
    _HEADER.pack_into(raw, 0, TABLE_VERSION, len(offsets), 0, 0)
    pack_into(f"<{len(offsets)}I", raw, _HEADER.size, *offsets)
    for index, entry in enumerate(placed.entries):
        encoded = _encode_numbered(index, entry)
        raw[entry.offset : entry.offset + len(encoded)] = encoded
    return bytes(raw)


def _encode_in_place(table: ResourceTable) -> bytes | None:
    """Encode over the bytes that the table came from; None where an entry does not fit there."""
    before = decode_table_untrusted(table.raw).entries
    if [entry.offset for entry in table.entries] != [entry.offset for entry in before]:
        return None
    raw = bytearray(table.raw)
    for index, (old, new) in enumerate(zip(before, table.entries, strict=True)):
        if new == old:
            continue  # also what an entry does not hold stays, such as bytes behind a name
        encoded = _encode_numbered(index, new)
        if len(encoded) != _entry_size(old):
            return None
        raw[new.offset : new.offset + len(encoded)] = encoded
    return bytes(raw)


def _encode_numbered(index: int, entry: Entry) -> bytes:
    try:
        return _encode_entry(entry)
    except (error, ValueError) as exc:
        raise ValueError(f"entry {index}: {exc}: {entry}") from exc


def _encode_entry(entry: Entry) -> bytes:
    match entry:
        case Carveout() | DevMem():
            return _MEMORY.pack(
                entry.TYPE,
                entry.da,
                entry.pa,
                entry.length,
                entry.flags,
                0,
                _encode_name(entry.name),
            )
        case Trace():
            return _TRACE.pack(entry.TYPE, entry.da, entry.length, 0, _encode_name(entry.name))
        case Vdev():
            return _encode_vdev(entry)
        case Vendor():
            if entry.type not in VENDOR_TYPES:
                raise ValueError(f"type {entry.type} is not a vendor's (128 to 512)")
            return _TYPE.pack(entry.type) + entry.data
        case Unknown():
            if entry.type in _DECODERS or entry.type in VENDOR_TYPES:
                raise ValueError(f"type {entry.type} ({type_name(entry.type)}) is not unknown")
            return _TYPE.pack(entry.type) + entry.data


def _encode_vdev(vdev: Vdev) -> bytes:
    head = _VDEV.pack(
        vdev.TYPE,
        vdev.id,
        vdev.notify_id,
        vdev.device_features,
        vdev.driver_features,
        len(vdev.config),
        vdev.status,
        len(vdev.vrings),
        0,
    )
    vrings = (_VRING.pack(v.da, v.align, v.num, v.notify_id, v.pa) for v in vdev.vrings)
    return head + b"".join(vrings) + vdev.config


def _entry_size(entry: Entry) -> int:
    match entry:
        case Carveout() | DevMem():
            return _MEMORY.size
        case Trace():
            return _TRACE.size
        case Vdev():
            return entry.config_offset + len(entry.config)
        case Vendor() | Unknown():
            return _TYPE.size + len(entry.data)


# Names, and the plain form


def _decode_name(raw: bytes) -> str:
    # surrogateescape, so that any bytes are a name and come back as they were
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _encode_name(name: str) -> bytes:
    raw = name.encode("utf-8", "surrogateescape")
    if len(raw) > NAME_SIZE or b"\0" in raw:
        raise ValueError(f"name {name!r} has a NUL or more than {NAME_SIZE} bytes ({len(raw)})")
    return raw


def _plain(value: Entry | Vring) -> dict[str, object]:
    return {each.name: _plain_field(getattr(value, each.name)) for each in fields(value)}


def _plain_field(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if isinstance(value, tuple):
        return [_plain(vring) for vring in cast("tuple[Vring, ...]", value)]
    return value
