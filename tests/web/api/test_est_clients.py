"""EST with a client certificate: the factory certificate of a new device, or the portal's own for a renewal."""

from __future__ import annotations

import base64
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.roles import Role
from tests.support.est import Device, certificates_of, csr_der, in_base64, new_key, refused
from tests.support.exposition import samples_of, value_of
from tests.support.harness import ON_SQLITE, Api, Clock, api_as
from tests.support.pki import PEM, Authority, key_pem
from workflows.enrolment.clients import CLIENT_CAS

pytestmark = ON_SQLITE


def pem(authority: Authority) -> str:
    return authority.certificate.public_bytes(PEM).decode()


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def added(api: Api, maker: Authority, **fields: Any) -> dict[str, Any]:
    answer = api.post("/manufacturers", {"name": "A maker", "certificate": pem(maker)} | fields)
    assert answer.status_code == 201, answer.text
    record: dict[str, Any] = answer.json
    return record


def registered(api: Api, maker: Authority, **fields: Any) -> str:
    """Register a manufacturer; return its path."""
    record = added(api, maker, **fields)
    path = f"/manufacturers/{record['manufacturer_id']}"
    proof = maker.issue(record["nonce"]).certificate.public_bytes(PEM).decode()
    proven = api.post(f"{path}/proof", {"certificate": proof}).json
    assert (proven["status"], proven["nonce"], proven["nonce_expires_at"]) == ("registered", None, None)
    return path


def factory_device(api: Api, maker: Authority, serial: str = "sn-1") -> Device:
    return Device(api, certificate=der(maker.issue(serial).certificate))


def test_a_device_enrols_with_its_factory_certificate(api: Api, app: Flask) -> None:
    maker = Authority("A maker's CA")
    registered(api, maker, type="pump", name_template="pump {serial}")
    one, request = factory_device(api, maker), csr_der()
    [certificate] = certificates_of(one.enrol(request))
    shown = api.get(f"/devices/{certificate.subject.rfc4514_string()[3:]}").json
    assert (shown["name"], shown["type"], shown["status"]) == ("pump sn-1", "pump", "active")
    assert certificates_of(one.enrol(request)) == [certificate]
    file = (portal_of(app).settings.tls_dir / CLIENT_CAS).read_bytes()
    assert maker.certificate in x509.load_pem_x509_certificates(file)


def test_csrattrs_names_the_key_types_of_the_manufacturer(api: Api) -> None:
    maker = Authority("A maker's CA")
    registered(api, maker, key_types=["ed25519"])
    ed25519 = bytes.fromhex("06032b6570")
    assert ed25519 in base64.b64decode(factory_device(api, maker).call("GET", "csrattrs").data)
    assert ed25519 not in base64.b64decode(Device(api).call("GET", "csrattrs").data)


def test_a_device_of_a_manufacturer_waits_if_an_operator_has_to_approve_it(api: Api) -> None:
    maker = Authority("A maker's CA")
    registered(api, maker, approval="operator")
    one, request = factory_device(api, maker), csr_der()
    assert one.enrol(request).status_code == 202
    [pending] = api.get("/devices?status=pending").json["devices"]
    api.post(f"/devices/{pending['device_id']}/approve")
    certificates_of(one.enrol(request))


def test_openssl_s_signature_of_the_nonce_is_a_proof(api: Api, tmp_path: Path) -> None:
    maker = Authority("A maker's CA")
    record = added(api, maker)
    (tmp_path / "ca.key").write_bytes(key_pem(maker.key))
    command = ["openssl", "dgst", "-sha256", "-sign", str(tmp_path / "ca.key")]
    signed = subprocess.run(command, input=record["nonce"].encode(), check=True, capture_output=True).stdout
    path = f"/manufacturers/{record['manufacturer_id']}/proof"
    assert api.post(path, {"signature": base64.b64encode(signed).decode()}).json["status"] == "registered"


