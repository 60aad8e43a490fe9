/* One file of the journal, read from its header on, and followed as it grows. */
#ifndef GUARD_JOURNAL_H
#define GUARD_JOURNAL_H

#include "registry.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

/* Is told of each line that was applied with RIGHTS_LOST, SERIAL_REVOKED or TENANT_SUSPENDED: `id` is of an identity,
 * or the tenant's name. */
typedef void (*rights_lost)(const char *id, enum outcome outcome);

struct journal {
    int fd;
    struct stat seen; /* as it was when last read */
    int64_t offset;   /* after the last complete line that was applied */
    uint32_t checksum;
    bool has_header;
    uint64_t epoch, base, sequence;
    uint64_t mark_sequence; /* the checksum after this line is kept in mark_checksum, if `marked` */
    uint32_t mark_checksum;
    bool marked;
    struct registry *registry;
    const char *fault; /* NULL while all is well, else why the file is not: for the log */
    bool passing;      /* the fault is of the system, and may pass without a change of the file */
};

/* Open the file; it is not read yet. Returns NULL with the reason if that is not possible. `mark` is the number of a
 * line whose running checksum is wanted, so that two files can be compared. */
struct journal *journal_open(const char *path, uint64_t mark, const char **reason);
void journal_close(struct journal *journal);

/* Open the path only to examine the file, as journal_open would. Returns false, with the reason, if it is missing or
 * may not be read. */
bool journal_examine(const char *path, struct stat *now, const char **reason);

/* Read and apply the complete lines that were added. Returns false, and sets `fault`, if the file is damaged: it then
 * stays so. `lost` may be NULL. */
bool journal_follow(struct journal *journal, rights_lost lost);

/* Say whether `now`, of the path, is the file that was opened. */
bool journal_is_file(const struct journal *journal, const struct stat *now);

/* Say whether the file looks the same as when it was last read. */
bool journal_is_unchanged(const struct journal *journal, const struct stat *now);

/* Say whether bytes may have been replaced that were read before: it was written to, and is as long as it was. */
bool journal_is_overwritten(const struct journal *journal, const struct stat *now);

/* Say whether there may be lines in the opened file that were not read, and none that was read has been replaced. It costs
 * one system call. The path, by which another file may be found meanwhile, is not looked at. */
bool journal_has_more(const struct journal *journal);

#endif
