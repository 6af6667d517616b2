/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * As wakeup_model.c, one floor higher: the real message_ring.c. One thread sends, and waits for a
 * free buffer when there is none; the other receives, and sleeps unless it is told that there is
 * more. The buffers are not accessible: what message_ring.c copies goes through a memcpy that
 * checks for data races and has the bytes elsewhere.
 *
 * Arguments, as name=value: those of the search, and
 *   sender      driver or device: the end that sends
 *   num, messages, event_idx
 *   start       index that the rings begin with
 *   batch       so many messages are sent at once
 *   max         so many are received at once, at most
 *   give_back   1: buffers return at once; 0: by message_ring_release
 *   sender_off  1: the sender turns its notifications off whenever it has sent
 *   polls       so often does the receiver look, with notifications left off, before it sleeps
 *   spurious    so often may either side wake up for nothing
 */
#include "memory_model.h"

#undef memcpy
#define memcpy(to, from, size) copy_seen(to, from, size)

static void *copy_seen(void *to, const void *from, size_t size);

/* GCC sees less of a function's results once its loads are calls. */
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "virtqueue.c"

#include "message_ring.c"

#include "model_link.h"

#define PAYLOAD 4u
#define BUFFER_SIZE (MESSAGE_HEADER + PAYLOAD)
#define POOL_SIZE (MODEL_NUM * BUFFER_SIZE)
#define MAX_BATCH 8u
#define FIRST 100u /* number of the first message: no other word has such a value */

#define ROOM (PAYLOAD + MESSAGE_SOURCE)

static struct {
    uint32_t driver_sends, num, messages, batch, event_idx, start, max, give_back, sender_off, polls, spurious;
} options = {.driver_sends = 1,
             .num = 2,
             .messages = 3,
             .batch = 1,
             .start = 0xFFFE,
             .max = MAX_BATCH,
             .give_back = 1,
             .sender_off = 1};

/* What one side does next depends on the members before `ring` alone. */
struct side {
    struct vq queue;
    struct vq_slot slots[MODEL_NUM];
    uint32_t number; /* of messages sent or received */
    uint32_t polled; /* times without a message */
    struct message_ring ring;
    struct vq_span spans[MODEL_NUM];
    struct message_record records[MAX_BATCH];
    uint8_t data[MAX_BATCH * ROOM];
    uint64_t places[MODEL_NUM];
    uint16_t spares[MODEL_NUM];
    uint8_t scratch[BUFFER_SIZE];
};

static struct side sides[2], initial[2]; /* the sender first */
static uint32_t offsets[MODEL_NUM];
static uint8_t *pool;                    /* not accessible */
static uint8_t buffers[POOL_SIZE];       /* what is in it */

/* The word that stands for the buffer at `where`, or NULL where there is none. */
static uint16_t *stands_for(const void *where)
{
    uintptr_t offset = (uintptr_t)where - (uintptr_t)pool;
    return offset < POOL_SIZE ? (uint16_t *)(void *)(model_buffers + offset / BUFFER_SIZE * MODEL_BUFFER) : NULL;
}

static void *copy_seen(void *to, const void *from, size_t size)
{
    const uint16_t *source = stands_for(from);
    uint16_t *target = stands_for(to);
    if (source) {
        (void)plain_load(source);
        from = buffers + ((uintptr_t)from - (uintptr_t)pool);
    }
    if (target) {
        plain_store(target, (uint16_t)(FIRST + sides[0].number)); /* which tells the bytes */
        to = buffers + ((uintptr_t)to - (uintptr_t)pool);
    }
    return memmove(to, from, size);
}

static void settle_side(const struct side *side)
{
    settle(side, offsetof(struct side, ring));
}

static int32_t did(struct side *side, uint16_t published, int32_t result, int32_t kick)
{
    struct model_tally *tally = &model_tallies[side - sides];
    tally->publishes += side->queue.published != published ? 1u : 0u;
    if (model_result(&side->queue, result) > 0 && (result & kick)) {
        tally->kicks++;
        kick_other();
    }
    return result;
}

/* The sender. */

static int32_t send_some(struct side *side)
{
    uint32_t payload[MAX_BATCH], lengths[MAX_BATCH], count = options.messages - side->number;
    uint16_t published = side->queue.published;
    if (count > options.batch)
        count = options.batch;
    for (uint32_t i = 0; i < count; i++) {
        payload[i] = side->number + i;
        lengths[i] = PAYLOAD;
    }
    if (options.batch > 1) /* all from the same address: a message's number is in its payload */
        return did(side, published,
                   message_ring_send_many(&side->ring, 0, ~0u - 1u, (const uint8_t *)payload, lengths, count),
                   MESSAGE_KICK);
    const uint8_t *bytes = (const uint8_t *)payload;
    int32_t sent = message_ring_send(&side->ring, side->number, ~side->number, bytes, PAYLOAD);
    int32_t result = did(side, published, sent, 1);
    return result < 0 ? result : 1;
}

