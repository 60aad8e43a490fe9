/* A line of the journal: its fields, and what it changes in a registry. README.md has the format. */
#ifndef GUARD_LINE_H
#define GUARD_LINE_H

#include "registry.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_LINE_BYTES 32768 /* with its LF */
#define CHECKSUM_BYTES 9     /* a space and eight digits */
#define FORMAT_VERSION 1

/* Verify the checksum at the end of a line that is continued from `previous`, and cut it off. The line has `length`
 * bytes and no LF; it becomes a string. Returns false, with a reason for the log, if it is not right. */
bool line_verify(char *line, size_t length, uint32_t *previous, const char **reason);

/* Read the header line; false if it is not one of this format. */
bool line_read_header(char *line, uint64_t *epoch, uint64_t *base);

/* Read a decimal number without leading zeros, at most 2^63 - 1; false if `text` is anything else. */
bool parse_number(const char *text, uint64_t *number);

/* Do what a verified line says, if `sequence` is its number. Sets `id` to the identity that it is about, or the tenant,
 * empty if none.
 * The line is changed. */
enum outcome line_apply(char *line, uint64_t sequence, struct registry *registry, char id[MAX_ID_BYTES + 1]);

#endif
