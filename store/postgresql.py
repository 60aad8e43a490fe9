"""How the portal connects to PostgreSQL: with limits on all that it waits for, and durable commits.

Imported only where PostgreSQL is used, since its driver takes a while to load.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from core.errors import DatabaseInUse
from core.files import folder_number
from store import scope

LOCK_SECONDS, STATEMENT_SECONDS, IDLE_SECONDS = 5, 30, 120
# Longer than any statement may take: only a server that is stopped or gone stays silent for this long.
ANSWER_SECONDS = 35.0
_FOLDERS = 0x706F7274  # the first number of the advisory locks that stand for data folders
# The numbers are signed where a lock is taken, and unsigned where it is listed: both are below 2**31.
_OTHER_FOLDERS = (
    "SELECT FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND classid = %s AND objid <> %s AND granted"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
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


def prepare(engine: Engine, folder: Path | None) -> None:
    """Let the engine make its connections in this way, for the portal of a data folder if one is given."""
    sa.event.listen(engine, "do_connect", _connect)
    sa.event.listen(engine, "connect", _on_connect)
    if folder is not None:
        sa.event.listen(engine, "connect", functools.partial(_claim, folder))
    sa.event.listen(engine, "begin", _on_begin)


def _connect(_dialect: object, _record: object, arguments: list[Any], parameters: dict[str, Any]) -> PatientConnection:
    return PatientConnection.connect(*arguments, **parameters)


def _on_begin(connection: Connection) -> None:
    """Begin a transaction with its settings, which end with it, in one message to the server."""
    # The driver would send BEGIN by itself, and then each setting: a wait for the server for every one. psycopg's
    # pipeline mode would send all at once, too, and takes twice as long as these reads do.
    options, tenant = connection.get_execution_options(), scope.scope_of(connection)
    reads = " ISOLATION LEVEL REPEATABLE READ READ ONLY" if options.get("portal_reads") else ""
    lasts = "" if options.get("portal_durable", True) else "; SET LOCAL synchronous_commit = off"
    driver: Any = connection.connection.driver_connection
    try:
        driver.execute(f"BEGIN{reads}; SET LOCAL {scope.SETTING} = '{tenant}'{lasts}", prepare=False)
    except psycopg.OperationalError as error:
        raise sa.exc.OperationalError("BEGIN", None, error) from error


def _claim(folder: Path, connection: PatientConnection, _record: object) -> None:
    """Hold a lock for the data folder as long as the connection lasts, and refuse it if another folder has one.

    A data folder has a broker beside it, and the database says what one broker enforces: a second one would be said to
    refuse devices that it lets in.
    """
    number = folder_number(folder)
    connection.execute("SELECT pg_advisory_lock_shared(%s, %s)", (_FOLDERS, number))
    if connection.execute(_OTHER_FOLDERS, (_FOLDERS, number)).fetchone() is not None:
        connection.close()
        raise DatabaseInUse(
            "A portal with another data folder works on this database, which knows one broker only; stop that one, or"
            " set PORTAL_DATABASE_URL to a database of its own."
        )


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
    connection.autocommit = True  # from now on transactions begin by _on_begin
