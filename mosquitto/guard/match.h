/* MQTT topic filters (MQTT 5.0 section 4.7) as pure functions of strings. */
#ifndef GUARD_MATCH_H
#define GUARD_MATCH_H

#include <stdbool.h>
#include <stddef.h>

#define MAX_TOPIC_BYTES 65535
#define MAX_TOPIC_LEVELS 200 /* the broker's own limit */

/* Say whether `filter` is well-formed: UTF-8 without control characters, wildcards alone in their level, `#` last. */
bool filter_is_valid(const char *filter);

/* Say whether `topic` has a wildcard, which a topic name must not have. */
bool has_wildcard(const char *topic);

/* Say whether `filter` matches the topic name `topic`. Both are well-formed. */
bool filter_matches(const char *filter, const char *topic);

/* Say whether there can be a topic that both filters match. */
bool filters_intersect(const char *one, const char *other);

/* Say whether every topic that `narrow` matches is matched by `wide`, too. */
bool filter_contains(const char *wide, const char *narrow);

#endif
