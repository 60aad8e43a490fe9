"""The certificate authority: the only room that signs."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from ca_algorithms import (
    KeyType,
    PrivateKey,
    PublicKey,
    check_public_key,
    generate_keypair,
    private_key_pem,
    public_key_der,
    public_key_fingerprint,
    signature_hash,
)
from ca_profiles import (
    Extension,
    Profile,
    device_profile,
    extension,
    issuing_profile,
    locations,
    responder_profile,
    root_profile,
    server_profile,
)
from ca_requests import read_csr
from errors import CaKeyUnavailable, IssuerUnusable, KeyRefused, SignatureCheckFailed

__all__ = [
    "Issued",
    "Issuer",
    "KeyType",
    "PrivateKey",
    "PublicKey",
    "Reason",
    "chain_pem",
    "create_issuing",
    "create_root",
    "generate_keypair",
    "private_key_pem",
    "public_key_fingerprint",
    "read_csr",
    "revoke_certificate",
    "sign_certificate",
    "sign_crl",
    "sign_responder_certificate",
    "sign_server_certificate",
]

BACKDATING = timedelta(minutes=5)  # for devices whose clocks run behind

_ISSUER_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SERIAL_NUMBER = re.compile(r"[0-9a-f]{1,40}")
_SERIAL_BITS = 159  # with the sign bit, 20 bytes: the most that RFC 5280 §4.1.2.2 allows


class Reason(StrEnum):
    """Why a certificate was revoked (RFC 5280 §5.3.1); removeFromCRL belongs to delta CRLs only."""

    UNSPECIFIED = "unspecified"
    KEY_COMPROMISE = "key_compromise"
    CA_COMPROMISE = "ca_compromise"
    AFFILIATION_CHANGED = "affiliation_changed"
    SUPERSEDED = "superseded"
    CESSATION_OF_OPERATION = "cessation_of_operation"
    CERTIFICATE_HOLD = "certificate_hold"
    PRIVILEGE_WITHDRAWN = "privilege_withdrawn"
    AA_COMPROMISE = "aa_compromise"


# "Unspecified" is said by leaving the extension out (RFC 5280 §5.3.1).
_REASON_EXTENSIONS: dict[Reason, list[Extension]] = {
    reason: [] if reason is Reason.UNSPECIFIED else [extension(x509.CRLReason(x509.ReasonFlags[reason.value]))]
    for reason in Reason
}


@dataclass(frozen=True)
class Issuer:
    """A CA: ``name`` is its slug in URLs, ``key`` is None where the private key is kept elsewhere.

    Raises ``IssuerUnusable`` where the certificate is not that of a CA, ``CaKeyUnavailable`` where the key does not
    belong to it.
    """

    name: str
    certificate: x509.Certificate
    key: PrivateKey | None = field(default=None, repr=False)
    public_key_der: bytes = field(init=False, repr=False, compare=False)
    authority_key_identifier: Extension = field(init=False, repr=False, compare=False)
    signature_hash: hashes.SHA256 | hashes.SHA384 | None = field(init=False, repr=False, compare=False)
    not_before: datetime = field(init=False, compare=False)
    not_after: datetime = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not _ISSUER_NAME.fullmatch(self.name):
            raise IssuerUnusable("The name of a CA must have 1 to 63 lower-case letters, digits and inner hyphens.")
        public_key = check_public_key(self.certificate.public_key())
        derived = {
            "public_key_der": public_key_der(public_key),
            "authority_key_identifier": _authority_key_identifier(self.name, self.certificate),
            "signature_hash": signature_hash(public_key),
            "not_before": self.certificate.not_valid_before_utc,
            "not_after": self.certificate.not_valid_after_utc,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        if self.key is not None and public_key_der(self.key.public_key()) != self.public_key_der:
            raise CaKeyUnavailable(
                f"The private key of CA {self.name} does not belong to its certificate; restore both from one backup."
            )


@dataclass(frozen=True)
class Issued:
    """A new certificate whose signature has been checked; times are aware UTC, ``pem`` ends with a newline."""

    certificate: x509.Certificate = field(repr=False)
    der: bytes = field(repr=False)
    pem: str = field(repr=False)
    serial_number: str  # 40 lower-case hex digits
    fingerprint: str  # SHA-256 of the DER, 64 lower-case hex digits
    not_before: datetime
    not_after: datetime


# --- Certificates -------------------------------------------------------------------------------------------------


def create_root(key: PrivateKey, *, common_name: str, now: datetime, days: int) -> Issued:
    """Sign the root's own certificate, valid until ``days`` after ``now``."""
    public_key = check_public_key(key.public_key())
    profile = root_profile(common_name)
    not_before = _second(now) - BACKDATING
    return _signed(
        _builder(profile, public_key, not_before=not_before, not_after=_end(now, days)).issuer_name(profile.subject),
        key,
        signature_hash(public_key),
        issuer_certificate=None,
    )


