/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * A split virtqueue, worked from either end: the driver adds buffers and gets
 * them back used, the device gets available buffers and puts them back used.
 *
 * The caller supplies all memory. The peer may write anything into the ring at
 * any time: each shared word is loaded once and checked, and what this side needs
 * to remember (free list, chain lengths, what is outstanding) is never read back
 * from shared memory. An impossible value sets `fault` and every later call that
 * returns a result returns VQ_BROKEN. One thread at a time may work a virtqueue.
 *
 * Reference: virtio 1.2, section 2.7 (split virtqueues).
 */
#ifndef OPENAMP_PY_VIRTQUEUE_H
#define OPENAMP_PY_VIRTQUEUE_H

#include <stdint.h>

/* cdef begin: the lines up to "cdef end" are also what cffi is given */

/* Results below zero. */
#define VQ_EMPTY -1  /* nothing there; from the adding side: no room */
#define VQ_BROKEN -2 /* the queue has a fault */
#define VQ_SMALL -3  /* the peer's buffer cannot hold the message */

/* What broke a queue; fault_value and fault_limit say by which number. */
#define VQ_FAULT_INDEX_JUMP 1    /* entries published at once; limit: possible ones */
#define VQ_FAULT_HEAD_RANGE 2    /* head; limit: num */
#define VQ_FAULT_HEAD_STATE 3    /* head that is not (or is already) outstanding */
#define VQ_FAULT_NEXT_RANGE 4    /* next; limit: entries of its table */
#define VQ_FAULT_CHAIN_LENGTH 5  /* descriptors walked; limit: those allowed */
#define VQ_FAULT_ADDRESS 6       /* address of a buffer; limit: its length */
#define VQ_FAULT_INDIRECT 7      /* length of an indirect table; limit: the largest */
#define VQ_FAULT_ORDER 8         /* a readable descriptor after a writable one: its position */

struct vq_region { /* memory that descriptors may point into */
    uint64_t pa;
    uint64_t size;
    uint8_t *base;
};

struct vq_span { /* one contiguous piece of a buffer */
    uint64_t pa;
    uint8_t *base; /* NULL where this side only names it (driver) */
    uint32_t length;
    uint32_t writable; /* by the device */
};

struct vq_slot { /* private, one for each descriptor */
    uint16_t next;   /* driver: the descriptor after this one, in its chain or the free list */
    uint16_t state;  /* of the chain with this head: below */
    uint32_t extent; /* of that chain; driver: in descriptors; device: in bytes */
};

#define VQ_SLOT_FREE 0
#define VQ_SLOT_OUT 1  /* driver: the device has it; device: taken and not put back */
#define VQ_SLOT_HELD 2 /* driver: back from the device, and not free yet */
#define VQ_SLOT_INHERITED 3 /* driver: out, and another driver lent less than a buffer: see vq_resume */

/* What a driver notes where single descriptors have no use for `next`, for another one that goes on:
 * vq_leave for each, and message_ring_receive VQ_LEFT_FREE for a buffer it keeps. No driver that
 * starts a ring writes these. */
#define VQ_LEFT_OUT 0xFFFE
#define VQ_LEFT_FREE 0xFFFF

struct vq {
    uint8_t *ring;       /* shared: the descriptors; the three parts may lie anywhere */
    uint16_t *available; /* flags, idx, ring[num], used_event: all u16 */
    uint16_t *used;      /* flags, idx: u16; elements[num] of 8 bytes; avail_event u16 */
    struct vq_slot *slots;
    const struct vq_region *regions;
    uint32_t region_count;
    uint16_t num;
    uint16_t mask; /* num - 1 */
    uint8_t driver;    /* 1: this side is the driver */
    uint8_t event_idx; /* notifications are suppressed by index instead of flag */
    uint8_t indirect;  /* indirect descriptors were negotiated */
    uint8_t quiet;     /* this side asked not to be notified, or its wish has lapsed */
    uint16_t next;      /* index this side publishes next */
    uint16_t published; /* index the other side can see */
    uint16_t seen;      /* entries of the other side's ring taken so far */
    uint16_t limit;     /* the other side's index when last loaded */
    uint16_t free_head;
    uint16_t free_count;
    uint16_t outstanding; /* driver: chains out; device: chains taken, not put back */
    uint32_t whole;       /* driver: length that inherited descriptors get when they come back */
    int32_t fault;
    uint64_t fault_value;
    uint64_t fault_limit;
};

