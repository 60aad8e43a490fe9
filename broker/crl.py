"""Checks the CRLs and CA certificates that the broker verifies devices with."""

from __future__ import annotations

import binascii
import hashlib
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes

from core.errors import ProjectionInvalid
from pki.crl import VerifyingKey, is_signed_by

_PEM_CRL = re.compile(rb"-----BEGIN X509 CRL-----\r?\n([A-Za-z0-9+/=\r\n]+)-----END X509 CRL-----\s*")


class ReadCrl(NamedTuple):
    """A CRL of a file, with its DER, and its PEM as it is in the file."""

    crl: x509.CertificateRevocationList
    der: bytes
    pem: bytes


@dataclass(frozen=True, slots=True)
class Trust:
    """What the broker verifies clients with: CRLs of the issuing CAs and the CA certificates, each in PEM.

    ``tenants`` has, of each issuing CA that is not the first tenant's, the SHA-256 of its certificate (DER, in hex)
    with the name of its tenant.
    """

    crl: bytes
    ca: bytes
    tenants: Mapping[str, str] = field(default_factory=dict)


NO_TENANTS: Mapping[str, str] = MappingProxyType({})  # all CAs are the first tenant's


@dataclass(frozen=True, slots=True)
class CrlWindow:
    """The time in which every CRL of a file is current: ``this_update`` (included) to ``next_update`` (excluded)."""

    this_update: datetime
    next_update: datetime

    def problem(self, now: datetime) -> str | None:
        """Return what is wrong with the CRLs at ``now``, as the end of a sentence, or ``None``."""
        if now < self.this_update:
            return f"is not valid before {self.this_update.isoformat()}"
        if now >= self.next_update:
            return f"expired at {self.next_update.isoformat()}"
        return None


def validate_crl(
    pem_bundle: bytes, issuers: Sequence[x509.Certificate], now: datetime, verified: set[bytes] | None = None
) -> CrlWindow:
    """Check a file of CRLs (PEM, RFC 5280 section 5) as strictly as the broker needs it; return when it is current.

    It must contain exactly one CRL of each certificate in ``issuers``, and no other, each a full CRL signed with that
    issuer's key, with thisUpdate <= ``now`` < nextUpdate. Otherwise raise ``ProjectionInvalid``: with such a file the
    broker would accept revoked certificates, or refuse every device. ``verified`` names CRLs with CAs whose signatures
    were verified before, which need not be again; those of this file take their place.
    """
    if not issuers:
        raise ProjectionInvalid("There is no issuing CA to check a CRL with.")
    named, good, windows = _by_subject(issuers), set[bytes](), []
    for crl, der, _ in read_crls(pem_bundle):
        issuer = _issuer_of(crl, der, named.get(crl.issuer, []), verified or (), good)
        if issuer is None:
            raise ProjectionInvalid(
                "A CRL is not signed by one of the issuing CAs, or an issuing CA has two of them in the file."
            )
        named[issuer.subject].remove(issuer)
        if any(extension.critical for extension in _extensions(crl)):
            raise ProjectionInvalid("A CRL has a critical extension: the broker needs full CRLs without any.")
        window = _window([crl])
        if problem := window.problem(now):
            raise ProjectionInvalid(f"The CRL of {issuer.subject.rfc4514_string()} {problem}.")
        windows.append(window)
    for without in (one for each in named.values() for one in each):
        raise ProjectionInvalid(f"There is no CRL of {without.subject.rfc4514_string()} in the file.")
    if verified is not None:
        verified.clear()
        verified |= good
    return CrlWindow(max(one.this_update for one in windows), min(one.next_update for one in windows))


def read_window(pem_bundle: bytes) -> CrlWindow:
    """Return when the CRLs of a file are current; raise ``ProjectionInvalid`` if it is not a file of CRLs."""
    return _window([read.crl for read in read_crls(pem_bundle)])


