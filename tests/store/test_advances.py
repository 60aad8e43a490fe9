"""Who waits for the next generation is woken by the commit of a transaction that has it, of any process."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import db
from operations.wiring import Portal
from store.advances import SOCKET, Advances
from store.database import Database
from store.listening import listen
from tests.support.harness import ON_POSTGRESQL, ON_SQLITE

LONG = 60.0


def is_woken(wait: Callable[[float], None], seconds: float = LONG) -> bool:
    """Whether a wait ends before its time."""
    started = time.monotonic()
    wait(seconds)
    return time.monotonic() - started < seconds


def _fail(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        db.next_generation(tx, at=portal.clock())
        raise ZeroDivisionError


def advance(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        db.next_generation(tx, at=portal.clock())


@ON_SQLITE
def test_the_commit_of_a_generation_wakes_and_no_other_does(portal: Portal) -> None:
    with portal.database.advances.listening() as wait:
        advance(portal)
        assert is_woken(wait)
        with pytest.raises(ZeroDivisionError):
            _fail(portal)
        with portal.database.transaction():
            pass
        assert not is_woken(wait, 0.05)


@ON_SQLITE
def test_several_that_came_meanwhile_wake_once(portal: Portal) -> None:
    with portal.database.advances.listening() as wait:
        for _ in range(5):
            advance(portal)
        assert is_woken(wait)
        assert not is_woken(wait, 0.05)


@ON_SQLITE
def test_nobody_has_to_wait(portal: Portal) -> None:
    advance(portal)
    with portal.database.advances.listening():
        pass
    advance(portal)  # the socket of who waited is there still


def test_a_folder_may_be_deep_and_who_waited_before_may_have_been_killed(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    (deep / SOCKET).touch()
    advances = Advances(deep, is_alone=True)
    with advances.listening() as wait:
        process = multiprocessing.get_context("spawn").Process(target=_tell, args=(deep,))
        process.start()
        assert is_woken(wait)
        process.join(LONG)
    assert (deep / SOCKET).stat().st_mode & 0o777 == 0o600


def _tell(folder: Path) -> None:
    Advances(folder, is_alone=True).tell()


@ON_POSTGRESQL
def test_on_postgresql_the_server_wakes(portal: Portal) -> None:
    stopping, begun = threading.Event(), threading.Event()
    database: Database = portal.database

    def heard(_waits: bool) -> None:
        begun.set()
        database.advances.heard()

    listening = threading.Thread(target=listen, args=(database, heard, stopping))
    listening.start()
    with database.advances.listening() as wait:
        assert begun.wait(LONG)
        assert is_woken(wait)  # by the look with which it begins
    stopping.set()
    listening.join()
