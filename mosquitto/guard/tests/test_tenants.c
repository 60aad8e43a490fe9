/* Tries the lines of tenants, as the journal's reader applies them; build with AddressSanitizer and UBSan. */
#include "../line.h"
#include "expect.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ONE "00000000-0000-4000-8000-000000000001"
#define TWO "00000000-0000-4000-8000-000000000002"
#define HASH "00112233445566778899aabbccddeeff00112233445566778899aabbccddee"

static struct registry *registry;
static uint64_t sequence;

static void begin(void)
{
    registry_free(registry);
    registry = registry_new();
    sequence = 0;
}

static enum outcome apply(const char *text)
{
    char line[512], id[MAX_ID_BYTES + 1];

    snprintf(line, sizeof line, "%llu %s", (unsigned long long)++sequence, text);
    return line_apply(line, sequence, registry, id);
}

static bool may(const char *id, enum access access, const char *topic)
{
    return registry_may(registry, registry_find(registry, id), id, access, topic);
}

static void begin_with_two(void)
{
    begin();
    EXPECT(apply("tenant b plant/b") == DONE);
    EXPECT(apply("tenant c c") == DONE);
}

static void test_default_topics_are_below_the_tenants_prefix(void)
{
    begin_with_two();
    EXPECT(apply("allow " ONE) == DONE);
    EXPECT(apply("allow " TWO " in:b") == DONE);
    EXPECT(apply("allow telegraf in:c r:c/#") == DONE);
    EXPECT(may(ONE, WRITE, "devices/" ONE "/x") && !may(ONE, WRITE, "plant/b/" ONE "/x"));
    EXPECT(may(TWO, WRITE, "plant/b/" TWO "/x") && !may(TWO, WRITE, "devices/" TWO "/x") && !may(TWO, READ, "c/" TWO));
    EXPECT(may("telegraf", READ, "c/x") && !may("telegraf", READ, "plant/b/x") && !may("telegraf", WRITE, "c/x"));
    EXPECT(registry_tenant_of(registry_find(registry, ONE)) == FIRST_TENANT);
    EXPECT(registry_tenant_of(registry_find(registry, TWO)) != registry_tenant_of(registry_find(registry, "telegraf")));
}

static void test_a_suspension_is_of_all_and_its_end_gives_all_back(void)
{
    begin_with_two();
    EXPECT(apply("allow " ONE " in:b") == DONE);
    EXPECT(apply("allow " TWO " in:c") == DONE);
    EXPECT(apply("suspend b") == TENANT_SUSPENDED);
    EXPECT(registry_standing(registry, ONE) == SUSPENDED && registry_standing(registry, TWO) == ALLOWED);
    EXPECT(!may(ONE, READ, "plant/b/" ONE "/x") && !may(ONE, WRITE, "plant/b/" ONE "/x"));
    EXPECT(may(TWO, READ, "c/" TWO "/x"));
    EXPECT(registry_may_subscribe(registry, registry_find(registry, ONE), ONE, "plant/b/" ONE "/#")); /* what a session keeps */
    EXPECT(!registry_may_subscribe(registry, registry_find(registry, ONE), ONE, "c/#"));
    EXPECT(apply("allow 00000000-0000-4000-8000-000000000003 in:b") == DONE);
    EXPECT(registry_standing(registry, "00000000-0000-4000-8000-000000000003") == SUSPENDED);
    EXPECT(apply("suspend b") == TENANT_SUSPENDED);
    EXPECT(apply("deny " ONE " in:b") == RIGHTS_LOST);
    EXPECT(registry_standing(registry, ONE) == DENIED);
    EXPECT(apply("tenant b plant/b") == DONE);
    EXPECT(registry_standing(registry, ONE) == DENIED);
    EXPECT(registry_standing(registry, "00000000-0000-4000-8000-000000000003") == ALLOWED);
}

