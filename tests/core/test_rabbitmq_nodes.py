"""The nodes of a RabbitMQ cluster, as a setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from config import Settings
from core.errors import SettingInvalid
from core.rabbitmq_nodes import RabbitmqNode, parse_rabbitmq_nodes, parse_tenant_ports
from core.setting_values import Address

NODE = {"name": "rabbit@a", "mqtt": "a.example.org:8883", "management": "https://a.example.org:15671"}


def test_a_node_is_a_name_two_addresses_and_a_folder() -> None:
    here = {"name": "rabbit@b", "mqtt": "[::1]:8883", "management": "http://127.0.0.1:15672/", "folder": "/srv/b"}
    assert parse_rabbitmq_nodes(json.dumps([NODE, here])) == (
        RabbitmqNode("rabbit@a", Address("a.example.org", 8883), "https://a.example.org:15671", None),
        RabbitmqNode("rabbit@b", Address("::1", 8883), "http://127.0.0.1:15672", Path("/srv/b")),
    )
    assert parse_rabbitmq_nodes("") == ()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{", "must be a JSON list"),
        ("[" * 100_000, "must be a JSON list"),
        ("{}", "must be a JSON list"),
        ("[]", "must be a JSON list"),
        ([NODE] * 33, "must be a JSON list"),
        ([{**NODE, "vhost": "/"}], "must be a JSON list"),
        ([{"name": "rabbit@a"}], "must be a JSON list"),
        ([{**NODE, "mqtt": 8883}], "must be a JSON list"),
        ([{**NODE, "folder": ""}], "must be a JSON list"),
        ([{**NODE, "name": "a"}], "has a node 'a', whose name"),
        ([{**NODE, "name": "\x1b[31m@a"}], r"has a node '\\x1b"),
        ([{**NODE, "mqtt": "a.example.org"}], "has a node rabbit@a with an address that must be HOST:PORT"),
        ([{**NODE, "management": "a.example.org"}], "has a node rabbit@a with an address that must be an http"),
        ([{**NODE, "management": "https://u:secret@a"}], "has a node rabbit@a with a user"),
        ([{**NODE, "management": "http://a.example.org:15672"}], "in the clear over the network"),
        ([{**NODE, "folder": "portal"}], "has a node rabbit@a whose folder is no absolute path"),
        ([NODE, {**NODE, "mqtt": "b:1"}], "its own name"),
        ([NODE, {**NODE, "name": "rabbit@b"}], "its own MQTT address"),
    ],
)
def test_another_value_is_refused_with_what_is_wrong(value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        parse_rabbitmq_nodes(value if isinstance(value, str) else json.dumps(value))
    assert "secret" not in str(caught.value)


def test_each_further_tenant_has_a_port() -> None:
    assert parse_tenant_ports('{"acme": 8884, "beta": 8885}') == {"acme": 8884, "beta": 8885}
    assert parse_tenant_ports("") == {}


@pytest.mark.parametrize(
    "value",
    [
        "[]",
        "{",
        '{"acme": "8884"}',
        '{"acme": 0}',
        '{"acme": 65536}',
        '{"acme": true}',
        '{"Acme": 1}',
        '{"a": 1, "b": 1}',
    ],
)
def test_ports_of_something_else_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"^(must|has)"):
        parse_tenant_ports(value)


CLUSTER = {
    "PORTAL_BROKER_CONTROL": "rabbitmq",
    "PORTAL_RABBITMQ_NODES": json.dumps([NODE]),
    "PORTAL_RABBITMQ_PASSWORD_FILE": "/etc/portal/rabbitmq",
    "PORTAL_RABBITMQ_BIND": "127.0.0.1:8445",
    "PORTAL_RABBITMQ_URL": "https://portal.example.org:8445/",
}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({**CLUSTER, "PORTAL_RABBITMQ_NODES": ""}, "PORTAL_BROKER_CONTROL=rabbitmq needs PORTAL_RABBITMQ_NODES"),
        ({"PORTAL_BROKER_CONTROL": "rabbitmq"}, "NODES and PORTAL_RABBITMQ_PASSWORD_FILE and PORTAL_RABBITMQ_BIND"),
        ({**CLUSTER, "PORTAL_BROKER_CONTROL": "guard"}, "PORTAL_RABBITMQ_NODES needs PORTAL_BROKER_CONTROL=rabbitmq"),
        ({**CLUSTER, "PORTAL_RABBITMQ_BIND": "0.0.0.0:8445", "PORTAL_RABBITMQ_URL": ""}, "URL must be set"),
        ({**CLUSTER, "PORTAL_RABBITMQ_URL": ""}, "PORTAL_RABBITMQ_URL must have a name"),
        ({**CLUSTER, "PORTAL_RABBITMQ_BIND": "127.0.0.1:8443"}, "PORTAL_RABBITMQ_BIND must be another address"),
        ({**CLUSTER, "PORTAL_RABBITMQ_CACHE_SECONDS": "3"}, "from 0 to 2"),
        ({**CLUSTER, "PORTAL_RABBITMQ_TENANT_PORTS": '{"acme": 8883}'}, "must have other ports than PORTAL_MQTT_PORT"),
    ],
)
def test_a_cluster_is_described_whole_or_not_at_all(environment: dict[str, str], said: str) -> None:
    with pytest.raises(SettingInvalid, match=said):
        Settings.from_env(environment)


def test_a_cluster_is_asked_by_the_names_of_the_docs() -> None:
    settings = Settings.from_env(CLUSTER)
    assert settings.rabbitmq_url == "https://portal.example.org:8445"
    assert (settings.rabbitmq_user, settings.rabbitmq_cache_seconds, settings.mqtt_tls) == ("portal", 1, "1.2")
    assert settings.enforce_timeout == 10
    assert settings.broker_control.by_journal


def test_devices_of_a_tenant_are_told_its_port() -> None:
    settings = Settings.from_env({**CLUSTER, "PORTAL_RABBITMQ_TENANT_PORTS": '{"acme": 8884}'})
    assert settings.broker_addresses_of("acme") == (Address("localhost", 8884),)
    assert settings.broker_addresses_of("default") == settings.broker_addresses == (Address("localhost", 8883),)


def test_nodes_may_be_tables_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "portal.toml"
    lines = [f'{name.removeprefix("PORTAL_").lower()} = "{CLUSTER[name]}"' for name in CLUSTER if "NODES" not in name]
    node = [f'{name} = "{value}"' for name, value in NODE.items()]
    path.write_text("\n".join([*lines, "[[rabbitmq_nodes]]", *node, ""]))
    path.chmod(0o600)
    assert Settings.from_env({"PORTAL_CONFIG": str(path)}).rabbitmq_nodes == parse_rabbitmq_nodes(json.dumps([NODE]))
