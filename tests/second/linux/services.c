/* SPDX-License-Identifier: BSD-3-Clause */
/* What services.h promises, but for what depends on the table: that is in remote.c. */
#include "services.h"
#include "trace.h"

#define HALT_BUG 5u

/* ---- text ---- */

size_t strlen(const char *text)
{
    size_t length = 0;

    while (text[length] != '\0')
        length++;
    return length;
}

int strncmp(const char *left, const char *right, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        if (left[i] != right[i])
            return (unsigned char)left[i] < (unsigned char)right[i] ? -1 : 1;
        if (left[i] == '\0')
            break;
    }
    return 0;
}

int strcmp(const char *left, const char *right)
{
    return strncmp(left, right, SIZE_MAX);
}

char *strncpy(char *to, const char *from, size_t size)
{
    size_t i = 0;

    for (; i < size && from[i] != '\0'; i++)
        to[i] = from[i];
    for (; i < size; i++)
        to[i] = '\0';
    return to;
}

void strscpy_pad(char *to, const char *from, size_t size)
{
    strncpy(to, from, size - 1);
    to[size - 1] = '\0';
}

struct text {
    char *at;
    char *end; /* for the NUL */
};

static void put(struct text *text, char character)
{
    if (text->at < text->end)
        *text->at++ = character;
}

static void put_text(struct text *text, const char *from)
{
    while (*from != '\0')
        put(text, *from++);
}

static void put_number(struct text *text, unsigned long value, unsigned int base)
{
    char digits[3 * sizeof value];
    unsigned int count = 0;

    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value != 0);
    while (count > 0)
        put(text, digits[--count]);
}

/* Knows %s, %d, %u, %x, %p and %%; a length of l or z; a width is skipped. */
int kernel_format(char *to, size_t size, const char *format, va_list arguments)
{
    struct text text = {to, to + size - 1};

    for (; *format != '\0'; format++) {
        bool is_long = false;
        unsigned long value;

        if (*format != '%') {
            if (*format != '\n')
                put(&text, *format);
            continue;
        }
        for (format++; (*format >= '0' && *format <= '9') || *format == 'l' || *format == 'z';
             format++)
            is_long |= *format > '9';
        switch (*format) {
        case 's':
            put_text(&text, va_arg(arguments, const char *));
            break;
        case 'd':
            value = (unsigned long)(is_long ? va_arg(arguments, long) : va_arg(arguments, int));
            if ((long)value < 0) {
                put(&text, '-');
                value = -value;
            }
            put_number(&text, value, 10);
            break;
        case 'u':
        case 'x':
        case 'X':
            value = is_long ? va_arg(arguments, unsigned long) : va_arg(arguments, unsigned int);
            put_number(&text, value, *format == 'u' ? 10 : 16);
            break;
        case 'p':
            put_number(&text, (uintptr_t)va_arg(arguments, void *), 16);
            break;
        default:
            put(&text, *format);
        }
    }
    *text.at = '\0';
    return (int)(text.at - to);
}

int snprintf(char *to, size_t size, const char *format, ...)
{
    va_list arguments;
    int length;

    va_start(arguments, format);
    length = kernel_format(to, size, format, arguments);
    va_end(arguments);
    return length;
}

void kernel_log(const struct device *device, const char *format, ...)
{
    char line[128];
    va_list arguments;

    va_start(arguments, format);
    kernel_format(line, sizeof line, format, arguments);
    va_end(arguments);
    if (device != NULL) {
        trace_text(device->name);
        trace_text(": ");
    }
    trace_line(line);
}

static void log_place(const char *what, const char *file, int line)
{
    trace_text(what);
    trace_text(file);
    trace_text(":");
    trace_decimal((uint32_t)line);
    trace_end();
}

_Noreturn void kernel_bug(const char *file, int line)
{
    log_place("BUG at ", file, line);
    port_halt(HALT_BUG);
}

int kernel_warn(const char *file, int line)
{
    log_place("WARNING at ", file, line);
    return 1;
}

/* ---- what 32-bit machines have no instruction for: the compiler calls these ---- */

