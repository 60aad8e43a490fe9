"""How a revocation took hold is shown step by step: what was proven, when, and nothing that was not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import NoReturn

import pytest
from flask import Flask

from app import portal_of
from broker.control import Step
from broker_provisioning import BrokerProvisioning
from config import Settings
from core.errors import BrokerUnavailable, DatabaseUnavailable, LockUnavailable
from core.states import BrokerKind
from operations.wiring import Portal, utc_now
from store import brokers, enforcement, generations
from tests.support.guarded import guarded_app
from tests.support.harness import Clock
from tests.workflows.test_admission import OPERATOR, request_of
from workflows.enforcement import PRUNED_EVERY, Enforcement, Progress, SharedAnswer, note_applied

TENANT = OPERATOR.tenant_id


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    with guarded_app(make_settings(PORTAL_BROKER_CONTROL="guard"), clock, monkeypatch) as built:
        yield built


@pytest.fixture
def portal(app: Flask) -> Portal:
    return portal_of(app)


@pytest.fixture
def device_id(portal: Portal) -> str:
    return portal.registrations.register(OPERATOR, request_of(1, csr=False)).device_id


def shown(portal: Portal, device_id: str) -> Enforcement:
    found = portal.enforcements.of(TENANT, device_id)
    assert found is not None
    return found


def test_what_was_drafted_is_dropped_if_the_crls_for_it_are_not_to_be_had(
    portal: Portal, device_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_arguments: object) -> NoReturn:
        raise LockUnavailable("CRLs are being signed.")

    portal.broker.begin_again()  # a whole journal is written, beside the old one
    with monkeypatch.context() as patched:
        patched.setattr(portal.reconciler.crls, "trust", busy)
        revoked = portal.revocations.revoke(OPERATOR, device_id, "key_compromise")
    assert [one.name for one in portal.settings.broker_dir.glob(".*.tmp")] == []
    assert revoked.problem == "CRLs are being signed."


def test_each_step_of_a_revocation_is_known_with_its_time_in_order(portal: Portal, device_id: str) -> None:
    assert portal.enforcements.of(TENANT, device_id) is None
    portal.revocations.revoke(OPERATOR, device_id, "key_compromise")
    found = shown(portal, device_id)
    assert [*found.proven] == [*Step]
    times = [found.recorded_at, *found.proven.values()]
    assert times == sorted(times)
    assert times[-1] - times[0] < timedelta(seconds=5)
    assert (found.is_enforced, found.problem) == (True, None)


def test_a_suspension_has_the_same_steps_and_a_resumption_none(portal: Portal, device_id: str) -> None:
    portal.revocations.suspend(OPERATOR, device_id)
    assert {*shown(portal, device_id).proven} == {*Step}
    portal.revocations.resume(OPERATOR, device_id)
    assert portal.enforcements.of(TENANT, device_id) is None


def test_what_is_not_proven_is_pending_with_the_reason(
    portal: Portal, device_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_arguments: object, **_options: object) -> None:
        raise BrokerUnavailable("The broker does not answer in time.")

    with monkeypatch.context() as patch:
        patch.setattr(portal.broker, "disconnect", fails)
        portal.revocations.revoke(OPERATOR, device_id, "unspecified")
    pending = shown(portal, device_id)
    assert {*pending.proven} == {Step.DENIED, Step.REFUSED}
    assert (pending.is_enforced, pending.problem) == (False, "The broker does not answer in time.")
    portal.reconciler.apply(pending.device.generation)
    enforced = shown(portal, device_id)
    assert {*enforced.proven} == {*Step}
    assert enforced.proven[Step.DENIED] == pending.proven[Step.DENIED]  # it was proven then
    assert (enforced.is_enforced, enforced.problem) == (True, None)


def test_before_any_attempt_all_is_pending_and_a_broker_that_is_away_is_the_reason(
    portal: Portal, device_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portal.reconciler, "_run", lambda *_: (_ for _ in ()).throw(BrokerUnavailable("away")))
    monkeypatch.setattr(BrokerProvisioning, "reachable", lambda _self: False)
    portal.revocations.revoke(OPERATOR, device_id, "unspecified")
    found = shown(portal, device_id)
    assert (found.proven, found.is_enforced) == ({}, False)
    assert found.problem == "The broker does not answer on its internal listener."


def test_a_later_change_of_topics_is_not_taken_for_the_suspension(portal: Portal, device_id: str) -> None:
    portal.revocations.suspend(OPERATOR, device_id)
    portal.registrations.update(OPERATOR, device_id, {}, [("devices/{id}/x", "read")])
    found = shown(portal, device_id)
    assert (found.proven, found.is_enforced) == ({}, True)


def test_while_a_reconciliation_takes_longer_what_it_has_proven_is_shown(
    portal: Portal, device_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.enforcement.SHOWN_AFTER_SECONDS", 0.0)
    disconnect, meanwhile = portal.broker.disconnect, list[Enforcement]()

    def looks(*arguments: object, **options: object) -> None:
        meanwhile.append(shown(portal, device_id))
        disconnect(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(portal.broker, "disconnect", looks)
    portal.revocations.revoke(OPERATOR, device_id, "unspecified")
    assert [({*one.proven}, one.is_enforced) for one in meanwhile] == [({Step.DENIED, Step.REFUSED}, False)]


def test_what_could_not_be_recorded_is_not_called_enforced(
    portal: Portal, device_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(brokers, "take_turns", lambda _tx: (_ for _ in ()).throw(DatabaseUnavailable("away")))
        portal.revocations.revoke(OPERATOR, device_id, "unspecified")
    found = shown(portal, device_id)
    assert ({*found.proven}, found.problem) == ({*Step} - {Step.ENFORCED}, "away")


def edge(portal: Portal) -> Callable[[datetime], None]:
    """Add a broker beside another node; return what has it prove the newest change, at a time."""
    with portal.database.transaction() as tx:
        added = brokers.add_broker(tx, "edge", BrokerKind.NODE, at=utc_now(), joined=True)

    def proves(at: datetime) -> None:
        with portal.database.transaction() as tx:
            newest = generations.get_broker_state(tx).generation
            steps = Progress(portal.database, added.id, newest - 1, newest, at)
            steps.proven(*Step)
            steps.record(tx)
            note_applied(tx, added.id, newest, at=at)

    return proves


def wait_for_no_other(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a revocation wait for the portal's own broker alone, which is given all its time."""
    others = portal.reconciler._others
    wait = others.wait_for_all
    monkeypatch.setattr(others, "wait_for_all", lambda generation, _deadline: wait(generation, 0.0))


