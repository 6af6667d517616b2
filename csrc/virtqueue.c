/* SPDX-License-Identifier: BSD-3-Clause */
#include "virtqueue.h"

#include <stddef.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "rings are used in place: little endian only");

#define DESC_NEXT 1u
#define DESC_WRITE 2u
#define DESC_INDIRECT 4u
#define NO_NOTIFY 1u /* flags of both rings */

/* The TSan test takes the release out, to show that the race would be seen. */
#ifndef VQ_PUBLISH_ORDER
#define VQ_PUBLISH_ORDER __ATOMIC_RELEASE
#endif

/* What openamp-c and rpmsg-lite put in `next` at the end of a list: no descriptor has it. */
#define END_OF_LIST 0x8000u

/* A slot's `next` while it is neither in a chain nor in the free list. */
#define UNLINKED 0xFFFFu

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags;
    uint16_t next;
};

struct used_element {
    uint32_t id;
    uint32_t len;
};

_Static_assert(sizeof(struct desc) == 16, "virtio 1.2, 2.7.5");
_Static_assert(offsetof(struct desc, next) == 14, "virtio 1.2, 2.7.5");
_Static_assert(sizeof(struct used_element) == 8, "virtio 1.2, 2.7.8");

static struct desc *descriptors(const struct vq *q)
{
    return (struct desc *)(void *)q->ring;
}

/* Available ring: flags, idx, ring[num], used_event: all u16. */
static uint16_t *available(const struct vq *q)
{
    return (uint16_t *)(void *)(q->ring + 16u * q->num);
}

/* Used ring: flags u16, idx u16, elements[num] of 8 bytes, avail_event u16. */
static uint16_t *used(const struct vq *q)
{
    return (uint16_t *)(void *)(q->ring + q->used_offset);
}

static struct used_element *used_elements(const struct vq *q)
{
    return (struct used_element *)(void *)(q->ring + q->used_offset + 4u);
}

static uint16_t *used_event(const struct vq *q)
{
    return available(q) + 2u + q->num;
}

static uint16_t *avail_event(const struct vq *q)
{
    return (uint16_t *)(void *)(q->ring + q->used_offset + 4u + 8u * q->num);
}

static uint16_t *own_ring(const struct vq *q)
{
    return q->driver ? available(q) : used(q);
}

static uint16_t *other_ring(const struct vq *q)
{
    return q->driver ? used(q) : available(q);
}

