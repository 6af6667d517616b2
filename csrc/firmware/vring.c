/* SPDX-License-Identifier: BSD-3-Clause */
#include "vring.h"

#include "port.h"
#include "trace.h"

bool bad_table(const char *what, uint32_t value)
{
    trace_text("bad resource table: ");
    trace_text(what);
    trace_text(" is ");
    trace_hex(value);
    trace_end();
    return false;
}

_Noreturn void ring_is_broken(uint32_t index, const char *what, uint32_t value, uint32_t limit)
{
    trace_text("ring ");
    trace_decimal(index);
    trace_text(" broken: ");
    trace_text(what);
    trace_text(" is ");
    trace_hex(value);
    trace_text(", limit ");
    trace_hex(limit);
    trace_end();
    port_halt(ECHO_HALT_BAD_RING);
}

bool find_pool(uint32_t *da, uint32_t *size, const struct table_carveout *pool)
{
    *da = load32(&pool->da);
    *size = load32(&pool->length);
    if (*da == TABLE_ANY || !is_free_ram(*da, *size))
        return bad_table("address of the buffer pool", *da);
    return true;
}

bool find_vring(struct vring *found, const struct table_vring *vring, uint32_t index)
{
    uint32_t da = load32(&vring->da);
    uint32_t align = load32(&vring->align);
    uint32_t num = load32(&vring->num);
    uint32_t notify_id = load32(&vring->notify_id);
    uint32_t used_offset;

    if (num > VRING_NUM || !is_power_of_two(num))
        return bad_table(index == 0 ? "size of vring 0" : "size of vring 1", num);
    if (align < sizeof(uint32_t) || align > VRING_ALIGN || !is_power_of_two(align))
        return bad_table(index == 0 ? "alignment of vring 0" : "alignment of vring 1", align);
    /*
     * Descriptors, available ring with its event word; then, aligned, the used ring with its own.
     */
    used_offset = (uint32_t)(16 * num + 4 + 2 * num + 2 + align - 1) & ~(align - 1);
    if (da == TABLE_ANY || da % align != 0 || da % sizeof(struct vring_descriptor) != 0 ||
        !is_free_ram(da, used_offset + 4 + 8 * num + 2))
        return bad_table(index == 0 ? "address of vring 0" : "address of vring 1", da);
    if (notify_id == TABLE_ANY)
        return bad_table(index == 0 ? "notify id of vring 0" : "notify id of vring 1", notify_id);

    found->descriptor = (struct vring_descriptor *)(uintptr_t)da;
    found->available = (struct vring_available *)(uintptr_t)(da + 16 * num);
    found->used = (struct vring_used *)(uintptr_t)(da + used_offset);
    found->num = (uint16_t)num;
    found->notify_id = notify_id;
    return true;
}
