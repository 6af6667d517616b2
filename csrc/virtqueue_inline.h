/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The part of a virtqueue that every message passes, to be inlined: private to virtqueue.c and
 * message_ring.c. `driver` is q->driver, passed where the caller knows it, so that the compiler
 * does too.
 */
#ifndef OPENAMP_PY_VIRTQUEUE_INLINE_H
#define OPENAMP_PY_VIRTQUEUE_INLINE_H

#include "virtqueue.h"

#include <stddef.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "rings are used in place: little endian only");

#define DESC_NEXT 1u
#define DESC_WRITE 2u
#define DESC_INDIRECT 4u
#define NO_NOTIFY 1u /* flags of both rings */

/* The TSan test takes the release out, to show that the race would be seen. */
#ifndef VQ_PUBLISH_ORDER
#define VQ_PUBLISH_ORDER __ATOMIC_RELEASE
#endif

/* Rare cases are kept out of line, so that the path of nearly every message stays short. */
#define RARE __attribute__((cold, noinline))
#define INLINE static inline __attribute__((always_inline))

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
_Static_assert(sizeof(struct vq_slot) == 8, "a table of them is indexed on the fast path");

static inline struct desc *descriptors(const struct vq *q)
{
    return (struct desc *)(void *)q->ring;
}

static inline struct used_element *used_elements(const struct vq *q)
{
    return (struct used_element *)(void *)(q->used + 2);
}

static inline uint16_t *used_event(const struct vq *q)
{
    return q->available + 2u + q->num;
}

static inline uint16_t *avail_event(const struct vq *q)
{
    return q->used + 2u + 4u * q->num;
}

static inline uint16_t *own_ring(const struct vq *q, int driver)
{
    return driver ? q->available : q->used;
}

static inline uint16_t *other_ring(const struct vq *q, int driver)
{
    return driver ? q->used : q->available;
}

