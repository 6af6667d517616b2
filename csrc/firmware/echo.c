/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The echo firmware: sends each message back to where it came from, until it is told to stop.
 * echo_protocol.h has the messages that are orders. It is the device or the driver, by what it is
 * linked with.
 */
#include "echo_protocol.h"
#include "freestanding.h"
#include "port.h"
#include "rpmsg_device.h"
#include "trace.h"
#include "variant.h"

static struct rpmsg_device device;
static uint32_t unknown_addresses; /* messages dropped for their destination */
static uint32_t unknown_ns;        /* name-service messages of a wrong size or for another name */
static bool bound;                 /* the host's address is known */

/* Answered, and not released yet: with VARIANT_HOLD that many are kept. */
static struct rpmsg_message held[VARIANT_HOLD + 1];
static uint32_t held_count;

static void bind(uint32_t address, const char *how)
{
    if (!bound) {
        bound = true;
        trace_text("bound to ");
        trace_hex(address);
        trace_text(how);
        trace_end();
    }
}

/* Compare up to a NUL; the name from the host need not have one. */
static bool is_our_name(const char name[RPMSG_NAME_SIZE])
{
    static const char ours[] = ECHO_CHANNEL_NAME;

    _Static_assert(sizeof ours <= RPMSG_NAME_SIZE + 1, "it is as long as the field or shorter");
    for (uint32_t i = 0; i < RPMSG_NAME_SIZE; i++) {
        if (name[i] != ours[i])
            return false;
        if (name[i] == '\0')
            break;
    }
    return true;
}

static void on_name_service(const struct rpmsg_message *message)
{
    struct rpmsg_ns ns;

    if (message->length != sizeof ns) {
        unknown_ns++;
        return;
    }
    memcpy(&ns, message->payload, sizeof ns);
    if (!is_our_name(ns.name)) {
        unknown_ns++;
    } else if ((ns.flags & RPMSG_NS_DESTROY) != 0) {
        bound = false;
        trace_line("unbound by name service");
    } else {
        bind(ns.address, " by name service");
    }
}

static void trace_drops(void)
{
    static const char *const text[] = {
        "dropped, no such address: ", "dropped, name service: ", "dropped, bad buffer: ",
        "dropped, bad length: ", "dropped, reply too long: "};
    const uint32_t count[] = {unknown_addresses, unknown_ns, device.bad_buffers, device.bad_lengths,
                              device.too_long};

    for (uint32_t i = 0; i < sizeof count / sizeof count[0]; i++)
        if (count[i] != 0)
            trace_count(text[i], count[i]);
}

static _Noreturn void power_down(const char *why, uint32_t code)
{
    trace_drops();
    trace_line(why);
    port_halt(code);
}

static enum rpmsg_link shut_down(const struct rpmsg_message *message)
{
    const uint32_t answer = ECHO_SHUTDOWN;
    enum rpmsg_link link =
        rpmsg_send(&device, ECHO_ADDRESS, message->source, &answer, sizeof answer);

    if (link == RPMSG_UP)
        link = rpmsg_announce(&device, ECHO_CHANNEL_NAME, ECHO_ADDRESS, RPMSG_NS_DESTROY);
    if (link != RPMSG_UP)
        return link;
    rpmsg_release(&device, message);
    rpmsg_flush(&device);
    power_down("shutdown", ECHO_HALT_DONE);
}

static _Noreturn void crash(void)
{
    trace_line("crash on request");
    rpmsg_flush(&device);
    port_crash(ECHO_CRASH_ADDRESS);
}

static _Noreturn void hang(void)
{
    trace_line("hang on request");
    rpmsg_flush(&device);
    for (;;)
        __asm__ volatile("");
}

static _Noreturn void reset(void)
{
    trace_line("reset on request");
    rpmsg_flush(&device);
    port_reset();
}

static enum rpmsg_link on_echo(const struct rpmsg_message *message)
{
    bind(message->source, " by its first message");
    if (message->length >= sizeof(uint32_t)) {
        uint32_t order =
            __atomic_load_n((const uint32_t *)(const void *)message->payload, __ATOMIC_RELAXED);

        if (order == ECHO_SHUTDOWN)
            return shut_down(message);
        if (message->length == sizeof(uint32_t)) {
            if (order == ECHO_CRASH)
                crash();
            if (order == ECHO_HANG)
                hang();
            if (order == ECHO_RESET)
                reset();
        }
    }
    return rpmsg_send(&device, ECHO_ADDRESS, message->source, message->payload, message->length);
}

static enum rpmsg_link announce(void)
{
    return rpmsg_announce(&device, ECHO_CHANNEL_NAME, ECHO_ADDRESS, RPMSG_NS_CREATE);
}

static enum rpmsg_link dispatch(const struct rpmsg_message *message)
{
    if (message->destination == ECHO_ADDRESS)
        return on_echo(message);
    if (VARIANT_ANNOUNCE == ANNOUNCE_ASKED && message->destination == ECHO_ADDRESS + 1)
        return announce();
    if (message->destination == RPMSG_NS_ADDRESS) {
        on_name_service(message);
    } else if (unknown_addresses++ == 0) {
        trace_text("dropped: no endpoint at ");
        trace_hex(message->destination);
        trace_text(" (further ones are only counted)");
        trace_end();
    }
    return RPMSG_UP;
}

static void release(const struct rpmsg_message *message)
{
    held[held_count++] = *message;
    if (held_count > VARIANT_HOLD)
        while (held_count > 0)
            rpmsg_release(&device, &held[--held_count]);
}

/* One connection, from a ready driver to its reset. */
static enum rpmsg_link serve(void)
{
    enum rpmsg_link link;

    bound = false;
    held_count = 0;
#if VARIANT_ANNOUNCE == ANNOUNCE_EARLY
    link = rpmsg_wait_buffers(&device);
#else
    link = rpmsg_wait_driver(&device);
#endif
    if (link == RPMSG_UP)
        link = rpmsg_open(&device, &resource_table.pool);
    if (link == RPMSG_UP) {
        trace_text("driver ready, features ");
        trace_hex(device.features);
        trace_end();
        if (VARIANT_ANNOUNCE != ANNOUNCE_ASKED)
            link = announce();
        if (link == RPMSG_UP && VARIANT_ANNOUNCE == ANNOUNCE_TWICE)
            link = announce();
    }
#if VARIANT_ANNOUNCE == ANNOUNCE_EARLY
    rpmsg_flush(&device);
    if (link == RPMSG_UP)
        link = rpmsg_wait_driver(&device);
#endif
    while (link == RPMSG_UP) {
        struct rpmsg_message message;

        link = rpmsg_receive(&device, &message);
        if (link != RPMSG_UP)
            break;
        link = dispatch(&message);
        if (link == RPMSG_UP)
            release(&message);
    }
    return link;
}

_Noreturn void firmware_main(void)
{
    trace_line("booted: echo on " ECHO_CHANNEL_NAME);
    device.vdev = &resource_table.vdev;
    for (;;) {
        switch (serve()) {
        case RPMSG_UP:
        case RPMSG_RESET:
            trace_drops();
            trace_line("reset by the host");
            break;
        case RPMSG_HOST_GONE:
            power_down("host gone", ECHO_HALT_DONE);
        case RPMSG_BAD_TABLE:
            power_down("halted", ECHO_HALT_BAD_TABLE);
        }
    }
}
