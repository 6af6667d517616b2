/* SPDX-License-Identifier: BSD-3-Clause */
#include "rpmsg_device.h"

#include "freestanding.h"
#include "port.h"
#include "trace.h"
#include "variant.h"
#include "vring.h"

#define STATUS_DRIVER_OK                                                                           \
    0x04u /* the one bit that OpenAMP (value 4) and Linux (value 7) hosts have in common */
#define STATUS_FEATURES_OK 0x08u
#define STATUS_NEEDS_RESET 0x40u

/* What a descriptor said, checked to lie in RAM. */
struct buffer {
    struct rpmsg_header *header;
    uint32_t length;
    uint16_t head;
    bool usable; /* in the pool, aligned, and with room for a header */
};

/* With VARIANT_SWAP: taken from the ring to the host, and to be filled after the one behind it. */
static struct buffer spare;
static bool has_spare;

/* ---- status ---- */

static bool driver_is_ready(const struct rpmsg_device *device)
{
    /*
     * Acquire: pairs with the driver, which writes addresses, rings and features before the status.
     */
    uint8_t status = __atomic_load_n(&device->vdev->status, __ATOMIC_ACQUIRE);

    return (status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET)) == STATUS_DRIVER_OK;
}

enum rpmsg_link rpmsg_wait_driver(struct rpmsg_device *device)
{
    while (!driver_is_ready(device)) {
        uint8_t status = __atomic_load_n(&device->vdev->status, __ATOMIC_ACQUIRE);

        if ((status & STATUS_NEEDS_RESET) != 0) {
            uint32_t notify_id = load32(&device->vdev->notify_id);

            /*
             * Release: we touch no ring after this, so the driver may reuse them once it sees the
             * 0.
             */
            __atomic_store_n(&device->vdev->status, 0, __ATOMIC_RELEASE);
            if (notify_id != TABLE_ANY)
                port_kick(notify_id);
        }
        if (!port_wait())
            return RPMSG_HOST_GONE;
    }
    return RPMSG_UP;
}

/* ---- rings ---- */

/*
 * Is an entry available that was not taken yet? Loads the index only when the known entries are
 * used up.
 */
static bool has_available(struct rpmsg_queue *queue)
{
    if (queue->seen == queue->taken) {
        /*
         * Acquire: pairs with the driver's release of the index, after which entry and descriptor
         * are there.
         */
        uint16_t index = __atomic_load_n(&queue->available->index, __ATOMIC_ACQUIRE);

        if ((uint16_t)(index - queue->taken) > queue->num)
            ring_is_broken(queue->index, "available index ahead", (uint16_t)(index - queue->taken),
                           queue->num);
        queue->seen = index;
    }
    return queue->seen != queue->taken;
}

/* Look at the next available buffer, without taking it; there must be one. */
static struct buffer look(const struct rpmsg_device *device, const struct rpmsg_queue *queue)
{
    uint16_t slot = (uint16_t)(queue->taken & (queue->num - 1));
    uint16_t head = load16(&queue->available->ring[slot]);
    const struct vring_descriptor *descriptor;
    struct buffer buffer;
    uint32_t address;
    uint32_t high;
    uint32_t flags;

    if (head >= queue->num)
        ring_is_broken(queue->index, "available entry", head, queue->num);
    descriptor = &queue->descriptor[head];
    address = load32(&descriptor->address_low);
    high = load32(&descriptor->address_high);
    flags = load16(&descriptor->flags);
    buffer.length = load32(&descriptor->length);
    buffer.head = head;
    if ((flags & (DESCRIPTOR_NEXT | DESCRIPTOR_INDIRECT)) != 0)
        ring_is_broken(queue->index, "descriptor flags word (no chains)", flags, DESCRIPTOR_WRITE);
    if (queue->index == 0 && (flags & DESCRIPTOR_WRITE) == 0)
        ring_is_broken(queue->index, "descriptor flags word (not writable)", flags,
                       DESCRIPTOR_WRITE);
    if (high != 0)
        ring_is_broken(queue->index, "high word of a buffer address", high, 0);
    if (!lies_in(address, 0, ram_start(), ram_size()))
        ring_is_broken(queue->index, "buffer address", address, ram_start() + ram_size());
    if (!lies_in(address, buffer.length, ram_start(), ram_size()))
        ring_is_broken(queue->index, "buffer length", buffer.length,
                       ram_start() + ram_size() - address);
    buffer.usable = lies_in(address, buffer.length, device->pool_da, device->pool_size) &&
                    buffer.length >= sizeof(struct rpmsg_header) && address % sizeof(uint32_t) == 0;
    buffer.header = (struct rpmsg_header *)(uintptr_t)address;
    return buffer;
}

