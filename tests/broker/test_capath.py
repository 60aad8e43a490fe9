"""The folder of CRLs and CAs: OpenSSL finds what is added, at the next handshake, without being told."""

from __future__ import annotations

import ssl
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from broker.capath import CaFolder, name_hash
from broker.crl import Trust
from tests.support import mutual_tls
from tests.support.pki import PEM, Authority, Credentials, Pki, key_pem

NAMES = {
    "usual": [(NameOID.COMMON_NAME, "Onboarding Portal Issuing CA 1")],
    "spaces and other letters": [(NameOID.COMMON_NAME, " Ü  b A "), (NameOID.ORGANIZATION_NAME, "x Y")],
    "PrintableString": [(NameOID.COUNTRY_NAME, "DE"), (NameOID.COMMON_NAME, "Pump")],
    "long": [(NameOID.COMMON_NAME, "x" * 64), (NameOID.ORGANIZATION_NAME, "y" * 64), (NameOID.COMMON_NAME, "z" * 64)],
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_name_has_the_hash_that_openssl_computes(kind: str) -> None:
    name = x509.Name([x509.NameAttribute(oid, value) for oid, value in NAMES[kind]])
    authority = Authority("x")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(authority.key.public_key())
        .serial_number(1)
        .not_valid_before(authority.now)
        .not_valid_after(authority.now + timedelta(days=1))
        .sign(authority.key, hashes.SHA256())
    )
    command = ["openssl", "x509", "-noout", "-subject_hash"]
    done = subprocess.run(command, input=certificate.public_bytes(PEM), capture_output=True, check=True)
    assert name_hash(name) == done.stdout.decode().strip()


class Server:
    """A TLS server that was started once, as a broker is, with the folder."""

    def __init__(self, folder: Path, pki: Pki, capath: Path) -> None:
        self.folder = folder
        self.pki = pki
        certificate, key = pki.issuing.issue("localhost", server_names=["localhost"]).write(folder, "server")
        (folder / "ca.pem").write_bytes(pki.ca_bundle)
        (folder / "crl.pem").write_bytes(pki.issuing.crl(this_update=pki.issuing.now - timedelta(days=1)))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate, key)
        self.context.load_verify_locations(folder / "ca.pem", capath)
        self.context.load_verify_locations(folder / "crl.pem")
        self.context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        self.context.verify_mode = ssl.CERT_REQUIRED

    def accepts(self, device: Credentials, *chain: x509.Certificate) -> bool:
        """Whether a handshake with the device's certificate succeeds."""
        path = self.folder / "device.pem"
        path.write_bytes(b"".join(one.public_bytes(PEM) for one in (device.certificate, *chain)) + key_pem(device.key))
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.load_verify_locations(self.folder / "ca.pem")
        client.load_cert_chain(path)
        return mutual_tls.accepts(self.context, client)


@pytest.fixture
def pki() -> Pki:
    return Pki()


@pytest.fixture
def folder(tmp_path: Path) -> CaFolder:
    return CaFolder(tmp_path / "capath", None)


def test_a_running_server_refuses_what_a_published_crl_lists(tmp_path: Path, pki: Pki, folder: CaFolder) -> None:
    devices = [pki.issuing.issue(str(number)) for number in range(4)]
    assert folder.publish(Trust(pki.issuing.crl(), pki.ca_bundle))
    server = Server(tmp_path, pki, folder.path)
    for revoked in range(4):
        assert server.accepts(devices[revoked])
        assert folder.publish(Trust(pki.issuing.crl(*devices[: revoked + 1]), pki.ca_bundle))
        assert [server.accepts(device) for device in devices] == [number > revoked for number in range(4)]
    assert folder.publish(Trust(pki.issuing.crl(), pki.ca_bundle))  # taken off again, as after a suspension
    assert server.accepts(devices[0])


def test_a_server_that_starts_later_finds_the_newest_behind_small_files(
    tmp_path: Path, pki: Pki, folder: CaFolder
) -> None:
    device, crls = pki.issuing.issue("x"), [pki.issuing.crl() for _ in range(9)]
    for crl in [*crls, pki.issuing.crl(device)]:
        assert folder.publish(Trust(crl, pki.ca_bundle))
    assert not Server(tmp_path, pki, folder.path).accepts(device)
    files = sorted(folder.path.glob("*.r*"))
    assert len(files) == 10
    assert len({path.read_bytes() for path in files}) == 2


def test_a_new_ca_is_trusted_with_its_crl(tmp_path: Path, pki: Pki, folder: CaFolder) -> None:
    folder.publish(Trust(pki.issuing.crl(), pki.ca_bundle))
    server = Server(tmp_path, pki, folder.path)
    second = Authority("Second issuing", issuer=pki.root)
    device = second.issue("x")
    assert not server.accepts(device)
    bundle = second.certificate.public_bytes(PEM) + pki.ca_bundle
    assert folder.publish(Trust(pki.issuing.crl() + second.crl(), bundle))
    assert server.accepts(device)
    folder.publish(Trust(pki.issuing.crl() + second.crl(device), bundle))
    assert not server.accepts(device)


def test_two_cas_of_one_name_have_files_of_their_own(tmp_path: Path, pki: Pki, folder: CaFolder) -> None:
    folder.publish(Trust(pki.issuing.crl(), pki.ca_bundle))
    twin = Authority(pki.issuing.common_name, issuer=pki.root)
    bundle = twin.certificate.public_bytes(PEM) + pki.ca_bundle
    folder.publish(Trust(pki.issuing.crl() + twin.crl(), bundle))
    assert len(list(folder.path.glob(f"{name_hash(twin.certificate.subject)}.[0-9]"))) == 2
    server = Server(tmp_path, pki, folder.path)
    one, two = pki.issuing.issue("x"), twin.issue("x")
    folder.publish(Trust(pki.issuing.crl(one) + twin.crl(), bundle))
    assert [server.accepts(one, pki.issuing.certificate), server.accepts(two, twin.certificate)] == [False, True]
    started = Server(tmp_path, pki, folder.path)
    assert [started.accepts(one, pki.issuing.certificate), started.accepts(two, twin.certificate)] == [False, True]


def test_what_is_there_is_not_added_again(pki: Pki, folder: CaFolder) -> None:
    trust = Trust(pki.issuing.crl(), pki.ca_bundle)
    assert folder.publish(trust)
    before = {path: path.stat().st_ino for path in folder.path.iterdir()}
    assert not folder.publish(trust)
    assert {path: path.stat().st_ino for path in folder.path.iterdir()} == before


def test_replaced_crls_are_removed_when_they_are_many(pki: Pki, folder: CaFolder) -> None:
    for _ in range(60):
        folder.publish(Trust(pki.issuing.crl(), pki.ca_bundle))
    folder.compact()
    assert len(list(folder.path.glob("*.r*"))) == 60
    for _ in range(10):
        folder.publish(Trust(pki.issuing.crl(), pki.ca_bundle))
    folder.compact()
    assert list(folder.path.glob("*.r*")) == []
    newest = pki.issuing.crl()
    folder.publish(Trust(newest, pki.ca_bundle))
    assert [path.read_bytes() for path in folder.path.glob("*.r*")] == [newest]
