#include "registry.h"

#include "match.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#define UUID_CHARACTERS 36
#define UUID_BYTES 16
#define OWN_ID '\xFF'      /* stands for the identity in a stored filter: no UTF-8 has this byte */
#define DEFAULT_TOPICS 0u  /* the position in the arena that no filters have */
#define FIRST_CAPACITY 1024u
#define MAX_CAPACITY (1u << 30)

enum key_kind { FREE_SLOT, UUID_KEY, NAME_KEY };

struct identity {
    union {
        uint8_t uuid[UUID_BYTES];
        struct {
            uint64_t hash;
            uint32_t position; /* of its name, in the arena */
        } name;
    } key;
    uint32_t filters; /* their position in the arena */
    uint8_t standing;
    uint8_t kind;
};

struct serial {
    struct serial_number number;
    uint8_t issuer; /* its place in the list */
    bool used, revoked;
};

struct issuer {
    uint8_t hash[HASH_BYTES];
    bool ours; /* false if it is known from a serial number only */
};

struct registry {
    struct identity *identities;
    struct serial *serials;
    char *arena;
    struct issuer *issuers;
    uint32_t capacity, count;
    uint32_t serial_capacity, serial_count;
    uint32_t arena_size, arena_used;
    uint32_t issuer_count;
    uint64_t seed[2];
    uint64_t stamp;
    uint8_t portal[HASH_BYTES];
    bool has_portal, has_prefix;
    char prefix[MAX_PREFIX_BYTES + 1];
};

static uint64_t last_stamp; /* of all registries */

/* An identity as it is looked for. */
struct key {
    uint8_t uuid[UUID_BYTES];
    uint64_t hash;
    const char *name;
    size_t length;
    enum key_kind kind;
};

/* --- Names ------------------------------------------------------------------------------------------------------ */

