/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The kernel services that Linux's RPMsg bus and virtio ring ask for, for one core that does one
 * thing at a time: no scheduler, no interrupts of its own, physical addresses everywhere.
 *
 * This one header stands in for all those of the kernel that are not taken as they are; build.py
 * says which. The names and the meaning of what is here are the kernel's, since its files are
 * compiled as they lie in the distribution's source; how it is done is ours and is small.
 */
#ifndef SERVICES_H
#define SERVICES_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "freestanding.h"
#include "port.h"

/* ---- configuration and compiler ---- */

#define CONFIG_RPMSG 1
#define CONFIG_RPMSG_NS 1
#define CONFIG_RPMSG_VIRTIO 1
#define CONFIG_VIRTIO 1
#define CONFIG_VIRTIO_ANCHOR 1

#define __init
#define __exit
#define __force
#define __bitwise
#define __user
#define __iomem
#define __packed __attribute__((packed))
#define __aligned(n) __attribute__((aligned(n)))
#define __must_check
#define __maybe_unused __attribute__((unused))
#define __always_inline inline __attribute__((always_inline))
#define __same_type(a, b) __builtin_types_compatible_p(typeof(a), typeof(b))
#define static_assert(condition, ...) _Static_assert(condition, #condition)
#define BUILD_BUG_ON(condition) BUG_ON(condition)
#define likely(x) (x)
#define unlikely(x) (x)
#define typecheck(type, x) 1
#define data_race(x) (x)

/* ---- types ---- */

typedef uint8_t u8, __u8;
typedef uint16_t u16, __u16, __le16, __be16;
typedef uint32_t u32, __u32, __le32, __be32;
typedef uint64_t u64, __u64, __le64, __be64;
typedef int8_t s8, __s8;
typedef int16_t s16, __s16;
typedef int32_t s32, __s32;
typedef int64_t s64, __s64;
typedef intptr_t ssize_t;
typedef unsigned int gfp_t;
typedef uintptr_t dma_addr_t, phys_addr_t;
typedef unsigned int __poll_t;
typedef struct poll_table poll_table;
typedef struct {
    u8 b[16];
} guid_t, uuid_le, uuid_t;
#define UUID_STRING_LEN 36

struct file;
struct cpumask;
struct module;

struct list_head {
    struct list_head *next, *prev;
};
struct hlist_head {
    struct hlist_node *first;
};
struct hlist_node {
    struct hlist_node *next, **pprev;
};

/* All cores here are little-endian. */
#define cpu_to_le16(x) ((__le16)(x))
#define cpu_to_le32(x) ((__le32)(x))
#define cpu_to_le64(x) ((__le64)(x))
#define le16_to_cpu(x) ((u16)(x))
#define le32_to_cpu(x) ((u32)(x))
#define le64_to_cpu(x) ((u64)(x))
#define cpu_to_be16(x) ((__be16)kernel_swap(x, 2))
#define cpu_to_be32(x) ((__be32)kernel_swap(x, 4))
#define cpu_to_be64(x) ((__be64)kernel_swap(x, 8))
#define be16_to_cpu(x) ((u16)kernel_swap(x, 2))
#define be32_to_cpu(x) ((u32)kernel_swap(x, 4))
#define be64_to_cpu(x) ((u64)kernel_swap(x, 8))
static inline u64 kernel_swap(u64 value, int size)
{
    u64 swapped = 0;

    for (; size > 0; size--, value >>= 8)
        swapped = swapped << 8 | (value & 0xFF);
    return swapped;
}

#define ARRAY_SIZE(array) (sizeof(array) / sizeof(array)[0])
#define BIT(n) (1UL << (n))
#define BIT_ULL(n) (1ULL << (n))
#define BITS_PER_LONG __LONG_WIDTH__
#define PAGE_SIZE 4096UL
#define PAGE_ALIGN(x) (((x) + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1))
#define INT_MAX __INT_MAX__
#define U16_MAX UINT16_MAX
static inline bool is_power_of_2(unsigned long n)
{
    return n != 0 && (n & (n - 1)) == 0;
}

/* ---- what is loaded once, stored once, and in which order ---- */

#define READ_ONCE(x) (*(const volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile typeof(x) *)&(x) = (value))
#define barrier() __asm__ volatile("" ::: "memory")
#define mb() port_full_fence()
#define rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define wmb() __atomic_thread_fence(__ATOMIC_RELEASE)
#define dma_rmb() rmb()
#define dma_wmb() wmb()
#define virt_mb() mb()
#define virt_rmb() rmb()
#define virt_wmb() wmb()
#define virt_store_mb(word, value)                                                                 \
    do {                                                                                           \
        WRITE_ONCE(word, value);                                                                   \
        mb();                                                                                      \
    } while (0)
