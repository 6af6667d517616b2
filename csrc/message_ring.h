/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * RPMsg messages through one virtqueue, in one direction and from one end.
 *
 * The driver owns the buffers: they lie side by side in its pool, and each goes with one
 * descriptor. The device uses what the driver lends it. A message is copied once,
 * between the caller's memory and the shared buffer (or not at all: reserved and kept
 * buffers), and its header is copied out before it is looked at.
 */
#ifndef OPENAMP_PY_MESSAGE_RING_H
#define OPENAMP_PY_MESSAGE_RING_H

#include "virtqueue.h"

/* cdef begin */

#define MESSAGE_HEADER 16 /* bytes before the payload: src, dst, reserved u32; len, flags u16 */
#define MESSAGE_ANY 0xFFFFFFFF /* no address */
#define MESSAGE_SOURCE 4  /* bytes after each payload in the caller's data: its source */

/* Bits for message_ring_receive. */
#define MESSAGE_GIVE_BACK 1 /* buffers return to the other side at once, but for those to keep */
#define MESSAGE_STAY_QUIET 2 /* where notifications are off when nothing is left, they stay off */

/* Bits that results have beside a count. */
#define MESSAGE_KICK 0x10000 /* the other side wants to be told */
#define MESSAGE_MORE 0x20000 /* there is more and no notification will come: call again */
#define MESSAGE_ALIKE 0x40000 /* all received have the destination and length of the first, none is kept */
#define MESSAGE_EVEN 0x200000 /* not that, but all have the length of the first, and none is kept */

/* What becomes of a received message's buffer, in its record. */
#define MESSAGE_RETURNED 0
#define MESSAGE_KEPT 1     /* the buffer waits for message_ring_release; the payload was copied */
#define MESSAGE_IN_PLACE 2 /* the same, but the payload is only there: at places[head]. One that came in
                            * several descriptors is copied after all: MESSAGE_KEPT */

struct message_record { /* one received message; packed like the caller unpacks it */
    uint32_t dst;
    uint16_t length; /* of the payload */
    uint16_t kept;
    uint32_t src;
    uint32_t offset; /* of the payload in the caller's data; its source follows it as a u32 */
    uint32_t head;   /* for message_ring_release */
};

struct message_keep { /* messages to this destination keep their buffers */
    uint32_t dst;
    uint32_t kept; /* MESSAGE_KEPT or MESSAGE_IN_PLACE */
};

struct message_ring {
    struct vq *queue;
    struct vq_span *spans; /* private room for one chain: num entries */
    uint64_t *places;      /* private, num entries: payload of the buffer that is kept or reserved, as pa */
    uint16_t *spares;      /* private, num entries: device, sending: buffers reserved and not used */
    uint8_t *scratch;      /* private, buffer_size bytes: device, receiving: a message that came in parts */
    uint64_t pool_pa;      /* driver only */
    uint8_t *pool;         /* driver only */
    const uint32_t *offsets; /* driver only, num entries, the caller's: where in the pool the buffers lie */
    uint32_t buffer_size;
    uint32_t sender; /* 1: this end sends */
    uint32_t spare_count;
    uint32_t keep_count;
    const struct message_keep *keep; /* receiving: sorted by dst; the caller's */
    uint64_t messages;   /* sent or received */
    uint64_t bytes;      /* of their payloads */
    uint64_t bad_length; /* dropped because header and buffer disagree */
    uint64_t bad_source; /* dropped because their source is the address that means "any" */
    uint64_t kicks;      /* times the other side wanted to be told... */
    uint64_t unkicked;   /* ...and times it did not */
};

/* Driver, receiving end: lends all buffers to the device. Does not ask for a kick. */
int32_t message_ring_fill(struct message_ring *ring);

/* Sends one message and publishes it. Returns 1 when the other side wants a kick, 0 when not,
 * VQ_EMPTY without a free buffer, VQ_SMALL where it is longer than a buffer of this ring, or than
 * the one the device was lent (kept for a shorter message), or VQ_BROKEN. */
int32_t message_ring_send(struct message_ring *ring, uint32_t src, uint32_t dst, const uint8_t *payload,
                          uint32_t length);

/* Sends `count` messages that lie end to end in `payload`. Returns how many went, with
 * MESSAGE_KICK added; fewer than `count` when buffers ran out or one is too small. */
int32_t message_ring_send_many(struct message_ring *ring, uint32_t src, uint32_t dst, const uint8_t *payload,
                               const uint32_t *lengths, uint32_t count);

/* Takes a free buffer for a message that is built in it: at places[head], at most `capacity` bytes.
 * Returns its head, VQ_EMPTY, VQ_SMALL where the device was lent one that is no buffer for a whole
 * message, or VQ_BROKEN. */
int32_t message_ring_reserve(struct message_ring *ring, uint32_t *capacity);

/* Sends the message in a reserved buffer; results as of message_ring_send, and VQ_EMPTY where
 * `head` is not reserved. After VQ_SMALL it still is. */
int32_t message_ring_commit(struct message_ring *ring, uint16_t head, uint32_t src, uint32_t dst, uint32_t length);

/* The reserved buffer is free again. Returns 0, or VQ_EMPTY where `head` is not reserved. */
int32_t message_ring_cancel(struct message_ring *ring, uint16_t head);

/* Receives up to `max` messages (at most 0xFFFF): records, and payloads with their sources into
 * `data` of max * (buffer_size - MESSAGE_HEADER + MESSAGE_SOURCE) bytes. Without MESSAGE_GIVE_BACK
 * each buffer waits for message_ring_release. Returns the count and bits above.
 * Messages that are bad are dropped and counted. */
int32_t message_ring_receive(struct message_ring *ring, struct message_record *records, uint8_t *data,
                             uint32_t max, int32_t how);

/* Gives `count` kept buffers back, each named once. Returns MESSAGE_KICK, 0, VQ_EMPTY where
 * one is not kept (nothing changes), or VQ_BROKEN. */
int32_t message_ring_release(struct message_ring *ring, const uint16_t *heads, uint32_t count);

/* 1 when a buffer is free, 0 when not. A broken queue counts as one: sending will tell. */
int32_t message_ring_has_buffer(const struct message_ring *ring);

/* Asks to be notified of a free buffer. Returns 1 when there is one already, 0 when not, or
 * VQ_BROKEN. */
int32_t message_ring_want_buffer(struct message_ring *ring);

/* cdef end */

#endif
