"""Each transaction has the scope of its request, its thread, or what it was told, and leaves none behind it."""

from __future__ import annotations

import contextlib
import threading

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from operations.wiring import Portal
from store import scope
from store.database import Database
from store.scope import ALL_TENANTS, NO_TENANT
from tests.support.harness import ON_POSTGRESQL

pytestmark = ON_POSTGRESQL


def seen_by(tx: Connection) -> str:
    return str(tx.execute(sa.text("SELECT current_setting('portal.tenant', true)")).scalar_one())


def seen_in(database: Database, sees: str | None = None) -> set[str]:
    """The scopes of all kinds of transactions."""
    seen = {database.write(seen_by, sees=sees)}
    with database.snapshot(sees=sees) as tx:
        seen.add(seen_by(tx))
    for durable in (True, False):
        with database.transaction(durable=durable, sees=sees) as tx:
            seen.add(seen_by(tx))
    return seen


def test_a_request_sees_nothing_until_it_is_known_whose_it_is(portal: Portal) -> None:
    with scope.of_request():
        assert seen_in(portal.database) == {NO_TENANT}
        assert seen_in(portal.database, ALL_TENANTS) == {ALL_TENANTS}  # said at the place
        scope.enter("another")
        assert seen_in(portal.database) == {"another"}
    assert seen_in(portal.database) == {ALL_TENANTS}


def test_a_request_that_fails_leaves_no_scope_to_the_next_one_in_its_thread(portal: Portal) -> None:
    def fail() -> None:
        with scope.of_request():
            scope.enter("another")
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fail()
    with scope.of_request():
        assert seen_in(portal.database) == {NO_TENANT}


def test_a_thread_that_a_request_starts_works_for_the_installation(portal: Portal) -> None:
    seen: list[set[str]] = []
    with scope.of_request():
        scope.enter("another")
        thread = threading.Thread(target=lambda: seen.append(seen_in(portal.database)))
        thread.start()
        thread.join()
        assert seen_in(portal.database) == {"another"}
    assert seen == [{ALL_TENANTS}]


@pytest.mark.parametrize("ends", ["commit", "rollback"])
def test_a_scope_ends_with_its_transaction_and_does_not_stay_on_the_connection(portal: Portal, ends: str) -> None:
    with portal.database.engine.connect() as connection:
        backend = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    with contextlib.suppress(ConnectionError), portal.database.transaction(sees="another") as tx:
        assert tx.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() == backend
        if ends == "rollback":
            raise ConnectionError
    with portal.database.engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        found = driver.execute("SELECT current_setting('portal.tenant', true), pg_backend_pid()").fetchone()
    assert found == ("", backend)


def test_a_widened_block_ends_in_the_scope_of_its_transaction(portal: Portal) -> None:
    with portal.database.transaction(sees="another") as tx:
        with scope.widened(tx):
            assert seen_by(tx) == ALL_TENANTS
        assert seen_by(tx) == "another"
        with pytest.raises(LookupError), scope.widened(tx):
            raise LookupError
        assert seen_by(tx) == "another"
        savepoint = tx.begin_nested()
        with pytest.raises(sa.exc.ProgrammingError), scope.widened(tx):
            tx.exec_driver_sql("SELECT nothing")
        savepoint.rollback()
        assert seen_by(tx) == "another"


@pytest.mark.parametrize("name", ["x'; DROP TABLE devices; --", "a b", "a" * 65, "%s"])
def test_what_is_no_name_of_a_tenant_begins_no_transaction(portal: Portal, name: str) -> None:
    with pytest.raises(ValueError, match="name of a tenant"), portal.database.snapshot(sees=name):
        pass


def test_only_a_request_enters_a_scope(portal: Portal) -> None:
    with pytest.raises(RuntimeError):
        scope.enter(portal.first_tenant)
