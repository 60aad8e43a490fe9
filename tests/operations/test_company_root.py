"""An issuing CA below a company's root, beside the portal's own root and in its place; the broker does not run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from cryptography.x509.oid import AuthorityInformationAccessOID
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.errors import BrokerUnavailable, CaChainRefused, InputInvalid, ProfileInvalid, ProfileRefused, StateConflict
from operations import authority, jobs
from operations.backup.backup import back_up
from operations.backup.restore import restore
from operations.doctor import data, doctor
from operations.doctor.base import Finding, State
from operations.wiring import Portal, open_portal, prepare
from pki.algorithms import KeyType
from pki.csr import read_csr
from pki.profiles import CertificateProfile
from store import issuers as store_issuers
from tests.support.company import NOW, CompanyCa, certificate_of, company_root, pem
from tests.support.est import Device, certificates_of
from tests.support.harness import ON_SQLITE, Api, Clock, csr_pem, state_of
from tests.workflows.test_registration import OPERATOR, with_fields
from workflows.authority import issuers as authority_issuers
from workflows.authority import rollover
from workflows.authority.creation import open_authority
from workflows.renewal import RenewalRequest

pytestmark = [ON_SQLITE, pytest.mark.both_stores]

OWN, NEXT = "CN=Device Onboarding Issuing CA 1", "CN=Devices"
ROOT = company_root()
BETWEEN = ROOT.below("Company CA", ends=timedelta(days=1000))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority_issuers, "SECONDS_BETWEEN_LOOKS", 0.0)


def requested(portal: Portal, **options: Any) -> x509.CertificateSigningRequest:
    return x509.load_pem_x509_csr(authority.request_ca(portal, OPERATOR, **options).pem.encode())


def signed(request: x509.CertificateSigningRequest, **options: Any) -> bytes:
    """The chain by which the company answers a request, with a CA between the root and the portal's."""
    return pem(BETWEEN.sign(request.public_key(), "Devices", path_length=0, **options), BETWEEN, ROOT)


def install(portal: Portal, chain: bytes | None = None, *, later: bool = False) -> str:
    content = signed(requested(portal)) if chain is None else chain
    return authority.install_ca(portal, OPERATOR, content, lambda _: None, later=later)


def register(portal: Portal) -> Any:
    return portal.registrations.register(OPERATOR, with_fields(csr=csr_pem()))


def names(path_or_pem: Path | bytes) -> list[str]:
    content = path_or_pem.read_bytes() if isinstance(path_or_pem, Path) else path_or_pem
    return [one.subject.rfc4514_string() for one in x509.load_pem_x509_certificates(content)]


def signers_of_servers(portal: Portal) -> set[str]:
    files = portal.settings.tls_dir / "server.pem", portal.settings.broker_file("server.pem")
    return {x509.load_pem_x509_certificate(path.read_bytes()).issuer.rfc4514_string() for path in files}


def trust_files(portal: Portal) -> list[list[str]]:
    return [names(portal.settings.data_dir / "ca.pem"), names(portal.settings.broker_file("ca.pem"))]


ABOVE = ["CN=Company CA", "CN=Company Root"]


# --- The request ----------------------------------------------------------------------------------------------------


def test_a_request_asks_for_what_an_issuing_ca_needs_and_is_the_same_until_it_is_answered(portal: Portal) -> None:
    request = requested(portal)
    assert request.subject.rfc4514_string() == "CN=Device Onboarding Issuing CA 2"
    assert request.is_signature_valid
    constraints = request.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value) == (True, x509.BasicConstraints(ca=True, path_length=0))
    usage = request.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.crl_sign) == (True, True)
    assert requested(portal) == request
    with pytest.raises(StateConflict, match="--another"):
        requested(portal, subject="CN=Other")
    other = requested(portal, subject="CN=Plant 7\\, Devices,O=Example Ltd", key_type=KeyType.EC_P384, another=True)
    assert other.subject.rfc4514_string() == "CN=Plant 7\\, Devices,O=Example Ltd"
    assert requested(portal) == other, "the newest one is printed"
    assert install(portal, signed(request)) == "issuing-2", "the older one can still be answered"
    assert install(portal, pem(BETWEEN.sign(other.public_key(), "Devices 2"), BETWEEN, ROOT)) == "issuing-3"
    assert not [*portal.settings.ca_dir.glob("*.csr.pem")]


