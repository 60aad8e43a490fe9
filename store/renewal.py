"""The database's side of renewals: certificates replaced, going on for a while, ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import PENDING_DELIVERY, CertificateStatus, DeliveryStatus
from store.certificates import CURRENT
from store.tables import Certificate, Delivery, IssuerRow

_USABLE = (CertificateStatus.ACTIVE, CertificateStatus.REPLACED)
SUPERSEDED = "superseded"
# As the conditions of indexes say it, so that these serve.
_REPLACED = sa.text("certificates.status = 'replaced'")
_WAITING = sa.text("deliveries.status IN ('ready', 'fetching')")


def count_valid(tx: Connection, tenant_id: str, device_id: str, *, now: datetime) -> int:
    """How many certificates a device can get in with at ``now``, those left out whose bundles nobody has fetched."""
    waiting = sa.select(Delivery.certificate_id).where(
        Delivery.device_id == device_id, Delivery.status == DeliveryStatus.READY
    )
    return tx.execute(
        sa.select(sa.func.count())
        .select_from(Certificate)
        .where(
            Certificate.tenant_id == tenant_id,
            Certificate.device_id == device_id,
            Certificate.status.in_(_USABLE),
            Certificate.not_after > now,
            Certificate.id.not_in(waiting),
        )
    ).scalar_one()


def goes_on_until(tx: Connection, tenant_id: str, device_id: str, *, now: datetime) -> datetime | None:
    """The time until which a device can get in with a certificate that was replaced, ``None`` where it cannot."""
    rows = tx.execute(
        sa.select(Certificate.replaced_until, Certificate.not_after).where(
            Certificate.tenant_id == tenant_id,
            Certificate.device_id == device_id,
            Certificate.status == CertificateStatus.REPLACED,
        )
    )
    ends = [min(until, not_after) for until, not_after in rows if until is not None and not_after > now]
    return max(ends, default=None)


def valid_dates(tx: Connection, tenant_id: str, device_id: str, fingerprint: str) -> tuple[datetime, datetime] | None:
    """The not_before and not_after of a device's certificate, by its SHA-256 in hex; ``None`` unless it is good."""
    row = tx.execute(
        sa.select(Certificate.not_before, Certificate.not_after).where(
            Certificate.tenant_id == tenant_id,
            Certificate.device_id == device_id,
            Certificate.fingerprint == fingerprint,
            Certificate.status.in_(_USABLE),
        )
    ).one_or_none()
    return None if row is None else (row.not_before, row.not_after)


def replace_current(tx: Connection, tenant_id: str, device_id: str, *, until: datetime, ends_when_used: bool) -> None:
    """Let a device's current certificate go on beside the next one, until a time at the longest."""
    tx.execute(
        sa.update(Certificate)
        .where(
            Certificate.tenant_id == tenant_id,
            Certificate.device_id == device_id,
            Certificate.status == CertificateStatus.ACTIVE,
        )
        .values(status=CertificateStatus.REPLACED, replaced_until=until, ends_when_used=ends_when_used)
    )


def unfetched(tx: Connection, tenant_id: str, device_id: str) -> Sequence[int]:
    """The certificates of a device whose keys are nowhere but in a bundle that nobody has begun to fetch."""
    return list(
        tx.execute(
            sa.select(Delivery.certificate_id).where(
                Delivery.tenant_id == tenant_id,
                Delivery.device_id == device_id,
                Delivery.status == DeliveryStatus.READY,
            )
        ).scalars()
    )


def drop_unfetched(tx: Connection, certificate_ids: Sequence[int], *, now: datetime, generation: int) -> None:
    """Revoke what ``unfetched`` found, and destroy the bundles; no session can have begun with such a key."""
    _supersede(tx, certificate_ids, now=now, generation=generation, sessions=False)


