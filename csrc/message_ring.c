/* SPDX-License-Identifier: BSD-3-Clause */
#include "message_ring.h"

#include <stddef.h>
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
static struct vq_span own_buffer(const struct message_ring *ring, uint16_t head)
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

/* Copies `length` bytes into a chain's spans, which have room for them. */
static void scatter(const struct vq_span *spans, uint32_t skip, const uint8_t *from, uint32_t length)
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

static void gather(const struct vq_span *spans, uint32_t skip, uint8_t *to, uint32_t length)
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

static void put_message(const struct vq_span *spans, const struct header *header, const uint8_t *payload)
{
    scatter(spans, 0, (const uint8_t *)header, MESSAGE_HEADER);
    scatter(spans, MESSAGE_HEADER, payload, header->length);
}

/* Bytes the device may write into its part of the chain in ring->spans. */
static uint32_t writable_bytes(const struct vq_span *spans, uint32_t count)
{
    uint32_t sum = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t length = spans[i].writable ? spans[i].length : 0;
        sum = length > UINT32_MAX - sum ? UINT32_MAX : sum + length;
    }
    return sum;
}

static int32_t send_one(struct message_ring *ring, const struct header *header, const uint8_t *payload)
{
    struct vq *q = ring->queue;
    if (q->driver) {
        uint32_t length;
        int32_t head;
        while ((head = vq_get_used(q, &length)) >= 0) {
        }
        if (head == VQ_BROKEN)
            return VQ_BROKEN;
        if (q->free_count == 0)
            return VQ_EMPTY;
        struct vq_span span = own_buffer(ring, q->free_head);
        put_message(&span, header, payload);
        head = vq_add(q, &span, 1, 0);
        return head < 0 ? head : 0;
    }
    uint32_t count;
    int32_t head = vq_get_available(q, ring->spans, q->num, &count);
    if (head < 0)
        return head;
    /* A chain whose first span is readable is not one to send with: no room in it. */
    uint32_t capacity = ring->spans[0].writable ? writable_bytes(ring->spans, count) : 0;
    if (capacity < (uint32_t)MESSAGE_HEADER + header->length) {
        vq_unget_available(q, (uint16_t)head);
        return VQ_SMALL;
    }
    put_message(ring->spans, header, payload);
    /* The whole capacity, not the bytes written: an OpenAMP driver takes this for the size of
     * its buffer. */
    return vq_put_used(q, (uint16_t)head, capacity);
}

int32_t message_ring_send(struct message_ring *ring, uint32_t src, uint32_t dst, const uint8_t *payload,
                          uint32_t length, int32_t more)
{
    if (length > 0xFFFFu || length > ring->buffer_size - MESSAGE_HEADER)
        return VQ_SMALL;
    struct header header = {.src = src, .dst = dst, .length = (uint16_t)length};
    int32_t result = send_one(ring, &header, payload);
    if (result < 0 || more)
        return result;
    return vq_publish(ring->queue);
}

int32_t message_ring_send_many(struct message_ring *ring, uint32_t src, uint32_t dst, const uint8_t *payload,
                               const uint32_t *lengths, uint32_t count)
{
    uint32_t sent = 0;
    int32_t result = 0;
    for (; sent < count && sent < 0xFFFFu; sent++) {
        result = message_ring_send(ring, src, dst, payload, lengths[sent], 1);
        if (result < 0)
            break;
        payload += lengths[sent];
    }
    int32_t kick = vq_publish(ring->queue) ? MESSAGE_KICK : 0;
    if (result == VQ_BROKEN || (sent == 0 && result < 0))
        return result;
    return (int32_t)sent | kick;
}

/* Takes the next received chain. Returns its head and sets where its bytes are, how many spans
 * that is, and how many bytes of them the sender says it filled. */
static int32_t take(struct message_ring *ring, uint32_t *count, uint32_t *filled)
{
    struct vq *q = ring->queue;
    if (q->driver) {
        int32_t head = vq_hold_used(q, filled);
        if (head >= 0) {
            ring->spans[0] = own_buffer(ring, (uint16_t)head);
            *count = 1;
        }
        return head;
    }
    int32_t head = vq_get_available(q, ring->spans, q->num, count);
    if (head >= 0) {
        uint32_t total = 0;
        for (uint32_t i = 0; i < *count; i++) {
            if (ring->spans[i].writable)
                break;
            total = ring->spans[i].length > UINT32_MAX - total ? UINT32_MAX : total + ring->spans[i].length;
        }
        *filled = total;
    }
    return head;
}

static int32_t give_back_one(struct message_ring *ring, uint16_t head)
{
    struct vq *q = ring->queue;
    if (head >= q->num)
        return VQ_EMPTY;
    if (!q->driver)
        return vq_put_used(q, head, q->slots[head].capacity);
    struct vq_span span = own_buffer(ring, head);
    return vq_add_again(q, head, &span);
}

int32_t message_ring_receive(struct message_ring *ring, struct message_record *records, uint8_t *data,
                             uint32_t max, int32_t give_back)
{
    struct vq *q = ring->queue;
    uint32_t received = 0, taken = 0, offset = 0, more = 0;
    /* `taken` bounds the call also when every message is bad. */
    while (received < max && taken < max) {
        uint32_t count = 0, filled = 0;
        int32_t head = take(ring, &count, &filled);
        if (head == VQ_BROKEN)
            return VQ_BROKEN;
        if (head == VQ_EMPTY) {
            /* With EVENT_IDX the wish names an index, so it is renewed after each drain. */
            if ((q->quiet || (q->event_idx && taken)) && vq_notify_on(q))
                continue;
            break;
        }
        if (++taken == QUIET_AFTER)
            vq_notify_off(q);
        struct header header;
        uint32_t room = filled < ring->buffer_size ? filled : ring->buffer_size;
        int good = filled >= MESSAGE_HEADER && (!q->driver || filled <= ring->buffer_size);
        if (good) {
            gather(ring->spans, 0, (uint8_t *)&header, MESSAGE_HEADER);
            /* From here on the header is ours: the compiler must not read it again from the
             * shared buffer it was copied from. */
            __asm__ volatile("" : "+m"(header));
            good = header.length <= room - MESSAGE_HEADER;
        }
        if (good) {
            gather(ring->spans, MESSAGE_HEADER, data + offset, header.length);
            records[received++] = (struct message_record){
                .src = header.src, .dst = header.dst, .offset = offset,
                .length = header.length, .flags = header.flags, .head = (uint16_t)head,
            };
            offset += header.length;
        } else {
            ring->bad_length++;
        }
        if ((give_back || !good) && give_back_one(ring, (uint16_t)head) < 0)
            return VQ_BROKEN;
    }
    if (taken >= max)
        more = q->quiet || q->event_idx || vq_pending(q) ? MESSAGE_MORE : 0;
    return (int32_t)(received | more | (vq_publish(q) ? (uint32_t)MESSAGE_KICK : 0u));
}

int32_t message_ring_release(struct message_ring *ring, const uint16_t *heads, uint32_t count)
{
    int32_t result = 0;
    for (uint32_t i = 0; i < count && result >= 0; i++)
        result = give_back_one(ring, heads[i]);
    int32_t kick = vq_publish(ring->queue) ? MESSAGE_KICK : 0;
    return result < 0 ? result : kick;
}

int32_t message_ring_want_buffer(struct message_ring *ring)
{
    struct vq *q = ring->queue;
    if (q->driver && q->free_count)
        return 1;
    return vq_notify_on(q);
}
