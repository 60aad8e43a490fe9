"""The pages of ``core.pages`` as rows, for the nodes that share a PostgreSQL."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection

from core.pages import Layout, OpenPages
from store.database import Database
from store.node_tables import Page
from store.scope import ALL_TENANTS

_CLASS = 0x706F7276  # the first number of the advisory locks on pages
# The clock of the database, because those of the nodes differ.
_LOCK = sa.text("SELECT extract(epoch FROM clock_timestamp()) FROM pg_advisory_xact_lock(:of, :number)")
_ITS = (Page.kind == sa.bindparam("of_kind"), Page.number == sa.bindparam("of_number"))
_READ = sa.select(Page.content).where(*_ITS)
_INSERT = postgresql.insert(Page)
_WRITE = _INSERT.on_conflict_do_update(
    index_elements=[Page.kind, Page.number], set_={"content": _INSERT.excluded.content}
)


@dataclass(frozen=True, slots=True)
class _OpenRows:
    tx: Connection
    layout: Layout
    kind: str
    now: float

    def read(self, number: int) -> bytes:
        content = self.tx.execute(_READ, {"of_kind": self.kind, "of_number": number}).scalar_one_or_none()
        return self.layout.empty(number) if content is None else bytes(content)

    def write(self, number: int, content: bytes) -> None:
        self.tx.execute(_WRITE, {"kind": self.kind, "number": number, "content": content})


class PageTable:
    """Pages in the table ``pages``: at most those of the layout, so that no flood fills the disk."""

    def __init__(self, database: Database, layout: Layout) -> None:
        """Use the rows of the layout's form; PostgreSQL only."""
        self._database = database
        self._layout = layout
        self._kind = layout.form.decode("ascii")

    @contextmanager
    def open(self, number: int, now: float) -> Iterator[OpenPages]:
        """Open the pages in a transaction of their own that need not survive a crash; see ``core.pages.Pages.open``."""
        lock = zlib.crc32(f"{self._kind} {number}".encode()) >> 1
        with self._database.transaction(durable=False, sees=ALL_TENANTS) as tx:
            seconds = tx.execute(_LOCK, {"of": _CLASS, "number": lock}).scalar_one()
            yield _OpenRows(tx, self._layout, self._kind, float(seconds))
