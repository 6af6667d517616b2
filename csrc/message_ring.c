/* SPDX-License-Identifier: BSD-3-Clause */
#include "message_ring.h"
#include "virtqueue_inline.h"

#include <string.h>

/* A drain this long is a flood: kicks are turned off for its rest. Below, the two fences that
 * turning them off and on takes cost more than the kick they save. */
#define QUIET_AFTER 4u

struct header {
    uint32_t src;
    uint32_t dst;
    uint32_t reserved;
    uint16_t length;
    uint16_t flags;
};

_Static_assert(sizeof(struct header) == MESSAGE_HEADER, "rpmsg header");
_Static_assert(offsetof(struct header, length) == 12, "rpmsg header");
_Static_assert(sizeof(struct message_record) == 20, "unpacked by the caller as <IIIHHHH");

/* Buffer `head` of a driver, as the span that is lent. */
static inline struct vq_span own_buffer(const struct message_ring *ring, uint16_t head)
{
    uint64_t offset = (uint64_t)head * ring->buffer_size;
    return (struct vq_span){.pa = ring->pool_pa + offset,
                            .base = ring->pool + offset,
                            .length = ring->buffer_size,
                            .writable = !ring->sender};
}

int32_t message_ring_fill(struct message_ring *ring)
{
    struct vq *q = ring->queue;
    while (q->free_count) {
        struct vq_span span = own_buffer(ring, q->free_head);
        if (vq_add(q, &span, 0, 1) < 0)
            return VQ_BROKEN;
    }
    (void)vq_publish(q);
    return 0;
}

/* Copies bytes from `skip` on between a chain and private memory. The caller has checked that
 * the chain has so many; nearly always they lie in its first span. */
static RARE void scatter_parts(const struct vq_span *spans, uint32_t skip, const uint8_t *from, uint32_t length)
{
    for (; length; spans++) {
        if (skip >= spans->length) {
            skip -= spans->length;
            continue;
        }
        uint32_t room = spans->length - skip, part = length < room ? length : room;
        memcpy(spans->base + skip, from, part);
        from += part;
        length -= part;
        skip = 0;
    }
}

static RARE void gather_parts(const struct vq_span *spans, uint32_t skip, uint8_t *to, uint32_t length)
{
    for (; length; spans++) {
        if (skip >= spans->length) {
            skip -= spans->length;
            continue;
        }
        uint32_t there = spans->length - skip, part = length < there ? length : there;
        memcpy(to, spans->base + skip, part);
        to += part;
        length -= part;
        skip = 0;
    }
}

INLINE void scatter(const struct vq_span *spans, uint32_t skip, const void *from, uint32_t length)
{
    if (skip + length <= spans->length)
        memcpy(spans->base + skip, from, length);
    else
        scatter_parts(spans, skip, from, length);
}

INLINE void gather(const struct vq_span *spans, uint32_t skip, void *to, uint32_t length)
{
    if (skip + length <= spans->length)
        memcpy(to, spans->base + skip, length);
    else
        gather_parts(spans, skip, to, length);
}

INLINE void put_message(const struct vq_span *spans, const struct header *header, const uint8_t *payload)
{
    scatter(spans, 0, header, MESSAGE_HEADER);
    scatter(spans, MESSAGE_HEADER, payload, header->length);
}

/* A buffer that came back is used before one that never went out: the fewer, the better they
 * stay in the cache. */
INLINE int32_t send_as_driver(struct message_ring *ring, const struct header *header, const uint8_t *payload)
{
    struct vq *q = ring->queue;
    uint32_t ignored;
    int32_t back = hold_used(q, &ignored);
    if (back == VQ_BROKEN)
        return VQ_BROKEN;
    if (back == VQ_EMPTY && q->free_count == 0)
        return VQ_EMPTY;
    uint16_t head = back >= 0 ? (uint16_t)back : q->free_head;
    struct vq_span span = own_buffer(ring, head);
    put_message(&span, header, payload);
    if (back >= 0)
        lend_again(q, head, &span);
    else
        (void)vq_add(q, &span, 1, 0); /* a descriptor is free: it cannot fail */
    return 0;
}

INLINE int32_t send_as_device(struct message_ring *ring, const struct header *header, const uint8_t *payload)
{
    struct vq *q = ring->queue;
    uint32_t count;
    int32_t head = get_available(q, ring->spans, q->num, &count);
    if (head < 0)
        return head;
    /* Writable spans come last, so there are only such or the chain is not one to send with. */
    uint32_t capacity = ring->spans[0].writable ? q->slots[head].extent : 0;
    if (capacity < (uint32_t)MESSAGE_HEADER + header->length) {
        vq_unget_available(q, (uint16_t)head);
        return VQ_SMALL;
    }
    put_message(ring->spans, header, payload);
    /* The whole capacity, not the bytes written: an OpenAMP driver takes this for the size of
     * its buffer. */
    return put_used(q, (uint16_t)head, capacity);
}

/* Sends one message without publishing it. */
INLINE int32_t send_one(struct message_ring *ring, uint32_t src, uint32_t dst, const uint8_t *payload,
                        uint32_t length)
{
    if (length > 0xFFFFu || length > ring->buffer_size - MESSAGE_HEADER)
        return VQ_SMALL;
    struct header header = {.src = src, .dst = dst, .length = (uint16_t)length};
    return ring->queue->driver ? send_as_driver(ring, &header, payload) : send_as_device(ring, &header, payload);
}

int32_t message_ring_send(struct message_ring *ring, uint32_t src, uint32_t dst, const uint8_t *payload,
                          uint32_t length, int32_t more)
{
    int32_t result = send_one(ring, src, dst, payload, length);
    return result < 0 || more ? result : publish(ring->queue, ring->queue->driver);
}

