"""The use cases of whoever runs an installation for several tenants: add, change, suspend and resume them."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

import db
from config import Settings
from core.broker_control import ControlKind
from core.errors import FieldProblem, GuardNeeded, InputInvalid, PortalError, StateConflict
from core.failpoints import failpoint
from core.roles import Role
from core.setting_values import parse_topic_prefix
from core.tenants import Quotas, TenantChoices, TenantStatus, check_tenant_name, overlapping
from store import audit, tenants
from store.audit import Actor
from store.database import Database
from store.scope import ALL_TENANTS, of_tenant
from store.tables import DEFAULT_TENANT
from store.tenants import TenantRecord
from workflows.delivery import KeptAnswers, Sealed
from workflows.operators import FIRST_TOKEN_LIFE, new_token
from workflows.reconciliation import Reconciler
from workflows.tenants import TenantDirectory

log = logging.getLogger("portal.tenants")

MAX_PREFIX = 256  # characters
GUARD_NEEDED = "Only the guard in the broker can keep tenants apart: set PORTAL_BROKER_CONTROL=guard first."
PORT_NEEDED = (
    "RabbitMQ keeps tenants apart by a listener for each: add one to the configuration of each node, restart it, set"
    ' PORTAL_RABBITMQ_TENANT_PORTS, such as {{"{0}": 8884}}, and start the portal again.'
)
GUARD_TOO_OLD = "The guard in the broker does not know tenants: install its plugin of this version, restart the broker."


@dataclass(frozen=True, slots=True)
class NewTenant:
    """A tenant to be added; its topics begin with its name if it has no ``topic_prefix``.

    Its issuing CA is below the installation's root, with ``own_root`` below one of its own.
    """

    name: str
    topic_prefix: str | None = None
    choices: TenantChoices = field(default_factory=TenantChoices)
    quotas: Quotas = field(default_factory=Quotas)
    own_root: bool = False

    @property
    def prefix(self) -> str:
        """Return below what its topics are to be."""
        return self.name if self.topic_prefix is None else self.topic_prefix


@dataclass(frozen=True, slots=True)
class TenantState:
    """A tenant, whether the broker was seen to obey its last change, and the ``problem`` if not."""

    record: TenantRecord
    enforced: bool
    problem: str | None


@dataclass(frozen=True, slots=True)
class AddedTenant:
    """A tenant that was added, with the token of its first admin, and why it has no CA yet, if it has none."""

    state: TenantState
    token: str = field(repr=False)
    token_expires_at: datetime
    ca_problem: str | None


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a repeat of adding a tenant has to say again."""

    token: str = field(repr=False)
    expires_at: datetime

    def to_json(self) -> bytes:
        return json.dumps([self.token, self.expires_at.isoformat()]).encode()

    @classmethod
    def from_json(cls, text: bytes) -> _Kept:
        token, expires_at = json.loads(text)
        return cls(token, datetime.fromisoformat(expires_at))


