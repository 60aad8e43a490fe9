"""How the portal connects to PostgreSQL: with limits on all that it waits for, and durable commits.

Imported only where PostgreSQL is used, since its driver takes a while to load.
"""

from __future__ import annotations

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
from core.server_command import server_command
from store import scope

LOCK_SECONDS, STATEMENT_SECONDS, IDLE_SECONDS = 5, 30, 120
# Longer than any statement may take: only a server that is stopped or gone stays silent for this long.
ANSWER_SECONDS = 35.0
FOLDERS = 0x706F7274  # the first number of the advisory locks that stand for data folders
# The numbers are signed where a lock is taken, and unsigned where it is listed: both are below 2**31.
_OTHER_FOLDERS = (
    "SELECT FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND classid = %s AND objid <> %s AND granted"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
NO_NODE = (
    "{} is the data folder of no node of the installation that works on this database; let an empty one join by: {},"
    " with a code of portal-server invite at another node, or set PORTAL_DATABASE_URL to a database of its own."
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
        claim = FolderClaim(folder)
        sa.event.listen(engine, "connect", claim)
        engine.update_execution_options(portal_claim=claim)
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


class FolderClaim:
    """Whose connections an engine makes: those of a data folder that is a node of the installation.

    Each holds a lock for its folder as long as it lasts, by which others see that the node works.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.is_node = False  # once it has entered the installation: from then on it is refused if it is none any more

    def __call__(self, connection: PatientConnection, _record: object) -> None:
        """Refuse a connection of a data folder that may not work on the database; raises ``DatabaseInUse``.

        A node has a broker beside it, and nothing is enforced before each broker that is recorded enforces it: that of
        a folder which is no node would be said to refuse devices that it lets in.
        """
        number = folder_number(self._folder)
        try:
            connection.execute("SELECT pg_advisory_lock_shared(%s, %s)", (FOLDERS, number))
            if not self._is_allowed(connection, number):
                raise DatabaseInUse(NO_NODE.format(self._folder, server_command("join")))
        except BaseException:
            connection.close()  # SQLAlchemy does not, where a listener fails
            raise

    def _is_allowed(self, connection: PatientConnection, number: int) -> bool:
        any_node, its_own = _nodes(connection, number)
        return its_own or (not (any_node and self.is_node) and not other_folders(connection, number))


def _nodes(connection: psycopg.Connection[Any], number: int) -> tuple[bool, bool]:
    """Return whether there is any node, and whether one has the folder of that number."""
    # There may be no such table yet, or not for this role: the owner of the tables lets it use them when it migrates.
    may_read = "SELECT coalesce(has_table_privilege(to_regclass('nodes'), 'SELECT'), false)"
    (is_readable,) = connection.execute(may_read).fetchone() or (False,)
    if not is_readable:
        return False, False
    query = "SELECT count(*) > 0, coalesce(bool_or(folder = %s), false) FROM nodes"
    return connection.execute(query, (number,)).fetchone() or (False, False)


def other_folders(connection: psycopg.Connection[Any], number: int) -> bool:
    """Return whether a portal with another data folder than that of a number has a connection to the database."""
    return connection.execute(_OTHER_FOLDERS, (FOLDERS, number)).fetchone() is not None


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
