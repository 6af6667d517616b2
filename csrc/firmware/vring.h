/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The split vring, legacy layout, and the RPMsg header as they lie in shared memory; and how their
 * words are loaded, stored and checked, by either end.
 */
#ifndef VRING_H
#define VRING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "echo_protocol.h"
#include "port.h"
#include "trace.h"
#include "variant.h"

#define DESCRIPTOR_NEXT 1u
#define DESCRIPTOR_WRITE 2u
#define DESCRIPTOR_INDIRECT 4u

#define AVAILABLE_NO_INTERRUPT 1u /* the driver wants no kick for used buffers */
#define USED_NO_NOTIFY 1u         /* the device wants no kick for available buffers */

/* Kick after so many buffers even if more are waiting, so that the host works on them meanwhile. */
#define BATCH 64u

/* The address is two words: a 32-bit machine has no 64-bit atomic load. */
struct vring_descriptor {
    uint32_t address_low;
    uint32_t address_high;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
};

struct vring_available {
    uint16_t flags;
    uint16_t index;
    uint16_t ring[];
};

struct vring_used_element {
    uint32_t id;
    uint32_t length;
};

struct vring_used {
    uint16_t flags;
    uint16_t index;
    struct vring_used_element ring[];
};

struct rpmsg_header {
    uint32_t source;
    uint32_t destination;
    uint32_t reserved; /* the receiver's, which may scribble on it: written as 0, never read */
    uint16_t length;
    uint16_t flags;
};

_Static_assert(sizeof(struct vring_descriptor) == 16, "descriptor");
_Static_assert(offsetof(struct vring_available, ring) == 4, "available ring");
_Static_assert(sizeof(struct vring_used_element) == 8, "used element");
_Static_assert(offsetof(struct vring_used, ring) == 4, "used ring");
_Static_assert(sizeof(struct rpmsg_header) == 16, "header");

static inline uint16_t load16(const uint16_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static inline uint32_t load32(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static inline void store16(uint16_t *word, uint16_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

static inline void store32(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

static inline uint32_t ram_start(void)
{
    return (uint32_t)(uintptr_t)port_ram_start;
}

static inline uint32_t ram_size(void)
{
    return (uint32_t)((uintptr_t)port_ram_end - (uintptr_t)port_ram_start);
}

static inline bool lies_in(uint32_t address, uint32_t size, uint32_t start, uint32_t room)
{
    return address >= start && address - start <= room && size <= room - (address - start);
}

/* In RAM, and not over the image. */
static inline bool is_free_ram(uint32_t address, uint32_t size)
{
    uint32_t image_start = (uint32_t)(uintptr_t)port_image_start;
    uint32_t image_end = (uint32_t)(uintptr_t)port_image_end;

    return lies_in(address, size, ram_start(), ram_size()) &&
           (address >= image_end || (address < image_start && size <= image_start - address));
}

static inline bool is_power_of_two(uint32_t value)
{
    return value != 0 && (value & (value - 1)) == 0;
}

/* The id to kick by for a queue. */
static inline uint32_t kick_id(uint32_t notify_id)
{
    return VARIANT_KICK_ID == TABLE_ANY ? notify_id : VARIANT_KICK_ID;
}

/* One vring of the table. */
struct vring {
    struct vring_descriptor *descriptor;
    struct vring_available *available;
    struct vring_used *used;
    uint32_t notify_id;
    uint16_t num;
};

/* Find a vring, and the buffers, in RAM. False where the table is wrong; the trace says how. */
bool find_vring(struct vring *found, const struct table_vring *vring, uint32_t index);
bool find_pool(uint32_t *da, uint32_t *size, const struct table_carveout *pool);

/* Say in the trace what of the table is wrong, and return false. */
bool bad_table(const char *what, uint32_t value);

/* Halt with ECHO_HALT_BAD_RING. */
_Noreturn void ring_is_broken(uint32_t index, const char *what, uint32_t value, uint32_t limit);

#endif