static uint16_t load16(const uint16_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static void store16(uint16_t *word, uint16_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

static int32_t break_queue(struct vq *q, int32_t fault, uint64_t value, uint64_t limit)
{
    q->fault = fault;
    q->fault_value = value;
    q->fault_limit = limit;
    return VQ_BROKEN;
}

/* The pointer to `length` bytes at `pa`, or NULL where they are not in one region. */
static uint8_t *translate(const struct vq *q, uint64_t pa, uint32_t length)
{
    for (uint32_t i = 0; i < q->region_count; i++) {
        const struct vq_region *region = &q->regions[i];
        uint64_t offset = pa - region->pa;
        if (pa >= region->pa && offset <= region->size && length <= region->size - offset)
            return region->base + offset;
    }
    return NULL;
}

uint32_t vq_ring_size(uint32_t num, uint32_t used_offset)
{
    return used_offset + 4u + 8u * num + 2u;
}

static void clear_private(struct vq *q)
{
    for (uint32_t i = 0; i < q->num; i++)
        q->slots[i] = (struct vq_slot){.next = UNLINKED};
    q->next = 0;
    q->seen = 0;
    q->quiet = 0;
    q->outstanding = 0;
    q->fault = 0;
    q->fault_value = 0;
    q->fault_limit = 0;
}

/* The free list of all slots that are in no chain, lowest first. */
static void link_free(struct vq *q)
{
    q->free_count = 0;
    q->free_head = END_OF_LIST;
    for (uint32_t i = q->num; i-- > 0;) {
        if (q->slots[i].next != UNLINKED)
            continue;
        q->slots[i].next = q->free_head;
        q->free_head = (uint16_t)i;
        q->free_count++;
    }
}

void vq_start(struct vq *q)
{
    clear_private(q);
    if (q->driver) {
        memset(q->ring, 0, vq_ring_size(q->num, q->used_offset));
        link_free(q);
        for (uint32_t i = 0; i < q->num; i++)
            store16(&descriptors(q)[i].next, i + 1u < q->num ? (uint16_t)(i + 1u) : END_OF_LIST);
    }
    q->published = q->limit = 0;
}

uint16_t vq_available_index(const struct vq *q)
{
    return __atomic_load_n(&available(q)[1], __ATOMIC_ACQUIRE);
}

uint16_t vq_used_index(const struct vq *q)
{
    return __atomic_load_n(&used(q)[1], __ATOMIC_ACQUIRE);
}

/* Marks the chain at `head` as outstanding, from the descriptors an earlier life of this
 * side left in memory. */
static int32_t adopt_chain(struct vq *q, uint16_t head)
{
    uint32_t position = head, count = 0, capacity = 0;
    if (head >= q->num)
        return break_queue(q, VQ_FAULT_HEAD_RANGE, head, q->num);
    for (;;) {
        if (q->slots[position].next != UNLINKED)
            return break_queue(q, VQ_FAULT_HEAD_STATE, position, q->num);
        const struct desc *d = &descriptors(q)[position];
        uint16_t flags = load16(&d->flags), next = load16(&d->next);
        uint32_t length = __atomic_load_n(&d->len, __ATOMIC_RELAXED);
        q->slots[position].next = END_OF_LIST;
        count++;
        if (flags & DESC_WRITE)
            capacity = length > UINT32_MAX - capacity ? UINT32_MAX : capacity + length;
        if (!(flags & DESC_NEXT))
            break;
        if (next >= q->num)
            return break_queue(q, VQ_FAULT_NEXT_RANGE, next, q->num);
        q->slots[position].next = next;
        position = next;
    }
    q->slots[head].state = VQ_SLOT_OUT;
    q->slots[head].count = count;
    q->slots[head].capacity = capacity;
    q->outstanding++;
    return 0;
}

int32_t vq_attach(struct vq *q, uint16_t seen)
{
    clear_private(q);
    q->next = q->driver ? vq_available_index(q) : vq_used_index(q);
    q->published = q->next;
    q->seen = q->limit = seen;
    if (!q->driver)
        return 0;
    uint16_t out = (uint16_t)(q->next - seen);
    if (out > q->num)
        return break_queue(q, VQ_FAULT_INDEX_JUMP, out, q->num);
    for (uint16_t i = 0; i < out; i++) {
        uint16_t slot = (uint16_t)((uint16_t)(seen + i) & (q->num - 1u));
        if (adopt_chain(q, load16(&available(q)[2u + slot])) < 0)
            return VQ_BROKEN;
    }
    link_free(q);
    return 0;
}

static void write_descriptor(const struct vq *q, uint16_t position, const struct vq_span *span, uint16_t flags)
{
    struct desc *d = &descriptors(q)[position];
    __atomic_store_n(&d->addr, span->pa, __ATOMIC_RELAXED);
    __atomic_store_n(&d->len, span->length, __ATOMIC_RELAXED);
    store16(&d->flags, flags);
}

static void lend(struct vq *q, uint16_t head)
{
    q->slots[head].state = VQ_SLOT_OUT;
    q->outstanding++;
    store16(&available(q)[2u + (q->next & (q->num - 1u))], head);
    q->next++;
}

int32_t vq_add(struct vq *q, const struct vq_span *spans, uint32_t readable, uint32_t writable)
{
    uint32_t count = readable + writable;
    if (q->fault)
        return VQ_BROKEN;
    if (count == 0 || count > q->free_count)
        return VQ_EMPTY;
    uint16_t head = q->free_head, position = head;
    uint32_t capacity = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint16_t flags = (uint16_t)((i >= readable ? DESC_WRITE : 0u) | (i + 1u < count ? DESC_NEXT : 0u));
        uint16_t next = q->slots[position].next;
        write_descriptor(q, position, &spans[i], flags);
        if (flags & DESC_NEXT)
            store16(&descriptors(q)[position].next, next);
        if (flags & DESC_WRITE)
            capacity += spans[i].length;
        position = next;
    }
    q->free_head = position;
    q->free_count = (uint16_t)(q->free_count - count);
    q->slots[head].count = count;
    q->slots[head].capacity = capacity;
    lend(q, head);
    return head;
}

int32_t vq_add_again(struct vq *q, uint16_t head, const struct vq_span *span)
{
    if (q->fault)
        return VQ_BROKEN;
    if (head >= q->num || q->slots[head].state != VQ_SLOT_HELD || q->slots[head].count != 1)
        return VQ_EMPTY;
    write_descriptor(q, head, span, span->writable ? DESC_WRITE : 0u);
    q->slots[head].capacity = span->writable ? span->length : 0u;
    lend(q, head);
    return 0;
}

/* Whether there is an entry at `seen`; loads the other side's index only when it must. */
static int32_t poll_other(struct vq *q, uint16_t possible)
{
    if (q->fault)
        return VQ_BROKEN;
    if (q->limit == q->seen) {
        /* Pairs with the release in vq_publish of the other side: the entries before idx are
         * visible after it. */
        uint16_t idx = __atomic_load_n(&other_ring(q)[1], __ATOMIC_ACQUIRE);
        uint16_t fresh = (uint16_t)(idx - q->seen);
        if (fresh == 0)
            return VQ_EMPTY;
        if (fresh > possible)
            return break_queue(q, VQ_FAULT_INDEX_JUMP, fresh, possible);
        q->limit = idx;
    }
    return 0;
}

int32_t vq_hold_used(struct vq *q, uint32_t *length)
{
    int32_t result = poll_other(q, q->outstanding);
    if (result < 0)
        return result;
    const struct used_element *element = &used_elements(q)[q->seen & (q->num - 1u)];
    uint32_t id = __atomic_load_n(&element->id, __ATOMIC_RELAXED);
    uint32_t written = __atomic_load_n(&element->len, __ATOMIC_RELAXED);
    if (id >= q->num)
        return break_queue(q, VQ_FAULT_HEAD_RANGE, id, q->num);
    if (q->slots[id].state != VQ_SLOT_OUT)
        return break_queue(q, VQ_FAULT_HEAD_STATE, id, q->num);
    q->slots[id].state = VQ_SLOT_HELD;
    q->outstanding--;
    q->seen++;
    *length = written;
    return (int32_t)id;
}

int32_t vq_get_used(struct vq *q, uint32_t *length)
{
    int32_t head = vq_hold_used(q, length);
    if (head < 0)
        return head;
    uint32_t count = q->slots[head].count;
    uint16_t last = (uint16_t)head;
    for (uint32_t i = 1; i < count; i++)
        last = q->slots[last].next;
    q->slots[last].next = q->free_head;
    q->slots[head].state = VQ_SLOT_FREE;
    q->free_head = (uint16_t)head;
    q->free_count = (uint16_t)(q->free_count + count);
    return head;
}

/* Walks one table of descriptors: the queue's own, or an indirect one. */
static int32_t walk(struct vq *q, const struct desc *table, uint32_t entries, uint16_t start, int in_indirect,
                    struct vq_span *spans, uint32_t max, uint32_t *count, uint32_t *total)
{
    uint16_t position = start;
    for (uint32_t steps = 1;; steps++) {
        const struct desc *d = &table[position];
        uint64_t addr = __atomic_load_n(&d->addr, __ATOMIC_RELAXED);
        uint32_t len = __atomic_load_n(&d->len, __ATOMIC_RELAXED);
        uint16_t flags = load16(&d->flags), next = load16(&d->next);
        uint8_t *base = translate(q, addr, len);
        if (!base)
            return break_queue(q, VQ_FAULT_ADDRESS, addr, len);
        if (flags & DESC_INDIRECT) {
            /* Only as the whole of a chain's tail, never nested (virtio 1.2, 2.7.5.3). The table
             * is used in place, so it must be aligned like one. */
            if (in_indirect || !q->indirect || (flags & DESC_NEXT) || len == 0 || len % 16u != 0 ||
                len / 16u > q->num || ((uintptr_t)base & 7u) != 0)
                return break_queue(q, VQ_FAULT_INDIRECT, len, 16u * (uint64_t)q->num);
            return walk(q, (const struct desc *)(const void *)base, len / 16u, 0, 1, spans, max, count, total);
        }
        if (*count >= max)
            return break_queue(q, VQ_FAULT_CHAIN_LENGTH, *count + 1u, max);
        uint32_t writable = (flags & DESC_WRITE) ? 1u : 0u;
        if (!writable && *count > 0 && spans[*count - 1u].writable)
            return break_queue(q, VQ_FAULT_ORDER, *count, q->num);
        spans[*count] = (struct vq_span){.pa = addr, .base = base, .length = len, .writable = writable};
        (*count)++;
        *total = len > UINT32_MAX - *total ? UINT32_MAX : *total + len;
        if (!(flags & DESC_NEXT))
            return 0;
        if (next >= entries)
            return break_queue(q, VQ_FAULT_NEXT_RANGE, next, entries);
        if (steps >= entries)
            return break_queue(q, VQ_FAULT_CHAIN_LENGTH, steps + 1u, entries);
        position = next;
    }
}

int32_t vq_get_available(struct vq *q, struct vq_span *spans, uint32_t max, uint32_t *count)
{
    int32_t result = poll_other(q, (uint16_t)(q->num - q->outstanding));
    uint32_t total = 0;
    if (result < 0)
        return result;
    uint16_t head = load16(&available(q)[2u + (q->seen & (q->num - 1u))]);
    if (head >= q->num)
        return break_queue(q, VQ_FAULT_HEAD_RANGE, head, q->num);
    if (q->slots[head].state != VQ_SLOT_FREE)
        return break_queue(q, VQ_FAULT_HEAD_STATE, head, q->num);
    *count = 0;
    if (walk(q, descriptors(q), q->num, head, 0, spans, max, count, &total) < 0)
        return VQ_BROKEN;
    q->slots[head].state = VQ_SLOT_OUT;
    q->slots[head].capacity = total;
    q->outstanding++;
    q->seen++;
    return head;
}

void vq_unget_available(struct vq *q, uint16_t head)
{
    q->slots[head].state = VQ_SLOT_FREE;
    q->outstanding--;
    q->seen--;
}

int32_t vq_put_used(struct vq *q, uint16_t head, uint32_t length)
{
    if (q->fault)
        return VQ_BROKEN;
    if (head >= q->num || q->slots[head].state != VQ_SLOT_OUT)
        return VQ_EMPTY;
    struct used_element *element = &used_elements(q)[q->next & (q->num - 1u)];
    __atomic_store_n(&element->id, head, __ATOMIC_RELAXED);
    __atomic_store_n(&element->len, length, __ATOMIC_RELAXED);
    q->slots[head].state = VQ_SLOT_FREE;
    q->outstanding--;
    q->next++;
    return 0;
}

int32_t vq_publish(struct vq *q)
{
    uint16_t from = q->published, to = q->next;
    if (q->fault || to == from)
        return 0;
    /* Pairs with the acquire in poll_other of the other side. */
    __atomic_store_n(&own_ring(q)[1], to, VQ_PUBLISH_ORDER);
    q->published = to;
    /* The index must be visible before the wish is read. Pairs with the fence in vq_notify_on
     * of the other side, which writes its wish before it reads the index. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (q->event_idx) {
        uint16_t event = load16(q->driver ? avail_event(q) : used_event(q));
        return (uint16_t)(to - event - 1u) < (uint16_t)(to - from);
    }
    return !(load16(&other_ring(q)[0]) & NO_NOTIFY);
}

int32_t vq_pending(const struct vq *q)
{
    return !q->fault && __atomic_load_n(&other_ring(q)[1], __ATOMIC_ACQUIRE) != q->seen;
}

void vq_notify_off(struct vq *q)
{
    q->quiet = 1;
    if (q->event_idx) {
        /* An event that lies behind: reached again only after 65535 more entries. */
        store16(q->driver ? used_event(q) : avail_event(q), (uint16_t)(q->seen - 1u));
        return;
    }
    store16(&own_ring(q)[0], NO_NOTIFY);
}

int32_t vq_notify_on(struct vq *q)
{
    q->quiet = 0;
    if (q->event_idx)
        store16(q->driver ? used_event(q) : avail_event(q), q->seen);
    else
        store16(&own_ring(q)[0], 0);
    /* The wish must be visible before the index is read again. Pairs with the fence in
     * vq_publish of the other side. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return vq_pending(q);
}
