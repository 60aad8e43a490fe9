"""Bundles that wait for their one download or are kept for a repeat of it, and answers kept for a repeated request."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypedDict

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import LinkExpired, LinkRevoked, LinkUnknown, LinkUsed, StateConflict
from core.states import PENDING_DELIVERY, ClientKind, DeliveryStatus, DeviceStatus
from store.database import Database
from store.prepared import Prepared, Question
from store.scope import ALL_TENANTS
from store.tables import Certificate, Delivery, Device, IdempotencyKey, KeptBundle


@dataclass(frozen=True, slots=True)
class BundleSource:
    """What a sealed bundle is made of: the secrets, sealed, and the certificate, DER, with its issuer's row."""

    sealed: bytes = field(repr=False)
    certificate: bytes
    fingerprint: str
    issuer_id: int


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """The delivery of a link; the broker must have reached ``generation`` before the bundle is released.

    Status "fetching" and ``lease_until`` are of fetches that an older version of the portal did not see the end of.
    Status "delivered" is that of a bundle that is kept for the client which asks. A ``sealed`` one is made when it is
    fetched, of its ``source``; its ``length`` is not known before. ``own_topics`` says whether the device has such.
    """

    id: str
    device_id: str
    certificate_id: int
    status: DeliveryStatus
    expires_at: datetime
    lease_until: datetime | None
    generation: int
    length: int | None
    sealed: bool
    own_topics: bool
    format: str
    kind: ClientKind
    tenant_id: str
    device_name: str
    source: BundleSource | None = field(repr=False)


_INSERT_DELIVERIES = Prepared(sa.insert(Delivery))


class NewDelivery(TypedDict):
    """An encrypted bundle that waits for its one download, or what it will be made of, ``sealed``."""

    id: str
    tenant_id: str
    device_id: str
    certificate_id: int
    bundle: bytes
    sealed: bool
    format: str
    created_at: datetime
    expires_at: datetime


def add_deliveries(tx: Connection, deliveries: Sequence[NewDelivery]) -> None:
    """Insert bundles for their downloads, all by one statement."""
    rows = [{**delivery, "status": DeliveryStatus.READY} for delivery in deliveries]
    if rows:
        _INSERT_DELIVERIES.run(tx, rows)


_DELIVERY = Question(
    sa.select(
        Delivery.id,
        Delivery.device_id,
        Delivery.certificate_id,
        Delivery.status,
        Delivery.expires_at,
        Delivery.lease_until,
        Device.generation,
        sa.func.coalesce(
            sa.case((Delivery.sealed, sa.null()), else_=sa.func.length(Delivery.bundle)), KeptBundle.length
        ),
        Delivery.sealed,
        Device.own_topics,
        Delivery.format,
        Device.kind,
        Delivery.tenant_id,
        Device.name,
        Delivery.delivered_at,
        Device.status,
        KeptBundle.key_hash,
        sa.case((Delivery.sealed, Delivery.bundle)),
        Certificate.der,
        Certificate.fingerprint,
        Certificate.issuer_id,
    )
    .join(Certificate, Certificate.id == Delivery.certificate_id)
    .join(Device, Device.id == Delivery.device_id)
    .outerjoin(KeptBundle, sa.and_(KeptBundle.delivery_id == Delivery.id, KeptBundle.expires_at > sa.bindparam("at")))
    .where(Delivery.id == sa.bindparam("wanted"))
)


def get_delivery(tx: Connection, delivery_id: str, *, now: datetime, key_hash: str | None = None) -> DeliveryRecord:
    """Read a delivery that can be fetched at ``now``, or again by the client whose idempotency key has this hash.

    Raises ``LinkUnknown``, ``LinkUsed``, ``LinkExpired`` or ``LinkRevoked``, ``StateConflict`` while the device is
    suspended.
    """
    return _checked(_DELIVERY.within(tx, {"wanted": delivery_id, "at": now}), now, key_hash)


def delivery_now(database: Database, delivery_id: str, *, now: datetime, key_hash: str | None = None) -> DeliveryRecord:
    """Read a delivery as ``get_delivery`` does, of any tenant, by a read of its own."""
    row = database.answer(_DELIVERY, {"wanted": delivery_id, "at": now}, sees=ALL_TENANTS)
    return _checked(row, now, key_hash)


def _checked(row: Sequence[Any] | None, now: datetime, key_hash: str | None) -> DeliveryRecord:
    if row is None:
        raise LinkUnknown("This download link is not known here; ask for the device's link again.")
    *first, delivered_at, device_status, kept_for, sealed, der, fingerprint, issuer_id = row
    source = None if sealed is None else BundleSource(sealed, der, fingerprint, issuer_id)
    values: Sequence[Any] = (*first, source)
    record = DeliveryRecord(*values)
    if record.status == DeliveryStatus.REVOKED:
        raise LinkRevoked("The device or certificate of this link has been revoked, so its bundle was destroyed.")
    if record.status == DeliveryStatus.EXPIRED or (record.status in PENDING_DELIVERY and record.expires_at <= now):
        raise LinkExpired("This link has expired, so its bundle was destroyed; issue new credentials for the device.")
    spent = record.status == DeliveryStatus.DELIVERED or (record.lease_until is not None and record.lease_until > now)
    if spent and not (key_hash and kept_for and hmac.compare_digest(key_hash, kept_for)):
        raise LinkUsed(device_id=record.device_id, delivery_id=record.id, delivered_at=delivered_at)
    if device_status == DeviceStatus.SUSPENDED:
        raise StateConflict("The device of this link is suspended; fetch its bundle once it has been resumed.")
    return record


