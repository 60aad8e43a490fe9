/* See ../README.md. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef const char *esp_event_base_t;
typedef int esp_err_t;
typedef struct esp_mqtt_client *esp_mqtt_client_handle_t;
typedef void (*esp_event_handler_t)(void *, esp_event_base_t, int32_t, void *);
typedef enum { MQTT_EVENT_ANY = -1, MQTT_EVENT_CONNECTED = 1 } esp_mqtt_event_id_t;
typedef enum { MQTT_TRANSPORT_UNKNOWN, MQTT_TRANSPORT_OVER_TCP, MQTT_TRANSPORT_OVER_SSL } esp_mqtt_transport_t;
typedef struct { esp_mqtt_event_id_t event_id; esp_mqtt_client_handle_t client; } esp_mqtt_event_t;
typedef esp_mqtt_event_t *esp_mqtt_event_handle_t;
typedef struct {
    struct {
        struct { const char *uri, *hostname; esp_mqtt_transport_t transport; const char *path; uint32_t port; } address;
        struct { bool use_global_ca_store; const char *certificate; size_t certificate_len; } verification;
    } broker;
    struct {
        const char *username, *client_id;
        struct { const char *password, *certificate; size_t certificate_len; const char *key; size_t key_len; } authentication;
    } credentials;
    struct { bool disable_clean_session; int keepalive; } session;
} esp_mqtt_client_config_t;

esp_mqtt_client_handle_t esp_mqtt_client_init(const esp_mqtt_client_config_t *config);
esp_err_t esp_mqtt_client_register_event(
    esp_mqtt_client_handle_t client, esp_mqtt_event_id_t event, esp_event_handler_t handler, void *argument);
esp_err_t esp_mqtt_client_start(esp_mqtt_client_handle_t client);
int esp_mqtt_client_publish(
    esp_mqtt_client_handle_t client, const char *topic, const char *data, int len, int qos, int retain);
