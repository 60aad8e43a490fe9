"""The nodes of a RabbitMQ cluster that is the broker: the value of a setting."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from core.setting_values import Address, is_loopback, parse_address, parse_path, parse_url
from core.tenants import check_tenant_name

MAX_NODES = 32
_KEYS = {"name", "mqtt", "management", "folder"}
_NEEDED = _KEYS - {"folder"}
_EXAMPLE = '[{"name": "rabbit@a", "mqtt": "a.example.org:8883", "management": "https://a.example.org:15671"}]'
_SYNTAX = f"must be a JSON list of nodes, such as {_EXAMPLE}"


class RabbitmqNode(NamedTuple):
    """A node: its name in the cluster, where MQTT and its management API are, and the folder that it reads.

    The ``folder`` is ``None`` where it is the broker folder.
    """

    name: str
    mqtt: Address
    management: str
    folder: Path | None


MAX_TENANT_PORTS = 1000
_PORTS_SYNTAX = 'must be a JSON object of tenants, each with the port of its listener, such as {"acme": 8884}'


def parse_rabbitmq_nodes(value: str) -> tuple[RabbitmqNode, ...]:
    """Return the nodes of a JSON list; empty stays empty.

    Raises ``ValueError`` with the end of a sentence that begins with the name of the setting.
    """
    if not value:
        return ()
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(_SYNTAX) from None
    if not isinstance(read, list) or not 0 < len(read) <= MAX_NODES:
        raise ValueError(_SYNTAX)
    nodes = tuple(map(_node, read))
    for what, own in (("name", [node.name for node in nodes]), ("MQTT address", [node.mqtt for node in nodes])):
        if len(set(own)) < len(own):
            raise ValueError(f"must have nodes each of which has its own {what}")
    return nodes


def _node(read: object) -> RabbitmqNode:
    if not isinstance(read, dict) or not _NEEDED <= read.keys() <= _KEYS:
        raise ValueError(_SYNTAX)
    if not all(isinstance(text, str) and text for text in read.values()):
        raise ValueError(_SYNTAX)
    return _checked(read)


def _checked(read: Mapping[str, Any]) -> RabbitmqNode:
    name = read["name"]
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}@[A-Za-z0-9.-]{1,253}", name):
        raise ValueError(f"has a node {name[:64]!a}, whose name must be that in its cluster, such as rabbit@a")
    try:
        mqtt = parse_address(read["mqtt"], example="a.example.org:8883")
        management = parse_url(read["management"])
    except ValueError as error:
        raise ValueError(f"has a node {name} with an address that {error}") from None
    parts = urlsplit(management)
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"has a node {name} with a user in its URL: set PORTAL_RABBITMQ_USER")
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ValueError(
            f"has a node {name} whose management API is asked in the clear over the network: give an https:// URL"
        )
    folder = read.get("folder")
    if folder is not None and folder[0] not in "/~":
        raise ValueError(f"has a node {name} whose folder is no absolute path")
    return RabbitmqNode(name, mqtt, management, None if folder is None else parse_path(folder))


def parse_tenant_ports(value: str) -> Mapping[str, int]:
    """Return the port of each tenant's listener, from a JSON object; empty stays empty.

    Raises ``ValueError`` with the end of a sentence that begins with the name of the setting.
    """
    try:
        read = json.loads(value) if value else {}
    except (ValueError, RecursionError):
        raise ValueError(_PORTS_SYNTAX) from None
    if not isinstance(read, dict) or len(read) > MAX_TENANT_PORTS:
        raise ValueError(_PORTS_SYNTAX)
    for name, port in read.items():
        if type(port) is not int or not 0 < port < 1 << 16:
            raise ValueError(_PORTS_SYNTAX)
        try:
            check_tenant_name(name)
        except ValueError as error:
            raise ValueError(f"has a tenant whose name {error}") from None
    if len({*read.values()}) < len(read):
        raise ValueError("must have tenants each of which has its own port")
    return read
