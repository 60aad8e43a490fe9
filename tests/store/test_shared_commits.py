"""Commits made together: durable for each, undone for the one that failed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from store.database import Database
from store.shared_commits import SharedTransactions


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path / 'portal.db'}", lock_path=tmp_path / "lock", threads=8)
    with made.transaction() as tx:
        tx.exec_driver_sql("CREATE TABLE seen (number INTEGER PRIMARY KEY)")
    yield made
    made.close()


def seen(database: Database) -> set[int]:
    with database.snapshot() as tx:
        return set(tx.execute(sa.text("SELECT number FROM seen")).scalars())


def insert(number: int) -> Callable[[Connection], int]:
    def work(tx: Connection) -> int:
        tx.exec_driver_sql("INSERT INTO seen VALUES (?)", (number,))
        return number

    return work


class Gate:
    """Opens transactions of a database once ``open`` is set, and counts them."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.open = threading.Event()
        self.waiting = threading.Event()
        self.opened = 0
        self.fails: Exception | None = None

    def transaction(self) -> AbstractContextManager[Connection]:
        @contextmanager
        def begin() -> Iterator[Connection]:
            self.waiting.set()
            assert self.open.wait(10)
            self.opened += 1
            with self.database.transaction() as tx:
                yield tx
                if self.fails is not None:
                    raise self.fails

        return begin()


def together(gate: Gate, works: list[Callable[[Connection], int]]) -> list[Future[int]]:
    """Have all of them wait before the first transaction begins; returns what became of each."""
    shared = SharedTransactions(gate.transaction)
    pool = ThreadPoolExecutor(len(works))
    first = pool.submit(shared.run, works[0])
    assert gate.waiting.wait(10)
    queued = threading.Semaphore(0)

    def enter(work: Callable[[Connection], int]) -> int:
        queued.release()
        return shared.run(work)

    others = [pool.submit(enter, work) for work in works[1:]]
    for _ in others:
        assert queued.acquire(timeout=10)
    gate.open.set()
    pool.shutdown(wait=True)
    return [first, *others]


def test_all_who_wait_are_committed(database: Database) -> None:
    gate = Gate(database)
    results = [future.result() for future in together(gate, [insert(number) for number in range(6)])]
    assert results == list(range(6))
    assert seen(database) == set(range(6))
    assert 1 <= gate.opened <= 6


def test_one_that_fails_is_undone_and_hurts_no_other(database: Database) -> None:
    def fail(tx: Connection) -> int:
        insert(100)(tx)
        insert(0)(tx)
        return 100

    futures = together(Gate(database), [insert(0), fail, insert(1), insert(2)])
    with pytest.raises(sa.exc.IntegrityError):
        futures[1].result()
    assert [futures[number].result() for number in (0, 2, 3)] == [0, 1, 2]
    assert seen(database) == {0, 1, 2}


def test_where_the_commit_fails_nobody_is_told_that_it_succeeded(database: Database) -> None:
    gate = Gate(database)
    gate.fails = OSError("no room")
    for future in together(gate, [insert(number) for number in range(4)]):
        with pytest.raises(OSError, match="no room"):
            future.result()
    assert seen(database) == set()


def test_a_failure_alone_is_raised_as_it_is(database: Database) -> None:
    insert_again = insert(7)
    database.write(insert_again)
    with pytest.raises(sa.exc.IntegrityError):
        database.write(insert_again)
    assert database.write(insert(8)) == 8
    assert seen(database) == {7, 8}


def test_work_that_was_done_is_done_again_where_anothers_failed_and_counts_once(database: Database) -> None:
    runs: list[int] = []

    def counted(tx: Connection) -> int:
        runs.append(1)
        return insert(5)(tx)

    def fail(tx: Connection) -> int:
        return insert(5)(tx)

    futures = together(Gate(database), [insert(0), counted, fail])
    outcomes = [future.exception() for future in futures]
    assert outcomes[0] is None
    assert sum(outcome is None for outcome in outcomes[1:]) == 1
    assert seen(database) == {0, 5}
    assert runs
