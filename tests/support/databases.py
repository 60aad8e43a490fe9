"""Databases of their own for tests, in the PostgreSQL that the tests were given."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

POSTGRES_URL = os.environ.get("PORTAL_TEST_POSTGRES_URL", "")


def administrate(statement: str) -> None:
    """Run a statement outside any transaction, as CREATE DATABASE needs it."""
    engine = sa.create_engine(POSTGRES_URL, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()


def url_of(database: str) -> str:
    return sa.make_url(POSTGRES_URL).set(database=database).render_as_string(hide_password=False)


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
