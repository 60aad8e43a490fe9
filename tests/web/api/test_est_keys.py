"""Keys generated for devices over EST (serverkeygen), checked by openssl; no copy of them is left."""

from __future__ import annotations

import logging

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from flask import Flask

from app import portal_of
from core import metrics
from tests.support.est import (
    Device,
    certificates_of,
    csr_der,
    device,
    in_base64,
    key_and_certificate,
    new_key,
    openssl,
    refused,
)
from tests.support.harness import ON_SQLITE, Api, Clock, state_of
from tests.support.pki import PEM, Authority

pytestmark = ON_SQLITE


def test_a_device_is_given_a_key_with_its_certificate(api: Api) -> None:
    own = new_key()
    answer = device(api, key_types=["ec-p384"], name_template="pump-{serial}").enrol(
        csr_der(own, "sn 9"), "serverkeygen"
    )
    key, certificate = key_and_certificate(answer)
    assert certificate.public_key() != own.public_key()
    assert b"384 bit" in openssl("pkey", "-inform", "DER", "-noout", "-text", data=key)
    shown = api.get(f"/devices/{certificate.subject.rfc4514_string()[3:]}").json
    assert (shown["name"], shown["status"]) == ("pump-sn-9", "active")


def test_no_copy_of_the_key_is_left_after_the_answer(
    api: Api, app: Flask, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    caplog.set_level(logging.DEBUG)
    key, certificate = key_and_certificate(device(api).enrol(None, "serverkeygen"))
    clock.advance(days=300)
    device_id = certificate.subject.rfc4514_string()[3:]
    one = Device(api, certificate=certificate.public_bytes(Encoding.DER))
    renewed, _ = key_and_certificate(one.enrol(csr_der(None, device_id), "serverkeygen"))
    portal = portal_of(app)
    kept = repr(state_of(portal)) + caplog.text + metrics.exposition([]).decode()
    kept += api.get("/audit?limit=200").text
    for secret in (key, renewed):
        number = openssl("pkey", "-inform", "DER", "-noout", "-text", data=secret).decode()
        digits = "".join(number.partition("priv:")[2].partition("pub:")[0].split()).replace(":", "")
        raw = bytes.fromhex(digits)[-32:]
        assert len(raw) == 32
        for form in (raw.hex(), repr(raw)[2:-1], repr(secret)[2:-1], in_base64(secret).decode()[52:74]):
            assert form not in kept
    assert api.get("/audit?action=device:enrol").json["entries"][0]["detail"]["key"] == "made here"


def test_a_key_is_generated_again_only_while_the_token_is_valid_and_before_a_renewal(api: Api, clock: Clock) -> None:
    one, request = device(api, expires_in_hours=1), csr_der()
    _, certificate = key_and_certificate(one.enrol(request, "serverkeygen"))
    device_id = certificate.subject.rfc4514_string()[3:]
    refused(one.enrol(request), 409)  # the certificate is for another key than that of the request
    clock.advance(hours=2)
    assert "expired" in refused(one.enrol(request, "serverkeygen"), 403)
    other = device(api, expires_in_hours=8760)
    _, certificate = key_and_certificate(other.enrol(request, "serverkeygen"))
    device_id = certificate.subject.rfc4514_string()[3:]
    assert api.post(f"/devices/{device_id}/renew", {}).status_code == 201
    refused(other.enrol(request, "serverkeygen"), 409)
    api.post(f"/revoke/{device_id}", {})
    refused(other.enrol(request, "serverkeygen"), 403)


def test_a_device_waits_for_an_operator_with_serverkeygen_too(api: Api) -> None:
    one, request = device(api, approval="operator"), csr_der()
    answer = one.enrol(request, "serverkeygen")
    assert (answer.status_code, int(answer.headers["Retry-After"]) > 0) == (202, True)
    [asking] = api.get("/enrolments").json["enrolments"]
    api.post(f"/devices/{asking['device_id']}/approve")
    _, certificate = key_and_certificate(one.enrol(request, "serverkeygen"))
    assert certificate.subject.rfc4514_string() == f"CN={asking['device_id']}"
    assert api.get("/enrolments").json["enrolments"] == []


def test_a_device_gets_a_key_with_its_factory_certificate(api: Api) -> None:
    maker = Authority("A maker's CA")
    record = api.post(
        "/manufacturers", {"name": "A maker", "certificate": maker.certificate.public_bytes(PEM).decode()}
    )
    proof = maker.issue(record.json["nonce"]).certificate.public_bytes(PEM).decode()
    api.post(f"/manufacturers/{record.json['manufacturer_id']}/proof", {"certificate": proof})
    one = Device(
        api, certificate=maker.issue("sn-1").certificate.public_bytes(Encoding.DER), path="/.well-known/est/default/"
    )
    key_and_certificate(one.enrol(None, "serverkeygen"))


def test_a_renewal_by_serverkeygen_keeps_window_names_and_key_type(api: Api, clock: Clock) -> None:
    [certificate] = certificates_of(device(api).enrol())
    device_id = certificate.subject.rfc4514_string()[3:]
    one = Device(api, certificate=certificate.public_bytes(Encoding.DER))
    request = csr_der(None, device_id)
    assert "too early" in refused(one.enrol(request, "serverkeygen"), 409)
    clock.advance(days=300)
    refused(one.enrol(csr_der(None, "another"), "serverkeygen"), 400)
    _, first = key_and_certificate(one.enrol(request, "serverkeygen"))
    _, second = key_and_certificate(one.enrol(request, "serverkeygen"))  # the first answer was lost
    assert len({item.public_bytes(PEM) for item in (certificate, first, second)}) == 3
    assert api.get(f"/devices/{device_id}/certificates").json["certificates"][-1]["revoked_at"] is None


def test_key_and_signature_of_the_request_are_ignored(api: Api) -> None:
    weak = openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024", data=b"")
    request = bytearray(_csr_by_openssl(weak))
    request[-1] ^= 1
    key_and_certificate(device(api).enrol(bytes(request), "serverkeygen"))


def _csr_by_openssl(key: bytes) -> bytes:
    return openssl("req", "-new", "-key", "/dev/stdin", "-subj", "/CN=sn-3", "-outform", "DER", data=key)


@pytest.mark.parametrize("oid", ["1.2.840.113549.1.9.16.2.37", "1.2.840.113549.1.9.16.2.54"])
def test_a_request_for_an_encrypted_key_is_refused(api: Api, oid: str) -> None:
    request = csr_der(attributes=[(oid, b"\x04\x08the-key1")])
    one = device(api)
    assert "DecryptKeyIdentifier" in refused(one.enrol(request, "serverkeygen"), 400)
    assert api.get("/enrolment-tokens").json["enrolment_tokens"][0]["uses"] == 0


@pytest.mark.parametrize(
    ("body", "status"), [(b"", 400), (b"!", 400), (b"MAMCAQE=", 400), (b"TUlJ" * 8000, 400), (b"TUlJ" * 20000, 413)]
)
def test_a_malformed_key_request_is_refused(api: Api, body: bytes, status: int) -> None:
    refused(device(api).call("POST", "serverkeygen", body), status)


def test_a_client_without_a_valid_token_gets_no_key(api: Api) -> None:
    answer = Device(api).enrol(None, "serverkeygen")
    refused(answer, 401)
    assert answer.headers["WWW-Authenticate"].startswith('Basic realm="')
    refused(Device(api, "en_wrong").enrol(None, "serverkeygen"), 401)
    refused(Device(api, certificate=Authority("Nobody's").issue("x").certificate.public_bytes(Encoding.DER)).enrol(
        None, "serverkeygen"
    ), 403)  # fmt: skip
    answer = device(api).call("POST", "serverkeygen", in_base64(csr_der()), content_type="application/json")
    refused(answer, 415)
