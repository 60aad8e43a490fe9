"""The database: devices with their certificates, in transactions that are durable once they end."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.device_status import DeviceStatus
from core.errors import DeviceNotFound
from core.states import PENDING_DELIVERY, CertificateStatus, DeliveryStatus
from store.devices import DEVICE_COLUMNS, DeviceRecord, device_record, update_device
from store.tables import AclEntry, BrokerState, Certificate, Delivery, Device, IssuerRow, UtcDateTime

# --- Devices ------------------------------------------------------------------------------------------------------

# Statements of every registration and every request stand ready: building one takes longer than running it.
_INSERT_DEVICE = sa.insert(Device)


def add_device(
    tx: Connection,
    *,
    tenant_id: str,
    device_id: str,
    name: str,
    type: str,  # noqa: A002 - the field's name in the interface
    location: str,
    firmware: str,
    metadata: dict[str, Any],
    status: DeviceStatus,
    topics: Sequence[tuple[str, str]] | None,
    created_at: datetime,
    generation: int,
    external_id: str | None = None,
) -> None:
    """Insert a device; ``topics`` are pairs of filter and access, or ``None`` for the default ones."""
    tx.execute(
        _INSERT_DEVICE,
        {
            "id": device_id,
            "tenant_id": tenant_id,
            "external_id": external_id,
            "name": name,
            "type": type,
            "location": location,
            "firmware": firmware,
            "metadata": metadata,
            "own_topics": topics is not None,
            "status": status,
            "created_at": created_at,
            "updated_at": created_at,
            "generation": generation,
        },
    )
    if topics is not None:
        _insert_topics(tx, tenant_id, device_id, topics)


def get_device(tx: Connection, tenant_id: str, device_id: str, *, for_update: bool = False) -> DeviceRecord:
    """Read a device; ``for_update`` keeps others from changing it until the transaction ends.

    Raises ``DeviceNotFound``.
    """
    query = sa.select(*DEVICE_COLUMNS).where(Device.tenant_id == tenant_id, Device.id == device_id)
    if for_update:
        query = query.with_for_update()  # nothing on SQLite, where a writer is alone anyway
    row = tx.execute(query).one_or_none()
    if row is None:
        raise DeviceNotFound(f"There is no device {device_id}; check the id with GET /devices.")
    return device_record(row)


def replace_topics(
    tx: Connection, tenant_id: str, device_id: str, topics: Sequence[tuple[str, str]] | None, *, generation: int
) -> None:
    """Give a device other topics of its own, or with ``None`` the default ones again."""
    tx.execute(sa.delete(AclEntry).where(AclEntry.tenant_id == tenant_id, AclEntry.device_id == device_id))
    if topics is not None:
        _insert_topics(tx, tenant_id, device_id, topics)
    update_device(tx, tenant_id, device_id, {"own_topics": topics is not None, "generation": generation})


def _insert_topics(tx: Connection, tenant_id: str, device_id: str, topics: Sequence[tuple[str, str]]) -> None:
    tx.execute(
        sa.insert(AclEntry),
        [
            {"tenant_id": tenant_id, "device_id": device_id, "position": position, "filter": pattern, "access": access}
            for position, (pattern, access) in enumerate(topics)
        ],
    )


def revoke_device(
    tx: Connection, tenant_id: str, device_id: str, *, revoked_at: datetime, reason: str, generation: int
) -> None:
    """Revoke a device with all certificates of it that are not yet, and destroy the bundles that wait for it."""
    update_device(
        tx,
        tenant_id,
        device_id,
        {
            "status": DeviceStatus.REVOKED,
            "revoked_at": revoked_at,
            "revocation_reason": reason,
            "updated_at": revoked_at,
            "generation": generation,
        },
    )
    own = (
        Certificate.tenant_id == tenant_id,
        Certificate.device_id == device_id,
        Certificate.status != CertificateStatus.REVOKED,
    )
    issuers = sa.select(Certificate.issuer_id).where(*own)
    tx.execute(sa.update(IssuerRow).where(IssuerRow.id.in_(issuers)).values(revoked_generation=generation))
    tx.execute(
        sa.update(Certificate)
        .where(*own)
        .values(
            status=CertificateStatus.REVOKED, revoked_at=revoked_at, revocation_reason=reason, generation=generation
        )
    )
    tx.execute(
        sa.update(Delivery)
        .where(
            Delivery.tenant_id == tenant_id,
            Delivery.device_id == device_id,
            Delivery.status.in_(PENDING_DELIVERY),
        )
        .values(status=DeliveryStatus.REVOKED, bundle=None, lease_until=None)
    )


# --- Certificates -------------------------------------------------------------------------------------------------

_INSERT_CERTIFICATE = sa.insert(Certificate).returning(Certificate.id)


def add_certificate(
    tx: Connection,
    *,
    tenant_id: str,
    issuer_id: int,
    purpose: str,
    serial_number: str,
    fingerprint: str,
    der: bytes,
    not_before: datetime,
    not_after: datetime,
    issued_at: datetime,
    device_id: str | None = None,
    revoked_at: datetime | None = None,
    reason: str | None = None,
) -> int:
    """Record a certificate, active or already revoked, and return its row's id.

    The database refuses a second active one of the same device, and a serial number that its issuer has used.
    """
    added = tx.execute(
        _INSERT_CERTIFICATE,
        {
            "tenant_id": tenant_id,
            "issuer_id": issuer_id,
            "device_id": device_id,
            "purpose": purpose,
            "serial_number": serial_number,
            "fingerprint": fingerprint,
            "der": der,
            "not_before": not_before,
            "not_after": not_after,
            "issued_at": issued_at,
            "status": CertificateStatus.ACTIVE if revoked_at is None else CertificateStatus.REVOKED,
            "revoked_at": revoked_at,
            "revocation_reason": reason,
        },
    )
    return int(added.scalar_one())


# --- The generation that the broker must reach ---------------------------------------------------------------------

_ADVANCE = (
    sa.update(BrokerState)
    .where(BrokerState.tenant_id == sa.bindparam("of_tenant"))
    .values(
        generation=BrokerState.generation + 1,
        pending_since=sa.func.coalesce(BrokerState.pending_since, sa.bindparam("at", type_=UtcDateTime)),
    )
    .returning(BrokerState.generation)
)


def next_generation(tx: Connection, tenant_id: str, *, at: datetime) -> int:
    """Advance the generation, in the transaction that makes the change, and return the new one."""
    return int(tx.execute(_ADVANCE, {"of_tenant": tenant_id, "at": at}).scalar_one())
