"""Find the devices that an upload names again, and replace credentials that nobody has fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import CertificateStatus, DeliveryStatus
from store.certificates import CERTIFICATE_COLUMNS, CertificateRecord
from store.devices import DEVICE_COLUMNS, TOPICS, DeviceRecord, topics_by_device
from store.tables import AclEntry, AuditEntry, Certificate, Delivery, Device, IssuerRow

_REPLACEABLE = (DeliveryStatus.READY, DeliveryStatus.EXPIRED)  # nobody has begun to fetch the bundle
CURRENT = (CertificateStatus.ACTIVE, CertificateStatus.HELD)


@dataclass(frozen=True, slots=True)
class KnownDevice:
    """A device found by its external id, with its current certificate and the bundle of that, if any.

    ``topics`` are pairs of filter and access, ``None`` for the default ones. ``waits`` says whether the bundle waits
    still for its first fetch, or has expired without one.
    """

    device: DeviceRecord
    topics: tuple[tuple[str, str], ...] | None
    certificate: CertificateRecord | None
    delivery_id: str | None
    waits: bool


_FIND = (
    sa.select(*DEVICE_COLUMNS, *CERTIFICATE_COLUMNS, Delivery.id, Delivery.status)
    .select_from(Device)
    .outerjoin(Certificate, sa.and_(Certificate.device_id == Device.id, Certificate.status.in_(CURRENT)))
    .outerjoin(Delivery, sa.and_(Delivery.device_id == Device.id, Delivery.certificate_id == Certificate.id))
    .where(
        Device.tenant_id == sa.bindparam("of_tenant"),
        Device.external_id.in_(sa.bindparam("wanted", expanding=True)),
    )
)


def find_known(tx: Connection, tenant_id: str, external_ids: Sequence[str]) -> dict[str, KnownDevice]:
    """Return the devices that have these external ids, by external id."""
    if not external_ids:
        return {}
    rows = tx.execute(_FIND, {"of_tenant": tenant_id, "wanted": external_ids}).all()
    found = [_found(row) for row in rows]
    with_topics = [device.id for device, *_ in found if device.own_topics]
    own = topics_by_device(tx, TOPICS.where(AclEntry.tenant_id == tenant_id, AclEntry.device_id.in_(with_topics)))
    in_use = _in_use(tx, tenant_id, [device.id for device, *_, status in found if status in _REPLACEABLE])
    known: dict[str, KnownDevice] = {}
    for device, certificate, delivery_id, status in found:
        is_active = certificate is not None and certificate.status is CertificateStatus.ACTIVE
        waits = status in _REPLACEABLE and device.id not in in_use and is_active
        topics = tuple(own.get(device.id, ())) if device.own_topics else None
        known[device.external_id or ""] = KnownDevice(device, topics, certificate, delivery_id, waits)
    return known


def _found(row: Sequence[Any]) -> tuple[DeviceRecord, CertificateRecord | None, str | None, DeliveryStatus | None]:
    """Read a row of ``_FIND``."""
    *columns, delivery_id, status = row
    number = len(DEVICE_COLUMNS)
    certificate = None if columns[number] is None else CertificateRecord(*columns[number:])
    return DeviceRecord(*columns[:number]), certificate, delivery_id, status


def _in_use(tx: Connection, tenant_id: str, device_ids: Sequence[str]) -> set[str]:
    """Return the devices of which a bundle was fetched or a certificate was renewed."""
    if not device_ids:
        return set()
    objects = {f"device:{device_id}": device_id for device_id in device_ids}
    found = tx.execute(
        sa.select(AuditEntry.object).where(
            AuditEntry.tenant_id == tenant_id,
            AuditEntry.object.in_(list(objects)),
            AuditEntry.action == "bundle:fetch",
        )
    ).scalars()
    renewed = tx.execute(
        sa.select(Certificate.device_id).where(
            Certificate.tenant_id == tenant_id,
            Certificate.device_id.in_(device_ids),
            Certificate.status == CertificateStatus.REPLACED,
        )
    ).scalars()
    return {objects[name] for name in found} | {device_id for device_id in renewed if device_id is not None}


def supersede_unfetched(
    tx: Connection, tenant_id: str, known: Sequence[KnownDevice], *, at: datetime, generation: int
) -> set[str]:
    """Destroy undelivered bundles with their links, and revoke their certificates as superseded.

    Returns the ids of the devices of which that was still possible: of the others something has changed meanwhile.
    """
    waiting = [device.delivery_id for device in known if device.delivery_id is not None]
    destroyed = tx.execute(
        sa.update(Delivery)
        .where(Delivery.tenant_id == tenant_id, Delivery.id.in_(waiting), Delivery.status == DeliveryStatus.READY)
        .values(status=DeliveryStatus.REVOKED, bundle=None)
        .returning(Delivery.certificate_id)
    ).scalars()
    gone = set(destroyed)
    expired = tx.execute(
        sa.select(Delivery.certificate_id).where(
            Delivery.tenant_id == tenant_id, Delivery.id.in_(waiting), Delivery.status == DeliveryStatus.EXPIRED
        )
    ).scalars()
    gone |= set(expired)
    revoked = tx.execute(
        sa.update(Certificate)
        .where(
            Certificate.tenant_id == tenant_id, Certificate.id.in_(gone), Certificate.status == CertificateStatus.ACTIVE
        )
        .values(status=CertificateStatus.REVOKED, revoked_at=at, revocation_reason="superseded")
        .returning(Certificate.device_id)
    ).scalars()
    done = {device_id for device_id in revoked if device_id is not None}
    issuers = {device.certificate.issuer_id for device in known if device.certificate and device.device.id in done}
    tx.execute(sa.update(IssuerRow).where(IssuerRow.id.in_(issuers)).values(revoked_generation=generation))
    return done
