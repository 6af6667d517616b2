/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Firmware around Linux's RPMsg bus: the virtio transport over the resource table, and an echo
 * service. The core is the driver of the virtio device, so the host is the device.
 *
 * What it does with messages is in orders.h.
 */
#include <linux/kconfig.h>
#include <linux/rpmsg.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_ring.h>

#include "echo_protocol.h"
#include "orders.h"
#include "rpmsg_internal.h"
#include "services.h"
#include "table.h"
#include "trace.h"

#define HALT_DONE 0u
#define HALT_NO_DEVICE 3u /* the trace says why */

/* What build.py makes of the initcalls of the kernel's files. */
int rpmsg_core_entry(void);
int virtio_entry(void);
int rpmsg_ns_entry(void);
int virtio_rpmsg_bus_entry(void);
int rpmsg_client_sample_entry(void);

static struct table_vdev *const vdev = &resource_table.vdev;
static struct virtqueue *queues[2]; /* from the host, to the host: as rpmsg_probe asks for them */
static struct rpmsg_device *control; /* through which channels are made here */
static bool is_to_stop;
static uint32_t sleeps; /* for want of room in the ring to the host */

/* ---- the transport ---- */

static uint8_t get_status(struct virtio_device *device)
{
    (void)device;
    return __atomic_load_n(&vdev->status, __ATOMIC_ACQUIRE);
}

static void set_status(struct virtio_device *device, uint8_t status)
{
    (void)device;
    /* Release: rings and features are there before the device is told so. */
    __atomic_store_n(&vdev->status, status, __ATOMIC_RELEASE);
    port_kick(vdev->notify_id);
}

static void reset(struct virtio_device *device)
{
    set_status(device, 0);
}

static uint64_t get_features(struct virtio_device *device)
{
    (void)device;
    return vdev->device_features;
}

static int finalize_features(struct virtio_device *device)
{
    vring_transport_features(device);
    vdev->driver_features = (uint32_t)device->features;
    return 0;
}

static bool notify(struct virtqueue *queue)
{
    port_kick(vdev->vring[queue->index].notify_id);
    return true;
}

static void del_vqs(struct virtio_device *device)
{
    struct virtqueue *queue, *next;

    list_for_each_entry_safe(queue, next, &device->vqs, list)
        vring_del_virtqueue(queue);
    queues[0] = queues[1] = NULL;
}

static int find_vqs(struct virtio_device *device, unsigned int count, struct virtqueue *found[],
                    vq_callback_t *callbacks[], const char *const names[], const bool *contexts,
                    struct irq_affinity *affinity)
{
    (void)contexts;
    (void)affinity;
    for (unsigned int i = 0; i < count; i++) {
        const struct table_vring *vring = &vdev->vring[i];
        void *ring = (void *)(uintptr_t)vring->da;

        memset(ring, 0, vring_size(vring->num, vring->align));
        queues[i] = found[i] = vring_new_virtqueue(i, vring->num, vring->align, device, true, false,
                                                   ring, notify, callbacks[i], names[i]);
        if (found[i] == NULL) {
            del_vqs(device);
            return -ENOMEM;
        }
    }
    return 0;
}

static const struct virtio_config_ops transport = {
    .get_status = get_status,
    .set_status = set_status,
    .reset = reset,
    .get_features = get_features,
    .finalize_features = finalize_features,
    .find_vqs = find_vqs,
    .del_vqs = del_vqs,
};

static void release_nothing(struct device *device)
{
    (void)device;
}

static struct device processor = {.name = "core", .release = release_nothing};
static struct virtio_device rpmsg_device = {
    .id.device = VIRTIO_ID_RPMSG,
    .config = &transport,
    .dev.parent = &processor,
    .dev.release = release_nothing,
};
static struct rpmsg_channel_info channel = {
    .name = LINUX_CHANNEL_NAME, .src = LINUX_ADDRESS, .dst = RPMSG_ADDR_ANY};

/* ---- what the kernel's files need of the table and the doorbell ---- */

void *dma_alloc_coherent(struct device *device, size_t size, dma_addr_t *address, gfp_t flags)
{
    const struct table_carveout *pool = &resource_table.pool;

    (void)flags;
    if (size > pool->length) {
        dev_err(device, "%zu bytes of buffers, the carveout has %u", size, pool->length);
        return NULL;
    }
    *address = pool->da;
    return (void *)(uintptr_t)pool->da;
}

static void wait_for_host(void)
{
    if (!port_wait()) {
        trace_line("host gone");
        port_halt(HALT_DONE);
    }
}