/* What the host is told that a buffer of this size, with so much written into it, has in it. */
static uint32_t used_length(uint32_t size, uint32_t written)
{
    if (VARIANT_USED_LENGTH == USED_WHOLE)
        return size; /* an OpenAMP driver takes it as the capacity for its next message */
    return VARIANT_USED_LENGTH == USED_WRITTEN ? written : 0;
}

/* Hand a buffer back with what is in it. */
static void put_used(struct rpmsg_queue *queue, uint16_t head, uint32_t length)
{
    struct vring_used_element *element = &queue->used->ring[queue->used_index & (queue->num - 1)];

    store32(&element->id, head);
    store32(&element->length, length);
    queue->used_index++;
    /*
     * Release: pairs with the driver's acquire of the index, after which it reads element and
     * buffer.
     */
    __atomic_store_n(&queue->used->index, queue->used_index, __ATOMIC_RELEASE);
    queue->kick_owed = true;
}

static void kick_if_wanted(struct rpmsg_queue *queue)
{
    if (queue->kick_owed) {
        queue->kick_owed = false;
        if (VARIANT_ALWAYS_KICK ||
            (load16(&queue->available->flags) & AVAILABLE_NO_INTERRUPT) == 0)
            port_kick(kick_id(queue->notify_id));
    }
}

void rpmsg_flush(struct rpmsg_device *device)
{
    device->batch = 0;
    if (device->to_host.kick_owed || device->from_host.kick_owed) {
        /*
         * Pairs with the driver's fence between clearing the flag and its last look at the used
         * index.
         */
        port_full_fence();
        kick_if_wanted(&device->to_host);
        kick_if_wanted(&device->from_host);
    }
}

/*
 * Sleep until the host has put something into the queue or may have; the rest of the time it need
 * not kick for it.
 */
static enum rpmsg_link wait_available(struct rpmsg_device *device, struct rpmsg_queue *queue)
{
    rpmsg_flush(device);
    store16(&queue->used->flags, 0);
    /*
     * Pairs with the driver's fence between publishing the available index and looking at this
     * flag.
     */
    port_full_fence();
    if (!has_available(queue) && !port_wait())
        return RPMSG_HOST_GONE;
    if (!driver_is_ready(device))
        return RPMSG_RESET;
    store16(&queue->used->flags, VARIANT_NEVER_QUIET ? 0 : USED_NO_NOTIFY);
    return RPMSG_UP;
}

/* Find the next buffer of the queue; entries that are no use go back and are counted. */
static enum rpmsg_link next_buffer(struct rpmsg_device *device, struct rpmsg_queue *queue,
                                   struct buffer *buffer)
{
    enum rpmsg_link link;

    for (;;) {
        while (!has_available(queue)) {
            link = wait_available(device, queue);
            if (link != RPMSG_UP)
                return link;
        }
        if (++device->batch > BATCH) {
            rpmsg_flush(device);
            if (!driver_is_ready(device))
                return RPMSG_RESET;
        }
        *buffer = look(device, queue);
        if (buffer->usable)
            return RPMSG_UP;
        if (device->bad_buffers++ == 0) {
            trace_text("dropped: buffer at ");
            trace_hex((uint32_t)(uintptr_t)buffer->header);
            trace_text(", length ");
            trace_decimal(buffer->length);
            trace_text(", is not in the pool (further ones are only counted)");
            trace_end();
        }
        queue->taken++;
        /*
         * To the host: 0, for nothing was written there. From the host: the driver may take it as
         * the capacity.
         */
        put_used(queue, buffer->head,
                 queue->index == 0 ? 0 : used_length(buffer->length, 0));
    }
}

/* ---- opening ---- */

static bool open_queue(struct rpmsg_queue *queue, const struct table_vring *vring, uint32_t index)
{
    struct vring found;

    if (!find_vring(&found, vring, index))
        return false;
    queue->descriptor = found.descriptor;
    queue->available = found.available;
    queue->used = found.used;
    queue->index = index;
    queue->notify_id = found.notify_id;
    queue->num = found.num;
    queue->kick_owed = false;
    /* A device goes on from where the rings stand: some drivers do not start them at zero. */
    queue->used_index = load16(&queue->used->index);
    queue->taken = queue->used_index;
    queue->seen = queue->used_index;
    /* From here on the host kicks only while we sleep on this queue. */
    store16(&queue->used->flags, VARIANT_NEVER_QUIET ? 0 : USED_NO_NOTIFY);
    return true;
}

