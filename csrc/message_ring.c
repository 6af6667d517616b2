/* SPDX-License-Identifier: BSD-3-Clause */
#include "message_ring.h"
#include "virtqueue_inline.h"

#include <string.h>

/* A drain this long is a flood: kicks are turned off for its rest. Below, the two fences that
 * turning them off and on takes cost more than the kick they save. */
#define QUIET_AFTER 4u

/* The header as two words, which is how it is cheapest to move: src and dst; then reserved (u32),
 * length and flags (u16 each). */
struct header {
    uint64_t addresses;
    uint64_t rest;
};

_Static_assert(sizeof(struct header) == MESSAGE_HEADER, "rpmsg header");
_Static_assert(offsetof(struct message_record, kept) == 6, "dst, length and kept as one word");
_Static_assert(sizeof(struct message_record) == 20, "unpacked by the caller as <IHHIII");

static inline struct header make_header(uint32_t src, uint32_t dst, uint32_t length)
{
    return (struct header){.addresses = src | (uint64_t)dst << 32, .rest = (uint64_t)length << 32};
}

/* A call of memcpy takes longer than to copy what most messages are. */
INLINE void copy_bytes(uint8_t *to, const uint8_t *from, uint32_t length)
{
    if (length - 8u <= 8u) {
        uint64_t first, last;
        memcpy(&first, from, 8);
        memcpy(&last, from + length - 8, 8);
        memcpy(to, &first, 8);
        memcpy(to + length - 8, &last, 8);
    } else {
        memcpy(to, from, length);
    }
}

/* Buffer `head` of a driver. */
INLINE uint8_t *own_buffer(const struct message_ring *ring, uint16_t head)
{
    return ring->pool + ring->offsets[head];
}

static inline struct vq_span own_span(const struct message_ring *ring, uint16_t head)
{
    return (struct vq_span){.pa = ring->pool_pa + ring->offsets[head],
                            .base = own_buffer(ring, head),
                            .length = ring->buffer_size,
                            .writable = !ring->sender};
}

/* Publishes, and counts what comes of it. */
INLINE int32_t tell(struct message_ring *ring, int driver)
{
    struct vq *q = ring->queue;
    if (q->next == q->published)
        return 0;
    int32_t kick = publish(q, driver);
    if (kick)
        ring->kicks++;
    else
        ring->unkicked++;
    return kick;
}

int32_t message_ring_fill(struct message_ring *ring)
{
    struct vq *q = ring->queue;
    while (q->free_count) {
        struct vq_span span = own_span(ring, q->free_head);
        if (vq_add(q, &span, 0, 1) < 0)
            return VQ_BROKEN;
    }
    return vq_publish(q) < 0 ? VQ_BROKEN : 0;
}

/* Copies bytes into a chain from `skip` on. The caller has checked that it has room for so many. */
static RARE void scatter(const struct vq_span *spans, uint32_t skip, const void *from, uint32_t length)
{
    const uint8_t *next = from;
    for (; length; spans++) {
        if (skip >= spans->length) {
            skip -= spans->length;
            continue;
        }
        uint32_t room = spans->length - skip, part = length < room ? length : room;
        memcpy(spans->base + skip, next, part);
        next += part;
        length -= part;
        skip = 0;
    }
}

INLINE void put_header(uint8_t *buffer, uint32_t src, uint32_t dst, uint32_t length)
{
    struct header header = make_header(src, dst, length);
    memcpy(buffer, &header, MESSAGE_HEADER);
}

INLINE void put_message(uint8_t *buffer, uint32_t src, uint32_t dst, const uint8_t *payload, uint32_t length)
{
    put_header(buffer, src, dst, length);
    copy_bytes(buffer + MESSAGE_HEADER, payload, length);
}

/* A buffer that came back is used before one that never went out: the fewer, the better they
 * stay in the cache. */
