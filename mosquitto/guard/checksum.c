#include "checksum.h"

#include <stdbool.h>

#define POLYNOMIAL 0xEDB88320u /* of CRC-32, the low bit first */
#define STRIDE 8               /* bytes that one round takes */

static uint32_t table[STRIDE][256];
static bool ready;

/* Fill the tables: table[n][b] is the checksum of the byte b with n zero bytes after it. */
static void make_table(void)
{
    for (unsigned byte = 0; byte < 256; byte++) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; bit++) {
            value = (value >> 1) ^ ((value & 1) ? POLYNOMIAL : 0);
        }
        table[0][byte] = value;
    }
    for (int zeros = 1; zeros < STRIDE; zeros++) {
        for (unsigned byte = 0; byte < 256; byte++) {
            uint32_t before = table[zeros - 1][byte];
            table[zeros][byte] = (before >> 8) ^ table[0][before & 0xFF];
        }
    }
    ready = true;
}

uint32_t checksum(uint32_t previous, const void *data, size_t length)
{
    const uint8_t *bytes = data;
    uint32_t value = ~previous;

    if (!ready) {
        make_table();
    }
    for (; length >= STRIDE; length -= STRIDE, bytes += STRIDE) {
        value = table[7][(value & 0xFF) ^ bytes[0]] ^ table[6][((value >> 8) & 0xFF) ^ bytes[1]] ^
                table[5][((value >> 16) & 0xFF) ^ bytes[2]] ^ table[4][(value >> 24) ^ bytes[3]] ^
                table[3][bytes[4]] ^ table[2][bytes[5]] ^ table[1][bytes[6]] ^ table[0][bytes[7]];
    }
    for (; length > 0; length--, bytes++) {
        value = (value >> 8) ^ table[0][(value ^ *bytes) & 0xFF];
    }
    return ~value;
}