/* Starts from zero; the driver also clears the ring memory. Notifications are on. */
void vq_start(struct vq *q);

/* Continues with the indexes in memory. The next entry to take from the other side's
 * ring is `seen`: on the device normally its own used index (the chains after it are
 * taken anew), on the driver the used index up to which it had looked. What is out is taken to be
 * what was added since: right where the device returns chains in order. Notifications are on. */
int32_t vq_attach(struct vq *q, uint16_t seen);
uint16_t vq_available_index(const struct vq *q); /* as it stands in memory */
uint16_t vq_used_index(const struct vq *q);

/* Driver of chains of one descriptor each: goes on where another one left, which had published
 * `available`. `heads` were out when `count` entries of that were still to come back; used ones
 * that were not looked at are among them. Where it lent less than `whole` bytes, the descriptor is
 * corrected when it comes back. Returns 0 or VQ_BROKEN. Notifications are on. */
int32_t vq_resume(struct vq *q, uint16_t available, const uint16_t *heads, uint16_t count, uint32_t whole);

/* Driver of such chains: says in the descriptors which of them are out, for the one that goes on.
 * A device does not look at that. */
void vq_leave(struct vq *q);

/* Driver: a chain of `readable` spans, then `writable` ones. Returns its head or VQ_EMPTY
 * when too few descriptors are free. Seen by the device only after vq_publish. */
int32_t vq_add(struct vq *q, const struct vq_span *spans, uint32_t readable, uint32_t writable);

/* Driver: takes back one used chain. Returns its head, VQ_EMPTY or VQ_BROKEN. */
int32_t vq_get_used(struct vq *q, uint32_t *length);

/* Driver: the same, but the chain's descriptors stay with it until vq_add_again, which lends
 * a chain of one descriptor anew. That returns 0, or VQ_EMPTY where `head` is not held (the
 * caller's mistake; nothing changes). */
int32_t vq_hold_used(struct vq *q, uint32_t *length);
int32_t vq_add_again(struct vq *q, uint16_t head, const struct vq_span *span);

/* Device: takes one available chain, into at most `max` spans. Returns its head, VQ_EMPTY
 * or VQ_BROKEN. */
int32_t vq_get_available(struct vq *q, struct vq_span *spans, uint32_t max, uint32_t *count);

/* Device: as if the last vq_get_available had not been. */
void vq_unget_available(struct vq *q, uint16_t head);

/* Device: gives a taken chain back. Seen by the driver only after vq_publish. Returns 0, or
 * VQ_EMPTY where `head` is not outstanding (the caller's mistake; nothing changes). */
int32_t vq_put_used(struct vq *q, uint16_t head, uint32_t length);

/* Makes all that was added or put visible. Returns 1 when the other side wants a kick, 0 when
 * not, or VQ_BROKEN. */
int32_t vq_publish(struct vq *q);

/* 1 when the other side's ring holds something not yet taken, 0 when not, or VQ_BROKEN. */
int32_t vq_pending(const struct vq *q);

/* Notifications this side gets. vq_notify_on returns 1 when something came in meanwhile,
 * which will not be notified, 0 when not, or VQ_BROKEN. With EVENT_IDX the wish is for the next
 * entry alone: it lapses once that is taken. */
void vq_notify_off(struct vq *q);
int32_t vq_notify_on(struct vq *q);

/* cdef end */

#endif