#define smp_load_acquire(pointer) __atomic_load_n(pointer, __ATOMIC_ACQUIRE)
#define smp_store_release(pointer, value) __atomic_store_n(pointer, value, __ATOMIC_RELEASE)

/* ---- errors ---- */

#define EPERM 1
#define ENOENT 2
#define EIO 5
#define ENXIO 6
#define E2BIG 7
#define EAGAIN 11
#define ENOMEM 12
#define EFAULT 14
#define EBUSY 16
#define ENODEV 19
#define EINVAL 22
#define ENOSPC 28
#define EMSGSIZE 90
#define ERESTARTSYS 512
#define ENOTSUPP 524

#define MAX_ERRNO 4095
#define IS_ERR_VALUE(x) ((uintptr_t)(x) >= (uintptr_t)-MAX_ERRNO)
#define IS_ERR(pointer) IS_ERR_VALUE(pointer)
#define PTR_ERR(pointer) ((int)(intptr_t)(pointer))
#define ERR_PTR(error) ((void *)(intptr_t)(error))

/* Halts the core, after a line in the trace. */
_Noreturn void kernel_bug(const char *file, int line);
int kernel_warn(const char *file, int line);
#define BUG() kernel_bug(__FILE__, __LINE__)
#define BUG_ON(condition)                                                                          \
    do {                                                                                           \
        if (condition)                                                                             \
            BUG();                                                                                 \
    } while (0)
#define WARN_ON(condition) ((condition) ? kernel_warn(__FILE__, __LINE__) : 0)
#define WARN_ON_ONCE(condition) WARN_ON(condition)
#define panic(...) BUG()

/* ---- text ---- */

size_t strlen(const char *text);
int strcmp(const char *left, const char *right);
int strncmp(const char *left, const char *right, size_t size);
char *strncpy(char *to, const char *from, size_t size);
void strscpy_pad(char *to, const char *from, size_t size);
int kernel_format(char *to, size_t size, const char *format, va_list arguments);
int snprintf(char *to, size_t size, const char *format, ...);
int sprintf(char *to, const char *format, ...);
int sysfs_emit(char *to, const char *format, ...);

/* A line in the trace; the device's name before it where there is one. */
struct device;
void kernel_log(const struct device *device, const char *format, ...);
#ifndef pr_fmt
#define pr_fmt(format) format
#endif
#define pr_err(format, ...) kernel_log(NULL, pr_fmt(format), ##__VA_ARGS__)
#define pr_debug(...)
#define dev_err(device, ...) kernel_log(device, __VA_ARGS__)
#define dev_warn(device, ...) kernel_log(device, __VA_ARGS__)
#define dev_warn_once(device, ...) kernel_log(device, __VA_ARGS__)
#define dev_warn_ratelimited(device, ...) kernel_log(device, __VA_ARGS__)
#define dev_info(device, ...) kernel_log(device, __VA_ARGS__)
#define dev_dbg(device, ...) ((void)(device))
#define print_hex_dump_debug(...)

/* ---- locks and waiting: there is one thread of control ---- */

/* Sleeps until the host rings, and wakes who waits for room. Halts if the host is gone. */
void kernel_sleep(void);

typedef struct {
    int unused;
} spinlock_t;
#define spin_lock_init(lock) ((void)(lock))
#define spin_lock(lock) ((void)(lock))
#define spin_unlock(lock) ((void)(lock))
#define spin_lock_irq(lock) ((void)(lock))
#define spin_unlock_irq(lock) ((void)(lock))
#define spin_lock_irqsave(lock, flags) ((void)(lock), (flags) = 0)
#define spin_unlock_irqrestore(lock, flags) ((void)(lock), (void)(flags))
#define synchronize_rcu() barrier()
#define might_sleep()

struct mutex {
    bool held;
};
#define mutex_init(mutex) ((void)((mutex)->held = false))
/* Nobody else could ever give it back. */
#define mutex_lock(mutex)                                                                          \
    do {                                                                                           \
        BUG_ON((mutex)->held);                                                                     \
        (mutex)->held = true;                                                                      \
    } while (0)
#define mutex_unlock(mutex) ((void)((mutex)->held = false))

typedef struct {
    int count;
} atomic_t;
static inline int atomic_inc_return(atomic_t *atomic)
{
    return ++atomic->count;
}
static inline bool atomic_dec_and_test(atomic_t *atomic)
{
    return --atomic->count == 0;
}

