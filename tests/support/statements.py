"""One cache of compiled SQL for all databases that the tests open, each of which would else compile every statement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from store import database

_compiled: dict[Any, Any] = {}
_kinds: dict[type, type] = {}


def _alike(kind: type) -> type:
    """A dialect whose instances are one key of the cache: the portal gives all engines of a kind the same options."""
    if kind not in _kinds:
        same = {"__eq__": lambda self, other: type(self) is type(other), "__hash__": lambda _self: hash(kind)}
        _kinds[kind] = type(kind.__name__, (kind,), same)
        _kinds[kind].supports_statement_cache = True  # type: ignore[attr-defined]
    return _kinds[kind]


@contextmanager
def compiled_once() -> Iterator[None]:
    """Let the engines that are created in the ``with`` block share their compiled statements."""
    create = database.create_engine

    def create_engine(url: str, threads: int) -> Engine:
        engine = create(url, threads)
        engine.dialect.__class__ = _alike(type(engine.dialect))
        engine.update_execution_options(compiled_cache=_compiled)
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "create_engine", create_engine)
        yield
