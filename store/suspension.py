"""The database's side of suspending a device, and of letting it back in."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.device_status import DeviceStatus
from core.states import CertificateStatus
from store.devices import update_device
from store.tables import Certificate, IssuerRow

HOLD = "certificate_hold"


def suspend_device(tx: Connection, tenant_id: str, device_id: str, *, suspended_at: datetime, generation: int) -> None:
    """Suspend a device and put every certificate with which it could get in on hold (RFC 5280 section 5.3.1)."""
    values = {"status": DeviceStatus.SUSPENDED, "updated_at": suspended_at, "generation": generation}
    update_device(tx, tenant_id, device_id, values)
    _turn(
        tx,
        (*_of(tenant_id, device_id), Certificate.status.in_((CertificateStatus.ACTIVE, CertificateStatus.REPLACED))),
        {
            "status": CertificateStatus.HELD,
            "revoked_at": suspended_at,
            "revocation_reason": HOLD,
            "generation": generation,
        },
    )


def resume_device(tx: Connection, tenant_id: str, device_id: str, *, resumed_at: datetime, generation: int) -> None:
    """Let a device back in: each certificate on hold becomes what it was."""
    values = {"status": DeviceStatus.ACTIVE, "updated_at": resumed_at, "generation": generation}
    update_device(tx, tenant_id, device_id, values)
    was = sa.case(
        (Certificate.replaced_until.is_(None), sa.literal(CertificateStatus.ACTIVE, Certificate.status.type)),
        else_=sa.literal(CertificateStatus.REPLACED, Certificate.status.type),
    )
    _turn(
        tx,
        (*_of(tenant_id, device_id), Certificate.status == CertificateStatus.HELD),
        {"status": was, "revoked_at": None, "revocation_reason": None, "generation": generation},
    )


def suspended_since(tx: Connection, tenant_id: str, device_id: str) -> datetime | None:
    """When the certificates of a device were put on hold, ``None`` where none is."""
    query = sa.select(sa.func.max(Certificate.revoked_at)).where(
        *_of(tenant_id, device_id), Certificate.status == CertificateStatus.HELD
    )
    since: datetime | None = tx.execute(query).scalar_one()
    return since


def _of(tenant_id: str, device_id: str) -> tuple[sa.ColumnElement[bool], ...]:
    return Certificate.tenant_id == tenant_id, Certificate.device_id == device_id


def _turn(tx: Connection, which: tuple[sa.ColumnElement[bool], ...], values: dict[str, object]) -> None:
    """Change certificates, and say to their issuers that their CRLs must follow."""
    issuers = sa.select(Certificate.issuer_id).where(*which)
    tx.execute(sa.update(IssuerRow).where(IssuerRow.id.in_(issuers)).values(revoked_generation=values["generation"]))
    tx.execute(sa.update(Certificate).where(*which).values(values))
