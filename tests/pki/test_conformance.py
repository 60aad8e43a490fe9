"""What other people's tools say of the certificates and CRLs."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

import ca
from pki.algorithms import KeyType, private_key_pem
from pki.issuers import ONLY_UUID, DeviceContents, Reason
from tests.support.ca_hierarchy import Hierarchy, MakeKey, make_hierarchy

DEVICE_ID = "3fa85f64-5717-4562-b3fc-2c963f66afa6"
KEY_TYPES = [str(key_type) for key_type in KeyType]

# What pkilint calls errors because the package that it checks names with knows nine URL schemes, and neither names of
# one label nor wildcards. They are right by RFC 3986 with RFC 9562 §4, by RFC 1034 §3.5, and by RFC 9525 §6.3.
NOT_KNOWN_TO_PKILINT = {
    ("pkix.invalid_uri_syntax", f'Invalid URI syntax: "urn:uuid:{DEVICE_ID}"'),
    ("pkix.invalid_domain_name_syntax", 'Invalid domain name syntax: "localhost"'),
    ("pkix.invalid_domain_name_syntax", 'Invalid domain name syntax: "*.example.com"'),
}

# What certificate profiles add to a device's certificate.
PROFILED = {
    "tls-server": DeviceContents(
        server_auth=True,
        dns_names=("pump-17.devices.example.com", "rack-7.xn--pmp-hoa.example"),
        ip_addresses=("198.51.100.7", "2001:db8::7"),
        subject=(
            (x509.NameOID.ORGANIZATION_NAME, "ACME Pümps"),
            (x509.NameOID.ORGANIZATIONAL_UNIT_NAME, "Halle 1"),
            (x509.NameOID.SERIAL_NUMBER, "line-4/000217"),
        ),
    ),
    "named-client": DeviceContents(dns_names=("pump-17.devices.example.com",)),
    "longest": DeviceContents(
        dns_names=(".".join(["a" * 63] * 3 + ["b" * 61]),),
        subject=((x509.NameOID.ORGANIZATION_NAME, "ü" * 64), (x509.NameOID.SERIAL_NUMBER, "7" * 64)),
    ),
}

# pkilint's own command-line tools, started once for all the files; a line of JSON for each.
RUN_PKILINT = """
import sys
from pkilint.bin import lint_crl, lint_pkix_cert
for path in sys.argv[1:]:
    if path.endswith(".crl"):
        kind = "ARL" if "root" in path else "CRL"
        lint_crl.main(["lint", "-t", kind, "-p", "PKIX", "-s", "WARNING", "-f", "JSON", path])
    else:
        lint_pkix_cert.main(["lint", "-s", "WARNING", "-f", "JSON", path])
