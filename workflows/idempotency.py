"""Idempotency keys: answers are kept for 24 hours, encrypted, so that a request can be repeated."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeVar

from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

import credential_delivery
from core.errors import IdempotencyConflict
from store import deliveries
from store.database import Database
from store.deliveries import SealedAnswer

ANSWERS_KEPT = timedelta(hours=24)
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Sealed:
    """A request that came with an idempotency key."""

    tenant_id: str
    seal: credential_delivery.AnswerSeal = field(repr=False)
    request_hash: str


class KeptAnswers:
    """Keeps answers encrypted under their idempotency keys, of which only hashes are stored."""

    def __init__(self, database: Database, pepper: bytes, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._pepper = pepper
        self._clock = clock

    def seal(self, tenant_id: str, idempotency_key: str | None, request: bytes) -> Sealed | None:
        """Return what ``once`` and ``keep`` need, ``None`` without a key; equal requests must be the same bytes."""
        if not idempotency_key:
            return None
        seal = credential_delivery.AnswerSeal.of(idempotency_key, pepper=self._pepper)
        return Sealed(tenant_id, seal, seal.request_hash(request))

    def once(
        self, sealed: Sealed | None, read: Callable[[bytes], Answer], make: Callable[[], tuple[Answer, int]]
    ) -> tuple[Answer, int]:
        """Return the answer kept for the same request, with the generation it was made at, else ``make`` one.

        ``make`` must call ``keep`` in its transaction. Raises ``IdempotencyConflict`` for a key that came with another
        request in the last 24 hours.
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
        return read(sealed.seal.open(kept.sealed)), kept.generation

    def _find(self, sealed: Sealed) -> SealedAnswer | None:
        with self._database.snapshot() as tx:
            kept = deliveries.find_answer(tx, sealed.tenant_id, sealed.seal.key_hash, now=self._clock())
        if kept is None:
            return None
        if not hmac.compare_digest(kept.request_hash, sealed.request_hash):
            raise IdempotencyConflict(
                "This Idempotency-Key was used with another body in the last 24 hours; use a new key."
            )
        return kept

    def keep(self, tx: Connection, sealed: Sealed, content: bytes, *, generation: int) -> None:
        """Keep an answer in the transaction that it is about; the database refuses a second one under the same key."""
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
