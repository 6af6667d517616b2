/* SPDX-License-Identifier: BSD-3-Clause */
#include "freestanding.h"

#include <stdint.h>

#if defined(__GNUC__) && !defined(__clang__)
/* Do not recognise the loops below as what they implement, and call them. */
#pragma GCC optimize("no-tree-loop-distribute-patterns")
#endif

/*
 * Sixteen bytes with the alignment of a word: vector or multiple-word moves where the machine has
 * them.
 */
struct block {
    uint32_t word[4];
} __attribute__((may_alias));

/* Forward copy; also right for overlapping memory when to is below from. */
void *memcpy(void *to, const void *from, size_t size)
{
    unsigned char *target = to;
    const unsigned char *source = from;

    if ((((uintptr_t)target | (uintptr_t)source) & (sizeof(uint32_t) - 1)) == 0) {
        for (; size >= sizeof(struct block); size -= sizeof(struct block)) {
            *(struct block *)(void *)target = *(const struct block *)(const void *)source;
            target += sizeof(struct block);
            source += sizeof(struct block);
        }
    }
    for (; size > 0; size--)
        *target++ = *source++;
    return to;
}

void *memmove(void *to, const void *from, size_t size)
{
    unsigned char *target = to;
    const unsigned char *source = from;

    if ((uintptr_t)to <= (uintptr_t)from)
        return memcpy(to, from, size);
    while (size > 0) {
        size--;
        target[size] = source[size];
    }
    return to;
}

void *memset(void *to, int value, size_t size)
{
    unsigned char *target = to;

    for (; size > 0; size--)
        *target++ = (unsigned char)value;
    return to;
}

int memcmp(const void *left, const void *right, size_t size)
{
    const unsigned char *a = left;
    const unsigned char *b = right;

    for (; size > 0; size--, a++, b++)
        if (*a != *b)
            return *a < *b ? -1 : 1;
    return 0;
}
