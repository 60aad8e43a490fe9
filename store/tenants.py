"""Tenants and the tokens of their operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import NotFound
from store.audit import EMPTY_RECORD
from store.database import columns_of, hash_of
from store.tables import AuditHead, BrokerState, Tenant, Token


def add_tenant(tx: Connection, tenant_id: str, *, created_at: datetime) -> None:
    """Record a tenant with an empty audit record, unless it exists; the first with the state of the broker of all."""
    if not is_tenant(tx, tenant_id):
        tx.execute(sa.insert(Tenant), {"id": tenant_id, "created_at": created_at})
        tx.execute(sa.insert(AuditHead), {"tenant_id": tenant_id, **dataclasses.asdict(EMPTY_RECORD)})
        if tx.execute(sa.select(BrokerState.tenant_id)).first() is None:
            state = {"tenant_id": tenant_id, "generation": 1, "applied_generation": 0, "pending_since": created_at}
            tx.execute(sa.insert(BrokerState), state)


def is_tenant(tx: Connection, tenant_id: str) -> bool:
    """Return whether there is a tenant of this name."""
    return tx.execute(sa.select(Tenant.id).where(Tenant.id == tenant_id)).one_or_none() is not None


def tenant_ids(tx: Connection) -> Sequence[str]:
    """Return the names of all tenants, in their order."""
    return tx.execute(sa.select(Tenant.id).order_by(Tenant.id)).scalars().all()


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """An operator token, without its secret; ``expires_at`` is ``None`` for one that lasts until revoked."""

    id: str
    tenant_id: str
    name: str
    role: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    def is_valid(self, now: datetime) -> bool:
        """Return whether the token may be used at ``now``."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


_TOKEN_COLUMNS = columns_of(TokenRecord, Token)
_FIND_TOKEN = sa.select(*_TOKEN_COLUMNS).where(Token.token_hash == sa.bindparam("wanted_hash"))


def add_token(tx: Connection, record: TokenRecord, *, secret: str) -> None:
    """Record a token with the hash of its secret."""
    tx.execute(sa.insert(Token), dataclasses.asdict(record) | {"token_hash": hash_of(secret)})


def find_token(tx: Connection, secret: str) -> TokenRecord | None:
    """Return a token by its secret; it may be expired or revoked."""
    row = tx.execute(_FIND_TOKEN, {"wanted_hash": hash_of(secret)}).one_or_none()
    return None if row is None else TokenRecord(*row)


def list_tokens(tx: Connection, tenant_id: str) -> Sequence[TokenRecord]:
    """Return every token, newest first."""
    rows = tx.execute(
        sa.select(*_TOKEN_COLUMNS).where(Token.tenant_id == tenant_id).order_by(Token.created_at.desc(), Token.id)
    )
    return [TokenRecord(*row) for row in rows]


def revoke_token(tx: Connection, tenant_id: str, token_id: str, *, revoked_at: datetime) -> TokenRecord:
    """Revoke a token and return it; an already revoked one keeps its time. Raises ``NotFound``."""
    own = (Token.tenant_id == tenant_id, Token.id == token_id)
    tx.execute(sa.update(Token).where(*own, Token.revoked_at.is_(None)).values(revoked_at=revoked_at))
    row = tx.execute(sa.select(*_TOKEN_COLUMNS).where(*own)).one_or_none()
    if row is None:
        raise NotFound("There is no token with this id; list them with GET /tokens.")
    return TokenRecord(*row)
