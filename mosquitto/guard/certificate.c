#include "certificate.h"

#include "openssl.h"

#include <string.h>

/* An issuer's name is the same for thousands of clients: its hash is remembered by its bytes. */
#define REMEMBERED 16
#define MAX_REMEMBERED_BYTES 512

static struct {
    size_t length;
    uint8_t der[MAX_REMEMBERED_BYTES];
    uint8_t hash[HASH_BYTES];
} remembered[REMEMBERED];
static unsigned next_to_replace;

void sha256_of(const char *text, size_t length, uint8_t hash[HASH_BYTES])
{
    SHA256((const unsigned char *)text, length, hash);
}

static void hash_name(const uint8_t *der, size_t length, uint8_t hash[HASH_BYTES])
{
    for (unsigned i = 0; i < REMEMBERED; i++) {
        if (remembered[i].length == length && memcmp(remembered[i].der, der, length) == 0) {
            memcpy(hash, remembered[i].hash, HASH_BYTES);
            return;
        }
    }
    SHA256(der, length, hash);
    if (length <= MAX_REMEMBERED_BYTES) {
        unsigned i = next_to_replace++ % REMEMBERED;
        remembered[i].length = length;
        memcpy(remembered[i].der, der, length);
        memcpy(remembered[i].hash, hash, HASH_BYTES);
    }
}

static bool read_issuer(const X509 *x509, struct certificate *into)
{
    const X509_NAME *name = X509_get_issuer_name(x509);
    const unsigned char *der = NULL;
    size_t length = 0;

    if (name == NULL || X509_NAME_get0_der(name, &der, &length) != 1 || der == NULL || length == 0) {
        return false;
    }
    hash_name(der, length, into->issuer);
    return true;
}

/* Read which key of its issuer it names (RFC 5280 section 4.2.1.1). With a serial number or a name of its issuer's
 * certificate, which the portal's CAs never put there, TLS could have taken another CA of the same key identifier. */
static bool read_key(X509 *x509, struct certificate *into)
{
    const ASN1_STRING *identifier = X509_get0_authority_key_id(x509);
    uint8_t both[2 * HASH_BYTES];

    if (identifier == NULL || X509_get0_authority_serial(x509) != NULL || X509_get0_authority_issuer(x509) != NULL) {
        return false;
    }
    memcpy(both, into->issuer, HASH_BYTES);
    SHA256(ASN1_STRING_get0_data(identifier), (size_t)ASN1_STRING_length(identifier), both + HASH_BYTES);
    SHA256(both, sizeof both, into->key);
    return true;
}

bool certificate_is_for_key(const struct certificate *certificate, const struct registry *registry, uint16_t tenant)
{
    uint8_t mark[HASH_BYTES];
    uint16_t of_mark, of_key;

    SHA256(certificate->issuer, HASH_BYTES, mark);
    if (tenant == FIRST_TENANT && !registry_find_issuer(registry, mark, &of_mark)) {
        return true;
    }
    return certificate->has_key && registry_find_issuer(registry, certificate->key, &of_key) && of_key == tenant;
}

static bool read_serial(const X509 *x509, struct certificate *into)
{
    const ASN1_STRING *number = X509_get0_serialNumber(x509);
    const uint8_t *bytes;
    int length;

    if (number == NULL || ASN1_STRING_type(number) != TYPE_INTEGER) {
        return false;
    }
    bytes = ASN1_STRING_get0_data(number);
    length = ASN1_STRING_length(number);
    for (; length > 0 && *bytes == 0; length--, bytes++) {
    }
    if (bytes == NULL || length > MAX_SERIAL_BYTES) {
        return false;
    }
    into->serial.length = (uint8_t)length;
    memcpy(into->serial.bytes, bytes, (size_t)length);
    return true;
}

/* Say whether the first common name is exactly `username`: the same that use_identity_as_username takes. */
static bool is_named(const X509 *x509, const char *username)
{
    const X509_NAME *subject = X509_get_subject_name(x509);
    int index = subject == NULL ? -1 : X509_NAME_get_index_by_NID(subject, NID_COMMON_NAME, -1);
    const X509_NAME_ENTRY *entry = index < 0 ? NULL : X509_NAME_get_entry(subject, index);
    const ASN1_STRING *name = entry == NULL ? NULL : X509_NAME_ENTRY_get_data(entry);
    size_t length;

    if (name == NULL || username == NULL) {
        return false;
    }
    length = strlen(username);
    return length > 0 && ASN1_STRING_length(name) == (int)length &&
           memcmp(ASN1_STRING_get0_data(name), username, length) == 0;
}

enum reading certificate_read(void *x509, const char *username, struct certificate *into)
{
    bool good;

    if (x509 == NULL) {
        return NO_CERTIFICATE;
    }
    memset(into, 0, sizeof *into);
    good = read_issuer(x509, into);
    if (good) {
        into->has_key = read_key(x509, into);
        into->has_serial = read_serial(x509, into);
        into->named = is_named(x509, username);
    }
    return good ? CERTIFICATE : BAD_CERTIFICATE;
}
