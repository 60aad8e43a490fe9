"""The rows of a tenant that was removed: its devices are revoked some at a time, and then all rows are deleted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import CertificateStatus, ClientKind, DeviceStatus
from store.deliveries import DeliveryRevocation
from store.devices import CertificateChange
from store.enrolment_tables import EnrolmentToken
from store.quotas import count_clients
from store.tables import METADATA, Certificate, Delivery, Device, IdempotencyKey, IssuerRow, Tenant, Token

_LAST = ("audit_entries", "audit_heads")  # what is told of the tenant longest

_OF_TENANT: sa.BindParameter[str] = sa.bindparam("of_tenant")
_IDS: sa.BindParameter[list[str]] = sa.bindparam("ids", expanding=True)
_SOME = (
    sa.select(Device.id, Device.kind)
    .where(Device.tenant_id == _OF_TENANT, Device.status != DeviceStatus.REVOKED)
    .order_by(Device.id)
    .limit(sa.bindparam("count"))
)
_REVOKE = (
    sa.update(Device)
    .where(Device.tenant_id == _OF_TENANT, Device.id.in_(_IDS))
    .values(
        status=DeviceStatus.REVOKED,
        revoked_at=sa.bindparam("at"),
        updated_at=sa.bindparam("at"),
        revocation_reason=sa.bindparam("reason"),
        generation=sa.bindparam("changed_at"),
    )
)
_REVOKE_CERTIFICATES = CertificateChange(
    Certificate.tenant_id == _OF_TENANT,
    Certificate.device_id.in_(_IDS),
    Certificate.status != CertificateStatus.REVOKED,
    status=CertificateStatus.REVOKED,
    revoked_at=sa.bindparam("at"),
    revocation_reason=sa.bindparam("reason"),
    generation=sa.bindparam("changed_at"),
)
_DESTROY_BUNDLES = DeliveryRevocation(Delivery.tenant_id == _OF_TENANT, Delivery.device_id.in_(_IDS))


def revoke_some(
    tx: Connection, tenant_id: str, *, reason: str, at: datetime, generation: int, limit: int
) -> Sequence[tuple[str, ClientKind]]:
    """Revoke at most ``limit`` devices and applications of a tenant, with all that was issued for them; return them."""
    chosen = [(row.id, row.kind) for row in tx.execute(_SOME, {"of_tenant": tenant_id, "count": limit})]
    if not chosen:
        return ()
    own = {"of_tenant": tenant_id, "ids": [device_id for device_id, _ in chosen]}
    tx.execute(_REVOKE, {**own, "at": at, "reason": reason, "changed_at": generation})
    _REVOKE_CERTIFICATES.run(tx, generation=generation, at=at, reason=reason, **own)
    _DESTROY_BUNDLES.run(tx, **own)
    count_clients(tx, tenant_id, -len(chosen))
    return chosen


def end_access(tx: Connection, tenant_id: str, *, at: datetime) -> None:
    """Revoke all tokens of a tenant, its operators' and those to enrol, and destroy the answers kept for a repeat."""
    for table in (Token, EnrolmentToken):
        own = (table.tenant_id == tenant_id, table.revoked_at.is_(None))
        tx.execute(sa.update(table).where(*own).values(revoked_at=at))
    tx.execute(sa.delete(IdempotencyKey).where(IdempotencyKey.tenant_id == tenant_id))


def count_not_revoked(tx: Connection, tenant_id: str) -> int:
    """Return how many devices and applications of a tenant are not revoked."""
    query = sa.select(sa.func.count()).select_from(Device)
    own = (Device.tenant_id == tenant_id, Device.status != DeviceStatus.REVOKED)
    return int(tx.execute(query.where(*own)).scalar_one())


def has_trusted_issuer(tx: Connection, tenant_id: str) -> bool:
    """Return whether a CA of a tenant is not retired."""
    query = sa.select(IssuerRow.id).where(IssuerRow.tenant_id == tenant_id, IssuerRow.status != "retired")
    return tx.execute(query.limit(1)).one_or_none() is not None


def delete_some(tx: Connection, tenant_id: str, *, limit: int) -> int:
    """Delete at most ``limit`` rows of a removed tenant, those first to which no others refer; return how many.

    The audit record comes last. The tenant itself stays.
    """
    for table in _in_order():
        keys = list(table.primary_key.columns)
        some = sa.select(*keys).where(table.c.tenant_id == tenant_id).limit(limit)
        own = table.c.tenant_id == tenant_id
        chosen = keys[0].in_(some) if len(keys) == 1 else sa.tuple_(*keys).in_(some)
        if deleted := tx.execute(sa.delete(table).where(own, chosen)).rowcount:
            return deleted
    return 0


def delete_tenant(tx: Connection, tenant_id: str) -> None:
    """Delete a removed tenant that has no other rows any more."""
    tx.execute(sa.delete(Tenant).where(Tenant.id == tenant_id))


def _in_order() -> Iterator[sa.Table]:
    owned = [table for table in reversed(METADATA.sorted_tables) if "tenant_id" in table.c]
    yield from (table for table in owned if table.name not in (*_LAST, "broker_state"))
    yield from (METADATA.tables[name] for name in _LAST)


def rows_of_devices(tx: Connection, tenant_id: str, *, after: str, limit: int) -> Sequence[dict[str, Any]]:
    """Return devices and applications as they are exported, in the order of their ids, without their generations."""
    hidden = {"tenant_id", "generation", "narrowed_generation"}
    columns = [column for column in Device.__table__.columns if column.name not in hidden]
    query = sa.select(*columns).where(Device.tenant_id == tenant_id, Device.id > after).order_by(Device.id)
    return [dict(row) for row in tx.execute(query.limit(limit)).mappings()]


def rows_of_certificates(tx: Connection, tenant_id: str, *, after: int, limit: int) -> Sequence[dict[str, Any]]:
    """Return certificates as they are exported, in the order in which they were issued."""
    hidden = {"tenant_id", "generation"}
    columns = [column for column in Certificate.__table__.columns if column.name not in hidden]
    query = sa.select(*columns).where(Certificate.tenant_id == tenant_id, Certificate.id > after)
    return [dict(row) for row in tx.execute(query.order_by(Certificate.id).limit(limit)).mappings()]
