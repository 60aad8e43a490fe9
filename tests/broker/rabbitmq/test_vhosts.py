"""The vhosts of tenants, as RabbitMQ is told of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from broker.rabbitmq.management import path_of
from broker.rabbitmq.vhosts import DESCRIPTION, MAPPING, Vhosts
from core.errors import BrokerNotEnforcing, BrokerUnavailable

PORTS = {"acme": 8884, "beta": 8885}
ACME, RIGHTS = path_of("vhosts", "acme"), path_of("permissions", "acme", "portal")


class Node:
    """The API of a node that keeps what it is told."""

    def __init__(self, **there: Any) -> None:
        self.there: dict[str, Any] = {**there}
        self.is_away = False
        self.told = 0

    def get(self, path: str, _deadline: float) -> Any:
        self._check()
        if path == "/api/vhosts?columns=name":
            return [{"name": path.rpartition("/")[2]} for path in self.there if path.startswith("/api/vhosts/")]
        return self.there.get(path)

    def put(self, path: str, _deadline: float, body: Mapping[str, Any]) -> None:
        self._check()
        self.told += 1
        self.there[path] = body

    def delete(self, path: str, _deadline: float) -> None:
        self._check()
        self.there.pop(path, None)

    def _check(self) -> None:
        if self.is_away:
            raise BrokerUnavailable("It is away.")


def soon() -> float:
    return time.monotonic() + 5


def vhosts(*nodes: Any) -> Vhosts:
    return Vhosts(lambda: nodes, "portal", PORTS)


def test_a_tenant_gets_a_vhost_and_the_clients_of_its_port() -> None:
    node = Node(**{MAPPING: {"value": {"1883": "of-others", "9999": "acme", "8884": "beta"}}})
    made = vhosts(node)
    made.make("acme", soon())
    assert node.there[ACME] == {"description": DESCRIPTION}
    assert node.there[MAPPING] == {"value": {"1883": "of-others", "8884": "acme"}}
    assert node.there[RIGHTS] == {"configure": "^mqtt-subscription-", "write": "^$", "read": "^$"}
    assert not made.problems(soon(), ["acme"])
    told = node.told
    made.make("acme", soon())
    assert node.told == told  # once


@pytest.mark.parametrize("path", [ACME, MAPPING])
def test_what_somebody_has_removed_is_made_again(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node()
    made = vhosts(node)
    made.make_all([*PORTS], soon())
    told, removed = node.told, node.there.pop(path)
    made.make_all([*PORTS], soon())
    assert node.told == told  # it is not looked at for each change
    monkeypatch.setattr("broker.rabbitmq.vhosts.LOOK_SECONDS", 0.0)
    made.make_all([*PORTS], soon())
    assert node.there[path] == removed
    assert not made.problems(soon(), PORTS)


def test_a_vhost_of_others_is_neither_used_nor_removed() -> None:
    node = Node(**{ACME: {"description": "production"}})
    with pytest.raises(BrokerNotEnforcing, match="vhost acme that the portal has not made"):
        vhosts(node).make("acme", soon())
    vhosts(node).remove("acme", soon())
    assert node.there[ACME] == {"description": "production"}


def test_a_removed_tenant_loses_its_vhost_and_its_port() -> None:
    node = Node()
    made = vhosts(node)
    for tenant in PORTS:
        made.make(tenant, soon())
    made.remove("acme", soon())
    assert ACME not in node.there
    assert node.there[MAPPING] == {"value": {"8885": "beta"}}
    made.remove("acme", soon())  # again does no harm
    made.make("acme", soon())
    assert ACME in node.there


def test_another_node_is_asked_while_one_does_not_answer() -> None:
    away, there = Node(), Node()
    away.is_away = True
    vhosts(away, there).make("acme", soon())
    assert ACME in there.there
    there.is_away = True
    with pytest.raises(BrokerUnavailable, match="away"):
        vhosts(away, there).make("beta", soon())


def test_a_tenant_without_a_port_is_refused_in_a_sentence() -> None:
    with pytest.raises(BrokerUnavailable, match="PORTAL_RABBITMQ_TENANT_PORTS has no port of the tenant other"):
        vhosts(Node()).make("other", soon())


@pytest.mark.parametrize("mapping", [None, {"value": {"8884": "beta"}}, {"value": []}, []])
def test_what_keeps_a_tenants_clients_out_is_said(mapping: Any) -> None:
    node = Node(**{ACME: {"description": DESCRIPTION}, MAPPING: mapping})
    assert vhosts(node).problems(soon(), ["acme"]) == ["RabbitMQ has no vhost acme, or not at port 8884."]
