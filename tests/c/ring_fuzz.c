/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * A peer that follows the protocol mostly, and between operations writes what it likes into the
 * rings and the buffers. Whatever it does, a call only returns a result that its header allows,
 * a broken queue stays broken, and a sanitizer finds nothing.
 *
 * Arguments: first seed, rounds. Prints how many rounds ended broken, and how often each fault.
 */
#include "polling.h"
#include "ring_link.h"

#define MAX_NUM 16u
#define MAX_BATCH 8u
#define MAX_KEEP 5u
#define STEPS 200u
#define STEPS_WHEN_BROKEN 5u
#define FAULTS 9

static uint64_t state;

static uint32_t random_below(uint32_t limit) /* splitmix64 */
{
    uint64_t z = (state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (uint32_t)((z ^ (z >> 31)) % limit);
}

static uint64_t interesting(const struct link *l)
{
    uint64_t pool_end = POOL_PA + (uint64_t)l->num * l->buffer_size;
    switch (random_below(7)) {
    case 0:
        return random_below(2u * l->num + 2u);
    case 1:
        return POOL_PA + random_below(l->num * l->buffer_size);
    case 2:
        return pool_end - random_below(40);
    case 3:
        return random_below(8); /* flags */
    case 4:
        return 16u * random_below(l->num + 2u);
    case 5:
        return UINT64_MAX - random_below(32);
    default:
        return (uint64_t)random_below(UINT32_MAX) << random_below(33);
    }
}

/* Writes one value of 2, 4 or 8 bytes somewhere in what is shared. */
static void scribble(const struct link *l)
{
    uint64_t value = interesting(l);
    uint32_t size = 2u << random_below(3);
    int in_pool = random_below(4) == 0;
    uint32_t room = in_pool ? l->num * l->buffer_size : l->ring_size;
    uint32_t at = random_below((room - size) / 2u + 1u) * 2u;
    if (!in_pool && (at == 16u * l->num + 2u || at == l->used_offset + 2u) && random_below(8))
        return; /* an index that jumps ends a round: not too often */
    memcpy((in_pool ? l->pool : l->ring) + at, &value, size);
}

/* As a driver does it, but with any descriptors: a chain of up to `num`, perhaps indirect. */
static void offer_chain(const struct link *l)
{
    uint16_t head = (uint16_t)random_below(l->num), idx;
    uint32_t position = head, writes = random_below(2);
    for (uint32_t left = random_below(random_below(4) ? 4 : l->num + 2u);; left--) {
        uint64_t addr = POOL_PA + random_below(l->num * l->buffer_size);
        uint32_t length = random_below(left ? 40 : 200);
        uint16_t flags = (uint16_t)((random_below(16) ? writes : random_below(2)) * 2u), next = (uint16_t)random_below(l->num);
        if (left) {
            flags |= 1u;
        } else if (random_below(4) == 0) {
            flags = 4;
            length = 16u * (1u + random_below(l->num));
            addr &= random_below(8) ? ~(uint64_t)7 : UINT64_MAX;
        }
        memcpy(l->ring + 16u * position, &addr, 8);
        memcpy(l->ring + 16u * position + 8, &length, 4);
        memcpy(l->ring + 16u * position + 12, &flags, 2);
        memcpy(l->ring + 16u * position + 14, &next, 2);
        position = next;
        if (!left)
            break;
    }
    uint8_t *available = l->ring + 16u * l->num;
    memcpy(&idx, available + 2, 2);
    memcpy(available + 4 + 2u * (idx % l->num), &head, 2);
    idx++;
    memcpy(available + 2, &idx, 2);
}

static void check_spans(const struct link *l, const struct vq_span *spans, uint32_t count)
{
    check(count >= 1 && count <= l->num, "spans", count);
    for (uint32_t i = 0; i < count; i++) {
        check(spans[i].base >= l->pool, "span before the pool", i);
        check(spans[i].length <= (uint64_t)(l->pool + l->num * l->buffer_size - spans[i].base), "span after it", i);
        check(i == 0 || spans[i].writable || !spans[i - 1].writable, "order", i);
        volatile uint8_t sum = 0; /* a sanitizer looks at each byte */
        for (uint32_t at = 0; at < spans[i].length; at++)
            sum = (uint8_t)(sum + spans[i].base[at]);
    }
}

/* One call on the queue itself. Returns what it returned. */
static int32_t work_queue(const struct link *l, struct vq *q, struct vq_span *spans)
{
    uint32_t value = 0;
    int32_t head;
    switch (random_below(6)) {
    case 0:
        return vq_publish(q);
    case 1:
        vq_notify_off(q);
        return vq_notify_on(q);
    case 2:
        if (!q->driver)
            return vq_put_used(q, (uint16_t)random_below(l->num + 2u), 7);
        for (uint32_t i = 0; i < l->num; i++)
            spans[i] = (struct vq_span){.pa = POOL_PA, .length = 1};
        value = random_below(l->num + 1u);
        return vq_add(q, spans, value, random_below(l->num - value + 1u));
    default:
        if (q->driver) {
            head = random_below(2) ? vq_get_used(q, &value) : vq_hold_used(q, &value);
        } else {
            head = vq_get_available(q, spans, l->num, &value);
            if (head >= 0) {
                check_spans(l, spans, value);
                if (random_below(8) == 0)
                    vq_unget_available(q, (uint16_t)head);
            }
        }
        check(head < (int32_t)l->num, "head", head);
        return head;
    }
}

/* A place that the ring names: all of its bytes are in the pool. */
static uint8_t *find_place(const struct link *l, const struct message_ring *ring, uint32_t head, uint32_t length)
{
    check(head < l->num, "head", head);
    uint64_t offset = ring->places[head] - POOL_PA, size = (uint64_t)l->num * l->buffer_size;
    check(offset <= size && length <= size - offset, "place", (long long)ring->places[head]);
    return l->pool + offset;
}

/* What the list says about a destination, found the slow way. */
static uint32_t wanted_keep(const struct message_ring *ring, uint32_t dst)
{
    uint32_t kept = MESSAGE_RETURNED;
    for (uint32_t i = 0; i < ring->keep_count; i++)
        kept = ring->keep[i].dst == dst ? ring->keep[i].kept : kept;
    return kept;
}

/* A new list of destinations whose buffers are kept, of exactly its size. */
static void choose_keep(struct message_ring *ring)
{
    struct message_keep *keep;
    uint32_t count = random_below(MAX_KEEP + 1u), dst = random_below(2);
    free((void *)(uintptr_t)ring->keep);
    ring->keep = keep = allocate(count * sizeof *keep);
    ring->keep_count = count;
    for (uint32_t i = 0; i < count; i++) {
        keep[i] = (struct message_keep){.dst = dst, .kept = random_below(2) ? MESSAGE_KEPT : MESSAGE_IN_PLACE};
        dst += 1u + random_below(2);
    }
}

/* For what says nothing of a broken queue. */
static int32_t or_broken(const struct message_ring *ring, int32_t result)
{
    return ring->queue->fault ? VQ_BROKEN : result;
}

static int32_t look_at_ring(struct message_ring *ring)
{
    int32_t result;
    if (random_below(2)) {
        result = poll_rings(ring, random_below(2) ? ring : NULL, 100u * random_below(2));
        check(ring->queue->quiet, "not quiet after polling", result);
    } else {
        result = message_ring_has_buffer(ring);
        check(result || !ring->queue->fault, "a broken queue counts as a buffer", result);
    }
    check(result == 0 || result == 1, "look", result);
    return or_broken(ring, result);
}

/* One call with which a message is built in its buffer, or not. */
static int32_t build_in_place(const struct link *l, struct message_ring *ring, uint32_t limit)
{
    uint32_t capacity = 0;
    uint16_t head = (uint16_t)random_below(l->num + 1u);
    int32_t result;
    switch (random_below(4)) {
    case 0:
        result = message_ring_cancel(ring, head);
        check(result == 0 || result == VQ_EMPTY, "cancel", result);
        return or_broken(ring, result);
    case 1:
        result = message_ring_commit(ring, head, random_below(4), random_below(8), random_below(limit + 2u));
        check(result <= 1, "commit", result);
        return result;
    default:
        result = message_ring_reserve(ring, &capacity);
        if (result >= 0) {
            check(capacity <= limit, "capacity", capacity);
            memset(find_place(l, ring, (uint32_t)result, capacity), 0xA5, capacity);
        }
        return result;
    }
}

static int32_t send_something(const struct link *l, struct message_ring *ring, const uint8_t *payload)
{
    uint32_t limit = ring->buffer_size - MESSAGE_HEADER;
    uint32_t lengths[3] = {random_below(limit + 2u), random_below(limit), random_below(limit)};
    uint32_t dst = random_below(8);
    int32_t result;
    switch (random_below(8)) {
    case 0:
        return message_ring_want_buffer(ring);
    case 1:
        return look_at_ring(ring);
    case 2:
    case 3:
        result = message_ring_send(ring, 1, dst, payload, lengths[0]);
        check(result <= 1, "send", result);
        return result;
    case 4:
    case 5:
        result = message_ring_send_many(ring, 1, dst, payload, lengths, 3);
        check(result < 0 || ((result & 0xFFFF) <= 3 && (result & ~(0xFFFF | MESSAGE_KICK)) == 0), "send_many", result);
        check(result != 0 && result != MESSAGE_KICK, "nothing sent and no reason", result);
        return result;
    default:
        return build_in_place(l, ring, limit);
    }
}

/* What message_ring_receive said of one message. */
static void check_record(const struct link *l, const struct message_ring *ring, const struct message_record *record,
                         const uint8_t *data, uint32_t room, int32_t how)
{
    const struct vq *q = ring->queue;
    uint32_t wanted = how & MESSAGE_GIVE_BACK ? wanted_keep(ring, record->dst) : MESSAGE_KEPT;
    check(record->length <= ring->buffer_size - MESSAGE_HEADER, "length", record->length);
    check(record->head < q->num, "head", record->head);
    check(record->src != MESSAGE_ANY, "source", record->src);
    if (record->kept != wanted) /* in parts: not in place */
        check(wanted == MESSAGE_IN_PLACE && record->kept == MESSAGE_RETURNED && !q->driver, "kept", record->kept);
    if (record->kept) {
        const uint16_t held = q->driver ? VQ_SLOT_HELD : VQ_SLOT_OUT;
        check(q->slots[record->head].state == held, "kept, and not held", record->head);
    }
    if (record->kept == MESSAGE_IN_PLACE) {
        const uint8_t *place = find_place(l, ring, record->head, record->length);
        volatile uint8_t sum = 0; /* a sanitizer looks at each byte */
        for (uint32_t at = 0; at < record->length; at++)
            sum = (uint8_t)(sum + place[at]);
    } else {
        check(record->offset + record->length + (uint32_t)MESSAGE_SOURCE <= room, "offset", record->offset);
        check(memcmp(data + record->offset + record->length, &record->src, MESSAGE_SOURCE) == 0, "source differs",
              record->src);
    }
}

static int32_t receive_something(const struct link *l, struct message_ring *ring, struct message_record *records,
                                 uint8_t *data)
{
    uint32_t room = ring->buffer_size - MESSAGE_HEADER + MESSAGE_SOURCE, max = 1u + random_below(MAX_BATCH);
    int32_t how = (int32_t)random_below(4), result, alike = 1;
    if (random_below(16) == 0)
        choose_keep(ring);
    switch (random_below(8)) {
    case 0:
        return look_at_ring(ring);
    case 1:
    case 2: {
        uint16_t heads[3];
        for (uint32_t i = 0; i < 3; i++)
            heads[i] = (uint16_t)random_below(ring->queue->num + 1u);
        result = message_ring_release(ring, heads, 1u + random_below(3));
        check(result <= 0 || result == MESSAGE_KICK, "release", result);
        return result;
    }
    default:
        result = message_ring_receive(ring, records, data, max, how);
    }
    if (result < 0) {
        check(result == VQ_BROKEN, "receive", result);
        return result;
    }
    const uint32_t count = (uint32_t)result & 0xFFFFu;
    check(count <= max, "received", result);
    check((result & ~(0xFFFF | MESSAGE_KICK | MESSAGE_MORE | MESSAGE_ALIKE)) == 0, "bits", result);
    for (uint32_t i = 0; i < count; i++) {
        check_record(l, ring, &records[i], data, max * room, how);
        alike &= !records[i].kept && records[i].dst == records[0].dst && records[i].length == records[0].length;
    }
    check(count == 0 || alike == ((result & MESSAGE_ALIKE) != 0), "alike", result);
    return result;
}

/* One call on the message ring. */
static int32_t work_ring(const struct link *l, struct message_ring *ring, struct message_record *records, uint8_t *data,
                         const uint8_t *payload)
{
    return ring->sender ? send_something(l, ring, payload) : receive_something(l, ring, records, data);
}

static int play(uint64_t seed, uint32_t *faults)
{
    state = seed;
    struct link l;
    uint32_t num = 1u << random_below(5), size = 17u + random_below(112);
    int driver_sends = (int)random_below(2), raw = (int)random_below(3) == 0;
    open_link(&l, num, size, driver_sends, (int)random_below(2));
    struct end *victim = random_below(2) ? &l.driver : &l.device;
    struct end *peer = victim == &l.driver ? &l.device : &l.driver;
    struct vq *q = &victim->queue;
    /* Of exactly the size that the calls may touch. */
    struct message_record *records = allocate(MAX_BATCH * sizeof *records);
    uint8_t *data = allocate(MAX_BATCH * (size_t)(size - MESSAGE_HEADER + MESSAGE_SOURCE));
    uint8_t *payload = allocate(3u * (size_t)size);
    struct vq_span *spans = allocate(num * sizeof *spans);
    for (uint32_t step = 0, broken = 0; step < STEPS && broken < STEPS_WHEN_BROKEN; step++) {
        broken += q->fault != 0;
        for (uint32_t times = random_below(3); times; times--)
            (void)(raw ? work_queue(&l, &peer->queue, spans) : work_ring(&l, &peer->ring, records, data, payload));
        if (q->driver == 0 && random_below(8) == 0)
            offer_chain(&l);
        if (random_below(12) == 0)
            scribble(&l);
        if (!q->fault && random_below(100) == 0) {
            (void)vq_attach(q, (uint16_t)(vq_used_index(q) - (random_below(4) ? 0 : random_below(3))));
            victim->ring.spare_count = 0; /* as of a ring that is made anew */
        }
        int was_broken = q->fault != 0;
        int32_t result = raw ? work_queue(&l, q, spans) : work_ring(&l, &victim->ring, records, data, payload);
        check(result >= VQ_SMALL, "result", result);
        check(!was_broken || result == VQ_BROKEN || result == VQ_SMALL, "no longer broken", result);
        check((result == VQ_BROKEN) == (q->fault != 0) || result == VQ_SMALL, "broken without a fault", result);
        check(q->outstanding <= num, "outstanding", q->outstanding);
    }
    int fault = q->fault;
    check(fault >= 0 && fault < FAULTS, "fault", fault);
    faults[fault]++;
    free(records);
    free(data);
    free(payload);
    free(spans);
    free((void *)(uintptr_t)l.driver.ring.keep);
    free((void *)(uintptr_t)l.device.ring.keep);
    close_link(&l);
    return fault != 0;
}

int main(int argc, char **argv)
{
    uint32_t faults[FAULTS] = {0}, broken = 0;
    check(argc == 3, "two arguments, got", argc - 1);
    uint64_t first = strtoull(argv[1], NULL, 0), rounds = strtoull(argv[2], NULL, 0);
    for (uint64_t seed = first; seed < first + rounds; seed++)
        broken += (uint32_t)play(seed, faults);
    printf("%u of %llu broken; faults", broken, (unsigned long long)rounds);
    for (int i = 1; i < FAULTS; i++)
        printf(" %u", faults[i]);
    printf("\n");
    return 0;
}
