/* SPDX-License-Identifier: BSD-3-Clause */
/* Port for the native core: RAM and doorbell come from csrc/native_core.c. */
#include <stddef.h>

#include "native_soc.h"
#include "port.h"

void firmware_entry(const struct native_soc *native_soc);

static const struct native_soc *soc;

void firmware_entry(const struct native_soc *native_soc)
{
    if (native_soc->abi != NATIVE_SOC_ABI)
        __builtin_trap();
    soc = native_soc;
    firmware_main();
}

void port_kick(uint32_t notify_id)
{
    soc->kick(notify_id);
}

bool port_wait(void)
{
    return soc->wait() == 0;
}

void port_full_fence(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

_Noreturn void port_halt(uint32_t code)
{
    soc->halt(code);
    __builtin_trap(); /* halt does not return */
}

_Noreturn void port_reset(void)
{
    soc->reset();
    __builtin_trap(); /* reset does not return */
}

_Noreturn void port_crash(uint32_t address)
{
    *(volatile uint32_t *)(uintptr_t)address = 0;
    __builtin_trap(); /* something is mapped there */
}
