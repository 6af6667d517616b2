/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The resource table, laid out as struct resource_table in table.h. It is assembler because a
 * 32-bit word that holds the address of a symbol is no constant in C where pointers have 64 bits.
 * No instructions: any ELF assembler takes it.
 */
#include "table.h"

    .file "table.S" /* else a symbol has the name of a temporary file */

    .section .resource_table, "aw", %progbits
    .balign 8
    .globl resource_table
    .type resource_table, %object
resource_table:
    .long TABLE_VERSION
    .long 3                         /* entries */
    .long 0, 0                      /* reserved */
    .long .Lpool - resource_table
    .long .Ltrace - resource_table
    .long .Lvdev - resource_table

.Lpool:                             /* the RPMsg buffers, wherever the host puts them */
    .long TABLE_CARVEOUT
    .long TABLE_ANY                 /* da */
    .long TABLE_ANY                 /* pa */
    .long RPMSG_POOL_SIZE
    .long 0                         /* flags */
    .long 0                         /* reserved */
    .ascii "vdev0buffer"
    .zero TABLE_NAME_SIZE - 11

.Ltrace:
    .long TABLE_TRACE
    .long trace_buffer              /* da */
    .long TRACE_SIZE
    .long 0                         /* reserved */
    .ascii "trace0"
    .zero TABLE_NAME_SIZE - 6

.Lvdev:
    .long TABLE_VDEV
    .long TABLE_VIRTIO_ID_RPMSG
    .long TABLE_ANY                 /* notify id */
    .long TABLE_FEATURES            /* offered */
    .long 0                         /* in use */
    .long 0                         /* config space: none */
    .byte 0                         /* status */
    .byte 2                         /* vrings */
    .byte 0, 0                      /* reserved */
    /* da, align, num, notify id, reserved */
    .long TABLE_ANY, VRING_ALIGN, VRING_NUM, TABLE_ANY, 0
    .long TABLE_ANY, VRING_ALIGN, VRING_NUM, TABLE_ANY, 0
    .size resource_table, . - resource_table

    .section .note.GNU-stack, "", %progbits
