"""Commits made together: durable for each caller, undone for the one that failed, and really one commit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from store import database as database_module
from store.database import Database

SECONDS = 10
NORMAL, FULL = 1, 2  # as SQLite has them
Work = Callable[[Connection], int]


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


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setattr(AnnouncedLock, "waiting", threading.Semaphore(0))
    monkeypatch.setattr(database_module, "Lock", AnnouncedLock)
    made = Database(f"sqlite:///{tmp_path / 'portal.db'}", folder=tmp_path, threads=8)
    with made.transaction() as tx:
        tx.exec_driver_sql("CREATE TABLE seen (number INTEGER PRIMARY KEY)")
    yield made
    made.close()


def seen(database: Database) -> set[int]:
    with database.snapshot() as tx:
        return set(tx.execute(sa.text("SELECT number FROM seen")).scalars())


def insert(number: int) -> Work:
    def work(tx: Connection) -> int:
        tx.exec_driver_sql("INSERT INTO seen VALUES (?)", (number,))
        return number

    return work


@contextmanager
def while_writing(database: Database) -> Iterator[None]:
    """Keep the write lock in another thread, with ``insert(-1)``, until the block ends."""
    begun, end = threading.Event(), threading.Event()

    def work(tx: Connection) -> int:
        begun.set()
        assert end.wait(SECONDS)
        return insert(-1)(tx)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(database.write, work)
        try:
            assert begun.wait(SECONDS)
            yield
        finally:
            end.set()
        future.result(SECONDS)


def together(database: Database, works: list[Work]) -> list[Future[int]]:
    """Let all of them wait, in this order, until the writer before them has committed; return what became of each."""
    with ThreadPoolExecutor(len(works)) as pool:
        with while_writing(database):
            futures = []
            for work in works:
                futures.append(pool.submit(database.write, work))
                assert AnnouncedLock.waiting.acquire(timeout=SECONDS), "nobody waits to share a commit"
        return futures


@pytest.fixture
def commits(database: Database) -> list[None]:
    """Grows by one with each commit."""
    counted: list[None] = []
    sa.event.listen(database.engine, "commit", lambda _connection: counted.append(None))
    return counted


def test_who_gives_way_to_another_tenant_holds_no_lock_that_this_one_waits_for(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_way() -> None:
        with database.transaction(patience=0.1) as tx:
            insert(1)(tx)

    monkeypatch.setattr(database_module, "give_way", give_way)
    database.write(insert(2))
    assert seen(database) == {1, 2}


def test_all_who_wait_share_one_commit(database: Database, commits: list[None]) -> None:
    futures = together(database, [insert(number) for number in range(6)])
    assert [future.result() for future in futures] == list(range(6))
    assert len(commits) == 2, "one of the writer that held the lock, and one for all who waited"
    assert seen(database) == {-1, *range(6)}


def test_nobody_is_answered_before_the_shared_commit(database: Database) -> None:
    answered: list[int] = []
    at_commit: list[list[int]] = []
    sa.event.listen(database.engine, "commit", lambda _connection: at_commit.append(list(answered)))

    with ThreadPoolExecutor(3) as pool, while_writing(database):
        for number in range(3):
            pool.submit(database.write, insert(number)).add_done_callback(
                lambda future: answered.append(future.result())
            )
            assert AnnouncedLock.waiting.acquire(timeout=SECONDS)
    assert at_commit == [[], []]
    assert sorted(answered) == [0, 1, 2]


def test_one_that_fails_is_undone_and_hurts_no_other(database: Database, commits: list[None]) -> None:
    def fail(tx: Connection) -> int:
        insert(100)(tx)
        insert(0)(tx)
        return 100

    futures = together(database, [insert(0), fail, insert(1), insert(2)])
    with pytest.raises(sa.exc.IntegrityError):
        futures[1].result()
    assert [futures[number].result() for number in (0, 2, 3)] == [0, 1, 2]
    assert len(commits) == 2
    assert seen(database) == {-1, 0, 1, 2}


def test_if_the_commit_fails_no_caller_sees_a_success(database: Database) -> None:
    commits: list[None] = []

    def fail_from_the_second_on(_connection: Connection) -> None:
        commits.append(None)
        if len(commits) > 1:
            raise OSError("no room")

    sa.event.listen(database.engine, "commit", fail_from_the_second_on)
    for future in together(database, [insert(number) for number in range(4)]):
        with pytest.raises(OSError, match="no room"):
            future.result()
    assert len(commits) == 2
    sa.event.remove(database.engine, "commit", fail_from_the_second_on)
    assert seen(database) == {-1}


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

    futures = together(database, [insert(0), counted, insert(5)])
    assert [future.exception() is None for future in futures] == [True, True, False]
    assert len(runs) == 2
    assert seen(database) == {-1, 0, 5}


def test_what_need_not_survive_a_power_cut_is_not_synced_and_the_next_commit_is(database: Database) -> None:
    for durable, synchronous in ((False, NORMAL), (True, FULL), (False, NORMAL)):
        with database.transaction(durable=durable) as tx:
            assert tx.exec_driver_sql("PRAGMA synchronous").scalar_one() == synchronous
    database.write(lambda tx: insert(tx.exec_driver_sql("PRAGMA synchronous").scalar_one())(tx))
    assert seen(database) == {FULL}
