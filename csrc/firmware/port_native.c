/* SPDX-License-Identifier: BSD-3-Clause */
/* Port for the native core: RAM and doorbell come from csrc/native_core.c. */
#include <stddef.h>

#include "native_soc.h"
#include "port.h"

_Noreturn void native_start(const struct native_soc *native_soc);

static const struct native_soc *soc;

/*
 * The core calls firmware_entry on a stack of the process. This one is in RAM, as on any SoC, so
 * that a coredump has it and a debugger finds the callers.
 */
#define STACK_SIZE "16384"
__asm__("    .pushsection .bss.stack, \"aw\", %nobits\n"
        "    .balign 16\n"
        "    .skip " STACK_SIZE "\n"
        "native_stack_top:\n"
        "    .popsection\n"
        "    .pushsection .text.entry, \"ax\", %progbits\n"
        "    .globl firmware_entry\n"
        "    .type firmware_entry, %function\n"
        "firmware_entry:\n"
        "    .cfi_startproc\n"
#if defined(__x86_64__)
        "    .cfi_undefined rip\n" /* nobody called: where a debugger's backtrace ends */
        "    leaq native_stack_top(%rip), %rsp\n"
        "    xorl %ebp, %ebp\n"
        "    call native_start\n"
#elif defined(__aarch64__)
        "    .cfi_undefined x30\n"
        "    adrp x9, native_stack_top\n"
        "    add x9, x9, :lo12:native_stack_top\n"
        "    mov sp, x9\n"
        "    mov x29, xzr\n"
        "    bl native_start\n"
#endif
        "    .cfi_endproc\n"
        "    .size firmware_entry, . - firmware_entry\n"
        "    .popsection\n");

_Noreturn void native_start(const struct native_soc *native_soc)
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

/* There is no console: the host reads the trace buffer. */
void port_console(const char *text, uint32_t length)
{
    (void)text;
    (void)length;
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
