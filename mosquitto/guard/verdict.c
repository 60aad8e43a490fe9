#include "verdict.h"

#include "broker.h"
#include "certificate.h"
#include "clients.h"
#include "guard.h"
#include "kicks.h"
#include "log.h"
#include "match.h"
#include "names.h"
#include "openssl.h"
#include "presence.h"

#include <string.h>

#define SHARED "$share/"
#define MQTT_5 5

/* Names that are not UUIDs and have come with a certificate of a portal CA: they are decided for while asleep, too. */
static struct names remembered;

/* UUIDs that the journal does not know and that the operator has let in with a password: they are not. */
static struct names foreign;

/* Client ids whose last connection had a certificate that is not accepted. Its will is published when no certificate is
 * to be seen any more, so these publish nothing until the device itself has connected. */
static struct names tainted;
static bool all_tainted; /* there was no memory to say whose */

/* Identities with a revoked serial number, whose connections are to be looked at. */
static struct names superseded;

static bool tenant_suspended; /* the connections of its identities are to be found */

/* A client as it comes to be checked. */
struct claim {
    const char *name;
    const struct identity *identity; /* what the journal knows of it, NULL if nothing */
    void *x509; /* its certificate; NULL if it shows none, or another one keeps it */
    bool has_certificate;
    const char *refusal; /* why it may do nothing whatever the journal says of its name; NULL if there is no such reason */
    bool kick;           /* whether it is also to be disconnected for that */
    bool foreign;        /* whether the reason is that another tenant's CA has named it */
    bool suspended;      /* whether it may do nothing because its tenant is suspended */
    bool may_end;        /* whether its connection can be ended by the answer to this check */
    bool ended;          /* whether it is */
    bool is_up_to_date;  /* whether the newest lines of the journal were read for it */
    struct certificate certificate;
};

static bool is_known(const char *name)
{
    const struct registry *registry = guard_registry();

    return registry != NULL && is_id(name) && registry_standing(registry, name) != UNKNOWN;
}

static const char *name_of(const struct mosquitto *client)
{
    const char *username = mosquitto_client_username(client);

    return username != NULL ? username : mosquitto_client_id(client);
}

/* Its password was right when this connection was opened. What it shows is compared as well, for the case that a broker
 * once reuses the connection's address without telling that it had ended. */
bool is_portal(const struct mosquitto *client)
{
    const struct client *found = clients_find(client);
    const char *username = mosquitto_client_username(client);
    void *x509;

    if (found == NULL || found->kind != PORTAL || username == NULL || strcmp(username, PORTAL_USER) != 0) {
        return false;
    }
    x509 = mosquitto_client_certificate(client);
    X509_free(x509);
    return x509 == NULL;
}

/* --- Who it is -------------------------------------------------------------------------------------------------- */

/* Say whether an identity of which the journal knows is another tenant's than the issuer of its certificate. */
static bool is_of_another_tenant(const struct registry *registry, const char *name, uint16_t issuer)
{
    const struct identity *identity = registry_find(registry, name);

    return identity != NULL && registry_tenant_of(identity) != issuer;
}

/* Judge a certificate; NOT_OURS if its issuer is not one of the portal's. */
static enum verdict judge_certificate(struct claim *claim)
{
    const struct certificate *certificate = &claim->certificate;
    const struct registry *registry = guard_registry();
    uint16_t tenant;

    if (registry == NULL) {
        claim->refusal = "no journal was read yet";
        return NOT_GRANTED;
    }
    if (!registry_find_issuer(registry, certificate->issuer, &tenant)) {
        return NOT_OURS;
    }
    if (!certificate_is_for_key(certificate, registry, tenant)) {
        claim->refusal = "its certificate is that of another CA with the name of a portal CA";
    } else if (!certificate->named) {
        claim->refusal = "its username is not the common name of its certificate";
    } else if (is_of_another_tenant(registry, claim->name, tenant)) {
        claim->refusal = "its certificate is of a CA of another tenant";
        claim->foreign = true;
    } else if (!certificate->has_serial) {
        claim->refusal = "its certificate has no serial number of at most 20 octets";
    } else if (registry_has_serial(registry, certificate->issuer, &certificate->serial)) {
        claim->refusal = "its certificate is revoked or superseded";
        claim->kick = true;
    } else {
        return GRANTED;
    }
    return NOT_GRANTED;
}

