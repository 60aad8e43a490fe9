"""What a node tells the others at a commit, by PostgreSQL's LISTEN and NOTIFY: that brokers have something to reach."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from core.errors import PortalError
from store.database import Database
from store.scope import ALL_TENANTS

log = logging.getLogger("portal.nodes")

CHANNEL = "portal_generation"
WAITS = "waits"  # what is told if a request waits at the node that tells
POLL_SECONDS = 1.0  # after which the listener looks by itself: what is told may be lost with a connection
# With one broker nobody else has anything to do. As a part of the statement that advances, it costs no wait of its own.
TOLD: sa.ColumnElement[str] = sa.literal_column(
    f"CASE WHEN EXISTS (SELECT FROM brokers OFFSET 1) THEN CAST(pg_notify('{CHANNEL}', '') AS text) END"
)
_HURRY = sa.text(f"SELECT pg_notify('{CHANNEL}', '{WAITS}')")


def hurry(database: Database) -> None:
    """Tell the other nodes that a request waits for their brokers; PostgreSQL only."""
    with database.transaction(durable=False, sees=ALL_TENANTS) as tx:
        tx.execute(_HURRY)


def listen(database: Database, heard: Callable[[bool], None], stopping: threading.Event) -> None:
    """Call ``heard`` when another process has told something, and each second; the body of a thread.

    It is given whether a request waits at another node.

    Runs until ``stopping`` is set, over losses of the connection. PostgreSQL only.
    """
    import psycopg  # takes a while to load, and every start imports this module

    while not stopping.is_set():
        try:
            _listen(database, heard, stopping)
        except (psycopg.Error, sa.exc.DBAPIError, sa.exc.TimeoutError, PortalError, OSError) as error:
            log.warning("other nodes are not heard", extra={"problem": str(error).partition("\n")[0]})
            stopping.wait(POLL_SECONDS)


def _listen(database: Database, heard: Callable[[bool], None], stopping: threading.Event) -> None:
    engine = database.locks.engine
    if engine is None:
        return
    pooled = engine.raw_connection()
    driver: Any = pooled.driver_connection
    try:
        driver.execute(f"LISTEN {CHANNEL}")
        waits = False
        while not stopping.is_set():
            heard(waits)
            told = [one.payload for one in driver.notifies(timeout=POLL_SECONDS, stop_after=1)]
            waits = WAITS in told
    finally:
        pooled.invalidate()  # it listens, which no lock should
