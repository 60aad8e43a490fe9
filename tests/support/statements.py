"""The statements that are sent to the database, by SQLAlchemy and past it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import sqlalchemy as sa

from store import prepared


@contextmanager
def noting(engine: sa.Engine | sa.Connection, note: Callable[[str, Sequence[Any]], None]) -> Iterator[None]:
    """Have each statement of an engine that is sent in the ``with`` block noted, with the rows of its parameters."""
    execute = prepared.execute

    def by_sqlalchemy(_c: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        note(statement, parameters if many else [parameters])

    def by_driver(driver: Any, statement: str, rows: Sequence[Any] = ((),)) -> Any:
        note(statement, rows)
        return execute(driver, statement, rows)

    sa.event.listen(engine, "before_cursor_execute", by_sqlalchemy)
    with mock.patch.object(prepared, "execute", by_driver):
        yield
    sa.event.remove(engine, "before_cursor_execute", by_sqlalchemy)
