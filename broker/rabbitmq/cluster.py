"""A RabbitMQ cluster as its management API has it: which nodes run, who is connected, and the end of their sessions."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, TypeVar

from broker.rabbitmq.answers import vhost_of
from broker.rabbitmq.management import Management, all_nodes, password_of, path_of
from config import Settings
from core.errors import BrokerNotEnforcing, BrokerUnavailable

IN_FLIGHT = 4
PAGE, MAX_PAGES = 500, 2000
_PAUSE = 0.02
_LATEST_MS = 253402300799000  # the end of the year 9999

_T = TypeVar("_T")


class Cluster:
    """Asks any node that answers; what it says counts for all that it sees."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Whose a client is the caller does not know, and a queue that is not there costs a millisecond.
        self._vhosts = [vhost_of(None), *map(vhost_of, settings.rabbitmq_tenant_ports)]
        self._names = {node.name for node in settings.rabbitmq_nodes}
        self._known: tuple[str, Sequence[Management]] = ("", ())  # by the password
        self._preferred = 0

    def nodes(self) -> Sequence[Management]:
        """Return what asks each node; raise ``BrokerUnavailable`` without a password."""
        password = password_of(self._settings)
        if self._known[0] != password:
            self._known = password, all_nodes(self._settings)
        return self._known[1]

    def answers(self, deadline: float) -> bool:
        """Return whether a node answers."""
        try:
            return self._at_any(lambda one, until: one.get("/api/whoami", until), deadline) is not None
        except BrokerUnavailable:
            return False

    def _at_any(self, do: Callable[[Management, float], _T], deadline: float) -> _T:
        """Do something at the node that answered last, else at the others; raise what the first raised.

        Each is told until when it may take, so that one that hangs leaves time for the others.
        """
        nodes, first = self.nodes(), self._preferred
        failed: BrokerUnavailable | None = None
        for number in range(len(nodes)):
            index, now = (first + number) % len(nodes), time.monotonic()
            try:
                done = do(nodes[index], now + (deadline - now) / (len(nodes) - number))
            except BrokerNotEnforcing:
                raise
            except BrokerUnavailable as error:
                failed = failed or error
            else:
                self._preferred = index
                return done
        raise failed or BrokerUnavailable("PORTAL_RABBITMQ_NODES names no node.")

    def running(self, deadline: float) -> Set[str]:
        """Return which of the nodes run, as one that answers sees it.

        Raise ``BrokerNotEnforcing`` if the cluster has another node running, has not all of them, or is not one
        cluster now; ``BrokerUnavailable`` if none answers.
        """
        return self._at_any(lambda one, until: self._running_at(one, until), deadline)

    def _running_at(self, node: Management, deadline: float) -> Set[str]:
        listed = node.get("/api/nodes?columns=name,running,partitions", deadline)
        try:
            running = {one["name"] for one in listed if one["running"]}
            known = {one["name"] for one in listed}
            others, missing = sorted(running - self._names), sorted(self._names - known)
            parted = any(one.get("partitions") for one in listed)
        except (TypeError, KeyError) as error:
            raise BrokerUnavailable(f"{node.node.name} lists its cluster in an unknown way.") from error
        if others:
            raise BrokerNotEnforcing(
                f"The cluster has the node {others[0]}, which PORTAL_RABBITMQ_NODES does not name: name it there too."
            )
        if missing:
            raise BrokerNotEnforcing(
                f"{missing[0]} is not in the cluster of {node.node.name}: correct PORTAL_RABBITMQ_NODES, or join it."
            )
        if parted:
            raise BrokerNotEnforcing(f"{node.node.name} has seen its cluster parted: restart the nodes that it names.")
        return running

    # --- Sessions

    def end(self, identity: str, deadline: float) -> None:
        """Close a client's connections, and delete its queues; raise ``BrokerUnavailable``."""
        self._at_any(lambda one, until: _end(one, identity, self._vhosts, until), deadline)

    def see_none(self, identity: str, names: Set[str], deadline: float) -> None:
        """See that a client has no connection, by what each of the nodes says, and close those that it has.

        A node knows its own connections even if others do not see it. Raise ``BrokerUnavailable``.
        """
        for one in self.nodes():
            if one.node.name in names:
                _see_none(one, identity, deadline)

    def for_each(self, identities: Iterable[str], do: Callable[[str], None]) -> None:
        """Do something for several clients at once; raise what the first one raises."""
        with ThreadPoolExecutor(max_workers=IN_FLIGHT, thread_name_prefix="rabbitmq") as pool:
            for _ in pool.map(do, identities):
                pass

    def end_until(self, deadline: float, identities: Iterable[str]) -> Set[str]:
        """Call ``end`` for as many clients as there is time for; return them."""
        ended = set[str]()

        def end(identity: str) -> None:
            if time.monotonic() < deadline:
                with contextlib.suppress(BrokerUnavailable):
                    self.end(identity, deadline)
                    ended.add(identity)

        self.for_each(identities, end)
        return ended

    # --- Who is connected

    def connected(self, deadline: float) -> Mapping[str, datetime]:
        """Return who is connected by MQTT at all nodes, and since when; raise ``BrokerUnavailable``."""
        return self._at_any(lambda one, until: dict(_connected(one, until)), deadline)


def _end(node: Management, identity: str, vhosts: Iterable[str], deadline: float) -> None:
    node.delete(path_of("connections", "username", identity), deadline)
    for vhost, quality in itertools.product(vhosts, (0, 1)):
        node.delete(path_of("queues", vhost, f"mqtt-subscription-{identity}qos{quality}"), deadline)


def _see_none(node: Management, identity: str, deadline: float) -> None:
    connections = path_of("connections", "username", identity)
    while (listed := node.get(connections, deadline)) != []:
        if not isinstance(listed, list):  # nor is there none if the path is not there
            raise BrokerUnavailable(f"{node.node.name} lists the connections of {identity} in an unknown way.")
        if time.monotonic() + _PAUSE >= deadline:
            raise BrokerUnavailable(f"{node.node.name} still has connections of {identity}, which it was told to end.")
        time.sleep(_PAUSE)
        node.delete(connections, deadline)


def _connected(node: Management, deadline: float) -> Iterator[tuple[str, datetime]]:
    about = f"columns=user,connected_at,protocol&page_size={PAGE}&sort=connected_at"
    for page in range(1, MAX_PAGES + 1):
        said = node.get(f"/api/connections?{about}&page={page}", deadline)
        try:
            for one in said["items"]:
                yield from _client(one)
            if page >= int(said["page_count"]):
                return
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise BrokerUnavailable(f"{node.node.name} lists connections in an unknown way.") from error
    raise BrokerUnavailable(f"{node.node.name} has more connections than {PAGE * MAX_PAGES}.")


def _client(one: Mapping[str, Any]) -> Iterator[tuple[str, datetime]]:
    """Yield a connection that is known whole: of a new one there may be a part."""
    if not isinstance(one, dict):
        raise TypeError("a connection is an object")
    user, protocol, at = one.get("user"), one.get("protocol"), one.get("connected_at")
    is_mqtt = isinstance(protocol, str) and "MQTT" in protocol
    if isinstance(user, str) and is_mqtt and isinstance(at, int) and 0 <= at <= _LATEST_MS:
        yield user, datetime.fromtimestamp(at / 1000, UTC)
