"""The rows of one tenant, copied back among those of others: renumbered, and never in place of a row of another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import BackupRefused
from core.tenants import TenantStatus
from store import copy as store_copy
from store import tenant_rows
from store.tables import METADATA, DeviceKey, Tenant

Rows = Callable[[str], Iterator[dict[str, Any]]]  # of a table
_BATCH = 500
_SHOWN = ("name", "id", "identity", "fingerprint")  # columns that are no secrets


class Renumbering:
    """Gives rows whose ids count those of the whole installation new ids, above all that there are, in their order."""

    def __init__(self, tx: Connection) -> None:
        self._new: dict[str, dict[int, int]] = {}
        self._next: dict[str, int] = {}
        for name in store_copy.table_names("any"):
            table = METADATA.tables[name]
            if table.autoincrement_column is not None:
                newest = tx.execute(sa.select(sa.func.max(table.autoincrement_column))).scalar_one()
                self._new[name], self._next[name] = {}, (newest or 0) + 1

    def change(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row with its new id and those of the rows that it refers to, which must have come before.

        What it says of a row of the installation, which no tenant's backup has, is not known here: it becomes NULL.
        Raises ``BackupRefused`` if it refers to a row that did not.
        """
        changed = dict(row)
        for column, referred in _references(name).items():
            if referred not in self._new:
                changed[column] = None
                continue
            if changed[column] is not None and changed[column] not in self._new[referred]:
                raise BackupRefused(f"A row of {name} in the backup refers to one that is missing; use another backup.")
            changed[column] = self._new[referred].get(changed[column])
        own = METADATA.tables[name].autoincrement_column
        if own is not None:
            self._new[name][row[own.name]] = changed[own.name] = self._next[name]
            self._next[name] += 1
        return changed


def _references(name: str) -> dict[str, str]:
    """Return the columns of a table that refer to rows by their numbers, with the tables of these."""
    named = {column.name: column.info["names"] for column in METADATA.tables[name].c if "names" in column.info}
    return named | {
        column.name: key.column.table.name
        for column in METADATA.tables[name].c
        for key in column.foreign_keys
        if key.column is key.column.table.autoincrement_column
    }


def taken(tx: Connection, tenant_id: str, backup: Rows) -> str | None:
    """Say what of a backup's rows is another tenant's here: ids, names of devices and CAs, compromised keys."""
    for name in store_copy.table_names(tenant_id):
        table = METADATA.tables[name]
        for column in _of_the_installation(table):
            for values in _batches(row[column.name] for row in backup(name)):
                query = sa.select(column, table.c.tenant_id).where(table.c.tenant_id != tenant_id, column.in_(values))
                if (found := tx.execute(query.limit(1)).one_or_none()) is not None:
                    shown = f" {found[0]}" if column.name in _SHOWN else ""
                    return f"The {column.name}{shown} of {name} in the backup is the tenant {found[1]}'s here"
    return _taken_key(tx, tenant_id, backup)


def _of_the_installation(table: sa.Table) -> Iterator[sa.Column[Any]]:
    """Yield the columns of which no two rows of any tenants have the same value, without those that are renumbered."""
    if table.name == "tenants":
        return
    keys = [constraint.columns for constraint in table.constraints if isinstance(constraint, sa.UniqueConstraint)]
    unique = [list(columns) for columns in (*keys, table.primary_key.columns)]
    unique += [list(index.columns) for index in table.indexes if index.unique]
    single = dict.fromkeys(columns[0] for columns in unique if len(columns) == 1)
    numbers = {*_references(table.name)} | ({own.name} if (own := table.autoincrement_column) is not None else set())
    yield from (column for column in single if column.name not in ("tenant_id", *numbers))


def _taken_key(tx: Connection, tenant_id: str, backup: Rows) -> str | None:
    """Say which key was revoked as compromised in one tenant, and is a device's in another."""
    compromised = DeviceKey.compromised_at.is_not(None)
    for rows in _batches(backup("device_keys")):
        bad = {row["key_fingerprint"]: row["compromised_at"] is not None for row in rows}
        query = sa.select(DeviceKey.key_fingerprint, DeviceKey.tenant_id, compromised.label("compromised")).where(
            DeviceKey.tenant_id != tenant_id, DeviceKey.key_fingerprint.in_(list(bad)), DeviceKey.device_id.is_not(None)
        )
        for fingerprint, other, there in tx.execute(query):
            if there != bad[fingerprint]:
                where = (
                    f"was revoked as compromised in the tenant {other}" if there else f"is the tenant {other}'s here"
                )
                return f"The key {fingerprint} of the backup {where}"
    return None


def delete(tx: Connection, tenant_id: str) -> None:
    """Delete all rows of a tenant within the transaction, those that nobody may delete but with their tenant, too."""
    tx.execute(sa.update(Tenant).where(Tenant.id == tenant_id).values(status=TenantStatus.REMOVED))
    while tenant_rows.delete_some(tx, tenant_id, limit=_BATCH):
        pass
    tenant_rows.delete_tenant(tx, tenant_id)


def load(
    tx: Connection, tenant_id: str, numbers: Renumbering, lines: Callable[[str], Iterator[bytes]]
) -> Mapping[str, int]:
    """Insert the rows of a tenant that ``lines`` has of each table; return their number by table."""
    counts = {}
    for name in store_copy.table_names(tenant_id):

        def change(row: dict[str, Any], name: str = name) -> dict[str, Any] | None:
            return numbers.change(name, row) if store_copy.owner_of(name, row) == tenant_id else None

        counts[name] = store_copy.load(tx, name, lines(name), change)
    store_copy.renumber(tx)
    return counts


def _batches(items: Iterator[Any]) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(items, _BATCH)):
        yield batch
