"""Renewals: certificates that were replaced, keep working for an overlap, and are then revoked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import CertificateStatus, DeliveryStatus
from store.certificates import CURRENT, of_device
from store.deliveries import DeliveryRevocation
from store.devices import CertificateChange
from store.tables import Certificate, Delivery

_USABLE = (CertificateStatus.ACTIVE, CertificateStatus.REPLACED)
SUPERSEDED = "superseded"
# As text, like the conditions of the partial indexes, so that the database uses these.
_REPLACED = sa.text("certificates.status = 'replaced'")
_WAITING = sa.text("deliveries.status IN ('ready', 'fetching')")


def count_valid(tx: Connection, tenant_id: str, device_id: str, *, now: datetime) -> int:
    """Return how many usable certificates a device has at ``now``, without those whose bundles nobody has fetched."""
    waiting = sa.select(Delivery.certificate_id).where(
        Delivery.device_id == device_id, Delivery.status == DeliveryStatus.READY
    )
    return tx.execute(
        sa.select(sa.func.count())
        .select_from(Certificate)
        .where(
            *of_device(tenant_id, device_id),
            Certificate.status.in_(_USABLE),
            Certificate.not_after > now,
            Certificate.id.not_in(waiting),
        )
    ).scalar_one()


def _replaced(tenant_id: str, device_id: str) -> tuple[sa.ColumnElement[bool], ...]:
    return *of_device(tenant_id, device_id), Certificate.status == CertificateStatus.REPLACED


def works_until(tx: Connection, tenant_id: str, device_id: str, *, now: datetime) -> datetime | None:
    """Return until when a replaced certificate of a device keeps working, ``None`` if there is none."""
    query = sa.select(Certificate.replaced_until, Certificate.not_after).where(*_replaced(tenant_id, device_id))
    rows = tx.execute(query)
    ends = [min(until, not_after) for until, not_after in rows if until is not None and not_after > now]
    return max(ends, default=None)


def valid_dates(tx: Connection, tenant_id: str, device_id: str, fingerprint: str) -> tuple[datetime, datetime] | None:
    """Return not_before and not_after of a device's certificate by its SHA-256 in hex; ``None`` unless it is usable."""
    shown = (*of_device(tenant_id, device_id), Certificate.fingerprint == fingerprint)
    query = sa.select(Certificate.not_before, Certificate.not_after).where(*shown, Certificate.status.in_(_USABLE))
    row = tx.execute(query).one_or_none()
    return None if row is None else (row.not_before, row.not_after)


def replace_current(tx: Connection, tenant_id: str, device_id: str, *, until: datetime, ends_when_used: bool) -> None:
    """Mark a device's current certificate as replaced: it keeps working beside the next one, at most until a time."""
    current = (*of_device(tenant_id, device_id), Certificate.status == CertificateStatus.ACTIVE)
    values = {"status": CertificateStatus.REPLACED, "replaced_until": until, "ends_when_used": ends_when_used}
    tx.execute(sa.update(Certificate).where(*current).values(values))


def unfetched_certificates(tx: Connection, tenant_id: str, device_id: str) -> Sequence[int]:
    """Return the row ids of certificates whose keys are only in a bundle that nobody has fetched."""
    own = (Delivery.tenant_id == tenant_id, Delivery.device_id == device_id, Delivery.status == DeliveryStatus.READY)
    return tx.execute(sa.select(Delivery.certificate_id).where(*own)).scalars().all()


def revoke_unfetched(tx: Connection, certificate_ids: Sequence[int], *, now: datetime, generation: int) -> None:
    """Revoke unfetched certificates and destroy their bundles; no session can have begun with such a key."""
    _supersede(tx, certificate_ids, now=now, generation=generation, sessions=False)


def revoke_replaced(
    tx: Connection, tenant_id: str, device_id: str, *, now: datetime, generation: int, when_used: bool = False
) -> int:
    """Revoke a device's replaced certificates, with ``when_used`` only those marked so; return how many."""
    query = sa.select(Certificate.id).where(*_replaced(tenant_id, device_id))
    if when_used:
        query = query.where(Certificate.ends_when_used)
    return _supersede(tx, tx.execute(query).scalars().all(), now=now, generation=generation, sessions=True)


