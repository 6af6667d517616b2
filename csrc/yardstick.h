/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * What `openamp bench` measures Python against: the same loops without an interpreter, over
 * the same rings and doorbell, with the same calls into message_ring.h. An end that is event-driven
 * sleeps on the link's doorbell, the very stream socket that Python sleeps on; one that polls does
 * not sleep. A tool for measuring: no other part of the package uses it, and nowhere else does C
 * sleep.
 */
#ifndef OPENAMP_PY_YARDSTICK_H
#define OPENAMP_PY_YARDSTICK_H

#include "message_ring.h"

/* cdef begin */

/* Results below zero, beside those of virtqueue.h. */
#define YARDSTICK_GONE -16   /* the other side closed its end of the doorbell */
#define YARDSTICK_SILENT -17 /* what is out did not come back in time */
#define YARDSTICK_WRONG -18  /* a message came back changed, out of order, or twice */
#define YARDSTICK_LOST -19   /* what arrived is not what was sent: lost, twice, or out of order */

#define YARDSTICK_END 0xFFFFFFFFFFFFFFFF /* the number of a flood's last message; as a count: a bad flood */

struct yardstick { /* one end of a link */
    struct message_ring *sending;
    struct message_ring *receiving;
    struct message_record *records; /* room for `batch` */
    uint8_t *data;                  /* room for their payloads */
    uint32_t batch;
    uint32_t count;         /* records received last */
    uint32_t next;          /* service: the first of them that was not served yet */
    uint32_t starved;       /* a message waits for a buffer */
    uint32_t polling;       /* sleeps only after nothing came for a while: between measurements */
    uint32_t sink;          /* service: messages to this address are counted, all others returned */
    uint64_t sunk;          /* those of this flood... */
    uint64_t misplaced;     /* ...and how many had another number */
    int32_t doorbell;       /* a stream socket; -1 for none */
    struct yardstick *peer; /* with no doorbell: the other end, worked whenever this one waits */
};

struct yardstick_run { /* one measurement */
    uint8_t *payload; /* `batch` messages: a number, a u64, and what fills it up; the caller's */
    const uint32_t *lengths; /* flood: `batch` times `length` */
    uint32_t length;         /* at least 8 */
    uint32_t batch;          /* flood: messages sent with one call */
    uint32_t source;         /* the first of... */
    uint32_t sources;        /* ...so many addresses that send in turn */
    uint32_t destination;
    uint32_t in_flight;   /* measure: messages out at once, as far as there are buffers */
    uint64_t nanoseconds; /* how long to send */
    uint64_t sent;        /* result: all that were sent */
    uint64_t received;    /* result: all that came back, or that the other side counted */
    uint64_t timed;       /* result: messages for the figure: those that came back while sending, or all... */
    uint64_t taken;       /* ...and the nanoseconds that took */
};

/* Sends messages and checks what comes back, then waits for what is still out. What is not
 * for its sources is passed over. Returns 0 or a result below zero. */
int32_t yardstick_measure(struct yardstick *end, struct yardstick_run *run);

/* Sends messages one way, then one with the number YARDSTICK_END, and waits for the other side's
 * count of them, a u64. Returns 0 or a result below zero. */
int32_t yardstick_flood(struct yardstick *end, struct yardstick_run *run);

/* Returns each message to its sender, and ends of floods with the count, until the other side is
 * gone: YARDSTICK_GONE, or what else went wrong. */
int32_t yardstick_echo(struct yardstick *end);

/* cdef end */

#endif