@pytest.mark.parametrize("subject", ["Devices", "O=Example", "CN=", "CN=" + "x" * 65, "CN=a,CN=b", "CN=a,=b"])
def test_a_bad_name_makes_no_key(portal: Portal, subject: str) -> None:
    before = state_of(portal)
    with pytest.raises(InputInvalid):
        requested(portal, subject=subject)
    assert state_of(portal) == before


# --- Beside the portal's own root -----------------------------------------------------------------------------------


def test_beside_the_own_root_every_device_trusts_what_portal_and_broker_show(app: Flask, api: Api) -> None:
    portal = portal_of(app)
    older = register(portal)
    assert install(portal) == "issuing-2"
    newer = register(portal)
    assert names(older.chain.encode())[1:] == [OWN]
    assert names(newer.chain.encode())[1:] == [NEXT, "CN=Company CA"], "a client of the root alone can verify it"
    assert trust_files(portal) == [[NEXT, OWN, *ABOVE, "CN=Device Onboarding Root CA"]] * 2
    assert signers_of_servers(portal) == {OWN}, "the older device knows no other root"
    assert portal.settings.broker_file("crl.pem").read_text().count("BEGIN X509 CRL") == 2, "none of the company's CAs"
    served = [one.subject.rfc4514_string() for one in certificates_of(Device(api).call("GET", "cacerts"))]
    assert sorted(served) == sorted(trust_files(portal)[0])
    assert api.get("/ca.pem").data == (portal.settings.data_dir / "ca.pem").read_bytes()
    portal.clients.write_authorities()
    assert names(portal.settings.tls_dir / "client-cas.pem") == [OWN, NEXT], "the company's other clients are none here"
    for device in (older, newer):
        portal.revocations.revoke(OPERATOR, device.device_id, "key_compromise")
    actions = [entry.action for entry in portal.operators.audit("default", limit=50, before=None, filters={})[0]]
    assert {"ca:request", "ca:create", "ca:issue"} <= {*actions}


def test_the_own_root_goes_when_no_device_needs_it(portal: Portal, clock: Clock) -> None:
    device = register(portal)
    install(portal)
    clock.advance(hours=2)
    authority.retire_unneeded(portal)
    assert signers_of_servers(portal) == {OWN}
    portal.renewals.renew(OPERATOR, device.device_id, RenewalRequest(csr=read_csr(csr_pem()), overlap_hours=1))
    clock.advance(hours=2)
    jobs.expire(portal)
    authority.retire_unneeded(portal)
    assert trust_files(portal) == [[NEXT, *ABOVE]] * 2
    assert signers_of_servers(portal) == {NEXT}
    assert portal.broker.files.damage() == []
    clock.advance(days=360)
    authority.renew_certificates(portal)
    authority.renew_crls(portal)
    assert [check.name for check in portal.readiness.checks() if check.problem] == ["broker"]
    with pytest.raises(StateConflict, match="below CN=Company Root, so that has to sign the next one"):
        authority.roll_over(portal, OPERATOR, lambda _: None)


