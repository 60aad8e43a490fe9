"""Lets threads wait for the turn to write until all of them do, so that they share a transaction."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pytest
from sqlalchemy.engine import Connection

from store import shared_transactions
from store.database import Database

SECONDS = 10
T = TypeVar("T")


class AnnouncedLock:
    """A lock that announces each thread that is about to wait for it."""

    waiting = threading.Semaphore(0)

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def acquire(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.waiting.release()
            self._lock.acquire()

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


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


def at_once(database: Database, calls: Sequence[Callable[[], T]]) -> list[Future[T]]:
    """Let all of them wait for the turn to write, in this order; return what became of each."""
    with ThreadPoolExecutor(len(calls)) as pool, while_writing(database):
        futures = []
        for call in calls:
            futures.append(pool.submit(call))
            assert one_more(), "it does not wait to share a transaction"
        return futures
