#include "kicks.h"

#include "broker.h"
#include "log.h"
#include "names.h"

#include <stdlib.h>
#include <string.h>

static struct names waiting;
static bool going_on;

void kicks_add(const char *username)
{
    if (names_find(&waiting, username) == NULL && !names_add(&waiting, username)) {
        log_error("There is no memory to disconnect %s, which is denied everything.", username);
    }
}

void kicks_flush(const char *except)
{
    struct names now = waiting;
    const struct name *name;

    if (now.used == 0) {
        return;
    }
    waiting = (struct names){0}; /* a kick calls the plugin, which may add others */
    going_on = true;
    for (size_t at = 0; (name = names_next(&now, &at)) != NULL;) {
        if (except != NULL && strcmp(name->text, except) == 0) {
            kicks_add(name->text);
        } else {
            mosquitto_kick_client_by_username(name->text, false);
        }
    }
    going_on = false;
    names_clear(&now);
}

bool kicks_going_on(void)
{
    return going_on;
}

void kicks_clear(void)
{
    names_clear(&waiting);
}