INLINE int32_t send_as_driver(struct message_ring *ring, uint32_t src, uint32_t dst, const uint8_t *payload,
                              uint32_t length)
{
    struct vq *q = ring->queue;
    uint32_t ignored;
    int32_t back = peek_used(q, 1, &ignored);
    if (back >= 0) {
        /* It goes out again as it is: the descriptor was written when it first went. */
        put_message(own_buffer(ring, (uint16_t)back), src, dst, payload, length);
        q->seen++;
        offer(q, (uint16_t)back);
        return 0;
    }
    if (back == VQ_BROKEN)
        return VQ_BROKEN;
    if (q->free_count == 0)
        return VQ_EMPTY;
    struct vq_span span = own_span(ring, q->free_head);
    put_message(span.base, src, dst, payload, length);
    (void)vq_add(q, &span, 1, 0); /* a descriptor is free: it cannot fail */
    return 0;
}

/* A chain that the device cannot send with as with one buffer, taken already: `count` spans. */
static RARE int32_t send_in_parts(struct message_ring *ring, uint16_t head, uint32_t src, uint32_t dst,
                                  const uint8_t *payload, uint32_t length)
{
    struct vq *q = ring->queue;
    /* Writable spans come last, so there are only such or the chain is not one to send with. */
    uint32_t capacity = ring->spans[0].writable ? q->slots[head].extent : 0;
    if (capacity < MESSAGE_HEADER + length) {
        vq_unget_available(q, head);
        return VQ_SMALL;
    }
    struct header header = make_header(src, dst, length);
    scatter(ring->spans, 0, &header, MESSAGE_HEADER);
    scatter(ring->spans, MESSAGE_HEADER, payload, length);
    return put_used(q, head, capacity);
}

/* A reserved buffer that was not used is sent with first. */
static RARE int32_t send_spare(struct message_ring *ring, uint32_t src, uint32_t dst, const uint8_t *payload,
                               uint32_t length)
{
    struct vq *q = ring->queue;
    uint16_t head = ring->spares[ring->spare_count - 1u];
    uint32_t capacity = q->slots[head].extent;
    uint8_t *buffer = translate(q, ring->places[head] - MESSAGE_HEADER, capacity);
    if (!buffer)
        return vq_break(q, VQ_FAULT_ADDRESS, ring->places[head], capacity);
    if (capacity < MESSAGE_HEADER + length)
        return VQ_SMALL;
    ring->spare_count--;
    put_message(buffer, src, dst, payload, length);
    return put_used(q, head, capacity);
}

INLINE int32_t send_as_device(struct message_ring *ring, uint32_t src, uint32_t dst, const uint8_t *payload,
                              uint32_t length)
{
    struct vq *q = ring->queue;
    if (ring->spare_count)
        return send_spare(ring, src, dst, payload, length);
    struct desc d;
    int32_t head = peek_available(q, &d);
    if (head < 0)
        return head;
    if (d.flags & (DESC_NEXT | DESC_INDIRECT)) {
        uint32_t count;
        head = vq_get_available(q, ring->spans, q->num, &count);
        return head < 0 ? head : send_in_parts(ring, (uint16_t)head, src, dst, payload, length);
    }
    uint8_t *buffer = translate(q, d.addr, d.len);
    if (!buffer)
        return vq_break(q, VQ_FAULT_ADDRESS, d.addr, d.len);
    if (!(d.flags & DESC_WRITE) || d.len < MESSAGE_HEADER + length)
        return VQ_SMALL;
    put_message(buffer, src, dst, payload, length);
    q->seen++;
    /* The whole capacity, not the bytes written: an OpenAMP driver takes this for the size of
     * its buffer. */
    answer(q, (uint16_t)head, d.len);
    return 0;
}

/* Sends one message without publishing or counting it. */
INLINE int32_t send_one(struct message_ring *ring, int driver, uint32_t src, uint32_t dst, const uint8_t *payload,
                        uint32_t length)
{
    return driver ? send_as_driver(ring, src, dst, payload, length)
                  : send_as_device(ring, src, dst, payload, length);
}

/* Most bytes of payload: the header's length is a u16. */
static inline uint32_t payload_limit(const struct message_ring *ring)
{
    uint32_t limit = ring->buffer_size - MESSAGE_HEADER;
    return limit < 0xFFFFu ? limit : 0xFFFFu;
}

