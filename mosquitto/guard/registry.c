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
    uint16_t tenant;
    uint8_t standing;
    uint8_t kind;
};

struct registry {
    struct identity *identities;
    char *arena;
    uint32_t capacity, count;
    uint32_t arena_size, arena_used;
    struct tenants tenants;
    struct issuers issuers;
    struct seed seed;
    uint64_t stamp;
    uint8_t portal[HASH_BYTES];
    bool has_portal, has_prefix;
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

/* Only a UUID in lower case is kept as 16 bytes: one in upper case is another name, as it is to the broker. */
static struct key make_key(const struct registry *registry, const char *id)
{
    struct key key = {.name = id, .length = strlen(id)};
    bool has_upper;

    if (parse_uuid(id, key.uuid, &has_upper) && !has_upper) {
        key.kind = UUID_KEY;
        key.hash = hash_bytes(&registry->seed, key.uuid, UUID_BYTES);
    } else {
        key.kind = NAME_KEY;
        key.hash = hash_bytes(&registry->seed, id, key.length);
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
    registry->arena = malloc(FIRST_CAPACITY);
    if (getrandom(&registry->seed, sizeof registry->seed, 0) != (ssize_t)sizeof registry->seed ||
        registry->identities == NULL || registry->arena == NULL ||
        !tenants_begin(&registry->tenants, &registry->seed) || !issuers_begin(&registry->issuers, &registry->seed)) {
        registry_free(registry);
        return NULL;
    }
    registry->seed.words[1] |= 1;
    registry->capacity = registry->arena_size = FIRST_CAPACITY;
    note_change(registry);
    registry->arena_used = DEFAULT_TOPICS + 1;
    return registry;
}

void registry_free(struct registry *registry)
{
    if (registry != NULL) {
        free(registry->identities);
        free(registry->arena);
        tenants_end(&registry->tenants);
        issuers_end(&registry->issuers);
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
    return identity->kind == NAME_KEY ? identity->key.name.hash : hash_bytes(&registry->seed, identity->key.uuid, UUID_BYTES);
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

enum standing registry_standing_of(const struct registry *registry, const struct identity *identity)
{
    if (identity == NULL) {
        return UNKNOWN;
    }
    return identity->standing == ALLOWED && registry->tenants.list[identity->tenant].suspended
               ? SUSPENDED
               : (enum standing)identity->standing;
}

enum standing registry_standing(const struct registry *registry, const char *id)
{
    return registry_standing_of(registry, registry_find(registry, id));
}

uint16_t registry_tenant_of(const struct identity *identity)
{
    return identity->tenant;
}

static const char *prefix_of(const struct registry *registry, const struct identity *identity)
{
    return registry->tenants.list[identity->tenant].prefix;
}

size_t registry_count(const struct registry *registry)
{
    return registry->count;
}

/* --- Topics ----------------------------------------------------------------------------------------------------- */

/* Goes through the filters of an identity: begin_filters, then next_filter until it returns false. */
struct cursor {
    const char *prefix; /* of the default topics */
    const char *id;
    const char *at; /* NULL before the default topics, and after the last filter */
    struct filter filter;
    char text[MAX_FILTER_BYTES];
};

static void begin_filters(
    struct cursor *cursor, const struct registry *registry, const struct identity *identity, const char *id)
{
    cursor->prefix = prefix_of(registry, identity);
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
        size_t used = strlen(cursor->prefix), id_length = strlen(cursor->id);
        memcpy(cursor->text, cursor->prefix, used);
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
static bool is_default_topic(const char *prefix, const char *id, const char *topic)
{
    size_t length = strlen(prefix);

    if (strncmp(topic, prefix, length) != 0 || topic[length] != '/') {
        return false;
    }
    topic += length + 1;
    length = strlen(id);
    return strncmp(topic, id, length) == 0 && (topic[length] == '/' || topic[length] == '\0');
}

/* A prefix may have any number of levels: each level after the first is looked at as if it were the identity. */
bool registry_is_of_denied(const struct registry *registry, const char *topic)
{
    for (const char *slash = strchr(topic, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        const struct identity *identity;
        size_t length = strcspn(slash + 1, "/");
        char id[MAX_ID_BYTES + 1];
        if (length > MAX_ID_BYTES) {
            continue;
        }
        memcpy(id, slash + 1, length);
        id[length] = '\0';
        identity = is_id(id) ? registry_find(registry, id) : NULL;
        if (identity != NULL && identity->standing == DENIED &&
            is_default_topic(prefix_of(registry, identity), id, topic)) {
            return true;
        }
    }
    return false;
}

bool registry_may(const struct registry *registry, const struct identity *identity, const char *id, enum access access,
    const char *topic)
{
    struct cursor *cursor = &scratch[0];

    if (registry_standing_of(registry, identity) != ALLOWED || has_wildcard(topic)) {
        return false;
    }
    if (identity->filters == DEFAULT_TOPICS) {
        return is_default_topic(prefix_of(registry, identity), id, topic);
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

    if (identity == NULL || identity->standing != ALLOWED || !filter_is_valid(filter)) {
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

/* Return the identity as one of the tenant, added if need be. One that is allowed is never another tenant's. */
static enum outcome find_or_add_of(
    struct registry *registry, const char *id, const char *tenant, struct identity **identity)
{
    uint16_t number;

    if (!is_id(id) || !tenants_find(&registry->tenants, tenant, &number)) {
        return REFUSED;
    }
    *identity = find_or_add(registry, id);
    if (*identity == NULL) {
        return NO_MEMORY;
    }
    if ((*identity)->standing == ALLOWED && (*identity)->tenant != number) {
        return REFUSED;
    }
    (*identity)->tenant = number;
    return DONE;
}

enum outcome registry_allow(
    struct registry *registry, const char *id, const char *tenant, const struct filter *filters, size_t count)
{
    struct identity *identity, before;
    uint32_t position;
    enum outcome outcome;

    note_change(registry);
    for (size_t i = 0; i < count; i++) {
        if (count > MAX_FILTERS || !is_acceptable(&filters[i])) {
            return REFUSED;
        }
    }
    outcome = find_or_add_of(registry, id, tenant, &identity);
    if (outcome != DONE) {
        return outcome;
    }
    before = *identity;
    position = registry->arena_used;
    for (size_t i = 0; i < count; i++) {
        if (!store_filter(registry, id, &filters[i])) {
            return NO_MEMORY;
        }
    }
    if (count > 0) {
        registry->arena[registry->arena_used++] = NO_ACCESS;
    }
    identity->filters = count > 0 ? position : DEFAULT_TOPICS;
    identity->standing = ALLOWED;
    return lost_rights(registry, &before, registry, identity, id) ? RIGHTS_LOST : DONE;
}

static enum outcome take_rights(struct identity *identity, enum standing standing)
{
    identity->filters = DEFAULT_TOPICS;
    identity->standing = (uint8_t)standing;
    return RIGHTS_LOST;
}

enum outcome registry_deny(struct registry *registry, const char *id, const char *tenant)
{
    const struct identity *known = registry_find(registry, id);
    struct identity *identity;
    enum outcome outcome;

    note_change(registry);
    if (tenant == NULL && known != NULL) {
        tenant = registry->tenants.list[known->tenant].name;
    }
    outcome = find_or_add_of(registry, id, tenant, &identity);
    return outcome == DONE ? take_rights(identity, DENIED) : outcome;
}

enum outcome registry_forget(struct registry *registry, const char *id)
{
    struct identity *identity;

    note_change(registry);
    if (!is_id(id)) {
        return REFUSED;
    }
    identity = find_or_add(registry, id);
    return identity == NULL ? NO_MEMORY : take_rights(identity, FORGOTTEN);
}

enum outcome registry_set_prefix(struct registry *registry, const char *prefix)
{
    note_change(registry);
    if (registry->count > 0 || registry->has_prefix) {
        return REFUSED;
    }
    registry->has_prefix = true;
    return tenants_set_first_prefix(&registry->tenants, prefix);
}

enum outcome registry_add_tenant(struct registry *registry, const char *name, const char *prefix)
{
    note_change(registry);
    return tenants_add(&registry->tenants, name, prefix);
}

enum outcome registry_suspend_tenant(struct registry *registry, const char *name)
{
    note_change(registry);
    return tenants_suspend(&registry->tenants, name) ? TENANT_SUSPENDED : REFUSED;
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

enum outcome registry_add_issuer(struct registry *registry, const uint8_t hash[HASH_BYTES], const char *tenant)
{
    uint16_t number;

    note_change(registry);
    return tenants_find(&registry->tenants, tenant, &number) ? issuers_add(&registry->issuers, hash, number)
                                                             : REFUSED;
}

bool registry_find_issuer(const struct registry *registry, const uint8_t hash[HASH_BYTES], uint16_t *tenant)
{
    return issuers_find(&registry->issuers, hash, tenant);
}

enum outcome registry_add_serial(
    struct registry *registry, const uint8_t issuer[HASH_BYTES], const struct serial_number *serial)
{
    enum outcome outcome;

    note_change(registry);
    outcome = issuers_add_serial(&registry->issuers, issuer, serial);
    return outcome == DONE ? SERIAL_REVOKED : outcome;
}

enum outcome registry_remove_serial(
    struct registry *registry, const uint8_t issuer[HASH_BYTES], const struct serial_number *serial)
{
    note_change(registry);
    issuers_remove_serial(&registry->issuers, issuer, serial);
    return DONE;
}

bool registry_has_serial(
    const struct registry *registry, const uint8_t issuer[HASH_BYTES], const struct serial_number *serial)
{
    return issuers_has_serial(&registry->issuers, issuer, serial);
}
