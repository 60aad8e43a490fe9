"""Devices over HTTP: register, list, show, change, revoke."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flask import Flask

from app import portal_of
from tests.support.harness import PER_DEVICE, Api, Clock, csr_pem, problem_of

PUMP = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}
KEY = {"Idempotency-Key": "a-key-of-16-chars"}
BUNDLE_FIELDS = {"download_url", "download_expires_at", "bundle_password"}
CSR_FIELDS = {"certificate", "chain"}
COMMON_FIELDS = {"device_id", "name", "status", "fingerprint", "serial_number", "issued_at", "expires_at"}


def names_of(page: Any) -> list[str]:
    return [device["name"] for device in page["devices"]]


# --- Register -----------------------------------------------------------------------------------------------------


def test_a_registration_returns_link_password_and_the_location_of_the_device(api: Api) -> None:
    answer = api.post("/register", PUMP)
    assert answer.status_code == 201
    assert set(answer.json) == COMMON_FIELDS | BUNDLE_FIELDS
    assert answer.headers["Location"] == f"/devices/{answer.json['device_id']}"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.json["status"] == "active"
    assert len(answer.json["bundle_password"]) >= 22
    assert api.get(answer.headers["Location"]).json["name"] == "pump-1"


def test_a_registration_by_csr_returns_certificate_and_chain_instead_of_a_bundle(api: Api) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    registered = api.register(csr=csr_pem(key))
    assert set(registered) == COMMON_FIELDS | CSR_FIELDS
    certificate = x509.load_pem_x509_certificate(registered["certificate"].encode())
    assert certificate.public_key() == key.public_key()
    assert registered["chain"].startswith(registered["certificate"])
    der = certificate.public_bytes(Encoding.DER)
    assert registered["fingerprint"] == hashlib.sha256(der).hexdigest()
    assert int(registered["serial_number"], 16) == certificate.serial_number
    assert registered["expires_at"] == certificate.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@PER_DEVICE
@pytest.mark.parametrize(
    "fields",
    [
        {"key_type": "ec-p384"},
        {"key_type": "ed25519"},
        {"bundle_password": "a password of my own"},
        {"metadata": {"rack": 7, "tags": ["a", {"b": None}], "ratio": 0.5, "naïve": "ünïcode ✓"}},
        {"topics": [{"filter": "devices/{id}/up/#", "access": "write"}, {"filter": "devices/all/+", "access": "read"}]},
        {"name": "Pumpe Nr. 7 – Süd 𝄞", "location": "Halle / 1"},
        {"validity_days": 1.0},
        {"csr": None, "key_type": None, "topics": None, "bundle_password": None, "validity_days": None},
    ],
)
def test_the_optional_fields_of_a_registration(api: Api, fields: dict[str, Any]) -> None:
    device = api.get(f"/devices/{api.register(**fields)['device_id']}").json
    for field in ("name", "location", "metadata", "topics"):
        if fields.get(field) is not None:
            assert device[field] == fields[field]


def test_a_certificate_is_valid_for_the_requested_days(api: Api) -> None:
    registered = api.register(validity_days=30)
    issued, ends = (datetime.fromisoformat(registered[name]) for name in ("issued_at", "expires_at"))
    assert timedelta(days=30) - timedelta(seconds=1) <= ends - issued <= timedelta(days=30)


def test_a_repeat_under_the_same_idempotency_key_gets_the_first_answer(api: Api) -> None:
    first, second = (api.post("/register", PUMP, headers=KEY) for _ in range(2))
    assert (second.status_code, second.json) == (201, first.json)
    assert len(api.get("/devices").json["devices"]) == 1


@PER_DEVICE
def test_a_device_is_active_at_once_and_applied_on_the_broker_later(api: Api) -> None:
    device = api.get(f"/devices/{api.register()['device_id']}").json
    assert (device["status"], device["broker"]) == ("active", "pending")
    assert device["topics"] == [{"filter": "devices/{id}/#", "access": "readwrite"}]
    assert device["certificate"]["status"] == "active"


# --- List ---------------------------------------------------------------------------------------------------------


def test_a_list_is_newest_first_and_its_pages_miss_nothing_while_devices_are_added_and_revoked(api: Api) -> None:
    for number in range(5):
        api.register(name=f"pump-{number}")
    first = api.get("/devices?limit=2").json
    api.register(name="a late one")
    second = api.get(f"/devices?limit=2&cursor={first['next_cursor']}").json
    third = api.get(f"/devices?limit=2&cursor={second['next_cursor']}").json
    assert [names_of(page) for page in (first, second, third)] == [
        ["pump-4", "pump-3"],
        ["pump-2", "pump-1"],
        ["pump-0"],
    ]
    assert third["next_cursor"] is None


def test_devices_created_at_the_same_time_are_paged_without_loss(api: Api, app: Flask) -> None:
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    registered = {api.register()["device_id"] for _ in range(5)}
    with portal_of(app).database.transaction() as tx:
        tx.exec_driver_sql("UPDATE devices SET created_at = '2030-01-01 00:00:00.000000'")
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = api.get(f"/devices?limit=2{cursor and '&cursor=' + cursor}").json
        seen += [device["device_id"] for device in page["devices"]]
        cursor = page["next_cursor"]
    assert sorted(seen) == sorted(registered)
    assert datetime.fromisoformat(api.get("/devices").json["devices"][0]["created_at"]).date() == moment.date()


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", ["Ärger 100%", "valve_1", "pump-1"]),
        ("type=valve", ["valve_1"]),
        ("location=hall 2", ["valve_1"]),
        ("type=valve&location=hall 1", []),
        ("q=PUMP", ["pump-1"]),
        ("q=Ärger", ["Ärger 100%"]),
        ("q=100%25", ["Ärger 100%"]),
        ("q=%25", ["Ärger 100%"]),
        ("q=e_1", ["valve_1"]),
        ("q=' OR 1=1 --", []),
        ("status=revoked", ["pump-1"]),
        ("status=active", ["Ärger 100%", "valve_1"]),
        ("expires_before=2000-01-01T00:00:00Z", []),
        ("expires_before=0001-01-01T00:00:00Z", []),
        ("expires_before=9999-12-31T23:59:59.999Z", ["Ärger 100%", "valve_1"]),
        ("expires_before=2100-01-01t00:00:00.5%2B02:00", ["Ärger 100%", "valve_1"]),
    ],
)
def test_a_list_can_be_filtered(api: Api, query: str, found: list[str]) -> None:
    gone = api.register()["device_id"]
    api.register(name="valve_1", type="valve", location="hall 2")
    api.register(name="Ärger 100%")
    api.post(f"/revoke/{gone}")
    answer = api.get(f"/devices?{query}")
    assert answer.status_code == 200, answer.text
    names = names_of(answer.json)
    if "expires_before" in query:  # in the order of their ends, which are the same second here
        names = sorted(names, reverse=True)
    assert names == found


def test_a_device_is_found_by_its_id(api: Api) -> None:
    device_id = api.register()["device_id"]
    api.register(name="another")
    assert names_of(api.get(f"/devices?q={device_id.upper()}").json) == ["pump-1"]


# --- Change -------------------------------------------------------------------------------------------------------


@PER_DEVICE
@pytest.mark.parametrize(
    "change",
    [
        {"name": "pump-2"},
        {"firmware": "2.0", "metadata": {"rack": 8}},
        {"metadata": {}},
        {"topics": [{"filter": "devices/{id}/up", "access": "write"}]},
    ],
)
def test_a_change_affects_the_named_fields_only(api: Api, clock: Clock, change: dict[str, Any]) -> None:
    device_id = api.register(metadata={"rack": 7})["device_id"]
    before = api.get(f"/devices/{device_id}").json
    clock.advance(seconds=5)
    changed = api.patch(f"/devices/{device_id}", change)
    assert changed.status_code == 200
    assert changed.json["updated_at"] > before["updated_at"]
    assert {**changed.json, "updated_at": ""} == {**before, **change, "updated_at": ""}
    assert api.get(f"/devices/{device_id}").json == changed.json


def test_topics_narrower_than_the_default_are_refused_by_a_new_installation(api: Api) -> None:
    narrower = {"topics": [{"filter": "devices/{id}/up", "access": "write"}]}
    device_id = api.register(topics=[{"filter": "devices/{id}/#", "access": "readwrite"}])["device_id"]
    for answer in (api.post("/register", PUMP | narrower), api.patch(f"/devices/{device_id}", narrower)):
        problem = problem_of(answer, 422, "topic_refused")
        assert "PORTAL_ACL_STYLE=per-device" in problem["detail"]
        assert [error["field"] for error in problem["errors"]] == ["topics"]


@PER_DEVICE
def test_null_restores_the_default_topics(api: Api) -> None:
    device_id = api.register(topics=[{"filter": "devices/{id}/up", "access": "write"}])["device_id"]
    changed = api.patch(f"/devices/{device_id}", {"topics": None})
    assert changed.json["topics"] == [{"filter": "devices/{id}/#", "access": "readwrite"}]


def test_the_certificates_of_a_device_are_listed_with_their_status(api: Api, app: Flask) -> None:
    registered = api.register()
    path = f"/devices/{registered['device_id']}"
    [certificate] = api.get(f"{path}/certificates").json["certificates"]
    assert (certificate["status"], certificate["revoked_at"]) == ("active", None)
    assert certificate["fingerprint"] == registered["fingerprint"]
    api.post(f"/revoke/{registered['device_id']}", {"reason": "key_compromise"})
    [revoked] = api.get(f"{path}/certificates").json["certificates"]
    assert (revoked["status"], revoked["revocation_reason"]) == ("revoked", "key_compromise")
    parsed = x509.load_pem_x509_certificate(revoked["certificate"].encode())
    issuer = portal_of(app).authority.first.issuing.issuer.certificate
    assert parsed.issuer == issuer.subject
    parsed.verify_directly_issued_by(issuer)
    assert parsed.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


# --- Revoke -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({}, "unspecified"),
        ({"json": {}}, "unspecified"),
        ({"json": {"reason": "key_compromise"}}, "key_compromise"),
        ({"json": {"reason": "cessation_of_operation"}}, "cessation_of_operation"),
    ],
)
def test_a_revocation_is_pending_while_the_broker_does_not_refuse_the_device(
    api: Api, request_: dict[str, Any], reason: str
) -> None:
    device_id = api.register()["device_id"]
    answer = api.call("POST", f"/revoke/{device_id}", **request_)
    assert answer.status_code == 200
    assert answer.json["device_id"] == device_id
    assert (answer.json["status"], answer.json["reason"]) == ("revoked", reason)
    assert answer.json["broker"] == "pending"
    assert answer.json["broker_problem"]
    device = api.get(f"/devices/{device_id}").json
    assert (device["status"], device["revoked_at"]) == ("revoked", answer.json["revoked_at"])
    assert device["expires_at"] == device["certificate"]["not_after"]


def test_revoking_twice_returns_the_same_and_is_recorded_once(api: Api, clock: Clock) -> None:
    device_id = api.register()["device_id"]
    first = api.post(f"/revoke/{device_id}", {"reason": "key_compromise"})
    clock.advance(minutes=1)
    second = api.post(f"/revoke/{device_id}", {"reason": "superseded"})
    assert (second.status_code, second.json) == (200, first.json)
    assert len(api.get(f"/audit?action=device:revoke&object=device:{device_id}").json["entries"]) == 1


def test_a_reason_can_be_made_worse_and_not_better(api: Api, clock: Clock) -> None:
    device_id = api.register()["device_id"]
    first = api.post(f"/revoke/{device_id}").json
    reasons = ["unspecified"]
    for asked in ("superseded", "privilege_withdrawn", "unspecified", "key_compromise", "superseded", "unspecified"):
        clock.advance(minutes=1)
        answer = api.post(f"/revoke/{device_id}", {"reason": asked}).json
        assert (answer["revoked_at"], answer["status"]) == (first["revoked_at"], "revoked")
        reasons.append(answer["reason"])
        assert api.get(f"/devices/{device_id}").json["revocation_reason"] == answer["reason"]
        [certificate] = api.get(f"/devices/{device_id}/certificates").json["certificates"]
        assert (certificate["revocation_reason"], certificate["revoked_at"]) == (answer["reason"], first["revoked_at"])
    assert reasons == ["unspecified", *["superseded"] * 3, *["key_compromise"] * 3]
    entries = api.get(f"/audit?action=device:revoke&object=device:{device_id}").json["entries"]
    assert [entry["detail"] for entry in entries] == [
        {"reason": "key_compromise", "before": "superseded"},
        {"reason": "superseded", "before": "unspecified"},
        {"reason": "unspecified"},
    ]


def test_a_revocation_is_final(api: Api) -> None:
    device_id = api.register()["device_id"]
    api.post(f"/revoke/{device_id}")
    problem_of(api.patch(f"/devices/{device_id}", {"name": "back again"}), 409, "state_conflict")


def test_only_an_active_device_has_a_date_from_which_it_may_renew(api: Api) -> None:
    path = f"/devices/{api.register()['device_id']}"

    def renewable_from() -> list[str | None]:
        return [api.get(path).json["renewable_from"], api.get("/devices").json["devices"][0]["renewable_from"]]

    active = renewable_from()
    assert None not in active
    api.post(f"{path}/suspend")
    assert renewable_from() == [None, None]
    api.post(f"{path}/resume")
    assert renewable_from() == active
    api.post(path.replace("/devices/", "/revoke/"))
    assert renewable_from() == [None, None]
