"""What a device with its certificate is told of the broker."""

from __future__ import annotations

import base64
import hashlib
import io
from typing import Any

import pytest
import pyzipper
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from flask import Flask

from app import portal_of
from core.roles import Role
from core.tenants import TenantStatus
from tests.support.est import Device, certificates_of, csr_der, device
from tests.support.harness import ON_SQLITE, PER_DEVICE, Api, Clock, api_as, csr_pem, problem_of
from tests.support.pki import Authority
from tests.web.api.test_downloads import path_of
from tests.web.api.test_est_clients import factory_device, registered
from tests.web.api.test_suspended_tenants import set_status

pytestmark = ON_SQLITE
PATH = "/.well-known/onboarding/config"


def der(pem: str) -> bytes:
    return x509.load_pem_x509_certificate(pem.encode()).public_bytes(Encoding.DER)


def asked(api: Api, certificate: bytes | None, **headers: str) -> Any:
    return Device(api, certificate=certificate, path=PATH).call("GET", "", headers=headers)


def told(api: Api, certificate: bytes) -> dict[str, Any]:
    answer = asked(api, certificate)
    assert answer.status_code == 200, answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    body: dict[str, Any] = answer.json
    return body


def with_csr(api: Api, **fields: Any) -> tuple[str, bytes]:
    """A device with a key of its own: its id, its certificate."""
    made = api.register(csr=csr_pem(), **fields)
    return made["device_id"], der(made["certificate"])


@PER_DEVICE
def test_a_device_learns_broker_client_id_topics_trust_and_when_to_renew(api: Api, app: Flask) -> None:
    topics = [
        {"filter": "devices/{id}/up/#", "access": "write"},
        {"filter": "devices/{id}/down", "access": "read"},
        {"filter": "devices/{id}/state", "access": "readwrite"},
    ]
    device_id, certificate = with_csr(api, name="pump-3", topics=topics)
    said, settings = told(api, certificate), portal_of(app).settings
    shown = api.get(f"/devices/{device_id}").json
    assert said == {
        "client_id": device_id,
        "kind": "device",
        "name": "pump-3",
        "brokers": [{"host": settings.mqtt_host, "port": settings.mqtt_port}],
        "tls": {"ca": api.get("/broker-ca.pem").text, "min_version": settings.mqtt_tls},
        "keep_alive_seconds": 60,
        "publish": [f"devices/{device_id}/up/#", f"devices/{device_id}/state"],
        "subscribe": [f"devices/{device_id}/down", f"devices/{device_id}/state"],
        "certificate": {
            "fingerprint": hashlib.sha256(certificate).hexdigest(),
            "renewable_from": shown["renewable_from"],
            **{name: shown["certificate"][name] for name in ("serial_number", "not_before", "not_after")},
        },
        "renewal": {"url": f"{settings.public_url}/.well-known/est/simplereenroll", "overlap_hours": 24},
    }


def test_it_is_what_the_bundle_of_a_device_says(api: Api, app: Flask) -> None:
    made = api.register()
    content = api_as(app, None).get(path_of(made)).data
    with pyzipper.AESZipFile(io.BytesIO(content)) as bundle:
        bundle.setpassword(made["bundle_password"].encode())
        files = {name: bundle.read(name).decode() for name in bundle.namelist()}
    said = told(api, der(files["device.pem"]))
    [broker] = said["brokers"]
    options = dict(line.split(" ", 1) for line in files["mosquitto-client.conf"].splitlines() if line[0] == "-")
    assert (options["-h"], options["-p"], options["-i"]) == (broker["host"], str(broker["port"]), said["client_id"])
    assert files["ca.pem"] == said["tls"]["ca"]


def test_a_device_that_has_enrolled_over_est_is_told_the_same(api: Api) -> None:
    [certificate] = certificates_of(device(api).enrol(csr_der()))
    said = told(api, certificate.public_bytes(Encoding.DER))
    assert certificate.subject.rfc4514_string() == f"CN={said['client_id']}"
    assert said["publish"] == said["subscribe"] == [f"devices/{said['client_id']}/#"]


def test_a_device_of_another_tenant_is_told_what_its_tenant_has(api: Api, app: Flask) -> None:
    acme = api_as(app, Role.ADMIN, "acme")
    device_id, certificate = with_csr(acme)
    said = told(api, certificate)
    assert said["publish"] == [f"acme/{device_id}/#"]
    assert said["tls"]["ca"] == acme.get("/broker-ca.pem").text
    assert told(api, with_csr(api)[1])["tls"]["ca"] == api.get("/broker-ca.pem").text


@pytest.mark.parametrize("act", ["suspend", "revoke"])
def test_a_device_that_is_suspended_or_revoked_is_told_nothing(api: Api, act: str) -> None:
    device_id, certificate = with_csr(api)
    api.post(f"/revoke/{device_id}" if act == "revoke" else f"/devices/{device_id}/suspend")
    detail = problem_of(asked(api, certificate), 403, "client_certificate_refused")["detail"]
    assert "revoked or suspended" in detail


def test_a_suspended_tenant_is_told_nothing(api: Api, app: Flask) -> None:
    certificate = with_csr(api_as(app, Role.ADMIN, "acme"))[1]
    set_status(portal_of(app), TenantStatus.SUSPENDED)
    problem_of(asked(api, certificate), 403, "tenant_suspended")


def test_an_expired_certificate_is_told_nothing(api: Api, clock: Clock) -> None:
    certificate = with_csr(api, validity_days=1)[1]
    clock.advance(days=1, hours=2)
    problem_of(asked(api, certificate), 403, "client_certificate_refused")


def test_without_a_certificate_of_this_portal_nobody_is_told_anything(api: Api) -> None:
    maker = Authority("A maker's CA")
    registered(api, maker)
    for certificate in (None, factory_device(api, maker).certificate, Authority("x").issue("y").certificate):
        shown = certificate.public_bytes(Encoding.DER) if isinstance(certificate, x509.Certificate) else certificate
        problem_of(asked(api, shown), 403, "client_certificate_refused")


def test_an_operator_token_is_no_certificate(api: Api) -> None:
    problem_of(api.get(PATH), 403, "client_certificate_refused")


def test_a_header_that_a_client_makes_up_is_no_certificate(api: Api) -> None:
    header = ssl_header(with_csr(api)[1])
    problem_of(asked(api, None, **{"Client-Cert": header}), 403, "client_certificate_refused")


def ssl_header(certificate: bytes) -> str:
    return f":{base64.b64encode(certificate).decode()}:"


def test_asking_with_a_new_certificate_counts_as_its_use(api: Api, app: Flask) -> None:
    device_id, first = with_csr(api)
    renewed = api.post(f"/devices/{device_id}/renew", {"csr": csr_pem(), "revoke_previous": "when_used"}).json
    told(api, first)
    assert told(api, der(renewed["certificate"]))["client_id"] == device_id
    problem_of(asked(api, first), 403, "client_certificate_refused")