def test_a_step_is_proven_once_each_broker_that_counts_has_proven_it_which_is_its_time(
    portal: Portal, device_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_no_other(portal, monkeypatch)
    proves = edge(portal)
    portal.revocations.revoke(OPERATOR, device_id, "unspecified")
    pending = shown(portal, device_id)
    assert (pending.proven, pending.is_enforced) == ({}, False)
    assert pending.problem == "edge was not seen to enforce it yet."
    later = pending.recorded_at + timedelta(minutes=1)
    proves(later)
    found = shown(portal, device_id)
    assert ([*found.proven], found.is_enforced) == ([*Step], True)
    assert all(at >= later for at in found.proven.values())


def test_a_broker_whose_steps_are_not_told_hides_those_of_the_others_until_it_enforces(
    portal: Portal, device_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_no_other(portal, monkeypatch)
    with portal.database.transaction() as tx:
        agent = brokers.add_broker(tx, "agent", BrokerKind.AGENT, at=utc_now(), joined=True)
    portal.revocations.revoke(OPERATOR, device_id, "unspecified")
    assert shown(portal, device_id).proven == {}
    with portal.database.transaction() as tx:
        note_applied(tx, agent.id, generations.get_broker_state(tx).generation, at=utc_now())
    assert [*shown(portal, device_id).proven] == [*Step]


def test_the_newest_generations_are_kept(portal: Portal) -> None:
    def proves(generation: int) -> None:
        with portal.database.transaction() as tx:
            Progress(portal.database, 1, generation - PRUNED_EVERY, generation, utc_now()).record(tx)

    with portal.database.snapshot() as tx:
        first = generations.get_broker_state(tx).generation + PRUNED_EVERY
    last = first + enforcement.KEPT
    for generation in range(first, last + 1, PRUNED_EVERY):
        proves(generation)
    with portal.database.snapshot() as tx:
        assert enforcement.attempts(tx, first) == []
        assert [one.generation for one in enforcement.attempts(tx, last)] == [last]


def test_a_broker_that_hangs_is_asked_once_by_many_that_watch_it() -> None:
    asked, hanging, released = [], threading.Event(), threading.Event()

    def answers() -> bool:
        asked.append(1)
        hanging.set()
        assert released.wait(30)
        return False

    shared = SharedAnswer(answers)
    first = threading.Thread(target=shared)
    first.start()
    assert hanging.wait(30)
    assert shared()  # nothing is known yet, and nobody waits
    released.set()
    first.join()
    assert not any(shared() for _ in range(9))
    assert len(asked) == 1


def test_after_a_while_the_broker_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workflows.enforcement.ANSWER_SECONDS", 0.0)
    answers = iter([False, True])
    shared = SharedAnswer(lambda: next(answers))
    assert [shared(), shared()] == [False, True]
