/* CRC-32 as zlib computes it, for the lines of the journal. */
#ifndef GUARD_CHECKSUM_H
#define GUARD_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

/* Return the CRC-32 of `length` bytes, continued from `previous`, which is 0 at the beginning: zlib.crc32(data, previous). */
uint32_t checksum(uint32_t previous, const void *data, size_t length);

#endif
