"""The use cases of operators: their tokens, failed logins, and reading the audit record."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.engine import Connection

from core import roles
from core.errors import Forbidden, LastAdminToken, LinkUsed, NotFound, TooManyAttempts
from core.roles import Role
from core.server_command import server_command
from core.throttle import Throttle
from store import audit, devices, enrolment, tenants
from store.audit import Actor, AuditRecord, Period
from store.database import Database
from store.scope import ALL_TENANTS
from store.tenants import TokenRecord
from workflows import events
from workflows.delivery import KeptAnswers, MadeSecret
from workflows.events import EventType

ONLY_SYSTEM = "Only an operator of the role system may make or revoke a token of that role."
FIRST_TOKEN_LIFE = timedelta(hours=24)  # of those that nobody asked for
LOOKED_AT = 1000  # entries of the audit record, for a page of those that fit what no index serves


@dataclass(eq=False, repr=False)
class Operators:
    """Authenticates operators by tokens, and records and slows down those who fail to."""

    _database: Database
    _throttle: Throttle
    _clock: Callable[[], datetime]
    _answers: KeptAnswers

    def authenticate(self, secret: str) -> TokenRecord | None:
        """Return the token with this secret, if it is valid now."""
        record = tenants.token_now(self._database, secret)
        return record if record is not None and record.is_valid(self._clock()) else None

    def create(
        self, actor: Actor, name: str, role: Role, life: timedelta | None, idempotency_key: str | None = None
    ) -> tuple[str, TokenRecord]:
        """Create a token; returns its secret, which is stored nowhere, with its record.

        Requests with one ``idempotency_key`` create one. Raises ``Forbidden`` if the role is that above the tenants,
        and the actor does not have it, and ``IdempotencyConflict``.
        """
        if role is Role.SYSTEM and actor.role != Role.SYSTEM:
            raise Forbidden(ONLY_SYSTEM)
        now = self._clock()
        expires_at = None if life is None else now + life
        secret, record = new_token(actor.tenant_id, name, role, expires_at, now=now)

        def write(tx: Connection) -> None:
            tenants.add_token(tx, record, secret=secret)
            audit.record(tx, actor, "token:create", f"token:{record.id}", at=now, name=name, role=role)

        new = MadeSecret("token", record.id, secret)
        made = self._answers.secret_once(actor, idempotency_key, [name, role, life], new, write)
        return made.secret, record if made.id == record.id else self._token(actor.tenant_id, made.id)

    def _token(self, tenant_id: str, token_id: str) -> TokenRecord:
        found = [one for one in self.tokens(tenant_id) if one.id == token_id]
        if not found:
            raise NotFound("No operator token has this id.")
        return found[0]

    def enrolment_tokens_of(self, tenant_id: str, token_id: str) -> int:
        """Return how many enrolment tokens that a token has made still admit devices."""
        with self._database.snapshot() as tx:
            return len(enrolment.usable_tokens_made_by(tx, tenant_id, token_id, now=self._clock()))

    def revoke_enrolment_tokens_of(self, actor: Actor, token_id: str) -> int:
        """Revoke the enrolment tokens that a token has made and that still admit devices; return how many."""
        now = self._clock()
        with self._database.transaction() as tx:
            made = enrolment.usable_tokens_made_by(tx, actor.tenant_id, token_id, now=now)
            for one in made:
                enrolment.revoke_enrolment_token(tx, actor.tenant_id, one.id, revoked_at=now)
                of = f"enrolment_token:{one.id}"
                audit.record(tx, actor, "enrolment_token:revoke", of, at=now, because=f"token {token_id} is revoked")
        return len(made)

    def revoke(self, actor: Actor, token_id: str, *, force: bool = False) -> TokenRecord:
        """Revoke a token at once; raises ``NotFound``, and unless by ``force`` ``LastAdminToken``.

        One of the role above the tenants is revoked by another of that role alone; raises ``Forbidden``.
        """
        now = self._clock()
        with self._database.transaction() as tx:
            audit.lock_audit_head(tx, actor.tenant_id)  # else two admins could revoke each other's token at once
            valid = [one for one in tenants.list_tokens(tx, actor.tenant_id) if one.is_valid(now)]
            if actor.role != Role.SYSTEM and any(one.id == token_id and one.role == Role.SYSTEM for one in valid):
                raise Forbidden(ONLY_SYSTEM)
            if not force:
                _check_not_last(tx, valid, token_id)
            record = tenants.revoke_token(tx, actor.tenant_id, token_id, revoked_at=now)
            if record.revoked_at == now:
                audit.record(tx, actor, "token:revoke", f"token:{token_id}", at=now)
        return record

    def tokens(self, tenant_id: str) -> Sequence[TokenRecord]:
        """Return every token, newest first."""
        with self._database.snapshot() as tx:
            return tenants.list_tokens(tx, tenant_id)

    def audit(
        self, tenant_id: str, *, limit: int, before: int | None, filters: dict[str, str], period: Period = audit.ALWAYS
    ) -> tuple[Sequence[AuditRecord], int | None]:
        """Return audit entries older than ``before``, newest first, and the ``before`` of the next page, if any.

        ``filters`` are those of the store. Indexes serve that by object, and a period: with another, or both, a page
        ends after a maximum number of entries that were looked at, however few of them match.
        """
        last = None
        with self._database.snapshot() as tx:
            if filters.keys() - (set() if period.is_limited else {"object"}):
                of_object = None if period.is_limited else filters.get("object")
                last = audit.audit_entry_before(
                    tx, tenant_id, count=LOOKED_AT, before=before, of_object=of_object, period=period
                )
            found = audit.list_audit_entries(
                tx, tenant_id, limit=limit + 1, before=before, down_to=last, filters=filters, period=period
            )
        if len(found) > limit:
            return found[:limit], found[limit - 1].id
        return found, last

    def refused(self, actor: Actor, action: str, target: str, code: str) -> None:
        """Record that a client was refused."""
        with self._database.transaction(sees=actor.tenant_id) as tx:
            audit.record(tx, actor, action, target, at=self._clock(), outcome="refused", code=code)

    def login_failed(self, actor: Actor, action: str, target: str, code: str) -> None:
        """Count and record a token or link that is unknown; raises ``TooManyAttempts``.

        It is not called for valid ones, so that other clients at the same address cannot lock anyone out.
        """
        failure = self._throttle.failed(actor.address, self._clock().timestamp())
        if failure.recorded:
            self.refused(actor, action, target, code)
        if failure.wait:
            raise TooManyAttempts(
                f"Too many logins from this address have failed; try again in {failure.wait} seconds.", failure.wait
            )

    def record_late_use(self, actor: Actor, action: str, target: str, code: str) -> None:
        """Record one that was valid and has expired, without counting it as a guess; a flood of them is summarized."""
        if self._throttle.failed(actor.address, self._clock().timestamp(), counts=False).recorded:
            self.refused(actor, action, target, code)

    def record_used_link(self, actor: Actor, error: LinkUsed, *, fetched: bool) -> None:
        """Record that a client came with a link that was used, and from where; a flood of them is summarized.

        If it tried to have the bundle ``fetched``, an event tells the subscribers, one for each link and address.
        """
        now = self._clock()
        if not self._throttle.failed(actor.address, now.timestamp(), counts=False).recorded:
            return
        facts = {} if error.delivered_at is None else {"used_at": error.delivered_at}
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            tenant_id, kind = devices.owner_of(tx, error.device_id)
            if fetched:
                events.record(
                    tx,
                    tenant_id,
                    EventType.LINK_REUSED,
                    error.device_id,
                    kind=kind,
                    at=now,
                    once=f"{error.delivery_id} {actor.address}",
                    address=actor.address,
                    **facts,
                )
            of, delivery = f"{kind}:{error.device_id}", error.delivery_id
            actor = dataclasses.replace(actor, tenant_id=tenant_id)  # whose link it is
            audit.record(tx, actor, "bundle:fetch", of, at=now, outcome="refused", code=error.code, delivery=delivery)

    def record_the_rest(self, tenant_id: str) -> None:
        """Record in one entry how many refusals were counted but not recorded since the last time."""
        rest = self._throttle.take_unrecorded()
        if rest.count:
            with self._database.transaction() as tx:
                audit.record(
                    tx,
                    audit.system_actor(tenant_id),
                    "access:throttle",
                    "access",
                    at=self._clock(),
                    outcome="refused",
                    count=rest.count,
                    most=dict(rest.networks),
                )


def actor_with(token: TokenRecord, *, request_id: str, address: str) -> Actor:
    """Return the operator who has come with a token, as the audit record names it."""
    return Actor(token.tenant_id, token.actor_name, token.role, request_id, address, token.id)


def _check_not_last(tx: Connection, valid: Sequence[TokenRecord], token_id: str) -> None:
    """Raise ``LastAdminToken`` if a tenant, or all tenants together, would be left without anybody to rule them.

    Tokens of people do not count: without the identity provider there would be no further ones.
    """
    valid = [one for one in valid if one.subject is None]
    kinds: dict[str, tuple[Role, ...]] = {"admin": (Role.SYSTEM, Role.ADMIN)}
    if len(tenants.tenant_ids(tx)) > 1:  # else nobody needs the role above them
        kinds["system"] = (Role.SYSTEM,)
    for kind, allowed in kinds.items():
        if [one.id for one in valid if one.role in allowed] == [token_id]:
            raise LastAdminToken(
                f"This is the last valid {kind} token: create another one first, or revoke it with force; then only"
                f" {server_command('admin-token')} on the portal's machine makes one."
            )


def new_token(
    tenant_id: str, name: str, role: Role, expires_at: datetime | None, *, now: datetime, subject: str | None = None
) -> tuple[str, TokenRecord]:
    """Create a token of 256 random bits: the secret, shown once, and the record, which does not contain it."""
    secret = roles.TOKEN_PREFIX + secrets.token_urlsafe(32)
    record = TokenRecord(
        id=secrets.token_hex(8),
        tenant_id=tenant_id,
        name=name,
        role=role,
        created_at=now,
        expires_at=expires_at,
        revoked_at=None,
        subject=subject,
    )
    return secret, record
