"""Commits made together: durable for each caller, undone for the one that failed, and really one commit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import DatabaseUnavailable, StateConflict
from store import database as database_module
from store import shared_transactions
from store.database import Database
from tests.support import waiting

NORMAL, FULL = 1, 2  # as SQLite has them
Work = Callable[[Connection], int]


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    waiting.announce(monkeypatch)
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


def together(database: Database, works: list[Work]) -> list[Future[int]]:
    """Let all of them wait, in this order, until the writer before them has committed; return what became of each."""
    return calls_together(database, [partial(database.write, work) for work in works])


def calls_together(database: Database, calls: Sequence[Callable[[], int]]) -> list[Future[int]]:
    """As ``together``, of calls that write."""
    with ThreadPoolExecutor(len(calls)) as pool:
        with waiting.while_writing(database, insert(-1)):
            futures = []
            for call in calls:
                futures.append(pool.submit(call))
                assert waiting.one_more(), "nobody waits to share a commit"
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

    with ThreadPoolExecutor(3) as pool, waiting.while_writing(database, insert(-1)):
        for number in range(3):
            pool.submit(database.write, insert(number)).add_done_callback(
                lambda future: answered.append(future.result())
            )
            assert waiting.one_more()
    assert at_commit == [[], []]
    assert sorted(answered) == [0, 1, 2]


def test_one_whose_work_is_committed_does_not_wait_for_who_leads_next(database: Database) -> None:
    writes, end = threading.Event(), threading.Event()

    def long(tx: Connection) -> int:
        writes.set()
        assert end.wait(waiting.SECONDS)
        return insert(1)(tx)

    def lead_twice() -> int:
        database.write(insert(0))
        return database.write(long)

    leader, *others = (lead_twice, *(partial(database.write, insert(number)) for number in range(2, 6)))
    with ThreadPoolExecutor(5) as pool:
        with waiting.while_writing(database, insert(-1)):
            leads = pool.submit(leader)
            assert waiting.one_more()
            futures = [pool.submit(other) for other in others]
            assert all(waiting.one_more() for _ in others)
        try:
            assert writes.wait(waiting.SECONDS)
            assert [future.result(waiting.SECONDS) for future in futures] == list(range(2, 6))
            assert not leads.done()
        finally:
            end.set()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Is set once a writer of a database that is opened from now on waits for those that are about to come."""
    waits = threading.Event()

    class Announced(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            waits.set()
            return super().wait(timeout)

    monkeypatch.setattr(shared_transactions, "Condition", Announced)
    return waits


def test_one_that_could_write_waits_for_those_that_are_about_to(
    waits: threading.Event, database: Database, commits: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_transactions, "MAX_WAIT_SECONDS", 60.0)
    prepares = threading.Event()

    def slowly() -> None:
        with database.preparing():
            prepares.set()
            assert waits.wait(60)
            database.write(insert(2))

    def quickly() -> None:
        database.write(insert(1))

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(slowly)]
        assert prepares.wait(60)
        futures.append(pool.submit(quickly))
        for future in futures:
            future.result()
    assert len(commits) == 1
    assert seen(database) == {1, 2}


def test_nobody_waits_for_one_that_has_given_up(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_transactions, "MAX_WAIT_SECONDS", 3600.0)
    with pytest.raises(StateConflict), database.preparing():
        raise StateConflict("refused")
    with database.preparing():
        database.write(insert(1))
        database.write(insert(2))  # and nobody for itself
    assert seen(database) == {1, 2}


def test_a_savepoint_is_made_only_where_somebodys_work_has_failed(database: Database) -> None:
    sent: list[str] = []
    sa.event.listen(database.engine, "savepoint", lambda _connection, _name: sent.append("savepoint"))
    sa.event.listen(database.engine, "rollback", lambda _connection: sent.append("rollback"))
    together(database, [insert(number) for number in range(3)])
    assert sent == []
    with database.transaction() as tx:
        tx.exec_driver_sql("DELETE FROM seen")
    together(database, [insert(10), insert(10)])
    assert sent == ["rollback", "savepoint", "savepoint"]
    assert seen(database) == {-1, 10}


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


def test_a_failure_of_the_database_is_the_portals_error_for_whom_it_meets(database: Database) -> None:
    def fail(tx: Connection) -> int:
        tx.exec_driver_sql("INSERT INTO seen VALUES (100)")
        tx.exec_driver_sql("SELECT * FROM nothing")
        return 100

    futures = together(database, [insert(0), fail])
    with pytest.raises(DatabaseUnavailable):
        futures[1].result()
    assert futures[0].result() == 0
    assert seen(database) == {-1, 0}


def test_if_sqlite_undoes_all_because_it_has_no_room_nothing_is_kept_and_nobody_sees_a_success(
    database: Database,
) -> None:
    undone: list[bool] = []
    with database.transaction() as tx:
        tx.exec_driver_sql("CREATE TABLE texts (text BLOB)")

    def fill(tx: Connection) -> int:
        insert(100)(tx)
        driver: Any = tx.connection.driver_connection
        pages = driver.execute("PRAGMA page_count").fetchone()[0]
        driver.execute(f"PRAGMA max_page_count = {pages}")
        try:
            tx.exec_driver_sql("INSERT INTO texts VALUES (zeroblob(100000))")
        finally:
            undone.append(not driver.in_transaction)
            driver.execute("PRAGMA max_page_count = 1000000")
        return 100

    for future in together(database, [insert(0), fill, insert(1)]):
        with pytest.raises(DatabaseUnavailable):
            future.result()
    assert undone == [True, True]
    assert seen(database) == {-1}
    assert database.write(insert(2)) == 2


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


def test_equal_work_of_all_who_wait_is_done_by_one_call_with_an_answer_for_each(
    database: Database, commits: list[None]
) -> None:
    calls: list[list[int]] = []

    def insert_all(tx: Connection, numbers: Sequence[int]) -> list[int]:
        calls.append(list(numbers))
        tx.exec_driver_sql("INSERT INTO seen VALUES (?)", [(number,) for number in numbers])
        return [10 * number for number in numbers]

    write: list[Callable[[], int]] = [partial(database.write_together, insert_all, number) for number in range(3)]
    futures = calls_together(database, [write[0], partial(database.write, insert(7)), *write[1:]])
    assert [future.result() for future in futures] == [0, 7, 10, 20]
    assert calls == [[0, 1, 2]]
    assert len(commits) == 2
    assert seen(database) == {-1, 0, 1, 2, 7}


def test_of_equal_work_that_fails_each_is_done_alone_and_hurts_no_other(database: Database) -> None:
    calls: list[list[int]] = []

    def insert_all(tx: Connection, numbers: Sequence[int]) -> Sequence[int]:
        calls.append(list(numbers))
        tx.exec_driver_sql("INSERT INTO seen VALUES (?)", [(number,) for number in numbers])
        return numbers

    futures = calls_together(
        database, [partial(database.write_together, insert_all, number) for number in (1, 2, 1, 3)]
    )
    with pytest.raises(sa.exc.IntegrityError):
        futures[2].result()
    assert [futures[place].result() for place in (0, 1, 3)] == [1, 2, 3]
    assert calls == [[1, 2, 1, 3], [1], [2], [1], [3]]
    assert seen(database) == {-1, 1, 2, 3}
