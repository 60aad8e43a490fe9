/* What one identity may ask of the broker that Mosquitto does not limit: how much its SUBSCRIBEs have it search, and how many
 * retained messages it leaves. Both are counted in memory, by identity, so a new connection does not begin anew. */
#ifndef GUARD_LIMITS_H
#define GUARD_LIMITS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DEFAULT_MAX_RETAINED 10000 /* topics of one identity */
#define SUBSCRIBE_SECONDS 30       /* in which an identity may spend SUBSCRIBE_BUDGET */
#define SUBSCRIBE_BUDGET 256u
#define RETAINED_A_POINT 400u /* so many retained messages of its own make a wildcard cost a point more */

/* What a filter costs: by how many topics the broker has to go through for retained messages. */
enum cost {
    ONE_TOPIC = 1,    /* it has no wildcard, or is of a shared subscription, for which there are none */
    OWN_TOPICS = 4,   /* a wildcard, and it matches only what the identity may read */
    OTHER_TOPICS = 64 /* it matches others, too, which the broker finds and then asks about one by one */
};

/* Take the cost of a filter from the identity's budget, at `now`, in seconds of a clock that never goes back; false if
 * there is too little left, or no memory. A wildcard costs more the more retained messages the identity has left: all are
 * handed to it. */
bool limits_subscribe(const char *id, enum cost cost, int64_t now);

/* Set how many topics of one identity may have a retained message. */
void limits_set_retained(size_t most);

/* Note that the identity leaves a retained message at a topic, told by a hash of identity and topic; false if it is one too
 * many, or there is no memory. Another one at the same topic takes its place. */
bool limits_retain(const char *id, uint64_t topic);

/* Note that the identity has cleared the retained message that it left there. */
void limits_clear_retained(const char *id, uint64_t topic);
void limits_clear(void);

#endif