typedef struct {
    int unused;
} wait_queue_head_t;
#define init_waitqueue_head(queue) ((void)(queue))
#define wake_up_interruptible(queue) ((void)(queue))
#define msecs_to_jiffies(milliseconds) (milliseconds)
/* There is no clock: it waits until the condition holds. */
#define wait_event_interruptible_timeout(queue, condition, timeout)                                \
    ({                                                                                             \
        while (!(condition))                                                                       \
            kernel_sleep();                                                                        \
        (timeout);                                                                                 \
    })

struct kref {
    int count;
};
static inline void kref_init(struct kref *kref)
{
    kref->count = 1;
}
static inline void kref_get(struct kref *kref)
{
    kref->count++;
}
static inline int kref_put(struct kref *kref, void (*release)(struct kref *))
{
    if (--kref->count > 0)
        return 0;
    release(kref);
    return 1;
}

typedef int irqreturn_t;
enum { IRQ_NONE, IRQ_HANDLED };

/* ---- memory ---- */

#define GFP_KERNEL 0u
#define __GFP_ZERO 1u
#define __GFP_NOWARN 0u
#define __GFP_HIGHMEM 0u
void *kzalloc(size_t size, gfp_t flags);
void kfree(const void *pointer);
size_t kernel_heap_used(void);
#define kmalloc(size, flags) kzalloc(size, flags)
#define kmalloc_array(count, size, flags) kzalloc((count) * (size), flags)

/* The buffers: the table's carveout, which there is one of. */
void *dma_alloc_coherent(struct device *device, size_t size, dma_addr_t *address, gfp_t flags);
#define dma_free_coherent(device, size, pointer, address) ((void)(pointer))

/* Rings lie where the table says, and no device here sees memory at other addresses. */
#define alloc_pages_exact(size, flags) NULL
#define free_pages_exact(pointer, size) ((void)(pointer))
#define virt_to_phys(pointer) ((phys_addr_t)(pointer))
#define virt_addr_valid(pointer) true
#define is_vmalloc_addr(pointer) false
#define vmalloc_to_page(pointer) ((void *)(pointer))
#define offset_in_page(pointer) 0u
#define xen_domain() false
#define kmsan_handle_dma(...)

enum dma_data_direction { DMA_BIDIRECTIONAL, DMA_TO_DEVICE, DMA_FROM_DEVICE };
#define dma_max_mapping_size(device) SIZE_MAX
#define dma_mapping_error(device, address) 0
#define dma_map_page(device, page, offset, size, direction) ((dma_addr_t)(page) + (offset))
#define dma_map_single(device, pointer, size, direction) ((dma_addr_t)(pointer))
#define dma_map_single_attrs(device, pointer, size, direction, attrs) ((dma_addr_t)(pointer))
#define dma_unmap_page(...)
#define dma_unmap_single(...)
#define dma_unmap_single_attrs(...)
#define dma_need_sync(device, address) false
#define dma_sync_single_range_for_cpu(...)
#define dma_sync_single_range_for_device(...)

struct scatterlist {
    void *page;
    unsigned int offset, length;
    bool is_last;
};
static inline void sg_init_table(struct scatterlist *sg, unsigned int count)
{
    memset(sg, 0, sizeof *sg * count);
    sg[count - 1].is_last = true;
}
static inline void sg_set_page(struct scatterlist *sg, void *page, unsigned int length,
                               unsigned int offset)
{
    sg->page = page;
    sg->length = length;
    sg->offset = offset;
}
static inline void sg_init_one(struct scatterlist *sg, void *pointer, unsigned int length)
{
    sg_init_table(sg, 1);
    sg_set_page(sg, pointer, length, 0);
}
#define sg_next(sg) ((sg)->is_last ? NULL : (sg) + 1)
#define sg_page(sg) ((sg)->page)
#define sg_phys(sg) ((dma_addr_t)(sg)->page + (sg)->offset)
#define sg_dma_address(sg) sg_phys(sg)

/* ---- numbers that are given out ---- */

#define IDR_LIMIT 32
struct idr {
    struct {
        int id;
        void *pointer; /* NULL: free */
    } entry[IDR_LIMIT];
};
void idr_init(struct idr *idr);
void idr_destroy(struct idr *idr);
/* The lowest free number from `start` on, below `end` unless that is 0 or less. */
int idr_alloc(struct idr *idr, void *pointer, int start, int end, gfp_t flags);
void *idr_find(const struct idr *idr, unsigned long id);
void *idr_remove(struct idr *idr, unsigned long id);