@dataclass(frozen=True, slots=True)
class Spent:
    """What a fetch finds in the database, in which format, and whether it is ``kept`` from an earlier fetch."""

    content: bytes
    format: str
    kept: bool


_LOCK_DELIVERY = Question(sa.select(Delivery.bundle).where(Delivery.id == sa.bindparam("wanted")).with_for_update())
_SPEND = Prepared(
    sa.update(Delivery)
    .where(Delivery.id == sa.bindparam("wanted"))
    .values(
        status=DeliveryStatus.DELIVERED,
        bundle=None,
        lease_until=None,
        delivered_at=sa.bindparam("at"),
        format=sa.bindparam("as_format"),
    )
)


def spend_delivery(
    tx: Connection, delivery_id: str, *, now: datetime, bundle_format: str | None = None, key_hash: str | None = None
) -> Spent:
    """Return what waits behind a link and destroy it: the link is used from this transaction's commit on.

    ``bundle_format`` is that in which it is handed out, ``None`` for the one it was registered with. If the client
    whose idempotency key has this hash used the link before, return the sealed bundle that is kept for it. Raises as
    ``get_delivery`` does.
    """
    # The row is locked before it is read, so that of several fetches at once only one finds the bundle.
    locked = _LOCK_DELIVERY.within(tx, {"wanted": delivery_id})
    bundle: bytes | None = None if locked is None else locked[0]
    record = get_delivery(tx, delivery_id, now=now, key_hash=key_hash)
    if bundle is None:
        kept = sa.select(KeptBundle.sealed_bundle).where(KeptBundle.delivery_id == delivery_id)
        return Spent(tx.execute(kept).scalar_one(), record.format, kept=True)
    chosen = bundle_format or record.format
    _SPEND.run(tx, [{"wanted": delivery_id, "at": now, "as_format": chosen}])
    return Spent(bundle, chosen, kept=False)


def keep_bundle(
    tx: Connection, tenant_id: str, delivery_id: str, *, key_hash: str, sealed: bytes, length: int, until: datetime
) -> None:
    """Keep a bundle that was just spent, sealed, for a repeat of its fetch by the same client."""
    row = {"delivery_id": delivery_id, "tenant_id": tenant_id, "key_hash": key_hash}
    tx.execute(sa.insert(KeptBundle), {**row, "sealed_bundle": sealed, "length": length, "expires_at": until})


def forget_kept_bundles(tx: Connection, *, now: datetime) -> int:
    """Destroy the kept bundles that can no longer be fetched again; return how many."""
    return tx.execute(sa.delete(KeptBundle).where(KeptBundle.expires_at <= now)).rowcount


class DeliveryRevocation:
    """Statements, built once, that destroy bundles: those that wait and those that are kept for a repeat."""

    def __init__(self, *which: sa.ColumnElement[bool]) -> None:
        self._revoke = (
            sa.update(Delivery)
            .where(*which, Delivery.status.in_(PENDING_DELIVERY))
            .values(status=DeliveryStatus.REVOKED, bundle=None, lease_until=None)
        )
        self._forget = sa.delete(KeptBundle).where(KeptBundle.delivery_id.in_(sa.select(Delivery.id).where(*which)))

    def run(self, tx: Connection, **parameters: Any) -> None:
        """Destroy the bundles of the deliveries that ``parameters`` select."""
        tx.execute(self._revoke, parameters)
        tx.execute(self._forget, parameters)


def anything_due(tx: Connection, *, now: datetime) -> bool:
    """Return whether a bundle or a kept answer has expired."""
    kept = sa.select(KeptBundle.delivery_id).where(KeptBundle.expires_at <= now)
    bundle = sa.select(Delivery.id).where(Delivery.status.in_(PENDING_DELIVERY), Delivery.expires_at <= now)
    answer = sa.select(IdempotencyKey.key_hash).where(IdempotencyKey.expires_at <= now)
    return bool(tx.execute(sa.select(sa.or_(bundle.exists(), kept.exists(), answer.exists()))).scalar_one())


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


# --- Answers kept for a repeated request -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SealedAnswer:
    """An answer kept for a repeated request: ``sealed`` can be opened only with the idempotency key.

    It is empty once the device is revoked. ``made_by`` is the actor that may repeat the request.
    """

    request_hash: str
    sealed: bytes
    generation: int
    made_by: str | None
    device_id: str | None


def find_answer(tx: Connection, tenant_id: str, key_hash: str, *, now: datetime) -> SealedAnswer | None:
    """Return the answer given under an idempotency key that has not expired, by the key's hash."""
    row = tx.execute(
        sa.select(
            IdempotencyKey.request_hash,
            IdempotencyKey.sealed_answer,
            IdempotencyKey.generation,
            IdempotencyKey.made_by,
            IdempotencyKey.device_id,
        ).where(
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


_EMPTY_ANSWERS = (
    sa.update(IdempotencyKey)
    .where(IdempotencyKey.tenant_id == sa.bindparam("of_tenant"), IdempotencyKey.device_id == sa.bindparam("of_device"))
    .values(sealed_answer=b"")
)


def empty_answers(tx: Connection, tenant_id: str, device_id: str) -> None:
    """Destroy the answers about a device. Their idempotency keys stay used, so that a repeat has no second effect."""
    tx.execute(_EMPTY_ANSWERS, {"of_tenant": tenant_id, "of_device": device_id})


def forget_answers(tx: Connection, *, now: datetime) -> int:
    """Delete expired answers; return how many."""
    return tx.execute(sa.delete(IdempotencyKey).where(IdempotencyKey.expires_at <= now)).rowcount
