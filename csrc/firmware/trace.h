/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The log that the host reads through the resource table's trace entry: text, one event a line,
 * always NUL terminated. When it is full the older half goes.
 *
 *     trace_text("ring ");  trace_decimal(1);  trace_text(" at ");  trace_hex(da);  trace_end();
 */
#ifndef TRACE_H
#define TRACE_H

#include <stdint.h>

#include "table.h"

extern char trace_buffer[TRACE_SIZE];

void trace_text(const char *text);
void trace_decimal(uint32_t value);
void trace_hex(uint32_t value);

/* Finish the line and publish it. A line is cut at 127 characters. */
void trace_end(void);

/* A line of one text, and of a text with a number behind it. */
void trace_line(const char *text);
void trace_count(const char *text, uint32_t value);

#endif
