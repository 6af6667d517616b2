/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Shows that no wake-up is lost: runs the real virtqueue.c, one thread on each end, in every way
 * that memory_model.h knows. One thread sends, and sleeps when no buffer is free; the other
 * receives, and sleeps when nothing is there. Each sleeps only after it asked to be notified and
 * nothing had come meanwhile. A violation is: both asleep with no kick on its way, a message out
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

#define MAX_NUM 4u
#define POOL_PA 0x100000u
#define BUFFER_SIZE 4u /* the message, and what counts its reads */
#define REGION_SIZE 0x1000u
#define FIRST 100u     /* number of the first message: no other word has such a value */

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
    struct vq_slot slots[MAX_NUM];
    uint32_t number;      /* of messages sent or received */
    uint32_t unpublished; /* of messages sent */
    uint32_t given, got;  /* buffers: their number goes with them as the length */
    uint32_t taken;       /* in one go */
    uint32_t woken;       /* has not looked since it woke up */
};

static struct side sides[2], initial[2]; /* the sender first */
static struct tally {
    uint64_t publishes, kicks, asked, meanwhile;
} tallies[2];
static struct vq_region region;

static int32_t result_of(const struct side *side, int32_t result)
{
    if (result == VQ_BROKEN) {
        note("fault", (uint64_t)side->queue.fault);
        note("  value", side->queue.fault_value);
        note("  limit", side->queue.fault_limit);
        violation("queue broken by fault", side->queue.fault);
    }
    return result;
}

