"""A unit is replaced: the external id of the revoked device passes to its successor, and the record says so."""

from __future__ import annotations

import json

from tests.support.est import certificates_of, device
from tests.support.harness import Api, problem_of

ROW = {"name": "000451", "type": "meter", "location": "Site 9", "firmware": "2.1", "external_id": "SN-000451"}


def upload(api: Api) -> dict[str, object]:
    answer = api.call("POST", "/register/bulk", data=json.dumps(ROW), content_type="application/x-ndjson")
    row: dict[str, object] = json.loads(answer.text.splitlines()[0])
    return row


def test_the_external_id_of_a_revoked_device_passes_to_its_successor_in_an_upload(api: Api) -> None:
    old = str(upload(api)["device_id"])
    api.post(f"/revoke/{old}", {"reason": "cessation_of_operation"})
    refused = upload(api)
    assert (refused["code"], "--free-external-id" in str(refused["detail"])) == ("state_conflict", True)
    for _ in range(2):
        freed = api.patch(f"/devices/{old}", {"external_id": None})
        assert freed.status_code == 200, freed.text
        assert (freed.json["external_id"], freed.json["former_external_id"]) == (None, "SN-000451")
    new = str(upload(api)["device_id"])
    assert new != old
    [found] = api.get("/devices?external_id=SN-000451").json["devices"]
    assert found["device_id"] == new
    [entry] = api.get("/audit?action=device:free_external_id").json["entries"]
    assert (entry["object"], entry["detail"]) == (f"device:{old}", {"external_id": "SN-000451"})
    assert api.get(f"/devices/{old}").json["status"] == "revoked"


def test_the_external_id_of_a_revoked_device_passes_to_its_successor_in_a_registration(api: Api) -> None:
    old = api.register(external_id="SN-1")["device_id"]
    api.post(f"/revoke/{old}")
    pump = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0", "external_id": "SN-1"}
    assert "free it" in problem_of(api.post("/register", pump), 409, "external_id_taken")["detail"]
    api.patch(f"/devices/{old}", {"external_id": None})
    assert api.post("/register", pump).status_code == 201


def test_a_device_that_is_expected_to_enrol_has_an_external_id_of_its_own(api: Api) -> None:
    api.post("/profiles", {"name": "plant-4", "serial_number": "{external_id}"})
    expected = ROW | {"profile": "plant-4"}
    device_id = api.post("/devices", expected).json["device_id"]
    assert api.get(f"/devices/{device_id}").json["external_id"] == "SN-000451"
    for path in ("/devices", "/register"):
        assert device_id in problem_of(api.post(path, expected), 409, "external_id_taken")["detail"]
    assert (upload(api)["code"], len(api.get("/devices").json["devices"])) == ("state_conflict", 1)
    [certificate] = certificates_of(device(api, device_id=device_id).enrol())
    assert "2.5.4.5=SN-000451" in certificate.subject.rfc4514_string()
    api.post(f"/revoke/{device_id}")
    assert "free it" in problem_of(api.post("/devices", expected), 409, "external_id_taken")["detail"]
    api.patch(f"/devices/{device_id}", {"external_id": None})
    assert api.post("/devices", expected).status_code == 201


def test_a_device_that_is_not_revoked_cannot_lose_its_external_id(api: Api) -> None:
    device_id = api.register(external_id="SN-1")["device_id"]
    problem_of(api.patch(f"/devices/{device_id}", {"external_id": None}), 409, "state_conflict")
    problem_of(api.patch(f"/devices/{device_id}", {"external_id": "SN-2"}), 409, "state_conflict")
    problem_of(api.patch(f"/devices/{device_id}", {"external_id": None, "name": "x"}), 422, "invalid_input")
    assert api.get(f"/devices/{device_id}").json["external_id"] == "SN-1"
