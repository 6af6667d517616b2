/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * A peer that follows the protocol mostly, and writes what it likes into the rings and the buffers:
 * between operations and, where the ring's sources were compiled with racing_peer.h, between any two
 * loads of one. Whatever it does, a call only returns a result that its header allows, a broken
 * queue stays broken, what is private stays consistent, only memory that is this side's to write
 * changes, and a sanitizer finds nothing.
 *
 * Every choice is drawn from a random number generator (arguments: first seed, rounds) or, with
 * COVERAGE_GUIDED, from the bytes of an input that libFuzzer makes up: a round ends where they are
 * used up. Prints how many rounds ended broken, and how often each fault.
 */
#include "racing_peer.h"
#undef __atomic_load_n
#undef memcpy

#if defined(COVERAGE_GUIDED) && defined(__clang__)
/* What guides is the coverage of the ring, not of this program. */
#pragma clang attribute push(__attribute__((no_sanitize("coverage"))), apply_to = function)
#endif

#include "polling.h"
#include "ring_link.h"

#define MAX_NUM 16u
#define MAX_SIZE 128u /* of a buffer */
#define MAX_BATCH 8u
#define MAX_KEEP 5u
#define STEPS 200u
#define STEPS_WHEN_BROKEN 5u
#define FAULTS 9
#define ANNEX_SIZE 300u

/* As in virtio 1.2, 2.7.5. */
#define NEXT 1u
#define WRITE 2u
#define INDIRECT 4u

/* Memory that chains may lie in beside the pool: the next address, but somewhere else. */
static uint8_t *annex;

#ifdef COVERAGE_GUIDED

static const uint8_t *input;
static size_t input_left;

/* Takes as many bytes as the limit needs. Without any left everything is 0. */
static uint32_t random_below(uint32_t limit)
{
    uint32_t value = 0;
    for (uint32_t most = limit - 1u; most && input_left; most >>= 8, input_left--)
        value = value << 8 | *input++;
    return value % limit;
}

static int goes_on(void)
{
    return input_left != 0;
}

#else

static uint64_t state;

