/* What a journal says, in memory: identities with their topics, tenants, serial numbers, issuers, the portal's password.
 *
 * Made for a million identities: an identity is 24 bytes in an open hash table, a UUID being 16 of them; own topic
 * filters are in one arena, in which the identity itself takes one byte. Default topics take no memory. */
#ifndef GUARD_REGISTRY_H
#define GUARD_REGISTRY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "issuers.h"
#include "outcome.h"
#include "tenants.h"

#define MAX_ID_BYTES 64
#define MAX_FILTERS 64 /* of one identity */
#define MAX_FILTER_BYTES 32768

/* How an identity stands. One of a tenant that is suspended is ALLOWED again once that is not. */
enum standing { UNKNOWN, ALLOWED, DENIED, FORGOTTEN, SUSPENDED };

enum access { NO_ACCESS = 0, READ = 1, WRITE = 2, READ_WRITE = 3 };

struct filter {
    enum access access;
    const char *text; /* well-formed, its first level no wildcard and not beginning with `$` */
};

struct registry;
struct identity;

/* Return an empty registry, NULL if there is no memory. */
struct registry *registry_new(void);
void registry_free(struct registry *registry);

/* Say whether `id` is an identity's name: 1 to 64 of A-Z a-z 0-9 . _ - */
bool is_id(const char *id);

/* Say whether `name` has the form of a UUID, in lower or upper case. */
bool is_uuid(const char *name);

/* Change what is known, each a line of the journal. `tenant` is a name, NULL for the first one: an unknown one is refused,
 * and an identity that is allowed, or an issuer, is never another tenant's than before. */
enum outcome registry_set_portal(struct registry *registry, const uint8_t hash[HASH_BYTES]);
enum outcome registry_set_prefix(struct registry *registry, const char *prefix);
enum outcome registry_add_tenant(struct registry *registry, const char *name, const char *prefix);
enum outcome registry_suspend_tenant(struct registry *registry, const char *name);
enum outcome registry_add_issuer(struct registry *registry, const uint8_t hash[HASH_BYTES], const char *tenant);
enum outcome registry_allow(
    struct registry *registry, const char *id, const char *tenant, const struct filter *filters, size_t count);
enum outcome registry_deny(struct registry *registry, const char *id, const char *tenant);
enum outcome registry_forget(struct registry *registry, const char *id);
enum outcome registry_add_serial(
    struct registry *registry, const uint8_t issuer[HASH_BYTES], const struct serial_number *serial);
enum outcome registry_remove_serial(
    struct registry *registry, const uint8_t issuer[HASH_BYTES], const struct serial_number *serial);

/* Ask. The hash of the portal's password is NULL if there is none. */
const uint8_t *registry_portal(const struct registry *registry);
bool registry_find_issuer(const struct registry *registry, const uint8_t hash[HASH_BYTES], uint16_t *tenant);
bool registry_has_serial(
    const struct registry *registry, const uint8_t issuer[HASH_BYTES], const struct serial_number *serial);

/* Return a number that no other registry has, and this one only until its next change. */
uint64_t registry_stamp(const struct registry *registry);
size_t registry_count(const struct registry *registry);

/* Return what is known of an identity, valid until the registry changes; NULL if that is nothing. */
const struct identity *registry_find(const struct registry *registry, const char *id);

/* Return how an identity stands: UNKNOWN if it is NULL. */
enum standing registry_standing_of(const struct registry *registry, const struct identity *identity);
enum standing registry_standing(const struct registry *registry, const char *id);

/* Return the number of an identity's tenant. */
uint16_t registry_tenant_of(const struct identity *identity);

/* Say whether an identity, found under the name `id`, may publish to, or receive from, a topic. */
bool registry_may(const struct registry *registry, const struct identity *identity, const char *id, enum access access,
    const char *topic);

/* Say whether a topic or filter is PREFIX/<identity>, or below it, of an identity that is DENIED. PREFIX is its tenant's. */
bool registry_is_of_denied(const struct registry *registry, const char *topic);

/* Say whether some topic that the filter matches can be read by the identity, or could while its tenant is not suspended. */
bool registry_may_subscribe(
    const struct registry *registry, const struct identity *identity, const char *id, const char *filter);

/* Say the same of every topic that the filter matches, by one of its filters. */
bool registry_may_share(
    const struct registry *registry, const struct identity *identity, const char *id, const char *filter);

/* Say whether the identity may do less by `now` than by `before`. */
bool registry_lost_rights(const struct registry *before, const struct registry *now, const char *id);

#endif
