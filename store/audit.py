"""The audit record: entries chained by their hashes, never changed and never removed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from store.database import columns_of
from store.tables import AuditEntry, AuditHead


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


_INSERT_AUDIT_ENTRIES = sa.insert(AuditEntry)
_LOCK_AUDIT_HEAD = (
    sa.select(AuditHead.number, AuditHead.hash)
    .where(AuditHead.tenant_id == sa.bindparam("of_tenant"))
    .with_for_update()
)
_MOVE_AUDIT_HEAD = (
    sa.update(AuditHead)
    .where(AuditHead.tenant_id == sa.bindparam("of_tenant"))
    .values(number=sa.bindparam("new_number"), hash=sa.bindparam("new_hash"))
)


def audit_head(tx: Connection, tenant_id: str) -> tuple[int, str]:
    """Return the number and the hash of the last audit entry."""
    row = tx.execute(sa.select(AuditHead.number, AuditHead.hash).where(AuditHead.tenant_id == tenant_id)).one()
    return row.number, row.hash


def lock_audit_head(tx: Connection, tenant_id: str) -> tuple[int, str]:
    """Return number and hash of the last audit entry, and let nobody else add one until the transaction ends."""
    number, last_hash = tx.execute(_LOCK_AUDIT_HEAD, {"of_tenant": tenant_id}).one()
    return number, last_hash


def add_audit_entries(tx: Connection, tenant_id: str, entries: Sequence[dict[str, Any]]) -> None:
    """Append entries in this order; each holds the columns of ``AuditEntry`` except id and tenant."""
    rows = [{"tenant_id": tenant_id, **entry} for entry in entries]
    tx.execute(_INSERT_AUDIT_ENTRIES, rows)
    last = entries[-1]
    tx.execute(_MOVE_AUDIT_HEAD, {"of_tenant": tenant_id, "new_number": last["number"], "new_hash": last["hash"]})


def audit_chain(tx: Connection, tenant_id: str) -> Generator[dict[str, Any], None, None]:
    """Yield every entry by number, with all columns except the id."""
    columns = [column for column in AuditEntry.__table__.c if column.name != "id"]
    query = sa.select(*columns).where(AuditEntry.tenant_id == tenant_id).order_by(AuditEntry.number)
    with tx.execute(query.execution_options(yield_per=1000)) as rows:  # a cursor of the server, which must be closed
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
    """Return entries newest first, older than entry ``before``, newer than ``after``; ``filters`` match exactly."""
    query = sa.select(*columns_of(AuditRecord, AuditEntry)).where(*_entries_between(tenant_id, before, after))
    for column, value in (filters or {}).items():
        query = query.where(AuditEntry.__table__.c[column] == value)
    return [AuditRecord(*row) for row in tx.execute(query.order_by(AuditEntry.id.desc()).limit(limit))]


def audit_entry_before(
    tx: Connection, tenant_id: str, *, count: int, before: int | None, of_object: str | None
) -> int | None:
    """Return the id of the entry ``count`` + 1 places before ``before``, or before the end; ``None`` if there is none.

    With ``of_object`` only entries of that object count.
    """
    query = sa.select(AuditEntry.id).where(*_entries_between(tenant_id, before, None))
    if of_object is not None:
        query = query.where(AuditEntry.object == of_object)
    return tx.execute(query.order_by(AuditEntry.id.desc()).limit(1).offset(count)).scalar_one_or_none()


def _entries_between(tenant_id: str, before: int | None, after: int | None) -> list[sa.ColumnElement[bool]]:
    conditions = [AuditEntry.tenant_id == tenant_id]
    conditions += [] if before is None else [AuditEntry.id < before]
    return conditions + ([] if after is None else [AuditEntry.id > after])


def count_audit_entries(tx: Connection, tenant_id: str) -> int:
    """Return how many entries the audit record has."""
    return tx.execute(sa.select(AuditHead.number).where(AuditHead.tenant_id == tenant_id)).scalar_one()
