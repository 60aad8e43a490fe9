#include "journal.h"

#include "line.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BUFFER_BYTES (256 * 1024) /* several of the longest lines */

static char buffer[BUFFER_BYTES]; /* the broker has one thread */

static int open_file(const char *path, struct stat *now, const char **reason)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);

    if (fd < 0) {
        *reason = errno == ENOENT ? "it is missing" : strerror(errno);
        return -1;
    }
    if (fstat(fd, now) != 0 || !S_ISREG(now->st_mode)) {
        *reason = "it is not a regular file";
        close(fd);
        return -1;
    }
    return fd;
}

bool journal_examine(const char *path, struct stat *now, const char **reason)
{
    int fd = open_file(path, now, reason);

    return fd >= 0 && close(fd) == 0;
}

struct journal *journal_open(const char *path, uint64_t mark, const char **reason)
{
    struct journal *journal = calloc(1, sizeof *journal);

    *reason = "there is no memory to read it";
    if (journal == NULL) {
        return NULL;
    }
    journal->mark_sequence = mark;
    journal->fd = open_file(path, &journal->seen, reason);
    if (journal->fd >= 0 && (journal->registry = registry_new()) != NULL) {
        return journal;
    }
    journal_close(journal);
    return NULL;
}

void journal_close(struct journal *journal)
{
    if (journal != NULL) {
        if (journal->fd >= 0) {
            close(journal->fd);
        }
        registry_free(journal->registry);
        free(journal);
    }
}

static bool fail(struct journal *journal, const char *reason)
{
    journal->fault = reason;
    return false;
}

static bool fail_for_now(struct journal *journal, const char *reason)
{
    journal->passing = true;
    return fail(journal, reason);
}

static void note_mark(struct journal *journal)
{
    if (journal->sequence == journal->mark_sequence) {
        journal->mark_checksum = journal->checksum;
        journal->marked = true;
    }
}

static bool take_line(struct journal *journal, char *line, size_t length, rights_lost lost)
{
    char id[MAX_ID_BYTES + 1];
    const char *reason;
    uint32_t running = journal->checksum; /* a line that is refused leaves the journal's as it is */
    enum outcome outcome;

    if (!line_verify(line, length, &running, &reason)) {
        return fail(journal, reason);
    }
    if (!journal->has_header) {
        if (!line_read_header(line, &journal->epoch, &journal->base)) {
            return fail(journal, "a header that is not of this format");
        }
        journal->has_header = true;
        journal->checksum = running;
        journal->sequence = journal->base;
        note_mark(journal);
        return true;
    }
    if (journal->sequence >= INT64_MAX) {
        return fail(journal, "a sequence number that is too large");
    }
    outcome = line_apply(line, journal->sequence + 1, journal->registry, id);
    if (outcome == REFUSED) {
        return fail(journal, "a line that is not of its format");
    }
    if (outcome == NO_MEMORY) {
        return fail_for_now(journal, "there is no memory for a line");
    }
    journal->checksum = running;
    journal->sequence++;
    note_mark(journal);
    if (outcome != DONE && lost != NULL) {
        lost(id, outcome);
    }
    return true;
}

/* Take the complete lines of the buffer; returns the bytes they have, or -1. */
static ssize_t take_lines(struct journal *journal, size_t filled, rights_lost lost)
{
    size_t taken = 0;

    for (;;) {
        char *line = buffer + taken;
        const char *end = memchr(line, '\n', filled - taken);
        size_t length = end == NULL ? filled - taken : (size_t)(end - line);
        if (length >= MAX_LINE_BYTES) {
            (void)fail(journal, "a line that is too long");
            return -1;
        }
        if (end == NULL) {
            return (ssize_t)taken;
        }
        if (!take_line(journal, line, length, lost)) {
            return -1;
        }
        taken += length + 1;
    }
}

bool journal_follow(struct journal *journal, rights_lost lost)
{
    if (journal->fault != NULL) {
        return false;
    }
    if (fstat(journal->fd, &journal->seen) != 0) {
        return fail_for_now(journal, "it cannot be examined");
    }
    if (journal->seen.st_size < journal->offset) {
        return fail(journal, "it is shorter than before");
    }
    for (;;) {
        ssize_t filled = pread(journal->fd, buffer, sizeof buffer, journal->offset), taken;
        if (filled < 0) {
            if (errno == EINTR) {
                continue;
            }
            return fail_for_now(journal, strerror(errno));
        }
        taken = take_lines(journal, (size_t)filled, lost);
        if (taken < 0) {
            return false;
        }
        journal->offset += taken;
        if (taken == 0) { /* at the end, or before a line that is being written */
            return true;
        }
    }
}

bool journal_is_file(const struct journal *journal, const struct stat *now)
{
    return journal->seen.st_dev == now->st_dev && journal->seen.st_ino == now->st_ino;
}

static bool is_same_time(const struct stat *one, const struct stat *other)
{
    return one->st_mtim.tv_sec == other->st_mtim.tv_sec && one->st_mtim.tv_nsec == other->st_mtim.tv_nsec;
}

bool journal_is_unchanged(const struct journal *journal, const struct stat *now)
{
    return journal->seen.st_size == now->st_size && is_same_time(&journal->seen, now);
}

bool journal_is_overwritten(const struct journal *journal, const struct stat *now)
{
    return journal->seen.st_size == now->st_size && !is_same_time(&journal->seen, now) &&
           journal->offset == now->st_size;
}

bool journal_has_more(const struct journal *journal)
{
    struct stat now;

    return fstat(journal->fd, &now) == 0 && !journal_is_unchanged(journal, &now) &&
           !journal_is_overwritten(journal, &now);
}