static enum verdict identify_without_certificate(const struct mosquitto *client, struct claim *claim)
{
    const struct client *found = clients_find(client);
    bool uuid = is_uuid(claim->name);

    if (found != NULL && found->kind == PLAIN) { /* the operator has let it in */
        if (is_known(claim->name)) {
            claim->refusal = "it has the name of a device and no certificate";
            return NOT_GRANTED;
        }
        if (uuid && names_find(&foreign, claim->name) == NULL) {
            (void)names_add(&foreign, claim->name); /* if there is no memory, it is denied while asleep */
        }
        return NOT_OURS;
    }
    if (is_known(claim->name) || names_find(&remembered, claim->name) != NULL) {
        return GRANTED;
    }
    return uuid && names_find(&foreign, claim->name) == NULL ? GRANTED : NOT_OURS;
}

/* Find out who a client is: GRANTED if the journal decides, by the claim's name. */
static enum verdict identify(struct mosquitto *client, struct claim *claim)
{
    const char *username = mosquitto_client_username(client);
    enum reading reading = certificate_read(claim->x509, username, &claim->certificate);

    if (claim->name == NULL) {
        claim->name = "";
        claim->refusal = "it has no name";
        return NOT_GRANTED;
    }
    if (reading == BAD_CERTIFICATE) {
        claim->refusal = "its certificate cannot be read";
        return NOT_GRANTED;
    }
    if (reading == CERTIFICATE) {
        return judge_certificate(claim);
    }
    if (username != NULL && strcmp(username, PORTAL_USER) == 0) { /* the portal itself was told apart before */
        claim->refusal = "it has the name of the portal and has not shown its password";
        return NOT_GRANTED;
    }
    return identify_without_certificate(client, claim);
}

/* Say whether the client was admitted before and nothing has changed: it is the same connection, which shows the same
 * certificate under the same name, and no line of the journal was read since. */
static bool is_still_admitted(const struct mosquitto *client, struct claim *claim)
{
    const struct client *found = claim->x509 == NULL ? NULL : clients_find(client);

    if (found == NULL || found->x509 != claim->x509 || !guard_is_good() || found->stamp == 0 ||
        found->stamp != registry_stamp(guard_registry()) || strcmp(found->name, claim->name) != 0) {
        return false;
    }
    claim->identity = found->identity;
    return true;
}

/* --- What it may do --------------------------------------------------------------------------------------------- */

/* Say whether a shared subscription `$share/GROUP/FILTER` takes only what is the identity's to read: what its members
 * are handed in turn and may not read is lost for the others. */
static bool may_share(const struct claim *claim, const char *subscription)
{
    const char *group = subscription + strlen(SHARED), *filter = strchr(group, '/');

    return filter != NULL && filter != group && strcspn(group, "+#") > (size_t)(filter - group) &&
           !filters_intersect(PORTAL_TOPICS, filter + 1) &&
           registry_may_share(guard_registry(), claim->identity, claim->name, filter + 1);
}

/* Say whether a topic is one of PORTAL_TOPICS. */
static bool is_portal_topic(const char *topic)
{
    size_t length = strlen(PORTAL_TOPICS) - strlen("/#");

    return strncmp(topic, PORTAL_TOPICS, length) == 0 && (topic[length] == '/' || topic[length] == '\0');
}

/* Say whether an identity may do what is asked; the journal in force is good. */
static bool may(const struct claim *claim, int access, const char *topic)
{
    const struct registry *registry = guard_registry();

    if (access == MOSQ_ACL_SUBSCRIBE && strncmp(topic, SHARED, strlen(SHARED)) == 0) {
        return may_share(claim, topic);
    }
    if (topic[0] == '$' || is_portal_topic(topic)) {
        return false;
    }
    switch (access) {
    case MOSQ_ACL_READ:
        return registry_may(registry, claim->identity, claim->name, READ, topic);
    case MOSQ_ACL_WRITE:
        return registry_may(registry, claim->identity, claim->name, WRITE, topic);
    case MOSQ_ACL_SUBSCRIBE:
        return registry_may_subscribe(registry, claim->identity, claim->name, topic);
    default:
        return false;
    }
}

