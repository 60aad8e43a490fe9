#include "line.h"

#include "checksum.h"

#include <string.h>

#define MAX_FIELDS (MAX_FILTERS + 4) /* sequence number, word, identity, tenant, filters */
#define OF_TENANT "in:"              /* before a tenant's name */

static int hex_value(char character)
{
    if (character >= '0' && character <= '9') {
        return character - '0';
    }
    return character >= 'a' && character <= 'f' ? character - 'a' + 10 : -1;
}

bool parse_number(const char *text, uint64_t *number)
{
    uint64_t value = 0;

    if (*text == '\0' || (text[0] == '0' && text[1] != '\0')) {
        return false;
    }
    for (; *text != '\0'; text++) {
        if (*text < '0' || *text > '9' || value > (INT64_MAX - (uint64_t)(*text - '0')) / 10) {
            return false;
        }
        value = value * 10 + (uint64_t)(*text - '0');
    }
    *number = value;
    return true;
}

bool line_verify(char *line, size_t length, uint32_t *previous, const char **reason)
{
    uint32_t given = 0, right;

    *reason = "a line that is not of its format";
    if (length <= CHECKSUM_BYTES || line[length - CHECKSUM_BYTES] != ' ') {
        return false;
    }
    for (size_t i = length - CHECKSUM_BYTES + 1; i < length; i++) {
        int value = hex_value(line[i]);
        if (value < 0) {
            return false;
        }
        given = given << 4 | (uint32_t)value;
    }
    length -= CHECKSUM_BYTES;
    right = checksum(*previous, line, length);
    if (given != right) {
        *reason = "a line with a wrong checksum";
        return false;
    }
    if (memchr(line, '\0', length) != NULL) {
        return false;
    }
    line[length] = '\0';
    *previous = right;
    return true;
}

/* Cut the line at its spaces; returns the number of fields, 0 if one is empty or there are too many. */
static size_t split(char *line, char *fields[], size_t most)
{
    size_t count = 0;

    for (;;) {
        size_t length = strcspn(line, " ");
        if (length == 0 || count == most) {
            return 0;
        }
        fields[count++] = line;
        line += length;
        if (*line == '\0') {
            return count;
        }
        *line++ = '\0';
    }
}

bool line_read_header(char *line, uint64_t *epoch, uint64_t *base)
{
    char *fields[4];
    uint64_t version;

    return split(line, fields, 4) == 4 && strcmp(fields[0], "portal-guard") == 0 &&
           parse_number(fields[1], &version) && version == FORMAT_VERSION && parse_number(fields[2], epoch) &&
           *epoch > 0 && parse_number(fields[3], base);
}

static bool parse_hash(const char *text, uint8_t hash[HASH_BYTES])
{
    for (size_t i = 0; i < (size_t)2 * HASH_BYTES; i++) {
        int value = hex_value(text[i]);
        if (value < 0) {
            return false;
        }
        hash[i / 2] = (uint8_t)(i % 2 ? hash[i / 2] | value : value << 4);
    }
    return text[(size_t)2 * HASH_BYTES] == '\0';
}

/* Read a serial number in lower-case hex without leading zeros; zero is "0". */
static bool parse_serial(const char *text, struct serial_number *serial)
{
    size_t digits = strlen(text);

    memset(serial, 0, sizeof *serial);
    if (strcmp(text, "0") == 0) {
        return true;
    }
    if (digits == 0 || digits > (size_t)2 * MAX_SERIAL_BYTES || text[0] == '0') {
        return false;
    }
    serial->length = (uint8_t)((digits + 1) / 2);
    for (size_t i = 0, place = digits % 2; i < digits; i++, place++) { /* an odd number of digits begins in a byte's middle */
        int value = hex_value(text[i]);
        if (value < 0) {
            return false;
        }
        serial->bytes[place / 2] = (uint8_t)(place % 2 ? serial->bytes[place / 2] | value : value << 4);
    }
    return true;
}

static int any_hex_value(char character)
{
    return character >= 'A' && character <= 'F' ? character - 'A' + 10 : hex_value(character);
}

/* Decode %XX in place; false if a byte stands there that must be encoded, or if the text would hold a NUL. */
static bool decode(char *text)
{
    char *to = text;

    for (; *text != '\0'; text++) {
        if (*text == '%') {
            int high = any_hex_value(text[1]), low = high < 0 ? -1 : any_hex_value(text[2]);
            if (low < 0 || (high == 0 && low == 0)) {
                return false;
            }
            *to++ = (char)(high << 4 | low);
            text += 2;
        } else if (*text > ' ' && *text < 0x7F) {
            *to++ = *text;
        } else {
            return false;
        }
    }
    *to = '\0';
    return true;
}

/* Read ACCESS:FILTER; the text is decoded in place. */
static bool parse_filter(char *field, struct filter *filter)
{
    static const struct {
        const char *word;
        size_t length;
        enum access access;
    } words[] = {{"r:", 2, READ}, {"w:", 2, WRITE}, {"rw:", 3, READ_WRITE}};

    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        if (strncmp(field, words[i].word, words[i].length) == 0) {
            filter->access = words[i].access;
            filter->text = field + words[i].length;
            return decode(field + words[i].length);
        }
    }
    return false;
}

