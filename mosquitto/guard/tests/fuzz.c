/* Feeds mutated journals and filters to what reads them; build with AddressSanitizer and UBSan.
 *
 *   fuzz SECONDS [SEED]
 *
 * Three kinds of rounds, in turn. `damage`: a right journal is cut, flipped, swapped, appended to and replaced while the
 * guard follows it; whenever the guard believes it, each identity must stand as the lines that were written say. `lines`:
 * mutated lines with right checksums, so that they are taken in. `filters`: random filters and topics, whose comparisons
 * must not contradict each other. Ends with status 1 at the first contradiction. */
#include "../checksum.h"
#include "../guard.h"
#include "../line.h"
#include "../match.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define IDENTITIES 8
#define TENANTS 3
#define MAX_LINES 40
#define MAX_FILE 200000

static char path[] = "/tmp/guard-fuzz-XXXXXX/journal", other_path[] = "/tmp/guard-fuzz-XXXXXX/journal.new";
static char file[MAX_FILE];
static size_t file_length;
static const char *ids[IDENTITIES] = {"00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002",
    "00000000-0000-4000-8000-000000000003", "00000000-0000-4000-8000-00000000000A", "telegraf", "node.red", "a", "-_-"};

/* The tenants besides the first: where what belongs to each begins, and how a line names it. */
static const struct {
    const char *prefix, *line, *in;
} tenants[TENANTS] = {{"devices", "", ""}, {"plant/b", "tenant b plant/b", " in:b"}, {"c", "tenant c c", " in:c"}};

/* What a journal says up to a line. */
struct state {
    enum standing stands[IDENTITIES]; /* without regard to tenants */
    unsigned tenant[IDENTITIES];
    bool known[TENANTS], suspended[TENANTS];
};

/* The right journal: what each line says, and how all stand after it. */
static char lines[MAX_LINES][160];
static struct state states[MAX_LINES + 1];
static size_t line_count;
static uint64_t epoch = 1;
static unsigned long believed;

static unsigned below(unsigned limit)
{
    return (unsigned)rand() % limit;
}

static void contradiction(const char *what)
{
    printf("contradiction: %s\n%.*s\n", what, (int)file_length, file);
    exit(1);
}

/* --- Journals --------------------------------------------------------------------------------------------------- */

static void add_line(char *into, size_t *length, uint32_t *previous, const char *text, size_t text_length)
{
    if (*length + text_length + 16 > MAX_FILE) {
        return;
    }
    *previous = checksum(*previous, text, text_length);
    memcpy(into + *length, text, text_length);
    *length += text_length;
    *length += (size_t)sprintf(into + *length, " %08x\n", (unsigned)*previous);
}

/* Write a line of a tenant, or of who is allowed: an identity that is allowed stays in its tenant. */
static void make_line(char *line, struct state *state, unsigned who, unsigned which)
{
    bool own = below(2) == 0;

    if (which > 0 && (!state->known[which] || below(4) == 0)) {
        state->suspended[which] = state->known[which] && below(2) == 0;
        sprintf(line, state->suspended[which] ? "suspend %.1s" : "%s", tenants[which].line + (state->suspended[which] ? 7 : 0));
        state->known[which] = true;
        return;
    }
    which = state->stands[who] == ALLOWED ? state->tenant[who] : which;
    sprintf(line, own ? "allow %s%s rw:x/%s/# r:y/+/%%C3%%BC" : "allow %s%s", ids[who], tenants[which].in, ids[who]);
    state->stands[who] = ALLOWED;
    state->tenant[who] = which;
}

static void make_history(void)
{
    line_count = 1 + below(MAX_LINES - 1);
    memset(states, 0, sizeof states);
    for (size_t i = 0; i < line_count; i++) {
        unsigned who = below(IDENTITIES);
        struct state *state = &states[i + 1];
        *state = states[i];
        switch (below(5)) {
        case 0:
            sprintf(lines[i], "deny %s", ids[who]);
            state->stands[who] = DENIED;
            break;
        case 1:
            sprintf(lines[i], "forget %s", ids[who]);
            state->stands[who] = FORGOTTEN;
            break;
        case 2:
            sprintf(lines[i], "generation %u", below(1000));
            break;
        default:
            make_line(lines[i], state, who, below(TENANTS));
        }
    }
}

