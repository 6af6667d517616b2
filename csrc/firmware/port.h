/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * What a port supplies to the firmware: the way in (an entry point of its own that calls
 * firmware_main), the doorbell and the ways out; and, in its linker script, where RAM is and which
 * part of it the image takes.
 */
#ifndef PORT_H
#define PORT_H

#include <stdbool.h>
#include <stdint.h>

/*
 * Ring the host's doorbell for a notify id; must not block. A host that has rings of ours unheard
 * need not hear this one: it will look at everything.
 */
void port_kick(uint32_t notify_id);

/* Sleep until the host rings; rings that came before the call count. False = the host is gone. */
bool port_wait(void);

/* Text for people who watch the board's console; lost where there is none or it is full. */
void port_console(const char *text, uint32_t length);

/* Order all earlier stores before all later loads, as the host sees them. */
void port_full_fence(void);

_Noreturn void port_halt(uint32_t code);
_Noreturn void port_reset(void);

/* Fault, at address if the machine lets us choose. */
_Noreturn void port_crash(uint32_t address);

/* The application; never returns. */
_Noreturn void firmware_main(void);

/* Linker script: the RAM window, and in it the image with everything that it reserves. */
extern unsigned char port_ram_start[];
extern unsigned char port_ram_end[];
extern unsigned char port_image_start[];
extern unsigned char port_image_end[];

#endif
