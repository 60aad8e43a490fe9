/* Tries what the guard reads before it refuses somebody; build with AddressSanitizer and UBSan. */
#include "../checksum.h"
#include "../guard.h"
#include "expect.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ONE "00000000-0000-4000-8000-000000000001"
#define TWO "00000000-0000-4000-8000-000000000002"

static char folder[] = "/tmp/guard-catch-up-XXXXXX", path[sizeof folder + 16], next_path[sizeof folder + 16];

/* A journal as it is written. */
struct written {
    int fd;
    uint32_t previous;
    unsigned long sequence;
};

static unsigned lost; /* of how many losses of rights the guard has told */

static void count_loss(const char *id, enum outcome outcome)
{
    (void)id;
    (void)outcome;
    lost++;
}

static void ignore_replacement(const struct registry *before, const struct registry *now)
{
    (void)before;
    (void)now;
}

static void ignore_change(bool good, const char *what)
{
    (void)good;
    (void)what;
}

static const struct guard_listener listener = {count_loss, ignore_replacement, ignore_change};

static void put(struct written *written, const char *bytes, size_t length)
{
    if (write(written->fd, bytes, length) != (ssize_t)length) {
        exit(2);
    }
}

/* Render the next line with its checksum and LF; return its length. */
static size_t render(struct written *written, char line[256], const char *text)
{
    int length = written->sequence == 0 ? snprintf(line, 200, "%s", text)
                                        : snprintf(line, 200, "%lu %s", written->sequence, text);

    written->sequence++;
    written->previous = checksum(written->previous, line, (size_t)length);
    return (size_t)length + (size_t)sprintf(line + length, " %08x\n", (unsigned)written->previous);
}

static void add(struct written *written, const char *text)
{
    char line[256];

    put(written, line, render(written, line, text));
}

static struct written begin(const char *where, const char *header)
{
    struct written written = {.fd = open(where, O_RDWR | O_CREAT | O_TRUNC, 0600)};

    add(&written, header);
    return written;
}

static struct written begin_in_force(void)
{
    struct written written = begin(path, "portal-guard 1 1 0");

    lost = 0;
    guard_open(path, &listener);
    guard_look(false);
    EXPECT(guard_is_good() && !guard_catch_up());
    return written;
}

static void end(struct written *written)
{
    guard_close();
    close(written->fd);
    unlink(path);
}

static bool is_allowed(const char *id)
{
    return registry_standing(guard_registry(), id) == ALLOWED;
}

static void test_lines_that_were_appended_are_read_once(void)
{
    struct written written = begin_in_force();

    add(&written, "allow " ONE);
    EXPECT(!is_allowed(ONE));
    EXPECT(guard_catch_up() && is_allowed(ONE) && lost == 0);
    EXPECT(!guard_catch_up());
    add(&written, "deny " ONE);
    add(&written, "allow " TWO);
    EXPECT(guard_catch_up() && !is_allowed(ONE) && is_allowed(TWO) && lost == 1);
    EXPECT(!guard_catch_up());
    end(&written);
}

static void test_a_line_that_is_being_written_is_looked_at_once(void)
{
    struct written written = begin_in_force();
    char line[256];
    size_t length = render(&written, line, "allow " ONE);

    put(&written, line, 20);
    EXPECT(guard_catch_up() && !is_allowed(ONE) && guard_is_good());
    EXPECT(!guard_catch_up());
    put(&written, line + 20, length - 20);
    EXPECT(guard_catch_up() && is_allowed(ONE));
    end(&written);
}

static void test_the_file_in_force_is_read_while_a_new_epoch_waits_at_its_path(void)
{
    struct written written = begin_in_force(), next;

    add(&written, "allow " ONE);
    next = begin(next_path, "portal-guard 1 2 0");
    add(&next, "allow " TWO);
    EXPECT(rename(next_path, path) == 0);
    EXPECT(guard_catch_up() && is_allowed(ONE) && !is_allowed(TWO));
    guard_look(false);
    EXPECT(guard_is_good() && guard_epoch() == 1);
    add(&written, "deny " ONE);
    EXPECT(guard_catch_up() && !is_allowed(ONE));
    add(&next, "allow " ONE);
    EXPECT(!guard_catch_up() && !is_allowed(ONE)); /* it is not in force */
    EXPECT(guard_confirm(2) && is_allowed(ONE) && is_allowed(TWO));
    add(&next, "deny " TWO);
    EXPECT(guard_catch_up() && !is_allowed(TWO));
    close(next.fd);
    end(&written);
}

static void test_damage_denies_everybody_and_is_not_read_again(void)
{
    struct written written = begin_in_force();

    add(&written, "allow " ONE);
    EXPECT(guard_catch_up() && guard_is_good());
    put(&written, "3 allow " TWO " 00000000\n", sizeof "3 allow " TWO " 00000000\n" - 1);
    EXPECT(guard_catch_up() && !guard_is_good() && !is_allowed(TWO));
    add(&written, "allow " TWO);
    EXPECT(!guard_catch_up() && !guard_is_good());
    end(&written);
}

static void test_bytes_that_were_replaced_are_left_to_the_next_look(void)
{
    struct written written = begin_in_force();
    struct timespec times[2] = {{.tv_sec = 1}, {.tv_sec = 1}};

    add(&written, "allow " ONE);
    EXPECT(guard_catch_up() && is_allowed(ONE));
    EXPECT(pwrite(written.fd, "x", 1, 0) == 1 && futimens(written.fd, times) == 0);
    EXPECT(!guard_catch_up() && guard_is_good());
    guard_look(false);
    EXPECT(!guard_is_good());
    end(&written);
}

static void test_a_file_that_was_cut_is_damaged(void)
{
    struct written written = begin_in_force();

    add(&written, "allow " ONE);
    EXPECT(guard_catch_up() && is_allowed(ONE));
    EXPECT(ftruncate(written.fd, 30) == 0);
    EXPECT(guard_catch_up() && !guard_is_good());
    end(&written);
}

static void test_nothing_is_read_before_a_journal_is_in_force(void)
{
    guard_open(path, &listener);
    EXPECT(!guard_catch_up());
    guard_look(false);
    EXPECT(!guard_catch_up() && !guard_is_good());
    guard_close();
}

int main(void)
{
    if (mkdtemp(folder) == NULL) {
        return 2;
    }
    sprintf(path, "%s/journal", folder);
    sprintf(next_path, "%s/journal.new", folder);
    test_lines_that_were_appended_are_read_once();
    test_a_line_that_is_being_written_is_looked_at_once();
    test_the_file_in_force_is_read_while_a_new_epoch_waits_at_its_path();
    test_damage_denies_everybody_and_is_not_read_again();
    test_bytes_that_were_replaced_are_left_to_the_next_look();
    test_a_file_that_was_cut_is_damaged();
    test_nothing_is_read_before_a_journal_is_in_force();
    rmdir(folder);
    return failures > 0;
}
