"""An agent tells its portal who is connected beside it, as the guard reports it."""

from __future__ import annotations

from datetime import timedelta

import pytest

from broker_provisioning import BrokerProvisioning
from core.states import PresenceState
from operations.agent import presence as presences
from operations.agent.agent import Agent
from operations.wiring import Portal
from store import agents, brokers
from store.presences import presence_of
from store.scope import ALL_TENANTS
from tests.operations.agent.conftest import Place, register
from tests.support.guard_stub import GuardStub
from tests.support.harness import Clock
from tests.support.links import Link
from tests.workflows.test_presence import Broker


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    """What the guard beside the agent reports."""
    broker = Broker()
    monkeypatch.setattr(BrokerProvisioning, "follow_presence", lambda _self, deadline: broker.follow_presence(deadline))
    return broker


@pytest.fixture
def agent(place: Place, broker: Broker) -> Agent:
    return place.agent()


def states(portal: Portal, *ids: str) -> list[str]:
    with portal.database.snapshot(sees=ALL_TENANTS) as tx:
        found = [presence_of(tx, "default", device_id) for device_id in ids]
    return [PresenceState(one.state).name.lower() for one in found if one is not None]


def test_everybody_is_told_once_then_changes(portal: Portal, agent: Agent, broker: Broker, clock: Clock) -> None:
    one, two = register(portal, 1), register(portal, 2)
    broker.connected = {one: clock(), "a-probe": clock()}
    agent.presence.follow()
    assert states(portal, one, two) == ["connected", "never_seen"]
    broker.tell(connected={two: clock()}, disconnected={one: clock()})
    agent.presence.follow()
    assert states(portal, one, two) == ["offline", "connected"]
    assert len(broker.asked) == 1
    assert agent.presence.known_session is not None


def test_a_large_set_is_told_in_parts(
    portal: Portal,
    agent: Agent,
    broker: Broker,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(presences, "MAX_CLIENTS", 2)
    monkeypatch.setattr("workflows.agents.presence.PAGE", 2)
    ids = [register(portal, number) for number in range(7)]
    broker.connected = dict.fromkeys(ids, clock())
    agent.presence.follow()
    assert states(portal, *ids) == ["connected"] * 7
    broker.connected = {ids[3]: clock()}
    agent.presence.close()
    agent.presence.follow()
    assert states(portal, *ids) == [*["offline"] * 3, "connected", *["offline"] * 3]
    broker.tell(connected=dict.fromkeys(ids, clock() + timedelta(seconds=1)))
    agent.presence.follow()
    assert states(portal, *ids) == ["connected"] * 7


def test_what_happens_while_the_link_is_lost_is_told_afterwards(
    portal: Portal,
    agent: Agent,
    broker: Broker,
    clock: Clock,
    link: Link,
) -> None:
    one, two = register(portal, 1), register(portal, 2)
    agent.presence.follow()
    link.cut()
    broker.tell(connected={one: clock(), two: clock()})
    agent.presence.follow()
    assert agent.presence.known_session is None
    broker.tell(disconnected={one: clock()})
    agent.presence.follow()
    link.join()
    agent.presence.follow()
    assert states(portal, one, two) == ["offline", "connected"]
    assert len(broker.asked) == 1


def test_a_broker_that_was_restarted_reports_everybody_again(
    portal: Portal,
    agent: Agent,
    broker: Broker,
    clock: Clock,
) -> None:
    one, two = register(portal, 1), register(portal, 2)
    broker.connected = {one: clock()}
    agent.presence.follow()
    broker.stop()
    agent.presence.follow()
    assert agent.presence.known_session is None
    with portal.database.snapshot(sees=ALL_TENANTS) as tx:
        assert not brokers.get_broker(tx, "edge").presence_known
    broker.start()
    broker.connected = {two: clock()}
    agent.presence.follow()
    assert states(portal, one, two) == ["offline", "connected"]


def test_a_portal_that_was_restored_is_told_everybody_again(
    portal: Portal,
    place: Place,
    guard: GuardStub,
    broker: Broker,
    clock: Clock,
) -> None:
    device, agent = register(portal), place.agent()
    agent.follow(0)
    broker.connected = {device: clock()}
    agent.presence.follow()
    with portal.database.transaction(sees=ALL_TENANTS) as tx:
        agents.begin_again(tx)
    agent.follow(0)  # which gives a sign of life
    agent.presence.follow()
    assert len(broker.asked) == 2
    assert agent.presence.known_session is not None
