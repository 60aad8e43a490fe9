#include "limits.h"

#include "names.h"

#include <stdlib.h>

#define FIRST_CAPACITY 1024

static struct names spent;   /* of the budget, since `began` */
static int64_t began;
static struct names keeping; /* how many topics each identity has in `topics` */
static size_t most_retained = DEFAULT_MAX_RETAINED;

/* The topics that have a retained message, by their hashes; 0 where free. At most half of the slots are in use. */
static struct {
    uint64_t *slots;
    size_t capacity, used;
} topics;

static unsigned count_of(const struct names *names, const char *id)
{
    const struct name *name = names_find(names, id);

    return name == NULL ? 0 : name->count;
}

bool limits_subscribe(const char *id, enum cost cost, int64_t now)
{
    unsigned points = (unsigned)cost + (cost == ONE_TOPIC ? 0 : count_of(&keeping, id) / RETAINED_A_POINT);

    if (now - began >= SUBSCRIBE_SECONDS) {
        names_clear(&spent);
        began = now;
    }
    return (points > SUBSCRIBE_BUDGET ? count_of(&spent, id) == 0 : count_of(&spent, id) + points <= SUBSCRIBE_BUDGET) &&
           names_count(&spent, id, points);
}

void limits_set_retained(size_t most)
{
    most_retained = most;
}

/* --- Topics with a retained message ------------------------------------------------------------------------------- */

static uint64_t key_of(uint64_t topic)
{
    return topic == 0 ? 1 : topic;
}

/* Return the slot of the topic, or the free one where it belongs. */
static uint64_t *slot_of(uint64_t key)
{
    size_t at = (size_t)key & (topics.capacity - 1);

    while (topics.slots[at] != 0 && topics.slots[at] != key) {
        at = (at + 1) & (topics.capacity - 1);
    }
    return &topics.slots[at];
}

static bool grow(void)
{
    uint64_t *before = topics.slots, *bigger;
    size_t capacity = topics.capacity;

    if (capacity > 0 && topics.used < capacity / 2) {
        return true;
    }
    bigger = calloc(capacity == 0 ? FIRST_CAPACITY : capacity * 2, sizeof *bigger);
    if (bigger == NULL) {
        return false;
    }
    topics.slots = bigger;
    topics.capacity = capacity == 0 ? FIRST_CAPACITY : capacity * 2;
    for (size_t i = 0; i < capacity; i++) {
        if (before[i] != 0) {
            *slot_of(before[i]) = before[i];
        }
    }
    free(before);
    return true;
}

bool limits_retain(const char *id, uint64_t topic)
{
    uint64_t key = key_of(topic);

    if (topics.used > 0 && *slot_of(key) == key) {
        return true;
    }
    if (count_of(&keeping, id) >= most_retained || !grow() || !names_add(&keeping, id)) {
        return false;
    }
    *slot_of(key) = key;
    topics.used++;
    return true;
}

void limits_clear_retained(const char *id, uint64_t topic)
{
    uint64_t key = key_of(topic), *slot = topics.used == 0 ? NULL : slot_of(key);
    size_t hole, mask = topics.capacity - 1;

    if (slot == NULL || *slot != key) {
        return;
    }
    *slot = 0;
    topics.used--;
    names_remove(&keeping, id);
    hole = (size_t)(slot - topics.slots);
    for (size_t at = (hole + 1) & mask; topics.slots[at] != 0; at = (at + 1) & mask) { /* close the gap */
        if (((at - (size_t)topics.slots[at]) & mask) >= ((at - hole) & mask)) {
            topics.slots[hole] = topics.slots[at];
            topics.slots[at] = 0;
            hole = at;
        }
    }
}

void limits_clear(void)
{
    names_clear(&spent);
    names_clear(&keeping);
    free(topics.slots);
    topics.slots = NULL;
    topics.capacity = topics.used = 0;
    most_retained = DEFAULT_MAX_RETAINED;
}
