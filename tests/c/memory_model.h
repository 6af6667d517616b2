/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Runs two threads in every way that C11 allows them to see each other's stores, for programs
 * that use the __atomic builtins: this header takes those over, so it comes before the code to
 * be checked, which is included after it.
 *
 * The memory. Every word keeps all the versions that were stored to it. A thread has a view: for
 * each word the oldest version that it may still load. A load takes any version from there to the
 * newest, and the view moves up to what it took. A version carries a view too, which a release
 * store fills with its thread's and an acquire load adds to its own. A sequentially consistent
 * fence exchanges views with all such fences before it. That is C11 as repaired by Lahav et al.
 * (RC11: no cycle of program order and reads-from), in the operational form of Kang et al. (POPL
 * 2017, without promises), and weaker than x86-TSO, where a load can only be stale by what is in a
 * store buffer. Each word has one writer, so its versions have one order: a second writer ends
 * the program. Plain accesses are checked for data races instead. The memory itself is not
 * accessible while the threads run: an access that this header does not see is a crash.
 *
 * The search. A store is made as early as can be, as a load may always take an older version; so
 * threads take turns only before loads, sequentially consistent fences and sleep. Every choice
 * there (who goes, and which version it loads) is tried, depth first, each time by running anew.
 * A state met before is not gone into again. It is known by a hash of 128 bits of: for each
 * thread, the values it loaded since its last `settle`; and of the memory what can still be
 * loaded, by distance from the newest version.
 */
#ifndef MEMORY_MODEL_H
#define MEMORY_MODEL_H

#undef _GNU_SOURCE
#define _GNU_SOURCE
#undef _FORTIFY_SOURCE /* which takes a jump to another stack for a mistake */

#include <inttypes.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define MODEL_WORDS 80u /* of two bytes; a larger one is known by its first two */
#define MODEL_SIZE (2u * MODEL_WORDS)
#define MODEL_VERSIONS 64u /* of one word in one execution */
#define MODEL_CHOICES 4096u
#define MODEL_EVENTS 4096u
#define MODEL_STACK 0x20000u
#define MODEL_PAGE 0x10000u /* the largest there is */
#define NOBODY 2u

struct view {
    uint8_t seen[MODEL_WORDS]; /* version of each word */
};

struct version {
    uint64_t value;
    struct view view;
};

struct word {
    uint32_t writer; /* NOBODY: not stored to yet */
    struct version versions[MODEL_VERSIONS];
};

enum stage { STARTING, STORING, LOADING, FENCING, SLEEPING, FINISHED };

struct thread {
    int started;
    jmp_buf place; /* where it waits */
    enum stage stage;
    uint32_t word;  /* to be loaded */
    uint32_t taken; /* which of its possible steps was chosen */
    struct view view;
    struct view acquired; /* what an acquire fence adds to it */
    struct view released; /* what the last release fence saw */
    uint64_t history[2];  /* hash of all that was loaded */
    uint32_t kicked;
    struct view kick; /* what the kicks carry */
    uint32_t spurious; /* times it may still wake up for nothing */
};

/* What is checked. */
struct program {
    void (*reset)(void); /* private memory as at the start */
    void (*run)(uint32_t thread);
    void (*ended)(int stuck); /* stuck: all are asleep or finished, and one is not finished */
    void (*name)(uint32_t offset, char *name, size_t size); /* of a word, for the trace */
    const char *threads[2];
    uint32_t spurious; /* wake-ups without a kick for each thread */
};

struct event {
    uint32_t thread;
    uint32_t offset; /* of a word; or NO_WORD */
    const char *what;
    const char *detail;
    uint64_t value;
    uint32_t newer; /* versions that a load passed over */
};

#define NO_WORD UINT32_MAX

