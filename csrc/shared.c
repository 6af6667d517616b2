/* SPDX-License-Identifier: BSD-3-Clause */
#include "shared.h"

uint8_t shared_load_u8(const uint8_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

uint32_t shared_load_u32(const uint8_t *word)
{
    return __atomic_load_n((const uint32_t *)(const void *)word, __ATOMIC_ACQUIRE);
}

void shared_store_u8(uint8_t *word, uint8_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

void shared_store_u32(uint8_t *word, uint32_t value)
{
    __atomic_store_n((uint32_t *)(void *)word, value, __ATOMIC_RELEASE);
}
