/* Who is to be disconnected. The broker's own structures are in use while it calls a plugin for a client, so that
 * nobody may be kicked from a callback of its own: kicks wait for the tick, or for the portal's question. */
#ifndef GUARD_KICKS_H
#define GUARD_KICKS_H

#include <stdbool.h>

/* Have all connections with this username ended. */
void kicks_add(const char *username);

/* End them, except those of `except`, the username of the client for which the broker has called; NULL on the tick. */
void kicks_flush(const char *except);

/* Have all connections with this username ended, with many others: some at each tick, as the broker goes through all its
 * connections for each name. */
void kicks_add_many(const char *username);

/* End some of them, as the broker ticks, those that `is_due` still says. */
void kicks_flush_many(bool (*is_due)(const char *username));

/* Say whether a kick is going on. The broker (2.0.11 in Debian, and later) then asks whether a stored session may keep
 * each of its subscriptions. */
bool kicks_going_on(void);
void kicks_clear(void);

#endif
