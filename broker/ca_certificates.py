"""Reads the CA certificates that the broker trusts: each is parsed once, and each CA verified under its issuer once.

There can be a thousand, one for each tenant, and whoever adds one more must not pay for all that are there. What is
remembered is bounded, and goes by the certificates' content.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from core.errors import ProjectionInvalid

MAX_REMEMBERED = 1 << 15  # more than the CAs that the guard takes
_BUNDLES = 4  # files that are remembered as a whole: each is looked at several times
_BEGIN, _END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
_MALFORMED = "The file of CA certificates is malformed."
_NO_CA = "The file of CA certificates contains something other than CA certificates."


@dataclass(frozen=True, slots=True)
class CaCertificate:
    """A CA certificate, known by the SHA-256 of its DER; ``subject`` and ``issuer`` are equal for equal names."""

    fingerprint: bytes
    certificate: x509.Certificate = field(compare=False, repr=False)
    pem: bytes = field(compare=False, repr=False)
    subject: str = field(compare=False)
    issuer: str = field(compare=False)

    @property
    def names_itself(self) -> bool:
        """Whether it is a root, or says that it is one."""
        return self.subject == self.issuer


@functools.lru_cache(maxsize=_BUNDLES)
def read_cas(ca_bundle: bytes) -> Sequence[CaCertificate]:
    """Return the certificates of a file (PEM), in its order.

    Raise ``ProjectionInvalid`` if it is malformed, or contains anything but CA certificates.
    """
    *blocks, rest = ca_bundle.split(_END)
    if _BEGIN in rest or not all(_BEGIN in block for block in blocks):
        raise ProjectionInvalid(_MALFORMED)
    if ca_bundle.count(b"-----BEGIN ") != len(blocks):
        raise ProjectionInvalid(_NO_CA)
    return tuple(_read(block[block.index(_BEGIN) :]) for block in blocks)


@functools.lru_cache(maxsize=MAX_REMEMBERED)
def _read(beginning: bytes) -> CaCertificate:
    """Read a certificate from its PEM without the last line."""
    try:
        certificate = x509.load_pem_x509_certificate(beginning + _END)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise ProjectionInvalid(_MALFORMED) from error
    if not constraints.ca:
        raise ProjectionInvalid(_NO_CA)
    return ca_certificate(certificate)


def ca_certificate(certificate: x509.Certificate) -> CaCertificate:
    """Return a CA certificate that was parsed already."""
    return CaCertificate(
        hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest(),
        certificate,
        certificate.public_bytes(Encoding.PEM),
        name_key(certificate.subject),
        name_key(certificate.issuer),
    )


def name_key(name: x509.Name) -> str:
    """Return what is equal for equal names; unlike a name itself, a dictionary finds it quickly."""
    return repr([sorted(repr((one.oid.dotted_string, one.value)) for one in relative) for relative in name.rdns])


@functools.lru_cache(maxsize=_BUNDLES)
def issuing_cas(ca_bundle: bytes) -> Sequence[CaCertificate]:
    """Return the issuing CAs of a file (PEM): those with no CA below them there; a root alone is one.

    Only their certificates may be shown by clients: of the CAs above them, which may be a company's, there is no CRL.
    Raise ``ProjectionInvalid`` as ``read_cas`` does, or if the issuer of a CA is not in the file.
    """
    cas = read_cas(ca_bundle)
    named, above = by_subject(cas), set[bytes]()
    for one in cas:
        issuers = [other for other in named.get(one.issuer, ()) if is_issued_by(one, other)]
        if not issuers:
            raise ProjectionInvalid(
                f"The issuer of the CA {one.certificate.subject.rfc4514_string()} is not in the file."
            )
        above.update(other.fingerprint for other in issuers if other != one)
    return tuple(one for one in cas if one.fingerprint not in above)


def by_subject(cas: Iterable[CaCertificate]) -> dict[str, list[CaCertificate]]:
    """Return the CAs by their names; several may have one."""
    named: dict[str, list[CaCertificate]] = {}
    for one in cas:
        named.setdefault(one.subject, []).append(one)
    return named


@functools.lru_cache(maxsize=MAX_REMEMBERED)
def is_issued_by(certificate: CaCertificate, issuer: CaCertificate) -> bool:
    """Return whether a CA has signed the certificate of another one, or its own; the signature is verified once."""
    try:
        certificate.certificate.verify_directly_issued_by(issuer.certificate)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
