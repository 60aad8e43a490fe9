"""Statements that every registration runs, compiled once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.sql.compiler import SQLCompiler

_Converter = Callable[[Any], Any] | None


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A statement in the words of one database, its parameters with what the driver wants made of each."""

    text: str
    positional: bool
    returns: bool
    parameters: tuple[tuple[str, _Converter], ...]
    given: Mapping[str, Any]


class Prepared:
    """A statement whose parameters are the same at each use, so that SQLAlchemy's work is done at the first one only.

    That work takes longer than SQLite's own, as does its way to the driver, so it is not taken. What a row holds is not
    converted: use it for statements that return nothing, numbers or texts.
    """

    def __init__(self, statement: sa.Insert | sa.Update | sa.Select[*tuple[Any, ...]]) -> None:
        self._statement = statement
        self._compiled: dict[str, _Compiled] = {}

    def run(self, tx: Connection, values: Mapping[str, Any]) -> Sequence[Any]:
        """Run it with ``values``: of an INSERT by column, else by the names of its parameters; returns the first row.

        That is empty where the statement returns none. Raises ``sqlalchemy.exc.DBAPIError`` as SQLAlchemy would.
        """
        dialect = tx.dialect
        made = self._compiled.get(dialect.name) or self._compile(dialect, list(values))
        if made.given:
            values = {**made.given, **values}
        parameters: Any = [
            values[name] if convert is None else convert(values[name]) for name, convert in made.parameters
        ]
        if not made.positional:
            parameters = dict(zip((name for name, _ in made.parameters), parameters, strict=True))
        cursor = tx.connection.cursor()
        try:
            cursor.execute(made.text, parameters)
            return (cursor.fetchone() if made.returns else None) or ()
        except dialect.loaded_dbapi.Error as error:
            if dialect.is_disconnect(error, tx.connection.driver_connection, cursor):
                tx.invalidate(error)
            raise sa.exc.DBAPIError.instance(
                made.text,
                parameters,
                error,
                dialect.loaded_dbapi.Error,
                hide_parameters=tx.engine.hide_parameters,
                dialect=dialect,
            ) from error
        finally:
            cursor.close()

    def _compile(self, dialect: Dialect, columns: list[str]) -> _Compiled:
        insert = isinstance(self._statement, sa.Insert)
        compiled = self._statement.compile(dialect=dialect, column_keys=columns if insert else None)
        assert isinstance(compiled, SQLCompiler)  # noqa: S101 - only schema statements compile to something else
        # What the statement says itself: numbers in its expressions, the columns' own defaults.
        given = {name: value for name, value in compiled.params.items() if value is not None}
        if insert:
            for column in compiled.insert_prefetch:
                if isinstance(column.default, sa.ColumnDefault):
                    given[column.key] = column.default.arg
        converters: Mapping[str, Any] = compiled._bind_processors
        names = compiled.positiontup if compiled.positional else list(compiled.params)
        parameters = tuple((name, converters.get(name)) for name in names or ())
        returns = isinstance(self._statement, sa.Select) or bool(compiled.effective_returning)
        made = _Compiled(str(compiled), compiled.positional, returns, parameters, given)
        self._compiled[dialect.name] = made
        return made
