#include "guard.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#define REREAD_SHARE 20 /* of the time, at most, is spent on reading damaged files again */

static struct {
    const char *path;
    struct guard_listener listener;
    struct journal *force;     /* in force, or was until it was found damaged */
    struct journal *candidate; /* another file, or the same one read again; not in force yet */
    const char *damage;        /* why nothing is believed, NULL if all is well */
    uint64_t wanted_epoch;     /* the portal has asked for it: less is too old */
    int64_t candidate_since;   /* when a candidate of a higher epoch was first seen, 0 if there is none */
    int64_t reread_after;      /* milliseconds */
    uint8_t portal[HASH_BYTES];
    bool has_portal;
    bool told; /* whether the state was logged, of which this is the text */
    char told_text[256];
} guard;

static int64_t now_milliseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void guard_open(const char *path, const struct guard_listener *listener)
{
    memset(&guard, 0, sizeof guard);
    guard.path = path;
    guard.listener = *listener;
    guard.damage = "it was not read yet";
}

static void drop_candidate(void)
{
    journal_close(guard.candidate);
    guard.candidate = NULL;
}

void guard_close(void)
{
    drop_candidate();
    journal_close(guard.force);
    guard.force = NULL;
}

const struct registry *guard_registry(void)
{
    return guard.force == NULL ? NULL : guard.force->registry;
}

bool guard_is_good(void)
{
    return guard.force != NULL && guard.damage == NULL;
}

static bool is_equal(const uint8_t one[HASH_BYTES], const uint8_t other[HASH_BYTES])
{
    uint8_t difference = 0;

    for (size_t i = 0; i < HASH_BYTES; i++) {
        difference |= one[i] ^ other[i];
    }
    return difference == 0;
}

bool guard_is_portal(const uint8_t hash[HASH_BYTES])
{
    bool waits = guard.candidate != NULL && guard.candidate->fault == NULL && guard.candidate_since != 0;
    const uint8_t *next = waits ? registry_portal(guard.candidate->registry) : NULL;

    return (guard.has_portal && is_equal(hash, guard.portal)) || (next != NULL && is_equal(hash, next));
}

uint64_t guard_epoch(void)
{
    return guard.force == NULL ? 0 : guard.force->epoch;
}

uint64_t guard_sequence(void)
{
    return guard.force == NULL ? 0 : guard.force->sequence;
}

/* Keep the newest password of a file that was read, as far as its lines were good. */
static void keep_portal(const struct journal *journal)
{
    const uint8_t *hash = registry_portal(journal->registry);

    if (hash != NULL) {
        memcpy(guard.portal, hash, HASH_BYTES);
        guard.has_portal = true;
    }
}

static void tell(void)
{
    char text[sizeof guard.told_text];
    bool good = guard_is_good();

    if (good) {
        snprintf(text, sizeof text, "The journal %s is in force: epoch %llu.", guard.path,
            (unsigned long long)guard.force->epoch);
    } else {
        snprintf(text, sizeof text,
            "The journal %s is not to be believed: %s. Every device is denied until the portal has written a good one.",
            guard.path, guard.damage == NULL ? "it was not read yet" : guard.damage);
    }
    if (!guard.told || strcmp(text, guard.told_text) != 0) {
        guard.told = true;
        memcpy(guard.told_text, text, sizeof text);
        guard.listener.changed(good, text);
    }
}

/* --- Another file than the one in force ------------------------------------------------------------------------- */

static void put_in_force(void)
{
    struct journal *before = guard.force;

    guard.force = guard.candidate;
    guard.candidate = NULL;
    guard.candidate_since = 0;
    guard.damage = NULL;
    keep_portal(guard.force);
    if (before != NULL) {
        guard.listener.replaced(before->registry, guard.force->registry);
        journal_close(before);
    }
}

/* Say why the candidate cannot replace what is in force, NULL if it can; it was read without a fault. */
static const char *objection(const struct journal *candidate, const struct journal *force)
{
    if (!candidate->has_header) {
        return "it is empty";
    }
    if (candidate->epoch < guard.wanted_epoch || (force != NULL && candidate->epoch < force->epoch)) {
        return "it is of an earlier epoch";
    }
    if (force == NULL || candidate->epoch > force->epoch) {
        return NULL;
    }
    if (candidate->sequence < force->sequence) {
        return "it ends before what was in force";
    }
    return candidate->marked && candidate->mark_checksum == force->checksum && candidate->base == force->base
               ? NULL
               : "it is of the same epoch and says something else";
}

