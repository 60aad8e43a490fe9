"""Tenants and the tokens of their operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import NotFound
from core.roles import Role
from core.states import BrokerKind, DeviceStatus
from core.tenants import Quotas, TenantChoices, TenantStatus, overlapping
from core.topics import literal_levels
from store.audit import EMPTY_RECORD
from store.brokers import FIRST_NAME, add_broker
from store.database import Database, columns_of, hash_of
from store.enrolment_tables import EnrolmentToken
from store.prepared import Question
from store.scope import ALL_TENANTS
from store.tables import DEFAULT_TENANT, AclEntry, AuditHead, BrokerState, Device, IssuerRow, Tenant, Token


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """A tenant; ``topic_prefix`` is ``None`` for the first one, whose topics begin as the settings say."""

    id: str
    status: TenantStatus
    topic_prefix: str | None
    choices: TenantChoices
    quotas: Quotas
    generation: int
    created_at: datetime
    changed_at: datetime | None


MAX_ACTOR = 128  # characters of an actor in the audit record
MAX_SUBJECT = MAX_ACTOR - len("? ()")
_TENANT_COLUMNS = columns_of(TenantRecord, Tenant)


def add_tenant(
    tx: Connection,
    tenant_id: str,
    *,
    created_at: datetime,
    topic_prefix: str | None = None,
    choices: TenantChoices = TenantChoices(),  # noqa: B008 - it is frozen
    quotas: Quotas = Quotas(),  # noqa: B008 - it is frozen
    generation: int = 0,
) -> None:
    """Record a tenant with an empty audit record, unless it exists; the first with the first broker.

    Its topics begin with its name if no prefix is given, and those of the first one as the settings say.
    """
    if is_tenant(tx, tenant_id):
        return
    row = {
        "id": tenant_id,
        "created_at": created_at,
        "topic_prefix": topic_prefix or (None if tenant_id == DEFAULT_TENANT else tenant_id),
        "choices": _given(choices),
        "quotas": _given(quotas),
        "generation": generation,
    }
    tx.execute(sa.insert(Tenant), row)
    tx.execute(sa.insert(AuditHead), {"tenant_id": tenant_id, **dataclasses.asdict(EMPTY_RECORD)})
    if tx.execute(sa.select(BrokerState.id)).first() is None:
        state = {"id": 1, "generation": 1, "applied_generation": 0, "pending_since": created_at}
        tx.execute(sa.insert(BrokerState), state)
        add_broker(tx, FIRST_NAME, BrokerKind.NODE, at=created_at, joined=True)


def is_tenant(tx: Connection, tenant_id: str) -> bool:
    """Return whether there is a tenant of this name."""
    return tx.execute(sa.select(Tenant.id).where(Tenant.id == tenant_id)).one_or_none() is not None


def status_of(tx: Connection, tenant_id: str) -> TenantStatus | None:
    """Return the status of a tenant, ``None`` if there is none of this name."""
    status = tx.execute(sa.select(Tenant.status).where(Tenant.id == tenant_id)).scalar_one_or_none()
    return None if status is None else TenantStatus(status)


def overlapping_prefixes(tx: Connection, prefix: str) -> Sequence[tuple[str, str]]:
    """Return the tenants, but the first, below whose topic prefix ``prefix`` is, or whose is below it, with that."""
    levels = prefix.split("/")
    above = ["/".join(levels[:count]) for count in range(1, len(levels) + 1)]
    below = Tenant.topic_prefix.startswith(f"{prefix}/", autoescape=True)
    query = sa.select(Tenant.id, Tenant.topic_prefix).where(sa.or_(Tenant.topic_prefix.in_(above), below))
    return [(tenant_id, str(theirs)) for tenant_id, theirs in tx.execute(query.order_by(Tenant.id))]


def tenant_ids(tx: Connection) -> Sequence[str]:
    """Return the names of all tenants, in their order."""
    return tx.execute(sa.select(Tenant.id).order_by(Tenant.id)).scalars().all()


def are_several(tx: Connection) -> bool:
    """Return whether there is more than one tenant."""
    return len(tx.execute(sa.select(Tenant.id).limit(2)).all()) > 1


def longest_link_hours(tx: Connection) -> int:
    """Return the most hours that a tenant has chosen for its links, 0 if none has."""
    return max(
        (choices.get("link_hours") or 0 for choices in tx.execute(sa.select(Tenant.choices)).scalars()), default=0
    )


def list_tenants(tx: Connection) -> Sequence[TenantRecord]:
    """Return all tenants, in the order of their names."""
    return [_record(row) for row in tx.execute(sa.select(*_TENANT_COLUMNS).order_by(Tenant.id))]


def removed_tenants(tx: Connection) -> Sequence[TenantRecord]:
    """Return the tenants that were removed and are still kept, in the order of their names."""
    query = sa.select(*_TENANT_COLUMNS).where(Tenant.status == TenantStatus.REMOVED).order_by(Tenant.id)
    return [_record(row) for row in tx.execute(query)]


_CHANGED = (
    sa.select(*_TENANT_COLUMNS)
    .where(Tenant.generation > sa.bindparam("since"), Tenant.generation > 0)
    .order_by(Tenant.id)
)


def changed_tenants(tx: Connection, *, since: int) -> Sequence[TenantRecord]:
    """Return the tenants of which the broker must learn since a generation, in the order of their names."""
    return [_record(row) for row in tx.execute(_CHANGED, {"since": since})]


def tenants_to_tell(tx: Connection) -> Sequence[TenantRecord]:
    """Return the tenants that a broker is told which knows nothing, in the order of their names.

    They are all but those that were removed, and whose devices and CAs are deleted.
    """
    left = [sa.exists().where(of.tenant_id == Tenant.id) for of in (Device, IssuerRow)]
    query = sa.select(*_TENANT_COLUMNS).where(sa.or_(Tenant.status != TenantStatus.REMOVED, *left))
    return [_record(row) for row in tx.execute(query.order_by(Tenant.id))]


_GET = sa.select(*_TENANT_COLUMNS).where(Tenant.id == sa.bindparam("wanted"))  # built once: requests run it
_GET_LOCKED = _GET.with_for_update()


def get_tenant(tx: Connection, tenant_id: str, *, for_update: bool = False) -> TenantRecord:
    """Return a tenant, locked until the transaction ends if it is to be changed; raises ``NotFound``."""
    row = tx.execute(_GET_LOCKED if for_update else _GET, {"wanted": tenant_id}).one_or_none()
    if row is None:
        raise NotFound("There is no tenant of this name; list them with GET /tenants.")
    return _record(row)


def topics_reaching(tx: Connection, tenant_id: str, prefix: str) -> Sequence[str]:
    """Return the topic filters of a tenant's devices and applications that may match a topic below ``prefix``.

    Those of revoked ones are left out.
    """
    first = prefix.partition("/")[0]
    query = (
        sa.select(AclEntry.filter)
        .distinct()
        .join(Device, Device.id == AclEntry.device_id)
        .where(AclEntry.tenant_id == tenant_id, Device.status != DeviceStatus.REVOKED)
        .where(sa.or_(AclEntry.filter == first, AclEntry.filter.startswith(f"{first}/", autoescape=True)))
    )
    found = tx.execute(query.order_by(AclEntry.filter)).scalars()
    return [one for one in found if overlapping(prefix, [literal_levels(one)])]


def update_tenant(tx: Connection, record: TenantRecord) -> None:
    """Write all of a tenant that may change; its topic prefix never does."""
    values = {
        "status": record.status,
        "choices": _given(record.choices),
        "quotas": _given(record.quotas),
        "generation": record.generation,
        "changed_at": record.changed_at,
    }
    tx.execute(sa.update(Tenant).where(Tenant.id == record.id), values)


def _record(row: sa.Row[Any]) -> TenantRecord:
    tenant_id, status, topic_prefix, choices, quotas, *rest = tuple[Any, ...](row)
    return TenantRecord(
        tenant_id, TenantStatus(status), topic_prefix, TenantChoices(**choices), Quotas(**quotas), *rest
    )


def _given(values: TenantChoices | Quotas) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(values).items() if value is not None}


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """An operator token, without its secret; ``expires_at`` is ``None`` for one that lasts until revoked.

    ``subject`` is ``iss#sub`` of the person who has it from a login by the identity provider, ``name`` the person's.
    """

    id: str
    tenant_id: str
    name: str
    role: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    subject: str | None = None

    @property
    def actor_name(self) -> str:
        """What the audit record shows: the name, and in parentheses the token's id, or the person's subject."""
        return actor_name(self.name, self.subject or self.id)

    def is_valid(self, now: datetime) -> bool:
        """Return whether the token may be used at ``now``."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


