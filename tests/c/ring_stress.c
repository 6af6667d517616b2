/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * A driver thread and a device thread that move messages both ways at once and check every
 * byte. A side with nothing to do sleeps on a doorbell, so a wake-up that is lost hangs the
 * program; its caller has a timeout. For a thread sanitizer there is also `spin`: no doorbell,
 * so that nothing but the rings orders the two threads.
 *
 * Arguments: sleep or spin, messages each way, entries of a ring, and 1 for EVENT_IDX.
 */
#include "polling.h"
#include "ring_link.h"

#include <pthread.h>
#include <sched.h>

#define BUFFER_SIZE 64u
#define MAX_NUM 256u
#define MAX_BATCH 16u
#define LIMIT (BUFFER_SIZE - MESSAGE_HEADER)
#define POLL_NS 2000u

struct doorbell {
    pthread_mutex_t lock;
    pthread_cond_t rung;
    uint32_t count;
};

struct side {
    struct message_ring *sending, *receiving;
    struct doorbell *own, *other;
    uint32_t total, sent, received, random, held_count;
    int spin;
    int starved; /* no buffer was free */
    int quiet;   /* the last receive may have left the ring without notifications */
    uint16_t held[MAX_NUM];
    struct message_record records[MAX_BATCH];
    uint8_t data[MAX_BATCH * (LIMIT + MESSAGE_SOURCE)];
};

static uint32_t next_random(struct side *side) /* xorshift32 */
{
    side->random ^= side->random << 13;
    side->random ^= side->random >> 17;
    side->random ^= side->random << 5;
    return side->random;
}

static void ring(struct doorbell *bell)
{
    pthread_mutex_lock(&bell->lock);
    bell->count++;
    pthread_cond_signal(&bell->rung);
    pthread_mutex_unlock(&bell->lock);
}

static void sleep_until_rung(struct doorbell *bell)
{
    pthread_mutex_lock(&bell->lock);
    while (bell->count == 0)
        pthread_cond_wait(&bell->rung, &bell->lock);
    bell->count = 0;
    pthread_mutex_unlock(&bell->lock);
}

static void kick(const struct side *side)
{
    if (!side->spin)
        ring(side->other);
}

/* What message `number` is made of. */
static uint32_t length_of(uint32_t number)
{
    return number * 31u % (LIMIT + 1u);
}

static uint8_t byte_of(uint32_t number, uint32_t position)
{
    return (uint8_t)(number * 7u + position);
}

static uint32_t build(uint8_t *payload, uint32_t number)
{
    uint32_t length = length_of(number);
    for (uint32_t i = 0; i < length; i++)
        payload[i] = byte_of(number, i);
    return length;
}

/* Some go to destinations whose buffers the other side keeps now and then. */
static uint32_t destination_of(uint32_t number)
{
    return number / 4u % 5u;
}

static const struct message_keep keep[] = {{1, MESSAGE_KEPT}, {3, MESSAGE_IN_PLACE}, {4, MESSAGE_IN_PLACE}};

/* Where in this process a reserved or kept buffer's payload is. */
static uint8_t *place_of(const struct message_ring *ring, uint32_t head)
{
    const struct vq_region *region = ring->queue->regions;
    return region->base + (ring->places[head] - region->pa);
}

/* One message. Results as of message_ring_send. */
static int32_t send_one(struct side *side)
{
    uint8_t payload[LIMIT];
    uint32_t length = build(payload, side->sent);
    int32_t result = message_ring_send(side->sending, side->sent, destination_of(side->sent), payload, length);
    side->sent += result >= 0;
    return result;
}

/* Some that have the source of the first and its destination. */
static int32_t send_many(struct side *side)
{
    uint8_t payload[4 * LIMIT], *next = payload;
    uint32_t lengths[4], count = 0, destination = destination_of(side->sent);
    while (count < 4 && side->sent + count < side->total && destination_of(side->sent + count) == destination) {
        lengths[count] = build(next, side->sent + count);
        next += lengths[count++];
    }
    int32_t result = message_ring_send_many(side->sending, side->sent, destination, payload, lengths, count);
    if (result < 0)
        return result;
    side->sent += (uint32_t)result & 0xFFFFu;
    return (result & MESSAGE_KICK) != 0;
}

/* One or two that are built in their buffers, and perhaps a third buffer that is not used. */
static int32_t send_reserved(struct side *side)
{
    uint32_t count = 0, capacity, want = 1u + next_random(side) % 3u;
    int32_t heads[3] = {0}, result = 0;
    while (count < want && (heads[count] = message_ring_reserve(side->sending, &capacity)) >= 0) {
        check(capacity == LIMIT, "capacity", capacity);
        count++;
    }
    check(count || heads[0] == VQ_EMPTY, "reserve", heads[0]);
    if (count == 0)
        return VQ_EMPTY;
    for (uint32_t i = 0; i < count; i++) {
        uint16_t head = (uint16_t)heads[i];
        if (i == 2 || side->sent == side->total) {
            check(message_ring_cancel(side->sending, head) == 0, "cancel", head);
            continue;
        }
        uint32_t length = build(place_of(side->sending, head), side->sent);
        int32_t kicks = message_ring_commit(side->sending, head, side->sent, destination_of(side->sent), length);
        check(kicks >= 0, "commit", kicks);
        result |= kicks;
        side->sent++;
    }
    return result;
}

