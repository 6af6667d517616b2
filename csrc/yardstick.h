/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * What `openamp bench` measures Python against: the same loops without an interpreter, over
 * the same rings and doorbell, with the same calls into message_ring.h (one for each message
 * sent, one for each batch received). A tool for measuring: no other part of the package uses
 * it, and nowhere else does C wait.
 */
#ifndef OPENAMP_PY_YARDSTICK_H
#define OPENAMP_PY_YARDSTICK_H

#include "message_ring.h"

/* cdef begin */

/* Results below zero, beside those of virtqueue.h. */
#define YARDSTICK_GONE -16   /* the other side closed its end of the doorbell */
#define YARDSTICK_SILENT -17 /* what is out did not come back in time */
#define YARDSTICK_WRONG -18  /* a message came back changed, out of order, or twice */

struct yardstick { /* one end of a link */
    struct message_ring *sending;
    struct message_ring *receiving;
    struct message_record *records; /* room for `batch` */
    uint8_t *data;                  /* room for their payloads */
    uint32_t batch;
    uint32_t count;         /* records received last */
    uint32_t next;          /* echo: the first of them that was not returned yet */
    int32_t doorbell;       /* a stream socket; -1 for none */
    struct yardstick *peer; /* with no doorbell: the other end, worked whenever this one waits */
};

struct yardstick_run { /* one measurement */
    uint8_t *payload; /* the message's number, a u64, and what fills it up: the caller's */
    uint32_t length;  /* at least 8 */
    uint32_t source;
    uint32_t destination;
    uint32_t in_flight;   /* messages out at once, as far as there are buffers */
    uint64_t nanoseconds; /* how long to send */
    uint64_t sent;        /* result: all that were sent */
    uint64_t received;    /* result: all that came back */
    uint64_t round_trips; /* result: those that came back while sending... */
    uint64_t taken;       /* ...and the nanoseconds that took */
};

/* Sends messages and checks what comes back, then waits for what is still out. What is not
 * for `source` is passed over. Returns 0 or a result below zero. */
int32_t yardstick_measure(struct yardstick *end, struct yardstick_run *run);

/* Returns each message to its sender until the other side is gone: YARDSTICK_GONE, or what
 * else went wrong. */
int32_t yardstick_echo(struct yardstick *end);

/* cdef end */

#endif
