/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * One direction of a link with both its ends in this process, for the test programs here.
 * Ring memory and buffers are allocations of exactly their size, so that a sanitizer sees
 * the first byte read or written outside.
 */
#ifndef RING_LINK_H
#define RING_LINK_H

#include "message_ring.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define POOL_PA 0x100000u
#define USED_ALIGN 64u

struct end { /* private to one side */
    struct vq queue;
    struct message_ring ring;
    struct vq_region region;
    uint32_t *offsets;
};

struct link {
    uint32_t num, buffer_size, used_offset, ring_size;
    uint8_t *ring, *pool; /* shared */
    struct end driver, device;
};

static inline void check(int holds, const char *what, long long value)
{
    if (!holds) {
        fprintf(stderr, "%s: %lld\n", what, value);
        exit(1);
    }
}

static inline void *allocate(size_t size)
{
    void *memory = calloc(1, size);
    check(memory != NULL, "out of memory", (long long)size);
    return memory;
}

static inline void open_end(struct link *l, struct end *end, int driver, int sender, int event_idx)
{
    end->region = (struct vq_region){.pa = POOL_PA, .size = (uint64_t)l->num * l->buffer_size, .base = l->pool};
    end->queue = (struct vq){
        .ring = l->ring,
        .slots = allocate(l->num * sizeof(struct vq_slot)),
        .regions = &end->region,
        .region_count = 1,
        .available = (uint16_t *)(void *)(l->ring + 16u * l->num),
        .used = (uint16_t *)(void *)(l->ring + l->used_offset),
        .num = (uint16_t)l->num,
        .mask = (uint16_t)(l->num - 1u),
        .driver = (uint8_t)driver,
        .event_idx = (uint8_t)event_idx,
        .indirect = 1,
    };
    end->offsets = allocate(l->num * sizeof(uint32_t));
    for (uint32_t i = 0; i < l->num; i++)
        end->offsets[i] = i * l->buffer_size;
    end->ring = (struct message_ring){
        .queue = &end->queue,
        .spans = allocate(l->num * sizeof(struct vq_span)),
        .places = allocate(l->num * sizeof(uint64_t)),
        .spares = allocate(l->num * sizeof(uint16_t)),
        .scratch = allocate(l->buffer_size),
        .pool_pa = driver ? POOL_PA : 0,
        .pool = driver ? l->pool : NULL,
        .offsets = end->offsets,
        .buffer_size = l->buffer_size,
        .sender = (uint32_t)sender,
    };
    vq_start(&end->queue);
    if (driver && !sender)
        check(message_ring_fill(&end->ring) == 0, "fill", 0);
    if (sender)
        vq_notify_off(&end->queue);
}

static inline void open_link(struct link *l, uint32_t num, uint32_t buffer_size, int driver_sends, int event_idx)
{
    uint32_t available_end = 16u * num + 2u * (3u + num);
    *l = (struct link){.num = num, .buffer_size = buffer_size};
    l->used_offset = (available_end + USED_ALIGN - 1) / USED_ALIGN * USED_ALIGN;
    l->ring_size = l->used_offset + 2u * 3u + 8u * num;
    l->ring = allocate(l->ring_size);
    l->pool = allocate((size_t)num * buffer_size);
    open_end(l, &l->driver, 1, driver_sends, event_idx);
    open_end(l, &l->device, 0, !driver_sends, event_idx);
}

static inline void close_end(struct end *end)
{
    free(end->queue.slots);
    free(end->offsets);
    free(end->ring.spans);
    free(end->ring.places);
    free(end->ring.spares);
    free(end->ring.scratch);
}

static inline void close_link(struct link *l)
{
    close_end(&l->driver);
    close_end(&l->device);
    free(l->ring);
    free(l->pool);
}

#endif
