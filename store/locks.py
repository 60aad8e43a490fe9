"""Locks of the whole installation: of the processes of a node, and of the nodes that share a database.

On SQLite an installation is one data folder, in which a file does for both. On PostgreSQL a session's advisory lock is
taken beside that file, so that of each node one process at most waits for it.

    with database.locks.of(".rollover.lock").try_hold() as held:
        if held: ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from enum import IntEnum
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from core.errors import LockUnavailable
from core.files import LOCK_SECONDS, FileLock

_LOCK = sa.text("SELECT pg_advisory_xact_lock(:number)")


class InstallationLock(IntEnum):
    """What a transaction alone may decide about, by the numbers of PostgreSQL's advisory locks (8443: migrations)."""

    CLIENT_CAS = 8445  # whose certificates TLS accepts; taken before the audit head
    NODES = 8446  # which data folders they are


def lock_installation(tx: Connection, what: InstallationLock) -> None:
    """Wait until no other transaction of any tenant has this lock, and keep it until this one ends.

    SQLite has one writer at a time anyway.
    """
    if tx.dialect.name != "sqlite":
        tx.execute(_LOCK, {"number": int(what)})


class LockOfNodes(Protocol):
    """A lock between nodes: ``store.advisory.AdvisoryLock``."""

    def hold(self, timeout: float) -> AbstractContextManager[Callable[[], bool]]:
        """Wait for the lock and hold it; yields what tells whether it still is. Raises ``LockUnavailable``."""


class SharedLock:
    """A lock that one thread of one process of one node holds.

    It ends with the process, and with the machine within some ten seconds; a holder that is cut off from the database
    loses it, which ``is_held`` tells. What must not happen twice is therefore also refused by a row.
    """

    def __init__(self, path: Path, between_nodes: LockOfNodes | None) -> None:
        """Use the file ``path`` between processes; without ``between_nodes`` there is one node."""
        self._file = FileLock(path)
        self._between_nodes = between_nodes
        self._is_held: Callable[[], bool] = lambda: True

    @contextmanager
    def hold(self, timeout: float = LOCK_SECONDS) -> Iterator[None]:
        """Wait for the lock and hold it for the body of the ``with``.

        Raises ``LockUnavailable`` if it is not free within ``timeout`` seconds, or if the file or the database cannot
        be used.
        """
        deadline = time.monotonic() + timeout
        with self._file.hold(timeout):
            if self._between_nodes is None:
                yield
                return
            with self._between_nodes.hold(max(0.0, deadline - time.monotonic())) as self._is_held:
                yield

    @contextmanager
    def try_hold(self, patience: float = 0.0) -> Iterator[bool]:
        """Take the lock if it is free; yields whether it was. Raises ``LockUnavailable`` if its file is unusable.

        With ``patience`` the process that is first in its node waits so many seconds for another node to give it up.
        """
        with self._file.try_hold() as is_free, ExitStack() as stack:
            if is_free and self._between_nodes is not None:
                try:
                    self._is_held = stack.enter_context(self._between_nodes.hold(patience))
                except LockUnavailable:
                    is_free = False
            yield is_free

    def is_held(self) -> bool:
        """Tell the holder whether it still is one, which it is not once its session with the database has ended."""
        return self._is_held()


class Locks:
    """The locks of an installation, by their names, which are those of their files in the data folder."""

    def __init__(self, folder: Path, engine: Engine | None) -> None:
        """Take an engine of PostgreSQL for the locks alone, ``None`` on SQLite."""
        self._folder = folder
        self.engine = engine
        if engine is not None:
            from store import advisory

            advisory.prepare(engine)

    def of(self, name: str) -> SharedLock:
        """Return a lock that one thread in the whole installation holds."""
        return SharedLock(self._folder / name, self._between_nodes(name))

    def alone_among_nodes(self, name: str, timeout: float) -> AbstractContextManager[object]:
        """Hold a lock between nodes for the body of a ``with``, for one who holds a lock on a file of the node already.

        Raises ``LockUnavailable`` if another node holds it for longer than ``timeout`` seconds.
        """
        lock = self._between_nodes(name)
        return nullcontext() if lock is None else lock.hold(timeout)

    def _between_nodes(self, name: str) -> LockOfNodes | None:
        if self.engine is None:
            return None
        from store import advisory

        return advisory.AdvisoryLock(self.engine, name)

    def close(self) -> None:
        """Close the connections that hold no lock."""
        if self.engine is not None:
            self.engine.dispose()