static bool is_tainted(const struct mosquitto *client)
{
    const char *id = mosquitto_client_id(client);

    return all_tainted || id == NULL || names_find(&tainted, id) != NULL;
}

/* Forget a connection; if it was an identity's, the portal is told. */
static void forget(const void *client)
{
    const struct client *found = clients_find(client);

    if (found != NULL && found->kind == DEVICE && found->admitted) {
        presence_disconnected(found->name);
    }
    clients_remove(client);
}

/* Note the connection of a device; NULL if there is no memory. */
static struct client *note_device(const struct mosquitto *client, struct claim *claim)
{
    struct client *found = clients_find(client);

    if (found == NULL || found->kind != DEVICE || strcmp(found->name, claim->name) != 0) {
        forget(client); /* the end of an earlier one was not seen */
        found = clients_note(client, DEVICE, claim->name);
        if (!is_uuid(claim->name) && names_find(&remembered, claim->name) == NULL) {
            (void)names_add(&remembered, claim->name);
        }
    }
    if (found != NULL) {
        found->certificate = claim->certificate;
        found->stamp = 0;
        if (claim->x509 != NULL && found->x509 != claim->x509) {
            clients_keep_certificate(found, claim->x509);
            claim->x509 = NULL; /* it is the client's now */
        }
    }
    return found;
}

/* Have a connection ended that is refused everything: at once if the answer to this check does, else at a tick. It is
 * never another one that has the same name by right. */
static void doom(const struct mosquitto *client, struct claim *claim, const char *reason)
{
    struct client *found;

    if (claim->may_end) {
        log_refusal("Client %s is refused everything: %s.", claim->name, reason);
        claim->ended = true;
        return;
    }
    found = note_device(client, claim);
    if (found == NULL || !found->doomed) {
        log_refusal("Client %s is refused everything: %s.", claim->name, reason);
        (claim->suspended ? kicks_add_many : kicks_add)(claim->name);
    }
    if (found != NULL) {
        found->doomed = true;
    }
}

/* Admit the connection of a device that the journal allows. */
static void admit(const struct mosquitto *client, struct claim *claim)
{
    struct client *found = note_device(client, claim);

    if (found != NULL) {
        found->stamp = registry_stamp(guard_registry());
        found->identity = claim->identity;
        found->doomed = false;
        if (!found->admitted) {
            found->admitted = true;
            presence_connected(found->name);
        }
    }
    if (tainted.used > 0 && mosquitto_client_id(client) != NULL) {
        names_remove(&tainted, mosquitto_client_id(client));
    }
}

static enum verdict judge(struct mosquitto *client, struct claim *claim);

/* Say whether the newest lines of the journal are to be read before a client is refused or left to others: once for a
 * check, and while the broker asks about sessions of those that are being kicked not at all. */
static bool has_news_for(struct claim *claim)
{
    if (claim->is_up_to_date || kicks_going_on()) {
        return false;
    }
    claim->is_up_to_date = true;
    return guard_catch_up();
}

static void begin_claim(const struct mosquitto *client, struct claim *claim)
{
    claim->name = name_of(client);
    claim->identity = NULL;
    claim->refusal = NULL;
    claim->kick = claim->foreign = claim->suspended = false;
}

static enum verdict judge_anew(struct mosquitto *client, struct claim *claim)
{
    begin_claim(client, claim);
    return judge(client, claim);
}

/* Decide whether the client may do anything at all. Nobody with a certificate, or who is told apart by a name alone, is
 * refused because of lines that were written and not read: the portal gives out credentials once they are written. */
static enum verdict judge(struct mosquitto *client, struct claim *claim)
{
    enum verdict verdict = identify(client, claim);
    enum standing standing;