enum rpmsg_link rpmsg_open(struct rpmsg_device *device, const struct table_carveout *pool)
{
    device->features = load32(&device->vdev->driver_features) & TABLE_FEATURE_NS;
    device->batch = 0;
    has_spare = false;
    if (find_pool(&device->pool_da, &device->pool_size, pool) &&
        open_queue(&device->to_host, &device->vdev->vring[0], 0) &&
        open_queue(&device->from_host, &device->vdev->vring[1], 1))
        return RPMSG_UP;
    return RPMSG_BAD_TABLE;
}

#if VARIANT_ANNOUNCE == ANNOUNCE_EARLY
enum rpmsg_link rpmsg_wait_buffers(struct rpmsg_device *device)
{
    struct vring to_host;
    struct vring from_host;

    while (!driver_is_ready(device)) {
        uint8_t status = __atomic_load_n(&device->vdev->status, __ATOMIC_ACQUIRE);

        if ((status & STATUS_FEATURES_OK) == 0) {
            if (!port_wait())
                return RPMSG_HOST_GONE;
            continue;
        }
        if (!find_vring(&to_host, &device->vdev->vring[0], 0) ||
            !find_vring(&from_host, &device->vdev->vring[1], 1))
            return RPMSG_BAD_TABLE;
        /* As they are at the start: what an earlier driver left there has counted on. */
        if (__atomic_load_n(&to_host.available->index, __ATOMIC_ACQUIRE) == to_host.num &&
            __atomic_load_n(&from_host.available->index, __ATOMIC_ACQUIRE) == 0 &&
            __atomic_load_n(&from_host.used->index, __ATOMIC_ACQUIRE) == 0)
            break;
    }
    return RPMSG_UP;
}
#endif

/* ---- messages ---- */

enum rpmsg_link rpmsg_receive(struct rpmsg_device *device, struct rpmsg_message *message)
{
    for (;;) {
        struct rpmsg_queue *queue = &device->from_host;
        struct buffer buffer;
        enum rpmsg_link link = next_buffer(device, queue, &buffer);

        if (link != RPMSG_UP)
            return link;
        queue->taken++;
        message->source = load32(&buffer.header->source);
        message->destination = load32(&buffer.header->destination);
        message->payload = (const unsigned char *)(buffer.header + 1);
        message->length = load16(&buffer.header->length);
        message->buffer_length = buffer.length;
        message->head = buffer.head;
        if (message->length <= buffer.length - sizeof(struct rpmsg_header))
            return RPMSG_UP;
        if (device->bad_lengths++ == 0) {
            trace_text("dropped: message length ");
            trace_decimal(message->length);
            trace_text(" in a buffer of ");
            trace_decimal(buffer.length);
            trace_text(" (further ones are only counted)");
            trace_end();
        }
        rpmsg_release(device, message);
    }
}

void rpmsg_release(struct rpmsg_device *device, const struct rpmsg_message *message)
{
    put_used(&device->from_host, message->head, used_length(message->buffer_length, 0));
    if (VARIANT_ALWAYS_KICK)
        rpmsg_flush(device);
}

enum rpmsg_link rpmsg_send(struct rpmsg_device *device, uint32_t source, uint32_t destination,
                           const void *payload, uint32_t length)
{
    struct rpmsg_queue *queue = &device->to_host;
    struct buffer buffer = spare;
    enum rpmsg_link link = has_spare ? RPMSG_UP : next_buffer(device, queue, &buffer);

    if (link != RPMSG_UP)
        return link;
    if (length > buffer.length - sizeof(struct rpmsg_header) || length > UINT16_MAX) {
        if (device->too_long++ == 0) {
            trace_text("dropped: reply of ");
            trace_decimal(length);
            trace_text(" for a buffer of ");
            trace_decimal(buffer.length);
            trace_text(" (further ones are only counted)");
            trace_end();
        }
        return RPMSG_UP; /* the buffer was not taken and serves the next message */
    }
    if (has_spare) {
        has_spare = false;
    } else {
        queue->taken++;
        if (VARIANT_SWAP) {
            spare = buffer;
            has_spare = true;
            link = next_buffer(device, queue, &buffer);
            if (link != RPMSG_UP)
                return link;
            queue->taken++;
        }
    }
    store32(&buffer.header->source, source);
    store32(&buffer.header->destination, destination);
    store32(&buffer.header->reserved, 0);
    store16(&buffer.header->length, (uint16_t)length);
    store16(&buffer.header->flags, 0);
    memcpy(buffer.header + 1, payload, length);
    put_used(queue, buffer.head,
             used_length(buffer.length, (uint32_t)sizeof(struct rpmsg_header) + length));
    if (VARIANT_ALWAYS_KICK)
        rpmsg_flush(device);
    return RPMSG_UP;
}