def end_replaced(
    tx: Connection, tenant_id: str, device_id: str, *, now: datetime, generation: int, when_used: bool = False
) -> int:
    """Revoke a device's replaced certificates, ``when_used`` those of which it was wanted; returns how many."""
    query = sa.select(Certificate.id).where(
        Certificate.tenant_id == tenant_id,
        Certificate.device_id == device_id,
        Certificate.status == CertificateStatus.REPLACED,
    )
    if when_used:
        query = query.where(Certificate.ends_when_used)
    return _supersede(tx, list(tx.execute(query).scalars()), now=now, generation=generation, sessions=True)


def overlaps_over(tx: Connection, *, now: datetime, limit: int = 500) -> Sequence[tuple[str, str]]:
    """Tenant and id of devices with a certificate whose overlap is over.

    Where the bundle with the newer key did not arrive for certain, the older one goes on: it may be all there is.
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
            Certificate.not_after > now,  # one that has expired keeps itself out
            ~waits.exists(),
        )
        .distinct()
        .limit(limit)
    )
    return [(row.tenant_id, row.device_id) for row in rows]


@dataclass(frozen=True, slots=True)
class Unfetched:
    """A renewal whose bundle nobody fetched in time: the row ids of its certificate, and of the one before."""

    tenant_id: str
    device_id: str
    certificate_id: int
    before_id: int


def unfetched_renewals(tx: Connection, *, now: datetime, limit: int = 500) -> Sequence[Unfetched]:
    """The renewals that nobody fetched in time, of devices that have an older certificate in time."""
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
    return [Unfetched(*row) for row in rows]


def undo(tx: Connection, renewal: Unfetched, *, now: datetime, generation: int) -> None:
    """Revoke the certificate of a renewal, and make the one before the device's again."""
    _supersede(tx, [renewal.certificate_id], now=now, generation=generation, sessions=False)
    again = sa.case(
        (Certificate.status == CertificateStatus.HELD, Certificate.status),
        else_=sa.literal(CertificateStatus.ACTIVE, Certificate.status.type),
    )
    values = {"status": again, "replaced_until": None, "ends_when_used": False}
    tx.execute(sa.update(Certificate).where(Certificate.id == renewal.before_id).values(values))


def is_current(tx: Connection, tenant_id: str, device_id: str, fingerprint: str) -> bool:
    """Whether a certificate, by its SHA-256 in hex, is the newest of a device that is in."""
    found = tx.execute(
        sa.select(Certificate.id).where(
            Certificate.tenant_id == tenant_id,
            Certificate.device_id == device_id,
            Certificate.fingerprint == fingerprint,
            Certificate.status == CertificateStatus.ACTIVE,
        )
    )
    return found.one_or_none() is not None


def ends_when_used(tx: Connection, tenant_id: str, device_id: str) -> bool:
    """Whether a certificate of the device is to end once its successor is used."""
    return bool(
        tx.execute(
            sa.select(
                sa.exists().where(
                    Certificate.tenant_id == tenant_id,
                    Certificate.device_id == device_id,
                    Certificate.status == CertificateStatus.REPLACED,
                    Certificate.ends_when_used,
                )
            )
        ).scalar_one()
    )


def _supersede(tx: Connection, ids: Sequence[int], *, now: datetime, generation: int, sessions: bool) -> int:
    """Revoke certificates as superseded, with the bundles that still hold their keys.

    With ``sessions`` those of the device are cut, since one may have begun with such a certificate.
    """
    if not ids:
        return 0
    which = Certificate.id.in_(ids)
    issuers = sa.select(Certificate.issuer_id).where(which, Certificate.status != CertificateStatus.REVOKED)
    tx.execute(sa.update(IssuerRow).where(IssuerRow.id.in_(issuers)).values(revoked_generation=generation))
    values = {"status": CertificateStatus.REVOKED, "revoked_at": now, "revocation_reason": SUPERSEDED}
    values |= {"generation": generation if sessions else 0}
    done = tx.execute(
        sa.update(Certificate).where(which, Certificate.status != CertificateStatus.REVOKED).values(values)
    )
    tx.execute(
        sa.update(Delivery)
        .where(Delivery.certificate_id.in_(ids), Delivery.status.in_(PENDING_DELIVERY))
        .values(status=DeliveryStatus.REVOKED, bundle=None, lease_until=None)
    )
    return done.rowcount
