"""Nothing is called enforced before each broker that counts has proven it, and nobody is told so."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

import db
from core.states import BrokerKind
from operations.wiring import Portal
from store import audit, brokers, generations
from store.tables import WebhookDelivery
from tests.support.brokers import enforce_all, obeys
from tests.support.harness import Clock
from tests.workflows.test_admission import OPERATOR, request_of
from workflows.enforcement import note_applied

Obeying = Callable[[], list[int]]


@pytest.fixture
def portal_of_two(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> Portal:
    """A portal whose own broker obeys at once, with a second one, edge-1, that has everything so far."""
    with portal.database.transaction() as tx:
        brokers.add_broker(tx, "edge-1", BrokerKind.AGENT, at=portal.clock(), joined=True)
        enforce_all(tx)
    obeys(portal, monkeypatch)
    return portal


def device_of(portal: Portal) -> str:
    return portal.registrations.register(OPERATOR, request_of(1, csr=False)).device_id


def reports(portal: Portal, name: str = "edge-1") -> None:
    """The broker of an agent proves that it has everything."""
    with portal.database.transaction() as tx:
        newest = generations.get_broker_state(tx).generation
        note_applied(tx, brokers.get_broker(tx, name).id, newest, at=portal.clock())
    portal.reconciler.heard_of_another()


def impatient(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a revocation wait for the portal's own broker alone, which is given all its time."""
    others = portal.reconciler._others
    wait = others.wait_for_all
    monkeypatch.setattr(others, "wait_for_all", lambda generation, _deadline: wait(generation, 0.0))


def test_a_revocation_is_pending_while_another_broker_lacks_it_which_the_answer_names(
    portal_of_two: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(portal_of_two, monkeypatch)
    device_id = device_of(portal_of_two)
    for _ in range(2):  # a repeat, too, though its own broker has it
        answer = portal_of_two.revocations.revoke(OPERATOR, device_id, "unspecified")
        assert not answer.enforced
        assert answer.problem == "edge-1 was not seen to enforce it yet."
    shown = portal_of_two.enforcements.of("default", device_id)
    assert shown is not None
    assert not shown.is_enforced
    reports(portal_of_two)
    assert portal_of_two.revocations.revoke(OPERATOR, device_id, "unspecified").enforced


def test_it_is_enforced_as_soon_as_the_last_one_has_reported(portal_of_two: Portal) -> None:
    device_id = device_of(portal_of_two)
    looked, wait = threading.Event(), portal_of_two.reconciler._others._heard.wait

    def look(timeout: float | None = None) -> bool:
        looked.set()
        return wait(timeout)

    portal_of_two.reconciler._others._heard.wait = look  # type: ignore[method-assign]
    found = []
    thread = threading.Thread(
        target=lambda: found.append(portal_of_two.revocations.revoke(OPERATOR, device_id, "unspecified").enforced)
    )
    thread.start()
    assert looked.wait(10)
    reports(portal_of_two)
    thread.join(10)
    assert found == [True]


def test_one_that_comes_back_counts_for_what_was_enforced_without_it(
    portal_of_two: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(portal_of_two, monkeypatch)
    device_id = device_of(portal_of_two)
    portal_of_two.brokers.declare_away(OPERATOR, "edge-1", "closed")
    assert portal_of_two.revocations.revoke(OPERATOR, device_id, "unspecified").enforced
    portal_of_two.brokers.declare_back(OPERATOR, "edge-1")
    assert not portal_of_two.revocations.revoke(OPERATOR, device_id, "unspecified").enforced


def test_a_download_waits_for_its_own_broker_alone(portal_of_two: Portal) -> None:
    with portal_of_two.database.transaction() as tx:
        generation = db.next_generation(tx, at=portal_of_two.clock())
    portal_of_two.reconciler.wait_until_granted(generation)


class TestEvents:
    @pytest.fixture(autouse=True)
    def _subscribed(self, portal_of_two: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
        portal_of_two.webhooks.create(OPERATOR, "all", "https://example.com/hook", [])

    @staticmethod
    def told(portal: Portal) -> list[str]:
        with portal.database.snapshot() as tx:
            rows = tx.execute(sa.select(WebhookDelivery.type).order_by(WebhookDelivery.id)).scalars()
            return [kind for kind in rows if "broker" in kind]

    def test_a_device_is_told_to_be_pending_and_then_enforced_once(
        self, portal_of_two: Portal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        impatient(portal_of_two, monkeypatch)
        portal_of_two.revocations.revoke(OPERATOR, device_of(portal_of_two), "unspecified")
        assert self.told(portal_of_two) == ["broker_pending"]
        reports(portal_of_two)
        reports(portal_of_two)
        assert self.told(portal_of_two) == ["broker_pending", "broker_enforced"]

    def test_nothing_is_told_again_when_a_broker_joins(self, portal_of_two: Portal) -> None:
        portal_of_two.brokers.declare_away(OPERATOR, "edge-1", "closed")
        portal_of_two.revocations.revoke(OPERATOR, device_of(portal_of_two), "unspecified")
        before = self.told(portal_of_two)
        with portal_of_two.database.transaction() as tx:
            brokers.add_broker(tx, "edge-2", BrokerKind.AGENT, at=portal_of_two.clock(), joined=True)
        reports(portal_of_two, "edge-2")
        assert self.told(portal_of_two) == before


def test_one_beside_a_node_is_not_removed(portal_of_two: Portal) -> None:
    with pytest.raises(Exception, match="declare it away"):
        portal_of_two.brokers.remove(OPERATOR, "main", "main")


def test_each_act_is_recorded(portal_of_two: Portal, clock: Clock) -> None:
    portal_of_two.brokers.set_address(OPERATOR, "edge-1", "edge-1.example.com:8883")
    for _ in range(2):
        portal_of_two.brokers.declare_away(OPERATOR, "edge-1", "closed")
    portal_of_two.brokers.declare_back(OPERATOR, "edge-1")
    portal_of_two.brokers.remove(OPERATOR, "edge-1", "edge-1")
    with portal_of_two.database.snapshot() as tx:
        assert recorded(tx) == ["broker:update", "broker:away", "broker:back", "broker:remove"]


def recorded(tx: Connection) -> list[str]:
    entries = audit.list_audit_entries(tx, "default", limit=50, filters={"object": "broker:edge-1"})
    return [entry.action for entry in entries][::-1]


def test_an_agent_that_is_not_heard_of_is_named_and_what_it_has_proven_stays(
    portal_of_two: Portal, clock: Clock
) -> None:
    reports(portal_of_two)
    clock.advance(seconds=30)
    assert portal_of_two.brokers.show("edge-1").problem is None
    clock.advance(seconds=31)
    state = portal_of_two.brokers.show("edge-1")
    assert (state.standing, state.code) == ("enforced", "broker_silent")
    for said in (state.problem, state.sentence):
        assert "Its agent has not reported since" in (said or "")
    assert portal_of_two.brokers.show("main").sentence is None  # nobody reports about it but the portal itself
    with portal_of_two.database.transaction() as tx:
        brokers.set_problem(tx, state.record.id, None, at=clock())
    assert portal_of_two.brokers.show("edge-1").sentence is None


def test_one_that_is_away_is_not_missed(portal_of_two: Portal, clock: Clock) -> None:
    portal_of_two.brokers.declare_away(OPERATOR, "edge-1", "The site is closed")
    clock.advance(days=1)
    assert portal_of_two.brokers.show("edge-1").problem is None
