"""Sessions of the web console: found by the secret of a browser's cookie, listed, ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import NotFound
from store.database import columns_of, hash_of
from store.session_tables import ConsoleSession
from store.tables import Token
from store.tenants import TOKEN_COLUMNS, TokenRecord

MAX_SESSIONS = 50  # of one token; the oldest make room


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A browser that is logged in, without the secret of its cookie."""

    id: str
    tenant_id: str
    token_id: str
    created_at: datetime
    last_seen_at: datetime
    expires_at: datetime
    address: str
    user_agent: str


_COLUMNS = columns_of(SessionRecord, ConsoleSession)
_WITH_TOKEN = sa.select(*_COLUMNS, *TOKEN_COLUMNS).join(
    Token, sa.and_(Token.tenant_id == ConsoleSession.tenant_id, Token.id == ConsoleSession.token_id)
)
_FIND = _WITH_TOKEN.where(ConsoleSession.secret_hash == sa.bindparam("wanted_hash"))


def add_session(tx: Connection, record: SessionRecord, *, secret: str) -> None:
    """Record a session with the hash of its secret; of ``MAX_SESSIONS`` that its token has, the oldest are deleted."""
    own = (ConsoleSession.tenant_id == record.tenant_id, ConsoleSession.token_id == record.token_id)
    newest = sa.select(ConsoleSession.id).where(*own).order_by(ConsoleSession.created_at.desc(), ConsoleSession.id)
    kept = newest.limit(MAX_SESSIONS - 1).subquery()
    tx.execute(sa.delete(ConsoleSession).where(*own, ConsoleSession.id.not_in(sa.select(kept.c.id))))
    tx.execute(sa.insert(ConsoleSession), dataclasses.asdict(record) | {"secret_hash": hash_of(secret)})


def find_session(tx: Connection, secret: str) -> tuple[SessionRecord, TokenRecord] | None:
    """Return a session by its secret, with its token as it is now; either may have expired.

    The tenant is not known before: the transaction must see the rows of all.
    """
    row = tx.execute(_FIND, {"wanted_hash": hash_of(secret)}).one_or_none()
    return None if row is None else _split(row)


def list_sessions(
    tx: Connection, tenant_id: str, token_id: str | None, *, now: datetime
) -> Sequence[tuple[SessionRecord, TokenRecord]]:
    """Return the sessions of a token, or of all of a tenant, that last at ``now``; the newest first."""
    query = _WITH_TOKEN.where(
        ConsoleSession.tenant_id == tenant_id,
        ConsoleSession.expires_at > now,
        Token.revoked_at.is_(None),
        sa.or_(Token.expires_at.is_(None), Token.expires_at > now),
    )
    if token_id is not None:
        query = query.where(ConsoleSession.token_id == token_id)
    return [_split(row) for row in tx.execute(query.order_by(ConsoleSession.created_at.desc(), ConsoleSession.id))]


def _split(row: sa.Row[tuple[object, ...]]) -> tuple[SessionRecord, TokenRecord]:
    values = tuple(row)
    return SessionRecord(*values[: len(_COLUMNS)]), TokenRecord(*values[len(_COLUMNS) :])  # type: ignore[arg-type]


def mark_seen(tx: Connection, tenant_id: str, session_id: str, *, at: datetime) -> None:
    """Record that a session was used."""
    own = (ConsoleSession.tenant_id == tenant_id, ConsoleSession.id == session_id)
    tx.execute(sa.update(ConsoleSession).where(*own).values(last_seen_at=at))


def end_session(tx: Connection, tenant_id: str, session_id: str, token_id: str | None = None) -> str:
    """Delete a session, if a ``token_id`` is given only one of that token; return its token, or raise ``NotFound``."""
    own = [ConsoleSession.tenant_id == tenant_id, ConsoleSession.id == session_id]
    if token_id is not None:
        own.append(ConsoleSession.token_id == token_id)
    ended = tx.execute(sa.delete(ConsoleSession).where(*own).returning(ConsoleSession.token_id)).scalar_one_or_none()
    if ended is None:
        raise NotFound("There is no session with this id; it may have ended.")
    return ended


def end_sessions_of(tx: Connection, tenant_id: str, token_id: str) -> int:
    """Delete all sessions of a token; return how many there were."""
    own = (ConsoleSession.tenant_id == tenant_id, ConsoleSession.token_id == token_id)
    return tx.execute(sa.delete(ConsoleSession).where(*own)).rowcount


def end_sessions_of_tenant(tx: Connection, tenant_id: str) -> None:
    """Delete all sessions of a tenant, as after a restore: what a backup has of them must let nobody in again."""
    tx.execute(sa.delete(ConsoleSession).where(ConsoleSession.tenant_id == tenant_id))


def any_expired(tx: Connection, *, now: datetime) -> bool:
    """Return whether ``forget_expired`` has something to do."""
    expired = sa.select(ConsoleSession.id).where(ConsoleSession.expires_at <= now)
    return tx.execute(expired.limit(1)).one_or_none() is not None


def forget_expired(tx: Connection, *, now: datetime) -> None:
    """Delete the sessions of all tenants that have expired."""
    tx.execute(sa.delete(ConsoleSession).where(ConsoleSession.expires_at <= now))
