"""Lets threads wait for the turn to write until all of them do, so that they share a transaction."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from sqlalchemy.engine import Connection

from store import shared_transactions
from store.database import Database

SECONDS = 10


class AnnouncedLock:
    """A lock that announces each thread that is about to wait for it."""

    waiting = threading.Semaphore(0)

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.waiting.release()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def announce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have databases that are opened from now on announce each thread that waits to write."""
    monkeypatch.setattr(AnnouncedLock, "waiting", threading.Semaphore(0))
    monkeypatch.setattr(shared_transactions, "Lock", AnnouncedLock)


def one_more() -> bool:
    """Return once another thread waits, whether one does."""
    return AnnouncedLock.waiting.acquire(timeout=SECONDS)


@contextmanager
def while_writing(database: Database, then: Callable[[Connection], object] = lambda _: None) -> Iterator[None]:
    """Keep the turn to write in another thread, until the block has ended and ``then`` has written."""
    begun, end = threading.Event(), threading.Event()

    def work(tx: Connection) -> object:
        begun.set()
        assert end.wait(SECONDS)
        return then(tx)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(database.write, work)
        try:
            assert begun.wait(SECONDS)
            yield
        finally:
            end.set()
        future.result(SECONDS)
