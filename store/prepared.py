"""Statements that every request runs, of which SQLAlchemy makes text and conversions once.

It prepares a statement for the driver anew at each execution, which takes several times as long as SQLite does to run
one that reads or writes a row. So SQLite's driver is given them here, in the transaction of SQLAlchemy's connection, of
which its events do not tell. On PostgreSQL, where the server takes longer, SQLAlchemy executes them as ever.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection

Values = Mapping[str, Any]
_Convert = Callable[[Any], Any]
_KEPT = 64  # times, of which a request writes the same few in many columns
_of_times: dict[tuple[object, ...], _Convert] = {}


@dataclass(frozen=True, slots=True)
class _Text:
    """The text of a statement for one dialect, and the names of its parameters in their order.

    ``fixed`` are the values that are the statement's own, or the defaults of columns.
    """

    text: str
    parameters: Sequence[tuple[str, _Convert | None]]
    fixed: Values

    def of(self, values: Values) -> tuple[Any, ...]:
        """Return the parameters for the driver; raises ``KeyError`` if a value is missing."""
        values = {**self.fixed, **values} if self.fixed else values
        return tuple([values[name] if convert is None else convert(values[name]) for name, convert in self.parameters])


class Prepared:
    """An INSERT of rows, or an UPDATE, whose text depends on no value.

    What it returns on SQLite are SQLite's own values, not converted to those of the columns' types.
    """

    def __init__(self, statement: sa.Insert | sa.Update) -> None:
        self._statement = statement
        self._texts: dict[tuple[object, ...], _Text] = {}

    def run(self, tx: Connection, rows: Sequence[Values]) -> None:
        """Execute it for each of the rows, which have the same names and of which there is one at least."""
        if tx.dialect.name == "sqlite":
            text = self._text(tx.dialect, rows[0])
            execute(_writing(tx), text.text, [text.of(row) for row in rows])
        else:
            tx.execute(self._statement, rows)

    def row(self, tx: Connection, values: Values) -> Sequence[Any]:
        """Execute it once, and return the one row that it returns."""
        if tx.dialect.name == "sqlite":
            text = self._text(tx.dialect, values)
            [row] = execute(_writing(tx), text.text, [text.of(values)])
            return row
        return tx.execute(self._statement, values).one()

    def _text(self, dialect: Dialect, values: Values) -> _Text:
        key = (type(dialect), *values)
        found = self._texts.get(key)
        if found is None:
            found = self._texts[key] = self._compiled(dialect, values)
        return found

    def _compiled(self, dialect: Dialect, values: Values) -> _Text:
        columns = list(values) if isinstance(self._statement, sa.Insert) else None
        compiled: Any = self._statement.compile(dialect=dialect, column_keys=columns)
        defaults = {column.key: column.default.arg for column in compiled.insert_prefetch}
        return _text_of(compiled, dialect, defaults)


class Question:
    """A SELECT whose text depends on no value, in a transaction or in a read of its own: ``Database.answer``."""

    def __init__(self, query: sa.Select[*tuple[Any, ...]]) -> None:
        self._query = query
        self._prepared: tuple[_Text, Sequence[_Convert | None]] | None = None

    def within(self, tx: Connection, values: Values) -> Sequence[Any] | None:
        """Return the only row, ``None`` if there is none, in a transaction."""
        return _only(self.rows(tx, values))

    def rows(self, tx: Connection, values: Values) -> Sequence[Sequence[Any]]:
        """Return all rows, in a transaction."""
        if tx.dialect.name != "sqlite":
            return tx.execute(self._query, values).all()
        return self._by_sqlite(tx.connection, tx.dialect, values)

    def by_sqlite(self, driver: DBAPIConnection, dialect: Dialect, values: Values) -> Sequence[Any] | None:
        """Return the only row, ``None`` if there is none, in no transaction."""
        return _only(self._by_sqlite(driver, dialect, values))

    def _by_sqlite(self, driver: DBAPIConnection, dialect: Dialect, values: Values) -> Sequence[Sequence[Any]]:
        text, converts = self._prepared_for(dialect)
        return [_converted(row, converts) for row in execute(driver, text.text, [text.of(values)])]

    def _prepared_for(self, dialect: Dialect) -> tuple[_Text, Sequence[_Convert | None]]:
        if self._prepared is None:
            text = _text_of(self._query.compile(dialect=dialect), dialect, {})
            types = [column.type.dialect_impl(dialect) for column in self._query.selected_columns]
            self._prepared = text, [kind.result_processor(dialect, None) for kind in types]
        return self._prepared


def execute(driver: DBAPIConnection, text: str, rows: Sequence[tuple[Any, ...]] = ((),)) -> Sequence[Sequence[Any]]:
    """Have SQLite's driver execute a statement, for each of ``rows``; return what it returns for a single one.

    Raises SQLAlchemy's errors in place of the driver's, which have the same names (PEP 249).
    """
    cursor = driver.cursor()
    try:
        if len(rows) > 1:
            cursor.executemany(text, rows)
            return ()
        cursor.execute(text, rows[0])
        return cursor.fetchall()
    except sqlite3.Error as error:
        kind: type[sa.exc.DBAPIError] = getattr(sa.exc, type(error).__name__, sa.exc.DBAPIError)
        raise kind(text, rows, error, hide_parameters=True) from error
    finally:
        cursor.close()


def _writing(tx: Connection) -> DBAPIConnection:
    """Return the driver's connection, which must be in a transaction: else it would commit each statement by itself.

    SQLite ends a transaction of its own accord where the disk is full.
    """
    driver = tx.connection
    if not driver.in_transaction:
        raise sa.exc.OperationalError(None, None, sqlite3.OperationalError("the transaction has ended"))
    return driver


def _only(rows: Sequence[Sequence[Any]]) -> Sequence[Any] | None:
    if len(rows) > 1:
        raise sa.exc.MultipleResultsFound("there are several rows")
    return rows[0] if rows else None


def _converted(row: Sequence[Any], converts: Sequence[_Convert | None]) -> Sequence[Any]:
    return [value if to is None else to(value) for value, to in zip(row, converts, strict=True)]


def _text_of(compiled: Any, dialect: Dialect, defaults: Values) -> _Text:
    binds = [(name, compiled.binds[name]) for name in compiled.positiontup]  # a name can come more than once
    fixed = {name: bind.value for name, bind in binds if not bind.required}
    return _Text(str(compiled), [(name, _bind(bind.type, dialect)) for name, bind in binds], {**fixed, **defaults})


def _bind(kind: sa.types.TypeEngine[Any], dialect: Dialect) -> _Convert | None:
    """Return how a value of this type is converted for the driver, ``None`` if it is not."""
    convert = kind.dialect_impl(dialect).bind_processor(dialect)
    if convert is not None and kind.python_type is datetime:
        return _of_times.setdefault((type(kind), type(dialect)), lru_cache(_KEPT)(convert))
    if convert is not None and issubclass(kind.python_type, StrEnum):
        return lru_cache(len(kind.python_type))(convert)
    return convert
