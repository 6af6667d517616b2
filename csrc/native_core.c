/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * native-core: the SoC around firmware that is built for this machine's own instruction set.
 *
 *     native-core MEMORY_FD DOORBELL_FD REPORT_FD ENTRY DA:SIZE:OFFSET [DA:SIZE:OFFSET ...]
 *
 * MEMORY_FD    the RAM, a memfd that the host has loaded; closed here once it is mapped
 * DOORBELL_FD  a connected stream socket: one byte per kick, both ways; end of file = host gone
 * REPORT_FD    write end of a pipe (or a file): gets at most one report, see below
 * ENTRY        device address of the firmware's entry point, inside one of the windows
 * DA:SIZE:OFFSET  a window: SIZE bytes of the memory from OFFSET on appear at device address DA;
 *              all three in whole pages
 *
 * Numbers are decimal, or hexadecimal with 0x. The process runs one boot and ends:
 *
 *     0..255   the firmware called halt(code), or its entry returned (0)
 *     124      the firmware asked for a reset   } a halt code may be the same number:
 *     125      the core could not be set up     } the report tells which it was
 *     signal   a fault (SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGABRT, SIGSYS), or a kill
 *
 * The report: 392 bytes, the machine's byte order, no padding; struct "=IIiIQ34Q96s" in Python:
 *
 *     0    u32  kind           1 fault, 2 setup failure, 3 reset request, 4 halted or returned
 *     4    u32  signal         1: the signal; else 0
 *     8    s32  code           1: si_code, 0 or less where a process sent the signal (a host that
 *                              interrupts a hung core); 2: errno or 0; 4: the halt code as the
 *                              firmware gave it
 *     12   u32  machine        1: whose registers these are, as e_machine in an ELF; else 0
 *     16   u64  fault_address  1: address accessed, 0 if unknown; for SIGSYS the number of the
 *                              refused system call
 *     24   u64  registers[34]  1: the machine's, in the order of its user_regs_struct in Linux,
 *                              which is that of NT_PRSTATUS in a core file; zeroes behind them
 *                              62 (x86-64): r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi
 *                              rdi orig_rax rip cs eflags rsp ss fs_base gs_base ds es fs gs;
 *                              those that a signal does not save are 0, orig_rax is -1
 *                              183 (aarch64): x0..x30 sp pc pstate (gdb calls it cpsr)
 *     296  text[96]            2: one line, NUL terminated; else empty
 *
 * The firmware lives in this process and can write to its memory, so a reader takes the report as
 * untrusted.
 *
 * No orphans: a core that sleeps sees the doorbell close; one that does not is killed by the
 * parent-death signal. Linux sends that one when the *thread* that started this process ends, so
 * start it from a thread that lives long enough. Signals of a terminal (SIGINT, SIGQUIT, SIGHUP)
 * are the host's business and are ignored here.
 */
#define _GNU_SOURCE

#include <elf.h>
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/user.h>
#include <ucontext.h>
#include <unistd.h>

#include "firmware/native_soc.h"

#if defined(__x86_64__)
#define CORE_AUDIT_ARCH AUDIT_ARCH_X86_64
#define CORE_MACHINE EM_X86_64
#elif defined(__aarch64__)
#define CORE_AUDIT_ARCH AUDIT_ARCH_AARCH64
#define CORE_MACHINE EM_AARCH64
#else
#error "native-core knows x86-64 and aarch64 only"
#endif

#define EXIT_RESET 124
#define EXIT_SETUP 125

#define REGISTERS 34   /* of aarch64; x86-64 has 27 */
#define MAX_WINDOWS 64 /* a host that maps more has a bug */

enum report_kind { REPORT_FAULT = 1, REPORT_SETUP = 2, REPORT_RESET = 3, REPORT_HALT = 4 };

struct report {
    uint32_t kind;
    uint32_t signal;
    int32_t code;
    uint32_t machine;
    uint64_t fault_address;
    uint64_t registers[REGISTERS];
    char text[96];
};

_Static_assert(sizeof(struct report) == 392, "the report is decoded by its offsets");
_Static_assert(offsetof(struct report, fault_address) == 16,
               "the report is decoded by its offsets");