struct ida {
    u32 taken;
};
#define DEFINE_IDA(name) struct ida name
int ida_alloc(struct ida *ida, gfp_t flags);
void ida_free(struct ida *ida, unsigned int id);
#define ida_destroy(ida) ((void)(ida))

/* ---- modules ---- */

/* build.py gives each file a MODULE_ENTRY; remote.c calls them in order. */
#define core_initcall(function)                                                                    \
    int MODULE_ENTRY(void);                                                                        \
    int MODULE_ENTRY(void)                                                                         \
    {                                                                                              \
        return function();                                                                         \
    }
#define postcore_initcall(function) core_initcall(function)
#define subsys_initcall(function) core_initcall(function)
#define module_driver(driver, add, remove)                                                         \
    int MODULE_ENTRY(void);                                                                        \
    int MODULE_ENTRY(void)                                                                         \
    {                                                                                              \
        return add(&driver);                                                                       \
    }
#define module_exit(function)
#define module_param(...)
#define EXPORT_SYMBOL(symbol)
#define EXPORT_SYMBOL_GPL(symbol)
#define MODULE_ALIAS(text)
#define MODULE_AUTHOR(text)
#define MODULE_DESCRIPTION(text)
#define MODULE_DEVICE_TABLE(...)
#define MODULE_LICENSE(text)
#define THIS_MODULE NULL

/* ---- devices, drivers and the buses that bring them together ---- */

struct attribute {
    const char *name;
};
struct device_attribute {
    struct attribute attr;
};
/* There is no sysfs: what would be shown in it is not compiled. */
#define DEVICE_ATTR_RO(name) struct device_attribute dev_attr_##name
#define DEVICE_ATTR_RW(name) DEVICE_ATTR_RO(name)
#define ATTRIBUTE_GROUPS(name) static const void *const name##_groups = name##_attrs

struct device_driver;
struct kobj_uevent_env;

struct bus_type {
    const char *name;
    const void *const *dev_groups;
    int (*match)(struct device *device, struct device_driver *driver);
    int (*uevent)(struct device *device, struct kobj_uevent_env *env);
    int (*probe)(struct device *device);
    void (*remove)(struct device *device);
    void (*shutdown)(struct device *device);
    struct list_head devices, drivers;
};

struct device_driver {
    const char *name;
    struct bus_type *bus;
    struct module *owner;
    struct list_head on_bus;
};

struct device {
    struct device *parent;
    struct bus_type *bus;
    struct device_driver *driver;
    void (*release)(struct device *device);
    void *driver_data;
    void *managed; /* one allocation that goes when the driver leaves */
    struct device_node *of_node;
    struct list_head on_bus, children, in_parent;
    int references;
    char name[64];
};

struct class {
    const char *name;
};
struct class *class_create(struct module *owner, const char *name);
#define class_destroy(class) ((void)(class))

int bus_register(struct bus_type *bus);
#define bus_unregister(bus) ((void)(bus))
int driver_register(struct device_driver *driver);
void driver_unregister(struct device_driver *driver);
int driver_set_override(struct device *device, const char **override, const char *text,
                        size_t length);
void device_initialize(struct device *device);
int device_add(struct device *device);
void device_unregister(struct device *device);
struct device *get_device(struct device *device);
void put_device(struct device *device);
int dev_set_name(struct device *device, const char *format, ...);
int device_for_each_child(struct device *parent, void *data,
                          int (*function)(struct device *device, void *data));
/* Holds what it finds. */
struct device *device_find_child(struct device *parent, void *data,
                                 int (*match)(struct device *device, void *data));
void *devm_kzalloc(struct device *device, size_t size, gfp_t flags);
#define dev_name(device) ((const char *)(device)->name)
#define dev_get_drvdata(device) ((device)->driver_data)
#define dev_set_drvdata(device, data) ((void)((device)->driver_data = (data)))
#define device_lock(device) ((void)(device))
#define device_unlock(device) ((void)(device))
#define dev_pm_domain_attach(device, power) 0
#define dev_pm_domain_detach(device, power) ((void)(device))
#define add_uevent_var(...) 0

/* There is no device tree. */
#define dev_of_node(device) ((struct device_node *)NULL)
#define of_node_put(node) ((void)(node))
#define of_get_available_child_count(node) 0
#define of_get_next_available_child(node, previous) ((struct device_node *)NULL)
#define of_device_is_compatible(node, name) false
#define of_driver_match_device(device, driver) 0
#define of_device_modalias(device, text, size) (-ENODEV)
#define of_device_uevent_modalias(device, env) (-ENODEV)

#include <linux/list.h>

#endif
