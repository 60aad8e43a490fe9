"""Transactions that callers share: one disk sync serves all that wait, and one call writes what is alike.

On SQLite writers take turns, so that callers wait for theirs in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Condition, Lock, local
from typing import Any, Generic, TypeVar

from sqlalchemy.engine import Connection

# How long one that could write waits for those that are about to: of two transactions each costs what one costs that
# has the rows of both.
MAX_WAIT_SECONDS = 0.005
Item = TypeVar("Item")
Result = TypeVar("Result")


class _Request(Generic[Item, Result]):
    """The work of one caller, and what became of it."""

    def __init__(self, work: Callable[[Connection, Sequence[Item]], Sequence[Result]], item: Item) -> None:
        self.work = work
        self.item = item
        self.results: list[Result] = []
        self.error: BaseException | None = None
        self.done = False
        self._turn = Lock()
        self._turn.acquire()

    def wait(self) -> bool:
        """Wait until the work is done, or it is the caller's turn to lead; return whether it is done."""
        self._turn.acquire()
        return self.done

    def wake(self) -> None:
        """End the caller's wait, or have it not wait at all."""
        self._turn.release()

    def run_in_savepoint(self, tx: Connection) -> None:
        """Do the work; if it fails, undo only its own changes and keep the error for its caller."""
        savepoint = tx.begin_nested()
        try:
            _run_all([self], tx)
        except BaseException as error:
            savepoint.rollback()
            if not isinstance(error, Exception):
                raise
            self.error = error
        else:
            savepoint.commit()

    def outcome(self) -> Result:
        """Return the result of the work, or raise its error."""
        if self.error is not None:
            raise self.error
        return self.results[0]


class SharedTransactions:
    """Runs the work of all callers that wait for the write lock in one transaction, so that one disk sync serves all.

    ``transaction`` opens a transaction that writes. A caller returns only after the commit that contains its work is
    durable, as with a transaction of its own.
    """

    def __init__(self, transaction: Callable[[], AbstractContextManager[Connection]]) -> None:
        self._transaction = transaction
        self._lock = Lock()
        self._waiting: list[_Request[Any, Any]] = []
        self._is_led = False  # whether a caller leads, who lets the first of those that wait lead after it
        self._preparing = 0  # callers that will come soon
        self._all_have_come = Condition()
        self._own = local()  # whether a thread is one of them

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Prepare in the body of the ``with`` what ``run`` is to write: who writes meanwhile waits a moment for it."""
        with self._all_have_come:
            self._preparing += 1
        self._own.prepares = True
        try:
            yield
        finally:
            self._has_come()

    def _has_come(self) -> None:
        if getattr(self._own, "prepares", False):
            self._own.prepares = False
            with self._all_have_come:
                self._preparing -= 1
                if not self._preparing:
                    self._all_have_come.notify()

    def run(self, work: Callable[[Connection, Sequence[Item]], Sequence[Result]], item: Item) -> Result:
        """Run ``work`` in a transaction that others may share; return its result for ``item``, or raise its error.

        It is given the items of all callers with an equal one, and returns a result for each. It runs a second time,
        for each item by itself, if the work of a caller in the same transaction failed. It must therefore do nothing
        but write to the database.
        """
        request = _Request(work, item)
        with self._lock:
            self._waiting.append(request)
            leads, self._is_led = not self._is_led, True
        self._has_come()
        # Not for a lock that all take in turn: one whose work is done would wait for whoever leads next.
        if leads or not request.wait():
            try:
                self._lead()
            finally:
                self._let_next_lead()
        return request.outcome()

    def _let_next_lead(self) -> None:
        with self._lock:
            following = self._waiting[:1]
            self._is_led = bool(following)
        for request in following:
            request.wake()

    def _lead(self) -> None:
        """Commit the work of all callers that wait."""
        requests: list[_Request[Any, Any]] = []
        several_work = False
        try:
            with self._all_have_come:
                self._all_have_come.wait_for(lambda: not self._preparing, MAX_WAIT_SECONDS)
            try:
                with self._transaction() as tx:
                    requests = self._take_waiting()  # only now, because others came while this one waited for the lock
                    several_work = len(requests) > 1
                    _run_all(requests, tx)
                    several_work = False
            except Exception:
                if not several_work:
                    raise
                # The work of one has failed, which is rare: a savepoint for each would cost all of them more than this.
                with self._transaction() as tx:
                    for request in requests:
                        request.run_in_savepoint(tx)
        except BaseException as error:
            if not requests:  # the transaction did not begin, so it fails for everyone who waits
                requests = self._take_waiting()
            for request in requests:
                request.error = request.error or error
            if not isinstance(error, Exception):
                raise
        finally:
            for request in requests:
                request.done = True
                request.wake()

    def _take_waiting(self) -> list[_Request[Any, Any]]:
        with self._lock:
            requests, self._waiting = self._waiting, []
        return requests


def _run_all(requests: Sequence[_Request[Any, Any]], tx: Connection) -> None:
    """Do the work of all, equal work once."""
    alike: dict[Callable[[Connection, Sequence[Any]], Sequence[Any]], list[_Request[Any, Any]]] = {}
    for request in requests:
        alike.setdefault(request.work, []).append(request)
    for work, some in alike.items():
        for request, result in zip(some, work(tx, [one.item for one in some]), strict=True):
            request.results = [result]