/* Buffer `head` of the driver, as the next that it lends. */
static struct vq_span own_buffer(struct side *side, uint16_t head)
{
    uint64_t offset = (uint64_t)head * BUFFER_SIZE;
    return (struct vq_span){.pa = POOL_PA + offset,
                            .base = region.base + offset,
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
    if (result_of(side, head) == VQ_EMPTY)
        return VQ_EMPTY;
    if (span.length != ++side->got || count != 1)
        violation("a stale entry, length", span.length);
    if (!q->driver && span.writable != (side == &sides[0]))
        violation("a stale descriptor, writable", span.writable);
    *buffer = q->driver ? region.base + (uint32_t)head * BUFFER_SIZE : span.base;
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
    if (result_of(side, result) != 0)
        violation("refused buffer", head);
}

static void publish_and_kick(struct side *side)
{
    struct tally *tally = &tallies[side - sides];
    if (side->queue.next == side->queue.published)
        return;
    tally->publishes++;
    if (result_of(side, vq_publish(&side->queue))) {
        tally->kicks++;
        kick_other();
    }
}

/* Returns whether something had come meanwhile. */
static int ask(struct side *side)
{
    struct tally *tally = &tallies[side - sides];
    int32_t meanwhile = result_of(side, vq_notify_on(&side->queue));
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
            buffer = region.base + q->free_head * BUFFER_SIZE;
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
            if (q->quiet || result_of(side, vq_pending(q))) {
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

static void name(uint32_t offset, char *word, size_t size)
{
    static const char *const fields[] = {"addr", NULL, NULL, NULL, "len", NULL, "flags", "next"};
    const struct vq *q = &sides[0].queue;
    const uint8_t *where = model.shared + offset;
    const uint8_t *available = (const uint8_t *)q->available, *used = (const uint8_t *)q->used;
    uint32_t in_available = (uint32_t)(where - available) / 2u, in_used = (uint32_t)(where - used) / 2u;
    if (where < available)
        snprintf(word, size, "desc[%u].%s", offset / 16u, fields[offset % 16u / 2u]);
    else if (where < used && in_available < 2u)
        snprintf(word, size, "available.%s", in_available ? "idx" : "flags");
    else if (where < used && in_available < 2u + q->num)
        snprintf(word, size, "available.ring[%u]", in_available - 2u);
    else if (where < used)
        snprintf(word, size, "used_event");
    else if (where >= region.base)
        snprintf(word, size, "buffer[%u]", (uint32_t)(where - region.base) / BUFFER_SIZE);
    else if (in_used < 2u)
        snprintf(word, size, "used.%s", in_used ? "idx" : "flags");
    else if (in_used < 2u + 4u * q->num)
        snprintf(word, size, "used.ring[%u].%s", (in_used - 2u) / 4u, (in_used - 2u) % 4u ? "len" : "id");
    else
        snprintf(word, size, "avail_event");
}

static void open_side(struct side *side, uint8_t *memory, uint32_t driver)
{
    uint32_t available = 16u * options.num;
    uint32_t used = (available + 2u * (3u + options.num) + 3u) / 4u * 4u;
    uint32_t pool = (used + 8u * options.num + 6u + 3u) / 4u * 4u;
    if (pool + options.num * BUFFER_SIZE > MODEL_SIZE)
        cannot("words", MODEL_WORDS);
    region = (struct vq_region){
        .pa = POOL_PA, .size = REGION_SIZE, .base = memory + pool};
    side->queue = (struct vq){
        .ring = memory,
        .available = (uint16_t *)(void *)(memory + available),
        .used = (uint16_t *)(void *)(memory + used),
        .slots = side->slots,
        .regions = &region,
        .region_count = 1,
        .num = (uint16_t)options.num,
        .mask = (uint16_t)(options.num - 1u),
        .driver = (uint8_t)driver,
        .event_idx = (uint8_t)options.event_idx,
    };
    side->queue.available[1] = side->queue.used[1] = (uint16_t)options.start;
    (void)result_of(side, vq_attach(&side->queue, (uint16_t)options.start));
    side->woken = 1;
}

/* The rings as they are once both sides are up, before the first message. */
static void open_both(void)
{
    uint8_t *memory = model_memory();
    open_side(&sides[0], memory, options.driver_sends);
    open_side(&sides[1], memory, !options.driver_sends);
    for (uint16_t i = 0; !options.driver_sends && i < options.num; i++) {
        struct vq_span span = own_buffer(&sides[1], i);
        if (vq_add(&sides[1].queue, &span, 0, 1) != i || vq_publish(&sides[1].queue) < 0)
            cannot("lending the buffers", i);
    }
    vq_notify_off(&sides[0].queue);
    memcpy(initial, sides, sizeof sides);
}

static uint32_t number_of(const char *text)
{
    char *end;
    unsigned long number = strtoul(text, &end, 10);
    if (end == text || *end || number > 0xFFFFu)
        cannot("a value that is no number, first byte", *text);
    return (uint32_t)number;
}

static void set_option(char *argument)
{
    static const struct {
        const char *name;
        uint32_t *value;
    } numbers[] = {
        {"num", &options.num},
        {"messages", &options.messages},
        {"batch", &options.batch},
        {"event_idx", &options.event_idx},
        {"start", &options.start},
        {"each", &options.each},
        {"quiet_after", &options.quiet_after},
        {"max", &options.max},
        {"sender_off", &options.sender_off},
        {"spurious", &options.spurious},
    };
    static const struct {
        const char *text;
        uint32_t *value;
        uint32_t meaning;
    } words[] = {
        {"sender=driver", &options.driver_sends, 1},  {"sender=device", &options.driver_sends, 0},
        {"receiver=always", &options.receiver, ALWAYS}, {"receiver=off", &options.receiver, OFF},
        {"receiver=lazy", &options.receiver, LAZY},
    };
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        if (strcmp(argument, words[i].text) == 0) {
            *words[i].value = words[i].meaning;
            return;
        }
    }
    char *value = strchr(argument, '=');
    if (!value)
        cannot("an argument without =, first byte", *argument);
    *value++ = 0;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        if (strcmp(argument, numbers[i].name) == 0) {
            *numbers[i].value = number_of(value);
            return;
        }
    }
    cannot("an argument of unknown name, first byte", *argument);
}

int main(int argc, char **argv)
{
    static const struct program program = {
        .reset = reset, .run = run, .ended = ended, .name = name, .threads = {"sender", "receiver"}};
    for (int i = 1; i < argc; i++)
        if (!set_model_option(argv[i]))
            set_option(argv[i]);
    if ((options.num != 1 && options.num != 2 && options.num != MAX_NUM) || options.batch == 0)
        cannot("entries", options.num);
    open_both();
    struct program with_options = program;
    with_options.spurious = options.spurious;
    explore(&with_options);
    printf("%" PRIu64 " executions, %" PRIu64 " to the end, %" PRIu64 " ends, %" PRIu64 " states\n",
           model.executions, model.complete, model.ends, model.state_count);
    for (int i = 0; i < 2; i++)
        printf("%s: %" PRIu64 " kicks of %" PRIu64 ", %" PRIu64 " meanwhile of %" PRIu64 "\n", program.threads[i],
               tallies[i].kicks, tallies[i].publishes, tallies[i].meanwhile, tallies[i].asked);
    return 0;
}