static struct {
    const struct program *program;
    uint8_t *shared;
    uint8_t initial[MODEL_SIZE];
    uint8_t size[MODEL_WORDS]; /* by which a word is accessed; 0: not yet */
    int running;
    uint32_t current;
    uint8_t latest[MODEL_WORDS];
    struct view fences; /* what the sequentially consistent fences saw so far */
    struct word words[MODEL_WORDS];
    struct thread threads[2];
    ucontext_t beginnings[2];
    jmp_buf caller;
    /* The path of choices: `depth` made in this execution, `replay` of them prescribed. */
    uint32_t depth, replay;
    uint16_t chosen[MODEL_CHOICES], possible[MODEL_CHOICES];
    struct event events[MODEL_EVENTS];
    uint32_t event_count;
    /* The states met, as a hash table. */
    uint64_t (*states)[2];
    uint64_t state_count, state_room;
    uint64_t executions, complete, ends;
    /* The reductions can be turned off, to see that they change nothing but the time. */
    int every_turn; /* threads take turns before stores too */
    int no_states;  /* states met before are gone into again */
    /* One thing to be left out: its kind, its function, the thread (or NULL: both), and how often
     * it was met. */
    const char *without_kind, *without_function, *without_thread;
    uint64_t left_out;
} model;

_Alignas(16) static uint8_t model_stacks[2][MODEL_STACK];

/* For what the model itself has no room for. */
_Noreturn static void cannot(const char *what, long long value)
{
    fprintf(stderr, "the model cannot do this: %s: %lld\n", what, value);
    exit(2);
}

static void record(const char *what, uint32_t offset, uint64_t value, uint32_t newer, const char *detail)
{
    if (model.event_count == MODEL_EVENTS)
        cannot("events of an execution", MODEL_EVENTS);
    model.events[model.event_count++] = (struct event){
        .thread = model.current, .offset = offset, .what = what, .detail = detail, .value = value, .newer = newer};
}

/* What a thread does beside memory, for the trace. */
static inline void note(const char *what, uint64_t value)
{
    record(what, NO_WORD, value, 0, "");
}

static void print_trace(void)
{
    for (uint32_t i = 0; i < model.event_count; i++) {
        const struct event *event = &model.events[i];
        char word[32];
        fprintf(stderr, "%4u  %-9s %s%s", i + 1u, model.program->threads[event->thread],
                event->thread ? "                " : "", event->what);
        if (event->offset != NO_WORD) {
            model.program->name(event->offset, word, sizeof word);
            fprintf(stderr, " %s = %" PRIu64, word, event->value);
        } else if (event->value != UINT64_MAX) {
            fprintf(stderr, " %" PRIu64, event->value);
        }
        fprintf(stderr, *event->detail ? " (%s)" : "%s", event->detail);
        if (event->newer)
            fprintf(stderr, " stale: newer ones %u", event->newer);
        fputc('\n', stderr);
    }
}

_Noreturn static inline void violation(const char *what, long long value)
{
    fprintf(stderr, "%s: %lld, in execution %" PRIu64 ":\n", what, value, model.executions);
    print_trace();
    exit(1);
}

/* Hashes. */

static void mix(uint64_t hash[2], uint64_t value)
{
    hash[0] = (hash[0] ^ value) * 0x9E3779B97F4A7C15u;
    hash[0] ^= hash[0] >> 32;
    hash[1] = (hash[1] + value + 0x632BE59BD9B4E019u) * 0xD6E8FEB86659FD93u;
    hash[1] ^= hash[1] >> 29;
}

static void mix_bytes(uint64_t hash[2], const void *bytes, size_t size)
{
    for (size_t at = 0; at < size; at += 8) {
        uint64_t value = 0;
        memcpy(&value, (const uint8_t *)bytes + at, size - at < 8 ? size - at : 8);
        mix(hash, value);
    }
}

/* Adds a view as how far behind the newest versions it is. */
static void mix_view(uint64_t hash[2], const struct view *view)
{
    struct view behind;
    for (uint32_t i = 0; i < MODEL_WORDS; i++)
        behind.seen[i] = (uint8_t)(model.latest[i] - view->seen[i]);
    mix_bytes(hash, &behind, sizeof behind);
}

/* Adds what a view has beyond `least`. */
static void mix_rest(uint64_t hash[2], const struct view *view, const struct view *least)
{
    struct view more;
    uint8_t any = 0;
    for (uint32_t i = 0; i < MODEL_WORDS; i++) {
        more.seen[i] = view->seen[i] > least->seen[i] ? view->seen[i] : least->seen[i];
        any |= more.seen[i] ^ least->seen[i];
    }
    if (any)
        mix_view(hash, &more);
    else
        mix(hash, UINT64_MAX);
}