def test_devices_of_an_unproven_manufacturer_are_refused(api: Api, app: Flask) -> None:
    maker, other = Authority("A maker's CA"), Authority("Another CA")
    record = added(api, maker)
    path = f"/manufacturers/{record['manufacturer_id']}/proof"
    foreign = other.issue(record["nonce"]).certificate.public_bytes(PEM).decode()
    unnamed = maker.issue("sn-1").certificate.public_bytes(PEM).decode()
    for proof in ({"certificate": foreign}, {"certificate": unnamed}, {"signature": "AAAA"}, {"certificate": "x"}):
        answer = api.post(path, proof)
        assert (answer.status_code, answer.json["code"]) == (422, "proof_invalid")
    refused(factory_device(api, maker).enrol(), 403)
    file = portal_of(app).settings.tls_dir / CLIENT_CAS
    assert not file.exists() or maker.certificate not in x509.load_pem_x509_certificates(file.read_bytes())


def test_devices_of_a_removed_manufacturer_are_refused(api: Api, app: Flask) -> None:
    maker = Authority("A maker's CA")
    path = registered(api, maker)
    assert api.post("/manufacturers", {"name": "again", "certificate": pem(maker)}).status_code == 409
    certificates_of(factory_device(api, maker).enrol())
    assert api.delete(path).json["status"] == "removed"
    refused(factory_device(api, maker, "sn-2").enrol(), 403)
    file = (portal_of(app).settings.tls_dir / CLIENT_CAS).read_bytes()
    assert maker.certificate not in x509.load_pem_x509_certificates(file)


def test_a_name_that_the_manufacturer_s_ca_may_not_certify_is_refused_behind_a_proxy_too(api: Api) -> None:
    only = x509.NameConstraints(permitted_subtrees=[x509.DNSName("pumps.example")], excluded_subtrees=None)
    maker = Authority("A maker's CA", constraints=only)
    registered(api, maker)
    for name, allowed in (("sn-1", True), ("sn-2.pumps.example", True), ("sn-3.valves.example", False)):
        device = Device(api, certificate=der(maker.issue(name).certificate))
        answer = device.enrol()
        if allowed:
            certificates_of(answer)
        else:
            assert "name constraints" in refused(answer, 403)


@pytest.mark.parametrize("certificate", ["x", pem(Authority("A")) + pem(Authority("B"))])
def test_a_certificate_that_is_not_a_usable_ca_is_refused_as_a_manufacturer(api: Api, certificate: str) -> None:
    answer = api.post("/manufacturers", {"name": "A maker", "certificate": certificate})
    assert (answer.status_code, answer.json["code"]) == (422, "manufacturer_invalid")


def test_a_device_certificate_is_refused_as_a_manufacturer(api: Api) -> None:
    leaf = Authority("A maker's CA").issue("sn-1").certificate.public_bytes(PEM).decode()
    assert api.post("/manufacturers", {"name": "A maker", "certificate": leaf}).status_code == 422


# --- Renewal ------------------------------------------------------------------------------------------------------


def enrolled(api: Api, **terms: Any) -> tuple[str, Device]:
    """A device that has enrolled with a token, and its certificate."""
    secret = api.post("/enrolment-tokens", {"name": "a batch"} | terms).json["token"]
    [certificate] = certificates_of(Device(api, secret).enrol())
    return certificate.subject.rfc4514_string()[3:], Device(api, certificate=der(certificate))


def test_a_device_renews_with_its_present_certificate(api: Api, clock: Clock) -> None:
    device_id, one = enrolled(api)
    key = new_key()
    request = csr_der(key, device_id, names=[x509.UniformResourceIdentifier(f"urn:uuid:{device_id}")])
    opens = api.get(f"/devices/{device_id}").json["renewable_from"]
    in_words = f"{opens[:19].replace('T', ' ')} UTC"
    assert in_words in refused(one.enrol(request, "simplereenroll"), 409)
    assert api.get("/devices?expires_before=2100-01-01T00:00:00Z").json["devices"][0]["renewable_from"] == opens
    clock.advance(days=300)
    [renewed] = certificates_of(one.enrol(request, "simplereenroll"))
    assert renewed.public_key() == key.public_key()
    assert renewed.subject.rfc4514_string() == f"CN={device_id}"
    assert certificates_of(one.enrol(request, "simplereenroll")) == [renewed]  # a lost answer
    assert len(api.get(f"/devices/{device_id}/certificates").json["certificates"]) == 2