def test_a_broker_that_shows_a_certificate_of_the_own_root_keeps_it(
    portal: Portal, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(portal, later=True)
    device = register(portal)
    authority.roll_over(portal, OPERATOR, lambda _: None)
    portal.revocations.revoke(OPERATOR, device.device_id, "superseded")
    authority.renew_certificates(portal)
    shown = x509.load_pem_x509_certificate(portal.settings.broker_file("server.pem").read_bytes())
    clock.advance(hours=2)
    authority.renew_certificates(portal)
    with monkeypatch.context() as patch:
        patch.setattr(type(portal.broker), "is_stopped", lambda _: False)
        with pytest.raises(BrokerUnavailable, match="does not answer"):
            authority.retire(portal, OPERATOR, "issuing-1")
        patch.setattr(type(portal.broker), "server_certificate", lambda *_: shown.public_bytes(Encoding.DER))
        with pytest.raises(StateConflict, match="restart it for its new one"):
            authority.retire(portal, OPERATOR, "issuing-1")
        authority.retire_unneeded(portal)  # of the jobs, which try again
    assert signers_of_servers(portal) == {NEXT}, "it is there for the restart"
    assert len(trust_files(portal)[0]) == 5
    authority.retire(portal, OPERATOR, "issuing-1")
    assert trust_files(portal) == [[NEXT, *ABOVE]] * 2


def test_a_ca_with_devices_keeps_the_servers_below_its_root(portal: Portal, clock: Clock) -> None:
    register(portal)
    authority.roll_over(portal, OPERATOR, lambda _: None)
    assert signers_of_servers(portal) == {"CN=Device Onboarding Issuing CA 2"}
    install(portal)
    clock.advance(hours=2)
    assert [one.issuer.name for one in portal.authority.with_crl()] == ["issuing-1", "issuing-3"], "it has no devices"
    assert signers_of_servers(portal) == {OWN}
    with pytest.raises(StateConflict, match="1 certificates of issuing-1 are still valid"):
        authority.retire(portal, OPERATOR, "issuing-1")


# --- In its place ---------------------------------------------------------------------------------------------------


@pytest.mark.both_stores(always=True)
def test_without_devices_the_companys_root_is_the_only_one_at_once(portal: Portal, clock: Clock) -> None:
    install(portal)
    assert trust_files(portal) == [[NEXT, *ABOVE]] * 2
    assert signers_of_servers(portal) == {NEXT}
    assert names(register(portal).chain.encode())[1:] == [NEXT, "CN=Company CA"]
    clock.advance(days=2)
    assert authority.roll_over(portal, OPERATOR, lambda _: None, own_root=True) == "issuing-3"
    assert trust_files(portal)[0] == ["CN=Device Onboarding Issuing CA 3", NEXT, *ABOVE, "CN=Device Onboarding Root CA"]
    assert signers_of_servers(portal) == {NEXT}


def test_while_a_portal_serves_the_own_root_stays_for_a_while(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority, "is_owned", lambda path: path == portal.settings.data_dir / ".serving.lock")
    install(portal)
    assert len(trust_files(portal)[0]) == 5
    assert signers_of_servers(portal) == {NEXT}, "no device knows the own root only"


def test_the_own_root_can_sign_a_request_far_from_the_portal(portal: Portal) -> None:
    key, root = portal.keys.load("root"), portal.authority.root.issuer.certificate
    request = requested(portal)
    issuing = certificate_of(request.public_key(), "Devices", root.subject, key, path_length=0)
    install(portal, pem(issuing, root))
    assert trust_files(portal) == [[NEXT, "CN=Device Onboarding Root CA"]] * 2
    assert names(register(portal).chain.encode())[1:] == [NEXT]


def test_nothing_lives_longer_than_the_cas_above(portal: Portal) -> None:
    short = ROOT.below("Company CA", ends=timedelta(days=100))
    install(portal, pem(short.sign(requested(portal).public_key(), "Devices"), short, ROOT))
    device = register(portal)
    assert x509.load_pem_x509_certificate(device.chain.encode()).not_valid_after_utc == NOW + timedelta(days=100)


# --- Cut off, repeated, refused ---------------------------------------------------------------------------------------

STEPS = ("apply_everywhere", "renew", "move_to", "renew_certificates")


@pytest.mark.parametrize("step", STEPS)
def test_an_installation_that_was_cut_off_is_continued(
    portal: Portal, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def cut_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    chain = signed(requested(portal))
    places = {
        "apply_everywhere": portal.reconciler,
        "renew": portal.responder.certificates,
        "move_to": rollover,
        "renew_certificates": authority,
    }
    with monkeypatch.context() as patch:
        patch.setattr(places[step], step, cut_off)
        with pytest.raises(KeyboardInterrupt):
            install(portal, chain)
    if step == "renew_certificates":
        with pytest.raises(StateConflict, match="has its certificate already"):
            install(portal, chain)
        authority.renew_certificates(portal)  # as the portal's job does
    else:
        assert portal.authority.first.issuing.issuer.name == "issuing-1"
        assert install(portal, chain) == "issuing-2"
    assert portal.authority.first.issuing.issuer.name == "issuing-2"
    assert signers_of_servers(portal) == {NEXT}


def test_a_restart_continues_with_what_was_installed(make_settings: Callable[..., Settings], clock: Clock) -> None:
    settings = make_settings()
    with contextlib.closing(open_portal(settings, clock)) as portal:
        older = register(portal)
        install(portal, later=True)
        assert names(register(portal).chain.encode())[1:] == [OWN], "it is to issue later"
    with contextlib.closing(open_portal(settings, clock)) as portal:
        prepare(portal)
        assert authority.roll_over(portal, OPERATOR, lambda _: None) == "issuing-2"
        assert trust_files(portal) == [[NEXT, OWN, *ABOVE, "CN=Device Onboarding Root CA"]] * 2
        assert portal.inventory.device("default", older.device_id).certificate is not None
    with contextlib.closing(open_portal(settings, clock)) as portal:
        assert portal.authority.first.issuing.issuer.above == (BETWEEN.certificate, ROOT.certificate)
        assert portal.authority.servers.issuer.name == "issuing-1"
        assert (
            open_authority(portal.database, portal.keys, settings, "default", now=clock()).first.ca_pem.count("BEGIN")
            == 5
        )


def constrained(*permitted: x509.GeneralName) -> CompanyCa:
    return ROOT.below("Constrained", further=[(x509.NameConstraints([*permitted], None), True)])


def test_what_the_name_constraints_of_a_company_do_not_permit_is_refused_and_named(app: Flask, api: Api) -> None:
    portal = portal_of(app)
    older = CertificateProfile("older", dns_names=("{name}.lab.example.com",))
    portal.profiles.add(OPERATOR, older)
    never = x509.NameConstraints(None, [x509.DNSName("lab.example.com"), x509.DNSName("pump-9.example.com")])
    above = ROOT.below("Constrained", further=[(never, True)])
    install(portal, pem(above.sign(requested(portal).public_key(), "Devices"), above, ROOT))
    said = "dns_names violates the name constraints of the CA CN=Constrained: of DNS names they exclude lab.example.com"
    [finding] = doctor.examine(portal.settings, portal.clock, checks=(("", data.certificate_profiles),))
    assert (finding.state, f"older: {said}" in finding.detail) == (State.PROBLEM, True)
    with pytest.raises(ProfileInvalid, match=said):
        portal.profiles.add(OPERATOR, dataclasses.replace(older, name="newer"))
    with pytest.raises(ProfileInvalid, match=said):
        portal.profiles.update(OPERATOR, "older", {"max_days": 9})
    portal.profiles.update(OPERATOR, "older", {"dns_names": ("{name}.example.com",)})
    [finding] = doctor.examine(portal.settings, portal.clock, checks=(("", data.certificate_profiles),))
    assert finding.state is State.OK
    device = {"profile": "older", "csr": csr_pem()}
    portal.registrations.register(OPERATOR, with_fields(**device, name="pump-8"))
    with pytest.raises(ProfileRefused, match="exclude pump-9"):
        portal.registrations.register(OPERATOR, with_fields(**device, name="pump-9"))
    row = b"name,type,location,firmware,profile\npump-9,pump,hall,1,older\npump-7,pump,hall,1,older\n"
    answer = api.call("POST", "/register/bulk?dry_run=true", data=row, content_type="text/csv")
    assert [json.loads(line).get("code") for line in answer.text.splitlines()] == ["profile_refused", None]


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        (lambda key: pem(ROOT.sign(csr_key(), "Devices"), ROOT), "No certificate in the file is for a key"),
        (lambda key: pem(ROOT.sign(key, "Devices", ends=timedelta(hours=-1)), ROOT), "expired at"),
        (lambda key: pem(ROOT.sign(key, "Device Onboarding Issuing CA 1"), ROOT), "issuing-1 or a CA above it has the"),
        (
            lambda key: pem((above := constrained(x509.DNSName("example.com"))).sign(key, "Devices"), above, ROOT),
            "Name constraints in the chain do not permit",
        ),
        (lambda key: b"", "cannot be read"),
    ],
)
def test_a_refused_chain_changes_nothing(portal: Portal, chain: Callable[[Any], bytes], said: str) -> None:
    content = chain(requested(portal).public_key())
    before = state_of(portal)
    with pytest.raises((CaChainRefused, StateConflict)) as refused:
        install(portal, content)
    assert said in refused.value.detail
    assert state_of(portal) == before
    assert install(portal) == "issuing-2", "the request waits for a better answer"


