/* The issuers of certificates in a journal, by hashes, each of a tenant; and the serial numbers that are revoked. */
#ifndef GUARD_ISSUERS_H
#define GUARD_ISSUERS_H

#include "hashing.h"
#include "outcome.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HASH_BYTES 32        /* of SHA-256 */
#define MAX_SERIAL_BYTES 20  /* RFC 5280 section 4.1.2.2 */
#define MAX_ISSUERS 65536u   /* hashes: of 4,096 tenants with 5 CAs each, three hashes a CA */

struct serial_number {
    uint8_t length;
    uint8_t bytes[MAX_SERIAL_BYTES]; /* big-endian, without leading zeros */
};

struct issuer {
    uint8_t hash[HASH_BYTES];
    uint16_t tenant;
    bool ours; /* false if it is known from a serial number only */
};

struct serial;

struct issuers {
    struct issuer *list;
    uint32_t *slots; /* positions in the list plus one, by the hash; 0 where free */
    uint32_t count, list_capacity, slot_capacity;
    struct serial *serials;
    uint32_t serial_count, serial_capacity;
    const struct seed *seed;
};

/* Begin with none; false if there is no memory. `seed` is kept. */
bool issuers_begin(struct issuers *issuers, const struct seed *seed);
void issuers_end(struct issuers *issuers);

/* Make a hash that of an issuer of the tenant; refused if it is another tenant's, or one too many. */
enum outcome issuers_add(struct issuers *issuers, const uint8_t hash[HASH_BYTES], uint16_t tenant);

/* Find whose issuer a hash is; false if it is none. */
bool issuers_find(const struct issuers *issuers, const uint8_t hash[HASH_BYTES], uint16_t *tenant);

/* Note that a certificate is revoked, or that it is not. */
enum outcome issuers_add_serial(
    struct issuers *issuers, const uint8_t issuer[HASH_BYTES], const struct serial_number *serial);
void issuers_remove_serial(
    struct issuers *issuers, const uint8_t issuer[HASH_BYTES], const struct serial_number *serial);
bool issuers_has_serial(
    const struct issuers *issuers, const uint8_t issuer[HASH_BYTES], const struct serial_number *serial);

#endif
