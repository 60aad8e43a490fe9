/* The tenants of a journal: each a number, a name, a topic prefix. The first one has no line, and no name. */
#ifndef GUARD_TENANTS_H
#define GUARD_TENANTS_H

#include "hashing.h"
#include "names.h"
#include "outcome.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FIRST_TENANT 0u
#define MAX_TENANTS 65535u /* besides the first */
#define MAX_TENANT_BYTES 63
#define MAX_PREFIX_BYTES 1024

struct tenant {
    char *name; /* NULL of the first one */
    char *prefix;
    bool suspended;
};

struct tenants {
    struct tenant *list; /* by number */
    uint16_t *slots;     /* numbers by the hash of the name; 0, that of the first tenant, where free */
    uint32_t count, list_capacity, slot_capacity;
    struct names prefixes, above; /* the prefixes, and what they begin with: a/b and a of a/b/c */
    const struct seed *seed;
};

/* Begin with the first tenant, whose prefix is `devices`; false if there is no memory. `seed` is kept. */
bool tenants_begin(struct tenants *tenants, const struct seed *seed);
void tenants_end(struct tenants *tenants);

/* Set the first tenant's prefix: before any other tenant is added. */
enum outcome tenants_set_first_prefix(struct tenants *tenants, const char *prefix);

/* Add a tenant, or end the suspension of one that has the same prefix. A name that is no DNS label in lower case is
 * refused, and a prefix that is malformed, another one than before, or not apart from those of all others. */
enum outcome tenants_add(struct tenants *tenants, const char *name, const char *prefix);

/* Suspend a tenant; false if it is not known. */
bool tenants_suspend(struct tenants *tenants, const char *name);

/* Find the number of a tenant, of the first one if `name` is NULL; false if it is not known. */
bool tenants_find(const struct tenants *tenants, const char *name, uint16_t *number);

#endif