def csr_key() -> Any:
    return x509.load_pem_x509_csr(csr_pem().encode()).public_key()


def test_one_key_gets_no_second_certificate_and_one_ca_comes_after_the_other(portal: Portal) -> None:
    request = requested(portal)
    install(portal, signed(request), later=True)
    with pytest.raises(StateConflict, match="issuing-2 has its certificate already"):
        install(portal, signed(request))
    other = signed(requested(portal))
    with pytest.raises(StateConflict, match="issuing-2 is to issue next"):
        install(portal, other)


# --- Commands, backups ------------------------------------------------------------------------------------------------


def test_the_commands_speak_in_sentences(app: Flask, tmp_path: Path) -> None:
    with app.app_context():
        _use_the_commands(app, tmp_path)


def _use_the_commands(app: Flask, tmp_path: Path) -> None:
    runner = app.test_cli_runner()
    made = runner.invoke(args=["ca", "request", "--subject", "CN=Plant 7"])
    assert made.exit_code == 0
    request = x509.load_pem_x509_csr(made.stdout.encode())
    assert re.search("^issuing-2  requested .*issuing-2", runner.invoke(args=["ca", "list"]).output, re.MULTILINE)
    chain = tmp_path / "chain.pem"
    missing = runner.invoke(args=["ca", "install", str(chain)])
    assert (missing.exit_code, missing.output) == (1, f"Error: {chain} cannot be read: No such file or directory.\n")
    chain.write_bytes(b"\0" * (1 << 20))
    huge = runner.invoke(args=["ca", "install", str(chain)])
    assert (huge.exit_code, "longer than 65536 bytes" in huge.output) == (1, True)
    chain.write_bytes(signed(request))
    done = runner.invoke(args=["ca", "install", str(chain)])
    assert done.exit_code == 0, done.output
    assert "Devices get certificates of issuing-2." in done.output
    listed = runner.invoke(args=["ca", "list"]).output
    assert "retired root, key here" in listed
    assert re.search("^NAME +ROLE .* BELOW$", listed, re.MULTILINE)
    assert re.search("^issuing-2 .* CN=Company Root$", listed, re.MULTILINE)