@dataclass(eq=False, repr=False)
class Tenants:
    """Adds tenants beside the first one, which is always there, and decides what becomes of them.

    What is done to a tenant is in its own audit record and in that of the actor.
    """

    _settings: Settings
    _database: Database
    _directory: TenantDirectory
    _reconciler: Reconciler
    _answers: KeptAnswers
    _broker_knows_tenants: Callable[[], bool]  # raises ``BrokerUnavailable``
    _create_ca: Callable[[Actor, bool], str | None]
    _clock: Callable[[], datetime]

    def add(self, actor: Actor, wanted: NewTenant, idempotency_key: str | None = None) -> AddedTenant:
        """Add a tenant with its CA and its first admin's token; requests with one ``idempotency_key`` add one.

        Raises ``InputInvalid``, ``StateConflict`` for a name or prefix that is taken, ``GuardNeeded``,
        ``IdempotencyConflict``, ``Unavailable``.
        """
        _check(wanted)
        sealed = self._answers.seal(actor, idempotency_key, _canonical(wanted))
        kept, generation = self._answers.once(sealed, _Kept.from_json, lambda: self._add(actor, wanted, sealed))
        record, problem = self.show(wanted.name), None
        if record.status is TenantStatus.ACTIVE:
            problem = self._with_ca(dataclasses.replace(actor, tenant_id=wanted.name), wanted)
        return AddedTenant(self.applied(record, generation), kept.token, kept.expires_at, problem)

    def _add(self, actor: Actor, wanted: NewTenant, sealed: Sealed | None) -> tuple[_Kept, int]:
        self._check_broker(wanted.name)
        now = self._clock()
        secret, token = new_token(wanted.name, "first admin", Role.ADMIN, now + FIRST_TOKEN_LIFE, now=now)
        kept = _Kept(secret, now + FIRST_TOKEN_LIFE)
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            generation = db.next_generation(tx, at=now)  # first: one at a time comes past it
            self._check_free(tx, wanted)
            tenants.add_tenant(
                tx,
                wanted.name,
                created_at=now,
                topic_prefix=wanted.prefix,
                choices=wanted.choices,
                quotas=wanted.quotas,
                generation=generation,
            )
            tenants.add_token(tx, token, secret=secret)
            record_of_both(tx, actor, "tenant:create", wanted.name, now, topic_prefix=wanted.prefix, token=token.id)
            if sealed is not None:
                self._answers.keep(tx, sealed, kept.to_json(), device_id=None, generation=generation)
            failpoint("tenant_add.before_commit")
        failpoint("tenant_add.after_commit")
        return kept, generation

    def _check_broker(self, name: str) -> None:
        kind = self._settings.broker_control
        if not kind.by_journal:
            raise GuardNeeded(GUARD_NEEDED)
        if kind is ControlKind.RABBITMQ and name not in self._settings.rabbitmq_tenant_ports:
            raise GuardNeeded(PORT_NEEDED.format(name))
        if not self._broker_knows_tenants():
            raise GuardNeeded(GUARD_TOO_OLD)

    def _check_free(self, tx: Connection, wanted: NewTenant) -> None:
        """Raise ``StateConflict`` if the name or topics of a tenant are another one's."""
        if (status := tenants.status_of(tx, wanted.name)) is TenantStatus.REMOVED:
            raise StateConflict("A tenant of this name was removed, and is still kept; take another name.")
        if status is not None:
            raise StateConflict("There is a tenant of this name already; take another name.")
        check_topics_free(tx, wanted.name, wanted.prefix, self._settings)
        # What the first one may use was checked by the settings of then, which may have had further prefixes.
        if older := tenants.topics_reaching(tx, DEFAULT_TENANT, wanted.prefix):
            raise StateConflict(
                f"Devices or applications of the tenant {DEFAULT_TENANT} still have the topics {older[0]}; give them"
                " others, revoke them, or take another prefix."
            )

    def _with_ca(self, actor: Actor, wanted: NewTenant) -> str | None:
        """Return why a tenant has no CA to issue with, ``None`` if it has one."""
        try:
            with of_tenant(ALL_TENANTS):  # the CA above it is the first tenant's
                problem = self._create_ca(actor, wanted.own_root)
        except PortalError as error:
            problem = error.detail
        if problem is not None:
            log.error("a tenant has no CA yet", extra={"tenant": wanted.name, "problem": problem})
        return problem

    # --- Read

    def show(self, name: str) -> TenantRecord:
        """Return a tenant with the prefix of its topics; raises ``NotFound``."""
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            return self.whole(tenants.get_tenant(tx, name))

    def list(self) -> Sequence[TenantRecord]:
        """Return all tenants in the order of their names, the removed ones that are still kept, too."""
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            return [self.whole(record) for record in tenants.list_tenants(tx)]

    def whole(self, record: TenantRecord) -> TenantRecord:
        """Return a tenant with the prefix of its topics, which the first one has in the settings."""
        return dataclasses.replace(record, topic_prefix=record.topic_prefix or self._settings.topic_prefix)

    # --- Change

    def change(self, actor: Actor, name: str, choices: Mapping[str, Any], quotas: Mapping[str, Any]) -> TenantRecord:
        """Change choices and quotas by the names of their fields; ``None`` takes one back.

        They count for what is asked for from then on. Raises ``NotFound``, ``StateConflict`` for a removed tenant.
        """
        now = self._clock()
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            record = tenants.get_tenant(tx, name, for_update=True)
            _check_not_removed(record)
            changed = dataclasses.replace(
                record,
                choices=dataclasses.replace(record.choices, **choices),
                quotas=dataclasses.replace(record.quotas, **quotas),
            )
            tenants.update_tenant(tx, changed)
            record_of_both(tx, actor, "tenant:update", name, now, choices=dict(choices), quotas=dict(quotas))
        self._directory.refresh()
        return self.whole(changed)

    def suspend(self, actor: Actor, name: str, *, waits: bool = True) -> TenantState:
        """Serve nobody of a tenant until it is resumed, and have the broker refuse its devices; may be repeated.

        With ``waits=False`` the answer comes at most a moment after that is recorded.

        Raises ``NotFound``, ``StateConflict`` for the first tenant and for one that was removed.
        """
        return self._move(actor, name, TenantStatus.SUSPENDED, "tenant:suspend", waits=waits)

    def resume(self, actor: Actor, name: str, *, waits: bool = True) -> TenantState:
        """Serve a suspended tenant again, with all that it had; may be repeated.

        Raises ``NotFound``, ``StateConflict`` for one that was removed.
        """
        return self._move(actor, name, TenantStatus.ACTIVE, "tenant:resume", waits=waits)

    def _move(self, actor: Actor, name: str, status: TenantStatus, action: str, *, waits: bool) -> TenantState:
        now = self._clock()
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            generation = db.next_generation(tx, at=now)
            record = tenants.get_tenant(tx, name, for_update=True)
            _check_not_removed(record)
            check_not_first(record, status)
            if record.status is not status:
                record = dataclasses.replace(record, status=status, generation=generation, changed_at=now)
                tenants.update_tenant(tx, record)
                record_of_both(tx, actor, action, name, now)
            failpoint("tenant_move.before_commit")
        failpoint("tenant_move.after_commit")
        return self.applied(self.whole(record), record.generation, waits=waits)

    def applied(self, record: TenantRecord, generation: int, *, waits: bool = True) -> TenantState:
        """Let this process and the broker know of a change; says whether the broker was seen to obey."""
        self._directory.refresh()
        apply = self._reconciler.apply_everywhere if waits else self._reconciler.apply_soon
        outcome = apply(generation)
        enforced = outcome.covers(generation)
        if outcome.problem is not None and not enforced:
            detail = {"tenant": record.id, "problem": outcome.problem}
            log.error("the broker does not enforce the new state of a tenant yet", extra=detail)
        return TenantState(record, enforced, None if enforced else outcome.problem)


