/* The few functions of libcrypto that are used, declared here so that its headers are not needed to build. The broker
 * has loaded the library; each of these has had this form since OpenSSL 1.1.1d. */
#ifndef GUARD_OPENSSL_H
#define GUARD_OPENSSL_H

#include <stddef.h>

typedef struct x509_st X509;
typedef struct X509_name_st X509_NAME;
typedef struct X509_name_entry_st X509_NAME_ENTRY;
typedef struct asn1_string_st ASN1_STRING;
typedef struct stack_st_GENERAL_NAME GENERAL_NAMES;

enum { NID_COMMON_NAME = 13, TYPE_INTEGER = 2 }; /* NID_commonName; V_ASN1_INTEGER of a number that is not negative */

void X509_free(X509 *certificate);
X509_NAME *X509_get_issuer_name(const X509 *certificate);
X509_NAME *X509_get_subject_name(const X509 *certificate);
const ASN1_STRING *X509_get0_serialNumber(const X509 *certificate);
const ASN1_STRING *X509_get0_authority_key_id(X509 *certificate);
const ASN1_STRING *X509_get0_authority_serial(X509 *certificate);
const GENERAL_NAMES *X509_get0_authority_issuer(X509 *certificate);
int X509_NAME_get0_der(const X509_NAME *name, const unsigned char **der, size_t *length);
int X509_NAME_get_index_by_NID(const X509_NAME *name, int nid, int after);
X509_NAME_ENTRY *X509_NAME_get_entry(const X509_NAME *name, int index);
ASN1_STRING *X509_NAME_ENTRY_get_data(const X509_NAME_ENTRY *entry);
int ASN1_STRING_type(const ASN1_STRING *string);
int ASN1_STRING_length(const ASN1_STRING *string);
const unsigned char *ASN1_STRING_get0_data(const ASN1_STRING *string);
unsigned char *SHA256(const unsigned char *data, size_t length, unsigned char *digest);

#endif
