/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The classical two-thread tests of a memory model, on memory_model.h itself. Prints what the
 * second thread, and in "sb" and "lb" each, can load: every result once, in order.
 *
 * Arguments: the name of the test, and those of the search.
 */
#include "memory_model.h"

#define RELAXED __ATOMIC_RELAXED
#define ACQUIRE __ATOMIC_ACQUIRE
#define RELEASE __ATOMIC_RELEASE
#define FENCE __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define LOAD(word, order) (uint32_t) __atomic_load_n(word, order)
#define SET(word, order) __atomic_store_n(word, 1, order)

static uint16_t *x, *y;
static uint32_t results[2], met[100];

#define TWO_THREADS(name, first, second) \
    static void name(uint32_t thread)    \
    {                                    \
        if (thread == 0) {               \
            first;                       \
        } else {                         \
            second;                      \
        }                                \
    }

/* Store buffering: a store, then a load of what the other stores. */
TWO_THREADS(sb, (SET(x, RELEASE), results[0] = LOAD(y, ACQUIRE)), (SET(y, RELEASE), results[1] = LOAD(x, ACQUIRE)))
TWO_THREADS(sb_fence, (SET(x, RELAXED), FENCE, results[0] = LOAD(y, RELAXED)),
            (SET(y, RELEASE), results[1] = LOAD(x, ACQUIRE)))
TWO_THREADS(sb_fences, (SET(x, RELAXED), FENCE, results[0] = LOAD(y, RELAXED)),
            (SET(y, RELAXED), FENCE, results[1] = LOAD(x, RELAXED)))

/* Message passing: the second thread loads y, then x. */
#define SECOND(order) (results[1] = 10u * LOAD(y, order), results[1] += LOAD(x, RELAXED))
TWO_THREADS(mp, (SET(x, RELAXED), SET(y, RELAXED)), SECOND(RELAXED))
TWO_THREADS(mp_release, (SET(x, RELAXED), SET(y, RELEASE)), SECOND(RELAXED))
TWO_THREADS(mp_acquire, (SET(x, RELAXED), SET(y, RELAXED)), SECOND(ACQUIRE))
TWO_THREADS(mp_both, (SET(x, RELAXED), SET(y, RELEASE)), SECOND(ACQUIRE))
TWO_THREADS(mp_fences, (SET(x, RELAXED), __atomic_thread_fence(RELEASE), SET(y, RELAXED)),
            (results[1] = 10u * LOAD(y, RELAXED), __atomic_thread_fence(ACQUIRE), results[1] += LOAD(x, RELAXED)))

/* Coherence: what was loaded once is not unseen. */
TWO_THREADS(corr, SET(x, RELAXED), (results[1] = 10u * LOAD(x, RELAXED), results[1] += LOAD(x, RELAXED)))

/* Load buffering: a load, then a store that the other loads. 11 is what C11 allows on paper, and
 * RC11 and this model do not. */
TWO_THREADS(lb, (results[0] = LOAD(x, RELAXED), SET(y, RELAXED)), (results[1] = LOAD(y, RELAXED), SET(x, RELAXED)))

TWO_THREADS(kick, (SET(x, RELAXED), kick_other()), (sleep_until_kicked(), results[1] = LOAD(x, RELAXED)))
TWO_THREADS(no_kick, SET(x, RELAXED), (sleep_until_kicked(), results[1] = LOAD(x, RELAXED)))

/* A plain word is read only once a flag says that it is written, and the other way round. */
#define READ_IF(order) (results[1] = LOAD(y, order) ? plain_load(x) : 9u)
TWO_THREADS(plain, (plain_store(x, 1), SET(y, RELEASE)), READ_IF(ACQUIRE))
TWO_THREADS(plain_relaxed, (plain_store(x, 1), SET(y, RELAXED)), READ_IF(ACQUIRE))
TWO_THREADS(plain_again, (LOAD(y, ACQUIRE) ? plain_store(x, 1) : (void)0), (plain_load(x), SET(y, RELEASE)))
TWO_THREADS(plain_again_relaxed, (LOAD(y, ACQUIRE) ? plain_store(x, 1) : (void)0),
            (plain_load(x), SET(y, RELAXED)))

static const struct {
    const char *name;
    void (*run)(uint32_t thread);
} tests[] = {
    {"sb", sb},
    {"sb_fence", sb_fence},
    {"sb_fences", sb_fences},
    {"mp", mp},
    {"mp_release", mp_release},
    {"mp_acquire", mp_acquire},
    {"mp_both", mp_both},
    {"mp_fences", mp_fences},
    {"corr", corr},
    {"lb", lb},
    {"kick", kick},
    {"no_kick", no_kick},
    {"plain", plain},
    {"plain_relaxed", plain_relaxed},
    {"plain_again", plain_again},
    {"plain_again_relaxed", plain_again_relaxed},
};

static void reset(void)
{
    results[0] = results[1] = 0;
}

static void ended(int stuck)
{
    if (stuck)
        violation("stuck", -1);
    met[10u * results[0] + results[1]] = 1;
}

static void name(uint32_t offset, char *word, size_t size)
{
    snprintf(word, size, "%c", offset ? 'y' : 'x');
}

int main(int argc, char **argv)
{
    uint16_t *memory = model_memory();
    struct program program = {.reset = reset, .ended = ended, .name = name, .threads = {"first", "second"}};
    x = memory;
    y = memory + 2; /* a plain word takes two */
    for (size_t i = 0; argc > 1 && i < sizeof tests / sizeof *tests; i++)
        if (strcmp(argv[1], tests[i].name) == 0)
            program.run = tests[i].run;
    if (!program.run)
        cannot("without a test's name, arguments", argc - 1);
    for (int i = 2; i < argc; i++)
        if (!set_model_option(argv[i]))
            cannot("unknown argument", i);
    explore(&program);
    for (uint32_t i = 0; i < 100; i++)
        if (met[i])
            printf("%02u ", i);
    putchar('\n');
    return 0;
}