def check_topics_free(tx: Connection, name: str, prefix: str, settings: Settings) -> None:
    """Raise ``StateConflict`` if topics below a prefix are those of a tenant of another name."""
    found = [one for one in tenants.overlapping_prefixes(tx, prefix) if one[0] != name]
    if name != DEFAULT_TENANT and (taken := overlapping(prefix, settings.application_prefixes)) is not None:
        found.append((DEFAULT_TENANT, taken))
    for other, taken in sorted(found)[:1]:
        raise StateConflict(f"The topics of the tenant {other} are below {taken}; take another prefix.")


def check_not_first(record: TenantRecord, status: TenantStatus) -> None:
    """Raise ``StateConflict`` if the first tenant were to be anything but active: it runs the installation."""
    if record.id == DEFAULT_TENANT and status is not TenantStatus.ACTIVE:
        raise StateConflict("The tenant default runs the installation; it can be neither suspended nor removed.")


def _check_not_removed(record: TenantRecord) -> None:
    if record.status is TenantStatus.REMOVED:
        raise StateConflict("The tenant was removed, which is final.")


def _check(wanted: NewTenant) -> None:
    """Raise ``InputInvalid`` for a name or a prefix that nobody could have."""
    try:
        check_tenant_name(wanted.name)
    except ValueError as error:
        raise _invalid("name", error) from error
    try:
        parse_topic_prefix(wanted.prefix)
        if len(wanted.prefix) > MAX_PREFIX:
            raise ValueError(f"must have at most {MAX_PREFIX} characters")
        if overlapping("portal", [wanted.prefix]):
            raise ValueError("must not begin with portal, where the portal and its broker talk")
    except ValueError as error:
        raise _invalid("topic_prefix", error) from error


def _invalid(name: str, error: ValueError) -> InputInvalid:
    return InputInvalid(f"The {name} {error}.", [FieldProblem(name, str(error))])


def _canonical(wanted: NewTenant) -> bytes:
    return json.dumps(["tenant", dataclasses.asdict(wanted)], sort_keys=True).encode()


def record_of_both(tx: Connection, actor: Actor, action: str, name: str, now: datetime, **detail: Any) -> None:
    """Write what was done to a tenant into the actor's audit record and into its own."""
    for owner in sorted({actor.tenant_id, name}):  # as audit.lock_audit_heads
        audit.record(tx, dataclasses.replace(actor, tenant_id=owner), action, f"tenant:{name}", at=now, **detail)