INLINE int32_t send(struct message_ring *ring, int driver, uint32_t src, uint32_t dst, const uint8_t *payload,
                    uint32_t length)
{
    if (ring->queue->fault)
        return VQ_BROKEN;
    if (length > payload_limit(ring))
        return VQ_SMALL;
    int32_t result = send_one(ring, driver, src, dst, payload, length);
    if (result < 0)
        return result;
    ring->messages++;
    ring->bytes += length;
    return tell(ring, driver);
}

int32_t message_ring_send(struct message_ring *ring, uint32_t src, uint32_t dst, const uint8_t *payload,
                          uint32_t length)
{
    return ring->queue->driver ? send(ring, 1, src, dst, payload, length) : send(ring, 0, src, dst, payload, length);
}

INLINE int32_t send_many(struct message_ring *ring, int driver, uint32_t src, uint32_t dst, const uint8_t *payload,
                         const uint32_t *lengths, uint32_t count)
{
    const uint32_t limit = payload_limit(ring);
    const uint8_t *next = payload;
    uint32_t sent = 0;
    int32_t result = 0;
    if (ring->queue->fault)
        return VQ_BROKEN;
    if (count > 0xFFFFu)
        count = 0xFFFFu;
    for (; sent < count; sent++) {
        uint32_t length = lengths[sent];
        result = length > limit ? VQ_SMALL : send_one(ring, driver, src, dst, next, length);
        if (result < 0)
            break;
        next += length;
    }
    if (result == VQ_BROKEN || (sent == 0 && result < 0))
        return result;
    ring->messages += sent;
    ring->bytes += (uint64_t)(next - payload);
    return (int32_t)sent | (tell(ring, driver) ? MESSAGE_KICK : 0);
}

int32_t message_ring_send_many(struct message_ring *ring, uint32_t src, uint32_t dst, const uint8_t *payload,
                               const uint32_t *lengths, uint32_t count)
{
    return ring->queue->driver ? send_many(ring, 1, src, dst, payload, lengths, count)
                               : send_many(ring, 0, src, dst, payload, lengths, count);
}

static int32_t reserve_as_driver(struct message_ring *ring)
{
    struct vq *q = ring->queue;
    uint32_t ignored;
    int32_t head = hold_used(q, &ignored);
    if (head == VQ_EMPTY && q->free_count) {
        struct vq_span span = own_span(ring, q->free_head);
        head = q->free_head;
        q->free_head = q->slots[head].next;
        q->free_count--;
        q->slots[head].state = VQ_SLOT_HELD;
        q->slots[head].extent = 1;
        write_descriptor(q, (uint16_t)head, &span, 0);
    }
    if (head >= 0)
        ring->places[head] = ring->pool_pa + ring->offsets[head] + MESSAGE_HEADER;
    return head;
}

static int32_t reserve_as_device(struct message_ring *ring)
{
    struct vq *q = ring->queue;
    uint32_t count;
    if (ring->spare_count)
        return ring->spares[--ring->spare_count];
    int32_t head = vq_get_available(q, ring->spans, q->num, &count);
    if (head < 0)
        return head;
    if (count != 1 || !ring->spans[0].writable || ring->spans[0].length < MESSAGE_HEADER) {
        vq_unget_available(q, (uint16_t)head);
        return VQ_SMALL;
    }
    ring->places[head] = ring->spans[0].pa + MESSAGE_HEADER;
    return head;
}

/* Bytes of the reserved buffer `head`, of which the header takes some. */
static uint32_t reserved_size(const struct message_ring *ring, uint16_t head)
{
    const struct vq *q = ring->queue;
    uint32_t there = q->driver ? ring->buffer_size : q->slots[head].extent;
    return there < ring->buffer_size ? there : ring->buffer_size;
}

int32_t message_ring_reserve(struct message_ring *ring, uint32_t *capacity)
{
    if (ring->queue->fault)
        return VQ_BROKEN;
    int32_t head = ring->queue->driver ? reserve_as_driver(ring) : reserve_as_device(ring);
    if (head >= 0)
        *capacity = reserved_size(ring, (uint16_t)head) - MESSAGE_HEADER;
    return head;
}

