"""The tables of what OpenAMP's and Linux's calls are here: complete, and true."""

from __future__ import annotations

import pytest

import openamp_py
from openamp_py import porting
from openamp_py.porting import Row

# The functions of openamp/remoteproc.h (v2026.04), and its platform operations.
OPENAMP_HEADER = """
remoteproc_init remoteproc_remove remoteproc_init_mem remoteproc_add_mem
remoteproc_get_io_with_name remoteproc_get_io_with_pa remoteproc_get_io_with_da
remoteproc_get_io_with_va remoteproc_mmap remoteproc_set_rsc_table remoteproc_config
remoteproc_start remoteproc_stop remoteproc_shutdown remoteproc_load remoteproc_load_noblock
remoteproc_allocate_id remoteproc_create_virtio remoteproc_remove_virtio
remoteproc_get_notification
"""
OPENAMP_OPERATIONS = "init remove mmap handle_rsc config start stop shutdown notify get_mem"

# The functions of linux/remoteproc.h (6.1), and the operations of a driver.
LINUX_HEADER = """
rproc_alloc devm_rproc_alloc rproc_free rproc_add devm_rproc_add rproc_del rproc_put rproc_boot
rproc_shutdown rproc_detach rproc_set_firmware rproc_report_crash rproc_coredump_using_sections
rproc_coredump_add_segment rproc_coredump_add_custom_segment rproc_coredump_set_elf_info
rproc_get_by_phandle rproc_get_by_child rproc_add_subdev rproc_remove_subdev rproc_add_carveout
rproc_mem_entry_init rproc_of_resm_mem_entry_init rproc_da_to_va rproc_resource_cleanup
"""
LINUX_OPERATIONS = """
prepare unprepare start stop attach detach kick da_to_va parse_fw handle_rsc
find_loaded_rsc_table get_loaded_rsc_table load sanity_check get_boot_addr panic coredump
"""
# What the documents in the seeds name besides.
OLDER = {
    "OPENAMP": "remoteproc_boot remoteproc_resource_init remoteproc_resource_deinit "
    "remoteproc_suspend remoteproc_resume",
    "LINUX": "rproc_register rproc_unregister rproc_get_by_name rproc_coredump",
}


@pytest.mark.parametrize(
    ("rows", "functions", "prefix", "operations", "older"),
    [
        (porting.OPENAMP, OPENAMP_HEADER, "remoteproc_ops", OPENAMP_OPERATIONS, OLDER["OPENAMP"]),
        (porting.LINUX, LINUX_HEADER, "rproc_ops", LINUX_OPERATIONS, OLDER["LINUX"]),
    ],
)
def test_no_call_is_missing(
    rows: tuple[Row, ...], functions: str, prefix: str, operations: str, older: str
) -> None:
    named = [row.c for row in rows]
    assert len(set(named)) == len(named)
    wanted = {*functions.split(), *older.split()}
    wanted |= {f"{prefix}.{operation}" for operation in operations.split()}
    assert wanted <= set(named)


@pytest.mark.parametrize("row", [*porting.OPENAMP, *porting.LINUX], ids=lambda row: row.c)
def test_what_takes_its_place_exists_and_is_public(row: Row) -> None:
    if not row.ours:
        assert row.remark, "says why there is nothing"
        return
    name, _, attribute = row.ours.partition(".")
    assert name in openamp_py.__all__
    if attribute:
        owner = getattr(openamp_py, name)
        assert getattr(owner, attribute).__doc__


def test_the_text_has_a_line_for_each_row() -> None:
    lines = porting.format_rows(porting.LINUX).splitlines()
    assert [line.split()[0] for line in lines] == [row.c.split()[0] for row in porting.LINUX]
