/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Calls into the Linux kernel's ring code, which is built for user space as its tools/virtio does
 * and linked with this file where the tests run, never shipped.
 */
#include "kernel_rings.h"

#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <linux/vringh.h>

/* In virtio_ring.c; the header that tools/virtio puts in the place of the kernel's leaves it out. */
bool virtqueue_is_broken(const struct virtqueue *vq);

/* What tools/virtio's kmalloc returns where it is set, and what its kfree leaves alone. */
void *__kmalloc_fake, *__kfree_ignore_start, *__kfree_ignore_end;
/* What its copies from and to user space may touch, or they abort: the range that vringh is given
 * is checked by vringh itself. */
void *__user_addr_min, *__user_addr_max = (void *)UINTPTR_MAX;

struct kernel_chain { /* the kernel's token */
    uint64_t message;
    int busy;
};

struct kernel_driver {
    struct virtio_device device;
    struct virtqueue *queue;
    struct vring ring;
    struct kernel_chain *chains; /* as many as entries; each has a table for itself */
    uint8_t *tables;
    uint32_t table_size;
    int kicked;
};

struct kernel_device {
    struct vringh ring;
    struct vringh_iov readable;
    struct vringh_iov *writable; /* by head, of the chains taken */
    uint64_t first, last;
};

void kernel_layout(uint32_t num, uint32_t align, struct kernel_layout *layout)
{
    uint8_t *base = (uint8_t *)(uintptr_t)align;
    struct vring ring;
    vring_init(&ring, num, base, align);
    layout->available = (uint64_t)((uint8_t *)ring.avail - base);
    layout->used = (uint64_t)((uint8_t *)ring.used - base);
    layout->size = vring_size(num, align);
}

static uint64_t features(int event_idx, int indirect)
{
    return 1ull << VIRTIO_F_VERSION_1 | (event_idx ? 1ull << VIRTIO_RING_F_EVENT_IDX : 0) |
           (indirect ? 1ull << VIRTIO_RING_F_INDIRECT_DESC : 0);
}

/* Driver. */

static bool on_kick(struct virtqueue *queue)
{
    ((struct kernel_driver *)queue->priv)->kicked = 1;
    return true;
}

static void on_interrupt(struct virtqueue *queue)
{
    (void)queue;
}

struct kernel_driver *kernel_driver_new(uint8_t *ring, uint32_t num, uint32_t align, int event_idx,
                                        uint8_t *tables, uint32_t table_size)
{
    struct kernel_driver *driver = calloc(1, sizeof(*driver));
    driver->chains = calloc(num, sizeof(*driver->chains));
    driver->tables = tables;
    driver->table_size = table_size;
    driver->device.features = features(event_idx, tables != NULL);
    INIT_LIST_HEAD(&driver->device.vqs);
    spin_lock_init(&driver->device.vqs_list_lock);
    vring_init(&driver->ring, num, ring, align);
    driver->queue = vring_new_virtqueue(0, num, align, &driver->device, true, false, ring, on_kick,
                                        on_interrupt, "kernel driver");
    driver->queue->priv = driver;
    return driver;
}

void kernel_driver_free(struct kernel_driver *driver)
{
    vring_del_virtqueue(driver->queue);
    free(driver->chains);
    free(driver);
}

int kernel_driver_run(struct kernel_driver *driver, uint32_t count)
{
    struct kernel_span span = {.base = (uint8_t *)driver->ring.desc};
    struct vring_used *used = driver->ring.used;
    uint64_t message;
    uint32_t length;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t slot = i & (driver->ring.num - 1);
        if (kernel_driver_add(driver, &span, 1, 0, i) != 1)
            return -EIO;
        (void)kernel_driver_kick(driver);
        used->ring[slot].id = driver->ring.avail->ring[slot];
        used->ring[slot].len = 0;
        used->idx++;
        if (kernel_driver_get(driver, &message, &length) != 1 || message != i)
            return -EIO;
    }
    return 0;
}

/* What the kernel frees of the tables stays where it is. */
static void keep_tables(const struct kernel_driver *driver)
{
    __kfree_ignore_start = driver->tables;
    __kfree_ignore_end = driver->tables + (size_t)driver->ring.num * driver->table_size;
}

static void free_anything(void)
{
    __kfree_ignore_start = __kfree_ignore_end = NULL;
}

/* A token and a table that no chain has, or NULL. */
static struct kernel_chain *spare_chain(struct kernel_driver *driver)
{
    for (uint32_t i = 0; i < driver->ring.num; i++)
        if (!driver->chains[i].busy)
            return &driver->chains[i];
    return NULL;
}

