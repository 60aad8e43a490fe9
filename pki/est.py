"""Read the requests of Enrolment over Secure Transport (EST, RFC 7030), and encode the responses."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, pkcs7
from cryptography.x509.oid import NameOID
from pyasn1.codec.der import encoder
from pyasn1.type import univ
from pyasn1_modules import rfc5280

from core.errors import CsrInvalid
from pki.algorithms import PrivateKey, check_public_key, key_type_of, public_key_fingerprint
from pki.csr import MAX_CSR_CHARACTERS, Csr, der_of, load_csr, read_csr_der
from pki.encoding import failing_as

# Attributes by which a client asks for its key to be encrypted (RFC 7030 §4.4.1.1, RFC 4108 §2.2.5).
_ENCRYPTED_KEY = frozenset({"1.2.840.113549.1.9.16.2.37", "1.2.840.113549.1.9.16.2.54"})
_CHANGE_SUBJECT_NAME = "1.3.6.1.5.5.7.7.36"  # RFC 6402 §2.8
_WHITE_SPACE = re.compile(rb"[ \t\r\n]+")
_SEQUENCE = b"\x30"  # the first byte of DER, and never of its Base64


@dataclass(frozen=True, slots=True)
class EnrolmentRequest:
    """A request to enrol or to re-enrol. ``key_fingerprint`` is the SHA-256 of the key's SubjectPublicKeyInfo, in hex.

    ``csr`` is None if the portal is to make the key: then neither signature nor kind of key was checked, and the
    fingerprint only tells one request from another (RFC 7030 §4.4.1).
    """

    csr: Csr | None
    key_fingerprint: str
    subject: x509.Name
    alternative_names: x509.SubjectAlternativeName | None
    attributes: frozenset[str]  # dotted OIDs

    @property
    def name(self) -> str:
        """Return the serialNumber of the subject, else its common name, else an empty text."""
        for oid in (NameOID.SERIAL_NUMBER, NameOID.COMMON_NAME):
            for attribute in self.subject.get_attributes_for_oid(oid):
                if isinstance(attribute.value, str):
                    return attribute.value
        return ""


def read_enrolment_request(body: bytes) -> EnrolmentRequest:
    """Read the body of an EST request: a PKCS#10 request, Base64 with or without white space (RFC 8951 §3.1).

    DER and PEM are accepted, too. Raises ``CsrInvalid``, ``KeyRefused``.
    """
    csr, key = read_csr_der(_der(body))
    checked = Csr(csr.public_bytes(Encoding.PEM).decode(), key)
    return _request(csr, checked, checked.key_fingerprint)


def read_key_request(body: bytes) -> EnrolmentRequest:
    """Read a request for a key that the portal makes: neither its key nor its signature counts (RFC 7030 §4.4.1).

    Raises ``CsrInvalid``, also if it asks for the key to be encrypted beyond TLS.
    """
    csr = load_csr(_der(body))
    with failing_as(CsrInvalid("The public key in the CSR cannot be read. Use any key; it will not be certified.")):
        key = csr.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    request = _request(csr, None, hashlib.sha256(key).hexdigest())
    if not request.attributes.isdisjoint(_ENCRYPTED_KEY):
        raise CsrInvalid(
            "The portal protects a key that it makes by TLS only, and does not encrypt it further; leave out"
            " DecryptKeyIdentifier and AsymmetricDecryptKeyIdentifier, or make the key on the device (simpleenroll)."
        )
    return request


def _request(csr: x509.CertificateSigningRequest, checked: Csr | None, fingerprint: str) -> EnrolmentRequest:
    with failing_as(CsrInvalid("The CSR is damaged: its subject, extensions or attributes cannot be read.")):
        subject = csr.subject
        attributes = frozenset(attribute.oid.dotted_string for attribute in csr.attributes)
        try:
            names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            names = None
    return EnrolmentRequest(checked, fingerprint, subject, names, attributes)


def _der(body: bytes) -> bytes:
    if len(body) > 2 * MAX_CSR_CHARACTERS:
        raise CsrInvalid(f"The request is longer than {2 * MAX_CSR_CHARACTERS} bytes; send one PKCS#10 request.")
    if body[:1] == _SEQUENCE:
        return body
    if body.lstrip().startswith(b"-----BEGIN"):
        with failing_as(CsrInvalid("The CSR's PEM block is damaged.")):
            return der_of(body.decode("ascii"))
    text = _WHITE_SPACE.sub(b"", body)
    if not text:
        raise CsrInvalid("The request is empty; send a PKCS#10 request in Base64.")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise CsrInvalid("The request is not valid Base64; send a PKCS#10 request in Base64.") from error


def key_type_of_certificate(der: bytes) -> str:
    """Name the kind of the key in a certificate of this CA (DER)."""
    return key_type_of(check_public_key(x509.load_der_x509_certificate(der).public_key()))


def is_for_key(der: bytes, key_fingerprint: str) -> bool:
    """Return whether a certificate of this CA (DER) is for the key with this fingerprint."""
    key = check_public_key(x509.load_der_x509_certificate(der).public_key())
    return public_key_fingerprint(key) == key_fingerprint


def check_same_names(request: EnrolmentRequest, certificate_der: bytes) -> None:
    """Raise ``CsrInvalid`` if a request has other names than the certificate to be renewed (RFC 7030 §4.2.2).

    A request may lack the alternative names, since some clients cannot set them.
    """
    certificate = x509.load_der_x509_certificate(certificate_der)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    same = request.subject == certificate.subject and request.alternative_names in (None, names)
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
}