_Static_assert(offsetof(struct report, registers) == 24, "the report is decoded by its offsets");
_Static_assert(offsetof(struct report, text) == 296, "the report is decoded by its offsets");
_Static_assert(sizeof(struct user_regs_struct) <= sizeof((struct report){0}.registers),
               "a report has room for the machine's registers");

struct window {
    uint64_t da;
    uint64_t size;
    uint64_t offset;
};

static int doorbell_fd = -1;
static int report_fd = -1;
static bool host_closed;
static volatile sig_atomic_t reported;

/* Faults are handled off the firmware's stack, which may be the thing that broke. */
static _Alignas(64) unsigned char signal_stack[65536];

/* Send the one report of this boot; false = it could not be delivered. Safe in a signal handler. */
static bool send_report(const struct report *report)
{
    ssize_t written;

    if (reported)
        return true;
    reported = 1;
    do
        written = write(report_fd, report, sizeof *report);
    while (written < 0 && errno == EINTR);
    return written == (ssize_t)sizeof *report;
}

/* Say in one line why the core cannot start, and end; error is an errno value, or 0. */
__attribute__((format(printf, 2, 3))) static _Noreturn void setup_failed(int error,
                                                                         const char *format, ...)
{
    struct report report = {.kind = REPORT_SETUP, .code = error};
    size_t length;
    va_list arguments;

    va_start(arguments, format);
    (void)vsnprintf(report.text, sizeof report.text, format, arguments);
    va_end(arguments);
    length = strlen(report.text);
    if (error != 0)
        (void)snprintf(report.text + length, sizeof report.text - length, ": %s", strerror(error));
    if (report_fd < 0 || !send_report(&report))
        (void)fprintf(stderr, "native-core: %s\n", report.text);
    _exit(EXIT_SETUP);
}

/* ---- the SoC, as the firmware sees it ---- */

static void soc_kick(uint32_t notify_id)
{
    unsigned char byte = (unsigned char)(notify_id & 0xFF);

    /* Errors are fine: a full socket holds rings enough, a closed one is found by the next wait. */
    (void)send(doorbell_fd, &byte, sizeof byte, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static _Noreturn void power_down(uint32_t code)
{
    struct report report = {.kind = REPORT_HALT, .code = (int32_t)code};

    (void)send_report(&report);
    _exit((int)(code & 0xFF));
}

static uint32_t soc_wait(void)
{
    /*
     * More than a Unix socket holds of one-byte messages; what stays behind only wakes once more.
     */
    static unsigned char rings[4096];

    if (host_closed)
        power_down(0);
    for (;;) {
        ssize_t count = recv(doorbell_fd, rings, sizeof rings, 0);

        if (count > 0)
            return 0;
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0 && errno == EAGAIN) { /* the host made our end non-blocking */
            struct pollfd readable = {.fd = doorbell_fd, .events = POLLIN};

            (void)poll(&readable, 1, -1);
            continue;
        }
        host_closed = true;
        return 1;
    }
}

static void soc_halt(uint32_t code)
{
    power_down(code);
}

static void soc_reset(void)
{
    const struct report report = {.kind = REPORT_RESET};

    (void)send_report(&report);
    _exit(EXIT_RESET);
}

static const struct native_soc soc = {
    .abi = NATIVE_SOC_ABI,
    .kick = soc_kick,
    .wait = soc_wait,
    .halt = soc_halt,
    .reset = soc_reset,
};

/* ---- faults ---- */

static const int fault_signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGABRT, SIGSYS};

