/* Who is connected, told in parts: none is larger than a client's queue, and no change overtakes the part it is about. */
#include "../log.h"
#include "../presence.h"
#include "expect.h"

#include <mosquitto.h>
#include <mosquitto_broker.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEVICES 250000u
#define QUEUE_BYTES 8388608u /* max_queued_bytes of mosquitto/portal.conf */

static struct {
    unsigned messages, bytes, entries, ends, mores, changes;
    bool seen[DEVICES + 1];
} told;

static unsigned count(const char *text, const char *word)
{
    unsigned found = 0;

    for (size_t length = strlen(word); *text != '\0'; text++) { /* strstr takes long under AddressSanitizer */
        found += *text == *word && strncmp(text, word, length) == 0;
    }
    return found;
}

/* In place of the broker's: notes what a message says. */
int mosquitto_broker_publish_copy(const char *clientid, const char *topic, int payloadlen, const void *payload, int qos,
    bool retain, mosquitto_property *properties)
{
    char *text = strndup(payload, (size_t)payloadlen);

    EXPECT(strcmp(clientid, "portal-1") == 0 && qos == 1 && !retain && properties == NULL);
    if (text == NULL) {
        return MOSQ_ERR_NOMEM;
    }
    if (strcmp(topic, CLIENTS_TOPIC) == 0) {
        told.messages++;
        told.bytes += (unsigned)payloadlen;
        told.ends += count(text, "{\"end\":true}");
        told.mores += count(text, "{\"more\":true}");
        for (const char *at = text; *at != '\0'; at++) {
            unsigned long number;
            if (*at != '[' || strncmp(at, "[\"device-", 9) != 0) {
                continue;
            }
            number = strtoul(at + 9, NULL, 10);
            EXPECT(number < DEVICES && !told.seen[number]);
            told.seen[number] = true;
            told.entries++;
        }
    } else {
        told.changes += count(text, "[\"");
    }
    free(text);
    return MOSQ_ERR_SUCCESS;
}

void log_error(const char *format, ...)
{
    printf("logged: %s\n", format);
    failures++;
}

static char *name_of(unsigned number)
{
    static char name[64];

    snprintf(name, sizeof name, "device-%032u", number);
    return name;
}

int main(void)
{
    static const char portal, other;
    unsigned parts = 1;

    for (unsigned i = 0; i < DEVICES; i++) {
        presence_connected(name_of(i));
    }
    EXPECT(presence_report(&portal, "portal-1", 1, 1));
    while (told.ends == 0) {
        EXPECT(told.messages <= PAGE_MESSAGES && told.bytes < QUEUE_BYTES / 2);
        EXPECT(told.mores == 1 && told.changes == 0);
        told.messages = told.bytes = told.mores = 0;
        presence_disconnected(name_of(parts)); /* meanwhile; some were told already, others not yet */
        presence_connected("new");
        presence_flush();
        EXPECT(!presence_more(&other));
        EXPECT(presence_more(&portal));
        parts++;
    }
    EXPECT(told.entries == DEVICES && parts >= 4);
    EXPECT(!presence_more(&portal));
    presence_flush();
    EXPECT(told.changes == parts); /* those that are gone, and the new one */
    presence_clear();
    printf("presence: %u failures, %u parts\n", failures, parts);
    return failures > 0;
}
