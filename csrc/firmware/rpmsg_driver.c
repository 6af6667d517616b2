/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The functions of rpmsg_device.h in the driver role, instead of rpmsg_device.c: the firmware owns
 * the rings and the buffers, and the host is the device. "The driver" is then this side, which is
 * always ready.
 *
 * The host may write to every shared word at any time, as there. What belongs to the driver is kept
 * here and never read back: which buffers are out, and how far the rings are. One link in a
 * firmware.
 */
#include "freestanding.h"
#include "port.h"
#include "rpmsg_device.h"
#include "trace.h"
#include "variant.h"
#include "vring.h"

#define STATUS_ACKNOWLEDGE 0x01u
#define STATUS_DRIVER 0x02u
#define STATUS_DRIVER_OK 0x04u
#define STATUS_FEATURES_OK 0x08u
#define STATUS_NEEDS_RESET 0x40u

/* One ring from the driver's end, and the buffers that belong to it. */
struct ring {
    struct vring vring;
    uint32_t index;           /* 0 from the host, 1 to the host */
    uint32_t buffers;         /* address of the first */
    uint32_t size;            /* of each, a multiple of 4 */
    uint16_t available_index; /* free-running: the next available entry to write */
    uint16_t seen;            /* free-running: the next used entry to take */
    uint16_t fresh;           /* to the host: buffers below were used before */
    bool is_out[VRING_NUM];   /* the host has it */
    bool kick_owed;
};

static struct ring receiving;
static struct ring sending;
static uint32_t sent; /* in this life */

static void set_status(struct rpmsg_device *device, uint32_t bits)
{
    uint32_t notify_id = load32(&device->vdev->notify_id);
    uint8_t status = (uint8_t)(bits | __atomic_load_n(&device->vdev->status, __ATOMIC_RELAXED));

    /* Release: pairs with the device, which reads features and rings once it sees the status. */
    __atomic_store_n(&device->vdev->status, bits == 0 ? 0 : status, __ATOMIC_RELEASE);
    if (notify_id != TABLE_ANY)
        port_kick(kick_id(notify_id));
}

static bool is_up(const struct rpmsg_device *device)
{
    return (__atomic_load_n(&device->vdev->status, __ATOMIC_ACQUIRE) & STATUS_NEEDS_RESET) == 0;
}

/* Reset the device and choose its features. */
enum rpmsg_link rpmsg_wait_driver(struct rpmsg_device *device)
{
    device->features = load32(&device->vdev->device_features) & TABLE_FEATURE_NS;
    if (!VARIANT_ONLY_DRIVER_OK) {
        set_status(device, 0);
        set_status(device, STATUS_ACKNOWLEDGE);
        set_status(device, STATUS_DRIVER);
    }
    store32(&device->vdev->driver_features, device->features);
    if (!VARIANT_ONLY_DRIVER_OK)
        set_status(device, STATUS_FEATURES_OK);
    return RPMSG_UP;
}

/* ---- rings ---- */

static struct rpmsg_header *buffer_of(const struct ring *ring, uint16_t head)
{
    return (struct rpmsg_header *)(uintptr_t)(ring->buffers + head * ring->size);
}

static void write_descriptor(struct ring *ring, uint16_t head, uint32_t length, uint16_t flags)
{
    struct vring_descriptor *descriptor = &ring->vring.descriptor[head];

    store32(&descriptor->address_low, ring->buffers + head * ring->size);
    store32(&descriptor->address_high, 0);
    store32(&descriptor->length, length);
    store16(&descriptor->flags, flags);
}

/* Lend a buffer to the host. */
static void put_available(struct ring *ring, uint16_t head)
{
    uint16_t slot = (uint16_t)(ring->available_index & (ring->vring.num - 1));

    ring->is_out[head] = true;
    store16(&ring->vring.available->ring[slot], head);
    ring->available_index++;
    /* Release: pairs with the device's acquire of the index, after which it reads the entry. */
    __atomic_store_n(&ring->vring.available->index, ring->available_index, __ATOMIC_RELEASE);
    ring->kick_owed = true;
}

