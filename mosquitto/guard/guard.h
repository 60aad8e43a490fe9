/* Which journal is in force: whether the file is to be believed, and what the portal is told about it. */
#ifndef GUARD_GUARD_H
#define GUARD_GUARD_H

#include "journal.h"

#include <stdbool.h>
#include <stdint.h>

#define CONFIRM_MILLISECONDS 10000 /* for which the old journal stays in force beside one of a new epoch */

/* What the guard tells of its own accord. All are called while it reads; none may call it back. */
struct guard_listener {
    rights_lost lost;                                                                 /* by a new line */
    void (*replaced)(const struct registry *before, const struct registry *now); /* by another file */
    void (*changed)(bool good, const char *what); /* a sentence for the log */
};

/* Begin with the journal at `path`, which is kept; it is not read yet. */
void guard_open(const char *path, const struct guard_listener *listener);
void guard_close(void);

/* Look whether the file has changed, and read what is new. `asked` if the portal waits for it: a damaged file that has
 * changed is then read again at once; else, as that takes a second for a million identities, only every so often. */
void guard_look(bool asked);

/* Read what was appended to the file in force since it was last read, before somebody is refused by it; say whether there
 * was something. Without that it costs one system call, so that it may be done in each check that refuses. What is in force
 * stays so until `guard_look`, also if another file is at the path now. Pointers into the registry are stale afterwards. */
bool guard_catch_up(void);

/* Return what is in force, damaged or not; NULL if nothing good was read since the start. */
const struct registry *guard_registry(void);

/* Say whether the journal in force may be believed now. While not, nobody that it decides for may do anything. */
bool guard_is_good(void);

/* Say whether this is the SHA-256 of the portal's password, by the newest good line that was read: of what is in force, a
 * damaged file's, too, or of a new epoch that waits to be confirmed. Compares in constant time. */
bool guard_is_portal(const uint8_t hash[HASH_BYTES]);

/* Answer the portal, after reading. */
bool guard_prove(uint64_t epoch, uint64_t sequence);
bool guard_confirm(uint64_t epoch);

uint64_t guard_epoch(void);
uint64_t guard_sequence(void);

#endif
