/* A set of strings, each with how often it was added. */
#ifndef GUARD_NAMES_H
#define GUARD_NAMES_H

#include <stdbool.h>
#include <stddef.h>
#include <time.h>

#define MAX_NAMES 1000000 /* in one set */

struct name {
    char *text;
    unsigned count; /* how often it was added and not removed */
    time_t since;   /* when it was added first */
};

struct names {
    struct name *slots;
    size_t capacity, used;
};

/* Return the name in the set, NULL if it is not there; valid until the set is changed. */
const struct name *names_find(const struct names *names, const char *text);

/* Add a name; false if there is no memory, or there are MAX_NAMES. */
bool names_add(struct names *names, const char *text);

/* Add a name so many times. */
bool names_count(struct names *names, const char *text, unsigned times);

/* Make a set, which is empty, a copy of another one; false, and it stays empty, if there is no memory. */
bool names_copy(struct names *copy, const struct names *names);

/* Take back one addition. */
void names_remove(struct names *names, const char *text);

/* Return the next name after position `*at`, which begins at 0; NULL after the last one. */
const struct name *names_next(const struct names *names, size_t *at);
void names_clear(struct names *names);

#endif
