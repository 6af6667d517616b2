/* SPDX-License-Identifier: BSD-3-Clause */
#define _POSIX_C_SOURCE 200809L /* clock_gettime, MSG_NOSIGNAL */

#include "yardstick.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define KICK 1u /* a byte's value is only a hint */

#define SILENT_MS 10000 /* a remote in Python takes well under a second to come up */
#define FOREVER -1

/* Reading the clock costs as much as moving a message between two ends in one thread. */
#define CLOCK_EVERY 16u

static uint64_t now(void)
{
    struct timespec time;
    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void kick(const struct yardstick *end)
{
    const uint8_t byte = KICK;
    /* A full socket holds kicks enough; a closed one is found by the next wait. */
    if (end->doorbell >= 0)
        (void)send(end->doorbell, &byte, sizeof byte, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* Returns 1 when the message went, 0 when there is no buffer; one will be notified. */
static int32_t send_message(const struct yardstick *end, uint32_t source, uint32_t destination,
                            const uint8_t *payload, uint32_t length)
{
    for (;;) {
        int32_t result = message_ring_send(end->sending, source, destination, payload, length, 0);
        if (result >= 0) {
            if (result)
                kick(end);
            if (!end->sending->queue->quiet)
                vq_notify_off(end->sending->queue);
            return 1;
        }
        if (result != VQ_EMPTY)
            return result;
        int32_t there = message_ring_want_buffer(end->sending);
        if (there <= 0)
            return there;
        /* Once more at most: what is there now can be had, or breaks the queue. */
    }
}

/* Returns 1 when there is something to do: messages came, or there may be more. */
static int32_t receive(struct yardstick *end)
{
    int32_t result = message_ring_receive(end->receiving, end->records, end->data, end->batch, 1);
    if (result < 0)
        return result;
    if (result & MESSAGE_KICK)
        kick(end);
    end->count = (uint32_t)result & 0xFFFFu;
    end->next = 0;
    return end->count || (result & MESSAGE_MORE);
}

/* Returns messages to their senders until none is there, or no buffer. Returns whether any went. */
static int32_t echo_some(struct yardstick *end)
{
    int32_t echoed = 0, busy;
    do {
        for (; end->next < end->count; end->next++) {
            const struct message_record *record = &end->records[end->next];
            int32_t went = send_message(end, record->dst, record->src, end->data + record->offset, record->length);
            if (went < 0)
                return went;
            if (!went)
                return echoed;
            echoed = 1;
        }
        busy = receive(end);
    } while (busy > 0);
    return busy < 0 ? busy : echoed;
}

/* Sleeps until the doorbell rings, or lets the other end in this thread have its turn. */
static int32_t wait_notified(const struct yardstick *end, int timeout_ms)
{
    if (end->peer) {
        int32_t echoed = echo_some(end->peer);
        return echoed ? echoed : YARDSTICK_SILENT;
    }
    struct pollfd readable = {.fd = end->doorbell, .events = POLLIN};
    int ready = poll(&readable, 1, timeout_ms);
    if (ready == 0)
        return YARDSTICK_SILENT;
    uint8_t kicks[4096];
    ssize_t heard = ready < 0 ? -1 : recv(end->doorbell, kicks, sizeof kicks, MSG_DONTWAIT);
    if (heard > 0 || (heard < 0 && (errno == EINTR || errno == EAGAIN)))
        return 0;
    return YARDSTICK_GONE;
}

/* Whether this is the next message that is out, as it was sent. */
static int is_echo(const struct yardstick_run *run, const uint8_t *data, uint32_t length)
{
    const uint32_t number = sizeof run->received;
    return run->received < run->sent && length == run->length && memcmp(data, &run->received, number) == 0 &&
           memcmp(data + number, run->payload + number, length - number) == 0;
}

int32_t yardstick_measure(struct yardstick *end, struct yardstick_run *run)
{
    uint64_t begin = now();
    uint32_t turns = 0;
    int sending = 1;
    run->sent = run->received = 0;
    while (sending || run->received < run->sent) {
        while (sending && run->sent - run->received < run->in_flight) {
            memcpy(run->payload, &run->sent, sizeof run->sent);
            int32_t went = send_message(end, run->source, run->destination, run->payload, run->length);
            if (went < 0)
                return went;
            if (!went)
                break;
            run->sent++;
        }
        int32_t busy = receive(end);
        if (busy == 0)
            busy = wait_notified(end, SILENT_MS);
        if (busy < 0)
            return busy;
        for (uint32_t i = 0; i < end->count; i++) {
            const struct message_record *record = &end->records[i];
            if (record->dst != run->source)
                continue;
            if (!is_echo(run, end->data + record->offset, record->length))
                return YARDSTICK_WRONG;
            run->received++;
        }
        if (++turns % CLOCK_EVERY)
            continue;
        uint64_t taken = now() - begin;
        if (sending && run->received && taken >= run->nanoseconds) {
            sending = 0;
            run->round_trips = run->received;
            run->taken = taken;
        }
        /* A peer that keeps this end awake, but not with what is out. */
        if (taken > run->nanoseconds && taken - run->nanoseconds > SILENT_MS * 1000000ull)
            return YARDSTICK_SILENT;
    }
    return 0;
}

int32_t yardstick_echo(struct yardstick *end)
{
    for (;;) {
        int32_t result = echo_some(end);
        if (result < 0)
            return result;
        result = wait_notified(end, FOREVER);
        if (result < 0)
            return result;
    }
}
