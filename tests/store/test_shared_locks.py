"""A lock of the installation is held by one thread of one process of one node; who loses it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from core.errors import LockUnavailable
from core.files import FileLock
from store.database import Database
from tests.support.databases import POSTGRES_URL, postgres_database

NAME = ".rollover.lock"
needs_postgresql = pytest.mark.skipif(not POSTGRES_URL, reason="needs one")


@contextmanager
def nodes(folder: Path) -> Iterator[tuple[Database, Database]]:
    """Two nodes on one database, as far as locks go: a folder each."""
    with postgres_database() as url:
        first, second = (Database(url, folder=folder, threads=1) for _ in range(2))
        # As two folders hold their locks, without what a second node needs beside.
        (folder / "second").mkdir()
        second.locks._folder = folder / "second"
        with closing(first), closing(second):
            yield first, second


def end_sessions(database: Database) -> None:
    url = database.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


@needs_postgresql
def test_one_node_at_a_time_holds_a_lock_and_the_next_one_gets_it_at_once(tmp_path: Path) -> None:
    with nodes(tmp_path) as (first, second):
        waits, has = threading.Event(), threading.Event()

        def wait_for_it() -> None:
            waits.set()
            with second.locks.of(NAME).hold(30):
                has.set()

        with first.locks.of(NAME).hold():
            with second.locks.of(NAME).try_hold() as held:
                assert not held
            with pytest.raises(LockUnavailable, match="another node"), second.locks.of(NAME).hold(0.05):
                pass
            with second.locks.of(".another.lock").try_hold() as held:
                assert held
            waiting = threading.Thread(target=wait_for_it)
            waiting.start()
            assert waits.wait(10)
            assert not has.is_set()
        assert has.wait(10)
        waiting.join()
        with second.locks.of(NAME).try_hold() as held:
            assert held


@needs_postgresql
def test_the_holder_of_a_lock_notices_that_its_session_has_ended_and_another_node_may_take_it(tmp_path: Path) -> None:
    with nodes(tmp_path) as (first, second):
        lock = first.locks.of(NAME)
        with lock.hold():
            assert lock.is_held()
            end_sessions(first)
            assert not lock.is_held()
            with second.locks.of(NAME).try_hold() as held:
                assert held
        with first.locks.of(NAME).try_hold() as held:
            assert held


@needs_postgresql
def test_no_lock_is_left_in_a_session_that_is_used_again(tmp_path: Path) -> None:
    with nodes(tmp_path) as (first, _):
        lock = first.locks.of(NAME)
        with pytest.raises(RuntimeError), lock.hold():
            raise RuntimeError
        with first.locks.of(NAME).hold(), pytest.raises(LockUnavailable), first.locks.of(NAME).hold(0.05):
            pass
        with first.engine.connect() as connection:
            count = (
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND database ="
                " (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            assert connection.execute(sa.text(count)).scalar_one() == 0


@needs_postgresql
def test_without_a_database_no_lock_between_nodes_is_had(tmp_path: Path) -> None:
    with nodes(tmp_path) as (first, _):
        gone = first.engine.url.set(database="gone").render_as_string(hide_password=False)
        with closing(Database(gone, folder=tmp_path, threads=1)) as database:
            with database.locks.of(NAME).try_hold() as held:
                assert not held
            with pytest.raises(LockUnavailable, match="does not answer"), database.locks.of(NAME).hold(1):
                pass


def test_on_sqlite_a_lock_is_its_file_alone(tmp_path: Path) -> None:
    with closing(Database(f"sqlite:///{tmp_path / 'portal.db'}", folder=tmp_path, threads=1)) as database:
        lock = database.locks.of(NAME)
        with lock.hold(), FileLock(tmp_path / NAME).try_hold() as held:
            assert not held
            assert lock.is_held()
        with database.locks.alone_among_nodes(NAME, 0.0), database.locks.of(NAME).try_hold() as held:
            assert held
