"""Figures for the overview of a tenant, each of which costs as much in a fleet of a million as in one of thousands.

What grows with the fleet is counted by an index up to a limit, or kept as a count.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import PresenceState
from store.certificates import CURRENT
from store.enrolment_tables import EnrolmentRow, ReenrolmentRow
from store.tables import AuditEntry, AuditHead, Certificate, Device, Presence, WebhookDelivery
from store.webhooks import DEAD

MAX_OF_WEEK, MAX_CONNECTED, MAX_WAITING, MAX_EVENTS = 5_000, 100_000, 1_000, 2_000


@dataclass(frozen=True, slots=True)
class Figures:
    """What there is of a tenant; each count but ``clients`` is at most its limit, which then means that or more.

    ``clients`` are devices and applications that are not revoked; ``weeks`` how many current certificates end in each
    of the weeks asked for, ``ended`` how many have ended; ``not_enforced`` how many revocations and suspensions the
    broker was not seen to obey yet; ``events`` counts audit entries by action, with the outcome.
    """

    clients: int
    connected: int
    ended: int
    weeks: tuple[int, ...]
    waiting: int
    failed_evidence: int
    not_enforced: int
    undelivered_events: int
    events: dict[tuple[str, str], int]


def figures_of(
    tx: Connection,
    tenant_id: str,
    *,
    weeks: Sequence[tuple[datetime, datetime]],
    since: datetime,
    applied: int,
    at_brokers: Collection[int] | None = None,
) -> Figures:
    """Return the figures of a tenant: certificates by ``weeks`` (from, to), audit entries ``since`` a time.

    ``applied`` is the generation that the broker was seen to enforce, ``at_brokers`` those whose clients are counted,
    ``None`` for all.
    """
    current = (Certificate.tenant_id == tenant_id, CURRENT, Certificate.device_id.is_not(None))
    heard = () if at_brokers is None else (Presence.broker_id.in_(sorted(at_brokers)),)
    counted = [
        _up_to(MAX_CONNECTED, Presence.tenant_id == tenant_id, Presence.state == PresenceState.CONNECTED, *heard),
        _up_to(MAX_OF_WEEK, *current, Certificate.not_after <= weeks[0][0]),
        _up_to(MAX_WAITING, EnrolmentRow.tenant_id == tenant_id, sa.text("enrolments.status = 'waiting'")),
        _up_to(MAX_WAITING, ReenrolmentRow.tenant_id == tenant_id, sa.text("reenrolments.status = 'waiting'")),
        _up_to(MAX_WAITING, Device.tenant_id == tenant_id, Device.attested == "failed"),
        _not_enforced(tenant_id, applied),
        _up_to(MAX_WAITING, WebhookDelivery.tenant_id == tenant_id, DEAD),
        *(
            _up_to(MAX_OF_WEEK, *current, Certificate.not_after > start, Certificate.not_after <= end)
            for start, end in weeks
        ),
    ]
    row = tx.execute(sa.select(*(query.label(f"n{number}") for number, query in enumerate(counted)))).one()
    connected, ended, first, further, failed, not_enforced, dead, *by_week = (int(value) for value in row)
    clients = tx.execute(sa.select(AuditHead.clients).where(AuditHead.tenant_id == tenant_id)).scalar_one_or_none()
    return Figures(
        clients=int(clients or 0),
        connected=connected,
        ended=ended,
        weeks=tuple(by_week),
        waiting=min(MAX_WAITING, first + further),
        failed_evidence=failed,
        not_enforced=not_enforced,
        undelivered_events=dead,
        events=_events(tx, tenant_id, since),
    )


def _up_to(limit: int, *conditions: Any) -> sa.ScalarSelect[int]:
    found = sa.select(sa.literal(1).label("one")).where(*conditions).limit(limit).subquery()
    return sa.select(sa.func.count()).select_from(found).scalar_subquery()


def _not_enforced(tenant_id: str, applied: int) -> sa.ScalarSelect[int]:
    """Count among those of all tenants, of which there are few: their index knows no tenant."""
    denied = sa.text("devices.status IN ('revoked', 'suspended')")
    found = sa.select(Device.tenant_id).where(Device.generation > applied, denied).limit(MAX_WAITING).subquery()
    return sa.select(sa.func.count()).select_from(found).where(found.c.tenant_id == tenant_id).scalar_subquery()


def _events(tx: Connection, tenant_id: str, since: datetime) -> dict[tuple[str, str], int]:
    newest = (
        sa.select(AuditEntry.action, AuditEntry.outcome)
        .where(AuditEntry.tenant_id == tenant_id, AuditEntry.at >= since)
        .order_by(AuditEntry.at.desc(), AuditEntry.id.desc())
        .limit(MAX_EVENTS)
        .subquery()
    )
    query = sa.select(newest.c.action, newest.c.outcome, sa.func.count()).group_by(newest.c.action, newest.c.outcome)
    return {(action, outcome): int(number) for action, outcome, number in tx.execute(query)}
