/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * What the tests call of the Linux kernel's own rings: virtio_ring.c is the driver, vringh.c
 * the device. Both address memory by pointers of this process.
 */
#ifndef KERNEL_RINGS_H
#define KERNEL_RINGS_H

#include <stdint.h>

/* cdef begin: the lines up to "cdef end" are also what cffi is given */

struct kernel_span {
    uint8_t *base;
    uint32_t length;
    uint32_t writable; /* by the device */
};

/* Where the kernel puts the parts of a vring, and its bytes in all. */
struct kernel_layout {
    uint64_t available, used, size;
};
void kernel_layout(uint32_t num, uint32_t align, struct kernel_layout *layout);

/* Results: 1 yes, 0 no, below zero an errno. Memory handed over here must outlive the end. */

struct kernel_driver;

/* `ring` is zero. `tables`, of num times `table_size` bytes, is where indirect tables go, for
 * the device to find them in shared memory; NULL: indirect descriptors are not negotiated. */
struct kernel_driver *kernel_driver_new(uint8_t *ring, uint32_t num, uint32_t align, int event_idx,
                                        uint8_t *tables, uint32_t table_size);
void kernel_driver_free(struct kernel_driver *driver);
/* Both indexes become `count` by that many chains going there and back. Before there is a device. */
int kernel_driver_run(struct kernel_driver *driver, uint32_t count);
/* 0: no room. The kernel shows the device each chain at once. */
int kernel_driver_add(struct kernel_driver *driver, const struct kernel_span *spans, uint32_t readable,
                      uint32_t writable, uint64_t message);
int kernel_driver_kick(struct kernel_driver *driver);
int kernel_driver_get(struct kernel_driver *driver, uint64_t *message, uint32_t *length);
void kernel_driver_disable(struct kernel_driver *driver);
int kernel_driver_enable(struct kernel_driver *driver); /* 0: something came in meanwhile */
int kernel_driver_enable_delayed(struct kernel_driver *driver); /* 0: much came in meanwhile */
void kernel_driver_interrupt(struct kernel_driver *driver); /* the device's kick has arrived */
uint32_t kernel_driver_free_descriptors(const struct kernel_driver *driver);

struct kernel_device;

/* Descriptors may point into `size` bytes at `memory`. Both indexes are `index`. */
struct kernel_device *kernel_device_new(uint8_t *ring, uint32_t num, uint32_t align, int event_idx,
                                        uint16_t index, uint8_t *memory, uint64_t size);
void kernel_device_free(struct kernel_device *device);
/* Takes a chain, its spans into `spans` and its readable bytes into `data`. */
int kernel_device_get(struct kernel_device *device, uint16_t *head, struct kernel_span *spans, uint32_t max,
                      uint32_t *count, uint8_t *data, uint32_t capacity, uint32_t *size);
/* Writes `data` into the chain's writable spans and gives it back as `length` bytes long. The
 * kernel shows the driver each chain at once. Returns the number of bytes written. */
int kernel_device_put(struct kernel_device *device, uint16_t head, const uint8_t *data, uint32_t size,
                      uint32_t length);
int kernel_device_need_notify(struct kernel_device *device);
void kernel_device_disable(struct kernel_device *device);
int kernel_device_enable(struct kernel_device *device); /* 0: something came in meanwhile */

/* cdef end */

#endif
