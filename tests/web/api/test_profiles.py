"""Certificate profiles over HTTP: add, change and remove them, and issue certificates under them, whichever way in."""

from __future__ import annotations

import base64
import io
import json
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_der_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.roles import Role
from pki.issuers import CLOCK_SKEW
from tests.support.est import Device, certificates_of, csr_der, device, key_and_certificate, refused
from tests.support.harness import ON_SQLITE, Api, Clock, api_as, csr_pem, problem_of
from tests.support.pki import PEM, Authority, key_pem
from tests.support.ports import free_port

PUMP = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}
SERVER = {
    "name": "tls-server",
    "extended_key_usage": ["client_auth", "server_auth"],
    "dns_names": ["{name}.devices.example.com"],
    "organization": "ACME",
    "serial_number": "{external_id}",
    "key_types": ["ec-p256", "ec-p384"],
    "max_days": 90,
}
NAMED = {"name": "named", "dns_names": ["{name}.devices.example.com"]}
OF_SERIAL = {"name": "of-serial", "dns_names": ["{serial}.devices.example.com"], "serial_number": "{serial}"}


def add(api: Api, *profiles: dict[str, Any]) -> None:
    for profile in profiles:
        answer = api.post("/profiles", profile)
        assert answer.status_code == 201, answer.text


