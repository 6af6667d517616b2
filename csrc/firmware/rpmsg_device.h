/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * RPMsg over virtio in the device role, for firmware: one vdev entry of the resource table, two
 * split vrings with flag-based suppression, no memory but the caller's struct. Linked with
 * rpmsg_driver.c instead of rpmsg_device.c, the same functions work in the driver role.
 *
 * The host may write to every shared word at any time. Each is loaded once and the copy is checked;
 * indexes are kept here and never read back. What a confused host could send costs one message,
 * which is dropped and counted; what no host may ever do (an index that jumps, a descriptor outside
 * of RAM) halts the core with ECHO_HALT_BAD_RING.
 *
 * All functions are for one thread of control. Kicks are gathered: they go out before each sleep,
 * every 64 buffers, and on rpmsg_flush.
 */
#ifndef RPMSG_DEVICE_H
#define RPMSG_DEVICE_H

#include <stdbool.h>
#include <stdint.h>

#include "table.h"

#define RPMSG_NS_ADDRESS 53u
#define RPMSG_NAME_SIZE 32

#define RPMSG_NS_CREATE 0u
#define RPMSG_NS_DESTROY 1u

/* Name-service message. */
struct rpmsg_ns {
    char name[RPMSG_NAME_SIZE]; /* zero padded by us; from the host the NUL may be missing */
    uint32_t address;
    uint32_t flags;
};

_Static_assert(sizeof(struct rpmsg_ns) == 40, "name-service message");

enum rpmsg_link {
    RPMSG_UP,        /* go on */
    RPMSG_RESET,     /* the driver left: hands off the rings, then rpmsg_wait_driver */
    RPMSG_HOST_GONE, /* nothing will ever come */
    RPMSG_BAD_TABLE  /* the host filled the table in wrongly; the trace says how */
};

struct vring_descriptor;
struct vring_available;
struct vring_used;

struct rpmsg_queue {
    const struct vring_descriptor *descriptor;
    const struct vring_available *available;
    struct vring_used *used;
    uint32_t index; /* 0 to the host, 1 from the host */
    uint32_t notify_id;
    uint16_t num;
    uint16_t seen;       /* available index as last loaded and checked */
    uint16_t taken;      /* free-running: the next available entry to take */
    uint16_t used_index; /* free-running: the next used entry to write */
    bool kick_owed;
};

struct rpmsg_device {
    struct table_vdev *vdev;
    uint32_t features; /* in use */
    uint32_t pool_da;
    uint32_t pool_size;
    uint32_t batch; /* buffers taken since the last flush */
    struct rpmsg_queue to_host;
    struct rpmsg_queue from_host;

    /* Dropped so far, over all connections. */
    uint32_t bad_buffers; /* outside of the pool, misaligned, or shorter than a header */
    uint32_t bad_lengths; /* header length larger than the buffer */
    uint32_t too_long;    /* replies larger than the host's buffer */
};

/*
 * A message in the host's buffer, valid until rpmsg_release. The host can still change the payload.
 */
struct rpmsg_message {
    uint32_t source;
    uint32_t destination;
    const unsigned char *payload; /* 4-byte aligned */
    uint32_t length;
    uint32_t buffer_length;
    uint16_t head;
};

/*
 * Sleep until the driver is ready (RPMSG_UP) or the host is gone. Answers a reset request with
 * status 0.
 */
enum rpmsg_link rpmsg_wait_driver(struct rpmsg_device *device);

/* With ANNOUNCE_EARLY: spin until the driver has posted its buffers, also before it is ready. */
enum rpmsg_link rpmsg_wait_buffers(struct rpmsg_device *device);

/* Read what the driver wrote into the table and join the rings where they are. */
enum rpmsg_link rpmsg_open(struct rpmsg_device *device, const struct table_carveout *pool);

/* Wait for the next message. */
enum rpmsg_link rpmsg_receive(struct rpmsg_device *device, struct rpmsg_message *message);

/* Give the message's buffer back. */
void rpmsg_release(struct rpmsg_device *device, const struct rpmsg_message *message);

/*
 * Send; waits for a buffer if the host has posted none. The payload may be that of a message in
 * hand. A payload that does not fit into the host's buffer is dropped and counted.
 */
enum rpmsg_link rpmsg_send(struct rpmsg_device *device, uint32_t source, uint32_t destination,
                           const void *payload, uint32_t length);

/*
 * Announce or withdraw a channel; nothing happens if the driver has not taken the name-service
 * feature.
 */
enum rpmsg_link rpmsg_announce(struct rpmsg_device *device, const char *name, uint32_t address,
                               uint32_t flags);

/* Send the kicks that are owed. */
void rpmsg_flush(struct rpmsg_device *device);

#endif
