/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * RPMsg messages through one virtqueue, in one direction and from one end.
 *
 * The driver owns the buffers: buffer n lies at pool + n * buffer_size and goes with
 * descriptor n. The device uses what the driver lends it. A message is copied once,
 * between the caller's memory and the shared buffer, and its header is copied out
 * before it is looked at.
 */
#ifndef OPENAMP_PY_MESSAGE_RING_H
#define OPENAMP_PY_MESSAGE_RING_H

#include "virtqueue.h"

/* cdef begin */

#define MESSAGE_HEADER 16 /* bytes before the payload: src, dst, reserved u32; len, flags u16 */

/* Bits that message_ring_receive and message_ring_release add to their result. */
#define MESSAGE_KICK 0x10000 /* the other side wants to be told of returned buffers */
#define MESSAGE_MORE 0x20000 /* there is more and no notification will come: call again */

struct message_record { /* one received message; packed like the caller unpacks it */
    uint32_t src;
    uint32_t dst;
    uint32_t offset; /* of the payload in the caller's data */
    uint16_t length; /* of the payload */
    uint16_t flags;
    uint16_t head; /* for message_ring_release */
    uint16_t pad;
};

struct message_ring {
    struct vq *queue;
    struct vq_span *spans; /* private room for one chain: num entries */
    uint64_t pool_pa;      /* driver only */
    uint8_t *pool;         /* driver only */
    uint32_t buffer_size;
    uint32_t sender; /* 1: this end sends */
    uint64_t bad_length; /* messages dropped because header and buffer disagree */
};

/* Driver, receiving end: lends all buffers to the device. Does not ask for a kick. */
int32_t message_ring_fill(struct message_ring *ring);

/* Sends one message, and with `more` 0 publishes it and those before it; with `more` 1 that is
 * left to a later call or vq_publish. Returns 1 when the other side wants a kick, 0 when not,
 * VQ_EMPTY without a free buffer, VQ_SMALL where the device was lent one that is too small (kept
 * for a shorter message), or VQ_BROKEN. */
int32_t message_ring_send(struct message_ring *ring, uint32_t src, uint32_t dst, const uint8_t *payload,
                          uint32_t length, int32_t more);

/* Sends `count` messages that lie end to end in `payload`. Returns how many went, with
 * MESSAGE_KICK added; fewer than `count` when buffers ran out or one is too small. */
int32_t message_ring_send_many(struct message_ring *ring, uint32_t src, uint32_t dst, const uint8_t *payload,
                               const uint32_t *lengths, uint32_t count);

/* Receives up to `max` messages (at most 0xFFFF): records, and payloads into `data` of
 * max * (buffer_size - MESSAGE_HEADER) bytes. With `give_back` the buffers return to the other
 * side at once, otherwise each waits for message_ring_release. Returns the count and the two
 * bits above. */
int32_t message_ring_receive(struct message_ring *ring, struct message_record *records, uint8_t *data,
                             uint32_t max, int32_t give_back);

/* Gives `count` received buffers back, each named once. Returns MESSAGE_KICK, 0, VQ_EMPTY where
 * one is not held (nothing changes), or VQ_BROKEN. */
int32_t message_ring_release(struct message_ring *ring, const uint16_t *heads, uint32_t count);

/* Asks to be notified of a free buffer. Returns 1 when there is one already, 0 when not, or
 * VQ_BROKEN. */
int32_t message_ring_want_buffer(struct message_ring *ring);

/* cdef end */

#endif
