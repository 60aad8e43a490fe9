"""Counts for monitoring: how much each tenant has of what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import PENDING_DELIVERY, ClientKind, PresenceState
from store.audit import audit_numbers
from store.certificates import CURRENT, IS_APPLICATION
from store.database import UtcDateTime
from store.tables import Certificate, Delivery, Device, Presence, Tenant, WebhookDelivery
from store.webhooks import DEAD, WAITING

_Of = Callable[[Any], sa.ColumnElement[bool]]


@dataclass(slots=True)
class Counts:
    """What there is of one tenant, or of several together; by kind: devices, and applications, which are none.

    ``status`` counts by kind and status, ``expiring`` by kind and the times asked for, ``attested`` by verdict.
    """

    status: Counter[tuple[ClientKind, str]] = field(default_factory=Counter)
    expiring: Counter[tuple[ClientKind, timedelta]] = field(default_factory=Counter)
    attested: Counter[str] = field(default_factory=Counter)
    connected: int = 0
    undelivered: int = 0
    audit_entries: int = 0
    events_waiting: int = 0
    events_dead: int = 0
    oldest_event: datetime | None = None


def counts_of(
    tx: Connection,
    *,
    now: datetime,
    within: Sequence[timedelta],
    tenant_id: str | None = None,
    at_brokers: Collection[int] | None = None,
) -> dict[str, Counts]:
    """Return the counts of a tenant, or of each; ``within`` are the times in which certificates expire.

    Who is connected is counted at ``at_brokers``, ``None`` for all.
    """
    entries = audit_numbers(tx)
    found = {name: Counts(audit_entries=entries[name]) for name in entries if tenant_id in (None, name)}
    every = sa.select(Tenant.id)

    def of(column: Any) -> sa.ColumnElement[bool]:
        # The subquery has the database go to the index of each tenant in turn.
        condition: sa.ColumnElement[bool] = column.in_(every) if tenant_id is None else column == tenant_id
        return condition

    _count_clients(tx, of, found)
    _count_expiring(tx, of, found, now, within)
    _count_rest(tx, of, found, at_brokers)
    return found


def total(counts: Iterable[Counts]) -> Counts:
    """Return the counts of several tenants together."""
    whole = Counts()
    for one in counts:
        whole.status += one.status
        whole.expiring += one.expiring
        whole.attested += one.attested
        whole.connected += one.connected
        whole.undelivered += one.undelivered
        whole.audit_entries += one.audit_entries
        whole.events_waiting += one.events_waiting
        whole.events_dead += one.events_dead
        oldest = [at for at in (whole.oldest_event, one.oldest_event) if at is not None]
        whole.oldest_event = min(oldest, default=None)
    return whole


def _count_clients(tx: Connection, of: _Of, found: Mapping[str, Counts]) -> None:
    # Applications are few, and counted here: for GROUP BY the database would take the index of all by their status.
    of_tenants = sa.select(Device.tenant_id, Device.status).where(of(Device.tenant_id))
    for tenant_id, status in tx.execute(of_tenants.where(IS_APPLICATION)):
        found[tenant_id].status[ClientKind.APPLICATION, status] += 1
    of_all = of_tenants.add_columns(sa.func.count()).group_by(Device.tenant_id, Device.status)
    for tenant_id, status, number in tx.execute(of_all):
        apart = found[tenant_id].status[ClientKind.APPLICATION, status]
        found[tenant_id].status[ClientKind.DEVICE, status] = number - apart
    attested = sa.select(Device.tenant_id, Device.attested, sa.func.count())
    attested = attested.where(of(Device.tenant_id), Device.attested.is_not(None))
    for tenant_id, verdict, number in tx.execute(attested.group_by(Device.tenant_id, Device.attested)):
        found[tenant_id].attested[str(verdict)] = number


def _count_expiring(
    tx: Connection, of: _Of, found: Mapping[str, Counts], now: datetime, within: Sequence[timedelta]
) -> None:
    """Count current certificates that expire within each of these times; those that have expired are not counted."""
    by_tenant = Certificate.tenant_id
    sums = [
        sa.func.sum(sa.case((Certificate.not_after <= sa.literal(now + time, Certificate.not_after.type), 1), else_=0))
        for time in within
    ]
    of_all = sa.select(by_tenant, *sums).where(
        of(by_tenant),
        Certificate.purpose == "device",
        CURRENT,
        Certificate.not_after > now,
        Certificate.not_after <= now + max(within),
    )
    apart = of_all.where(Certificate.device_id.in_(_applications(of)))
    for tenant_id, *numbers in tx.execute(of_all.group_by(by_tenant)):
        for time, number in zip(within, numbers, strict=True):
            found[tenant_id].expiring[ClientKind.DEVICE, time] = int(number)
    for tenant_id, *numbers in tx.execute(apart.group_by(by_tenant)):
        for time, number in zip(within, numbers, strict=True):
            found[tenant_id].expiring[ClientKind.APPLICATION, time] = int(number)
            found[tenant_id].expiring[ClientKind.DEVICE, time] -= int(number)


def _count_rest(tx: Connection, of: _Of, found: Mapping[str, Counts], at_brokers: Collection[int] | None) -> None:
    seen = sa.select(Presence.tenant_id, sa.func.count()).group_by(Presence.tenant_id)
    seen = seen.where(of(Presence.tenant_id), Presence.state == PresenceState.CONNECTED)
    if at_brokers is not None:
        seen = seen.where(Presence.broker_id.in_(sorted(at_brokers)))
    for tenant_id, number in tx.execute(seen):
        found[tenant_id].connected = number
    for tenant_id, number in tx.execute(seen.where(Presence.identity.in_(_applications(of)))):
        found[tenant_id].connected -= number
    bundles = sa.select(Delivery.tenant_id, sa.func.count()).where(Delivery.status.in_(PENDING_DELIVERY))
    for tenant_id, number in tx.execute(bundles.where(of(Delivery.tenant_id)).group_by(Delivery.tenant_id)):
        found[tenant_id].undelivered = number
    of_events = WebhookDelivery.tenant_id
    oldest = sa.func.min(WebhookDelivery.created_at, type_=UtcDateTime())
    waiting = sa.select(of_events, sa.func.count(), oldest).where(of(of_events), WAITING)
    for tenant_id, number, at in tx.execute(waiting.group_by(of_events)):
        found[tenant_id].events_waiting, found[tenant_id].oldest_event = number, at
    dead = sa.select(of_events, sa.func.count()).where(of(of_events), DEAD)
    for tenant_id, number in tx.execute(dead.group_by(of_events)):
        found[tenant_id].events_dead = number


def _applications(of: _Of) -> sa.Select[Any]:
    return sa.select(Device.id).where(of(Device.tenant_id), IS_APPLICATION)