def certificate_of(api: Api, device_id: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(api.get(f"/devices/{device_id}").json["certificate"]["certificate"].encode())


def names_in(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.DNSName)


def subject_of(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string()


def device_id_of(certificate: x509.Certificate) -> str:
    [name] = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(name.value)


def refusal(answer: Any, *said: str, status: int = 422, code: str = "profile_refused") -> None:
    detail = problem_of(answer, status, code)["detail"]
    assert all(part in detail for part in said), detail


def last_entry(api: Api) -> dict[str, Any]:
    entry: dict[str, Any] = api.get("/audit?limit=1").json["entries"][0]
    return entry


# --- The profiles -------------------------------------------------------------------------------------------------


def test_a_profile_is_added_listed_changed_and_removed(api: Api) -> None:
    answer = api.post("/profiles", SERVER)
    assert (answer.status_code, answer.headers["Location"]) == (201, "/profiles/tls-server")
    assert answer.json == answer.json | SERVER | {"built_in": False, "default_days": None, "ip_addresses": []}
    assert last_entry(api)["action"] == "profile:add"
    assert last_entry(api)["detail"]["dns_names"] == SERVER["dns_names"]
    changed = api.patch("/profiles/tls-server", {"max_days": 30, "organization": None}).json
    assert changed == api.get("/profiles/tls-server").json
    assert (changed["max_days"], changed["organization"], changed["dns_names"]) == (30, None, SERVER["dns_names"])
    assert last_entry(api)["detail"] == {"max_days": 30, "organization": None}
    add(api, NAMED)
    assert [item["name"] for item in api.get("/profiles").json["profiles"]] == ["default", "named", "tls-server"]
    assert api.delete("/profiles/tls-server").status_code == 200
    assert (last_entry(api)["action"], last_entry(api)["object"]) == ("profile:remove", "profile:tls-server")
    problem_of(api.get("/profiles/tls-server"), 404, "not_found")
    add(api, SERVER)  # its name is free again


def test_the_default_profile_is_built_in(api: Api) -> None:
    default = api.get("/profiles/default").json
    assert default["built_in"] is True
    assert (default["extended_key_usage"], default["dns_names"], default["max_days"]) == (["client_auth"], [], None)
    for answer in (
        api.post("/profiles", {"name": "default"}),
        api.patch("/profiles/default", {"max_days": 9}),
        api.delete("/profiles/default"),
    ):
        problem_of(answer, 409, "profile_in_use")


def test_a_name_is_taken_once_and_rules_that_contradict_are_refused(api: Api) -> None:
    add(api, NAMED)
    problem_of(api.post("/profiles", NAMED), 409, "profile_in_use")
    bad = {"name": "bad", "dns_names": ["*.{name}.example.com"]}
    assert problem_of(api.post("/profiles", bad), 422, "profile_invalid")["errors"][0]["field"] == "dns_names"
    refused_change = api.patch("/profiles/named", {"extended_key_usage": ["server_auth"]})
    problem_of(refused_change, 422, "profile_invalid")
    problem_of(api.post("/profiles", {"name": "Bad Name"}), 422, "invalid_input")
    problem_of(api.patch("/profiles/named", {}), 422, "invalid_input")
    problem_of(api.patch("/profiles/unknown", {"max_days": 9}), 404, "not_found")
    problem_of(api.delete("/profiles/unknown"), 404, "not_found")
    assert api.get("/profiles/named").json["extended_key_usage"] == ["client_auth"]


# --- Registration -------------------------------------------------------------------------------------------------


def test_a_device_is_registered_under_a_profile(api: Api) -> None:
    add(api, SERVER)
    registered = api.register(name="Pump-1", external_id="line-4/000217", profile="tls-server")
    certificate, device_id = certificate_of(api, registered["device_id"]), registered["device_id"]
    assert names_in(certificate) == ["pump-1.devices.example.com"]
    assert subject_of(certificate) == f"CN={device_id},2.5.4.5=line-4/000217,O=ACME"
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert life <= timedelta(days=90) + CLOCK_SKEW
    entry = last_entry(api)
    assert (entry["action"], entry["detail"]["profile"]) == ("device:register", "tls-server")
    assert entry["detail"]["names"] == ["pump-1.devices.example.com"]
    assert api.get(f"/devices/{device_id}").json["profile"] == "tls-server"
    assert api.get("/devices").json["devices"][0]["profile"] == "tls-server"


def test_a_certificate_without_a_profile_is_as_before(api: Api) -> None:
    add(api, SERVER)
    for fields in ({}, {"profile": "default"}, {"profile": None}):
        device_id = api.register(**fields)["device_id"]
        certificate = certificate_of(api, device_id)
        assert api.get(f"/devices/{device_id}").json["profile"] == "default"
        assert subject_of(certificate) == f"CN={device_id}"
        assert names_in(certificate) == []
        oids = [item.oid.dotted_string for item in certificate.extensions]
        assert oids == ["2.5.29.19", "2.5.29.15", "2.5.29.37", "2.5.29.17", "2.5.29.14", "2.5.29.35", "2.5.29.31",
                        "1.3.6.1.5.5.7.1.1"]  # fmt: skip
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usages) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_default_and_no_profile_are_one_request_to_an_idempotency_key(api: Api) -> None:
    key = {"Idempotency-Key": "a-key-of-16-chars"}
    first = api.post("/register", PUMP, headers=key).json
    assert api.post("/register", PUMP | {"profile": "default"}, headers=key).json == first
    add(api, NAMED)
    problem_of(api.post("/register", PUMP | {"profile": "named"}, headers=key), 409, "idempotency_conflict")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"profile": "unknown"}, "no certificate profile unknown"),
        ({"validity_days": 91}, "tls-server allows certificates of at most 90 days"),
        ({"key_type": "ed25519"}, "tls-server allows keys of ec-p256, ec-p384, not ed25519"),
        ({"external_id": None}, "tls-server needs the device's external_id"),
        ({"name": "pump 1"}, "tls-server needs the device's name for {name}.devices.example.com, and 'pump 1' has"),
    ],
)
def test_what_a_profile_does_not_allow_is_refused_by_its_name(api: Api, fields: dict[str, Any], said: str) -> None:
    add(api, SERVER)
    refusal(api.post("/register", PUMP | {"profile": "tls-server", "external_id": "x"} | fields), said)
    assert api.get("/devices").json["devices"] == []


def test_a_csr_for_a_kind_of_key_that_the_profile_does_not_allow_is_refused(api: Api) -> None:
    add(api, SERVER | {"key_types": ["ec-p384"], "serial_number": None})
    wanted = PUMP | {"profile": "tls-server"}
    refusal(api.post("/register", wanted | {"csr": csr_pem()}), "tls-server allows keys of ec-p384, not ec-p256")
    assert api.post("/register", wanted | {"csr": csr_pem(ec.generate_private_key(ec.SECP384R1()))}).status_code == 201
    assert api.post("/register", wanted | {"name": "pump-2"}).status_code == 201  # the portal makes one that fits