/* Render the first lines of the history; `file` then holds a journal that is right. */
static void render(size_t count)
{
    char text[256];
    uint32_t previous = 0;

    file_length = 0;
    add_line(file, &file_length, &previous, text, (size_t)sprintf(text, "portal-guard 1 %llu 0", (unsigned long long)epoch));
    for (size_t i = 0; i < count; i++) {
        add_line(file, &file_length, &previous, text, (size_t)sprintf(text, "%zu %s", i + 1, lines[i]));
    }
}

static void write_file(const char *to, size_t length)
{
    FILE *stream = fopen(to, to == path ? "r+" : "w");

    if (stream == NULL && (stream = fopen(to, "w")) == NULL) {
        perror(to);
        exit(2);
    }
    fwrite(file, 1, length, stream);
    fclose(stream);
    if (truncate(to, (off_t)length) != 0) {
        exit(2);
    }
}

/* Change some bytes of the file. */
static void mutate(void)
{
    for (unsigned times = below(4); times > 0 && file_length > 2; times--) {
        size_t at = below((unsigned)file_length), length = 1 + below(60);
        length = length > file_length - at ? file_length - at : length;
        switch (below(6)) {
        case 0:
            file[at] ^= (char)(1u << below(8));
            break;
        case 1:
            file_length = at;
            break;
        case 2:
            memmove(file + at, file + at + length, file_length - at - length);
            file_length -= length;
            break;
        case 3:
            memmove(file + at, file + below((unsigned)(file_length - length + 1)), length);
            break;
        case 4:
            file[at] = "\n \0%:#+/0a"[below(10)];
            break;
        default:
            if (file_length + length < MAX_FILE) {
                memmove(file + at + length, file + at, file_length - at);
                file_length += length;
            }
        }
    }
}

static void ignore_loss(const char *id, enum outcome outcome)
{
    (void)id;
    (void)outcome;
}

static void ignore_replacement(const struct registry *before, const struct registry *now)
{
    for (size_t i = 0; i < IDENTITIES; i++) {
        (void)registry_lost_rights(before, now, ids[i]);
    }
}

static void ignore_change(bool good, const char *what)
{
    (void)good;
    (void)what;
}

static void check_identity(const struct registry *registry, const struct state *state, size_t i)
{
    const struct identity *identity = registry_find(registry, ids[i]);
    bool suspended = state->stands[i] == ALLOWED && state->suspended[state->tenant[i]];

    if (registry_standing(registry, ids[i]) != (suspended ? SUSPENDED : state->stands[i])) {
        contradiction("an identity stands otherwise than written");
    }
    for (unsigned which = 0; which < TENANTS; which++) {
        char topic[128];
        bool allowed = state->stands[i] == ALLOWED && !suspended && state->tenant[i] == which;
        sprintf(topic, "%s/%s/x", tenants[which].prefix, ids[i]);
        if (registry_may(registry, identity, ids[i], WRITE, topic) && !allowed) {
            contradiction("an identity that is not allowed, or another tenant's, may publish");
        }
        (void)registry_may_share(registry, identity, ids[i], topic);
        (void)registry_is_of_denied(registry, topic);
    }
    (void)registry_may_subscribe(registry, identity, ids[i], "x/+/#");
}

/* What is believed must be what was written. */
static void check_state(void)
{
    const struct registry *registry = guard_registry();
    uint64_t sequence = guard_sequence();

    if (!guard_is_good()) {
        return;
    }
    believed++;
    if (guard_epoch() != epoch || sequence > line_count) {
        contradiction("a journal is believed that was not written");
    }
    for (size_t i = 0; i < IDENTITIES; i++) {
        check_identity(registry, &states[sequence], i);
    }
}

static const struct guard_listener listener = {ignore_loss, ignore_replacement, ignore_change};

static void fuzz_damage(void)
{
    unlink(path);
    guard_open(path, &listener);
    make_history();
    for (unsigned step = 0; step < 12; step++) {
        render(below((unsigned)line_count + 1));
        if (below(3) == 0) {
            mutate();
        }
        switch (below(4)) {
        case 0:
            unlink(path);
            break;
        case 1:
            write_file(other_path, file_length);
            rename(other_path, path);
            break;
        default:
            write_file(path, file_length);
        }
        switch (below(4)) {
        case 0:
            (void)guard_prove(epoch + below(5) / 4, below((unsigned)line_count + 1));
            break;
        case 1:
            (void)guard_confirm(epoch);
            break;
        case 2:
            (void)guard_catch_up();
            break;
        default:
            guard_look(below(2) == 0);
        }
        check_state();
    }
    guard_close();
}

