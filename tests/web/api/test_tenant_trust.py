"""What each tenant's devices are given of CAs, at which URLs, and whose certificate counts under whose label."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.ocsp import OCSPCertStatus, OCSPResponseStatus
from cryptography.x509.oid import AuthorityInformationAccessOID
from flask import Flask

from app import portal_of
from core.errors import CaKeyUnavailable
from core.roles import Role
from pki.algorithms import PrivateKey
from tests.support.est import Device, certificates_of, csr_der, new_key, refused, token
from tests.support.harness import ON_SQLITE, Api, Clock, api_as, csr_pem, problem_of
from tests.support.ocsp import ask, failure_of, post, read, said_of
from tests.support.pki import Authority
from tests.web.api.test_est_clients import der, registered

pytestmark = ON_SQLITE

NAMES = ("acme", "globex")


@pytest.fixture
def anyone(app: Flask) -> Api:
    return api_as(app, None)


@pytest.fixture
def tenants(app: Flask) -> dict[str, Api]:
    """An admin of the first tenant and of each of two others, by the tenants' names."""
    return {name: api_as(app, Role.ADMIN, name) for name in ("default", *NAMES)}


def label(name: str) -> str:
    return f"/.well-known/est/{name}/"


def subjects(certificates: list[x509.Certificate]) -> set[str]:
    return {one.subject.rfc4514_string() for one in certificates}


ROOT, FIRST = "CN=Device Onboarding Root CA", "CN=Device Onboarding Issuing CA 1"
TRUSTED = {
    "default": {ROOT, FIRST},
    "acme": {ROOT, "CN=Device Onboarding acme Issuing CA 1"},
    "globex": {ROOT, "CN=Device Onboarding globex Issuing CA 1"},
}


# --- What is handed out ----------------------------------------------------------------------------------------------


def test_cacerts_under_a_label_has_the_chain_of_that_tenant_alone(tenants: dict[str, Api], anyone: Api) -> None:
    for name in tenants:
        assert subjects(certificates_of(Device(anyone, path=label(name)).call("GET", "cacerts"))) == TRUSTED[name]
    assert subjects(certificates_of(Device(anyone).call("GET", "cacerts"))) == TRUSTED["default"]
    refused(Device(anyone, path=label("nobody")).call("GET", "cacerts"), 404)


def test_cacerts_without_a_label_is_that_of_the_tenant_whose_certificate_is_shown(tenants: dict[str, Api]) -> None:
    certificate = enrolled(tenants["acme"])
    shown = Device(tenants["acme"], certificate=certificate.public_bytes(Encoding.DER))
    assert subjects(certificates_of(shown.call("GET", "cacerts"))) == TRUSTED["acme"]


@pytest.mark.parametrize("path", ["/ca.pem", "/broker-ca.pem"])
def test_an_operator_is_given_what_its_tenants_devices_trust_and_anyone_what_the_first_ones_do(
    tenants: dict[str, Api], anyone: Api, path: str
) -> None:
    for name, api in tenants.items():
        answer = api.get(path)
        assert subjects(x509.load_pem_x509_certificates(answer.data)) == TRUSTED[name]
        assert answer.headers["Vary"] == "Authorization"
    assert anyone.get(path).data == tenants["default"].get(path).data


# --- URLs ------------------------------------------------------------------------------------------------------------


def test_the_urls_in_certificates_do_not_name_the_tenant_and_lead_to_its_own_crl(
    tenants: dict[str, Api], anyone: Api, app: Flask
) -> None:
    certificate = enrolled(tenants["acme"])
    issuing = portal_of(app).authority.issuing_of("acme").issuer.certificate
    urls = urls_of(certificate)
    assert not any("acme" in url for url in urls.values())
    crl = x509.load_der_x509_crl(anyone.get(urlsplit(urls["crl"]).path).data)
    assert crl.issuer == issuing.subject
    assert x509.load_der_x509_certificate(anyone.get(urlsplit(urls["issuer"]).path).data) == issuing
    pem = anyone.get(urlsplit(urls["issuer"]).path.replace(".cer", ".pem"))
    assert subjects(x509.load_pem_x509_certificates(pem.data)) == TRUSTED["acme"]


