"""The job that sends mail: in a thread of its own, which holds up no other job, and none without a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from config import Settings
from operations import jobs
from operations.wiring import open_portal
from store.tables import BrokerState, IssuerRow
from tests.support.harness import Clock
from tests.support.mail_server import mail_server


def test_the_job_tells_people_without_being_asked(
    make_settings: Callable[..., Settings], clock: Clock, tmp_path: Path
) -> None:
    with mail_server(tmp_path) as server:
        portal = open_portal(make_settings(**server.environment()), clock)
        with portal.database.transaction() as tx:
            tx.execute(sa.update(BrokerState).values(pending_since=None))  # since the tests have begun, it would say
            tx.execute(sa.update(IssuerRow).values(not_after=clock() + timedelta(days=20)))
        gave_up = threading.Timer(30, server.arrived.set)
        gave_up.start()
        jobs.run(portal, server.arrived, jobs.SEND_MAIL, jobs.MAIL_LOCK)
        gave_up.cancel()
        portal.close()
    (message,) = server.messages
    assert str(message["Subject"]).endswith(": 2 CAs end")


@pytest.mark.parametrize("sends", [True, False])
def test_mail_has_a_thread_of_its_own_if_there_is_a_server(
    make_settings: Callable[..., Settings],
    clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sends: bool,
) -> None:
    threads: dict[str, tuple[str, ...]] = {}

    def run(_: Any, stopping: Any, jobs: tuple[jobs.Job, ...] = jobs.JOBS, lock: str = jobs.LEADER_LOCK) -> None:
        threads[threading.current_thread().name] = (lock, *(job.name for job in jobs))

    monkeypatch.setattr(jobs, "run", run)
    environment = {
        "PORTAL_MAIL_SERVER": "localhost:25",
        "PORTAL_MAIL_FROM": "portal@example.com",
        "PORTAL_MAIL_TO": "ada@example.com",
    }
    before = set(threading.enumerate())
    portal = open_portal(make_settings(**(environment if sends else {})), clock)
    jobs.start(portal).set()
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    portal.close()
    assert ("mail" in threads) is sends
    if sends:
        assert threads["mail"] == (jobs.MAIL_LOCK, "mail")
    assert "mail" not in threads["jobs"]
