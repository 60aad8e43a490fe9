"""Renewals, against a real database, CA and files; the broker does not run."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import sqlalchemy as sa
from cryptography import x509

from core.errors import IdempotencyConflict, InputInvalid, LinkExpired, LinkRevoked, StateConflict
from core.states import DeliveryStatus
from operations import jobs
from operations.wiring import Portal
from pki.csr import read_csr
from store import certificates as store_certificates
from store import generations
from store.certificates import CertificateRecord
from store.devices import DeviceFilter
from store.tables import Delivery
from tests.support.harness import ON_SQLITE, Api, Clock, csr_pem, problem_of
from tests.workflows.test_registration import OPERATOR, PUMP, token_of, with_fields
from workflows.registration import Registered
from workflows.renewal import MAX_VALID, RenewalRequest, Renewed

KEY = "a-key-of-16-chars"


def by_csr(**changed: object) -> RenewalRequest:
    return RenewalRequest(csr=read_csr(csr_pem()), **changed)  # type: ignore[arg-type]  # each test says which


def certificates(portal: Portal, device_id: str) -> list[CertificateRecord]:
    """Oldest first."""
    with portal.database.snapshot() as tx:
        return list(store_certificates.device_certificates(tx, "default", device_id))[::-1]


def statuses(portal: Portal, device_id: str) -> list[str]:
    return [certificate.status for certificate in certificates(portal, device_id)]


def link(renewed: Renewed) -> str:
    assert renewed.download_url is not None
    return renewed.download_url.rpartition("/")[2]


def fetch(portal: Portal, token: str) -> None:
    portal.deliveries.deliver(OPERATOR, token)


def register_by_csr(portal: Portal) -> Registered:
    return portal.registrations.register(OPERATOR, with_fields(csr=csr_pem()))


def generation(portal: Portal) -> int:
    with portal.database.snapshot() as tx:
        return generations.get_broker_state(tx).generation


def listed(portal: Portal, certificate: CertificateRecord) -> x509.RevokedCertificate | None:
    crl = x509.load_pem_x509_crl(portal.settings.broker_file("crl.pem").read_bytes())
    return crl.get_revoked_certificate_by_serial_number(int(certificate.serial_number, 16))


def test_a_renewed_device_has_two_certificates_until_the_overlap_has_ended(portal: Portal, clock: Clock) -> None:
    device = register_by_csr(portal)
    before = generation(portal)
    renewed = portal.renewals.renew(OPERATOR, device.device_id, by_csr())
    assert renewed.certificate is not None
    assert x509.load_pem_x509_certificate(renewed.certificate.encode()).subject.rfc4514_string() == (
        f"CN={device.device_id}"
    )
    assert renewed.previous_valid_until == renewed.issued_at + timedelta(hours=24)
    assert statuses(portal, device.device_id) == ["replaced", "active"]
    assert generation(portal) == before, "nothing changes for the broker: it knows the device by its id"
    jobs.expire(portal)
    assert statuses(portal, device.device_id) == ["replaced", "active"]
    clock.advance(hours=24, seconds=1)
    jobs.expire(portal)
    assert statuses(portal, device.device_id) == ["revoked", "active"]
    entry = listed(portal, certificates(portal, device.device_id)[0])
    assert entry is not None
    assert entry.extensions.get_extension_for_class(x509.CRLReason).value.reason is x509.ReasonFlags.superseded
    with portal.database.snapshot() as tx:
        assert generations.devices_to_disconnect(tx, since=before) == [device.device_id]
    of_device = {"object": f"device:{device.device_id}"}
    actions = [entry.action for entry in portal.operators.audit("default", limit=2, before=None, filters=of_device)[0]]
    assert actions == ["certificate:supersede", "device:renew"]


def test_an_overlap_of_nothing_ends_the_older_ones_at_once(portal: Portal) -> None:
    device = register_by_csr(portal)
    portal.renewals.renew(OPERATOR, device.device_id, by_csr())
    renewed = portal.renewals.renew(OPERATOR, device.device_id, by_csr(overlap_hours=0))
    assert (renewed.ended, renewed.previous_valid_until) == (True, None)
    assert renewed.problem is not None, "the broker does not run"
    assert statuses(portal, device.device_id) == ["revoked", "revoked", "active"]
    assert listed(portal, certificates(portal, device.device_id)[0])


def test_with_a_bundle_the_older_certificate_keeps_working_until_the_bundle_was_fetched(
    portal: Portal, clock: Clock
) -> None:
    device = register_by_csr(portal)
    renewed = portal.renewals.renew(OPERATOR, device.device_id, RenewalRequest(overlap_hours=1))
    clock.advance(hours=2)
    jobs.expire(portal)
    assert statuses(portal, device.device_id) == ["replaced", "active"]
    fetch(portal, link(renewed))
    jobs.expire(portal)
    assert statuses(portal, device.device_id) == ["revoked", "active"]


def test_a_renewal_that_nobody_fetched_is_undone(portal: Portal, clock: Clock) -> None:
    device = register_by_csr(portal)
    renewed = portal.renewals.renew(OPERATOR, device.device_id, RenewalRequest())
    clock.advance(hours=24, seconds=1)
    jobs.expire(portal)
    assert statuses(portal, device.device_id) == ["active", "revoked"]
    assert certificates(portal, device.device_id)[1].revocation_reason == "superseded"
    with pytest.raises(LinkRevoked):
        portal.deliveries.deliver(OPERATOR, link(renewed))
    clock.advance(days=30)
    jobs.expire(portal)
    assert statuses(portal, device.device_id) == ["active", "revoked"]


def test_a_bundle_that_was_not_fetched_is_destroyed_by_the_next_renewal(portal: Portal) -> None:
    device = portal.registrations.register(OPERATOR, PUMP)
    renewed = portal.renewals.renew(OPERATOR, device.device_id, RenewalRequest())
    assert renewed.previous_valid_until is None
    with pytest.raises(LinkRevoked):
        portal.deliveries.deliver(OPERATOR, token_of(device))
    again = portal.renewals.renew(OPERATOR, device.device_id, RenewalRequest())
    assert statuses(portal, device.device_id) == ["revoked", "revoked", "active"]
    with portal.database.snapshot() as tx:
        assert generations.devices_to_disconnect(tx, since=0) == [], "no session can have begun with such a key"
    fetch(portal, link(again))


def test_a_lost_answer_is_repeated_by_its_key_and_another_key_gives_another(portal: Portal) -> None:
    device = register_by_csr(portal)
    renewal = by_csr()
    first = portal.renewals.renew(OPERATOR, device.device_id, renewal, KEY)
    assert portal.renewals.renew(OPERATOR, device.device_id, renewal, KEY) == first
    with pytest.raises(IdempotencyConflict):
        portal.renewals.renew(OPERATOR, device.device_id, by_csr(), KEY)
    assert portal.renewals.renew(OPERATOR, device.device_id, renewal).serial_number != first.serial_number
    assert statuses(portal, device.device_id) == ["replaced", "replaced", "active"]


def test_a_device_has_a_few_certificates_at_a_time_and_no_more(portal: Portal, clock: Clock) -> None:
    device = register_by_csr(portal)
    for _ in range(MAX_VALID - 1):
        portal.renewals.renew(OPERATOR, device.device_id, by_csr())
    with pytest.raises(StateConflict, match=f"has {MAX_VALID} valid certificates"):
        portal.renewals.renew(OPERATOR, device.device_id, by_csr())
    clock.advance(hours=25)
    jobs.expire(portal)
    portal.renewals.renew(OPERATOR, device.device_id, by_csr())


def test_renewals_at_once_under_one_key_make_one_certificate(portal: Portal) -> None:
    device = register_by_csr(portal)
    renewal, start = by_csr(), threading.Barrier(4)

    def renew(_: int) -> Renewed:
        start.wait()
        return portal.renewals.renew(OPERATOR, device.device_id, renewal, KEY)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(renew, range(4)))) == 1
    assert statuses(portal, device.device_id) == ["replaced", "active"]


def test_renewals_at_once_each_make_one(portal: Portal) -> None:
    device = register_by_csr(portal)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: portal.renewals.renew(OPERATOR, device.device_id, by_csr()), range(3)))
    assert statuses(portal, device.device_id) == ["replaced", "replaced", "replaced", "active"]


@ON_SQLITE
def test_only_a_device_that_is_in_renews(portal: Portal) -> None:
    device = register_by_csr(portal)
    portal.revocations.suspend(OPERATOR, device.device_id)
    with pytest.raises(StateConflict, match="suspended"):
        portal.renewals.renew(OPERATOR, device.device_id, by_csr())
    portal.revocations.revoke(OPERATOR, device.device_id, "unspecified")
    with pytest.raises(StateConflict, match="revoked"):
        portal.renewals.renew(OPERATOR, device.device_id, by_csr())


@ON_SQLITE
def test_a_csr_goes_with_no_key_type(portal: Portal) -> None:
    device = register_by_csr(portal)
    with pytest.raises(InputInvalid):
        portal.renewals.renew(OPERATOR, device.device_id, RenewalRequest(csr=read_csr(csr_pem()), key_type="ed25519"))
    assert statuses(portal, device.device_id) == ["active"]


def test_suspending_holds_every_certificate_and_resuming_gives_each_back(portal: Portal) -> None:
    device = register_by_csr(portal)
    portal.renewals.renew(OPERATOR, device.device_id, by_csr())
    portal.revocations.suspend(OPERATOR, device.device_id)
    assert statuses(portal, device.device_id) == ["held", "held"]
    assert all(listed(portal, certificate) for certificate in certificates(portal, device.device_id))
    assert len(portal.inventory.devices("default", DeviceFilter(), limit=5, cursor=None).devices) == 1
    portal.revocations.resume(OPERATOR, device.device_id)
    assert statuses(portal, device.device_id) == ["replaced", "active"]
    portal.revocations.revoke(OPERATOR, device.device_id, "key_compromise")
    assert statuses(portal, device.device_id) == ["revoked", "revoked"]
    assert all(listed(portal, certificate) for certificate in certificates(portal, device.device_id))


def test_the_older_one_ends_once_the_newer_was_shown_where_that_was_wanted(portal: Portal) -> None:
    device = register_by_csr(portal)
    first = portal.renewals.renew(OPERATOR, device.device_id, by_csr())
    second = portal.renewals.renew(OPERATOR, device.device_id, by_csr(when_used=True))
    for shown in (device.fingerprint, first.fingerprint, "0" * 64):
        portal.renewals.used(OPERATOR, device.device_id, shown)
    assert statuses(portal, device.device_id) == ["replaced", "replaced", "active"]
    portal.renewals.used(OPERATOR, device.device_id, second.fingerprint)
    assert statuses(portal, device.device_id) == ["replaced", "revoked", "active"]
    assert listed(portal, certificates(portal, device.device_id)[1])


def test_a_device_renews_in_the_window_of_the_certificate_that_it_shows(portal: Portal, clock: Clock) -> None:
    device = register_by_csr(portal)

    def ask(shown: str) -> Renewed:
        return portal.renewals.renew(OPERATOR, device.device_id, by_csr(), shown=shown)

    with pytest.raises(StateConflict, match="too early to renew"):
        ask(device.fingerprint)
    clock.advance(days=245)
    lost = ask(device.fingerprint)
    with pytest.raises(StateConflict, match="too early to renew"):
        ask(lost.fingerprint)
    assert ask(device.fingerprint).fingerprint != lost.fingerprint
    portal.renewals.renew(OPERATOR, device.device_id, by_csr(overlap_hours=0))
    with pytest.raises(StateConflict, match="revoked or not the device's"):
        ask(device.fingerprint)


def test_the_interface_gives_a_bundle_or_a_certificate(api: Api) -> None:
    device_id = api.register()["device_id"]
    renewed = api.post(f"/devices/{device_id}/renew")
    assert renewed.status_code == 201, renewed.text
    assert {"download_url", "bundle_password"} <= renewed.json.keys()
    chained = api.post(f"/devices/{device_id}/renew", {"csr": csr_pem(), "overlap_hours": 0}).json
    assert chained["chain"].startswith(chained["certificate"])
    assert api.get(f"/devices/{device_id}").json["certificate"]["serial_number"] == chained["serial_number"]
    again = api.post(f"/devices/{device_id}/renew", {"csr": csr_pem(), "overlap_hours": 0}).json
    assert again["broker"] == "pending"
    problem_of(api.post(f"/devices/{device_id}/renew", {"overlap_hours": -1}), 422, "invalid_input")
    problem_of(api.post(f"/devices/{device_id}/renew", {"revoke_previous": "never"}), 422, "invalid_input")


@ON_SQLITE
def test_a_link_that_an_older_version_did_not_see_the_end_of_leaves_both_certificates(
    portal: Portal, clock: Clock
) -> None:
    device = register_by_csr(portal)
    renewed = portal.renewals.renew(OPERATOR, device.device_id, RenewalRequest())
    with portal.database.transaction() as tx:
        lease = clock() + timedelta(seconds=30)
        tx.execute(sa.update(Delivery).values(status=DeliveryStatus.FETCHING, lease_until=lease))
    clock.advance(hours=25)
    jobs.expire(portal)
    with pytest.raises(LinkExpired):
        portal.deliveries.deliver(OPERATOR, link(renewed))
    jobs.expire(portal)
    assert statuses(portal, device.device_id) == ["replaced", "active"], "which of them arrived nobody knows"


@ON_SQLITE
def test_a_session_that_was_half_way_in_is_cut_once_more_when_no_other_can_come(
    portal: Portal, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[str] = []
    device = register_by_csr(portal)
    portal.renewals.renew(OPERATOR, device.device_id, by_csr(overlap_hours=0))
    monkeypatch.setattr(portal.broker, "reachable", lambda: True)
    monkeypatch.setattr(portal.broker, "disconnect", lambda devices, _deadline: cut.extend(devices))
    jobs.disconnect_again(portal)
    assert cut == []
    clock.advance(seconds=101)
    jobs.disconnect_again(portal)
    jobs.disconnect_again(portal)
    assert cut == [device.device_id]
    clock.advance(seconds=200)
    jobs.disconnect_again(portal)
    assert cut == [device.device_id]