def ended_overlaps(tx: Connection, *, now: datetime, limit: int = 500) -> Sequence[tuple[str, str]]:
    """Return tenant and id of devices with a replaced certificate whose overlap has ended.

    While the bundle of the newer key is undelivered, the older certificate keeps working: it may be the only one.
    """
    newer = sa.orm.aliased(Certificate)
    waits = (
        sa.select(Delivery.id)
        .join(newer, newer.id == Delivery.certificate_id)
        .where(
            Delivery.device_id == Certificate.device_id,
            newer.status == CertificateStatus.ACTIVE,
            Delivery.status != DeliveryStatus.DELIVERED,
        )
    )
    rows = tx.execute(
        sa.select(Certificate.tenant_id, Certificate.device_id)
        .where(
            _REPLACED,
            Certificate.replaced_until <= now,
            Certificate.not_after > now,  # an expired one is refused anyway
            ~waits.exists(),
        )
        .distinct()
        .limit(limit)
    )
    return [(row.tenant_id, row.device_id) for row in rows]


@dataclass(frozen=True, slots=True)
class UnfetchedRenewal:
    """A renewal whose bundle nobody fetched in time: the row ids of its certificate and of the previous one."""

    tenant_id: str
    device_id: str
    certificate_id: int
    before_id: int


def unfetched_renewals(tx: Connection, *, now: datetime, limit: int = 500) -> Sequence[UnfetchedRenewal]:
    """Return renewals whose bundle has expired unfetched, of devices whose previous certificate is still valid."""
    before = sa.orm.aliased(Certificate)
    newest_before = (
        sa.select(sa.func.max(before.id))
        .where(
            before.device_id == Certificate.device_id,
            before.status.in_((CertificateStatus.REPLACED, CertificateStatus.HELD)),
            before.replaced_until.is_not(None),
            before.not_after > now,
        )
        .scalar_subquery()
    )
    rows = tx.execute(
        sa.select(Certificate.tenant_id, Certificate.device_id, Certificate.id, newest_before)
        .join(Delivery, Delivery.certificate_id == Certificate.id)
        .where(
            CURRENT,
            _WAITING,
            Delivery.status == DeliveryStatus.READY,
            Delivery.expires_at <= now,
            newest_before.is_not(None),
        )
        .limit(limit)
    )
    return [UnfetchedRenewal(*row) for row in rows]


def undo_renewal(tx: Connection, renewal: UnfetchedRenewal, *, now: datetime, generation: int) -> None:
    """Revoke the certificate of a renewal, and make the previous one current again."""
    _supersede(tx, [renewal.certificate_id], now=now, generation=generation, sessions=False)
    again = sa.case(
        (Certificate.status == CertificateStatus.HELD, Certificate.status),
        else_=sa.literal(CertificateStatus.ACTIVE, Certificate.status.type),
    )
    values = {"status": again, "replaced_until": None, "ends_when_used": False}
    tx.execute(sa.update(Certificate).where(Certificate.id == renewal.before_id).values(values))


def is_current(tx: Connection, tenant_id: str, device_id: str, fingerprint: str) -> bool:
    """Return whether a certificate, by its SHA-256 in hex, is the active one of a device."""
    active = (*of_device(tenant_id, device_id), Certificate.status == CertificateStatus.ACTIVE)
    query = sa.select(Certificate.id).where(*active, Certificate.fingerprint == fingerprint)
    return tx.execute(query).one_or_none() is not None


def ends_when_used(tx: Connection, tenant_id: str, device_id: str) -> bool:
    """Return whether a replaced certificate of the device is to be revoked once its successor is used."""
    to_end = sa.exists().where(*_replaced(tenant_id, device_id), Certificate.ends_when_used)
    return bool(tx.execute(sa.select(to_end)).scalar_one())


_SUPERSEDE = CertificateChange(
    Certificate.id.in_(sa.bindparam("ids", expanding=True)),
    Certificate.status != CertificateStatus.REVOKED,
    status=CertificateStatus.REVOKED,
    revoked_at=sa.bindparam("at"),
    revocation_reason=SUPERSEDED,
    generation=sa.bindparam("ended_at"),
)
_DESTROY_BUNDLES = DeliveryRevocation(Delivery.certificate_id.in_(sa.bindparam("ids", expanding=True)))


def _supersede(tx: Connection, ids: Sequence[int], *, now: datetime, generation: int, sessions: bool) -> int:
    """Revoke certificates as superseded, and destroy the bundles that still hold their keys.

    With ``sessions`` the sessions of the device end, because one may have begun with such a certificate.
    """
    if not ids:
        return 0
    done = _SUPERSEDE.run(tx, generation=generation, ids=ids, at=now, ended_at=generation if sessions else 0)
    _DESTROY_BUNDLES.run(tx, ids=ids)
    return done
