"""Locks of the whole installation, for what is one in it although its rows belong to tenants."""

from __future__ import annotations

from enum import IntEnum

import sqlalchemy as sa
from sqlalchemy.engine import Connection

_LOCK = sa.text("SELECT pg_advisory_xact_lock(:number)")


class InstallationLock(IntEnum):
    """What a transaction alone may decide about, by the numbers of PostgreSQL's advisory locks (8443: migrations)."""

    CLIENT_CAS = 8445  # whose certificates TLS accepts; taken before the audit head


def lock_installation(tx: Connection, what: InstallationLock) -> None:
    """Wait until no other transaction of any tenant has this lock, and keep it until this one ends.

    SQLite has one writer at a time anyway.
    """
    if tx.dialect.name != "sqlite":
        tx.execute(_LOCK, {"number": int(what)})
