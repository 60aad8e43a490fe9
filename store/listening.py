"""What a node tells the others at a commit, by PostgreSQL's LISTEN and NOTIFY: that brokers have something to reach."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import psycopg
import sqlalchemy as sa

from core.errors import PortalError
from store.database import Database

log = logging.getLogger("portal.nodes")

CHANNEL = "portal_generation"
POLL_SECONDS = 1.0  # after which the listener looks by itself: what is told may be lost with a connection
# With one broker nobody else has anything to do. As a part of the statement that advances, it costs no wait of its own.
TOLD: sa.ColumnElement[str] = sa.literal_column(
    f"CASE WHEN EXISTS (SELECT FROM brokers OFFSET 1) THEN CAST(pg_notify('{CHANNEL}', '') AS text) END"
)
_LOST = (psycopg.Error, sa.exc.DBAPIError, sa.exc.TimeoutError, PortalError, OSError)


def listen(database: Database, heard: Callable[[], None], stopping: threading.Event) -> None:
    """Call ``heard`` when another process has told something, and each second; the body of a thread.

    Runs until ``stopping`` is set, over losses of the connection. PostgreSQL only.
    """
    while not stopping.is_set():
        try:
            _listen(database, heard, stopping)
        except _LOST as error:
            log.warning("other nodes are not heard", extra={"problem": str(error).partition("\n")[0]})
            stopping.wait(POLL_SECONDS)


def _listen(database: Database, heard: Callable[[], None], stopping: threading.Event) -> None:
    engine = database.locks.engine
    if engine is None:
        return
    pooled = engine.raw_connection()
    driver: Any = pooled.driver_connection
    try:
        driver.execute(f"LISTEN {CHANNEL}")
        while not stopping.is_set():
            heard()
            for _ in driver.notifies(timeout=POLL_SECONDS, stop_after=1):
                pass
    finally:
        pooled.invalidate()  # it listens, which no lock should
