/* What a line of the journal has changed. */
#ifndef GUARD_OUTCOME_H
#define GUARD_OUTCOME_H

enum outcome {
    DONE,
    RIGHTS_LOST,      /* done, and the identity may do less than before */
    SERIAL_REVOKED,   /* done, and connections with that certificate may do nothing */
    TENANT_SUSPENDED, /* done, and no identity of the tenant may do anything */
    REFUSED,          /* not done: it is malformed, contradicts an earlier line, or is too much */
    NO_MEMORY,        /* not done */
};

#endif
