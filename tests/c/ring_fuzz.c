/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * A peer that follows the protocol mostly, and between operations writes what it likes into the
 * rings and the buffers. Whatever it does, a call only returns a result that its header allows,
 * a broken queue stays broken, and a sanitizer finds nothing.
 *
 * Arguments: first seed, rounds. Prints how many rounds ended broken, and how often each fault.
 */
#include "ring_link.h"

#define MAX_NUM 16u
#define MAX_BATCH 8u
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

/* One call on the message ring. */
static int32_t work_ring(struct message_ring *ring, struct message_record *records, uint8_t *data, uint8_t *payload)
{
    uint32_t limit = ring->buffer_size - MESSAGE_HEADER;
    if (ring->sender) {
        uint32_t lengths[3] = {random_below(limit + 2u), random_below(limit), random_below(limit)};
        if (random_below(3) == 0)
            return message_ring_want_buffer(ring);
        if (random_below(2))
            return message_ring_send(ring, 1, 2, payload, lengths[0], (int32_t)random_below(2));
        return message_ring_send_many(ring, 1, 2, payload, lengths, 3);
    }
    if (random_below(3) == 0) {
        uint16_t heads[3];
        for (uint32_t i = 0; i < 3; i++)
            heads[i] = (uint16_t)random_below(ring->queue->num + 1u);
        return message_ring_release(ring, heads, 1u + random_below(3));
    }
    uint32_t max = 1u + random_below(MAX_BATCH);
    int32_t result = message_ring_receive(ring, records, data, max, (int32_t)random_below(2));
    if (result < 0)
        return result;
    check((uint32_t)(result & 0xFFFF) <= max, "received", result);
    for (uint32_t i = 0; i < (uint32_t)(result & 0xFFFF); i++) {
        check(records[i].length <= limit, "length", records[i].length);
        check(records[i].offset + records[i].length <= max * limit, "offset", records[i].offset);
        check(records[i].head < ring->queue->num, "head", records[i].head);
    }
    return result;
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
    uint8_t *data = allocate(MAX_BATCH * (size_t)(size - MESSAGE_HEADER));
    uint8_t *payload = allocate(3u * (size_t)size);
    struct vq_span *spans = allocate(num * sizeof *spans);
    for (uint32_t step = 0, broken = 0; step < STEPS && broken < STEPS_WHEN_BROKEN; step++) {
        broken += q->fault != 0;
        for (uint32_t times = random_below(3); times; times--)
            (void)(raw ? work_queue(&l, &peer->queue, spans) : work_ring(&peer->ring, records, data, payload));
        if (q->driver == 0 && random_below(8) == 0)
            offer_chain(&l);
        if (random_below(12) == 0)
            scribble(&l);
        if (!q->fault && random_below(100) == 0)
            (void)vq_attach(q, (uint16_t)(vq_used_index(q) - (random_below(4) ? 0 : random_below(3))));
        int was_broken = q->fault != 0;
        int32_t result = raw ? work_queue(&l, q, spans) : work_ring(&victim->ring, records, data, payload);
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
