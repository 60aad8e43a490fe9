"""How a revocation took hold is shown step by step: what was proven, when, and nothing that was not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from flask import Flask

from app import portal_of
from broker.control import Step
from broker_provisioning import BrokerProvisioning
from config import Settings
from core.errors import BrokerUnavailable
from operations.wiring import Portal, utc_now
from tests.support.guarded import guarded_app
from tests.support.harness import Clock
from tests.workflows.test_admission import OPERATOR, request_of
from workflows.enforcement import SLOT_BYTES, SLOTS, Enforcement, Progress, SharedAnswer, StepsFile

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


def test_another_process_reads_the_same(portal: Portal, device_id: str) -> None:
    portal.revocations.revoke(OPERATOR, device_id, "unspecified")
    found = shown(portal, device_id)
    elsewhere = StepsFile(portal.settings.data_dir / ".enforcement").read(found.device.generation)
    assert elsewhere[-1].proven == found.proven


def test_steps_of_before_a_restored_backup_are_not_taken_for_its_own(portal: Portal, device_id: str) -> None:
    portal.revocations.revoke(OPERATOR, device_id, "unspecified")
    generation = shown(portal, device_id).device.generation
    portal.reconciler.steps.path.unlink()
    before = portal.reconciler.steps
    Progress(before, generation - 1, generation, utc_now() - timedelta(days=1)).proven(*Step)
    assert len(before.read(generation)) == 1
    found = shown(portal, device_id)
    assert (found.proven, found.is_enforced) == ({}, True)


def test_a_later_change_of_topics_is_not_taken_for_the_suspension(portal: Portal, device_id: str) -> None:
    portal.revocations.suspend(OPERATOR, device_id)
    portal.registrations.update(OPERATOR, device_id, {}, [("devices/{id}/x", "read")])
    found = shown(portal, device_id)
    assert (found.proven, found.is_enforced) == ({}, True)


def test_the_file_keeps_the_newest_generations_in_a_fixed_size_and_what_is_damaged_counts_as_unknown(
    tmp_path: Path,
) -> None:
    file = StepsFile(tmp_path / "steps")
    assert file.read(1) == []
    for generation in range(1, SLOTS + 3):
        Progress(file, generation - 1, generation, utc_now()).proven(*Step)
    assert file.path.stat().st_size == SLOTS * SLOT_BYTES
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert file.read(2) == []
    assert [attempt.generation for attempt in file.read(SLOTS)] == [SLOTS]
    content = bytearray(file.path.read_bytes())
    content[30] ^= 1  # in the slot of the generation SLOTS
    file.path.write_bytes(content)
    assert file.read(SLOTS) == []
    file.path.write_bytes(b"short")
    assert file.read(SLOTS) == []


def test_a_long_problem_is_cut_to_its_slot(tmp_path: Path) -> None:
    file = StepsFile(tmp_path / "steps")
    Progress(file, 0, 1, utc_now()).failed("ä" * 500)
    [attempt] = file.read(1)
    assert attempt.problem.startswith("äää")
    assert attempt.proven == {}
    assert file.path.stat().st_size == 2 * SLOT_BYTES


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
