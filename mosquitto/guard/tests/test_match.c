/* Compares the matcher with the broker's own mosquitto_topic_matches_sub, on all short filters and topics and on random
 * longer ones, and the two comparisons of filters with what they mean: a search through topics. */
#include "../match.h"

#include <mosquitto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TEXT 64
#define MAX_LEVELS 3
#define TOPICS 4096

static const char *levels[] = {"a", "b", "", "+", "#", "$a", "a+", "$SYS"};
static char topics[TOPICS][MAX_TEXT];
static size_t topic_count;
static unsigned long compared, failures;

static void fail(const char *what, const char *one, const char *other, bool ours)
{
    printf("%s: '%s' and '%s': ours says %s\n", what, one, other, ours ? "yes" : "no");
    failures++;
}

/* Write the text number `number`, of one to MAX_LEVELS levels; false after the last one. */
static bool nth_text(unsigned number, size_t choices, char text[MAX_TEXT])
{
    for (int count = 1, total = (int)choices; count <= MAX_LEVELS; count++, total *= (int)choices) {
        if (number < (unsigned)total) {
            text[0] = '\0';
            for (int i = 0; i < count; i++, number /= (unsigned)choices) {
                strcat(text, i > 0 ? "/" : "");
                strcat(text, levels[number % choices]);
            }
            return true;
        }
        number -= (unsigned)total;
    }
    return false;
}

static void compare_validity(const char *text)
{
    bool theirs = mosquitto_sub_topic_check(text) == MOSQ_ERR_SUCCESS;

    compared++;
    if (text[0] != '\0' && filter_is_valid(text) != theirs) {
        fail("valid", text, "", !theirs);
    }
}

static void compare_match(const char *filter, const char *topic)
{
    bool theirs = false;

    if (topic[0] == '\0' || mosquitto_topic_matches_sub(filter, topic, &theirs) != MOSQ_ERR_SUCCESS) {
        return;
    }
    compared++;
    if (filter_matches(filter, topic) != theirs) {
        fail("matches", filter, topic, !theirs);
    }
}

/* Say whether the filter matches the empty topic, which there is not. "+/#", too, matches all that "#" matches, as no
 * topic without a first level is left for it; our comparison does not know that, and says no. */
static bool has_empty_parent(const char *filter)
{
    return strcmp(filter, "/#") == 0;
}

/* The topics have a level more, and a level "c" more, than the filters, so that each difference shows in one of them. */
static void compare_filters(const char *one, const char *other)
{
    bool together = false, contained = true;

    for (size_t i = 0; i < topic_count; i++) {
        bool first = filter_matches(one, topics[i]), second = filter_matches(other, topics[i]);
        together = together || (first && second);
        contained = contained && (first || !second);
    }
    compared++;
    if (filters_intersect(one, other) != together && !has_empty_parent(one) && !has_empty_parent(other)) {
        fail("intersect", one, other, !together);
    }
    if (filter_contains(one, other) && !contained) {
        fail("contains", one, other, true);
    }
    if (!filter_contains(one, other) && contained && strcmp(other, "#") != 0 && !has_empty_parent(other)) {
        fail("contains", one, other, false);
    }
}

static void make_topics(void)
{
    static const char *words[] = {"a", "b", "", "c", "$a", "$SYS"};
    const size_t choices = sizeof words / sizeof *words;

    for (unsigned count = 1, total = (unsigned)choices; count <= 4; count++, total *= (unsigned)choices) {
        for (unsigned number = 0; number < total && topic_count < TOPICS; number++) {
            char *text = topics[topic_count];
            unsigned rest = number;
            text[0] = '\0';
            for (unsigned i = 0; i < count; i++, rest /= (unsigned)choices) {
                strcat(text, i > 0 ? "/" : "");
                strcat(text, words[rest % choices]);
            }
            topic_count += text[0] != '\0';
        }
    }
}

static void random_text(char *text, bool wildcards)
{
    int count = 1 + rand() % 8;

    text[0] = '\0';
    for (int i = 0; i < count; i++) {
        strcat(text, i > 0 ? "/" : "");
        strcat(text, levels[rand() % (wildcards ? 8 : 3)]);
    }
}

int main(void)
{
    char one[MAX_TEXT], other[MAX_TEXT];

    make_topics();
    for (unsigned i = 0; nth_text(i, 8, one); i++) {
        compare_validity(one);
        if (one[0] == '\0' || !filter_is_valid(one)) {
            continue;
        }
        for (size_t topic = 0; topic < topic_count; topic++) {
            compare_match(one, topics[topic]);
        }
    }
    for (unsigned i = 0; nth_text(i, 6, one); i++) {
        for (unsigned j = 0; strlen(one) < 6 && nth_text(j, 6, other); j++) {
            if (strlen(other) < 6 && one[0] && other[0] && filter_is_valid(one) && filter_is_valid(other)) {
                compare_filters(one, other);
            }
        }
    }
    srand(1);
    for (int i = 0; i < 500000; i++) {
        random_text(one, true);
        random_text(other, false);
        compare_validity(one);
        if (one[0] != '\0' && filter_is_valid(one)) {
            compare_match(one, other);
        }
    }
    printf("%lu comparisons, %lu differences\n", compared, failures);
    return failures > 0 || compared < 1000000;
}
