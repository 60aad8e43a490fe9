"""Certificates: their rows, which are current, which are good, which should be renewed soon."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import ON_CRL, CertificateStatus, ClientKind, DeviceStatus
from store.database import UtcDateTime, columns_of
from store.tables import Certificate, Device, ExpiryAnnouncement


@dataclass(frozen=True, slots=True)
class CertificateRecord:
    """A row of ``certificates``: serial number in lower-case hex, fingerprint SHA-256 in lower-case hex."""

    id: int
    issuer_id: int
    device_id: str | None
    purpose: str
    serial_number: str
    fingerprint: str
    der: bytes
    not_before: datetime
    not_after: datetime
    issued_at: datetime
    status: CertificateStatus
    revoked_at: datetime | None
    revocation_reason: str | None


CERTIFICATE_COLUMNS = columns_of(CertificateRecord, Certificate)


# Literals, not parameters: a database uses a partial index only if the query contains the index's condition as text. A
# further condition on the same column must come first, because SQLite searches the index by the first one.
CURRENT = sa.and_(sa.text("certificates.status IN ('active', 'held')"), sa.text("certificates.replaced_until IS NULL"))


def of_device(
    tenant_id: str | sa.BindParameter[str], device_id: str | sa.BindParameter[str]
) -> tuple[sa.ColumnElement[bool], ...]:
    """Return the conditions that a certificate is one of a device."""
    return Certificate.tenant_id == tenant_id, Certificate.device_id == device_id


# For statements that are built once.
OF_DEVICE = of_device(sa.bindparam("of_tenant"), sa.bindparam("of_device"))


def device_certificates(tx: Connection, tenant_id: str, device_id: str) -> Sequence[CertificateRecord]:
    """Return every certificate that a device has had, newest first."""
    query = sa.select(*CERTIFICATE_COLUMNS).where(*of_device(tenant_id, device_id)).order_by(Certificate.id.desc())
    return [CertificateRecord(*row) for row in tx.execute(query)]


def current_certificate(tx: Connection, tenant_id: str, device_id: str) -> CertificateRecord | None:
    """Return the current certificate of a device, or else the last that it had; ``None`` before the first."""
    row = tx.execute(
        sa.select(*CERTIFICATE_COLUMNS)
        .where(*of_device(tenant_id, device_id))
        .order_by(sa.case((CURRENT, 0), else_=1), Certificate.id.desc())
        .limit(1)
    ).one_or_none()
    return None if row is None else CertificateRecord(*row)


@dataclass(frozen=True, slots=True)
class ShownCertificate:
    """A certificate of this portal that a client has presented, with the state of its device."""

    tenant_id: str
    certificate: CertificateRecord
    device_status: DeviceStatus
    kind: ClientKind


def find_device_certificate(tx: Connection, fingerprint: str) -> ShownCertificate | None:
    """Return a device's certificate by the SHA-256 of its DER in hex, whatever its state."""
    query = (
        sa.select(Certificate.tenant_id, Device.status, Device.kind, *CERTIFICATE_COLUMNS)
        .join(Device, sa.and_(Device.tenant_id == Certificate.tenant_id, Device.id == Certificate.device_id))
        .where(Certificate.fingerprint == fingerprint, Certificate.purpose == "device")
    )
    row = tx.execute(query).one_or_none()
    return None if row is None else ShownCertificate(row[0], CertificateRecord(*row[3:]), row[1], row[2])


def get_certificate(tx: Connection, tenant_id: str, certificate_id: int) -> CertificateRecord:
    """Return a certificate by the id of its row."""
    own = (Certificate.tenant_id == tenant_id, Certificate.id == certificate_id)
    return CertificateRecord(*tx.execute(sa.select(*CERTIFICATE_COLUMNS).where(*own)).one())


def count_issued(tx: Connection, tenant_id: str, device_id: str, *, since: datetime) -> int:
    """Return how many certificates a device was issued since a time."""
    own = (*of_device(tenant_id, device_id), Certificate.issued_at >= since)
    return tx.execute(sa.select(sa.func.count()).select_from(Certificate).where(*own)).scalar_one()


# --- The portal's own ------------------------------------------------------------------------------------------------


def find_own_certificate(tx: Connection, fingerprint: str) -> CertificateRecord | None:
    """Return a certificate that is not a device's nor a probe's, by the SHA-256 of its DER in hex."""
    query = sa.select(*CERTIFICATE_COLUMNS)
    query = query.where(Certificate.fingerprint == fingerprint, Certificate.purpose == "server")
    row = tx.execute(query).one_or_none()
    return None if row is None else CertificateRecord(*row)


def own_certificates(
    tx: Connection, tenant_id: str, *, now: datetime, purpose: str = "server"
) -> Sequence[CertificateRecord]:
    """Return those of a purpose and a tenant that are neither revoked nor expired, by an index of current ones."""
    query = sa.select(*CERTIFICATE_COLUMNS).where(
        CURRENT,
        Certificate.tenant_id == tenant_id,
        Certificate.not_after > now,
        Certificate.device_id.is_(None),
        Certificate.purpose == purpose,
    )
    return [CertificateRecord(*row) for row in tx.execute(query)]


