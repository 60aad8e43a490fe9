"""What is kept to be handed out: the bundle behind a link, once, and the answer to a request that may be repeated."""

from __future__ import annotations

import dataclasses
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeVar

from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

import credential_delivery
from config import Settings
from core.errors import IdempotencyConflict
from core.failpoints import failpoint
from delivery.formats import BundleFormat
from store import audit, deliveries, devices
from store.audit import Actor
from store.database import Database
from store.scope import ALL_TENANTS
from workflows import events
from workflows.events import EventType
from workflows.reconciliation import Reconciler
from workflows.tenants import TenantDirectory


@dataclass(frozen=True, slots=True)
class DeliveredBundle:
    """A bundle that was taken from the database, and is nowhere else."""

    delivery_id: str
    device_id: str
    content: bytes
    format: BundleFormat = BundleFormat.ZIP


@dataclass(eq=False, repr=False)
class Deliveries:
    """The bundles behind the signed links."""

    _settings: Settings
    _database: Database
    _tenants: TenantDirectory
    _reconciler: Reconciler
    _link_keys: Sequence[str]
    _pepper: bytes
    _clock: Callable[[], datetime]

    def check_download(self, token: str, idempotency_key: str | None = None) -> deliveries.DeliveryRecord:
        """Return what a link's token leads to, without using the link.

        Raises ``LinkUnknown``, ``LinkUsed``, ``LinkExpired``, ``LinkRevoked``, ``TenantSuspended``.
        """
        return self._find(token, idempotency_key)[0]

    def _find(
        self, token: str, idempotency_key: str | None
    ) -> tuple[deliveries.DeliveryRecord, credential_delivery.AnswerSeal | None]:
        now = self._clock()
        # The signature's own age limit is the longest a link can live; what counts is the time in the database.
        longest = timedelta(hours=self._tenants.longest_link_hours) + timedelta(days=1)
        delivery_id = credential_delivery.read_download_token(token, self._link_keys, now=now, max_age=longest)
        seal = None
        if idempotency_key:
            purpose = f"download/{delivery_id}"
            seal = credential_delivery.AnswerSeal.of(idempotency_key, pepper=self._pepper, purpose=purpose)
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            found = deliveries.get_delivery(tx, delivery_id, now=now, key_hash=seal.key_hash if seal else None)
        self._tenants.of(found.tenant_id).check_served()
        return found, seal

    def deliver(self, actor: Actor, token: str, idempotency_key: str | None = None) -> DeliveredBundle:
        """Return the bundle behind a link; the link is used, and the bundle destroyed, before this returns.

        Whether the bundle reaches the client cannot be known. With an ``idempotency_key`` it is kept, sealed under that
        key, so that the same key may fetch it again within ``PORTAL_LINK_GRACE``; nothing else opens the link again.
        Raises as ``check_download`` does, and ``Unavailable`` while the broker does not know the device.
        """
        record, seal = self._find(token, idempotency_key)
        actor = dataclasses.replace(actor, tenant_id=record.tenant_id)  # anyone has the link, and it says whose it is
        self._reconciler.wait_until_granted(record.generation)
        content = self._database.write(lambda tx: self._spend(tx, actor, record, seal), sees=record.tenant_id)
        failpoint("deliver.after_commit")
        return DeliveredBundle(record.id, record.device_id, content, BundleFormat(record.format))

    def _spend(
        self,
        tx: Connection,
        actor: Actor,
        record: deliveries.DeliveryRecord,
        seal: credential_delivery.AnswerSeal | None,
    ) -> bytes:
        now, kind, device = self._clock(), record.kind, f"{record.kind}:{record.device_id}"
        content, repeated = deliveries.spend_delivery(tx, record.id, now=now, key_hash=seal.key_hash if seal else None)
        if repeated and seal is not None:
            events.record(tx, actor.tenant_id, EventType.DELIVERED, record.device_id, kind=kind, at=now, repeated=True)
            audit.record(tx, actor, "bundle:repeat", device, at=now, delivery=record.id)
            return seal.open(content)
        if seal is not None and self._settings.link_grace:
            deliveries.keep_bundle(
                tx,
                actor.tenant_id,
                record.id,
                key_hash=seal.key_hash,
                sealed=seal.seal(content),
                length=len(content),
                until=now + timedelta(seconds=self._settings.link_grace),
            )
        events.record(tx, actor.tenant_id, EventType.DELIVERED, record.device_id, kind=kind, at=now)
        audit.record(tx, actor, "bundle:fetch", device, at=now, delivery=record.id)
        audit.record(tx, actor, "bundle:deliver", device, at=now, delivery=record.id)
        failpoint("deliver.before_commit")
        return content