    if (verdict != GRANTED && claim->has_certificate && has_news_for(claim)) {
        return judge_anew(client, claim);
    }
    if (verdict == NOT_OURS) {
        return NOT_OURS;
    }
    if (verdict == NOT_GRANTED) {
        if (!claim->kick) {
            log_refusal("Client %s is refused everything: %s.", claim->name, claim->refusal);
            claim->ended = claim->foreign && claim->may_end;
        } else if (!kicks_going_on()) {
            doom(client, claim, claim->refusal);
        }
        return NOT_GRANTED;
    }
    if (!guard_is_good()) {
        return NOT_GRANTED;
    }
    claim->identity = registry_find(guard_registry(), claim->name);
    standing = registry_standing_of(guard_registry(), claim->identity);
    if (standing != ALLOWED && has_news_for(claim)) {
        return judge_anew(client, claim);
    }
    if (standing != ALLOWED) {
        claim->suspended = standing == SUSPENDED;
        if (claim->has_certificate && !kicks_going_on()) {
            doom(client, claim, claim->suspended ? "its tenant is suspended" : "the journal does not allow it");
        }
        return NOT_GRANTED;
    }
    if (claim->has_certificate) {
        admit(client, claim);
    }
    return GRANTED;
}

/* Judge a client by all that it shows; what is found out is in the claim. */
static enum verdict judge_client(struct mosquitto *client, struct claim *claim)
{
    enum verdict verdict = GRANTED;

    claim->x509 = mosquitto_client_certificate(client);
    begin_claim(client, claim);
    claim->has_certificate = claim->x509 != NULL;
    if (claim->name == NULL || !is_still_admitted(client, claim)) {
        verdict = judge(client, claim);
    }
    X509_free(claim->x509);
    claim->x509 = NULL;
    return verdict;
}

/* Say whether the broker ends the connection if this check is answered by an error: it does for what a client publishes.
 * In MQTT 5 the client is told first that it may not; before that PUBACK could only say that its message was taken. */
static bool can_end(const struct mosquitto *client, int access)
{
    return access == MOSQ_ACL_WRITE && mosquitto_client_protocol_version(client) < MQTT_5 &&
           mosquitto_client_address(client) != NULL;
}

enum verdict verdict_of(struct mosquitto *client, int access, const char *topic)
{
    struct claim claim = {.may_end = can_end(client, access)};
    enum verdict verdict = judge_client(client, &claim);

    if ((claim.kick || claim.suspended) && access == MOSQ_ACL_SUBSCRIBE && kicks_going_on()) {
        claim.identity = registry_find(guard_registry(), claim.name);
        verdict = GRANTED; /* the session keeps them for another certificate, or for the end of the suspension */
    }
    if (claim.ended) {
        return ENDED;
    }
    if (verdict == NOT_OURS || access == MOSQ_ACL_UNSUBSCRIBE) {
        return verdict == NOT_OURS ? NOT_OURS : GRANTED;
    }
    if (verdict == NOT_GRANTED || (access == MOSQ_ACL_WRITE && !claim.has_certificate && is_tainted(client))) {
        return NOT_GRANTED;
    }
    return may(&claim, access, topic) ? GRANTED : NOT_GRANTED;
}

enum cost verdict_cost(const struct mosquitto *client, const char *filter)
{
    const struct registry *registry = guard_registry();
    const char *name = name_of(client);

    if (!has_wildcard(filter) || strncmp(filter, SHARED, strlen(SHARED)) == 0) {
        return ONE_TOPIC;
    }
    return registry_may_share(registry, registry_find(registry, name), name, filter) ? OWN_TOPICS : OTHER_TOPICS;
}

/* --- Connections that begin and end ----------------------------------------------------------------------------- */

static bool is_right_password(const char *password)
{
    uint8_t given[HASH_BYTES];

    if (password == NULL) {
        return false;
    }
    guard_look(false); /* the portal may have written a new one just now */
    sha256_of(password, strlen(password), given);
    return guard_is_portal(given);
}

/* Say whether nobody but a device, or the portal, may connect with this name as user or client id, by what was read. */
static bool is_taken(const char *name)
{
    return name != NULL && (is_known(name) || presence_is_recipient(name));
}

enum verdict verdict_of_password(struct mosquitto *client, const char *username, const char *password)
{
    void *x509 = mosquitto_client_certificate(client);

    if (x509 != NULL) {
        X509_free(x509);
        return NOT_OURS;
    }
    if (username == NULL || strcmp(username, PORTAL_USER) != 0) {
        return verdict_of_method(client);
    }
    if (!is_right_password(password) || clients_note(client, PORTAL, NULL) == NULL) {
        log_refusal("A client that calls itself the portal has not shown its password.");
        return NOT_GRANTED;
    }
    return GRANTED;
}