bool is_id(const char *id)
{
    size_t length = strspn(id, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-");

    return length > 0 && length <= MAX_ID_BYTES && id[length] == '\0';
}

#define UPPER 0x20 /* marks a digit in upper case */

/* The value of each hexadecimal digit with a mark, 0 for all other characters. */
static const uint8_t digits[256] = {
    ['0'] = 0x10, ['1'] = 0x11, ['2'] = 0x12, ['3'] = 0x13, ['4'] = 0x14, ['5'] = 0x15, ['6'] = 0x16, ['7'] = 0x17,
    ['8'] = 0x18, ['9'] = 0x19, ['a'] = 0x1A, ['b'] = 0x1B, ['c'] = 0x1C, ['d'] = 0x1D, ['e'] = 0x1E, ['f'] = 0x1F,
    ['A'] = 0x3A, ['B'] = 0x3B, ['C'] = 0x3C, ['D'] = 0x3D, ['E'] = 0x3E, ['F'] = 0x3F,
};

/* Read a UUID, and note whether it has digits in upper case; false if `name` is none. */
static bool parse_uuid(const char *name, uint8_t uuid[UUID_BYTES], bool *has_upper)
{
    static const uint8_t places[UUID_BYTES] = {0, 2, 4, 6, 9, 11, 14, 16, 19, 21, 24, 26, 28, 30, 32, 34};
    unsigned all = 0x10, any = 0;

    if (strnlen(name, UUID_CHARACTERS + 1) != UUID_CHARACTERS || name[8] != '-' || name[13] != '-' ||
        name[18] != '-' || name[23] != '-') {
        return false;
    }
    for (unsigned i = 0; i < UUID_BYTES; i++) {
        unsigned high = digits[(uint8_t)name[places[i]]], low = digits[(uint8_t)name[places[i] + 1]];
        all &= high & low;
        any |= high | low;
        uuid[i] = (uint8_t)(high << 4 | (low & 0xF));
    }
    *has_upper = any & UPPER;
    return all != 0;
}

bool is_uuid(const char *name)
{
    uint8_t uuid[UUID_BYTES];
    bool has_upper;

    return parse_uuid(name, uuid, &has_upper);
}

/* Multiply to 128 bits and fold them into 64: each bit of both depends on all of the result. */
static uint64_t fold(uint64_t one, uint64_t other)
{
    unsigned __int128 product = (unsigned __int128)one * other;

    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* Hash bytes with the registry's random seed, so that nobody can choose names that collide. */
static uint64_t hash_bytes(const struct registry *registry, const void *data, size_t length)
{
    const uint8_t *bytes = data;
    uint64_t state = registry->seed[0] ^ length, word;

    for (; length >= sizeof word; length -= sizeof word, bytes += sizeof word) {
        memcpy(&word, bytes, sizeof word);
        state = fold(state ^ word, registry->seed[1]);
    }
    word = 0;
    memcpy(&word, bytes, length);
    return fold(state ^ word, registry->seed[1] ^ 0x9E3779B97F4A7C15u);
}

/* Only a UUID in lower case is kept as 16 bytes: one in upper case is another name, as it is to the broker. */
static struct key make_key(const struct registry *registry, const char *id)
{
    struct key key = {.name = id, .length = strlen(id)};
    bool has_upper;

    if (parse_uuid(id, key.uuid, &has_upper) && !has_upper) {
        key.kind = UUID_KEY;
        key.hash = hash_bytes(registry, key.uuid, UUID_BYTES);
    } else {
        key.kind = NAME_KEY;
        key.hash = hash_bytes(registry, id, key.length);
    }
    return key;
}

/* --- Memory ----------------------------------------------------------------------------------------------------- */

static void note_change(struct registry *registry)
{
    registry->stamp = ++last_stamp;
}

uint64_t registry_stamp(const struct registry *registry)
{
    return registry->stamp;
}

struct registry *registry_new(void)
{
    struct registry *registry = calloc(1, sizeof *registry);

    if (registry == NULL) {
        return NULL;
    }
    registry->identities = calloc(FIRST_CAPACITY, sizeof *registry->identities);
    registry->serials = calloc(FIRST_CAPACITY, sizeof *registry->serials);
    registry->issuers = calloc(MAX_ISSUERS, sizeof *registry->issuers);
    registry->arena = malloc(FIRST_CAPACITY);
    if (registry->identities == NULL || registry->serials == NULL || registry->issuers == NULL ||
        registry->arena == NULL ||
        getrandom(registry->seed, sizeof registry->seed, 0) != (ssize_t)sizeof registry->seed) {
        registry_free(registry);
        return NULL;
    }
    registry->capacity = registry->serial_capacity = FIRST_CAPACITY;
    registry->arena_size = FIRST_CAPACITY;
    registry->seed[1] |= 1;
    note_change(registry);
    registry->arena_used = DEFAULT_TOPICS + 1;
    memcpy(registry->prefix, "devices", sizeof "devices");
    return registry;
}

void registry_free(struct registry *registry)
{
    if (registry != NULL) {
        free(registry->identities);
        free(registry->serials);
        free(registry->issuers);
        free(registry->arena);
        free(registry);
    }
}

/* Make room for `size` more bytes in the arena; false if there is no memory. */
static bool reserve(struct registry *registry, size_t size)
{
    uint64_t wanted = registry->arena_size;
    char *bigger;

    if (size <= registry->arena_size - registry->arena_used) {
        return true;
    }
    while (wanted - registry->arena_used < size) {
        wanted *= 2;
    }
    if (wanted > UINT32_MAX) {
        return false;
    }
    bigger = realloc(registry->arena, wanted);
    if (bigger == NULL) {
        return false;
    }
    registry->arena = bigger;
    registry->arena_size = (uint32_t)wanted;
    return true;
}

static uint64_t identity_hash(const struct registry *registry, const struct identity *identity)
{
    return identity->kind == NAME_KEY ? identity->key.name.hash : hash_bytes(registry, identity->key.uuid, UUID_BYTES);
}

/* Double the table when three quarters are in use; false if there is no memory. */
static bool grow_identities(struct registry *registry)
{
    uint32_t capacity = registry->capacity * 2;
    struct identity *bigger;

    if (registry->count < registry->capacity / 4 * 3) {
        return true;
    }
    if (capacity > MAX_CAPACITY || (bigger = calloc(capacity, sizeof *bigger)) == NULL) {
        return false;
    }
    for (uint32_t i = 0; i < registry->capacity; i++) {
        const struct identity *identity = &registry->identities[i];
        if (identity->kind != FREE_SLOT) {
            uint32_t at = (uint32_t)identity_hash(registry, identity) & (capacity - 1);
            while (bigger[at].kind != FREE_SLOT) {
                at = (at + 1) & (capacity - 1);
            }
            bigger[at] = *identity;
        }
    }
    free(registry->identities);
    registry->identities = bigger;
    registry->capacity = capacity;
    return true;
}

/* --- Identities ------------------------------------------------------------------------------------------------- */

static bool is_same(const struct registry *registry, const struct identity *identity, const struct key *key)
{
    if (identity->kind != key->kind) {
        return false;
    }
    if (key->kind == UUID_KEY) {
        return memcmp(identity->key.uuid, key->uuid, UUID_BYTES) == 0;
    }
    return identity->key.name.hash == key->hash &&
           strcmp(registry->arena + identity->key.name.position, key->name) == 0;
}

/* Return the slot of the key, or the free one where it belongs. */
static struct identity *slot_of(const struct registry *registry, const struct key *key)
{
    uint32_t at = (uint32_t)key->hash & (registry->capacity - 1);

    while (registry->identities[at].kind != FREE_SLOT && !is_same(registry, &registry->identities[at], key)) {
        at = (at + 1) & (registry->capacity - 1);
    }
    return &registry->identities[at];
}

const struct identity *registry_find(const struct registry *registry, const char *id)
{
    struct key key = make_key(registry, id);
    const struct identity *identity = slot_of(registry, &key);

    return identity->kind == FREE_SLOT ? NULL : identity;
}

/* Return the identity, which is added as UNKNOWN if need be; NULL if there is no memory. */
static struct identity *find_or_add(struct registry *registry, const char *id)
{
    struct key key = make_key(registry, id);
    struct identity *identity = slot_of(registry, &key);

    if (identity->kind != FREE_SLOT) {
        return identity;
    }
    if (!grow_identities(registry) || (key.kind == NAME_KEY && !reserve(registry, key.length + 1))) {
        return NULL;
    }
    identity = slot_of(registry, &key);
    identity->kind = (uint8_t)key.kind;
    if (key.kind == UUID_KEY) {
        memcpy(identity->key.uuid, key.uuid, UUID_BYTES);
    } else {
        identity->key.name.hash = key.hash;
        identity->key.name.position = registry->arena_used;
        memcpy(registry->arena + registry->arena_used, id, key.length + 1);
        registry->arena_used += (uint32_t)key.length + 1;
    }
    registry->count++;
    return identity;
}

enum standing identity_standing(const struct identity *identity)
{
    return identity == NULL ? UNKNOWN : (enum standing)identity->standing;
}

enum standing registry_standing(const struct registry *registry, const char *id)
{
    return identity_standing(registry_find(registry, id));
}

size_t registry_count(const struct registry *registry)
{
    return registry->count;
}

/* --- Topics ----------------------------------------------------------------------------------------------------- */

/* Goes through the filters of an identity: begin_filters, then next_filter until it returns false. */
struct cursor {
    const struct registry *registry;
    const char *id;
    const char *at; /* NULL before the default topics, and after the last filter */
    struct filter filter;
    char text[MAX_FILTER_BYTES];
};

static void begin_filters(
    struct cursor *cursor, const struct registry *registry, const struct identity *identity, const char *id)
{
    cursor->registry = registry;
    cursor->id = id;
    cursor->at = identity->filters == DEFAULT_TOPICS ? "" : registry->arena + identity->filters;
    cursor->filter.text = identity->filters == DEFAULT_TOPICS ? NULL : cursor->text;
    cursor->filter.access = NO_ACCESS;
}

/* Write a stored filter with the identity in its place. It fits, as it did before it was stored. */
static void expand(struct cursor *cursor, const char *stored)
{
    size_t used = 0, id_length = strlen(cursor->id);

    for (; *stored != '\0' && used + id_length < sizeof cursor->text; stored++) {
        if (*stored == OWN_ID) {
            memcpy(cursor->text + used, cursor->id, id_length);
            used += id_length;
        } else {
            cursor->text[used++] = *stored;
        }
    }
    cursor->text[*stored == '\0' ? used : 0] = '\0'; /* a filter that did not fit matches nothing */
}

static bool next_filter(struct cursor *cursor)
{
    if (cursor->at == NULL) {
        return false;
    }
    if (cursor->filter.text == NULL) { /* the default topics */
        size_t used = strlen(cursor->registry->prefix), id_length = strlen(cursor->id);
        memcpy(cursor->text, cursor->registry->prefix, used);
        cursor->text[used++] = '/';
        memcpy(cursor->text + used, cursor->id, id_length);
        memcpy(cursor->text + used + id_length, "/#", sizeof "/#");
        cursor->filter = (struct filter){READ_WRITE, cursor->text};
        cursor->at = NULL;
        return true;
    }
    if (*cursor->at == NO_ACCESS) {
        cursor->at = NULL;
        return false;
    }
    cursor->filter.access = (enum access) * cursor->at;
    expand(cursor, cursor->at + 1);
    cursor->at += strlen(cursor->at) + 1;
    return true;
}

static struct cursor scratch[2]; /* the broker has one thread; too large for its stack */

/* Say whether the topic is PREFIX/<identity> or below it. */
static bool is_default_topic(const struct registry *registry, const char *id, const char *topic)
{
    size_t length = strlen(registry->prefix);

    if (strncmp(topic, registry->prefix, length) != 0 || topic[length] != '/') {
        return false;
    }
    topic += length + 1;
    length = strlen(id);
    return strncmp(topic, id, length) == 0 && (topic[length] == '/' || topic[length] == '\0');
}

bool registry_is_of_denied(const struct registry *registry, const char *topic)
{
    size_t prefix = strlen(registry->prefix), length;
    char id[MAX_ID_BYTES + 1];

    if (strncmp(topic, registry->prefix, prefix) != 0 || topic[prefix] != '/') {
        return false;
    }
    topic += prefix + 1;
    length = strcspn(topic, "/");
    if (length > MAX_ID_BYTES) {
        return false;
    }
    memcpy(id, topic, length);
    id[length] = '\0';
    return is_id(id) && registry_standing(registry, id) == DENIED;
}

bool registry_may(const struct registry *registry, const struct identity *identity, const char *id, enum access access,
    const char *topic)
{
    struct cursor *cursor = &scratch[0];

    if (identity_standing(identity) != ALLOWED || has_wildcard(topic)) {
        return false;
    }
    if (identity->filters == DEFAULT_TOPICS) {
        return is_default_topic(registry, id, topic);
    }
    begin_filters(cursor, registry, identity, id);
    while (next_filter(cursor)) {
        if ((cursor->filter.access & access) == access && filter_matches(cursor->filter.text, topic)) {
            return true;
        }
    }
    return false;
}

/* Say whether one of the identity's filters for reading compares with `filter` as asked. */
static bool any_readable(const struct registry *registry, const struct identity *identity, const char *id,
    const char *filter, bool (*compare)(const char *own, const char *filter))
{
    struct cursor *cursor = &scratch[0];

    if (identity_standing(identity) != ALLOWED || !filter_is_valid(filter)) {
        return false;
    }
    begin_filters(cursor, registry, identity, id);
    while (next_filter(cursor)) {
        if ((cursor->filter.access & READ) && compare(cursor->filter.text, filter)) {
            return true;
        }
    }
    return false;
}

bool registry_may_subscribe(
    const struct registry *registry, const struct identity *identity, const char *id, const char *filter)
{
    return any_readable(registry, identity, id, filter, filters_intersect);
}

bool registry_may_share(
    const struct registry *registry, const struct identity *identity, const char *id, const char *filter)
{
    return any_readable(registry, identity, id, filter, filter_contains);
}

/* Say whether one of the filters of `identity` contains `filter` with all of `access`. */
static bool covers(const struct registry *registry, const struct identity *identity, const char *id,
    enum access access, const char *filter)
{
    struct cursor *cursor = &scratch[1];

    begin_filters(cursor, registry, identity, id);
    while (next_filter(cursor)) {
        if ((cursor->filter.access & access) == access && filter_contains(cursor->filter.text, filter)) {
            return true;
        }
    }
    return false;
}

static bool lost_rights(const struct registry *before, const struct identity *was, const struct registry *after,
    const struct identity *now, const char *id)
{
    struct cursor *cursor = &scratch[0];

    if (was == NULL || was->standing != ALLOWED) {
        return false;
    }
    if (now == NULL || now->standing != ALLOWED) {
        return true;
    }
    begin_filters(cursor, before, was, id);
    while (next_filter(cursor)) {
        for (unsigned access = READ; access <= WRITE; access <<= 1) {
            if ((cursor->filter.access & access) && !covers(after, now, id, (enum access)access, cursor->filter.text)) {
                return true;
            }
        }
    }
    return false;
}

bool registry_lost_rights(const struct registry *before, const struct registry *now, const char *id)
{
    return lost_rights(before, registry_find(before, id), now, registry_find(now, id), id);
}

/* Append a filter to the arena, with one byte for each occurrence of the identity; false if there is no memory. */
static bool store_filter(struct registry *registry, const char *id, const struct filter *filter)
{
    size_t id_length = strlen(id);
    char *at;

    if (!reserve(registry, strlen(filter->text) + 3)) { /* its access, NUL, and the end of the list */
        return false;
    }
    at = registry->arena + registry->arena_used;
    *at++ = (char)filter->access;
    for (const char *text = filter->text; *text != '\0';) {
        if (strncmp(text, id, id_length) == 0) {
            *at++ = OWN_ID;
            text += id_length;
        } else {
            *at++ = *text++;
        }
    }
    *at++ = '\0';
    registry->arena_used = (uint32_t)(at - registry->arena);
    return true;
}

static bool is_acceptable(const struct filter *filter)
{
    return filter->access >= READ && filter->access <= READ_WRITE && strlen(filter->text) < MAX_FILTER_BYTES &&
           filter_is_valid(filter->text) && strchr("$+#", filter->text[0]) == NULL;
}

enum outcome registry_allow(struct registry *registry, const char *id, const struct filter *filters, size_t count)
{
    struct identity *identity, before;
    uint32_t position = registry->arena_used;

    note_change(registry);
    if (!is_id(id) || count > MAX_FILTERS) {
        return REFUSED;
    }
    for (size_t i = 0; i < count; i++) {
        if (!is_acceptable(&filters[i])) {
            return REFUSED;
        }
    }
    identity = find_or_add(registry, id);
    if (identity == NULL) {
        return NO_MEMORY;
    }
    before = *identity;
    if (count > 0) {
        position = registry->arena_used;
        for (size_t i = 0; i < count; i++) {
            if (!store_filter(registry, id, &filters[i])) {
                return NO_MEMORY;
            }
        }
        registry->arena[registry->arena_used++] = NO_ACCESS;
    }
    identity->filters = count > 0 ? position : DEFAULT_TOPICS;
    identity->standing = ALLOWED;
    return lost_rights(registry, &before, registry, identity, id) ? RIGHTS_LOST : DONE;
}

enum outcome registry_revoke(struct registry *registry, const char *id, enum standing standing)
{
    struct identity *identity;

    note_change(registry);
    if (!is_id(id) || standing == ALLOWED) {
        return REFUSED;
    }
    identity = find_or_add(registry, id);
    if (identity == NULL) {
        return NO_MEMORY;
    }
    identity->filters = DEFAULT_TOPICS;
    identity->standing = (uint8_t)standing;
    return RIGHTS_LOST;
}

enum outcome registry_set_prefix(struct registry *registry, const char *prefix)
{
    note_change(registry);
    if (registry->count > 0 || registry->has_prefix || strlen(prefix) > MAX_PREFIX_BYTES ||
        !filter_is_valid(prefix) || has_wildcard(prefix) || prefix[0] == '$') {
        return REFUSED;
    }
    memcpy(registry->prefix, prefix, strlen(prefix) + 1);
    registry->has_prefix = true;
    return DONE;
}

/* --- Issuers, serial numbers, the portal ------------------------------------------------------------------------ */

enum outcome registry_set_portal(struct registry *registry, const uint8_t hash[HASH_BYTES])
{
    memcpy(registry->portal, hash, HASH_BYTES);
    registry->has_portal = true;
    return DONE;
}

const uint8_t *registry_portal(const struct registry *registry)
{
    return registry->has_portal ? registry->portal : NULL;
}

static struct issuer *find_issuer(const struct registry *registry, const uint8_t hash[HASH_BYTES])
{
    for (uint32_t i = 0; i < registry->issuer_count; i++) {
        if (memcmp(registry->issuers[i].hash, hash, HASH_BYTES) == 0) {
            return &registry->issuers[i];
        }
    }
    return NULL;
}

static struct issuer *find_or_add_issuer(struct registry *registry, const uint8_t hash[HASH_BYTES])
{
    struct issuer *issuer = find_issuer(registry, hash);

    if (issuer == NULL && registry->issuer_count < MAX_ISSUERS) {
        issuer = &registry->issuers[registry->issuer_count++];
        memcpy(issuer->hash, hash, HASH_BYTES);
    }
    return issuer;
}

enum outcome registry_add_issuer(struct registry *registry, const uint8_t hash[HASH_BYTES])
{
    struct issuer *issuer = find_or_add_issuer(registry, hash);

    note_change(registry);
    if (issuer == NULL) {
        return REFUSED;
    }
    issuer->ours = true;
    return DONE;
}

bool registry_is_issuer(const struct registry *registry, const uint8_t hash[HASH_BYTES])
{
    const struct issuer *issuer = find_issuer(registry, hash);

    return issuer != NULL && issuer->ours;
}

static uint64_t serial_hash(const struct registry *registry, uint8_t issuer, const struct serial_number *number)
{
    return hash_bytes(registry, number->bytes, number->length) ^ issuer;
}

/* Return the slot of the serial number, or the free one where it belongs. */
static struct serial *serial_slot(
    const struct registry *registry, uint8_t issuer, const struct serial_number *number)
{
    uint32_t at = (uint32_t)serial_hash(registry, issuer, number) & (registry->serial_capacity - 1);

    for (;; at = (at + 1) & (registry->serial_capacity - 1)) {
        struct serial *serial = &registry->serials[at];
        if (!serial->used || (serial->issuer == issuer && serial->number.length == number->length &&
                                 memcmp(serial->number.bytes, number->bytes, number->length) == 0)) {
            return serial;
        }
    }
}

static bool grow_serials(struct registry *registry)
{
    struct registry bigger = *registry;

    if (registry->serial_count < registry->serial_capacity / 4 * 3) {
        return true;
    }
    bigger.serial_capacity = registry->serial_capacity * 2;
    if (bigger.serial_capacity > MAX_CAPACITY ||
        (bigger.serials = calloc(bigger.serial_capacity, sizeof *bigger.serials)) == NULL) {
        return false;
    }
    for (uint32_t i = 0; i < registry->serial_capacity; i++) {
        const struct serial *serial = &registry->serials[i];
        if (serial->used) {
            *serial_slot(&bigger, serial->issuer, &serial->number) = *serial;
        }
    }
    free(registry->serials);
    registry->serials = bigger.serials;
    registry->serial_capacity = bigger.serial_capacity;
    return true;
}

enum outcome registry_add_serial(
    struct registry *registry, const uint8_t issuer[HASH_BYTES], const struct serial_number *serial)
{
    const struct issuer *found = find_or_add_issuer(registry, issuer);
    struct serial *slot;
    uint8_t place;

    note_change(registry);
    if (found == NULL || serial->length > MAX_SERIAL_BYTES) {
        return REFUSED;
    }
    if (!grow_serials(registry)) {
        return NO_MEMORY;
    }
    place = (uint8_t)(found - registry->issuers);
    slot = serial_slot(registry, place, serial);
    if (!slot->used) {
        registry->serial_count++;
    }
    *slot = (struct serial){.number = *serial, .issuer = place, .used = true, .revoked = true};
    return SERIAL_REVOKED;
}

enum outcome registry_remove_serial(
    struct registry *registry, const uint8_t issuer[HASH_BYTES], const struct serial_number *serial)
{
    const struct issuer *found = find_issuer(registry, issuer);

    note_change(registry);
    if (found != NULL) {
        struct serial *slot = serial_slot(registry, (uint8_t)(found - registry->issuers), serial);
        slot->revoked = false; /* its slot stays in use, so that those behind it are found */
    }
    return DONE;
}

bool registry_has_serial(
    const struct registry *registry, const uint8_t issuer[HASH_BYTES], const struct serial_number *serial)
{
    const struct issuer *found = find_issuer(registry, issuer);

    return found != NULL && serial_slot(registry, (uint8_t)(found - registry->issuers), serial)->revoked;
}
