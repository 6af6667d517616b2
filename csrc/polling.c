/* SPDX-License-Identifier: BSD-3-Clause */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */

#include "polling.h"

#include <time.h>

/* Looks between two readings of the clock, which take longer than a look. */
#define LOOKS 8u

static uint64_t now(void)
{
    struct timespec time;
    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* Lets the other thread of this CPU core, and the power budget, have the moment. */
static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void be_quiet(const struct message_ring *ring)
{
    if (!ring->queue->quiet)
        vq_notify_off(ring->queue);
}

int32_t poll_rings(struct message_ring *receiving, struct message_ring *sending, uint64_t nanoseconds)
{
    be_quiet(receiving);
    if (sending)
        be_quiet(sending);
    const uint64_t begin = now();
    do {
        for (uint32_t looks = LOOKS; looks; looks--) {
            if (vq_pending(receiving->queue) || (sending && message_ring_has_buffer(sending)))
                return 1;
            relax();
        }
    } while (now() - begin < nanoseconds);
    return 0;
}

int32_t poll_receive(struct message_ring *receiving, struct message_ring *sending, uint64_t nanoseconds,
                     struct message_record *records, uint8_t *data, uint32_t max, int32_t how)
{
    int32_t polled = 0;
    if (nanoseconds && !vq_pending(receiving->queue) && !(sending && message_ring_has_buffer(sending)))
        polled = POLL_TRIED | (poll_rings(receiving, sending, nanoseconds) ? POLL_HIT : 0);
    int32_t result = message_ring_receive(receiving, records, data, max, how);
    return result < 0 ? result : result | polled;
}
