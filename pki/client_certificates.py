"""Read the certificates of TLS clients, and those of the manufacturers' CAs that devices bring certificates from."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pyasn1.codec.der import decoder
from pyasn1_modules import rfc5280

from core.errors import ClientCertificateRefused, KeyRefused, ManufacturerInvalid, PortalError, ProofInvalid
from pki import foreign
from pki.algorithms import check_public_key, public_key_fingerprint
from pki.encoding import failing_as, pem
from pki.foreign import ForeignCertificate, Name, texts_of
from pki.name_constraints import is_permitted
from pki.outer_chain import spki

MAX_CERTIFICATE_BYTES = 16 * 1024
MAX_PEM_CHARACTERS = 16 * 1024
MIN_KEY_IDENTIFIER = 16  # octets: shorter ones could be found for another key
_PEM = re.compile(r"-----BEGIN (?:X509 )?CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END", re.ASCII)
_ONE_PEM = "Send one certificate in PEM, BEGIN CERTIFICATE to END CERTIFICATE."
T = TypeVar("T", bound=x509.ExtensionType)
_SERIAL_NUMBER, _COMMON_NAME = "2.5.4.5", "2.5.4.3"


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """A client's certificate with its properties; its issuer has not been checked.

    ``fingerprint`` is the SHA-256 of its DER, ``key_fingerprint`` that of its SubjectPublicKeyInfo, both in hex.
    ``serial`` is the serialNumber of its subject (IEEE 802.1AR §8.6), else the common name, else empty.
    """

    certificate: ForeignCertificate = field(repr=False)
    fingerprint: str
    key_fingerprint: str
    serial: str
    not_before: datetime
    not_after: datetime


def common_name(certificate: x509.Certificate) -> str:
    """Return the common name of a certificate's subject, which is its identity on the broker; empty if it has none."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def read_client(der: bytes) -> ClientCertificate:
    """Read a client's certificate; raises ``ClientCertificateRefused``."""
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise ClientCertificateRefused(f"The client certificate is longer than {MAX_CERTIFICATE_BYTES} bytes.")
    certificate = _read(der, ClientCertificateRefused, "The client certificate")
    with failing_as(ClientCertificateRefused("The key in the client certificate cannot be read.")):
        key = check_public_key(certificate.strict.public_key())
    names = texts_of(certificate.subject, _SERIAL_NUMBER, _COMMON_NAME)
    return ClientCertificate(
        certificate=certificate,
        fingerprint=hashlib.sha256(der).hexdigest(),
        key_fingerprint=public_key_fingerprint(key),
        serial=names[0] if names else "",
        not_before=certificate.strict.not_valid_before_utc,
        not_after=certificate.strict.not_valid_after_utc,
    )


def _read(der: bytes, refusal: type[PortalError], what: str) -> ForeignCertificate:
    try:
        return foreign.read_certificate(der)
    except ValueError as error:
        raise refusal(f"{what} cannot be read: it {error}.") from error


def is_issued_by(certificate: ForeignCertificate, issuer_der: bytes) -> bool:
    """Return whether the CA has signed the certificate and has the name of its issuer (RFC 5280 §6.1.3)."""
    issuer = _authority(issuer_der)
    if certificate.issuer != issuer.subject:
        return False
    try:
        return foreign.is_signed_by(issuer.strict.public_key(), certificate.strict, certificate.content)
    except (ValueError, UnsupportedAlgorithm):
        return False


def subject_of(authority_der: bytes) -> Name:
    """Return the name of a CA, as ``is_issued_by`` compares it."""
    return foreign.read_certificate(authority_der).subject


def is_permitted_by(certificate: ForeignCertificate, issuer_der: bytes) -> bool:
    """Return whether the name constraints of the CA that signed a certificate permit its names (RFC 5280 §4.2.1.10).

    Where the portal ends TLS, OpenSSL has checked it already; a proxy passes certificates on without their chain.
    """
    return is_permitted(certificate, _authority(issuer_der))


@lru_cache(maxsize=256)
def _authority(der: bytes) -> ForeignCertificate:
    """Read the certificate of a CA that is known here, for each of its clients."""
    return foreign.read_certificate(der)


def may_identify_a_client(client: ClientCertificate) -> bool:
    """Return whether the certificate is that of an end entity, and not limited to other purposes than TLS client.

    Factory certificates (IDevID) often name no purpose at all (IEEE 802.1AR §8.11).
    """
    extensions = client.certificate.strict.extensions
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
    return "".join(pem("CERTIFICATE", der) for der in certificates).encode()


# --- Manufacturers' CAs --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ManufacturerCa:
    """The certificate of a manufacturer's CA: ``fingerprint`` is the SHA-256 of its DER, 64 lower-case hex digits."""

    der: bytes = field(repr=False)
    fingerprint: str
    not_after: datetime


def _read_pem(pem: str, refusal: type[PortalError], what: str) -> ForeignCertificate:
    """Read a certificate in PEM, with any text around the block (RFC 7468 §2)."""
    if len(pem) > MAX_PEM_CHARACTERS or pem.count("-----BEGIN") != 1:
        raise refusal(f"{what} cannot be read. {_ONE_PEM}")
    found = _PEM.search(pem)
    try:
        der = base64.b64decode("".join(found[1].split()), validate=True) if found else b""
    except ValueError:
        der = b""
    if not der:
        raise refusal(f"{what} cannot be read. {_ONE_PEM}")
    return _read(der, refusal, what)


