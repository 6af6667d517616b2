"""What the calls of OpenAMP's and Linux's remoteproc are here, as tables."""

from __future__ import annotations

from typing import Final, NamedTuple


class Row(NamedTuple):
    """One C name and what takes its place."""

    c: str
    ours: str
    """Below `openamp_py`; empty where nothing takes its place, and the remark says why."""
    remark: str = ""


OPENAMP: Final = (
    Row("remoteproc_init", "open_processor", "an async with block; its end is remoteproc_remove"),
    Row("remoteproc_remove", "open_processor", "leaving the block"),
    Row("remoteproc_config", "RemoteProcessor.configure"),
    Row("remoteproc_init_mem", "Region"),
    Row("remoteproc_add_mem", "RemoteProcessor.add_memory"),
    Row("remoteproc_get_io_with_name", "MemoryMap.find_name", "of RemoteProcessor.memory"),
    Row("remoteproc_get_io_with_pa", "MemoryMap.find_pa", "of RemoteProcessor.memory"),
    Row("remoteproc_get_io_with_da", "MemoryMap.find_da", "of RemoteProcessor.memory"),
    Row("remoteproc_get_io_with_va", "MemoryMap.find_view", "a memoryview is the virtual address"),
    Row("remoteproc_mmap", "RemoteProcessor.map"),
    Row("remoteproc_set_rsc_table", "RemoteProcessor.set_table", "attach(table_da=) where it runs"),
    Row("remoteproc_load", "RemoteProcessor.load", "a path, a name, bytes or a file"),
    Row("remoteproc_load_noblock", "RemoteProcessor.load", "an async file, or a stream of pieces"),
    Row("remoteproc_start", "RemoteProcessor.start"),
    Row("remoteproc_stop", "RemoteProcessor.stop"),
    Row("remoteproc_shutdown", "RemoteProcessor.shutdown"),
    Row("remoteproc_suspend", "RemoteProcessor.suspend", "promised, and never built in C"),
    Row("remoteproc_resume", "RemoteProcessor.resume", "promised, and never built in C"),
    Row("remoteproc_create_virtio", "RemoteProcessor.create_virtio", "each vdev has one at first"),
    Row("remoteproc_remove_virtio", "RemoteProcessor.remove_virtio"),
    Row("remoteproc_get_notification", "RemoteProcessor.get_notification"),
    Row("remoteproc_allocate_id", "", "notify ids are given out when an image is loaded"),
    Row("remoteproc_ops.init", "Platform", "its constructor"),
    Row("remoteproc_ops.remove", "Platform.close"),
    Row("remoteproc_ops.mmap", "Platform.translate"),
    Row("remoteproc_ops.get_mem", "Platform.translate"),
    Row("remoteproc_ops.handle_rsc", "Platform.handle_vendor", "or register_vendor, for one type"),
    Row("remoteproc_ops.config", "Platform.prepare"),
    Row("remoteproc_ops.start", "Platform.create_core", "and Core.run, until the core ends"),
    Row("remoteproc_ops.stop", "Core.run", "which is cancelled"),
    Row("remoteproc_ops.shutdown", "Platform.unprepare"),
    Row("remoteproc_ops.notify", "Core.kick"),
    Row("remoteproc_resource_init", "open_resources", "the remote's side"),
    Row("remoteproc_resource_deinit", "open_resources", "leaving the block"),
    Row("remoteproc_boot", "RemoteProcessor.boot"),
)
"""Every public function of OpenAMP's ``openamp/remoteproc.h``, every platform operation, and what
its older documents name besides."""

