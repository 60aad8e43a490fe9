/* Loads a journal as the plugin does, and times its decisions: prints one line of JSON.
 *
 *   measure JOURNAL IDENTITY...
 */
#include "../guard.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define DECISIONS 2000000

static void ignore_loss(const char *id, enum outcome outcome)
{
    (void)id;
    (void)outcome;
}

static void ignore_replacement(const struct registry *before, const struct registry *now)
{
    (void)before;
    (void)now;
}

static void say(bool good, const char *what)
{
    if (!good) {
        fprintf(stderr, "%s\n", what);
    }
}

static double processor_seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static long resident_kilobytes(void)
{
    char line[256];
    long kilobytes = 0;
    FILE *status = fopen("/proc/self/status", "r");

    while (status != NULL && fgets(line, sizeof line, status) != NULL) {
        if (sscanf(line, "VmRSS: %ld", &kilobytes) == 1) {
            break;
        }
    }
    if (status != NULL) {
        fclose(status);
    }
    return kilobytes;
}

int main(int count, char **arguments)
{
    static const struct guard_listener listener = {ignore_loss, ignore_replacement, say};
    double began = processor_seconds(), loaded, publish, subscribe, catch_up;
    size_t granted = 0;
    char(*topics)[256];

    if (count < 3 || (topics = calloc((size_t)count, sizeof *topics)) == NULL) {
        return 2;
    }
    guard_open(arguments[1], &listener);
    guard_look(true);
    loaded = processor_seconds();
    if (!guard_is_good()) {
        return 1;
    }
    for (int i = 2; i < count; i++) {
        snprintf(topics[i], sizeof topics[i], "devices/%.64s/telemetry", arguments[i]);
    }
    for (int i = 0; i < DECISIONS; i++) {
        int who = 2 + i % (count - 2);
        const struct identity *identity = registry_find(guard_registry(), arguments[who]);
        granted += registry_may(guard_registry(), identity, arguments[who], WRITE, topics[who]);
    }
    publish = processor_seconds();
    for (int i = 0; i < DECISIONS; i++) {
        int who = 2 + i % (count - 2);
        const struct identity *identity = registry_find(guard_registry(), arguments[who]);
        granted += registry_may_subscribe(guard_registry(), identity, arguments[who], topics[who]);
    }
    subscribe = processor_seconds();
    for (int i = 0; i < DECISIONS; i++) {
        granted += guard_catch_up(); /* what a refusal costs besides; there is nothing to read */
    }
    catch_up = processor_seconds();
    printf("{\"load_seconds\": %.3f, \"resident_mb\": %.1f, \"publish_us\": %.3f, \"subscribe_us\": %.3f, \"catch_up_us\": %.3f, "
           "\"granted\": %zu}\n",
        loaded - began, (double)resident_kilobytes() / 1024, (publish - loaded) / DECISIONS * 1e6,
        (subscribe - publish) / DECISIONS * 1e6, (catch_up - subscribe) / DECISIONS * 1e6, granted);
    guard_close();
    free(topics);
    return granted != 2 * (size_t)DECISIONS;
}