static void test_an_identity_that_is_allowed_is_never_another_tenants(void)
{
    static const char *others[] = {"allow " ONE, "allow " ONE " in:c", "deny " ONE " in:c", "allow " ONE " in:c r:c/#"};

    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        begin_with_two();
        EXPECT(apply("allow " ONE " in:b") == DONE);
        EXPECT(apply(others[i]) == REFUSED);
    }
    begin_with_two();
    EXPECT(apply("allow " ONE " in:b") == DONE);
    EXPECT(apply("forget " ONE) == RIGHTS_LOST);
    EXPECT(apply("allow " ONE " in:c") == DONE);
    EXPECT(may(ONE, READ, "c/" ONE "/x") && !may(ONE, READ, "plant/b/" ONE "/x"));
}

static void test_a_denied_identity_keeps_its_tenant_and_what_it_has_left_can_be_cleared(void)
{
    begin_with_two();
    EXPECT(apply("allow " ONE " in:b") == DONE);
    EXPECT(!registry_is_of_denied(registry, "plant/b/" ONE "/#"));
    EXPECT(apply("deny " ONE) == RIGHTS_LOST);
    EXPECT(registry_is_of_denied(registry, "plant/b/" ONE "/#") && registry_is_of_denied(registry, "plant/b/" ONE));
    EXPECT(!registry_is_of_denied(registry, "devices/" ONE "/#") && !registry_is_of_denied(registry, "c/" ONE "/#"));
    EXPECT(!registry_is_of_denied(registry, "plant/b/x/" ONE "/#") && !registry_is_of_denied(registry, ONE));
    EXPECT(apply("deny " TWO " in:c") == RIGHTS_LOST); /* the first line of it in a new journal */
    EXPECT(registry_is_of_denied(registry, "c/" TWO "/x") && !registry_is_of_denied(registry, "devices/" TWO "/x"));
    EXPECT(apply("deny unknown") == RIGHTS_LOST);
    EXPECT(registry_is_of_denied(registry, "devices/unknown/x"));
}

static void test_an_issuer_is_of_one_tenant(void)
{
    uint8_t hash[HASH_BYTES] = {0};
    uint16_t tenant = 99, other;

    begin_with_two();
    EXPECT(apply("serial " HASH "01 1f " ONE) == SERIAL_REVOKED); /* known, and nobody's yet */
    EXPECT(apply("issuer " HASH "01 in:b") == DONE && apply("issuer " HASH "01 in:b") == DONE);
    EXPECT(apply("issuer " HASH "02") == DONE && apply("issuer " HASH "03 in:c") == DONE);
    for (int last = 1; last <= 3; last++) {
        for (int i = 0; i < HASH_BYTES; i++) {
            hash[i] = (uint8_t)((i % 16) * 0x11);
        }
        hash[HASH_BYTES - 1] = (uint8_t)last;
        EXPECT(registry_find_issuer(registry, hash, &other) && other != tenant);
        EXPECT((last == 2) == (other == FIRST_TENANT));
        tenant = other;
    }
    EXPECT(apply("issuer " HASH "01") == REFUSED);
    begin_with_two();
    EXPECT(apply("issuer " HASH "01") == DONE && apply("issuer " HASH "01 in:b") == REFUSED);
}

static void test_malformed_unknown_and_overlapping_are_damage(void)
{
    static const char *bad[] = {"tenant b", "tenant b plant/b x", "tenant b other", "tenant B x", "tenant -x x", "tenant x- x",
        "tenant x.y x", "tenant x x/+", "tenant x #", "tenant x $x", "tenant x x%0", "tenant x devices", "tenant x devices/y",
        "tenant x plant", "tenant x plant/b", "tenant x plant/b/y", "tenant x c", "tenant x c/d",
        "tenant aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa x", "suspend x", "suspend", "suspend b c",
        "suspend in:b", "allow " ONE " in:x", "allow " ONE " in:", "allow " ONE " r:a in:b", "allow " ONE " in:b in:b",
        "deny " ONE " in:x", "deny " ONE " b", "deny " ONE " in:b x", "forget " ONE " in:b", "issuer " HASH "01 in:x",
        "issuer " HASH "01 b", "issuer " HASH "01 in:b x", "prefix x"};
    static const char *good[] = {"tenant x plant/c", "tenant x plantb", "tenant x cc", "tenant x devices2", "tenant 1-x x/y/z",
        "tenant b plant/b", "tenant x %63%63"};

    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        begin_with_two();
        expect(apply(bad[i]) == REFUSED, bad[i]);
    }
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        begin_with_two();
        expect(apply(good[i]) == DONE, good[i]);
    }
    begin();
    EXPECT(apply("prefix sites/x") == DONE);
    EXPECT(apply("tenant b devices") == DONE && apply("tenant c sites") == REFUSED && apply("tenant d sites/x/y") == REFUSED);
}

