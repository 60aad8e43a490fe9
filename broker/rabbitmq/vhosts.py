"""The vhost of each further tenant, and which listener's clients are in it, as a RabbitMQ cluster is told.

A client that logs in by its certificate cannot name a vhost. RabbitMQ looks for one in a map of all common names, which
would have to be sent as a whole for each new device, then by the listener's port: so each tenant has a port.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from broker.rabbitmq.management import Json, Management, path_of
from core.errors import BrokerNotEnforcing, BrokerUnavailable

MAPPING = path_of("global-parameters", "mqtt_port_to_vhost_mapping")
# By it the portal's own vhosts are known: a vhost of others is never removed.
DESCRIPTION = "made by the onboarding portal"
LOOK_SECONDS = 10.0
_T = TypeVar("_T")


class Vhosts:
    """Makes and removes vhosts at any node that answers; ``ports`` is that of each tenant's listener."""

    def __init__(self, nodes: Callable[[], Iterable[Management]], user: str, ports: Mapping[str, int]) -> None:
        self._nodes = nodes
        self._user = user
        self._ports = ports
        self._made: set[str] = set()
        self._looked_at = time.monotonic()

    def make_all(self, tenants: Sequence[str], deadline: float) -> None:
        """Let the clients of tenants log in; raise ``BrokerUnavailable``.

        What was made is looked for again every few seconds, and made again if somebody has removed it.
        """
        if self._made and time.monotonic() - self._looked_at >= LOOK_SECONDS:
            self._made.difference_update(self._at_any(lambda node: self._missing(node, deadline, tenants)))
            self._looked_at = time.monotonic()
        for tenant in tenants:
            self.make(tenant, deadline)

    def make(self, tenant: str, deadline: float) -> None:
        """Let a tenant's clients log in, unless that was done; raise ``BrokerUnavailable``.

        The portal's user gets what it needs there to delete the queues of clients that are cut off.
        """
        if tenant in self._made:
            return
        port = self._ports.get(tenant)
        if port is None:
            raise BrokerUnavailable(f"PORTAL_RABBITMQ_TENANT_PORTS has no port of the tenant {tenant}.")

        def make(node: Management) -> None:
            vhost = node.get(path_of("vhosts", tenant), deadline)
            if vhost is not None and not _is_ours(vhost):
                raise BrokerNotEnforcing(
                    f"RabbitMQ has a vhost {tenant} that the portal has not made: remove it, or take another name."
                )
            node.put(path_of("vhosts", tenant), deadline, {"description": DESCRIPTION})
            rights = {"configure": "^mqtt-subscription-", "write": "^$", "read": "^$"}
            node.put(path_of("permissions", tenant, self._user), deadline, rights)
            self._map(node, deadline, {str(port): tenant})

        self._at_any(make)
        self._made.add(tenant)

    def remove(self, tenant: str, deadline: float) -> None:
        """Remove the vhost of a tenant that was removed, with all queues and connections; raise ``BrokerUnavailable``.

        One that the portal has not made stays.
        """

        def remove(node: Management) -> None:
            vhost = node.get(path_of("vhosts", tenant), deadline)
            self._map(node, deadline, {}, without=tenant)
            if _is_ours(vhost):
                node.delete(path_of("vhosts", tenant), deadline)

        self._at_any(remove)
        self._made.discard(tenant)

    def problems(self, deadline: float, tenants: Iterable[str]) -> list[str]:
        """Return which tenants' clients cannot log in, each as a sentence; raise ``BrokerUnavailable``."""
        missing = self._at_any(lambda node: self._missing(node, deadline, tenants))
        return [f"RabbitMQ has no vhost {tenant}, or not at port {self._ports.get(tenant)}." for tenant in missing]

    def _missing(self, node: Management, deadline: float, tenants: Iterable[str]) -> list[str]:
        there = {vhost["name"] for vhost in node.get("/api/vhosts?columns=name", deadline) or ()}
        mapped = _mapped(node.get(MAPPING, deadline))
        return [
            tenant for tenant in tenants if tenant not in there or mapped.get(str(self._ports.get(tenant))) != tenant
        ]

    def _map(self, node: Management, deadline: float, more: Mapping[str, str], without: str | None = None) -> None:
        """Change which ports belong to which vhosts, and leave those of others as they are."""
        before = _mapped(node.get(MAPPING, deadline))
        after = {port: vhost for port, vhost in before.items() if vhost != without and vhost not in more.values()}
        after |= more
        if after != before:
            node.put(MAPPING, deadline, {"value": after})

    def _at_any(self, act: Callable[[Management], _T]) -> _T:
        """Act at the first node that answers."""
        problem: BrokerUnavailable | None = None
        for node in self._nodes():
            try:
                return act(node)
            except BrokerNotEnforcing:
                raise
            except BrokerUnavailable as error:
                problem = problem or error
        raise problem or BrokerUnavailable("There is no node of RabbitMQ.")


def _mapped(parameter: Json) -> dict[str, str]:
    value = parameter.get("value") if isinstance(parameter, dict) else None
    return {str(port): str(vhost) for port, vhost in value.items()} if isinstance(value, dict) else {}


def _is_ours(vhost: Json) -> bool:
    return isinstance(vhost, dict) and vhost.get("description") == DESCRIPTION
