/* The entry points that the broker calls. */
#include "broker.h"
#include "certificate.h"
#include "clients.h"
#include "guard.h"
#include "kicks.h"
#include "limits.h"
#include "line.h"
#include "log.h"
#include "match.h"
#include "portal.h"
#include "presence.h"
#include "verdict.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PLUGIN_API 5
#define LOOK_MILLISECONDS 50   /* the broker ticks each time that something happens; the journal is looked at less often */
#define TICK_MILLISECONDS 100
#define HEADROOM_BYTES (16 << 20)
#define SILENT_MILLISECONDS 1000 /* without a tick, after which a check looks at the journal itself */

/* When the next tick is wanted: a member that 2.0 does not heed, and that 2.1 has renamed, in milliseconds. */
#if LIBMOSQUITTO_VERSION_NUMBER >= 2001000
#define NEXT_TICK next_ms
#else
#define NEXT_TICK next_ns
#endif

/* Events of Mosquitto 2.1, by number, so that a plugin that was built on 2.0 has them, too. What they hand over begins as
 * struct mosquitto_evt_disconnect. */
enum { EVENT_CONNECT = 11, EVENT_CLIENT_OFFLINE = 28 };

/* By these the portal's doctor knows the version of the file, and that it compares more than the names of CAs. */
#define TEXT_OF(number) #number
#define PROTOCOL(number) "portal-guard protocol " TEXT_OF(number)
__attribute__((used)) static const char protocol[] = PROTOCOL(GUARD_VERSION);
__attribute__((used)) static const char compares_keys[] = "portal-guard compares keys of CAs";

static mosquitto_plugin_id_t *identifier; /* NULL while the plugin is not loaded */
static char *journal_path;
static int64_t last_look; /* milliseconds */

static int64_t milliseconds_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Look at the journal if it was not looked at for so long; say whether. */
static bool look_after(int64_t milliseconds)
{
    int64_t now = milliseconds_now();

    if (now - last_look < milliseconds) {
        return false;
    }
    last_look = now;
    guard_look(false);
    return true;
}

/* End who is to be ended, except connections of `except`. While nothing is believed, sessions stay as they are. */
static void kick(const char *except)
{
    if (guard_is_good()) {
        verdict_settle();
        kicks_flush(except);
    }
}

static void tell_state(bool good, const char *what)
{
    if (good) {
        log_notice("%s", what);
    } else {
        log_error("%s", what);
    }
}

/* --- Events ----------------------------------------------------------------------------------------------------- */

/* Say whether the broker has room for another retained message below its memory_limit, which it would not let grow, but
 * from which it could not start again: its database takes 1 % more to be read than it takes in memory. */
static bool has_headroom(void)
{
    void *room = mosquitto_malloc(HEADROOM_BYTES);

    mosquitto_free(room);
    return room != NULL;
}

/* Return a hash of an identity and a topic by which nobody can make two topics look like one. */
static uint64_t hash_of(const char *id, const char *topic)
{
    static char text[MAX_ID_BYTES + MAX_TOPIC_BYTES + 2];
    uint8_t hash[HASH_BYTES];
    uint64_t number;
    int length = snprintf(text, sizeof text, "%s/%s", id, topic);

    sha256_of(text, length < (int)sizeof text ? (size_t)length : sizeof text - 1, hash);
    memcpy(&number, hash, sizeof number);
    return number;
}

/* Say whether a device may leave this retained message, or will, besides those that it has left; an empty one clears. */
static bool may_retain(const struct mosquitto_evt_acl_check *check, const char *id)
{
    if (check->payloadlen == 0) {
        limits_clear_retained(id, hash_of(id, check->topic));
        return true;
    }
    if (!has_headroom()) {
        log_refusal("A retained message to %s is refused: hardly any memory is left below memory_limit.", check->topic);
        return false;
    }
    if (!limits_retain(id, hash_of(id, check->topic))) {
        log_refusal("A retained message to %s is refused: device %s has left as many as it may.", check->topic, id);
        return false;
    }
    return true;
}

static bool may_subscribe(const struct mosquitto_evt_acl_check *check, const char *id)
{
    if (!limits_subscribe(id, verdict_cost(check->client, check->topic), milliseconds_now() / 1000)) {
        log_refusal("A SUBSCRIBE to %s is refused: device %s has sent too many in %d seconds.", check->topic, id,
            SUBSCRIBE_SECONDS);
        return false;
    }
    return true;
}

/* Say whether what a device has the right to do is within its limits. What the broker asks of its own accord is: about the sender
 * of a retained message, who has no address then, and about the subscriptions of one that is kicked. */
static bool is_within_limits(const struct mosquitto_evt_acl_check *check)
{
    const char *id = mosquitto_client_username(check->client);

    if (id == NULL || mosquitto_client_address(check->client) == NULL || kicks_going_on()) {
        return true;
    }
    if (check->access == MOSQ_ACL_SUBSCRIBE) {
        return may_subscribe(check, id);
    }
    return check->access != MOSQ_ACL_WRITE || !check->retain || may_retain(check, id);
}

static int on_acl_check(int event, void *data, void *user)
{
    struct mosquitto_evt_acl_check *check = data;
    bool granted;

    (void)event;
    (void)user;
    if (check->client == NULL || check->topic == NULL) {
        return MOSQ_ERR_ACL_DENIED;
    }
    if (is_portal(check->client)) {
        granted = portal_may(check);
        kick(PORTAL_USER);
        return granted ? MOSQ_ERR_SUCCESS : MOSQ_ERR_ACL_DENIED;
    }
    (void)look_after(SILENT_MILLISECONDS); /* the broker is slow, or set up so that it never ticks */
    switch (verdict_of(check->client, check->access, check->topic)) {
    case GRANTED:
        return is_within_limits(check) ? MOSQ_ERR_SUCCESS : MOSQ_ERR_ACL_DENIED;
    case NOT_OURS:
        return MOSQ_ERR_PLUGIN_DEFER;
    case ENDED:
        return MOSQ_ERR_AUTH;
    default:
        return MOSQ_ERR_ACL_DENIED;
    }
}