/* Take a buffer that the host has returned. False where there is none. */
static bool take_used(struct ring *ring, uint16_t *head)
{
    /*
     * Acquire: pairs with the device's release of the index, after which buffer and entry are
     * there.
     */
    uint16_t index = __atomic_load_n(&ring->vring.used->index, __ATOMIC_ACQUIRE);
    const struct vring_used_element *element =
        &ring->vring.used->ring[ring->seen & (ring->vring.num - 1)];
    uint32_t id;
    uint32_t length;

    if ((uint16_t)(index - ring->seen) > ring->vring.num)
        ring_is_broken(ring->index, "used index ahead", (uint16_t)(index - ring->seen),
                       ring->vring.num);
    if (index == ring->seen)
        return false;
    id = load32(&element->id);
    length = load32(&element->length);
    if (id >= ring->vring.num || !ring->is_out[id])
        ring_is_broken(ring->index, "used entry (not out)", id, ring->vring.num);
    /*
     * OpenAMP's driver takes the length as the capacity for its next message, so nothing but that
     * of the descriptor will do.
     */
    if (length != load32(&ring->vring.descriptor[id].length))
        ring_is_broken(ring->index, "used length", length, ring->size);
    ring->is_out[id] = false;
    ring->seen++;
    *head = (uint16_t)id;
    return true;
}

static void kick_if_wanted(struct ring *ring)
{
    if (ring->kick_owed) {
        ring->kick_owed = false;
        if (VARIANT_ALWAYS_KICK || (load16(&ring->vring.used->flags) & USED_NO_NOTIFY) == 0)
            port_kick(kick_id(ring->vring.notify_id));
    }
}

void rpmsg_flush(struct rpmsg_device *device)
{
    device->batch = 0;
    if (receiving.kick_owed || sending.kick_owed) {
        /*
         * Pairs with the device's fence between clearing its flag and its last look at the index.
         */
        port_full_fence();
        kick_if_wanted(&receiving);
        kick_if_wanted(&sending);
    }
}

/* Take a buffer that the host has returned; sleep until there is one. */
static enum rpmsg_link wait_used(struct rpmsg_device *device, struct ring *ring, uint16_t *head)
{
    while (!take_used(ring, head)) {
        rpmsg_flush(device);
        if (!VARIANT_NO_INTERRUPT)
            store16(&ring->vring.available->flags, 0);
        /* Pairs with the device's fence between publishing its index and looking at this flag. */
        port_full_fence();
        if (load16(&ring->vring.used->index) == ring->seen && !port_wait())
            return RPMSG_HOST_GONE;
        if (!is_up(device))
            return RPMSG_RESET;
        if (!VARIANT_NEVER_QUIET)
            store16(&ring->vring.available->flags, AVAILABLE_NO_INTERRUPT);
    }
    if (VARIANT_ALWAYS_KICK || ++device->batch > BATCH)
        rpmsg_flush(device);
    return RPMSG_UP;
}

/* ---- opening ---- */

static bool open_ring(struct ring *ring, const struct table_vring *vring, uint32_t index)
{
    uint16_t first = (uint16_t)VARIANT_FIRST_INDEX;

    ring->index = index;
    if (!find_vring(&ring->vring, vring, index))
        return false;
    memset(ring->vring.descriptor, 0, sizeof(struct vring_descriptor) * ring->vring.num);
    memset(ring->vring.available->ring, 0, sizeof(uint16_t) * ring->vring.num);
    memset(ring->vring.used->ring, 0, sizeof(struct vring_used_element) * ring->vring.num);
    memset(ring->is_out, 0, sizeof ring->is_out);
    store16(&ring->vring.available->index, first);
    store16(&ring->vring.used->index, first);
    store16(&ring->vring.used->flags, 0);
    store16(&ring->vring.available->flags, VARIANT_NEVER_QUIET ? 0 : AVAILABLE_NO_INTERRUPT);
    ring->available_index = ring->seen = first;
    ring->fresh = 0;
    ring->kick_owed = false;
    return true;
}

