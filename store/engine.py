"""Connections to SQLite and PostgreSQL, set up so that a commit is durable and no thread waits without end."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from core.errors import StartupError

# --- PostgreSQL ------------------------------------------------------------------------------------------------------

LOCK_SECONDS, STATEMENT_SECONDS, IDLE_SECONDS = 5, 30, 120
# Longer than any statement may take: only a server that is stopped or gone stays silent for this long.
ANSWER_SECONDS = 35.0
CONNECT_ARGUMENTS = {
    "connect_timeout": 5,
    # A machine that is gone is noticed after 10 to 25 s.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15000,
}


class PatientConnection(psycopg.Connection[Any]):
    """A connection that is closed if the server says nothing for ``patience`` seconds; ``None`` waits without limit."""

    patience: float | None = ANSWER_SECONDS

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Wait as psycopg does, but with a limit; raises ``psycopg.OperationalError`` past it."""
        if timeout is not None or self.patience is None:
            return super().wait(gen, interval, timeout)
        deadline = time.monotonic() + self.patience
        try:
            return super().wait(gen, interval, self.patience)
        except psycopg.OperationalError:
            if time.monotonic() < deadline:  # an error that the server reported
                raise
            self.pgconn.finish()
            raise psycopg.OperationalError("the server does not answer") from None


def set_up(engine: Engine) -> None:
    """Make an engine open such connections, durable ones whatever the server's default is."""
    sa.event.listen(engine, "do_connect", _connect)
    sa.event.listen(engine, "connect", _on_connect)


@contextmanager
def without_time_limits(connection: Connection) -> Iterator[None]:
    """Run a transaction that may take as long as it needs, such as a migration."""
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
    # "off" loses acknowledged commits when the server crashes; every other value is at least as strict as "on".
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
LOCKED_SECONDS = 0.2  # how long a writer waits if the previous one waited in vain
# Connections of a process beside those of its request threads: for reconciliation, jobs and probes.
SPARE_CONNECTIONS = 8


def create_engine(url: str, threads: int) -> Engine:
    """Return an engine for a SQLite or PostgreSQL URL, with room for ``threads`` connections and a few more.

    It opens no connection yet. Raises ``StartupError`` if the URL cannot be read.
    """
    if url.startswith("postgresql://"):
        url = "postgresql+psycopg://" + url.removeprefix("postgresql://")
    options: dict[str, Any] = {
        "pool_size": threads + SPARE_CONNECTIONS,
        "max_overflow": 0,
        "pool_use_lifo": True,  # the connection used last has its pages and statements cached
        "hide_parameters": True,  # else they would appear in tracebacks
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
        # SQLite would create it with the process's umask. Its WAL takes over the file's mode.
        os.close(os.open(engine.url.database or "", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        sa.event.listen(engine, "connect", _on_sqlite_connect)
        sa.event.listen(engine, "begin", _on_sqlite_begin)
    else:
        set_up(engine)
    return engine


def _on_sqlite_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver would send BEGIN too late: see _on_sqlite_begin
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # NORMAL loses acknowledged commits at a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA secure_delete = ON")  # a deleted bundle is overwritten
    cursor.execute("PRAGMA trusted_schema = OFF")
    cursor.close()


def _on_sqlite_begin(connection: Connection) -> None:
    # A writer takes the write lock at once: a transaction that begins as a reader may fail at its first write.
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
    """Return whether SQLite reports that its file is corrupt or is not a database."""
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF  # the primary code, without the extended part
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
