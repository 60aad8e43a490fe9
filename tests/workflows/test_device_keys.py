"""A key that was compromised is certified for nobody any more, and a key is that of one device at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from flask import Flask
from sqlalchemy.exc import IntegrityError

from app import portal_of
from config import Settings
from core.errors import KeyCompromised
from pki.algorithms import certificate_key_fingerprint
from store.tables import Certificate, DeviceKey
from tests.support.backups import copied, opened, put_back
from tests.support.est import Device, certificates_of, csr_der, device, new_key, refused
from tests.support.harness import Api, Clock, csr_pem, problem_of
from tests.workflows.test_registration import OPERATOR, with_fields

PUMP = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}


def compromised_key(api: Api) -> ec.EllipticCurvePrivateKey:
    """The key of a device that was revoked because somebody else has it, too."""
    key = new_key()
    device_id = api.register(csr=csr_pem(key))["device_id"]
    assert api.post(f"/revoke/{device_id}", {"reason": "key_compromise"}).status_code in (200, 202)
    return key


def uploaded(api: Api, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to the rows of an upload."""
    body = "".join(json.dumps(PUMP | row) + "\n" for row in rows)
    answer = api.call("POST", "/register/bulk", data=body, content_type="application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines() if "row" in json.loads(line)]


def test_a_thief_of_a_compromised_key_cannot_register_it(api: Api) -> None:
    problem = problem_of(api.post("/register", PUMP | {"csr": csr_pem(compromised_key(api))}), 422, "key_compromised")
    assert "make a new key" in problem["detail"]


def test_a_thief_of_a_key_that_the_portal_made_cannot_register_it(app: Flask, api: Api) -> None:
    """The key is known to whoever had the bundle; its fingerprint is in the certificate."""
    device_id = api.register()["device_id"]
    api.post(f"/revoke/{device_id}", {"reason": "key_compromise"})
    with portal_of(app).database.snapshot() as tx:
        der = tx.execute(sa.select(Certificate.der).where(Certificate.device_id == device_id)).scalar_one()
        blocked = tx.execute(sa.select(DeviceKey).where(DeviceKey.compromised_at.is_not(None))).one()
    assert blocked.key_fingerprint == certificate_key_fingerprint(der)


def test_a_compromised_key_in_an_upload_costs_its_row_and_no_other(api: Api) -> None:
    key = compromised_key(api)
    first, second, third = uploaded(api, {}, {"csr": csr_pem(key)}, {"csr": csr_pem()})
    assert (second["code"], second["row"]) == ("key_compromised", 2)
    assert "device_id" in first
    assert "device_id" in third


def test_a_device_cannot_renew_with_a_compromised_key(api: Api) -> None:
    key = compromised_key(api)
    device_id = api.register()["device_id"]
    problem_of(api.post(f"/devices/{device_id}/renew", {"csr": csr_pem(key)}), 422, "key_compromised")
    assert [one["status"] for one in api.get(f"/devices/{device_id}/certificates").json["certificates"]] == ["active"]


@pytest.mark.parametrize("approval", ["at_once", "operator"])
def test_a_compromised_key_cannot_enrol_and_uses_no_place_of_its_token(api: Api, approval: str) -> None:
    one = device(api, approval=approval)
    assert "make a new key" in refused(one.enrol(csr_der(compromised_key(api))), 400)
    assert api.get("/enrolment-tokens").json["enrolment_tokens"][0]["uses"] == 0
    assert api.get("/devices?status=pending").json["devices"] == []


def test_a_device_cannot_reenrol_with_a_compromised_key(api: Api, clock: Clock) -> None:
    key, own = compromised_key(api), new_key()
    [certificate] = certificates_of(device(api).enrol(csr_der(own)))
    renewing = Device(api, certificate=certificate.public_bytes(Encoding.DER))
    subject = certificate.subject.rfc4514_string()[3:]
    clock.advance(days=300)
    assert refused(renewing.enrol(csr_der(key, subject), "simplereenroll"), 400)


def test_every_key_of_a_compromised_device_is_blocked_its_superseded_ones_too(api: Api) -> None:
    first, second = new_key(), new_key()
    device_id = api.register(csr=csr_pem(first))["device_id"]
    assert api.post(f"/devices/{device_id}/renew", {"csr": csr_pem(second), "overlap_hours": 0}).status_code == 201
    api.post(f"/revoke/{device_id}", {"reason": "key_compromise"})
    for key in (first, second):
        problem_of(api.post("/register", PUMP | {"csr": csr_pem(key)}), 422, "key_compromised")


def test_a_theft_that_is_learnt_of_after_the_revocation_blocks_the_key(api: Api) -> None:
    key = new_key()
    device_id = api.register(csr=csr_pem(key))["device_id"]
    path = f"/revoke/{device_id}"
    first = api.post(path, {"reason": "cessation_of_operation"}).json
    for _ in range(2):
        again = api.post(path, {"reason": "key_compromise"}).json
        assert (again["revoked_at"], again["reason"]) == (first["revoked_at"], "key_compromise")
    problem_of(api.post("/register", PUMP | {"csr": csr_pem(key)}), 422, "key_compromised")
    assert len(api.get(f"/audit?action=device:revoke&object=device:{device_id}").json["entries"]) == 2


def test_a_key_that_another_device_uses_is_refused_until_that_is_revoked(api: Api) -> None:
    key = new_key()
    owner = api.register(csr=csr_pem(key))["device_id"]
    assert owner in problem_of(api.post("/register", PUMP | {"csr": csr_pem(key)}), 409, "key_in_use")["detail"]
    other = api.register()["device_id"]
    problem_of(api.post(f"/devices/{other}/renew", {"csr": csr_pem(key)}), 409, "key_in_use")
    assert api.post(f"/devices/{owner}/renew", {"csr": csr_pem(key)}).status_code == 201  # its own
    api.post(f"/revoke/{owner}", {"reason": "cessation_of_operation"})
    assert api.register(csr=csr_pem(key))["status"] == "active"


def test_a_device_is_not_told_whose_key_it_asks_with(api: Api, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    key, own = new_key(), new_key()
    owner = api.register(csr=csr_pem(key))["device_id"]
    [certificate] = certificates_of(device(api).enrol(csr_der(own)))
    renewing = Device(api, certificate=certificate.public_bytes(Encoding.DER))
    clock.advance(days=300)
    for answer in (
        device(api).enrol(csr_der(key)),
        device(api, approval="operator").enrol(csr_der(key)),
        renewing.enrol(csr_der(key, certificate.subject.rfc4514_string()[3:]), "simplereenroll"),
    ):
        assert refused(answer, 409) == "This key is another device's; make a new key for this device.\n"
    told = [record.problem for record in caplog.records if record.getMessage() == "refused"]  # type: ignore[attr-defined]
    assert [owner in each for each in told] == [True] * 3


def test_one_key_twice_in_an_upload_makes_one_device(api: Api) -> None:
    key = new_key()
    first, second = uploaded(api, {"csr": csr_pem(key)}, {"csr": csr_pem(key)})
    assert "device_id" in first
    assert second["code"] == "key_in_use"


def test_two_requests_at_once_with_one_key_make_one_device(api: Api) -> None:
    key = new_key()
    requests = [PUMP | {"csr": csr_pem(key)} for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda request: api.post("/register", request).status_code, requests))
    assert sorted(answers) == [201, 409, 409, 409]


@pytest.mark.parametrize(
    "attack",
    [
        "UPDATE device_keys SET compromised_at = NULL",
        "DELETE FROM device_keys",
        "INSERT OR REPLACE INTO device_keys SELECT tenant_id, key_fingerprint, device_id, NULL FROM device_keys",
    ],
)
def test_the_database_itself_keeps_a_compromised_key_so(app: Flask, api: Api, attack: str) -> None:
    compromised_key(api)
    database = portal_of(app).database
    if "REPLACE" in attack and not database.is_sqlite:
        pytest.skip("a statement of SQLite")
    with pytest.raises(IntegrityError, match="stays so"), database.transaction() as tx:
        tx.execute(sa.text(attack))


def test_a_restore_keeps_a_compromised_key_blocked(
    make_settings: Callable[..., Settings], tmp_path: Path, clock: Clock
) -> None:
    settings, file = make_settings(), tmp_path / "a.backup"
    before, since = csr_pem(), csr_pem()
    with opened(settings, clock) as portal:
        known = portal.registrations.register(OPERATOR, with_fields(csr=before))
        copied(settings, file, clock)
        unknown = portal.registrations.register(OPERATOR, with_fields(csr=since))
        for registered in (known, unknown):
            portal.revocations.revoke(OPERATOR, registered.device_id, "key_compromise")
    put_back(settings, file, clock)
    with opened(settings, clock) as portal:
        for csr in (before, since):
            with pytest.raises(KeyCompromised):
                portal.registrations.register(OPERATOR, with_fields(csr=csr))
