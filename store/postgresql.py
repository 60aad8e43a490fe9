"""Connections to PostgreSQL on which no thread waits without end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.errors import _WaitTimeout
from sqlalchemy.engine import Connection, Engine

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
