"""Who was last seen connected: written by identity, and only where something has changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

import db
from core.states import BrokerKind, PresenceState
from operations.wiring import Portal
from store import brokers
from store.presences import (
    Place,
    PresenceRecord,
    Sighting,
    add_presences,
    admitted,
    connected_at,
    presence_of,
    record_presences,
)
from tests.test_db import add_device

NOW = datetime(2027, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(seconds=7)
CONNECTED = Sighting(PresenceState.CONNECTED, LATER)
HERE, THERE = 1, 2  # brokers


@contextmanager
def rows_written(portal: Portal) -> Iterator[list[int]]:
    """How many presences each UPDATE has changed."""
    changed: list[int] = []

    def note(_connection: object, cursor: sa.engine.interfaces.DBAPICursor, statement: str, *_rest: object) -> None:
        if statement.startswith("UPDATE presences"):
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
        away = Sighting(PresenceState.OFFLINE, LATER)
        record_presences(tx, HERE, {one: CONNECTED, "an-application": CONNECTED, two: away, "nobody": CONNECTED})
        assert [presence_of(tx, "default", who) for who in (one, two, "an-application", "nobody")] == [
            PresenceRecord(*CONNECTED, HERE),
            PresenceRecord(*away, HERE),
            PresenceRecord(*CONNECTED, HERE),
            None,
        ]


def test_what_has_not_changed_is_not_written(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        one, two = add_device(tx, created_at=NOW), add_device(tx, created_at=NOW)
        record_presences(tx, HERE, {one: CONNECTED})
    with rows_written(portal) as changed, portal.database.transaction() as tx:
        record_presences(tx, HERE, {})
        record_presences(tx, HERE, {one: CONNECTED})
        record_presences(tx, HERE, {one: CONNECTED, two: CONNECTED})
    assert changed == [1]


@pytest.mark.parametrize("limit", [1, 2, 50])
def test_who_is_connected_is_read_page_by_page(portal: Portal, limit: int) -> None:
    with portal.database.transaction() as tx:
        ids = sorted(add_device(tx, created_at=NOW) for _ in range(5))
        seen = {device_id: Sighting(PresenceState.CONNECTED, LATER) for device_id in ids}
        seen[ids[0]] = Sighting(PresenceState.OFFLINE, NOW)
        record_presences(tx, HERE, seen)
        found: list[Place] = []
        while page := connected_at(tx, HERE, limit=limit, after=found[-1].identity if found else ""):
            found += page
        within = connected_at(tx, HERE, limit=9, after=ids[1], upto=ids[3])
    assert found == [Place(device_id, LATER, is_removed=False) for device_id in ids[1:]]
    assert [place.identity for place in within] == ids[2:4]


def test_who_is_at_other_brokers_only_is_not_connected_here(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        another_broker(tx)
        one, two = sorted(add_device(tx, created_at=NOW) for _ in range(2))
        record_presences(tx, THERE, {one: CONNECTED, two: CONNECTED})
        record_presences(tx, HERE, {two: Sighting(PresenceState.CONNECTED, NOW)})
        assert connected_at(tx, HERE, limit=9) == [Place(two, NOW, is_removed=False)]
        assert [place.since for place in connected_at(tx, THERE, limit=9)] == [LATER, LATER]
        brokers.remove_broker(tx, brokers.get_broker(tx, "there"), at=NOW)
        assert connected_at(tx, HERE, limit=9) == [Place(one, LATER, True), Place(two, LATER, True)]


def another_broker(tx: Connection) -> None:
    broker = brokers.add_broker(tx, "there", BrokerKind.AGENT, at=NOW, joined=True)
    assert broker.id == THERE


# --- Several brokers -------------------------------------------------------------------------------------------------


def at(seconds: int) -> datetime:
    return NOW + timedelta(seconds=seconds)


def here(state: PresenceState, seconds: int) -> tuple[int, Sighting]:
    return HERE, Sighting(state, at(seconds))


def there(state: PresenceState, seconds: int) -> tuple[int, Sighting]:
    return THERE, Sighting(state, at(seconds))


ON, OFF = PresenceState.CONNECTED, PresenceState.OFFLINE


@pytest.mark.parametrize(
    ("told", "known"),
    [
        pytest.param([here(ON, 1), there(ON, 2)], PresenceRecord(ON, at(2), THERE, None, {HERE: at(1)}), id="at both"),
        pytest.param(
            [here(ON, 1), there(ON, 2), here(OFF, 3)],
            PresenceRecord(ON, at(2), THERE, at(3)),
            id="moved: the old broker notices later",
        ),
        pytest.param([here(ON, 1), here(OFF, 2), there(ON, 3)], PresenceRecord(ON, at(3), THERE), id="left, then came"),
        pytest.param(
            [here(ON, 1), there(ON, 2), there(OFF, 3)],
            PresenceRecord(ON, at(1), HERE, at(3)),
            id="the older connection is there still",
        ),
        pytest.param(
            [here(ON, 1), there(ON, 2), there(OFF, 3), here(OFF, 4)],
            PresenceRecord(OFF, at(4), HERE),
            id="gone from both",
        ),
        pytest.param(
            [here(ON, 1), there(ON, 2), there(OFF, 5), here(OFF, 4)],
            PresenceRecord(OFF, at(5), HERE),
            id="seen last when it left the other one",
        ),
        pytest.param(
            [there(ON, 2), here(OFF, 9)],
            PresenceRecord(ON, at(2), THERE, at(9)),
            id="one broker ends no connection of another",
        ),
        pytest.param(
            [here(ON, 9), here(OFF, 10), here(ON, 1), here(OFF, 2)],
            PresenceRecord(OFF, at(2), HERE),
            id="a broker's word replaces its own, as after its clock was set back",
        ),
        pytest.param(
            [here(OFF, 9), there(ON, 1), there(OFF, 2)],
            PresenceRecord(OFF, at(2), THERE),
            id="a connection replaces when it was seen before",
        ),
        pytest.param([here(OFF, 9), there(OFF, 2)], PresenceRecord(OFF, at(9), HERE), id="seen last at either"),
    ],
)
def test_a_connection_belongs_to_its_broker(
    portal: Portal, told: list[tuple[int, Sighting]], known: PresenceRecord
) -> None:
    with portal.database.transaction() as tx:
        another_broker(tx)
        device_id = add_device(tx, created_at=NOW)
        for broker_id, sighting in told:
            record_presences(tx, broker_id, {device_id: sighting})
        assert presence_of(tx, "default", device_id) == known


def test_a_connection_to_a_broker_that_was_removed_counts_no_more(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        another_broker(tx)
        device_id = add_device(tx, created_at=NOW)
        record_presences(tx, THERE, {device_id: Sighting(ON, at(1))})
        record_presences(tx, HERE, {device_id: Sighting(ON, at(2))})
        brokers.remove_broker(tx, brokers.get_broker(tx, "there"), at=NOW)
        record_presences(tx, HERE, {device_id: Sighting(OFF, at(3))})
        assert presence_of(tx, "default", device_id) == PresenceRecord(OFF, at(3), HERE)


def test_only_active_clients_are_admitted(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        active, revoked = (add_device(tx, created_at=NOW) for _ in range(2))
        db.revoke_device(tx, "default", revoked, revoked_at=NOW, reason="unspecified", generation=1)
        assert admitted(tx, [active, revoked, "unknown"]) == {active}
        assert admitted(tx, []) == set()
