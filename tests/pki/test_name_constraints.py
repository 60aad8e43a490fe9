"""Name constraints of a CA: openssl verify says what is right."""

from __future__ import annotations

import ipaddress
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from pki.encoding import join
from pki.foreign import read_certificate
from pki.name_constraints import NamePatterns, is_permitted, violation, violation_by_all

KEY = ec.derive_private_key(7, ec.SECP256R1())
NOW = datetime.now(UTC).replace(microsecond=0)
Names = Sequence[x509.GeneralName]


def named(**attributes: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(getattr(NameOID, oid), value) for oid, value in attributes.items()])


def directory(**attributes: str) -> x509.DirectoryName:
    return x509.DirectoryName(named(**attributes))


def network(text: str) -> x509.IPAddress:
    return x509.IPAddress(ipaddress.ip_network(text))


def address(text: str) -> x509.IPAddress:
    return x509.IPAddress(ipaddress.ip_address(text))


def certificate(subject: x509.Name, *extensions: x509.ExtensionType) -> bytes:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(named(COMMON_NAME="Maker"))
    builder = builder.public_key(KEY.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(NOW - timedelta(days=1)).not_valid_after(NOW + timedelta(days=1))
    for extension in extensions:
        builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
    return builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER)


def authority(*extensions: x509.ExtensionType) -> bytes:
    return certificate(named(COMMON_NAME="Maker"), x509.BasicConstraints(ca=True, path_length=None), *extensions)


dns, mail, uri = x509.DNSName, x509.RFC822Name, x509.UniformResourceIdentifier
REGISTERED = x509.RegisteredID(x509.ObjectIdentifier("1.2.3"))
ACME = named(ORGANIZATION_NAME="Acme", COMMON_NAME="sn 1")
LONGER = directory(ORGANIZATION_NAME="Acme", COMMON_NAME="sn 1", LOCALITY_NAME="x")
SN_1 = named(COMMON_NAME="sn 1")


@dataclass(frozen=True)
class Case:
    what: str
    permitted: bool
    subject: x509.Name = SN_1
    names: Names = ()
    only: Names = ()
    never: Names = ()