/* The registers of a signal context, in the order of a core file. */
static struct user_regs_struct registers_of(const ucontext_t *context)
{
    const mcontext_t *saved = &context->uc_mcontext;
    struct user_regs_struct registers = {0};

#if defined(__x86_64__)
#define SAVED(index) ((unsigned long long)saved->gregs[index])
    registers.r15 = SAVED(REG_R15);
    registers.r14 = SAVED(REG_R14);
    registers.r13 = SAVED(REG_R13);
    registers.r12 = SAVED(REG_R12);
    registers.rbp = SAVED(REG_RBP);
    registers.rbx = SAVED(REG_RBX);
    registers.r11 = SAVED(REG_R11);
    registers.r10 = SAVED(REG_R10);
    registers.r9 = SAVED(REG_R9);
    registers.r8 = SAVED(REG_R8);
    registers.rax = SAVED(REG_RAX);
    registers.rcx = SAVED(REG_RCX);
    registers.rdx = SAVED(REG_RDX);
    registers.rsi = SAVED(REG_RSI);
    registers.rdi = SAVED(REG_RDI);
    registers.orig_rax = UINT64_MAX; /* no system call is to be restarted */
    registers.rip = SAVED(REG_RIP);
    registers.eflags = SAVED(REG_EFL);
    registers.rsp = SAVED(REG_RSP);
    registers.cs = SAVED(REG_CSGSFS) & 0xFFFF; /* four of 16 bits: cs, gs, fs, ss */
    registers.gs = SAVED(REG_CSGSFS) >> 16 & 0xFFFF;
    registers.fs = SAVED(REG_CSGSFS) >> 32 & 0xFFFF;
    registers.ss = SAVED(REG_CSGSFS) >> 48;
#undef SAVED
#else
    for (size_t i = 0; i < sizeof registers.regs / sizeof registers.regs[0]; i++)
        registers.regs[i] = saved->regs[i];
    registers.sp = saved->sp;
    registers.pc = saved->pc;
    registers.pstate = saved->pstate;
#endif
    return registers;
}

static void on_fault(int number, siginfo_t *info, void *context)
{
    const struct user_regs_struct registers = registers_of(context);
    struct report report = {.kind = REPORT_FAULT,
                            .signal = (uint32_t)number,
                            .code = info->si_code,
                            .machine = CORE_MACHINE};

    if (number == SIGSYS && info->si_code > 0)
        report.fault_address = (uint64_t)(unsigned int)info->si_syscall;
    else if (info->si_code >
             0) /* sent by the kernel; otherwise si_addr overlays the sender's ids */
        report.fault_address = (uint64_t)(uintptr_t)info->si_addr;
    memcpy(report.registers, &registers, sizeof registers);
    (void)send_report(&report);

    /* RLIMIT_CORE 0 stops core files but not a core_pattern pipe; undumpable stops both. */
    (void)prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    /*
     * SA_RESETHAND made the signal fatal again and SA_NODEFER left it open: the wait status shows
     * it.
     */
    (void)syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), number);
    _exit(128 + number);
}

static void catch_faults(void)
{
    static const int ignored[] = {SIGINT, SIGQUIT, SIGHUP, SIGPIPE};
    const stack_t stack = {.ss_sp = signal_stack, .ss_size = sizeof signal_stack};
    struct sigaction action = {.sa_flags =
                                   (int)(SA_SIGINFO | SA_ONSTACK | SA_RESETHAND | SA_NODEFER)};
    sigset_t none;

    if (sigaltstack(&stack, NULL) != 0)
        setup_failed(errno, "sigaltstack");
    action.sa_sigaction = on_fault;
    (void)sigemptyset(&action.sa_mask);
    for (size_t i = 0; i < sizeof fault_signals / sizeof fault_signals[0]; i++)
        if (sigaction(fault_signals[i], &action, NULL) != 0)
            setup_failed(errno, "sigaction for signal %d", fault_signals[i]);
    for (size_t i = 0; i < sizeof ignored / sizeof ignored[0]; i++)
        if (signal(ignored[i], SIG_IGN) == SIG_ERR)
            setup_failed(errno, "ignoring signal %d", ignored[i]);
    (void)sigemptyset(&none);
    if (sigprocmask(SIG_SETMASK, &none, NULL) != 0)
        setup_failed(errno, "sigprocmask");
}

/* ---- confinement ---- */

#define ANY_ARGUMENT UINT32_MAX

/* A system call that stays allowed; first is what its first argument must be, or ANY_ARGUMENT. */
struct rule {
    uint32_t number;
    uint32_t first;
};

/*
 * Refuse every system call but those of the SoC functions and of the fault handler. This catches
 * firmware that runs wild; it is not a wall against malice. A kernel without seccomp runs the
 * firmware unconfined.
 */
