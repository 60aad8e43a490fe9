"""The use cases of sessions of the web console: log in, be recognized at each request, list, end."""

from __future__ import annotations

import contextlib
import hmac
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from core.errors import PortalError, Unauthenticated
from core.roles import MAY, Permission
from store import audit, sessions
from store.audit import Actor
from store.database import Database
from store.scope import ALL_TENANTS
from store.sessions import SessionRecord
from store.tenants import TokenRecord
from workflows.operators import Operators, actor_with

SESSION_LIFE = timedelta(hours=8)
SEEN_EVERY = timedelta(minutes=1)  # a session that is used is recorded as seen so often at most
MAX_USER_AGENT = 200  # characters


@dataclass(frozen=True, slots=True)
class LiveSession:
    """A session with the operator token that it stands for, as both are now."""

    record: SessionRecord
    token: TokenRecord


@dataclass(eq=False, repr=False)
class Sessions:
    """Gives browsers sessions of 8 hours, and finds them by the secrets of their cookies.

    A session stands for an operator token, whose row is read at each request: a token that is revoked, has expired or
    has another role counts as that at once.
    """

    _database: Database
    _operators: Operators
    _clock: Callable[[], datetime]

    def log_in(self, visitor: Actor, token_secret: str, user_agent: str) -> tuple[str, LiveSession]:
        """Begin a session by the secret of an operator token; returns the secret for the cookie with the session.

        Raises ``Unauthenticated`` and, after too many wrong tokens of the visitor's address, ``TooManyAttempts``: both
        are recorded as those of any request are.
        """
        token = self._operators.authenticate(token_secret)
        if token is None:
            self._operators.login_failed(visitor, "session:begin", "access", "unauthenticated")
            raise Unauthenticated("This token is not valid here: check that it was copied whole, or ask an admin.")
        return self.begin(actor_with(token, request_id=visitor.request_id, address=visitor.address), token, user_agent)

    def begin(self, actor: Actor, token: TokenRecord, user_agent: str) -> tuple[str, LiveSession]:
        """Begin a session for a token that the actor has just proven to hold; returns its secret, and the session."""
        now = self._clock()
        secret = secrets.token_urlsafe(32)
        ends = now + SESSION_LIFE
        record = SessionRecord(
            id=secrets.token_hex(8),
            tenant_id=token.tenant_id,
            token_id=token.id,
            created_at=now,
            last_seen_at=now,
            expires_at=ends if token.expires_at is None else min(ends, token.expires_at),
            address=actor.address[:64],
            user_agent=_printable(user_agent)[:MAX_USER_AGENT],
        )
        with self._database.transaction(sees=token.tenant_id) as tx:
            sessions.add_session(tx, record, secret=secret)
            audit.record(tx, actor, "session:begin", f"session:{record.id}", at=now)
        return secret, LiveSession(record, token)

    def find(self, secret: str) -> LiveSession | None:
        """Return the session with this secret, if it and its token are valid now, and record that it was seen."""
        now = self._clock()
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            found = sessions.find_session(tx, secret)
        if found is None or found[0].expires_at <= now or not found[1].is_valid(now):
            return None
        record = found[0]
        if now - record.last_seen_at >= SEEN_EVERY:
            with contextlib.suppress(PortalError):  # a database that only reads still shows pages
                self._database.write(
                    lambda tx: sessions.mark_seen(tx, record.tenant_id, record.id, at=now), sees=record.tenant_id
                )
        return LiveSession(*found)

    def sessions(self, actor: Actor) -> Sequence[LiveSession]:
        """Return the sessions that the actor may end, newest first: its token's, or with that permission all."""
        with self._database.snapshot() as tx:
            found = sessions.list_sessions(tx, actor.tenant_id, _only_of(actor), now=self._clock())
        return [LiveSession(*one) for one in found]

    def end(self, actor: Actor, session_id: str) -> None:
        """End a session at once; raises ``NotFound``, for one that the actor may not end, too."""
        with self._database.transaction() as tx:
            token_id = sessions.end_session(tx, actor.tenant_id, session_id, _only_of(actor))
            audit.record(tx, actor, "session:end", f"session:{session_id}", at=self._clock(), token=token_id)

    def end_all(self, actor: Actor) -> int:
        """End all sessions of the actor's own token, the present one too; return how many there were."""
        token_id = str(actor.token_id)
        with self._database.transaction() as tx:
            ended = sessions.end_sessions_of(tx, actor.tenant_id, token_id)
            audit.record(tx, actor, "session:end_all", f"token:{token_id}", at=self._clock(), count=ended)
        return ended

    def sweep(self) -> None:
        """Delete the sessions of all tenants that have expired."""
        now = self._clock()
        with self._database.snapshot() as tx:
            if not sessions.any_expired(tx, now=now):
                return
        self._database.write(lambda tx: sessions.forget_expired(tx, now=now))


def form_token(secret: str) -> str:
    """Return what each form of a session must send back (64 hex digits), so that no other site can make it up.

    It follows from the secret of the session's cookie and is stored nowhere.
    """
    return hmac.digest(secret.encode(), b"portal console form", "sha256").hex()


def _only_of(actor: Actor) -> str | None:
    """Return the token whose sessions the actor may see and end; ``None``: those of all tokens of the tenant."""
    return None if Permission.TOKENS in MAY.get(actor.role, ()) else str(actor.token_id)


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable())
