"""The resource table: golden tables of real peers, every limit, every refusal."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openamp_py.constants import DA_ANY, NOTIFY_ID_ANY, RPMSG_F_NS, VIRTIO_ID_RPMSG
from openamp_py.errors import FirmwareError, ResourceTableError
from openamp_py.remoteproc.resource_table import (
    MAX_ENTRIES,
    MEMORY_DA_OFFSET,
    MEMORY_PA_OFFSET,
    VDEV_DRIVER_FEATURES_OFFSET,
    VDEV_NOTIFY_ID_OFFSET,
    VDEV_STATUS_OFFSET,
    VDEV_VRINGS_OFFSET,
    VRING_DA_OFFSET,
    VRING_NOTIFY_ID_OFFSET,
    VRING_SIZE,
    Carveout,
    DevMem,
    Entry,
    ResourceTable,
    Trace,
    Unknown,
    Vdev,
    Vendor,
    Vring,
    decode_table_untrusted,
    encode_table,
    entry_type,
    place_entries,
    rpmsg_table,
    type_name,
)

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"

VRINGS = (Vring(0x4000, 0x1000, 256, 1), Vring(0x8000, 0x1000, 256, 2))
RPMSG = Vdev(VIRTIO_ID_RPMSG, 0, RPMSG_F_NS, vrings=VRINGS)
ONE_OF_EACH: tuple[Entry, ...] = (
    Carveout(DA_ANY, DA_ANY, 0x4000, 0, "heap"),
    DevMem(0x4000_0000, 0x4000_0000, 0x1000, 0, "uart"),
    Trace(0x1000_2000, 0x400, "trace0"),
    Vdev(3, NOTIFY_ID_ANY, 1, 1, 7, (Vring(DA_ANY, 16, 8, 5, 6),), b"config"),
    RPMSG,
    Vendor(128, b"private!"),
    Unknown(9, b"skipped!"),
)

deterministic = settings(derandomize=True, deadline=None, max_examples=400)


def table_bytes(*entries: bytes, offsets: list[int] | None = None) -> bytes:
    """Build a table by hand, without the encoder."""
    if offsets is None:
        starts = [16 + 4 * len(entries)]
        for entry in entries[:-1]:
            starts.append(starts[-1] + len(entry))
        offsets = starts if entries else []
    header = struct.pack(f"<4I{len(offsets)}I", 1, len(offsets), 0, 0, *offsets)
    return header + b"".join(entries)


def vdev_bytes(
    vrings: list[tuple[int, int, int]], *, id: int = 7, count: int | None = None, reserved: int = 0
) -> bytes:
    """Build a vdev with vrings of (da, align, num)."""
    number = len(vrings) if count is None else count
    head = struct.pack("<6I2BH", 3, id, 0, 1, 0, 0, 0, number, reserved)
    return head + b"".join(struct.pack("<5I", *vring, 0, 0) for vring in vrings)


def patched(raw: bytes, offset: int, value: int, layout: str = "<I") -> bytes:
    image = bytearray(raw)
    struct.pack_into(layout, image, offset, value)
    return bytes(image)


# Normal


def golden_tables() -> dict[str, str]:
    path = GOLDEN / "openamp" / "expected.json"
    if not path.exists():
        pytest.skip(f"the golden data is not here: {path}")
    return {name: snapshot["table"] for name, snapshot in json.loads(path.read_text()).items()}


def test_tables_of_the_openamp_demo_decode_and_encode_to_the_byte() -> None:
    tables = golden_tables()
    assert len(tables) == 11
    for name, text in tables.items():
        raw = bytes.fromhex(text)
        table = decode_table_untrusted(raw)
        accepted, status = (0, 0) if name == "table_only" else (1, 4)
        assert table.entries == (Vdev(7, 0, 1, accepted, status, VRINGS, b""),), name
        assert table.vdevs[0].offset == 20
        assert table.length == 88
        assert encode_table(table) == raw, name


def test_each_type_decodes_from_its_wire_layout() -> None:
    raw = table_bytes(
        struct.pack("<6I32s", 0, 0x10, 0x20, 0x30, 0x40, 0, b"heap"),
        struct.pack("<6I32s", 1, 0x11, 0x21, 0x31, 0x41, 0, b"uart"),
        struct.pack("<4I32s", 2, 0x12, 0x32, 0, b"trace0"),
        struct.pack("<6I2BH5I3s", 3, 99, 2, 3, 4, 3, 5, 1, 0, 0x400, 64, 8, 6, 7, b"cfg") + b"\0",
        struct.pack("<2I4s", 200, 4, b"data"),
        struct.pack("<I8s", 5, b"checksum"),
    )
    table = decode_table_untrusted(raw)
    assert table.entries == (
        Carveout(0x10, 0x20, 0x30, 0x40, "heap"),
        DevMem(0x11, 0x21, 0x31, 0x41, "uart"),
        Trace(0x12, 0x32, "trace0"),
        Vdev(99, 2, 3, 4, 5, (Vring(0x400, 64, 8, 6, 7),), b"cfg"),
        Vendor.of(200, b"data"),
        Unknown(5, b"checksum"),
    )
    assert [entry.offset for entry in table.entries] == [40, 96, 152, 200, 252, 264]
    assert encode_table(table) == raw


def test_entries_are_found_by_kind() -> None:
    table = ResourceTable(ONE_OF_EACH)
    carveout, devmem, trace, other, rpmsg, vendor, unknown = ONE_OF_EACH
    assert table.carveouts == (carveout,)
    assert table.devmems == (devmem,)
    assert table.traces == (trace,)
    assert table.vdevs == (other, rpmsg)
    assert table.vendors == (vendor,)
    assert table.unknowns == (unknown,)


def test_offset_and_length_do_not_count_in_comparisons() -> None:
    placed = place_entries(ONE_OF_EACH)
    assert placed == ResourceTable(ONE_OF_EACH)
    assert hash(placed) == hash(ResourceTable(ONE_OF_EACH))
    assert all(entry.offset % 4 == 0 and entry.offset for entry in placed.entries)
    assert placed.length == len(encode_table(ONE_OF_EACH))
    decoded = decode_table_untrusted(encode_table(ONE_OF_EACH))
    assert [e.offset for e in decoded.entries] == [e.offset for e in placed.entries]


@pytest.mark.parametrize(
    ("entry", "offset", "layout", "read"),
    [
        (ONE_OF_EACH[0], MEMORY_DA_OFFSET, "<I", lambda e: e.da),
        (ONE_OF_EACH[0], MEMORY_PA_OFFSET, "<I", lambda e: e.pa),
        (RPMSG, VDEV_NOTIFY_ID_OFFSET, "<I", lambda e: e.notify_id),
        (RPMSG, VDEV_DRIVER_FEATURES_OFFSET, "<I", lambda e: e.driver_features),
        (RPMSG, VDEV_STATUS_OFFSET, "<B", lambda e: e.status),
        (RPMSG, VDEV_VRINGS_OFFSET + VRING_DA_OFFSET, "<I", lambda e: e.vrings[0].da),
        (RPMSG, VDEV_VRINGS_OFFSET + VRING_NOTIFY_ID_OFFSET, "<I", lambda e: e.vrings[0].notify_id),
        (RPMSG, VDEV_VRINGS_OFFSET + VRING_SIZE, "<I", lambda e: e.vrings[1].da),
        (ONE_OF_EACH[3], cast(Vdev, ONE_OF_EACH[3]).config_offset, "<B", lambda e: e.config[0]),
    ],
)
def test_what_the_host_writes_in_place_is_what_is_decoded(
    entry: Entry, offset: int, layout: str, read: Callable[[object], int]
) -> None:
    table = place_entries([Trace(0, 0, ""), entry])
    raw = patched(encode_table(table), table.entries[1].offset + offset, 0xF0, layout)
    if layout == "<I":  # 0xF0 with a second byte, so that a wrong width shows
        raw = patched(raw, table.entries[1].offset + offset, 0x00AB_0000, layout)
    changed = decode_table_untrusted(raw).entries[1]
    assert read(changed) == (0x00AB_0000 if layout == "<I" else 0xF0)
    assert read(entry) != read(changed)


def test_plain_form_names_every_field_and_is_json() -> None:
    raw = encode_table([*ONE_OF_EACH[:4], Vendor(128, b"\x01\xff\0\0"), Unknown(4, b"")])
    plain = decode_table_untrusted(raw).to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["length"] == len(raw)
    carveout, _, _, vdev, vendor, unknown = cast("list[dict[str, object]]", plain["entries"])
    assert carveout == {
        "kind": "carveout",
        "type": 0,
        "offset": 40,
        "da": DA_ANY,
        "pa": DA_ANY,
        "length": 0x4000,
        "flags": 0,
        "name": "heap",
    }
    assert vdev == {
        "kind": "vdev",
        "type": 3,
        "offset": 200,
        "id": 3,
        "notify_id": NOTIFY_ID_ANY,
        "device_features": 1,
        "driver_features": 1,
        "status": 7,
        "vrings": [{"da": DA_ANY, "align": 16, "num": 8, "notify_id": 5, "pa": 6}],
        "config": b"config".hex(),
    }
    assert vendor == {"kind": "vendor", "type": 128, "offset": 256, "data": "01ff0000"}
    assert unknown == {"kind": "unknown", "type": 4, "offset": 264, "data": ""}


def test_types_have_names() -> None:
    assert [type_name(number) for number in (0, 1, 2, 3)] == ["carveout", "devmem", "trace", "vdev"]
    assert "rproc_mem" in type_name(4)
    assert "fw_chksum" in type_name(5)
    assert type_name(128) == "vendor 128"
    assert type_name(513) == "unknown type 513"
    assert [entry_type(entry) for entry in ONE_OF_EACH] == [0, 1, 2, 3, 3, 128, 9]


# Limits


def test_an_empty_table_is_legal() -> None:
    assert decode_table_untrusted(table_bytes()) == ResourceTable()
    assert encode_table([]) == table_bytes()


def test_most_entries() -> None:
    table = ResourceTable((Unknown(9, b""),) * MAX_ENTRIES)
    assert decode_table_untrusted(encode_table(table)) == table


@pytest.mark.parametrize("num", [1, 2, 16, 32768])
@pytest.mark.parametrize("align", [4, 16, 4096, 1 << 31])
def test_vrings_of_every_size(num: int, align: int) -> None:
    raw = table_bytes(vdev_bytes([(DA_ANY, align, num), (0, align, num)]))
    assert [v.num for v in decode_table_untrusted(raw).vdevs[0].vrings] == [num, num]


@pytest.mark.parametrize("count", [0, 1, 3, 255])
def test_a_device_that_is_not_rpmsg_has_any_number_of_vrings(count: int) -> None:
    raw = table_bytes(vdev_bytes([(DA_ANY, 16, 8)] * count, id=99))
    assert len(decode_table_untrusted(raw).vdevs[0].vrings) == count


def test_fixed_notify_ids_may_repeat() -> None:
    # The PRU firmware in the field has 0 in both vrings; the host numbers them, as Linux does.
    raw = table_bytes(vdev_bytes([(0, 16, 16), (0, 16, 16)]))
    assert [v.notify_id for v in decode_table_untrusted(raw).vdevs[0].vrings] == [0, 0]


@pytest.mark.parametrize(
    ("type_", "kind"), [(127, Unknown), (128, Vendor), (512, Vendor), (513, Unknown), (4, Unknown)]
)
def test_borders_between_known_vendor_and_unknown_types(type_: int, kind: type[Entry]) -> None:
    raw = table_bytes(struct.pack("<2I", type_, 0))
    assert type(decode_table_untrusted(raw).entries[0]) is kind


@pytest.mark.parametrize(("kind", "type_"), [(Unknown, 9), (Vendor, 128)])
def test_data_goes_on_to_the_next_entry_or_the_end(
    kind: type[Unknown | Vendor], type_: int
) -> None:
    entries = (kind(type_, b"1234"), Trace(0, 0, "t"), kind(type_, b"odd"))
    assert decode_table_untrusted(encode_table(entries)).entries == entries


@pytest.mark.parametrize(
    ("data", "payload"),
    [
        (b"", None),
        (b"\1\0\0", None),
        (b"\0\0\0\0", b""),
        (b"\0\0\0\0more", b""),
        (b"\4\0\0\0data", b"data"),
        (b"\3\0\0\0data", b"dat"),
        (b"\5\0\0\0data", None),
        (b"\xff\xff\xff\xffdata", None),
    ],
)
def test_a_vendor_entry_needs_no_length(data: bytes, payload: bytes | None) -> None:
    table = decode_table_untrusted(table_bytes(struct.pack("<I", 128) + data))
    assert table.vendors == (Vendor(128, data),)
    assert table.vendors[0].payload == payload


def test_a_vendor_entry_in_openamps_form() -> None:
    entry = Vendor.of(200, b"12345")
    assert entry == Vendor(200, b"\5\0\0\x0012345\0\0\0")
    assert entry.payload == b"12345"
    encode_table([entry, Trace(0, 0, "t")])


def test_entries_may_lie_in_any_order_at_any_address_with_gaps() -> None:
    trace = struct.pack("<4I32s", 2, 1, 2, 0, b"t")
    vendor = struct.pack("<2I1s", 128, 1, b"x")
    raw = table_bytes(b"..." + trace + b"." + vendor + b"..", offsets=[24 + 52, 24 + 3])
    table = decode_table_untrusted(raw)
    assert table.entries == (Vendor(128, b"\1\0\0\0x.."), Trace(1, 2, "t"))
    assert encode_table(table) == raw


def test_an_edited_table_keeps_what_no_entry_holds() -> None:
    trace = struct.pack("<4I32s", 2, 1, 2, 0, b"t\0garbage")
    vdev = vdev_bytes([(DA_ANY, 16, 8)] * 2)
    raw = table_bytes(b"gap!" + vdev + trace + b"behind", offsets=[24 + 4 + len(vdev), 28])
    table = decode_table_untrusted(raw)
    first, second = table.vdevs[0].vrings
    edited = replace(table.vdevs[0], status=7, vrings=(first, replace(second, da=0x4000)))
    changed = encode_table(replace(table, entries=(table.entries[0], edited)))
    assert decode_table_untrusted(changed).vdevs == (edited,)
    differ = [at for at, (old, new) in enumerate(zip(raw, changed, strict=True)) if old != new]
    assert set(differ) <= {28 + 24, *range(28 + 28 + 20, 28 + 28 + 24)}


@pytest.mark.parametrize(
    "edit",
    [
        lambda entries: entries[1:],
        lambda entries: entries[::-1],
        lambda entries: (*entries, Trace(1, 2, "new")),
        lambda entries: (entries[0], replace(entries[1], config=b"more"), *entries[2:]),
    ],
)
def test_an_edited_table_that_no_longer_fits_is_laid_out_anew(
    edit: Callable[[tuple[Entry, ...]], tuple[Entry, ...]],
) -> None:
    raw = encode_table([Trace(0, 0, "t"), RPMSG, Carveout(1, 2, 3, 4, "c")])
    table = decode_table_untrusted(raw + b"behind")
    entries = edit(table.entries)
    changed = encode_table(replace(table, entries=entries))
    assert changed == encode_table(entries)
    assert decode_table_untrusted(changed).entries == entries


def test_where_a_table_ends_in_memory() -> None:
    raw = encode_table([Trace(0, 0, "t"), RPMSG])
    assert decode_table_untrusted(raw + bytes(100)).end == len(raw)
    assert decode_table_untrusted(table_bytes() + bytes(100)).end == 16


def test_the_usual_table_leaves_its_places_to_the_host() -> None:
    trace = Trace(0x1000, 64, "trace0")
    table = rpmsg_table(vdevs=3, num=16, align=64, features=3, extra=[trace])
    assert decode_table_untrusted(encode_table(table)) == table
    vring = Vring(DA_ANY, 64, 16, NOTIFY_ID_ANY)
    assert table.vdevs == (Vdev(7, NOTIFY_ID_ANY, 3, vrings=(vring, vring)),) * 3
    assert table.traces == (trace,)
    (plain,) = rpmsg_table().vdevs
    assert (plain.device_features, plain.vrings[0].num, plain.vrings[0].align) == (1, 256, 4096)


@pytest.mark.parametrize("wrong", [{"num": 17}, {"align": 6}, {"vdevs": 1025}])
def test_the_usual_table_refuses_what_there_is_not(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"17 entries|alignment 6|1025 entries"):
        rpmsg_table(
            num=wrong.get("num", 16), align=wrong.get("align", 4), vdevs=wrong.get("vdevs", 1)
        )


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"", ""),
        (b"n" * 32, "n" * 32),
        (b"a\0garbage", "a"),
        ("größe".encode(), "größe"),
        (b"\xff\xfe", "\udcff\udcfe"),
    ],
)
def test_names_of_any_bytes(raw: bytes, name: str) -> None:
    table = decode_table_untrusted(table_bytes(struct.pack("<4I32s", 2, 0, 0, 0, raw)))
    assert table.traces[0].name == name
    assert decode_table_untrusted(encode_table(table)) == table
    entry = cast("list[dict[str, str]]", table.to_dict()["entries"])[0]
    entry["name"].encode()  # a plain form can be printed


def test_features_and_status_of_a_running_peer_may_be_anything() -> None:
    raw = table_bytes(vdev_bytes([(DA_ANY, 16, 8)] * 2))
    raw = patched(patched(raw, 20 + 16, 0xFFFF_FFFF), 20 + 24, 0xFF, "<B")
    vdev = decode_table_untrusted(raw).vdevs[0]
    assert (vdev.driver_features, vdev.status) == (0xFFFF_FFFF, 0xFF)


# Refusals

CARVEOUT = struct.pack("<6I32s", 0, 0, 0, 0, 0, 0, b"")
TRACE = struct.pack("<4I32s", 2, 0, 0, 0, b"")
PAIR = vdev_bytes([(0x1000, 0x1000, 16), (0x2000, 0x1000, 16)])

REFUSED = {
    "empty": (b"", r"0 bytes; the header alone has 16"),
    "short header": (table_bytes()[:15], r"15 bytes"),
    "version 0": (patched(table_bytes(), 0, 0), r"version 0, expected 1"),
    "version 2": (patched(table_bytes(), 0, 2), r"version 2, expected 1"),
    "first reserved word": (patched(table_bytes(), 8, 7), r"reserved words 0x7, 0x0"),
    "second reserved word": (patched(table_bytes(), 12, 7), r"reserved words 0x0, 0x7"),
    "more entries than the table": (patched(table_bytes(), 4, 1), r"1 entries end at 0x14.*0x10"),
    "entries huge": (patched(table_bytes(), 4, 0x4000_0000), r"1073741824 entries, limit 1024"),
    "one entry too many": (table_bytes(*[b"...."] * 1025), r"1025 entries, limit 1024"),
    "offset into the header": (table_bytes(TRACE, offsets=[16]), r"entry 0 is 0x10.*0x14"),
    "offset at the end": (table_bytes(TRACE, offsets=[20 + 45]), r"entry 0 is 0x41.*0x44"),
    "offset huge": (table_bytes(TRACE, offsets=[0xFFFF_FFF0]), r"entry 0 is 0xfffffff0"),
    "carveout cut": (table_bytes(CARVEOUT[:-1]), r"entry 0 \(carveout\) at offset 0x14.*0x38 byte"),
    "carveout reserved": (table_bytes(patched(CARVEOUT, 20, 1)), r"carveout.*reserved.*0x1"),
    "devmem cut": (table_bytes(patched(CARVEOUT, 0, 1)[:-1]), r"\(devmem\).*beyond the table"),
    "devmem reserved": (
        table_bytes(patched(patched(CARVEOUT, 0, 1), 20, 1)),
        r"devmem.*reserved.*0x1",
    ),
    "trace cut": (table_bytes(TRACE[:-1]), r"\(trace\).*0x30 bytes end at 0x44.*0x43 bytes"),
    "trace reserved": (table_bytes(patched(TRACE, 12, 1)), r"trace.*reserved.*0x1"),
    "vdev cut": (table_bytes(PAIR[:27]), r"\(vdev\).*beyond the table"),
    "vdev reserved": (table_bytes(patched(PAIR, 26, 0x100, "<H")), r"vdev.*reserved.*0x100"),
    "vrings cut": (table_bytes(PAIR[:-1]), r"2 vrings and 0x0 bytes.*end at 0x58.*0x57 bytes"),
    "vrings beyond": (table_bytes(vdev_bytes([], id=9, count=255)), r"255 vrings.*beyond"),
    "config beyond": (table_bytes(patched(PAIR, 20, 1)), r"0x1 bytes of config space.*0x59"),
    "config huge": (table_bytes(patched(PAIR, 20, 0xFFFF_FFFF)), r"0xffffffff bytes of config"),
    "rpmsg with 0 vrings": (table_bytes(vdev_bytes([])), r"0 vrings; an RPMsg.*has 2"),
    "rpmsg with 1 vring": (table_bytes(vdev_bytes([(0, 16, 8)])), r"1 vrings; an RPMsg.*has 2"),
    "rpmsg with 3 vrings": (table_bytes(vdev_bytes([(0, 16, 8)] * 3)), r"3 vrings; an RPMsg"),
    "num 0": (table_bytes(vdev_bytes([(0, 16, 8), (0, 16, 0)])), r"vring 1: num 0 is not"),
    "num 17": (table_bytes(vdev_bytes([(0, 16, 17), (0, 16, 8)])), r"vring 0: num 17.*1 to 32768"),
    "num 65536": (table_bytes(vdev_bytes([(0, 16, 65536)], id=9)), r"num 65536 is not"),
    "align 0": (table_bytes(vdev_bytes([(0, 0, 8)], id=9)), r"align 0x0 is not"),
    "align 2": (table_bytes(vdev_bytes([(0, 2, 8)], id=9)), r"align 0x2 is not.*at least 4"),
    "align 12": (table_bytes(vdev_bytes([(0, 12, 8)], id=9)), r"align 0xc is not"),
    "vring da misaligned": (
        table_bytes(vdev_bytes([(0x1800, 0x1000, 8)], id=9)),
        r"da 0x1800 is not a multiple of 0x1000",
    ),
    "descriptors misaligned": (
        table_bytes(vdev_bytes([(0x1804, 4, 8)], id=9)),
        r"da 0x1804 is not a multiple of 0x10 \(its align is 0x4\)",
    ),
    "overlap": (
        table_bytes(TRACE[:44], TRACE, offsets=[24, 24 + 44]),
        r"entry 0 at offset 0x18 ends at 0x48, inside entry 1 at offset 0x44",
    ),
    "overlap the other way": (
        table_bytes(TRACE[:44], TRACE, offsets=[24 + 44, 24]),
        r"entry 1 at offset 0x18 ends at 0x48, inside entry 0",
    ),
    "one entry twice": (table_bytes(TRACE, offsets=[24, 24]).ljust(80, b"\0"), r"inside entry 1"),
    "unknown entry twice": (table_bytes(b"\x09\0\0\0", offsets=[24, 24]), r"inside entry 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    raw, message = REFUSED[name]
    with pytest.raises(ResourceTableError, match=message):
        decode_table_untrusted(raw)


def test_the_error_is_also_a_value_error_and_a_firmware_error() -> None:
    with pytest.raises(ValueError) as caught:
        decode_table_untrusted(b"")
    assert isinstance(caught.value, FirmwareError)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([Unknown(9, b"odd"), Trace(0, 0, "")], r"entry 0: .*multiple of 4 bytes, and has 3"),
        ([Vendor(128, b"odd"), Trace(0, 0, "")], r"entry 0: .*multiple of 4 bytes, and has 3"),
        ([Trace(0, 0, "n" * 33)], r"entry 0: name .*more than 32 bytes \(33\)"),
        ([Trace(0, 0, "a\0b")], r"NUL"),
        ([RPMSG, Trace(-1, 0, "")], r"entry 1: "),
        ([Trace(1 << 32, 0, "")], r"entry 0: "),
        ([Vdev(9, 0, 0, vrings=VRINGS * 128)], r"entry 0: "),
        ([Vendor(127, b"")], r"type 127 is not a vendor's"),
        ([Vendor(513, b"")], r"type 513 is not a vendor's"),
        ([Unknown(3, b"")], r"type 3 \(vdev\) is not unknown"),
        ([Unknown(128, b"")], r"type 128 \(vendor 128\) is not unknown"),
        ([Trace(0, 0, "")] * 1025, r"1025 entries, limit 1024"),
    ],
)
def test_what_cannot_be_encoded_is_the_callers_error(entries: list[Entry], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        encode_table(entries)
    assert not isinstance(caught.value, FirmwareError)


# Hostile input

u8 = st.integers(0, 0xFF)
u32 = st.integers(0, 0xFFFF_FFFF)
names = st.binary(max_size=32).map(lambda raw: raw.split(b"\0")[0].decode(errors="surrogateescape"))
small = st.binary(max_size=24)
vring_aligns = st.integers(4, 16).map(lambda bit: 1 << bit)


@st.composite
def vring_values(draw: st.DrawFn) -> Vring:
    align = draw(vring_aligns)
    da = draw(st.just(DA_ANY) | st.integers(0, 0xFFFE_FFFF // align).map(lambda n: n * align))
    return Vring(da, align, 1 << draw(st.integers(0, 15)), draw(u32), draw(u32))


@st.composite
def vdev_values(draw: st.DrawFn) -> Vdev:
    id_ = draw(st.just(VIRTIO_ID_RPMSG) | u32)
    count = 2 if id_ == VIRTIO_ID_RPMSG else draw(st.integers(0, 4))
    vrings = tuple(draw(vring_values()) for _ in range(count))
    return Vdev(id_, draw(u32), draw(u32), draw(u32), draw(u8), vrings, draw(small))


unknown_types = st.integers(4, 127) | st.integers(513, 0xFFFF_FFFF)
known_entries = st.one_of(
    st.builds(Carveout, u32, u32, u32, u32, names),
    st.builds(DevMem, u32, u32, u32, u32, names),
    st.builds(Trace, u32, u32, names),
    vdev_values(),
    st.builds(Vendor, st.integers(128, 512), small.map(lambda raw: raw[: len(raw) & ~3])),
    st.builds(Unknown, unknown_types, small.map(lambda raw: raw[: len(raw) & ~3])),
)
tables = st.builds(
    lambda entries, last: ResourceTable((*entries, *last)),
    st.lists(known_entries, max_size=6),
    st.lists(st.builds(Unknown, unknown_types, small), max_size=1),
)


@deterministic
@given(tables)
def test_encoding_is_the_inverse_of_decoding(table: ResourceTable) -> None:
    raw = encode_table(table)
    decoded = decode_table_untrusted(raw)
    assert decoded == table
    assert encode_table(decoded) == raw
    json.dumps(decoded.to_dict()).encode()


def decodes_or_refuses(raw: bytes) -> None:
    """Decode; what is accepted must keep every promise, what is refused must say why."""
    try:
        table = decode_table_untrusted(raw)
    except ResourceTableError as exc:
        str(exc).encode()  # printable, also with a hostile name in it
        return
    assert table.length == len(raw)
    assert encode_table(table) == raw
    assert table.end <= len(raw)
    json.dumps(table.to_dict()).encode()
    for entry in table.entries:
        assert 16 + 4 * len(table.entries) <= entry.offset <= len(raw) - 4
    for vdev in table.vdevs:
        assert vdev.offset + vdev.config_offset + len(vdev.config) <= len(raw)
        assert all(vring.num in {1 << n for n in range(16)} for vring in vdev.vrings)
        assert vdev.id != VIRTIO_ID_RPMSG or len(vdev.vrings) == 2


@deterministic
@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(raw: bytes) -> None:
    decodes_or_refuses(raw)


@deterministic
@given(st.binary(max_size=200), st.integers(0, 8))
def test_any_bytes_behind_a_good_header_decode_or_are_refused(body: bytes, num: int) -> None:
    decodes_or_refuses(struct.pack("<4I", 1, num, 0, 0) + body)


@deterministic
@given(
    tables,
    st.lists(st.tuples(st.integers(0, 500), u8 | st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))),
    st.integers(0, 500),
)
def test_a_damaged_table_decodes_or_is_refused(
    table: ResourceTable, damage: list[tuple[int, int]], cut: int
) -> None:
    raw = bytearray(encode_table(table))
    for position, value in damage:
        raw[position % len(raw)] = value
    decodes_or_refuses(bytes(raw[: len(raw) - cut % len(raw)] if cut % 3 == 0 else raw))


@deterministic
@given(tables, st.binary(max_size=9), st.randoms(use_true_random=False), st.data())
def test_any_layout_encodes_to_the_byte_and_can_be_edited(
    table: ResourceTable, junk: bytes, random: Random, data: st.DataObject
) -> None:
    """Entries in any order with junk between them and behind their names."""
    parts = [encode_table([entry])[20:] for entry in table.entries]
    order = list(range(len(parts)))
    random.shuffle(order)
    body, offsets = b"", [0] * len(parts)
    for index in order:
        body += junk + bytes(-(16 + 4 * len(parts) + len(body) + len(junk)) % 4)
        offsets[index] = 16 + 4 * len(parts) + len(body)
        body += parts[index]
    raw = bytearray(table_bytes(body + junk, offsets=offsets))
    for entry, offset in zip(table.entries, offsets, strict=True):
        if isinstance(entry, (Carveout, DevMem, Trace)):
            at = offset + (16 if isinstance(entry, Trace) else 24)
            end = raw.find(b"\0", at, at + 32) + 1
            if end:
                raw[end : at + 32] = (junk * 32 + bytes(32))[: at + 32 - end]
    decoded = decode_table_untrusted(bytes(raw))
    assert encode_table(decoded) == raw
    if not decoded.entries:
        return
    index = data.draw(st.integers(0, len(decoded.entries) - 1))
    edited = decoded.entries[index]
    if isinstance(edited, (Carveout, Trace, DevMem)):
        edited = replace(edited, da=data.draw(u32), name=data.draw(names))
    elif isinstance(edited, Vdev):
        edited = replace(edited, status=data.draw(u8), driver_features=data.draw(u32))
    entries = (*decoded.entries[:index], edited, *decoded.entries[index + 1 :])
    changed = encode_table(replace(decoded, entries=entries))
    assert len(changed) == len(raw)
    assert decode_table_untrusted(changed).entries == entries


def test_what_was_decoded_does_not_change_with_the_memory() -> None:
    memory = bytearray(encode_table(ONE_OF_EACH))
    table = decode_table_untrusted(memoryview(memory))
    memory[:] = b"\xff" * len(memory)
    assert table.entries == ONE_OF_EACH
