"""Which tenants of a restored backup were suspended or removed since it was made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Set
from datetime import datetime
from typing import Any

from core.tenants import TenantStatus
from store.tables import DEFAULT_TENANT
from store.tenants import TenantRecord

_IN_ORDER = (TenantStatus.ACTIVE, TenantStatus.SUSPENDED, TenantStatus.REMOVED)  # the later the less it may do


def ended_since(
    restored: Iterable[TenantRecord],
    replaced: Callable[[str], Iterator[dict[str, Any]]] | None,
    suspended: Set[str],
    *,
    now: datetime,
) -> Iterator[TenantRecord]:
    """Yield each restored tenant that may do less than the backup says, with the status that it has had since when.

    That is known from the replaced database: from its tenants, and from the audit record where the rows of one were
    deleted since. Another tenant that has got its name is told apart by when it was added. Without that database those
    are suspended that the guard's journal has as ``suspended``.
    """
    here = [record for record in restored if record.id != DEFAULT_TENANT]
    if replaced is None:
        since = {record: (TenantStatus.SUSPENDED, now) for record in here if record.id in suspended}
    elif here:
        since = _in_replaced(here, replaced, now)
    else:
        return
    for record, (status, at) in since.items():
        if _IN_ORDER.index(status) > _IN_ORDER.index(record.status):
            yield dataclasses.replace(record, status=status, changed_at=at)


def _in_replaced(
    here: list[TenantRecord], replaced: Callable[[str], Iterator[dict[str, Any]]], now: datetime
) -> dict[TenantRecord, tuple[TenantStatus, datetime]]:
    there = {(row["id"], row["created_at"]): row for row in replaced("tenants")}
    deleted = {row["object"]: row["at"] for row in replaced("audit_entries") if row["action"] == "tenant:delete"}
    since = {}
    for record in here:
        row, deleted_at = there.get((record.id, record.created_at)), deleted.get(f"tenant:{record.id}")
        if row is not None:
            since[record] = TenantStatus(row["status"]), row["changed_at"] or now
        elif deleted_at is not None and deleted_at > record.created_at:
            since[record] = TenantStatus.REMOVED, deleted_at
    return since