/* --- What each word does: `fields` are those after it ----------------------------------------------------------- */

static enum outcome apply_portal(struct registry *registry, char **fields, size_t count)
{
    uint8_t hash[HASH_BYTES];

    return count == 1 && parse_hash(fields[0], hash) ? registry_set_portal(registry, hash) : REFUSED;
}

static enum outcome apply_prefix(struct registry *registry, char **fields, size_t count)
{
    return count == 1 && decode(fields[0]) ? registry_set_prefix(registry, fields[0]) : REFUSED;
}

/* Return the tenant's name if `field` names one, else NULL: then it is the first one. */
static const char *tenant_in(const char *field)
{
    return strncmp(field, OF_TENANT, strlen(OF_TENANT)) == 0 ? field + strlen(OF_TENANT) : NULL;
}

/* Say whether there is nothing behind the first field but perhaps the tenant, whose name is set then. */
static bool has_only_tenant(char **fields, size_t count, const char **tenant)
{
    *tenant = count == 2 ? tenant_in(fields[1]) : NULL;
    return count == 1 || *tenant != NULL;
}

static enum outcome apply_tenant(struct registry *registry, char **fields, size_t count)
{
    return count == 2 && decode(fields[1]) ? registry_add_tenant(registry, fields[0], fields[1]) : REFUSED;
}

static enum outcome apply_suspend(struct registry *registry, char **fields, size_t count)
{
    return count == 1 ? registry_suspend_tenant(registry, fields[0]) : REFUSED;
}

static enum outcome apply_issuer(struct registry *registry, char **fields, size_t count)
{
    uint8_t hash[HASH_BYTES];
    const char *tenant;

    return has_only_tenant(fields, count, &tenant) && parse_hash(fields[0], hash)
               ? registry_add_issuer(registry, hash, tenant)
               : REFUSED;
}

static enum outcome apply_allow(struct registry *registry, char **fields, size_t count)
{
    struct filter filters[MAX_FILTERS];
    const char *tenant = count >= 2 ? tenant_in(fields[1]) : NULL;
    size_t first = tenant == NULL ? 1 : 2;

    if (count > first + MAX_FILTERS) {
        return REFUSED;
    }
    for (size_t i = first; i < count; i++) {
        if (!parse_filter(fields[i], &filters[i - first])) {
            return REFUSED;
        }
    }
    return registry_allow(registry, fields[0], tenant, filters, count - first);
}

static enum outcome apply_deny(struct registry *registry, char **fields, size_t count)
{
    const char *tenant;

    return has_only_tenant(fields, count, &tenant) ? registry_deny(registry, fields[0], tenant) : REFUSED;
}

static enum outcome apply_forget(struct registry *registry, char **fields, size_t count)
{
    return count == 1 ? registry_forget(registry, fields[0]) : REFUSED;
}

static enum outcome apply_serial(struct registry *registry, char **fields, size_t count)
{
    uint8_t hash[HASH_BYTES];
    struct serial_number serial;

    if (count != 3 || !parse_hash(fields[0], hash) || !parse_serial(fields[1], &serial) || !is_id(fields[2])) {
        return REFUSED;
    }
    return registry_add_serial(registry, hash, &serial);
}

static enum outcome apply_unserial(struct registry *registry, char **fields, size_t count)
{
    uint8_t hash[HASH_BYTES];
    struct serial_number serial;

    if (count != 2 || !parse_hash(fields[0], hash) || !parse_serial(fields[1], &serial)) {
        return REFUSED;
    }
    return registry_remove_serial(registry, hash, &serial);
}

static enum outcome apply_generation(struct registry *registry, char **fields, size_t count)
{
    uint64_t number;

    (void)registry; /* the generation is for whoever reads the file */
    return count == 1 && parse_number(fields[0], &number) ? DONE : REFUSED;
}

static const struct {
    const char *word;
    enum outcome (*apply)(struct registry *registry, char **fields, size_t count);
    int id; /* which field is the identity, or the tenant, -1 if none */
} words[] = {
    {"allow", apply_allow, 0},
    {"deny", apply_deny, 0},
    {"forget", apply_forget, 0},
    {"serial", apply_serial, 2},
    {"unserial", apply_unserial, -1},
    {"generation", apply_generation, -1},
    {"portal", apply_portal, -1},
    {"prefix", apply_prefix, -1},
    {"issuer", apply_issuer, -1},
    {"tenant", apply_tenant, 0},
    {"suspend", apply_suspend, 0},
};

enum outcome line_apply(char *line, uint64_t sequence, struct registry *registry, char id[MAX_ID_BYTES + 1])
{
    char *fields[MAX_FIELDS];
    size_t count = split(line, fields, MAX_FIELDS);
    uint64_t number;
    enum outcome outcome;

    id[0] = '\0';
    if (count < 3 || !parse_number(fields[0], &number) || number != sequence) {
        return REFUSED;
    }
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        if (strcmp(fields[1], words[i].word) != 0) {
            continue;
        }
        outcome = words[i].apply(registry, fields + 2, count - 2);
        if (outcome < REFUSED && words[i].id >= 0) {
            strcpy(id, fields[2 + words[i].id]); /* is_id has limited it, or is_label */
        }
        return outcome;
    }
    return REFUSED;
}
