/* SPDX-License-Identifier: BSD-3-Clause */
#include "trace.h"

#include "freestanding.h"
#include "port.h"

char trace_buffer[TRACE_SIZE];

/* Private: what the host writes into the buffer cannot move us out of it. */
static uint32_t used;
static char line[128];
static uint32_t line_length;

static void put(char character)
{
    if (line_length < sizeof line - 1) /* the last one is for the line end */
        line[line_length++] = character;
}

void trace_text(const char *text)
{
    for (; *text != '\0'; text++)
        put(*text);
}

void trace_decimal(uint32_t value)
{
    char digits[10]; /* of 2^32 - 1 */
    uint32_t count = 0;

    do {
        digits[count++] = (char)('0' + value % 10);
        value /= 10;
    } while (value != 0);
    while (count > 0)
        put(digits[--count]);
}

void trace_hex(uint32_t value)
{
    uint32_t shift = 28;

    while (shift > 0 && value >> shift == 0)
        shift -= 4;
    trace_text("0x");
    for (;; shift -= 4) {
        put("0123456789abcdef"[(value >> shift) & 0xF]);
        if (shift == 0)
            break;
    }
}

/*
 * Make room by dropping the older half, up to the end of a line. The host may read meanwhile: it is
 * shown text that does not continue what it had, never text twice.
 */
static void drop_older_half(void)
{
    uint32_t start = used / 2 + 1; /* beyond what is kept, so that the end mark spares it */
    uint32_t kept;

    while (start < used && trace_buffer[start - 1] != '\n')
        start++;
    kept = used - start;
    trace_buffer[kept] = '\0';
    __atomic_thread_fence(__ATOMIC_RELEASE); /* the end mark first, for a host that reads along */
    memcpy(trace_buffer, trace_buffer + start, kept);
    memset(trace_buffer + kept, 0, start);
    used = kept;
}

void trace_end(void)
{
    line[line_length++] = '\n';
    if (used + line_length > TRACE_SIZE - 1) /* the last one stays NUL */
        drop_older_half();
    memcpy(trace_buffer + used, line, line_length);
    used += line_length;
    port_console(line, line_length);
    line_length = 0;
}

void trace_line(const char *text)
{
    trace_text(text);
    trace_end();
}

void trace_count(const char *text, uint32_t value)
{
    trace_text(text);
    trace_decimal(value);
    trace_end();
}
