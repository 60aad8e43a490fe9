/* The connections that the guard has seen, by the broker's pointer: from their first check until they end. */
#ifndef GUARD_CLIENTS_H
#define GUARD_CLIENTS_H

#include "certificate.h"

#include <stdbool.h>
#include <stddef.h>

enum client_kind {
    PLAIN,  /* has sent CONNECT on a listener where passwords count, with no certificate */
    PORTAL, /* the same, and is the portal */
    DEVICE, /* has a certificate of a portal CA */
};

struct client {
    const void *key;
    char *name; /* its identity; NULL unless it is a DEVICE */
    enum client_kind kind;
    bool admitted;                  /* a DEVICE that was allowed when it was checked */
    bool doomed;                    /* it is to be kicked */
    struct certificate certificate; /* of a DEVICE, as last seen */
    void *x509;                     /* the same; held, so that no other certificate can have this address */
    uint64_t stamp;                 /* of the registry by which it was admitted; 0 if it was not */
    const struct identity *identity; /* valid while that registry has the stamp */
};

struct client *clients_find(const void *key);

/* Return the client, which is added if need be; NULL if there is no memory. */
struct client *clients_note(const void *key, enum client_kind kind, const char *name);

/* Keep the certificate that the client shows, which is given up, in place of the one before. */
void clients_keep_certificate(struct client *client, void *x509);
void clients_remove(const void *key);

/* Return the next client after position `*at`, which begins at 0; NULL after the last one. */
struct client *clients_next(size_t *at);
void clients_clear(void);

#endif
