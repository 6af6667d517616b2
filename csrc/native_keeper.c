/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * native-keeper: the parent of a native core that is to outlive the host that booted it.
 *
 *     native-keeper PATH LISTENER_FD HOST_FD DOORBELL_FD MEMORY_FD CORE_DOORBELL_FD REPORT_FD \
 *                   CORE ENTRY DA:SIZE:OFFSET [DA:SIZE:OFFSET ...]
 *
 * PATH         absolute path of the Unix socket on which LISTENER_FD (SOCK_SEQPACKET) listens;
 *              removed when the keeper ends
 * HOST_FD      a connected SOCK_SEQPACKET socket: the host that boots the core
 * DOORBELL_FD  the host's end of the doorbell; the keeper never uses it, it only hands it on
 * CORE ...     the program native-core and its arguments from ENTRY on; the descriptors between
 *              are its arguments too, in its order
 *
 * The process that was started ends at once; the keeper is what it forked: in a session of its
 * own, and nobody's child. It serves one host at a time; others are told so and sent away. Each
 * message begins with struct header, in the machine's byte order:
 *
 *     from the keeper
 *     1 hello   with five descriptors: MEMORY, DOORBELL, REPORT, pidfd of the core, pidfd of the
 *               keeper; number is 1 where the core has ended already, else 0; then what the last
 *               host left, or nothing
 *     2 busy    another host has the core; the connection is closed
 *     3 failed  the core could not be started; number is an errno value, then a line of text
 *     4 left    the answer to leave; number is that of the order
 *     5 ended   number is the wait status of the core; the keeper ends
 *
 *     from the host
 *     1 take    the core is this host's from now on
 *     2 leave   it is nobody's from now on; then what the next host is to get
 *
 * The first host has the core from the beginning. When a host that has the core closes its
 * connection (it stopped the core, or died), the keeper kills the core and ends. Any other host
 * may come and go. A core that ends while nobody has it leaves its wait status to the next host
 * that takes it. When the keeper dies, its core dies of the parent-death signal.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#define PROTOCOL_VERSION 1
#define MAX_LEFT (33 * 1024) /* a note of 32 KiB and a description of the core */

enum to_host { HELLO = 1, BUSY = 2, FAILED = 3, LEFT = 4, ENDED = 5 };
enum to_keeper { TAKE = 1, LEAVE = 2 };

struct header {
    uint16_t version;
    uint16_t kind;
    uint32_t number;
};

_Static_assert(sizeof(struct header) == 8, "the host decodes it by its offsets");

enum argument {
    ARG_PATH = 1,
    ARG_LISTENER,
    ARG_HOST,
    ARG_DOORBELL,
    ARG_MEMORY,
    ARG_CORE_DOORBELL,
    ARG_REPORT,
    ARG_CORE,
    ARG_ENTRY,
    ARG_WINDOW
};

static const char *path;
static int listener = -1;
static int host = -1; /* -1: nobody is connected */
static bool owned = true;

static pid_t core;
static bool core_ended;
static int core_status;

enum { HANDED_MEMORY, HANDED_DOORBELL, HANDED_REPORT, HANDED_CORE, HANDED_KEEPER, HANDED };
static int handed[HANDED];

static unsigned char left[MAX_LEFT];
static size_t left_length;

/* Send one message; false = it could not be delivered, as to a host that reads nothing. */
static bool send_message(int to, enum to_host kind, uint32_t number, const void *body,
                         size_t length, bool with_descriptors)
{
    struct header header = {PROTOCOL_VERSION, (uint16_t)kind, number};
    struct iovec parts[] = {{&header, sizeof header}, {(void *)(uintptr_t)body, length}};
    union {
        struct cmsghdr header;
        unsigned char bytes[CMSG_SPACE(sizeof handed)];
    } control = {0};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};

    if (with_descriptors) {
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(sizeof handed);
        memcpy(CMSG_DATA(&control.header), handed, sizeof handed);
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
    }
    return sendmsg(to, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0;
}

static bool send_hello(void)
{
    return send_message(host, HELLO, core_ended, left, left_length, true);
}

/* Say why there is no core, and end. */
static _Noreturn void failed(const char *what)
{
    int error = errno;

    (void)unlink(path);
    (void)send_message(host, FAILED, (uint32_t)error, what, strlen(what), false);
    _exit(1);
}

/* The core is over, and its host gets to know how. The path is free before anybody knows. */
static _Noreturn void finish(void)
{
    if (!core_ended) {
        (void)kill(core, SIGKILL);
        while (waitpid(core, &core_status, 0) < 0 && errno == EINTR)
            ;
    }
    (void)unlink(path);
    if (host >= 0)
        (void)send_message(host, ENDED, (uint32_t)core_status, NULL, 0, false);
    _exit(0);
}

static void host_gone(void)
{
    (void)close(host);
    host = -1;
    if (owned)
        finish();
}