@pytest.mark.parametrize("path", ["/crl/{}.crl", "/ca/{}.cer", "/ca/{}.pem"])
def test_nobody_finds_a_tenant_by_guessing_its_name_or_counting(
    tenants: dict[str, Api], anyone: Api, path: str
) -> None:
    assert tenants
    for guess in ("acme-issuing-1", "acme", "acme-root", "3", "4"):
        problem_of(anyone.get(path.format(guess)), 404, "not_found")


def test_a_crl_lists_certificates_of_its_own_tenant_alone(tenants: dict[str, Api], app: Flask) -> None:
    portal, serials = portal_of(app), {}
    for name, api in tenants.items():
        device = api.post("/register", {"name": "pump", "csr": csr_pem()} | FIELDS).json
        assert api.post(f"/revoke/{device['device_id']}", {"reason": "key_compromise"}).status_code == 200
        serials[name] = int(device["serial_number"], 16)
    for name in tenants:
        record = portal.inventory.crl(portal.authority.issuing_of(name).id)
        assert record is not None
        listed = {entry.serial_number for entry in x509.load_der_x509_crl(record.der)}
        assert {other for other, serial in serials.items() if serial in listed} == {name}


FIELDS = {"type": "pump", "location": "hall 1", "firmware": "1.0"}


def urls_of(certificate: x509.Certificate) -> dict[str, str]:
    points = certificate.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    access = certificate.extensions.get_extension_for_class(x509.AuthorityInformationAccess).value
    urls = {one.access_method: one.access_location.value for one in access}
    [name] = points[0].full_name or []
    return {
        "crl": name.value,
        "issuer": urls[AuthorityInformationAccessOID.CA_ISSUERS],
        "ocsp": urls[AuthorityInformationAccessOID.OCSP],
    }


# --- Labels and client certificates ----------------------------------------------------------------------------------


def enrolled(api: Api, path: str = "/.well-known/est/") -> x509.Certificate:
    """The certificate of a device that has enrolled by an enrolment token of the operator's tenant."""
    [certificate] = certificates_of(Device(api, token=token(api), path=path).enrol())
    return certificate


def test_a_csr_is_not_enrolled_at_the_label_of_another_tenant(tenants: dict[str, Api]) -> None:
    refused(Device(tenants["acme"], token=token(tenants["acme"]), path=label("globex")).enrol(), 401)
    assert tenants["globex"].get("/devices").json["devices"] == []
    assert tenants["acme"].get("/devices").json["devices"] == []


@pytest.mark.parametrize("operation", ["simplereenroll", "serverkeygen", "simpleenroll"])
def test_a_certificate_of_one_tenant_counts_for_nothing_at_the_label_of_another(
    tenants: dict[str, Api], operation: str, clock: Clock
) -> None:
    key = new_key()
    device = Device(tenants["acme"], token=token(tenants["acme"]))
    [certificate] = certificates_of(device.enrol(csr_der(key)))
    for name in ("globex", "default"):
        foreign = Device(tenants["acme"], certificate=certificate.public_bytes(Encoding.DER), path=label(name))
        assert "label" in refused(foreign.enrol(csr_der(key), operation), 403)
    own = Device(tenants["acme"], certificate=certificate.public_bytes(Encoding.DER), path=label("acme"))
    if operation == "simplereenroll":
        clock.advance(days=300)  # before that it is too early
        renewed = certificates_of(own.enrol(csr_der(new_key(), certificate_name(certificate)), operation))
        assert renewed[0].issuer == certificate.issuer


def certificate_name(certificate: x509.Certificate) -> str:
    return str(certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value)


