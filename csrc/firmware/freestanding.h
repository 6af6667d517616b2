/* SPDX-License-Identifier: BSD-3-Clause */
/* The four functions that a C compiler may call although there is no C library. */
#ifndef FREESTANDING_H
#define FREESTANDING_H

#include <stddef.h>

void *memcpy(void *to, const void *from, size_t size);
void *memmove(void *to, const void *from, size_t size);
void *memset(void *to, int value, size_t size);
int memcmp(const void *left, const void *right, size_t size);

#endif
