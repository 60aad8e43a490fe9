#include "clients.h"

#include "openssl.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FIRST_CAPACITY 256

static struct {
    struct client *slots; /* free where `key` is NULL */
    size_t capacity, count;
} clients;

static size_t home_of(const void *key)
{
    return (size_t)(((uint64_t)(uintptr_t)key * 0x9E3779B97F4A7C15u) >> 32) & (clients.capacity - 1);
}

static struct client *slot_of(const void *key)
{
    size_t at = home_of(key);

    while (clients.slots[at].key != NULL && clients.slots[at].key != key) {
        at = (at + 1) & (clients.capacity - 1);
    }
    return &clients.slots[at];
}

struct client *clients_find(const void *key)
{
    struct client *client = clients.count == 0 ? NULL : slot_of(key);

    return client == NULL || client->key == NULL ? NULL : client;
}

static bool grow(void)
{
    struct client *before = clients.slots, *bigger;
    size_t capacity = clients.capacity;

    if (capacity > 0 && clients.count < capacity / 2) {
        return true;
    }
    bigger = calloc(capacity == 0 ? FIRST_CAPACITY : capacity * 2, sizeof *bigger);
    if (bigger == NULL) {
        return false;
    }
    clients.slots = bigger;
    clients.capacity = capacity == 0 ? FIRST_CAPACITY : capacity * 2;
    for (size_t i = 0; i < capacity; i++) {
        if (before[i].key != NULL) {
            *slot_of(before[i].key) = before[i];
        }
    }
    free(before);
    return true;
}

static void release(struct client *client)
{
    free(client->name);
    X509_free(client->x509);
}

struct client *clients_note(const void *key, enum client_kind kind, const char *name)
{
    struct client *client;
    char *copy;

    if (!grow()) {
        return NULL;
    }
    copy = name == NULL ? NULL : strdup(name);
    if (name != NULL && copy == NULL) {
        return NULL;
    }
    client = slot_of(key);
    if (client->key == NULL) {
        clients.count++;
    } else {
        release(client);
    }
    *client = (struct client){.key = key, .name = copy, .kind = kind};
    return client;
}

void clients_keep_certificate(struct client *client, void *x509)
{
    X509_free(client->x509);
    client->x509 = x509;
}

void clients_remove(const void *key)
{
    struct client *client = clients_find(key);
    size_t hole, at, mask = clients.capacity - 1;

    if (client == NULL) {
        return;
    }
    release(client);
    *client = (struct client){0};
    clients.count--;
    hole = (size_t)(client - clients.slots);
    for (at = (hole + 1) & mask; clients.slots[at].key != NULL; at = (at + 1) & mask) { /* close the gap */
        size_t home = home_of(clients.slots[at].key);
        if (((at - home) & mask) >= ((at - hole) & mask)) {
            clients.slots[hole] = clients.slots[at];
            clients.slots[at] = (struct client){0};
            hole = at;
        }
    }
}

struct client *clients_next(size_t *at)
{
    while (*at < clients.capacity) {
        struct client *client = &clients.slots[(*at)++];
        if (client->key != NULL) {
            return client;
        }
    }
    return NULL;
}

void clients_clear(void)
{
    for (size_t at = 0; at < clients.capacity; at++) {
        release(&clients.slots[at]);
    }
    free(clients.slots);
    clients.slots = NULL;
    clients.capacity = clients.count = 0;
}
