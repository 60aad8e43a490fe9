"""The database's figures: how many of what there are."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import PENDING_DELIVERY, IssuerStatus
from store.reads import CURRENT
from store.tables import AuditHead, Certificate, Crl, Delivery, Device, IssuerRow


def devices_by_status(tx: Connection, tenant_id: str) -> dict[str, int]:
    """How many devices there are in each status that any is in."""
    rows = tx.execute(
        sa.select(Device.status, sa.func.count()).where(Device.tenant_id == tenant_id).group_by(Device.status)
    )
    return {row[0]: row[1] for row in rows}


def certificates_ending(tx: Connection, tenant_id: str, *, now: datetime, within: Sequence[timedelta]) -> list[int]:
    """How many certificates that devices use now end within each of these times, and have not ended yet."""
    counts = [
        sa.func.sum(sa.case((Certificate.not_after <= sa.literal(now + time, Certificate.not_after.type), 1), else_=0))
        for time in within
    ]
    row = tx.execute(
        sa.select(*counts).where(
            Certificate.tenant_id == tenant_id,
            Certificate.purpose == "device",
            CURRENT,
            Certificate.not_after > now,
            Certificate.not_after <= now + max(within),
        )
    ).one()
    return [int(count or 0) for count in row]


def undelivered_bundles(tx: Connection, tenant_id: str) -> int:
    """How many bundles wait for their download."""
    return tx.execute(
        sa.select(sa.func.count())
        .select_from(Delivery)
        .where(Delivery.tenant_id == tenant_id, Delivery.status.in_(PENDING_DELIVERY))
    ).scalar_one()


def audit_entries(tx: Connection, tenant_id: str) -> int:
    """How many entries the audit record has."""
    return tx.execute(sa.select(AuditHead.number).where(AuditHead.tenant_id == tenant_id)).scalar_one()


def issuer_ends(tx: Connection) -> list[tuple[str, datetime, datetime | None]]:
    """Each issuer's name, its certificate's not_after, and its newest CRL's nextUpdate, ``None`` before the first."""
    rows = tx.execute(
        sa.select(IssuerRow.name, IssuerRow.not_after, Crl.next_update)
        .outerjoin_from(IssuerRow, Crl, Crl.issuer_id == IssuerRow.id)
        .where(IssuerRow.status == IssuerStatus.ACTIVE)
        .order_by(IssuerRow.id)
    )
    return [(row.name, row.not_after, row.next_update) for row in rows]