def test_a_renewal_under_another_name_is_refused(api: Api, clock: Clock) -> None:
    device_id, one = enrolled(api)
    clock.advance(days=300)
    other = [x509.UniformResourceIdentifier("urn:uuid:00000000-0000-4000-8000-000000000000")]
    change = [("1.3.6.1.5.5.7.7.36", b"\x30\x00")]
    for request in (
        csr_der(None, "other"),
        csr_der(None, device_id, names=other),
        csr_der(None, device_id, attributes=change),
    ):
        refused(one.enrol(request, "simplereenroll"), 400)


def test_a_renewal_is_limited_to_the_key_types_of_the_token(api: Api, clock: Clock) -> None:
    device_id, one = enrolled(api, key_types=["ec-p256"])
    clock.advance(days=300)
    other = ec.generate_private_key(ec.SECP384R1())
    assert "ec-p256" in refused(one.enrol(csr_der(other, device_id), "simplereenroll"), 400)
    certificates_of(one.enrol(csr_der(None, device_id), "simplereenroll"))


def test_a_client_without_a_certificate_of_the_portal_cannot_renew(api: Api) -> None:
    device_id, one = enrolled(api)
    answer = Device(api).enrol(csr_der(None, device_id), "simplereenroll")
    refused(answer, 401)
    assert answer.headers["WWW-Authenticate"].startswith("Basic")
    maker = Authority("A maker's CA")
    registered(api, maker)
    refused(factory_device(api, maker).enrol(csr_der(None, device_id), "simplereenroll"), 403)
    assert "simplereenroll" in refused(one.enrol(), 403)


@pytest.mark.parametrize("act", ["revoke", "suspend"])
def test_a_revoked_or_held_certificate_is_refused(api: Api, clock: Clock, act: str) -> None:
    device_id, one = enrolled(api)
    clock.advance(days=300)
    api.post(f"/revoke/{device_id}" if act == "revoke" else f"/devices/{device_id}/suspend", {})
    refused(one.enrol(csr_der(None, device_id), "simplereenroll"), 403)
    one.token = api.post("/enrolment-tokens", {"name": "a batch"}).json["token"]
    refused(one.enrol(), 403)  # a good token does not make up for it
    found = api.get("/audit?action=device:enrol&outcome=refused").json["entries"]
    assert [entry["object"] for entry in found] == ["client certificate"] * 2


def test_an_expired_certificate_is_refused(api: Api, clock: Clock) -> None:
    device_id, one = enrolled(api)
    clock.advance(days=400)
    assert "expired" in refused(one.enrol(csr_der(None, device_id), "simplereenroll"), 403)


# --- A proxy's header ---------------------------------------------------------------------------------------------


def in_header(certificate: bytes) -> dict[str, str]:
    return {"Client-Cert": f":{base64.b64encode(certificate).decode()}:"}


def test_a_forged_client_cert_header_is_ignored(api: Api) -> None:
    maker = Authority("A maker's CA")
    registered(api, maker)
    forged = in_header(der(maker.issue("sn-1").certificate))
    refused(Device(api).call("POST", "simpleenroll", in_base64(csr_der()), headers=forged), 401)


