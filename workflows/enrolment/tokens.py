"""The use cases of enrolment tokens: create, list, revoke, find."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

import db
from core.errors import StateConflict
from core.roles import hash_token
from core.states import DeviceStatus
from store import enrolment
from store.database import Database
from store.enrolment import EnrolmentProfile, EnrolmentTokenRecord
from workflows import audit
from workflows.audit import Actor

TOKEN_PREFIX = "en_"  # noqa: S105 - lets secret scanners find a token that leaked; no secret itself
MAX_LISTED = 1000


class EnrolmentTokens:
    """Secrets with which devices enrol; the database holds their hashes only."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock

    def create(
        self, actor: Actor, name: str, profile: EnrolmentProfile, *, device_id: str | None, count: int, life: timedelta
    ) -> tuple[str, EnrolmentTokenRecord]:
        """Create a token for one pending device, or for ``count`` new ones; returns its secret with its record.

        Raises ``DeviceNotFound``, ``StateConflict`` for a device that is not pending.
        """
        now = self._clock()
        secret = TOKEN_PREFIX + secrets.token_urlsafe(32)
        record = EnrolmentTokenRecord(
            id=secrets.token_hex(8),
            tenant_id=actor.tenant_id,
            name=name,
            device_id=device_id,
            uses_allowed=count,
            uses=0,
            created_at=now,
            expires_at=now + life,
            revoked_at=None,
            profile=profile,
        )
        with self._database.transaction() as tx:
            if device_id is not None:
                device = db.get_device(tx, actor.tenant_id, device_id, for_update=True)
                if device.status is not DeviceStatus.PENDING:
                    raise StateConflict(f"The device is {device.status}; only a pending one can enrol with a token.")
            enrolment.add_enrolment_token(tx, record, secret_hash=hash_token(secret))
            detail = {"device_id": device_id} if device_id else {"count": count}
            audit.record(
                tx, actor, "enrolment_token:create", f"enrolment_token:{record.id}", at=now, name=name, **detail
            )
        return secret, record

    def revoke(self, actor: Actor, token_id: str) -> EnrolmentTokenRecord:
        """Revoke a token at once; devices that have enrolled with it keep working. Raises ``NotFound``."""
        now = self._clock()
        with self._database.transaction() as tx:
            record = enrolment.revoke_enrolment_token(tx, actor.tenant_id, token_id, revoked_at=now)
            if record.revoked_at == now:
                audit.record(tx, actor, "enrolment_token:revoke", f"enrolment_token:{token_id}", at=now)
        return record

    def tokens(self, tenant_id: str) -> Sequence[EnrolmentTokenRecord]:
        """Return the newest thousand tokens, newest first."""
        with self._database.snapshot() as tx:
            return enrolment.list_enrolment_tokens(tx, tenant_id, limit=MAX_LISTED)

    def find(self, secret: str) -> EnrolmentTokenRecord | None:
        """Return the token with this secret, in any state: whether it admits devices is checked where it is used."""
        with self._database.snapshot() as tx:
            return enrolment.find_enrolment_token(tx, hash_token(secret))
