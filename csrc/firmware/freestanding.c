/* SPDX-License-Identifier: BSD-3-Clause */
#include "freestanding.h"

#include <stdint.h>

#if defined(__GNUC__) && !defined(__clang__)
/* Do not recognise the loops below as what they implement, and call them. */
#pragma GCC optimize("no-tree-loop-distribute-patterns")
#endif

#define BLOCK 16u

typedef uint32_t aliased_word __attribute__((may_alias));

/*
 * Sixteen bytes: vector or multiple-word moves where the machine has them. Word by word, for some
 * compilers make a call of memcpy of a struct's assignment.
 */
static void copy_block(unsigned char *to, const unsigned char *from)
{
    aliased_word *target = (aliased_word *)(void *)to;
    const aliased_word *source = (const aliased_word *)(const void *)from;
    uint32_t word[4] = {source[0], source[1], source[2], source[3]};

    target[0] = word[0];
    target[1] = word[1];
    target[2] = word[2];
    target[3] = word[3];
}

/* Forward copy; also right for overlapping memory when to is below from. */
void *memcpy(void *to, const void *from, size_t size)
{
    unsigned char *target = to;
    const unsigned char *source = from;

    if ((((uintptr_t)target | (uintptr_t)source) & (sizeof(uint32_t) - 1)) == 0) {
        for (; size >= BLOCK; size -= BLOCK) {
            copy_block(target, source);
            target += BLOCK;
            source += BLOCK;
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
