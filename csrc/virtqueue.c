/* SPDX-License-Identifier: BSD-3-Clause */
#include "virtqueue_inline.h"

#include <string.h>

/* What openamp-c and rpmsg-lite put in `next` at the end of a list: no descriptor has it. */
#define END_OF_LIST 0x8000u

/* A slot's `next` while it is neither in a chain nor in the free list. */
#define UNLINKED 0xFFFFu

RARE void vq_set_fault(struct vq *q, int32_t fault, uint64_t value, uint64_t limit)
{
    q->fault = fault;
    q->fault_value = value;
    q->fault_limit = limit;
}

RARE int32_t vq_unexpected_used(struct vq *q, uint32_t head)
{
    if (q->slots[head].state != VQ_SLOT_INHERITED)
        return vq_break(q, VQ_FAULT_HEAD_STATE, head, q->num);
    __atomic_store_n(&descriptors(q)[head].len, q->whole, __ATOMIC_RELAXED);
    q->slots[head].state = VQ_SLOT_OUT;
    return VQ_AGAIN;
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
        memset(q->ring, 0, sizeof(struct desc) * q->num);
        memset(q->available, 0, sizeof(uint16_t) * (3u + q->num));
        memset(q->used, 0, sizeof(uint16_t) * 3u + sizeof(struct used_element) * q->num);
        link_free(q);
        for (uint32_t i = 0; i < q->num; i++)
            store16(&descriptors(q)[i].next, i + 1u < q->num ? (uint16_t)(i + 1u) : END_OF_LIST);
    }
    q->published = q->limit = 0;
}

uint16_t vq_available_index(const struct vq *q)
{
    return __atomic_load_n(&q->available[1], __ATOMIC_ACQUIRE);
}

uint16_t vq_used_index(const struct vq *q)
{
    return __atomic_load_n(&q->used[1], __ATOMIC_ACQUIRE);
}

/* Marks the chain at `head` as outstanding, from the descriptors an earlier life of this
 * side left in memory. */
static int32_t adopt_chain(struct vq *q, uint16_t head)
{
    uint32_t position = head, count = 0;
    if (head >= q->num)
        return vq_break(q, VQ_FAULT_HEAD_RANGE, head, q->num);
    for (;;) {
        if (q->slots[position].next != UNLINKED)
            return vq_break(q, VQ_FAULT_HEAD_STATE, position, q->num);
        const struct desc *d = &descriptors(q)[position];
        uint16_t flags = load16(&d->flags), next = load16(&d->next);
        q->slots[position].next = END_OF_LIST;
        count++;
        if (!(flags & DESC_NEXT))
            break;
        if (next >= q->num)
            return vq_break(q, VQ_FAULT_NEXT_RANGE, next, q->num);
        q->slots[position].next = next;
        position = next;
    }
    q->slots[head].state = VQ_SLOT_OUT;
    q->slots[head].extent = count;
    q->outstanding++;
    return 0;
}

int32_t vq_attach(struct vq *q, uint16_t seen)
{
    clear_private(q);
    q->next = q->driver ? vq_available_index(q) : vq_used_index(q);
    q->published = q->next;
    q->seen = q->limit = seen;
    if (!q->driver) {
        (void)vq_notify_on(q);
        return 0;
    }
    uint16_t out = (uint16_t)(q->next - seen);
    if (out > q->num)
        return vq_break(q, VQ_FAULT_INDEX_JUMP, out, q->num);
    for (uint16_t i = 0; i < out; i++) {
        uint16_t slot = (uint16_t)((uint16_t)(seen + i) & q->mask);
        if (adopt_chain(q, load16(&q->available[2u + slot])) < 0)
            return VQ_BROKEN;
    }
    link_free(q);
    (void)vq_notify_on(q);
    return 0;
}

