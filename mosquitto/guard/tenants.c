#include "tenants.h"

#include "match.h"

#include <stdlib.h>
#include <string.h>

#define FIRST_CAPACITY 4u /* of the list; the slots are twice as many or more */

bool tenants_begin(struct tenants *tenants, const struct seed *seed)
{
    *tenants = (struct tenants){.seed = seed, .list_capacity = FIRST_CAPACITY, .slot_capacity = 2 * FIRST_CAPACITY};
    tenants->list = calloc(tenants->list_capacity, sizeof *tenants->list);
    tenants->slots = calloc(tenants->slot_capacity, sizeof *tenants->slots);
    if (tenants->list == NULL || tenants->slots == NULL || (tenants->list[0].prefix = strdup("devices")) == NULL) {
        tenants_end(tenants);
        return false;
    }
    tenants->count = 1;
    return true;
}

void tenants_end(struct tenants *tenants)
{
    for (uint32_t i = 0; i < tenants->count; i++) {
        free(tenants->list[i].name);
        free(tenants->list[i].prefix);
    }
    free(tenants->list);
    free(tenants->slots);
    names_clear(&tenants->prefixes);
    names_clear(&tenants->above);
    *tenants = (struct tenants){0};
}

/* --- Names ------------------------------------------------------------------------------------------------------ */

/* Say whether a name is a DNS label in lower case (RFC 1123 section 2.1). */
static bool is_label(const char *name)
{
    size_t length = strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789-");

    return length > 0 && length <= MAX_TENANT_BYTES && name[length] == '\0' && name[0] != '-' && name[length - 1] != '-';
}

/* Return the slot of the name, or the free one where it belongs. */
static uint16_t *slot_of(const struct tenants *tenants, const char *name)
{
    uint32_t at = (uint32_t)hash_bytes(tenants->seed, name, strlen(name)) & (tenants->slot_capacity - 1);

    while (tenants->slots[at] != FIRST_TENANT && strcmp(tenants->list[tenants->slots[at]].name, name) != 0) {
        at = (at + 1) & (tenants->slot_capacity - 1);
    }
    return &tenants->slots[at];
}

bool tenants_find(const struct tenants *tenants, const char *name, uint16_t *number)
{
    *number = name == NULL ? FIRST_TENANT : *slot_of(tenants, name);
    return name == NULL || *number != FIRST_TENANT;
}

/* Double both tables when the list is full; false if there is no memory. */
static bool grow(struct tenants *tenants)
{
    struct tenant *list;
    uint16_t *slots;

    if (tenants->count < tenants->list_capacity) {
        return true;
    }
    list = realloc(tenants->list, (size_t)2 * tenants->list_capacity * sizeof *list);
    if (list == NULL) {
        return false;
    }
    tenants->list = list;
    slots = calloc((size_t)2 * tenants->slot_capacity, sizeof *slots);
    if (slots == NULL) {
        return false;
    }
    free(tenants->slots);
    tenants->slots = slots;
    tenants->list_capacity *= 2;
    tenants->slot_capacity *= 2;
    for (uint32_t i = 1; i < tenants->count; i++) {
        *slot_of(tenants, list[i].name) = (uint16_t)i;
    }
    return true;
}

/* --- Prefixes --------------------------------------------------------------------------------------------------- */

static bool is_prefix(const char *prefix)
{
    return strlen(prefix) <= MAX_PREFIX_BYTES && filter_is_valid(prefix) && !has_wildcard(prefix) && prefix[0] != '$';
}

/* Say whether `inner` is `outer`, or below it. */
static bool is_below(const char *inner, const char *outer)
{
    size_t length = strlen(outer);

    return strncmp(inner, outer, length) == 0 && (inner[length] == '/' || inner[length] == '\0');
}

/* Call `each` with what the prefix begins with, the shortest first, until it returns false; say whether it never did. */
static bool walk_above(struct tenants *tenants, const char *prefix, bool (*each)(struct tenants *, const char *))
{
    char above[MAX_PREFIX_BYTES + 1];

    strcpy(above, prefix); /* is_prefix has limited it */
    for (char *slash = strchr(above, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        bool goes_on;
        *slash = '\0';
        goes_on = each(tenants, above);
        *slash = '/';
        if (!goes_on) {
            return false;
        }
    }
    return true;
}

static bool is_free(struct tenants *tenants, const char *above)
{
    return names_find(&tenants->prefixes, above) == NULL;
}

static bool note_above(struct tenants *tenants, const char *above)
{
    return names_find(&tenants->above, above) != NULL || names_add(&tenants->above, above);
}

/* Say whether no topic below the prefix is below that of another tenant, too. */
static bool is_apart(struct tenants *tenants, const char *prefix)
{
    const char *first = tenants->list[FIRST_TENANT].prefix;

    return !is_below(prefix, first) && !is_below(first, prefix) && is_free(tenants, prefix) &&
           names_find(&tenants->above, prefix) == NULL && walk_above(tenants, prefix, is_free);
}

/* --- Changes ---------------------------------------------------------------------------------------------------- */

enum outcome tenants_set_first_prefix(struct tenants *tenants, const char *prefix)
{
    char *copy;

    if (tenants->count > 1 || !is_prefix(prefix)) {
        return REFUSED;
    }
    copy = strdup(prefix);
    if (copy == NULL) {
        return NO_MEMORY;
    }
    free(tenants->list[FIRST_TENANT].prefix);
    tenants->list[FIRST_TENANT].prefix = copy;
    return DONE;
}

enum outcome tenants_add(struct tenants *tenants, const char *name, const char *prefix)
{
    struct tenant added = {0};
    uint16_t number;

    if (!is_label(name) || !is_prefix(prefix)) {
        return REFUSED;
    }
    if (tenants_find(tenants, name, &number)) {
        if (strcmp(tenants->list[number].prefix, prefix) != 0) {
            return REFUSED;
        }
        tenants->list[number].suspended = false;
        return DONE;
    }
    if (tenants->count > MAX_TENANTS || !is_apart(tenants, prefix)) {
        return REFUSED;
    }
    if (!grow(tenants) || !names_add(&tenants->prefixes, prefix) || !walk_above(tenants, prefix, note_above) ||
        (added.name = strdup(name)) == NULL || (added.prefix = strdup(prefix)) == NULL) {
        free(added.name);
        return NO_MEMORY; /* the journal is read again as a whole */
    }
    *slot_of(tenants, name) = (uint16_t)tenants->count;
    tenants->list[tenants->count++] = added;
    return DONE;
}

bool tenants_suspend(struct tenants *tenants, const char *name)
{
    uint16_t number;

    if (!tenants_find(tenants, name, &number)) {
        return false;
    }
    tenants->list[number].suspended = true;
    return true;
}