def probe_certificates(tx: Connection, tenant_id: str, *, now: datetime) -> Sequence[bytes]:
    """Return those by which portals probe their brokers, DER, that are neither revoked nor expired."""
    query = sa.select(Certificate.der).where(
        CURRENT,
        Certificate.tenant_id == tenant_id,
        Certificate.not_after > now,
        Certificate.device_id.is_(None),
        Certificate.purpose == "canary",
    )
    return [row[0] for row in tx.execute(query)]


def revoke_own_certificate(
    tx: Connection, record: CertificateRecord, *, at: datetime, reason: str, generation: int
) -> None:
    """Revoke one of the portal's own certificates."""
    values = {
        "status": CertificateStatus.REVOKED,
        "revoked_at": at,
        "revocation_reason": reason,
        "generation": generation,
    }
    tx.execute(sa.update(Certificate).where(Certificate.id == record.id).values(values))


# --- Revocation states -----------------------------------------------------------------------------------------------

SERIAL_NUMBER_DIGITS = 40  # RFC 5280 section 4.1.2.2: at most 20 octets


@dataclass(frozen=True, slots=True)
class RevocationState:
    """When and why a certificate was revoked or put on hold; ``None`` if it is neither."""

    revoked_at: datetime | None
    reason: str | None


_STATE_COLUMNS = Certificate.serial_number, Certificate.status, Certificate.revoked_at, Certificate.revocation_reason
# A query of its own for one certificate, because nearly all requests ask for one and it is quicker.
_STATE_OF_ONE = sa.select(*_STATE_COLUMNS).where(
    Certificate.issuer_id == sa.bindparam("issuer_id"), Certificate.serial_number == sa.bindparam("serial_number")
)
_STATES_OF_SEVERAL = sa.select(*_STATE_COLUMNS).where(
    Certificate.issuer_id == sa.bindparam("issuer_id"),
    Certificate.serial_number.in_(sa.bindparam("serial_numbers", expanding=True)),
)


def revocation_states(tx: Connection, issuer_id: int, serial_numbers: Collection[str]) -> dict[str, RevocationState]:
    """Return the states of an issuer's certificates by serial number (lower-case hex), without those never issued."""
    wanted = sorted({number for number in serial_numbers if len(number) <= SERIAL_NUMBER_DIGITS})
    if not wanted:
        return {}
    if len(wanted) == 1:
        rows = tx.execute(_STATE_OF_ONE, {"issuer_id": issuer_id, "serial_number": wanted[0]})
    else:
        rows = tx.execute(_STATES_OF_SEVERAL, {"issuer_id": issuer_id, "serial_numbers": wanted})
    return {
        serial_number: RevocationState(revoked_at, reason) if status in ON_CRL else _GOOD
        for serial_number, status, revoked_at, reason in rows
    }


_GOOD = RevocationState(None, None)

# --- Expiry ----------------------------------------------------------------------------------------------------------


# As text: SQLite uses a partial index only if the statement contains the index's condition word for word.
IS_APPLICATION = sa.text("devices.kind = 'application'")


@dataclass(frozen=True, slots=True)
class ExpiringCertificate:
    """A certificate, of a device or an application, that is past two thirds of its life."""

    certificate_id: int
    tenant_id: str
    device_id: str
    kind: ClientKind
    name: str
    serial_number: str
    not_after: datetime


# The two databases calculate with times in different ways.
_PAST_SHARE = {
    "sqlite": (
        "julianday(certificates.not_before)"
        " + (julianday(certificates.not_after) - julianday(certificates.not_before)) * {share} <= julianday(:now)"
    ),
    "postgresql": "certificates.not_before + (certificates.not_after - certificates.not_before) * {share} <= :now",
}


def past_share(tx: Connection, share: str, now: datetime) -> sa.TextClause:
    """Return the condition that a ``share`` of a certificate's lifetime, such as ``2 / 3``, has passed."""
    text = _PAST_SHARE[tx.dialect.name].format(share=share)
    return sa.text(text).bindparams(sa.bindparam("now", now, type_=UtcDateTime()))


def renewals_to_announce(tx: Connection, *, now: datetime, limit: int) -> Sequence[ExpiringCertificate]:
    """Return active certificates that should be renewed and were not announced yet."""
    announced = sa.select(ExpiryAnnouncement.certificate_id).where(ExpiryAnnouncement.certificate_id == Certificate.id)
    query = (
        sa.select(
            Certificate.id,
            Certificate.tenant_id,
            Certificate.device_id,
            Device.kind,
            Device.name,
            Certificate.serial_number,
            Certificate.not_after,
        )
        .join(Device, Device.id == Certificate.device_id)
        .where(
            Certificate.status == CertificateStatus.ACTIVE,
            Certificate.not_after > now,
            past_share(tx, "2 / 3", now),
            ~announced.exists(),
        )
        .order_by(Certificate.id)
        .limit(limit)
    )
    rows: Sequence[Any] = tx.execute(query).all()
    return [ExpiringCertificate(*row) for row in rows]


def mark_announced(tx: Connection, expiring: Sequence[ExpiringCertificate], *, at: datetime) -> None:
    """Record that the expiry of these certificates was announced."""
    rows = [{"certificate_id": one.certificate_id, "tenant_id": one.tenant_id, "announced_at": at} for one in expiring]
    tx.execute(sa.insert(ExpiryAnnouncement), rows)
