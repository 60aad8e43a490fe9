/* Tells the portal which identities are connected. */
#ifndef GUARD_PRESENCE_H
#define GUARD_PRESENCE_H

#include <stdbool.h>
#include <stdint.h>

#define CLIENTS_TOPIC "portal/guard/clients"
#define PRESENCE_TOPIC "portal/guard/presence"
#define PAGE_MESSAGES 16 /* of up to 200 KB: 3 MB, of the 8 MB that mosquitto/portal.conf lets a client's queue have */

/* Note a connection of an identity, or its end. */
void presence_connected(const char *identity);
void presence_disconnected(const char *identity);

/* Send all connected identities to the client of this id, and changes from now on. `key` is its connection, which
 * presence_ended compares. Returns false if there is no memory. What would be more than PAGE_MESSAGES is sent when it
 * asks: the broker drops what a client's queue has no room for (max_queued_bytes). */
bool presence_report(const void *key, const char *client_id, uint64_t epoch, uint64_t sequence);

/* Send the next part of them to the client that has asked; false if there is none, or no memory. */
bool presence_more(const void *key);

/* Note that a connection has ended: if it was the one that asked, nothing more is sent to it. */
void presence_ended(const void *key);

/* Say whether changes are sent to this client id. */
bool presence_is_recipient(const char *client_id);

/* Send what has changed since the last time. */
void presence_flush(void);
void presence_clear(void);

#endif