def test_a_backup_has_the_companys_cas_and_the_requests_that_wait(
    make_settings: Callable[..., Settings], clock: Clock, tmp_path: Path
) -> None:
    settings, other = make_settings(), None
    with contextlib.closing(open_portal(settings, clock)) as portal:
        register(portal)
        install(portal)
        newer = register(portal)
        other = requested(portal)
    back_up(settings, tmp_path / "copy", now=clock())
    (settings.ca_dir / "issuing-3.csr.pem").unlink()
    restore(settings, tmp_path / "copy", replace=True, keep_links=False, now=clock())
    with contextlib.closing(open_portal(settings, clock)) as portal:
        prepare(portal)
        assert requested(portal) == other
        assert trust_files(portal) == [[NEXT, OWN, *ABOVE, "CN=Device Onboarding Root CA"]] * 2
        assert signers_of_servers(portal) == {OWN}
        assert portal.inventory.device("default", newer.device_id).certificate is not None
        assert names(register(portal).chain.encode())[1:] == [NEXT, "CN=Company CA"]
        clock.advance(days=2)
        assert install(portal, pem(ROOT.sign(other.public_key(), "Devices 2"), ROOT)) == "issuing-3"


@pytest.mark.long  # Java takes seconds to start
@pytest.mark.skipif(shutil.which("javac") is None, reason="needs a JDK, of which java runs a source file")
def test_java_validates_devices_by_pkix_up_to_the_companys_root(portal: Portal, tmp_path: Path) -> None:
    install(portal)
    good, gone = register(portal), register(portal)
    portal.revocations.revoke(OPERATOR, gone.device_id, "key_compromise")
    portal.reconciler.crls.sign_put_off()
    files = {"root.pem": pem(ROOT), "root.crl": crl_of(ROOT), "between.crl": crl_of(BETWEEN)}
    with portal.database.snapshot() as tx:
        newest = store_issuers.get_crl(tx, portal.authority.first.issuing.id)
    assert newest is not None
    files |= {"issuing.crl": newest.der, "good.pem": good.chain.encode(), "gone.pem": gone.chain.encode()}
    portal.responder.certificates.renew()
    for device in ("good", "gone"):
        certificate = x509.load_pem_x509_certificate(files[f"{device}.pem"])
        issuer = portal.authority.first.issuing.issuer.certificate
        by_sha1 = hashes.SHA1()  # noqa: S303 - Java looks for no other (RFC 5019 section 2.1.1)
        request = ocsp.OCSPRequestBuilder().add_certificate(certificate, issuer, by_sha1).build()
        answer = portal.responder.answer(request.public_bytes(Encoding.DER))
        files[f"{device}.ocsp"] = answer.der
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    source = Path(__file__).resolve().parents[1] / "support" / "Pkix.java"
    for device, said in (("good", "valid"), ("gone", "REVOKED")):
        for revocation in (["root.crl", "between.crl", "issuing.crl"], [f"{device}.ocsp"]):
            command = ["java", str(source), "root.pem", f"{device}.pem", *revocation]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.stdout.strip() == said, done.stderr


