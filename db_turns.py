"""Commits of requests that wait at the same time, made together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

from sqlalchemy.engine import Connection

Result = TypeVar("Result")


class _Turn(Generic[Result]):
    """One request's part of a shared transaction."""

    def __init__(self, work: Callable[[Connection], Result]) -> None:
        self._work = work
        self._result: list[Result] = []
        self.error: BaseException | None = None
        self.done = False

    def run(self, tx: Connection, *, alone: bool) -> None:
        """Do the work; where it fails, only what it did is undone, and only its own caller hears of it."""
        savepoint = None if alone else tx.begin_nested()
        try:
            self._result.append(self._work(tx))
        except Exception as error:
            if savepoint is None:
                raise
            savepoint.rollback()
            self.error = error
        else:
            if savepoint is not None:
                savepoint.commit()

    def outcome(self) -> Result:
        if self.error is not None:
            raise self.error
        return self._result[0]


class SharedTransactions:
    """Whoever gets the database's write lock commits for all who wait: one sync to the disk for many requests.

    ``transaction`` opens a transaction that writes. A caller returns only once the commit that holds its work is
    durable, exactly as with a transaction of its own.
    """

    def __init__(self, transaction: Callable[[], AbstractContextManager[Connection]]) -> None:
        self._transaction = transaction
        self._lock = threading.Lock()
        self._waiting: list[_Turn[object]] = []
        self._leader = threading.Lock()

    def run(self, work: Callable[[Connection], Result]) -> Result:
        """Run ``work`` in a transaction that others may share; returns its result, or raises what it raised."""
        turn = _Turn(work)
        with self._lock:
            self._waiting.append(turn)  # type: ignore[arg-type]  # a list of turns with results of any type
        with self._leader:
            if not turn.done:
                self._lead()
        return turn.outcome()

    def _lead(self) -> None:
        turns: list[_Turn[object]] = []
        try:
            with self._transaction() as tx:
                with self._lock:  # only now: while this one waited for the write lock, others came
                    turns, self._waiting = self._waiting, []
                for turn in turns:
                    turn.run(tx, alone=len(turns) == 1)
        except BaseException as error:
            if not turns:  # the transaction did not even begin: none of those who wait gets one
                with self._lock:
                    turns, self._waiting = self._waiting, []
            for turn in turns:
                turn.error = turn.error or error
            if not isinstance(error, Exception):
                raise
        finally:
            for turn in turns:
                turn.done = True
