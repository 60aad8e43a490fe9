"""What is kept to be handed out: the bundle behind a link, once, and the answer to a request that may be repeated."""

from __future__ import annotations

import dataclasses
import hmac
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeVar

from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

import credential_delivery
from config import Settings
from core.errors import IdempotencyConflict, LinkUnknown, StateConflict
from core.failpoints import failpoint
from core.states import PENDING_DELIVERY
from core.topics import Access, Topic
from delivery.formats import BundleFormat
from store import audit, deliveries, devices
from store.audit import Actor
from store.database import Database
from workflows import events
from workflows.bundles import Bundles
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


@dataclass(frozen=True, slots=True)
class _Found:
    """What a link leads to, with the seal of the idempotency key that came with it."""

    record: deliveries.DeliveryRecord
    link: credential_delivery.DownloadToken
    seal: credential_delivery.AnswerSeal | None


@dataclass(frozen=True, slots=True)
class _Spending:
    """A fetch: who fetches, what the link leads to, the bundle ``made`` of that, and the format that was asked for."""

    actor: Actor
    found: _Found
    made: bytes | None = field(repr=False)
    bundle_format: BundleFormat | None


@dataclass(eq=False, repr=False)
class Deliveries:
    """The bundles behind the signed links."""

    _settings: Settings
    _database: Database
    _tenants: TenantDirectory
    _reconciler: Reconciler
    _bundles: Bundles
    _pepper: bytes
    _clock: Callable[[], datetime]

    def check_download(
        self, token: str, idempotency_key: str | None = None, bundle_format: BundleFormat | None = None
    ) -> deliveries.DeliveryRecord:
        """Return what a link's token leads to, without using the link; its ``format`` is that of the bundle.

        Raises ``LinkUnknown``, ``LinkUsed``, ``LinkExpired``, ``LinkRevoked``, ``TenantSuspended``; ``StateConflict``
        for a format that the bundle cannot be had in.
        """
        record = self._find(token, idempotency_key).record
        return dataclasses.replace(record, format=_format_of(record, bundle_format))

    def _find(self, token: str, idempotency_key: str | None) -> _Found:
        now = self._clock()
        # The signature's own age limit is the longest a link can live; what counts is the time in the database.
        longest = timedelta(hours=self._tenants.longest_link_hours) + timedelta(days=1)
        link, seal = self._bundles.read_link(token, now=now, max_age=longest), None
        if idempotency_key:
            purpose = f"download/{link.delivery_id}"
            seal = credential_delivery.AnswerSeal.of(idempotency_key, pepper=self._pepper, purpose=purpose)
        key_hash = seal.key_hash if seal else None
        found = deliveries.delivery_now(self._database, link.delivery_id, now=now, key_hash=key_hash)
        self._tenants.of(found.tenant_id).check_served()
        return _Found(found, link, seal)

    def deliver(
        self,
        actor: Actor,
        token: str,
        idempotency_key: str | None = None,
        bundle_format: BundleFormat | None = None,
    ) -> DeliveredBundle:
        """Return the bundle behind a link; the link is used, and all it was made of destroyed, before this returns.

        It is in ``bundle_format``, ``None`` for the one it was registered with. Whether it reaches the client cannot be
        known. With an ``idempotency_key`` it is kept, sealed under that key, so that the same key may fetch it again
        within ``PORTAL_LINK_GRACE``; nothing else opens the link again. Raises as ``check_download`` does, and
        ``Unavailable`` while the broker does not know the device.
        """
        found = self._find(token, idempotency_key)
        record, chosen = found.record, _format_of(found.record, bundle_format)
        actor = dataclasses.replace(actor, tenant_id=record.tenant_id)  # anyone has the link, and it says whose it is
        self._reconciler.wait_until_granted(record.generation)
        with self._database.preparing():
            # Before the transaction, in which others would wait; of several fetches at once one releases what it made.
            made = self._make(found, chosen)
            spending = _Spending(actor, found, made, bundle_format)
            spent = self._database.write_together(self._spend_all, spending, sees=record.tenant_id)
        failpoint("deliver.after_commit")
        return DeliveredBundle(record.id, record.device_id, spent.content, BundleFormat(spent.format))

    def _make(self, found: _Found, bundle_format: BundleFormat) -> bytes | None:
        """Make the bundle of a link; ``None`` if it was made before, and is kept."""
        record = found.record
        if record.source is None:
            return None
        topics = None
        if record.own_topics:
            with self._database.snapshot(sees=record.tenant_id) as tx:
                own = devices.device_topics(tx, record.tenant_id, record.device_id)
            topics = [Topic(pattern, Access(access)) for pattern, access in own]
        return self._bundles.make(
            self._tenants.of(record.tenant_id),
            record.device_id,
            record.source,
            found.link,
            topics,
            bundle_format=bundle_format,
            now=self._clock(),
        )

    def _spend_all(self, tx: Connection, spending: Sequence[_Spending]) -> Sequence[deliveries.Spent]:
        """Spend what several clients fetch, with one addition to the audit record of each tenant."""
        now, acts = self._clock(), list[audit.Act]()
        spent = [self._spend(tx, one, acts, now) for one in spending]
        for tenant_id in sorted({actor.tenant_id for actor, *_ in acts}):
            audit.record_all(tx, [act for act in acts if act[0].tenant_id == tenant_id], at=now)
        failpoint("deliver.before_commit")
        return spent

    def _spend(self, tx: Connection, spending: _Spending, acts: list[audit.Act], now: datetime) -> deliveries.Spent:
        """Spend a link, and add to the ``acts`` that are to be recorded."""
        actor, found, bundle_format = spending.actor, spending.found, spending.bundle_format
        record, seal = found.record, found.seal
        kind, device, key_hash = record.kind, f"{record.kind}:{record.device_id}", seal.key_hash if seal else None
        spent = deliveries.spend_delivery(tx, record.id, now=now, bundle_format=bundle_format, key_hash=key_hash)
        if spent.kept and seal is not None:
            if bundle_format not in (None, spent.format):  # another fetch with this key was quicker
                raise StateConflict(_fixed(spent.format))
            events.record(tx, actor.tenant_id, EventType.DELIVERED, record.device_id, kind=kind, at=now, repeated=True)
            acts.append((actor, "bundle:repeat", device, {"delivery": record.id}))
            return dataclasses.replace(spent, content=seal.open(spent.content))
        content = spending.made if record.sealed else spent.content
        if content is None:  # what is sealed is never handed out
            raise LinkUnknown("This download link is not known here; check that it was copied whole.")
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
        acts += [(actor, action, device, {"delivery": record.id}) for action in ("bundle:fetch", "bundle:deliver")]
        return dataclasses.replace(spent, content=content)


