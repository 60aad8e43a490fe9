"""Databases for tests, in the PostgreSQL that the tests were given."""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import sqlalchemy as sa

RUNNING_ROLE = "portal_running"
POSTGRES_URL = os.environ.get("PORTAL_TEST_POSTGRES_URL", "")


def administrate(statement: str) -> None:
    """Run a statement outside any transaction, as CREATE DATABASE needs it."""
    engine = sa.create_engine(POSTGRES_URL, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()


def url_of(database: str) -> str:
    return sa.make_url(POSTGRES_URL).set(database=database).render_as_string(hide_password=False)


def running_url_of(database: str) -> str:
    """The URL of a database for a role that owns nothing, as a portal should run, which row-level security holds."""
    _make_running_role()
    return sa.make_url(POSTGRES_URL).set(database=database, username=RUNNING_ROLE).render_as_string(hide_password=False)


@functools.cache
def _make_running_role() -> None:
    # Another process of the tests may be making it.
    administrate(
        f"DO $$ BEGIN CREATE ROLE {RUNNING_ROLE} LOGIN; EXCEPTION WHEN duplicate_object OR unique_violation THEN END $$"
    )


def create_database(template: str = "template1") -> str:
    """Make a database and return its name."""
    name = f"portal_{uuid.uuid4().hex[:12]}"
    administrate(f"CREATE DATABASE {name} TEMPLATE {template}")
    return name


def drop_database(name: str) -> None:
    administrate(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def postgres_database() -> Iterator[str]:
    """The URL of an empty database, for the body of a ``with``."""
    name = create_database()
    yield url_of(name)
    drop_database(name)


class DatabaseCopies:
    """Copies of a database, each lent to one test at a time.

    To create one takes PostgreSQL 0.1 s of processor time. So a copy that a test gives back is reset to the rows of the
    template, in milliseconds, and lent again; it is dropped instead if the test changed its schema or made it large.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        self._idle: list[str] = []
        self._lent: list[str] = []
        with psycopg.connect(_libpq_url(template), autocommit=True) as connection:
            self._schema = _schema_of(connection)
            self._tables = [name for (name,) in connection.execute(_TABLES)]
            self._rows = {table: _copied(connection, table) for table in self._tables}
            self._sequences = connection.execute(_SEQUENCES).fetchall()

    def lend(self) -> str:
        """Return the name of a database that equals the template."""
        name = self._idle.pop() if self._idle else create_database(self._template)
        self._lent.append(name)
        return name

    def give_back(self, name: str) -> None:
        self._lent.remove(name)
        reset = False
        with contextlib.suppress(psycopg.Error):
            reset = self._reset(name)
        if reset:
            self._idle.append(name)
        else:
            drop_database(name)

    def close(self) -> None:
        """Drop the copies and the template."""
        for name in (*self._idle, *self._lent, self._template):
            drop_database(name)

    def _reset(self, name: str) -> bool:
        with psycopg.connect(_libpq_url(name), autocommit=True) as connection:
            connection.execute(_END_OTHERS)
            if _schema_of(connection) != self._schema:
                return False
            with connection.transaction():
                connection.execute("SET LOCAL session_replication_role = replica")  # no triggers, no foreign keys
                deletes = (f"DELETE FROM {table}" for table in self._tables)  # noqa: S608 - names from the catalogue
                connection.execute("; ".join(deletes).encode())
                for table, rows in self._rows.items():
                    if rows:
                        with connection.cursor().copy(f"COPY {table} FROM STDIN".encode()) as copy:
                            copy.write(rows)
                for sequence, value in self._sequences:
                    connection.execute("SELECT setval(%s, coalesce(%s, 1), %s)", (sequence, value, value is not None))
        return True


_MAX_BYTES = 32 * 1024 * 1024  # of a copy that is lent again
_END_OTHERS = (
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)
_TABLES = "SELECT quote_ident(tablename) FROM pg_tables WHERE schemaname = 'public'"
_SEQUENCES = "SELECT quote_ident(sequencename), last_value FROM pg_sequences WHERE schemaname = 'public'"
# Object identifiers are those of the template, so a table that was dropped and created again differs. A table that was
# analysed with many rows differs, too.
_SCHEMA = """
    SELECT md5(string_agg(item, ' ' ORDER BY item)), pg_database_size(current_database()) FROM (
        SELECT concat('column', attrelid, attname, atttypid, attnotnull, attisdropped, reltuples > 1000) AS item
            FROM pg_attribute JOIN pg_class c ON c.oid = attrelid WHERE relnamespace = 'public'::regnamespace
        UNION ALL SELECT concat('constraint', oid, conrelid, conname) FROM pg_constraint
            WHERE connamespace = 'public'::regnamespace
        UNION ALL SELECT concat('trigger', oid, tgrelid, tgname, tgenabled) FROM pg_trigger
        UNION ALL SELECT concat('function', oid, md5(prosrc)) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    ) AS items
"""


def _libpq_url(database: str) -> str:
    url = sa.make_url(POSTGRES_URL).set(drivername="postgresql", database=database)
    return url.render_as_string(hide_password=False)


def _schema_of(connection: psycopg.Connection[Any]) -> tuple[str, bool]:
    """Return a digest of everything in the schema, and whether the database is small."""
    digest, size = connection.execute(_SCHEMA).fetchone() or ("", 0)
    return digest, size < _MAX_BYTES


def _copied(connection: psycopg.Connection[Any], table: str) -> bytes:
    with connection.cursor().copy(f"COPY {table} TO STDOUT".encode()) as copy:
        return b"".join(map(bytes, copy))