static int authentication_result(enum verdict verdict)
{
    return verdict == GRANTED ? MOSQ_ERR_SUCCESS : verdict == NOT_OURS ? MOSQ_ERR_PLUGIN_DEFER : MOSQ_ERR_AUTH;
}

static int on_basic_auth(int event, void *data, void *user)
{
    struct mosquitto_evt_basic_auth *connect = data;

    (void)event;
    (void)user;
    return authentication_result(verdict_of_password(connect->client, connect->username, connect->password));
}

static int on_extended_auth(int event, void *data, void *user)
{
    struct mosquitto_evt_extended_auth *connect = data;

    (void)event;
    (void)user;
    return authentication_result(verdict_of_method(connect->client));
}

static int on_disconnect(int event, void *data, void *user)
{
    struct mosquitto_evt_disconnect *end = data;

    (void)event;
    (void)user;
    verdict_ended(end->client);
    return MOSQ_ERR_SUCCESS;
}

static int on_connect(int event, void *data, void *user)
{
    struct mosquitto_evt_disconnect *begin = data;

    (void)event;
    (void)user;
    verdict_connected(begin->client);
    return MOSQ_ERR_SUCCESS;
}

static int on_tick(int event, void *data, void *user)
{
    struct mosquitto_evt_tick *tick = data;

    (void)event;
    (void)user;
    tick->NEXT_TICK = TICK_MILLISECONDS;
    if (look_after(LOOK_MILLISECONDS)) {
        presence_flush();
    }
    kick(NULL);
    if (guard_is_good()) {
        kicks_flush_many(verdict_is_suspended);
    }
    return MOSQ_ERR_SUCCESS;
}

static const struct {
    int event;
    MOSQ_FUNC_generic_callback callback;
    bool optional;
} callbacks[] = {
    {MOSQ_EVT_ACL_CHECK, on_acl_check, false},
    {MOSQ_EVT_BASIC_AUTH, on_basic_auth, false},
    {MOSQ_EVT_EXT_AUTH_START, on_extended_auth, false},
    {MOSQ_EVT_DISCONNECT, on_disconnect, false},
    {MOSQ_EVT_TICK, on_tick, false},
    {EVENT_CONNECT, on_connect, true},
    {EVENT_CLIENT_OFFLINE, on_disconnect, true}, /* in place of DISCONNECT where the session is kept */
};

/* --- Loading and unloading -------------------------------------------------------------------------------------- */

#pragma GCC visibility push(default) /* all else is hidden */

mosq_plugin_EXPORT int mosquitto_plugin_version(int supported_version_count, const int *supported_versions)
{
    for (int i = 0; i < supported_version_count; i++) {
        if (supported_versions[i] == PLUGIN_API) {
            return PLUGIN_API;
        }
    }
    return -1;
}

mosq_plugin_EXPORT int mosquitto_plugin_init(
    mosquitto_plugin_id_t *id, void **user, struct mosquitto_opt *options, int option_count)
{
    static const struct guard_listener listener = {verdict_lost, verdict_replaced, tell_state};
    const char *path = NULL;
    uint64_t most = DEFAULT_MAX_RETAINED;

    (void)user;
    for (int i = 0; i < option_count; i++) {
        if (strcmp(options[i].key, "journal") == 0) {
            path = options[i].value;
        } else if (strcmp(options[i].key, "max_retained") == 0 && !parse_number(options[i].value, &most)) {
            log_error("Give plugin_opt_max_retained a whole number: how many retained messages one device may leave.");
            return MOSQ_ERR_INVAL;
        }
    }
    limits_set_retained(most);
    if (identifier != NULL || path == NULL || path[0] != '/' || (journal_path = strdup(path)) == NULL) {
        log_error("Give plugin_opt_journal the path of the portal's journal, and load the plugin once.");
        return MOSQ_ERR_INVAL;
    }
    identifier = id;
    guard_open(journal_path, &listener);
    guard_look(false);
    for (size_t i = 0; i < sizeof callbacks / sizeof *callbacks; i++) {
        int result = mosquitto_callback_register(id, callbacks[i].event, callbacks[i].callback, NULL, NULL);
        if (result != MOSQ_ERR_SUCCESS && !(callbacks[i].optional && result == MOSQ_ERR_NOT_SUPPORTED)) {
            log_error("The broker does not let the plugin register event %d.", callbacks[i].event);
            return result;
        }
    }
    return MOSQ_ERR_SUCCESS;
}

mosq_plugin_EXPORT int mosquitto_plugin_cleanup(void *user, struct mosquitto_opt *options, int option_count)
{
    (void)user;
    (void)options;
    (void)option_count;
    if (identifier != NULL) {
        for (size_t i = 0; i < sizeof callbacks / sizeof *callbacks; i++) {
            mosquitto_callback_unregister(identifier, callbacks[i].event, callbacks[i].callback, NULL);
        }
    }
    identifier = NULL;
    presence_clear();
    kicks_clear();
    verdict_clear();
    limits_clear();
    guard_close();
    free(journal_path);
    journal_path = NULL;
    return MOSQ_ERR_SUCCESS;
}

#pragma GCC visibility pop
