/* What counts in a client's certificate: the issuer, the serial number, the common name. */
#ifndef GUARD_CERTIFICATE_H
#define GUARD_CERTIFICATE_H

#include "registry.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct certificate {
    uint8_t issuer[HASH_BYTES]; /* SHA-256 of the DER of its issuer's name */
    struct serial_number serial;
    bool has_serial; /* false if the number is negative or longer than RFC 5280 section 4.1.2.2 allows */
    bool named;      /* whether its first common name is the username that was compared */
};

enum reading { NO_CERTIFICATE, CERTIFICATE, BAD_CERTIFICATE };

/* Read a certificate as mosquitto_client_certificate returns it; it is not freed. */
enum reading certificate_read(void *x509, const char *username, struct certificate *into);

/* Write the SHA-256 of a text. */
void sha256_of(const char *text, size_t length, uint8_t hash[HASH_BYTES]);

#endif
