/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The firmware's resource table, as table.S lays it down and as the host completes it in memory: it
 * fills in the carveout's addresses, the vrings' addresses and notify ids, the features in use and
 * the status. The constants serve the assembler too, so they have no suffixes.
 */
#ifndef TABLE_H
#define TABLE_H

#define TABLE_VERSION 1
#define TABLE_CARVEOUT 0 /* entry types */
#define TABLE_TRACE 2
#define TABLE_VDEV 3
#define TABLE_ANY 0xFFFFFFFF /* an address or a notify id that the host is to choose */
#define TABLE_NAME_SIZE 32
#define TABLE_SIZE 200

#define TABLE_VIRTIO_ID_RPMSG 7
#define TABLE_FEATURE_NS 1 /* bit 0: name service */

#ifndef TABLE_FEATURES
#define TABLE_FEATURES TABLE_FEATURE_NS /* offered */
#endif
#ifndef VRING_NUM
#define VRING_NUM 256 /* entries offered; the host may choose fewer */
#endif
#ifndef VRING_ALIGN
#define VRING_ALIGN 4096 /* of the used ring */
#endif
#ifndef RPMSG_TO_HOST_SIZE
#define RPMSG_TO_HOST_SIZE 512 /* of a buffer; where the host is the driver, it is its choice */
#endif
#ifndef RPMSG_FROM_HOST_SIZE
#define RPMSG_FROM_HOST_SIZE 512
#endif
#define RPMSG_POOL_SIZE (VRING_NUM * (RPMSG_TO_HOST_SIZE + RPMSG_FROM_HOST_SIZE))
#define TRACE_SIZE 4096

#ifndef __ASSEMBLER__

#include <stddef.h>
#include <stdint.h>

struct table_carveout {
    uint32_t type;
    uint32_t da;
    uint32_t pa;
    uint32_t length;
    uint32_t flags;
    uint32_t reserved;
    char name[TABLE_NAME_SIZE];
};

struct table_trace {
    uint32_t type;
    uint32_t da;
    uint32_t length;
    uint32_t reserved;
    char name[TABLE_NAME_SIZE];
};

struct table_vring {
    uint32_t da;
    uint32_t align;
    uint32_t num;
    uint32_t notify_id;
    uint32_t reserved; /* "pa" in Linux, which writes it */
};

struct table_vdev {
    uint32_t type;
    uint32_t id;
    uint32_t notify_id;
    uint32_t device_features;
    uint32_t driver_features; /* the host's choice among them ("gfeatures") */
    uint32_t config_length;
    uint8_t status;
    uint8_t vring_count;
    uint8_t reserved[2];
    struct table_vring vring[2];
};

struct resource_table {
    uint32_t version;
    uint32_t count;
    uint32_t reserved[2];
    uint32_t offset[3];
    struct table_carveout pool;
    struct table_trace trace;
    struct table_vdev vdev;
};

_Static_assert(sizeof(struct table_carveout) == 56, "carveout entry");
_Static_assert(sizeof(struct table_trace) == 48, "trace entry");
_Static_assert(sizeof(struct table_vdev) == 68, "vdev entry with two vrings");
_Static_assert(offsetof(struct table_vdev, status) == 24, "vdev status");
_Static_assert(offsetof(struct table_vdev, vring) == 28, "vdev vrings");
_Static_assert(sizeof(struct resource_table) == TABLE_SIZE, "resource table");

extern struct resource_table resource_table;

#endif
#endif
