/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * What the native core gives its firmware: the whole "SoC" is four functions.
 *
 * The firmware's entry point has the type native_entry. It is called on the stack of the core's
 * only thread, with RAM mapped at its device addresses. The struct stays valid for the life of the
 * core. Whatever else the firmware does (a system call of its own, an access outside of its memory)
 * is a fault.
 */
#ifndef NATIVE_SOC_H
#define NATIVE_SOC_H

#include <stdint.h>

#define NATIVE_SOC_ABI 1u

struct native_soc {
    uint32_t abi; /* NATIVE_SOC_ABI; a firmware built for another number must not go on */
    uint32_t reserved;

    /*
     * Ring the host's doorbell with the low 8 bits of notify_id. Never blocks: a full doorbell
     * already wakes.
     */
    void (*kick)(uint32_t notify_id);

    /*
     * Sleep until the host rings, and take all rings that are there: they are hints, so look at
     * every queue. Rings that came before the call count. 0 = woken; 1 = the host closed its end
     * and nothing will ever come. A core that waits again after a 1 is powered down, because it
     * would spin.
     */
    uint32_t (*wait)(void);

    /*
     * Power down in good order; the low 8 bits of code are the exit status of the core. Does not
     * return.
     */
    void (*halt)(uint32_t code);

    /* Ask the host for a reset. Does not return: it is the host that boots the core again. */
    void (*reset)(void);
};

typedef void native_entry(const struct native_soc *soc);

#endif
