"""The use cases around operators: make a token, revoke it, find whose it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

import access
import audit
import db_access
from access import Role
from audit import Actor
from db import Database
from db_access import AuditRecord, TokenRecord


class Operators:
    """Who may ask the portal for something."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock

    def authenticate(self, secret: str) -> TokenRecord | None:
        """The token with this secret, if it is valid now."""
        with self._database.snapshot() as tx:
            record = db_access.find_token(tx, access.hash_token(secret))
        return record if record is not None and access.is_valid(record, self._clock()) else None

    def create(self, actor: Actor, name: str, role: Role, life: timedelta | None) -> tuple[str, TokenRecord]:
        """Make a token; returns its secret, which is stored nowhere, with its record."""
        now = self._clock()
        expires_at = None if life is None else now + life
        secret, record = access.new_token(actor.tenant_id, name, role, expires_at, now=now)
        with self._database.transaction() as tx:
            db_access.add_token(tx, record, token_hash=access.hash_token(secret))
            audit.record(tx, actor, "token:create", f"token:{record.id}", at=now, name=name, role=role)
        return secret, record

    def revoke(self, actor: Actor, token_id: str) -> TokenRecord:
        """Revoke a token, at once; raises ``NotFound``."""
        now = self._clock()
        with self._database.transaction() as tx:
            record = db_access.revoke_token(tx, actor.tenant_id, token_id, revoked_at=now)
            if record.revoked_at == now:
                audit.record(tx, actor, "token:revoke", f"token:{token_id}", at=now)
        return record

    def tokens(self, tenant_id: str) -> Sequence[TokenRecord]:
        """Every token, newest first."""
        with self._database.snapshot() as tx:
            return db_access.list_tokens(tx, tenant_id)

    def audit(
        self, tenant_id: str, *, limit: int, before: int | None, filters: dict[str, str]
    ) -> Sequence[AuditRecord]:
        """The audit record, newest first, older than entry ``before``; ``filters`` match exactly."""
        with self._database.snapshot() as tx:
            return db_access.list_audit_entries(tx, tenant_id, limit=limit, before=before, filters=filters)

    def refused(self, actor: Actor, action: str, target: str, code: str) -> None:
        """Record that somebody was refused."""
        with self._database.transaction() as tx:
            audit.record(tx, actor, action, target, at=self._clock(), outcome="refused", code=code)