static void send_all(struct side *side)
{
    struct model_tally *tally = &model_tallies[0];
    while (side->number < options.messages) {
        settle_side(side);
        note("sends", side->number);
        int32_t result = send_some(side);
        if (result == VQ_EMPTY) {
            int32_t meanwhile = model_result(&side->queue, message_ring_want_buffer(&side->ring));
            tally->asked++;
            tally->meanwhile += meanwhile ? 1u : 0u;
            if (!meanwhile || is_left_out("result", __func__))
                sleep_until_kicked();
            continue;
        }
        if (result < 0)
            violation("not sent", result);
        side->number += (uint32_t)result & 0xFFFFu;
        if (options.sender_off)
            vq_notify_off(&side->queue);
    }
}

/* The receiver. */

static void check_message(const struct side *side, const struct message_record *record, uint32_t number)
{
    uint32_t payload;
    note("receives", number);
    memmove(&payload, side->data + record->offset, PAYLOAD);
    if (record->length != PAYLOAD || payload != number || record->src != (options.batch > 1 ? 0 : number))
        violation("another message than the next", payload);
}

static void receive_all(struct side *side)
{
    while (side->number < options.messages) {
        settle_side(side);
        int32_t stay = side->polled < options.polls ? MESSAGE_STAY_QUIET : 0;
        int32_t how = options.give_back ? MESSAGE_GIVE_BACK : 0;
        uint16_t published = side->queue.published, heads[MAX_BATCH];
        int32_t result = did(
            side, published,
            message_ring_receive(&side->ring, side->records, side->data, options.max, how | stay), MESSAGE_KICK);
        uint32_t count = (uint32_t)result & 0xFFFFu;
        for (uint32_t i = 0; i < count; i++) {
            check_message(side, &side->records[i], side->number + i);
            heads[i] = (uint16_t)side->records[i].head;
        }
        side->number += count;
        side->polled = count ? 0 : side->polled + 1u;
        published = side->queue.published;
        if (count && !options.give_back &&
            did(side, published, message_ring_release(&side->ring, heads, count), MESSAGE_KICK) < 0)
            violation("not released", count);
        if (side->number == options.messages || (result & MESSAGE_MORE) || stay)
            continue;
        side->polled = 0;
        sleep_until_kicked();
    }
}

static void run(uint32_t thread)
{
    if (thread == 0)
        send_all(&sides[0]);
    else
        receive_all(&sides[1]);
    settle_side(&sides[thread]);
}

static void reset(void)
{
    memmove(sides, initial, sizeof sides);
}

static void ended(int stuck)
{
    if (stuck)
        violation("lost wake-up: no side goes on, messages sent and not received",
                  (long long)sides[0].number - sides[1].number);
    if (sides[1].number != options.messages || sides[1].ring.bad_length)
        violation("not all received", sides[1].number);
}

static void open_both(void)
{
    pool = mmap(NULL, MODEL_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pool == MAP_FAILED)
        cannot("no memory", MODEL_PAGE);
    model_open(options.num, options.start, POOL_SIZE, pool);
    for (uint32_t i = 0; i < options.num; i++)
        offsets[i] = i * BUFFER_SIZE;
    for (uint32_t i = 0; i < 2; i++) {
        struct side *side = &sides[i];
        uint32_t driver = i == 0 ? options.driver_sends : !options.driver_sends;
        model_open_queue(&side->queue, side->slots, driver, options.event_idx);
        side->ring = (struct message_ring){
            .queue = &side->queue,
            .spans = side->spans,
            .places = side->places,
            .spares = side->spares,
            .scratch = side->scratch,
            .pool_pa = driver ? MODEL_POOL_PA : 0,
            .pool = driver ? pool : NULL,
            .offsets = offsets,
            .buffer_size = BUFFER_SIZE,
            .sender = i == 0,
        };
    }
    if (!options.driver_sends && message_ring_fill(&sides[1].ring) < 0)
        cannot("lending the buffers", options.num);
    vq_notify_off(&sides[0].queue);
    memmove(initial, sides, sizeof sides);
}

int main(int argc, char **argv)
{
    static const struct model_option table[] = {
        {"sender=driver", &options.driver_sends, 1},
        {"sender=device", &options.driver_sends, 0},
        {"num", &options.num, 0},
        {"messages", &options.messages, 0},
        {"batch", &options.batch, 0},
        {"event_idx", &options.event_idx, 0},
        {"start", &options.start, 0},
        {"max", &options.max, 0},
        {"give_back", &options.give_back, 0},
        {"sender_off", &options.sender_off, 0},
        {"polls", &options.polls, 0},
        {"spurious", &options.spurious, 0},
    };
    model_set_options(table, sizeof table / sizeof *table, argc, argv);
    if (options.max == 0 || options.max > MAX_BATCH || options.batch > MAX_BATCH)
        cannot("messages at once", options.max);
    open_both();
    model_explore(&(struct program){
        .reset = reset, .run = run, .ended = ended, .spurious = options.spurious});
    return 0;
}
