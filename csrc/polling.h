/* SPDX-License-Identifier: BSD-3-Clause */
/* Looking at rings for a short time instead of sleeping. */
#ifndef OPENAMP_PY_POLLING_H
#define OPENAMP_PY_POLLING_H

#include "message_ring.h"

/* cdef begin */

/* Spins until a message is there, or a free buffer of `sending` where that is not NULL, or the
 * time is up. Neither side is notified meanwhile, nor after it: both queues are quiet. Returns 1
 * when there is something, 0 when not; a broken queue counts as something. */
int32_t poll_rings(struct message_ring *receiving, struct message_ring *sending, uint64_t nanoseconds);

/* Bits of poll_receive's result beside those of message_ring_receive. */
#define POLL_TRIED 0x80000 /* nothing was there at first */
#define POLL_HIT 0x100000  /* but then something was */

/* message_ring_receive, and poll_rings before it where nothing is there. */
int32_t poll_receive(struct message_ring *receiving, struct message_ring *sending, uint64_t nanoseconds,
                     struct message_record *records, uint8_t *data, uint32_t max, int32_t how);

/* cdef end */

#endif
