"""Reads the certificate that a TLS client has shown."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core.errors import ClientCertificateRefused
from pki.algorithms import PublicKey, check_public_key, public_key_fingerprint
from pki.encoding import failing_as

MAX_CERTIFICATE_BYTES = 16 * 1024
T = TypeVar("T", bound=x509.ExtensionType)
_UNREADABLE = "The client certificate cannot be read."


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """A certificate with what is asked about it; nobody has vouched for it yet.

    ``fingerprint`` is the SHA-256 of its DER, ``key_fingerprint`` that of its SubjectPublicKeyInfo, both in hex.
    ``serial`` is the serialNumber of its subject (IEEE 802.1AR section 8.6), else the common name, else empty.
    """

    certificate: x509.Certificate = field(repr=False)
    fingerprint: str
    key_fingerprint: str
    serial: str
    not_before: datetime
    not_after: datetime


def read_client(der: bytes) -> ClientCertificate:
    """Read a client's certificate; raises ``ClientCertificateRefused``."""
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise ClientCertificateRefused(f"The client certificate is longer than {MAX_CERTIFICATE_BYTES} bytes.")
    with failing_as(ClientCertificateRefused(_UNREADABLE)):
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        names = [
            attribute.value
            for oid in (NameOID.SERIAL_NUMBER, NameOID.COMMON_NAME)
            for attribute in certificate.subject.get_attributes_for_oid(oid)
            if isinstance(attribute.value, str)
        ]
        return ClientCertificate(
            certificate=certificate,
            fingerprint=hashlib.sha256(der).hexdigest(),
            key_fingerprint=_key_fingerprint(key),
            serial=names[0] if names else "",
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
        )


def _key_fingerprint(key: object) -> str:
    checked: PublicKey = check_public_key(key)
    return public_key_fingerprint(checked)


def is_issued_by(client: ClientCertificate, issuer: x509.Certificate) -> bool:
    """Whether the CA has signed the certificate and bears the name of its issuer (RFC 5280 section 6.1.3)."""
    try:
        client.certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def is_issued_by_der(client: ClientCertificate, issuer: bytes) -> bool:
    """As ``is_issued_by``, for a CA certificate in DER."""
    return is_issued_by(client, x509.load_der_x509_certificate(issuer))


def may_identify_a_client(client: ClientCertificate) -> bool:
    """Whether the certificate is an end entity's that may be used so: no CA, and no other purpose named.

    Certificates that a device is born with often name no purpose at all (IEEE 802.1AR section 8.11).
    """
    with failing_as(ClientCertificateRefused(_UNREADABLE)):
        extensions = client.certificate.extensions
        unknown = [item for item in extensions if item.critical and isinstance(item.value, x509.UnrecognizedExtension)]
        constraints = _value(extensions, x509.BasicConstraints)
        usage = _value(extensions, x509.KeyUsage)
        purposes = _value(extensions, x509.ExtendedKeyUsage)
    if unknown or (constraints is not None and constraints.ca):
        return False
    if usage is not None and not usage.digital_signature:
        return False
    allowed = {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
    return purposes is None or not allowed.isdisjoint(purposes)


def _value(extensions: x509.Extensions, kind: type[T]) -> T | None:
    try:
        return extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def pem_bundle(certificates: list[bytes]) -> bytes:
    """Several certificates, DER, as one PEM file."""
    return b"".join(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in certificates)