CASES = (
    Case("no name of the kind", True, only=[dns("acme.example")]),
    Case("its organization", True, ACME, only=[directory(ORGANIZATION_NAME="Acme")]),
    Case("its organization in other letters", True, ACME, only=[directory(ORGANIZATION_NAME=" ACME ")]),
    Case("another organization", False, ACME, only=[directory(ORGANIZATION_NAME="Acme Corp")]),
    Case("a longer name", False, ACME, only=[LONGER]),
    Case("an excluded organization", False, ACME, never=[directory(ORGANIZATION_NAME="Acme")]),
    Case("one of two", True, ACME, only=[directory(ORGANIZATION_NAME="Other"), directory(ORGANIZATION_NAME="Acme")]),
    Case("a host within", True, names=[dns("a.Acme.example")], only=[dns("acme.example")]),
    Case("the host itself", True, names=[dns("acme.example")], only=[dns("acme.example")]),
    Case("a host that ends alike", False, names=[dns("notacme.example")], only=[dns("acme.example")]),
    Case("one host of two", False, names=[dns("a.example"), dns("b.org")], only=[dns("example")]),
    Case("an excluded host", False, names=[dns("a.evil.example")], never=[dns("evil.example")]),
    Case("a common name like a host", False, named(COMMON_NAME="pump.evil.example"), only=[dns("acme.example")]),
    Case("a mailbox", True, names=[mail("a@acme.example")], only=[mail("a@acme.example")]),
    Case("another mailbox", False, names=[mail("b@acme.example")], only=[mail("a@acme.example")]),
    Case("a mailbox at the host", True, names=[mail("b@acme.example")], only=[mail("acme.example")]),
    Case("a mailbox below the host", False, names=[mail("b@x.acme.example")], only=[mail("acme.example")]),
    Case("a mailbox in the domain", True, names=[mail("b@x.acme.example")], only=[mail(".acme.example")]),
    Case("an address in the subject", False, named(EMAIL_ADDRESS="a@evil.example"), only=[mail("acme.example")]),
    Case("a URI in the domain", True, names=[uri("https://a.acme.example:8/x")], only=[uri(".acme.example")]),
    Case("a URI of another host", False, names=[uri("https://evil.example/a")], only=[uri("acme.example")]),
    Case("a URI without a host", False, names=[uri("urn:dev:1")], only=[uri("acme.example")]),
    Case("an address in the network", True, names=[address("10.1.2.3")], only=[network("10.0.0.0/8")]),
    Case("an address outside", False, names=[address("11.1.2.3")], only=[network("10.0.0.0/8")]),
    Case("an address of the other kind", False, names=[address("::1")], only=[network("10.0.0.0/8")]),
    Case("an excluded address", False, names=[address("fd00::1")], never=[network("fd00::/8")]),
    Case("a kind that nobody checks", False, names=[REGISTERED], only=[REGISTERED]),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_names_are_permitted_as_openssl_permits_them(case: Case, tmp_path: Path) -> None:
    ca = authority(x509.NameConstraints(list(case.only) or None, list(case.never) or None))
    device = certificate(case.subject, *([x509.SubjectAlternativeName(case.names)] if case.names else []))
    assert is_permitted(read_certificate(device), read_certificate(ca)) is case.permitted
    for file, der in (("ca.pem", ca), ("device.pem", device)):
        pem = x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
        (tmp_path / file).write_bytes(pem)
    verify = ["openssl", "verify", "-CAfile", str(tmp_path / "ca.pem"), str(tmp_path / "device.pem")]
    done = subprocess.run(verify, check=False, capture_output=True, text=True)
    assert (done.returncode == 0) is case.permitted, done.stderr


def test_a_ca_without_constraints_permits_every_name() -> None:
    names = x509.SubjectAlternativeName([x509.DNSName("a.example"), x509.RegisteredID(x509.ObjectIdentifier("1.2.3"))])
    assert is_permitted(read_certificate(certificate(ACME, names)), read_certificate(authority()))


def subtree(*parts: bytes) -> bytes:
    return join(0x30, join(0xA0, join(0x30, join(0x82, b"example"), *parts)))


@pytest.mark.parametrize(
    ("value", "permitted"),
    [
        (subtree(), True),
        (subtree(join(0x80, b"\0")), True),
        (subtree(join(0x80, b"\1")), False),
        (subtree(join(0x81, b"\1")), False),
        (b"", False),
        (b"\x30\x05", False),
        (join(0x30, join(0xA2)), False),
        (join(0x30, join(0xA0, join(0x30))), False),
    ],
    ids=["plain", "minimum 0", "minimum 1", "maximum", "empty", "cut off", "another field", "no name"],
)
def test_constraints_that_cannot_be_read_permit_nothing(value: bytes, permitted: bool) -> None:
    constraints = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.30"), value)
    device = certificate(ACME, x509.SubjectAlternativeName([x509.DNSName("a.example")]))
    assert is_permitted(read_certificate(device), read_certificate(authority(constraints))) is permitted


@pytest.mark.parametrize(
    ("only", "never", "names", "said"),
    [
        ([dns("example.org")], [], [dns("a.example.com")], "DNS names they permit only example.org, not a.example.com"),
        ([], [network("10.0.0.0/8")], [address("10.1.2.3")], "they exclude 10.0.0.0/255.0.0.0, such as 10.1.2.3"),
        ([directory(ORGANIZATION_NAME="Other")], [], [], "of subjects they permit only O=Other, not O=Acme, CN=sn 1"),
        ([uri("acme.example")], [], [uri("urn:uuid:1")], "they cannot be kept: one has a URI without a host"),
    ],
)  # fmt: skip
def test_the_constraint_that_is_violated_is_named(only: Names, never: Names, names: Names, said: str) -> None:
    ca = authority(x509.NameConstraints([*only] or None, [*never] or None))
    device = certificate(ACME, *([x509.SubjectAlternativeName(names)] if names else []))
    assert said in str(violation(read_certificate(device), read_certificate(ca)))


IN_PLANT = NamePatterns(domains=["plant.example.com"])
OF_ACME = NamePatterns(subject=[("2.5.4.10", "ACME"), ("2.5.4.5", None), ("2.5.4.3", None)])
ADDRESSES = NamePatterns(addresses=True)
ALL_ADDRESSES = [network("0.0.0.0/0"), network("::/0")]


@pytest.mark.parametrize(
    ("patterns", "only", "never", "violates"),
    [
        (IN_PLANT, [dns("example.com")], [], False),
        (IN_PLANT, [dns(".plant.example.com"), dns("example.org")], [], False),
        (IN_PLANT, [dns("pump-1.plant.example.com")], [], False),
        (IN_PLANT, [dns("example.org")], [], True),
        (IN_PLANT, [dns("ant.example.com")], [], True),
        (IN_PLANT, [], [dns("Example.com")], True),
        (IN_PLANT, [], [dns("pump-1.plant.example.com")], False),
        (IN_PLANT, [network("10.0.0.0/8"), directory(ORGANIZATION_NAME="Other")], [], False),
        (ADDRESSES, [network("10.0.0.0/8")], [network("10.1.0.0/16")], False),
        (ADDRESSES, [], ALL_ADDRESSES, True),
        (ADDRESSES, [], ALL_ADDRESSES[:1], False),
        (OF_ACME, [directory(ORGANIZATION_NAME="acme")], [], False),
        (OF_ACME, [directory(ORGANIZATION_NAME="ACME", SERIAL_NUMBER="7")], [], False),
        (OF_ACME, [directory(ORGANIZATION_NAME="Other")], [], True),
        (OF_ACME, [directory(COUNTRY_NAME="GB")], [], True),
        (OF_ACME, [], [directory(ORGANIZATION_NAME="ACME")], True),
        (OF_ACME, [], [directory(ORGANIZATION_NAME="ACME", SERIAL_NUMBER="7")], False),
        (NamePatterns(), [dns("example.org")], ALL_ADDRESSES, False),
    ],
)
def test_names_to_come_violate_a_constraint_if_none_of_them_can_be_permitted(
    patterns: NamePatterns, only: Names, never: Names, violates: bool
) -> None:
    ca = read_certificate(authority(x509.NameConstraints([*only] or None, [*never] or None)))
    assert (violation_by_all(patterns, ca) is not None) is violates
