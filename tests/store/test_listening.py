"""A node hears at once of a change that another one has committed, and looks by itself each second."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import db
from core.states import BrokerKind
from operations.wiring import Portal
from store import brokers, listening
from tests.store.test_shared_locks import end_sessions
from tests.support.harness import ON_POSTGRESQL

pytestmark = ON_POSTGRESQL


@contextmanager
def listener(portal: Portal) -> Iterator[threading.Semaphore]:
    """What is released whenever the listener calls."""
    heard, stopping = threading.Semaphore(0), threading.Event()
    thread = threading.Thread(target=listening.listen, args=(portal.database, lambda _waits: heard.release(), stopping))
    thread.start()
    try:
        assert heard.acquire(timeout=20)  # at its start
        yield heard
    finally:
        stopping.set()
        thread.join(30)


def advance(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        db.next_generation(tx, at=portal.clock())


def test_a_commit_with_a_new_generation_is_heard(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "POLL_SECONDS", 3600.0)
    with portal.database.transaction() as tx:
        brokers.add_broker(tx, "another", BrokerKind.AGENT, at=portal.clock(), joined=True)
    heard, stopping = threading.Semaphore(0), threading.Event()
    thread = threading.Thread(target=listening.listen, args=(portal.database, lambda _waits: heard.release(), stopping))
    thread.start()
    assert heard.acquire(timeout=20)
    advance(portal)
    assert heard.acquire(timeout=20)
    stopping.set()
    advance(portal)
    thread.join(30)
    assert not thread.is_alive()


def test_with_one_broker_nobody_is_told(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        assert tx.execute(db._ADVANCE_AND_TELL, {"at": portal.clock()}).one()[1] is None
        brokers.add_broker(tx, "another", BrokerKind.AGENT, at=portal.clock(), joined=True)
        assert tx.execute(db._ADVANCE_AND_TELL, {"at": portal.clock()}).one()[1] is not None


def test_the_listener_looks_by_itself_and_goes_on_after_a_loss_of_its_connection(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "POLL_SECONDS", 0.02)
    with listener(portal) as heard:
        assert heard.acquire(timeout=20)
        end_sessions(portal.database)
        while heard.acquire(blocking=False):
            pass
        assert all(heard.acquire(timeout=20) for _ in range(3))


def test_the_others_are_told_that_a_request_waits(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "POLL_SECONDS", 3600.0)
    heard: queue.SimpleQueue[bool] = queue.SimpleQueue()
    stopping = threading.Event()
    thread = threading.Thread(target=listening.listen, args=(portal.database, heard.put, stopping))
    thread.start()
    assert not heard.get(timeout=20)
    listening.hurry(portal.database)
    assert heard.get(timeout=20)
    stopping.set()
    listening.hurry(portal.database)
    thread.join(30)
