"""A device of a manufacturer that was reset enrols again with another key, after approval by an operator."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from flask import Flask

from app import portal_of
from operations.wiring import Portal
from tests.support.est import Device, certificates_of, csr_der, refused
from tests.support.harness import Api, problem_of
from tests.support.pki import PEM, Authority

MAKER = Authority("A maker's CA")


@pytest.fixture
def factory_device(api: Api) -> Device:
    """A device with the factory certificate of a registered manufacturer."""
    certificate = MAKER.certificate.public_bytes(PEM).decode()
    record = api.post("/manufacturers", {"name": "A maker", "certificate": certificate}).json
    proof = MAKER.issue(record["nonce"]).certificate.public_bytes(PEM).decode()
    api.post(f"/manufacturers/{record['manufacturer_id']}/proof", {"certificate": proof})
    return Device(api, certificate=MAKER.issue("sn-1").certificate.public_bytes(Encoding.DER))


@pytest.fixture
def before(factory_device: Device) -> tuple[str, Device]:
    """The device after its first enrolment: its path, and the client with its certificate."""
    [certificate] = certificates_of(factory_device.enrol())
    device_id = certificate.subject.rfc4514_string()[3:]
    return f"/devices/{device_id}", Device(factory_device.api, certificate=certificate.public_bytes(Encoding.DER))


def asking(api: Api) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.get("/enrolments").json["enrolments"]
    return found


def test_an_approved_device_keeps_its_name_and_loses_its_older_certificates(
    api: Api, factory_device: Device, before: tuple[str, Device], app: Flask
) -> None:
    path, older = before
    request = csr_der()
    for _ in range(2):
        answer = factory_device.enrol(request)
        assert (answer.status_code, int(answer.headers["Retry-After"]) > 0) == (202, True)
    [waits] = asking(api)
    assert (f"/devices/{waits['device_id']}", waits["again"], waits["name"]) == (path, True, "sn-1")
    shown = api.get(f"{path}/enrolment").json
    assert (shown["status"], shown["again"], shown["key_fingerprint"]) == ("waiting", True, waits["key_fingerprint"])
    assert api.get(path).json["status"] == "active"
    assert "too early" in refused(older.enrol(csr_der(None, waits["device_id"]), "simplereenroll"), 409)  # still in
    for _ in range(2):
        assert api.post(f"{path}/approve", {"key_fingerprint": waits["key_fingerprint"]}).json["status"] == "active"
    [certificate] = certificates_of(factory_device.enrol(request))
    assert certificate.subject.rfc4514_string() == f"CN={waits['device_id']}"
    assert certificates_of(factory_device.enrol(request)) == [certificate]
    refused(older.enrol(csr_der(None, waits["device_id"]), "simplereenroll"), 403)
    found = api.get(f"{path}/certificates").json["certificates"]
    assert [(item["status"], item["revocation_reason"]) for item in found] == [
        ("active", None),
        ("revoked", "superseded"),
    ]
    assert serials_on_crl(portal_of(app)) >= {found[1]["serial_number"]}
    assert (asking(api), api.get(f"{path}/enrolment").json["status"]) == ([], "issued")
    actions = [entry["action"] for entry in api.get("/audit?limit=50").json["entries"]]
    for action in ("device:ask_again", "device:approve", "device:enrol_again"):
        assert actions.count(action) == 1


def serials_on_crl(portal: Portal) -> set[str]:
    crls = (portal.settings.broker_dir / "crl.pem").read_bytes().split(b"-----BEGIN X509 CRL-----")[1:]
    lists = [x509.load_pem_x509_crl(b"-----BEGIN X509 CRL-----" + block) for block in crls]
    return {f"{entry.serial_number:x}" for one in lists for entry in one}


def test_a_rejected_key_gets_no_certificate_and_the_device_stays_active(
    api: Api, factory_device: Device, before: tuple[str, Device]
) -> None:
    path, _ = before
    request = csr_der()
    factory_device.enrol(request)
    for _ in range(2):
        assert api.post(f"{path}/reject").json["status"] == "active"
    assert "rejected this key" in refused(factory_device.enrol(request), 403)
    problem_of(api.post(f"{path}/approve"), 409, "state_conflict")
    assert factory_device.enrol().status_code == 202  # another key is another question
    assert api.get(path).json["status"] == "active"


def test_an_approval_is_for_the_key_that_the_operator_saw(
    api: Api, factory_device: Device, before: tuple[str, Device]
) -> None:
    path, _ = before
    request = csr_der()
    factory_device.enrol(request)
    [waits] = asking(api)
    factory_device.enrol()
    problem_of(api.post(f"{path}/approve", {"key_fingerprint": waits["key_fingerprint"]}), 409, "state_conflict")
    api.post(f"{path}/approve")
    assert factory_device.enrol(request).status_code == 202  # which puts the approved key aside
    assert asking(api)[0]["key_fingerprint"] == waits["key_fingerprint"]


@pytest.mark.parametrize("act", ["suspend", "revoke"])
def test_a_revoked_device_does_not_come_back_by_a_reset(
    api: Api, factory_device: Device, before: tuple[str, Device], act: str
) -> None:
    path, _ = before
    request = csr_der()
    factory_device.enrol(request)
    api.post(f"{path}/approve")
    api.post(f"{path}/suspend" if act == "suspend" else path.replace("/devices", "/revoke"), {})
    refused(factory_device.enrol(request), 403)
    assert asking(api) == []


def test_a_revoked_device_can_enrol_as_a_new_one_with_a_token(
    api: Api, factory_device: Device, before: tuple[str, Device]
) -> None:
    path, _ = before
    api.post(path.replace("/devices", "/revoke"), {})
    refused(factory_device.enrol(), 403)
    factory_device.token = api.post("/enrolment-tokens", {"name": "repaired"}).json["token"]
    [certificate] = certificates_of(factory_device.enrol())
    assert f"/devices/{certificate.subject.rfc4514_string()[3:]}" != path


def test_waiting_devices_are_listed_longest_wait_first(
    api: Api, factory_device: Device, before: tuple[str, Device]
) -> None:
    factory_device.enrol()
    token = api.post("/enrolment-tokens", {"name": "a batch", "approval": "operator"}).json
    Device(api, token["token"]).enrol()
    first, second = asking(api)
    assert (first["again"], second["again"]) == (True, False)
    assert (first["manufacturer_id"] is None, second["enrolment_token_id"]) == (False, token["enrolment_token_id"])
    problem_of(
        api.post(f"/devices/{second['device_id']}/approve", {"key_fingerprint": "0" * 64}), 409, "state_conflict"
    )
