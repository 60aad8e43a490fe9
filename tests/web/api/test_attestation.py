"""Enrolment with evidence: what a device gets, what is kept of it, and what a policy that changes does to it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from flask import Flask

from app import portal_of
from core.roles import Role
from tests.support.attestation import RECORDED, Maker, SoftwareTpm
from tests.support.attested import AttestedDevice, attested_device, policy
from tests.support.est import Device, new_key, token
from tests.support.harness import ON_SQLITE, Api, Clock, api_as, problem_of
from tests.support.pki import PEM, Authority
from tests.web.api.test_actions import act
from tests.workflows.test_events import recorded, subscribe

pytestmark = ON_SQLITE


def enrolled(device: AttestedDevice, evidence: dict[str, Any] | None = None) -> str:
    answer = device.enrol(evidence)
    assert answer.status_code == 201, answer.text
    return str(answer.json["device_id"])


# --- A device enrols ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["eat-jwt", "eat-cwt", "psa"])
def test_a_device_enrols_with_evidence_for_its_key(api: Api, kind: str) -> None:
    device = attested_device(api, types=[kind])
    answer = device.enrol(device.evidence(kind))
    assert answer.status_code == 201, answer.text
    [certificate] = x509.load_pem_x509_certificates(answer.json["certificate"].encode())
    assert certificate.public_key() == device.maker.key.public_key()
    assert answer.json["chain"].startswith(answer.json["certificate"])
    shown = api.get(f"/devices/{answer.json['device_id']}").json
    assert (shown["status"], shown["attested"]) == ("active", "passed")
    kept = shown["attestation"]
    assert (kept["verdict"], kept["type"], kept["code"], kept["problems"]) == ("passed", kind, "", [])
    assert kept["claims"]["attester"]
    assert "attestation" in api.get("/audit?action=device:enrol").json["entries"][0]["detail"]


def test_a_device_enrols_by_a_factory_certificate_with_evidence(api: Api) -> None:
    maker, authority = Maker(), Authority("A maker's CA")
    body = {"name": "maker", "certificate": authority.certificate.public_bytes(PEM).decode()}
    made = api.post("/manufacturers", body | {"attestation": policy(maker)}).json
    proof = authority.issue(made["nonce"]).certificate.public_bytes(PEM).decode()
    api.post(f"/manufacturers/{made['manufacturer_id']}/proof", {"certificate": proof})
    factory = authority.issue("serial-1").certificate.public_bytes(PEM).decode()
    device = AttestedDevice(api, Device(api), maker).renewing(factory)
    problem_of(device.enrol(), 403, "attestation_required")
    enrolled(device, device.evidence())


def test_a_tpm_with_a_certified_attestation_key_enrols(api: Api, clock: Clock) -> None:
    now = clock()
    tpm = SoftwareTpm(authority=Authority("TPM maker", now=now), now=now)
    root = tpm.authority.certificate.public_bytes(PEM).decode()
    secret = token(api, attestation={"mode": "require", "anchors": [{"pem": root, "types": ["tpm2"]}]})
    device = AttestedDevice(api, Device(api, secret), Maker(key=tpm.key))

    def make(maker: Maker) -> bytes:
        return json.dumps(tpm.evidence(nonce=maker.challenge.nonce)).encode()

    enrolled(device, device.made("tpm2", make))


def test_a_tpm_is_challenged_by_its_endorsement_key(api: Api) -> None:
    evidence = RECORDED["rsa-ek"]["evidence"]
    root = base64.encodebytes(base64.b64decode(RECORDED["rsa-ek"]["root"])).decode()
    pem = f"-----BEGIN CERTIFICATE-----\n{root}-----END CERTIFICATE-----\n"
    device = Device(api, token(api, attestation={"mode": "require", "anchors": [pem]}), path="/")
    body = {"type": "tpm2"} | {name: evidence[name] for name in ("ek_certificate", "intermediates", "ak_public")}
    shown = AttestedDevice(api, device).call("attestation/nonce", body).json
    assert base64.b64decode(shown["credential"])[:2] == (len(base64.b64decode(shown["credential"])) - 2).to_bytes(2)
    assert len(base64.b64decode(shown["secret"])) == 2 + 256
    unrestricted = body | {"ak_public": RECORDED["rsa-ek"]["unrestricted_ak_public"]}
    problem_of(AttestedDevice(api, device).call("attestation/nonce", unrestricted), 403, "attestation_key_refused")
    stranger = attested_device(api)
    problem_of(stranger.call("attestation/nonce", body), 403, "attestation_anchor_unknown")


def test_a_repeat_has_the_same_answer_and_needs_no_evidence(api: Api) -> None:
    device = attested_device(api)
    first = device.enrol(device.evidence()).json
    assert device.enrol().json == first


def test_a_device_that_waits_for_an_operator_shows_evidence_again_for_its_certificate(api: Api) -> None:
    maker = Maker()
    device = AttestedDevice(api, Device(api, token(api, approval="operator", attestation=policy(maker))), maker)
    problem_of(device.enrol(), 403, "attestation_required")
    answer = device.enrol(device.evidence())
    assert (answer.status_code, answer.data, int(answer.headers["Retry-After"]) > 0) == (202, b"", True)
    [waiting] = api.get("/enrolments").json["enrolments"]
    api.post(f"/devices/{waiting['device_id']}/approve")
    problem_of(device.enrol(), 403, "attestation_required")
    assert enrolled(device, device.evidence()) == waiting["device_id"]


def test_a_device_without_evidence_is_admitted_unless_it_is_required(api: Api) -> None:
    for mode in ("off", "record"):
        device = attested_device(api, mode=mode)
        assert device.enrol().status_code == 201
    assert device.enrol(device.evidence() | {"evidence": "e30.e30.AA"}).status_code == 201


def test_over_est_a_device_is_told_where_evidence_goes(api: Api) -> None:
    device = attested_device(api)
    for operation in ("simpleenroll", "serverkeygen"):
        answer = device.credential.enrol(operation=operation)
        assert answer.status_code == 403
        assert "POST /enroll" in answer.text
    assert not api.get("/devices").json["devices"]


def test_without_a_policy_enroll_answers_as_est_does(api: Api) -> None:
    device = AttestedDevice(api, Device(api, token(api)))
    device_id = enrolled(device)
    assert api.get(f"/devices/{device_id}").json["attestation"] is None
    answer = AttestedDevice(api, Device(api)).enrol()
    problem_of(answer, 401, "unauthenticated")
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")


def test_a_device_with_another_key_shows_evidence_before_it_waits(api: Api) -> None:
    device = attested_device(api, count=2)
    enrolled(device, device.evidence())
    device.maker.key = new_key()
    problem_of(device.enrol(), 403, "attestation_required")
    assert not api.get("/enrolments").json["enrolments"]
    assert device.enrol(device.evidence()).status_code == 202


# --- What is recorded ---------------------------------------------------------------------------------------------


def test_under_record_a_device_is_admitted_and_what_is_wrong_is_kept(api: Api, app: Flask) -> None:
    subscribe(portal_of(app))
    device = attested_device(api, mode="record", debug=["disabled-since-boot"])
    device_id = enrolled(device, device.evidence())
    kept = api.get(f"/devices/{device_id}").json["attestation"]
    assert (kept["verdict"], kept["code"]) == ("failed", "attestation_policy_failed")
    assert "debug status is disabled-permanently" in kept["problems"][0]
    other = attested_device(api, mode="record")
    assert enrolled(other, other.evidence(nonce=device.nonce())) != device_id
    codes = [event["data"]["code"] for event in recorded(portal_of(app)) if event["type"] == "attestation_failed"]
    assert codes == ["attestation_policy_failed", "attestation_nonce_unknown"]
    unasked = attested_device(api, mode="record")
    assert api.get(f"/devices/{enrolled(unasked)}").json["attestation"] is None


def test_a_refusal_is_recorded_in_audit_record_and_event(api: Api, app: Flask) -> None:
    subscribe(portal_of(app))
    device = attested_device(api)
    problem_of(device.enrol(), 403, "attestation_required")
    [entry] = api.get("/audit?action=device:attest").json["entries"]
    assert (entry["outcome"], entry["detail"]["code"]) == ("refused", "attestation_required")
    [event] = [one for one in recorded(portal_of(app)) if one["type"] == "attestation_failed"]
    assert (event["device_id"], event["data"]["admitted"]) == (None, False)


def test_devices_are_listed_by_their_verdict(api: Api) -> None:
    passed = attested_device(api, count=2)
    failed = attested_device(api, mode="record", debug=["enabled"])
    ids = {
        "passed": enrolled(passed, passed.evidence()),
        "failed": enrolled(failed, failed.evidence()),
        "none": api.register()["device_id"],
    }
    for verdict, device_id in ids.items():
        found = api.get(f"/devices?attested={verdict}").json["devices"]
        assert [one["device_id"] for one in found] == [device_id]
    assert api.get("/devices?attested=outdated").json["devices"] == []
    measured = {line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in api.get("/metrics").text.splitlines()}
    assert measured['portal_devices_attested{verdict="failed"}'] == "1.0"
    assert len(api.get("/devices?attested=passed&status=active").json["devices"]) == 1


# --- Who may do what ----------------------------------------------------------------------------------------------


def test_only_an_admin_says_whose_word_counts(as_role: Callable[[Role | None], Api], api: Api) -> None:
    body = {"name": "a batch", "attestation": policy(Maker())}
    problem_of(as_role(Role.OPERATOR).post("/enrolment-tokens", body), 403, "forbidden")
    problem_of(as_role(Role.AUDITOR).post("/attestation/nonce"), 403, "forbidden")
    shown = api.post("/enrolment-tokens", body).json["attestation"]
    assert (shown["mode"], shown["version"], len(shown["anchors"])) == ("require", 1, 1)


@pytest.mark.parametrize(
    "anchors",
    [
        [],
        ["no PEM"],
        ["-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"],
        ["-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"],
        [Authority("one").certificate.public_bytes(PEM).decode() * 2],
        [{"pem": Authority("one").certificate.public_bytes(PEM).decode(), "identifier": "00"}],
    ],
)
def test_anchors_that_cannot_be_used_are_refused(api: Api, anchors: list[Any]) -> None:
    body = {"name": "a batch", "attestation": {"mode": "require", "anchors": anchors}}
    problem_of(api.post("/enrolment-tokens", body), 422, "attestation_policy_invalid")


def test_an_operator_registers_a_device_with_its_evidence(as_role: Callable[[Role | None], Api], api: Api) -> None:
    maker, operator = Maker(), as_role(Role.OPERATOR)
    made = api.post("/enrolment-tokens", {"name": "a batch", "attestation": policy(maker)}).json
    device = AttestedDevice(api, Device(api), maker)
    nonce = operator.post("/attestation/nonce").json["nonce"]
    evidence = device.evidence(nonce=nonce) | {"policy_id": made["attestation"]["policy_id"]}
    body = {"name": "p", "type": "t", "location": "l", "firmware": "f"}
    problem_of(operator.post("/register", body | {"attestation": evidence}), 422, "invalid_input")
    body |= {"csr": device.csr()}
    stolen = as_role(Role.OPERATOR).post("/register", body | {"attestation": evidence})
    problem_of(stolen, 403, "attestation_nonce_unknown")
    device_id = operator.post("/register", body | {"attestation": evidence}).json["device_id"]
    assert api.get(f"/devices/{device_id}").json["attestation"]["verdict"] == "passed"
    unknown = body | {"attestation": evidence | {"policy_id": "0" * 16}}
    problem_of(operator.post("/register", unknown), 404, "not_found")


def test_nonces_that_nobody_can_use_are_deleted(api: Api, app: Flask, clock: Clock) -> None:
    attested_device(api).nonce()
    clock.advance(minutes=9)
    kept = attested_device(api).nonce()
    clock.advance(minutes=2)
    portal = portal_of(app)
    portal.nonces.sweep()
    with portal.database.snapshot() as tx:
        rows = tx.exec_driver_sql("SELECT holder, seed IS NULL FROM attestation_nonces").all()
    assert len(rows) == 1
    assert kept


# --- Renewal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_renewal", [True, False])
def test_a_renewal_needs_evidence_if_the_policy_says_so(api: Api, clock: Clock, on_renewal: bool) -> None:
    device = attested_device(api, clock=clock, on_renewal=on_renewal)
    pem = device.enrol(device.evidence()).json["certificate"]
    clock.advance(days=300)
    renewing = device.renewing(pem)
    device_id = x509.load_pem_x509_certificate(pem.encode()).subject.rfc4514_string().removeprefix("CN=")
    renewing.maker.key = new_key()
    over_est = renewing.credential.call("POST", "simplereenroll", _body(renewing, device_id))
    over_enroll = renewing.enrol(csr=renewing.csr(device_id))
    if not on_renewal:
        assert (over_est.status_code, over_enroll.status_code) == (200, 201), over_enroll.text
        return
    assert over_est.status_code == 403
    assert "POST /enroll" in over_est.text
    problem_of(over_enroll, 403, "attestation_required")
    first = api.get(f"/devices/{device_id}").json["attestation"]["key_fingerprint"]
    answer = renewing.enrol(renewing.evidence(), csr=renewing.csr(device_id))
    assert answer.status_code == 201, answer.text
    assert answer.json["device_id"] == device_id
    assert api.get(f"/devices/{device_id}").json["attestation"]["key_fingerprint"] != first


def test_a_policy_of_a_group_counts_in_place_of_that_of_the_token(app: Flask, api: Api, clock: Clock) -> None:
    device = attested_device(api, clock=clock, on_renewal=False)
    pem = device.enrol(device.evidence()).json["certificate"]
    device_id = x509.load_pem_x509_certificate(pem.encode()).subject.rfc4514_string().removeprefix("CN=")
    operator, rules = api_as(app, Role.OPERATOR), policy(device.maker, on_renewal=True)
    api.post("/groups", {"name": "watched"})
    problem_of(operator.patch("/groups/watched", {"attestation": rules}), 403, "forbidden")
    answer = api.patch("/groups/watched", {"attestation": rules})
    assert answer.json["attestation"]["on_renewal"] is True, answer.text
    members = {"add": [device_id]}
    problem_of(operator.post("/groups/watched/members", members), 403, "forbidden")  # it could loosen what is required
    assert api.post("/groups/watched/members", members).json["members"] == 1
    for refused in (operator.patch("/groups/watched", {"attestation": None}), operator.delete("/groups/watched")):
        problem_of(refused, 403, "forbidden")
    clock.advance(days=300)
    renewing = device.renewing(pem)
    renewing.maker.key = new_key()
    problem_of(renewing.enrol(csr=renewing.csr(device_id)), 403, "attestation_required")
    assert renewing.enrol(renewing.evidence(), csr=renewing.csr(device_id)).status_code == 201
    assert api.patch("/groups/watched", {"attestation": None}).json["attestation"] is None
    assert api.get("/groups/watched").json["attestation"] is None


def _body(device: AttestedDevice, subject: str) -> bytes:
    return device.csr(subject).encode()


# --- A policy that changes ----------------------------------------------------------------------------------------


def test_a_device_that_would_fail_now_is_marked_and_can_be_suspended(api: Api, app: Flask) -> None:
    device, other = attested_device(api), attested_device(api)
    device_id, untouched = enrolled(device, device.evidence()), enrolled(other, other.evidence())
    newest = api.get("/enrolment-tokens").json["enrolment_tokens"]
    [token_id] = [
        one["enrolment_token_id"] for one in newest if one["attestation"]["anchors"][0]["pem"] in _pem(device)
    ]
    subscribe(portal_of(app))

    def change(**rules: Any) -> dict[str, Any]:
        answer = api.patch(f"/enrolment-tokens/{token_id}", {"attestation": policy(device.maker, **rules)})
        assert answer.status_code == 200, answer.text
        portal_of(app).reappraisals.run()
        shown: dict[str, Any] = api.get(f"/devices/{device_id}").json["attestation"]
        return shown

    marked = change(debug=["disabled-since-boot"])
    assert (marked["verdict"], marked["code"], marked["policy_version"]) == (
        "outdated", "attestation_policy_failed", 2,
    )  # fmt: skip
    assert api.get(f"/devices/{untouched}").json["attested"] == "passed"
    assert [event["type"] for event in recorded(portal_of(app))] == ["attestation_failed"]
    [line] = act(api, action="suspend", filter={"attested": "outdated"})
    assert (line["device_id"], line["status"]) == (device_id, "suspended")
    assert change()["verdict"] == "passed"
    gone = change(anchors=policy(Maker())["anchors"])
    assert gone["verdict"] == "outdated"
    assert "anchor" in gone["problems"][0]


def _pem(device: AttestedDevice) -> list[str]:
    return [str(one) for one in policy(device.maker)["anchors"]]


@pytest.mark.parametrize(
    ("anchor", "field"),
    [
        ({"pem": "a key", "identifier": "no hex"}, "identifier"),
        ({"pem": "a key", "identifier": "00", "kid": "00"}, "kid"),
        ({"types": ["psa"]}, "pem"),
        ("A" * 16385, "pem"),
    ],
)
def test_a_malformed_anchor_is_refused_by_the_field_that_is_wrong(api: Api, anchor: Any, field: str) -> None:
    body = {"name": "a batch", "attestation": {"mode": "require", "anchors": [anchor]}}
    problem = problem_of(api.post("/enrolment-tokens", body), 422, "invalid_input")
    assert [one["field"] for one in problem["errors"]] == [f"attestation.anchors.0.{field}"]
