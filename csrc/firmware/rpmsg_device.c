/* SPDX-License-Identifier: BSD-3-Clause */
#include "rpmsg_device.h"

#include "echo_protocol.h"
#include "freestanding.h"
#include "port.h"
#include "trace.h"

#define STATUS_DRIVER_OK                                                                           \
    0x04u /* the one bit that OpenAMP (value 4) and Linux (value 7) hosts have in common */
#define STATUS_NEEDS_RESET 0x40u

#define DESCRIPTOR_NEXT 1u
#define DESCRIPTOR_WRITE 2u
#define DESCRIPTOR_INDIRECT 4u

#define AVAILABLE_NO_INTERRUPT 1u /* the driver wants no kick for used buffers */
#define USED_NO_NOTIFY 1u         /* we want no kick for available buffers */

/* Kick after so many buffers even if more are waiting, so that the host works on them meanwhile. */
#define BATCH 64u

/*
 * Split ring, legacy layout. The address is two words: a 32-bit machine has no 64-bit atomic load.
 */
struct vring_descriptor {
    uint32_t address_low;
    uint32_t address_high;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
};

struct vring_available {
    uint16_t flags;
    uint16_t index;
    uint16_t ring[];
};

struct vring_used_element {
    uint32_t id;
    uint32_t length;
};

struct vring_used {
    uint16_t flags;
    uint16_t index;
    struct vring_used_element ring[];
};

struct rpmsg_header {
    uint32_t source;
    uint32_t destination;
    uint32_t reserved; /* the receiver's, which may scribble on it: written as 0, never read */
    uint16_t length;
    uint16_t flags;
};

_Static_assert(sizeof(struct vring_descriptor) == 16, "descriptor");
_Static_assert(offsetof(struct vring_available, ring) == 4, "available ring");
_Static_assert(sizeof(struct vring_used_element) == 8, "used element");
_Static_assert(offsetof(struct vring_used, ring) == 4, "used ring");
_Static_assert(sizeof(struct rpmsg_header) == 16, "header");

/* What a descriptor said, checked to lie in RAM. */
struct buffer {
    struct rpmsg_header *header;
    uint32_t length;
    uint16_t head;
    bool usable; /* in the pool, aligned, and with room for a header */
};

