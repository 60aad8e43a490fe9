#include "portal.h"

#include "broker.h"
#include "guard.h"
#include "line.h"
#include "log.h"
#include "match.h"
#include "presence.h"
#include "verdict.h"

#include <string.h>

#define MAX_QUESTION_BYTES 128
#define MAX_CLEARED 10000 /* retained messages by one SUBSCRIBE */

static bool answer_prove(struct mosquitto *client, char *first, char *second)
{
    uint64_t epoch, sequence;

    (void)client;
    return second != NULL && parse_number(first, &epoch) && parse_number(second, &sequence) &&
           guard_prove(epoch, sequence);
}

static bool answer_epoch(struct mosquitto *client, char *first, char *second)
{
    uint64_t epoch;

    (void)client;
    return second == NULL && parse_number(first, &epoch) && guard_confirm(epoch);
}

static bool answer_identify(struct mosquitto *client, char *first, char *second)
{
    (void)client;
    guard_look(true);
    return second == NULL && is_id(first) && guard_is_good() && registry_standing(guard_registry(), first) == ALLOWED;
}

static bool answer_version(struct mosquitto *client, char *first, char *second)
{
    uint64_t version;

    (void)client;
    return second == NULL && parse_number(first, &version) && version >= OLDEST_VERSION && version <= GUARD_VERSION;
}

static bool answer_report(struct mosquitto *client, char *first, char *second)
{
    const char *id = mosquitto_client_id(client);

    (void)second;
    return *first == '\0' && id != NULL && presence_report(client, id, guard_epoch(), guard_sequence());
}

static bool answer_more(struct mosquitto *client, char *first, char *second)
{
    (void)second;
    return *first == '\0' && presence_more(client);
}

/* The question `refused` is not here: its answer is no, as that of any other. */
static const struct {
    const char *word;
    bool (*answer)(struct mosquitto *client, char *first, char *second);
} questions[] = {
    {"prove", answer_prove},
    {"epoch", answer_epoch},
    {"identify", answer_identify},
    {"version", answer_version},
    {"report", answer_report},
    {"more", answer_more},
};

static bool answer(struct mosquitto *client, const char *topic)
{
    char question[MAX_QUESTION_BYTES], *first, *second;

    topic += strlen(PORTAL_TOPICS) - 1; /* what is below portal/guard/ */
    if (strlen(topic) >= sizeof question) {
        return false;
    }
    strcpy(question, topic);
    first = question + strcspn(question, "/");
    if (*first != '\0') {
        *first++ = '\0';
    }
    second = strchr(first, '/');
    if (second != NULL) {
        *second++ = '\0';
    }
    for (size_t i = 0; i < sizeof questions / sizeof *questions; i++) {
        if (strcmp(question, questions[i].word) == 0) {
            return questions[i].answer(client, first, second);
        }
    }
    guard_look(true);
    return false;
}

/* Say whether a topic or filter is below the default topics of an identity that is denied everything. */
static bool is_of_denied(const char *topic)
{
    return guard_is_good() && registry_is_of_denied(guard_registry(), topic);
}

static struct {
    unsigned cleared;
    bool ended; /* nothing more is cleared until the next SUBSCRIBE */
} clearing;

/* Say whether the portal may subscribe to what is of a denied identity, by which its retained messages are cleared. */
static bool begin_clearing(const char *filter)
{
    clearing.cleared = 0;
    clearing.ended = false;
    return is_of_denied(filter);
}

/* Have the broker drop the retained message of a topic, once it has gone through those that it is showing now. Each is
 * copied until then, so there is a most; what is left is withheld, as its sender may not publish. */
static void clear_retained(const char *topic)
{
    if (clearing.cleared == MAX_CLEARED) {
        log_error("%u retained messages are cleared, the one of %s and others are left: they are withheld.", MAX_CLEARED,
            topic);
        clearing.ended = true;
    } else if (mosquitto_broker_publish_copy(NULL, topic, 0, NULL, 0, true, NULL) != MOSQ_ERR_SUCCESS) {
        log_error("There is no memory to clear the retained message of %s and others: they are withheld.", topic);
        clearing.ended = true;
    } else {
        clearing.cleared++;
    }
}

bool portal_may(const struct mosquitto_evt_acl_check *check)
{
    const char *topic = check->topic;

    switch (check->access) {
    case MOSQ_ACL_WRITE:
        return strncmp(topic, PORTAL_TOPICS, strlen(PORTAL_TOPICS) - 1) == 0 && answer(check->client, topic);
    case MOSQ_ACL_READ:
        if (!clearing.ended && check->retain && check->payloadlen > 0 && is_of_denied(topic)) {
            clear_retained(topic); /* an empty one, for which this is not done again; the portal reads neither */
        }
        return filter_matches(PORTAL_TOPICS, topic);
    case MOSQ_ACL_SUBSCRIBE:
        return filter_contains(PORTAL_TOPICS, topic) || begin_clearing(topic);
    default:
        return check->access == MOSQ_ACL_UNSUBSCRIBE;
    }
}
