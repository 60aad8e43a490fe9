"""The audit record: a chain in which no entry can be altered, removed or moved unnoticed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from operations.wiring import Portal
from store import audit
from store.audit import Actor, AuditVerdict
from tests.support.harness import as_owner
from tests.workflows.test_registration import OPERATOR, PUMP


def verdict(portal: Portal) -> AuditVerdict:
    with portal.database.snapshot() as tx:
        return audit.verify(tx, "default")


def tamper(portal: Portal, *statements: str) -> None:
    """Change the record as somebody could who may do anything to the database."""
    with as_owner(portal) as tx:
        if portal.database.is_sqlite:
            tx.exec_driver_sql("DROP TRIGGER audit_entries_unchanged")
            tx.exec_driver_sql("DROP TRIGGER audit_entries_undeleted")
        else:
            tx.exec_driver_sql("DROP TRIGGER audit_entries_append_only ON audit_entries")
        for statement in statements:
            tx.exec_driver_sql(statement)


@pytest.fixture
def recorded(portal: Portal) -> Portal:
    """A portal with some history; its first start left eight entries."""
    device = portal.registrations.register(OPERATOR, PUMP)
    portal.registrations.update(OPERATOR, device.device_id, {"name": "pump-2"})
    portal.registrations.update(OPERATOR, device.device_id, {"location": "hall 2"})
    return portal


def test_an_untouched_record_is_sound(recorded: Portal) -> None:
    found = verdict(recorded)
    assert found.problem is None
    assert found.entries == 11


@pytest.mark.parametrize(
    ("statements", "problem"),
    [
        (["UPDATE audit_entries SET actor = 'nobody' WHERE number = 9"], "Entry 9 was altered"),
        (["UPDATE audit_entries SET outcome = 'refused' WHERE number = 11"], "Entry 11 was altered"),
        (["UPDATE audit_entries SET detail = '{}' WHERE number = 9"], "Entry 9 was altered"),
        (["DELETE FROM audit_entries WHERE number = 1"], "Entry 1 is missing"),
        (["DELETE FROM audit_entries WHERE number = 9"], "Entry 9 is missing"),
        (["DELETE FROM audit_entries WHERE number = 11"], "Entry 11 is missing, at the end"),
        (["DELETE FROM audit_entries WHERE number > 8"], "Entry 9 is missing, at the end"),
        (
            [
                "UPDATE audit_entries SET number = 99 WHERE number = 9",
                "UPDATE audit_entries SET number = 9 WHERE number = 10",
                "UPDATE audit_entries SET number = 10 WHERE number = 99",
            ],
            "Entry 9 does not follow entry 8",
        ),
        (["UPDATE audit_heads SET number = 10"], "Entry 11 is not the one"),
    ],
)
def test_the_first_entry_that_does_not_hold_is_named(recorded: Portal, statements: list[str], problem: str) -> None:
    tamper(recorded, *statements)
    found = verdict(recorded).problem
    assert found is not None
    assert found.startswith(problem)


def test_entries_written_at_once_make_one_chain(portal: Portal) -> None:
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        for _ in range(10):
            with portal.database.transaction() as tx:
                audit.record(tx, OPERATOR, "device:update", f"device:{number}", at=portal.clock())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    found = verdict(portal)
    assert (found.problem, found.entries) == (None, 88)


def test_an_entry_is_there_only_if_its_change_is(portal: Portal) -> None:
    before = verdict(portal).entries

    def fail(tx: Connection) -> None:
        audit.record(tx, OPERATOR, "device:update", "device:x", at=portal.clock())
        tx.execute(sa.text("INSERT INTO devices (id) VALUES ('x')"))

    with pytest.raises(sa.exc.DBAPIError), portal.database.transaction() as tx:
        fail(tx)
    assert verdict(portal).entries == before


@pytest.mark.parametrize("long", [lambda a: a.name, lambda a: a.address])
def test_overlong_names_and_addresses_are_cut_and_still_verify(portal: Portal, long: Callable[[Actor], str]) -> None:
    actor = Actor("default", "n" * 500, "operator", "request-9", "a" * 500)
    with portal.database.transaction() as tx:
        audit.record(tx, actor, "device:update", "o" * 500, at=portal.clock())
    assert len(long(actor)) == 500
    assert verdict(portal).problem is None