uint64_t __ashldi3(uint64_t value, int count);
uint64_t __lshrdi3(uint64_t value, int count);

uint64_t __ashldi3(uint64_t value, int count)
{
    uint32_t low = (uint32_t)value;
    uint32_t high = (uint32_t)(value >> 32);

    if (count >= 32)
        return (uint64_t)(low << (count - 32)) << 32;
    if (count > 0)
        high = high << count | low >> (32 - count);
    return (uint64_t)high << 32 | low << count;
}

uint64_t __lshrdi3(uint64_t value, int count)
{
    uint32_t low = (uint32_t)value;
    uint32_t high = (uint32_t)(value >> 32);

    if (count >= 32)
        return high >> (count - 32);
    if (count > 0)
        low = low >> count | high << (32 - count);
    return (uint64_t)(high >> count) << 32 | low;
}

/* ---- memory: first fit, neighbours that are free are joined when one is looked for ---- */

#define HEAP_SIZE (256u * 1024u)

struct block {
    size_t size; /* of what follows */
    bool used;
} __attribute__((aligned(16)));

static unsigned char heap[HEAP_SIZE] __attribute__((aligned(16)));
static size_t heap_used;

static struct block *next_block(struct block *block)
{
    return (struct block *)(void *)((unsigned char *)(block + 1) + block->size);
}

void *kzalloc(size_t size, gfp_t flags)
{
    struct block *block = (struct block *)(void *)heap;
    struct block *end = (struct block *)(void *)(heap + HEAP_SIZE);

    (void)flags;
    if (size > HEAP_SIZE)
        return NULL;
    size = (size + 15u) & ~(size_t)15;
    if (block->size == 0)
        block->size = HEAP_SIZE - sizeof *block;
    for (; block < end; block = next_block(block)) {
        if (block->used)
            continue;
        for (struct block *next = next_block(block); next < end && !next->used;
             next = next_block(block))
            block->size += sizeof *next + next->size;
        if (block->size < size)
            continue;
        if (block->size - size > sizeof *block) {
            size_t rest = block->size - size - sizeof *block;

            block->size = size;
            *next_block(block) = (struct block){rest, false};
        }
        block->used = true;
        heap_used += block->size;
        return memset(block + 1, 0, size);
    }
    return NULL;
}

void kfree(const void *pointer)
{
    struct block *block = (struct block *)(uintptr_t)pointer - 1;

    if (pointer == NULL)
        return;
    BUG_ON(!block->used);
    block->used = false;
    heap_used -= block->size;
    memset(block + 1, 0xA5, block->size); /* whoever uses it still does not find it as it was */
}

size_t kernel_heap_used(void)
{
    return heap_used;
}

/* ---- numbers ---- */

void idr_init(struct idr *idr)
{
    memset(idr, 0, sizeof *idr);
}

void idr_destroy(struct idr *idr)
{
    idr_init(idr);
}

static int idr_place(const struct idr *idr, unsigned long id)
{
    for (int i = 0; i < IDR_LIMIT; i++)
        if (idr->entry[i].pointer != NULL && (unsigned long)idr->entry[i].id == id)
            return i;
    return -1;
}

int idr_alloc(struct idr *idr, void *pointer, int start, int end, gfp_t flags)
{
    int id = start;

    (void)flags;
    while (idr_place(idr, (unsigned long)id) >= 0)
        id++;
    if (end > 0 && id >= end)
        return -ENOSPC;
    for (int i = 0; i < IDR_LIMIT; i++) {
        if (idr->entry[i].pointer == NULL) {
            idr->entry[i].id = id;
            idr->entry[i].pointer = pointer;
            return id;
        }
    }
    return -ENOMEM;
}

void *idr_find(const struct idr *idr, unsigned long id)
{
    int place = idr_place(idr, id);

    return place < 0 ? NULL : idr->entry[place].pointer;
}

void *idr_remove(struct idr *idr, unsigned long id)
{
    void *pointer = idr_find(idr, id);

    if (pointer != NULL)
        idr->entry[idr_place(idr, id)].pointer = NULL;
    return pointer;
}

