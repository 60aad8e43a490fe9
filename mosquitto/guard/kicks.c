#include "kicks.h"

#include "broker.h"
#include "log.h"
#include "names.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* A batch of many takes a quarter of the time since the one before, within limits, and they keep a distance. */
#define LEAST_MILLISECONDS 5
#define MOST_MILLISECONDS 25
#define LEAST_PAUSE_MILLISECONDS 15

static struct names waiting;
static struct names many, many_now; /* those of `many_now`, which does not change meanwhile, are being ended */
static size_t many_at;
static int64_t batch_ended; /* milliseconds */
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

void kicks_add_many(const char *username)
{
    if (names_find(&many, username) == NULL && !names_add(&many, username)) {
        kicks_add(username);
    }
}

static int64_t milliseconds_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Return the next name of many; NULL if there is none at present. */
static const char *next_of_many(void)
{
    const struct name *name = names_next(&many_now, &many_at);

    if (name == NULL) {
        names_clear(&many_now);
        many_now = many;
        many = (struct names){0};
        many_at = 0;
        name = names_next(&many_now, &many_at);
    }
    return name == NULL ? NULL : name->text;
}

void kicks_flush_many(bool (*is_due)(const char *username))
{
    int64_t began, pause, most;
    const char *username;

    if (many.used == 0 && many_now.used == 0) {
        return;
    }
    began = milliseconds_now();
    pause = began - batch_ended;
    if (pause < LEAST_PAUSE_MILLISECONDS) {
        return;
    }
    most = pause / 4 > MOST_MILLISECONDS ? MOST_MILLISECONDS : pause / 4;
    most = most < LEAST_MILLISECONDS ? LEAST_MILLISECONDS : most;
    going_on = true;
    do {
        username = next_of_many();
        if (username != NULL && is_due(username)) {
            mosquitto_kick_client_by_username(username, false);
        }
        batch_ended = milliseconds_now();
    } while (username != NULL && batch_ended - began < most);
    going_on = false;
}

bool kicks_going_on(void)
{
    return going_on;
}

void kicks_clear(void)
{
    names_clear(&waiting);
    names_clear(&many);
    names_clear(&many_now);
    many_at = 0;
}
