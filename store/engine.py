"""Connections to SQLite and PostgreSQL, set up so that a commit is durable and no thread waits without end."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.errors import _WaitTimeout
from sqlalchemy.engine import Connection, Engine

from core.errors import StartupError

# --- PostgreSQL ------------------------------------------------------------------------------------------------------

LOCK_SECONDS, STATEMENT_SECONDS, IDLE_SECONDS = 5, 30, 120
# Longer than a statement may take: only a server that is stopped or gone lets this pass.
ANSWER_SECONDS = 35.0
CONNECT_ARGUMENTS = {
    "connect_timeout": 5,
    # For a machine that is gone: 10 to 25 s.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15000,
}


class PatientConnection(psycopg.Connection[Any]):
    """A connection that is given up where the server says nothing for ``patience`` seconds; None is for ever."""

    patience: float | None = ANSWER_SECONDS

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Wait as psycopg does, but with a limit; raises ``psycopg.OperationalError`` past it."""
        if timeout is not None:
            return super().wait(gen, interval, timeout)
        try:
            return super().wait(gen, interval, self.patience)
        except _WaitTimeout:
            self.pgconn.finish()
            raise psycopg.OperationalError("the server does not answer") from None


def set_up(engine: Engine) -> None:
    """Have an engine make such connections, durable ones whatever the server's default is."""
    sa.event.listen(engine, "do_connect", _connect)
    sa.event.listen(engine, "connect", _on_connect)


@contextmanager
def unhurried(connection: Connection) -> Iterator[None]:
    """Let a transaction take the time it takes: a migration may."""
    driver: Any = connection.connection.driver_connection
    driver.patience = None
    try:
        connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
        connection.execute(sa.text("SET LOCAL lock_timeout = 0"))
        yield
    finally:
        driver.patience = ANSWER_SECONDS


def _connect(_dialect: object, _record: object, arguments: list[Any], parameters: dict[str, Any]) -> PatientConnection:
    return PatientConnection.connect(*arguments, **parameters)


def _on_connect(connection: PatientConnection, _record: object) -> None:
    # "off" loses acknowledged commits when the server dies; what else the server may be set to is stricter than "on".
    settings = {
        "lock_timeout": f"{LOCK_SECONDS}s",
        "statement_timeout": f"{STATEMENT_SECONDS}s",
        "idle_in_transaction_session_timeout": f"{IDLE_SECONDS}s",
    }
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
        for name, value in settings.items():
            cursor.execute("SELECT set_config(%s, %s, false)", (name, value))
    connection.commit()


# --- Engines ---------------------------------------------------------------------------------------------------------

BUSY_TIMEOUT_SECONDS = 5.0
LOCKED_SECONDS = 0.2  # what a writer waits where the last one waited in vain
# How many connections a process may hold beside those of its request threads: passes, jobs, probes.
SPARE_CONNECTIONS = 8


def create_engine(url: str, threads: int) -> Engine:
    """An engine for a SQLite or PostgreSQL URL with connections for ``threads`` and some more; no connection is made.

    Raises ``StartupError`` where the URL cannot be read.
    """
    if url.startswith("postgresql://"):
        url = "postgresql+psycopg://" + url.removeprefix("postgresql://")
    options: dict[str, Any] = {
        "pool_size": threads + SPARE_CONNECTIONS,
        "max_overflow": 0,
        "pool_use_lifo": True,  # the connection used last has its pages and statements at hand
        "hide_parameters": True,  # they would stand in tracebacks
        "pool_timeout": BUSY_TIMEOUT_SECONDS,
    }
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False}
    else:
        options["connect_args"] = dict(CONNECT_ARGUMENTS)
        options["pool_pre_ping"] = True
    try:
        engine = sa.create_engine(url, **options)
    except sa.exc.ArgumentError as error:
        raise StartupError("PORTAL_DATABASE_URL cannot be read as a database URL.") from error
    if engine.dialect.name == "sqlite":
        # SQLite would make it with the process's umask; its WAL takes over the file's mode.
        os.close(os.open(engine.url.database or "", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        sa.event.listen(engine, "connect", _on_sqlite_connect)
        sa.event.listen(engine, "begin", _on_sqlite_begin)
    else:
        set_up(engine)
    return engine


def _on_sqlite_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late: see _on_sqlite_begin
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # NORMAL loses acknowledged commits at a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA secure_delete = ON")  # a delivered bundle is overwritten, not only forgotten
    cursor.execute("PRAGMA trusted_schema = OFF")
    cursor.close()


def _on_sqlite_begin(connection: Connection) -> None:
    # A writer takes the write lock at once: a reader that turns writer half-way can fail for no fault of its own.
    seconds = connection.get_execution_options().get("portal_writes")
    if seconds is None:
        connection.exec_driver_sql("BEGIN")
    elif seconds > BUSY_TIMEOUT_SECONDS - 0.5:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(seconds * 1000)}")
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        finally:
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_SECONDS * 1000)}")


def is_damage(error: sa.exc.DatabaseError) -> bool:
    """Whether SQLite says that its file is no database or does not hold together."""
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF  # the primary one, without what makes it an extended one
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