def _format_of(record: deliveries.DeliveryRecord, wanted: BundleFormat | None) -> BundleFormat:
    """Return the format that a bundle is handed out in; raises ``StateConflict`` if it was made in another one."""
    has = BundleFormat(record.format)
    if wanted in (None, has):
        return has
    if record.sealed and record.status in PENDING_DELIVERY:
        return BundleFormat(wanted)
    raise StateConflict(_fixed(has))


def _fixed(has: str) -> str:
    return f"This bundle was made as {has} and cannot be had in another format; ask for {has}, or for none."


# --- Answers kept for a repeated request --------------------------------------------------------------------------

ANSWERS_KEPT = timedelta(hours=24)
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Sealed:
    """A request that came with an idempotency key."""

    actor: Actor
    seal: credential_delivery.AnswerSeal = field(repr=False)
    request_hash: str


@dataclass(frozen=True, slots=True)
class MadeSecret:
    """A secret that is shown once, with the kind and the id of what it is for."""

    kind: str
    id: str
    secret: str = field(repr=False)

    def to_json(self) -> bytes:
        """Return it as it is kept, encrypted, for a repeat of its request."""
        return json.dumps([self.kind, self.id, self.secret]).encode()

    @classmethod
    def from_json(cls, content: bytes) -> MadeSecret:
        """Read what was kept."""
        return cls(*json.loads(content))


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

    def secret_once(
        self,
        actor: Actor,
        idempotency_key: str | None,
        wanted: Sequence[object],
        new: MadeSecret,
        write: Callable[[Connection], None],
    ) -> MadeSecret:
        """Have ``write`` record what a ``new`` secret is for, and return it.

        A repeat of what is ``wanted`` with the same key writes nothing, and returns the secret of the first request.
        Raises ``IdempotencyConflict``.
        """
        sealed = self.seal(actor, idempotency_key, json.dumps([new.kind, *wanted], default=str).encode())

        def make() -> tuple[MadeSecret, int]:
            with self._database.transaction() as tx:
                write(tx)
                if sealed is not None:
                    self.keep(tx, sealed, new.to_json(), device_id=None, generation=0)
            return new, 0

        return self.once(sealed, MadeSecret.from_json, make)[0]

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