static void hash_state(uint64_t hash[2])
{
    struct view both;
    hash[0] = hash[1] = 0;
    for (uint32_t i = 0; i < MODEL_WORDS; i++) {
        uint8_t a = model.threads[0].view.seen[i], b = model.threads[1].view.seen[i];
        both.seen[i] = a < b ? a : b;
    }
    /* What will join a view counts by what it adds to it. */
    for (uint32_t i = 0; i < 2; i++) {
        const struct thread *thread = &model.threads[i], *other = &model.threads[1u - i];
        mix(hash, (uint64_t)thread->stage << 32 | thread->word);
        mix(hash, (uint64_t)thread->kicked << 32 | thread->spurious);
        mix(hash, thread->history[0]);
        mix(hash, thread->history[1]);
        mix_view(hash, &thread->view);
        mix_rest(hash, &thread->acquired, &thread->view);
        mix_rest(hash, &thread->released, &other->view);
        mix_rest(hash, &thread->kick, &thread->view);
    }
    mix_rest(hash, &model.fences, &both);
    for (uint32_t i = 0; i < MODEL_WORDS; i++) {
        const struct word *word = &model.words[i];
        if (word->writer == NOBODY)
            continue;
        const struct view *reader = &model.threads[1u - word->writer].view;
        mix(hash, i);
        for (uint32_t version = reader->seen[i]; version <= model.latest[i]; version++) {
            mix(hash, word->versions[version].value);
            mix_rest(hash, &word->versions[version].view, reader);
        }
    }
}

/* Puts a state into the table. Returns whether it was there. */
static int met_before(const uint64_t state[2])
{
    if (2u * model.state_count >= model.state_room) {
        uint64_t(*old)[2] = model.states, old_room = model.state_room;
        model.state_room = old_room ? 2u * old_room : 1u << 16;
        model.states = calloc(model.state_room, sizeof *model.states);
        if (!model.states)
            cannot("states", (long long)model.state_count);
        model.state_count = 0;
        for (uint64_t i = 0; i < old_room; i++)
            if (old[i][0] | old[i][1])
                (void)met_before(old[i]);
        free(old);
    }
    uint64_t at = state[0] & (model.state_room - 1u);
    for (; model.states[at][0] | model.states[at][1]; at = (at + 1u) & (model.state_room - 1u))
        if (model.states[at][0] == state[0] && model.states[at][1] == state[1])
            return 1;
    model.states[at][0] = state[0];
    model.states[at][1] = state[1];
    model.state_count++;
    return 0;
}

/* Turns. */

/* In how many ways the thread can go on. */
static uint32_t possible_steps(const struct thread *thread)
{
    switch (thread->stage) {
    case STARTING:
    case STORING:
    case FENCING:
        return 1;
    case LOADING:
        return 1u + model.latest[thread->word] - thread->view.seen[thread->word];
    case SLEEPING:
        return thread->kicked;
    default:
        return 0;
    }
}

static uint32_t choose(uint32_t possible)
{
    if (possible == 1)
        return 0;
    if (model.depth == MODEL_CHOICES)
        cannot("choices of an execution", MODEL_CHOICES);
    if (model.depth >= model.replay) {
        uint64_t state[2];
        hash_state(state);
        if (!model.no_states && met_before(state))
            return possible;
        model.chosen[model.depth] = 0;
        model.possible[model.depth] = (uint16_t)possible;
    } else if (model.possible[model.depth] != possible) {
        cannot("an execution that differs when run again", model.depth);
    }
    return model.chosen[model.depth++];
}

/* Ends this execution. */
_Noreturn static void leave(void)
{
    _longjmp(model.caller, 1);
}

/* Goes on with the current thread. */
_Noreturn static void go_on(void)
{
    struct thread *thread = &model.threads[model.current];
    if (thread->started)
        _longjmp(thread->place, 1);
    thread->started = 1;
    setcontext(&model.beginnings[model.current]);
    cannot("start the thread", model.current);
}