int32_t vq_resume(struct vq *q, uint16_t available, const uint16_t *heads, uint16_t count, uint32_t whole)
{
    clear_private(q);
    q->next = q->published = available;
    q->seen = q->limit = (uint16_t)(available - count);
    q->whole = whole;
    if (count > q->num)
        return vq_break(q, VQ_FAULT_INDEX_JUMP, count, q->num);
    uint16_t fresh = (uint16_t)(vq_used_index(q) - q->seen);
    if (fresh > count)
        return vq_break(q, VQ_FAULT_INDEX_JUMP, fresh, count);
    for (uint32_t i = 0; i < count; i++) {
        if (heads[i] >= q->num)
            return vq_break(q, VQ_FAULT_HEAD_RANGE, heads[i], q->num);
        if (q->slots[heads[i]].next != UNLINKED)
            return vq_break(q, VQ_FAULT_HEAD_STATE, heads[i], q->num);
        int is_whole = __atomic_load_n(&descriptors(q)[heads[i]].len, __ATOMIC_RELAXED) == whole;
        q->slots[heads[i]] = (struct vq_slot){
            .next = END_OF_LIST, .state = is_whole ? VQ_SLOT_OUT : VQ_SLOT_INHERITED, .extent = 1};
    }
    q->outstanding = count;
    link_free(q);
    /* What vq_leave said holds no longer. */
    for (uint32_t i = 0; i < q->num; i++)
        store16(&descriptors(q)[i].next, END_OF_LIST);
    (void)vq_notify_on(q);
    return 0;
}

void vq_leave(struct vq *q)
{
    for (uint32_t i = 0; i < q->num; i++) {
        int out = q->slots[i].state == VQ_SLOT_OUT || q->slots[i].state == VQ_SLOT_INHERITED;
        store16(&descriptors(q)[i].next, out ? VQ_LEFT_OUT : VQ_LEFT_FREE);
    }
}

int32_t vq_add(struct vq *q, const struct vq_span *spans, uint32_t readable, uint32_t writable)
{
    uint32_t count = readable + writable;
    if (q->fault)
        return VQ_BROKEN;
    if (count == 0 || count > q->free_count)
        return VQ_EMPTY;
    uint16_t head = q->free_head, position = head;
    for (uint32_t i = 0; i < count; i++) {
        uint16_t flags = (uint16_t)((i >= readable ? DESC_WRITE : 0u) | (i + 1u < count ? DESC_NEXT : 0u));
        uint16_t next = q->slots[position].next;
        write_descriptor(q, position, &spans[i], flags);
        if (flags & DESC_NEXT)
            store16(&descriptors(q)[position].next, next);
        position = next;
    }
    q->free_head = position;
    q->free_count = (uint16_t)(q->free_count - count);
    q->slots[head].extent = count;
    lend(q, head);
    return head;
}

int32_t vq_add_again(struct vq *q, uint16_t head, const struct vq_span *span)
{
    if (q->fault)
        return VQ_BROKEN;
    if (head >= q->num || q->slots[head].state != VQ_SLOT_HELD || q->slots[head].extent != 1)
        return VQ_EMPTY;
    write_descriptor(q, head, span, span->writable ? DESC_WRITE : 0u);
    lend(q, head);
    return 0;
}

int32_t vq_hold_used(struct vq *q, uint32_t *length)
{
    return hold_used(q, length);
}

int32_t vq_get_used(struct vq *q, uint32_t *length)
{
    int32_t head = hold_used(q, length);
    if (head < 0)
        return head;
    free_chain(q, (uint16_t)head);
    return head;
}

/* Sets the span of one descriptor, which is a private copy. */
static int32_t set_span(struct vq *q, struct desc d, struct vq_span *span)
{
    uint8_t *base = translate(q, d.addr, d.len);
    if (!base)
        return vq_break(q, VQ_FAULT_ADDRESS, d.addr, d.len);
    *span = (struct vq_span){
        .pa = d.addr, .base = base, .length = d.len, .writable = (d.flags & DESC_WRITE) ? 1u : 0u};
    return 0;
}

/* Takes the chain of several descriptors that begins with `first`. Returns 0 or VQ_BROKEN; `bytes`
 * is their sum. Each table's descriptors are walked at most once. */