def actor_name(name: str, identity: str) -> str:
    """Return how the audit record names somebody: by a name, of which it may have the beginning, and an identity."""
    return f"{name[: MAX_ACTOR - len(identity) - len(' ()')].rstrip()} ({identity})"


_ROLE = sa.case((Token.is_system, Role.SYSTEM.value), else_=Token.role).label("role")
TOKEN_COLUMNS = [
    _ROLE if field.name == "role" else getattr(Token, field.name) for field in dataclasses.fields(TokenRecord)
]
_FIND_TOKEN = Question(sa.select(*TOKEN_COLUMNS).where(Token.token_hash == sa.bindparam("wanted_hash")))


def add_token(tx: Connection, record: TokenRecord, *, secret: str, login_hash: str | None = None) -> None:
    """Record a token with the hash of its secret, and that of the login by the identity provider it comes from."""
    is_system = record.role == Role.SYSTEM
    role = Role.ADMIN if is_system else record.role
    hashes = {"token_hash": hash_of(secret), "login_hash": login_hash}
    tx.execute(sa.insert(Token), dataclasses.asdict(record) | {"role": role, "is_system": is_system} | hashes)


def was_used(tx: Connection, login_hash: str) -> bool:
    """Return whether a login by the identity provider has led to a token before."""
    return tx.execute(sa.select(Token.id).where(Token.login_hash == login_hash)).first() is not None


