"""What somebody tries who has a genuine root of trust, but not that of the device, or not the evidence in time."""

from __future__ import annotations

import base64
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from flask import Flask

from app import portal_of
from attestation.evidence import to_base64url
from core.errors import AttestationRefused
from tests.support.attestation import Maker, SigningKey
from tests.support.attested import AttestedDevice, attested_device, policy
from tests.support.est import Device, csr_der, new_key, refused, token
from tests.support.harness import ON_SQLITE, Api, Clock, csr_pem, problem_of
from tests.support.pki import PEM, Authority
from tests.web.api.test_est_clients import registered
from workflows.attestation import nonces
from workflows.attestation.nonces import NonceHolder

OTHER = to_base64url(b"\x01" + bytes(32))  # the UEID of another root of trust, for which the same key vouches


def enrolled(api: Api, clock: Clock, **fields: Any) -> tuple[AttestedDevice, str]:
    """A device with a certificate, now due to be renewed, and another key for that; and its id."""
    one = attested_device(api, **fields)
    answer = one.enrol(one.evidence())
    assert answer.status_code == 201, answer.text
    clock.advance(days=300)
    renewing = one.renewing(answer.json["certificate"])
    renewing.maker, renewing.clock = Maker(root_of_trust=one.maker.root_of_trust), clock
    return renewing, str(answer.json["device_id"])


def renew(one: AttestedDevice, device_id: str, shown: dict[str, Any] | None) -> Any:
    return one.call("enroll", {"csr": one.csr(device_id), **({} if shown is None else {"attestation": shown})})


def test_of_requests_with_one_nonce_at_once_one_gets_its_challenge(app: Flask) -> None:
    kept, tenant_id = portal_of(app).attestations._nonces, portal_of(app).first_tenant
    holder, ready = NonceHolder(tenant_id, "enrolment_token:x"), threading.Barrier(3)

    def spent(nonce: str) -> str:
        ready.wait()
        try:
            kept.spend(holder, nonce)
        except AttestationRefused as refusal:
            return refusal.code
        return ""

    with ThreadPoolExecutor(3) as pool:
        for _ in range(20):
            nonce = kept.issue(holder).nonce
            used = "attestation_nonce_used"
            assert sorted(pool.map(spent, [nonce] * 3)) == ["", used, used]


def test_a_holder_of_the_batch_s_token_cannot_keep_its_devices_from_getting_a_nonce(
    api: Api, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nonces, "MAX_NONCES", 3)
    one = attested_device(api)
    taken = [one.nonce() for _ in range(5)]
    problem_of(one.enrol(one.evidence(nonce=taken[0])), 403, "attestation_nonce_unknown")
    assert one.enrol(one.evidence(nonce=taken[2])).status_code == 201
    with portal_of(app).database.snapshot() as tx:
        assert tx.exec_driver_sql("SELECT count(*) FROM attestation_nonces").scalar_one() == 3


@ON_SQLITE
def test_a_renewal_that_needs_evidence_is_refused_without_by_every_way(api: Api, clock: Clock) -> None:
    one, device_id = enrolled(api, clock, on_renewal=True)
    problem_of(renew(one, device_id, None), 403, "attestation_required")
    for path in ("/.well-known/est/", "/.well-known/est/default/"):
        for operation in ("simplereenroll", "serverkeygen"):
            est = Device(api, None, one.credential.certificate, path=path)
            assert "requires attestation" in refused(est.enrol(csr_der(one.maker.key, device_id), operation), 403)
    assert renew(one, device_id, one.evidence()).status_code == 201


