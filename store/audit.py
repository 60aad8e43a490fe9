"""The audit record: who did what, each entry with the hash of the one before it; never changed and never removed.

An entry is hashed as the canonical JSON of its fields. These texts are chained, each by the hash of the one before it,
and are the leaves of a Merkle tree, whose root a checkpoint signs: see docs/security.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.merkle import Edge
from store.database import columns_of
from store.prepared import Prepared, Question
from store.tables import AuditEntry, AuditHead, Tenant

_HASHED = ("number", "previous_hash", "actor", "action", "object", "outcome", "request_id", "address", "detail")
_hashed_of = itemgetter(*_HASHED)
_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)
_INSERT_AUDIT_ENTRIES = Prepared(sa.insert(AuditEntry))
_AUDIT_HEAD = sa.select(AuditHead.number, AuditHead.hash, AuditHead.edge).where(
    AuditHead.tenant_id == sa.bindparam("of_tenant")
)
_LOCK_AUDIT_HEAD = Question(_AUDIT_HEAD.with_for_update())
_MOVE_AUDIT_HEAD = Prepared(
    sa.update(AuditHead)
    .where(AuditHead.tenant_id == sa.bindparam("of_tenant"))
    .values(number=sa.bindparam("new_number"), hash=sa.bindparam("new_hash"), edge=sa.bindparam("new_edge"))
)
READ_AT_ONCE = 1000  # entries


@dataclass(frozen=True, slots=True)
class Actor:
    """The client of a request.

    ``name`` is what the audit record shows: ``NAME (ID)`` of an operator's token, ``NAME (ISS#SUB)`` of a person whom
    the identity provider has named, the credential of a device, ``anyone``, or ``portal`` for a job. ``token_id`` is
    the operator's token.
    """

    tenant_id: str
    name: str
    role: str
    request_id: str
    address: str
    token_id: str | None = None


Act = tuple[Actor, str, str, Mapping[str, Any]]  # with action, object and detail


@dataclass(frozen=True, slots=True)
class Head:
    """Number and hash of the last entry, and the edge of the Merkle tree over all entries."""

    number: int
    hash: str
    edge: bytes


EMPTY_RECORD = Head(0, "0" * 64, b"")


def system_actor(tenant_id: str) -> Actor:
    """Return the portal itself as the actor, for what no client asked for."""
    return Actor(tenant_id=tenant_id, name="portal", role="system", request_id="", address="")


def record(
    tx: Connection,
    actor: Actor,
    action: str,
    object: str,  # noqa: A002 - the field's name in the record
    *,
    at: datetime,
    outcome: str = "done",
    **detail: Any,
) -> None:
    """Append an entry in the transaction that makes the change it is about.

    ``action`` is a tag such as ``device:register``; ``object`` names what it was done to, such as ``device:<id>``.
    ``detail`` never holds a secret: no key, password, token or link. Call it last in a transaction: from here to its
    end, other transactions that append wait for this one.
    """
    record_all(tx, [(actor, action, object, detail)], at=at, outcome=outcome)


def record_all(
    tx: Connection,
    acts: Sequence[Act],
    *,
    at: datetime,
    outcome: str = "done",
    head: Head | None = None,
) -> None:
    """Append an entry for each of ``acts`` (actor, action, object, detail), as ``record`` does for one.

    The actors are of one tenant. ``head`` is that of its record, if the transaction has locked it and appended nothing
    since.
    """
    if not acts:
        return
    tenant_id = acts[0][0].tenant_id
    head = head or lock_audit_head(tx, tenant_id)
    number, previous_hash, tree = head.number, head.hash, Edge(head.number, head.edge)
    entries: list[dict[str, Any]] = []
    for actor, action, object_, detail in acts:
        number += 1
        entry: dict[str, Any] = {
            "tenant_id": tenant_id,
            "number": number,
            "previous_hash": previous_hash,
            "at": at,
            "actor": actor.name[:128],
            "action": action,
            "object": object_[:128],
            "outcome": outcome,
            "request_id": actor.request_id,
            "address": actor.address[:64],
            "detail": dict(detail),
        }
        text = canonical(entry)
        entry["hash"] = previous_hash = hashlib.sha256(text).hexdigest()
        tree.append(text)
        entries.append(entry)
    _INSERT_AUDIT_ENTRIES.run(tx, entries)
    moved = {"new_number": number, "new_hash": previous_hash, "new_edge": tree.packed()}
    _MOVE_AUDIT_HEAD.run(tx, [{"of_tenant": tenant_id, **moved}])


def audit_head(tx: Connection, tenant_id: str) -> Head:
    """Return the head of the record; if somebody has deleted it, that of an empty one."""
    row = tx.execute(_AUDIT_HEAD, {"of_tenant": tenant_id}).one_or_none()
    return EMPTY_RECORD if row is None else Head(*row)


def audit_numbers(tx: Connection) -> dict[str, int]:
    """Return how many entries the record of each tenant has; none if somebody has deleted its head."""
    query = sa.select(Tenant.id, sa.func.coalesce(AuditHead.number, 0).label("number"))
    query = query.outerjoin(AuditHead, AuditHead.tenant_id == Tenant.id).order_by(Tenant.id)
    return {row.id: row.number for row in tx.execute(query)}


def lock_audit_head(tx: Connection, tenant_id: str) -> Head:
    """Return the head of the record, and let nobody else add an entry until the transaction ends."""
    row = _LOCK_AUDIT_HEAD.within(tx, {"of_tenant": tenant_id})
    if row is None:
        raise LookupError(f"the tenant {tenant_id} has no audit record")
    return Head(*row)


def lock_audit_heads(tx: Connection, tenant_ids: Iterable[str]) -> None:
    """Lock the records of several tenants, before anything is appended to one of them.

    Always in the order of their names: else two transactions that append to the same ones could wait for each other.
    """
    for tenant_id in sorted({*tenant_ids}):
        lock_audit_head(tx, tenant_id)


def canonical(entry: Mapping[str, Any]) -> bytes:
    """Return the canonical JSON of an entry, which contains the hash of the entry before it.

    An array of tenant, time (RFC 3339, microseconds, ``+00:00``) and the fields of ``_HASHED``: ASCII, no spaces, keys
    of objects sorted.
    """
    at = entry["at"].astimezone(UTC).isoformat(timespec="microseconds")
    values = [entry["tenant_id"], at, *_hashed_of(entry)]
    return _JSON.encode(values).encode()


# --- Check --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AuditVerdict:
    """The result of a check: how many entries are intact, the hash of the last one, and what is wrong after it.

    ``roots`` has the roots of the Merkle tree at the sizes that were asked for, as far as the record is intact.
    """

    entries: int
    head: str
    problem: str | None
    roots: Mapping[int, bytes]


def verify(tx: Connection, tenant_id: str, *, after: Head = EMPTY_RECORD, sizes: Collection[int] = ()) -> AuditVerdict:
    """Check the hashes from the first entry to the last; the result names the first altered, removed or moved one.

    Entries up to the head ``after``, which the caller trusts, are not read.
    """
    number, previous_hash, tree = after.number, after.hash, Edge(after.number, after.edge)
    roots = {number: tree.root()}
    for entry in read_entries(tx, tenant_id, after=number):
        problem, text = None, canonical(entry)
        if entry["number"] != number + 1:
            problem = f"Entry {number + 1} is missing: after {number} comes {entry['number']}."
        elif entry["previous_hash"] != previous_hash:
            problem = f"Entry {number + 1} does not follow entry {number}: one of them was replaced or moved."
        elif entry["hash"] != hashlib.sha256(text).hexdigest():
            problem = f"Entry {number + 1} was altered: {entry['action']} of {entry['object']}."
        if problem is not None:
            return AuditVerdict(number, previous_hash, problem, roots)
        number, previous_hash = entry["number"], entry["hash"]
        tree.append(text)
        if number in sizes:
            roots[number] = tree.root()
    problem, head = None, audit_head(tx, tenant_id)
    if head.number > number:
        problem = f"Entry {number + 1} is missing, at the end of the record."
    elif (head.number, head.hash) != (number, previous_hash):
        problem = f"Entry {number} is not the one that was recorded last."
    elif head.edge != tree.packed():
        problem = f"The Merkle tree that is kept with entry {number} is not that of the entries."
    return AuditVerdict(number, previous_hash, problem, roots)


def read_entries(tx: Connection, tenant_id: str, *, after: int, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of the entries behind number ``after``, oldest first, as many as ``limit`` at most."""
    query = sa.select(AuditEntry.__table__).where(AuditEntry.tenant_id == tenant_id, AuditEntry.number > after)
    query = query.order_by(AuditEntry.number).limit(limit)
    with tx.execute(query.execution_options(yield_per=READ_AT_ONCE)) as rows:  # a server's cursor, to be closed
        for row in rows.mappings():
            yield dict(row)