def find_token(tx: Connection, secret: str) -> TokenRecord | None:
    """Return a token by its secret; it may be expired or revoked."""
    row = _FIND_TOKEN.within(tx, {"wanted_hash": hash_of(secret)})
    return None if row is None else TokenRecord(*row)


def token_now(database: Database, secret: str) -> TokenRecord | None:
    """Return a token as ``find_token`` does, by a read of its own, as each request does it."""
    row = database.answer(_FIND_TOKEN, {"wanted_hash": hash_of(secret)}, sees=ALL_TENANTS)
    return None if row is None else TokenRecord(*row)


def list_tokens(tx: Connection, tenant_id: str | None = None) -> Sequence[TokenRecord]:
    """Return every token of a tenant, or of all, newest first."""
    query = sa.select(*TOKEN_COLUMNS).order_by(Token.created_at.desc(), Token.id)
    if tenant_id is not None:
        query = query.where(Token.tenant_id == tenant_id)
    return [TokenRecord(*row) for row in tx.execute(query)]


def revoke_token(tx: Connection, tenant_id: str, token_id: str, *, revoked_at: datetime) -> TokenRecord:
    """Revoke a token and return it; an already revoked one keeps its time. Raises ``NotFound``."""
    own = (Token.tenant_id == tenant_id, Token.id == token_id)
    tx.execute(sa.update(Token).where(*own, Token.revoked_at.is_(None)).values(revoked_at=revoked_at))
    row = tx.execute(sa.select(*TOKEN_COLUMNS).where(*own)).one_or_none()
    if row is None:
        raise NotFound("There is no token with this id; list them with GET /tokens.")
    return TokenRecord(*row)


def prune_logins(tx: Connection, *, before: datetime) -> int:
    """Delete the tokens of people that expired before then; those stay that have made enrolment tokens."""
    made = sa.select(EnrolmentToken.id).where(EnrolmentToken.operator_token_id == Token.id).exists()
    ended = sa.delete(Token).where(Token.subject.is_not(None), Token.expires_at < before, ~made)
    return tx.execute(ended).rowcount