/* Returns when it is this thread's turn again. */
static void let_go_on(struct thread *own)
{
    if (_setjmp(own->place) == 0)
        go_on();
}

/* Lets the threads take turns. Returns when it is the turn of the one that calls this, with its
 * step in `taken`. */
static void wait_for_turn(void)
{
    uint32_t self = model.current, next = 1u - self, step = 0;
    struct thread *own = &model.threads[self], *other = &model.threads[1u - self];
    if (other->stage != STARTING) {
        uint32_t own_steps = possible_steps(own), steps = own_steps + possible_steps(other);
        if (steps == 0) {
            int finished = own->stage == FINISHED && other->stage == FINISHED;
            model.program->ended(!finished);
            uint64_t state[2];
            hash_state(state);
            model.complete++;
            model.ends += !met_before(state);
            leave();
        }
        uint32_t own_spurious = own->stage == SLEEPING && !own->kicked && own->spurious;
        uint32_t other_spurious = other->stage == SLEEPING && !other->kicked && other->spurious;
        uint32_t possible = steps + own_spurious + other_spurious, pick = choose(possible);
        if (pick == possible)
            leave();
        if (pick >= steps) {
            next = pick == steps && own_spurious ? self : 1u - self;
        } else if (pick < own_steps) {
            next = self;
            step = pick;
        } else {
            step = pick - own_steps;
        }
    }
    model.threads[next].taken = step;
    model.current = next;
    if (next != self)
        let_go_on(own);
}

static void run_thread(void)
{
    uint32_t self = model.current;
    model.program->run(self);
    model.threads[self].stage = FINISHED;
    note("finished", UINT64_MAX);
    wait_for_turn();
}

static struct thread *stop_at(enum stage stage, uint32_t word)
{
    struct thread *thread = &model.threads[model.current];
    thread->stage = stage;
    thread->word = word;
    wait_for_turn();
    return thread;
}

/* Without `every_turn` a store does not wait: it is made as early as can be. */
static void stop_at_store(uint32_t word)
{
    if (model.every_turn)
        mix(stop_at(STORING, word)->history, 0);
}

/* The memory. */

static void join(struct view *view, const struct view *other)
{
    for (uint32_t i = 0; i < MODEL_WORDS; i++)
        view->seen[i] = view->seen[i] > other->seen[i] ? view->seen[i] : other->seen[i];
}

static uint32_t word_at(const void *where, uint32_t size)
{
    uintptr_t offset = (uintptr_t)where - (uintptr_t)model.shared;
    if (offset > MODEL_SIZE - size)
        cannot("an atomic access outside the shared memory", (long long)offset);
    uint32_t word = (uint32_t)offset / 2u;
    if (offset % 2u || (model.size[word] && model.size[word] != size))
        cannot("a word accessed by two sizes, at", (long long)offset);
    model.size[word] = (uint8_t)size;
    return word;
}

static uint64_t version_value(uint32_t word, uint32_t version)
{
    uint64_t value = 0;
    if (version)
        return model.words[word].versions[version].value;
    memcpy(&value, model.initial + 2u * word, model.size[word]);
    return value;
}

/* Whether the order or fence of this kind, in this function, is the one to be left out. */
static int is_left_out(const char *kind, const char *function)
{
    if (!model.without_kind || strcmp(kind, model.without_kind) || strcmp(function, model.without_function))
        return 0;
    if (model.without_thread && strcmp(model.program->threads[model.current], model.without_thread))
        return 0;
    model.left_out++;
    return 1;
}

static void add_version(uint32_t word, uint64_t value, int release)
{
    struct thread *thread = &model.threads[model.current];
    struct word *w = &model.words[word];
    if (w->writer != model.current && w->writer != NOBODY)
        cannot("two writers of the word at", 2ll * word);
    if (model.latest[word] == MODEL_VERSIONS - 1u)
        cannot("versions of a word", MODEL_VERSIONS);
    w->writer = model.current;
    thread->view.seen[word] = ++model.latest[word];
    struct version *version = &w->versions[model.latest[word]];
    version->value = value;
    version->view = release ? thread->view : thread->released;
    version->view.seen[word] = model.latest[word];
}

