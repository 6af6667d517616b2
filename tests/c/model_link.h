/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Two virtqueues on one ring in memory_model.h, for the programs that run them there: where
 * things lie, their names in a trace, arguments, and what is printed in the end.
 */
#ifndef MODEL_LINK_H
#define MODEL_LINK_H

#include "memory_model.h"
#include "virtqueue.h"

#define MODEL_NUM 4u /* the largest */
#define MODEL_POOL_PA 0x100000u
#define MODEL_BUFFER 4u /* bytes that stand for a buffer: its content, and what counts its reads */

/* Of the sender, then of the receiver, in all executions together. */
static struct model_tally {
    uint64_t publishes, kicks, asked, meanwhile;
} model_tallies[2];

static struct vq_region model_region; /* the buffers */
static uint8_t *model_buffers;        /* what stands for them */
static uint16_t *model_available, *model_used;
static uint32_t model_num;

static int32_t model_result(const struct vq *q, int32_t result)
{
    if (result == VQ_BROKEN) {
        note("fault", (uint64_t)q->fault);
        note("  value", q->fault_value);
        note("  limit", q->fault_limit);
        violation("queue broken by fault", q->fault);
    }
    return result;
}

static void model_name(uint32_t offset, char *word, size_t size)
{
    static const char *const fields[] = {"addr", NULL, NULL, NULL, "len", NULL, "flags", "next"};
    const uint8_t *where = model.shared + offset;
    const uint8_t *available = (const uint8_t *)model_available, *used = (const uint8_t *)model_used;
    uint32_t in_available = (uint32_t)(where - available) / 2u, in_used = (uint32_t)(where - used) / 2u;
    if (where < available)
        snprintf(word, size, "desc[%u].%s", offset / 16u, fields[offset % 16u / 2u]);
    else if (where < used && in_available < 2u)
        snprintf(word, size, "available.%s", in_available ? "idx" : "flags");
    else if (where < used && in_available < 2u + model_num)
        snprintf(word, size, "available.ring[%u]", in_available - 2u);
    else if (where < used)
        snprintf(word, size, "used_event");
    else if (where >= model_buffers)
        snprintf(word, size, "buffer[%u]", (uint32_t)(where - model_buffers) / MODEL_BUFFER);
    else if (in_used < 2u)
        snprintf(word, size, "used.%s", in_used ? "idx" : "flags");
    else if (in_used < 2u + 4u * model_num)
        snprintf(word, size, "used.ring[%u].%s", (in_used - 2u) / 4u, (in_used - 2u) % 4u ? "len" : "id");
    else
        snprintf(word, size, "avail_event");
}

/* Lays out a ring. The buffers are `pool`, or if that is NULL what stands for them. */
static void model_open(uint32_t num, uint32_t start, uint32_t pool_size, uint8_t *pool)
{
    uint32_t used = (16u * num + 2u * (3u + num) + 3u) / 4u * 4u;
    uint32_t buffers = (used + 8u * num + 6u + 3u) / 4u * 4u;
    if (num == 0 || num > MODEL_NUM || (num & (num - 1u)) || buffers + num * MODEL_BUFFER > MODEL_SIZE)
        cannot("entries", num);
    uint8_t *memory = model_memory();
    model_num = num;
    model_available = (uint16_t *)(void *)(memory + 16u * num);
    model_used = (uint16_t *)(void *)(memory + used);
    model_buffers = memory + buffers;
    model_region = (struct vq_region){.pa = MODEL_POOL_PA, .size = pool_size, .base = pool ? pool : model_buffers};
    model_available[1] = model_used[1] = (uint16_t)start;
}

static void model_open_queue(struct vq *q, struct vq_slot *slots, uint32_t driver, uint32_t event_idx)
{
    *q = (struct vq){
        .ring = model.shared,
        .available = model_available,
        .used = model_used,
        .slots = slots,
        .regions = &model_region,
        .region_count = 1,
        .num = (uint16_t)model_num,
        .mask = (uint16_t)(model_num - 1u),
        .driver = (uint8_t)driver,
        .event_idx = (uint8_t)event_idx,
    };
    (void)model_result(q, vq_attach(q, model_available[1]));
}

struct model_option { /* "name", which takes a number, or "name=word", which means one */
    const char *text;
    uint32_t *value;
    uint32_t meaning;
};

static int model_set_option(const struct model_option *option, const char *argument)
{
    const char *equals = strchr(argument, '=');
    char *end;
    if (strcmp(argument, option->text) == 0) {
        *option->value = option->meaning;
        return equals != NULL;
    }
    if (!equals || strncmp(argument, option->text, (size_t)(equals - argument)) ||
        option->text[equals - argument])
        return 0;
    unsigned long number = strtoul(equals + 1, &end, 10);
    *option->value = (uint32_t)number;
    return equals[1] && !*end && number <= 0xFFFFu;
}

static void model_set_options(const struct model_option *table, size_t count, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        int known = set_model_option(argv[i]);
        for (size_t at = 0; !known && at < count; at++)
            known = model_set_option(&table[at], argv[i]);
        if (!known)
            cannot("take the argument", i);
    }
}

/* Runs the program in every way there is, and prints how much was tried, of each side how many of
 * its publishes kicked, and how often something had come meanwhile when it asked to be notified. */
static void model_explore(const struct program *parts)
{
    struct program program = *parts;
    program.name = model_name;
    program.threads[0] = "sender";
    program.threads[1] = "receiver";
    explore(&program);
    printf("%" PRIu64 " executions, %" PRIu64 " to the end, %" PRIu64 " ends, %" PRIu64 " states\n",
           model.executions, model.complete, model.ends, model.state_count);
    for (int i = 0; i < 2; i++) {
        const struct model_tally *tally = &model_tallies[i];
        printf("%s: %" PRIu64 " kicks of %" PRIu64 ", %" PRIu64 " meanwhile of %" PRIu64 "\n",
               program.threads[i], tally->kicks, tally->publishes, tally->meanwhile, tally->asked);
    }
}

#endif
