/* SPDX-License-Identifier: BSD-3-Clause */
#define _POSIX_C_SOURCE 200809L /* clock_gettime, MSG_NOSIGNAL */

#include "yardstick.h"
#include "polling.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define KICK 1u /* a byte's value is only a hint */

#define SILENT_MS 10000 /* a remote in Python takes well under a second to come up */
#define FOREVER -1

/* An end that polls goes to sleep when nothing came for so long: many times what the other side can
 * take within a measurement, and short enough not to disturb what is measured next. */
#define IDLE_NS 10000000u

/* Reading the clock costs as much as moving a message between two ends in one thread. */
#define CLOCK_EVERY 16u

static uint64_t now(void)
{
    struct timespec time;
    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* Whether a measurement that sends for a given time should long be over. */
static int is_overdue(const struct yardstick_run *run, uint64_t taken)
{
    return taken > run->nanoseconds && taken - run->nanoseconds > SILENT_MS * 1000000ull;
}

static void kick(const struct yardstick *end)
{
    const uint8_t byte = KICK;
    /* A full socket holds kicks enough; a closed one is found by the next wait. */
    if (end->doorbell >= 0)
        (void)send(end->doorbell, &byte, sizeof byte, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* Something was sent. */
static void sent(struct yardstick *end, int32_t wants_kick)
{
    end->starved = 0;
    if (wants_kick)
        kick(end);
    if (!end->sending->queue->quiet)
        vq_notify_off(end->sending->queue);
}

/* There was no buffer. Returns 1 when there is one now, 0 when not; one will be noticed. */
static int32_t lacks_buffer(struct yardstick *end)
{
    end->starved = 1;
    return end->polling ? message_ring_has_buffer(end->sending) : message_ring_want_buffer(end->sending);
}

/* Returns 1 when the message went, 0 when there is no buffer. */
static int32_t send_message(struct yardstick *end, uint32_t source, uint32_t destination, const uint8_t *payload,
                            uint32_t length)
{
    for (;;) {
        int32_t result = message_ring_send(end->sending, source, destination, payload, length);
        if (result >= 0) {
            sent(end, result);
            return 1;
        }
        if (result != VQ_EMPTY)
            return result;
        int32_t there = lacks_buffer(end);
        if (there <= 0)
            return there;
        /* Once more at most: what is there now can be had, or breaks the queue. */
    }
}

/* Returns 1 when there is something to do: messages came, or there may be more. */
static int32_t receive(struct yardstick *end)
{
    const int32_t how = MESSAGE_GIVE_BACK | (end->polling ? MESSAGE_STAY_QUIET : 0);
    int32_t result = message_ring_receive(end->receiving, end->records, end->data, end->batch, how);
    end->count = end->next = 0;
    if (result < 0)
        return result;
    if (result & MESSAGE_KICK)
        kick(end);
    end->count = (uint32_t)result & 0xFFFFu;
    return end->count || (result & MESSAGE_MORE);
}

/* The number that a message begins with; 0 where it is too short for one. */
static uint64_t number_of(const struct yardstick *end, const struct message_record *record)
{
    uint64_t number = 0;
    if (record->length >= sizeof number)
        memcpy(&number, end->data + record->offset, sizeof number);
    return number;
}

/* Counts a message of a flood; its end is answered with the count. Returns 0 when it has to wait. */
static int32_t sink(struct yardstick *end, const struct message_record *record)
{
    uint64_t number = number_of(end, record);
    if (number != YARDSTICK_END) {
        end->misplaced += number != end->sunk || record->length < sizeof number;
        end->sunk++;
        return 1;
    }
    uint64_t count = end->misplaced ? YARDSTICK_END : end->sunk;
    int32_t went = send_message(end, record->dst, record->src, (const uint8_t *)&count, sizeof count);
    if (went > 0)
        end->sunk = end->misplaced = 0;
    return went;
}

static int32_t serve_one(struct yardstick *end, const struct message_record *record)
{
    if (record->dst == end->sink)
        return sink(end, record);
    return send_message(end, record->dst, record->src, end->data + record->offset, record->length);
}

/* Serves messages until none is there, or no buffer. Returns whether there were any. */
static int32_t serve_some(struct yardstick *end)
{
    int32_t served = 0, busy;
    do {
        for (; end->next < end->count; end->next++) {
            int32_t went = serve_one(end, &end->records[end->next]);
            if (went < 0)
                return went;
            if (!went)
                return served;
            served = 1;
        }
        busy = receive(end);
    } while (busy > 0);
    return busy < 0 ? busy : served;
}

/* For an end that polls. Returns 1 when there is something, 0 when it may sleep: it will be kicked. */
static int32_t poll_before_sleep(const struct yardstick *end)
{
    if (poll_rings(end->receiving, end->starved ? end->sending : NULL, IDLE_NS))
        return 1;
    int32_t there = vq_notify_on(end->receiving->queue);
    if (there == 0 && end->starved)
        there = message_ring_want_buffer(end->sending);
    return there;
}

/* Waits until something may have come, or lets the other end in this thread have its turn. */
static int32_t wait_notified(const struct yardstick *end, int timeout_ms)
{
    if (end->peer) {
        int32_t served = serve_some(end->peer);
        return served ? served : YARDSTICK_SILENT;
    }
    if (end->polling) {
        int32_t there = poll_before_sleep(end);
        if (there)
            return there;
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
static int is_echo(const struct yardstick_run *run, const struct message_record *record, const uint8_t *data)
{
    const uint32_t number = sizeof run->received;
    return run->received < run->sent && record->dst == run->source + (uint32_t)(run->received % run->sources) &&
           record->length == run->length && memcmp(data, &run->received, number) == 0 &&
           memcmp(data + number, run->payload + number, run->length - number) == 0;
}

static int is_ours(const struct yardstick_run *run, const struct message_record *record)
{
    return record->dst - run->source < run->sources;
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
            int32_t went = send_message(end, run->source + (uint32_t)(run->sent % run->sources), run->destination,
                                        run->payload, run->length);
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
            if (!is_ours(run, record))
                continue;
            if (!is_echo(run, record, end->data + record->offset))
                return YARDSTICK_WRONG;
            run->received++;
        }
        if (++turns % CLOCK_EVERY)
            continue;
        uint64_t taken = now() - begin;
        if (sending && run->received && taken >= run->nanoseconds) {
            sending = 0;
            run->timed = run->received;
            run->taken = taken;
        }
        /* A peer that keeps this end awake, but not with what is out. */
        if (is_overdue(run, taken))
            return YARDSTICK_SILENT;
    }
    return 0;
}

/* Sends the first `count` messages of `payload`, waiting for buffers. */
static int32_t send_batch(struct yardstick *end, const struct yardstick_run *run, uint32_t source, uint32_t count,
                          uint64_t begin)
{
    for (uint32_t done = 0; done < count;) {
        int32_t result = message_ring_send_many(end->sending, source, run->destination,
                                                run->payload + (size_t)done * run->length, run->lengths + done,
                                                count - done);
        if (result >= 0) {
            sent(end, result & MESSAGE_KICK);
            done += (uint32_t)result & 0xFFFFu;
            continue;
        }
        if (result == VQ_EMPTY)
            result = lacks_buffer(end);
        if (result == 0)
            result = wait_notified(end, SILENT_MS);
        if (result < 0)
            return result;
        if (is_overdue(run, now() - begin))
            return YARDSTICK_SILENT;
    }
    return 0;
}

/* Waits for the other side's count of the messages. */
static int32_t wait_count(struct yardstick *end, struct yardstick_run *run, uint64_t begin)
{
    for (;;) {
        int32_t busy = receive(end);
        if (busy == 0)
            busy = wait_notified(end, SILENT_MS);
        if (busy < 0)
            return busy;
        for (uint32_t i = 0; i < end->count; i++) {
            const struct message_record *record = &end->records[i];
            if (!is_ours(run, record))
                continue;
            run->received = number_of(end, record);
            return 0;
        }
        if (is_overdue(run, now() - begin))
            return YARDSTICK_SILENT;
    }
}

int32_t yardstick_flood(struct yardstick *end, struct yardstick_run *run)
{
    const uint64_t marker = YARDSTICK_END;
    uint64_t begin = now(), batches = 0;
    run->sent = run->received = 0;
    do {
        for (uint32_t i = 0; i < run->batch; i++) {
            uint64_t number = run->sent + i;
            memcpy(run->payload + (size_t)i * run->length, &number, sizeof number);
        }
        uint32_t source = run->source + (uint32_t)(batches % run->sources);
        int32_t result = send_batch(end, run, source, run->batch, begin);
        if (result < 0)
            return result;
        run->sent += run->batch;
        batches++;
    } while (batches % CLOCK_EVERY || now() - begin < run->nanoseconds);
    memcpy(run->payload, &marker, sizeof marker);
    int32_t result = send_batch(end, run, run->source, 1, begin);
    if (result == 0)
        result = wait_count(end, run, begin);
    if (result < 0)
        return result;
    run->timed = run->sent;
    run->taken = now() - begin;
    return run->received == run->sent ? 0 : YARDSTICK_LOST;
}

int32_t yardstick_echo(struct yardstick *end)
{
    for (;;) {
        int32_t result = serve_some(end);
        if (result < 0)
            return result;
        result = wait_notified(end, FOREVER);
        if (result < 0)
            return result;
    }
}
