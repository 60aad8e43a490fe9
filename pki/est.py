"""Read the requests of Enrolment over Secure Transport (EST, RFC 7030), and encode the responses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, pkcs7
from pyasn1.codec.der import encoder
from pyasn1.type import univ
from pyasn1_modules import rfc5280

from core.errors import CsrInvalid
from pki.algorithms import (
    PrivateKey,
    certificate_key_fingerprint,
    check_public_key,
    key_type_of,
)
from pki.csr import MAX_CSR_CHARACTERS, Csr, checked, csr_der, load_csr
from pki.encoding import pem
from pki.foreign import ForeignCsr, Name, read_alternative_names, read_name, texts_of

# Attributes by which a client asks for its key to be encrypted (RFC 7030 §4.4.1.1, RFC 4108 §2.2.5).
_ENCRYPTED_KEY = frozenset({"1.2.840.113549.1.9.16.2.37", "1.2.840.113549.1.9.16.2.54"})
_CHANGE_SUBJECT_NAME = "1.3.6.1.5.5.7.7.36"  # RFC 6402 §2.8
_SERIAL_NUMBER, _COMMON_NAME = "2.5.4.5", "2.5.4.3"


@dataclass(frozen=True, slots=True)
class EnrolmentRequest:
    """A request to enrol or to re-enrol. ``key_fingerprint`` is the SHA-256 of the key's SubjectPublicKeyInfo, in hex.

    ``csr`` is None if the portal is to make the key: then neither signature nor kind of key was checked, and the
    fingerprint only tells one request from another (RFC 7030 §4.4.1).
    """

    csr: Csr | None
    key_fingerprint: str
    subject: Name
    alternative_names: tuple[tuple[bytes, ...], ...]  # the names in DER, once for each time that they are requested
    attributes: frozenset[str]  # dotted OIDs

    @property
    def name(self) -> str:
        """Return the serialNumber of the subject, else its common name, else an empty text."""
        return next(iter(texts_of(self.subject, _SERIAL_NUMBER, _COMMON_NAME)), "")


def read_enrolment_request(body: bytes) -> EnrolmentRequest:
    """Read the body of an EST request: a PKCS#10 request, Base64 with or without white space (RFC 8951 §3.1).

    DER and PEM are accepted, too. Raises ``CsrInvalid``, ``KeyRefused``.
    """
    der = _der(body)
    csr = load_csr(der)
    own = checked(csr, pem("CERTIFICATE REQUEST", der))
    return _request(csr, own, own.key_fingerprint)


def read_key_request(body: bytes) -> EnrolmentRequest:
    """Read a request for a key that the portal makes: neither its key nor its signature counts (RFC 7030 §4.4.1).

    Raises ``CsrInvalid``, also if it asks for the key to be encrypted beyond TLS.
    """
    csr = load_csr(_der(body))
    request = _request(csr, None, hashlib.sha256(csr.public_key).hexdigest())
    if not request.attributes.isdisjoint(_ENCRYPTED_KEY):
        raise CsrInvalid(
            "The portal protects a key that it makes by TLS only, and does not encrypt it further; leave out"
            " DecryptKeyIdentifier and AsymmetricDecryptKeyIdentifier, or make the key on the device (simpleenroll)."
        )
    return request


def _request(csr: ForeignCsr, own: Csr | None, fingerprint: str) -> EnrolmentRequest:
    return EnrolmentRequest(own, fingerprint, csr.subject, csr.alternative_names, csr.attributes)


def _der(body: bytes) -> bytes:
    if len(body) > 2 * MAX_CSR_CHARACTERS:
        raise CsrInvalid(f"The request is longer than {2 * MAX_CSR_CHARACTERS} bytes; send one PKCS#10 request.")
    return csr_der(body)


def key_type_of_certificate(der: bytes) -> str:
    """Name the kind of the key in a certificate of this CA (DER)."""
    return key_type_of(check_public_key(x509.load_der_x509_certificate(der).public_key()))


def is_for_key(der: bytes, key_fingerprint: str) -> bool:
    """Return whether a certificate of this CA (DER) is for the key with this fingerprint."""
    return certificate_key_fingerprint(der) == key_fingerprint


def check_same_names(request: EnrolmentRequest, certificate_der: bytes) -> None:
    """Raise ``CsrInvalid`` if a request has other names than the certificate to be renewed (RFC 7030 §4.2.2).

    A request may lack the alternative names, since some clients cannot set them.
    """
    certificate = x509.load_der_x509_certificate(certificate_der)
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    names = read_alternative_names(extension.public_bytes())
    same = request.subject == read_name(certificate.subject.public_bytes())
    same = same and all(requested == names for requested in request.alternative_names)
    if not same or _CHANGE_SUBJECT_NAME in request.attributes:
        raise CsrInvalid(
            "The CSR names another subject than the certificate that is to be renewed; use the same subject and names."
        )


# --- Responses ------------------------------------------------------------------------------------------------------


def certs_only(certificates: Sequence[bytes]) -> bytes:
    """Encode certificates (DER) as a certs-only PKCS#7 message in DER (RFC 5272 §4.1)."""
    return pkcs7.serialize_certificates([x509.load_der_x509_certificate(der) for der in certificates], Encoding.DER)


def pkcs8(key: PrivateKey) -> bytes:
    """Encode a private key as unencrypted PKCS#8 DER, for the TLS connection to the device that asked for it."""
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def csr_attributes(key_types: Iterable[str]) -> bytes:
    """Ask for the kind of key that a CSR is to have, the first of ``key_types``: CsrAttrs in DER (RFC 8951 §3.2)."""
    return _CSR_ATTRIBUTES[next(iter(key_types))]


def _key_attribute(key: str, value: univ.Integer | univ.ObjectIdentifier) -> rfc5280.Attribute:
    attribute = rfc5280.Attribute()
    attribute["type"] = key
    attribute["values"][0] = encoder.encode(value)
    return attribute


def _encoded(*attributes: rfc5280.Attribute | univ.ObjectIdentifier) -> bytes:
    items = univ.SequenceOf(componentType=univ.Any())
    items.extend(encoder.encode(attribute) for attribute in attributes)
    return bytes(encoder.encode(items))


_EC, _RSA = "1.2.840.10045.2.1", "1.2.840.113549.1.1.1"
_SHA256_WITH_RSA = univ.ObjectIdentifier("1.2.840.113549.1.1.11")
# The kind of key, with the algorithm that it signs with (RFC 7030 §4.5.2; RFC 5480, 8410, 4055).
_CSR_ATTRIBUTES = {
    "ec-p256": _encoded(
        _key_attribute(_EC, univ.ObjectIdentifier("1.2.840.10045.3.1.7")), univ.ObjectIdentifier("1.2.840.10045.4.3.2")
    ),
    "ec-p384": _encoded(
        _key_attribute(_EC, univ.ObjectIdentifier("1.3.132.0.34")), univ.ObjectIdentifier("1.2.840.10045.4.3.3")
    ),
    "ed25519": _encoded(univ.ObjectIdentifier("1.3.101.112")),
    "rsa-2048": _encoded(_key_attribute(_RSA, univ.Integer(2048)), _SHA256_WITH_RSA),
    "rsa-3072": _encoded(_key_attribute(_RSA, univ.Integer(3072)), _SHA256_WITH_RSA),
    "rsa-4096": _encoded(_key_attribute(_RSA, univ.Integer(4096)), _SHA256_WITH_RSA),
}