static uint32_t random_below(uint32_t limit) /* splitmix64 */
{
    uint64_t z = (state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (uint32_t)((z ^ (z >> 31)) % limit);
}

static int goes_on(void)
{
    return 1;
}

#endif

static uint32_t pool_size(const struct link *l)
{
    return l->num * l->buffer_size;
}

/* Where `length` bytes at `pa` are, or NULL: found another way than the ring does. */
static uint8_t *at_pa(const struct link *l, uint64_t pa, uint64_t length)
{
    const uint64_t pool_end = POOL_PA + pool_size(l), annex_end = pool_end + ANNEX_SIZE;
    if (pa > annex_end || length > annex_end - pa || pa < POOL_PA)
        return NULL;
    if (pa + length <= pool_end)
        return l->pool + (pa - POOL_PA);
    return pa >= pool_end ? annex + (pa - pool_end) : NULL;
}

static uint64_t random_pa(const struct link *l)
{
    return POOL_PA + (random_below(8) ? random_below(pool_size(l)) : pool_size(l) + random_below(ANNEX_SIZE));
}

static uint64_t interesting(const struct link *l)
{
    switch (random_below(8)) {
    case 0:
        return random_below(2u * l->num + 2u);
    case 1:
        return random_pa(l);
    case 2:
        return POOL_PA + pool_size(l) + (random_below(2) ? ANNEX_SIZE : 0) - random_below(40);
    case 3:
        return random_below(8); /* flags */
    case 4:
        return 16u * random_below(l->num + 2u);
    case 5:
        return UINT64_MAX - random_below(32);
    case 6:
        return POOL_PA - random_below(40);
    default:
        return (uint64_t)random_below(UINT32_MAX) << random_below(33);
    }
}

/* What was in shared memory before a call, and what the peer wrote meanwhile. */
static struct {
    uint8_t ring[16u * MAX_NUM + 2u * (3u + MAX_NUM) + USED_ALIGN + 2u * 3u + 8u * MAX_NUM];
    uint8_t pool[MAX_NUM * MAX_SIZE];
    uint8_t annex[ANNEX_SIZE];
    uint8_t writable[MAX_NUM * MAX_SIZE + ANNEX_SIZE]; /* by a device that sends: pool, then annex */
    int may_turn; /* a table lies in what may be written: a message of the call may change what it says */
} before;

/* The peer writes, in shared memory. */
static void poke(const struct link *l, uint8_t *at, const void *value, size_t size)
{
    memcpy(at, value, size);
    if (at >= l->ring && at < l->ring + l->ring_size)
        memcpy(before.ring + (at - l->ring), value, size);
    else if (at >= l->pool && at < l->pool + pool_size(l))
        memcpy(before.pool + (at - l->pool), value, size);
    else
        memcpy(before.annex + (at - annex), value, size);
}

static void poke16(const struct link *l, uint8_t *at, uint32_t value)
{
    uint16_t word = (uint16_t)value;
    poke(l, at, &word, sizeof word);
}

/* Writes one value of 2, 4 or 8 bytes somewhere in what is shared. */
static void scribble(const struct link *l)
{
    uint64_t value = interesting(l);
    uint32_t size = 2u << random_below(3), in = random_below(8);
    uint8_t *where = in == 0 ? annex : in <= 2 ? l->pool : l->ring;
    uint32_t room = in == 0 ? ANNEX_SIZE : in <= 2 ? pool_size(l) : l->ring_size;
    uint32_t at = random_below((room - size) / 2u + 1u) * 2u;
    if (where == l->ring && (at == 16u * l->num + 2u || at == l->used_offset + 2u) && random_below(8))
        return; /* an index that jumps ends a round: not too often */
    poke(l, where + at, &value, size);
}

/* The peer's writes between the loads of one call: none while there is no link. */
static struct {
    const struct link *link;
    uint32_t loads; /* to the next write; 0: there is none */
    int written;    /* in this call */
} race;

void before_load(const volatile void *from, size_t size)
{
    const struct link *l = race.link;
    uint8_t *at = (uint8_t *)(uintptr_t)from;
    if (!race.loads || size == 0)
        return;
    int in_ring = at >= l->ring && at < l->ring + l->ring_size, in_pool = at >= l->pool && at < l->pool + pool_size(l);
    if ((!in_ring && !in_pool && (at < annex || at >= annex + ANNEX_SIZE)) || --race.loads)
        return;
    uint64_t value = 0;
    race.written = 1;
    size = size < sizeof value ? size : sizeof value;
    memcpy(&value, at, size);
    switch (random_below(4)) {
    case 0:
        scribble(l);
        break;
    case 1:
        value = interesting(l);
        poke(l, at, &value, size);
        break;
    default:
        value += (uint64_t)random_below(8) - 3u;
        poke(l, at, &value, size);
    }
    race.loads = random_below(2) == 1 ? 1u + random_below(8) : 0;
}

/* As a driver does it, but with any descriptors: a chain of up to `entries`, perhaps indirect, in
 * `table` from `position` on. */
static void forge_chain(const struct link *l, uint8_t *table, uint32_t entries, uint32_t position, uint32_t depth)
{
    uint32_t writes = random_below(2);
    for (uint32_t left = random_below(random_below(4) ? 4 : entries + 2u); position < entries; left--) {
        uint64_t addr = random_pa(l);
        uint32_t length = random_below(left ? 40 : 200), next = random_below(entries);
        if (random_below(16) == 1)
            next = random_below(entries + 2u);
        if (random_below(8) == 1)
            writes = !writes;
        uint16_t flags = (uint16_t)((writes ? WRITE : 0u) | (left ? NEXT : 0u));
        if (!left && random_below(4) == 0) {
            flags = (uint16_t)(INDIRECT | (random_below(16) == 1 ? random_below(4) : 0u));
            length = 16u * (1u + random_below(l->num + 1u)) + (random_below(32) == 1);
            if (random_below(8) != 1)
                addr &= ~(uint64_t)7;
            uint8_t *inner = at_pa(l, addr, length);
            if (inner && depth < 2)
                forge_chain(l, inner, length / 16u, 0, depth + 1u);
        }
        uint8_t *at = table + 16u * position;
        poke(l, at, &addr, 8);
        poke(l, at + 8, &length, 4);
        poke16(l, at + 12, flags);
        poke16(l, at + 14, next);
        position = next;
        if (!left)
            break;
    }
}

/* Puts an entry into the peer's ring at `at`, and goes on with its index. */
static void forge_entry(const struct link *l, struct vq *peer, uint8_t *at, const void *entry, uint32_t size)
{
    uint16_t idx;
    memcpy(&idx, at + 2, 2);
    poke(l, at + 4 + size * (idx % l->num), entry, size);
    idx = (uint16_t)(idx + (random_below(16) == 1 ? random_below(l->num + 2u) : 1u));
    poke(l, at + 2, &idx, 2);
    peer->next = peer->published = idx; /* what it does next comes after this */
}

static void forge_header(const struct link *l, uint64_t pa)
{
    uint32_t words[4] = {random_below(8) == 1 ? MESSAGE_ANY : 1u, random_below(8), 0, random_below(2u * l->buffer_size)};
    uint8_t *at = at_pa(l, pa, sizeof words);
    if (random_below(8) == 1)
        words[3] = (uint32_t)interesting(l);
    if (at)
        poke(l, at, words, sizeof words);
}

static void offer_chain(const struct link *l, struct vq *peer)
{
    uint16_t head = (uint16_t)random_below(l->num + (random_below(16) == 1));
    forge_chain(l, l->ring, l->num, head, 0);
    if (random_below(2) && head < l->num) {
        uint64_t addr;
        memcpy(&addr, l->ring + 16u * head, sizeof addr);
        forge_header(l, addr);
    }
    forge_entry(l, peer, l->ring + 16u * l->num, &head, sizeof head);
}

/* As a device does it, but any chain: also one that it does not have, or twice, or out of order. */
static void return_chain(const struct link *l, struct vq *peer)
{
    uint32_t element[2] = {random_below(l->num + (random_below(16) == 1)), random_below(2u * l->buffer_size)};
    if (random_below(8) == 1)
        element[random_below(2)] = (uint32_t)interesting(l);
    if (random_below(2))
        forge_header(l, POOL_PA + (uint64_t)element[0] * l->buffer_size);
    forge_entry(l, peer, l->ring + l->used_offset, element, sizeof element);
}

static void look_at_bytes(const uint8_t *bytes, uint32_t length)
{
    volatile uint8_t sum = 0; /* a sanitizer looks at each */
    for (uint32_t at = 0; at < length; at++)
        sum = (uint8_t)(sum + bytes[at]);
}

static void check_spans(const struct link *l, const struct vq_span *spans, uint32_t count)
{
    check(count >= 1 && count <= l->num, "spans", count);
    for (uint32_t i = 0; i < count; i++) {
        check(spans[i].base && spans[i].base == at_pa(l, spans[i].pa, spans[i].length), "span outside", i);
        check(i == 0 || spans[i].writable || !spans[i - 1].writable, "order", i);
        look_at_bytes(spans[i].base, spans[i].length);
    }
}

struct descriptor {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

static struct descriptor descriptor_at(const uint8_t *table, uint32_t position)
{
    struct descriptor d;
    memcpy(&d, table + 16u * position, sizeof d);
    return d;
}

/* What vq_get_available must find from `head` on, in memory that nobody writes meanwhile: how many
 * spans, or 0 where it must refuse the chain. */
static uint32_t walk(const struct link *l, const struct vq *q, uint32_t head, uint32_t max, struct vq_span *spans)
{
    const uint8_t *table = l->ring;
    uint32_t entries = l->num, position = head, steps = 0, count = 0;
    for (;;) {
        if (position >= entries || steps++ == entries)
            return 0;
        const struct descriptor d = descriptor_at(table, position);
        uint8_t *base = at_pa(l, d.addr, d.len);
        const uint32_t writable = d.flags & WRITE ? 1 : 0;
        if (!base)
            return 0;
        if (d.flags & INDIRECT) {
            if (!q->indirect || table != l->ring || d.flags & NEXT || d.len == 0 || d.len % 16u ||
                d.len / 16u > l->num || (uintptr_t)base % 8u)
                return 0;
            table = base;
            entries = d.len / 16u;
            position = steps = 0;
            continue;
        }
        if (count == max || (count && spans[count - 1u].writable && !writable))
            return 0;
        spans[count++] = (struct vq_span){.pa = d.addr, .base = base, .length = d.len, .writable = writable};
        if (!(d.flags & NEXT))
            return count;
        position = d.next;
    }
}

/* What vq_get_available said, or why it broke the queue. */
static void check_chain(const struct link *l, const struct vq *q, int32_t head, const struct vq_span *spans,
                        uint32_t count, uint32_t max)
{
    struct vq_span expected[MAX_NUM];
    uint16_t next;
    memcpy(&next, l->ring + 16u * l->num + 4u + 2u * (q->seen % l->num), sizeof next);
    if (race.written)
        return;
    if (head >= 0) {
        check(walk(l, q, (uint32_t)head, max, expected) == count, "another count of spans", count);
        for (uint32_t i = 0; i < count; i++) {
            check(spans[i].pa == expected[i].pa && spans[i].length == expected[i].length &&
                      spans[i].writable == expected[i].writable,
                  "another span", i);
        }
    } else if (q->fault >= VQ_FAULT_NEXT_RANGE) {
        check(walk(l, q, next, max, expected) == 0, "a good chain refused", q->fault);
    }
}

/* What is private of a queue without a fault, all of it against all else. */
static void check_queue(const struct vq *q)
{
    const uint32_t num = q->num, hidden = (uint16_t)(q->next - q->published), known = (uint16_t)(q->limit - q->seen);
    uint32_t out = 0, met = 0, free_count = 0, visits[MAX_NUM] = {0};
    for (uint32_t i = 0; i < num; i++) {
        const struct vq_slot *slot = &q->slots[i];
        uint32_t position = i;
        out += slot->state == VQ_SLOT_OUT || slot->state == VQ_SLOT_INHERITED;
        check(slot->state <= (q->driver ? VQ_SLOT_INHERITED : VQ_SLOT_OUT), "state", slot->state);
        if (slot->state == VQ_SLOT_FREE || !q->driver)
            continue;
        for (uint32_t left = slot->extent; left; left--, position = q->slots[position].next) {
            check(position < num && !visits[position]++, "chain", position);
            met++;
        }
    }
    check(out == q->outstanding, "outstanding", q->outstanding);
    if (!q->driver) {
        check(out + hidden + known <= num, "device: chains counted twice", out + hidden + known);
        return;
    }
    for (uint32_t position = q->free_head; free_count < q->free_count; position = q->slots[position].next) {
        check(position < num && !visits[position]++, "free list", position);
        check(q->slots[position].state == VQ_SLOT_FREE, "free, and not", position);
        free_count++;
    }
    check(met + free_count == num, "descriptors lost", met + free_count);
    check(hidden + known <= out, "driver: chains counted twice", hidden + known);
}

static void check_ring(const struct message_ring *ring)
{
    const struct vq *q = ring->queue;
    uint32_t visits[MAX_NUM] = {0};
    check(ring->spare_count <= q->outstanding, "spares", ring->spare_count);
    for (uint32_t i = 0; i < ring->spare_count; i++) {
        check(ring->spares[i] < q->num && !visits[ring->spares[i]]++, "spare", ring->spares[i]);
        check(q->slots[ring->spares[i]].state == VQ_SLOT_OUT, "spare, and not out", ring->spares[i]);
    }
}

static void mark(const struct link *l, uint64_t pa, uint32_t length)
{
    if (at_pa(l, pa, length))
        memset(before.writable + (pa - POOL_PA), 1, length);
}

static void mark_table(const struct link *l, const uint8_t *table, uint32_t entries)
{
    for (uint32_t i = 0; i < entries; i++) {
        const struct descriptor d = descriptor_at(table, i);
        const uint8_t *inner = d.flags & INDIRECT && table == l->ring ? at_pa(l, d.addr, d.len) : NULL;
        if (inner)
            mark_table(l, inner, d.len / 16u);
        else if (d.flags & WRITE)
            mark(l, d.addr, d.len);
    }
}

/* Whether any byte of a table that is not in the ring may be written. */
static int table_may_turn(const struct link *l)
{
    for (uint32_t i = 0; i < l->num; i++) {
        const struct descriptor d = descriptor_at(l->ring, i);
        if (d.flags & INDIRECT && at_pa(l, d.addr, d.len) && memchr(before.writable + (d.addr - POOL_PA), 1, d.len))
            return 1;
    }
    return 0;
}

/* Notes what a device may write now: what descriptors say, and the buffers it has. */
static void mark_writable(const struct link *l, const struct message_ring *ring)
{
    const struct vq *q = ring->queue;
    if (q->driver || !ring->sender)
        return;
    memset(before.writable, 0, pool_size(l) + ANNEX_SIZE);
    mark_table(l, l->ring, l->num);
    for (uint32_t i = 0; i < l->num; i++) {
        if (q->slots[i].state == VQ_SLOT_OUT)
            mark(l, ring->places[i] - MESSAGE_HEADER, q->slots[i].extent);
    }
    before.may_turn = table_may_turn(l);
}

static void check_changes(const uint8_t *was, const uint8_t *is, const uint8_t *writable, uint32_t size)
{
    if (memcmp(was, is, size) == 0)
        return;
    for (uint32_t i = 0; i < size; i++)
        check(writable[i] || was[i] == is[i], "wrote where it may not", i);
}

/* Shared memory changed only where this side may write it. */
static void check_written(const struct link *l, const struct vq *q, int may_write_pool)
{
    const uint32_t available_end = 16u * l->num + 2u * (3u + l->num), from = q->driver ? available_end : 0;
    const uint32_t to = q->driver ? l->ring_size : l->used_offset;
    check(memcmp(before.ring + from, l->ring + from, to - from) == 0, "wrote in the other side's ring", q->driver);
    if (!may_write_pool) {
        check(memcmp(before.pool, l->pool, pool_size(l)) == 0, "wrote in the pool", q->driver);
        check(memcmp(before.annex, annex, ANNEX_SIZE) == 0, "wrote in the annex", q->driver);
    } else if (!q->driver && !race.written && !before.may_turn) {
        check_changes(before.pool, l->pool, before.writable, pool_size(l));
        check_changes(before.annex, annex, before.writable + pool_size(l), ANNEX_SIZE);
    }
}

/* One call on the queue itself. Returns what it returned. */
static int32_t work_queue(const struct link *l, struct vq *q, struct vq_span *spans)
{
    uint32_t value = 0;
    int32_t head;
    switch (random_below(8)) {
    case 0:
        return vq_publish(q);
    case 1:
        vq_notify_off(q);
        return vq_notify_on(q);
    case 2:
        return vq_pending(q);
    case 3:
        if (!q->driver)
            return vq_put_used(q, (uint16_t)random_below(l->num + 2u), 7);
        spans[0] = (struct vq_span){.pa = POOL_PA, .length = 1, .writable = random_below(2)};
        value = random_below(l->num + 2u);
        head = vq_add_again(q, (uint16_t)value, spans);
        check(head < 0 || (head == 0 && q->slots[value].extent == 1), "added again", value);
        return head;
    case 4:
        if (!q->driver)
            return vq_put_used(q, (uint16_t)random_below(l->num), (uint32_t)interesting(l));
        for (uint32_t i = 0; i < l->num; i++)
            spans[i] = (struct vq_span){.pa = POOL_PA, .length = 1};
        value = random_below(l->num + 1u);
        return vq_add(q, spans, value, random_below(l->num - value + 1u));
    default:
        if (q->driver) {
            head = random_below(2) ? vq_get_used(q, &value) : vq_hold_used(q, &value);
        } else {
            const uint32_t max = random_below(8) == 1 ? random_below(l->num) : l->num;
            const int was_broken = q->fault != 0;
            head = vq_get_available(q, spans, max, &value);
            if (!was_broken)
                check_chain(l, q, head, spans, value, max);
            if (head >= 0) {
                check(value <= max, "more spans than asked", value);
                check_spans(l, spans, value);
                if (random_below(8) == 0)
                    vq_unget_available(q, (uint16_t)head);
            }
        }
        check(head < (int32_t)l->num, "head", head);
        return head;
    }
}

/* A place that the ring names: all of its bytes are in memory. */
static uint8_t *find_place(const struct link *l, const struct message_ring *ring, uint32_t head, uint32_t length)
{
    check(head < l->num, "head", head);
    uint8_t *place = at_pa(l, ring->places[head], length);
    check(place != NULL, "place", (long long)ring->places[head]);
    return place;
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
        result = poll_rings(ring, random_below(2) ? ring : NULL, random_below(2));
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
    if (record->kept != wanted) /* in parts: copied */
        check(wanted == MESSAGE_IN_PLACE && record->kept == MESSAGE_KEPT && !q->driver, "kept", record->kept);
    if (record->kept) {
        const uint16_t held = q->driver ? VQ_SLOT_HELD : VQ_SLOT_OUT;
        check(q->slots[record->head].state == held, "kept, and not held", record->head);
    }
    if (record->kept == MESSAGE_IN_PLACE) {
        look_at_bytes(find_place(l, ring, record->head, record->length), record->length);
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
    int32_t how = (int32_t)random_below(4), result, even = 1, alike = 1;
    if (random_below(16) == 0)
        choose_keep(ring);
    switch (random_below(8)) {
    case 0:
        return look_at_ring(ring);
    case 1:
    case 2: {
        const struct vq *q = ring->queue;
        uint16_t heads[3];
        const uint32_t count = 1u + random_below(3);
        int kept = 1;
        for (uint32_t i = 0; i < count; i++) {
            heads[i] = (uint16_t)random_below(q->num + 1u);
            kept &= heads[i] < q->num && q->slots[heads[i]].state == (q->driver ? VQ_SLOT_HELD : VQ_SLOT_OUT);
        }
        result = message_ring_release(ring, heads, count);
        check(result <= 0 || result == MESSAGE_KICK, "release", result);
        check(q->fault || (result != VQ_EMPTY) == kept, "kept, and not released", result);
        return result;
    }
    case 3:
        if (!ring->queue->driver)
            return message_ring_want_buffer(ring);
        result = message_ring_fill(ring);
        check(result <= 0, "fill", result);
        return or_broken(ring, result);
    case 4:
        result = poll_receive(ring, random_below(2) ? ring : NULL, random_below(2), records, data, max, how);
        check(result < 0 || (result & POLL_TRIED) || !(result & POLL_HIT), "hit, and not tried", result);
        if (result >= 0)
            result &= ~(POLL_TRIED | POLL_HIT);
        break;
    default:
        result = message_ring_receive(ring, records, data, max, how);
    }
    if (result < 0) {
        check(result == VQ_BROKEN, "receive", result);
        return result;
    }
    const uint32_t count = (uint32_t)result & 0xFFFFu;
    check(count <= max, "received", result);
    check((result & ~(0xFFFF | MESSAGE_KICK | MESSAGE_MORE | MESSAGE_ALIKE | MESSAGE_EVEN)) == 0, "bits", result);
    for (uint32_t i = 0; i < count; i++) {
        check_record(l, ring, &records[i], data, max * room, how);
        even &= !records[i].kept && records[i].length == records[0].length;
        alike &= records[i].dst == records[0].dst;
    }
    check(count == 0 || (even && alike) == ((result & MESSAGE_ALIKE) != 0), "alike", result);
    check(count == 0 || (even && !alike) == ((result & MESSAGE_EVEN) != 0), "even", result);
    return result;
}

/* One call on the message ring. */
static int32_t work_ring(const struct link *l, struct message_ring *ring, struct message_record *records, uint8_t *data,
                         const uint8_t *payload)
{
    return ring->sender ? send_something(l, ring, payload) : receive_something(l, ring, records, data);
}

/* Another driver goes on where this one left: with what that had out, or with anything. */
static void take_over(struct end *end)
{
    struct vq *q = &end->queue;
    uint16_t heads[MAX_NUM + 2u], count = 0, available = q->next;
    if (random_below(2))
        vq_leave(q);
    for (uint16_t i = 0; i < q->num; i++) {
        if (q->slots[i].state == VQ_SLOT_OUT || q->slots[i].state == VQ_SLOT_INHERITED)
            heads[count++] = i;
    }
    switch (random_below(8)) {
    case 1:
        count = (uint16_t)random_below(q->num + 2u);
        for (uint16_t i = 0; i < count; i++)
            heads[i] = (uint16_t)random_below(q->num + 1u);
        break;
    case 2:
        available = (uint16_t)(vq_used_index(q) + random_below(q->num + 2u));
        break;
    case 3:
        available = vq_available_index(q);
        break;
    default:
        break;
    }
    /* Free descriptors may get other buffers. */
    const uint32_t one = random_below(q->num), other = random_below(q->num), offset = end->offsets[one];
    end->offsets[one] = end->offsets[other];
    end->offsets[other] = offset;
    int32_t result = vq_resume(q, available, heads, count, end->ring.buffer_size);
    check((result == VQ_BROKEN) == (q->fault != 0) && result <= 0, "resume", result);
    check(q->fault || (q->outstanding == count && q->free_count == q->num - count), "resumed with others", count);
}

/* A peer, or this side, that begins anew with what is in memory. */
static void attach(struct end *end)
{
    struct vq *q = &end->queue;
    uint16_t seen = q->seen;
    if (q->driver && random_below(2)) {
        take_over(end);
        return;
    }
    switch (random_below(8)) {
    case 1:
        seen = (uint16_t)(vq_used_index(q) - random_below(q->num + 2u));
        break;
    case 2:
        seen = (uint16_t)(vq_available_index(q) - random_below(q->num + 2u));
        break;
    case 3:
        seen = vq_used_index(q);
        break;
    default:
        break;
    }
    int32_t result = vq_attach(q, seen);
    check((result == VQ_BROKEN) == (q->fault != 0) && result <= 0, "attach", result);
    end->ring.spare_count = 0; /* as of a ring that is made anew */
}

/* What the peer does that is not in the protocol. */
static void attack(const struct link *l, struct vq *peer)
{
    switch (random_below(24)) {
    case 0:
        scribble(l);
        break;
    case 1:
        forge_header(l, random_pa(l));
        break;
    case 2:
        if (peer->driver)
            offer_chain(l, peer);
        else
            return_chain(l, peer);
        break;
    default:
        break;
    }
}

/* One call of the victim, while the peer may write. */
static void take_step(const struct link *l, struct end *victim, int raw, struct vq_span *spans,
                      struct message_record *records, uint8_t *data, const uint8_t *payload)
{
    struct vq *q = &victim->queue;
    const int was_broken = q->fault != 0;
    memcpy(before.ring, l->ring, l->ring_size);
    memcpy(before.pool, l->pool, pool_size(l));
    memcpy(before.annex, annex, ANNEX_SIZE);
    mark_writable(l, &victim->ring);
    race.link = l;
    race.written = 0;
    race.loads = random_below(16) == 1 ? 1u + random_below(16) : 0;
    int32_t result = VQ_BROKEN;
    if (!was_broken && random_below(128) == 1)
        attach(victim), result = q->fault ? VQ_BROKEN : 0;
    else
        result = raw ? work_queue(l, q, spans) : work_ring(l, &victim->ring, records, data, payload);
    race.loads = 0;
    check(result >= VQ_SMALL, "result", result);
    check(!was_broken || result == VQ_BROKEN, "no longer broken", result);
    /* Messages that came before a fault are received; the next call tells. */
    int came_before = q->fault && !raw && !victim->ring.sender && !was_broken && result > 0;
    check(came_before || (result == VQ_BROKEN) == (q->fault != 0), "broken without a fault", result);
    check_written(l, q, !raw && victim->ring.sender);
    if (q->fault)
        return;
    check_queue(q);
    check_ring(&victim->ring);
}

/* One round. Returns the fault that it ended with. */
static int play(void)
{
    struct link l;
    uint32_t num = 1u << random_below(5), size = 17u + random_below(MAX_SIZE - 16u);
    int driver_sends = (int)random_below(2), raw = random_below(3) == 0, event_idx = (int)random_below(2);
    open_link(&l, num, size, driver_sends, event_idx);
    annex = allocate(ANNEX_SIZE);
    struct end *victim = random_below(2) ? &l.driver : &l.device;
    struct end *peer = victim == &l.driver ? &l.device : &l.driver;
    struct vq *q = &victim->queue;
    const struct vq_region regions[2] = {
        {.pa = POOL_PA, .size = pool_size(&l), .base = l.pool},
        {.pa = POOL_PA + pool_size(&l), .size = ANNEX_SIZE, .base = annex},
    };
    l.device.queue.regions = regions;
    l.device.queue.region_count = 2;
    l.device.queue.indirect = random_below(4) != 1;
    /* Of exactly the size that the calls may touch. */
    struct message_record *records = allocate(MAX_BATCH * sizeof *records);
    uint8_t *data = allocate(MAX_BATCH * (size_t)(size - MESSAGE_HEADER + MESSAGE_SOURCE));
    uint8_t *payload = allocate(3u * (size_t)size);
    struct vq_span *spans = allocate(num * sizeof *spans);
    for (uint32_t step = 0, broken = 0; step < STEPS && broken < STEPS_WHEN_BROKEN && goes_on(); step++) {
        broken += q->fault != 0;
        if (peer->queue.fault && random_below(4) == 1)
            attach(peer);
        for (uint32_t times = random_below(3); times; times--)
            (void)(raw ? work_queue(&l, &peer->queue, spans) : work_ring(&l, &peer->ring, records, data, payload));
        attack(&l, &peer->queue);
        take_step(&l, victim, raw, spans, records, data, payload);
    }
    int fault = q->fault;
    check(fault >= 0 && fault < FAULTS, "fault", fault);
    free(records);
    free(data);
    free(payload);
    free(spans);
    free(annex);
    free((void *)(uintptr_t)l.driver.ring.keep);
    free((void *)(uintptr_t)l.device.ring.keep);
    close_link(&l);
    return fault;
}

static unsigned long long rounds, ended[FAULTS]; /* by fault */

static void play_one(void)
{
    rounds++;
    ended[play()]++;
}

static void print_summary(void)
{
    printf("%llu of %llu broken; faults", rounds - ended[0], rounds);
    for (int i = 1; i < FAULTS; i++)
        printf(" %llu", ended[i]);
    printf("\n");
}

#ifdef COVERAGE_GUIDED

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    check(atexit(print_summary) == 0, "atexit", 0);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    input = bytes;
    input_left = size;
    play_one();
    return 0;
}

#else

int main(int argc, char **argv)
{
    check(argc == 3, "two arguments, got", argc - 1);
    uint64_t first = strtoull(argv[1], NULL, 0), count = strtoull(argv[2], NULL, 0);
    for (uint64_t seed = first; seed < first + count; seed++) {
        state = seed;
        play_one();
    }
    print_summary();
    return 0;
}

#endif

#if defined(COVERAGE_GUIDED) && defined(__clang__)
#pragma clang attribute pop
#endif
