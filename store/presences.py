"""Who was last seen connected to a broker, to which, and when: written in batches, by identity.

A connection belongs to a broker. A row has the newest one of an identity, with its broker; connections that it has at
other brokers at the same time are in ``also_at``, so that the end of one of them does not end the others. Each broker
can begin and end connections of its own only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import DeviceStatus, PresenceState
from store.broker_tables import Broker
from store.prepared import Prepared
from store.tables import Device, Presence


class Place(NamedTuple):
    """An identity that may be connected at a broker; ``since`` when, ``None`` if it is at other ones only.

    ``is_removed`` if its broker, at which it was since then, is none of the installation's any more.
    """

    identity: str
    since: datetime | None
    is_removed: bool


class Sighting(NamedTuple):
    """What a broker tells of an identity: that it is connected, and since when; or that it is not, and until when."""

    state: PresenceState
    since: datetime


@dataclass(frozen=True, slots=True)
class PresenceRecord:
    """Since when an identity is connected; when it was seen last (offline), or added (never seen).

    ``broker_id`` is the broker of that connection. ``also_at`` has further connections by their brokers, each since
    when, ``left_at`` when a newer one at a broker ended that it has left.
    """

    state: PresenceState
    since: datetime
    broker_id: int | None = None
    left_at: datetime | None = None
    also_at: Mapping[int, datetime] = field(default_factory=dict)

    def with_sighting(self, broker_id: int, told: Sighting, brokers: Collection[int]) -> PresenceRecord:
        """Return the record with what one of the ``brokers`` that there are has told."""
        connections = dict(self.also_at)
        if self.state is PresenceState.CONNECTED and self.broker_id is not None:
            connections[self.broker_id] = self.since
        connections = {broker: since for broker, since in connections.items() if broker in brokers}
        ended = [] if self.left_at is None else [(self.left_at, self.broker_id)]
        if told.state is PresenceState.CONNECTED:
            connections[broker_id] = told.since
        else:
            connections.pop(broker_id, None)
            ended.append((told.since, broker_id))
        if connections:
            newest = max(connections, key=lambda broker: (connections[broker], broker))
            since, left_at = connections.pop(newest), max((at for at, _ in ended), default=None)
            left_at = None if left_at is None or left_at <= since else left_at
            return PresenceRecord(PresenceState.CONNECTED, since, newest, left_at, connections)
        # The broker's own word before counts no more: its clock may have been set back.
        if self.state is not PresenceState.NEVER_SEEN and self.broker_id not in (broker_id, None):
            ended.append((self.since, self.broker_id))
        last, at = max(ended, key=lambda one: one[0])
        return PresenceRecord(PresenceState.OFFLINE, last, at)

    def since_at(self, broker_id: int) -> datetime | None:
        """Return since when it is connected at a broker, ``None`` if it is not."""
        if self.state is PresenceState.CONNECTED and self.broker_id == broker_id:
            return self.since
        return self.also_at.get(broker_id)


_INSERT = Prepared(sa.insert(Presence))
_COLUMNS = (
    Presence.identity,
    Presence.state,
    Presence.since,
    Presence.broker_id,
    Presence.left_at,
    Presence.also_at,
)
_UPDATE = (
    sa.update(Presence)
    .where(Presence.identity == sa.bindparam("of"))
    .values({name: sa.bindparam(f"new_{name}") for name in ("state", "since", "broker_id", "left_at", "also_at")})
)
# In the order of identities, so that two that write wait for each other, and do not lock each other out.
_TO_CHANGE = (
    sa.select(*_COLUMNS)
    .where(Presence.identity.in_(sa.bindparam("identities", expanding=True)))
    .order_by(Presence.identity)
    .with_for_update(of=Presence)
)
_ADMITTED = sa.select(Device.id).where(
    Device.id.in_(sa.bindparam("identities", expanding=True)), Device.status == DeviceStatus.ACTIVE
)
_KNOWN = sa.select(Broker.id).where(Broker.id.in_(sa.bindparam("ids", expanding=True)))


def add_presences(tx: Connection, added: Sequence[tuple[str, str, datetime]]) -> None:
    """Add identities that were never seen: tenant, identity and the current time of each."""
    rows = [
        {"tenant_id": tenant_id, "identity": identity, "state": PresenceState.NEVER_SEEN, "since": at}
        for tenant_id, identity, at in added
    ]
    if rows:
        _INSERT.run(tx, rows)


def record_presences(tx: Connection, broker_id: int, seen: Mapping[str, Sighting]) -> None:
    """Record what a broker has told of identities; those that were never added are left out.

    A row that says so already is not written: neither its page nor the index has to be.
    """
    if not seen:
        return
    found = {row.identity: _record(row) for row in tx.execute(_TO_CHANGE, {"identities": [*seen]})}
    others = {broker for one in found.values() for broker in (one.broker_id, *one.also_at)} - {broker_id, None}
    known = {broker_id, *(tx.execute(_KNOWN, {"ids": [*others]}).scalars() if others else ())}
    changed = [
        _row(identity, new)
        for identity, old in found.items()
        if (new := old.with_sighting(broker_id, seen[identity], known)) != old
    ]
    if changed:
        tx.execute(_UPDATE, changed)


def admitted(tx: Connection, identities: Collection[str]) -> set[str]:
    """Return which of these are of devices, or applications, that brokers admit."""
    return {*tx.execute(_ADMITTED, {"identities": [*identities]}).scalars()} if identities else set()


def presence_of(tx: Connection, tenant_id: str, identity: str) -> PresenceRecord | None:
    """Return what is known of an identity, ``None`` if it was never added."""
    query = sa.select(*_COLUMNS).where(Presence.tenant_id == tenant_id, Presence.identity == identity)
    row = tx.execute(query).one_or_none()
    return None if row is None else _record(row)


def connected_at(
    tx: Connection, broker_id: int, *, limit: int, after: str = "", upto: str | None = None
) -> Sequence[Place]:
    """Return identities of all tenants that may be connected at a broker, in their order, after ``after``."""
    removed = sa.or_(Presence.broker_id.is_(None), Presence.broker_id.not_in(sa.select(Broker.id)))
    here = sa.or_(Presence.broker_id == broker_id, Presence.also_at.is_not(None), removed)
    query = sa.select(*_COLUMNS, removed.label("is_removed"))
    query = query.where(Presence.identity > after, Presence.state == PresenceState.CONNECTED, here)
    if upto is not None:
        query = query.where(Presence.identity <= upto)
    rows = tx.execute(query.order_by(Presence.identity).limit(limit))
    return [
        Place(row.identity, row.since if row.is_removed else _record(row).since_at(broker_id), row.is_removed)
        for row in rows
    ]


def _record(row: sa.Row[Any]) -> PresenceRecord:
    also_at = {int(broker): datetime.fromtimestamp(at, UTC) for broker, at in (row.also_at or {}).items()}
    return PresenceRecord(PresenceState(row.state), row.since, row.broker_id, row.left_at, also_at)


def _row(identity: str, record: PresenceRecord) -> dict[str, Any]:
    also_at = {str(broker): at.timestamp() for broker, at in record.also_at.items()} or None
    return {
        "of": identity,
        "new_state": record.state,
        "new_since": record.since,
        "new_broker_id": record.broker_id,
        "new_left_at": record.left_at,
        "new_also_at": also_at,
    }