static void test_an_allow_line_has_sixty_four_filters_beside_its_tenant(void)
{
    char text[1024] = "allow " ONE " in:b";
    enum outcome outcome = REFUSED;

    for (int count = 1; count <= MAX_FILTERS + 1; count++) {
        sprintf(text + strlen(text), " r:a/%d", count);
        if (count >= MAX_FILTERS) {
            char line[1100], id[MAX_ID_BYTES + 1];
            begin_with_two();
            snprintf(line, sizeof line, "3 %s", text);
            outcome = line_apply(line, 3, registry, id);
            EXPECT(outcome == (count == MAX_FILTERS ? DONE : REFUSED));
        }
    }
}

/* 65,535 tenants with an identity and a CA each, and 65,536 hashes of issuers. */
static void test_the_limits(void)
{
    char text[256];
    uint8_t hash[HASH_BYTES] = {0};
    uint16_t tenant;

    begin();
    for (unsigned i = 1; i <= MAX_TENANTS; i++) {
        snprintf(text, sizeof text, "tenant t%u x/t%u", i, i);
        EXPECT(apply(text) == DONE);
        snprintf(text, sizeof text, "allow d%u in:t%u", i, i);
        EXPECT(apply(text) == DONE);
        snprintf(text, sizeof text, "issuer %064x in:t%u", i, i);
        EXPECT(apply(text) == DONE);
    }
    EXPECT(apply("tenant more more") == REFUSED);
    snprintf(text, sizeof text, "issuer %064x", MAX_ISSUERS);
    EXPECT(apply(text) == DONE);
    snprintf(text, sizeof text, "issuer %064x", MAX_ISSUERS + 1);
    EXPECT(apply(text) == REFUSED);
    EXPECT(may("d65535", READ, "x/t65535/d65535/x") && !may("d65535", READ, "x/t65534/d65535/x"));
    EXPECT(apply("suspend t65535") == TENANT_SUSPENDED);
    EXPECT(registry_standing(registry, "d65535") == SUSPENDED && registry_standing(registry, "d65534") == ALLOWED);
    hash[HASH_BYTES - 2] = 0xFF;
    hash[HASH_BYTES - 1] = 0xFE;
    EXPECT(registry_find_issuer(registry, hash, &tenant));
    EXPECT(tenant == registry_tenant_of(registry_find(registry, "d65534")));
}

static void test_rights_are_compared_over_two_journals(void)
{
    struct registry *before;

    begin_with_two();
    EXPECT(apply("allow " ONE " in:b") == DONE);
    before = registry;
    registry = NULL;
    begin();
    EXPECT(apply("tenant c c") == DONE && apply("tenant b plant/b") == DONE); /* with other numbers */
    EXPECT(apply("allow " ONE " in:b") == DONE);
    EXPECT(!registry_lost_rights(before, registry, ONE));
    begin();
    EXPECT(apply("tenant b elsewhere") == DONE && apply("allow " ONE " in:b") == DONE);
    EXPECT(registry_lost_rights(before, registry, ONE));
    registry_free(before);
}

int main(void)
{
    test_default_topics_are_below_the_tenants_prefix();
    test_a_suspension_is_of_all_and_its_end_gives_all_back();
    test_an_identity_that_is_allowed_is_never_another_tenants();
    test_a_denied_identity_keeps_its_tenant_and_what_it_has_left_can_be_cleared();
    test_an_issuer_is_of_one_tenant();
    test_malformed_unknown_and_overlapping_are_damage();
    test_an_allow_line_has_sixty_four_filters_beside_its_tenant();
    test_the_limits();
    test_rights_are_compared_over_two_journals();
    registry_free(registry);
    printf("%u failures\n", failures);
    return failures != 0;
}
