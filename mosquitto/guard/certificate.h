/* What counts in a client's certificate: the issuer and its key, the serial number, the common name. */
#ifndef GUARD_CERTIFICATE_H
#define GUARD_CERTIFICATE_H

#include "registry.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct certificate {
    uint8_t issuer[HASH_BYTES]; /* SHA-256 of the DER of its issuer's name */
    uint8_t key[HASH_BYTES];    /* SHA-256 of `issuer` and the SHA-256 of its issuer's key identifier */
    bool has_key;               /* false if it has none, or names its issuer in another way, too */
    struct serial_number serial;
    bool has_serial; /* false if the number is negative or longer than RFC 5280 section 4.1.2.2 allows */
    bool named;      /* whether its first common name is the username that was compared */
};

enum reading { NO_CERTIFICATE, CERTIFICATE, BAD_CERTIFICATE };

/* Read a certificate as mosquitto_client_certificate returns it; it is not freed. */
enum reading certificate_read(void *x509, const char *username, struct certificate *into);

/* Say whether a certificate whose issuer's name is that of a CA of the tenant is also for that CA's key, or whether the
 * journal, being one of before, does not say which key that is: it always says it of another tenant than the first. */
bool certificate_is_for_key(const struct certificate *certificate, const struct registry *registry, uint16_t tenant);

/* Write the SHA-256 of a text. */
void sha256_of(const char *text, size_t length, uint8_t hash[HASH_BYTES]);

#endif