def issuing_certificates(ca_bundle: bytes) -> list[x509.Certificate]:
    """Return the issuing CAs of a bundle (PEM): those with no CA below them there; a root alone is one.

    Only their certificates may be shown by clients: of the CAs above them, which may be a company's, there is no CRL.
    Raise ``ProjectionInvalid`` if the bundle is malformed, contains a certificate that is not a CA, or lacks an issuer.
    """
    try:
        certificates = x509.load_pem_x509_certificates(ca_bundle)
        constraints = [one.extensions.get_extension_for_class(x509.BasicConstraints).value for one in certificates]
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise ProjectionInvalid("The file of CA certificates is malformed.") from error
    if ca_bundle.count(b"-----BEGIN ") != len(certificates) or not all(one.ca for one in constraints):
        raise ProjectionInvalid("The file of CA certificates contains something other than CA certificates.")
    named = _by_subject(certificates)
    above: set[x509.Certificate] = set()
    for certificate in certificates:
        issuers = [one for one in named.get(certificate.issuer, ()) if _is_issued_by(certificate, one)]
        if not issuers:
            raise ProjectionInvalid(f"The issuer of the CA {certificate.subject.rfc4514_string()} is not in the file.")
        above.update(one for one in issuers if one != certificate)
    return [one for one in certificates if one not in above]


def _by_subject(certificates: Iterable[x509.Certificate]) -> dict[x509.Name, list[x509.Certificate]]:
    named: dict[x509.Name, list[x509.Certificate]] = {}
    for certificate in certificates:
        named.setdefault(certificate.subject, []).append(certificate)
    return named


def read_crls(pem_bundle: bytes) -> list[ReadCrl]:
    """Return the CRLs of a file, unchecked; raise ``ProjectionInvalid`` if it is not a file of CRLs."""
    crls = []
    position = 0
    while position < len(pem_bundle):
        # Block by block with nothing between: a damaged block must not go unnoticed beside a good one.
        block = _PEM_CRL.match(pem_bundle, position)
        if block is None:
            raise ProjectionInvalid("The file of CRLs is malformed or truncated.")
        try:
            der = binascii.a2b_base64(block[1].translate(None, b"\r\n"), strict_mode=True)
            crls.append(ReadCrl(x509.load_der_x509_crl(der), der, block[0]))
        except ValueError as error:
            raise ProjectionInvalid("The file of CRLs contains a block that is not a CRL.") from error
        position = block.end()
    if not crls:
        raise ProjectionInvalid("The file of CRLs is empty.")
    return crls


def _window(crls: Sequence[x509.CertificateRevocationList]) -> CrlWindow:
    ends = [crl.next_update_utc for crl in crls]
    if None in ends:
        raise ProjectionInvalid("A CRL has no nextUpdate.")
    return CrlWindow(
        max(crl.last_update_utc for crl in crls), min(end or datetime.min.replace(tzinfo=UTC) for end in ends)
    )


def _issuer_of(
    crl: x509.CertificateRevocationList,
    der: bytes,
    candidates: Sequence[x509.Certificate],
    verified: Container[bytes],
    good: set[bytes],
) -> x509.Certificate | None:
    """Return the candidate that signed a CRL, and add what names the two to ``good``."""
    for candidate in candidates:
        both = hashlib.sha256(candidate.fingerprint(hashes.SHA256()) + der).digest()
        if both in verified or _is_signed_by(crl, der, _issuer_key(candidate)):
            good.add(both)
            return candidate
    return None


def _is_signed_by(crl: x509.CertificateRevocationList, der: bytes, key: VerifyingKey) -> bool:
    try:
        return is_signed_by(crl, der, key)
    except (ValueError, TypeError, IndexError, UnsupportedAlgorithm) as error:
        raise ProjectionInvalid("A CRL has a signature of a kind that cannot be checked.") from error


def _issuer_key(certificate: x509.Certificate) -> VerifyingKey:
    key = certificate.public_key()
    if not isinstance(key, VerifyingKey):
        raise ProjectionInvalid("A CA has a key of a kind that does not sign CRLs.")
    return key


def _extensions(crl: x509.CertificateRevocationList) -> x509.Extensions:
    try:
        return crl.extensions
    except (ValueError, x509.DuplicateExtension) as error:
        raise ProjectionInvalid("A CRL has malformed extensions.") from error


def _is_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
