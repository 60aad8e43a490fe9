"""Who was last seen connected: written by identity, and only where something has changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from core.states import PresenceState
from operations.wiring import Portal
from store.presences import (
    PresenceRecord,
    add_presences,
    connected_page,
    presence_of,
    record_presences,
)
from tests.test_db import add_device

NOW = datetime(2027, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(seconds=7)
CONNECTED = PresenceRecord(PresenceState.CONNECTED, LATER)


@contextmanager
def rows_written(portal: Portal) -> Iterator[list[int]]:
    """How many rows each UPDATE has changed."""
    changed: list[int] = []

    def note(_connection: object, cursor: sa.engine.interfaces.DBAPICursor, statement: str, *_rest: object) -> None:
        if statement.startswith("UPDATE"):
            changed.append(cursor.rowcount)

    sa.event.listen(portal.database.engine, "after_cursor_execute", note)
    yield changed
    sa.event.remove(portal.database.engine, "after_cursor_execute", note)


def test_a_new_device_was_never_seen(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        device_id = add_device(tx, created_at=NOW)
        assert presence_of(tx, "default", device_id) == PresenceRecord(PresenceState.NEVER_SEEN, NOW)
        assert presence_of(tx, "other", device_id) is None


def test_a_batch_is_recorded_by_identity_and_unknown_ones_are_left_out(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        one, two = add_device(tx, created_at=NOW), add_device(tx, created_at=NOW)
        add_presences(tx, [("default", "an-application", NOW)])
        away = PresenceRecord(PresenceState.OFFLINE, LATER)
        record_presences(tx, {one: CONNECTED, "an-application": CONNECTED, two: away, "nobody": CONNECTED})
        assert [presence_of(tx, "default", who) for who in (one, two, "an-application", "nobody")] == [
            CONNECTED,
            away,
            CONNECTED,
            None,
        ]


def test_what_has_not_changed_is_not_written(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        one, two = add_device(tx, created_at=NOW), add_device(tx, created_at=NOW)
        record_presences(tx, {one: CONNECTED})
    with rows_written(portal) as changed, portal.database.transaction() as tx:
        record_presences(tx, {})
        record_presences(tx, {one: CONNECTED})
        record_presences(tx, {one: CONNECTED, two: CONNECTED})
    assert changed == [0, 1]


@pytest.mark.parametrize("limit", [1, 2, 50])
def test_who_is_connected_is_read_page_by_page(portal: Portal, limit: int) -> None:
    with portal.database.transaction() as tx:
        ids = [add_device(tx, created_at=NOW) for _ in range(5)]
        seen = {
            device_id: PresenceRecord(PresenceState.CONNECTED, NOW + timedelta(seconds=number // 2))
            for number, device_id in enumerate(ids)
        }
        seen[ids[0]] = PresenceRecord(PresenceState.OFFLINE, NOW)
        record_presences(tx, seen)
        found: list[tuple[datetime, str]] = []
        after = None
        while page := connected_page(tx, "default", limit=limit, after=after):
            found += page
            after = page[-1]
    assert found == sorted((seen[device_id].since, device_id) for device_id in ids[1:])
