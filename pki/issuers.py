"""What a certificate authority is: its certificate with the key that signs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from core.errors import CaKeyUnavailable, IssuerUnusable
from pki.algorithms import PrivateKey, check_public_key, public_key_der, signature_hash
from pki.profiles import Extension, extension

SERIAL_BITS = 159  # with the sign bit, 20 bytes: the most that RFC 5280 §4.1.2.2 allows
_ISSUER_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


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


def signing_key(issuer: Issuer) -> PrivateKey:
    """The issuer's private key; raises ``IssuerUnusable`` where it is not on this machine."""
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


def whole_second(moment: datetime) -> datetime:
    """A time in UTC cut to whole seconds, as certificates and CRLs hold it; raises ``ValueError`` where it is naive."""
    if moment.tzinfo is None:
        raise ValueError("times must be aware")
    return moment.astimezone(UTC).replace(microsecond=0)
