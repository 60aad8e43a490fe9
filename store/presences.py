"""Who was last seen connected to the broker, and when: written in batches, by identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import PresenceState
from store.tables import Presence


@dataclass(frozen=True, slots=True)
class PresenceRecord:
    """Since when an identity is connected; when it was seen last (offline), or added (never seen)."""

    state: PresenceState
    since: datetime


Places = Sequence[tuple[datetime, str]]  # of identities that are connected: since when, and the identity

_INSERT = sa.insert(Presence)
# A row that says so already is not written: neither its page nor the index has to be.
_UPDATE = (
    sa.update(Presence)
    .where(
        Presence.identity == sa.bindparam("of"),
        sa.or_(Presence.state != sa.bindparam("new_state"), Presence.since != sa.bindparam("new_since")),
    )
    .values(state=sa.bindparam("new_state"), since=sa.bindparam("new_since"))
)


def add_presences(tx: Connection, added: Sequence[tuple[str, str, datetime]]) -> None:
    """Add identities that were never seen: tenant, identity and the current time of each."""
    rows = [
        {"tenant_id": tenant_id, "identity": identity, "state": PresenceState.NEVER_SEEN, "since": at}
        for tenant_id, identity, at in added
    ]
    if rows:
        tx.execute(_INSERT, rows)


def record_presences(tx: Connection, seen: Mapping[str, PresenceRecord]) -> None:
    """Record identities as seen; those that were never added are left out."""
    rows = [
        {"of": identity, "new_state": record.state, "new_since": record.since}
        for identity, record in sorted(seen.items())
    ]
    if rows:  # in the order of identities, so that two that write wait for each other, and do not lock each other out
        tx.execute(_UPDATE, rows)


def presence_of(tx: Connection, tenant_id: str, identity: str) -> PresenceRecord | None:
    """Return what is known of an identity, ``None`` if it was never added."""
    query = sa.select(Presence.state, Presence.since).where(
        Presence.tenant_id == tenant_id, Presence.identity == identity
    )
    row = tx.execute(query).one_or_none()
    return None if row is None else PresenceRecord(PresenceState(row.state), row.since)


def connected_page(tx: Connection, tenant_id: str, *, limit: int, after: tuple[datetime, str] | None = None) -> Places:
    """Return who is connected, in the order of the index, after ``after``, the last one of the page before."""
    query = sa.select(Presence.since, Presence.identity).where(
        Presence.tenant_id == tenant_id, Presence.state == PresenceState.CONNECTED
    )
    if after is not None:
        first = sa.tuple_(sa.literal(after[0], Presence.since.type), after[1])
        query = query.where(sa.tuple_(Presence.since, Presence.identity) > first)
    rows = tx.execute(query.order_by(Presence.since, Presence.identity).limit(limit))
    return [(row.since, row.identity) for row in rows]