static void judge_candidate(void)
{
    const char *problem = guard.candidate->fault;

    if (problem == NULL) {
        problem = objection(guard.candidate, guard.force);
    }
    if (problem != NULL) {
        guard.damage = problem;
        guard.candidate_since = 0;
    } else if (guard.force == NULL || guard.candidate->epoch == guard.force->epoch) {
        put_in_force();
    } else { /* of a new epoch: waits for the portal's word */
        if (guard.candidate_since == 0) {
            guard.candidate_since = now_milliseconds();
        }
        if (guard.damage != NULL || now_milliseconds() - guard.candidate_since > CONFIRM_MILLISECONDS) {
            guard.damage = "it is of a new epoch that the portal has not confirmed";
        }
    }
}

static void open_candidate(void)
{
    int64_t began = now_milliseconds();
    const char *reason;

    drop_candidate();
    guard.candidate = journal_open(guard.path, guard.force == NULL ? 0 : guard.force->sequence, &reason);
    if (guard.candidate == NULL) {
        guard.damage = reason;
        guard.candidate_since = 0;
        return;
    }
    (void)journal_follow(guard.candidate, NULL);
    if (guard.force == NULL) {
        keep_portal(guard.candidate);
    }
    guard.reread_after = now_milliseconds() + REREAD_SHARE * (1 + now_milliseconds() - began);
}

static void look_at_candidate(const struct stat *now, bool asked)
{
    struct journal *candidate = guard.candidate;

    if (candidate == NULL || !journal_is_file(candidate, now)) {
        guard.candidate_since = 0;
        open_candidate();
    } else if (!journal_is_unchanged(candidate, now) || candidate->passing) {
        if (candidate->fault == NULL && !journal_is_overwritten(candidate, now)) {
            (void)journal_follow(candidate, NULL);
        } else if (asked || now_milliseconds() >= guard.reread_after) {
            open_candidate();
        }
    }
    if (guard.candidate != NULL) {
        judge_candidate();
    }
}

/* --- The file in force ------------------------------------------------------------------------------------------ */

static void follow_force(void)
{
    if (!journal_follow(guard.force, guard.listener.lost)) {
        guard.damage = guard.force->fault;
    }
    keep_portal(guard.force);
}

static void look_at_force(const struct stat *now)
{
    drop_candidate(); /* there was another file for a while */
    guard.candidate_since = 0;
    if (journal_is_unchanged(guard.force, now)) {
        return;
    }
    if (journal_is_overwritten(guard.force, now)) {
        open_candidate(); /* which is the same file, read again */
        if (guard.candidate != NULL) {
            judge_candidate();
        }
        return;
    }
    follow_force();
}

bool guard_catch_up(void)
{
    if (!guard_is_good() || !journal_has_more(guard.force)) {
        return false;
    }
    follow_force();
    tell();
    return true;
}

void guard_look(bool asked)
{
    const char *reason;
    struct stat now;

    if (!journal_examine(guard.path, &now, &reason)) {
        guard.damage = reason;
    } else if (guard_is_good() && journal_is_file(guard.force, &now)) {
        look_at_force(&now);
    } else {
        look_at_candidate(&now, asked);
    }
    tell();
}

/* --- What the portal asks ----------------------------------------------------------------------------------------- */

bool guard_prove(uint64_t epoch, uint64_t sequence)
{
    guard_look(true);
    if (guard.force != NULL && epoch > guard.force->epoch &&
        (guard.candidate == NULL || guard.candidate->fault != NULL || guard.candidate->epoch != epoch)) {
        guard.wanted_epoch = epoch;
        guard.damage = "the portal has a later one, this is an old one";
        tell();
    }
    return guard_is_good() && guard.force->epoch == epoch && guard.force->sequence >= sequence;
}

bool guard_confirm(uint64_t epoch)
{
    const struct journal *candidate;

    guard_look(true);
    candidate = guard.candidate;
    if (candidate != NULL && candidate->fault == NULL && candidate->epoch == epoch &&
        objection(candidate, guard.force) == NULL) {
        put_in_force();
        tell();
    }
    return guard_is_good() && guard.force->epoch == epoch;
}