def hash_at(tx: Connection, tenant_id: str, number: int) -> str | None:
    """Return the hash that the entry ``number`` has, ``None`` if there is no such entry."""
    query = sa.select(AuditEntry.hash).where(AuditEntry.tenant_id == tenant_id, AuditEntry.number == number)
    return tx.execute(query).scalar_one_or_none()


# --- Lists --------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, slots=True)
class Period:
    """Entries from ``since`` on, and before ``until``; with one of them a list is in the order of time.

    Else it is in the order of numbers, which another clock can make a different one.
    """

    since: datetime | None = None
    until: datetime | None = None

    @property
    def is_limited(self) -> bool:
        """Whether it has a beginning or an end."""
        return self.since is not None or self.until is not None

    def newest_first(self) -> list[sa.ColumnElement[Any]]:
        """Return what to order by: an index has it."""
        return [AuditEntry.at.desc(), AuditEntry.id.desc()] if self.is_limited else [AuditEntry.id.desc()]


ALWAYS = Period()


def list_audit_entries(
    tx: Connection,
    tenant_id: str,
    *,
    limit: int,
    before: int | None = None,
    down_to: int | None = None,
    filters: dict[str, str] | None = None,
    period: Period = ALWAYS,
) -> Sequence[AuditRecord]:
    """Return entries newest first, older than entry ``before``, down to that entry.

    ``filters`` match exactly, but for an ``actor``, which may be the name of an operator's token alone.
    """
    query = sa.select(*columns_of(AuditRecord, AuditEntry)).where(*_between(tx, tenant_id, before, down_to, period))
    for column, value in (filters or {}).items():
        matches = AuditEntry.__table__.c[column] == value
        if column == "actor":
            matches |= AuditEntry.actor.startswith(f"{value} (", autoescape=True)
        query = query.where(matches)
    return [AuditRecord(*row) for row in tx.execute(query.order_by(*period.newest_first()).limit(limit))]


