"""Repeated and concurrent enrolment requests, and approval by an operator, on each database."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.support.est import Device, certificates_of, csr_der, device, key_and_certificate, new_key, refused, token
from tests.support.harness import Api, Clock


def test_a_repeat_after_a_lost_answer_uses_no_second_place(api: Api) -> None:
    one, request = device(api, count=1), csr_der()
    first, again = certificates_of(one.enrol(request)), certificates_of(one.enrol(request))
    assert first == again
    assert len(api.get("/devices").json["devices"]) == 1


def test_concurrent_devices_are_counted_once_each(api: Api) -> None:
    secret, keys = token(api, count=2), [new_key(), new_key()]
    requests = [csr_der(key, f"serial-{number}") for number, key in enumerate(keys)] * 2
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda request: Device(api, secret).enrol(request), requests))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len(api.get("/devices").json["devices"]) == 2
    assert api.get("/enrolment-tokens").json["enrolment_tokens"][0]["uses"] == 2


# --- A unit that is flashed twice ---------------------------------------------------------------------------------


def fleet(api: Api) -> list[tuple[str, str]]:
    return [(device["name"], device["status"]) for device in api.get("/devices").json["devices"]]


def uses(api: Api) -> int:
    return int(api.get("/enrolment-tokens").json["enrolment_tokens"][0]["uses"])


def test_a_unit_flashed_twice_is_one_device_once_an_operator_has_seen_its_new_key(api: Api) -> None:
    one = device(api, count=9)
    [before] = certificates_of(one.enrol(csr_der(None, "SN-1")))
    certificates_of(one.enrol(csr_der(None, "SN-2")))
    request = csr_der(None, "SN-1")
    assert [one.enrol(request).status_code for _ in range(2)] == [202, 202]
    assert sorted(fleet(api)) == [("SN-1", "active"), ("SN-2", "active")]
    [waits] = api.get("/enrolments").json["enrolments"]
    assert (before.subject.rfc4514_string(), waits["again"]) == (f"CN={waits['device_id']}", True)
    api.post(f"/devices/{waits['device_id']}/approve", {"key_fingerprint": waits["key_fingerprint"]})
    [after] = certificates_of(one.enrol(request))
    assert certificates_of(one.enrol(request)) == [after]
    assert (after.subject, after == before) == (before.subject, False)
    found = api.get(f"/devices/{waits['device_id']}/certificates").json["certificates"]
    assert [(item["status"], item["revocation_reason"]) for item in found] == [
        ("active", None),
        ("revoked", "superseded"),
    ]
    assert uses(api) == 2
    assert one.enrol(csr_der(None, "SN-1")).status_code == 202  # a third key is another question


def test_a_unit_flashed_twice_is_one_device_at_once_if_its_token_says_so(api: Api) -> None:
    one = device(api, count=9, repeated_serial="same_device")
    requests = [csr_der(None, "SN-1") for _ in range(2)]
    [before], [after] = (certificates_of(one.enrol(request)) for request in requests)
    assert (after.subject, after == before) == (before.subject, False)
    assert certificates_of(one.enrol(requests[1])) == [after]
    assert (fleet(api), uses(api)) == ([("SN-1", "active")], 1)
    assert api.get("/audit?action=device:enrol_again").json["entries"]


def test_a_token_that_needs_approval_gives_nobody_another_s_place_at_once(api: Api) -> None:
    one, request = device(api, count=9, repeated_serial="same_device", approval="operator"), csr_der(None, "SN-1")
    one.enrol(request)
    [waits] = api.get("/enrolments").json["enrolments"]
    api.post(f"/devices/{waits['device_id']}/approve")
    certificates_of(one.enrol(request))
    assert one.enrol(csr_der(None, "SN-1")).status_code == 202


def test_a_revoked_unit_does_not_come_back_by_being_flashed(api: Api) -> None:
    one = device(api, count=9, repeated_serial="same_device")
    [certificate] = certificates_of(one.enrol(csr_der(None, "SN-1")))
    api.post(f"/revoke/{certificate.subject.rfc4514_string()[3:]}", {})
    assert "revoked" in refused(one.enrol(csr_der(None, "SN-1")), 403)


@pytest.mark.parametrize(("setting", "serial"), [("new_device", "SN-1"), ("operator", "")])
def test_units_without_serial_numbers_of_their_own_are_new_devices(api: Api, setting: str, serial: str) -> None:
    one = device(api, count=2, repeated_serial=setting)
    for _ in range(2):
        certificates_of(one.enrol(csr_der(None, serial)))
    assert len(fleet(api)) == 2


def test_units_flashed_twice_at_once_are_one_device(api: Api) -> None:
    secret = token(api, count=9, repeated_serial="same_device")
    with ThreadPoolExecutor(3) as pool:
        requests = [csr_der(None, "SN-1") for _ in range(3)]
        answers = list(pool.map(lambda request: Device(api, secret).enrol(request), requests))
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert (fleet(api), uses(api)) == ([("SN-1", "active")], 1)


def test_a_token_that_has_expired_replaces_nothing(api: Api, clock: Clock) -> None:
    for setting in ("same_device", "operator"):
        one = device(api, count=9, repeated_serial=setting)
        certificates_of(one.enrol(csr_der(None, "SN-1")))
        clock.advance(hours=25)
        assert "expired" in refused(one.enrol(csr_der(None, "SN-1")), 403)


def test_a_device_waits_until_an_operator_approves_it(api: Api) -> None:
    one, request = device(api, approval="operator"), csr_der()
    first, second = one.enrol(request), one.enrol(request)
    assert (first.status_code, second.status_code) == (202, 202)
    assert (first.data, first.headers["Content-Length"], first.content_type) == (b"", "0", None)
    assert int(first.headers["Retry-After"]) > 0
    [pending] = api.get("/devices?status=pending").json["devices"]
    path = f"/devices/{pending['device_id']}"
    asked = api.get(f"{path}/enrolment").json
    assert asked["status"] == "waiting"
    entry = api.get("/audit?action=device:ask").json["entries"][0]
    assert asked["key_fingerprint"] == entry["detail"]["key_fingerprint"]
    for _ in range(2):
        assert api.post(f"{path}/approve").json == {"device_id": pending["device_id"], "status": "pending"}
    [certificate] = certificates_of(one.enrol(request))
    assert certificate.subject.rfc4514_string() == f"CN={pending['device_id']}"
    assert api.get(path).json["status"] == "active"
    assert certificates_of(one.enrol(request)) == [certificate]
    for decision in ("approve", "reject"):
        assert api.post(f"{path}/{decision}").status_code == 409


def test_a_rejected_device_stays_rejected(api: Api) -> None:
    one, request = device(api, approval="operator"), csr_der()
    one.enrol(request)
    [pending] = api.get("/devices?status=pending").json["devices"]
    path = f"/devices/{pending['device_id']}"
    for _ in range(2):
        assert api.post(f"{path}/reject").json["status"] == "revoked"
    assert "rejected" in refused(one.enrol(request), 403)
    assert api.post(f"{path}/approve").status_code == 409
    assert api.get(path).json["revocation_reason"] == "privilege_withdrawn"


def test_a_rejection_is_of_the_key_that_was_looked_at_and_says_why_in_the_record(api: Api) -> None:
    one = device(api, approval="operator")
    one.enrol(csr_der())
    [pending] = api.get("/devices?status=pending").json["devices"]
    path = f"/devices/{pending['device_id']}"
    assert api.post(f"{path}/reject", {"key_fingerprint": "0" * 64, "why": "not ours"}).status_code == 409
    assert api.post(f"{path}/reject", {"why": "a\u202eb"}).status_code == 422
    assert api.post(f"{path}/reject", {"reason": "not ours"}).status_code == 422
    assert api.get(path).json["status"] == "pending"
    key = api.get(f"{path}/enrolment").json["key_fingerprint"]
    assert api.post(f"{path}/reject", {"key_fingerprint": key, "why": "not ours"}).status_code == 200
    assert api.get("/audit?action=device:reject").json["entries"][0]["detail"] == {"why": "not ours"}


def test_a_device_without_a_request_cannot_be_approved(api: Api) -> None:
    wanted = {"name": "pump-7", "type": "pump", "location": "hall 2", "firmware": "1"}
    answer = api.post("/devices", wanted)
    assert (answer.status_code, answer.json["status"]) == (201, "pending")
    path = answer.headers["Location"]
    assert api.post(f"{path}/approve").status_code == 409
    assert api.get(f"{path}/enrolment").status_code == 404
    one = device(api, device_id=answer.json["device_id"])
    assert api.post(f"{path}/reject").json["status"] == "revoked"
    refused(one.enrol(), 403)
    assert api.post("/enrolment-tokens", {"name": "late", "device_id": answer.json["device_id"]}).status_code == 409


def test_after_a_lost_answer_a_second_key_is_issued_and_the_first_one_revoked(api: Api) -> None:
    one, request = device(api, count=1), csr_der()
    _, first = key_and_certificate(one.enrol(request, "serverkeygen"))
    _, second = key_and_certificate(one.enrol(request, "serverkeygen"))
    assert first.subject == second.subject
    device_id = first.subject.rfc4514_string()[3:]
    found = api.get(f"/devices/{device_id}/certificates").json["certificates"]
    assert [(item["status"], item["revocation_reason"]) for item in found] == [
        ("active", None),
        ("revoked", "superseded"),
    ]
    refused(Device(api, certificate=first.public_bytes(Encoding.DER)).enrol(None, "simplereenroll"), 403)
    for _ in range(3):
        key_and_certificate(one.enrol(request, "serverkeygen"))
    assert "within a day" in refused(one.enrol(request, "serverkeygen"), 429)
