"""Dump tables as lines of JSON and load them, from any of the portal's databases to any other."""

from __future__ import annotations

import base64
import binascii
import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import BackupRefused, DatabaseTooNew
from store import schema
from store.database import UtcDateTime
from store.tables import METADATA

Change = Callable[[dict[str, Any]], dict[str, Any] | None]
BATCH = 500
# The kinds of columns, which the first line of a dump names, so that a dump outlives changes of the tables.
_TYPES: dict[str, sa.types.TypeEngine[Any]] = {
    "time": UtcDateTime(),
    "bytes": sa.LargeBinary(),
    "json": sa.JSON(none_as_null=True),
    "plain": sa.types.NullType(),
}


def table_names(tenant_id: str | None = None) -> list[str]:
    """Return the name of every table, or of those with rows of a tenant, each after those that it refers to.

    Without those of the nodes that run now.
    """
    kept = [table for table in METADATA.sorted_tables if "of_nodes" not in table.info]
    return [table.name for table in kept if tenant_id is None or _owner(table) is not None]


def _owner(table: sa.Table) -> sa.Column[Any] | None:
    """Return the column that names the tenant of a row."""
    return table.c.id if table.name == "tenants" else table.c.get("tenant_id")


def owner_of(name: str, row: Mapping[str, Any]) -> str:
    """Return the tenant of a row of a table that has rows of tenants."""
    return str(row["id" if name == "tenants" else "tenant_id"])


# --- Dump ---------------------------------------------------------------------------------------------------------


def rows(tx: Connection, name: str, tenant_id: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, or those of a tenant, in the order of its key."""
    table = METADATA.tables[name]
    query = sa.select(table).order_by(*table.primary_key).execution_options(yield_per=BATCH)
    owner = None if tenant_id is None else _owner(table)
    if owner is not None:
        query = query.where(owner == tenant_id)
    with contextlib.closing(tx.execute(query)) as result:
        for row in result.mappings():
            yield dict(row)


def dump(tx: Connection, name: str, tenant_id: str | None = None) -> Iterator[str]:
    """Yield a table as lines of JSON: its columns as pairs of name and kind, then an array for each row.

    With ``tenant_id`` only the rows of that tenant.
    """
    kinds = [(column.name, _kind(column.type)) for column in METADATA.tables[name].c]
    yield json.dumps({"columns": kinds}) + "\n"
    for row in rows(tx, name, tenant_id):
        yield json.dumps([_to_json(row[column], kind) for column, kind in kinds], separators=(",", ":")) + "\n"


def _kind(of: sa.types.TypeEngine[Any]) -> str:
    for kind, known in (("time", UtcDateTime), ("bytes", sa.LargeBinary), ("json", sa.JSON)):
        if isinstance(of, known):
            return kind
    return "plain"


def _to_json(value: Any, kind: str) -> Any:
    if value is None or kind in ("plain", "json"):
        return value
    return value.isoformat() if kind == "time" else base64.b64encode(value).decode()


# --- Load ---------------------------------------------------------------------------------------------------------


def read(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the rows that ``dump`` wrote; raises ``BackupRefused`` if the lines are not its."""
    _, found = _read(lines)
    return found


def load(tx: Connection, name: str, lines: Iterable[bytes], change: Change | None = None) -> int:
    """Insert the rows that ``dump`` wrote into a table of the same schema revision; return how many.

    ``change`` makes of each row the one to insert, or ``None`` to leave it out.
    """
    kinds, found = _read(lines)
    if change is not None:
        found = (row for row in map(change, found) if row is not None)
    table = sa.table(name, *(sa.column(column, _TYPES[kind]) for column, kind in kinds))
    statement, count = sa.insert(table), 0
    while batch := list(itertools.islice(found, BATCH)):
        tx.execute(statement, batch)
        count += len(batch)
    return count


def _read(lines: Iterable[bytes]) -> tuple[list[tuple[str, str]], Iterator[dict[str, Any]]]:
    remaining = iter(lines)
    try:
        kinds = [(str(name), str(kind)) for name, kind in json.loads(next(remaining))["columns"]]
    except (StopIteration, ValueError, TypeError, KeyError) as error:
        raise BackupRefused("A table of the backup has no columns; use another backup.") from error
    if any(kind not in _TYPES for _, kind in kinds):
        raise BackupRefused("A table of the backup has a column of an unknown kind; use the version that made it.")
    return kinds, (_row(line, kinds) for line in remaining)


def _row(line: bytes, kinds: list[tuple[str, str]]) -> dict[str, Any]:
    try:
        values = json.loads(line)
        return {name: _from_json(value, kind) for (name, kind), value in zip(kinds, values, strict=True)}
    except (ValueError, TypeError, binascii.Error) as error:
        raise BackupRefused("A row of the backup cannot be read; use another backup.") from error


def _from_json(value: Any, kind: str) -> Any:
    if value is None or kind in ("plain", "json"):
        return value
    return datetime.fromisoformat(value) if kind == "time" else base64.b64decode(value, validate=True)


# --- The schema that rows belong to -------------------------------------------------------------------------------


def check_revision(wanted: str) -> None:
    """Raise ``DatabaseTooNew`` if this version does not know a schema revision."""
    if wanted not in schema.revisions():
        raise DatabaseTooNew(
            f"The backup was made by a newer version of the portal (schema {wanted}); restore it with that version."
        )


def clear(tx: Connection, wanted: str) -> None:
    """Give a PostgreSQL database the empty tables of a revision, within the transaction."""
    tx.execute(schema.MIGRATION_LOCK)
    current = schema.revision(tx)
    here = [name for name in sa.inspect(tx).get_table_names() if name in METADATA.tables]
    if current == wanted:
        tx.execute(sa.text(f"TRUNCATE {', '.join(here)}"))
        return
    for name in [*here, "alembic_version"]:
        tx.execute(sa.text(f"DROP TABLE IF EXISTS {name} CASCADE"))
    for function in ("portal_refuse", "portal_refuse_unless_removed"):
        tx.execute(sa.text(f"DROP FUNCTION IF EXISTS {function}() CASCADE"))
    schema.upgrade(tx, wanted)


def renumber(tx: Connection) -> None:
    """Make PostgreSQL number new rows above those that were loaded with their numbers; SQLite does so by itself."""
    if tx.dialect.name == "sqlite":
        return
    for table in METADATA.sorted_tables:
        if table.autoincrement_column is None:
            continue
        column = table.autoincrement_column.name
        sequence = tx.execute(sa.select(sa.func.pg_get_serial_sequence(table.name, column))).scalar_one()
        if sequence is not None:
            newest = sa.select(sa.func.max(table.c[column])).scalar_subquery()
            tx.execute(sa.select(sa.func.setval(sequence, sa.func.coalesce(newest, 1), newest.is_not(None))))
