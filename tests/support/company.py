"""The CAs of a company above the portal's, made by cryptography alone, and spoiled in the way that a test says."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = datetime.now(UTC).replace(microsecond=0)


def name_of(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]) if common_name else x509.Name([])


@dataclass(frozen=True)
class CompanyCa:
    """A CA with its key."""

    key: Any
    certificate: x509.Certificate

    def sign(self, public_key: Any, common_name: str, **options: Any) -> x509.Certificate:
        return certificate_of(public_key, common_name, self.certificate.subject, self.key, **options)

    def below(self, common_name: str, **options: Any) -> CompanyCa:
        key = ec.generate_private_key(ec.SECP256R1())
        return CompanyCa(key, self.sign(key.public_key(), common_name, **options))


def company_root(common_name: str = "Company Root", key: Any = None, **options: Any) -> CompanyCa:
    key = key or ec.generate_private_key(ec.SECP384R1())
    return CompanyCa(key, certificate_of(key.public_key(), common_name, name_of(common_name), key, **options))


def certificate_of(
    public_key: Any,
    common_name: str,
    issuer: x509.Name,
    key: Any,
    *,
    is_ca: bool = True,
    path_length: int | None = None,
    signs: bool = True,
    signs_crls: bool = True,
    usage: bool = True,
    purposes: Sequence[x509.ObjectIdentifier] = (),
    starts: timedelta = timedelta(hours=-2),
    ends: timedelta = timedelta(days=4000),
    identifier: bool = True,
    digest: hashes.SHA224 | hashes.SHA256 | None = None,
    further: Sequence[tuple[x509.ExtensionType, bool]] = (),
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(name_of(common_name))
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + starts)
        .not_valid_after(NOW + ends)
        .add_extension(x509.BasicConstraints(is_ca, path_length), critical=True)
    )
    if usage:
        bits = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
        ) | {"encipher_only": False, "decipher_only": False}
        key_usage = x509.KeyUsage(digital_signature=True, key_cert_sign=signs, crl_sign=signs_crls, **bits)
        builder = builder.add_extension(key_usage, critical=True)
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    if identifier:
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
    )
    for extension, critical in further:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(key, digest or hashes.SHA256())


def pem(*certificates: x509.Certificate | CompanyCa) -> bytes:
    each = (one.certificate if isinstance(one, CompanyCa) else one for one in certificates)
    return b"".join(one.public_bytes(Encoding.PEM) for one in each)


def key_pem(key: Any, password: bytes = b"") -> bytes:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))


def server_below(ca: CompanyCa, *names: str, key: Any = None, **options: Any) -> CompanyCa:
    """A TLS server's certificate with its key, for host names and addresses."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    alternative = x509.SubjectAlternativeName(
        [x509.IPAddress(ipaddress.ip_address(n)) if n[0].isdigit() else x509.DNSName(n) for n in names]
    )
    given = {
        "is_ca": False,
        "signs": False,
        "signs_crls": False,
        "ends": timedelta(days=90),
        "purposes": [ExtendedKeyUsageOID.SERVER_AUTH],
        "further": [(alternative, False)],
        **options,
    }
    return CompanyCa(key, ca.sign(key.public_key(), "server", **given))
