"""A revoked or rejected device does not come back through its factory certificate, by whatever manufacturer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from flask import Flask

from app import portal_of
from store.enrolment_tables import EnrolmentRow
from tests.support.est import Device, certificates_of, csr_der, refused
from tests.support.harness import Api, problem_of, state_of
from tests.support.pki import PEM, Authority
from tests.web.api.test_est_clients import factory_device, pem, registered
from workflows.enrolment.clients import CLIENT_CAS


def renewed(maker: Authority, *, common_name: str | None = None, identifier: bytes | None = None) -> Authority:
    """The same CA with another certificate for the same key; without an identifier of it if that is empty."""
    other = copy.copy(maker)
    name = common_name or maker.common_name
    builder = maker._builder(name, name, maker.key.public_key())
    for extension in maker.certificate.extensions:
        value = extension.value
        if identifier is not None and isinstance(value, x509.SubjectKeyIdentifier):
            if not identifier:
                continue
            value = x509.SubjectKeyIdentifier(identifier)
        builder = builder.add_extension(value, critical=extension.critical)
    other.certificate = builder.sign(maker.key, hashes.SHA256())
    return other


def comes_back_by(api: Api, maker: Authority, path: str, how: str) -> None:
    """Do with the manufacturer what must bring no device back."""
    terms = {"repeated_serial": api.get(path).json["repeated_serial"]}
    if how == "removed and added again":
        assert api.delete(path).status_code == 200
        registered(api, maker, **terms)
    elif how == "renewed":
        registered(api, renewed(maker), **terms)
    elif how == "renewed in its place":
        answer = api.patch(path, {"certificate": pem(renewed(maker))})
        assert answer.status_code == 200, answer.text
    else:
        registered(api, renewed(maker), **terms)
        assert api.delete(path).status_code == 200


WAYS = pytest.mark.parametrize(
    "how", ["removed and added again", "renewed", "renewed in its place", "renewed, and the old one removed"]
)


@WAYS
@pytest.mark.parametrize("setting", ["operator", "new_device"])  # by the latter only its key tells what it is
def test_a_revoked_device_does_not_come_back_when_its_manufacturer_is(api: Api, how: str, setting: str) -> None:
    maker = Authority("A maker's CA")
    path = registered(api, maker, repeated_serial=setting)
    one = factory_device(api, maker)
    [certificate] = certificates_of(one.enrol())
    device_id = certificate.subject.rfc4514_string()[3:]
    api.post(f"/revoke/{device_id}", {"reason": "privilege_withdrawn"})
    comes_back_by(api, maker, path, how)
    assert "revoked" in refused(one.enrol(), 403)
    assert [device["device_id"] for device in api.get("/devices").json["devices"]] == [device_id]


@WAYS
def test_a_rejected_device_does_not_come_back_when_its_manufacturer_does(api: Api, how: str) -> None:
    maker = Authority("A maker's CA")
    path = registered(api, maker, approval="operator")
    one = factory_device(api, maker)
    assert one.enrol().status_code == 202
    [waiting] = api.get("/enrolments").json["enrolments"]
    assert api.post(f"/devices/{waiting['device_id']}/reject").json["status"] == "revoked"
    comes_back_by(api, maker, path, how)
    assert "rejected" in refused(one.enrol(), 403)
    assert len(api.get("/devices").json["devices"]) == 1


@WAYS
def test_an_active_device_stays_the_same_device_when_its_manufacturer_comes_back(api: Api, how: str) -> None:
    maker = Authority("A maker's CA")
    path = registered(api, maker)
    one, request = factory_device(api, maker), csr_der()
    first = certificates_of(one.enrol(request))
    comes_back_by(api, maker, path, how)
    assert certificates_of(one.enrol(request)) == first
    assert one.enrol().status_code == 202  # another key waits for an operator, as ever
    assert len(api.get("/devices").json["devices"]) == 1


def test_one_factory_certificate_at_two_manufacturers_at_once_makes_one_device(app: Flask, api: Api) -> None:
    maker = Authority("A maker's CA")
    registered(api, maker)
    registered(api, renewed(maker))
    one, request = factory_device(api, maker), csr_der()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: Device(api, certificate=one.certificate).enrol(request), range(4)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(api.get("/devices").json["devices"]) == 1
    with portal_of(app).database.snapshot() as tx:
        index = {index["name"]: index for index in sa.inspect(tx).get_indexes(EnrolmentRow.__tablename__)}
    assert index["uq_enrolments_one_of_a_factory_key"]["unique"]


# --- Another factory certificate with the serial number of a device ---------------------------------------------------


def fleet(api: Api) -> list[tuple[str, str]]:
    return [(device["name"], device["status"]) for device in api.get("/devices").json["devices"]]


def only_id(api: Api) -> str:
    [device] = api.get("/devices").json["devices"]
    return str(device["device_id"])


def test_a_unit_with_another_factory_certificate_is_one_device_once_an_operator_has_seen_its_key(api: Api) -> None:
    maker = Authority("A maker's CA")
    registered(api, maker)
    [before] = certificates_of(factory_device(api, maker).enrol())
    again, request = factory_device(api, maker), csr_der()
    assert [again.enrol(request).status_code for _ in range(2)] == [202, 202]
    [waits] = api.get("/enrolments").json["enrolments"]
    assert (waits["device_id"], waits["again"]) == (only_id(api), True)
    api.post(f"/devices/{waits['device_id']}/approve", {"key_fingerprint": waits["key_fingerprint"]})
    [after] = certificates_of(again.enrol(request))
    assert certificates_of(again.enrol(request)) == [after]
    assert (after.subject, after == before) == (before.subject, False)
    found = api.get(f"/devices/{waits['device_id']}/certificates").json["certificates"]
    assert [item["status"] for item in found] == ["active", "revoked"]


def test_a_unit_with_another_factory_certificate_is_one_device_at_once_if_its_manufacturer_says_so(api: Api) -> None:
    maker = Authority("A maker's CA")
    path = registered(api, maker)
    assert api.get(path).json["repeated_serial"] == "operator"
    assert api.patch(path, {"repeated_serial": "same_device"}).json["repeated_serial"] == "same_device"
    one, other = factory_device(api, maker), factory_device(api, maker)
    made = [certificates_of(unit.enrol()) for unit in (one, one, other, other)]  # a reset unit is replaced at once, too
    assert len({certificate.serial_number for [certificate] in made}) == 4
    assert fleet(api) == [("sn-1", "active")]


def test_a_manufacturer_that_needs_approval_gives_no_unit_another_s_place_at_once(api: Api) -> None:
    maker = Authority("A maker's CA")
    registered(api, maker, repeated_serial="same_device", approval="operator")
    one, request = factory_device(api, maker), csr_der()
    one.enrol(request)
    api.post(f"/devices/{only_id(api)}/approve")
    certificates_of(one.enrol(request))
    assert [factory_device(api, maker).enrol().status_code, one.enrol().status_code] == [202, 202]


def test_units_whose_certificates_share_a_serial_number_are_new_devices_if_their_manufacturer_says_so(api: Api) -> None:
    maker = Authority("A maker's CA")
    registered(api, maker, repeated_serial="new_device")
    for _ in range(2):
        certificates_of(factory_device(api, maker).enrol())
    assert fleet(api) == [("sn-1", "active")] * 2


def test_a_serial_number_counts_for_one_manufacturer_s_ca(api: Api) -> None:
    for maker in (Authority("A maker's CA"), Authority("Another maker's CA")):
        registered(api, maker)
        certificates_of(factory_device(api, maker).enrol())
    assert fleet(api) == [("sn-1", "active")] * 2


@WAYS
@pytest.mark.parametrize("setting", ["operator", "same_device"])
def test_a_revoked_unit_does_not_come_back_with_another_factory_certificate(api: Api, how: str, setting: str) -> None:
    maker = Authority("A maker's CA")
    path = registered(api, maker, repeated_serial=setting)
    certificates_of(factory_device(api, maker).enrol())
    api.post(f"/revoke/{only_id(api)}", {"reason": "privilege_withdrawn"})
    comes_back_by(api, maker, path, how)
    assert "revoked" in refused(factory_device(api, maker).enrol(), 403)
    assert len(fleet(api)) == 1


def test_a_revoked_device_comes_back_by_neither_of_its_factory_certificates(api: Api) -> None:
    maker = Authority("A maker's CA")
    path = registered(api, maker, repeated_serial="same_device")
    units = [factory_device(api, maker) for _ in range(2)]
    for unit in units:
        certificates_of(unit.enrol())
    api.post(f"/revoke/{only_id(api)}", {})
    api.patch(path, {"repeated_serial": "new_device"})  # so that their serial number says nothing any more
    for unit in units:
        assert "revoked" in refused(unit.enrol(), 403)
    certificates_of(factory_device(api, maker).enrol())


def test_units_of_one_serial_number_that_enrol_at_once_are_one_device(api: Api) -> None:
    maker = Authority("A maker's CA")
    registered(api, maker, repeated_serial="same_device")
    shown = [factory_device(api, maker).certificate for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda der: Device(api, certificate=der).enrol(), shown))
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert fleet(api) == [("sn-1", "active")]


# --- Terms --------------------------------------------------------------------------------------------------------


def test_the_terms_of_a_manufacturer_change_without_removing_it(api: Api) -> None:
    maker = Authority("A maker's CA")
    path = registered(api, maker, type="pump", validity_days=30)
    changes = {"name": "Another name", "approval": "operator", "key_types": ["ec-p256"], "validity_days": None}
    changed = api.patch(path, changes)
    assert changed.status_code == 200, changed.text
    assert {field: changed.json[field] for field in changes} == changes
    assert (changed.json["type"], changed.json["status"]) == ("pump", "registered")
    assert factory_device(api, maker).enrol().status_code == 202
    entry = api.get("/audit?action=manufacturer:update").json["entries"][0]
    assert entry["detail"] == {"changed": sorted(changes)}


@pytest.mark.parametrize(
    "changes",
    [
        *({}, {"certificate": ""}, {"certificate": None}, {"key_types": []}, {"validity_days": 0}),
        *({"approval": "never"}, {"name": None}, {"repeated_serial": None}),
    ],
)
def test_other_changes_of_a_manufacturer_are_refused(api: Api, changes: dict[str, object]) -> None:
    path = registered(api, Authority("A maker's CA"))
    before = api.get(path).json
    problem_of(api.patch(path, changes), 422, "invalid_input")
    assert api.get(path).json == before


def test_a_renewed_certificate_of_a_ca_takes_the_place_of_the_old_one(app: Flask, api: Api) -> None:
    maker = Authority("A maker's CA")
    path, new = registered(api, maker), renewed(maker)
    before = api.get(path).json
    changed = api.patch(path, {"certificate": pem(new)}).json
    assert changed == before | {
        "certificate": pem(new),
        "fingerprint": new.certificate.fingerprint(hashes.SHA256()).hex(),
    }
    entry = api.get("/audit?action=manufacturer:update").json["entries"][0]["detail"]
    assert entry == {
        "changed": ["certificate"], "fingerprint": changed["fingerprint"], "replaces": before["fingerprint"],
    }  # fmt: skip
    file = (portal_of(app).settings.tls_dir / CLIENT_CAS).read_bytes()
    trusted = x509.load_pem_x509_certificates(file)
    assert (new.certificate in trusted, maker.certificate in trusted) == (True, False)
    certificates_of(factory_device(api, new).enrol())


def of_another_key(maker: Authority) -> Authority:
    return Authority(maker.common_name)


def of_another_name(maker: Authority) -> Authority:
    return renewed(maker, common_name="Another maker's CA")


def of_another_identifier(maker: Authority) -> Authority:
    return renewed(maker, identifier=b"another")


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (of_another_key, "its key is another"),
        (of_another_name, "its subject is another"),
        (of_another_identifier, "its subjectKeyIdentifier is another"),
    ],
)
def test_a_ca_that_is_another_one_does_not_take_the_place_of_one_whose_key_was_proven(
    app: Flask, api: Api, other: Callable[[Authority], Authority], problem: str
) -> None:
    maker = Authority("A maker's CA")
    path = registered(api, maker)
    before = state_of(portal_of(app))
    refusal = problem_of(api.patch(path, {"name": "x", "certificate": pem(other(maker))}), 409, "conflict")
    assert problem in refusal["detail"]
    assert state_of(portal_of(app)) == before


def test_a_renewed_certificate_that_would_lock_out_the_devices_of_another_ca_is_refused(api: Api) -> None:
    maker = Authority("A maker's CA")
    path, new = registered(api, maker), renewed(maker, identifier=b"")
    other = registered(api, Authority(maker.common_name))
    refusal = problem_of(api.patch(path, {"certificate": pem(new)}), 409, "conflict")
    assert "subjectKeyIdentifier" in refusal["detail"]
    api.delete(other)
    assert api.patch(path, {"certificate": pem(new)}).status_code == 200
    certificates_of(factory_device(api, maker).enrol())


def test_a_certificate_that_another_manufacturer_has_is_refused_as_a_renewed_one(app: Flask, api: Api) -> None:
    maker = Authority("A maker's CA")
    path, new = registered(api, maker), renewed(maker)
    registered(api, new)
    assert "exists already" in problem_of(api.patch(path, {"certificate": pem(new)}), 409, "conflict")["detail"]
    leaf = maker.issue("sn-1").certificate.public_bytes(PEM).decode()
    for certificate in ("x", leaf):
        answer = api.patch(path, {"certificate": certificate})
        assert (answer.status_code, answer.json["code"]) == (422, "manufacturer_invalid")


def test_a_removed_manufacturer_is_not_changed(api: Api) -> None:
    maker = Authority("A maker's CA")
    path = registered(api, maker)
    api.delete(path)
    for changes in ({"name": "again"}, {"certificate": pem(renewed(maker))}):
        problem_of(api.patch(path, changes), 409, "conflict")