static int is_reserved(const struct message_ring *ring, uint16_t head)
{
    const struct vq *q = ring->queue;
    if (!ring->sender || head >= q->num || q->slots[head].state != (q->driver ? VQ_SLOT_HELD : VQ_SLOT_OUT))
        return 0;
    for (uint32_t i = 0; i < ring->spare_count; i++) {
        if (ring->spares[i] == head)
            return 0;
    }
    return 1;
}

int32_t message_ring_commit(struct message_ring *ring, uint16_t head, uint32_t src, uint32_t dst, uint32_t length)
{
    struct vq *q = ring->queue;
    if (q->fault)
        return VQ_BROKEN;
    if (!is_reserved(ring, head))
        return VQ_EMPTY;
    if (length > payload_limit(ring) || length > reserved_size(ring, head) - MESSAGE_HEADER)
        return VQ_SMALL;
    if (q->driver) {
        put_header(own_buffer(ring, head), src, dst, length);
        lend(q, head);
    } else {
        uint32_t capacity = q->slots[head].extent;
        uint8_t *buffer = translate(q, ring->places[head] - MESSAGE_HEADER, capacity);
        if (!buffer)
            return vq_break(q, VQ_FAULT_ADDRESS, ring->places[head], capacity);
        put_header(buffer, src, dst, length);
        (void)put_used(q, head, capacity);
    }
    ring->messages++;
    ring->bytes += length;
    return tell(ring, q->driver);
}

int32_t message_ring_cancel(struct message_ring *ring, uint16_t head)
{
    struct vq *q = ring->queue;
    if (!is_reserved(ring, head))
        return VQ_EMPTY;
    if (q->driver) {
        free_chain(q, head);
    } else {
        ring->spares[ring->spare_count++] = head;
    }
    return 0;
}

/* MESSAGE_KEPT or MESSAGE_IN_PLACE for a destination whose messages keep their buffers. */
static RARE uint32_t look_up_keep(const struct message_ring *ring, uint32_t dst)
{
    uint32_t low = 0, high = ring->keep_count;
    while (low < high) {
        uint32_t middle = (low + high) / 2u;
        if (ring->keep[middle].dst < dst)
            low = middle + 1u;
        else
            high = middle;
    }
    return low < ring->keep_count && ring->keep[low].dst == dst ? ring->keep[low].kept : MESSAGE_RETURNED;
}

/* The next received chain, which is looked at and not taken yet. */
struct received {
    const uint8_t *buffer;
    uint64_t pa; /* device: of the buffer; 0 where it is a copy of several parts */
    uint32_t filled; /* bytes, as the sender says */
    uint32_t extent; /* device: bytes of the chain */
};

/* A chain of several descriptors: what it holds is copied into one piece. */
static RARE int32_t look_at_parts(struct message_ring *ring, struct received *chain)
{
    struct vq *q = ring->queue;
    uint32_t count, filled = 0;
    int32_t head = vq_get_available(q, ring->spans, q->num, &count);
    if (head < 0)
        return head;
    for (uint32_t i = 0; i < count && !ring->spans[i].writable && filled < ring->buffer_size; i++) {
        uint32_t room = ring->buffer_size - filled, there = ring->spans[i].length;
        memcpy(ring->scratch + filled, ring->spans[i].base, there < room ? there : room);
        filled += there < room ? there : room;
    }
    *chain = (struct received){.buffer = ring->scratch, .filled = filled, .extent = q->slots[head].extent};
    vq_unget_available(q, (uint16_t)head);
    return head;
}

INLINE int32_t look(struct message_ring *ring, int driver, struct received *chain)
{
    struct vq *q = ring->queue;
    if (driver) {
        int32_t head = peek_used(q, 0, &chain->filled);
        if (head >= 0)
            chain->buffer = own_buffer(ring, (uint16_t)head);
        return head;
    }
    struct desc d;
    int32_t head = peek_available(q, &d);
    if (head < 0)
        return head;
    if (d.flags & (DESC_NEXT | DESC_INDIRECT))
        return look_at_parts(ring, chain);
    chain->buffer = translate(q, d.addr, d.len);
    if (!chain->buffer)
        return vq_break(q, VQ_FAULT_ADDRESS, d.addr, d.len);
    chain->pa = d.addr;
    chain->filled = (d.flags & DESC_WRITE) ? 0 : d.len;
    chain->extent = d.len;
    return head;
}