int32_t message_ring_send_many(struct message_ring *ring, uint32_t src, uint32_t dst, const uint8_t *payload,
                               const uint32_t *lengths, uint32_t count)
{
    uint32_t sent = 0;
    int32_t result = 0;
    for (; sent < count && sent < 0xFFFFu; sent++) {
        result = send_one(ring, src, dst, payload, lengths[sent]);
        if (result < 0)
            break;
        payload += lengths[sent];
    }
    if (result == VQ_BROKEN || (sent == 0 && result < 0))
        return result;
    return (int32_t)sent | (publish(ring->queue, ring->queue->driver) ? MESSAGE_KICK : 0);
}

/* Takes the next received chain. Returns its head and sets where its bytes are and how many of
 * them the sender says it filled. */
INLINE int32_t take(struct message_ring *ring, int driver, uint32_t *filled)
{
    struct vq *q = ring->queue;
    struct vq_span *spans = ring->spans;
    if (driver) {
        int32_t head = hold_used(q, filled);
        if (head >= 0)
            spans[0] = own_buffer(ring, (uint16_t)head);
        return head;
    }
    uint32_t count;
    int32_t head = get_available(q, spans, q->num, &count);
    if (head < 0)
        return head;
    uint32_t readable = 0;
    for (uint32_t i = 0; i < count && !spans[i].writable; i++)
        readable = spans[i].length > UINT32_MAX - readable ? UINT32_MAX : readable + spans[i].length;
    *filled = readable;
    return head;
}

/* Copies the message out of the chain in ring->spans, of which `filled` bytes are filled, and
 * fills all of `record` but its head. Returns 0 where header and buffer disagree. */
INLINE int copy_message(const struct message_ring *ring, int driver, uint32_t filled, uint8_t *data,
                        uint32_t offset, struct message_record *record)
{
    struct header header;
    if (filled < MESSAGE_HEADER)
        return 0;
    if (filled > ring->buffer_size) {
        if (driver) /* more than there is */
            return 0;
        filled = ring->buffer_size; /* more than the caller's data has room for */
    }
    gather(ring->spans, 0, &header, MESSAGE_HEADER);
    /* From here on the header is ours: the compiler must not read it again from the shared
     * buffer it was copied from. */
    __asm__ volatile("" : "+m"(header));
    if (header.length > filled - MESSAGE_HEADER)
        return 0;
    gather(ring->spans, MESSAGE_HEADER, data + offset, header.length);
    record->src = header.src;
    record->dst = header.dst;
    record->offset = offset;
    record->length = header.length;
    record->flags = header.flags;
    record->pad = 0;
    return 1;
}

/* Gives back one buffer, which is held. Seen by the other side only after publish. */
INLINE void give_back_one(struct message_ring *ring, int driver, uint16_t head)
{
    struct vq *q = ring->queue;
    if (driver) {
        struct vq_span span = own_buffer(ring, head);
        lend_again(q, head, &span);
    } else {
        (void)put_used(q, head, q->slots[head].extent);
    }
}

INLINE int32_t receive(struct message_ring *ring, int driver, struct message_record *records, uint8_t *data,
                       uint32_t max, int32_t give_back)
{
    struct vq *q = ring->queue;
    uint32_t received = 0, taken = 0, offset = 0, more = 0;
    /* `taken` bounds the call also when every message is bad. */
    while (taken < max) {
        uint32_t filled = 0;
        int32_t head = take(ring, driver, &filled);
        if (head == VQ_BROKEN)
            return VQ_BROKEN;
        if (head == VQ_EMPTY) {
            if (q->quiet && vq_notify_on(q))
                continue;
            break;
        }
        taken++;
        if (q->event_idx)
            q->quiet = 1; /* the wish named an index that now lies behind */
        else if (taken == QUIET_AFTER)
            vq_notify_off(q);
        int good = copy_message(ring, driver, filled, data, offset, &records[received]);
        if (good) {
            records[received].head = (uint16_t)head;
            offset += records[received++].length;
        } else {
            ring->bad_length++;
        }
        if (give_back || !good)
            give_back_one(ring, driver, (uint16_t)head);
    }
    if (taken >= max && (q->quiet || vq_pending(q)))
        more = MESSAGE_MORE;
    return (int32_t)(received | more | (publish(q, driver) ? (uint32_t)MESSAGE_KICK : 0u));
}

int32_t message_ring_receive(struct message_ring *ring, struct message_record *records, uint8_t *data,
                             uint32_t max, int32_t give_back)
{
    return ring->queue->driver ? receive(ring, 1, records, data, max, give_back)
                               : receive(ring, 0, records, data, max, give_back);
}

int32_t message_ring_release(struct message_ring *ring, const uint16_t *heads, uint32_t count)
{
    struct vq *q = ring->queue;
    uint16_t held = q->driver ? VQ_SLOT_HELD : VQ_SLOT_OUT;
    if (q->fault)
        return VQ_BROKEN;
    for (uint32_t i = 0; i < count; i++) {
        if (heads[i] >= q->num || q->slots[heads[i]].state != held)
            return VQ_EMPTY;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (q->slots[heads[i]].state == held) /* not so for one that is named twice */
            give_back_one(ring, q->driver, heads[i]);
    }
    return vq_publish(q) ? MESSAGE_KICK : 0;
}

int32_t message_ring_want_buffer(struct message_ring *ring)
{
    struct vq *q = ring->queue;
    if (q->driver && q->free_count && !q->fault)
        return 1;
    return vq_notify_on(q);
}
