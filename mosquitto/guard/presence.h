/* Tells the portal which identities are connected. */
#ifndef GUARD_PRESENCE_H
#define GUARD_PRESENCE_H

#include <stdbool.h>
#include <stdint.h>

#define CLIENTS_TOPIC "portal/guard/clients"
#define PRESENCE_TOPIC "portal/guard/presence"

/* Note a connection of an identity, or its end. */
void presence_connected(const char *identity);
void presence_disconnected(const char *identity);

/* Send all connected identities to the client of this id, and changes from now on. `key` is its connection, which
 * presence_ended compares. Returns false if there is no memory. */
bool presence_report(const void *key, const char *client_id, uint64_t epoch, uint64_t sequence);

/* Note that a connection has ended: if it was the one that asked, nothing more is sent to it. */
void presence_ended(const void *key);

/* Say whether changes are sent to this client id. */
bool presence_is_recipient(const char *client_id);

/* Send what has changed since the last time. */
void presence_flush(void);
void presence_clear(void);

#endif
