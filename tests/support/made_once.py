"""What the portals of one process make alike, once for all: compiled SQL, routes, the statements of the schema."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.engine import Connection, Engine
from werkzeug.routing import Rule

from store import database, schema

_compiled: dict[Any, Any] = {}
_kinds: dict[type, type] = {}
_rules: dict[tuple[str, str, frozenset[str]], dict[str, Any]] = {}
_migrations: dict[tuple[str, str, Path], list[tuple[str, Any]]] = {}
_migrate = schema.upgrade


def _alike(kind: type) -> type:
    """A dialect whose instances are one key of the cache: the portal gives all engines of a kind the same options."""
    if kind not in _kinds:
        same = {"__eq__": lambda self, other: type(self) is type(other), "__hash__": lambda _self: hash(kind)}
        _kinds[kind] = type(kind.__name__, (kind,), same)
        _kinds[kind].supports_statement_cache = True  # type: ignore[attr-defined]
    return _kinds[kind]


class _Rule(Rule):
    """A rule that has what the first one of its kind made of the same path."""

    def compile(self) -> None:
        key = self.rule, str(self.endpoint), frozenset(self.methods or ())
        if key not in _rules:
            super().compile()
            _rules[key] = dict(vars(self))
        vars(self).update(_rules[key] | {"map": self.map})


def _upgrade(tx: Connection, wanted: str) -> None:
    """Give an empty database the schema by the statements that the migrations executed on the first one."""
    key = tx.dialect.name, wanted, schema.MIGRATIONS
    if schema.revision(tx) is not None:
        _migrate(tx, wanted)
    elif key in _migrations:
        for statement, parameters in _migrations[key]:
            tx.exec_driver_sql(statement, parameters)
    else:
        executed: list[tuple[str, Any]] = []
        with _noting(tx, executed):
            _migrate(tx, wanted)
        _migrations[key] = executed


@contextmanager
def _noting(tx: Connection, executed: list[tuple[str, Any]]) -> Iterator[None]:
    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        assert not many
        reads = statement.startswith("SELECT") or (statement.startswith("PRAGMA") and "=" not in statement)
        if not reads:
            executed.append((statement, parameters))

    sa.event.listen(tx, "before_cursor_execute", note)
    yield
    sa.event.remove(tx, "before_cursor_execute", note)


@contextmanager
def made_once() -> Iterator[None]:
    """Let the engines and the applications that are created in the ``with`` block share what they make alike."""
    create = database.create_engine

    def create_engine(url: str, threads: int, folder: Path | None = None) -> Engine:
        engine = create(url, threads, folder)
        engine.dialect.__class__ = _alike(type(engine.dialect))
        engine.update_execution_options(compiled_cache=_compiled)
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "create_engine", create_engine)
        patch.setattr(Flask, "url_rule_class", _Rule)
        patch.setattr(schema, "upgrade", _upgrade)
        yield