LINUX: Final = (
    Row("rproc_alloc", "open_processor", "an async with block; or Registry.add, which adds it too"),
    Row("devm_rproc_alloc", "open_processor"),
    Row("rproc_free", "open_processor", "leaving the block"),
    Row("rproc_add", "Registry.add"),
    Row("devm_rproc_add", "Registry.add"),
    Row("rproc_register", "Registry.add", "its older name; add_in_background does not wait"),
    Row("rproc_del", "Registry.remove"),
    Row("rproc_unregister", "Registry.remove", "its older name"),
    Row("rproc_boot", "RemoteProcessor.boot", "counted"),
    Row("rproc_shutdown", "RemoteProcessor.shutdown", "counted"),
    Row("rproc_detach", "RemoteProcessor.detach", "also of a core that was booted here"),
    Row("rproc_set_firmware", "RemoteProcessor.set_firmware"),
    Row("rproc_get_by_name", "Registry.get", "boots nothing; Registry.use does"),
    Row("rproc_get_by_phandle", "Registry.get", "with the number that Registry.handle gives"),
    Row("rproc_get_by_child", "", "there is no tree of devices"),
    Row("rproc_put", "Registry.put"),
    Row("rproc_report_crash", "RemoteProcessor.report_crash"),
    Row("rproc_coredump", "RemoteProcessor.coredump", "encode_coredump makes a file of it"),
    Row("rproc_coredump_using_sections", "", "one format; gdb and readelf know it"),
    Row("rproc_coredump_add_segment", "RemoteProcessor.add_to_coredump"),
    Row("rproc_coredump_add_custom_segment", "Platform.dump_segments"),
    Row("rproc_coredump_set_elf_info", "Core", "its machine and elf_class"),
    Row("rproc_add_subdev", "RemoteProcessor.add_subdevice"),
    Row("rproc_remove_subdev", "RemoteProcessor.remove_subdevice"),
    Row("rproc_add_carveout", "RemoteProcessor.add_memory", "found by its name"),
    Row("rproc_mem_entry_init", "Region"),
    Row("rproc_of_resm_mem_entry_init", "Region", "there is no device tree"),
    Row("rproc_da_to_va", "MemoryMap.find_da", "of RemoteProcessor.memory"),
    Row("rproc_vq_interrupt", "RemoteProcessor.get_notification"),
    Row("rproc_resource_cleanup", "RemoteProcessor.shutdown"),
    Row("rproc_ops.prepare", "Platform.prepare"),
    Row("rproc_ops.unprepare", "Platform.unprepare"),
    Row("rproc_ops.start", "Platform.create_core", "and Core.run, until the core ends"),
    Row("rproc_ops.stop", "Core.run", "which is cancelled"),
    Row("rproc_ops.attach", "Platform.attach_core"),
    Row("rproc_ops.detach", "Core.detach"),
    Row("rproc_ops.kick", "Core.kick"),
    Row("rproc_ops.da_to_va", "Platform.translate"),
    Row("rproc_ops.parse_fw", "Platform.decode", "register_loader, for all platforms"),
    Row("rproc_ops.handle_rsc", "Platform.handle_vendor"),
    Row("rproc_ops.find_loaded_rsc_table", "Platform.find_table"),
    Row("rproc_ops.get_loaded_rsc_table", "Core", "its table_da, once it was attached"),
    Row("rproc_ops.load", "Platform.load"),
    Row("rproc_ops.sanity_check", "Platform.check"),
    Row("rproc_ops.get_boot_addr", "Platform.boot_address"),
    Row("rproc_ops.coredump", "Platform.dump_segments"),
    Row("rproc_ops.panic", "Platform.panic"),
    Row("sysfs state", "RemoteProcessor.states"),
    Row("sysfs recovery", "CrashPolicy", "recovery; by hand: RemoteProcessor.recover"),
    Row("sysfs coredump", "CoredumpMode", "of the CrashPolicy"),
    Row("debugfs trace", "TraceFollower", "or read_trace, for all at once"),
    Row("debugfs resource_table", "RemoteProcessor.table"),
)
"""Every public function of Linux's ``linux/remoteproc.h`` (6.1), every operation of a driver, what
its older documents name besides, and the files of sysfs and debugfs."""


def format_rows(rows: tuple[Row, ...]) -> str:
    """A table as text."""
    c = max(len(row.c) for row in rows)
    ours = max(len(row.ours or "-") for row in rows)
    return "\n".join(
        f"{row.c:{c}}  {row.ours or '-':{ours}}  {row.remark}".rstrip() for row in rows
    )