def test_the_label_says_which_of_two_tenants_that_have_registered_a_maker_is_meant(tenants: dict[str, Api]) -> None:
    maker = Authority("A maker's CA")
    for name in NAMES:
        registered(tenants[name], maker)
    for number, name in enumerate(NAMES):
        unit = der(maker.issue(f"sn-{number}").certificate)
        [certificate] = certificates_of(Device(tenants[name], certificate=unit, path=label(name)).enrol())
        assert certificate.issuer.rfc4514_string() == f"CN=Device Onboarding {name} Issuing CA 1"
        assert len(tenants[name].get("/devices").json["devices"]) == 1
    unit = der(maker.issue("sn-9").certificate)
    assert "several tenants" in refused(Device(tenants["acme"], certificate=unit).enrol(), 403)
    refused(Device(tenants["acme"], certificate=unit, path=label("default")).enrol(), 403)


# --- OCSP ------------------------------------------------------------------------------------------------------------


def test_a_tenants_ca_is_answered_for_once_somebody_asks_and_not_before(tenants: dict[str, Api], app: Flask) -> None:
    portal, anyone = portal_of(app), api_as(app, None)
    folder = portal.settings.ocsp_dir
    portal.responder.certificates.renew()
    assert sorted(path.stem for path in folder.glob("*.pem")) == ["issuing-1", "root"]
    device = tenants["acme"].post("/register", {"name": "pump", "csr": csr_pem()} | FIELDS).json
    issuer = portal.authority.issuing_of("acme").issuer.certificate
    question = ask(issuer, int(device["serial_number"], 16))
    answer = read(post(anyone, question.der()))
    assert answer.certificate_status is OCSPCertStatus.GOOD
    answer.certificates[0].verify_directly_issued_by(issuer)
    assert sorted(path.stem for path in folder.glob("*.pem")) == ["acme-issuing-1", "issuing-1", "root"]
    before = (folder / "acme-issuing-1.pem").read_bytes()
    assert said_of(anyone, question) == ["good"]
    assert (folder / "acme-issuing-1.pem").read_bytes() == before
    tenants["acme"].post(f"/revoke/{device['device_id']}", {"reason": "key_compromise"})
    assert said_of(anyone, question) == ["revoked"]


def test_the_responder_of_a_tenant_is_renewed_when_it_is_asked_late(
    tenants: dict[str, Api], app: Flask, clock: Clock
) -> None:
    portal, anyone = portal_of(app), api_as(app, None)
    question = ask(portal.authority.issuing_of("acme").issuer.certificate, 7)
    path = portal.settings.ocsp_dir / "acme-issuing-1.pem"
    assert said_of(anyone, question) == ["unknown"]
    seen = {path.read_bytes()}
    for days in (9, 1, 30):  # of 14: not due, past two thirds, long expired
        clock.advance(days=days)
        assert said_of(anyone, question) == ["unknown"]
        seen.add(path.read_bytes())
    assert len(seen) == 3


def test_a_ca_of_one_tenant_knows_no_certificate_of_another(tenants: dict[str, Api], app: Flask) -> None:
    device = tenants["globex"].post("/register", {"name": "pump", "csr": csr_pem()} | FIELDS).json
    issuer = portal_of(app).authority.issuing_of("acme").issuer.certificate
    assert said_of(api_as(app, None), ask(issuer, int(device["serial_number"], 16))) == ["unknown"]


def test_a_tenants_ca_whose_key_is_lost_is_not_tried_at_each_request(
    tenants: dict[str, Api], app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tenants
    portal, anyone = portal_of(app), api_as(app, None)
    tried: list[str] = []

    def lost(name: str) -> PrivateKey:
        tried.append(name)
        raise CaKeyUnavailable("It is lost.")

    monkeypatch.setattr(portal.keys, "load", lost)
    question = ask(portal.authority.issuing_of("acme").issuer.certificate, 7)
    for _ in range(3):
        assert failure_of(post(anyone, question.der())) is OCSPResponseStatus.TRY_LATER
    assert tried == ["acme-issuing-1"]
    assert said_of(anyone, ask(portal.authority.first.issuing.issuer.certificate, 7)) == ["unknown"]