# --- What the doctor says ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def published(files: dict[str, bytes]) -> Iterator[str]:
    """The company's web server; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def crl_of(authority_: CompanyCa, *revoked: x509.Certificate, ends: timedelta = timedelta(days=30)) -> bytes:
    builder = x509.CertificateRevocationListBuilder(authority_.certificate.subject, NOW - timedelta(days=1), NOW + ends)
    for certificate in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder(certificate.serial_number, NOW - timedelta(hours=1)).build()
        )
    return builder.sign(authority_.key, hashes.SHA256()).public_bytes(Encoding.DER)


def pointers(url: str) -> list[tuple[x509.ExtensionType, bool]]:
    crl, cer = (x509.UniformResourceIdentifier(f"{url}/{name}") for name in ("root.crl", "root.cer"))
    point = x509.DistributionPoint([crl], None, None, None)
    access = x509.AccessDescription(AuthorityInformationAccessOID.CA_ISSUERS, cer)
    return [(x509.CRLDistributionPoints([point]), False), (x509.AuthorityInformationAccess([access]), False)]


def test_the_doctor_looks_at_what_the_company_publishes(make_settings: Callable[..., Settings], clock: Clock) -> None:
    app = create_app(make_settings(), background=False, clock=clock)
    portal = portal_of(app)
    prepare(portal)

    def finding(name: str = "CAs above") -> Finding:
        checks = tuple((known, check) for known, check in doctor.CHECKS if known == name)
        [found] = doctor.examine(portal.settings, portal.clock, checks=checks)
        return found

    assert finding().detail == "No CA is above those of the portal."
    files = {"/root.crl": crl_of(ROOT), "/root.cer": ROOT.certificate.public_bytes(Encoding.DER)}
    with published(files) as url:
        issuing = ROOT.sign(requested(portal).public_key(), "Devices", further=pointers(url))
        install(portal, pem(issuing, ROOT))
        for name in ("CAs above", "CA chain", "CA keys", "expiry"):
            assert finding(name).state is State.OK, finding(name)
        assert f"{url}/root.crl" in finding().detail
        bad = {
            "expired at": crl_of(ROOT, ends=timedelta(hours=-1)),
            "has revoked CN=Devices": crl_of(ROOT, issuing),
            "does not have a CRL that CN=Company Root has signed": crl_of(company_root()),
        }
        for said, content in bad.items():
            files["/root.crl"] = content
            assert (finding().state, said in finding().detail) == (State.PROBLEM, True)
        files |= {"/root.crl": crl_of(ROOT), "/root.cer": pem(company_root())}
        assert "does not have the certificate of CN=Company Root" in finding().detail
        files |= {"/root.cer": pem(ROOT)}
        assert finding().state is State.OK
        del files["/root.crl"]
        assert (finding().state, "status 404" in finding().detail) == (State.WARNING, True)
    assert finding().state is State.WARNING, "nobody answers"
    portal.close()
