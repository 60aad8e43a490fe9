"""Checks the CRLs and CA certificates that the broker verifies devices with."""

from __future__ import annotations

import binascii
import hashlib
import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from broker.ca_certificates import CaCertificate, by_subject, name_key
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
            return f"is not valid before {self.this_update:%Y-%m-%d %H:%M:%S} UTC"
        if now >= self.next_update:
            return f"expired at {self.next_update:%Y-%m-%d %H:%M:%S} UTC"
        return None


@dataclass(frozen=True, slots=True)
class CheckedCrl:
    """A CRL whose signature was verified with the key of ``issuer``, and when it is current."""

    issuer: CaCertificate
    window: CrlWindow


def validate_crl(
    pem_bundle: bytes,
    issuers: Sequence[CaCertificate],
    now: datetime,
    verified: MutableMapping[bytes, CheckedCrl] | None = None,
) -> CrlWindow:
    """Check a file of CRLs (PEM, RFC 5280 section 5) as strictly as the broker needs it; return when it is current.

    It must contain exactly one CRL of each certificate in ``issuers``, and no other, each a full CRL signed with that
    issuer's key, with thisUpdate <= ``now`` < nextUpdate. Otherwise raise ``ProjectionInvalid``: with such a file the
    broker would accept revoked certificates, or refuse every device. ``verified`` has, by the SHA-256 of their PEM,
    CRLs that were checked before, which need not be parsed and verified again; those of this file take their place.
    """
    if not issuers:
        raise ProjectionInvalid("There is no issuing CA to check a CRL with.")
    left, named = {one.fingerprint: one for one in issuers}, by_subject(issuers)
    good = dict[bytes, CheckedCrl]()
    for block in split_crls(pem_bundle):
        digest = hashlib.sha256(block).digest()
        checked = None if verified is None else verified.get(digest)
        if checked is None or checked.issuer.fingerprint not in left:
            read = read_crl(block)
            named_so = named.get(name_key(read.crl.issuer), ())
            checked = _check(read, [one for one in named_so if one.fingerprint in left])
        del left[checked.issuer.fingerprint]
        if problem := checked.window.problem(now):
            raise ProjectionInvalid(f"The CRL of {_called(checked.issuer)} {problem}.")
        good[digest] = checked
    for without in left.values():
        raise ProjectionInvalid(f"There is no CRL of {_called(without)} in the file.")
    if verified is not None:
        verified.clear()
        verified.update(good)
    return _shared(one.window for one in good.values())


def _check(read: ReadCrl, candidates: Sequence[CaCertificate]) -> CheckedCrl:
    for candidate in candidates:
        if _is_signed_by(read.crl, read.der, _issuer_key(candidate.certificate)):
            if any(extension.critical for extension in _extensions(read.crl)):
                raise ProjectionInvalid("A CRL has a critical extension: the broker needs full CRLs without any.")
            return CheckedCrl(candidate, _window(read.crl))
    raise ProjectionInvalid(
        "A CRL is not signed by one of the issuing CAs, or an issuing CA has two of them in the file."
    )


def _called(issuer: CaCertificate) -> str:
    return issuer.certificate.subject.rfc4514_string()


def read_window(pem_bundle: bytes, known: MutableMapping[bytes, CrlWindow] | None = None) -> CrlWindow:
    """Return when the CRLs of a file are current; raise ``ProjectionInvalid`` if it is not a file of CRLs.

    ``known`` has the windows of CRLs that were read before, by the SHA-256 of their PEM; those of this file take their
    place.
    """
    found = dict[bytes, CrlWindow]()
    for block in split_crls(pem_bundle):
        digest = hashlib.sha256(block).digest()
        seen = None if known is None else known.get(digest)
        found[digest] = _window(read_crl(block).crl) if seen is None else seen
    if known is not None:
        known.clear()
        known.update(found)
    return _shared(found.values())


def split_crls(pem_bundle: bytes) -> list[bytes]:
    """Return each CRL of a file as it is there, PEM; raise ``ProjectionInvalid`` if it is not a file of CRLs."""
    blocks = []
    position = 0
    while position < len(pem_bundle):
        # Block by block with nothing between: a damaged block must not go unnoticed beside a good one.
        block = _PEM_CRL.match(pem_bundle, position)
        if block is None:
            raise ProjectionInvalid("The file of CRLs is malformed or truncated.")
        blocks.append(block[0])
        position = block.end()
    if not blocks:
        raise ProjectionInvalid("The file of CRLs is empty.")
    return blocks


def read_crl(block: bytes) -> ReadCrl:
    """Return a CRL from its PEM, unchecked; raise ``ProjectionInvalid`` if it is none."""
    before, *between, after = block.split(b"-----")
    if before or len(between) != 3 or (between[0], between[2]) != (b"BEGIN X509 CRL", b"END X509 CRL") or after.strip():
        raise ProjectionInvalid("The file of CRLs is malformed or truncated.")
    try:
        der = binascii.a2b_base64(between[1].translate(None, b"\r\n"), strict_mode=True)
        return ReadCrl(x509.load_der_x509_crl(der), der, block)
    except ValueError as error:
        raise ProjectionInvalid("The file of CRLs contains a block that is not a CRL.") from error


def read_crls(pem_bundle: bytes) -> list[ReadCrl]:
    """Return the CRLs of a file, unchecked; raise ``ProjectionInvalid`` if it is not a file of CRLs."""
    return [read_crl(block) for block in split_crls(pem_bundle)]


def _window(crl: x509.CertificateRevocationList) -> CrlWindow:
    if crl.next_update_utc is None:
        raise ProjectionInvalid("A CRL has no nextUpdate.")
    return CrlWindow(crl.last_update_utc, crl.next_update_utc)


def _shared(windows: Iterable[CrlWindow]) -> CrlWindow:
    each = list(windows)
    return CrlWindow(max(one.this_update for one in each), min(one.next_update for one in each))


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