# --- Answers kept for a repeated request --------------------------------------------------------------------------

ANSWERS_KEPT = timedelta(hours=24)
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Sealed:
    """A request that came with an idempotency key."""

    actor: Actor
    seal: credential_delivery.AnswerSeal = field(repr=False)
    request_hash: str


@dataclass(eq=False, repr=False)
class KeptAnswers:
    """Keeps answers encrypted under their idempotency keys, of which only hashes are stored."""

    _database: Database
    _pepper: bytes
    _clock: Callable[[], datetime]

    def seal(self, actor: Actor, idempotency_key: str | None, request: bytes) -> Sealed | None:
        """Return what ``once`` and ``keep`` need, ``None`` without a key; equal requests must be the same bytes."""
        if not idempotency_key:
            return None
        seal = credential_delivery.AnswerSeal.of(idempotency_key, pepper=self._pepper)
        return Sealed(actor, seal, seal.request_hash(request))

    def once(
        self, sealed: Sealed | None, read: Callable[[bytes], Answer], make: Callable[[], tuple[Answer, int]]
    ) -> tuple[Answer, int]:
        """Return the answer kept for the same request, with the generation it was made at, else ``make`` one.

        ``make`` must call ``keep`` in its transaction. Each repeat is recorded. Raises ``IdempotencyConflict`` for a
        key that came with another request or from another actor in the last 24 hours, or if the device is revoked.
        """
        if sealed is None:
            return make()
        kept = self._find(sealed)
        if kept is None:
            try:
                return make()
            except IntegrityError:
                # Of two first requests with one key the database accepted one: its answer is both's.
                kept = self._find(sealed)
                if kept is None:
                    raise
        self._record(sealed, kept, {})
        return read(sealed.seal.open(kept.sealed)), kept.generation

    def _find(self, sealed: Sealed) -> deliveries.SealedAnswer | None:
        with self._database.snapshot() as tx:
            kept = deliveries.find_answer(tx, sealed.actor.tenant_id, sealed.seal.key_hash, now=self._clock())
        if kept is None:
            return None
        if kept.made_by != sealed.actor.name:
            self._record(sealed, kept, {"outcome": "refused", "code": IdempotencyConflict.code})
            raise IdempotencyConflict(
                "This Idempotency-Key was used by another operator token in the last 24 hours; use a new key."
            )
        if not hmac.compare_digest(kept.request_hash, sealed.request_hash):
            raise IdempotencyConflict(
                "This Idempotency-Key was used with another body in the last 24 hours; use a new key."
            )
        if not kept.sealed:
            raise IdempotencyConflict(
                "The device that this Idempotency-Key was used for has been revoked since; use a new key for another."
            )
        return kept

    def _record(self, sealed: Sealed, kept: deliveries.SealedAnswer, detail: dict[str, str]) -> None:
        tenant_id, target = sealed.actor.tenant_id, "idempotency key"
        with self._database.transaction() as tx:
            if kept.device_id:
                target = f"{devices.kind_of(tx, tenant_id, kept.device_id)}:{kept.device_id}"
            audit.record(tx, sealed.actor, "answer:repeat", target, at=self._clock(), **detail)

    def keep(self, tx: Connection, sealed: Sealed, content: bytes, *, device_id: str | None, generation: int) -> None:
        """Keep an answer in the transaction that it is about; the database refuses a second one under the same key."""
        now = self._clock()
        deliveries.add_answer(
            tx,
            tenant_id=sealed.actor.tenant_id,
            made_by=sealed.actor.name,
            device_id=device_id,
            key_hash=sealed.seal.key_hash,
            request_hash=sealed.request_hash,
            sealed_answer=sealed.seal.seal(content),
            generation=generation,
            created_at=now,
            expires_at=now + ANSWERS_KEPT,
        )
