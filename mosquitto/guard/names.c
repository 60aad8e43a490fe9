#include "names.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FIRST_CAPACITY 64

static size_t hash_of(const char *text)
{
    uint64_t hash = 0xCBF29CE484222325u; /* FNV-1a */

    for (; *text != '\0'; text++) {
        hash = (hash ^ (uint8_t)*text) * 0x100000001B3u;
    }
    return (size_t)(hash ^ hash >> 32);
}

/* Return the slot of the name, or the free one where it belongs. At most half of them are in use. */
static struct name *slot_of(const struct names *names, const char *text)
{
    size_t at = hash_of(text) & (names->capacity - 1);

    while (names->slots[at].text != NULL && strcmp(names->slots[at].text, text) != 0) {
        at = (at + 1) & (names->capacity - 1);
    }
    return &names->slots[at];
}

static struct name *find(const struct names *names, const char *text)
{
    struct name *name = names->used == 0 ? NULL : slot_of(names, text);

    return name == NULL || name->text == NULL ? NULL : name;
}

const struct name *names_find(const struct names *names, const char *text)
{
    return find(names, text);
}

static bool grow(struct names *names)
{
    struct names bigger = {.capacity = names->capacity == 0 ? FIRST_CAPACITY : names->capacity * 2};

    if (names->capacity > 0 && names->used < names->capacity / 2) {
        return true;
    }
    bigger.slots = calloc(bigger.capacity, sizeof *bigger.slots);
    if (bigger.slots == NULL) {
        return false;
    }
    for (size_t i = 0; i < names->capacity; i++) {
        if (names->slots[i].text != NULL) {
            *slot_of(&bigger, names->slots[i].text) = names->slots[i];
        }
    }
    free(names->slots);
    names->slots = bigger.slots;
    names->capacity = bigger.capacity;
    return true;
}

bool names_add(struct names *names, const char *text)
{
    return names_count(names, text, 1);
}

bool names_count(struct names *names, const char *text, unsigned times)
{
    struct name *name = find(names, text);

    if (name == NULL) {
        char *copy = names->used < MAX_NAMES && grow(names) ? strdup(text) : NULL;
        if (copy == NULL) {
            return false;
        }
        name = slot_of(names, text);
        *name = (struct name){.text = copy, .since = time(NULL)};
        names->used++;
    }
    name->count += times;
    return true;
}

bool names_copy(struct names *copy, const struct names *names)
{
    if (names->used == 0) {
        return true;
    }
    copy->slots = calloc(names->capacity, sizeof *copy->slots);
    if (copy->slots == NULL) {
        return false;
    }
    copy->capacity = names->capacity;
    for (size_t i = 0; i < names->capacity; i++) {
        if (names->slots[i].text != NULL) {
            char *text = strdup(names->slots[i].text);
            if (text == NULL) {
                names_clear(copy);
                return false;
            }
            copy->slots[i] = names->slots[i];
            copy->slots[i].text = text;
            copy->used++;
        }
    }
    return true;
}

void names_remove(struct names *names, const char *text)
{
    struct name *name = find(names, text);
    size_t hole, mask = names->capacity - 1;

    if (name == NULL || --name->count > 0) {
        return;
    }
    free(name->text);
    *name = (struct name){0};
    names->used--;
    hole = (size_t)(name - names->slots);
    for (size_t at = (hole + 1) & mask; names->slots[at].text != NULL; at = (at + 1) & mask) { /* close the gap */
        size_t home = hash_of(names->slots[at].text) & mask;
        if (((at - home) & mask) >= ((at - hole) & mask)) {
            names->slots[hole] = names->slots[at];
            names->slots[at] = (struct name){0};
            hole = at;
        }
    }
}

const struct name *names_next(const struct names *names, size_t *at)
{
    while (*at < names->capacity) {
        const struct name *name = &names->slots[(*at)++];
        if (name->text != NULL) {
            return name;
        }
    }
    return NULL;
}

void names_clear(struct names *names)
{
    for (size_t i = 0; i < names->capacity; i++) {
        free(names->slots[i].text);
    }
    free(names->slots);
    *names = (struct names){0};
}