enum verdict verdict_of_method(struct mosquitto *client)
{
    const char *username = mosquitto_client_username(client), *id = mosquitto_client_id(client);

    (void)guard_catch_up(); /* a name that was told just now is taken */
    if (is_taken(username) || is_taken(id) || clients_note(client, PLAIN, NULL) == NULL) {
        log_refusal("A client without a certificate is not let in as user %s, client id %s: that is a device's.",
            username == NULL ? "(none)" : username, id == NULL ? "(none)" : id);
        return NOT_GRANTED;
    }
    return NOT_OURS;
}

void verdict_connected(struct mosquitto *client)
{
    struct claim claim = {0};

    if (!is_portal(client)) {
        (void)judge_client(client, &claim);
    }
}

void verdict_ended(struct mosquitto *client)
{
    const char *username = mosquitto_client_username(client), *id = mosquitto_client_id(client);
    struct claim claim = {.name = username, .x509 = mosquitto_client_certificate(client)};

    if (certificate_read(claim.x509, username, &claim.certificate) == CERTIFICATE &&
        judge_certificate(&claim) == NOT_GRANTED && id != NULL && names_find(&tainted, id) == NULL &&
        !names_add(&tainted, id)) {
        all_tainted = true;
    }
    X509_free(claim.x509);
    presence_ended(client);
    forget(client);
}

/* --- Changes of the journal --------------------------------------------------------------------------------------- */

void verdict_lost(const char *id, enum outcome outcome)
{
    if (outcome == TENANT_SUSPENDED) {
        tenant_suspended = true;
    } else if (outcome == RIGHTS_LOST || (names_find(&superseded, id) == NULL && !names_add(&superseded, id))) {
        kicks_add(id);
    }
}

bool verdict_is_suspended(const char *id)
{
    return registry_standing(guard_registry(), id) == SUSPENDED;
}

/* Say whether a connected device may do less by `now` than it might before, but for a suspension of its tenant. */
static bool is_worse(const struct client *client, const struct registry *before, const struct registry *now)
{
    const struct certificate *certificate = &client->certificate;
    uint16_t tenant;

    return registry_standing(now, client->name) != ALLOWED || registry_lost_rights(before, now, client->name) ||
           registry_has_serial(now, certificate->issuer, &certificate->serial) ||
           (registry_find_issuer(now, certificate->issuer, &tenant) && is_of_another_tenant(now, client->name, tenant));
}

void verdict_replaced(const struct registry *before, const struct registry *now)
{
    const struct client *client;

    for (size_t at = 0; (client = clients_next(&at)) != NULL;) {
        if (client->kind == DEVICE && registry_standing(now, client->name) == SUSPENDED) {
            kicks_add_many(client->name);
        } else if (client->kind == DEVICE && is_worse(client, before, now)) {
            kicks_add(client->name);
        }
    }
}

/* Find the connections of identities whose tenants are suspended. */
static void settle_suspended(void)
{
    const struct client *client;

    for (size_t at = 0; (client = clients_next(&at)) != NULL;) {
        if (client->kind == DEVICE && verdict_is_suspended(client->name)) {
            kicks_add_many(client->name);
        }
    }
    tenant_suspended = false;
}

void verdict_settle(void)
{
    const struct registry *registry = guard_registry();
    const struct client *client;
    const struct name *name;

    if (tenant_suspended && registry != NULL) {
        settle_suspended();
    }
    if (superseded.used == 0 || registry == NULL) {
        return;
    }
    for (size_t at = 0; (client = clients_next(&at)) != NULL;) {
        if (client->kind == DEVICE && names_find(&superseded, client->name) != NULL) {
            if (registry_has_serial(registry, client->certificate.issuer, &client->certificate.serial)) {
                kicks_add(client->name);
            }
            names_remove(&superseded, client->name);
        }
    }
    for (size_t at = 0; (name = names_next(&superseded, &at)) != NULL;) {
        kicks_add(name->text); /* connected and never checked, or not connected */
    }
    names_clear(&superseded);
}

void verdict_clear(void)
{
    names_clear(&remembered);
    names_clear(&foreign);
    names_clear(&tainted);
    names_clear(&superseded);
    all_tainted = tenant_suspended = false;
    clients_clear();
}
