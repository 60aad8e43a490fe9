/* See ../../README.md. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include "tls_credentials.h"

enum mqtt_qos { MQTT_QOS_0_AT_MOST_ONCE, MQTT_QOS_1_AT_LEAST_ONCE, MQTT_QOS_2_EXACTLY_ONCE };
enum mqtt_version { MQTT_VERSION_3_1_0 = 3, MQTT_VERSION_3_1_1 = 4 };
enum mqtt_transport_type { MQTT_TRANSPORT_NON_SECURE, MQTT_TRANSPORT_SECURE };
enum { TLS_PEER_VERIFY_NONE, TLS_PEER_VERIFY_OPTIONAL, TLS_PEER_VERIFY_REQUIRED };
struct mqtt_utf8 { const uint8_t *utf8; uint32_t size; };
struct mqtt_binstr { uint8_t *data; uint32_t len; };
struct mqtt_topic { struct mqtt_utf8 topic; uint8_t qos; };
struct mqtt_publish_message { struct mqtt_topic topic; struct mqtt_binstr payload; };
struct mqtt_publish_param { struct mqtt_publish_message message; uint16_t message_id; uint8_t dup_flag : 1, retain_flag : 1; };
struct mqtt_sec_config {
    int peer_verify;
    uint32_t cipher_count;
    const int *cipher_list;
    uint32_t sec_tag_count;
    const sec_tag_t *sec_tag_list;
    const char *hostname;
};
struct mqtt_transport {
    enum mqtt_transport_type type;
    struct { int sock; struct mqtt_sec_config config; } tls;
};
struct mqtt_client {
    struct mqtt_transport transport;
    struct mqtt_utf8 client_id;
    const void *broker;
    uint8_t *rx_buf, *tx_buf;
    uint32_t rx_buf_size, tx_buf_size;
    uint16_t keepalive;
    uint8_t protocol_version;
};
int mqtt_publish(struct mqtt_client *client, const struct mqtt_publish_param *param);
