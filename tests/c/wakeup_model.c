/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Shows that no wake-up is lost: runs the real virtqueue.c, one thread on each end, in every way
 * that memory_model.h knows. One thread sends, and sleeps when no buffer is free; the other
 * receives, and sleeps when nothing is there. Each sleeps only while it has asked to be notified,
 * and nothing had come meanwhile. A violation is: both asleep with no kick on its way, a message out
 * of order or with another's content, a race on a buffer, a fault on a queue.
 *
 * Arguments, as name=value: those of the search, and
 *   sender      driver or device: the end that sends
 *   receiver    how the other end treats its notifications:
 *               always: leaves them on, and asks anew before each sleep
 *               off: turns them off after each sleep, and on before the next
 *               lazy: as message_ring_receive does. With flags it turns them off once it has taken
 *               `quiet_after` in one go, with EVENT_IDX it lets the wish lapse; it asks anew only
 *               when it must, and takes at most `max` (0: any number) in one go
 *   num, messages, event_idx
 *   start       index that the rings begin with
 *   batch       so many messages are published together
 *   each        1: each buffer given back is published at once; 0: together, before a sleep
 *   sender_off  1: the sender turns its notifications off whenever it has sent
 *   spurious    so often may either side wake up for nothing
 * What can be left out is also the result of vq_notify_on: result:ask.
 *
 * Prints how much was tried, and of each side how many of its publishes kicked and how often
 * something had come meanwhile when it asked to be notified.
 */
#include "memory_model.h"

#include "virtqueue.c"

#include "model_link.h"

#define BUFFER_SIZE MODEL_BUFFER
#define REGION_SIZE 0x1000u /* room for the lengths that say how often a buffer was given */
#define FIRST 100u /* number of the first message: no other word has such a value */

enum { ALWAYS, OFF, LAZY };

static struct {
    uint32_t driver_sends, receiver, num, messages, batch, event_idx, start, each, quiet_after, max, sender_off,
        spurious;
} options = {.driver_sends = 1,
             .receiver = ALWAYS,
             .num = 2,
             .messages = 3,
             .batch = 1,
             .start = 0xFFFE,
             .each = 1,
             .quiet_after = 1,
             .sender_off = 1};

/* All that one side knows: what it does next depends on nothing else where it settles. */
struct side {
    struct vq queue;
    struct vq_slot slots[MODEL_NUM];
    uint32_t number;      /* of messages sent or received */
    uint32_t unpublished; /* of messages sent */
    uint32_t given, got;  /* buffers: their number goes with them as the length */
    uint32_t taken;       /* in one go */
    uint32_t woken;       /* has not looked since it woke up */
};

static struct side sides[2], initial[2]; /* the sender first */
/* Buffer `head` of the driver, as the next that it lends. */
static struct vq_span own_buffer(struct side *side, uint16_t head)
{
    uint64_t offset = (uint64_t)head * BUFFER_SIZE;
    return (struct vq_span){.pa = MODEL_POOL_PA + offset,
                            .base = model_region.base + offset,
                            .length = ++side->given,
                            .writable = side == &sides[1]}; /* to the device that sends */
}

/* Takes a buffer that the other side gave. Returns its head or VQ_EMPTY. */
static int32_t take(struct side *side, uint8_t **buffer)
{
    struct vq *q = &side->queue;
    struct vq_span span = {0};
    uint32_t count = 1;
    int32_t head = q->driver ? vq_hold_used(q, &span.length) : vq_get_available(q, &span, 1, &count);
    if (model_result(&side->queue, head) == VQ_EMPTY)
        return VQ_EMPTY;
    if (span.length != ++side->got || count != 1)
        violation("a stale entry, length", span.length);
    if (!q->driver && span.writable != (side == &sides[0]))
        violation("a stale descriptor, writable", span.writable);
    *buffer = q->driver ? model_region.base + (uint32_t)head * BUFFER_SIZE : span.base;
    return head;
}

static void give(struct side *side, uint16_t head)
{
    struct vq *q = &side->queue;
    int32_t result;
    if (q->driver) {
        struct vq_span span = own_buffer(side, head);
        result = vq_add_again(q, head, &span);
    } else {
        result = vq_put_used(q, head, ++side->given);
    }
    if (model_result(&side->queue, result) != 0)
        violation("refused buffer", head);
}

static void publish_and_kick(struct side *side)
{
    struct model_tally *tally = &model_tallies[side - sides];
    if (side->queue.next == side->queue.published)
        return;
    tally->publishes++;
    if (model_result(&side->queue, vq_publish(&side->queue))) {
        tally->kicks++;
        kick_other();
    }
}

/* Returns whether something had come meanwhile. */
static int ask(struct side *side)
{
    struct model_tally *tally = &model_tallies[side - sides];
    int32_t meanwhile = model_result(&side->queue, vq_notify_on(&side->queue));
    tally->asked++;
    tally->meanwhile += meanwhile ? 1u : 0u;
    return meanwhile && !is_left_out("result", __func__);
}

