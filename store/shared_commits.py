"""Commits of requests that wait at the same time, made together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
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

    def run(self, tx: Connection) -> None:
        """Do the work, anew if it was done before."""
        self._result = [self._work(tx)]

    def run_apart(self, tx: Connection) -> None:
        """Do the work; where it fails, only what it did is undone, and only its own caller hears of it."""
        savepoint = tx.begin_nested()
        try:
            self.run(tx)
        except BaseException as error:
            savepoint.rollback()
            if not isinstance(error, Exception):
                raise
            self.error = error
        else:
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
        """Run ``work`` in a transaction that others may share; returns its result, or raises what it raised.

        It is run once more where another's work, done before it in the same transaction, failed: so it must do nothing
        but write to the database.
        """
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
                if len(turns) == 1:
                    turns[0].run(tx)
                else:
                    _run_together(turns, tx)
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


def _run_together(turns: Sequence[_Turn[object]], tx: Connection) -> None:
    """Do the work of all as one; the rare one that fails is found by doing all of it again, each apart."""
    savepoint = tx.begin_nested()
    try:
        for turn in turns:
            turn.run(tx)
    except BaseException as error:
        savepoint.rollback()
        if not isinstance(error, Exception):
            raise
        for turn in turns:
            turn.run_apart(tx)
    else:
        savepoint.commit()
