"""A PostgreSQL server that stops answering is given up after a time limit; its connections are durable."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import sqlalchemy as sa

from core.errors import DatabaseUnavailable
from store import postgresql
from store.database import Database
from tests.support.postgres import Cluster

pytestmark = pytest.mark.system


def test_a_server_that_is_stopped_is_given_up_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(postgresql.PatientConnection, "patience", 0.5)
    monkeypatch.setitem(postgresql.CONNECT_ARGUMENTS, "connect_timeout", 2)
    with Cluster() as cluster:
        database = Database(cluster.url, lock_path=tmp_path / "lock", threads=2)
        database.migrate()
        database.ping()
        processes = cluster.processes()
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(DatabaseUnavailable):
                database.ping()
        finally:
            for pid in processes:
                os.kill(pid, signal.SIGCONT)
        database.ping()
        database.close()


def test_connections_are_durable_and_bounded_whatever_the_servers_defaults() -> None:
    with Cluster("synchronous_commit=off") as cluster:
        database = Database(cluster.url, lock_path=Path("/nonexistent"), threads=2)
        with database.snapshot() as tx:
            shown = {
                name: tx.execute(sa.text(f"SHOW {name}")).scalar_one()
                for name in ("synchronous_commit", "lock_timeout", "statement_timeout")
            }
        database.close()
    assert shown == {"synchronous_commit": "on", "lock_timeout": "5s", "statement_timeout": "30s"}