def create_issuing(
    root: Issuer, public_key: PublicKey, *, common_name: str, now: datetime, days: int, pki_url: str
) -> Issued:
    """Sign the certificate of an issuing CA, for ``days`` or as long as the root lives.

    ``pki_url`` is the base of the URLs put into certificates. Raises as ``sign_certificate`` does.
    """
    return _sign(root, public_key, issuing_profile(common_name), now=now, days=days, pki_url=pki_url)


def sign_certificate(
    issuer: Issuer, public_key: PublicKey, *, device_id: str, now: datetime, days: int, pki_url: str
) -> Issued:
    """Sign a device's certificate: TLS client, named by its UUID (RFC 5280 profile in ``ca_profiles.py``).

    Valid from five minutes before ``now`` until ``days`` after it, within the life of the issuer. Raises
    ``InputInvalid`` for an id that is no UUID, ``KeyRefused`` for a key that is not certified, ``IssuerUnusable`` where
    the issuer is out of date or its key is not here, ``SignatureCheckFailed`` where the result does not verify.
    """
    return _sign(issuer, public_key, device_profile(device_id), now=now, days=days, pki_url=pki_url)


def sign_server_certificate(
    issuer: Issuer, public_key: PublicKey, *, names: Sequence[str], now: datetime, days: int, pki_url: str
) -> Issued:
    """Sign a TLS server's certificate for DNS names and IP addresses; raises as ``sign_certificate`` does."""
    return _sign(issuer, public_key, server_profile(names), now=now, days=days, pki_url=pki_url)


def sign_responder_certificate(issuer: Issuer, public_key: PublicKey, *, now: datetime, days: int) -> Issued:
    """Sign the certificate that answers OCSP for this CA (RFC 6960 §4.2.2.2); raises as ``sign_certificate`` does."""
    return _sign(issuer, public_key, responder_profile(issuer.name), now=now, days=days, pki_url="")


def chain_pem(*certificates: x509.Certificate) -> str:
    """Write certificates as PEM, one after the other: the leaf first (RFC 8446 §4.4.2)."""
    return "".join(certificate.public_bytes(Encoding.PEM).decode("ascii") for certificate in certificates)


def _sign(issuer: Issuer, public_key: PublicKey, profile: Profile, *, now: datetime, days: int, pki_url: str) -> Issued:
    key = _signing_key(issuer)
    moment = _second(now)
    if not issuer.not_before <= moment < issuer.not_after:
        raise IssuerUnusable(
            f"The CA {issuer.name} is valid only from {issuer.not_before:%Y-%m-%d %H:%M}"
            f" to {issuer.not_after:%Y-%m-%d %H:%M} UTC; check the clock, or make a new CA."
        )
    public_key = check_public_key(public_key)
    if public_key_der(public_key) == issuer.public_key_der:
        raise KeyRefused("The public key is the CA's own. Make a new key pair.")
    builder = _builder(
        profile,
        public_key,
        issuer.authority_key_identifier,
        *locations(pki_url, issuer.name, profile.revocation),
        not_before=max(moment - BACKDATING, issuer.not_before),
        not_after=min(_end(now, days), issuer.not_after),
    )
    return _signed(
        builder.issuer_name(issuer.certificate.subject),
        key,
        issuer.signature_hash,
        issuer_certificate=issuer.certificate,
    )


