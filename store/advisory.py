"""PostgreSQL's advisory locks of a session, for what one node at a time may do.

Each lock has a connection of its own while it is held, so that no limit of a statement or a transaction ends it, and so
that it ends with the connection. Imported only where PostgreSQL is used.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from core.errors import LockUnavailable
from store.postgresql import ANSWER_SECONDS

log = logging.getLogger("portal.locks")

_CLASS = 0x706F7275  # the first number of these advisory locks; store/postgresql.py has that of data folders
# A machine that is gone is noticed by the server, too, which else keeps its locks for two hours.
_NOTICED = ("tcp_keepalives_idle", "3"), ("tcp_keepalives_interval", "2"), ("tcp_keepalives_count", "2")
_LOST = (psycopg.OperationalError, psycopg.InterfaceError, sa.exc.DBAPIError, sa.exc.TimeoutError)


def prepare(engine: Engine) -> None:
    """Let the connections of an engine be ones that hold locks, after ``store.postgresql.prepare``."""
    sa.event.listen(engine, "connect", _on_connect)


def _on_connect(connection: psycopg.Connection[Any], _record: object) -> None:
    for name, value in (*_NOTICED, ("tcp_user_timeout", "7000"), ("statement_timeout", "0")):
        connection.execute("SELECT set_config(%s, %s, false)", (name, value))


class AdvisoryLock:
    """A lock by its name, in one database."""

    def __init__(self, engine: Engine, name: str) -> None:
        """Take the connections of an engine that ``prepare`` has seen."""
        self._engine = engine
        self._name = name
        self._number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1

    @contextmanager
    def hold(self, timeout: float) -> Iterator[Callable[[], bool]]:
        """Wait for the lock and hold it; yields what tells whether it still is.

        Raises ``LockUnavailable`` if another node holds it for longer than ``timeout`` seconds, or if the database does
        not answer.
        """
        try:
            pooled = self._engine.raw_connection()
        except _LOST as error:
            raise LockUnavailable(f"The lock {self._name} cannot be taken: the database does not answer.") from error
        driver: Any = pooled.driver_connection
        is_clean = False
        try:
            is_clean = self._take(driver, timeout)
            yield lambda: _answers(driver)
        finally:
            if is_clean and _answers(driver, "SELECT pg_advisory_unlock(%s, %s)", _CLASS, self._number):
                pooled.close()
            else:
                pooled.invalidate()  # and with the connection the lock, should it be held

    def _take(self, driver: Any, timeout: float) -> bool:
        try:
            if timeout <= 0:
                (taken,) = driver.execute("SELECT pg_try_advisory_lock(%s, %s)", (_CLASS, self._number)).fetchone()
            else:
                driver.patience = ANSWER_SECONDS + timeout
                limit = f"{max(1, int(timeout * 1000))}ms"
                driver.execute("SELECT set_config('lock_timeout', %s, false)", (limit,))
                driver.execute("SELECT pg_advisory_lock(%s, %s)", (_CLASS, self._number))
                taken = True
        except psycopg.errors.LockNotAvailable:
            taken = False
        except _LOST as error:
            raise LockUnavailable(f"The lock {self._name} cannot be taken: the database does not answer.") from error
        finally:
            driver.patience = ANSWER_SECONDS
        if not taken:
            raise LockUnavailable(f"Timed out waiting for {self._name}: another node of the portal holds it.")
        return True


def _answers(driver: Any, statement: str = "SELECT true", *parameters: object) -> bool:
    """Return what a statement says, false if the session has ended."""
    try:
        return bool(driver.execute(statement, parameters).fetchone()[0])
    except _LOST:
        return False
