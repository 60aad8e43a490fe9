"""Which process runs jobs: one of a node for what the node does, one of all nodes for what is done once.

The kernel, or the database, gives the lock of a process that dies to another one. A process that is stopped, or hangs,
keeps it: so the one that leads gives signs of life, and without these another stands in.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from core.files import FileLock
from store import leaders
from store.database import Database
from store.scope import ALL_TENANTS

SILENT_SECONDS = 60.0  # a job may take long, so silence counts only after this time
SIGN_SECONDS = 10.0  # between two signs of life in the database
PATIENCE_SECONDS = 10.0  # for which a node waits, at once the next one when the node that leads is gone


class Leadership(Protocol):
    """Who leads, as one process sees it."""

    def try_lead(self) -> AbstractContextManager[bool]:
        """Lead if nobody does; yields whether this process does."""

    def try_stand_in(self) -> AbstractContextManager[bool]:
        """Stand in for the one that leads if nobody does; yields whether this process does."""

    def goes_on(self) -> bool:
        """Return whether the one that leads still does, after a sign of life."""

    def is_silent(self) -> bool:
        """Return whether the one that leads has given no sign of life for ``SILENT_SECONDS``."""


def leadership_of(database: Database, folder: Path, lock: str, *, of_all: bool) -> Leadership:
    """Return who leads by a lock, among the processes of a data folder, or ``of_all`` nodes on the database."""
    return _OfNodes(database, lock) if of_all and not database.is_sqlite else _OfNode(folder / lock)


class _OfNode:
    """Leads by a file; the time of its last change is the last sign of life."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._leader, self._stand_in = FileLock(path), FileLock(path.with_suffix(".stand-in.lock"))

    def try_lead(self) -> AbstractContextManager[bool]:
        return self._leader.try_hold()

    def try_stand_in(self) -> AbstractContextManager[bool]:
        return self._stand_in.try_hold()

    def goes_on(self) -> bool:
        with contextlib.suppress(OSError):
            os.utime(self._path, (time.time(), time.time()))
        return True

    def is_silent(self) -> bool:
        return abs(time.time() - self._path.stat().st_mtime) > SILENT_SECONDS


class _OfNodes:
    """Leads by a lock of the installation; signs of life are a row, with times of the database's clock."""

    def __init__(self, database: Database, name: str) -> None:
        self._database, self._name = database, name
        self._leader = database.locks.of(name)
        self._stand_in = database.locks.of(str(Path(name).with_suffix(".stand-in.lock")))
        self._signed_at = -math.inf

    def try_lead(self) -> AbstractContextManager[bool]:
        return self._leader.try_hold(PATIENCE_SECONDS)

    def try_stand_in(self) -> AbstractContextManager[bool]:
        return self._stand_in.try_hold()

    def goes_on(self) -> bool:
        if not self._leader.is_held():
            return False
        if time.monotonic() - self._signed_at >= SIGN_SECONDS:
            with self._database.transaction(durable=False, sees=ALL_TENANTS) as tx:
                leaders.sign_of_life(tx, self._name)
            self._signed_at = time.monotonic()
        return True

    def is_silent(self) -> bool:
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            return leaders.is_silent(tx, self._name, SILENT_SECONDS)
