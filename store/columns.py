"""What the definitions of tables share: kinds of columns, conditions, and the owner of a row."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite numbers rows only in INTEGER columns


def one_of(column: str, *values: str) -> str:
    """Return the condition that a column has one of these values."""
    allowed = ", ".join(f"'{value}'" for value in values)
    return f"{column} IN ({allowed})"


def partial_index(name: str, *columns: str, where: str, unique: bool = False) -> sa.Index:
    """Return an index of the rows that fulfil a condition, on either database."""
    return sa.Index(name, *columns, unique=unique, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


class OfTenant:
    """A row with its owner."""

    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"))
