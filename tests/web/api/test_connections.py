"""Whether devices are connected: in the answers about them, as a filter and as an order of their list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.roles import Role
from core.states import PresenceState
from operations.wiring import Portal
from store.presences import Sighting, record_presences
from tests.support.exposition import samples_of, value_of
from tests.support.harness import Api, Clock, api_as, problem_of


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock) -> Iterator[Flask]:
    built = create_app(make_settings(PORTAL_BROKER_CONTROL="guard"), background=False, clock=clock)
    yield built
    portal_of(built).close()


@pytest.fixture
def portal(app: Flask) -> Portal:
    return portal_of(app)


@pytest.fixture
def fleet(api: Api, portal: Portal, clock: Clock) -> list[str]:
    """Four devices: connected, seen a minute ago, an hour ago, never; the broker was heard just now."""
    ids = [api.register(name=f"pump-{number}")["device_id"] for number in range(4)]
    seen = {
        ids[0]: Sighting(PresenceState.CONNECTED, clock() - timedelta(days=1)),
        ids[1]: Sighting(PresenceState.OFFLINE, clock() - timedelta(minutes=1)),
        ids[2]: Sighting(PresenceState.OFFLINE, clock() - timedelta(hours=1)),
    }
    with portal.database.transaction() as tx:
        record_presences(tx, 1, seen)
    portal.follower.contact.made("x")
    return ids


def names(api: Api, query: str) -> list[str]:
    """The numbers of the devices in a list, page by page."""
    found: list[str] = []
    cursor = ""
    while True:
        page = api.get(f"/devices?limit=1&{query}{cursor}").json
        found += [device["name"].removeprefix("pump-") for device in page["devices"]]
        if page["next_cursor"] is None:
            return found
        cursor = f"&cursor={page['next_cursor']}"


def connections(api: Api, ids: list[str]) -> list[dict[str, Any] | None]:
    """The same in the list and in the answer about one device."""
    listed = {device["device_id"]: device["connection"] for device in api.get("/devices").json["devices"]}
    assert [listed[device_id] for device_id in ids] == [
        api.get(f"/devices/{device_id}").json["connection"] for device_id in ids
    ]
    return [listed[device_id] for device_id in ids]


def test_a_device_is_connected_or_offline_or_was_never_seen(api: Api, fleet: list[str]) -> None:
    here, left, _, never = connections(api, fleet)
    assert here is not None
    assert left is not None
    assert (here["connected"], left["connected"]) == (True, False)
    assert here["since"] < here["last_seen"]
    assert left["since"] == left["last_seen"]
    assert never is None


def test_what_is_not_known_is_said_to_be_so(api: Api, portal: Portal, fleet: list[str], clock: Clock) -> None:
    portal.follower.contact.lost("x")
    here, left, _, never = connections(api, fleet)
    assert [one and (one["connected"], one["since"]) for one in (here, left, never)] == [(None, None)] * 3
    assert here is not None
    assert here["last_seen"] is not None
    assert never is not None
    assert never["last_seen"] is None


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("connected=true", "0"),
        ("connected=false", "12"),
        ("connected=false&sort=last_seen", "21"),
        ("connected=never", "3"),
        ("sort=last_seen", "3210"),
        ("sort=-last_seen", "0123"),
        ("sort=-last_seen&q=pump", "0123"),
        ("connected=true&type=valve", ""),
        ("connected=true&sort=name", "0"),
        ("connected=false&sort=created", "12"),
        ("connected=never&sort=expires", "3"),
        ("connected=true&sort=last_seen&expires_before=2100-01-01T00:00:00Z&status=active", "0"),
    ],
)
def test_devices_are_listed_by_their_connection(api: Api, fleet: list[str], query: str, found: str) -> None:
    assert "".join(names(api, query)) == found


def test_a_cursor_continues_no_list_in_another_order(api: Api, fleet: list[str]) -> None:
    orders = ("", "sort=last_seen", "connected=false", "expires_before=2100-01-01T00:00:00Z")
    for first in orders:
        cursor = api.get(f"/devices?limit=1&{first}").json["next_cursor"]
        for second in orders:
            answer = api.get(f"/devices?{second}&cursor={cursor}")
            assert (answer.status_code == 200) == (first == second), (first, second)


def test_a_cursor_continues_no_list_with_another_filter(api: Api, fleet: list[str]) -> None:
    filters = ("", "type=pump", "type=valve", "type=pump&q=pump", "location=hall+1")
    cursors = {filters: api.get(f"/devices?limit=1&{filters}").json["next_cursor"] for filters in filters}
    for first, cursor in cursors.items():
        for second in cursors if cursor is not None else ():
            answer = api.get(f"/devices?{second}&cursor={cursor}")
            assert (answer.status_code == 200) == (first == second), (first, second)
    assert any(cursors.values())


def test_a_cursor_still_fits_when_the_time_of_expires_before_has_moved(api: Api, fleet: list[str]) -> None:
    cursor = api.get("/devices?limit=1&expires_before=2100-01-01T00:00:00Z").json["next_cursor"]
    assert api.get(f"/devices?expires_before=2100-01-01T00:01:00Z&cursor={cursor}").status_code == 200


def test_nobody_is_listed_as_connected_while_that_is_not_known(
    api: Api, fleet: list[str], portal: Portal, clock: Clock
) -> None:
    clock.advance(seconds=60)
    for query in ("connected=true", "connected=false", "connected=never"):
        problem_of(api.get(f"/devices?{query}"), 503, "broker_unavailable")
    assert "".join(names(api, "sort=last_seen")) == "3210"


def test_under_files_nothing_is_known(make_settings: Callable[..., Settings]) -> None:
    app = create_app(make_settings(PORTAL_BROKER_CONTROL="files"), background=False)
    api = api_as(app, Role.ADMIN)
    portal_of(app).follower.follow()
    device_id = api.register()["device_id"]
    assert connections(api, [device_id]) == [{"connected": None, "since": None, "last_seen": None}]
    problem = problem_of(api.get("/devices?connected=true"), 409, "guard_needed")
    assert "PORTAL_BROKER_CONTROL=guard" in problem["detail"]
    portal_of(app).close()


@pytest.mark.parametrize("query", ["connected=yes", "connected=", "sort=newest", "sort=colour"])
def test_other_words_are_refused(api: Api, query: str) -> None:
    problem_of(api.get(f"/devices?{query}"), 422, "invalid_input")


def test_the_number_of_connected_devices_is_measured_while_it_is_known(
    api: Api, fleet: list[str], portal: Portal
) -> None:
    samples = samples_of(api.get("/metrics").text)
    assert value_of(samples, "portal_devices_connected") == 1
    assert value_of(samples, "portal_connections_known") == 1
    portal.follower.contact.lost("x")
    samples = samples_of(api.get("/metrics").text)
    assert ("portal_devices_connected", frozenset()) not in samples
    assert value_of(samples, "portal_connections_known") == 0