static void confine(void)
{
    const struct rule rules[] = {
        {SYS_recvfrom, (uint32_t)doorbell_fd}, /* the two of a round trip come first */
        {SYS_sendto, (uint32_t)doorbell_fd},
#ifdef SYS_poll
        {SYS_poll, ANY_ARGUMENT},
#endif
        {SYS_ppoll, ANY_ARGUMENT},
        {SYS_restart_syscall, ANY_ARGUMENT}, /* a poll that SIGSTOP and SIGCONT interrupted */
        {SYS_write, (uint32_t)report_fd},
        {SYS_exit_group, ANY_ARGUMENT},
        {SYS_exit, ANY_ARGUMENT},
        {SYS_rt_sigreturn, ANY_ARGUMENT},
        {SYS_getpid, ANY_ARGUMENT},
        {SYS_gettid, ANY_ARGUMENT},
        {SYS_tgkill, (uint32_t)getpid()},
        {SYS_prctl, PR_SET_DUMPABLE},
    };
    enum { RULES = sizeof rules / sizeof rules[0], HEAD = 4, PER_RULE = 5 };
    struct sock_filter filter[HEAD + PER_RULE * RULES + 1];
    struct sock_fprog program = {.filter = filter};
    size_t length = 0;

#define EMIT(instruction) (filter[length++] = (struct sock_filter)instruction)
#define LOAD(field)                                                                                \
    EMIT(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (uint32_t)offsetof(struct seccomp_data, field)))
#define SKIP_UNLESS(value, count) EMIT(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), 0, (count)))
#define RETURN(verdict) EMIT(BPF_STMT(BPF_RET | BPF_K, (verdict)))
    /*
     * The x32 calls of x86-64 share its architecture word but not these numbers, so they meet no
     * rule.
     */
    LOAD(arch);
    EMIT(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, CORE_AUDIT_ARCH, 1, 0));
    RETURN(SECCOMP_RET_TRAP);
    LOAD(nr);
    for (size_t i = 0; i < RULES; i++) {
        if (rules[i].first == ANY_ARGUMENT) {
            SKIP_UNLESS(rules[i].number, 1);
        } else {
            SKIP_UNLESS(rules[i].number, 4);
            LOAD(args[0]); /* the low half: both machines are little endian */
            EMIT(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, rules[i].first, 1, 0));
            RETURN(SECCOMP_RET_TRAP);
        }
        RETURN(SECCOMP_RET_ALLOW);
    }
    RETURN(SECCOMP_RET_TRAP);
#undef EMIT
#undef LOAD
#undef SKIP_UNLESS
#undef RETURN

    program.len = (unsigned short)length;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return;
    /*
     * SPEC_ALLOW: kernels before 5.16 slow every filtered process down with speculation
     * mitigations.
     */
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &program) !=
        0)
        (void)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}

/* ---- setting up ---- */

/*
 * Read the number at text up to the character end (which is skipped); complains about the whole
 * argument.
 */
static uint64_t parse_number(const char **text, char end, const char *argument)
{
    char *rest = NULL;
    unsigned long long value;

    if (**text < '0' || **text > '9') /* strtoull would take blanks and signs */
        setup_failed(0, "bad argument '%.40s': a number is missing", argument);
    errno = 0;
    value = strtoull(*text, &rest, 0);
    if (errno != 0 || *rest != end)
        setup_failed(errno, "bad argument '%.40s'", argument);
    *text = end == '\0' ? rest : rest + 1;
    return value;
}

static int parse_descriptor(const char *argument)
{
    const char *text = argument;
    uint64_t value = parse_number(&text, '\0', argument);

    if (value > INT32_MAX)
        setup_failed(0, "bad argument '%.40s': not a file descriptor", argument);
    return (int)value;
}

static struct window parse_window(const char *argument)
{
    const char *text = argument;
    struct window window;

    window.da = parse_number(&text, ':', argument);
    window.size = parse_number(&text, ':', argument);
    window.offset = parse_number(&text, '\0', argument);
    return window;
}