void kernel_sleep(void)
{
    /*
     * Called with messages in hand, so the ring from the host has to wait; its sender's kick is
     * taken here, which is why the main loop looks at the ring before it waits.
     */
    sleeps++;
    wait_for_host();
    vring_interrupt(0, queues[1]);
}

/* ---- the services ---- */

static void answer(struct rpmsg_endpoint *endpoint, uint32_t to, uint32_t order, uint32_t first,
                   uint32_t second, uint32_t third)
{
    uint32_t words[] = {order, first, second, third};

    rpmsg_sendto(endpoint, words, sizeof words, to);
}

static void flood(struct rpmsg_endpoint *endpoint, uint32_t to, uint32_t order, uint32_t count,
                  uint32_t length)
{
    static uint32_t payload[256];
    uint32_t before = sleeps;
    uint32_t sent = 0;
    int error = 0;

    if (length > sizeof payload)
        length = sizeof payload;
    while (sent < count) {
        payload[0] = sent;
        if (order == ORDER_FLOOD)
            error = rpmsg_sendto(endpoint, payload, (int)length, to);
        else
            error = rpmsg_trysendto(endpoint, payload, (int)length, to);
        if (error != 0)
            break;
        sent++;
    }
    trace_count("messages sent: ", sent);
    answer(endpoint, to, order, sent, (uint32_t)error, sleeps - before);
}

static int on_message(struct rpmsg_device *device, void *data, int length, void *private,
                      uint32_t from)
{
    struct rpmsg_endpoint *endpoint = device->ept;
    uint32_t words[3] = {0};

    (void)private;
    memcpy(words, data, (size_t)length < sizeof words ? (size_t)length : sizeof words);
    if (length == sizeof words && (words[0] == ORDER_FLOOD || words[0] == ORDER_FILL)) {
        flood(endpoint, from, words[0], words[1], words[2]);
        return 0;
    }
    if (length == sizeof words && words[0] == ORDER_LIMIT) {
        answer(endpoint, from, words[0], (uint32_t)rpmsg_get_mtu(endpoint), 0, 0);
        return 0;
    }
    /* Not from within a callback of what is to be removed. */
    is_to_stop |= length == sizeof words[0] && words[0] == ECHO_SHUTDOWN;
    return rpmsg_sendto(endpoint, data, length, from);
}

static int on_channel(struct rpmsg_device *device)
{
    dev_info(&device->dev, "opened at 0x%x", device->src);
    return 0;
}

static void on_channel_gone(struct rpmsg_device *device)
{
    dev_info(&device->dev, "closed");
}

static struct rpmsg_device_id echo_names[] = {{.name = LINUX_CHANNEL_NAME}, {.name = ""}};

static struct rpmsg_driver echo_driver = {
    .drv.name = "echo",
    .id_table = echo_names,
    .probe = on_channel,
    .remove = on_channel_gone,
    .callback = on_message,
};

/* The bus makes one device of this name, for user space to make channels through. Here we do. */
static int on_control(struct rpmsg_device *device)
{
    control = device;
    return 0;
}

static void on_control_gone(struct rpmsg_device *device)
{
    (void)device;
    control = NULL;
}

static struct rpmsg_driver control_driver = {
    .drv.name = "rpmsg_ctrl",
    .probe = on_control,
    .remove = on_control_gone,
};

static _Noreturn void shut_down(void)
{
    rpmsg_release_channel(control, &channel);
    unregister_virtio_device(&rpmsg_device);
    trace_count("bytes of the heap in use: ", (uint32_t)kernel_heap_used());
    trace_line("shutdown");
    port_halt(HALT_DONE);
}

_Noreturn void firmware_main(void)
{
    int (*const entries[])(void) = {rpmsg_core_entry, virtio_entry, rpmsg_ns_entry,
                                    virtio_rpmsg_bus_entry, rpmsg_client_sample_entry};

    device_initialize(&processor);
    for (size_t i = 0; i < ARRAY_SIZE(entries); i++)
        BUG_ON(entries[i]() != 0);
    register_rpmsg_driver(&control_driver);
    register_rpmsg_driver(&echo_driver);
    if (register_virtio_device(&rpmsg_device) != 0 || control == NULL ||
        rpmsg_create_channel(control, &channel) == NULL)
        port_halt(HALT_NO_DEVICE);
    for (;;) {
        while (vring_interrupt(0, queues[0]) == IRQ_HANDLED)
            ;
        if (is_to_stop)
            shut_down();
        wait_for_host();
    }
}
