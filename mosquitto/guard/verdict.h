/* Who a client is, and what it may do. README.md, "Whom it decides for", has the rules. */
#ifndef GUARD_VERDICT_H
#define GUARD_VERDICT_H

#include "broker.h"
#include "limits.h"
#include "registry.h"

#include <stdbool.h>

#define PORTAL_USER "portal"
#define PORTAL_TOPICS "portal/guard/#"

enum verdict {
    GRANTED,
    NOT_GRANTED,
    NOT_OURS,
    ENDED, /* not granted, and the connection is to be ended at once, without an answer */
};

/* Decide a check of the broker's for a client that is not the portal. */
enum verdict verdict_of(struct mosquitto *client, int access, const char *topic);

/* Return what a filter costs that this client was granted. */
enum cost verdict_cost(const struct mosquitto *client, const char *filter);

/* Decide a CONNECT where passwords count. */
enum verdict verdict_of_password(struct mosquitto *client, const char *username, const char *password);

/* Decide a CONNECT with an authentication method of another plugin: NOT_GRANTED or NOT_OURS. */
enum verdict verdict_of_method(struct mosquitto *client);

/* Note that a client has connected, where the broker says so. */
void verdict_connected(struct mosquitto *client);

/* Note that a connection ends; its certificate can still be read. */
void verdict_ended(struct mosquitto *client);

/* Say whether this connection is the portal's. */
bool is_portal(const struct mosquitto *client);

/* Kick the connected clients that may do less by `now` than by `before`. */
void verdict_replaced(const struct registry *before, const struct registry *now);

/* Have a client kicked after a line of the journal. */
void verdict_lost(const char *id, enum outcome outcome);

/* Find the connections whose certificates were revoked, or whose tenants were suspended, by the last lines. */
void verdict_settle(void);

/* Say whether the tenant of an identity is suspended, and nothing else keeps it out. */
bool verdict_is_suspended(const char *id);
void verdict_clear(void);

#endif