/* Make the window's bytes visible to instruction fetches (nothing to do on x86-64). */
static void synchronize_code(const struct window *window, uint64_t page)
{
#if defined(__x86_64__)
    (void)window;
    (void)page;
#else
    /* Page by page, and only what is in memory: to touch the rest would allocate it. */
    for (uint64_t done = 0; done < window->size; done += page) {
        char *start = (char *)(uintptr_t)(window->da + done);
        unsigned char resident = 1;

        if (mincore(start, page, &resident) != 0 || (resident & 1) != 0)
            __builtin___clear_cache(start, start + page);
    }
#endif
}

static void map_window(int memory_fd, uint64_t memory_size, const struct window *window,
                       const char *argument)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    void *wanted = (void *)(uintptr_t)window->da;
    void *mapped;

    if (window->size == 0 || window->da > UINT64_MAX - window->size)
        setup_failed(0, "window %.40s: bad size", argument);
    if (((window->da | window->size | window->offset) & (page - 1)) != 0)
        setup_failed(0, "window %.40s: not in whole pages of %llu", argument,
                     (unsigned long long)page);
    if (window->offset > memory_size || window->size > memory_size - window->offset)
        setup_failed(0, "window %.40s: past the end of memory (%llu)", argument,
                     (unsigned long long)memory_size);
    mapped = mmap(wanted, (size_t)window->size, PROT_READ | PROT_WRITE | PROT_EXEC,
                  MAP_SHARED | MAP_FIXED_NOREPLACE, memory_fd, (off_t)window->offset);
    if (mapped == MAP_FAILED)
        setup_failed(errno, "window %.40s", argument);
    if (mapped != wanted) /* kernels before 4.17 take the address as a wish */
        setup_failed(0, "window %.40s: the address is taken", argument);
    synchronize_code(window, page);
}

int main(int argc, char **argv)
{
    const struct rlimit no_core = {0, 0};
    struct stat memory;
    struct pollfd doorbell;
    const char *text;
    uint64_t entry;
    int memory_fd;
    int type = 0;
    socklen_t type_size = sizeof type;
    bool entry_inside = false;
    native_entry *firmware;

    if (argc < 6) {
        (void)fprintf(
            stderr,
            "usage: native-core MEMORY_FD DOORBELL_FD REPORT_FD ENTRY DA:SIZE:OFFSET ...\n");
        return EXIT_SETUP;
    }
    report_fd = parse_descriptor(argv[3]);
    memory_fd = parse_descriptor(argv[1]);
    doorbell_fd = parse_descriptor(argv[2]);

    /*
     * First ask for the signal, then look for a parent that was gone before: no gap between the
     * two.
     */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0)
        setup_failed(errno, "parent-death signal");
    if (getsockopt(doorbell_fd, SOL_SOCKET, SO_TYPE, &type, &type_size) != 0)
        setup_failed(errno, "doorbell descriptor %d", doorbell_fd);
    if (type != SOCK_STREAM)
        setup_failed(0, "doorbell descriptor %d: not a stream socket", doorbell_fd);
    doorbell = (struct pollfd){.fd = doorbell_fd, .events = POLLRDHUP};
    if (poll(&doorbell, 1, 0) < 0)
        setup_failed(errno, "doorbell descriptor %d", doorbell_fd);
    if (doorbell.revents != 0)
        setup_failed(0, "the host closed the doorbell before the core was up");
    if (setrlimit(RLIMIT_CORE, &no_core) != 0)
        setup_failed(errno, "RLIMIT_CORE");

    text = argv[4];
    entry = parse_number(&text, '\0', argv[4]);
    if (argc - 5 > MAX_WINDOWS)
        setup_failed(0, "%d windows, the limit is %d", argc - 5, MAX_WINDOWS);
    if (fstat(memory_fd, &memory) != 0)
        setup_failed(errno, "memory descriptor %d", memory_fd);
    for (int i = 5; i < argc; i++) {
        const struct window window = parse_window(argv[i]);

        map_window(memory_fd, (uint64_t)memory.st_size, &window, argv[i]);
        entry_inside = entry_inside || (entry >= window.da && entry - window.da < window.size);
    }
    if (!entry_inside)
        setup_failed(0, "entry 0x%llx is in no window", (unsigned long long)entry);
    (void)close(memory_fd);

    catch_faults();
    confine();
    firmware = (native_entry *)(uintptr_t)entry;
    firmware(&soc);
    power_down(0);
}
