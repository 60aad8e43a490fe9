/* A hash of bytes with a random seed, so that nobody can choose keys that collide. */
#ifndef GUARD_HASHING_H
#define GUARD_HASHING_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct seed {
    uint64_t words[2]; /* the second one is odd */
};

/* Multiply to 128 bits and fold them into 64: each bit of both depends on all of the result. */
static inline uint64_t fold(uint64_t one, uint64_t other)
{
    unsigned __int128 product = (unsigned __int128)one * other;

    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t hash_bytes(const struct seed *seed, const void *data, size_t length)
{
    const uint8_t *bytes = data;
    uint64_t state = seed->words[0] ^ length, word;

    for (; length >= sizeof word; length -= sizeof word, bytes += sizeof word) {
        memcpy(&word, bytes, sizeof word);
        state = fold(state ^ word, seed->words[1]);
    }
    word = 0;
    memcpy(&word, bytes, length);
    return fold(state ^ word, seed->words[1] ^ 0x9E3779B97F4A7C15u);
}

#endif