def test_the_client_cert_header_of_a_trusted_proxy_counts_and_its_own_certificate_does_not(
    make_settings: Callable[..., Settings],
) -> None:
    built = create_app(make_settings(PORTAL_TRUSTED_PROXIES="10.0.0.0/8, 127.0.0.1"), background=False)
    api, maker = api_as(built, Role.ADMIN), Authority("A maker's CA")
    registered(api, maker)
    body, good = in_base64(csr_der()), in_header(der(maker.issue("sn-1").certificate))
    certificates_of(Device(api).call("POST", "simpleenroll", body, headers=good))
    refused(factory_device(api, maker, "proxy").call("POST", "simpleenroll", body), 401)
    for header in (":!:", "x", f"{good['Client-Cert']}, {good['Client-Cert']}"):
        refused(Device(api).call("POST", "simpleenroll", body, headers={"Client-Cert": header}), 400)
    elsewhere = {"REMOTE_ADDR": "192.0.2.1"}
    answer = api.client.post(
        "/.well-known/est/simpleenroll", data=body, headers=good, content_type="application/pkcs10",
        environ_base=elsewhere,
    )  # fmt: skip
    refused(answer, 401)
    portal_of(built).close()


def test_nginx_s_header_counts_on_the_unix_socket_and_not_from_an_address(
    make_settings: Callable[..., Settings],
) -> None:
    built = create_app(make_settings(PORTAL_TRUSTED_PROXIES="127.0.0.1"), background=False)
    api, maker = api_as(built, Role.ADMIN), Authority("A maker's CA")
    registered(api, maker)
    certificate = maker.issue("sn-1").certificate
    escaped = {"X-SSL-Client-Cert": quote(certificate.public_bytes(PEM).decode())}
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:

        def enrol(headers: dict[str, str], **environ: object) -> Any:
            path = "/.well-known/est/simpleenroll"
            kind, body = "application/pkcs10", in_base64(csr_der())
            return api.client.post(path, data=body, headers=headers, content_type=kind, environ_overrides=environ)

        on_unix_socket = {"gunicorn.socket": left, "REMOTE_ADDR": "192.0.2.1"}
        refused(enrol(escaped), 401)  # a client could have sent it through the proxy
        refused(enrol(escaped, REMOTE_ADDR="192.0.2.1"), 401)
        refused(enrol({}, **on_unix_socket), 401)
        refused(enrol(escaped | in_header(der(certificate)), **on_unix_socket), 400)
        for damaged in ("x", quote("-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----\n"), "%00"):
            refused(enrol({"X-SSL-Client-Cert": damaged}, **on_unix_socket), 400)
        certificates_of(enrol(escaped, **on_unix_socket))
    portal_of(built).close()


# --- What counts as use -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["cacerts", "csrattrs"])
def test_using_a_new_certificate_revokes_the_previous_one_if_configured(
    make_settings: Callable[..., Settings], clock: Clock, operation: str
) -> None:
    built = create_app(make_settings(PORTAL_RENEWAL_REVOKE_PREVIOUS="when_used"), background=False, clock=clock)
    api = api_as(built, Role.ADMIN)
    device_id, older = enrolled(api)
    clock.advance(days=300)
    [certificate] = certificates_of(older.enrol(csr_der(None, device_id), "simplereenroll"))
    newer = Device(api, certificate=der(certificate))

    def states() -> list[str]:
        return [item["status"] for item in api.get(f"/devices/{device_id}/certificates").json["certificates"]]

    assert older.call("GET", operation).status_code == 200
    assert Device(api, certificate=b"0\x03\x02\x01\x01").call("GET", operation).status_code == 200
    assert states() == ["active", "replaced"]
    assert newer.call("GET", operation).status_code == 200
    assert states() == ["active", "revoked"]
    assert older.call("GET", operation).status_code == 200  # is for anyone; the certificate counts for nothing
    portal_of(built).close()


def test_renewals_are_counted_by_requester(api: Api, clock: Clock) -> None:
    device_id, one = enrolled(api)
    clock.advance(days=300)
    before = {by: counted(api, by) for by in ("operator", "device")}
    request = csr_der(None, device_id)
    for _ in range(2):
        certificates_of(one.enrol(request, "simplereenroll"))
    api.post(f"/devices/{device_id}/renew", {})
    assert {by: counted(api, by) - before[by] for by in before} == {"operator": 1, "device": 1}


def counted(api: Api, by: str) -> float:
    return value_of(samples_of(api.get("/metrics").text), "portal_renewals_total", by=by)
