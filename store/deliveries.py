"""Bundles that wait for their one download, and answers that are kept for a repeated request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypedDict

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import LinkExpired, LinkRevoked, LinkUnknown, LinkUsed, StateConflict
from core.states import PENDING_DELIVERY, DeliveryStatus, DeviceStatus
from store.tables import Delivery, Device, IdempotencyKey


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """The delivery of a link; the broker must have reached ``generation`` before the bundle is released.

    Status "fetching" and ``lease_until`` are of fetches that an older version of the portal did not see the end of.
    """

    id: str
    device_id: str
    certificate_id: int
    status: DeliveryStatus
    expires_at: datetime
    lease_until: datetime | None
    generation: int
    length: int
    format: str


_INSERT_DELIVERIES = sa.insert(Delivery)


class NewDelivery(TypedDict):
    """An encrypted bundle that waits for its one download."""

    id: str
    tenant_id: str
    device_id: str
    certificate_id: int
    bundle: bytes
    format: str
    created_at: datetime
    expires_at: datetime


def add_deliveries(tx: Connection, deliveries: Sequence[NewDelivery]) -> None:
    """Insert bundles for their downloads, all by one statement."""
    rows = [{**delivery, "status": DeliveryStatus.READY} for delivery in deliveries]
    if rows:
        tx.execute(_INSERT_DELIVERIES, rows)


def get_delivery(tx: Connection, delivery_id: str, *, now: datetime) -> DeliveryRecord:
    """Read a delivery that can still be fetched at ``now``.

    Raises ``LinkUnknown``, ``LinkUsed``, ``LinkExpired`` or ``LinkRevoked``, ``StateConflict`` while the device is
    suspended.
    """
    row = tx.execute(
        sa.select(
            Delivery.id,
            Delivery.device_id,
            Delivery.certificate_id,
            Delivery.status,
            Delivery.expires_at,
            Delivery.lease_until,
            Device.generation,
            sa.func.length(Delivery.bundle),
            Delivery.format,
            Device.status,
        )
        .join(Device, Device.id == Delivery.device_id)
        .where(Delivery.id == delivery_id)
    ).one_or_none()
    if row is None:
        raise LinkUnknown("This download link is not known here; ask for the device's link again.")
    record = DeliveryRecord(*row[:-1])
    if record.status == DeliveryStatus.REVOKED:
        raise LinkRevoked("The device or certificate of this link has been revoked, so its bundle was destroyed.")
    if record.status == DeliveryStatus.EXPIRED or (record.status in PENDING_DELIVERY and record.expires_at <= now):
        raise LinkExpired("This link has expired, so its bundle was destroyed; issue new credentials for the device.")
    if record.status == DeliveryStatus.DELIVERED or (record.lease_until is not None and record.lease_until > now):
        raise LinkUsed("This link has been used; give the device new credentials if it was not you.")
    if row[-1] == DeviceStatus.SUSPENDED:
        raise StateConflict("The device of this link is suspended; fetch its bundle once it has been resumed.")
    return record


def spend_delivery(tx: Connection, delivery_id: str, *, now: datetime) -> bytes:
    """Return the bundle and destroy it: the link is used from this transaction's commit on.

    Raises as ``get_delivery`` does.
    """
    # The row is locked before it is read, so that of several fetches at once only one finds the bundle.
    bundle: bytes | None = tx.execute(
        sa.select(Delivery.bundle).where(Delivery.id == delivery_id).with_for_update()
    ).scalar_one_or_none()
    get_delivery(tx, delivery_id, now=now)
    if bundle is None:
        raise LinkUsed("This link has been used; give the device new credentials if it was not you.")
    tx.execute(
        sa.update(Delivery)
        .where(Delivery.id == delivery_id)
        .values(status=DeliveryStatus.DELIVERED, bundle=None, lease_until=None, delivered_at=now)
    )
    return bundle


def anything_due(tx: Connection, *, now: datetime) -> bool:
    """Return whether a bundle or a kept answer has expired."""
    bundle = sa.select(Delivery.id).where(Delivery.status.in_(PENDING_DELIVERY), Delivery.expires_at <= now)
    answer = sa.select(IdempotencyKey.key_hash).where(IdempotencyKey.expires_at <= now)
    return bool(tx.execute(sa.select(sa.or_(bundle.exists(), answer.exists()))).scalar_one())


def expire_deliveries(tx: Connection, *, now: datetime, limit: int = 1000) -> Sequence[tuple[str, str, str]]:
    """Destroy expired bundles; return tenant, device and delivery of each."""
    due = (
        sa.select(Delivery.id)
        .where(
            Delivery.status.in_(PENDING_DELIVERY),
            Delivery.expires_at <= now,
            sa.or_(Delivery.lease_until.is_(None), Delivery.lease_until <= now),
        )
        .limit(limit)
    )
    expired = tx.execute(
        sa.update(Delivery)
        .where(Delivery.id.in_(due))
        .values(status=DeliveryStatus.EXPIRED, bundle=None, lease_until=None)
        .returning(Delivery.tenant_id, Delivery.device_id, Delivery.id)
    )
    return [(row.tenant_id, row.device_id, row.id) for row in expired]


def count_undelivered(tx: Connection, tenant_id: str) -> int:
    """Return how many bundles wait for their download."""
    return tx.execute(
        sa.select(sa.func.count())
        .select_from(Delivery)
        .where(Delivery.tenant_id == tenant_id, Delivery.status.in_(PENDING_DELIVERY))
    ).scalar_one()


# --- Answers kept for a repeated request -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SealedAnswer:
    """An answer kept for a repeated request: ``sealed`` can be opened only with the idempotency key."""

    request_hash: str
    sealed: bytes
    generation: int


def find_answer(tx: Connection, tenant_id: str, key_hash: str, *, now: datetime) -> SealedAnswer | None:
    """Return the answer given under an idempotency key that has not expired, by the key's hash."""
    row = tx.execute(
        sa.select(IdempotencyKey.request_hash, IdempotencyKey.sealed_answer, IdempotencyKey.generation).where(
            IdempotencyKey.tenant_id == tenant_id,
            IdempotencyKey.key_hash == key_hash,
            IdempotencyKey.expires_at > now,
        )
    ).one_or_none()
    return None if row is None else SealedAnswer(*row)


def add_answer(tx: Connection, *, tenant_id: str, key_hash: str, created_at: datetime, **values: Any) -> None:
    """Keep a sealed answer; the primary key refuses a second one under the same idempotency key.

    ``values`` are the other columns of ``IdempotencyKey``.
    """
    own = (IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.key_hash == key_hash)
    tx.execute(sa.delete(IdempotencyKey).where(*own, IdempotencyKey.expires_at <= created_at))
    row = {"tenant_id": tenant_id, "key_hash": key_hash, "created_at": created_at, **values}
    tx.execute(sa.insert(IdempotencyKey), row)


def forget_answers(tx: Connection, *, now: datetime) -> int:
    """Delete expired answers; return how many."""
    return tx.execute(sa.delete(IdempotencyKey).where(IdempotencyKey.expires_at <= now)).rowcount
