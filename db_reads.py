"""The database's questions: lists, pages, what the broker must be told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from db import (
    CERTIFICATE_COLUMNS,
    DEVICE_COLUMNS,
    CertificateRecord,
    DeviceRecord,
    certificate_record,
    device_record,
)
from db_tables import AclEntry, Certificate, Device
from lifecycle import DeviceStatus

CURRENT = sa.and_(Certificate.status.in_(("active", "held")), Certificate.replaced_until.is_(None))


@dataclass(frozen=True, slots=True)
class DeviceFilter:
    """Which devices a list is to hold; ``None`` does not narrow it. ``q`` is looked for in name and id."""

    status: str | None = None
    type: str | None = None
    location: str | None = None
    q: str | None = None
    expires_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class AclChange:
    """What the broker must know of a device: ``topics`` are pairs of filter and access, ``None`` the default ones."""

    device_id: str
    status: DeviceStatus
    topics: tuple[tuple[str, str], ...] | None
    generation: int


def list_devices(
    tx: Connection,
    tenant_id: str,
    wanted: DeviceFilter,
    *,
    limit: int,
    after: tuple[datetime, str] | None = None,
) -> Sequence[tuple[DeviceRecord, datetime | None]]:
    """A page of devices, newest first, each with its certificate's not_after.

    ``after`` is the creation time and id of the last device of the page before (keyset paging).
    """
    current = sa.and_(Certificate.device_id == Device.id, CURRENT)
    query = (
        sa.select(*DEVICE_COLUMNS, Certificate.not_after)
        .outerjoin_from(Device, Certificate, current)
        .where(Device.tenant_id == tenant_id)
    )
    for column, value in ((Device.status, wanted.status), (Device.type, wanted.type)):
        if value is not None:
            query = query.where(column == value)
    if wanted.location is not None:
        query = query.where(Device.location == wanted.location)
    if wanted.q is not None:
        found = Device.name.icontains(wanted.q, autoescape=True)  # the database folds both sides, each in its way
        query = query.where(sa.or_(found, Device.id == wanted.q.lower()))
    if wanted.expires_before is not None:
        query = query.where(Certificate.not_after < wanted.expires_before)
    if after is not None:
        created_at, device_id = after
        query = query.where(
            sa.tuple_(Device.created_at, Device.id)
            < sa.tuple_(sa.literal(created_at, Device.created_at.type), device_id)
        )
    rows = tx.execute(query.order_by(Device.created_at.desc(), Device.id.desc()).limit(limit))
    return [(device_record(row[:-1]), row[-1]) for row in rows]


def device_topics(tx: Connection, tenant_id: str, device_id: str) -> tuple[tuple[str, str], ...]:
    """The topics of a device that has its own, as pairs of filter and access, in their order."""
    rows = tx.execute(
        sa.select(AclEntry.filter, AclEntry.access)
        .where(AclEntry.tenant_id == tenant_id, AclEntry.device_id == device_id)
        .order_by(AclEntry.position)
    )
    return tuple((row.filter, row.access) for row in rows)


def device_certificates(tx: Connection, tenant_id: str, device_id: str) -> Sequence[CertificateRecord]:
    """Every certificate the device has had, newest first."""
    rows = tx.execute(
        sa.select(*CERTIFICATE_COLUMNS)
        .where(Certificate.tenant_id == tenant_id, Certificate.device_id == device_id)
        .order_by(Certificate.id.desc())
    )
    return [certificate_record(row) for row in rows]


def current_certificate(tx: Connection, tenant_id: str, device_id: str) -> CertificateRecord | None:
    """The certificate that a device uses now, or the last that it had; ``None`` before the first."""
    row = tx.execute(
        sa.select(*CERTIFICATE_COLUMNS)
        .where(Certificate.tenant_id == tenant_id, Certificate.device_id == device_id)
        .order_by(sa.case((CURRENT, 0), else_=1), Certificate.id.desc())
        .limit(1)
    ).one_or_none()
    return None if row is None else certificate_record(row)


def acl_changes(tx: Connection, tenant_id: str, *, since: int, defaults: bool) -> Iterator[AclChange]:
    """Every device whose place in the ACL changed after generation ``since``.

    From 0 this is the whole ACL: ``defaults`` then says whether devices that are active with the default topics
    are wanted, too (a pattern line stands for them all).
    """
    query = sa.select(Device.id, Device.status, Device.own_topics, Device.generation).where(
        Device.tenant_id == tenant_id
    )
    entries = sa.select(AclEntry.device_id, AclEntry.filter, AclEntry.access).where(AclEntry.tenant_id == tenant_id)
    if since > 0:
        query = query.where(Device.generation > since)
        entries = entries.join(Device, Device.id == AclEntry.device_id).where(Device.generation > since)
    elif not defaults:
        query = query.where(sa.or_(Device.own_topics, Device.status != DeviceStatus.ACTIVE))
    topics: dict[str, list[tuple[str, str]]] = {}
    for device_id, pattern, access in tx.execute(entries.order_by(AclEntry.device_id, AclEntry.position)):
        topics.setdefault(device_id, []).append((pattern, access))
    for device_id, status, own_topics, generation in tx.execute(query.execution_options(yield_per=5000)):
        own = tuple(topics.get(device_id, ())) if own_topics else None
        yield AclChange(device_id, DeviceStatus(status), own, generation)


def devices_put_out(tx: Connection, tenant_id: str, *, since: int) -> list[str]:
    """Devices whose sessions must end since generation ``since``.

    They were put out (revoked or suspended), or one certificate of theirs was revoked, with which the session may have
    begun: a device that has another connects again with it.
    """
    out = sa.select(Device.id).where(
        Device.tenant_id == tenant_id,
        Device.generation > since,
        Device.status.in_((DeviceStatus.REVOKED, DeviceStatus.SUSPENDED)),
    )
    lost_one = sa.select(Certificate.device_id).where(
        Certificate.generation > since,
        Certificate.generation > 0,  # so that SQLite sees that its index fits
        Certificate.tenant_id == tenant_id,
        Certificate.status == "revoked",
        Certificate.device_id.is_not(None),
    )
    return [device_id for device_id in tx.execute(sa.union(out, lost_one)).scalars() if device_id]


def devices_put_out_since(tx: Connection, tenant_id: str, since: datetime) -> list[str]:
    """Devices revoked or suspended after a time: their half-open connections may still be on their way in."""
    revoked = sa.select(Device.id).where(Device.tenant_id == tenant_id, Device.revoked_at > since)
    held = (
        sa.select(Device.id)
        .join(Certificate, Certificate.device_id == Device.id)
        .where(
            Device.tenant_id == tenant_id, Device.status == DeviceStatus.SUSPENDED, Certificate.status == "held",
            Certificate.revoked_at > since,
        )
    )  # fmt: skip
    return list(tx.execute(sa.union(revoked, held)).scalars())


def superseded_between(tx: Connection, tenant_id: str, start: datetime, end: datetime) -> list[tuple[int, str]]:
    """Certificates of devices that are in, superseded in a span of time, as pairs of row id and device.

    Only the newest thousand revocations are looked at.
    """
    newest = (
        sa.select(Certificate.id, Certificate.device_id, Certificate.revoked_at, Certificate.revocation_reason)
        .where(Certificate.tenant_id == tenant_id, Certificate.generation > 0, Certificate.status == "revoked")
        .order_by(Certificate.generation.desc())
        .limit(1000)
        .subquery()
    )
    rows = tx.execute(
        sa.select(newest.c.id, newest.c.device_id)
        .join(Device, Device.id == newest.c.device_id)
        .where(
            newest.c.revocation_reason == "superseded",
            newest.c.revoked_at > start,
            newest.c.revoked_at <= end,
            Device.status == DeviceStatus.ACTIVE,
        )
    )
    return [(row.id, row.device_id) for row in rows]