"""


@dataclass(frozen=True)
class World:
    """Everything that the CA can sign, in files: ``.pem``, ``.cer`` and ``.key`` or ``.crl`` and ``.crl.pem``."""

    cas: Hierarchy
    folder: Path
    revoked_serial_number: str

    def file(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, make_ca_key: MakeKey) -> World:
    folder = tmp_path_factory.mktemp("pki")
    cas = make_hierarchy(datetime.now(UTC), make_ca_key)
    certificates: dict[str, x509.Certificate] = {"root": cas.root.certificate, "issuing": cas.issuing.certificate}
    for key_type in KeyType:
        key = ca.generate_keypair(key_type)
        (folder / f"device-{key_type}.key").write_bytes(private_key_pem(key))
        certificates[f"device-{key_type}"] = cas.device(key.public_key(), device_id=DEVICE_ID).certificate
        as_server = cas.device(key.public_key(), device_id=DEVICE_ID, contents=PROFILED["tls-server"])
        certificates[f"tls-server-{key_type}"] = as_server.certificate
    server_key = ca.generate_keypair(KeyType.EC_P256)
    for name, contents in PROFILED.items():
        profiled = cas.device(server_key.public_key(), device_id=DEVICE_ID, contents=contents)
        certificates[name] = profiled.certificate
        (folder / f"{name}.key").write_bytes(private_key_pem(server_key))
    of_rsa = make_hierarchy(cas.now, make_ca_key, issuing_key_type=KeyType.RSA_3072)
    certificates["of-rsa-issuing"] = of_rsa.issuing.certificate
    for name, contents in {"default": ONLY_UUID, **PROFILED}.items():
        profiled = of_rsa.device(server_key.public_key(), device_id=DEVICE_ID, contents=contents)
        certificates[f"of-rsa-{name}"] = profiled.certificate
    (folder / "server.key").write_bytes(private_key_pem(server_key))
    names = ("localhost", "127.0.0.1", "::1", "*.example.com")
    certificates["server"] = cas.server(*names, public_key=server_key.public_key()).certificate
    certificates["server-long"] = cas.server(f"{'a' * 60}.example.com").certificate
    revoked = cas.device(device_id=DEVICE_ID)
    certificates["revoked"] = revoked.certificate
    for name, certificate in certificates.items():
        (folder / f"{name}.pem").write_text(ca.chain_pem(certificate))
        (folder / f"{name}.cer").write_bytes(certificate.public_bytes(Encoding.DER))

    crls = {"empty": cas.crl(), "root": cas.crl(issuer=cas.root)}
    entries = []
    for number, reason in enumerate(Reason, start=1):
        entries.append(ca.revoke_certificate(f"{number:x}", cas.now, reason))
        crls[f"reason-{reason}"] = cas.crl(entries[-1], number=number)
    mine = ca.revoke_certificate(revoked.serial_number, cas.now, Reason.KEY_COMPROMISE)
    crls["all"] = cas.crl(*entries, mine, number=100)
    for name, der in crls.items():
        (folder / f"{name}.crl").write_bytes(der)
        (folder / f"{name}.crl.pem").write_bytes(x509.load_der_x509_crl(der).public_bytes(Encoding.PEM))
    return World(cas, folder, revoked.serial_number)


def openssl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["openssl", *arguments], check=False, capture_output=True, text=True)


# --- pkilint ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def findings(world: World) -> dict[str, set[tuple[str, str]]]:
    """Findings of severity WARNING, ERROR or FATAL, for each file."""
    paths = sorted([*world.folder.glob("*.cer"), *world.folder.glob("*.crl")])
    command = [sys.executable, "-c", RUN_PKILINT, *map(str, paths)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {path.name: _findings(json.loads(line)) for path, line in zip(paths, lines, strict=True)}


def _findings(report: dict[str, Any]) -> set[tuple[str, str]]:
    return {
        (finding["code"], finding.get("message", ""))
        for result in report["results"]
        for finding in result["finding_descriptions"]
    }


CERTIFICATES = [
    "root",
    "issuing",
    "server",
    "server-long",
    *PROFILED,
    *(f"device-{key_type}" for key_type in KEY_TYPES),
    *(f"tls-server-{key_type}" for key_type in KEY_TYPES),
    *(f"of-rsa-{name}" for name in ("issuing", "default", *PROFILED)),
]
CRLS = ["root", "empty", "all", *(f"reason-{reason}" for reason in Reason)]


@pytest.mark.parametrize("file", [*(f"{name}.cer" for name in CERTIFICATES), *(f"{name}.crl" for name in CRLS)])
def test_pkilint_finds_nothing_wrong(findings: dict[str, set[tuple[str, str]]], file: str) -> None:
    assert findings[file] - NOT_KNOWN_TO_PKILINT == set()


def test_pkilint_would_find_something_wrong(tmp_path: Path, world: World) -> None:
    damaged = tmp_path / "damaged.cer"
    key_identifier = x509.SubjectKeyIdentifier.from_public_key(world.cas.issuing.certificate.public_key()).digest
    content = (world.folder / "server-long.cer").read_bytes()
    damaged.write_bytes(content.replace(b"\x80\x14" + key_identifier, b"\x85\x14" + key_identifier))
    command = [sys.executable, "-c", RUN_PKILINT, str(damaged)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert _findings(json.loads(report))


# --- openssl ------------------------------------------------------------------------------------------------------


def verify(world: World, certificate: str, purpose: str, *options: str) -> subprocess.CompletedProcess[str]:
    return openssl(
        *("verify", "-x509_strict", "-crl_check", "-purpose", purpose, *options),
        *("-CAfile", world.file("root.pem"), "-untrusted", world.file("issuing.pem")),
        *("-CRLfile", world.file("all.crl.pem"), world.file(f"{certificate}.pem")),
    )


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_openssl_verifies_a_device(world: World, key_type: str) -> None:
    result = verify(world, f"device-{key_type}", "sslclient")
    assert (result.returncode, result.stdout.strip()) == (0, world.file(f"device-{key_type}.pem") + ": OK")


def test_openssl_verifies_a_server_by_each_of_its_names(world: World) -> None:
    for option in ("-verify_hostname", "localhost"), ("-verify_hostname", "a.example.com"), ("-verify_ip", "::1"):
        assert verify(world, "server", "sslserver", *option).returncode == 0
    assert verify(world, "server", "sslserver", "-verify_hostname", "example.org").returncode != 0
    assert verify(world, "server-long", "sslserver", "-verify_hostname", f"{'a' * 60}.example.com").returncode == 0


def test_openssl_verifies_a_device_that_is_a_server_by_its_names_and_no_other(world: World) -> None:
    own = ("-verify_hostname", "pump-17.devices.example.com")
    for option in own, ("-verify_ip", "198.51.100.7"), ("-verify_ip", "2001:db8::7"):
        assert verify(world, "tls-server", "sslserver", *option).returncode == 0
        assert verify(world, "tls-server", "sslclient", *option).returncode == 0
    assert verify(world, "tls-server", "sslserver", "-verify_hostname", "localhost").returncode != 0
    assert verify(world, "tls-server", "sslserver", "-verify_hostname", DEVICE_ID).returncode != 0
    assert verify(world, "named-client", "sslserver").returncode != 0


def test_openssl_verifies_the_whole_chain_against_the_crls_of_both_cas(world: World) -> None:
    result = verify(world, "device-ec-p256", "sslclient", "-crl_check_all", "-CRLfile", world.file("root.crl.pem"))
    assert result.returncode == 0


def test_openssl_refuses_a_revoked_device(world: World) -> None:
    result = verify(world, "revoked", "sslclient")
    assert result.returncode != 0
    assert "certificate revoked" in result.stderr


@pytest.mark.parametrize(("certificate", "purpose"), [("device-ec-p256", "sslserver"), ("server", "sslclient")])
def test_openssl_refuses_a_certificate_for_another_purpose(world: World, certificate: str, purpose: str) -> None:
    result = verify(world, certificate, purpose)
    assert result.returncode != 0
    assert "unsuitable certificate purpose" in result.stderr


@pytest.mark.parametrize(("moment", "reason"), [(-600, "not yet valid"), (366 * 86400, "expired")])
def test_openssl_refuses_a_certificate_out_of_its_time(world: World, moment: int, reason: str) -> None:
    at = int(world.cas.now.timestamp()) + moment
    assert reason in verify(world, "device-ec-p256", "sslclient", "-attime", str(at)).stderr


@pytest.mark.parametrize("name", [name for name in CRLS if name != "root"])
def test_openssl_verifies_a_crl(world: World, name: str) -> None:
    result = openssl("crl", "-inform", "DER", "-in", world.file(f"{name}.crl"), *("-noout", "-verify", "-CAfile"),
                     world.file("issuing.pem"))  # fmt: skip
    assert (result.returncode, result.stderr.strip()) == (0, "verify OK")


def test_openssl_verifies_the_crl_of_the_root(world: World) -> None:
    arguments = ["crl", "-inform", "DER", "-in", world.file("root.crl"), "-noout", "-verify", "-CAfile"]
    assert openssl(*arguments, world.file("root.pem")).stderr.strip() == "verify OK"
    assert openssl(*arguments, world.file("issuing.pem")).stderr.strip() != "verify OK"


def test_openssl_shows_what_the_crl_says(world: World) -> None:
    text = openssl("crl", "-inform", "DER", "-in", world.file("all.crl"), "-noout", "-text").stdout
    assert "Version 2 (0x1)" in text
    assert f"Serial Number: {world.revoked_serial_number.upper()}" in text
    assert "X509v3 CRL Number: \n                100" in text
    next_update = world.cas.now.replace(microsecond=0) + timedelta(days=7)
    assert f"Next Update: {next_update:%b} {next_update.day:2d} {next_update:%H:%M:%S %Y} GMT" in text


# --- TLS ----------------------------------------------------------------------------------------------------------


def handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Let the two talk in memory until both are through."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname="localhost"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(sides)
    while waiting:
        for side in tuple(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
    return sides[0], sides[1]


def contexts(world: World, device: str, version: ssl.TLSVersion) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    client = ssl.create_default_context(cafile=world.file("root.pem"))
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=world.file("root.pem"))
    for context, name in ((client, device), (server, "server")):
        chain = world.folder / f"{name}.chain.pem"
        chain.write_text((world.folder / f"{name}.pem").read_text() + (world.folder / "issuing.pem").read_text())
        context.load_cert_chain(chain, world.file(f"{name}.key"))
        context.minimum_version = context.maximum_version = version
        context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_verify_locations(world.file("all.crl.pem"))
    server.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    return client, server


@pytest.mark.parametrize("key_type", KEY_TYPES)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_device_and_a_server_trust_each_other_over_tls(world: World, key_type: str, version: ssl.TLSVersion) -> None:
    client, server = handshake(*contexts(world, f"device-{key_type}", version))
    peer = server.getpeercert()
    assert peer is not None
    assert peer["subject"] == ((("commonName", DEVICE_ID),),)
    assert peer["subjectAltName"] == (("URI", f"urn:uuid:{DEVICE_ID}"),)
    assert client.version() == server.version()
