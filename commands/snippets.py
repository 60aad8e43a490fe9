"""Programs for a device in several languages, with the values of one device in them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Template
from typing import Any

from commands.errors import CheckFailed, Unreachable

_HOST = re.compile("[A-Za-z0-9.:_-]{1,253}")
_UNCLEAR = "The portal's answer does not say where the broker is; its version may differ."
MOSQUITTO = """\
# In the folder of the unpacked bundle.
mosquitto_pub -h $host -p $port --cafile ca.pem --cert chain.pem --key device.key -i $client_id -t $topic -m 21 -q 1
"""
SUBSCRIBE = """\
mosquitto_sub -h $host -p $port --cafile ca.pem --cert chain.pem --key device.key -i $client_id -t $filter -v -q 1
"""
OPTIONS = """\
# Options for mosquitto_pub and mosquitto_sub, in this folder: mosquitto_pub $$(grep -v '^#' mosquitto-client.conf) -t …
# device.key is the key that the CSR was made with: copy it here under this name, or write its path below.
-h $host
-p $port
-i $client_id
--cafile ca.pem
--cert chain.pem
--key device.key
"""
PYTHON = """\
# pip install 'paho-mqtt>=2.0'; run it in the folder of the unpacked bundle.
import ssl

import paho.mqtt.client as mqtt

client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=$client_id, protocol=mqtt.MQTTv5)
client.tls_set("ca.pem", "chain.pem", "device.key", tls_version=ssl.PROTOCOL_TLS_CLIENT)
client.connect($host, $port, keepalive=60)
client.loop_start()
sent = client.publish($topic, "21", qos=1)
sent.wait_for_publish(timeout=20)
print("acknowledged:", sent.is_published())
client.disconnect()
client.loop_stop()
"""
NODE = """\
// npm install mqtt; run it in the folder of the unpacked bundle.
const fs = require("fs");
const mqtt = require("mqtt");

const client = mqtt.connect({
  protocol: "mqtts",
  host: $host,
  port: $port,
  protocolVersion: 5,
  clientId: $client_id,
  keepalive: 60,
  ca: fs.readFileSync("ca.pem"),
  cert: fs.readFileSync("chain.pem"),
  key: fs.readFileSync("device.key"),
});
client.on("connect", async () => {
  await client.publishAsync($topic, "21", { qos: 1 });
  console.log("acknowledged");
  await client.endAsync();
});
client.on("error", (error) => console.error(error.message));
"""
ESP_IDF = """\
// ESP-IDF 5. Set the clock (SNTP) first: certificates have dates. In CMakeLists.txt of the component:
// target_add_binary_data($${COMPONENT_TARGET} "ca.pem" TEXT), and the same for chain.pem and device.key.
#include <stddef.h>
#include "mqtt_client.h"

extern const char ca_pem[] asm("_binary_ca_pem_start");
extern const char chain_pem[] asm("_binary_chain_pem_start");
extern const char device_key[] asm("_binary_device_key_start");

static void on_connected(void *argument, esp_event_base_t base, int32_t id, void *data)
{
    esp_mqtt_event_handle_t event = data;
    (void)argument, (void)base, (void)id;
    esp_mqtt_client_publish(event->client, $topic, "21", 0, 1, 0);
}

void start_mqtt(void)
{
    const esp_mqtt_client_config_t config = {
        .broker.address.transport = MQTT_TRANSPORT_OVER_SSL,
        .broker.address.hostname = $host,
        .broker.address.port = $port,
        .broker.verification.certificate = ca_pem,
        .credentials.client_id = $client_id,
        .credentials.authentication.certificate = chain_pem,
        .credentials.authentication.key = device_key,
        .session.keepalive = 60,
    };
    esp_mqtt_client_handle_t client = esp_mqtt_client_init(&config);
    esp_mqtt_client_register_event(client, MQTT_EVENT_CONNECTED, on_connected, NULL);
    esp_mqtt_client_start(client);
}
"""
ZEPHYR = """\
/* Zephyr. Set the clock first: certificates have dates. Needs CONFIG_MQTT_LIB, CONFIG_MQTT_LIB_TLS and
 * CONFIG_NET_SOCKETS_SOCKOPT_TLS. ca_pem, chain_pem and device_key are the three files with a final zero byte. */
#include <string.h>
#include <zephyr/net/mqtt.h>
#include <zephyr/net/tls_credentials.h>

#define CREDENTIALS_TAG 42

extern const char ca_pem[], chain_pem[], device_key[];

static const sec_tag_t tags[] = { CREDENTIALS_TAG };