def read_manufacturer_ca(pem: str, *, now: datetime) -> ManufacturerCa:
    """Read the certificate of a CA that issues factory certificates (IDevID); it need not be a root.

    Raises ``ManufacturerInvalid`` if it is not that of a CA, is not valid now, or its key is not of an accepted kind.
    """
    certificate = _read_pem(pem, ManufacturerInvalid, "The certificate")
    try:
        with failing_as(ManufacturerInvalid("The CA's key cannot be read, or is of an unknown kind.")):
            check_public_key(certificate.strict.public_key())
    except KeyRefused as error:
        raise ManufacturerInvalid(f"The CA's key is not accepted. {error.detail}") from error
    extensions = certificate.strict.extensions
    constraints = [item.value for item in extensions if isinstance(item.value, x509.BasicConstraints)]
    usage = [item.value for item in extensions if isinstance(item.value, x509.KeyUsage)]
    if not constraints or not constraints[0].ca or (usage and not usage[0].key_cert_sign):
        raise ManufacturerInvalid("The certificate is not that of a CA; send the one that signs the devices' own.")
    not_after = certificate.strict.not_valid_after_utc
    if not certificate.strict.not_valid_before_utc <= now < not_after:
        raise ManufacturerInvalid("The CA's certificate has expired or is not valid yet.")
    return ManufacturerCa(certificate.der, hashlib.sha256(certificate.der).hexdigest(), not_after)


def may_be_confused(one: bytes, other: bytes) -> bool:
    """Return whether OpenSSL may take one CA (DER) for the other, and then refuse the clients of one of them.

    It finds the issuer of a certificate by name and by key identifier where both have one, and tries no second one.
    Names are compared as it does: without regard to case and to repeated white space.
    """
    first, second = _authority(one), _authority(other)
    if _folded(first.subject) != _folded(second.subject) or first.strict.public_key() == second.strict.public_key():
        return False
    identifiers = [_value(each.strict.extensions, x509.SubjectKeyIdentifier) for each in (first, second)]
    return None in identifiers or identifiers[0] == identifiers[1]


def has_identifier_of_its_key(der: bytes) -> bool:
    """Return whether a CA's certificate (DER) has a subjectKeyIdentifier that no CA with another key could have.

    That is a hash of its key as in RFC 5280 section 4.2.1.2 (1) or RFC 7093 section 2, of at least 16 octets.
    """
    certificate = _authority(der).strict
    identifier = _value(certificate.extensions, x509.SubjectKeyIdentifier)
    if identifier is None or len(identifier.digest) < MIN_KEY_IDENTIFIER:
        return False
    info = spki(certificate.public_key())
    with failing_as(ManufacturerInvalid("The CA's key cannot be read, or is of an unknown kind.")):
        bits = decoder.decode(info, asn1Spec=rfc5280.SubjectPublicKeyInfo())[0]["subjectPublicKey"].asOctets()
    return any(
        hashlib.new(name, content).digest().startswith(identifier.digest)
        for name in ("sha1", "sha256", "sha384", "sha512")
        for content in (bits, info)
    )


def renewal_problem(renewed: bytes, before: bytes) -> str | None:
    """Return why a certificate (DER) is not a renewed one of the same CA, for its devices' sake, as a clause."""
    new, old = _authority(renewed), _authority(before)
    if new.strict.public_key() != old.strict.public_key():
        return "its key is another"
    if _folded(new.subject) != _folded(old.subject):
        return "its subject is another"
    identifiers = [_value(each.strict.extensions, x509.SubjectKeyIdentifier) for each in (new, old)]
    if identifiers[0] is not None and identifiers[0] != identifiers[1]:
        return "its subjectKeyIdentifier is another, so TLS would refuse devices whose certificates name the CA's"
    return None


def _folded(name: Name) -> list[list[tuple[str, str]]]:
    return [sorted((oid, " ".join(text.split()).casefold()) for oid, text in rdn) for rdn in name]


def key_fingerprint_of_ca(der: bytes) -> str:
    """Return the SHA-256 of a CA's SubjectPublicKeyInfo in hex, which stays when its certificate is renewed."""
    return public_key_fingerprint(check_public_key(_authority(der).strict.public_key()))


def check_proof_by_certificate(ca_der: bytes, nonce: str, pem: str) -> None:
    """Raise ``ProofInvalid`` unless ``pem`` is a certificate, signed by the CA, whose common name is the nonce."""
    proof = _read_pem(pem, ProofInvalid, "The proof")
    names = texts_of(proof.subject, _COMMON_NAME)
    if not is_issued_by(proof, ca_der):
        raise ProofInvalid("The proof is not a certificate that this CA has signed.")
    if names != [nonce]:
        raise ProofInvalid("The proof's common name is not the nonce; make a certificate whose common name it is.")


def check_proof_by_signature(ca_der: bytes, nonce: str, signature: str) -> None:
    """Raise ``ProofInvalid`` unless ``signature`` (Base64) is one of the nonce's text, in ASCII, by the CA's key.

    ECDSA or RSA (PKCS#1 v1.5) with SHA-256, as ``openssl dgst -sha256 -sign`` makes it, or Ed25519.
    """
    key = _authority(ca_der).strict.public_key()
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