def _builder(
    profile: Profile, public_key: PublicKey, *extensions: Extension, not_before: datetime, not_after: datetime
) -> x509.CertificateBuilder:
    key_identifier = extension(x509.SubjectKeyIdentifier.from_public_key(public_key))
    return (
        x509.CertificateBuilder(extensions=[*profile.extensions, key_identifier, *extensions])
        .subject_name(profile.subject)
        .public_key(public_key)
        .serial_number(_new_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )


def _signed(
    builder: x509.CertificateBuilder,
    key: PrivateKey,
    algorithm: hashes.SHA256 | hashes.SHA384 | None,
    *,
    issuer_certificate: x509.Certificate | None,
) -> Issued:
    """Sign, then read back what is to be released and verify it under the issuer's certificate (its own if None)."""
    der = builder.sign(key, algorithm).public_bytes(Encoding.DER)
    certificate = x509.load_der_x509_certificate(der)
    try:
        certificate.verify_directly_issued_by(issuer_certificate or certificate)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise SignatureCheckFailed(
            "A new certificate did not verify under its issuer and was thrown away; check the machine and the CA's key."
        ) from error
    return Issued(
        certificate=certificate,
        der=der,
        pem=certificate.public_bytes(Encoding.PEM).decode("ascii"),
        serial_number=f"{certificate.serial_number:x}",
        fingerprint=hashlib.sha256(der).hexdigest(),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


# --- Revocation ---------------------------------------------------------------------------------------------------


def revoke_certificate(serial_number: str, revoked_at: datetime, reason: Reason) -> x509.RevokedCertificate:
    """Make the CRL entry of a certificate (RFC 5280 §5.3); it can be kept, and stand in many CRLs.

    ``serial_number`` is lower-case hex, ``revoked_at`` is cut to whole seconds.
    """
    if not _SERIAL_NUMBER.fullmatch(serial_number):
        raise ValueError("a serial number is 1 to 40 lower-case hex digits")
    return (
        x509.RevokedCertificateBuilder(extensions=_REASON_EXTENSIONS[reason])
        .serial_number(int(serial_number, 16))
        .revocation_date(_second(revoked_at))
        .build()
    )


def sign_crl(
    issuer: Issuer,
    revoked: Iterable[x509.RevokedCertificate],
    *,
    number: int,
    this_update: datetime,
    next_update: datetime,
) -> bytes:
    """Sign a full v2 CRL (RFC 5280 §5), as DER; ``number`` must grow from one to the next.

    An issuer that is out of date still signs: revoking is never refused. Raises ``IssuerUnusable`` where the
    issuer's key is not here, ``SignatureCheckFailed`` where the result does not verify.
    """
    key = _signing_key(issuer)
    if not 0 < number < 1 << _SERIAL_BITS:
        raise ValueError("a CRL number is positive and has 20 bytes at most (RFC 5280 §5.2.3)")
    begin, end = _second(this_update), _second(next_update)
    if not begin < end:
        raise ValueError("nextUpdate must come after thisUpdate")
    entries = list(revoked)
    # The entries go in at once: add_revoked_certificate() copies its list at every call.
    der = (
        x509.CertificateRevocationListBuilder(
            extensions=[issuer.authority_key_identifier, extension(x509.CRLNumber(number))],
            revoked_certificates=entries,
        )
        .issuer_name(issuer.certificate.subject)
        .last_update(begin)
        .next_update(end)
        .sign(key, issuer.signature_hash)
        .public_bytes(Encoding.DER)
    )
    crl = x509.load_der_x509_crl(der)
    issuer_public_key = check_public_key(issuer.certificate.public_key())
    if not crl.is_signature_valid(issuer_public_key) or len(crl) != len(entries):
        raise SignatureCheckFailed(
            "A new CRL did not verify under its issuer and was thrown away; check the machine and the CA's key."
        )
    return der


# --- Shared -------------------------------------------------------------------------------------------------------


def _signing_key(issuer: Issuer) -> PrivateKey:
    if issuer.key is None:
        raise IssuerUnusable(f"The private key of CA {issuer.name} is not on this machine, so it cannot sign.")
    return issuer.key


def _authority_key_identifier(name: str, certificate: x509.Certificate) -> Extension:
    """Make the AKI of what this CA signs (RFC 5280 §4.2.1.1), after making sure that it may sign at all."""
    try:
        extensions = certificate.extensions
        may_sign = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        key_identifier = extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise IssuerUnusable(f"The certificate of CA {name} is not that of a CA.") from error
    if not (may_sign and usage.key_cert_sign and usage.crl_sign):
        raise IssuerUnusable(f"The certificate of CA {name} does not allow it to sign certificates and CRLs.")
    return extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_identifier))


def _new_serial_number() -> int:
    """Draw 158 random bits below a one: always 20 bytes, never zero, 40 hex digits in every tool."""
    return 1 << (_SERIAL_BITS - 1) | secrets.randbits(_SERIAL_BITS - 1)


def _end(now: datetime, days: int) -> datetime:
    if days < 1:
        raise ValueError("a certificate lives at least one day")
    return _second(now) + timedelta(days=days)


def _second(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError("times must be aware")
    return moment.astimezone(UTC).replace(microsecond=0)
