"""Enrolment over EST with a token: what a device gets, and what is refused."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Callable
from datetime import timedelta
from io import BytesIO
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.tenants import TenantChoices
from pki.issuers import CLOCK_SKEW
from store import tenants
from tests.support.est import Device, certificates_of, csr_der, device, in_base64, new_key, refused
from tests.support.harness import ON_SQLITE, PER_DEVICE, Api, Clock

pytestmark = ON_SQLITE


# --- What is for anyone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/.well-known/est/", "/.well-known/est/default/"])
def test_cacerts_returns_the_certificate_chain(api: Api, app: Flask, path: str) -> None:
    found = certificates_of(Device(api, path=path).call("GET", "cacerts"))
    trusted = x509.load_pem_x509_certificates(portal_of(app).authority.first.ca_pem.encode())
    assert set(found) == set(trusted)
    assert len(found) == 2


def test_an_unknown_label_is_not_found(api: Api) -> None:
    refused(Device(api, path="/.well-known/est/other/").call("GET", "cacerts"), 404)


@pytest.mark.parametrize(
    ("key_type", "said"),
    [
        ("ec-p256", ["id-ecPublicKey", "prime256v1", "ecdsa-with-SHA256"]),
        ("ec-p384", ["id-ecPublicKey", "secp384r1", "ecdsa-with-SHA384"]),
        ("ed25519", ["ED25519"]),
        ("rsa-3072", ["rsaEncryption", "0C00", "sha256WithRSAEncryption"]),
        ("rsa-4096", ["rsaEncryption", "1000", "sha256WithRSAEncryption"]),
    ],
)
def test_csrattrs_names_the_key_type_of_the_token(api: Api, key_type: str, said: list[str]) -> None:
    answer = device(api, key_types=[key_type]).call("GET", "csrattrs")
    assert answer.content_type == "application/csrattrs"
    der = base64.b64decode(answer.data)
    shown = subprocess.run(["openssl", "asn1parse", "-inform", "DER"], input=der, check=True, capture_output=True)
    assert [line.rpartition(":")[2].strip() for line in shown.stdout.decode().splitlines() if "prim" in line] == said


def test_csrattrs_without_a_token_names_the_key_type_of_the_settings(api: Api) -> None:
    assert Device(api).call("GET", "csrattrs").status_code == 200


def test_csrattrs_at_a_label_names_the_key_type_that_its_tenant_has_chosen(api: Api, app: Flask) -> None:
    portal = portal_of(app)
    with portal.database.transaction() as tx:
        choices = TenantChoices(key_type="ed25519")
        tenants.add_tenant(tx, "acme", created_at=portal.clock(), choices=choices)
    portal.tenant_terms.refresh()
    ed25519_oid = bytes.fromhex("06032b6570")
    for path, expected in (("/.well-known/est/acme/", True), ("/.well-known/est/default/", False)):
        shown = base64.b64decode(Device(api, path=path).call("GET", "csrattrs").data)
        assert (ed25519_oid in shown) is expected


# --- Enrolment by a token -----------------------------------------------------------------------------------------


def test_a_device_enrols_with_a_token_for_several_devices(api: Api) -> None:
    key, terms = new_key(), {"location": "hall 1", "firmware": "7", "validity_days": 9}
    answer = device(api, name_template="pump-{number} {serial}", **terms).enrol(csr_der(key, "sn 42"))
    [certificate] = certificates_of(answer)
    assert certificate.public_key() == key.public_key()
    device_id = certificate.subject.rfc4514_string().removeprefix("CN=")
    shown = api.get(f"/devices/{device_id}").json
    assert (shown["status"], shown["name"], shown["type"]) == ("active", "pump-1 sn-42", "pump")
    assert (shown["location"], shown["firmware"]) == ("hall 1", "7")
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert timedelta(days=9) <= life <= timedelta(days=9) + CLOCK_SKEW


@PER_DEVICE
def test_the_certificate_is_held_back_until_the_broker_admits_the_device(api: Api, app: Flask) -> None:
    certificates_of(device(api).enrol())
    portal = portal_of(app)
    acl = (portal.settings.broker_dir / "acl").read_text()
    newest = api.get("/devices").json["devices"][0]["device_id"]
    assert f"user {newest}" in acl


@PER_DEVICE
def test_a_pending_device_enrols_with_a_token_of_its_own(api: Api) -> None:
    wanted = {"name": "pump-7", "type": "pump", "location": "hall 2", "firmware": "1"}
    topics = [{"filter": "devices/{id}/up", "access": "write"}]
    device_id = api.post("/devices", wanted | {"topics": topics}).json["device_id"]
    assert api.get(f"/devices/{device_id}").json["status"] == "pending"
    one = device(api, device_id=device_id)
    [certificate] = certificates_of(one.enrol())
    assert certificate.subject.rfc4514_string() == f"CN={device_id}"
    shown = api.get(f"/devices/{device_id}").json
    assert (shown["status"], shown["name"], shown["topics"]) == ("active", "pump-7", topics)
    assert "used up" in refused(one.enrol(), 403)


@pytest.mark.parametrize(
    "form",
    [
        lambda der: base64.b64encode(der),
        lambda der: base64.encodebytes(der).replace(b"\n", b"\r\n"),
        lambda der: b"  " + base64.encodebytes(der).replace(b"\n", b" \n\t") + b"\n\n",
        lambda der: der,
        lambda der: x509.load_der_x509_csr(der).public_bytes(Encoding.PEM),
    ],
    ids=["one line", "CRLF", "spaces", "DER", "PEM"],
)
def test_a_request_may_be_encoded_as_clients_do_it(api: Api, form: Callable[[bytes], bytes]) -> None:
    assert len(certificates_of(device(api).call("POST", "simpleenroll", form(csr_der())))) == 1


# --- What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("credentials", [None, "Basic !", "Basic ZGV2aWNl", "Basic ZGV2aWNlOmVuX25vbmU=", "Bearer x"])
def test_a_device_without_credentials_is_asked_for_a_token(api: Api, credentials: str | None) -> None:
    headers = {} if credentials is None else {"Authorization": credentials}
    answer = Device(api).call("POST", "simpleenroll", in_base64(csr_der()), headers=headers)
    refused(answer, 401)
    assert answer.headers["WWW-Authenticate"].startswith('Basic realm="')
    assert api.get("/audit?limit=1").json["entries"][0]["outcome"] == "refused"


def test_an_operator_token_is_refused_as_an_enrolment_token(api: Api) -> None:
    refused(Device(api, api.token).enrol(), 401)


def test_a_client_with_too_many_failures_has_to_wait(make_settings: Callable[..., Settings]) -> None:
    built = create_app(make_settings(PORTAL_LOGIN_FAILURES="2"), background=False)
    stranger = Device(Api(built.test_client(), None), "en_guess")
    answers = [stranger.enrol() for _ in range(3)]
    assert [answer.status_code for answer in answers] == [401, 401, 429]
    assert int(answers[-1].headers["Retry-After"]) > 0
    portal_of(built).close()


def test_an_expired_used_up_or_revoked_token_is_refused(api: Api, clock: Clock) -> None:
    used_up, expired, revoked = device(api), device(api, expires_in_hours=1), device(api)
    certificates_of(used_up.enrol())
    newest = api.get("/enrolment-tokens").json["enrolment_tokens"][0]["enrolment_token_id"]
    assert api.delete(f"/enrolment-tokens/{newest}").json["revoked_at"]
    clock.advance(hours=2)
    for one, word in ((used_up, "used up"), (expired, "expired"), (revoked, "revoked")):
        if one is not used_up:
            assert word in refused(one.enrol(), 403)
    assert len(api.get("/devices").json["devices"]) == 1


def test_an_enrolled_device_can_repeat_its_request_after_the_token_expired_but_not_once_it_is_revoked(
    api: Api, clock: Clock
) -> None:
    one, request = device(api, expires_in_hours=1), csr_der()
    first = certificates_of(one.enrol(request))
    clock.advance(hours=2)
    assert certificates_of(one.enrol(request)) == first
    newest = api.get("/enrolment-tokens").json["enrolment_tokens"][0]["enrolment_token_id"]
    api.delete(f"/enrolment-tokens/{newest}")
    refused(one.enrol(request), 403)


def test_a_revoked_device_does_not_get_its_certificate_again(api: Api) -> None:
    one, request = device(api), csr_der()
    [certificate] = certificates_of(one.enrol(request))
    device_id = certificate.subject.rfc4514_string().removeprefix("CN=")
    api.post(f"/revoke/{device_id}", {})
    assert "revoked" in refused(one.enrol(request), 403)


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["P-384", "Ed25519", "RSA"],
)
def test_a_key_type_that_the_token_does_not_allow_is_refused(api: Api, key: Any) -> None:
    one = device(api, key_types=["ec-p256"])
    assert "ec-p256" in refused(one.enrol(csr_der(key)), 400)
    assert api.get("/enrolment-tokens").json["enrolment_tokens"][0]["uses"] == 0
    certificates_of(one.enrol())


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "empty"),
        (b"not base64!", "Base64"),
        (base64.b64encode(b"\x30\x03\x02\x01\x01"), "signature algorithm"),
        (b"\x30\x82" + b"\xff" * 64, "cut off"),
        (b"-----BEGIN CERTIFICATE REQUEST-----\n", "PEM"),
        (b"TUlJ" * 8000, "longer"),
        (base64.b64encode(csr_der()[:-1] + b"\x00"), "signature"),
    ],
)
def test_a_malformed_request_is_refused_with_a_sentence(api: Api, body: bytes, word: str) -> None:
    assert word in refused(device(api).call("POST", "simpleenroll", body), 400)


def test_pkcs7_is_refused_as_a_request(api: Api) -> None:
    one = device(api)
    message = one.call("GET", "cacerts").data
    assert "signature algorithm" in refused(one.call("POST", "simpleenroll", message), 400)
    refused(one.call("POST", "simpleenroll", message, content_type="application/pkcs7-mime"), 415)
    refused(one.call("POST", "fullcmc", message, content_type="application/pkcs7-mime"), 404)


def test_a_request_that_is_too_long_is_not_read(api: Api) -> None:
    body = b"TUlJ" * 10000
    refused(device(api).call("POST", "simpleenroll", body), 413)
    in_chunks = {"wsgi.input_terminated": True, "CONTENT_LENGTH": ""}
    path = "/.well-known/est/simpleenroll"
    answer = api.client.post(
        path, content_type="application/pkcs10", input_stream=BytesIO(body), environ_overrides=in_chunks
    )
    refused(answer, 413)


def test_a_request_of_another_media_type_is_refused(api: Api) -> None:
    answer = device(api).call("POST", "simpleenroll", in_base64(csr_der()), content_type="application/json")
    assert "application/pkcs10" in refused(answer, 415)


def test_another_method_is_refused_in_plain_text(api: Api) -> None:
    answer = Device(api).call("GET", "simpleenroll")
    refused(answer, 405)
    assert answer.headers["Allow"] == "POST"