/* As rpmsg-lite: all buffers to send with are in the used ring, and none was ever available. */
static void fill_used(struct ring *ring)
{
    for (uint16_t head = 0; head < ring->vring.num; head++) {
        uint16_t slot = (uint16_t)((ring->seen + head) & (ring->vring.num - 1));

        write_descriptor(ring, head, ring->size, 0);
        store32(&ring->vring.used->ring[slot].id, head);
        store32(&ring->vring.used->ring[slot].length, ring->size);
        ring->is_out[head] = true;
    }
    ring->fresh = ring->vring.num;
    store16(&ring->vring.used->index, (uint16_t)(ring->seen + ring->vring.num));
}

enum rpmsg_link rpmsg_open(struct rpmsg_device *device, const struct table_carveout *pool)
{
    sent = 0;
    device->batch = 0;
    if (!find_pool(&device->pool_da, &device->pool_size, pool) ||
        !open_ring(&receiving, &device->vdev->vring[0], 0) ||
        !open_ring(&sending, &device->vdev->vring[1], 1))
        return RPMSG_BAD_TABLE;
    receiving.buffers = device->pool_da;
    receiving.size = RPMSG_FROM_HOST_SIZE;
    sending.buffers = device->pool_da + receiving.vring.num * receiving.size;
    sending.size = RPMSG_TO_HOST_SIZE;
    if (receiving.vring.num * receiving.size + sending.vring.num * sending.size >
        device->pool_size) {
        bad_table("size of the buffer pool", device->pool_size);
        return RPMSG_BAD_TABLE;
    }
    for (uint16_t head = 0; head < receiving.vring.num; head++) {
        write_descriptor(&receiving, head, receiving.size, DESCRIPTOR_WRITE);
        put_available(&receiving, head);
    }
    receiving.kick_owed = false; /* the status is kicked for */
    if (VARIANT_PREFILLED)
        fill_used(&sending);
    if (VARIANT_SENT_BEFORE == 0)
        set_status(device, STATUS_DRIVER_OK);
    return RPMSG_UP;
}

/* ---- messages ---- */

enum rpmsg_link rpmsg_receive(struct rpmsg_device *device, struct rpmsg_message *message)
{
    for (;;) {
        enum rpmsg_link link = wait_used(device, &receiving, &message->head);
        const struct rpmsg_header *header;

        if (link != RPMSG_UP)
            return link;
        header = buffer_of(&receiving, message->head);
        message->source = load32(&header->source);
        message->destination = load32(&header->destination);
        message->payload = (const unsigned char *)(header + 1);
        message->length = load16(&header->length);
        message->buffer_length = receiving.size;
        if (message->length <= receiving.size - sizeof(struct rpmsg_header))
            return RPMSG_UP;
        device->bad_lengths++;
        rpmsg_release(device, message);
    }
}

void rpmsg_release(struct rpmsg_device *device, const struct rpmsg_message *message)
{
    put_available(&receiving, message->head);
    if (VARIANT_ALWAYS_KICK)
        rpmsg_flush(device);
}

enum rpmsg_link rpmsg_send(struct rpmsg_device *device, uint32_t source, uint32_t destination,
                           const void *payload, uint32_t length)
{
    struct rpmsg_header *header;
    enum rpmsg_link link = RPMSG_UP;
    uint16_t head;

    if (length > sending.size - sizeof(struct rpmsg_header)) {
        device->too_long++;
        return RPMSG_UP;
    }
    /* As OpenAMP: what was used before comes first. */
    if (!take_used(&sending, &head)) {
        if (sending.fresh < sending.vring.num)
            head = sending.fresh++;
        else
            link = wait_used(device, &sending, &head);
    }
    if (link != RPMSG_UP)
        return link;
    header = buffer_of(&sending, head);
    store32(&header->source, source);
    store32(&header->destination, destination);
    store32(&header->reserved, 0);
    store16(&header->length, (uint16_t)length);
    store16(&header->flags, 0);
    memcpy(header + 1, payload, length);
    write_descriptor(&sending, head,
                     VARIANT_EXACT_DESCRIPTORS ? (uint32_t)sizeof *header + length : sending.size,
                     0);
    put_available(&sending, head);
    if (++sent == VARIANT_SENT_BEFORE)
        set_status(device, STATUS_DRIVER_OK);
    if (VARIANT_ALWAYS_KICK)
        rpmsg_flush(device);
    return RPMSG_UP;
}
