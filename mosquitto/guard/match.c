#include "match.h"

#include <stdint.h>
#include <string.h>

/* Return the number of bytes of the UTF-8 character at `text`, 0 if it is malformed or a control character. */
static size_t character_length(const unsigned char *text)
{
    static const uint32_t smallest[] = {0, 0, 0x80, 0x800, 0x10000};
    size_t length = text[0] < 0x80 ? 1 : text[0] < 0xC0 ? 0 : text[0] < 0xE0 ? 2 : text[0] < 0xF0 ? 3 : text[0] < 0xF8 ? 4 : 0;
    uint32_t point = length == 1 ? text[0] : text[0] & (0x7Fu >> length);

    for (size_t i = 1; i < length; i++) {
        if ((text[i] & 0xC0) != 0x80) { /* the NUL at the end, too */
            return 0;
        }
        point = point << 6 | (text[i] & 0x3Fu);
    }
    if (length == 0 || point < smallest[length] || point > 0x10FFFF || (point >= 0xD800 && point <= 0xDFFF)) {
        return 0;
    }
    return point < 0x20 || (point >= 0x7F && point < 0xA0) ? 0 : length;
}

static bool is_text(const char *text)
{
    for (const unsigned char *at = (const unsigned char *)text; *at;) {
        size_t length = character_length(at);
        if (length == 0) {
            return false;
        }
        at += length;
    }
    return true;
}

static size_t level_length(const char *text)
{
    return strcspn(text, "/");
}

static bool is_level(const char *text, size_t length, char wildcard)
{
    return length == 1 && text[0] == wildcard;
}

static bool begins_with_wildcard(const char *filter)
{
    return filter[0] == '#' || filter[0] == '+';
}

bool has_wildcard(const char *topic)
{
    return strpbrk(topic, "+#") != NULL;
}

bool filter_is_valid(const char *filter)
{
    int levels = 0;

    if (filter[0] == '\0' || strlen(filter) > MAX_TOPIC_BYTES || !is_text(filter)) {
        return false;
    }
    for (const char *at = filter;; at++) {
        size_t length = level_length(at);
        bool wildcard = length > 0 && strcspn(at, "+#") < length;
        if (++levels > MAX_TOPIC_LEVELS || (wildcard && length != 1) || (wildcard && *at == '#' && at[1] != '\0')) {
            return false;
        }
        at += length;
        if (*at == '\0') {
            return true;
        }
    }
}

bool filter_matches(const char *filter, const char *topic)
{
    if (topic[0] == '$' && begins_with_wildcard(filter)) {
        return false;
    }
    for (;; filter++, topic++) {
        size_t length = level_length(filter), given = level_length(topic);
        if (is_level(filter, length, '#')) {
            return true;
        }
        if (!is_level(filter, length, '+') && (length != given || memcmp(filter, topic, length) != 0)) {
            return false;
        }
        filter += length;
        topic += given;
        if (*topic == '\0') {
            return *filter == '\0' || strcmp(filter, "/#") == 0; /* `#` matches the parent level */
        }
        if (*filter == '\0') {
            return false;
        }
    }
}

bool filters_intersect(const char *one, const char *other)
{
    if ((one[0] == '$' && begins_with_wildcard(other)) || (other[0] == '$' && begins_with_wildcard(one))) {
        return false;
    }
    for (;; one++, other++) {
        size_t length = level_length(one), given = level_length(other);
        if (is_level(one, length, '#') || is_level(other, given, '#')) {
            return true;
        }
        if (!is_level(one, length, '+') && !is_level(other, given, '+') &&
            (length != given || memcmp(one, other, length) != 0)) {
            return false;
        }
        one += length;
        other += given;
        if (*one == '\0') {
            return *other == '\0' || strcmp(other, "/#") == 0;
        }
        if (*other == '\0') {
            return strcmp(one, "/#") == 0;
        }
    }
}

bool filter_contains(const char *wide, const char *narrow)
{
    if (narrow[0] == '$' && begins_with_wildcard(wide)) {
        return false;
    }
    for (;; wide++, narrow++) {
        size_t length = level_length(wide), given = level_length(narrow);
        if (is_level(wide, length, '#')) {
            return true;
        }
        if (is_level(narrow, given, '#')) {
            return false;
        }
        if (!is_level(wide, length, '+') && (length != given || memcmp(wide, narrow, length) != 0)) {
            return false;
        }
        wide += length;
        narrow += given;
        if (*narrow == '\0') {
            return *wide == '\0' || strcmp(wide, "/#") == 0;
        }
        if (*wide == '\0') {
            return false;
        }
    }
}
