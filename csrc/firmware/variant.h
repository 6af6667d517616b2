/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * What other implementations of RPMsg do otherwise, each as a switch of the compiler's command line
 * (-DNAME=VALUE) so that a host can be tried against it. The defaults are the firmware that ships.
 * VRING_NUM, VRING_ALIGN, the buffers' sizes and the offered features (table.h), and the channel's
 * name and address (echo_protocol.h) can be given in the same way.
 */
#ifndef VARIANT_H
#define VARIANT_H

#include "table.h"

/* The length of used entries; hosts may not need it. */
#define USED_WHOLE 0   /* the buffer's, whatever is in it: OpenAMP and rpmsg-lite */
#define USED_WRITTEN 1 /* what was written, so 0 for a buffer that was read: virtio's text, Linux */
#define USED_ZERO 2    /* 0 for all */
#ifndef VARIANT_USED_LENGTH
#define VARIANT_USED_LENGTH USED_WHOLE
#endif

/* Keep this many messages after they were answered, then release them, the newest first. */
#ifndef VARIANT_HOLD
#define VARIANT_HOLD 0
#endif

/* Device: fill the host's buffers in pairs, the second one first. */
#ifndef VARIANT_SWAP
#define VARIANT_SWAP 0
#endif

/* Kick for every buffer, whatever the host's flags say. */
#ifndef VARIANT_ALWAYS_KICK
#define VARIANT_ALWAYS_KICK 0
#endif

/* Want a kick for everything, also while awake. */
#ifndef VARIANT_NEVER_QUIET
#define VARIANT_NEVER_QUIET 0
#endif

/* The id of every kick; ANY is the queue's. */
#ifndef VARIANT_KICK_ID
#define VARIANT_KICK_ID TABLE_ANY
#endif

/* When the channel is announced. */
#define ANNOUNCE_ONCE 0  /* when the link is up */
#define ANNOUNCE_TWICE 1 /* the same, and again */
#define ANNOUNCE_EARLY 2 /* device: as soon as the host has posted buffers, before DRIVER_OK */
#define ANNOUNCE_ASKED 3 /* when a message comes to the address after the echo's */
#ifndef VARIANT_ANNOUNCE
#define VARIANT_ANNOUNCE ANNOUNCE_ONCE
#endif

/* Driver: write DRIVER_OK into the status and nothing else, as OpenAMP. */
#ifndef VARIANT_ONLY_DRIVER_OK
#define VARIANT_ONLY_DRIVER_OK 0
#endif

/* Driver: the value of both indexes of both rings at the start. */
#ifndef VARIANT_FIRST_INDEX
#define VARIANT_FIRST_INDEX 0
#endif

/* Driver: find the buffers to send with in the used ring, as if the device had returned them. */
#ifndef VARIANT_PREFILLED
#define VARIANT_PREFILLED 0
#endif

/* Driver: say in the rings' flags for good that no kick is wanted, and sleep all the same. */
#ifndef VARIANT_NO_INTERRUPT
#define VARIANT_NO_INTERRUPT 0
#endif

/* Driver: the length of descriptors is that of the message (Linux) and not of the buffer. */
#ifndef VARIANT_EXACT_DESCRIPTORS
#define VARIANT_EXACT_DESCRIPTORS 0
#endif

/* Driver: send this many messages before DRIVER_OK. */
#ifndef VARIANT_SENT_BEFORE
#define VARIANT_SENT_BEFORE 0
#endif

#endif
