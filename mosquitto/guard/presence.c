#include "presence.h"

#include "broker.h"
#include "log.h"
#include "names.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MESSAGE_BYTES (192 * 1024) /* a message that has reached this length is sent */
#define ENTRY_BYTES 128            /* one identity with its time, or a delimiter */

static struct names online, changed;
static struct names whole; /* all that were connected when the portal asked, while it is told of them in parts */
static size_t whole_at;
static bool is_telling;
static const void *recipient_key;
static char *recipient;

/* A message that is being written. An identity is of A-Z a-z 0-9 . _ - only, so nothing needs to be escaped. */
struct message {
    const char *topic;
    char *text;
    size_t used;
    bool failed;
};

static void append(struct message *message, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void append(struct message *message, const char *format, ...)
{
    va_list arguments;
    int length;

    if (message->text == NULL && (message->text = malloc(MESSAGE_BYTES + 4 * ENTRY_BYTES)) == NULL) {
        message->failed = true;
    }
    if (message->failed) {
        return;
    }
    va_start(arguments, format);
    length = vsnprintf(message->text + message->used, ENTRY_BYTES, format, arguments);
    va_end(arguments);
    message->used += length > 0 && length < ENTRY_BYTES ? (size_t)length : 0;
}

static void send_message(struct message *message)
{
    if (!message->failed && message->used > 0) {
        message->failed = mosquitto_broker_publish_copy(recipient, message->topic, (int)message->used, message->text, 1,
                              false, NULL) != MOSQ_ERR_SUCCESS;
    }
    message->used = 0;
}

static bool finish(struct message *message)
{
    send_message(message);
    free(message->text);
    if (message->failed) {
        log_error("There is no memory to tell the portal who is connected.");
    }
    return !message->failed;
}

/* Append the identities of `which` that are online, or that are not: "word":[["ID",time],…]. A message that has become
 * long is sent, and another one begun. */
static void append_names(struct message *message, const struct names *which, bool are_online, const char *word)
{
    const struct name *name;
    const char *separator = "";

    append(message, "\"%s\":[", word);
    for (size_t at = 0; (name = names_next(which, &at)) != NULL;) {
        const struct name *found = names_find(&online, name->text);
        if ((found != NULL) != are_online) {
            continue;
        }
        append(message, "%s[\"%s\",%lld]", separator, name->text, (long long)(found == NULL ? time(NULL) : found->since));
        separator = ",";
        if (message->used >= MESSAGE_BYTES) {
            append(message, "]}\n");
            send_message(message);
            append(message, "{\"%s\":[", word);
            separator = "";
        }
    }
    append(message, "]");
}

/* Send the next part of the whole set, after what the message has. */
static bool send_part(struct message *message)
{
    const struct name *name;
    const char *separator = "";
    unsigned sent = 0;

    append(message, "{\"connected\":[");
    while ((name = names_next(&whole, &whole_at)) != NULL) {
        append(message, "%s[\"%s\",%lld]", separator, name->text, (long long)name->since);
        separator = ",";
        if (message->used >= MESSAGE_BYTES) {
            if (++sent == PAGE_MESSAGES) {
                break;
            }
            append(message, "]}\n");
            send_message(message);
            append(message, "{\"connected\":[");
            separator = "";
        }
    }
    append(message, "]}\n%s\n", name == NULL ? "{\"end\":true}" : "{\"more\":true}");
    if (name == NULL) {
        names_clear(&whole);
        is_telling = false;
    }
    return finish(message);
}

static void note_change(const char *identity)
{
    if (recipient != NULL && names_find(&changed, identity) == NULL && !names_add(&changed, identity)) {
        log_error("There is no memory to tell the portal who is connected.");
    }
}

void presence_connected(const char *identity)
{
    if (names_add(&online, identity)) {
        note_change(identity);
    }
}

void presence_disconnected(const char *identity)
{
    names_remove(&online, identity);
    note_change(identity);
}

bool presence_report(const void *key, const char *client_id, uint64_t epoch, uint64_t sequence)
{
    struct message message = {.topic = CLIENTS_TOPIC};
    char *copy = strdup(client_id);

    if (copy == NULL) {
        return false;
    }
    free(recipient);
    recipient = copy;
    recipient_key = key;
    names_clear(&changed);
    names_clear(&whole);
    whole_at = 0;
    is_telling = names_copy(&whole, &online);
    if (!is_telling) {
        log_error("There is no memory to tell the portal who is connected.");
        return false;
    }
    append(&message, "{\"epoch\":%llu,\"seq\":%llu,\"begin\":true}\n", (unsigned long long)epoch,
        (unsigned long long)sequence);
    return send_part(&message);
}

bool presence_more(const void *key)
{
    struct message message = {.topic = CLIENTS_TOPIC};

    return recipient != NULL && recipient_key == key && is_telling && send_part(&message);
}

void presence_ended(const void *key)
{
    if (recipient != NULL && recipient_key == key) {
        free(recipient);
        recipient = NULL;
        recipient_key = NULL;
        names_clear(&changed);
        names_clear(&whole);
        is_telling = false;
    }
}

bool presence_is_recipient(const char *client_id)
{
    return recipient != NULL && strcmp(recipient, client_id) == 0;
}

void presence_flush(void)
{
    struct message message = {.topic = PRESENCE_TOPIC};

    if (recipient == NULL || changed.used == 0 || is_telling) {
        return; /* a change that overtook the part with the same identity would be undone by that */
    }
    append(&message, "{");
    append_names(&message, &changed, true, "connected");
    append(&message, ",");
    append_names(&message, &changed, false, "disconnected");
    append(&message, "}\n");
    if (finish(&message)) {
        names_clear(&changed);
    }
}

void presence_clear(void)
{
    presence_ended(recipient_key);
    names_clear(&online);
    names_clear(&changed);
}