/* Sends some messages. Returns whether it may go on without a notification. */
static int send_some(struct side *side)
{
    side->starved = 0;
    for (uint32_t burst = next_random(side) % 32u; burst && side->sent < side->total; burst--) {
        uint32_t how = next_random(side) % 4u;
        int32_t result = how == 0 ? send_many(side) : how == 1 ? send_reserved(side) : send_one(side);
        if (result == VQ_EMPTY) {
            side->starved = message_ring_want_buffer(side->sending) == 0;
            return !side->starved;
        }
        check(result >= 0, "send", result);
        vq_notify_off(side->sending->queue);
        if (result)
            kick(side);
    }
    return side->sent < side->total;
}

static void release_all(struct side *side)
{
    for (uint32_t i = side->held_count; i > 1; i--) { /* in any order */
        uint32_t j = next_random(side) % i;
        uint16_t head = side->held[j];
        side->held[j] = side->held[i - 1];
        side->held[i - 1] = head;
    }
    int32_t result = message_ring_release(side->receiving, side->held, side->held_count);
    check(result >= 0, "release", result);
    side->held_count = 0;
    if (result)
        kick(side);
}

/* Receives some messages. Returns whether there may be more without a notification. */
static int receive_some(struct side *side)
{
    int how = (int)(next_random(side) % 4u);
    side->receiving->keep = keep;
    side->receiving->keep_count = next_random(side) % 2u ? (uint32_t)(sizeof keep / sizeof *keep) : 0;
    int32_t result = message_ring_receive(side->receiving, side->records, side->data, MAX_BATCH, how);
    check(result >= 0, "receive", result);
    for (uint32_t i = 0; i < (uint32_t)(result & 0xFFFF); i++) {
        const struct message_record *record = &side->records[i];
        uint32_t number = side->received++;
        const uint8_t *payload = record->kept == MESSAGE_IN_PLACE ? place_of(side->receiving, record->head)
                                                                  : side->data + record->offset;
        /* Those sent in one call have the number of the first for their source. */
        check(record->src <= number && number - record->src < 4, "out of order", number);
        check(record->dst == destination_of(number), "destination", record->dst);
        check(record->length == length_of(number), "length", record->length);
        for (uint32_t at = 0; at < record->length; at++)
            check(payload[at] == byte_of(number, at), "content", number);
        if (record->kept)
            side->held[side->held_count++] = (uint16_t)record->head;
        else
            check(how & MESSAGE_GIVE_BACK, "not kept", number);
    }
    if (result & MESSAGE_KICK)
        kick(side);
    if (side->held_count && (side->held_count > side->receiving->queue->num / 2u || !(result & MESSAGE_MORE)))
        release_all(side);
    side->quiet = (how & MESSAGE_STAY_QUIET) != 0;
    return (result & MESSAGE_MORE) != 0;
}

/* Looks for a moment before it sleeps, now and then. Returns whether there is something. */
static int look_around(struct side *side)
{
    int polls = next_random(side) % 2u == 0;
    if (polls && poll_rings(side->receiving, side->starved ? side->sending : NULL, POLL_NS))
        return 1;
    if (side->spin)
        return 0;
    /* What left the rings quiet must ask again before it sleeps. */
    int busy = (polls || side->quiet) && vq_notify_on(side->receiving->queue);
    if (polls && side->starved)
        busy |= message_ring_want_buffer(side->sending);
    return busy;
}

static void *work(void *argument)
{
    struct side *side = argument;
    while (side->sent < side->total || side->received < side->total) {
        int busy = send_some(side);
        busy |= receive_some(side);
        if (busy || (side->sent == side->total && side->received == side->total) || look_around(side))
            continue;
        if (side->spin)
            sched_yield();
        else
            sleep_until_rung(side->own);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    static struct doorbell bells[2] = {{PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0},
                                       {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0}};
    static struct side sides[2];
    check(argc == 5, "four arguments, got", argc - 1);
    int spin = strcmp(argv[1], "spin") == 0, event_idx = atoi(argv[4]);
    uint32_t total = (uint32_t)atoi(argv[2]), num = (uint32_t)atoi(argv[3]);
    check(num >= 1 && num <= MAX_NUM, "entries", num);
    struct link down, up;
    open_link(&down, num, BUFFER_SIZE, 1, event_idx);
    open_link(&up, num, BUFFER_SIZE, 0, event_idx);
    for (int i = 0; i < 2; i++) {
        sides[i].own = &bells[i];
        sides[i].other = &bells[1 - i];
        sides[i].total = total;
        sides[i].random = 0x9E3779B9u + (uint32_t)i;
        sides[i].spin = spin;
    }
    sides[0].sending = &down.driver.ring;
    sides[0].receiving = &up.driver.ring;
    sides[1].sending = &up.device.ring;
    sides[1].receiving = &down.device.ring;
    pthread_t device;
    check(pthread_create(&device, NULL, work, &sides[1]) == 0, "no thread", 0);
    work(&sides[0]);
    pthread_join(device, NULL);
    printf("%u messages each way\n", sides[1].received);
    close_link(&down);
    close_link(&up);
    return 0;
}
