/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Included before the ring's sources (-include): lets the peer write between any two of their
 * loads, as one on another core can. What is looked at twice may then have changed.
 */
#ifndef RACING_PEER_H
#define RACING_PEER_H

#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L /* as polling.c says it, which is too late after this */
#endif

#include <stddef.h>
#include <string.h>

/* The program's: `size` bytes are about to be read here. */
void before_load(const volatile void *from, size_t size);

#define __atomic_load_n(word, order) (before_load(word, sizeof *(word)), __atomic_load_n(word, order))
#define memcpy(to, from, size) (before_load(from, size), memcpy(to, from, size))

#endif