/* Take one message; false = there is none. A host that breaks the protocol is taken for gone. */
static bool serve_host(void)
{
    static struct {
        struct header header;
        unsigned char body[MAX_LEFT];
    } order;
    ssize_t received = recv(host, &order, sizeof order, MSG_DONTWAIT | MSG_TRUNC);
    size_t length;

    if (received < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (received < 0 && errno == ECONNRESET)
        return true; /* told once, before what the host said last: it may have taken the core back */
    if (received < (ssize_t)sizeof order.header || received > (ssize_t)sizeof order ||
        order.header.version != PROTOCOL_VERSION) {
        host_gone();
        return false;
    }
    length = (size_t)received - sizeof order.header;
    if (order.header.kind == TAKE && length == 0) {
        owned = true;
        if (core_ended)
            finish();
    } else if (order.header.kind == LEAVE) {
        memcpy(left, order.body, length);
        left_length = length;
        owned = false;
        (void)send_message(host, LEFT, order.header.number, NULL, 0, false);
    } else {
        host_gone();
        return false;
    }
    return true;
}

static void welcome(void)
{
    struct ucred peer = {0};
    socklen_t size = sizeof peer;
    int visitor = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

    if (visitor < 0)
        return;
    if (getsockopt(visitor, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 ||
        peer.uid != geteuid()) {
        (void)close(visitor);
    } else if (host >= 0) {
        (void)send_message(visitor, BUSY, 0, NULL, 0, false);
        (void)close(visitor);
    } else {
        host = visitor;
        if (!send_hello())
            host_gone();
    }
}

static _Noreturn void keep(void)
{
    for (;;) {
        /* poll passes over what is -1 */
        struct pollfd watched[] = {
            {.fd = core_ended ? -1 : handed[HANDED_CORE], .events = POLLIN},
            {.fd = host, .events = POLLIN},
            {.fd = listener, .events = POLLIN},
        };

        if (poll(watched, sizeof watched / sizeof watched[0], -1) < 0) {
            if (errno == EINTR)
                continue;
            finish();
        }
        if (watched[0].revents != 0 && waitpid(core, &core_status, WNOHANG) == core) {
            core_ended = true;
            if (owned)
                finish();
        }
        /* Always before the listener: a host that left is not in the way of the next one. */
        while (host >= 0 && serve_host())
            ;
        if (watched[2].revents != 0)
            welcome();
    }
}

static int open_pidfd(pid_t pid)
{
    return (int)syscall(SYS_pidfd_open, pid, 0); /* close-on-exec by itself */
}

static void start_core(char **argv)
{
    const pid_t keeper = getpid();
    int news[2]; /* closed by the core's exec, or tells why there was none */
    int error;

    if (pipe2(news, O_CLOEXEC) != 0)
        failed("a pipe");
    core = fork();
    if (core < 0)
        failed("the core's process");
    if (core == 0) {
        /* Asked for first, then looked: a keeper that died before is not missed. */
        if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0 || getppid() != keeper)
            _exit(127);
        /* native-core MEMORY_FD DOORBELL_FD REPORT_FD ENTRY WINDOW... */
        argv[ARG_MEMORY - 1] = argv[ARG_CORE];
        for (char **argument = &argv[ARG_CORE]; (*argument = argument[1]) != NULL; argument++)
            ;
        (void)execv(argv[ARG_MEMORY - 1], &argv[ARG_MEMORY - 1]);
        error = errno;
        (void)!write(news[1], &error, sizeof error);
        _exit(127);
    }
    (void)close(news[1]);
    if (read(news[0], &error, sizeof error) == sizeof error) {
        errno = error;
        failed(argv[ARG_CORE]);
    }
    (void)close(news[0]);
}

static void become_daemon(void)
{
    static const int ignored[] = {SIGINT, SIGQUIT, SIGHUP, SIGPIPE};
    int null;

    switch (fork()) {
    case -1:
        failed("the keeper's process");
    case 0:
        break;
    default:
        _exit(0);
    }
    (void)setsid();
    if (chdir("/") != 0)
        failed("the root directory");
    for (size_t i = 0; i < sizeof ignored / sizeof ignored[0]; i++)
        (void)signal(ignored[i], SIG_IGN);
    (void)signal(SIGCHLD, SIG_DFL); /* ignored, it would make the kernel throw the status away */
    /* A pipe that somebody reads to its end must not wait for us. */
    null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0)
        failed("/dev/null");
    for (int standard = 0; standard <= 2; standard++)
        if (dup2(null, standard) < 0)
            failed("/dev/null");
    if (null > 2)
        (void)close(null);
}

/* Only what the core itself gets stays open over its exec. */
static int private_descriptor(const char *argument)
{
    int descriptor = atoi(argument);

    if (fcntl(descriptor, F_SETFD, FD_CLOEXEC) != 0)
        failed("a descriptor");
    return descriptor;
}

int main(int argc, char **argv)
{
    if (argc <= ARG_WINDOW) {
        (void)fprintf(stderr, "usage: native-keeper PATH LISTENER_FD HOST_FD DOORBELL_FD MEMORY_FD "
                              "CORE_DOORBELL_FD REPORT_FD CORE ENTRY DA:SIZE:OFFSET ...\n");
        return 1;
    }
    path = argv[ARG_PATH];
    host = private_descriptor(argv[ARG_HOST]);
    listener = private_descriptor(argv[ARG_LISTENER]);
    handed[HANDED_DOORBELL] = private_descriptor(argv[ARG_DOORBELL]);
    handed[HANDED_MEMORY] = atoi(argv[ARG_MEMORY]);
    handed[HANDED_REPORT] = atoi(argv[ARG_REPORT]);

    become_daemon();
    start_core(argv);
    (void)close(atoi(argv[ARG_CORE_DOORBELL])); /* so that only the core's end is the core's */
    handed[HANDED_CORE] = open_pidfd(core);
    handed[HANDED_KEEPER] = open_pidfd(getpid());
    if (handed[HANDED_CORE] < 0 || handed[HANDED_KEEPER] < 0)
        failed("a pidfd (Linux 5.3 has it)"); /* the core dies with us */
    if (!send_hello())
        host_gone();
    keep();
}
