/* SPDX-License-Identifier: BSD-3-Clause */
/* What the echo firmware understands, and how it ends. */
#ifndef ECHO_PROTOCOL_H
#define ECHO_PROTOCOL_H

/* The channel it announces, and the address it has: those of the OpenAMP demos. */
#ifndef ECHO_CHANNEL_NAME
#define ECHO_CHANNEL_NAME "rpmsg-openamp-demo-channel"
#endif
#ifndef ECHO_ADDRESS
#define ECHO_ADDRESS 1024u
#endif

/*
 * Control messages: the first four bytes of a payload, a little-endian word. Shutdown is OpenAMP's
 * own and counts in a payload of any length >= 4, as there; the others only in a payload of exactly
 * 4 bytes.
 */
#define ECHO_SHUTDOWN 0xEF56A55Au /* answer with the same word, withdraw the channel, power down */
#define ECHO_CRASH 0xEF56A501u    /* write to ECHO_CRASH_ADDRESS, which faults */
#define ECHO_HANG 0xEF56A502u     /* loop for ever, deaf to doorbells */
#define ECHO_RESET 0xEF56A503u    /* ask the SoC for a reset */

#define ECHO_CRASH_ADDRESS 0xDEAD0000u

/* Codes of halt. */
#define ECHO_HALT_DONE 0u      /* shut down on request, or the host is gone */
#define ECHO_HALT_BAD_TABLE 3u /* the host filled the resource table in wrongly: see the trace */
#define ECHO_HALT_BAD_RING 4u  /* the host put an impossible value into a ring: see the trace */

#endif
