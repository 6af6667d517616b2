/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Port for Arm's mps2 and mps3 boards with a Cortex-M, as QEMU has them. The host writes the image
 * into RAM that it shares and zeroes .bss; the doorbell is a UART, one byte a ring; another UART is
 * the console. build.py says where they are.
 */
#include <stddef.h>

#include "port.h"

/* CMSDK APB UART. */
struct uart {
    uint32_t data;
    uint32_t state;
    uint32_t control;
    uint32_t interrupt; /* pending ones; writing a 1 clears */
    uint32_t divider;
};

#define UART_TX_FULL 1u /* in state */
#define UART_RX_FULL 2u
#define UART_TX_ENABLE 1u /* in control */
#define UART_RX_ENABLE 2u
#define UART_RX_INTERRUPT_ENABLE 8u
#define UART_RX_INTERRUPT 2u /* in interrupt */
#define UART_DIVIDER_MIN 16u /* the least that the device takes; QEMU keeps no baud rate */

#define DOORBELL ((volatile struct uart *)DOORBELL_UART)
#define CONSOLE ((volatile struct uart *)CONSOLE_UART)

#define INTERRUPT_ENABLE ((volatile uint32_t *)0xE000E100u)   /* NVIC_ISER, a bit each */
#define INTERRUPT_DISABLE ((volatile uint32_t *)0xE000E180u)  /* NVIC_ICER */
#define VECTOR_TABLE (*(volatile uint32_t *)0xE000ED08u)      /* VTOR */
#define APPLICATION_RESET (*(volatile uint32_t *)0xE000ED0Cu) /* AIRCR */
#define SYSTEM_RESET_REQUEST 0x05FA0004u                      /* with the key in the upper half */

#if __ARM_ARCH >= 8
#define MPU_CONTROL (*(volatile uint32_t *)0xE000ED94u)
#define MPU_REGION (*(volatile uint32_t *)0xE000ED98u)
#define MPU_BASE (*(volatile uint32_t *)0xE000ED9Cu)
#define MPU_LIMIT (*(volatile uint32_t *)0xE000EDA0u)
#define MPU_READ_ONLY 4u /* in MPU_BASE: for privileged code */
#define MPU_REGION_ENABLE 1u
#define MPU_ENABLE 5u /* and memory outside of regions is as without it */
#endif

/* A byte to the host that is no notify id: powered down. These boards have no other way. */
#define HALT_BYTE 0xF0u

_Noreturn void firmware_entry(void);
_Noreturn void port_start(void);

/* In .bss, so that a coredump has it. */
static unsigned char stack[4096] __attribute__((aligned(8), used));

static volatile bool rung;

/*
 * The vector table need not be in use yet, and the stack pointer need not be ours: a loader may
 * have jumped here.
 */
__attribute__((naked)) _Noreturn void firmware_entry(void)
{
    __asm__("    .cfi_undefined lr\n" /* nobody called: where a debugger's backtrace ends */
            "    ldr r0, =stack + 4096\n"
            "    msr msp, r0\n"
            "    bl port_start\n"
            "    .ltorg\n");
}

/*
 * The host reads the registers at the fault: from the frame that the exception left on the stack,
 * and those that are not in it as they are now. So nothing but r0 and r1 is touched here.
 */
__attribute__((naked)) static void on_fault(void)
{
    __asm__("    movw r0, #0xED0C\n" /* APPLICATION_RESET */
            "    movt r0, #0xE000\n"
            "    movw r1, #0x0004\n" /* SYSTEM_RESET_REQUEST */
            "    movt r1, #0x05FA\n"
            "    str r1, [r0]\n"
            "    dsb\n"
            "1:  b 1b\n");
}

static void on_doorbell(void)
{
    /* First the mark, then the bytes: a byte that comes in between interrupts again. */
    DOORBELL->interrupt = UART_RX_INTERRUPT;
    while ((DOORBELL->state & UART_RX_FULL) != 0)
        (void)DOORBELL->data;
    rung = true;
}

typedef void handler(void);

static const struct {
    unsigned char *stack;
    handler *exception[15 + DOORBELL_IRQ + 1];
} vectors __attribute__((section(".vectors"), used)) = {
    .stack = stack + sizeof stack,
    .exception = {[0] = firmware_entry,
                  [1 ... 15 + DOORBELL_IRQ - 1] = on_fault,
                  [15 + DOORBELL_IRQ] = on_doorbell},
};

_Noreturn void port_start(void)
{
    VECTOR_TABLE = (uint32_t)(uintptr_t)&vectors;
    CONSOLE->divider = UART_DIVIDER_MIN;
    CONSOLE->control = UART_TX_ENABLE;
    DOORBELL->divider = UART_DIVIDER_MIN;
    DOORBELL->control = UART_TX_ENABLE | UART_RX_ENABLE | UART_RX_INTERRUPT_ENABLE;
    /*
     * QEMU stops to look for input while a receiver is off; this makes it look again. Nothing is
     * lost with the byte: whoever starts looks at everything.
     */
    (void)DOORBELL->data;
    INTERRUPT_ENABLE[DOORBELL_IRQ / 32] = 1u << DOORBELL_IRQ % 32;
    firmware_main();
}

void port_kick(uint32_t notify_id)
{
    /*
     * Full: the host has not heard the byte in there, and will look after it has. To wait would
     * be to hang with a host that does not read.
     */
    if ((DOORBELL->state & UART_TX_FULL) == 0)
        DOORBELL->data = notify_id & 0xFF;
}

bool port_wait(void)
{
    for (;;) {
        bool heard;

        /* Masked, an interrupt still ends the sleep: none is lost between the look and the wfi. */
        __asm__ volatile("cpsid i" ::: "memory");
        heard = rung;
        rung = false;
        if (!heard)
            __asm__ volatile("wfi" ::: "memory");
        __asm__ volatile("cpsie i\n isb" ::: "memory");
        if (heard)
            return true;
    }
}

void port_console(const char *text, uint32_t length)
{
    for (uint32_t i = 0; i < length && (CONSOLE->state & UART_TX_FULL) == 0; i++)
        CONSOLE->data = (unsigned char)text[i];
}

void port_full_fence(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    /*
     * QEMU before 8.1 leaves the barrier out where the board has one core, and the host's next
     * look could come before our store. Reading a device takes QEMU's lock, which is a barrier.
     */
    (void)DOORBELL->state;
}

_Noreturn void port_halt(uint32_t code)
{
    /* This byte the host must get. */
    while ((DOORBELL->state & UART_TX_FULL) != 0)
        ;
    DOORBELL->data = HALT_BYTE | (code & 0xF);
    INTERRUPT_DISABLE[DOORBELL_IRQ / 32] = 1u << DOORBELL_IRQ % 32;
    for (;;)
        __asm__ volatile("wfi");
}

_Noreturn void port_reset(void)
{
    APPLICATION_RESET = SYSTEM_RESET_REQUEST;
    for (;;)
        __asm__ volatile("dsb");
}

_Noreturn void port_crash(uint32_t address)
{
#if __ARM_ARCH >= 8
    /* The mps3 boards have RAM nearly everywhere: forbid to write these 32 bytes. */
    MPU_REGION = 0;
    MPU_BASE = (address & ~31u) | MPU_READ_ONLY;
    MPU_LIMIT = (address & ~31u) | MPU_REGION_ENABLE;
    MPU_CONTROL = MPU_ENABLE;
    __asm__ volatile("dsb\n isb" ::: "memory");
#endif
    *(volatile uint32_t *)(uintptr_t)address = 0;
    __builtin_trap(); /* something is mapped there */
}