int ida_alloc(struct ida *ida, gfp_t flags)
{
    (void)flags;
    for (int id = 0; id < 32; id++) {
        if ((ida->taken & BIT(id)) == 0) {
            ida->taken |= (u32)BIT(id);
            return id;
        }
    }
    return -ENOSPC;
}

void ida_free(struct ida *ida, unsigned int id)
{
    ida->taken &= (u32)~BIT(id);
}

/* ---- devices, drivers and buses ---- */

struct class *class_create(struct module *owner, const char *name)
{
    static struct class only;

    (void)owner;
    only.name = name;
    return &only;
}

int bus_register(struct bus_type *bus)
{
    INIT_LIST_HEAD(&bus->devices);
    INIT_LIST_HEAD(&bus->drivers);
    return 0;
}

static void detach(struct device *device)
{
    if (device->driver == NULL)
        return;
    device->bus->remove(device);
    device->driver = NULL;
    device->driver_data = NULL;
    kfree(device->managed);
    device->managed = NULL;
}

static bool attach(struct device *device, struct device_driver *driver)
{
    int error;

    if (!device->bus->match(device, driver))
        return false;
    device->driver = driver;
    error = device->bus->probe(device);
    if (error == 0)
        return true;
    dev_err(device, "probe with driver %s failed: %d", driver->name, error);
    device->driver = NULL;
    kfree(device->managed);
    device->managed = NULL;
    return false;
}

int driver_register(struct device_driver *driver)
{
    struct device *device;

    list_add_tail(&driver->on_bus, &driver->bus->drivers);
    list_for_each_entry(device, &driver->bus->devices, on_bus)
        if (device->driver == NULL)
            attach(device, driver);
    return 0;
}

void driver_unregister(struct device_driver *driver)
{
    struct device *device;

    list_for_each_entry(device, &driver->bus->devices, on_bus)
        if (device->driver == driver)
            detach(device);
    list_del(&driver->on_bus);
}

int driver_set_override(struct device *device, const char **override, const char *text,
                        size_t length)
{
    char *copy = kzalloc(length + 1, GFP_KERNEL);

    (void)device;
    if (copy == NULL)
        return -ENOMEM;
    memcpy(copy, text, length);
    kfree(*override);
    *override = copy;
    return 0;
}

void device_initialize(struct device *device)
{
    device->references = 1;
    INIT_LIST_HEAD(&device->children);
}

int device_add(struct device *device)
{
    struct device_driver *driver;

    get_device(device);
    list_add_tail(&device->in_parent, &device->parent->children);
    list_add_tail(&device->on_bus, &device->bus->devices);
    list_for_each_entry(driver, &device->bus->drivers, on_bus)
        if (attach(device, driver))
            break;
    put_device(device);
    return 0;
}

void device_unregister(struct device *device)
{
    detach(device);
    list_del(&device->in_parent);
    list_del(&device->on_bus);
    put_device(device);
}

struct device *get_device(struct device *device)
{
    device->references++;
    return device;
}

void put_device(struct device *device)
{
    if (--device->references == 0)
        device->release(device);
}

int dev_set_name(struct device *device, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    kernel_format(device->name, sizeof device->name, format, arguments);
    va_end(arguments);
    return 0;
}

int device_for_each_child(struct device *parent, void *data,
                          int (*function)(struct device *device, void *data))
{
    struct device *device, *next;
    int result = 0;

    list_for_each_entry_safe(device, next, &parent->children, in_parent) {
        result = function(device, data);
        if (result != 0)
            break;
    }
    return result;
}

struct device *device_find_child(struct device *parent, void *data,
                                 int (*match)(struct device *device, void *data))
{
    struct device *device;

    list_for_each_entry(device, &parent->children, in_parent)
        if (match(device, data))
            return get_device(device);
    return NULL;
}

void *devm_kzalloc(struct device *device, size_t size, gfp_t flags)
{
    BUG_ON(device->managed != NULL);
    device->managed = kzalloc(size, flags);
    return device->managed;
}
