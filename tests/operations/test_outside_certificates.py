"""Server certificates of other issuers for HTTPS and the broker: taken if clients can verify them, and when renewed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import pyzipper
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from commands.bundle import DeviceBundle, check_bundle, open_bundle
from config import Settings
from core.errors import ProfileRefused, ServerCertificateRefused, SettingInvalid
from core.files import replace_file
from operations import jobs
from operations.authority import take_outside_certificates
from operations.commands import _operator_environment
from operations.doctor import doctor
from operations.doctor.base import Finding, State
from operations.own_certificates import probe_certificates
from operations.wiring import Portal, open_portal, prepare
from pki.profiles import CertificateProfile
from tests.support.company import CompanyCa, company_root, key_pem, pem, server_below
from tests.support.harness import ON_SQLITE, Clock
from tests.workflows.test_registration import OPERATOR, PUMP, token_of
from web.listeners import ServerTls
from web.slow_clients import SlowClients
from workflows import credentials
from workflows.bundles import broker_trust
from workflows.credentials import own_names
from workflows.enrolment.clients import CLIENT_CAS
from workflows.registration import Registered

pytestmark = ON_SQLITE

SITE, BROKER = "portal.example.com", "mqtt.example.com"
ROOT = company_root("Web Root")
BETWEEN = ROOT.below("Web CA")


class Outside:
    """The files that somebody else renews."""

    def __init__(self, folder: Path, setting: str = "TLS") -> None:
        self.certificate, self.key = folder / f"{setting}.fullchain.pem", folder / f"{setting}.privkey.pem"
        host = {"PORTAL_PUBLIC_URL": f"https://{SITE}"} if setting == "TLS" else {"PORTAL_MQTT_HOST": BROKER}
        self.environment = {
            **host,
            f"PORTAL_{setting}_CERTIFICATE": str(self.certificate),
            f"PORTAL_{setting}_KEY": str(self.key),
        }

    def put(self, server: CompanyCa, *above: CompanyCa, key: bytes = b"") -> CompanyCa:
        """As certbot: each name is a link, to a new file after a renewal."""
        for path, content in ((self.certificate, pem(server, *above)), (self.key, key or key_pem(server.key))):
            target = path.with_suffix(f".{server.certificate.serial_number}")
            target.write_bytes(content)
            target.chmod(0o600)
            path.unlink(missing_ok=True)
            path.symlink_to(target)
        return server


@pytest.fixture
def outside(tmp_path: Path) -> Outside:
    return Outside(tmp_path)


@pytest.fixture
def portal(make_settings: Callable[..., Settings], clock: Clock, outside: Outside) -> Iterator[Portal]:
    outside.put(server_below(BETWEEN, SITE), BETWEEN, ROOT)
    built = open_portal(make_settings(**outside.environment), clock)
    prepare(built)
    yield built
    built.close()


def installed(portal: Portal) -> x509.Certificate:
    return x509.load_pem_x509_certificate((portal.settings.tls_dir / "server.pem").read_bytes())


def examined(portal: Portal, *names: str) -> dict[str, Finding]:
    checks = tuple(check for check in doctor.CHECKS if check[0] in names)
    return {finding.name: finding for finding in doctor.examine(portal.settings, portal.clock, checks=checks)}


# --- The start ----------------------------------------------------------------------------------------------------


def test_one_setting_without_the_other_is_refused(make_settings: Callable[..., Settings], outside: Outside) -> None:
    for name in ("TLS_CERTIFICATE", "TLS_KEY", "BROKER_CERTIFICATE", "BROKER_KEY"):
        with pytest.raises(SettingInvalid, match=f"PORTAL_{name.partition('_')[0]}_.* must be set together"):
            make_settings(**{f"PORTAL_{name}": str(outside.key)})


def test_a_start_is_refused_in_one_sentence_and_nothing_is_written(
    make_settings: Callable[..., Settings], clock: Clock, outside: Outside
) -> None:
    portal = open_portal(make_settings(**outside.environment), clock)
    before = installed(portal)
    with pytest.raises(ServerCertificateRefused, match=r"^PORTAL_TLS_CERTIFICATE names .* cannot be read \(No such"):
        prepare(portal)
    outside.put(server_below(BETWEEN, SITE), BETWEEN, ROOT)
    outside.key.resolve().chmod(0o604)
    with pytest.raises(ServerCertificateRefused, match=r"^PORTAL_TLS_KEY names a key that is open to others"):
        prepare(portal)
    outside.put(server_below(BETWEEN, "other.example.com"), BETWEEN, ROOT)
    with pytest.raises(ServerCertificateRefused, match=rf"^PORTAL_TLS_CERTIFICATE and .*ask for {SITE}"):
        prepare(portal)
    assert installed(portal) == before
    assert not (portal.settings.data_dir / "portal-ca.pem").exists()
    portal.close()


# --- What is made of it -------------------------------------------------------------------------------------------


def test_its_copies_are_the_portals_alone_and_its_root_is_for_clients(portal: Portal) -> None:
    settings = portal.settings
    assert installed(portal).issuer == BETWEEN.certificate.subject
    assert (settings.tls_dir / "server.key").stat().st_mode & 0o777 == 0o600
    trust = settings.data_dir / "portal-ca.pem"
    assert (trust.read_bytes(), trust.stat().st_mode & 0o777) == (pem(ROOT), 0o644)
    assert f"PORTAL_CA={trust}" in _operator_environment(settings, None)
    assert b"Web" not in (settings.data_dir / "ca.pem").read_bytes()  # what issues devices' certificates


def test_a_bundle_has_the_root_of_https_encrypted_beside_what_the_broker_shows(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    content = content_of(portal, registered)
    opened = open_bundle(content, registered.bundle_password or "")
    assert opened.files["portal-ca.pem"] == pem(ROOT)
    assert opened.files["ca.pem"] == portal.authority.first.ca_pem.encode()
    assert b"portal-ca.pem" in opened.files["README.txt"]
    check_bundle(opened, now=portal.clock())
    with pyzipper.AESZipFile(io.BytesIO(content)) as archive:
        assert archive.getinfo("portal-ca.pem").flag_bits & 1


def test_without_the_settings_the_portal_has_its_own_certificate_again(
    portal: Portal, make_settings: Callable[..., Settings]
) -> None:
    again = open_portal(
        make_settings(PORTAL_DATA_DIR=str(portal.settings.data_dir), PORTAL_PUBLIC_URL=f"https://{SITE}"), portal.clock
    )
    prepare(again)
    assert installed(again).issuer == again.authority.servers.issuer.certificate.subject
    assert not (again.settings.data_dir / "portal-ca.pem").exists()
    assert "portal-ca.pem" not in _operator_environment(again.settings, None)
    again.close()


# --- Renewal ------------------------------------------------------------------------------------------------------


def test_a_renewed_pair_is_taken_by_a_job_within_a_minute(portal: Portal, outside: Outside) -> None:
    before = installed(portal)
    take_outside_certificates(portal)
    assert installed(portal) == before
    renewed = outside.put(server_below(BETWEEN, SITE), BETWEEN, ROOT)
    job = next(job for job in jobs.JOBS if job.run is take_outside_certificates)
    job.run(portal)
    assert job.seconds <= 60
    assert installed(portal) == renewed.certificate


def test_a_bad_renewal_is_said_and_the_pair_before_goes_on(
    portal: Portal, outside: Outside, caplog: pytest.LogCaptureFixture
) -> None:
    before = installed(portal)

    def refused() -> list[float]:
        gauges = {gauge.name: gauge for gauge in portal.monitoring.gauges()}
        return [value for _, value in gauges["portal_server_certificate_refused"].samples]

    assert refused() == [0.0]
    bad = outside.put(server_below(BETWEEN, "other.example.com"), BETWEEN, ROOT)
    for _ in range(2):
        take_outside_certificates(portal)
    portal.own_certificates.renew(served=True)
    said = [record for record in caplog.records if record.message == "a new server certificate is not taken"]
    assert len(said) == 1
    assert key_pem(bad.key).decode().splitlines()[1] not in caplog.text
    assert installed(portal) == before
    assert refused() == [1.0]
    finding = examined(portal, "portal certificate")["portal certificate"]
    assert finding.state is State.PROBLEM
    assert f"ask for {SITE} would refuse it" in finding.detail
    outside.put(server_below(BETWEEN, SITE), BETWEEN, ROOT)
    take_outside_certificates(portal)
    assert installed(portal) != before
    assert refused() == [0.0]


def shown_by(tls: ServerTls, roots: bytes) -> bytes:
    """The certificate that a new connection sees."""
    ours, theirs = socket.socketpair()
    client = ssl.create_default_context(cadata=roots.decode())
    server = threading.Thread(target=lambda: tls.context().wrap_socket(theirs, server_side=True).close())
    server.start()
    with client.wrap_socket(ours, server_hostname=SITE) as secure:
        shown = secure.getpeercert(binary_form=True) or b""
    server.join()
    return shown


def test_https_shows_a_renewed_pair_without_a_restart(portal: Portal, outside: Outside) -> None:
    folder = portal.settings.tls_dir
    tls = ServerTls(folder / "server.pem", folder / "server.key", None, 5.0, SlowClients(2))
    renewed = outside.put(server_below(BETWEEN, SITE), BETWEEN, ROOT)
    take_outside_certificates(portal)
    tls._checked = 0.0  # it looks once a second
    assert shown_by(tls, pem(ROOT)) == renewed.certificate.public_bytes(Encoding.DER)


@pytest.mark.parametrize(("days", "state"), [(74, State.OK), (76, State.WARNING), (91, State.PROBLEM)])
def test_doctor_says_when_it_was_not_renewed_in_time(portal: Portal, clock: Clock, days: int, state: State) -> None:
    clock.advance(days=days)
    detail = examined(portal, "expiry")["expiry"].detail
    assert ("The portal's certificate expire" in detail) == (state is not State.OK)


# --- The broker ---------------------------------------------------------------------------------------------------


@pytest.fixture
def of_broker(tmp_path: Path) -> Outside:
    outside = Outside(tmp_path, "BROKER")
    outside.put(server_below(BETWEEN, BROKER), BETWEEN, ROOT)
    return outside


@pytest.fixture
def behind(make_settings: Callable[..., Settings], clock: Clock, of_broker: Outside) -> Iterator[Portal]:
    built = open_portal(make_settings(**of_broker.environment), clock)
    prepare(built)
    yield built
    built.close()


def test_the_broker_gets_the_pair_and_devices_trust_its_root_beside_the_portals_cas(
    behind: Portal, of_broker: Outside
) -> None:
    settings = behind.settings
    chain, key = (settings.broker_file(name) for name in ("server.pem", "server.key"))
    assert names_in(chain.read_bytes()) == ["CN=server", "CN=Web CA"]
    assert key.stat().st_mode & 0o007 == 0
    bundle = bundle_of(behind)
    assert bundle.files["ca.pem"] == behind.authority.first.ca_pem.encode() + pem(ROOT)
    assert broker_trust(settings, behind.authority.first.ca_pem).encode() == bundle.files["ca.pem"]
    assert "portal-ca.pem" not in bundle.files
    check_bundle(bundle, now=behind.clock())
    assert installed(behind).issuer == behind.authority.servers.issuer.certificate.subject

    renewed = of_broker.put(server_below(BETWEEN, BROKER), BETWEEN, ROOT)
    take_outside_certificates(behind)
    assert x509.load_pem_x509_certificate(chain.read_bytes()) == renewed.certificate

    good = chain.read_bytes()
    of_broker.put(server_below(BETWEEN, SITE), BETWEEN, ROOT)
    take_outside_certificates(behind)
    assert chain.read_bytes() == good
    finding = examined(behind, "broker certificate")["broker certificate"]
    assert finding.state is State.PROBLEM
    assert f"ask for {BROKER} would refuse it" in finding.detail


@pytest.mark.parametrize("server", ["TLS", "BROKER"])
def test_no_device_gets_a_further_name_of_the_certificate_that_a_server_shows(
    make_settings: Callable[..., Settings], clock: Clock, tmp_path: Path, server: str
) -> None:
    outside, host = Outside(tmp_path, server), {"TLS": SITE, "BROKER": BROKER}[server]
    outside.put(server_below(BETWEEN, host), BETWEEN, ROOT)
    with contextlib.closing(open_portal(make_settings(**outside.environment), clock)) as portal:
        prepare(portal)
        uses = ("client_auth", "server_auth")
        for name, names in (("flat", "{name}.example.com"), ("hall", "{name}.hall.example.com")):
            portal.profiles.add(OPERATOR, CertificateProfile(name, extended_key_usage=uses, dns_names=(names,)))
        portal.profiles.add(OPERATOR, CertificateProfile("ip", extended_key_usage=uses, ip_addresses=("{location}",)))
        before = dataclasses.replace(PUMP, name="alt", profile="flat")
        device = portal.registrations.register(OPERATOR, before)
        outside.put(server_below(BETWEEN, host, "ALT.example.com", "*.hall.example.com", "192.0.2.7"), BETWEEN, ROOT)
        take_outside_certificates(portal)
        for profile, location in (("flat", "here"), ("hall", "here"), ("ip", "192.0.2.7")):
            wanted = dataclasses.replace(before, profile=profile, location=location)
            with pytest.raises(ProfileRefused, match="of the portal or the broker"):
                portal.registrations.register(OPERATOR, wanted)
        portal.registrations.register(OPERATOR, dataclasses.replace(before, name="pump-2"))
        finding = examined(portal, "device names")["device names"]
        assert finding.state is State.PROBLEM
        assert f"alt.example.com (device {device.device_id})" in finding.detail


def test_the_names_in_a_certificate_are_read_again_only_when_its_file_has_changed(
    behind: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = behind.settings.broker_file("server.pem")
    names, read = own_names(behind.settings), list[bytes]()

    def read_names(content: bytes) -> tuple[str, ...]:
        read.append(content)
        return ("new.example.com",)

    monkeypatch.setattr(credentials, "names_shown", read_names)
    assert (own_names(behind.settings), read) == (names, [])
    replace_file(shown, content := shown.read_bytes())
    assert "new.example.com" in own_names(behind.settings)
    assert "new.example.com" in own_names(behind.settings)
    assert read == [content]


def test_the_root_before_is_trusted_until_the_broker_shows_a_certificate_of_the_new_one(
    behind: Portal, of_broker: Outside
) -> None:
    shown = behind.settings.broker_file("server.pem").read_bytes()
    other = company_root("Another Root")
    of_broker.put(server_below(other, BROKER), other)
    take_outside_certificates(behind)
    root, before = behind.settings.probe_ca_files
    assert (root.read_bytes(), before.read_bytes()) == (pem(other), pem(ROOT))

    def served(content: bytes) -> bytes:
        return x509.load_pem_x509_certificate(content).public_bytes(Encoding.DER)

    jobs._restart_if_due(behind, served(shown))
    assert before.exists()
    jobs._restart_if_due(behind, served(behind.settings.broker_file("server.pem").read_bytes()))
    assert not before.exists()
    assert "Another Root" in "".join(names_in(bundle_of(behind).files["ca.pem"]))


def test_whom_the_brokers_issuer_has_certified_is_no_device(behind: Portal) -> None:
    """The lists by which anybody verifies devices do not have it: not the broker's, not the portal's, not /ca.pem."""
    settings = behind.settings
    for path in (settings.broker_file("ca.pem"), settings.data_dir / "ca.pem"):
        assert b"BEGIN" in path.read_bytes()
        assert not {"CN=Web Root", "CN=Web CA"} & set(names_in(path.read_bytes()))
    assert "Web" not in "".join(names_in(behind.authority.first.ca_pem.encode()))
    assert not [path for path in settings.broker_file("capath").glob("*.[0-9]") if b"Web" in path.read_bytes()]


def test_the_broker_has_a_certificate_of_the_portal_again_without_the_settings(
    behind: Portal, make_settings: Callable[..., Settings]
) -> None:
    again = open_portal(
        make_settings(PORTAL_DATA_DIR=str(behind.settings.data_dir), PORTAL_MQTT_HOST=BROKER), behind.clock
    )
    prepare(again)
    root, before = again.settings.probe_ca_files
    assert (root.exists(), before.read_bytes()) == (False, pem(ROOT))
    own = again.authority.servers.issuer.certificate.subject
    assert x509.load_pem_x509_certificate(again.settings.broker_file("server.pem").read_bytes()).issuer == own
    assert bundle_of(again).files["ca.pem"] == again.authority.first.ca_pem.encode()
    again.close()


def names_in(content: bytes) -> list[str]:
    return [one.subject.rfc4514_string() for one in x509.load_pem_x509_certificates(content)]


def bundle_of(portal: Portal) -> DeviceBundle:
    registered = portal.registrations.register(OPERATOR, PUMP)
    return open_bundle(content_of(portal, registered), registered.bundle_password or "")


def content_of(portal: Portal, registered: Registered) -> bytes:
    return portal.deliveries.deliver(OPERATOR, token_of(registered)).content


# --- Clients ------------------------------------------------------------------------------------------------------


def test_a_client_that_the_issuer_has_certified_is_nobody(portal: Portal) -> None:
    """Not at HTTPS, nor at the broker: neither list of client CAs has the issuer, or anything else of its chain."""
    settings = portal.settings
    for path in (settings.tls_dir / CLIENT_CAS, settings.broker_file("ca.pem")):
        trusted = x509.load_pem_x509_certificates(path.read_bytes())
        assert trusted
        assert not {ROOT.certificate, BETWEEN.certificate} & set(trusted)
    tls = ServerTls(
        settings.tls_dir / "server.pem",
        settings.tls_dir / "server.key",
        settings.tls_dir / CLIENT_CAS,
        5,
        SlowClients(2),
    )
    impostor = server_below(BETWEEN, SITE, purposes=[ExtendedKeyUsageOID.CLIENT_AUTH])
    good = probe_certificates(settings).good
    client = settings.data_dir / "impostor.pem"
    client.write_bytes(pem(impostor, BETWEEN) + key_pem(impostor.key))
    assert handshake(tls, str(good.certificate), str(good.key)) is None
    assert "unknown ca" in (handshake(tls, str(client), None) or "").lower()


def handshake(tls: ServerTls, certificate: str, key: str | None) -> str | None:
    """What the server says to a client that shows a certificate, nothing if it takes it."""
    ours, theirs = socket.socketpair()
    client = ssl.create_default_context(cadata=pem(ROOT).decode())
    client.load_cert_chain(certificate, key)
    client.maximum_version = ssl.TLSVersion.TLSv1_2  # in which the client's handshake ends with the server's verdict

    def serve() -> None:
        with contextlib.suppress(OSError):
            tls.context().wrap_socket(theirs, server_side=True).close()
        theirs.close()

    server = threading.Thread(target=serve)
    server.start()
    try:
        client.wrap_socket(ours, server_hostname=SITE).close()
    except ssl.SSLError as error:
        return str(error).replace("_", " ")
    finally:
        ours.close()
        server.join()
    return None
