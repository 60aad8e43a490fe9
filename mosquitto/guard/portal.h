/* What the portal asks, by publishing below portal/guard/: the reason code of PUBACK is the answer. */
#ifndef GUARD_PORTAL_H
#define GUARD_PORTAL_H

#include "broker.h"

#include <stdbool.h>

#define GUARD_VERSION 4  /* of the protocol with the portal; raised with each change of it */
#define OLDEST_VERSION 2 /* the first one that this one includes: a portal that asks for it is answered as before */

/* Decide a check of the broker's for the portal's own connection. */
bool portal_may(const struct mosquitto_evt_acl_check *check);

#endif
