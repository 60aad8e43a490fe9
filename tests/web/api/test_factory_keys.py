"""A revoked or rejected device does not come back through its factory certificate, by whatever manufacturer."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives import hashes
from flask import Flask

from app import portal_of
from store.enrolment_tables import EnrolmentRow
from tests.support.est import Device, certificates_of, csr_der, refused
from tests.support.harness import Api, problem_of
from tests.support.pki import Authority
from tests.web.api.test_est_clients import factory_device, registered


def renewed(maker: Authority) -> Authority:
    """The same CA with another certificate for the same key."""
    other = copy.copy(maker)
    builder = maker._builder(maker.common_name, maker.common_name, maker.key.public_key())
    for extension in maker.certificate.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    other.certificate = builder.sign(maker.key, hashes.SHA256())
    return other


def comes_back_by(api: Api, maker: Authority, path: str, how: str) -> None:
    """Do with the manufacturer what must bring no device back."""
    if how == "removed and added again":
        assert api.delete(path).status_code == 200
        registered(api, maker)
    elif how == "renewed":
        registered(api, renewed(maker))
    else:
        registered(api, renewed(maker))
        assert api.delete(path).status_code == 200


WAYS = pytest.mark.parametrize("how", ["removed and added again", "renewed", "renewed, and the old one removed"])


@WAYS
def test_a_revoked_device_does_not_come_back_when_its_manufacturer_is(api: Api, how: str) -> None:
    maker = Authority("A maker's CA")
    path = registered(api, maker)
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
    [{}, {"certificate": "x"}, {"key_types": []}, {"validity_days": 0}, {"approval": "never"}, {"name": None}],
)
def test_other_changes_of_a_manufacturer_are_refused(api: Api, changes: dict[str, object]) -> None:
    path = registered(api, Authority("A maker's CA"))
    before = api.get(path).json
    problem_of(api.patch(path, changes), 422, "invalid_input")
    assert api.get(path).json == before


def test_a_removed_manufacturer_is_not_changed(api: Api) -> None:
    path = registered(api, Authority("A maker's CA"))
    api.delete(path)
    problem_of(api.patch(path, {"name": "again"}), 409, "conflict")
