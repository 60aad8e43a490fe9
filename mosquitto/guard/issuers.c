#include "issuers.h"

#include <stdlib.h>
#include <string.h>

#define FIRST_CAPACITY 16u /* of the list; the slots are twice as many */
#define FIRST_SERIALS 1024u
#define MAX_SERIALS (1u << 30)

struct serial {
    struct serial_number number;
    uint8_t state; /* a serial_state */
    uint16_t issuer; /* its position in the list */
};

enum serial_state { FREE_SERIAL, GOOD_SERIAL, REVOKED_SERIAL };

bool issuers_begin(struct issuers *issuers, const struct seed *seed)
{
    *issuers = (struct issuers){.seed = seed, .list_capacity = FIRST_CAPACITY, .slot_capacity = 2 * FIRST_CAPACITY,
        .serial_capacity = FIRST_SERIALS};
    issuers->list = calloc(issuers->list_capacity, sizeof *issuers->list);
    issuers->slots = calloc(issuers->slot_capacity, sizeof *issuers->slots);
    issuers->serials = calloc(issuers->serial_capacity, sizeof *issuers->serials);
    if (issuers->list == NULL || issuers->slots == NULL || issuers->serials == NULL) {
        issuers_end(issuers);
        return false;
    }
    return true;
}

void issuers_end(struct issuers *issuers)
{
    free(issuers->list);
    free(issuers->slots);
    free(issuers->serials);
    *issuers = (struct issuers){0};
}

/* --- Issuers ---------------------------------------------------------------------------------------------------- */

/* Return the slot of the hash, or the free one where it belongs. */
static uint32_t *slot_of(const struct issuers *issuers, const uint8_t hash[HASH_BYTES])
{
    uint32_t at = (uint32_t)hash_bytes(issuers->seed, hash, HASH_BYTES) & (issuers->slot_capacity - 1);

    while (issuers->slots[at] != 0 && memcmp(issuers->list[issuers->slots[at] - 1].hash, hash, HASH_BYTES) != 0) {
        at = (at + 1) & (issuers->slot_capacity - 1);
    }
    return &issuers->slots[at];
}

static struct issuer *find(const struct issuers *issuers, const uint8_t hash[HASH_BYTES])
{
    uint32_t position = *slot_of(issuers, hash);

    return position == 0 ? NULL : &issuers->list[position - 1];
}

/* Double both tables when the list is full; false if there is no memory. */
static bool grow(struct issuers *issuers)
{
    struct issuer *list;
    uint32_t *slots;

    if (issuers->count < issuers->list_capacity) {
        return true;
    }
    list = realloc(issuers->list, (size_t)2 * issuers->list_capacity * sizeof *list);
    if (list == NULL) {
        return false;
    }
    issuers->list = list;
    slots = calloc((size_t)2 * issuers->slot_capacity, sizeof *slots);
    if (slots == NULL) {
        return false;
    }
    free(issuers->slots);
    issuers->slots = slots;
    issuers->list_capacity *= 2;
    issuers->slot_capacity *= 2;
    for (uint32_t i = 0; i < issuers->count; i++) {
        *slot_of(issuers, list[i].hash) = i + 1;
    }
    return true;
}

/* Find an issuer, which is added as nobody's if need be. */
static enum outcome find_or_add(
    struct issuers *issuers, const uint8_t hash[HASH_BYTES], struct issuer **found)
{
    *found = find(issuers, hash);
    if (*found != NULL) {
        return DONE;
    }
    if (issuers->count == MAX_ISSUERS) {
        return REFUSED;
    }
    if (!grow(issuers)) {
        return NO_MEMORY;
    }
    *slot_of(issuers, hash) = issuers->count + 1;
    *found = &issuers->list[issuers->count++];
    **found = (struct issuer){0};
    memcpy((*found)->hash, hash, HASH_BYTES);
    return DONE;
}

enum outcome issuers_add(struct issuers *issuers, const uint8_t hash[HASH_BYTES], uint16_t tenant)
{
    struct issuer *issuer;
    enum outcome outcome = find_or_add(issuers, hash, &issuer);