static uint16_t load16(const uint16_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static uint32_t load32(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static void store16(uint16_t *word, uint16_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

static void store32(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

static uint32_t ram_start(void)
{
    return (uint32_t)(uintptr_t)port_ram_start;
}

static uint32_t ram_size(void)
{
    return (uint32_t)((uintptr_t)port_ram_end - (uintptr_t)port_ram_start);
}

static bool lies_in(uint32_t address, uint32_t size, uint32_t start, uint32_t room)
{
    return address >= start && address - start <= room && size <= room - (address - start);
}

/* In RAM, and not over the image. */
static bool is_free_ram(uint32_t address, uint32_t size)
{
    uint32_t image_start = (uint32_t)(uintptr_t)port_image_start;
    uint32_t image_end = (uint32_t)(uintptr_t)port_image_end;

    return lies_in(address, size, ram_start(), ram_size()) &&
           (address >= image_end || (address < image_start && size <= image_start - address));
}

static bool is_power_of_two(uint32_t value)
{
    return value != 0 && (value & (value - 1)) == 0;
}

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

static _Noreturn void ring_is_broken(const struct rpmsg_queue *queue, const char *what,
                                     uint32_t value, uint32_t limit)
{
    trace_text("ring ");
    trace_decimal(queue->index);
    trace_text(" broken: ");
    trace_text(what);
    trace_text(" is ");
    trace_hex(value);
    trace_text(", limit ");
    trace_hex(limit);
    trace_end();
    port_halt(ECHO_HALT_BAD_RING);
}

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
            ring_is_broken(queue, "available index ahead", (uint16_t)(index - queue->taken),
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
        ring_is_broken(queue, "available entry", head, queue->num);
    descriptor = &queue->descriptor[head];
    address = load32(&descriptor->address_low);
    high = load32(&descriptor->address_high);
    flags = load16(&descriptor->flags);
    buffer.length = load32(&descriptor->length);
    buffer.head = head;
    if ((flags & (DESCRIPTOR_NEXT | DESCRIPTOR_INDIRECT)) != 0)
        ring_is_broken(queue, "descriptor flags word (no chains)", flags, DESCRIPTOR_WRITE);
    if (queue->index == 0 && (flags & DESCRIPTOR_WRITE) == 0)
        ring_is_broken(queue, "descriptor flags word (not writable)", flags, DESCRIPTOR_WRITE);
    if (high != 0)
        ring_is_broken(queue, "high word of a buffer address", high, 0);
    if (!lies_in(address, 0, ram_start(), ram_size()))
        ring_is_broken(queue, "buffer address", address, ram_start() + ram_size());
    if (!lies_in(address, buffer.length, ram_start(), ram_size()))
        ring_is_broken(queue, "buffer length", buffer.length, ram_start() + ram_size() - address);
    buffer.usable = lies_in(address, buffer.length, device->pool_da, device->pool_size) &&
                    buffer.length >= sizeof(struct rpmsg_header) && address % sizeof(uint32_t) == 0;
    buffer.header = (struct rpmsg_header *)(uintptr_t)address;
    return buffer;
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
        if ((load16(&queue->available->flags) & AVAILABLE_NO_INTERRUPT) == 0)
            port_kick(queue->notify_id);
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
    store16(&queue->used->flags, USED_NO_NOTIFY);
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
        put_used(queue, buffer->head, queue->index == 0 ? 0 : buffer->length);
    }
}

/* ---- opening ---- */

static enum rpmsg_link bad_table(const char *what, uint32_t value)
{
    trace_text("bad resource table: ");
    trace_text(what);
    trace_text(" is ");
    trace_hex(value);
    trace_end();
    return RPMSG_BAD_TABLE;
}

static enum rpmsg_link open_queue(struct rpmsg_queue *queue, const struct table_vring *vring,
                                  uint32_t index)
{
    uint32_t da = load32(&vring->da);
    uint32_t align = load32(&vring->align);
    uint32_t num = load32(&vring->num);
    uint32_t notify_id = load32(&vring->notify_id);
    uint32_t used_offset;

    if (num > VRING_NUM || !is_power_of_two(num))
        return bad_table(index == 0 ? "size of vring 0" : "size of vring 1", num);
    if (align < sizeof(uint32_t) || align > VRING_ALIGN || !is_power_of_two(align))
        return bad_table(index == 0 ? "alignment of vring 0" : "alignment of vring 1", align);
    /*
     * Descriptors, available ring with its event word; then, aligned, the used ring with its own.
     */
    used_offset = (uint32_t)(16 * num + 4 + 2 * num + 2 + align - 1) & ~(align - 1);
    if (da == TABLE_ANY || da % align != 0 || da % sizeof(struct vring_descriptor) != 0 ||
        !is_free_ram(da, used_offset + 4 + 8 * num + 2))
        return bad_table(index == 0 ? "address of vring 0" : "address of vring 1", da);
    if (notify_id == TABLE_ANY)
        return bad_table(index == 0 ? "notify id of vring 0" : "notify id of vring 1", notify_id);

    queue->descriptor = (const struct vring_descriptor *)(uintptr_t)da;
    queue->available = (const struct vring_available *)(uintptr_t)(da + 16 * num);
    queue->used = (struct vring_used *)(uintptr_t)(da + used_offset);
    queue->index = index;
    queue->notify_id = notify_id;
    queue->num = (uint16_t)num;
    queue->kick_owed = false;
    /* A device goes on from where the rings stand: some drivers do not start them at zero. */
    queue->used_index = load16(&queue->used->index);
    queue->taken = queue->used_index;
    queue->seen = queue->used_index;
    /* From here on the host kicks only while we sleep on this queue. */
    store16(&queue->used->flags, USED_NO_NOTIFY);
    return RPMSG_UP;
}

enum rpmsg_link rpmsg_open(struct rpmsg_device *device, const struct table_carveout *pool)
{
    enum rpmsg_link link;

    device->features = load32(&device->vdev->driver_features) & TABLE_FEATURE_NS;
    device->pool_da = load32(&pool->da);
    device->pool_size = load32(&pool->length);
    device->batch = 0;
    if (device->pool_da == TABLE_ANY || !is_free_ram(device->pool_da, device->pool_size))
        return bad_table("address of the buffer pool", device->pool_da);
    link = open_queue(&device->to_host, &device->vdev->vring[0], 0);
    if (link == RPMSG_UP)
        link = open_queue(&device->from_host, &device->vdev->vring[1], 1);
    return link;
}

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
    /* The whole length: an OpenAMP driver takes it as the capacity for its next message. */
    put_used(&device->from_host, message->head, message->buffer_length);
}

enum rpmsg_link rpmsg_send(struct rpmsg_device *device, uint32_t source, uint32_t destination,
                           const void *payload, uint32_t length)
{
    struct rpmsg_queue *queue = &device->to_host;
    struct buffer buffer;
    enum rpmsg_link link = next_buffer(device, queue, &buffer);

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
    queue->taken++;
    store32(&buffer.header->source, source);
    store32(&buffer.header->destination, destination);
    store32(&buffer.header->reserved, 0);
    store16(&buffer.header->length, (uint16_t)length);
    store16(&buffer.header->flags, 0);
    memcpy(buffer.header + 1, payload, length);
    put_used(queue, buffer.head, buffer.length);
    return RPMSG_UP;
}

enum rpmsg_link rpmsg_announce(struct rpmsg_device *device, const char *name, uint32_t address,
                               uint32_t flags)
{
    struct rpmsg_ns ns;

    if ((device->features & TABLE_FEATURE_NS) == 0)
        return RPMSG_UP;
    memset(&ns, 0, sizeof ns);
    for (uint32_t i = 0; i < RPMSG_NAME_SIZE && name[i] != '\0'; i++)
        ns.name[i] = name[i];
    ns.address = address;
    ns.flags = flags;
    return rpmsg_send(device, address, RPMSG_NS_ADDRESS, &ns, sizeof ns);
}