/* What becomes of the buffer of a message to `dst`. */
static RARE uint32_t choose_kept(const struct message_ring *ring, const struct received *chain, int32_t how,
                                 uint32_t dst)
{
    uint32_t kept = how & MESSAGE_GIVE_BACK ? look_up_keep(ring, dst) : MESSAGE_KEPT;
    int in_parts = !ring->queue->driver && chain->pa == 0;
    return kept == MESSAGE_IN_PLACE && in_parts ? MESSAGE_KEPT : kept;
}

/* Takes the chain that was looked at and keeps it for message_ring_release. */
static RARE void keep_one(struct message_ring *ring, uint16_t head, const struct received *chain)
{
    struct vq *q = ring->queue;
    q->seen++;
    if (q->driver) {
        q->slots[head].state = VQ_SLOT_HELD;
        q->outstanding--;
        ring->places[head] = ring->pool_pa + ring->offsets[head] + MESSAGE_HEADER;
        /* For the driver that goes on where this one is killed. */
        store16(&descriptors(q)[head].next, VQ_LEFT_FREE);
    } else {
        q->slots[head].state = VQ_SLOT_OUT;
        q->slots[head].extent = chain->extent;
        q->outstanding++;
        ring->places[head] = chain->pa + MESSAGE_HEADER;
    }
}

/* What a record begins with: dst, length, kept. */
INLINE uint64_t first_word(const struct message_record *record)
{
    uint64_t word;
    memcpy(&word, record, sizeof word);
    return word;
}

/* MESSAGE_ALIKE, MESSAGE_EVEN or neither. */
INLINE uint32_t compare(const struct message_record *records, uint32_t count)
{
    uint64_t first = count ? first_word(records) : 0, differ = 0;
    for (const struct message_record *record = records, *end = record + count; record != end; record++)
        differ |= first_word(record) ^ first;
    if ((first >> 48) != MESSAGE_RETURNED || differ >> 32)
        return 0;
    return differ ? MESSAGE_EVEN : MESSAGE_ALIKE;
}

