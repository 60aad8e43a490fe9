/* What the tests of the guard say of an expectation that does not hold, and count. */
#ifndef GUARD_TESTS_EXPECT_H
#define GUARD_TESTS_EXPECT_H

#include <stdbool.h>
#include <stdio.h>

static unsigned failures;

#define EXPECT(condition) expect(condition, #condition)

static void expect(bool holds, const char *what)
{
    if (!holds) {
        printf("not so: %s\n", what);
        failures++;
    }
}

#endif
