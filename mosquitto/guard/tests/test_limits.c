/* What one identity may ask for: budgets of SUBSCRIBE, and topics with a retained message. */
#include "../limits.h"
#include "expect.h"

#include <stdio.h>
#include <stdlib.h>

#define TOPICS 5000
#define MOST 2000

/* Return how many filters are granted at once. */
static unsigned granted(const char *id, enum cost cost, int64_t now)
{
    unsigned count = 0;

    while (count < 2 * SUBSCRIBE_BUDGET && limits_subscribe(id, cost, now)) {
        count++;
    }
    return count;
}

static void test_subscribe(void)
{
    EXPECT(granted("one", OTHER_TOPICS, 100) == 4);
    EXPECT(granted("one", ONE_TOPIC, 129) == 0);
    EXPECT(granted("other", OWN_TOPICS, 129) == 64);
    EXPECT(granted("third", ONE_TOPIC, 129) == 256);
    EXPECT(granted("one", OWN_TOPICS, 130) == 64);
    EXPECT(limits_subscribe("other", OTHER_TOPICS, 130));
    EXPECT(granted("other", OWN_TOPICS, 130) == 48);
    limits_clear();
}

static void test_subscribe_to_what_it_keeps(void)
{
    for (uint64_t topic = 0; topic < 10000; topic++) {
        EXPECT(limits_retain("one", (topic + 1) * 0x9E3779B97F4A7C15u));
    }
    EXPECT(granted("other", OWN_TOPICS, 500) == 64);
    EXPECT(granted("one", OWN_TOPICS, 500) == 8); /* each 4 + 10,000 / 400 */
    EXPECT(granted("one", ONE_TOPIC, 500) == 24);
    EXPECT(granted("one", OTHER_TOPICS, 530) == 2);
    limits_clear();
    limits_set_retained(1000000);
    for (uint64_t topic = 0; topic < 200000; topic++) {
        EXPECT(limits_retain("one", (topic + 1) * 0x9E3779B97F4A7C15u));
    }
    EXPECT(granted("one", OWN_TOPICS, 560) == 1); /* it may do so once, however many it may leave */
    limits_clear();
}

static void test_retained(void)
{
    limits_set_retained(2);
    EXPECT(limits_retain("one", 0) && limits_retain("one", 7));
    EXPECT(!limits_retain("one", 8));
    EXPECT(limits_retain("one", 0)); /* in place of the first */
    EXPECT(limits_retain("other", 8));
    limits_clear_retained("one", 9); /* there is none */
    EXPECT(!limits_retain("one", 10));
    limits_clear_retained("one", 0);
    EXPECT(limits_retain("one", 10));
    EXPECT(!limits_retain("one", 0));
    limits_clear();
    EXPECT(limits_retain("one", 0));
    limits_clear();
}

/* Many topics that come and go must be counted as a plain list counts them. */
static void test_against_a_list(void)
{
    static bool kept[TOPICS];
    size_t count = 0;

    limits_set_retained(MOST);
    srand(1);
    for (unsigned i = 0; i < 2000000; i++) {
        size_t at = (size_t)rand() % TOPICS;
        uint64_t topic = (uint64_t)(at % 100) | (uint64_t)at << 32; /* long runs of slots */
        if (rand() % 2) {
            bool fits = kept[at] || count < MOST;
            if (limits_retain("one", topic) != fits) {
                expect(false, "a topic fits as the list says");
                break;
            }
            count += fits && !kept[at];
            kept[at] = fits;
        } else {
            limits_clear_retained("one", topic);
            count -= kept[at];
            kept[at] = false;
        }
    }
    limits_clear();
}

int main(void)
{
    test_subscribe();
    test_subscribe_to_what_it_keeps();
    test_retained();
    test_against_a_list();
    printf("limits: %u failures\n", failures);
    return failures > 0;
}
