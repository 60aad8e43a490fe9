"""The database's part in saying once of each certificate that it should be renewed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import CertificateStatus
from store.tables import Certificate, Device, UtcDateTime
from store.tables_events import ExpiryAnnouncement


@dataclass(frozen=True, slots=True)
class Expiring:
    """A device's certificate that is past two thirds of its life."""

    certificate_id: int
    tenant_id: str
    device_id: str
    name: str
    serial_number: str
    not_after: datetime


# The arithmetic of times, which no two databases share.
_PAST_TWO_THIRDS = {
    "sqlite": (
        "julianday(certificates.not_before)"
        " + (julianday(certificates.not_after) - julianday(certificates.not_before)) * 2 / 3 <= julianday(:now)"
    ),
    "postgresql": "certificates.not_before + (certificates.not_after - certificates.not_before) * 2 / 3 <= :now",
}


def unannounced(tx: Connection, *, now: datetime, limit: int) -> Sequence[Expiring]:
    """Certificates in use of which it was not yet said; the device is neither suspended nor revoked."""
    past = sa.text(_PAST_TWO_THIRDS[tx.dialect.name]).bindparams(sa.bindparam("now", now, type_=UtcDateTime()))
    announced = sa.select(ExpiryAnnouncement.certificate_id).where(ExpiryAnnouncement.certificate_id == Certificate.id)
    query = (
        sa.select(
            Certificate.id,
            Certificate.tenant_id,
            Certificate.device_id,
            Device.name,
            Certificate.serial_number,
            Certificate.not_after,
        )
        .join(Device, Device.id == Certificate.device_id)
        .where(Certificate.status == CertificateStatus.ACTIVE, Certificate.not_after > now, past, ~announced.exists())
        .order_by(Certificate.id)
        .limit(limit)
    )
    rows: Sequence[Any] = tx.execute(query).all()
    return [Expiring(*row) for row in rows]


def announced(tx: Connection, expiring: Sequence[Expiring], *, at: datetime) -> None:
    """Record that it was said."""
    rows = [{"certificate_id": one.certificate_id, "tenant_id": one.tenant_id, "announced_at": at} for one in expiring]
    tx.execute(sa.insert(ExpiryAnnouncement), rows)