int kernel_driver_add(struct kernel_driver *driver, const struct kernel_span *spans, uint32_t readable,
                      uint32_t writable, uint64_t message)
{
    struct kernel_chain *chain = spare_chain(driver);
    uint32_t count = readable + writable;
    if (count == 0 || count > driver->ring.num || (driver->tables && count * 16 > driver->table_size))
        return -EINVAL;
    if (!chain)
        return 0;
    struct scatterlist *lists = calloc(count, sizeof(*lists));
    struct scatterlist **each = calloc(count, sizeof(struct scatterlist *));
    for (uint32_t i = 0; i < count; i++) {
        sg_init_one(&lists[i], spans[i].base, spans[i].length);
        each[i] = &lists[i];
    }
    if (driver->tables) /* an indirect table is the one thing that is allocated in there */
        __kmalloc_fake = driver->tables + (size_t)(chain - driver->chains) * driver->table_size;
    keep_tables(driver);
    int result = virtqueue_add_sgs(driver->queue, each, readable, writable, chain, GFP_ATOMIC);
    free_anything();
    __kmalloc_fake = NULL;
    free(each);
    free(lists);
    if (result == -ENOSPC)
        return 0;
    if (result < 0)
        return result;
    *chain = (struct kernel_chain){.message = message, .busy = 1};
    return 1;
}

int kernel_driver_kick(struct kernel_driver *driver)
{
    driver->kicked = 0;
    (void)virtqueue_kick(driver->queue);
    return driver->kicked;
}

int kernel_driver_get(struct kernel_driver *driver, uint64_t *message, uint32_t *length)
{
    keep_tables(driver);
    struct kernel_chain *chain = virtqueue_get_buf(driver->queue, length);
    free_anything();
    if (virtqueue_is_broken(driver->queue))
        return -EIO;
    if (!chain)
        return 0;
    chain->busy = 0;
    *message = chain->message;
    return 1;
}

void kernel_driver_disable(struct kernel_driver *driver)
{
    virtqueue_disable_cb(driver->queue);
}

int kernel_driver_enable(struct kernel_driver *driver)
{
    return virtqueue_enable_cb(driver->queue);
}

int kernel_driver_enable_delayed(struct kernel_driver *driver)
{
    return virtqueue_enable_cb_delayed(driver->queue);
}

void kernel_driver_interrupt(struct kernel_driver *driver)
{
    (void)vring_interrupt(0, driver->queue);
}

uint32_t kernel_driver_free_descriptors(const struct kernel_driver *driver)
{
    return driver->queue->num_free;
}

/* Device. */

struct kernel_device *kernel_device_new(uint8_t *ring, uint32_t num, uint32_t align, int event_idx,
                                        uint16_t index, uint8_t *memory, uint64_t size)
{
    struct kernel_device *device = calloc(1, sizeof(*device));
    struct vring parts;
    vring_init(&parts, num, ring, align);
    if (vringh_init_user(&device->ring, features(event_idx, 0), num, true, parts.desc, parts.avail,
                         parts.used) < 0)
        abort();
    device->ring.last_avail_idx = device->ring.last_used_idx = index;
    device->writable = calloc(num, sizeof(*device->writable));
    device->first = (uintptr_t)memory;
    device->last = device->first + size - 1;
    return device;
}

void kernel_device_free(struct kernel_device *device)
{
    for (uint32_t i = 0; i < device->ring.vring.num; i++)
        vringh_iov_cleanup(&device->writable[i]);
    vringh_iov_cleanup(&device->readable);
    free(device->writable);
    free(device);
}

static bool get_range(struct vringh *ring, u64 address, struct vringh_range *range)
{
    struct kernel_device *device = container_of(ring, struct kernel_device, ring);
    *range = (struct vringh_range){.start = device->first, .end_incl = device->last};
    return device->first <= address && address <= device->last;
}

int kernel_device_get(struct kernel_device *device, uint16_t *head, struct kernel_span *spans, uint32_t max,
                      uint32_t *count, uint8_t *data, uint32_t capacity, uint32_t *size)
{
    struct vringh_iov *readable = &device->readable, writable = {0};
    int result = vringh_getdesc_user(&device->ring, readable, &writable, get_range, head);
    if (result != 1) {
        vringh_iov_cleanup(&writable);
        return result;
    }
    vringh_iov_cleanup(&device->writable[*head]);
    device->writable[*head] = writable;
    if (readable->used + writable.used > max)
        return -E2BIG;
    *count = 0;
    for (uint32_t i = 0; i < readable->used; i++)
        spans[(*count)++] = (struct kernel_span){readable->iov[i].iov_base, (uint32_t)readable->iov[i].iov_len, 0};
    for (uint32_t i = 0; i < writable.used; i++)
        spans[(*count)++] = (struct kernel_span){writable.iov[i].iov_base, (uint32_t)writable.iov[i].iov_len, 1};
    ssize_t copied = vringh_iov_pull_user(readable, data, capacity);
    *size = (uint32_t)copied;
    return copied < 0 ? (int)copied : 1;
}

int kernel_device_put(struct kernel_device *device, uint16_t head, const uint8_t *data, uint32_t size,
                      uint32_t length)
{
    ssize_t written = vringh_iov_push_user(&device->writable[head], data, size);
    if (written < 0)
        return (int)written;
    int result = vringh_complete_user(&device->ring, head, length);
    return result < 0 ? result : (int)written;
}

int kernel_device_need_notify(struct kernel_device *device)
{
    return vringh_need_notify_user(&device->ring);
}

void kernel_device_disable(struct kernel_device *device)
{
    vringh_notify_disable_user(&device->ring);
}

int kernel_device_enable(struct kernel_device *device)
{
    return vringh_notify_enable_user(&device->ring);
}
