"""The two roles of PostgreSQL: one owns the tables and changes the schema, the portal runs as the other.

Row-level security does not hold the owner of a table, so that the portal's own role should own none.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from store.tables import METADATA

RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")  # TRUNCATE is none: it would pass by row-level security
_MISSING = sa.text(
    "SELECT EXISTS (SELECT FROM unnest(CAST(:tables AS text[])) AS name, unnest(CAST(:rights AS text[])) AS kind"
    " WHERE NOT has_table_privilege(:role, name, kind))"
    " OR NOT has_table_privilege(:role, 'alembic_version', 'SELECT')"
    " OR EXISTS (SELECT FROM pg_class WHERE relnamespace = current_schema()::regnamespace"
    " AND CASE relkind WHEN 'S' THEN NOT has_sequence_privilege(:role, oid, 'USAGE') ELSE false END)"
)
_ROLE = sa.text(
    "SELECT rolname AS name, rolsuper AS is_superuser, rolbypassrls AS bypasses, EXISTS (SELECT FROM pg_class WHERE"
    " relnamespace = current_schema()::regnamespace AND relname = ANY(:tables)"
    " AND pg_has_role(current_user, relowner, 'USAGE')) AS is_owner FROM pg_roles WHERE rolname = current_user"
)
_MAY_CHANGE = sa.text(
    "SELECT has_schema_privilege(current_schema(), 'CREATE') AND NOT EXISTS (SELECT FROM pg_class WHERE"
    " relnamespace = current_schema()::regnamespace AND relname = ANY(:tables)"
    " AND NOT pg_has_role(current_user, relowner, 'USAGE'))"
)


@dataclass(frozen=True, slots=True)
class DatabaseRole:
    """The role that a connection has in PostgreSQL, and what of it makes row-level security void."""

    name: str
    is_superuser: bool
    bypasses: bool
    is_owner: bool

    @property
    def unbound(self) -> str | None:
        """Why row-level security does not hold the role, as the end of a sentence; ``None`` if it does."""
        if self.is_superuser:
            return "is a superuser"
        if self.bypasses:
            return "has BYPASSRLS"
        return "owns the tables" if self.is_owner else None


def role_of(tx: Connection) -> DatabaseRole:
    """Return the role of a connection to PostgreSQL."""
    return DatabaseRole(*tx.execute(_ROLE, {"tables": list(METADATA.tables)}).one())


def may_change_schema(tx: Connection) -> bool:
    """Return whether the role of a connection to PostgreSQL may make the portal's tables, and owns those there are."""
    return bool(tx.execute(_MAY_CHANGE, {"tables": list(METADATA.tables)}).scalar_one())


def grant(tx: Connection, role: str) -> None:
    """Give a role the rights that the portal needs to run, as the owner of the tables, if it lacks any."""
    tables = list(METADATA.tables)
    if not tx.execute(_MISSING, {"tables": tables, "rights": list(RIGHTS), "role": role}).scalar_one():
        return
    quote = tx.dialect.identifier_preparer.quote
    schema, to = quote(tx.exec_driver_sql("SELECT current_schema()").scalar_one()), quote(role)
    for statement in (
        f"GRANT USAGE ON SCHEMA {schema} TO {to}",
        f"GRANT {', '.join(RIGHTS)} ON {', '.join(map(quote, tables))} TO {to}",
        f"GRANT SELECT ON alembic_version TO {to}",
        f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA {schema} TO {to}",
    ):
        tx.exec_driver_sql(statement)
