"""A PostgreSQL server that stops answering is given up after a time limit; one that is read-only is told of."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from app import create_app, portal_of
from core.errors import DatabaseInUse, DatabaseUnavailable
from core.roles import Role
from store import postgresql
from store.database import Database
from tests.support.harness import api_as, first_start, problem_of, settings_for
from tests.support.postgres import Cluster

pytestmark = pytest.mark.system

PUMP = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}


def test_a_server_that_is_stopped_is_given_up_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(postgresql.PatientConnection, "patience", 0.5)
    monkeypatch.setitem(postgresql.CONNECT_ARGUMENTS, "connect_timeout", 2)
    with Cluster() as cluster:
        database = Database(cluster.url, folder=tmp_path, threads=2)
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


def test_a_server_that_became_read_only_is_read_and_readyz_tells_at_once(tmp_path: Path) -> None:
    with Cluster() as cluster:
        settings = settings_for(tmp_path / "data", PORTAL_DATABASE_URL=cluster.url)
        first_start(settings)
        app = create_app(settings, background=False)
        api = api_as(app, Role.ADMIN)

        def database_check() -> dict[str, Any]:
            [check] = [check for check in api.get("/readyz").json["checks"] if check["name"] == "database"]
            return dict(check)

        api.register()
        assert database_check()["ok"]
        cluster.become_standby()
        problem_of(api.post("/register", PUMP), 503, "database_unavailable")
        assert "cannot be written" in database_check()["problem"]
        assert len(api.get("/devices").json["devices"]) == 1
        cluster.promote()
        assert database_check()["ok"]
        api.register()
        portal_of(app).close()


def test_connections_are_durable_and_bounded_whatever_the_servers_defaults(tmp_path: Path) -> None:
    with Cluster("synchronous_commit=off") as cluster:
        database = Database(cluster.url, folder=tmp_path, threads=2)
        with database.snapshot() as tx:
            shown = {
                name: tx.execute(sa.text(f"SHOW {name}")).scalar_one()
                for name in ("synchronous_commit", "lock_timeout", "statement_timeout")
            }
        database.close()
    assert shown == {"synchronous_commit": "on", "lock_timeout": "5s", "statement_timeout": "30s"}


def test_a_connection_that_the_server_ends_in_a_transaction_is_a_database_that_does_not_answer(tmp_path: Path) -> None:
    with Cluster() as cluster:
        database = Database(cluster.url, folder=tmp_path, threads=2)
        database.migrate()

        def end_it(tx: sa.Connection) -> None:
            own = tx.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
            with database.snapshot() as other:
                assert other.execute(sa.text("SELECT pg_terminate_backend(:own, 5000)"), {"own": own}).scalar_one()
            tx.execute(sa.text("SELECT 1"))

        with pytest.raises(DatabaseUnavailable):
            database.write(end_it)
        with database.transaction() as tx:
            assert tx.execute(sa.text("SELECT 1")).scalar_one() == 1
        database.close()


def test_a_default_of_read_only_is_not_overridden_after_a_snapshot(tmp_path: Path) -> None:
    with Cluster("default_transaction_read_only=on") as cluster:
        database = Database(cluster.url, folder=tmp_path, threads=2)
        for begin in (database.transaction, database.snapshot, database.transaction):
            with begin() as tx:
                assert tx.execute(sa.text("SHOW transaction_read_only")).scalar_one() == "on"
        database.close()


def test_a_database_serves_the_portals_of_one_data_folder_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with Cluster() as cluster:
        first, beside = (Database(cluster.url, folder=folder, threads=1) for _ in range(2))
        first.migrate()
        beside.ping()
        other = Database(cluster.url, folder=shutil.copytree(folder, tmp_path / "copy"), threads=1)
        with pytest.raises(DatabaseInUse, match="the data folder of no node"):
            other.ping()
        first.close()
        with pytest.raises(DatabaseInUse):
            other.ping()
        beside.close()
        other.ping()
        with pytest.raises(DatabaseInUse):  # it finds its place taken after a loss of all its connections
            first.ping()
        other.close()
        first.ping()
        first.close()
