/* SPDX-License-Identifier: BSD-3-Clause */
/* Single words in memory that the other side reads and writes: status, features, addresses. */
#ifndef OPENAMP_PY_SHARED_H
#define OPENAMP_PY_SHARED_H

#include <stdint.h>

/* cdef begin */

/* Loads acquire and stores release: what was written before a store is visible to whoever
 * loads the value. A u32 must be 4-byte aligned. */
uint8_t shared_load_u8(const uint8_t *word);
uint32_t shared_load_u32(const uint8_t *word);
void shared_store_u8(uint8_t *word, uint8_t value);
void shared_store_u32(uint8_t *word, uint32_t value);

/* cdef end */

#endif