@ON_SQLITE
@pytest.mark.parametrize("by", ["the device", "an operator"])
def test_a_device_that_renews_with_another_key_without_evidence_is_not_listed_as_attested(
    api: Api, app: Flask, clock: Clock, by: str
) -> None:
    one, device_id = enrolled(api, clock)
    if by == "the device":
        answer = renew(one, device_id, None)
        assert answer.status_code == 201
        one.credential = one.renewing(answer.json["certificate"]).credential
    else:
        assert api.post(f"/devices/{device_id}/renew", {}).status_code == 201
    kept = api.get(f"/devices/{device_id}").json["attestation"]
    assert (kept["verdict"], kept["code"]) == ("outdated", "attested_key_mismatch")
    [listed] = api.get("/devices?attested=outdated").json["devices"]
    assert listed["device_id"] == device_id
    [made] = api.get("/enrolment-tokens").json["enrolment_tokens"]
    changed = api.patch(f"/enrolment-tokens/{made['enrolment_token_id']}", {"attestation": policy(one.maker)})
    assert changed.status_code == 200
    portal_of(app).reappraisals.run()
    assert api.get(f"/devices/{device_id}").json["attestation"]["verdict"] == "outdated"
    if by == "the device":
        clock.advance(days=300)
        assert renew(one, device_id, one.evidence()).status_code == 201
        assert api.get(f"/devices/{device_id}").json["attestation"]["verdict"] == "passed"


@ON_SQLITE
@pytest.mark.parametrize("on_renewal", [True, False])
def test_a_thief_of_a_device_s_key_does_not_renew_with_another_root_of_trust(
    api: Api, clock: Clock, on_renewal: bool
) -> None:
    one, device_id = enrolled(api, clock, on_renewal=on_renewal)
    for ueid in (OTHER, None):
        problem_of(renew(one, device_id, one.evidence(ueid=ueid)), 403, "attester_changed")
    assert renew(one, device_id, one.evidence()).status_code == 201


@ON_SQLITE
def test_where_evidence_is_only_recorded_another_root_of_trust_is_a_failure(api: Api, app: Flask, clock: Clock) -> None:
    one, device_id = enrolled(api, clock, mode="record")
    assert renew(one, device_id, one.evidence(ueid=OTHER)).status_code == 201
    kept = api.get(f"/devices/{device_id}").json["attestation"]
    assert (kept["verdict"], kept["code"]) == ("failed", "attester_changed")
    [made] = api.get("/enrolment-tokens").json["enrolment_tokens"]
    assert (
        api.patch(f"/enrolment-tokens/{made['enrolment_token_id']}", {"attestation": policy(one.maker)}).status_code
        == 200
    )
    portal_of(app).reappraisals.run()
    assert api.get(f"/devices/{device_id}").json["attestation"]["verdict"] == "failed"


@ON_SQLITE
@pytest.mark.parametrize("first", [{"ueid": OTHER}, {"nonce": to_base64url(bytes(32)), "ueid": OTHER}])
def test_where_evidence_is_only_recorded_a_failure_does_not_make_way_for_another_root_of_trust(
    api: Api, clock: Clock, first: dict[str, Any]
) -> None:
    one, device_id = enrolled(api, clock, mode="record")
    own = api.get(f"/devices/{device_id}").json["attestation"]["claims"]["attester"]
    verdicts = []
    for shown in (first, {"ueid": OTHER}, {}):
        answer = renew(one, device_id, one.evidence(**shown))
        assert answer.status_code == 201, answer.text
        kept = api.get(f"/devices/{device_id}").json["attestation"]
        verdicts.append(kept["verdict"])
        assert kept["claims"]["attester"] == own
        clock.advance(days=300)
        one.credential = one.renewing(answer.json["certificate"]).credential
    assert verdicts == ["failed", "failed", "passed"]


@ON_SQLITE
def test_evidence_of_another_root_of_trust_that_fails_the_policy_does_not_pass_a_milder_one(
    api: Api, app: Flask, clock: Clock
) -> None:
    one, device_id = enrolled(api, clock, mode="record", lifecycle=["secured"])
    assert renew(one, device_id, one.evidence(ueid=OTHER)).status_code == 201
    [made] = api.get("/enrolment-tokens").json["enrolment_tokens"]
    milder = api.patch(f"/enrolment-tokens/{made['enrolment_token_id']}", {"attestation": policy(one.maker)})
    assert milder.status_code == 200
    portal_of(app).reappraisals.run()
    assert api.get(f"/devices/{device_id}").json["attestation"]["code"] == "attester_changed"