static inline uint16_t load16(const uint16_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

INLINE void store16(uint16_t *word, uint16_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

/* In virtqueue.c: marks the queue broken. */
void vq_set_fault(struct vq *q, int32_t fault, uint64_t value, uint64_t limit);

/* A result of peek_used: a head was inherited, and is like any other at the next look. Not a head, so
 * that the path of nearly every message does not go on behind a call. */
#define VQ_AGAIN -4

/* In virtqueue.c: a head came back that is not simply out. Returns VQ_AGAIN or VQ_BROKEN. */
int32_t vq_unexpected_used(struct vq *q, uint32_t head);

static inline int32_t vq_break(struct vq *q, int32_t fault, uint64_t value, uint64_t limit)
{
    vq_set_fault(q, fault, value, limit);
    return VQ_BROKEN;
}

/* The pointer to `length` bytes at `pa`, or NULL where they are not in one region. */
INLINE uint8_t *translate(const struct vq *q, uint64_t pa, uint32_t length)
{
    for (const struct vq_region *region = q->regions, *end = region + q->region_count; region != end; region++) {
        uint64_t offset = pa - region->pa; /* huge where pa lies below */
        if (offset <= region->size && length <= region->size - offset)
            return region->base + offset;
    }
    return NULL;
}

INLINE void write_descriptor(const struct vq *q, uint16_t position, const struct vq_span *span, uint16_t flags)
{
    struct desc *d = &descriptors(q)[position];
    __atomic_store_n(&d->addr, span->pa, __ATOMIC_RELAXED);
    __atomic_store_n(&d->len, span->length, __ATOMIC_RELAXED);
    store16(&d->flags, flags);
}

/* Driver: puts a head into the available ring. */
INLINE void offer(struct vq *q, uint16_t head)
{
    store16(&q->available[2u + (q->next & q->mask)], head);
    q->next++;
}

/* Device: puts a head into the used ring. */
INLINE void answer(struct vq *q, uint16_t head, uint32_t length)
{
    struct used_element *element = &used_elements(q)[q->next & q->mask];
    __atomic_store_n(&element->id, head, __ATOMIC_RELAXED);
    __atomic_store_n(&element->len, length, __ATOMIC_RELAXED);
    q->next++;
}

/* Driver: lends a chain that is free or held. */
INLINE void lend(struct vq *q, uint16_t head)
{
    q->slots[head].state = VQ_SLOT_OUT;
    q->outstanding++;
    offer(q, head);
}

/* Whether there is an entry at `seen`; loads the other side's index only when it must. The
 * queue has no fault: the caller has looked. */
INLINE int32_t poll_other(struct vq *q, int driver)
{
    if (q->limit == q->seen) {
        /* Pairs with the release in vq_publish of the other side: the entries before idx are
         * visible after it. */
        uint16_t idx = __atomic_load_n(&other_ring(q, driver)[1], __ATOMIC_ACQUIRE);
        uint16_t fresh = (uint16_t)(idx - q->seen);
        if (fresh == 0)
            return VQ_EMPTY;
        /* What the other side can see of this one. Never below zero: an entry is taken only
         * after it was counted here. */
        uint32_t hidden = (uint16_t)(q->next - q->published);
        uint32_t possible = (driver ? q->outstanding : (uint32_t)q->num - q->outstanding) - hidden;
        if (fresh > possible)
            return vq_break(q, VQ_FAULT_INDEX_JUMP, fresh, possible);
        q->limit = idx;
    }
    return 0;
}

/* Driver: the head of the next used chain, which is checked but not taken: the caller goes on
 * with `seen`, and says what becomes of the chain. `inherits`: some may be VQ_SLOT_INHERITED. */
INLINE int32_t peek_used(struct vq *q, int inherits, uint32_t *length)
{
    int32_t result = poll_other(q, 1);
    if (result < 0)
        return result;
    const struct used_element *element = &used_elements(q)[q->seen & q->mask];
    uint32_t id = __atomic_load_n(&element->id, __ATOMIC_RELAXED);
    *length = __atomic_load_n(&element->len, __ATOMIC_RELAXED);
    if (id >= q->num)
        return vq_break(q, VQ_FAULT_HEAD_RANGE, id, q->num);
    if (q->slots[id].state != VQ_SLOT_OUT) {
        if (!inherits)
            return vq_break(q, VQ_FAULT_HEAD_STATE, id, q->num);
        result = vq_unexpected_used(q, id);
        if (result >= 0)
            __builtin_unreachable(); /* which spares the path of nearly every message a register */
        return result;
    }
    return (int32_t)id;
}

/* vq_hold_used. */
INLINE int32_t hold_used(struct vq *q, uint32_t *length)
{
    if (q->fault)
        return VQ_BROKEN;
    int32_t head = peek_used(q, 1, length);
    if (head == VQ_AGAIN)
        head = peek_used(q, 1, length);
    if (head < 0)
        return head == VQ_BROKEN ? head : VQ_EMPTY;
    q->slots[head].state = VQ_SLOT_HELD;
    q->outstanding--;
    q->seen++;
    return head;
}

/* Driver: the descriptors of a chain that is neither out nor wanted any more are free again. */
static inline void free_chain(struct vq *q, uint16_t head)
{
    uint32_t count = q->slots[head].extent;
    uint16_t last = head;
    for (uint32_t i = 1; i < count; i++)
        last = q->slots[last].next;
    q->slots[last].next = q->free_head;
    q->slots[head].state = VQ_SLOT_FREE;
    q->free_head = head;
    q->free_count = (uint16_t)(q->free_count + count);
}

static inline struct desc load_descriptor(const struct desc *shared)
{
    return (struct desc){.addr = __atomic_load_n(&shared->addr, __ATOMIC_RELAXED),
                         .len = __atomic_load_n(&shared->len, __ATOMIC_RELAXED),
                         .flags = load16(&shared->flags),
                         .next = load16(&shared->next)};
}

/* Device: the head of the next available chain, which is not taken, and its first descriptor. */
INLINE int32_t peek_available(struct vq *q, struct desc *d)
{
    int32_t result = poll_other(q, 0);
    if (result < 0)
        return result;
    uint16_t head = load16(&q->available[2u + (q->seen & q->mask)]);
    if (head >= q->num)
        return vq_break(q, VQ_FAULT_HEAD_RANGE, head, q->num);
    if (q->slots[head].state != VQ_SLOT_FREE)
        return vq_break(q, VQ_FAULT_HEAD_STATE, head, q->num);
    *d = load_descriptor(&descriptors(q)[head]);
    return head;
}

/* vq_put_used. */
INLINE int32_t put_used(struct vq *q, uint16_t head, uint32_t length)
{
    if (q->fault)
        return VQ_BROKEN;
    if (head >= q->num || q->slots[head].state != VQ_SLOT_OUT)
        return VQ_EMPTY;
    q->slots[head].state = VQ_SLOT_FREE;
    q->outstanding--;
    answer(q, head, length);
    return 0;
}

/* vq_publish. */
INLINE int32_t publish(struct vq *q, int driver)
{
    uint16_t from = q->published, to = q->next;
    if (q->fault)
        return VQ_BROKEN;
    if (to == from)
        return 0;
    /* Pairs with the acquire in poll_other of the other side. */
    __atomic_store_n(&own_ring(q, driver)[1], to, VQ_PUBLISH_ORDER);
    q->published = to;
    /* The index must be visible before the wish is read. Pairs with the fence in vq_notify_on
     * of the other side, which writes its wish before it reads the index. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (q->event_idx) {
        uint16_t event = load16(driver ? avail_event(q) : used_event(q));
        return (uint16_t)(to - event - 1u) < (uint16_t)(to - from);
    }
    return !(load16(&other_ring(q, driver)[0]) & NO_NOTIFY);
}

#endif