static RARE int32_t walk(struct vq *q, const struct desc *first, struct vq_span *spans, uint32_t max,
                         uint32_t *count, uint32_t *bytes)
{
    const struct desc *table = descriptors(q);
    struct desc d = *first;
    uint32_t entries = q->num, steps = 1, n = 0, sum = 0;
    int in_indirect = 0;
    for (;;) {
        if (d.flags & DESC_INDIRECT) {
            const uint8_t *base = translate(q, d.addr, d.len);
            if (!base)
                return vq_break(q, VQ_FAULT_ADDRESS, d.addr, d.len);
            /* Only as the last of a chain, never nested (virtio 1.2, 2.7.5.3). The table is
             * used in place, so it must be aligned like one. */
            if (in_indirect || !q->indirect || (d.flags & DESC_NEXT) || d.len == 0 || d.len % 16u != 0 ||
                d.len / 16u > q->num || ((uintptr_t)base & 7u) != 0)
                return vq_break(q, VQ_FAULT_INDIRECT, d.len, 16u * (uint64_t)q->num);
            in_indirect = 1;
            table = (const struct desc *)(const void *)base;
            entries = d.len / 16u;
            steps = 1;
            d = load_descriptor(&table[0]);
            continue;
        }
        if (n >= max)
            return vq_break(q, VQ_FAULT_CHAIN_LENGTH, n + 1u, max);
        if (set_span(q, d, &spans[n]) < 0)
            return VQ_BROKEN;
        if (n > 0 && spans[n - 1u].writable && !spans[n].writable)
            return vq_break(q, VQ_FAULT_ORDER, n, q->num);
        n++;
        sum = d.len > UINT32_MAX - sum ? UINT32_MAX : sum + d.len;
        if (!(d.flags & DESC_NEXT))
            break;
        if (d.next >= entries)
            return vq_break(q, VQ_FAULT_NEXT_RANGE, d.next, entries);
        if (++steps > entries)
            return vq_break(q, VQ_FAULT_CHAIN_LENGTH, steps, entries);
        d = load_descriptor(&table[d.next]);
    }
    *count = n;
    *bytes = sum;
    return 0;
}

int32_t vq_get_available(struct vq *q, struct vq_span *spans, uint32_t max, uint32_t *count)
{
    if (q->fault)
        return VQ_BROKEN;
    struct desc d;
    int32_t head = peek_available(q, &d);
    if (head < 0)
        return head;
    uint32_t bytes = d.len;
    if ((d.flags & (DESC_NEXT | DESC_INDIRECT)) || max == 0) {
        if (walk(q, &d, spans, max, count, &bytes) < 0)
            return VQ_BROKEN;
    } else if (set_span(q, d, spans) < 0) {
        return VQ_BROKEN;
    } else {
        *count = 1;
    }
    q->slots[head].state = VQ_SLOT_OUT;
    q->slots[head].extent = bytes;
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
    return put_used(q, head, length);
}

int32_t vq_publish(struct vq *q)
{
    return publish(q, q->driver);
}

int32_t vq_pending(const struct vq *q)
{
    if (q->fault)
        return VQ_BROKEN;
    return __atomic_load_n(&other_ring(q, q->driver)[1], __ATOMIC_ACQUIRE) != q->seen;
}

void vq_notify_off(struct vq *q)
{
    q->quiet = 1;
    if (q->event_idx) {
        /* An event that lies far behind, also behind what the other side made visible before it asks
         * (as Linux does): reached again only after 32768 more entries. */
        store16(q->driver ? used_event(q) : avail_event(q), (uint16_t)(q->seen - 0x8000u));
        return;
    }
    store16(&own_ring(q, q->driver)[0], NO_NOTIFY);
}

int32_t vq_notify_on(struct vq *q)
{
    q->quiet = 0;
    if (q->event_idx)
        store16(q->driver ? used_event(q) : avail_event(q), q->seen);
    else
        store16(&own_ring(q, q->driver)[0], 0);
    /* The wish must be visible before the index is read again. Pairs with the fence in
     * vq_publish of the other side. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return vq_pending(q);
}
