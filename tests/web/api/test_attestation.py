"""Enrolment with evidence: what a device gets, and each thing for which it is refused."""

from __future__ import annotations

import pytest
from cryptography import x509

from tests.support.attested import AttestedDevice, attested_device
from tests.support.harness import ON_SQLITE, Api, problem_of

pytestmark = ON_SQLITE


@pytest.mark.parametrize("kind", ["eat-jwt", "eat-cwt", "psa"])
def test_a_device_enrols_with_evidence_for_its_key(api: Api, kind: str) -> None:
    device = attested_device(api, types=[kind])
    answer = device.enrol(device.evidence(kind))
    assert answer.status_code == 201, answer.text
    [certificate] = x509.load_pem_x509_certificates(answer.json["certificate"].encode())
    assert certificate.public_key() == device.maker.key.public_key()
    assert answer.json["chain"].startswith(answer.json["certificate"])
    assert api.get(f"/devices/{answer.json['device_id']}").json["status"] == "active"


def test_a_device_without_evidence_is_told_what_is_missing(api: Api) -> None:
    device = attested_device(api, types=["psa"])
    problem = problem_of(device.enrol(), 403, "attestation_required")
    assert "(psa)" in problem["detail"]
    assert "POST /attestation/nonce" in problem["detail"]
    assert not api.get("/devices").json["devices"]


def test_over_est_a_device_is_told_where_evidence_goes(api: Api) -> None:
    device = attested_device(api)
    answer = device.credential.enrol()
    assert answer.status_code == 403
    assert "POST /enroll" in answer.text


def test_a_nonce_is_spent_by_the_first_try_whatever_comes_of_it(api: Api) -> None:
    device = attested_device(api)
    evidence = device.evidence()
    problem_of(device.enrol(evidence | {"evidence": "e30.e30.AA"}), 403, "evidence_algorithm_refused")
    problem_of(device.enrol(evidence), 403, "attestation_nonce_used")


def test_a_nonce_of_another_holder_is_unknown(api: Api) -> None:
    device, other = attested_device(api), attested_device(api)
    stolen = AttestedDevice(api, device.credential, device.maker)
    problem_of(stolen.enrol(stolen.evidence(nonce=other.nonce())), 403, "attestation_nonce_unknown")