static void model_store(void *where, uint64_t value, uint32_t size, int order, const char *function)
{
    if (!model.running) {
        memcpy(where, &value, size);
        return;
    }
    if (order != __ATOMIC_RELAXED && order != __ATOMIC_RELEASE)
        cannot("the order of a store", order);
    int release = order == __ATOMIC_RELEASE && !is_left_out("release", function);
    uint32_t word = word_at(where, size);
    stop_at_store(word);
    add_version(word, value, release);
    record("stores", 2u * word, value, 0, release ? "release" : "");
}

static uint64_t model_load(const void *where, uint32_t size, int order, const char *function)
{
    if (!model.running) {
        uint64_t value = 0;
        memcpy(&value, where, size);
        return value;
    }
    if (order != __ATOMIC_RELAXED && order != __ATOMIC_ACQUIRE)
        cannot("the order of a load", order);
    int acquire = order == __ATOMIC_ACQUIRE && !is_left_out("acquire", function);
    uint32_t word = word_at(where, size);
    struct thread *thread = stop_at(LOADING, word);
    uint32_t version = model.latest[word] - thread->taken;
    thread->view.seen[word] = (uint8_t)version;
    if (version)
        join(acquire ? &thread->view : &thread->acquired, &model.words[word].versions[version].view);
    uint64_t value = version_value(word, version);
    mix(thread->history, value);
    record("loads", 2u * word, value, thread->taken, acquire ? "acquire" : "");
    return value;
}

static void model_fence(int order, const char *function)
{
    struct thread *thread = &model.threads[model.current];
    if (!model.running || is_left_out("fence", function))
        return;
    if (order == __ATOMIC_SEQ_CST) {
        stop_at(FENCING, 0);
        mix(thread->history, UINT64_MAX);
    }
    if (order != __ATOMIC_RELEASE)
        join(&thread->view, &thread->acquired);
    if (order == __ATOMIC_SEQ_CST) {
        join(&thread->view, &model.fences);
        model.fences = thread->view;
    }
    if (order != __ATOMIC_ACQUIRE)
        thread->released = thread->view;
    record("fence in", NO_WORD, UINT64_MAX, 0, function);
}

/* Plain accesses to a word of two bytes, of which the two bytes after it count the reads. */
static inline void plain_store(uint16_t *where, uint16_t value)
{
    uint32_t word = word_at(where, 2), reads = word + 1u;
    stop_at_store(word);
    record("writes", 2u * word, value, 0, "");
    if (model.threads[model.current].view.seen[reads] != model.latest[reads])
        violation("data race: written before it was surely read, word", word);
    add_version(word, value, 0);
}

static inline uint16_t plain_load(const uint16_t *where)
{
    uint32_t word = word_at(where, 2);
    stop_at_store(word);
    struct thread *thread = &model.threads[model.current];
    uint16_t value = (uint16_t)version_value(word, model.latest[word]);
    mix(thread->history, value);
    record("reads", 2u * word, value, 0, "");
    if (thread->view.seen[word] != model.latest[word])
        violation("data race: read before it was surely written, word", word);
    add_version(word + 1u, 0, 0);
    return value;
}

/* Wakes the other thread, or keeps it from falling asleep next time. As with every doorbell there
 * is, what came before the kick is visible after it. */
static inline void kick_other(void)
{
    stop_at_store(0);
    struct thread *other = &model.threads[1u - model.current];
    other->kicked = 1;
    join(&other->kick, &model.threads[model.current].view);
    note("kicks", UINT64_MAX);
}

static inline void sleep_until_kicked(void)
{
    note("sleeps", UINT64_MAX);
    struct thread *thread = stop_at(SLEEPING, 0);
    note(thread->kicked ? "wakes up" : "wakes up for nothing", UINT64_MAX);
    mix(thread->history, thread->kicked);
    if (thread->kicked) {
        join(&thread->view, &thread->kick);
        thread->kicked = 0;
        thread->kick = (struct view){0};
    } else {
        thread->spurious--;
    }
}

