/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * What the firmware with Linux's RPMsg bus does with messages.
 *
 * It announces LINUX_CHANNEL_NAME. What comes to that address, or to that of a channel of this name
 * that the host announced, is sent back, but for orders: messages of exactly three little-endian
 * words, the first of which is one of these. An order is answered by four words: itself, and three
 * numbers. ECHO_SHUTDOWN, alone in a message, is answered by itself; then the channel is withdrawn,
 * the device removed and the core powered down.
 *
 * The kernel's rpmsg_client_sample.c serves the host's channels of its name besides.
 */
#ifndef ORDERS_H
#define ORDERS_H

#define LINUX_CHANNEL_NAME "linux-echo"
#define LINUX_ADDRESS 30u

/*
 * Send this many messages of this length, each of which begins with its number, and wait for room.
 * The answer: how many were sent, the error that ended it, how often the sender slept.
 */
#define ORDER_FLOOD 0xEF56A510u
/* The same, but where there is no room it ends. */
#define ORDER_FILL 0xEF56A511u
/* The answer: the longest payload of a message, and twice 0. */
#define ORDER_LIMIT 0xEF56A512u
#endif