    if (outcome != DONE || (issuer->ours && issuer->tenant != tenant)) {
        return outcome == DONE ? REFUSED : outcome;
    }
    issuer->tenant = tenant;
    issuer->ours = true;
    return DONE;
}

bool issuers_find(const struct issuers *issuers, const uint8_t hash[HASH_BYTES], uint16_t *tenant)
{
    const struct issuer *issuer = find(issuers, hash);

    if (issuer == NULL || !issuer->ours) {
        return false;
    }
    *tenant = issuer->tenant;
    return true;
}

/* --- Serial numbers --------------------------------------------------------------------------------------------- */

static uint64_t serial_hash(const struct issuers *issuers, uint16_t issuer, const struct serial_number *number)
{
    return hash_bytes(issuers->seed, number->bytes, number->length) ^ issuer;
}

/* Return the slot of the serial number, or the free one where it belongs. */
static struct serial *serial_slot(const struct issuers *issuers, uint16_t issuer, const struct serial_number *number)
{
    uint32_t at = (uint32_t)serial_hash(issuers, issuer, number) & (issuers->serial_capacity - 1);

    for (;; at = (at + 1) & (issuers->serial_capacity - 1)) {
        struct serial *serial = &issuers->serials[at];
        if (serial->state == FREE_SERIAL || (serial->issuer == issuer && serial->number.length == number->length &&
                                                memcmp(serial->number.bytes, number->bytes, number->length) == 0)) {
            return serial;
        }
    }
}

static bool grow_serials(struct issuers *issuers)
{
    struct issuers bigger = *issuers;

    if (issuers->serial_count < issuers->serial_capacity / 4 * 3) {
        return true;
    }
    bigger.serial_capacity = issuers->serial_capacity * 2;
    if (bigger.serial_capacity > MAX_SERIALS ||
        (bigger.serials = calloc(bigger.serial_capacity, sizeof *bigger.serials)) == NULL) {
        return false;
    }
    for (uint32_t i = 0; i < issuers->serial_capacity; i++) {
        const struct serial *serial = &issuers->serials[i];
        if (serial->state != FREE_SERIAL) {
            *serial_slot(&bigger, serial->issuer, &serial->number) = *serial;
        }
    }
    free(issuers->serials);
    issuers->serials = bigger.serials;
    issuers->serial_capacity = bigger.serial_capacity;
    return true;
}

enum outcome issuers_add_serial(
    struct issuers *issuers, const uint8_t issuer[HASH_BYTES], const struct serial_number *serial)
{
    struct issuer *found;
    struct serial *slot;
    uint16_t position;
    enum outcome outcome = find_or_add(issuers, issuer, &found);

    if (outcome != DONE || serial->length > MAX_SERIAL_BYTES) {
        return outcome == DONE ? REFUSED : outcome;
    }
    if (!grow_serials(issuers)) {
        return NO_MEMORY;
    }
    position = (uint16_t)(found - issuers->list);
    slot = serial_slot(issuers, position, serial);
    if (slot->state == FREE_SERIAL) {
        issuers->serial_count++;
    }
    *slot = (struct serial){.number = *serial, .issuer = position, .state = REVOKED_SERIAL};
    return DONE;
}

void issuers_remove_serial(
    struct issuers *issuers, const uint8_t issuer[HASH_BYTES], const struct serial_number *serial)
{
    const struct issuer *found = find(issuers, issuer);

    if (found != NULL) {
        struct serial *slot = serial_slot(issuers, (uint16_t)(found - issuers->list), serial);
        if (slot->state == REVOKED_SERIAL) {
            slot->state = GOOD_SERIAL; /* it stays in use, so that those behind it are found */
        }
    }
}

bool issuers_has_serial(
    const struct issuers *issuers, const uint8_t issuer[HASH_BYTES], const struct serial_number *serial)
{
    const struct issuer *found = find(issuers, issuer);

    return found != NULL &&
           serial_slot(issuers, (uint16_t)(found - issuers->list), serial)->state == REVOKED_SERIAL;
}