/* Says that what the thread does next depends only on these bytes, not on what it loaded. */
static inline void settle(const void *bytes, size_t size)
{
    struct thread *thread = &model.threads[model.current];
    thread->history[0] = thread->history[1] = 0;
    mix_bytes(thread->history, bytes, size);
}

/* The search. */

static void *model_memory(void)
{
    model.shared = mmap(NULL, MODEL_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (model.shared == MAP_FAILED)
        cannot("no memory", MODEL_PAGE);
    return model.shared;
}

static void execute(void)
{
    model.executions++;
    model.depth = model.event_count = 0;
    model.fences = (struct view){0};
    memset(model.latest, 0, sizeof model.latest);
    for (uint32_t i = 0; i < MODEL_WORDS; i++)
        model.words[i].writer = NOBODY;
    for (uint32_t i = 0; i < 2; i++) {
        struct thread *thread = &model.threads[i];
        thread->started = 0;
        thread->stage = STARTING;
        thread->view = thread->acquired = thread->released = thread->kick = (struct view){0};
        thread->history[0] = thread->history[1] = 0;
        thread->kicked = 0;
        thread->spurious = model.program->spurious;
    }
    model.program->reset();
    model.current = 0;
    if (_setjmp(model.caller) == 0)
        go_on();
}

/* Takes an argument that is for the search: `turns`=every and `states`=0 turn the reductions off,
 * `without`=KIND:FUNCTION or KIND:FUNCTION:THREAD leaves out a fence, a release or an acquire.
 * Returns whether it was one. */
static int set_model_option(char *argument)
{
    if (strcmp(argument, "turns=every") == 0)
        return model.every_turn = 1;
    if (strcmp(argument, "states=0") == 0)
        return model.no_states = 1;
    if (strncmp(argument, "without=", 8) != 0)
        return 0;
    model.without_kind = strtok(argument + 8, ":");
    model.without_function = strtok(NULL, ":");
    model.without_thread = strtok(NULL, ":");
    return model.without_kind && model.without_function;
}

/* Runs the program in every way there is. Comes back when nothing was found. */
static void explore(const struct program *program)
{
    model.program = program;
    memcpy(model.initial, model.shared, MODEL_SIZE);
    if (mprotect(model.shared, MODEL_PAGE, PROT_NONE))
        cannot("no protection", MODEL_PAGE);
    model.running = 1;
    for (uint32_t i = 0; i < 2; i++) {
        ucontext_t *beginning = &model.beginnings[i];
        getcontext(beginning);
        beginning->uc_stack.ss_sp = model_stacks[i];
        beginning->uc_stack.ss_size = MODEL_STACK;
        beginning->uc_link = NULL;
        makecontext(beginning, run_thread, 0);
    }
    do {
        execute();
        while (model.depth && model.chosen[model.depth - 1u] + 1u == model.possible[model.depth - 1u])
            model.depth--;
        model.replay = model.depth;
        if (model.depth)
            model.chosen[model.depth - 1u]++;
    } while (model.depth);
    if (model.without_kind && !model.left_out)
        cannot("leave out what is not there, times met", 0);
}

#define MODEL_STORER(bits)                                                                                  \
    static inline void model_store##bits(uint##bits##_t *word, uint##bits##_t value, int order,             \
                                         const char *function)                                              \
    {                                                                                                       \
        model_store(word, value, bits / 8u, order, function);                                               \
    }                                                                                                       \
    static inline uint##bits##_t model_load##bits(const uint##bits##_t *word, int order, const char *function) \
    {                                                                                                       \
        return (uint##bits##_t)model_load(word, bits / 8u, order, function);                                \
    }
MODEL_STORER(16)
MODEL_STORER(32)
MODEL_STORER(64)

/* A type that is not here, or another builtin on shared memory, does not compile or crashes. */
#define MODEL_OF(kind, word) \
    _Generic(*(word), uint16_t : kind##16, uint32_t : kind##32, uint64_t : kind##64)
#define __atomic_load_n(word, order) MODEL_OF(model_load, word)(word, order, __func__)
#define __atomic_store_n(word, value, order) MODEL_OF(model_store, word)(word, value, order, __func__)
#define __atomic_thread_fence(order) model_fence(order, __func__)

#endif
