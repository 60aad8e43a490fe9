"""Who is connected to the brokers of agents: what one is believed, and what is known while it is cut off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

import pytest
from flask import Flask

from app import portal_of
from config import Settings
from core.errors import StateConflict
from core.roles import Role
from core.states import PresenceState
from operations.wiring import Portal
from store import agents
from store.presences import PresenceRecord, Sighting, presence_of, record_presences
from store.scope import ALL_TENANTS
from tests.support.guarded import guarded_app
from tests.support.harness import Clock, api_as
from tests.workflows.agents.test_agents import given_page, joined, register, state_of
from tests.workflows.test_admission import OPERATOR
from workflows import connections
from workflows.agents.agents import Report
from workflows.agents.presence import Part, ToldPresence
from workflows.connections import AGENT_SECONDS, DeviceConnection

HERE = 1  # the broker beside the portal
SESSION, OTHER = "a" * 32, "b" * 32
ALL = Part("", None)
Times = Mapping[str, int]


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    settings = make_settings(PORTAL_BROKER_CONTROL="guard", PORTAL_AGENTS_BIND="127.0.0.1:8444")
    with guarded_app(settings, clock, monkeypatch) as built:
        yield built


@pytest.fixture
def portal(app: Flask) -> Portal:
    return portal_of(app)


@pytest.fixture(autouse=True)
def others_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "OTHERS_SECONDS", 0.0)


class Edge:
    """An agent as far as it tells who is connected."""

    def __init__(self, portal: Portal, name: str = "edge") -> None:
        self.portal, self.name = portal, name
        self.certificate = joined(portal, name)
        self.session, self.number = SESSION, 0

    @property
    def id(self) -> int:
        return state_of(self.portal, self.name).id

    def now(self) -> int:
        return int(self.portal.clock().timestamp())

    def tell(
        self,
        connected: Times | None = None,
        disconnected: Times | None = None,
        *,
        part: Part | None = None,
        known: bool = True,
        at: float | None = None,
    ) -> str | None:
        self.number += 1
        time = self.portal.clock().timestamp() if at is None else at
        told = ToldPresence(self.session, self.number, time, part, connected or {}, disconnected or {}, known)
        return self.portal.agent_presences.take(self.portal.agents.shown(self.certificate), told)

    def tell_all(self, connected: Times | None = None, **options: Any) -> None:
        self.tell(connected, part=ALL, **options)


@pytest.fixture
def edge(portal: Portal) -> Edge:
    return Edge(portal)


@pytest.fixture
def device(portal: Portal) -> str:
    portal.follower.contact.made("x")
    return register(portal)


def recorded(portal: Portal, device_id: str) -> PresenceRecord | None:
    with portal.database.snapshot(sees=ALL_TENANTS) as tx:
        return presence_of(tx, "default", device_id)


def shown(portal: Portal, device_id: str) -> DeviceConnection | None:
    return portal.inventory.device("default", device_id).connection


def is_near(at: datetime | None, expected: datetime) -> bool:
    """Whether it is the time, but for parts of a second, which messages do not have."""
    return at is not None and abs(at - expected) < timedelta(seconds=2)


def is_connected(portal: Portal, device_id: str) -> bool | None:
    connection = shown(portal, device_id)
    assert connection is not None
    return connection.connected


def test_a_device_at_the_broker_of_an_agent_is_connected_and_then_is_not(edge: Edge, device: str, clock: Clock) -> None:
    portal, since = edge.portal, edge.now()
    edge.tell_all()
    assert shown(portal, device) is None  # never seen, and both brokers are heard
    edge.tell({device: since})
    connection = shown(portal, device)
    assert connection is not None
    assert connection.connected is True
    assert is_near(connection.last_seen, clock())
    clock.advance(seconds=7)
    edge.tell(disconnected={device: edge.now()})
    connection = shown(portal, device)
    assert connection is not None
    assert connection.connected is False
    assert is_near(connection.last_seen, clock())


def test_the_whole_set_of_one_broker_ends_no_connection_of_another(edge: Edge, device: str, clock: Clock) -> None:
    portal, another, beside = edge.portal, Edge(edge.portal, "edge-2"), register(edge.portal, 2)
    edge.tell_all({device: edge.now()})
    with portal.database.transaction(sees=ALL_TENANTS) as tx:
        record_presences(tx, HERE, {beside: Sighting(PresenceState.CONNECTED, clock())})
    another.tell_all()
    assert (is_connected(portal, device), is_connected(portal, beside)) == (True, True)
    edge.session = OTHER
    edge.tell_all()
    assert (is_connected(portal, device), is_connected(portal, beside)) == (False, True)


def test_an_agent_that_is_cut_off_makes_its_own_devices_unknown_and_no_others(
    app: Flask, edge: Edge, device: str, clock: Clock
) -> None:
    portal, other, api = edge.portal, register(edge.portal, 2), api_as(app, Role.ADMIN)
    edge.tell_all({device: edge.now()})
    heard = clock()
    with portal.database.transaction(sees=ALL_TENANTS) as tx:
        record_presences(tx, HERE, {other: Sighting(PresenceState.CONNECTED, clock())})
    clock.advance(seconds=AGENT_SECONDS + 1)
    portal.follower.contact.made("x")
    connection = shown(portal, device)
    assert connection is not None
    assert (connection.connected, connection.since) == (None, None)
    assert is_near(connection.last_seen, heard)
    assert is_connected(portal, other) is True

    def listed(query: str) -> list[str]:
        return [one["device_id"] for one in api.get(f"/devices?{query}").json["devices"]]

    assert listed("connected=true") == listed("connected=true&sort=name") == [other]
    assert listed("connected=false") == []
    edge.tell()
    assert sorted(listed("connected=true")) == sorted([device, other])


def test_a_sign_of_life_of_who_has_told_all_keeps_it_known(edge: Edge, device: str, clock: Clock) -> None:
    portal, page = edge.portal, given_page(edge.portal, edge.certificate)
    edge.tell_all({device: edge.now()})
    clock.advance(seconds=AGENT_SECONDS + 1)
    portal.follower.contact.made("x")

    def report(session: str | None) -> bool:
        mark = Report(page.generation, page.digest, None, session)
        return portal.agents.report(portal.agents.shown(edge.certificate), mark)

    assert not report(None)
    assert not report(OTHER)
    assert is_connected(portal, device) is None
    assert report(SESSION)
    assert is_connected(portal, device) is True


def test_what_an_agent_has_not_told_to_the_end_is_not_known(edge: Edge, device: str) -> None:
    edge.tell_all({device: edge.now()}, known=False)
    assert is_connected(edge.portal, device) is None
    edge.tell(known=True)
    assert is_connected(edge.portal, device) is True
    edge.tell(known=False)  # its guard does not report any more
    assert is_connected(edge.portal, device) is None


def test_a_large_whole_set_is_taken_in_part_by_part(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workflows.agents.presence.PAGE", 2)
    portal, ids = edge.portal, sorted(register(edge.portal, number) for number in range(6))
    since = edge.now()
    edge.tell_all(dict.fromkeys(ids, since))
    edge.session = OTHER
    parts, after = list[str | None](), ""
    while True:  # of all of them the first and the last are connected still
        done = edge.tell({ids[0]: since, ids[-1]: since}, part=Part(after, None))
        parts.append(done)
        if done is None:
            break
        after = done
    assert len(parts) > 2  # each with a limited amount of work
    states = [one.state for one in (recorded(portal, who) for who in ids) if one is not None]
    on, off = PresenceState.CONNECTED, PresenceState.OFFLINE
    assert states == [on, off, off, off, off, on]


def test_a_message_that_arrives_late_or_follows_nothing_is_refused(edge: Edge, device: str) -> None:
    with pytest.raises(StateConflict):
        edge.tell({device: edge.now()})
    edge.tell_all()
    edge.tell({device: edge.now()})
    edge.tell(disconnected={device: edge.now()})
    edge.number = 1
    with pytest.raises(StateConflict):
        edge.tell({device: edge.now()})
    assert is_connected(edge.portal, device) is False
    edge.session, edge.number = OTHER, 9
    with pytest.raises(StateConflict):
        edge.tell({device: edge.now()})


def test_after_a_restore_everybody_is_told_again(edge: Edge, device: str) -> None:
    edge.tell_all({device: edge.now()})
    with edge.portal.database.transaction(sees=ALL_TENANTS) as tx:
        agents.begin_again(tx)
    with pytest.raises(StateConflict):
        edge.tell({device: edge.now()})


# --- One that lies ---------------------------------------------------------------------------------------------------


def test_it_is_believed_of_no_device_that_brokers_do_not_admit(edge: Edge, device: str) -> None:
    portal, never = edge.portal, register(edge.portal, 2)
    for device_id in (device, never):
        portal.revocations.revoke(OPERATOR, device_id, "unspecified")
    edge.tell_all({device: edge.now(), never: edge.now(), "0" * 8 + "-0000-0000-0000-" + "0" * 12: edge.now()})
    assert shown(portal, device) is shown(portal, never) is None


def test_it_ends_no_connection_at_another_broker(edge: Edge, device: str, clock: Clock) -> None:
    portal = edge.portal
    with portal.database.transaction(sees=ALL_TENANTS) as tx:
        record_presences(tx, HERE, {device: Sighting(PresenceState.CONNECTED, clock())})
    edge.tell_all()
    edge.tell({device: edge.now() + 1})
    edge.tell(disconnected={device: edge.now() + 1})
    known = recorded(portal, device)
    assert known is not None
    assert (known.state, known.broker_id) == (PresenceState.CONNECTED, HERE)


@pytest.mark.parametrize("seconds", [0, 253402300799])
def test_its_times_are_between_its_joining_and_now(edge: Edge, device: str, clock: Clock, seconds: int) -> None:
    start = state_of(edge.portal, "edge").joined_at
    assert start is not None
    clock.advance(hours=1)
    edge.tell_all({device: seconds})
    known = recorded(edge.portal, device)
    assert known is not None
    assert start <= known.since <= clock()


def test_a_clock_that_is_wrong_there_moves_nothing(edge: Edge, device: str, clock: Clock) -> None:
    clock.advance(hours=10)
    wrong = edge.now() - 7200
    edge.tell_all({device: wrong - 60}, at=wrong)
    known = recorded(edge.portal, device)
    assert known is not None
    assert is_near(known.since, clock() - timedelta(seconds=60))


def test_the_devices_of_a_broker_that_is_removed_are_not_connected_there_any_more(edge: Edge, device: str) -> None:
    portal = edge.portal
    edge.tell_all({device: edge.now()})
    portal.brokers.remove(OPERATOR, "edge", "edge")
    known = recorded(portal, device)
    assert known is not None
    assert known.state is PresenceState.OFFLINE
