"""The database's record of who may ask, with what they did."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import NotFound
from store.statements import Prepared
from store.tables import AuditEntry, AuditHead, Token


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
        """Whether the token may be used at ``now``."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One entry of the audit record."""

    id: int
    at: datetime
    actor: str
    action: str
    object: str
    outcome: str
    request_id: str
    address: str
    detail: dict[str, Any]


_TOKEN_COLUMNS = (
    Token.id,
    Token.tenant_id,
    Token.name,
    Token.role,
    Token.created_at,
    Token.expires_at,
    Token.revoked_at,
)
_FIND_TOKEN = sa.select(*_TOKEN_COLUMNS).where(Token.token_hash == sa.bindparam("wanted_hash"))
_INSERT_AUDIT_ENTRY = Prepared(sa.insert(AuditEntry))
_INSERT_AUDIT_ENTRIES = sa.insert(AuditEntry)
_LOCK_AUDIT_HEAD = Prepared(
    sa.select(AuditHead.number, AuditHead.hash)
    .where(AuditHead.tenant_id == sa.bindparam("of_tenant"))
    .with_for_update()
)
_MOVE_AUDIT_HEAD = Prepared(
    sa.update(AuditHead)
    .where(AuditHead.tenant_id == sa.bindparam("of_tenant"))
    .values(number=sa.bindparam("new_number"), hash=sa.bindparam("new_hash"))
)


def add_token(tx: Connection, record: TokenRecord, *, token_hash: str) -> None:
    """Record a token by the SHA-256 of its secret, in lower-case hex."""
    tx.execute(
        sa.insert(Token),
        {
            "id": record.id,
            "tenant_id": record.tenant_id,
            "name": record.name,
            "role": record.role,
            "token_hash": token_hash,
            "created_at": record.created_at,
            "expires_at": record.expires_at,
        },
    )


def find_token(tx: Connection, token_hash: str) -> TokenRecord | None:
    """Look a token up by the SHA-256 of its secret; it may be expired or revoked."""
    row = tx.execute(_FIND_TOKEN, {"wanted_hash": token_hash}).one_or_none()
    return None if row is None else TokenRecord(*row)


def list_tokens(tx: Connection, tenant_id: str) -> Sequence[TokenRecord]:
    """Every token, newest first."""
    rows = tx.execute(
        sa.select(*_TOKEN_COLUMNS).where(Token.tenant_id == tenant_id).order_by(Token.created_at.desc(), Token.id)
    )
    return [TokenRecord(*row) for row in rows]


def revoke_token(tx: Connection, tenant_id: str, token_id: str, *, revoked_at: datetime) -> TokenRecord:
    """Revoke a token; one that is revoked already keeps its time. Raises ``NotFound``."""
    own = (Token.tenant_id == tenant_id, Token.id == token_id)
    tx.execute(sa.update(Token).where(*own, Token.revoked_at.is_(None)).values(revoked_at=revoked_at))
    row = tx.execute(sa.select(*_TOKEN_COLUMNS).where(*own)).one_or_none()
    if row is None:
        raise NotFound("There is no token with this id; list them with GET /tokens.")
    return TokenRecord(*row)


def audit_head(tx: Connection, tenant_id: str) -> tuple[int, str]:
    """Number and hash of the last audit entry, as one state of the database has them."""
    row = tx.execute(sa.select(AuditHead.number, AuditHead.hash).where(AuditHead.tenant_id == tenant_id)).one()
    return row.number, row.hash


def lock_audit_head(tx: Connection, tenant_id: str) -> tuple[int, str]:
    """Number and hash of the last audit entry, which stays the last until the transaction ends."""
    number, last_hash = _LOCK_AUDIT_HEAD.run(tx, {"of_tenant": tenant_id})
    return number, last_hash


def add_audit_entries(tx: Connection, tenant_id: str, entries: Sequence[dict[str, Any]]) -> None:
    """Append to the audit record, in this order; each holds the columns of ``AuditEntry`` but for id and tenant."""
    rows = [{"tenant_id": tenant_id, **entry} for entry in entries]
    if len(rows) == 1:
        _INSERT_AUDIT_ENTRY.run(tx, rows[0])
    else:
        tx.execute(_INSERT_AUDIT_ENTRIES, rows)
    last = entries[-1]
    _MOVE_AUDIT_HEAD.run(tx, {"of_tenant": tenant_id, "new_number": last["number"], "new_hash": last["hash"]})


def audit_chain(tx: Connection, tenant_id: str) -> Generator[dict[str, Any], None, None]:
    """Every entry of the audit record as it stands, by number, all columns but the id."""
    columns = [column for column in AuditEntry.__table__.c if column.name != "id"]
    query = sa.select(*columns).where(AuditEntry.tenant_id == tenant_id).order_by(AuditEntry.number)
    with tx.execute(query.execution_options(yield_per=1000)) as rows:  # a cursor of the server's, to be closed
        for row in rows.mappings():
            yield dict(row)


def list_audit_entries(
    tx: Connection,
    tenant_id: str,
    *,
    limit: int,
    before: int | None = None,
    after: int | None = None,
    filters: dict[str, str] | None = None,
) -> Sequence[AuditRecord]:
    """Entries newest first, older than entry ``before``, newer than ``after``; ``filters`` match columns exactly."""
    query = sa.select(
        AuditEntry.id,
        AuditEntry.at,
        AuditEntry.actor,
        AuditEntry.action,
        AuditEntry.object,
        AuditEntry.outcome,
        AuditEntry.request_id,
        AuditEntry.address,
        AuditEntry.detail,
    ).where(*_entries_between(tenant_id, before, after))
    for column, value in (filters or {}).items():
        query = query.where(AuditEntry.__table__.c[column] == value)
    return [AuditRecord(*row) for row in tx.execute(query.order_by(AuditEntry.id.desc()).limit(limit))]


def audit_entry_before(
    tx: Connection, tenant_id: str, *, count: int, before: int | None, of_object: str | None
) -> int | None:
    """The entry ``count`` + 1 places before another, or before the end; ``None`` where there are not so many.

    With ``of_object`` only those of that object count.
    """
    query = sa.select(AuditEntry.id).where(*_entries_between(tenant_id, before, None))
    if of_object is not None:
        query = query.where(AuditEntry.object == of_object)
    return tx.execute(query.order_by(AuditEntry.id.desc()).limit(1).offset(count)).scalar_one_or_none()


def _entries_between(tenant_id: str, before: int | None, after: int | None) -> list[sa.ColumnElement[bool]]:
    conditions = [AuditEntry.tenant_id == tenant_id]
    conditions += [] if before is None else [AuditEntry.id < before]
    return conditions + ([] if after is None else [AuditEntry.id > after])
