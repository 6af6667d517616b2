"""Firmware images before the kernel's judgement and ours.

Where they differ the difference is one of those listed here, each with its reason.
"""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
import struct
from pathlib import Path

import pytest

from openamp_py.constants import DA_ANY
from openamp_py.errors import FirmwareError
from openamp_py.memory import MemoryMap, Region
from openamp_py.remoteproc.elf import Firmware, decode_elf_untrusted
from openamp_py.remoteproc.plan import plan_load
from openamp_py.remoteproc.resource_table import Carveout, Trace
from tests.kernel.conftest import Boot
from tests.kernel.images import (
    CODE_DA,
    TABLE_AT,
    TABLE_DA,
    TRACE_DA,
    TRACE_SIZE,
    make_image,
    make_table,
    rpmsg_vdev,
)
from tests.kernel.verdicts import judge

pytestmark = pytest.mark.linux_kernel

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "linux" / "firmware.jsonl"
MUTANTS = 1000
MOST_BOOTS = 20

WE_REFUSE = {
    r"e_type|e_ehsize|e_phentsize|e_shentsize": "Linux does not look at them",
    r"none of the \d+ program headers is a PT_LOAD": "Linux starts a core without a program",
    r"overlap|inside entry": "Linux lets segments and entries share their bytes",
    r"(carveout|trace|vring) .* (lie outside|end beyond)": "Linux warns, or moves it",
    r"num \d+ is not a power of two": "Linux accepts 17, and its slot arithmetic breaks",
    r"align .* is not a power of two|is not a multiple of": "Linux rounds, or has no such device",
    r"not in a loaded segment": "Linux works a copy that the core does not see",
    r"section names|its name at|section headers|e_shstrndx": "Linux reads behind the image",
    r"\d+ vrings; an RPMsg device": "Linux panics when it stops the core",
}
"""Messages of ours for images that Linux starts."""

KERNEL_FALLS = "|".join(
    (
        r"section|e_shstrndx|program headers",  # looked for behind the image
        r"\d+ vrings; an RPMsg device",
        r"align .* is not a power of two",
    )
)
"""Messages of ours for images that take the kernel down."""


def core_memory() -> MemoryMap:
    """What the guest's core has: its own memory, and what the host gives it of its own."""
    own, host = memoryview(bytearray(0x1_0000)), memoryview(bytearray(0x100_0000))
    ram = Region("ram", 0x6000_0000, 0x6000_0000, host)
    return MemoryMap([Region("tcm", CODE_DA, CODE_DA, own), ram])


def our_verdict(image: bytes, memory: MemoryMap) -> Firmware | str:
    """The image decoded, or why it is refused."""
    try:
        firmware = decode_elf_untrusted(image)
        plan_load(firmware, memory)
    except FirmwareError as error:
        return str(error)
    return firmware


def linux_is_stricter(firmware: Firmware) -> bool:
    """Whether it is an image that Linux has a reason of its own to refuse."""
    table = firmware.table
    if table is None:
        return True  # which is legal here: the core runs, without RPMsg
    # Linux wants an IOMMU for the one, and gives no memory of no size.
    return bool(table.devmems) or any(carveout.length == 0 for carveout in table.carveouts)


async def test_the_golden_images(boot: Boot) -> None:
    if not GOLDEN.exists():
        pytest.skip(f"the golden data is not here: {GOLDEN}")
    golden = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    images = [gzip.decompress(base64.b64decode(each["elf_gzip_base64"])) for each in golden]
    verdicts, _ = await judge(boot, images)
    memory = core_memory()
    for each, image, verdict in zip(golden, images, verdicts, strict=True):
        name = each["name"]
        if name in ("vrings0", "vrings1"):
            assert verdict.start == "lost", name
        elif name == "empty":
            # The loader looks for it in its other places too, and then says that there is none.
            assert verdict.start in ("EINVAL", "ENOENT")
        else:
            was = (each["start"], each["state_after"], each["vdevs"])
            assert was == (verdict.start, verdict.state, verdict.devices), name
        assert is_explained(verdict.start, our_verdict(image, memory)), name


def is_explained(theirs: str, ours: Firmware | str) -> bool:
    """Whether two verdicts agree, or differ for a reason that is known."""
    if isinstance(ours, Firmware):
        return theirs == "ok" or (theirs != "lost" and linux_is_stricter(ours))
    if theirs == "lost":
        return bool(re.search(KERNEL_FALLS, ours))
    return theirs != "ok" or any(re.search(reason, ours) for reason in WE_REFUSE)


def kernel_reads_behind(image: bytes) -> bool:
    """Whether Linux would look for headers or names behind the image, and may not return."""
    if len(image) < 52:
        return False
    programs, start, program_count, count, names = struct.unpack_from("<II8xH2xHH", image, 28)
    ends = (programs + 32 * program_count, start + 40 * max(count, names + 1))
    if max(ends) > len(image):
        return True
    (names_at,) = struct.unpack_from("<16xI", image, start + 40 * names)
    named = (struct.unpack_from("<I", image, start + 40 * number)[0] for number in range(count))
    return any(names_at + name + len(".resource_table") >= len(image) for name in named)


def make_mutants(count: int) -> list[bytes]:
    """Images with a few wrong bytes or words, where they matter."""
    rng = random.Random(6)
    heap, trace = Carveout(DA_ANY, DA_ANY, 0x4000, 0, "heap"), Trace(TRACE_DA, TRACE_SIZE, "trace0")
    table = make_table(heap, trace, rpmsg_vdev(16))
    good = make_image(table)
    behind = TABLE_AT + len(table)
    # the ELF header, the program headers, the table, the names of sections, and their headers; but
    # for the null section, which Linux takes for the table's if it has that name
    headers = (len(good) - 2 * 40, len(good))
    zones = [(0, 52), (52, 116), *[(TABLE_AT, behind)] * 2, (behind, headers[0] - 40), headers]
    mutants: list[bytes] = []
    while len(mutants) < count:
        image = bytearray(good)
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(*rng.choice(zones))
            match rng.randrange(3):
                case 0:
                    image[at] = rng.randrange(256)
                case 1:
                    image[at] ^= 1 << rng.randrange(8)
                case _:
                    words = (0, 1, 2, 3, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, len(good), TABLE_DA)
                    word = rng.choice((*words, rng.getrandbits(32)))
                    struct.pack_into("<I", image, min(at & ~3, len(image) - 4), word)
        if rng.random() < 0.05:
            del image[rng.randrange(len(image)) :]
        if not kernel_reads_behind(bytes(image)):
            mutants.append(bytes(image))
    return mutants


async def test_a_thousand_mutants(boot: Boot) -> None:
    mutants = make_mutants(MUTANTS)
    verdicts, boots = await judge(boot, mutants)
    assert boots <= MOST_BOOTS
    memory = core_memory()
    ours = [our_verdict(mutant, memory) for mutant in mutants]
    assert not [
        (number, theirs.start, verdict)
        for number, (theirs, verdict) in enumerate(zip(verdicts, ours, strict=True))
        if not is_explained(theirs.start, verdict)
    ]
    agreed = [
        isinstance(verdict, Firmware)
        for theirs, verdict in zip(verdicts, ours, strict=True)
        if (theirs.start == "ok") == isinstance(verdict, Firmware)
    ]
    assert min(agreed.count(True), agreed.count(False)) > MUTANTS // 10, "mutants of both kinds"