/* Call it after mqtt_client_init() and before mqtt_connect(). client->broker is the address of $host, port $port. */
int use_credentials(struct mqtt_client *client)
{
    static char client_id[] = $client_id;
    const sec_tag_t tag = CREDENTIALS_TAG;
    int error = tls_credential_add(tag, TLS_CREDENTIAL_CA_CERTIFICATE, ca_pem, strlen(ca_pem) + 1);
    if (error == 0) {
        error = tls_credential_add(tag, TLS_CREDENTIAL_PUBLIC_CERTIFICATE, chain_pem, strlen(chain_pem) + 1);
    }
    if (error == 0) {
        error = tls_credential_add(tag, TLS_CREDENTIAL_PRIVATE_KEY, device_key, strlen(device_key) + 1);
    }
    client->client_id.utf8 = (uint8_t *)client_id;
    client->client_id.size = sizeof(client_id) - 1;
    client->protocol_version = MQTT_VERSION_3_1_1;
    client->keepalive = 60;
    client->transport.type = MQTT_TRANSPORT_SECURE;
    client->transport.tls.config.peer_verify = TLS_PEER_VERIFY_REQUIRED;
    client->transport.tls.config.sec_tag_list = tags;
    client->transport.tls.config.sec_tag_count = 1;
    client->transport.tls.config.hostname = $host;
    return error;
}

/* Call it once MQTT_EVT_CONNACK has come. */
int publish(struct mqtt_client *client)
{
    static char topic[] = $topic, value[] = "21";
    struct mqtt_publish_param message = { 0 };
    message.message.topic.topic.utf8 = (uint8_t *)topic;
    message.message.topic.topic.size = sizeof(topic) - 1;
    message.message.topic.qos = MQTT_QOS_1_AT_LEAST_ONCE;
    message.message.payload.data = (uint8_t *)value;
    message.message.payload.len = sizeof(value) - 1;
    message.message_id = 1;
    return mqtt_publish(client, &message);
}
"""


@dataclass(frozen=True, slots=True)
class Snippet:
    """A template, and how a text is quoted in its language."""

    template: str
    quoted: Callable[[str], str]


SNIPPETS: Mapping[str, Snippet] = {
    "mosquitto": Snippet(MOSQUITTO, shlex.quote),
    "python": Snippet(PYTHON, json.dumps),
    "node": Snippet(NODE, json.dumps),
    "esp-idf": Snippet(ESP_IDF, json.dumps),
    "zephyr": Snippet(ZEPHYR, json.dumps),
}


def snippet_for(device: Mapping[str, Any], kind: str) -> str:
    """Return a program that connects as the device and publishes to its first topic.

    Raises ``CheckFailed`` if it may publish nowhere, ``Unreachable`` if the answer does not say where the broker is.
    """
    client_id, host, port = _address(device)
    try:
        topics = [(str(topic["filter"]).replace("{id}", client_id), topic["access"]) for topic in device["topics"]]
    except (KeyError, TypeError):
        raise Unreachable(_UNCLEAR) from None
    writable = [pattern for pattern, access in topics if access != "read"]
    readable = [pattern for pattern, access in topics if access != "write"]
    if not writable and kind != "mosquitto":
        raise CheckFailed("The device may publish to no topic, so only --snippet mosquitto has something for it.")
    snippet = SNIPPETS[kind]
    texts = {"host": host, "client_id": client_id}
    texts |= {"topic": writable[0].replace("#", "hello").replace("+", "hello")} if writable else {}
    texts |= {"filter": readable[0]} if readable else {}
    template = snippet.template
    if kind == "mosquitto":
        comment, _, publish = MOSQUITTO.partition("\n")
        template = f"{comment}\n{publish if writable else ''}{SUBSCRIBE if readable else ''}"
    quoted = {name: snippet.quoted(value) for name, value in texts.items()}
    return Template(template).substitute(quoted, port=port)


def client_options(device: Mapping[str, Any]) -> str:
    """Return the options for Mosquitto's clients of a device with a key of its own; raises ``Unreachable``."""
    client_id, host, port = _address(device)
    return Template(OPTIONS).substitute(client_id=client_id, host=host, port=port)


def _address(device: Mapping[str, Any]) -> tuple[str, str, int]:
    """Return the client id, and host and port of the first broker; raises ``Unreachable`` if the answer lacks them."""
    try:
        broker = device["brokers"][0]
        client_id, host, port = str(device["device_id"]), str(broker["host"]), int(broker["port"])
    except (KeyError, IndexError, TypeError, ValueError):
        raise Unreachable(_UNCLEAR) from None
    if not _HOST.fullmatch(host):  # it is in a comment of C, too
        raise Unreachable(_UNCLEAR)
    return client_id, host, port
