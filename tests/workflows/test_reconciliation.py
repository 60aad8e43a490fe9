"""Whatever changes what the broker must know also asks for the reconciliation that brings it there."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

import db
from core.states import Approval, RepeatedSerial
from operations.wiring import Portal
from pki.csr import read_csr
from pki.est import read_enrolment_request
from store import brokers, generations
from store.enrolment import EnrolmentProfile
from tests.support.brokers import obeys
from tests.support.est import csr_der
from tests.support.harness import ON_SQLITE, PER_DEVICE, Clock, csr_pem
from tests.workflows.test_admission import OPERATOR, Rows, request_of
from workflows.bulk.batch import Candidate
from workflows.enrolment.credentials import Waiting, by_token
from workflows.prompt import Outcome
from workflows.reconciliation import AFTER_FAILURE_SECONDS
from workflows.renewal import RenewalRequest

pytestmark = ON_SQLITE
UseCase = Callable[[Portal], object]


def generation(portal: Portal) -> int:
    with portal.database.snapshot() as tx:
        return generations.get_broker_state(tx).generation


@pytest.fixture
def asked(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The generations that were asked of a broker that obeys at once; ``wake`` asks for the newest one."""
    found = obeys(portal, monkeypatch)
    monkeypatch.setattr(portal.reconciler, "wake", lambda: found.append(generation(portal)))
    return found


def registered(portal: Portal, *, csr: bool = True) -> str:
    return portal.registrations.register(OPERATOR, request_of(1, csr=csr)).device_id


def upload(portal: Portal, *, csr: bool) -> None:
    list(portal.bulk.register(OPERATOR, Rows([Candidate(1, request_of(1, csr=csr))])))


def enrol(portal: Portal, *, approval: Approval = Approval.AT_ONCE) -> None:
    profile = EnrolmentProfile("pump", "hall 1", "1.0", "{serial}", ("ec-p256",), 9, approval, RepeatedSerial.OPERATOR)
    life = timedelta(days=1)
    secret, _ = portal.enrolment_tokens.create(OPERATOR, "batch", profile, device_id=None, count=1, life=life)
    token, request = portal.enrolment_tokens.find(secret), read_enrolment_request(csr_der())
    assert token is not None
    outcome = portal.enrolment.enrol(OPERATOR, by_token(token, request), request)
    if isinstance(outcome, Waiting):
        portal.approvals.approve(OPERATOR, outcome.device_id)
        portal.enrolment.enrol(OPERATOR, by_token(token, request), request)


# Those of devices that the broker has no word of before.
ADMISSIONS: dict[str, UseCase] = {
    "a registration": lambda portal: registered(portal, csr=False),
    "a registration by CSR": registered,
    "an upload": lambda portal: upload(portal, csr=False),
    "an upload of CSRs": lambda portal: upload(portal, csr=True),
    "an enrolment": enrol,
    "an approved enrolment": lambda portal: enrol(portal, approval=Approval.OPERATOR),
}


@PER_DEVICE
@pytest.mark.parametrize("admit", ADMISSIONS.values(), ids=ADMISSIONS)
def test_the_broker_is_updated_for_a_device_that_it_must_know(portal: Portal, asked: list[int], admit: UseCase) -> None:
    before = generation(portal)
    admit(portal)
    assert before < generation(portal) == max(asked)


@pytest.mark.parametrize("admit", [ADMISSIONS["a registration"], ADMISSIONS["an upload"]], ids=["one", "upload"])
def test_under_the_pattern_style_the_broker_is_not_updated_for_a_device_with_the_default_topics(
    portal: Portal, asked: list[int], admit: UseCase
) -> None:
    before = generation(portal)
    admit(portal)
    assert (generation(portal), asked) == (before, [])


def renew(portal: Portal, device_id: str, *, overlap_hours: int) -> None:
    portal.renewals.renew(OPERATOR, device_id, RenewalRequest(csr=read_csr(csr_pem()), overlap_hours=overlap_hours))


def renew_until_used(portal: Portal, device_id: str) -> None:
    renewed = portal.renewals.renew(OPERATOR, device_id, RenewalRequest(csr=read_csr(csr_pem()), when_used=True))
    portal.renewals.used(OPERATOR, device_id, renewed.fingerprint)


def resume(portal: Portal, device_id: str) -> None:
    portal.revocations.suspend(OPERATOR, device_id)
    portal.revocations.resume(OPERATOR, device_id)


CHANGES: dict[str, Callable[[Portal, str], object]] = {
    "a revocation": lambda portal, device_id: portal.revocations.revoke(OPERATOR, device_id, "key_compromise"),
    "a suspension": lambda portal, device_id: portal.revocations.suspend(OPERATOR, device_id),
    "a resumption": resume,
    "other topics": lambda portal, device_id: portal.registrations.update(OPERATOR, device_id, {}, topics=None),
    "a renewal without overlap": lambda portal, device_id: renew(portal, device_id, overlap_hours=0),
    "the use of a new certificate": renew_until_used,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_broker_is_updated_after_a_change(
    portal: Portal, asked: list[int], change: Callable[[Portal, str], object]
) -> None:
    device_id = registered(portal)
    before = generation(portal)
    change(portal, device_id)
    assert before < generation(portal) == max(asked)


def test_the_broker_is_updated_after_a_renewal_destroys_a_bundle(portal: Portal, asked: list[int]) -> None:
    device_id = registered(portal, csr=False)
    portal.renewals.renew(OPERATOR, device_id, RenewalRequest())
    assert generation(portal) == max(asked)


def test_the_broker_is_updated_when_an_overlap_ends(portal: Portal, asked: list[int], clock: Clock) -> None:
    device_id = registered(portal)
    renew(portal, device_id, overlap_hours=1)
    before = generation(portal)
    clock.advance(hours=2)
    assert portal.renewals.end_overlaps() == 1
    assert before < generation(portal) == max(asked)


def test_a_client_that_gets_a_certificate_waits_until_the_broker_knows_the_device(
    portal: Portal, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    apply = portal.reconciler.apply

    def noticed(wanted: int, *, timeout: float | None = None) -> Outcome:
        order.append("applied")
        return apply(wanted, timeout=timeout)

    monkeypatch.setattr(portal.reconciler, "apply", noticed)
    registered(portal)
    order.append("answered")
    assert order == ["applied", "answered"]
    assert asked


def test_requests_give_up_early_only_until_the_broker_has_obeyed_again(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts: list[float] = []

    def fail(timeout: float, enforced: int) -> Outcome:
        timeouts.append(timeout)
        return Outcome(enforced, enforced, "It was too slow.")

    monkeypatch.setattr(portal.reconciler, "_reconcile", fail)
    with portal.database.transaction() as tx:
        newest = db.next_generation(tx, at=portal.clock())
    portal.reconciler.apply(newest)
    portal.reconciler.apply(newest)
    with portal.database.transaction() as tx:  # as the jobs do, in whichever process
        brokers.set_applied_generation(tx, 1, newest, applied_at=portal.clock())
        newest = db.next_generation(tx, at=portal.clock())
    portal.reconciler.apply(newest)
    whole = portal.settings.enforce_timeout
    assert timeouts == [whole, AFTER_FAILURE_SECONDS, whole]
