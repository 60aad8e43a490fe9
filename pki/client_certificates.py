"""Read the certificates of TLS clients, and those of the manufacturers' CAs that devices bring certificates from."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core.errors import ClientCertificateRefused, KeyRefused, ManufacturerInvalid, ProofInvalid
from pki.algorithms import PublicKey, check_public_key, public_key_fingerprint
from pki.encoding import failing_as

MAX_CERTIFICATE_BYTES = 16 * 1024
MAX_PEM_CHARACTERS = 16 * 1024
_ONE_PEM = "Send one certificate in PEM, BEGIN CERTIFICATE to END CERTIFICATE."
T = TypeVar("T", bound=x509.ExtensionType)
_UNREADABLE = "The client certificate cannot be read."


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """A client's certificate with its properties; its issuer has not been checked.

    ``fingerprint`` is the SHA-256 of its DER, ``key_fingerprint`` that of its SubjectPublicKeyInfo, both in hex.
    ``serial`` is the serialNumber of its subject (IEEE 802.1AR §8.6), else the common name, else empty.
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
    """Return whether the CA has signed the certificate and has the name of its issuer (RFC 5280 §6.1.3)."""
    try:
        client.certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def is_issued_by_der(client: ClientCertificate, issuer: bytes) -> bool:
    """Do the same as ``is_issued_by`` for a CA certificate in DER."""
    return is_issued_by(client, x509.load_der_x509_certificate(issuer))


def may_identify_a_client(client: ClientCertificate) -> bool:
    """Return whether the certificate is that of an end entity, and not limited to other purposes than TLS client.

    Factory certificates (IDevID) often name no purpose at all (IEEE 802.1AR §8.11).
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
    """Encode certificates (DER) as one PEM file."""
    return b"".join(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in certificates)


# --- Manufacturers' CAs --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ManufacturerCa:
    """The certificate of a manufacturer's CA: ``fingerprint`` is the SHA-256 of its DER, 64 lower-case hex digits."""

    der: bytes = field(repr=False)
    fingerprint: str
    not_after: datetime


def _read_pem(pem: str, failure: ManufacturerInvalid | ProofInvalid) -> x509.Certificate:
    if len(pem) > MAX_PEM_CHARACTERS or pem.count("-----BEGIN") != 1:
        raise failure
    with failing_as(failure):
        return x509.load_pem_x509_certificate(pem.encode("ascii"))


def read_manufacturer_ca(pem: str, *, now: datetime) -> ManufacturerCa:
    """Read the certificate of a CA that issues factory certificates (IDevID); it need not be a root.

    Raises ``ManufacturerInvalid`` if it is not that of a CA, is not valid now, or its key is not of an accepted kind.
    """
    certificate = _read_pem(pem, ManufacturerInvalid(f"The certificate cannot be read. {_ONE_PEM}"))
    try:
        check_public_key(certificate.public_key())
    except KeyRefused as error:
        raise ManufacturerInvalid(f"The CA's key is not accepted. {error.detail}") from error
    except ValueError as error:
        raise ManufacturerInvalid("The CA's key cannot be read.") from error
    with failing_as(ManufacturerInvalid("The CA's certificate has extensions that cannot be read.")):
        extensions = certificate.extensions
        constraints = [item.value for item in extensions if isinstance(item.value, x509.BasicConstraints)]
        usage = [item.value for item in extensions if isinstance(item.value, x509.KeyUsage)]
    if not constraints or not constraints[0].ca or (usage and not usage[0].key_cert_sign):
        raise ManufacturerInvalid("The certificate is not that of a CA; send the one that signs the devices' own.")
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        raise ManufacturerInvalid("The CA's certificate has expired or is not valid yet.")
    der = certificate.public_bytes(Encoding.DER)
    return ManufacturerCa(der, hashlib.sha256(der).hexdigest(), certificate.not_valid_after_utc)


def check_proof_by_certificate(ca_der: bytes, nonce: str, pem: str) -> None:
    """Raise ``ProofInvalid`` unless ``pem`` is a certificate, signed by the CA, whose common name is the nonce."""
    proof = _read_pem(pem, ProofInvalid(f"The proof cannot be read. {_ONE_PEM}"))
    failure = ProofInvalid("The proof is not a certificate that this CA has signed.")
    with failing_as(failure):
        names = [attribute.value for attribute in proof.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        proof.verify_directly_issued_by(x509.load_der_x509_certificate(ca_der))
    if names != [nonce]:
        raise ProofInvalid("The proof's common name is not the nonce; make a certificate whose common name it is.")


def check_proof_by_signature(ca_der: bytes, nonce: str, signature: str) -> None:
    """Raise ``ProofInvalid`` unless ``signature`` (Base64) is one of the nonce's text, in ASCII, by the CA's key.

    ECDSA or RSA (PKCS#1 v1.5) with SHA-256, as ``openssl dgst -sha256 -sign`` makes it, or Ed25519.
    """
    key = x509.load_der_x509_certificate(ca_der).public_key()
    message = nonce.encode("ascii")
    try:
        raw = base64.b64decode("".join(signature.split()), validate=True)
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(raw, message, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(raw, message, padding.PKCS1v15(), hashes.SHA256())
        elif isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(raw, message)
        else:
            raise ProofInvalid("The CA's key is of a kind that is not accepted.")
    except (ValueError, InvalidSignature) as error:
        raise ProofInvalid("The proof is not a signature of the nonce's text by this CA's key.") from error
