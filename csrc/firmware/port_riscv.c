/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Port for QEMU's RISC-V board "virt", RV32 and RV64, in machine mode. The host writes the image
 * into RAM that it shares and zeroes .bss; the doorbell is the board's only UART, one byte a ring.
 */
#include <stddef.h>

#include "port.h"

/* NS16550A. */
struct uart {
    uint8_t data;
    uint8_t interrupts;
    uint8_t fifo;
    uint8_t line;
    uint8_t modem;
    uint8_t status;
    uint8_t modem_status;
    uint8_t scratch;
};

#define UART_RX_INTERRUPT_ENABLE 1u /* in interrupts */
#define UART_FIFO_ENABLE 1u
#define UART_8_BITS 3u      /* in line */
#define UART_RX_READY 0x01u /* in status */
#define UART_TX_EMPTY 0x20u

#define DOORBELL ((volatile struct uart *)0x10000000u)
#define DOORBELL_IRQ 10u

/* Interrupt controller, as hart 0 in machine mode sees it. */
#define PLIC 0x0C000000u
#define PLIC_PRIORITY ((volatile uint32_t *)PLIC)
#define PLIC_ENABLE (*(volatile uint32_t *)(PLIC + 0x2000u))
#define PLIC_THRESHOLD (*(volatile uint32_t *)(PLIC + 0x200000u))
#define PLIC_CLAIM (*(volatile uint32_t *)(PLIC + 0x200004u))

#define TEST_DEVICE (*(volatile uint32_t *)0x00100000u)
#define TEST_DONE 0x5555u
#define TEST_FAILED 0x3333u /* with a code in the upper half */
#define TEST_RESET 0x7777u

#define MSTATUS_MIE 8u
#define MIE_EXTERNAL 0x800u

#if __riscv_xlen == 64
#define STORE "sd"
#define LOAD "ld"
#else
#define STORE "sw"
#define LOAD "lw"
#endif

_Noreturn void firmware_entry(void);
_Noreturn void port_start(void);
void on_trap(void);
void on_doorbell(void);

/* In .bss, so that a coredump has it. */
static unsigned char stack[8192] __attribute__((aligned(16), used));

static volatile bool rung;

/* All harts start here; the first one works. */
__attribute__((naked, section(".vectors"))) _Noreturn void firmware_entry(void)
{
    __asm__("    .cfi_undefined ra\n" /* nobody called: where a debugger's backtrace ends */
            "    csrr t0, mhartid\n"
            "    bnez t0, 1f\n"
            "    la sp, stack + 8192\n"
            "    call port_start\n"
            "1:  wfi\n"
            "    j 1b\n");
}

/*
 * A fault asks for a reset. The host reads the registers at the fault as they are then: so t0 and
 * t1, which that takes, get their values back, and the stack pointer is not trusted.
 */
__attribute__((naked, aligned(4))) void on_trap(void)
{
    __asm__("    csrw mscratch, t0\n"
            "    csrr t0, mcause\n"
            "    bltz t0, 2f\n" /* an interrupt has the sign bit */
            "    la t0, 3f\n"
            "    " STORE " t1, 0(t0)\n"
            "    li t0, 0x100000\n" /* TEST_DEVICE */
            "    li t1, 0x7777\n"   /* TEST_RESET */
            "    sw t1, 0(t0)\n"
            "    la t0, 3f\n"
            "    " LOAD " t1, 0(t0)\n"
            "    csrr t0, mscratch\n"
            "1:  j 1b\n"
            "2:  csrr t0, mscratch\n"
            "    j on_doorbell\n"
            "    .pushsection .bss\n"
            "    .balign 8\n"
            "3:  .skip 8\n"
            "    .popsection\n");
}

__attribute__((interrupt("machine"), used)) void on_doorbell(void)
{
    uint32_t claimed = PLIC_CLAIM;

    while ((DOORBELL->status & UART_RX_READY) != 0)
        (void)DOORBELL->data;
    PLIC_CLAIM = claimed; /* done with it */
    rung = true;
}

_Noreturn void port_start(void)
{
    __asm__ volatile("csrw mtvec, %0" ::"r"(on_trap));
    DOORBELL->line = UART_8_BITS;
    DOORBELL->fifo = UART_FIFO_ENABLE;
    DOORBELL->interrupts = UART_RX_INTERRUPT_ENABLE;
    /*
     * QEMU stops to look for input while nothing can take it; this makes it look again. Nothing is
     * lost with the byte: whoever starts looks at everything.
     */
    (void)DOORBELL->data;
    PLIC_PRIORITY[DOORBELL_IRQ] = 1;
    PLIC_ENABLE = 1u << DOORBELL_IRQ;
    PLIC_THRESHOLD = 0;
    __asm__ volatile("csrw mie, %0" ::"r"(MIE_EXTERNAL));
    __asm__ volatile("csrsi mstatus, %0" ::"i"(MSTATUS_MIE) : "memory");
    firmware_main();
}

void port_kick(uint32_t notify_id)
{
    /*
     * Not empty: the host has not heard the byte in there, and will look after it has. To wait
     * would be to hang with a host that does not read.
     */
    if ((DOORBELL->status & UART_TX_EMPTY) != 0)
        DOORBELL->data = (uint8_t)notify_id;
}

bool port_wait(void)
{
    for (;;) {
        bool heard;

        /* Masked, an interrupt still ends the sleep: none is lost between the look and the wfi. */
        __asm__ volatile("csrci mstatus, %0" ::"i"(MSTATUS_MIE) : "memory");
        heard = rung;
        rung = false;
        if (!heard)
            __asm__ volatile("wfi" ::: "memory");
        __asm__ volatile("csrsi mstatus, %0" ::"i"(MSTATUS_MIE) : "memory");
        if (heard)
            return true;
    }
}

/* There is no second UART: the host reads the trace buffer. */
void port_console(const char *text, uint32_t length)
{
    (void)text;
    (void)length;
}

void port_full_fence(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    /*
     * QEMU before 8.1 leaves the barrier out where the board has one core, and the host's next
     * look could come before our store. Reading a device takes QEMU's lock, which is a barrier.
     */
    (void)DOORBELL->scratch;
}

static _Noreturn void end(uint32_t how)
{
    __asm__ volatile("csrw mie, zero" ::: "memory"); /* nothing wakes it any more */
    TEST_DEVICE = how;
    for (;;)
        __asm__ volatile("wfi");
}

_Noreturn void port_halt(uint32_t code)
{
    end(code == 0 ? TEST_DONE : (code << 16) + TEST_FAILED);
}

_Noreturn void port_reset(void)
{
    end(TEST_RESET);
}

_Noreturn void port_crash(uint32_t address)
{
    *(volatile uint32_t *)(uintptr_t)address = 0;
    __builtin_trap(); /* something is mapped there */
}