@pytest.mark.parametrize("own", ["localhost", "portal.example.com", "mqtt.example.com", "pki.example.com"])
def test_no_device_gets_a_name_of_the_portal_or_the_broker(make_settings: Callable[..., Settings], own: str) -> None:
    hosts = {"PORTAL_PUBLIC_URL": "https://portal.example.com", "PORTAL_PKI_URL": "http://pki.example.com"}
    app = create_app(make_settings(**hosts, PORTAL_MQTT_HOST="MQTT.example.com"), background=False)
    api = api_as(app, Role.ADMIN)
    name, _, domain = own.partition(".")
    if not domain:
        problem_of(api.post("/profiles", NAMED | {"dns_names": ["{name}"]}), 422, "profile_invalid")
    add(api, NAMED | {"dns_names": [f"{{name}}.{domain or 'localhost'}"]})
    refusal(api.post("/register", PUMP | {"name": name.upper(), "profile": "named"}), "of the portal or the broker")
    portal_of(app).close()


@ON_SQLITE
def test_a_device_is_a_tls_server_that_openssl_and_curl_know_by_its_name(api: Api, tmp_path: Path) -> None:
    add(api, SERVER | {"serial_number": None})
    key, host = ec.generate_private_key(ec.SECP256R1()), "pump-1.devices.example.com"
    registered = api.post("/register", PUMP | {"profile": "tls-server", "csr": csr_pem(key)}).json
    *_, root = x509.load_pem_x509_certificates(api.get("/ca.pem").data)
    files = {"device.pem": registered["certificate"].encode(), "chain.pem": registered["chain"].encode()}
    for name, content in {**files, "device.key": key_pem(key), "root.pem": root.public_bytes(PEM)}.items():
        (tmp_path / name).write_bytes(content)
    port = free_port()
    own = ["-cert", "device.pem", "-cert_chain", "chain.pem", "-key", "device.key", "-www"]
    serve = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", *own]
    by_openssl = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-CAfile", "root.pem", "-verify_return_error"]
    by_curl = ["curl", "-sSf", "--noproxy", "*", "--cacert", "root.pem"]

    def trusts(*command: str) -> bool:
        done = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        return done.returncode == 0

    with subprocess.Popen(serve, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert "ACCEPT\n" in server.stdout
            for name in (host, "pump-2.devices.example.com", "localhost"):
                is_own = name == host
                assert trusts(*by_openssl, "-x509_strict", "-verify_hostname", name) is is_own
                to = ["--resolve", f"{name}:{port}:127.0.0.1", f"https://{name}:{port}/"]
                assert trusts(*by_curl, *to) is is_own
        finally:
            server.kill()


# --- Renewal ------------------------------------------------------------------------------------------------------


def test_a_renewal_is_under_the_profile_as_it_is_then(api: Api) -> None:
    add(api, SERVER)
    device_id = api.register(external_id="a", profile="tls-server", validity_days=90)["device_id"]
    api.patch("/profiles/tls-server", {"max_days": 30, "dns_names": ["{name}.example.com"], "key_types": ["ec-p384"]})
    assert names_in(certificate_of(api, device_id)) == ["pump-1.devices.example.com"]
    refusal(api.post(f"/devices/{device_id}/renew", {"validity_days": 31}), "tls-server", "at most 30 days")
    refusal(api.post(f"/devices/{device_id}/renew", {"csr": csr_pem()}), "tls-server", "ec-p384")
    assert api.post(f"/devices/{device_id}/renew", {}).status_code == 201
    renewed = certificate_of(api, device_id)
    assert names_in(renewed) == ["pump-1.example.com"]
    assert isinstance(renewed.public_key().curve, ec.SECP384R1)  # type: ignore[union-attr]
    assert last_entry(api)["detail"]["profile"] == "tls-server"


def test_a_device_changes_its_profile_with_its_next_certificate(api: Api) -> None:
    add(api, NAMED)
    device_id = api.register()["device_id"]
    assert api.patch(f"/devices/{device_id}", {"profile": "named"}).json["profile"] == "named"
    assert last_entry(api)["detail"] == {"changed": ["profile"], "profile": "named"}
    assert names_in(certificate_of(api, device_id)) == []
    api.post(f"/devices/{device_id}/renew", {})
    assert names_in(certificate_of(api, device_id)) == ["pump-1.devices.example.com"]
    assert api.patch(f"/devices/{device_id}", {"profile": "default"}).json["profile"] == "default"
    refusal(api.patch(f"/devices/{device_id}", {"profile": "unknown"}), "no certificate profile unknown")


# --- Bulk ---------------------------------------------------------------------------------------------------------


def upload(api: Api, rows: list[dict[str, Any]], query: str = "") -> list[dict[str, Any]]:
    body = "\n".join(json.dumps(PUMP | row) for row in rows).encode()
    answer = api.call("POST", f"/register/bulk{query}", data=body, content_type="application/x-ndjson")
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def test_the_rows_of_an_upload_have_profiles(api: Api) -> None:
    add(api, NAMED, SERVER)
    taken = api.register(name="pump-1", profile="named")["device_id"]
    rows: list[dict[str, Any]] = [
        {"name": "pump-2", "profile": "named", "external_id": "b"},
        {"name": "pump-3"},
        {"name": "pump-1", "profile": "named"},
        {"name": "pump-2", "profile": "named"},
        {"name": "pump 4", "profile": "named"},
        {"name": "pump-5", "profile": "tls-server", "external_id": "e", "validity_days": 99},
        {"name": "pump-6", "profile": "unknown"},
        {"name": "pump-7", "profile": "tls-server", "external_id": "g"},
    ]
    codes = [None, None, "name_in_use", "name_in_use", *["profile_refused"] * 3, None]
    assert [answer.get("code") for answer in upload(api, rows, "?dry_run=true")] == codes
    answers = upload(api, rows)
    assert [answer.get("code") for answer in answers] == codes
    assert taken in answers[2]["detail"]
    assert "tls-server" in answers[5]["detail"]
    assert names_in(certificate_of(api, answers[0]["device_id"])) == ["pump-2.devices.example.com"]
    assert names_in(certificate_of(api, answers[1]["device_id"])) == []
    assert "O=ACME" in subject_of(certificate_of(api, answers[7]["device_id"]))
    [repeated] = upload(api, rows[:1])
    assert (repeated["repeated"], repeated["device_id"]) == (True, answers[0]["device_id"])
    assert names_in(certificate_of(api, repeated["device_id"])) == ["pump-2.devices.example.com"]
    [other] = upload(api, [rows[0] | {"profile": "tls-server"}])
    assert (other["code"], "profile" in other["detail"]) == ("external_id_taken", True)


def test_a_csv_has_a_column_for_the_profile(api: Api) -> None:
    add(api, NAMED)
    body = b"name,type,location,firmware,profile\npump-1,pump,hall,1,named\npump-2,pump,hall,1,\n"
    answer = api.call("POST", "/register/bulk", data=io.BytesIO(body), content_type="text/csv")
    ids = [json.loads(line)["device_id"] for line in answer.text.splitlines()]
    assert [api.get(f"/devices/{device_id}").json["profile"] for device_id in ids] == ["named", "default"]


# --- Enrolment ----------------------------------------------------------------------------------------------------


def enrolled(one: Device, subject: str, **options: Any) -> x509.Certificate:
    [certificate] = certificates_of(one.enrol(csr_der(None, subject), **options))
    return certificate


def test_a_device_enrols_by_a_token_with_a_profile_and_renews_under_it(api: Api, app: Flask, clock: Clock) -> None:
    add(api, OF_SERIAL)
    one = device(api, profile="of-serial", count=2)
    certificate = enrolled(one, "SN-42")
    device_id = device_id_of(certificate)
    assert names_in(certificate) == ["sn-42.devices.example.com"]
    assert subject_of(certificate) == f"CN={device_id},2.5.4.5=SN-42"
    assert api.get(f"/devices/{device_id}").json["profile"] == "of-serial"
    clock.advance(days=300)
    api.patch("/profiles/of-serial", {"organization": "ACME"})
    der = certificate.public_bytes(Encoding.DER)
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(certificate.subject)
        .sign(key := ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    )
    [renewed] = certificates_of(
        Device(api, certificate=der).enrol(request.public_bytes(Encoding.DER), operation="simplereenroll")
    )
    assert renewed.public_key() == key.public_key()
    assert subject_of(renewed) == f"CN={device_id},2.5.4.5=SN-42,O=ACME"
    assert names_in(renewed) == ["sn-42.devices.example.com"]


def test_a_stranger_with_a_token_gets_neither_another_devices_name_nor_its_id(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    add(api, OF_SERIAL)
    one = device(api, profile="of-serial", count=9, repeated_serial="new_device")
    first = device_id_of(enrolled(one, "SN-42"))
    said = refused(one.enrol(csr_der(None, "sn-42")), 409)
    assert "is another device's" in said
    assert first not in said
    [record] = [record for record in caplog.records if record.getMessage() == "refused"]
    assert f"device {first}" in record.problem  # type: ignore[attr-defined]
    assert "has none" in refused(one.enrol(csr_der(None, "")), 400)
    assert "other characters" in refused(one.enrol(csr_der(None, "*.devices.example.com")), 400)
    assert "other characters" in refused(one.enrol(csr_der(None, "a\x00b")), 400)
    assert len(api.get("/devices").json["devices"]) == 1


def test_a_device_enrols_by_a_manufacturer_with_a_profile(api: Api) -> None:
    add(api, OF_SERIAL, SERVER)
    maker = Authority("A maker's CA")
    certificate = maker.certificate.public_bytes(PEM).decode()
    record = api.post("/manufacturers", {"name": "acme", "certificate": certificate, "profile": "of-serial"}).json
    path = f"/manufacturers/{record['manufacturer_id']}"
    proof = maker.issue(record["nonce"]).certificate.public_bytes(PEM).decode()
    assert api.post(f"{path}/proof", {"certificate": proof}).json["profile"] == "of-serial"
    factory = Device(api, certificate=maker.issue("SN-7").certificate.public_bytes(Encoding.DER))
    enrolled_certificate = enrolled(factory, "whatever")
    assert names_in(enrolled_certificate) == ["sn-7.devices.example.com"]
    problem_of(api.delete("/profiles/of-serial"), 409, "profile_in_use")
    changed = api.patch(path, {"profile": "default"})
    assert changed.json["profile"] == "default"
    refusal(api.patch(path, {"profile": "unknown"}), "no certificate profile unknown")
    refusal(api.patch(path, {"profile": "tls-server", "key_types": ["ed25519"]}), "tls-server", "ec-p256, ec-p384")


def test_the_kinds_of_key_of_the_profile_count_at_an_enrolment(api: Api) -> None:
    add(api, SERVER | {"serial_number": None, "key_types": ["ec-p384"], "name": "p384"})
    one = device(api, profile="p384", key_types=["ec-p256", "ec-p384"])
    p384 = bytes.fromhex("06052b81040022")
    assert p384 in base64.b64decode(one.call("GET", "csrattrs").data)
    assert "p384 allows keys of ec-p384" in refused(one.enrol(), 400)
    key, certificate = key_and_certificate(one.enrol(csr_der(None, "sn-1"), "serverkeygen"))
    assert isinstance(load_der_private_key(key, None).curve, ec.SECP384R1)  # type: ignore[union-attr]
    assert names_in(certificate) == ["sn-1.devices.example.com"]


def test_an_expected_device_has_its_own_profile(api: Api) -> None:
    add(api, NAMED)
    device_id = api.post("/devices", PUMP | {"profile": "named"}).json["device_id"]
    both = {"name": "one", "device_id": device_id, "profile": "named"}
    problem_of(api.post("/enrolment-tokens", both), 422, "invalid_input")
    certificate = enrolled(device(api, device_id=device_id), "anything")
    assert names_in(certificate) == ["pump-1.devices.example.com"]


def test_a_device_that_waits_for_an_operator_is_checked_before_it_waits(api: Api) -> None:
    add(api, OF_SERIAL)
    one = device(api, profile="of-serial", approval="operator", count=2)
    assert "has none" in refused(one.enrol(csr_der(None, "")), 400)
    request = csr_der(None, "sn-1")
    assert one.enrol(request).status_code == 202
    [waiting] = api.get("/enrolments").json["enrolments"]
    assert api.post(f"/devices/{waiting['device_id']}/approve").status_code == 200
    [certificate] = certificates_of(one.enrol(request))
    assert names_in(certificate) == ["sn-1.devices.example.com"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"profile": "unknown"}, "no certificate profile unknown"),
        ({"profile": "tls-server", "validity_days": 91}, "at most 90 days"),
        ({"profile": "tls-server", "key_types": ["rsa-4096"]}, "allows none of these key_types"),
        ({"profile": "tls-server", "name_template": "pump-{number}"}, "{number}"),
    ],
)
def test_a_token_by_which_nobody_could_enrol_is_refused(api: Api, fields: dict[str, Any], said: str) -> None:
    add(api, SERVER)
    refusal(api.post("/enrolment-tokens", {"name": "a batch"} | fields), said)
