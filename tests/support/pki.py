"""A small certificate authority for tests, made by cryptography alone so that it can judge the portal's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PEM = Encoding.PEM


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(PEM, PrivateFormat.PKCS8, NoEncryption())


@dataclass(frozen=True)
class Credentials:
    """A certificate with its key, in memory."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        certificate.write_bytes(self.certificate.public_bytes(PEM))
        key.write_bytes(key_pem(self.key))
        key.chmod(0o600)
        return certificate, key


@dataclass
class Authority:
    """One CA: a self-signed root, or below the ``issuer`` given."""

    common_name: str
    issuer: Authority | None = None
    now: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    crl_number: int = 0
    constraints: x509.NameConstraints | None = None
    key_identifier: bytes | None = None  # that of another CA's key, whose certificates it forges

    def __post_init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        own = x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()).digest
        self.key_identifier = self.key_identifier or own
        parent = self.issuer or self
        builder = (
            self._builder(self.common_name, parent.common_name, self.key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier(self.key_identifier), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(parent.key.public_key()), critical=False)
        )
        if self.constraints is not None:
            builder = builder.add_extension(self.constraints, critical=True)
        self.certificate = builder.sign(parent.key, hashes.SHA256())

    def _builder(self, subject: str, issuer: str, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(_name(subject))
            .issuer_name(_name(issuer))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now - timedelta(hours=1))
            .not_valid_after(self.now + timedelta(days=30))
        )

    def issue(self, common_name: str, *, server_names: Iterable[str] = (), names_issuer: bool = False) -> Credentials:
        """A device's certificate, or a server's where it has names.

        With ``names_issuer`` it says which certificate its issuer has, besides the key (RFC 5280 section 4.2.1.1).
        """
        of_issuer: dict[str, Any] = {"authority_cert_issuer": None, "authority_cert_serial_number": None}
        if names_issuer:
            of_issuer["authority_cert_issuer"] = [x509.DirectoryName(self.certificate.issuer)]
            of_issuer["authority_cert_serial_number"] = self.certificate.serial_number
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName(name) for name in server_names]
        usage = ExtendedKeyUsageOID.SERVER_AUTH if names else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            self._builder(common_name, self.common_name, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier(self.key_identifier, **of_issuer), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return Credentials(builder.sign(self.key, hashes.SHA256()), key)

    def crl(
        self,
        *revoked: Credentials,
        this_update: datetime | None = None,
        next_update: datetime | None = None,
        signed_by: Authority | None = None,
        delta: bool = False,
    ) -> bytes:
        """A CRL in PEM that lists the certificates given."""
        self.crl_number += 1
        this_update = this_update or self.now - timedelta(hours=1) + timedelta(seconds=self.crl_number)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(_name(self.common_name))
            .last_update(this_update)
            .next_update(next_update or self.now + timedelta(days=7))
            .add_extension(x509.CRLNumber(self.crl_number), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if delta:
            builder = builder.add_extension(x509.DeltaCRLIndicator(1), critical=True)
        for credentials in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(credentials.certificate.serial_number)
                .revocation_date(self.now - timedelta(minutes=1))
                .build()
            )
        return builder.sign((signed_by or self).key, hashes.SHA256()).public_bytes(PEM)


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


class Pki:
    """A root with one issuing CA."""

    def __init__(self) -> None:
        self.root = Authority("Test root")
        self.issuing = Authority("Test issuing", issuer=self.root)

    @property
    def ca_bundle(self) -> bytes:
        return self.issuing.certificate.public_bytes(PEM) + self.root.certificate.public_bytes(PEM)


def ca_without_key_identifiers(name: str) -> tuple[str, ec.EllipticCurvePrivateKey]:
    """The certificate, PEM, and the key of a CA that TLS knows by its name alone."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(hours=1))
    builder = builder.not_valid_after(now + timedelta(days=9))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(PEM).decode(), key