def signed_below(api: Api, signer: SigningKey, chain: list[x509.Certificate]) -> Any:
    """The answer to evidence that is signed by the first of the chain, the last of which is the anchor."""
    anchor = chain[-1].public_bytes(PEM).decode()
    secret = token(api, attestation={"mode": "require", "anchors": [anchor]})
    one = AttestedDevice(api, Device(api, secret), Maker(root_of_trust=signer))
    x5c = [base64.b64encode(certificate.public_bytes(Encoding.DER)).decode() for certificate in chain[:-1]]
    shown = one.evidence()
    text = one.maker.jwt({"x5c": x5c}, iat=int(one.clock().timestamp())).decode()
    return one.enrol(shown | {"evidence": text})


@ON_SQLITE
def test_a_factory_certificate_signs_no_evidence_though_its_ca_is_an_anchor_or_below_one(api: Api) -> None:
    root = Authority("A root")
    maker = Authority("A maker's CA", issuer=root)
    unit = maker.issue("sn-1")
    chain = [unit.certificate, maker.certificate, root.certificate]
    assert signed_below(api, unit.key, chain).status_code == 201  # nothing says yet that devices enrol by it
    registered(api, maker)
    for length in (2, 3):
        problem_of(signed_below(api, unit.key, chain[:length]), 403, "attestation_certificate_refused")


@ON_SQLITE
def test_a_certificate_of_the_portal_signs_no_evidence_though_its_root_is_an_anchor(api: Api) -> None:
    key = new_key()
    answer = api.register(csr=csr_pem(key))
    chain = x509.load_pem_x509_certificates(answer["chain"].encode())
    [root] = [one for one in x509.load_pem_x509_certificates(api.get("/ca.pem").data) if one.issuer == one.subject]
    chain = [one for one in chain if one != root]
    problem_of(signed_below(api, key, [*chain, root]), 403, "attestation_certificate_refused")


@ON_SQLITE
def test_the_key_of_a_device_that_waits_is_not_replaced_without_evidence(api: Api) -> None:
    maker = Maker()
    secret = token(api, count=9, approval="operator", attestation=policy(maker), repeated_serial="operator")
    one = AttestedDevice(api, Device(api, secret), maker)
    assert one.enrol(one.evidence()).status_code == 202
    waiting = api.get("/enrolments").json
    problem_of(AttestedDevice(api, one.credential).enrol(), 403, "attestation_required")
    assert api.get("/enrolments").json == waiting
    other = AttestedDevice(api, one.credential, Maker(root_of_trust=maker.root_of_trust))
    assert other.enrol(other.evidence()).status_code == 202
    assert api.get("/enrolments").json != waiting


@ON_SQLITE
def test_a_serial_number_brings_no_device_another_root_of_trust_unless_an_operator_says_so(api: Api) -> None:
    for setting, status in (("same_device", 403), ("operator", 202)):
        maker = Maker()
        secret = token(api, count=9, repeated_serial=setting, attestation=policy(maker))
        one = AttestedDevice(api, Device(api, secret), maker)
        first = one.enrol(one.evidence())
        assert first.status_code == 201
        other = AttestedDevice(api, one.credential, Maker(root_of_trust=maker.root_of_trust))
        answer = other.enrol(other.evidence(ueid=OTHER))
        assert answer.status_code == status, answer.text
        if setting == "operator":
            assert api.post(f"/devices/{first.json['device_id']}/approve").status_code == 200
        again = other.enrol(other.evidence(ueid=OTHER if setting == "operator" else None))
        assert again.status_code == (201 if setting == "operator" else 403)
