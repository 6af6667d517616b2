/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * A fixed number of 16-byte messages one way, for an instruction count: sent, received with a
 * copy, their buffers returned and reclaimed. callgrind counts `count_messages` alone.
 *
 * Arguments: driver or device (which end sends), messages in a batch, messages in all, and
 * 1 for EVENT_IDX.
 */
#include "ring_link.h"

#define NUM 256u
#define BUFFER_SIZE 512u
#define MAX_BATCH 64u
#define LENGTH 16u

void count_messages(struct message_ring *sender, struct message_ring *receiver, uint32_t batch, uint32_t total);

static struct message_record records[MAX_BATCH];
static uint8_t data[MAX_BATCH * (BUFFER_SIZE - MESSAGE_HEADER + MESSAGE_SOURCE)];
static uint8_t payload[MAX_BATCH * LENGTH];
static uint32_t lengths[MAX_BATCH];

__attribute__((noinline)) void count_messages(struct message_ring *sender, struct message_ring *receiver,
                                              uint32_t batch, uint32_t total)
{
    for (uint32_t done = 0; done < total; done += batch) {
        int32_t sent = batch == 1 ? message_ring_send(sender, 1024, 1025, payload, LENGTH) + 1
                                  : message_ring_send_many(sender, 1024, 1025, payload, lengths, batch);
        /* One message in 1 + (0 or 1 for the kick), which is also what was asked for. */
        int32_t received = message_ring_receive(receiver, records, data, MAX_BATCH, MESSAGE_GIVE_BACK);
        if (sent <= 0 || (uint32_t)(received & 0xFFFF) != batch) {
            fprintf(stderr, "sent %d, received %d\n", sent, received);
            exit(1);
        }
    }
}

int main(int argc, char **argv)
{
    struct link l;
    check(argc == 5, "four arguments, got", argc - 1);
    int driver_sends = strcmp(argv[1], "driver") == 0;
    uint32_t batch = (uint32_t)atoi(argv[2]), total = (uint32_t)atoi(argv[3]);
    check(batch >= 1 && batch <= MAX_BATCH && total % batch == 0, "batch", batch);
    for (uint32_t i = 0; i < MAX_BATCH; i++)
        lengths[i] = LENGTH;
    for (uint32_t i = 0; i < sizeof payload; i++)
        payload[i] = (uint8_t)i;
    open_link(&l, NUM, BUFFER_SIZE, driver_sends, atoi(argv[4]));
    struct end *sender = driver_sends ? &l.driver : &l.device;
    struct end *receiver = driver_sends ? &l.device : &l.driver;
    count_messages(&sender->ring, &receiver->ring, batch, total);
    check(memcmp(data, payload, LENGTH) == 0, "payload differs", 0);
    close_link(&l);
    return 0;
}