/* --- Lines ------------------------------------------------------------------------------------------------------ */

static void fuzz_lines(void)
{
    static const char *seeds[] = {"portal 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff", "prefix a/b%20c",
        "issuer 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff", "allow a-b rw:a/+/# r:b/%C3%BC w:c",
        "allow 00000000-0000-4000-8000-000000000001", "deny 00000000-0000-4000-8000-000000000001", "forget a-b",
        "serial 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff 1f00 a-b",
        "unserial 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff 1f00", "generation 12", "tenant b plant/b",
        "tenant c c/%C3%BC/d", "suspend b", "allow a-b in:b", "allow a-b in:c rw:c/+/# r:b", "deny a-b in:b",
        "issuer 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff in:c"};
    char text[512], id[MAX_ID_BYTES + 1];
    uint32_t previous = 0;
    struct registry *registry = registry_new();
    uint64_t number;

    for (unsigned i = 1; registry != NULL && i < 200; i++) {
        const char *reason;
        size_t length = (size_t)sprintf(file, "%u %s", i, seeds[below(sizeof seeds / sizeof *seeds)]);
        file_length = length;
        if (below(2) == 0) {
            mutate();
        }
        length = file_length < sizeof text - 16 ? file_length : sizeof text - 16;
        memcpy(text, file, length);
        number = checksum(previous, text, length);
        length += (size_t)sprintf(text + length, " %08x", (unsigned)number);
        if (line_verify(text, length, &previous, &reason)) {
            (void)line_apply(text, i, registry, id);
        }
        (void)registry_may_subscribe(registry, registry_find(registry, "a-b"), "a-b", "a/+/#");
        (void)registry_may(registry, registry_find(registry, "a-b"), "a-b", READ, "a/b/c");
        (void)registry_is_of_denied(registry, "c/\xC3\xBC/d/a-b/#");
        memcpy(text, file, sizeof text - 1);
        text[sizeof text - 1] = '\0';
        (void)line_read_header(text, &number, &number);
    }
    registry_free(registry);
}

/* --- Filters ---------------------------------------------------------------------------------------------------- */

static void random_filter(char text[256])
{
    static const char *parts[] = {"a", "b", "/", "/", "/", "+", "#", "$", "\xC3\xBC", "\xFF", "\x01", "$share/g/"};

    text[0] = '\0';
    for (unsigned count = 1 + below(12); count > 0; count--) {
        strcat(text, parts[below(12)]);
    }
}

static void fuzz_filters(void)
{
    char one[256], other[256], topic[256];

    for (unsigned i = 0; i < 2000; i++) {
        random_filter(one);
        random_filter(other);
        random_filter(topic);
        if (!filter_is_valid(one) || !filter_is_valid(other) || !filter_is_valid(topic) || has_wildcard(topic)) {
            continue;
        }
        if (filter_matches(one, topic) && filter_matches(other, topic) && !filters_intersect(one, other)) {
            contradiction("two filters match a topic and do not intersect");
        }
        if (filter_contains(one, other) && filter_matches(other, topic) && !filter_matches(one, topic)) {
            contradiction("a filter contains another one and does not match its topic");
        }
        if (filter_contains(one, other) && !filters_intersect(one, other)) {
            contradiction("a filter contains another one and does not intersect it");
        }
        if (filters_intersect(one, other) != filters_intersect(other, one)) {
            contradiction("filters intersect in one order only");
        }
    }
}

int main(int count, char **arguments)
{
    time_t end = time(NULL) + (count > 1 ? atoi(arguments[1]) : 10);
    unsigned seed = count > 2 ? (unsigned)atoi(arguments[2]) : (unsigned)time(NULL);
    unsigned long rounds = 0;
    char folder[] = "/tmp/guard-fuzz-XXXXXX";

    srand(seed);
    if (mkdtemp(folder) == NULL) {
        return 2;
    }
    memcpy(path, folder, strlen(folder));
    memcpy(other_path, folder, strlen(folder));
    printf("seed %u\n", seed);
    for (; time(NULL) < end; rounds++) {
        fuzz_damage();
        fuzz_lines();
        if (rounds % 16 == 0) {
            fuzz_filters();
        }
    }
    unlink(path);
    unlink(other_path);
    rmdir(folder);
    printf("%lu rounds, a journal was believed %lu times, no contradiction\n", rounds, believed);
    return believed == 0;
}