/* The sender. */

static void send_all(struct side *side)
{
    struct vq *q = &side->queue;
    while (side->number < options.messages) {
        settle(side, sizeof *side);
        uint8_t *buffer;
        int32_t head = take(side, &buffer);
        int fresh = head == VQ_EMPTY && q->driver && q->free_count;
        if (fresh) { /* never lent so far */
            head = q->free_head;
            buffer = model_region.base + q->free_head * BUFFER_SIZE;
        } else if (head == VQ_EMPTY) {
            publish_and_kick(side);
            side->unpublished = 0;
            if (!ask(side))
                sleep_until_kicked();
            continue;
        }
        note("sends", side->number);
        plain_store((uint16_t *)(void *)buffer, (uint16_t)(FIRST + side->number++));
        if (fresh) {
            struct vq_span span = own_buffer(side, (uint16_t)head);
            (void)vq_add(q, &span, 1, 0);
        } else {
            give(side, (uint16_t)head);
        }
        if (++side->unpublished == options.batch || side->number == options.messages) {
            publish_and_kick(side);
            side->unpublished = 0;
        }
        if (options.sender_off)
            vq_notify_off(q);
    }
}

/* The receiver. */

static void sleep_again(struct side *side)
{
    publish_and_kick(side);
    side->taken = 0;
    side->woken = 1;
    sleep_until_kicked();
}

static void receive_all(struct side *side)
{
    struct vq *q = &side->queue;
    while (side->number < options.messages) {
        settle(side, sizeof *side);
        if (side->woken && options.receiver == OFF)
            vq_notify_off(q);
        side->woken = 0;
        if (options.max && side->taken >= options.max) {
            if (q->quiet || model_result(&side->queue, vq_pending(q))) {
                publish_and_kick(side);
                side->taken = 0;
            } else {
                sleep_again(side);
                continue;
            }
        }
        uint8_t *buffer;
        int32_t head = take(side, &buffer);
        if (head == VQ_EMPTY) {
            if (options.receiver == LAZY && !q->quiet)
                sleep_again(side);
            else if (!ask(side))
                sleep_again(side);
            continue;
        }
        side->taken++;
        if (options.receiver == LAZY && options.event_idx)
            q->quiet = 1;
        else if (options.receiver == LAZY && side->taken == options.quiet_after)
            vq_notify_off(q);
        uint16_t message = plain_load((const uint16_t *)(const void *)buffer);
        note("receives", side->number);
        if (message != FIRST + side->number++)
            violation("another message than the next", message);
        give(side, (uint16_t)head);
        if (options.each)
            publish_and_kick(side);
    }
    publish_and_kick(side);
}

static void run(uint32_t thread)
{
    if (thread == 0)
        send_all(&sides[0]);
    else
        receive_all(&sides[1]);
    settle(&sides[thread], sizeof sides[thread]);
}

static void reset(void)
{
    memcpy(sides, initial, sizeof sides);
}

static void ended(int stuck)
{
    if (stuck)
        violation("lost wake-up: no side goes on, messages sent and not received",
                  (long long)sides[0].number - sides[1].number);
    if (sides[1].number != options.messages)
        violation("not all received", sides[1].number);
}

/* The rings as they are once both sides are up, before the first message. */
static void open_both(void)
{
    model_open(options.num, options.start, REGION_SIZE, NULL);
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t driver = i == 0 ? options.driver_sends : !options.driver_sends;
        model_open_queue(&sides[i].queue, sides[i].slots, driver, options.event_idx);
    }
    for (uint16_t i = 0; !options.driver_sends && i < options.num; i++) {
        struct vq_span span = own_buffer(&sides[1], i);
        if (vq_add(&sides[1].queue, &span, 0, 1) != i || vq_publish(&sides[1].queue) < 0)
            cannot("lending the buffers", i);
    }
    vq_notify_off(&sides[0].queue);
    sides[1].woken = 1;
    memcpy(initial, sides, sizeof sides);
}

int main(int argc, char **argv)
{
    static const struct model_option table[] = {
        {"sender=driver", &options.driver_sends, 1},
        {"sender=device", &options.driver_sends, 0},
        {"receiver=always", &options.receiver, ALWAYS},
        {"receiver=off", &options.receiver, OFF},
        {"receiver=lazy", &options.receiver, LAZY},
        {"num", &options.num, 0},
        {"messages", &options.messages, 0},
        {"batch", &options.batch, 0},
        {"event_idx", &options.event_idx, 0},
        {"start", &options.start, 0},
        {"each", &options.each, 0},
        {"quiet_after", &options.quiet_after, 0},
        {"max", &options.max, 0},
        {"sender_off", &options.sender_off, 0},
        {"spurious", &options.spurious, 0},
    };
    model_set_options(table, sizeof table / sizeof *table, argc, argv);
    open_both();
    model_explore(&(struct program){
        .reset = reset, .run = run, .ended = ended, .spurious = options.spurious});
    return 0;
}