def audit_entry_before(
    tx: Connection, tenant_id: str, *, count: int, before: int | None, of_object: str | None, period: Period = ALWAYS
) -> int | None:
    """Return the id of the entry ``count`` places before ``before``, or before the end; ``None`` if there is none.

    With ``of_object`` only entries of that object count.
    """
    query = sa.select(AuditEntry.id).where(*_between(tx, tenant_id, before, None, period))
    if of_object is not None:
        query = query.where(AuditEntry.object == of_object)
    return tx.execute(query.order_by(*period.newest_first()).limit(1).offset(count - 1)).scalar_one_or_none()


def _between(
    tx: Connection, tenant_id: str, before: int | None, down_to: int | None, period: Period
) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = [AuditEntry.tenant_id == tenant_id]
    if not period.is_limited:
        conditions += [] if before is None else [AuditEntry.id < before]
        return conditions + ([] if down_to is None else [AuditEntry.id >= down_to])
    here = sa.tuple_(AuditEntry.at, AuditEntry.id)
    at = None if before is None else _time_of(tx, tenant_id, before)
    # Only one upper bound, because a database uses only one for an index.
    if at is not None and (period.until is None or at < period.until):
        conditions.append(here < _place(at, before))
    elif period.until is not None:
        conditions.append(AuditEntry.at < period.until)
    since = None if down_to is None else _time_of(tx, tenant_id, down_to)
    if since is not None:
        conditions.append(here >= _place(since, down_to))
    elif period.since is not None:
        conditions.append(AuditEntry.at >= period.since)
    return conditions


def _time_of(tx: Connection, tenant_id: str, entry_id: int) -> datetime | None:
    query = sa.select(AuditEntry.at).where(AuditEntry.tenant_id == tenant_id, AuditEntry.id == entry_id)
    return tx.execute(query).scalar_one_or_none()


def _place(at: datetime, entry_id: int | None) -> sa.Tuple:
    return sa.tuple_(sa.literal(at, AuditEntry.at.type), sa.literal(entry_id, AuditEntry.id.type))