/* `choose`: some buffers may be kept. */
INLINE int32_t receive(struct message_ring *ring, int driver, int choose, struct message_record *records,
                       uint8_t *data, uint32_t max, int32_t how)
{
    struct vq *q = ring->queue;
    struct message_record *record = records;
    uint8_t *next = data;
    uint32_t taken = 0, retries = 0;
    if (q->fault)
        return VQ_BROKEN;
    /* `taken` bounds the call also when every message is bad, `retries` when the other side only
     * seems to have more. */
    while (taken < max) {
        struct received chain;
        struct header header = {0, 0};
        int32_t head = look(ring, driver, &chain);
        if (head < 0) {
            if (head == VQ_BROKEN) {
                if (record == records)
                    return VQ_BROKEN;
                break; /* what came before is good; the next call tells */
            }
            if (q->event_idx && taken)
                q->quiet = 1; /* the wish named an index that now lies behind */
            if (q->quiet && !(how & MESSAGE_STAY_QUIET) && vq_notify_on(q) && retries++ < max)
                continue;
            break;
        }
        if (++taken == QUIET_AFTER && !q->quiet)
            vq_notify_off(q);
        uint32_t kept = MESSAGE_RETURNED, length = 0;
        /* A driver's buffer cannot hold more than there is of it. */
        int good = chain.filled >= MESSAGE_HEADER && !(driver && chain.filled > ring->buffer_size);
        if (good) {
            memcpy(&header, chain.buffer, MESSAGE_HEADER);
            /* From here on the header is ours: the compiler must not read it again from the
             * shared buffer it was copied from. */
            __asm__ volatile("" : "+r"(header.addresses), "+r"(header.rest));
            length = (uint16_t)(header.rest >> 32);
            good = length <= chain.filled - MESSAGE_HEADER && (driver || length <= ring->buffer_size - MESSAGE_HEADER);
        }
        const uint32_t src = (uint32_t)header.addresses;
        if (good && src != MESSAGE_ANY) {
            if (choose)
                kept = choose_kept(ring, &chain, how, (uint32_t)(header.addresses >> 32));
            if (kept != MESSAGE_IN_PLACE)
                copy_bytes(next, chain.buffer + MESSAGE_HEADER, length);
            const uint64_t word = header.addresses >> 32 | (uint64_t)length << 32 | (uint64_t)kept << 48;
            memcpy(record, &word, sizeof word);
            record->src = src;
            record->offset = (uint32_t)(next - data);
            record->head = (uint32_t)head;
            record++;
            ring->bytes += length;
            if (kept != MESSAGE_IN_PLACE) {
                next += length;
                memcpy(next, &src, MESSAGE_SOURCE);
                next += MESSAGE_SOURCE;
            }
        } else if (good) {
            ring->bad_source++;
        } else {
            ring->bad_length++;
        }
        if (kept) {
            keep_one(ring, (uint16_t)head, &chain);
            continue;
        }
        q->seen++;
        if (driver)
            offer(q, (uint16_t)head);
        else
            answer(q, (uint16_t)head, chain.extent);
    }
    if (q->event_idx && taken >= max)
        q->quiet = 1;
    const uint32_t received = (uint32_t)(record - records);
    const uint32_t alike = compare(records, received);
    ring->messages += received;
    if (q->fault)
        return (int32_t)(received | alike);
    const int unasked = q->quiet && !(how & MESSAGE_STAY_QUIET);
    const int goes_on = (taken >= max || retries > max) && (unasked || vq_pending(q));
    return (int32_t)(received | alike | (goes_on ? (uint32_t)MESSAGE_MORE : 0u) |
                     (tell(ring, driver) ? (uint32_t)MESSAGE_KICK : 0u));
}

int32_t message_ring_receive(struct message_ring *ring, struct message_record *records, uint8_t *data,
                             uint32_t max, int32_t how)
{
    if (ring->keep_count || !(how & MESSAGE_GIVE_BACK))
        return ring->queue->driver ? receive(ring, 1, 1, records, data, max, how)
                                   : receive(ring, 0, 1, records, data, max, how);
    return ring->queue->driver ? receive(ring, 1, 0, records, data, max, how)
                               : receive(ring, 0, 0, records, data, max, how);
}

/* Gives back one buffer, which is kept. Seen by the other side only after publish. */
static void give_back_one(struct message_ring *ring, uint16_t head)
{
    struct vq *q = ring->queue;
    if (q->driver) {
        store16(&descriptors(q)[head].next, VQ_LEFT_OUT);
        lend(q, head);
    } else {
        (void)put_used(q, head, q->slots[head].extent);
    }
}

int32_t message_ring_release(struct message_ring *ring, const uint16_t *heads, uint32_t count)
{
    struct vq *q = ring->queue;
    uint16_t held = q->driver ? VQ_SLOT_HELD : VQ_SLOT_OUT;
    if (q->fault)
        return VQ_BROKEN;
    for (uint32_t i = 0; i < count; i++) {
        if (ring->sender || heads[i] >= q->num || q->slots[heads[i]].state != held)
            return VQ_EMPTY;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (q->slots[heads[i]].state == held) /* not so for one that is named twice */
            give_back_one(ring, heads[i]);
    }
    return tell(ring, q->driver) ? MESSAGE_KICK : 0;
}

static int has_unused(const struct message_ring *ring)
{
    return ring->queue->driver ? ring->queue->free_count != 0 : ring->spare_count != 0;
}

int32_t message_ring_has_buffer(const struct message_ring *ring)
{
    return has_unused(ring) || vq_pending(ring->queue);
}

int32_t message_ring_want_buffer(struct message_ring *ring)
{
    if (!ring->queue->fault && has_unused(ring))
        return 1;
    return vq_notify_on(ring->queue);
}
