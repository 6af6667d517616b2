/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * A driver thread and a device thread that move messages both ways at once and check every
 * byte. A side with nothing to do sleeps on a doorbell, so a wake-up that is lost hangs the
 * program; its caller has a timeout. For a thread sanitizer there is also `spin`: no doorbell,
 * so that nothing but the rings orders the two threads.
 *
 * Arguments: sleep or spin, messages each way, entries of a ring, and 1 for EVENT_IDX.
 */
#include "ring_link.h"

#include <pthread.h>
#include <sched.h>

#define BUFFER_SIZE 64u
#define MAX_NUM 256u
#define MAX_BATCH 16u
#define LIMIT (BUFFER_SIZE - MESSAGE_HEADER)

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
    uint16_t held[MAX_NUM];
    struct message_record records[MAX_BATCH];
    uint8_t data[MAX_BATCH * LIMIT];
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

/* Sends some messages. Returns whether it may go on without a notification. */
static int send_some(struct side *side)
{
    for (uint32_t burst = next_random(side) % 32u; burst && side->sent < side->total; burst--) {
        uint8_t payload[LIMIT];
        uint32_t length = length_of(side->sent);
        for (uint32_t i = 0; i < length; i++)
            payload[i] = byte_of(side->sent, i);
        int32_t result = message_ring_send(side->sending, side->sent, ~side->sent, payload, length, 0);
        if (result == VQ_EMPTY)
            return message_ring_want_buffer(side->sending) > 0;
        check(result >= 0, "send", result);
        vq_notify_off(side->sending->queue);
        side->sent++;
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
    int give_back = next_random(side) % 2u == 0;
    int32_t result = message_ring_receive(side->receiving, side->records, side->data, MAX_BATCH, give_back);
    check(result >= 0, "receive", result);
    for (uint32_t i = 0; i < (uint32_t)(result & 0xFFFF); i++) {
        const struct message_record *record = &side->records[i];
        uint32_t number = side->received++;
        check(record->src == number && record->dst == ~number, "out of order", number);
        check(record->length == length_of(number), "length", record->length);
        for (uint32_t at = 0; at < record->length; at++)
            check(side->data[record->offset + at] == byte_of(number, at), "content", number);
        if (!give_back)
            side->held[side->held_count++] = record->head;
    }
    if (result & MESSAGE_KICK)
        kick(side);
    if (side->held_count && (side->held_count > side->receiving->queue->num / 2u || !(result & MESSAGE_MORE)))
        release_all(side);
    return (result & MESSAGE_MORE) != 0;
}

static void *work(void *argument)
{
    struct side *side = argument;
    while (side->sent < side->total || side->received < side->total) {
        int busy = send_some(side);
        busy |= receive_some(side);
        if (busy)
            continue;
        if (side->spin)
            sched_yield();
        else if (side->sent < side->total || side->received < side->total)
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
