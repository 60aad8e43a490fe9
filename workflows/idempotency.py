"""Answers kept for 24 hours, so that a request may be repeated."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy.engine import Connection

import credential_delivery as delivery
from core.errors import IdempotencyConflict
from store import deliveries
from store.database import Database

ANSWERS_KEPT = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Sealed:
    """A request that came with an idempotency key."""

    tenant_id: str
    seal: delivery.AnswerSeal = field(repr=False)
    request_hash: str


@dataclass(frozen=True, slots=True)
class Kept:
    """The answer to an earlier request with the same key and body, with the generation that it was made at."""

    content: bytes = field(repr=False)
    generation: int


class KeptAnswers:
    """Keeps answers sealed under their idempotency keys, of which only hashes are stored."""

    def __init__(self, database: Database, pepper: bytes, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._pepper = pepper
        self._clock = clock

    def seal(self, tenant_id: str, idempotency_key: str | None, request: bytes) -> Sealed | None:
        """Prepare for a ``request``, in a form in which equal ones are the same bytes; ``None`` without a key."""
        if not idempotency_key:
            return None
        seal = delivery.AnswerSeal.of(idempotency_key, pepper=self._pepper)
        return Sealed(tenant_id, seal, seal.request_hash(request))

    def find(self, sealed: Sealed) -> Kept | None:
        """The answer given in the last 24 hours; raises ``IdempotencyConflict`` where it was to another request."""
        with self._database.snapshot() as tx:
            kept = deliveries.find_answer(tx, sealed.tenant_id, sealed.seal.key_hash, now=self._clock())
        if kept is None:
            return None
        if not hmac.compare_digest(kept.request_hash, sealed.request_hash):
            raise IdempotencyConflict(
                "This Idempotency-Key was used with another body in the last 24 hours; use a new key."
            )
        return Kept(sealed.seal.open(kept.sealed), kept.generation)

    def keep(self, tx: Connection, sealed: Sealed, content: bytes, *, generation: int) -> None:
        """Keep an answer in the transaction that it speaks of; the database refuses a second one under the key."""
        now = self._clock()
        deliveries.add_answer(
            tx,
            tenant_id=sealed.tenant_id,
            key_hash=sealed.seal.key_hash,
            request_hash=sealed.request_hash,
            sealed=sealed.seal.seal(content),
            generation=generation,
            created_at=now,
            expires_at=now + ANSWERS_KEPT,
        )
